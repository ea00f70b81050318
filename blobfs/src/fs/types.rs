//! What the public calls take and give.

use crate::ondisk::Timestamp;
use crate::units::InodeId;

/// Number of a client's session, given by `Fs::open_session`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// Who calls, and for what: part of every call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Context {
    /// The client's session.
    pub session: SessionId,
    /// The client's number for the request (FUSE `unique`).
    pub request: u64,
    /// User of the calling process.
    pub uid: u32,
    /// Group of the calling process.
    pub gid: u32,
    /// Calling process.
    pub pid: u32,
    /// A supplementary group of the caller, sent when it is that of the directory in which an inode is made:
    /// a member may make set-group-id programs for it (FUSE `FUSE_EXT_GROUPS`).
    pub supplementary_gid: Option<u32>,
}

/// Attributes of an inode, as `stat` and `statx` show them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub inode: InodeId,
    /// Type and permission bits.
    pub mode: u32,
    /// Number of names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device node.
    pub rdev: u32,
    /// Size in bytes.
    pub size: u64,
    /// Allocated space in units of 512 bytes.
    pub sectors: u64,
    /// Preferred I/O size in bytes.
    pub block_size: u32,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of the content.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// Birth.
    pub btime: Timestamp,
}

/// A time in a [`SetAttr`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The time of the call.
    Now,
    /// This time.
    At(Timestamp),
}

/// Attributes to change; `None` leaves one as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetAttr {
    /// Permission bits (type bits are ignored).
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Truncates or extends.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of the content.
    pub mtime: Option<SetTime>,
    /// Last change of the inode (a write-back client sets it).
    pub ctime: Option<Timestamp>,
    /// Drop set-user-id, set-group-id and capabilities, because the caller may not keep them.
    pub kill_privileges: bool,
}

/// What a new inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewNode<'a> {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link with its target.
    Symlink(&'a [u8]),
    /// A device node, FIFO or socket: `S_IF*` bits and device number.
    Special {
        /// `S_IFCHR`, `S_IFBLK`, `S_IFIFO` or `S_IFSOCK`.
        file_type: u32,
        /// Device number in the kernel's 32-bit encoding.
        rdev: u32,
    },
}

/// How an inode is created.
#[derive(Debug, Clone, Copy)]
pub struct CreateSpec<'a> {
    /// What it is.
    pub node: NewNode<'a>,
    /// Permission bits, before the default ACL or the umask is applied.
    pub mode: u32,
    /// The caller's umask, applied when the directory has no default ACL.
    pub umask: u32,
    /// Security attributes (name, value) that are set in the same transaction.
    pub security: &'a [(&'a [u8], &'a [u8])],
}

/// An entry that a client now knows: its lookup count has grown by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Attributes; the inode number is the node id.
    pub attr: Attr,
}

/// One entry of a directory scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The inode.
    pub inode: InodeId,
    /// `DT_*`.
    pub file_type: u8,
    /// Name, 1 to 255 bytes.
    pub name: &'a [u8],
    /// Where a scan resumes behind this entry; stable as long as the entry exists; below 2^63.
    pub cookie: u64,
}

/// How `rename` treats an existing target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RenameMode {
    /// Replace it.
    #[default]
    Replace,
    /// Fail with [`crate::FsError::Exists`].
    NoReplace,
    /// Both must exist and change places.
    Exchange,
}

/// How `set_xattr` treats an existing attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum XattrMode {
    /// Create or replace.
    #[default]
    Set,
    /// Fail with [`crate::FsError::Exists`] when it exists.
    Create,
    /// Fail with [`crate::FsError::NoAttribute`] when it does not.
    Replace,
}

/// What `fallocate` does with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FallocateMode {
    /// Allocate blocks for holes; existing data stays.
    Allocate {
        /// Do not extend the file.
        keep_size: bool,
    },
    /// Free the blocks: the range reads as zeros; the size stays.
    PunchHole,
    /// Make the range read as zeros, blocks allocated.
    Zero {
        /// Do not extend the file.
        keep_size: bool,
    },
}

/// What `seek` looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeekTarget {
    /// The next byte that is stored (`SEEK_DATA`).
    Data,
    /// The next hole, or the end of the file (`SEEK_HOLE`).
    Hole,
}

/// How a read or write goes to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IoFlags {
    /// Bypass the data cache (`O_DIRECT`), coherent with it.
    pub direct: bool,
    /// Append: the offset is the end of the file.
    pub append: bool,
    /// Complete only when data (and the size) are durable (`O_DSYNC`).
    pub dsync: bool,
    /// Complete only when data and attributes are durable (`O_SYNC`).
    pub sync: bool,
    /// Written back from the client's own cache: changes no times, and no set-id bits.
    pub from_cache: bool,
    /// Drop set-user-id, set-group-id and capabilities (FUSE `WRITE_KILL_SUIDGID`).
    pub kill_privileges: bool,
}

impl IoFlags {
    /// The same for a later part of an operation: the first one has given the file its times.
    pub(crate) fn without_times(self) -> Self {
        Self { from_cache: true, ..self }
    }
}

/// What `statfs` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatFs {
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks, reservations subtracted.
    pub free: u64,
    /// Inodes in all (an estimate: inodes are made of space).
    pub inodes: u64,
    /// Inodes that can still be made.
    pub free_inodes: u64,
    /// Longest name in bytes.
    pub name_len_max: u32,
}
