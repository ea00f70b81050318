//! POSIX conformance: pjdfstest as root, compared with ext4 in the same guest.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    time::Duration,
};

use anyhow::{Context as _, ensure};

use super::{Case, CaseContext};
use crate::{artifacts::MOUNT_POINT, daemon::Daemon, progress::note, qemu::Echo, uml::UmlGuest};

pub(super) const PJDFSTEST: Case = Case {
    name: "pjdfstest",
    about: "POSIX conformance as root: no failure and no skipped test that ext4 in the same guest does not show",
    run,
};

/// The suite has 398 tests; far fewer results would mean that it did not run.
const TESTS_MIN: usize = 390;

/// Tests that no FUSE mount can run, and why.
const SKIPPED_ON_A_MOUNT: &[(&str, &str)] = &[(
    "link::link_count_max",
    "pathconf(_PC_LINK_MAX) is a table in the C library, by file system type, and has no entry for FUSE",
)];

/// Where ext4 is mounted. As long as [`MOUNT_POINT`]: the suite builds paths of exactly PATH_MAX bytes below it, and
/// some lengths make its own arithmetic overflow.
const EXT4_MOUNT_POINT: &str = "/mnt/compare";
const _: () = assert!(EXT4_MOUNT_POINT.len() == MOUNT_POINT.len());

/// The suite sleeps between two operations whose times it compares. Timestamps in User-Mode Linux advance every 10 ms
/// (HZ = 100), later on a machine that keeps it waiting.
const CONFIGURATION: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
stat_st_birthtime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.05
allow_remount = false
[dummy_auth]
entries = [["nobody", "nogroup"], ["tests", "tests"]]
"#;

/// Times of a new file on a mount come from the host's clock, later ones of a regular file from the guest's. A busy machine
/// lets User-Mode Linux lose ticks while it boots, and its clock stays behind by a multiple of what the suite sleeps. So
/// it is set forward by that, and by no more than it takes to find out.
const SET_CLOCK: &str = r#"
before=${EPOCHREALTIME/[.,]/}; mkdir /mnt/vhostfs/clock
host=$(stat -c %.6Y /mnt/vhostfs/clock); rmdir /mnt/vhostfs/clock
late=$((${host/[.,]/} - before)); echo "clock late by $late us at most"
if test $late -gt 0; then date --set="+$((late / 1000000)).$(printf %06d $((late % 1000000))) seconds"; fi
"#;

/// Marks the output of one run of the suite.
const SECTION: &str = "@@results of ";

fn run(context: &CaseContext<'_>) -> anyhow::Result<()> {
    let daemon = Daemon::start(&context.artifacts.server, context.scratch, "fs", "1G", &[])?;
    let disk = context.scratch.join("ext4.img");
    File::create(&disk)?.set_len(512 << 20)?;
    let mut guest = UmlGuest::new(daemon.socket());
    guest.disk = Some(disk);
    let limit = Duration::from_secs(600);
    let output = guest.run(context.scratch, "pjdfstest", &script(context), Echo::Quiet, limit)?;

    let mut sections = output.split(SECTION).skip(1).map(parse);
    let ext4 = sections.next().context("no results of ext4")?;
    let ours = sections.next().context("no results of the mount")?;
    for (name, results) in [("ext4", &ext4), ("the mount", &ours)] {
        note(&format!(
            "pjdfstest on {name}: {} passed, {} failed, {} skipped",
            results.passed,
            results.failed.len(),
            results.skipped.len()
        ));
        let total = results.passed + results.failed.len() + results.skipped.len();
        ensure!(total >= TESTS_MIN, "only {total} results on {name}, expected {TESTS_MIN} or more");
    }
    let reference: BTreeSet<_> = ext4.failed.keys().collect();
    let failures: Vec<_> = ours.failed.iter().filter(|(test, _)| !reference.contains(test)).collect();
    ensure!(failures.is_empty(), "fails here and not on ext4: {failures:#?}");
    check_skipped(&ext4, &ours)?;
    daemon.stop_and_check()
}

