//! Why a call did not succeed: it has to wait, or it failed.

use bdev::BdevError;

use crate::store::NodeRef;
use crate::units::InodeId;

/// What a call waits for. Satisfied by `Fs::wait`; nothing was changed when a call returns one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wait {
    /// Tree nodes that are not in the node cache: all those that are known to be needed.
    Nodes(Vec<NodeRef>),
    /// A journal commit (room in the open block, or freed blocks that become durable).
    Commit,
    /// A checkpoint (journal full, too many dirty nodes, or tree blocks that become free).
    Checkpoint,
    /// Freed blocks that are held back until device operations have ended, or by a discard or commit.
    Space,
    /// The write-back of an inode's dirty pages (rename over a file, search for holes).
    WriteBack(InodeId),
    /// The inode has to be made ready to grow to this size in bytes.
    Growth(InodeId, u64),
    /// The end of data operations that hold a range lock of the inode (truncate, punch).
    Range(InodeId),
}

/// Why a call returned without a result.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// Satisfy the wait, then call again.
    Wait(Wait),
    /// The call failed; nothing was changed.
    Fail(FsError),
}

/// The result of a call that may have to wait.
pub type Try<T> = Result<T, Stop>;

impl From<FsError> for Stop {
    fn from(error: FsError) -> Self {
        Self::Fail(error)
    }
}

impl From<Wait> for Stop {
    fn from(wait: Wait) -> Self {
        Self::Wait(wait)
    }
}

/// Damage found in what the device holds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{structure} at byte {offset}: {problem}")]
pub struct Corruption {
    /// Which structure ("node", "inode item", "journal block").
    pub structure: &'static str,
    /// Where on the device, in bytes; for an item the number of its owner.
    pub offset: u64,
    /// What is wrong: expected and found.
    pub problem: String,
}

/// Why an operation failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FsError {
    /// No entry of that name, or no such attribute value.
    #[error("no such entry")]
    NotFound,
    /// The inode does not exist or the caller never looked it up.
    #[error("stale inode")]
    Stale,
    /// The name exists.
    #[error("entry exists")]
    Exists,
    /// A directory is needed.
    #[error("not a directory")]
    NotADirectory,
    /// A directory is not allowed here.
    #[error("is a directory")]
    IsADirectory,
    /// The directory has entries.
    #[error("directory not empty")]
    NotEmpty,
    /// An argument makes no sense.
    #[error("invalid argument")]
    Invalid,
    /// A name of more than 255 bytes.
    #[error("name too long")]
    NameTooLong,
    /// A file larger than the format allows.
    #[error("file too large")]
    FileTooLarge,
    /// More hard links than the format allows.
    #[error("too many links")]
    TooManyLinks,
    /// No space is left, after a forced commit and checkpoint gave none back; or a full hash bucket.
    #[error("no space left on device")]
    NoSpace,
    /// The caller lacks the right, by file system semantics (not by mode bits, which the client checks).
    #[error("operation not permitted")]
    NotPermitted,
    /// Access denied by the export (an area outside its root).
    #[error("permission denied")]
    AccessDenied,
    /// The file system or the export is read-only.
    #[error("read-only file system")]
    ReadOnly,
    /// No extended attribute of that name.
    #[error("no such attribute")]
    NoAttribute,
    /// The value does not fit the caller's buffer.
    #[error("result does not fit the buffer")]
    Range,
    /// An extended attribute or list that is larger than allowed.
    #[error("argument too large")]
    TooBig,
    /// Not available for this kind of file.
    #[error("operation not supported")]
    NotSupported,
    /// Seek behind the last data or hole.
    #[error("no data behind the offset")]
    NoData,
    /// Memory limits do not allow the operation.
    #[error("out of memory")]
    OutOfMemory,
    /// The operation was cancelled (the session ended).
    #[error("interrupted")]
    Interrupted,
    /// The device failed.
    #[error(transparent)]
    Device(#[from] BdevError),
    /// Data of a file that does not have its checksum: to its reader it is as if the device did not give it.
    #[error(transparent)]
    WrongData(Corruption),
    /// The device holds damaged data.
    #[error(transparent)]
    Corrupt(#[from] Corruption),
}
