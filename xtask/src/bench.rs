//! `cargo xtask bench`: the benchmark program of the `bench` package, built for release.

use crate::build;

/// Runs the benchmarks with the arguments given.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    build::programs()?;
    build::run_shown(
        build::cargo().args(["run", "--release", "--package", "vhostfs-bench", "--"]).args(arguments),
    )
}
