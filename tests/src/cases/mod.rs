//! The tests that run in guests, by name. `cargo xtask test` runs all of them, `--only NAME` one.
//!
//! A case gets a scratch folder of its own, starts its own daemon, and leaves none behind. It fails by returning
//! an error that says what was expected; the runner adds the end of every log in the scratch folder.

use std::path::Path;

use crate::artifacts::Artifacts;

mod applications;
mod fio;
mod fsx;
mod idle;
mod kills;
mod limits;
mod pjdfstest;
mod sessions;
mod tree;

pub use tree::{CHECKSUM_LIST, unpack_script, verify_script};

/// How much work the cases with a repeat count do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Minutes: what CI runs.
    Short,
    /// The full counts.
    Long,
}

/// What a case works with.
#[derive(Debug)]
pub struct CaseContext<'a> {
    /// Kernels, programs, sources and the server under test.
    pub artifacts: &'a Artifacts,
    /// Folder for the image, sockets and logs of this case alone.
    pub scratch: &'a Path,
    /// Amount of work.
    pub scale: Scale,
}

/// One test in a guest.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// Name for `--only` and the summary.
    pub name: &'static str,
    /// What it shows, in one line.
    pub about: &'static str,
    /// The test.
    pub run: fn(&CaseContext<'_>) -> anyhow::Result<()>,
}

/// All cases, quick ones first.
pub const CASES: &[Case] = &[
    sessions::ONCE,
    sessions::REBIND,
    sessions::REBOOT,
    sessions::KILLED_GUEST,
    idle::IDLE,
    limits::LIMITS,
    limits::FULL,
    pjdfstest::PJDFSTEST,
    applications::C_PROJECT,
    applications::GIT,
    applications::SQLITE,
    fio::FIO_VERIFY,
    fsx::FSX,
    fsx::FSX_MMAP,
    sessions::STOP,
    sessions::KILLED_DAEMON,
    sessions::RESETS,
    kills::KILLS,
];
