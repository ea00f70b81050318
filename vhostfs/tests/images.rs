//! Images that cannot be served: one line that says why, and nothing is touched.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

mod support;

use support::daemon::Folder;

impl Folder {
    /// Fails with status 1 and one line that gives `reason`; the image stays as it was.
    #[track_caller]
    fn assert_refused(&self, image: &Path, options: &[&str], reason: &str) {
        let before = fs::read(image).ok();
        let output = self.serve(image, options).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        // The image comes first, then what is wrong, and behind a semicolon what to do.
        let (_, rest) = text.strip_prefix("vhostfs: ").and_then(|text| text.split_once(": ")).expect(&text);
        assert!(rest.contains("; ") && rest.contains(reason), "{text}");
        assert!(fs::read(image).ok() == before, "the image was changed");
        assert!(!self.path("socket").exists(), "the socket was made");
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
    folder.assert_refused(&folder.path("missing"), &[], "no such file or device");
    folder.assert_refused(&folder.path("no/such/folder"), &["--size", "16M"], "no such file or device");
    folder.assert_refused(folder.0.path(), &[], "neither a regular file nor a block device");
    let other = folder.path("other");
    fs::write(&other, vec![0x5a; 1 << 20]).unwrap();
    folder.assert_refused(&other, &[], "not a blobfs file system");
    // A size is for a new image only: nothing is formatted over.
    folder.assert_refused(&other, &["--size", "16M"], "not a blobfs file system");
    let empty = folder.path("empty");
    File::create(&empty).unwrap();
    folder.assert_refused(&empty, &[], "smaller than one block");
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
    for (size, reason) in [("1", "smaller than one block"), ("4096", "too small"), ("64K", "too small")] {
        let image = folder.path(size);
        folder.assert_refused(&image, &["--size", size], reason);
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
    let reason = "the device has 8388608 bytes, the file system 16777216";
    folder.assert_refused(&image, &[], reason);
}

#[test]
fn an_image_in_use_is_refused_and_its_user_goes_on() {
    let folder = Folder::new();
    let image = folder.made();
    let other = Folder::new();
    let user = other.start(&image, &[]);
    folder.assert_refused(&image, &[], "in use by another program");
    folder.assert_refused(&image, &["--readonly"], "in use by another program");
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