/// Shows the tests that are skipped on the mount alone. Each must be one of [`SKIPPED_ON_A_MOUNT`].
fn check_skipped(ext4: &Results, ours: &Results) -> anyhow::Result<()> {
    let (mut known, mut unknown) = (Vec::new(), Vec::new());
    for (test, reason) in ours.skipped.iter().filter(|(test, _)| !ext4.skipped.contains_key(*test)) {
        match SKIPPED_ON_A_MOUNT.iter().find(|(known, _)| known == test) {
            Some(entry) => known.push(entry),
            None => unknown.push((test, reason)),
        }
    }
    for (test, reason) in known {
        note(&format!("pjdfstest skips {test} on the mount only: {reason}"));
    }
    ensure!(unknown.is_empty(), "skipped here and not on ext4: {unknown:#?}");
    Ok(())
}

fn script(context: &CaseContext<'_>) -> String {
    let pjdfstest = context.artifacts.pjdfstest.display();
    format!(
        "set -e -o pipefail; mkdir -p {EXT4_MOUNT_POINT}; mkfs.ext4 -q /dev/ubda; mount /dev/ubda {EXT4_MOUNT_POINT}\n\
         cd /mnt/tmp; cp /etc/passwd /etc/group .\n\
         echo 'tests:x:4321:4321::/:/bin/sh' >>passwd; echo 'tests:x:4321:' >>group\n\
         mount --bind passwd /etc/passwd; mount --bind group /etc/group\n\
         cat >configuration.toml <<'END'\n{CONFIGURATION}\nEND\n\
         {SET_CLOCK}\n\
         for place in {EXT4_MOUNT_POINT} {MOUNT_POINT}; do\n\
             echo '{SECTION}'$place\n\
             {{ {pjdfstest} -c configuration.toml -p $place -s /dev/shm 2>&1 || test $? = 1; }} | cat\n\
         done\n\
         umount {EXT4_MOUNT_POINT}\n"
    )
}

/// Results of one run: the names of failed and skipped tests with the reason given.
#[derive(Debug, Default)]
struct Results {
    passed: usize,
    failed: BTreeMap<String, String>,
    skipped: BTreeMap<String, String>,
}

/// Reads lines `NAME  ok|FAILED|skipped`; the reason is on the indented line after.
fn parse(section: &str) -> Results {
    let mut results = Results::default();
    let mut lines = section.lines().peekable();
    while let Some(line) = lines.next() {
        let mut words = line.split_whitespace();
        let (Some(test), Some(outcome), None) = (words.next(), words.next(), words.next()) else { continue };
        let reason = lines.next_if(|next| next.starts_with('\t')).unwrap_or("").trim().to_owned();
        match outcome {
            "ok" => results.passed += 1,
            "FAILED" => drop(results.failed.insert(test.to_owned(), reason)),
            "skipped" => drop(results.skipped.insert(test.to_owned(), reason)),
            _ => {}
        }
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_tests_may_be_skipped_on_the_mount_alone() {
        let results = |skipped: &[&str]| Results {
            skipped: skipped.iter().map(|test| ((*test).to_owned(), "a reason".to_owned())).collect(),
            ..Results::default()
        };
        let ext4 = results(&["chflags::all"]);
        assert!(check_skipped(&ext4, &results(&["chflags::all", "link::link_count_max"])).is_ok());
        assert!(check_skipped(&ext4, &results(&["chflags::all", "open::new"])).is_err());
    }

    #[test]
    fn results_are_read_with_their_reasons() {
        let results = parse(
            "/mnt/x\na::b   ok\nc::d   FAILED\n\twrong errno\ne   skipped\n\tno feature\n\nSummary: 1 failed, 1 skipped, 1 passed\n",
        );
        assert_eq!(results.passed, 1);
        assert_eq!(results.failed["c::d"], "wrong errno");
        assert_eq!(results.skipped["e"], "no feature");
    }
}
