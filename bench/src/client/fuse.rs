//! The part of the FUSE protocol that the client speaks (`include/uapi/linux/fuse.h`, version 7.41).
//!
//! Written down again here, and not taken from the server, so that a mistake in one is not shared by the other.
//! Structs have the kernel's names in Rust's spelling, and the machine's byte order, which is the guest's.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Node of the export's root.
pub const ROOT_ID: u64 = 1;

/// Protocol version of a Linux 6.12 guest.
pub const VERSION: (u32, u32) = (7, 41);

/// `O_DIRECT` of x86-64 Linux, in the flags of OPEN, READ and WRITE.
pub const O_DIRECT: u32 = 0o40000;
/// `O_RDWR`.
pub const O_RDWR: u32 = 0o2;
/// `O_CREAT`.
pub const O_CREAT: u32 = 0o100;
/// `S_IFREG`.
pub const S_IFREG: u32 = 0o100_000;

/// `ENOENT`: there is no such name.
pub const ENOENT: i32 = 2;
/// `EEXIST`: there is such a name already.
pub const EEXIST: i32 = 17;
/// `ENOSYS`: the server does not serve this operation, and wants not to be asked again.
pub const ENOSYS: i32 = 38;

macro_rules! opcodes {
    ($($name:ident = $value:literal),* $(,)?) => {
        /// Operation of a request.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u32)]
        #[expect(missing_docs, reason = "the protocol's own names")]
        pub enum Opcode { $($name = $value),* }
    };
}

opcodes! {
    Lookup = 1, Getattr = 3, Mkdir = 9, Unlink = 10, Open = 14, Read = 15, Write = 16, Release = 18, Fsync = 20,
    Init = 26, Opendir = 27, Releasedir = 29, Create = 35, BatchForget = 42,
}

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {
        $($(#[$doc])*
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
        #[repr(C)]
        #[expect(missing_docs, reason = "the protocol's own names")]
        pub struct $name { $(pub $field: $kind),* })*
    };
}

wire! {
    /// Start of every request.
    InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, total_extlen: u16,
        padding: u16,
    }
    /// Start of every reply; `error` is 0 or a negative errno.
    OutHeader { len: u32, error: i32, unique: u64 }
    /// Version and wishes of the guest.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11] }
    /// What the server grants.
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        request_timeout: u16, unused: [u16; 11],
    }
    /// Attributes of a node.
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// A node that a name leads to.
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32,
        attr_valid_nsec: u32, attr: Attr,
    }
    /// Arguments of GETATTR.
    GetattrIn { getattr_flags: u32, dummy: u32, fh: u64 }
    /// Attributes as an answer.
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }
    /// Arguments of MKDIR, before the name.
    MkdirIn { mode: u32, umask: u32 }
    /// Arguments of OPEN and OPENDIR.
    OpenIn { flags: u32, open_flags: u32 }
    /// An open file or directory.
    OpenOut { fh: u64, open_flags: u32, backing_id: i32 }
    /// Arguments of CREATE, before the name.
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32 }
    /// Answer of CREATE.
    CreateOut { entry: EntryOut, open: OpenOut }
    /// Arguments of READ.
    ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    /// Arguments of WRITE.
    WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    /// Answer of WRITE.
    WriteOut { size: u32, padding: u32 }
    /// Arguments of RELEASE and RELEASEDIR.
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    /// Arguments of FSYNC.
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32 }
    /// Arguments of BATCH_FORGET, before its list.
    BatchForgetIn { count: u32, dummy: u32 }
    /// One node of BATCH_FORGET.
    ForgetOne { nodeid: u64, nlookup: u64 }
    /// Start of the security context that follows a create, when both sides know of it.
    SecctxHeader { size: u32, nr_secctx: u32 }
}

/// READDIRPLUS answers with attributes.
pub const DO_READDIRPLUS: u64 = 1 << 13;
/// The guest caches writes.
pub const WRITEBACK_CACHE: u64 = 1 << 16;
/// The guest can do without OPEN.
pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
/// `max_pages` counts.
pub const MAX_PAGES: u64 = 1 << 22;
/// The guest can do without OPENDIR.
pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
/// `flags2` counts.
pub const INIT_EXT: u64 = 1 << 30;
/// A security context follows each create.
pub const SECURITY_CTX: u64 = 1 << 32;

/// Flags of a Linux 6.12 guest (`fuse_send_init`), both words. Left out: what needs a DAX window or a host.
pub const GUEST_FLAGS: u64 = {
    let low = 0b1111_1111 // async read ... splice write (bits 0-7)
        | 1 << 8 // splice move
        | 1 << 9 // splice read
        | 1 << 10 // flock locks
        | 1 << 11 // ioctl on directories
        | 1 << 12 // automatic invalidation of data
        | DO_READDIRPLUS
        | 1 << 14 // adaptive readdirplus
        | 1 << 15 // asynchronous direct I/O
        | WRITEBACK_CACHE
        | NO_OPEN_SUPPORT
        | 1 << 18 // parallel directory operations
        | 1 << 19 // killpriv
        | 1 << 20 // POSIX ACLs
        | 1 << 21 // error of aborted connections
        | MAX_PAGES
        | 1 << 23 // cached symbolic links
        | NO_OPENDIR_SUPPORT
        | 1 << 25 // explicit invalidation of data
        | 1 << 27 // submounts
        | 1 << 28 // killpriv v2
        | 1 << 29 // extended SETXATTR
        | INIT_EXT;
    let high = SECURITY_CTX
        | 1 << 34 // supplementary group on create
        | 1 << 35 // expire-only invalidation
        | 1 << 36 // shared mappings of direct files
        | 1 << 38 // no export
        | 1 << 39; // resent requests
    low | high
};

/// Bytes of a value on the wire.
pub fn bytes<T: IntoBytes + Immutable>(value: &T) -> &[u8] {
    value.as_bytes()
}

const _: () = {
    assert!(size_of::<InHeader>() == 40);
    assert!(size_of::<OutHeader>() == 16);
    assert!(size_of::<InitIn>() == 64 && size_of::<InitOut>() == 64);
    assert!(size_of::<EntryOut>() == 128 && size_of::<AttrOut>() == 104);
    assert!(size_of::<ReadIn>() == 40 && size_of::<WriteIn>() == 40);
};
