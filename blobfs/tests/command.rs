//! The program as its users meet it: exit status, output, and one line when something is wrong.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::rc::Rc;

use bdev::open::ImageSpec;
use blobfs::Fs;
use blobfs::fs::{Context, MountOptions};
use blobfs::ondisk::superblock::FORMAT_VERSION;
use blobfs::store::{MkfsOptions, OpenOptions, Store, mkfs};
use blobfs::units::InodeId;
use reactor::{Reactor, SystemClock};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// A folder for images.
struct Scratch(TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// A new image of 16 MiB.
    fn image(&self, name: &str) -> String {
        let path = self.path(name);
        succeeds(&["mkfs", "--size", "16M", "--label", "testing", &path]);
        path
    }
}

fn blobfs(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_blobfs")).args(arguments).output().unwrap()
}

/// Exits 0; gives standard output.
#[track_caller]
fn succeeds(arguments: &[&str]) -> String {
    let output = blobfs(arguments);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Fails with this status and one line that contains `expected`, and prints nothing else.
#[track_caller]
fn refused(arguments: &[&str], status: i32, expected: &str) {
    let output = blobfs(arguments);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("blobfs: ") && text.contains(expected) && text.contains("; "), "{text}");
    assert!(output.stdout.is_empty());
}

/// Both `info` and `fsck` refuse the image and leave it as it is.
#[track_caller]
fn unusable(image: &str, expected: &str) {
    let before = fs::read(image).unwrap();
    refused(&["info", image], 1, expected);
    refused(&["fsck", image], 8, expected);
    assert!(fs::read(image).unwrap() == before);
}

#[test]
fn a_new_image_is_sound_and_shows_what_it_was_made_with() {
    let scratch = Scratch::new();
    let image = scratch.image("image");
    assert_eq!(fs::metadata(&image).unwrap().len(), 16 << 20);
    assert!(succeeds(&["fsck", &image]).contains("clean"));
    assert!(succeeds(&["info", &image]).contains("testing"));
    let info: serde_json::Value = serde_json::from_str(&succeeds(&["info", "--json", &image])).unwrap();
    assert_eq!(info["label"], "testing");
    assert_eq!(info["size"], 16 << 20);
    assert_eq!(info["clean"], true);
    assert_eq!(info["data_checksums"], false);
    let report: serde_json::Value = serde_json::from_str(&succeeds(&["fsck", "--json", &image])).unwrap();
    assert_eq!(report["findings"].as_array().unwrap().len(), 0);
}

#[test]
fn checksums_of_data_are_made_when_asked_for_and_shown() {
    let scratch = Scratch::new();
    let image = scratch.path("image");
    succeeds(&["mkfs", "--size", "16M", "--data-checksum", &image]);
    assert!(succeeds(&["info", &image]).contains("CRC-32C of each block"));
    let info: serde_json::Value = serde_json::from_str(&succeeds(&["info", "--json", &image])).unwrap();
    assert_eq!((&info["data_checksums"], &info["incompatible_features"]), (&true.into(), &1.into()));
    assert!(succeeds(&["fsck", &image]).contains("clean"));
    assert!(succeeds(&["scrub", &image]).contains("clean"));
}

#[test]
fn a_new_image_can_be_mounted_for_reading() {
    let scratch = Scratch::new();
    let image = scratch.image("image").parse().unwrap();
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let options = bdev::OpenOptions { read_only: true, create: None };
    let device = bdev::open(&image, &options, &reactor).unwrap();
    let at = reactor.clone();
    let root = reactor.block_on(async move {
        let options = OpenOptions { readonly: true, ..OpenOptions::default() };
        let store = Store::open(device, at, options).await.unwrap();
        let fs = Fs::mount(store, MountOptions { readonly: true, ..MountOptions::default() }).await.unwrap();
        let session = fs.open_session();
        let ctx = Context { session, request: 1, uid: 0, gid: 0, pid: 1, supplementary_gid: None };
        fs.run(|fs| fs.get_attr(&ctx, InodeId::ROOT)).await
    });
    assert_eq!(root.unwrap().nlink, 2);
}

#[test]
fn sizes_and_blocks_are_taken_as_given() {
    let scratch = Scratch::new();
    for block_size in ["512", "1K", "4096", "16384"] {
        let image = scratch.path(block_size);
        succeeds(&["mkfs", "--size", "16M", "--block-size", block_size, &image]);
        succeeds(&["fsck", &image]);
    }
    // A part of a larger file.
    let image = scratch.path("large");
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    succeeds(&["mkfs", "--size", "32M", &image]);
    let info: serde_json::Value = serde_json::from_str(&succeeds(&["info", "--json", &image])).unwrap();
    assert_eq!(info["size"], 32 << 20);
    succeeds(&["fsck", &image]);
}

