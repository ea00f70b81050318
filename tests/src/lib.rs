//! Harness for tests of the whole system: a real daemon, real guest kernels, real programs in them.
//!
//! | module | provides |
//! |---|---|
//! | [`artifacts`] | where everything a guest is made of lies on this machine |
//! | [`daemon`] | a file service process: started, watched, stopped, killed |
//! | [`qemu`] | a Debian cloud kernel under QEMU: one command at a time, with its exit status |
//! | [`uml`] | User-Mode Linux over the host's own tree: one script per boot, near native speed |
//! | [`process`], [`progress`] | child processes that cannot outlive us; steps that print their time |
//! | [`cases`] | the tests themselves, by name |
//!
//! The library installs nothing and builds nothing: `cargo xtask` does, and passes an [`artifacts::Artifacts`].
//!
//! Rules that every part keeps:
//!
//! - Everything that waits has a time limit; a guest that hangs is a failure with a message, never a stuck run.
//! - Whatever a process printed is in a `*.log` file of the case's scratch folder, so a failure can show it.
//! - A case that cannot run fails. Nothing is skipped: what needs root runs through sudo, or fails.

pub mod artifacts;
pub mod cases;
pub mod daemon;
pub mod process;
pub mod progress;
pub mod qemu;
pub mod uml;
