//! Images that were written once mount, are clean and hold what they held. See `README.md` beside this file.

mod contents;

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bdev::Bdev;
use bdev::sim::{CrashChoice, SimDisk};
use blobfs::Fs;
use blobfs::check::{Finding, check};
use blobfs::fs::MountOptions;
use blobfs::ondisk::superblock::{FORMAT_VERSION, INCOMPAT_DATA_SUMS, SUPERBLOCK_LEN, SUPERBLOCK_OFFSETS};
use blobfs::store::{MkfsOptions, OpenOptions, Store, mkfs};
use contents::{Client, TIME, expected};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use reactor::{Reactor, VirtualClock};

/// Oldest version that is supported.
const VERSION_OLDEST: u32 = 2;

/// Oldest version with checksums of file data.
const VERSION_WITH_SUMS: u32 = 3;

/// Bytes of an image and of its blocks.
const SIZE: u64 = 1 << 20;
const BLOCK: u32 = 512;

/// The images of a version.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Clean,
    Journal,
}

const STATES: [State; 2] = [State::Clean, State::Journal];

/// Whether the blocks of an image have checksums.
const SUMS: [bool; 2] = [false, true];

fn path(version: u32, sums: bool, state: State) -> PathBuf {
    let sums = if sums { "-sums" } else { "" };
    let state = match state {
        State::Clean => "clean",
        State::Journal => "journal",
    };
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v{version}{sums}-{state}.img.gz"))
}

fn reactor() -> Rc<Reactor> {
    Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(TIME))))
}

fn load(path: &Path) -> Rc<SimDisk> {
    let packed = fs::File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut bytes = Vec::new();
    GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len() as u64, SIZE);
    let disk = SimDisk::new(SIZE, BLOCK, 1);
    disk.poke(0, &bytes);
    disk
}

fn save(disk: &SimDisk, path: &Path) {
    let mut bytes = vec![0; SIZE as usize];
    disk.peek(0, &mut bytes);
    let mut packer = GzEncoder::new(fs::File::create(path).unwrap(), Compression::best());
    packer.write_all(&bytes).unwrap();
    packer.finish().unwrap();
}

fn mount(disk: &Rc<SimDisk>, reactor: &Rc<Reactor>) -> Client {
    let (disk, inner) = (disk.clone(), reactor.clone());
    let fs = reactor.block_on(async move {
        let store = Store::open(disk, inner, OpenOptions::default()).await.unwrap();
        Fs::mount(store, MountOptions::default()).await.unwrap()
    });
    Client::new(fs)
}

/// An image as this code writes it.
fn make(sums: bool, state: State) -> Rc<SimDisk> {
    let reactor = reactor();
    let disk = SimDisk::new(SIZE, BLOCK, 1);
    let bdev: Rc<dyn Bdev> = disk.clone();
    let options = MkfsOptions {
        uuid: *b"golden blobfs v1",
        hash_key: [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908],
        label: "golden".to_owned(),
        block_size: BLOCK,
        node_size: 1024,
        group_blocks: 512,
        journal_size: 64 << 10,
        data_checksum: sums,
        ..MkfsOptions::default()
    };
    reactor.block_on(async move { mkfs(&bdev, &options).await }).unwrap();
    let client = mount(&disk, &reactor);
    reactor.block_on(async move {
        client.fill().await.unwrap();
        client.unmount().await.unwrap();
    });
    if state == State::Clean {
        return disk;
    }
    let client = mount(&disk, &reactor);
    let client = reactor.block_on(async move {
        client.change().await.unwrap();
        client.sync().await.unwrap();
        client.log().await.unwrap();
        client
    });
    let crashed = disk.crash(CrashChoice::Nothing);
    drop(client);
    crashed
}