#[test]
fn wrong_command_lines_are_refused() {
    let scratch = Scratch::new();
    let image = scratch.path("image");
    refused(&[], 2, "no command");
    refused(&["fly"], 2, "fly");
    refused(&["mkfs"], 2, "IMAGE");
    refused(&["info"], 2, "IMAGE");
    refused(&["fsck"], 16, "IMAGE");
    refused(&["fsck", "--fast", &image], 16, "--fast");
    refused(&["fsck", "-y", "-n", &image], 16, "--repair");
    refused(&["scrub"], 16, "IMAGE");
    refused(&["scrub", "--repair", &image], 16, "--repair");
    refused(&["mkfs", "--size", "4Q", &image], 2, "4Q");
    refused(&["mkfs", "--size", "-4", &image], 2, "-4");
    for size in ["0", "256", "3000", "32768", "x"] {
        refused(&["mkfs", "--size", "16M", "--block-size", size, &image], 2, "512 to 16384");
    }
    refused(&["mkfs", "--size", "16M", "--label", &"x".repeat(33), &image], 2, "32 bytes");
    assert!(!Path::new(&image).exists());
}

#[test]
fn images_that_cannot_be_made_leave_nothing_behind() {
    let scratch = Scratch::new();
    let image = scratch.path("image");
    refused(&["mkfs", &image], 1, "no such file");
    refused(&["mkfs", "--size", "64K", &image], 1, "too small");
    refused(&["mkfs", "--size", "100", &image], 1, "smaller than one block");
    refused(&["mkfs", "--size", "16M", &scratch.path("none/image")], 1, "no such file");
    refused(&["mkfs", scratch.0.path().to_str().unwrap()], 1, "neither a regular file nor a block device");
    assert_eq!(fs::read_dir(scratch.0.path()).unwrap().count(), 0);

    File::create(&image).unwrap().set_len(16 << 20).unwrap();
    refused(&["mkfs", "--size", "17M", &image], 1, "fewer than --size");
    assert!(fs::read(&image).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn known_content_is_not_overwritten_without_force() {
    let scratch = Scratch::new();
    let image = scratch.image("image");
    let before = fs::read(&image).unwrap();
    refused(&["mkfs", &image], 1, "holds a blobfs file system");
    assert!(fs::read(&image).unwrap() == before);
    succeeds(&["mkfs", "--force", "--label", "second", &image]);
    assert!(succeeds(&["info", &image]).contains("second"));

    let other = scratch.path("other");
    let file = File::create(&other).unwrap();
    file.set_len(16 << 20).unwrap();
    file.write_all_at(&[0x53, 0xef], 1080).unwrap();
    refused(&["mkfs", &other], 1, "ext4");
}

#[test]
fn what_is_no_image_is_told_apart() {
    let scratch = Scratch::new();
    let missing = scratch.path("missing");
    refused(&["info", &missing], 1, "no such file");
    refused(&["fsck", &missing], 8, "no such file");

    let zeros = scratch.path("zeros");
    File::create(&zeros).unwrap().set_len(16 << 20).unwrap();
    unusable(&zeros, "not a blobfs file system");
    refused(&["fsck", "memory:16M"], 8, "not a blobfs file system");
    refused(&["fsck", "null:16M"], 8, "not a blobfs file system");

    let empty = scratch.path("empty");
    File::create(&empty).unwrap();
    unusable(&empty, "smaller than one block");
}

/// Rewrites part of both copies of the superblock, with right checksums.
fn patch_superblocks(image: &str, offset: usize, bytes: &[u8]) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    for copy in [4096, 8192] {
        let mut block = [0; 512];
        file.read_exact_at(&mut block, copy).unwrap();
        block[offset..offset + bytes.len()].copy_from_slice(bytes);
        let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &block[12..]) as u32;
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        file.write_all_at(&block, copy).unwrap();
    }
}

#[test]
fn other_versions_and_features_are_refused() {
    let scratch = Scratch::new();
    let image = scratch.image("image");
    let before = fs::read(&image).unwrap();
    let next = FORMAT_VERSION + 1;
    let named = format!("version {next}");
    patch_superblocks(&image, 12, &next.to_le_bytes());
    unusable(&image, &named);
    // One copy is enough: the other one may be older.
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&before[8192..8704], 8192).unwrap();
    let before = fs::read(&image).unwrap();
    refused(&["fsck", &image], 8, &named);
    refused(&["fsck", "--repair", &image], 8, &named);
    assert!(fs::read(&image).unwrap() == before);

    let image = scratch.image("features");
    patch_superblocks(&image, 32, &64_u64.to_le_bytes());
    refused(&["fsck", &image], 8, "0x40");

    let image = scratch.image("magic");
    patch_superblocks(&image, 0, b"other fs");
    unusable(&image, "not a blobfs file system");
}

