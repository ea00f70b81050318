//! READ, WRITE, FSYNC, SYNCFS, FALLOCATE, LSEEK.

use std::rc::Rc;
use std::time::Duration;

use bdev::sim::{CrashChoice, SimDisk};
use zerocopy::{FromZeros, IntoBytes};

use super::client::*;
use crate::abi::*;
use crate::op;

const MAX: u64 = i64::MAX as u64;
const MIB: usize = 1 << 20;

/// Bytes that differ from place to place.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

#[test]
fn what_was_written_is_read_at_any_alignment() {
    let (_world, client) = exclusive();
    for (offset, len) in [(0, 1), (4095, 2), (4096, 4096), (511, 70_000), (0, MIB), (MIB as u64 - 1, MIB)] {
        let file = client.file(ROOT, &format!("{offset}-{len}"));
        let bytes = pattern(len);
        assert_eq!(client.write(file, offset, &bytes), Ok(len as u32));
        assert_eq!(client.getattr(file).unwrap().size, offset + len as u64);
        assert!(client.read(file, offset, len as u32).unwrap() == bytes, "{offset} {len}");
        if offset > 0 {
            let before = (offset as usize).min(MIB);
            assert!(client.read(file, offset - before as u64, before as u32).unwrap() == vec![0; before]);
        }
    }
}

#[test]
fn a_read_ends_with_the_file() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    client.write(file, 0, b"0123456789").unwrap();
    assert_eq!(client.read(file, 8, 100).unwrap(), b"89");
    for (offset, size) in [(10, 100), (1 << 40, 100), (MAX, 4096), (MAX - 1, 1 << 20), (0, 0)] {
        assert_eq!(client.read(file, offset, size).unwrap(), b"", "{offset} {size}");
    }
    assert_eq!(client.read(file, MAX + 1, 1), Err(libc::EINVAL));
    assert_eq!(client.read(file, u64::MAX, 1), Err(libc::EINVAL));
}

#[test]
fn the_last_byte_of_the_largest_file_can_be_written_and_read() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    assert_eq!(client.write(file, MAX - 1, b"x"), Ok(1));
    assert_eq!(client.getattr(file).unwrap().size, MAX);
    assert_eq!(client.read(file, MAX - 2, 100).unwrap(), b"\0x");
    assert_eq!(client.write(file, MAX - 1, b"xy"), Err(libc::EFBIG));
    assert_eq!(client.write(file, MAX, b"x"), Err(libc::EFBIG));
    assert_eq!(client.write(file, MAX + 1, b"x"), Err(libc::EINVAL));
    assert_eq!(client.write(file, u64::MAX, b"x"), Err(libc::EINVAL));
}

#[test]
fn lengths_that_lie_are_refused() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let write = |size, bytes: &[u8]| {
        let args = fuse_write_in { size, ..fuse_write_in::new_zeroed() };
        client.get::<fuse_write_out>(op::FUSE_WRITE, file, &[args.as_bytes(), bytes]).map(|out| out.size)
    };
    assert_eq!(write(11, b"0123456789"), Err(libc::EINVAL));
    assert_eq!(write(u32::MAX, b"0123456789"), Err(libc::EINVAL));
    assert_eq!(write(MIB as u32 + 1, &vec![0; MIB + 1]), Err(libc::EINVAL));
    // What follows the stated size is not written.
    assert_eq!(write(4, b"0123456789"), Ok(4));
    assert_eq!(client.read(file, 0, 100).unwrap(), b"0123");
    let read = |size, room| {
        let args = fuse_read_in { size, ..fuse_read_in::new_zeroed() };
        client.finish(client.send(op::FUSE_READ, file, args.as_bytes(), room))
    };
    assert_eq!(read(101, 16 + 100), Err(libc::EINVAL));
    assert_eq!(read(u32::MAX, 16 + 100), Err(libc::EINVAL));
    assert_eq!(read(MIB as u32 + 1, 16 + 2 * MIB), Err(libc::EINVAL));
    assert_eq!(read(100, 16 + 100).unwrap(), b"0123");
}

#[test]
fn only_regular_files_have_data() {
    let (_world, client) = exclusive();
    let dir = client.mkdir(ROOT, "dir").unwrap();
    let fifo = client.mknod(ROOT, "fifo", libc::S_IFIFO, 0).unwrap().nodeid;
    for (node, errno) in [(dir, libc::EISDIR), (fifo, libc::EINVAL)] {
        assert_eq!(client.read(node, 0, 10), Err(errno));
        assert_eq!(client.write(node, 0, b"x"), Err(errno));
        assert_eq!(client.fallocate(node, 0, 0, 10), Err(errno));
    }
}

