//! Guests that leave without a word: rebound drivers, reboots, kills, resets. The daemon serves on.

use std::time::Duration;

use super::{Case, CaseContext, Scale, tree};
use crate::{
    artifacts::{MOUNT_POINT, Server},
    daemon::{Daemon, fsck},
    progress::note,
    qemu::{Echo, Hardware, QemuGuest},
    uml::UmlGuest,
};

pub(super) const REBIND: Case = Case {
    name: "rebind",
    about: "the guest unbinds and rebinds the driver, unmounted and while in use",
    run: rebind,
};

pub(super) const REBOOT: Case = Case {
    name: "reboot",
    about: "a guest that reboots without unmounting finds everything it had synced",
    run: reboot,
};

pub(super) const KILLED_GUEST: Case = Case {
    name: "killed-guest",
    about: "after QEMU is killed in the middle of work, the next one connects to the same socket and works",
    run: killed_guest,
};

pub(super) const KILLED_DAEMON: Case = Case {
    name: "killed-daemon",
    about: "after the daemon is killed under fio, the image is clean and everything synced is in it",
    run: killed_daemon,
};

pub(super) const RESETS: Case = Case {
    name: "resets",
    about: "20 machine resets under fio; after each the synced tree is intact, and the image is clean at the end",
    run: resets,
};

pub(super) const STOP: Case = Case {
    name: "stop",
    about: "SIGTERM while a guest works: the daemon exits with status 0, the image is clean and has everything synced",
    run: stop,
};

pub(super) const ONCE: Case = Case {
    name: "once",
    about: "with --once the daemon ends with its guest, on a socket of its own and on one that it inherits",
    run: once,
};

/// Time for unpacking or verifying the source tree under emulation.
const TREE_LIMIT: Duration = Duration::from_secs(600);

/// Starts fio in the background, reading, writing and creating; waits until it has its files and is in the middle of it.
const FIO_IN_BACKGROUND: &str = "mkdir -p /mnt/vhostfs/load\n\
    fio --name=load --directory=/mnt/vhostfs/load --numjobs=4 --size=8m --rw=randrw --bsrange=4k-64k \
    --ioengine=psync --fsync=16 --time_based --runtime=600 --thread >/tmp/fio.out 2>&1 &\n\
    for i in {1..200}; do sleep 1; test -e /mnt/vhostfs/load/load.3.0 && break; done; sleep 2\n\
    test -n \"$(pidof fio)\" -a -e /mnt/vhostfs/load/load.3.0 || { cat /tmp/fio.out; ls -l /mnt/vhostfs/load; false; }";

/// Time for fio to lay out its files: some seconds, minutes on a machine with eight times as much to do as CPUs.
const FIO_START_LIMIT: Duration = Duration::from_secs(300);

fn start_fio(guest: &mut QemuGuest) -> anyhow::Result<()> {
    guest.run_with(FIO_IN_BACKGROUND, Echo::Quiet, FIO_START_LIMIT).map(drop)
}

fn start(context: &CaseContext<'_>, hardware: &Hardware) -> anyhow::Result<(Daemon, QemuGuest)> {
    let daemon = Daemon::start(&context.artifacts.server, context.scratch, "fs", "1G", &["--queues", "2"])?;
    let guest =
        QemuGuest::boot_mounted(context.artifacts, context.scratch, "guest", daemon.socket(), hardware)?;
    Ok((daemon, guest))
}

fn rebind(context: &CaseContext<'_>) -> anyhow::Result<()> {
    let (daemon, mut guest) = start(context, &Hardware::default())?;
    let driver = "cd /sys/bus/virtio/drivers/virtiofs; device=$(basename virtio*)";
    guest.run(&format!("set -e; echo first >{MOUNT_POINT}/file; umount {MOUNT_POINT}"))?;
    for _ in 0..3 {
        guest.run(&format!("set -e; {driver}; echo $device >unbind; echo $device >bind"))?;
        guest.mount()?;
        guest.run(&format!("set -e; grep -qx first {MOUNT_POINT}/file; umount {MOUNT_POINT}"))?;
    }
    // With the file system mounted and a file open: its users get errors, and the mount goes once they have left.
    guest.mount()?;
    guest.run(&format!(
        "set -e; echo second >{MOUNT_POINT}/file; sync {MOUNT_POINT}/file; exec 9<>{MOUNT_POINT}/file\n\
         {driver}; echo $device >unbind; if echo third >{MOUNT_POINT}/file; then exit 1; fi; exec 9>&-\n\
         umount -l {MOUNT_POINT}; echo $device >bind"
    ))?;
    guest.mount()?;
    guest.run(&format!("grep -qx second {MOUNT_POINT}/file"))?;
    guest.power_off()?;
    daemon.stop_and_check()
}

fn reboot(context: &CaseContext<'_>) -> anyhow::Result<()> {
    let (daemon, mut guest) = start(context, &Hardware::default())?;
    for round in 0..2 {
        guest.run(&format!("set -e; echo {round} >{MOUNT_POINT}/file; sync"))?;
        start_fio(&mut guest)?;
        guest.reboot()?;
        guest.mount()?;
        guest.run(&format!("grep -qx {round} {MOUNT_POINT}/file"))?;
    }
    guest.power_off()?;
    daemon.stop_and_check()
}