#[test]
fn damage_is_reported_and_left_as_it_is() {
    let scratch = Scratch::new();
    let image = scratch.image("image");
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&[0xff; 16], 4096 + 64).unwrap();
    let before = fs::read(&image).unwrap();

    let output = blobfs(&["fsck", &image]);
    assert_eq!(output.status.code(), Some(4));
    assert!(output.stderr.is_empty());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("superblock, copy 0: checksum"), "{text}");
    assert!(text.contains("1 finding"), "{text}");

    let output = blobfs(&["fsck", "--json", &image]);
    assert_eq!(output.status.code(), Some(4));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["findings"][0]["finding"], "superblock");
    assert_eq!(report["findings"][0]["copy"], 0);
    assert!(report["findings"][0]["text"].as_str().unwrap().contains("checksum"));
    assert_eq!(report["complete"], true);

    assert!(succeeds(&["info", &image]).contains("damaged superblock"));
    assert!(fs::read(&image).unwrap() == before);
}

/// An image whose first superblock is damaged.
fn damaged_image(scratch: &Scratch) -> String {
    let image = scratch.image("damaged");
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&[0xff; 16], 4096 + 64).unwrap();
    image
}

#[test]
fn a_repair_says_what_it_did_and_leaves_a_clean_image() {
    for option in ["--repair", "-y"] {
        let scratch = Scratch::new();
        let image = damaged_image(&scratch);
        let output = blobfs(&["fsck", option, &image]);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.starts_with("superblock, copy 0: checksum"), "{text}");
        assert!(text.contains(": repaired: written anew from the other copy"), "{text}");
        assert!(text.contains("clean"), "{text}");
        let after = fs::read(&image).unwrap();
        assert!(succeeds(&["fsck", option, &image]).contains("clean"));
        assert!(fs::read(&image).unwrap() == after, "there was nothing to repair");
        succeeds(&["fsck", &image]);
    }
}

#[test]
fn a_repair_as_json_names_every_action() {
    let scratch = Scratch::new();
    let image = damaged_image(&scratch);
    let output = blobfs(&["fsck", "--repair", "--json", &image]);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["findings"][0]["finding"], "superblock");
    assert_eq!(report["findings"][0]["repaired"], true);
    assert_eq!(report["findings"][0]["action"], "written anew from the other copy");
    assert_eq!((&report["changed"], &report["left"]), (&true.into(), &0.into()));
    assert_eq!(report["refused"], serde_json::Value::Null);
    assert!(report["counts"]["free_blocks"].as_u64().unwrap() > 0);
}

#[test]
fn a_careful_repair_leaves_what_could_lose_something() {
    let scratch = Scratch::new();
    let image = damaged_image(&scratch);
    let before = fs::read(&image).unwrap();
    for option in ["-p", "-a"] {
        let output = blobfs(&["fsck", option, &image]);
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains("not repaired: something would be lost"), "{text}");
        assert!(fs::read(&image).unwrap() == before);
    }
    assert_eq!(blobfs(&["fsck", "-n", "-f", &image]).status.code(), Some(4));
    // A wrong number of free blocks costs nothing.
    let image = scratch.image("counter");
    patch_superblocks(&image, 256, &7_u64.to_le_bytes());
    let output = blobfs(&["fsck", "-p", &image]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    succeeds(&["fsck", "-p", &image]);
}

#[test]
fn under_the_name_that_fsck_looks_for_it_is_fsck() {
    let scratch = Scratch::new();
    let image = damaged_image(&scratch);
    let link = scratch.path("fsck.blobfs");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_blobfs"), &link).unwrap();
    let status = |arguments: &[&str]| Command::new(&link).args(arguments).output().unwrap().status.code();
    assert_eq!(status(&["-a", &image]), Some(4));
    assert_eq!(status(&["-y", &image]), Some(1));
    assert_eq!(status(&["-f", "-y", &image]), Some(0));
    assert_eq!(status(&["-z", &image]), Some(16));
}

