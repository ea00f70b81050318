//! fsx: random operations on one file, every read compared with what must be there; with mapped I/O and without.

use std::time::Duration;

use anyhow::ensure;

use super::{Case, CaseContext, Scale};
use crate::{artifacts::MOUNT_POINT, daemon::Daemon, qemu::Echo, uml::UmlGuest};

pub(super) const FSX: Case = Case {
    name: "fsx",
    about: "random reads, writes, truncates, punches and syncs of a file, each read compared",
    run: |context| run(context, "mapread = 0\nmapwrite = 0\n"),
};

pub(super) const FSX_MMAP: Case = Case {
    name: "fsx-mmap",
    about: "the same mixed with reads and writes through mmap",
    run: |context| run(context, "mapread = 1\nmapwrite = 1\n"),
};

/// Operations on a file of up to 64 KiB, at most 8 KiB each: small, so that they meet each other often.
///
/// Weights beside those of mapped I/O. Syncs and cache drops are rarer than the rest, or nothing would stay cached.
const CONFIGURATION: &str = "flen = 65536\n[opsize]\nmax = 8192\n[weights]\nread = 1\nwrite = 1\ntruncate = 0.5\n\
    punch_hole = 0.5\nposix_fallocate = 0.3\nsendfile = 0.2\ncopy_file_range = 0.2\nclose_open = 0.2\n\
    invalidate = 0.2\nfsync = 0.05\nfdatasync = 0.05\n";

/// The seed is fixed: a failure repeats. Long runs take others by changing it.
const SEED: u32 = 20_117;

fn run(context: &CaseContext<'_>, mapped_weights: &str) -> anyhow::Result<()> {
    let operations = match context.scale {
        Scale::Short => 100_000,
        Scale::Long => 1_000_000,
    };
    let daemon = Daemon::start(&context.artifacts.server, context.scratch, "fs", "1G", &[])?;
    let fsx = context.artifacts.fsx.display();
    let script = format!(
        "set -e; cd /mnt/tmp\n\
         cat >fsx.toml <<'END'\n{CONFIGURATION}{mapped_weights}END\n\
         {fsx} -f fsx.toml -N {operations} -S {SEED} -P /mnt/tmp {MOUNT_POINT}/file 2>&1\n"
    );
    let limit = Duration::from_secs(120 + operations / 200);
    let output = UmlGuest::new(daemon.socket()).run(context.scratch, "fsx", &script, Echo::Quiet, limit)?;
    ensure!(output.contains("All operations completed A-OK!"), "fsx ended without its last line: {output}");
    daemon.stop_and_check()
}
