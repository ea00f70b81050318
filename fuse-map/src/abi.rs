//! The kernel's FUSE structs and constants under their kernel names (`include/uapi/linux/fuse.h`).
//!
//! Protocol 7.31 to 7.45. Numbers are in the byte order of the client, which has that of the host: virtio-fs
//! and `/dev/fuse` both define it so.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Declares structs of the wire with their size, which is checked.
macro_rules! wire {
    ($($name:ident [$size:literal] { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        #[allow(non_camel_case_types, dead_code, reason = "the kernel's names, and its fields in full")]
        #[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub(crate) struct $name { $(pub(crate) $field: $kind),* }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

wire! {
    fuse_in_header[40] {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, total_extlen: u16,
        padding: u16,
    }
    fuse_out_header[16] { len: u32, error: i32, unique: u64 }

    fuse_init_in[16] { major: u32, minor: u32, max_readahead: u32, flags: u32 }
    fuse_init_ext_in[48] { flags2: u32, unused: [u32; 11] }
    fuse_init_out[64] {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16,
        congestion_threshold: u16, max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16,
        flags2: u32, unused: [u32; 7],
    }

    fuse_attr[88] {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32,
        mtimensec: u32, ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32,
        flags: u32,
    }
    fuse_entry_out[128] {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32,
        attr_valid_nsec: u32, attr: fuse_attr,
    }
    fuse_attr_out[104] { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: fuse_attr }
    fuse_getattr_in[16] { getattr_flags: u32, dummy: u32, fh: u64 }
    fuse_setattr_in[88] {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32,
        unused5: u32,
    }
    fuse_statx_in[24] { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32 }
    fuse_sx_time[16] { tv_sec: i64, tv_nsec: u32, reserved: i32 }
    fuse_statx[256] {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16, spare0: u16,
        ino: u64, size: u64, blocks: u64, attributes_mask: u64, atime: fuse_sx_time, btime: fuse_sx_time,
        ctime: fuse_sx_time, mtime: fuse_sx_time, rdev_major: u32, rdev_minor: u32, dev_major: u32,
        dev_minor: u32, spare2: [u64; 14],
    }
    fuse_statx_out[288] {
        attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: fuse_statx,
    }

    fuse_forget_in[8] { nlookup: u64 }
    fuse_forget_one[16] { nodeid: u64, nlookup: u64 }
    fuse_batch_forget_in[8] { count: u32, dummy: u32 }
    fuse_mknod_in[16] { mode: u32, rdev: u32, umask: u32, padding: u32 }
    fuse_mkdir_in[8] { mode: u32, umask: u32 }
    fuse_rename_in[8] { newdir: u64 }
    fuse_rename2_in[16] { newdir: u64, flags: u32, padding: u32 }
    fuse_link_in[8] { oldnodeid: u64 }
    fuse_create_in[16] { flags: u32, mode: u32, umask: u32, open_flags: u32 }
    fuse_open_in[8] { flags: u32, open_flags: u32 }
    fuse_open_out[16] { fh: u64, open_flags: u32, backing_id: i32 }
    fuse_create_out[144] { entry: fuse_entry_out, open: fuse_open_out }

    fuse_read_in[40] {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    fuse_write_in[40] {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    fuse_write_out[8] { size: u32, padding: u32 }
    fuse_fsync_in[16] { fh: u64, fsync_flags: u32, padding: u32 }
    fuse_fallocate_in[32] { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    fuse_lseek_in[24] { fh: u64, offset: u64, whence: u32, padding: u32 }
    fuse_lseek_out[8] { offset: u64 }

    fuse_setxattr_compat_in[8] { size: u32, flags: u32 }
    fuse_setxattr_in[16] { size: u32, flags: u32, setxattr_flags: u32, padding: u32 }
    fuse_getxattr_in[8] { size: u32, padding: u32 }
    fuse_getxattr_out[8] { size: u32, padding: u32 }

    fuse_kstatfs[80] {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    }
    fuse_dirent[24] { ino: u64, off: u64, namelen: u32, kind: u32 }

    fuse_ext_header[8] { size: u32, kind: u32 }
    fuse_secctx[8] { size: u32, padding: u32 }
}

pub(crate) const FUSE_KERNEL_VERSION: u32 = 7;
/// The newest minor version whose additions were looked at.
pub(crate) const FUSE_KERNEL_MINOR_VERSION: u32 = 45;
/// The oldest minor version that is served: Linux 5.4, the first with virtio-fs.
pub(crate) const MINOR_VERSION_MIN: u32 = 31;
pub(crate) const FUSE_ROOT_ID: u64 = 1;

bitflags::bitflags! {
    /// Flags of INIT, `flags` and `flags2` in one word.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct InitFlags: u64 {
        const FUSE_ASYNC_READ = 1 << 0;
        const FUSE_EXPORT_SUPPORT = 1 << 4;
        const FUSE_BIG_WRITES = 1 << 5;
        const FUSE_DONT_MASK = 1 << 6;
        const FUSE_AUTO_INVAL_DATA = 1 << 12;
        const FUSE_DO_READDIRPLUS = 1 << 13;
        const FUSE_READDIRPLUS_AUTO = 1 << 14;
        const FUSE_ASYNC_DIO = 1 << 15;
        const FUSE_WRITEBACK_CACHE = 1 << 16;
        const FUSE_NO_OPEN_SUPPORT = 1 << 17;
        const FUSE_PARALLEL_DIROPS = 1 << 18;
        const FUSE_POSIX_ACL = 1 << 20;
        const FUSE_MAX_PAGES = 1 << 22;
        const FUSE_CACHE_SYMLINKS = 1 << 23;
        const FUSE_NO_OPENDIR_SUPPORT = 1 << 24;
        const FUSE_HANDLE_KILLPRIV_V2 = 1 << 28;
        const FUSE_SETXATTR_EXT = 1 << 29;
        const FUSE_INIT_EXT = 1 << 30;
        const FUSE_SECURITY_CTX = 1 << 32;
        const FUSE_CREATE_SUPP_GROUP = 1 << 34;
        const FUSE_DIRECT_IO_ALLOW_MMAP = 1 << 36;
    }
}

bitflags::bitflags! {
    /// Which fields of SETATTR count.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) struct SetattrValid: u32 {
        const FATTR_MODE = 1 << 0;
        const FATTR_UID = 1 << 1;
        const FATTR_GID = 1 << 2;
        const FATTR_SIZE = 1 << 3;
        const FATTR_ATIME = 1 << 4;
        const FATTR_MTIME = 1 << 5;
        const FATTR_ATIME_NOW = 1 << 7;
        const FATTR_MTIME_NOW = 1 << 8;
        const FATTR_CTIME = 1 << 10;
        const FATTR_KILL_SUIDGID = 1 << 11;
    }
}

pub(crate) const FOPEN_DIRECT_IO: u32 = 1 << 0;
pub(crate) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
pub(crate) const FOPEN_CACHE_DIR: u32 = 1 << 3;
pub(crate) const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

pub(crate) const FUSE_OPEN_KILL_SUIDGID: u32 = 1 << 0;
pub(crate) const FUSE_WRITE_CACHE: u32 = 1 << 0;
pub(crate) const FUSE_WRITE_KILL_SUIDGID: u32 = 1 << 2;
pub(crate) const FUSE_FSYNC_FDATASYNC: u32 = 1 << 0;
pub(crate) const FUSE_SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

/// An extension whose kind is at most this is a list of that many security contexts.
pub(crate) const FUSE_MAX_NR_SECCTX: u32 = 31;
/// An extension with supplementary groups.
pub(crate) const FUSE_EXT_GROUPS: u32 = 32;

/// Directory entries and parts of extensions are padded to this.
pub(crate) const FUSE_REC_ALIGN: usize = 8;