fn killed_guest(context: &CaseContext<'_>) -> anyhow::Result<()> {
    let (mut daemon, mut guest) = start(context, &Hardware::default())?;
    for round in 0..3 {
        guest.run(&format!("set -e; echo {round} >{MOUNT_POINT}/file; sync"))?;
        start_fio(&mut guest)?;
        guest.kill();
        daemon.expect_next_guest()?;
        guest = QemuGuest::boot_mounted(
            context.artifacts,
            context.scratch,
            "guest",
            daemon.socket(),
            &Hardware::default(),
        )?;
        guest.run(&format!("grep -qx {round} {MOUNT_POINT}/file"))?;
    }
    guest.power_off()?;
    daemon.stop_and_check()
}

fn killed_daemon(context: &CaseContext<'_>) -> anyhow::Result<()> {
    let (mut daemon, mut guest) = start(context, &Hardware::default())?;
    guest.run_with(&tree::unpack_script(), Echo::Quiet, TREE_LIMIT)?;
    for round in 0..3 {
        guest.run(&format!("set -e; echo {round} >{MOUNT_POINT}/file; sync {MOUNT_POINT}/file"))?;
        start_fio(&mut guest)?;
        let image = daemon.image().to_owned();
        daemon.kill();
        guest.kill(); // QEMU cannot reconnect a virtio-fs device
        if let Server::Vhostfs { blobfs, .. } = &context.artifacts.server {
            fsck(blobfs, &image)?;
        }
        (daemon, guest) = start(context, &Hardware::default())?;
        guest.run(&format!("grep -qx {round} {MOUNT_POINT}/file"))?;
    }
    guest.run_with(&tree::verify_script(), Echo::Quiet, TREE_LIMIT)?;
    guest.power_off()?;
    daemon.stop_and_check()
}

fn resets(context: &CaseContext<'_>) -> anyhow::Result<()> {
    /// The figure the product promises. Cheap enough (some 8 s each) for every run; long runs do more.
    const RESETS_SHORT: u32 = 20;
    const RESETS_LONG: u32 = 100;
    let request_queues = context.artifacts.server.request_queues(2);
    let hardware = Hardware { cpus: 2, request_queues, ..Hardware::default() };
    let (mut daemon, mut guest) = start(context, &hardware)?;
    guest.run_with(&tree::unpack_script(), Echo::Quiet, TREE_LIMIT)?;
    let count = if context.scale == Scale::Long { RESETS_LONG } else { RESETS_SHORT };
    for round in 1..=count {
        guest.run(&format!("set -e; echo {round} >{MOUNT_POINT}/round; sync {MOUNT_POINT}/round"))?;
        start_fio(&mut guest)?;
        guest.reset()?;
        daemon.check_running()?;
        guest.mount()?;
        guest.run(&format!("grep -qx {round} {MOUNT_POINT}/round"))?;
        if round % 5 == 0 {
            guest.run_with(&tree::verify_script(), Echo::Quiet, TREE_LIMIT)?;
            note(&format!("{round} of {count} resets: the tree is intact"));
        }
    }
    guest.power_off()?;
    daemon.stop_and_check()
}

fn stop(context: &CaseContext<'_>) -> anyhow::Result<()> {
    let (daemon, mut guest) = start(context, &Hardware::default())?;
    guest.run_with(&tree::unpack_script(), Echo::Quiet, TREE_LIMIT)?;
    start_fio(&mut guest)?;
    daemon.stop_and_check()?;
    guest.kill(); // QEMU cannot reconnect a virtio-fs device
    let (daemon, mut guest) = start(context, &Hardware::default())?;
    guest.run_with(&tree::verify_script(), Echo::Quiet, TREE_LIMIT)?;
    guest.power_off()?;
    daemon.stop_and_check()
}

fn once(context: &CaseContext<'_>) -> anyhow::Result<()> {
    let (server, scratch) = (&context.artifacts.server, context.scratch);
    let limit = Duration::from_secs(120);
    let daemon = Daemon::start(server, scratch, "fs", "1G", &["--once"])?;
    let script = format!("echo first >{MOUNT_POINT}/file");
    UmlGuest::new(daemon.socket()).run(scratch, "own", &script, Echo::Quiet, limit)?;
    daemon.wait_and_check()?;
    if matches!(server, Server::Virtiofsd(_)) {
        return Ok(()); // it has no such option
    }
    let daemon = Daemon::start_with_descriptor(server, scratch, "inherited", "1G", &["--once"])?;
    let script = format!("set -e; echo second >{MOUNT_POINT}/file; sync; grep -qx second {MOUNT_POINT}/file");
    UmlGuest::new(daemon.socket()).run(scratch, "inherited", &script, Echo::Quiet, limit)?;
    daemon.wait_and_check()
}
