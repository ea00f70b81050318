//! `cargo xtask crash`: the crash tests of blobfs, for as long as one likes.

use crate::build;

/// Options of `cargo xtask crash`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How long to go on.
    #[arg(long, value_name = "N")]
    seconds: u64,
    /// The first seed; a failure names the one that repeats it.
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

/// Runs the campaign. A broken promise is an error.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let mut command = build::cargo();
    command
        .args(["test", "--package", "blobfs", "--test", "simulation", "--", "--nocapture"])
        .args(["crash::", "sequences::every_pair"])
        .env("VHOSTFS_CRASH_SECONDS", options.seconds.to_string())
        .env("VHOSTFS_CRASH_SEED", options.seed.to_string());
    build::run_shown(&mut command)
}
