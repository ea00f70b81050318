//! Errors of the file system as the client's error numbers.

use blobfs::FsError;

/// An error number of the kernel, positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    pub(crate) const INVALID: Self = Self(libc::EINVAL);
}

impl From<FsError> for Errno {
    fn from(error: FsError) -> Self {
        Self(match error {
            FsError::NotFound => libc::ENOENT,
            FsError::Stale => libc::ESTALE,
            FsError::Exists => libc::EEXIST,
            FsError::NotADirectory => libc::ENOTDIR,
            FsError::IsADirectory => libc::EISDIR,
            FsError::NotEmpty => libc::ENOTEMPTY,
            FsError::Invalid => libc::EINVAL,
            FsError::NameTooLong => libc::ENAMETOOLONG,
            FsError::FileTooLarge => libc::EFBIG,
            FsError::TooManyLinks => libc::EMLINK,
            FsError::NoSpace => libc::ENOSPC,
            FsError::NotPermitted => libc::EPERM,
            FsError::AccessDenied => libc::EACCES,
            FsError::ReadOnly => libc::EROFS,
            FsError::NoAttribute => libc::ENODATA,
            FsError::Range => libc::ERANGE,
            FsError::TooBig => libc::E2BIG,
            FsError::NotSupported => libc::EOPNOTSUPP,
            FsError::NoData => libc::ENXIO,
            FsError::OutOfMemory => libc::ENOMEM,
            FsError::Interrupted => libc::EINTR,
            FsError::Device(_) | FsError::WrongData(_) => libc::EIO,
            FsError::Corrupt(_) => libc::EUCLEAN,
        })
    }
}