#[test]
fn who_caches_writes_decides_where_appended_bytes_go() {
    let world = World::new();
    for (export, expected) in [(EXCLUSIVE, &b"0123\0\0\0\0ab"[..]), (NO_CACHE, b"0123ab")] {
        let client = world.client(export);
        let file = client.file(ROOT, &format!("{:?}", export.cache));
        client.write(file, 0, b"0123").unwrap();
        // The exclusive client still holds bytes 4 to 7.
        assert_eq!(client.write_as(file, 8, b"ab", libc::O_APPEND, 0), Ok(2));
        assert_eq!(client.read(file, 0, 100).unwrap(), expected);
    }
}

#[test]
fn pages_that_the_client_writes_back_change_no_times() {
    let (world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let before = client.getattr(file).unwrap();
    world.sleep(Duration::from_secs(10));
    client.write_as(file, 0, b"x", 0, FUSE_WRITE_CACHE).unwrap();
    let after = client.getattr(file).unwrap();
    assert_eq!((after.mtime, after.ctime, after.size), (before.mtime, before.ctime, 1));
    client.write(file, 0, b"y").unwrap();
    let after = client.getattr(file).unwrap();
    assert_eq!((after.mtime, after.ctime), (before.mtime + 10, before.ctime + 10));
}

#[test]
fn a_write_drops_privileges_when_the_client_says_so() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let mode = fuse_setattr_in { mode: 0o6755, ..fuse_setattr_in::new_zeroed() };
    client.setattr(file, SetattrValid::FATTR_MODE, mode).unwrap();
    client.write(file, 0, b"x").unwrap();
    assert_eq!(client.getattr(file).unwrap().mode & 0o7777, 0o6755);
    client.write_as(file, 0, b"x", 0, FUSE_WRITE_KILL_SUIDGID).unwrap();
    assert_eq!(client.getattr(file).unwrap().mode & 0o7777, 0o755);
}

/// Does `work`, cuts the power with nothing of the disk's cache surviving, and shows what "file" holds.
fn after_power_cut(work: impl FnOnce(&World, &Client, u64)) -> Option<Vec<u8>> {
    let (world, disk) = World::on_disk();
    let client = world.client(EXCLUSIVE);
    let file = client.file(ROOT, "file");
    work(&world, &client, file);
    let disk: Rc<SimDisk> = disk.crash(CrashChoice::Nothing);
    let world = World::mount(disk, world.reactor.clone());
    let client = world.client(EXCLUSIVE);
    let file = client.find(ROOT, "file").ok()?;
    Some(client.read(file, 0, 100).unwrap())
}

#[test]
fn what_is_synced_survives_a_power_cut() {
    let unsynced = after_power_cut(|_, client, file| {
        client.write(file, 0, b"data").unwrap();
    });
    assert_eq!(unsynced, None, "the test sees what is lost");
    let whole = Some(b"data".to_vec());
    let fsync = fuse_fsync_in::new_zeroed();
    let fdatasync = fuse_fsync_in { fsync_flags: FUSE_FSYNC_FDATASYNC, ..fsync };
    for args in [fsync, fdatasync] {
        let synced = after_power_cut(|_, client, file| {
            client.write(file, 0, b"data").unwrap();
            client.done(op::FUSE_FSYNC, file, &[args.as_bytes()]).unwrap();
        });
        assert_eq!(synced, whole);
    }
    let synced = after_power_cut(|_, client, file| {
        client.write(file, 0, b"data").unwrap();
        client.done(op::FUSE_SYNCFS, ROOT, &[&[0; 8]]).unwrap();
    });
    assert_eq!(synced, whole);
    for flags in [libc::O_DSYNC, libc::O_SYNC] {
        let synced = after_power_cut(|_, client, file| {
            client.write_as(file, 0, b"data", flags, 0).unwrap();
        });
        assert_eq!(synced, whole);
    }
    let named = after_power_cut(|_, client, _| {
        client.done(op::FUSE_FSYNCDIR, ROOT, &[fsync.as_bytes()]).unwrap();
    });
    assert_eq!(named, Some(Vec::new()));
}

