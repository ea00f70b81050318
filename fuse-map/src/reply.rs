//! Replies: their values in the wire's form, and their way into the client's memory.

use bdev::IoBuffers;
use blobfs::fs::types::{Attr, StatFs};
use blobfs::ondisk::Timestamp;
use zerocopy::IntoBytes;

use crate::abi::*;
use crate::errno::Errno;

/// Length of the header that every reply begins with.
pub(crate) const HEADER_LEN: usize = size_of::<fuse_out_header>();

/// Where a request's reply goes. `writable` has room for a header.
#[derive(Clone, Copy)]
pub(crate) struct Reply<'a> {
    pub(crate) writable: &'a IoBuffers,
    pub(crate) unique: u64,
}

impl Reply<'_> {
    /// Bytes of the reply's body that find room.
    pub(crate) fn room(&self) -> usize {
        self.writable.len() - HEADER_LEN
    }

    /// An error.
    pub(crate) fn error(&self, errno: Errno) -> usize {
        self.header(-errno.0, 0)
    }

    /// Success, with `len` bytes of a body that already lies behind the header.
    pub(crate) fn body_in_place(&self, len: usize) -> usize {
        self.header(0, len)
    }

    /// Success with this body; an error if it does not find room.
    pub(crate) fn bytes(&self, body: &[u8]) -> usize {
        if body.len() > self.room() {
            return self.error(Errno::INVALID);
        }
        self.writable.copy_from(HEADER_LEN, body);
        self.header(0, body.len())
    }

    /// Success with a struct as its body.
    pub(crate) fn value(&self, value: &(impl IntoBytes + zerocopy::Immutable)) -> usize {
        self.bytes(value.as_bytes())
    }

    fn header(&self, error: i32, body_len: usize) -> usize {
        let len = HEADER_LEN + body_len;
        let header = fuse_out_header { len: len as u32, error, unique: self.unique };
        self.writable.copy_from(0, header.as_bytes());
        len
    }
}

/// `struct fuse_attr` of an inode that the client knows by `nodeid`.
pub(crate) fn attr(nodeid: u64, attr: &Attr) -> fuse_attr {
    fuse_attr {
        ino: nodeid,
        size: attr.size,
        blocks: attr.sectors,
        atime: attr.atime.seconds.cast_unsigned(),
        mtime: attr.mtime.seconds.cast_unsigned(),
        ctime: attr.ctime.seconds.cast_unsigned(),
        atimensec: attr.atime.nanoseconds,
        mtimensec: attr.mtime.nanoseconds,
        ctimensec: attr.ctime.nanoseconds,
        mode: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: attr.rdev,
        blksize: attr.block_size,
        flags: 0,
    }
}

/// `struct fuse_statx`, with every basic field and the birth time.
pub(crate) fn statx(nodeid: u64, attr: &Attr) -> fuse_statx {
    fuse_statx {
        mask: libc::STATX_BASIC_STATS | libc::STATX_BTIME,
        blksize: attr.block_size,
        attributes: 0,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        mode: attr.mode as u16,
        spare0: 0,
        ino: nodeid,
        size: attr.size,
        blocks: attr.sectors,
        attributes_mask: 0,
        atime: sx_time(attr.atime),
        btime: sx_time(attr.btime),
        ctime: sx_time(attr.ctime),
        mtime: sx_time(attr.mtime),
        // The kernel's 32-bit encoding (`new_encode_dev`): 12 bits of major between 20 bits of minor.
        rdev_major: (attr.rdev >> 8) & 0xfff,
        rdev_minor: (attr.rdev & 0xff) | ((attr.rdev >> 12) & 0xf_ff00),
        dev_major: 0,
        dev_minor: 0,
        spare2: [0; 14],
    }
}

fn sx_time(time: Timestamp) -> fuse_sx_time {
    fuse_sx_time { tv_sec: time.seconds, tv_nsec: time.nanoseconds, reserved: 0 }
}

/// `struct fuse_statfs_out`.
pub(crate) fn statfs(stat: &StatFs) -> fuse_kstatfs {
    fuse_kstatfs {
        blocks: stat.blocks,
        bfree: stat.free,
        bavail: stat.free,
        files: stat.inodes,
        ffree: stat.free_inodes,
        bsize: stat.block_size,
        namelen: stat.name_len_max,
        frsize: stat.block_size,
        padding: 0,
        spare: [0; 6],
    }
}
