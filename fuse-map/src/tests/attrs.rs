//! GETATTR, SETATTR, STATX, STATFS.

use std::time::Duration;

use zerocopy::{FromZeros, IntoBytes};

use super::client::*;
use crate::abi::*;
use crate::op;

fn zero() -> fuse_setattr_in {
    fuse_setattr_in::new_zeroed()
}

#[test]
fn what_setattr_sets_getattr_shows() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let args = fuse_setattr_in {
        mode: 0o4711,
        uid: 12,
        gid: 34,
        atime: 5,
        atimensec: 6,
        mtime: (-7_i64).cast_unsigned(),
        mtimensec: 999_999_999,
        ctime: 8,
        ctimensec: 9,
        ..zero()
    };
    let valid = SetattrValid::FATTR_MODE
        | SetattrValid::FATTR_UID
        | SetattrValid::FATTR_GID
        | SetattrValid::FATTR_ATIME
        | SetattrValid::FATTR_MTIME
        | SetattrValid::FATTR_CTIME;
    client.setattr(file, valid, args).unwrap();
    let attr = client.getattr(file).unwrap();
    assert_eq!((attr.mode, attr.uid, attr.gid), (libc::S_IFREG | 0o4711, 12, 34));
    assert_eq!((attr.atime, attr.atimensec), (5, 6));
    assert_eq!((attr.mtime.cast_signed(), attr.mtimensec), (-7, 999_999_999));
    assert_eq!((attr.ctime, attr.ctimensec), (8, 9));
    assert_eq!((attr.ino, attr.blksize), (file, 4096));
}

/// The bits above those of `st_mode` came into the inode, which was damaged then by the checker's measure.
#[test]
fn bits_that_no_mode_has_are_left_out() {
    let (world, client) = exclusive();
    let args = fuse_mkdir_in { mode: u32::MAX, umask: 0 };
    let dir: fuse_entry_out = client.get(op::FUSE_MKDIR, ROOT, &[args.as_bytes(), &c("dir")]).unwrap();
    assert_eq!(dir.attr.mode, libc::S_IFDIR | 0o7777);
    let file = client.mknod(ROOT, "file", libc::S_IFREG | 0xffff_0000, 0).unwrap();
    assert_eq!(file.attr.mode, libc::S_IFREG);
    for node in [ROOT, dir.nodeid, file.nodeid] {
        let kind = client.getattr(node).unwrap().mode & libc::S_IFMT;
        let args = fuse_setattr_in { mode: u32::MAX, ..zero() };
        let attr = client.setattr(node, SetattrValid::FATTR_MODE, args).unwrap();
        assert_eq!(attr.mode, kind | 0o7777);
    }
    drop(client);
    world.assert_sound();
}

#[test]
fn now_is_the_time_of_the_server() {
    let (world, client) = exclusive();
    let file = client.file(ROOT, "file");
    world.sleep(Duration::from_secs(100));
    let now = client.getattr(client.file(ROOT, "later")).unwrap().ctime;
    let valid = SetattrValid::FATTR_ATIME | SetattrValid::FATTR_ATIME_NOW | SetattrValid::FATTR_MTIME_NOW;
    let attr = client.setattr(file, valid, fuse_setattr_in { atime: 1, ..zero() }).unwrap();
    assert_eq!((attr.atime, attr.mtime, attr.ctime), (now, now, now));
}

#[test]
fn times_out_of_range_are_refused() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let args = fuse_setattr_in {
        atimensec: 1_000_000_000,
        mtimensec: 1_000_000_000,
        ctimensec: 1_000_000_000,
        ..zero()
    };
    for valid in [SetattrValid::FATTR_ATIME, SetattrValid::FATTR_MTIME, SetattrValid::FATTR_CTIME] {
        assert_eq!(client.setattr(file, valid, args).err(), Some(libc::EINVAL));
    }
}

#[test]
fn sizes_shrink_and_grow_with_zeros() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    client.write(file, 0, &[7; 10_000]).unwrap();
    let resize = |size| client.setattr(file, SetattrValid::FATTR_SIZE, fuse_setattr_in { size, ..zero() });
    assert_eq!(resize(100).unwrap().size, 100);
    assert_eq!(resize(300).unwrap().size, 300);
    assert_eq!(client.read(file, 0, 1000).unwrap(), [vec![7; 100], vec![0; 200]].concat());
    assert_eq!(resize(i64::MAX as u64).unwrap().size, i64::MAX as u64);
    assert_eq!(resize(1 << 63).err(), Some(libc::EINVAL));
    assert_eq!(resize(0).unwrap().blocks, 0);
    let dir = client.mkdir(ROOT, "dir").unwrap();
    let link = client.symlink(ROOT, "link", "x").unwrap();
    assert_eq!(client.setattr(dir, SetattrValid::FATTR_SIZE, zero()).err(), Some(libc::EISDIR));
    assert_eq!(client.setattr(link, SetattrValid::FATTR_SIZE, zero()).err(), Some(libc::EINVAL));
}

