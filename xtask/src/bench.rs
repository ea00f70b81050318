//! `cargo xtask bench`: the benchmark program of the `bench` package, built for release, beside its peer.

use crate::{build, setup};

/// Runs the benchmarks with the arguments given. A peer that they name is used instead of the one built here.
pub(crate) fn run(arguments: &[String]) -> anyhow::Result<()> {
    let mut command = build::cargo();
    command.args(["run", "--release", "--quiet", "--package", "vhostfs-bench", "--"]);
    setup::ensure_benchmark_packages()?;
    if !arguments.iter().any(|argument| argument == "--peer" || argument.starts_with("--peer=")) {
        let peer = setup::ensure_peer()?;
        command.arg("--peer").arg(peer.program);
        command.args(peer.note.map(|note| format!("--peer-note={note}")));
    }
    build::programs()?;
    build::run_shown(command.args(arguments))
}
