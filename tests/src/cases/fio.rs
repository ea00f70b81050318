//! fio with verification: many jobs write patterns and read them back.

use std::time::Duration;

use super::{Case, CaseContext};
use crate::{
    artifacts::MOUNT_POINT,
    daemon::Daemon,
    qemu::{Echo, Hardware, QemuGuest},
    uml::UmlGuest,
};

pub(super) const FIO_VERIFY: Case = Case {
    name: "fio-verify",
    about: "16 fio jobs write and verify, buffered and direct, in both kinds of guest and over two request queues",
    run,
};

fn run(context: &CaseContext<'_>) -> anyhow::Result<()> {
    let mut daemon =
        Daemon::start(&context.artifacts.server, context.scratch, "fs", "4G", &["--queues", "2"])?;
    let limit = Duration::from_secs(400);
    let script =
        format!("set -e\n{}\n{}", verify_command("buffered", 0, "32m"), verify_command("direct", 1, "16m"));
    UmlGuest::new(daemon.socket()).run(context.scratch, "uml", &script, Echo::Quiet, limit)?;
    daemon.expect_next_guest()?;
    let request_queues = context.artifacts.server.request_queues(2);
    let hardware = Hardware { cpus: 2, request_queues, ..Hardware::default() };
    let mut guest =
        QemuGuest::boot_mounted(context.artifacts, context.scratch, "qemu", daemon.socket(), &hardware)?;
    guest.run_with(&verify_command("buffered", 0, "4m"), Echo::Quiet, limit)?;
    guest.run_with(&verify_command("direct", 1, "4m"), Echo::Quiet, limit)?;
    guest.power_off()?;
    daemon.stop_and_check()
}

/// 16 jobs with a file each: random writes of mixed sizes with a checksum in every block, all verified at the end.
fn verify_command(name: &str, direct: u8, size: &str) -> String {
    format!(
        "mkdir -p {MOUNT_POINT}/{name}\n\
         fio --name={name} --directory={MOUNT_POINT}/{name} --numjobs=16 --size={size} --rw=randwrite \
         --bsrange=4k-128k --bs_unaligned=0 --blockalign=4k --ioengine=psync --direct={direct} --verify=crc32c \
         --verify_fatal=1 --do_verify=1 --end_fsync=1 --group_reporting --thread --minimal --verify_state_save=0 || exit 1\n\
         rm -r {MOUNT_POINT}/{name}\n"
    )
}
