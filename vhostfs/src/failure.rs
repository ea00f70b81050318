//! How the daemon ends when something is wrong: one line and an exit status.

use std::fmt;
use std::process::ExitCode;

/// What failed, why, and what to do about it.
#[derive(Debug)]
pub(crate) struct Failure {
    what: String,
    why: String,
    advice: String,
    status: u8,
}

impl Failure {
    /// The work failed: exit status 1.
    pub(crate) fn new(what: impl Into<String>, why: impl fmt::Display, advice: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.to_string(), advice: advice.into(), status: 1 }
    }

    /// The command line is wrong: exit status 2.
    pub(crate) fn usage(what: impl Into<String>, why: impl fmt::Display) -> Self {
        let advice = "see 'vhostfs serve --help'";
        Self { status: 2, ..Self::new(what, why, advice) }
    }

    /// The work failed, with an error that already says what, why and what to do.
    pub(crate) fn complete(error: &impl fmt::Display) -> Self {
        let text = error.to_string();
        let (what, rest) = text.split_once(": ").unwrap_or(("image", &text));
        let (why, advice) = rest.rsplit_once("; ").unwrap_or((rest, "check it"));
        Self::new(what, why, advice)
    }

    /// The exit status.
    pub(crate) fn exit_code(&self) -> ExitCode {
        self.status.into()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let one_line = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        write!(f, "vhostfs: {}: {}; {}", one_line(&self.what), one_line(&self.why), self.advice)
    }
}
