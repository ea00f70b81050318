//! The table of opcodes.

use crate::Handled;
use crate::abi::*;
use crate::errno::Errno;
use crate::map::{attr, data, dir, misc, name, xattr};
use crate::session::Call;

/// What is to be done for an opcode.
#[derive(Clone, Copy)]
pub(crate) enum Op {
    /// Served by a function.
    Answered {
        /// The function.
        run: fn(&Call<'_>) -> Result<Handled, Errno>,
        /// Bytes that the body of a reply takes at least. Checked first: nothing is done that cannot be
        /// answered.
        room: usize,
        /// Whether it changes the file system: refused on a read-only export.
        changes: bool,
    },
    /// Served without a reply.
    OneWay(fn(&Call<'_>)),
    /// Not served, for this reason.
    Refused(i32),
}

/// Whether nobody waits for a reply.
pub(crate) fn is_one_way(opcode: u32) -> bool {
    matches!(find(opcode), Op::OneWay(_))
}

/// One line per opcode: number, name, and how it is served.
macro_rules! opcodes {
    ($($number:literal $name:ident $kind:ident ($($argument:expr),*);)*) => {
        $(#[allow(dead_code, reason = "the kernel's names; tests use some")]
        pub(crate) const $name: u32 = $number;)*

        /// How an opcode is served. Unknown ones are refused as the protocol asks.
        pub(crate) fn find(opcode: u32) -> Op {
            match opcode {
                $($name => opcodes!(@$kind $($argument),*),)*
                _ => Op::Refused(libc::ENOSYS),
            }
        }
    };
    (@read $run:expr, $room:expr) => { Op::Answered { run: $run, room: $room, changes: false } };
    (@change $run:expr, $room:expr) => { Op::Answered { run: $run, room: $room, changes: true } };
    (@one_way $run:expr) => { Op::OneWay($run) };
    (@refused $errno:expr) => { Op::Refused($errno) };
}

opcodes! {
    1 FUSE_LOOKUP read(name::lookup, size_of::<fuse_entry_out>());
    2 FUSE_FORGET one_way(name::forget);
    3 FUSE_GETATTR read(attr::getattr, size_of::<fuse_attr_out>());
    4 FUSE_SETATTR change(attr::setattr, size_of::<fuse_attr_out>());
    5 FUSE_READLINK read(name::readlink, 0);
    6 FUSE_SYMLINK change(name::symlink, size_of::<fuse_entry_out>());
    8 FUSE_MKNOD change(name::mknod, size_of::<fuse_entry_out>());
    9 FUSE_MKDIR change(name::mkdir, size_of::<fuse_entry_out>());
    10 FUSE_UNLINK change(name::unlink, 0);
    11 FUSE_RMDIR change(name::rmdir, 0);
    12 FUSE_RENAME change(name::rename, 0);
    13 FUSE_LINK change(name::link, size_of::<fuse_entry_out>());
    14 FUSE_OPEN read(misc::open, size_of::<fuse_open_out>());
    15 FUSE_READ read(data::read, 0);
    16 FUSE_WRITE change(data::write, size_of::<fuse_write_out>());
    17 FUSE_STATFS read(misc::statfs, size_of::<fuse_kstatfs>());
    18 FUSE_RELEASE read(misc::done, 0);
    20 FUSE_FSYNC read(data::fsync, 0);
    21 FUSE_SETXATTR change(xattr::set, 0);
    22 FUSE_GETXATTR read(xattr::get, 0);
    23 FUSE_LISTXATTR read(xattr::list, 0);
    24 FUSE_REMOVEXATTR change(xattr::remove, 0);
    25 FUSE_FLUSH read(misc::flush, 0);
    26 FUSE_INIT read(misc::init, size_of::<fuse_init_out>());
    27 FUSE_OPENDIR read(misc::opendir, size_of::<fuse_open_out>());
    28 FUSE_READDIR read(dir::readdir, 0);
    29 FUSE_RELEASEDIR read(misc::done, 0);
    30 FUSE_FSYNCDIR read(data::fsync, 0);
    34 FUSE_ACCESS refused(libc::ENOSYS);
    35 FUSE_CREATE change(name::create, size_of::<fuse_create_out>());
    36 FUSE_INTERRUPT refused(libc::ENOSYS);
    38 FUSE_DESTROY read(misc::destroy, 0);
    39 FUSE_IOCTL refused(libc::ENOTTY);
    42 FUSE_BATCH_FORGET one_way(name::batch_forget);
    43 FUSE_FALLOCATE change(data::fallocate, 0);
    44 FUSE_READDIRPLUS read(dir::readdirplus, 0);
    45 FUSE_RENAME2 change(name::rename2, 0);
    46 FUSE_LSEEK read(data::lseek, size_of::<fuse_lseek_out>());
    47 FUSE_COPY_FILE_RANGE refused(libc::EOPNOTSUPP);
    50 FUSE_SYNCFS read(data::syncfs, 0);
    51 FUSE_TMPFILE change(name::tmpfile, size_of::<fuse_create_out>());
    52 FUSE_STATX read(attr::statx, size_of::<fuse_statx_out>());
    53 FUSE_COPY_FILE_RANGE_64 refused(libc::EOPNOTSUPP);
}
