//! An idle file system costs next to nothing.

use std::{fs, thread::sleep, time::Duration};

use anyhow::{Context as _, ensure};

use super::{Case, CaseContext};
use crate::{
    artifacts::MOUNT_POINT,
    daemon::Daemon,
    progress::note,
    qemu::{Hardware, QemuGuest},
};

pub(super) const IDLE: Case = Case {
    name: "idle",
    about: "with a guest that mounts and does nothing, the daemon uses no CPU time and little memory",
    run,
};

/// Time for what was written to be committed and for the poller to fall asleep.
const SETTLE: Duration = Duration::from_secs(12);

/// Time watched.
const WATCHED: Duration = Duration::from_secs(10);

/// CPU time allowed meanwhile, in ticks of 10 ms: 0.5 %, room for a few timers, far below any spinning.
const TICKS_MAX: u64 = 5;

/// Memory allowed beside the caches, in KiB. The data cache and the guest's memory are shared mappings, which are not
/// counted; the metadata of this test's few files is, and is small.
const RESIDENT_KIB_MAX: u64 = 32 << 10;

fn run(context: &CaseContext<'_>) -> anyhow::Result<()> {
    let daemon = Daemon::start(&context.artifacts.server, context.scratch, "fs", "1G", &[])?;
    let hardware = Hardware::default();
    let mut guest =
        QemuGuest::boot_mounted(context.artifacts, context.scratch, "guest", daemon.socket(), &hardware)?;
    guest.run(&format!("set -e; cp -r /bin {MOUNT_POINT}/; ls -lR {MOUNT_POINT} >/dev/null"))?;
    sleep(SETTLE);
    let before = cpu_ticks(daemon.id())?;
    sleep(WATCHED);
    let used = cpu_ticks(daemon.id())? - before;
    note(&format!("the idle daemon used {used} ticks of 10 ms in {} s", WATCHED.as_secs()));
    ensure!(used <= TICKS_MAX, "the idle daemon used {used} ticks of 10 ms in {} s", WATCHED.as_secs());
    let resident = private_kib(daemon.id())?;
    note(&format!("the idle daemon holds {resident} KiB beside its data cache"));
    ensure!(resident <= RESIDENT_KIB_MAX, "the idle daemon holds {resident} KiB beside its data cache");
    guest.run(&format!("ls {MOUNT_POINT}/bin >/dev/null"))?; // and it still answers
    guest.power_off()?;
    daemon.stop_and_check()
}

/// User and system time of a process and its threads: fields 14 and 15 of `/proc/PID/stat` (proc(5)).
fn cpu_ticks(process: u32) -> anyhow::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat"))?;
    // The second field is the program's name in parentheses, which may contain spaces.
    let fields: Vec<&str> =
        stat.rsplit_once(") ").context("unexpected /proc/PID/stat")?.1.split(' ').collect();
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}

/// Resident memory that is not a shared mapping: RssAnon and RssFile of `/proc/PID/status` (proc(5)).
fn private_kib(process: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{process}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
        number
            .with_context(|| format!("no {name} in /proc/PID/status"))?
            .parse::<u64>()
            .context("not a number")
    };
    Ok(field("RssAnon")? + field("RssFile")?)
}