#[test]
fn fallocate_does_what_its_mode_says() {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;
    const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    client.fallocate(file, KEEP, 0, 8192).unwrap();
    let attr = client.getattr(file).unwrap();
    assert_eq!((attr.size, attr.blocks), (0, 16));
    client.fallocate(file, 0, 4096, 8192).unwrap();
    let attr = client.getattr(file).unwrap();
    assert_eq!((attr.size, attr.blocks), (12_288, 24));
    client.write(file, 0, &[1; 12_288]).unwrap();
    client.fallocate(file, PUNCH, 4000, 4192).unwrap();
    let attr = client.getattr(file).unwrap();
    assert_eq!((attr.size, attr.blocks), (12_288, 16));
    let expected = [vec![1; 4000], vec![0; 4192], vec![1; 4096]].concat();
    assert!(client.read(file, 0, 20_000).unwrap() == expected);
    client.fallocate(file, ZERO | KEEP, 12_000, 4384).unwrap();
    assert_eq!(client.getattr(file).unwrap().size, 12_288);
    client.fallocate(file, ZERO, 12_000, 4384).unwrap();
    assert_eq!(client.getattr(file).unwrap().size, 16_384);
    assert!(client.read(file, 12_000, 10_000).unwrap() == vec![0; 4384]);
}

#[test]
fn fallocate_refuses_what_it_does_not_know_and_cannot_hold() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    for mode in [
        libc::FALLOC_FL_PUNCH_HOLE,
        libc::FALLOC_FL_COLLAPSE_RANGE,
        libc::FALLOC_FL_INSERT_RANGE,
        libc::FALLOC_FL_UNSHARE_RANGE,
        -1,
    ] {
        assert_eq!(client.fallocate(file, mode, 0, 4096), Err(libc::EOPNOTSUPP), "{mode}");
    }
    assert_eq!(client.fallocate(file, 0, 0, 0), Err(libc::EINVAL));
    assert_eq!(client.fallocate(file, 0, MAX, 1), Err(libc::EFBIG));
    assert_eq!(client.fallocate(file, 0, 1, u64::MAX), Err(libc::EFBIG));
    assert_eq!(client.fallocate(file, 0, MAX + 1, 1), Err(libc::EINVAL));
    assert_eq!(client.fallocate(file, 0, 0, 1 << 40), Err(libc::ENOSPC));
    assert_eq!(client.getattr(file).unwrap().blocks, 0);
}

#[test]
fn a_write_that_has_room_for_a_part_is_refused_and_not_short() {
    const LEN: usize = 1 << 20;
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let mut offset = 0;
    let error = loop {
        match client.write(file, offset, &vec![1; LEN]) {
            Ok(len) => assert_eq!(len as usize, LEN),
            Err(error) => break error,
        }
        offset += LEN as u64;
        assert!(offset < 1 << 32, "the device is never full");
    };
    assert_eq!(error, libc::ENOSPC);
    assert_eq!(client.write_as(file, offset, &vec![1; LEN], libc::O_DIRECT, 0), Err(libc::ENOSPC));
    client.fsync(file).unwrap();
}

fn lseek(client: &Client, nodeid: u64, offset: u64, whence: i32) -> Result<u64, i32> {
    let args = fuse_lseek_in { fh: 0, offset, whence: whence.cast_unsigned(), padding: 0 };
    client.get::<fuse_lseek_out>(op::FUSE_LSEEK, nodeid, &[args.as_bytes()]).map(|out| out.offset)
}

#[test]
fn lseek_finds_data_and_holes() {
    let (_world, client) = uncached();
    let file = client.file(ROOT, "file");
    client.write(file, 8192, &[1; 4096]).unwrap();
    client.fallocate(file, 0, 16_384, 4096).unwrap();
    for (offset, data, hole) in
        [(0, Ok(8192), Ok(0)), (8192, Ok(8192), Ok(12_288)), (9000, Ok(9000), Ok(12_288))]
    {
        assert_eq!(lseek(&client, file, offset, libc::SEEK_DATA), data, "{offset}");
        assert_eq!(lseek(&client, file, offset, libc::SEEK_HOLE), hole, "{offset}");
    }
    assert_eq!(
        lseek(&client, file, 12_288, libc::SEEK_DATA),
        Err(libc::ENXIO),
        "unwritten blocks are no data"
    );
    for offset in [20_480, MAX, MAX + 1, u64::MAX] {
        assert_eq!(lseek(&client, file, offset, libc::SEEK_DATA), Err(libc::ENXIO));
        assert_eq!(lseek(&client, file, offset, libc::SEEK_HOLE), Err(libc::ENXIO));
    }
    for whence in [libc::SEEK_SET, libc::SEEK_CUR, libc::SEEK_END, 5, -1] {
        assert_eq!(lseek(&client, file, 0, whence), Err(libc::EINVAL));
    }
}

/// Linux does not write its cache back before it asks: `cp` of a file that is being written would take data
/// that is only in the guest's cache for a hole.
#[test]
fn a_client_that_caches_writes_is_not_told_of_holes() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    assert_eq!(lseek(&client, file, 0, libc::SEEK_DATA), Err(libc::ENOSYS));
}
