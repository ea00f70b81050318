//! How the tool ends when something is wrong: one line and an exit status.

use std::fmt;
use std::process::ExitCode;

/// What the exit status says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// The work failed.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// `fsck`: it could not do its work.
    FsckOperational = 8,
    /// `fsck`: the command line is wrong.
    FsckUsage = 16,
    /// `fsck`: a signal ended it.
    FsckCancelled = 32,
}

/// What failed, why, and what to do about it.
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    why: String,
    advice: String,
    status: Status,
}

impl Failure {
    /// The work failed.
    pub(crate) fn new(what: impl Into<String>, why: impl fmt::Display, advice: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.to_string(), advice: advice.into(), status: Status::Failed }
    }

    /// The work failed, with an error that already says what, why and what to do.
    pub(crate) fn complete(error: &impl fmt::Display) -> Self {
        let text = error.to_string();
        let (what, rest) = text.split_once(": ").unwrap_or(("image", &text));
        let (why, advice) = rest.rsplit_once("; ").unwrap_or((rest, "check it"));
        Self::new(what, why, advice)
    }

    /// The same with another exit status.
    pub(crate) fn with(self, status: Status) -> Self {
        Self { status, ..self }
    }

    /// The exit status.
    pub(crate) fn exit_code(&self) -> ExitCode {
        (self.status as u8).into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        write!(f, "blobfs: {}: {}; {}", one_line(&self.what), one_line(&self.why), self.advice)
    }
}