#[test]
fn an_image_without_a_superblock_is_left_as_it_is() {
    let scratch = Scratch::new();
    let image = damaged_image(&scratch);
    let file = File::options().write(true).open(&image).unwrap();
    file.write_all_at(&[0xff; 16], 8192 + 64).unwrap();
    let before = fs::read(&image).unwrap();
    let output = blobfs(&["fsck", "--repair", &image]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("not repaired: no copy of the superblock"));
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn a_scrub_reads_an_image_and_changes_nothing() {
    let scratch = Scratch::new();
    let image = scratch.image("image");
    let before = fs::read(&image).unwrap();
    assert!(succeeds(&["scrub", &image]).contains("clean"));
    let report: serde_json::Value = serde_json::from_str(&succeeds(&["scrub", "--json", &image])).unwrap();
    assert_eq!(report["check"]["complete"], true);
    assert_eq!(report["unreadable"].as_array().unwrap().len(), 0);
    assert_eq!(report["data_bytes"], 0);
    assert!(fs::read(&image).unwrap() == before);

    let output = blobfs(&["scrub", &damaged_image(&scratch)]);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(String::from_utf8(output.stdout).unwrap().contains("superblock, copy 0"));
    refused(&["scrub", &scratch.path("missing")], 8, "no such file");
}

#[test]
fn a_truncated_image_is_refused() {
    let scratch = Scratch::new();
    let image = scratch.image("image");
    File::options().write(true).open(&image).unwrap().set_len(8 << 20).unwrap();
    let before = fs::read(&image).unwrap();
    refused(&["fsck", &image], 8, "8388608 bytes");
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn an_image_in_use_is_refused() {
    let scratch = Scratch::new();
    let image = scratch.image("image");
    let file = File::open(&image).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
    unusable(&image, "in use");
    refused(&["mkfs", "--force", &image], 1, "in use");
    rustix::fs::flock(&file, rustix::fs::FlockOperation::Unlock).unwrap();
    succeeds(&["fsck", &image]);
}

/// An image that takes seconds to check: it was not closed, so all of its enormous, empty journal is searched.
fn slow_image(scratch: &Scratch) -> String {
    let image = scratch.path("slow");
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let create = bdev::open::OpenOptions { read_only: false, create: Some(SLOW_JOURNAL + (1 << 30)) };
    let device = bdev::open::open(&ImageSpec::Path(image.clone().into()), &create, &reactor).unwrap();
    let options = MkfsOptions { block_size: 16_384, journal_size: SLOW_JOURNAL, ..MkfsOptions::default() };
    reactor.block_on(async move { mkfs(&device, &options).await }).unwrap();
    patch_superblocks(&image, 160, &[0]);
    image
}

const SLOW_JOURNAL: u64 = 64 << 30;

/// Whether a process handles SIGINT, as `/proc` tells.
fn catches_interrupts(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
    u64::from_str_radix(caught.trim(), 16).unwrap() & (1 << (Signal::INT.as_raw() - 1)) != 0
}

#[test]
fn a_check_that_is_interrupted_says_so() {
    let scratch = Scratch::new();
    let image = slow_image(&scratch);
    let check = "the check was cancelled by a signal; nothing was changed";
    let repair =
        "the repair was cancelled by a signal; nothing that counts was changed, it can be done again";
    let scrub = "the scrub was cancelled by a signal; nothing was changed";
    let cases = [
        (Signal::INT, &["fsck"][..], check),
        (Signal::TERM, &["fsck"], check),
        (Signal::INT, &["fsck", "--repair"], repair),
        (Signal::INT, &["scrub"], scrub),
    ];
    for (signal, arguments, expected) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blobfs"));
        command.args(arguments).arg(&image).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        while !catches_interrupts(child.id()) {
            std::thread::yield_now();
        }
        kill_process(Pid::from_child(&child), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(32), "{text}");
        assert_eq!(text, format!("blobfs: {image}: {expected}\n"));
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn help_tells_a_newcomer_what_to_do() {
    for (command, words) in [
        (&["--help"][..], &["mkfs", "fsck", "EXIT STATUS"][..]),
        (&["mkfs", "--help"], &["blobfs mkfs --size 4G", "--force", "--block-size", "--data-checksum"]),
        (&["fsck", "--help"], &["EXIT STATUS", "--json", "--repair", "lost+found", "-p", "EXAMPLES"]),
        (&["scrub", "--help"], &["EXIT STATUS", "--json"]),
        (&["info", "--help"], &["--json"]),
    ] {
        let help = succeeds(command);
        for word in words {
            assert!(help.contains(word), "{word} is missing in {help}");
        }
    }
    assert!(succeeds(&["--version"]).contains(env!("CARGO_PKG_VERSION")));
}