#[test]
fn privileges_go_when_the_client_says_so() {
    let (_world, client) = exclusive();
    let file = client.file(ROOT, "file");
    let set = |mode| client.setattr(file, SetattrValid::FATTR_MODE, fuse_setattr_in { mode, ..zero() });
    let chown = SetattrValid::FATTR_UID | SetattrValid::FATTR_KILL_SUIDGID;
    let args = fuse_setattr_in { uid: 5, ..zero() };
    set(0o6755).unwrap();
    client.setxattr(file, "security.capability", b"capability", 0).unwrap();
    assert_eq!(client.setattr(file, SetattrValid::FATTR_UID, args).unwrap().mode & 0o7777, 0o6755);
    assert_eq!(client.setattr(file, chown, args).unwrap().mode & 0o7777, 0o755);
    assert_eq!(client.getxattr(file, "security.capability", 100), Err(libc::ENODATA));
    // Without group execute it is no privilege.
    set(0o6745).unwrap();
    assert_eq!(client.setattr(file, chown, args).unwrap().mode & 0o7777, 0o2745);
    let truncate = SetattrValid::FATTR_SIZE | SetattrValid::FATTR_KILL_SUIDGID;
    set(0o6755).unwrap();
    assert_eq!(client.setattr(file, truncate, zero()).unwrap().mode & 0o7777, 0o755);
    let dir = client.mkdir(ROOT, "dir").unwrap();
    let mode = fuse_setattr_in { mode: 0o2775, ..zero() };
    client.setattr(dir, SetattrValid::FATTR_MODE, mode).unwrap();
    assert_eq!(client.setattr(dir, chown, args).unwrap().mode & 0o7777, 0o2775);
}

#[test]
fn an_exclusive_client_may_keep_attributes_and_another_may_not() {
    let (world, client) = exclusive();
    let args = fuse_getattr_in::new_zeroed();
    let out: fuse_attr_out = client.get(op::FUSE_GETATTR, ROOT, &[args.as_bytes()]).unwrap();
    assert_eq!(out.attr_valid, 24 * 60 * 60);
    let out: fuse_attr_out = world.client(NO_CACHE).get(op::FUSE_GETATTR, ROOT, &[args.as_bytes()]).unwrap();
    assert_eq!((out.attr_valid, out.attr_valid_nsec), (0, 0));
}

#[test]
fn statx_knows_the_birth_time() {
    let (world, client) = exclusive();
    let device = client.mknod(ROOT, "device", libc::S_IFBLK, 0x1234_5678).unwrap();
    world.sleep(Duration::from_secs(10));
    client.setattr(device.nodeid, SetattrValid::FATTR_MODE, zero()).unwrap();
    let args = fuse_statx_in { sx_mask: libc::STATX_BTIME, ..fuse_statx_in::new_zeroed() };
    let out: fuse_statx_out = client.get(op::FUSE_STATX, device.nodeid, &[args.as_bytes()]).unwrap();
    assert_eq!(out.attr_valid, 24 * 60 * 60);
    let stat = out.stat;
    assert_eq!(stat.mask, libc::STATX_BASIC_STATS | libc::STATX_BTIME);
    assert_eq!(stat.btime.tv_sec.cast_unsigned(), device.attr.ctime);
    assert_eq!(stat.ctime.tv_sec, stat.btime.tv_sec + 10);
    assert_eq!((u32::from(stat.mode), stat.ino, stat.nlink), (libc::S_IFBLK, device.nodeid, 1));
    assert_eq!((stat.rdev_major, stat.rdev_minor), (0x456, 0x1_2378));
}

#[test]
fn statfs_shows_what_is_left() {
    let (_world, client) = exclusive();
    let statfs = || client.get::<fuse_kstatfs>(op::FUSE_STATFS, ROOT, &[]).unwrap();
    let before = statfs();
    assert_eq!((before.bsize, before.frsize, before.namelen), (4096, 4096, 255));
    assert!(before.bfree < before.blocks && before.bavail == before.bfree && before.ffree <= before.files);
    let file = client.file(ROOT, "file");
    client.write(file, 0, &vec![1; 1 << 20]).unwrap();
    client.fsync(file).unwrap();
    assert!(before.bfree - statfs().bfree >= 256);
}
