//! Images that cannot be served: one line that says why, and nothing is touched.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn serve(&self, image: &Path, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhostfs"));
        command.arg("serve").arg("--socket").arg(self.path("socket")).args(["--tag", "t"]).args(options);
        command.arg(image);
        command
    }

    /// Fails with status 1 and one line that contains `expected`; the image stays as it was.
    #[track_caller]
    fn assert_refused(&self, image: &Path, options: &[&str], expected: &str) {
        let before = fs::read(image).ok();
        let output = self.serve(image, options).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("vhostfs: ") && text.contains(expected) && text.contains("; "), "{text}");
        assert!(fs::read(image).ok() == before, "the image was changed");
        assert!(!self.path("socket").exists(), "the socket was made");
    }

    /// A daemon that has said that it is ready.
    fn start(&self, image: &Path, options: &[&str]) -> Daemon {
        let mut child = self.serve(image, options).stderr(Stdio::piped()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("ready") {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "the daemon has ended");
        }
        Daemon { child, log }
    }

    /// An image that a daemon made and left clean.
    fn made(&self) -> PathBuf {
        let image = self.path("image");
        self.start(&image, &["--size", "16M"]).stop();
        image
    }
}

struct Daemon {
    child: Child,
    log: BufReader<std::process::ChildStderr>,
}

impl Daemon {
    fn signal(&self, signal: i32) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// SIGTERM: it leaves a clean image and exits 0.
    fn stop(mut self) {
        self.signal(libc::SIGTERM);
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), Some(0), "{rest}");
    }
}

fn patch(image: &Path, offset: u64, bytes: &[u8]) {
    let mut file = OpenOptions::new().write(true).open(image).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(bytes).unwrap();
}

/// Gives a patched superblock the checksum of its bytes.
fn repair(image: &Path, superblock: u64) {
    let bytes = fs::read(image).unwrap();
    let covered = &bytes[superblock as usize + 12..superblock as usize + 512];
    let checksum = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, covered) as u32;
    patch(image, superblock + 8, &checksum.to_le_bytes());
}

/// Where the superblock copies lie.
const SUPERBLOCKS: [u64; 2] = [4096, 8192];

#[test]
fn what_is_no_image_is_refused() {
    let folder = Folder::new();
    folder.assert_refused(&folder.path("missing"), &[], "missing");
    folder.assert_refused(&folder.path("no/such/folder"), &["--size", "16M"], "no/such/folder");
    folder.assert_refused(folder.0.path(), &[], "");
    let other = folder.path("other");
    fs::write(&other, vec![0x5a; 1 << 20]).unwrap();
    folder.assert_refused(&other, &[], "other");
    // A size is for a new image only: nothing is formatted over.
    folder.assert_refused(&other, &["--size", "16M"], "other");
    let empty = folder.path("empty");
    File::create(&empty).unwrap();
    folder.assert_refused(&empty, &[], "empty");
}

#[test]
fn a_root_that_is_not_there_is_refused_before_anything_is_changed() {
    let folder = Folder::new();
    let new = folder.path("new");
    folder.assert_refused(&new, &["--size", "16M", "--root", "sub"], "has no directories");
    assert!(!new.exists());
    folder.assert_refused(&folder.made(), &["--root", "sub"], "no such entry");
}

#[test]
fn an_image_that_would_be_too_small_is_not_left_behind() {
    let folder = Folder::new();
    for size in ["1", "4096", "64K"] {
        let image = folder.path(size);
        folder.assert_refused(&image, &["--size", size], size);
        assert!(!image.exists());
    }
}

#[test]
fn damaged_and_foreign_superblocks_are_refused() {
    for (offset, bytes, repair_checksum, expected) in [
        (0, &b"notblob\0"[..], false, "not a blobfs file system; format it with 'blobfs mkfs"),
        (12, &[99, 0, 0, 0][..], true, "version"),
        (32, &[0xff; 8][..], true, "feature"),
        (48, &[0xff; 16][..], false, "checksum"),
    ] {
        let folder = Folder::new();
        let image = folder.made();
        for superblock in SUPERBLOCKS {
            patch(&image, superblock + offset, bytes);
            if repair_checksum {
                repair(&image, superblock);
            }
        }
        folder.assert_refused(&image, &[], expected);
    }
}

#[test]
fn a_truncated_image_is_refused() {
    let folder = Folder::new();
    let image = folder.made();
    OpenOptions::new().write(true).open(&image).unwrap().set_len(8 << 20).unwrap();
    folder.assert_refused(&image, &[], "image");
}

#[test]
fn an_image_in_use_is_refused_and_its_user_goes_on() {
    let folder = Folder::new();
    let image = folder.made();
    let other = Folder::new();
    let user = other.start(&image, &[]);
    folder.assert_refused(&image, &[], "use");
    folder.assert_refused(&image, &["--readonly"], "use");
    user.stop();
    folder.start(&image, &["--readonly"]).stop();
}

#[test]
fn a_killed_daemon_leaves_an_image_that_serves_again_and_a_socket_that_is_replaced() {
    let folder = Folder::new();
    let image = folder.made();
    let mut daemon = folder.start(&image, &[]);
    daemon.child.kill().unwrap();
    daemon.child.wait().unwrap();
    assert!(folder.path("socket").exists());
    folder.start(&image, &[]).stop();
    assert!(!folder.path("socket").exists());
}
