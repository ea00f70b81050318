//! `cargo xtask demo`: a Linux guest on a new image, a tour in it, then a shell, or a second guest that checks what the
//! first one left and takes the same tour.

use std::{path::Path, time::Duration};

use vhostfs_tests::{
    artifacts::{Artifacts, MOUNT_POINT},
    cases::{CHECKSUM_LIST, unpack_script, verify_script},
    daemon::Daemon,
    progress::{note, step},
    qemu::{Echo, Hardware, QemuGuest},
};

use crate::{build, setup, terminal};

/// Size of the image; the file is sparse.
const IMAGE_SIZE: &str = "4G";

/// Limit of one stop of the tour, all of which are quick on an idle machine.
const STOP_LIMIT: Duration = Duration::from_secs(600);

/// Runs the tour.
pub(crate) fn run(check: bool) -> anyhow::Result<()> {
    let artifacts = setup::ensure(setup::Purpose::Demo, build::programs)?;
    let scratch = tempfile::Builder::new().prefix("demo-").tempdir_in(&artifacts.run_dir)?;
    let (daemon, mut guest) = boot(&artifacts, scratch.path(), "first")?;
    tour(&mut guest)?;
    if check {
        step("power off and stop the daemon, check the image", || {
            guest.power_off()?;
            daemon.stop_and_check()
        })?;
        second_guest(&artifacts, scratch.path())?;
        println!("\nThe tour passed twice: every checksum was right in both guests, and the image is clean.");
        return Ok(());
    }
    if terminal::is_interactive() {
        shell(&mut guest)?;
    }
    step("power off and stop the daemon, check the image", || {
        guest.power_off()?;
        daemon.stop_and_check()
    })
}

fn boot(artifacts: &Artifacts, scratch: &Path, name: &str) -> anyhow::Result<(Daemon, QemuGuest)> {
    let daemon = step(&format!("serve an image of {IMAGE_SIZE}"), || {
        Daemon::start(&artifacts.server, scratch, "demo", IMAGE_SIZE, &[])
    })?;
    let guest = step(&format!("boot the {name} guest and mount the image at {MOUNT_POINT}"), || {
        QemuGuest::boot_mounted(artifacts, scratch, name, daemon.socket(), &Hardware::default())
    })?;
    Ok((daemon, guest))
}

/// What the tour shows: a title and the script that does it.
fn stops() -> Vec<(&'static str, String)> {
    vec![
        (
            "the guest and its mount",
            format!("uname -srm; grep {MOUNT_POINT} /proc/mounts; df -h {MOUNT_POINT}"),
        ),
        ("unpack the source of coreutils and list its checksums", unpack_script()),
        ("verify the checksums, with caches dropped", verify_script()),
        (
            "links, attributes and access lists",
            format!(
                "set -e; cd {MOUNT_POINT}; ln -f tour/README hard; ln -sf tour/README soft; cmp hard soft\n\
                 setfattr -n user.origin -v Debian hard; getfattr -n user.origin tour/README\n\
                 setfacl -m u:nobody:r hard; getfacl -c hard; ls -li hard soft tour/README"
            ),
        ),
        (
            "fio: random writes with a checksum in every block, read back and verified",
            format!(
                "fio --name=tour --directory={MOUNT_POINT} --size=32m --rw=randwrite --bs=4k --ioengine=psync \
                 --verify=crc32c --verify_fatal=1 --end_fsync=1 --verify_state_save=0 --thread | grep -E 'IOPS|err=' && rm {MOUNT_POINT}/tour.0.0"
            ),
        ),
        (
            "how long things take in this (emulated) guest",
            format!(
                "set -e; cd {MOUNT_POINT}; TIMEFORMAT='%R s'; mkdir small; cd small\n\
                 echo -n 'create 1000 files: '; time for i in {{1..1000}}; do :>$i; done\n\
                 echo -n 'list them:         '; time ls -l >/dev/null\n\
                 echo -n 'remove them:       '; cd ..; time rm -r small\n\
                 echo -n 'write 64 MiB:      '; time dd if=/dev/zero of=big bs=1M count=64 conv=fsync status=none\n\
                 echo -n 'read it again:     '; time dd if=big of=/dev/null bs=1M status=none; rm big"
            ),
        ),
        ("what is used now", format!("df -h {MOUNT_POINT}; df -i {MOUNT_POINT}; du -sh {MOUNT_POINT}/tour")),
    ]
}

fn tour(guest: &mut QemuGuest) -> anyhow::Result<()> {
    for (title, script) in stops() {
        step(title, || guest.run_with(&script, Echo::Lines, STOP_LIMIT).map(drop))?;
    }
    Ok(())
}

fn shell(guest: &mut QemuGuest) -> anyhow::Result<()> {
    note("a shell in the guest; leave it with `exit` or Ctrl-D");
    let size = terminal::size()?;
    let raw = terminal::RawMode::enter()?;
    let result = guest.attach(std::io::stdin(), size);
    drop(raw);
    println!();
    result
}

/// Finds everything as the first guest left it, removes it, and takes the tour again.
fn second_guest(artifacts: &Artifacts, scratch: &Path) -> anyhow::Result<()> {
    let (daemon, mut guest) = boot(artifacts, scratch, "second")?;
    step("verify every checksum in the second guest", || {
        guest.run_with(&verify_script(), Echo::Lines, STOP_LIMIT).map(drop)
    })?;
    step("check what else the first guest left", || {
        let script = format!(
            "set -e; cd {MOUNT_POINT}; cmp hard soft; test $(stat -c %h hard) = 2\n\
             test $(getfattr --only-values -n user.origin hard) = Debian; getfacl -c hard | grep -qx user:nobody:r--"
        );
        guest.run(&script).map(drop)
    })?;
    step("remove all of it, for a second tour on the same image", || {
        let script = format!(
            "set -e; cd {MOUNT_POINT}; rm -r tour {CHECKSUM_LIST} hard soft; sync; test -z \"$(ls -A)\"\n\
             df -h {MOUNT_POINT}; df -i {MOUNT_POINT}"
        );
        guest.run_with(&script, Echo::Lines, STOP_LIMIT).map(drop)
    })?;
    tour(&mut guest)?;
    step("power off and stop the daemon, check the image", || {
        guest.power_off()?;
        daemon.stop_and_check()
    })
}
