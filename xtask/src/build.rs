//! Release builds of the programs under test, and where cargo puts things.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};
use vhostfs_tests::{artifacts::Server, progress::step};

/// Root of the workspace.
pub(crate) fn workspace() -> &'static Path {
    // The package is one level below the workspace; cargo gives its absolute path at compile time.
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// `cargo`, in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

/// Runs a command with its output going to the terminal; fails unless it exits 0.
pub(crate) fn run_shown(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

/// Builds `vhostfs` and `blobfs` for release.
pub(crate) fn programs() -> anyhow::Result<Server> {
    step("build vhostfs and blobfs", || {
        run_shown(cargo().args(["build", "--release", "--bin", "vhostfs", "--bin", "blobfs"]))
    })?;
    let release = target_dir().join("release");
    Ok(Server::Vhostfs { vhostfs: release.join("vhostfs"), blobfs: release.join("blobfs") })
}

/// Cargo's target folder: this program lies in `TARGET/PROFILE/xtask`.
pub(crate) fn target_dir() -> PathBuf {
    let found = env::current_exe().ok().and_then(|program| Some(program.parent()?.parent()?.to_owned()));
    found.unwrap_or_else(|| workspace().join("target"))
}