/// The image is clean, holds what it should, and is clean again after a mount that writes.
#[track_caller]
fn verify(disk: &Rc<SimDisk>, state: State) {
    for round in 0..2 {
        let bdev: Rc<dyn Bdev> = disk.clone();
        let report = reactor().block_on(async move { check(&bdev).await }).unwrap();
        assert_eq!(report.findings, []);
        assert!(report.complete);
        assert_eq!(report.counts.journal_blocks > 0, state == State::Journal && round == 0);
        let reactor = reactor();
        let client = mount(disk, &reactor);
        let found = reactor.block_on(async move {
            let found = client.tree().await.unwrap();
            client.unmount().await.unwrap();
            found
        });
        let expected = expected(state == State::Journal);
        assert!(found.keys().eq(expected.keys()), "{:?}", found.keys());
        for (path, seen) in &expected {
            assert!(found[path] == *seen, "{path}: {:?}", found[path]);
        }
    }
}

#[test]
fn images_of_every_version_hold_what_they_held() {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        for (sums, state) in kinds() {
            save(&make(sums, state), &path(FORMAT_VERSION, sums, state));
        }
    }
    for version in VERSION_OLDEST..=FORMAT_VERSION {
        for (sums, state) in kinds().filter(|(sums, _)| !sums || version >= VERSION_WITH_SUMS) {
            verify(&load(&path(version, sums, state)), state);
        }
    }
}

fn kinds() -> impl Iterator<Item = (bool, State)> {
    SUMS.into_iter().flat_map(|sums| STATES.map(|state| (sums, state)))
}

/// Makes both copies of the superblock state another version of the format.
fn set_version(disk: &SimDisk, version: u32) {
    set_bytes(disk, 12, &version.to_le_bytes());
}

/// Changes bytes of both copies of the superblock.
fn set_bytes(disk: &SimDisk, at: usize, bytes: &[u8]) {
    for offset in SUPERBLOCK_OFFSETS {
        let mut copy = [0; SUPERBLOCK_LEN];
        disk.peek(offset, &mut copy);
        copy[at..at + bytes.len()].copy_from_slice(bytes);
        let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, &copy[12..]) as u32;
        copy[8..12].copy_from_slice(&crc.to_le_bytes());
        disk.poke(offset, &copy);
    }
}

#[test]
fn images_of_other_versions_are_left_alone_and_the_versions_named() {
    for version in [VERSION_OLDEST - 1, FORMAT_VERSION + 1] {
        let disk = load(&path(FORMAT_VERSION, false, State::Clean));
        set_version(&disk, version);
        let writes = disk.writes();
        let (bdev, reactor): (Rc<dyn Bdev>, _) = (disk.clone(), reactor());
        let inner = reactor.clone();
        let (mounted, checked) = reactor.block_on(async move {
            let mounted = Store::open(bdev.clone(), inner, OpenOptions::default()).await;
            (mounted.map(drop), check(&bdev).await.map(drop))
        });
        let known = format!("{VERSION_OLDEST} to {FORMAT_VERSION}");
        let expected = format!("superblock: format version {version}, known are {known}");
        assert_eq!(mounted.unwrap_err().to_string(), expected);
        assert_eq!(checked.unwrap_err().to_string(), expected);
        assert_eq!(disk.writes(), writes);
    }
}

#[test]
fn what_is_written_today_holds_the_same() {
    for (sums, state) in kinds() {
        verify(&make(sums, state), state);
    }
}

/// The bit in the superblock is all that says so: without it the checksums are items that do not belong there, and
/// with one more the image is that of a later version.
#[test]
fn checksums_are_a_feature_that_code_without_it_refuses() {
    let check_with = |features: u64| {
        let disk = load(&path(FORMAT_VERSION, true, State::Clean));
        let mut stored = [0; 8];
        disk.peek(SUPERBLOCK_OFFSETS[0] + 32, &mut stored);
        assert_eq!(stored, INCOMPAT_DATA_SUMS.to_le_bytes());
        set_bytes(&disk, 32, &features.to_le_bytes());
        let bdev: Rc<dyn Bdev> = disk;
        reactor().block_on(async move { check(&bdev).await })
    };
    let findings = check_with(0).unwrap().findings;
    assert!(findings.iter().all(|finding| matches!(finding, Finding::Checksums { .. })), "{findings:?}");
    assert!(!findings.is_empty());
    let refused = check_with(INCOMPAT_DATA_SUMS | 2).unwrap_err();
    assert_eq!(refused.to_string(), "unknown incompatible features 0x2");
}
