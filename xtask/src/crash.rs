//! `cargo xtask crash`: power cuts and failing devices on a simulated disk, for as long as one likes.

use std::{os::unix::process::CommandExt as _, process::Command};

use anyhow::Context as _;

use crate::build;

/// Arguments of `cargo xtask crash`, passed on to the simulation.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

/// Builds the simulation for release and becomes it: signals and exit status are its own.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    Err(simulation()?.args(&options.arguments).exec()).context("start the simulation")
}

/// The simulation, built for release; it is told which commit it tests.
pub(crate) fn simulation() -> anyhow::Result<Command> {
    build::run_shown(build::cargo().args(["build", "--release", "--quiet", "--package", "simulation"]))?;
    let mut command = Command::new(build::target_dir().join("release/simulation"));
    command.args(["--commit", &commit()]);
    // Each state takes and gives back a few megabytes; giving them back to the kernel costs a fifth of the time.
    command.env("MIMALLOC_PURGE_DELAY", "-1");
    Ok(command)
}

/// The commit that is checked out, with a mark when files differ from it.
fn commit() -> String {
    let described = Command::new("git")
        .args(["describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])
        .current_dir(build::workspace())
        .output();
    match described {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}
