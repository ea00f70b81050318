//! `cargo xtask bench`: the benchmark program of the `bench` package, built for release, beside its peer.

use crate::{build, setup};

/// Runs the benchmarks with the arguments given.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    let virtiofsd = setup::ensure_peer()?;
    build::programs()?;
    let mut command = build::cargo();
    command.args(["run", "--release", "--quiet", "--package", "vhostfs-bench", "--", "--peer"]);
    build::run_shown(command.arg(virtiofsd).args(arguments))
}
