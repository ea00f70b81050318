//! An image with checksums of data, damaged while nobody serves it: its guest gets an error, the log says where.

use std::fs;
use std::path::Path;
use std::rc::Rc;

use bdev::open::{ImageSpec, OpenOptions};
use blobfs::store::{MkfsOptions, mkfs};
use reactor::{Reactor, SystemClock};

mod support;

use support::daemon::{DaemonGuest, Folder};
use support::guest::{init_request, words};

const LOOKUP: u32 = 1;
const READ: u32 = 15;
const WRITE: u32 = 16;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const CREATE: u32 = 35;

const ROOT: u64 = 1;
const EIO: i32 = 5;

/// Bytes of a request, and of the file: too many for the tree.
const PIECE: u32 = 1024;
const LEN: u32 = 8 * PIECE;

fn format(image: &Path) {
    let spec: ImageSpec = image.to_str().unwrap().parse().unwrap();
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let device =
        bdev::open(&spec, &OpenOptions { read_only: false, create: Some(16 << 20) }, &reactor).unwrap();
    let options = MkfsOptions { data_checksum: true, ..MkfsOptions::default() };
    reactor.block_on(async move { mkfs(&device, &options).await }).unwrap();
}

/// Arguments of READ and, with the bytes behind them, of WRITE.
fn transfer(offset: u32) -> Vec<u8> {
    words(&[0, 0, offset, 0, PIECE, 0, 0, 0, 0, 0])
}

fn connect(folder: &Folder) -> DaemonGuest {
    let mut guest = folder.guest();
    assert_eq!(guest.call(INIT, 0, &init_request(!(1 << 30))).0, 0);
    guest
}

fn node((error, body): (i32, Vec<u8>)) -> u64 {
    assert_eq!(error, 0);
    u64::from_le_bytes(body[..8].try_into().unwrap())
}

#[test]
fn a_damaged_block_is_an_error_for_its_reader_and_a_line_in_the_log() {
    let folder = Folder::new();
    let image = folder.path("image");
    format(&image);
    let daemon = folder.start(&image, &[]);
    let mut guest = connect(&folder);
    let file = node(guest.call(CREATE, ROOT, &[&words(&[2, 0o644, 0, 0])[..], b"file\0"].concat()));
    for offset in (0..LEN).step_by(PIECE as usize) {
        let bytes = vec![if offset < LEN / 2 { 0xa7 } else { 0xb7 }; PIECE as usize];
        assert_eq!(guest.call(WRITE, file, &[transfer(offset), bytes].concat()).0, 0);
    }
    assert_eq!(guest.call(FSYNC, file, &[0; 16]).0, 0);
    drop(guest);
    assert!(!daemon.stop().contains("checksum"));

    let mut bytes = fs::read(&image).unwrap();
    let block = bytes.chunks(4096).position(|block| block.iter().all(|byte| *byte == 0xb7)).unwrap();
    bytes[block * 4096 + 100] ^= 1;
    fs::write(&image, bytes).unwrap();

    let daemon = folder.start(&image, &[]);
    let mut guest = connect(&folder);
    let file = node(guest.call(LOOKUP, ROOT, b"file\0"));
    assert_eq!(guest.call(READ, file, &transfer(0)), (0, vec![0xa7; PIECE as usize]));
    for offset in [LEN / 2, LEN - PIECE] {
        assert_eq!(guest.call(READ, file, &transfer(offset)).0, -EIO);
    }
    drop(guest);
    let log = daemon.stop();
    let line = log.lines().find(|line| line.contains("file data does not have its checksum")).expect(&log);
    for place in [format!("inode={file}"), "offset=4096".to_owned(), format!("block={block}")] {
        assert!(line.contains(&place), "{line}");
    }
}
