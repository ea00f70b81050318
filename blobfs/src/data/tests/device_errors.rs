//! A device that fails one operation: whoever asked for it is told, nobody else, and the next one works. Only a
//! failed journal ends all changes.

use bdev::BdevError;
use bdev::sim::{Effect, Fault, OpKind};

use super::*;

const EIO: i32 = 5;
const LEN: usize = 1 << 20;

fn failing(mount: &Mount, kind: OpKind) {
    mount.disk.inject(Fault::nth(kind, 0, Effect::Error { errno: EIO }));
}

fn is_eio<T: std::fmt::Debug>(result: Result<T, FsError>) {
    assert!(matches!(result, Err(FsError::Device(BdevError::Io { errno: EIO, .. }))), "{result:?}");
}

/// A file of [`LEN`] bytes on the device, none of it cached, its nodes in memory.
fn cold_file() -> (Mount, InodeId) {
    let mount = Mount::new(4096, false);
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move { write(&fs, ctx, inode, 0, &[7; LEN], BUFFERED).await });
    let mount = mount.remount();
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move { read(&fs, ctx, inode, LEN as u64 - 4096, 4096, DIRECT).await });
    (mount, inode)
}

/// Reads from a cold file while the next read of the device fails, and once more.
fn read_fails_once(offset: u64, len: usize, flags: IoFlags) {
    let (mount, inode) = cold_file();
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    failing(&mount, OpKind::Read);
    mount.reactor.block_on(async move {
        let buf = Rc::new(AlignedBuf::zeroed(len, 4096));
        is_eio(fs.read(ctx, inode, offset, IoBuffers::from_aligned(&buf), flags).await);
        assert_eq!(read(&fs, ctx, inode, offset, len, flags).await, vec![7; len]);
        write(&fs, ctx, inode, 0, &[8; 4096], BUFFERED).await;
        fs.sync_inode(inode, false).await.unwrap();
    });
}

#[test]
fn a_data_block_that_cannot_be_read_fails_that_read_alone() {
    read_fails_once(40_000, 9000, BUFFERED);
}

#[test]
fn a_direct_read_that_fails_is_told_to_its_caller_alone() {
    read_fails_once(40_960, 8192, DIRECT);
    // One with an end inside a block goes another way.
    read_fails_once(40_000, 9000, DIRECT);
}

#[test]
fn a_node_that_cannot_be_read_fails_that_call_alone() {
    let mount = Mount::new(4096, false);
    let names = ["first", "second", "third"];
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        // Long names, so that the tree has several levels.
        for number in 0..1000 {
            let name = format!("{number:0>200}");
            let spec = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };
            fs.run(|fs| fs.create(&ctx, InodeId::ROOT, name.as_bytes(), &spec)).await.unwrap();
        }
    });
    for name in names {
        mount.create(name);
    }
    let mount = mount.remount();
    for name in names {
        failing(&mount, OpKind::Read);
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        mount.reactor.block_on(async move {
            is_eio(fs.run(|fs| fs.lookup(&ctx, InodeId::ROOT, name.as_bytes())).await);
            fs.run(|fs| fs.lookup(&ctx, InodeId::ROOT, name.as_bytes())).await.unwrap();
        });
    }
    mount.create("fourth");
    mount.remount();
}

#[test]
fn a_direct_write_that_fails_is_told_to_its_caller_alone_and_keeps_no_blocks() {
    let (mount, inode) = cold_file();
    // Over blocks of the file, then behind its end.
    for offset in [0, LEN as u64] {
        failing(&mount, OpKind::Write);
        let free = mount.fs.stat_fs().free;
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        mount.reactor.block_on(async move {
            is_eio(fs.write(ctx, inode, offset, buffer(&[8; 8192]), DIRECT).await);
            assert_eq!(fs.stat_fs().free, free);
            assert_eq!(fs.get_attr(&ctx, inode).unwrap().size, LEN as u64);
            write(&fs, ctx, inode, offset, &[9; 8192], DIRECT).await;
            assert_eq!(read(&fs, ctx, inode, offset, 8192, BUFFERED).await, [9; 8192]);
            resize(&fs, ctx, inode, LEN as u64).await;
        });
    }
    mount.remount();
}

#[test]
fn a_write_of_the_journal_that_fails_ends_all_changes_but_no_reads() {
    let (mount, inode) = cold_file();
    mount.create("not durable");
    failing(&mount, OpKind::Write);
    let (fs, ctx, disk) = (mount.fs.clone(), mount.ctx, mount.disk.clone());
    mount.reactor.block_on(async move {
        is_eio(fs.sync_all().await);
        let (writes, read_only) = (disk.writes(), FsError::ReadOnly);

        let spec = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };
        let made = fs.run(|fs| fs.create(&ctx, InodeId::ROOT, b"new", &spec)).await;
        assert_eq!(made.unwrap_err(), read_only);
        assert_eq!(fs.run(|fs| fs.unlink(&ctx, InodeId::ROOT, b"f")).await, Err(read_only.clone()));
        for flags in [BUFFERED, DIRECT] {
            let written = fs.write(ctx, inode, 0, buffer(&[8; 4096]), flags).await;
            assert_eq!(written, Err(read_only.clone()));
        }
        let shorter = SetAttr { size: Some(5), ..SetAttr::default() };
        let resized = fs.run(|fs| fs.set_attr(&ctx, inode, &shorter)).await;
        assert_eq!(resized.unwrap_err(), read_only);
        let punched = fs.fallocate(ctx, inode, FallocateMode::PunchHole, 0, 4096).await;
        assert_eq!(punched, Err(read_only));
        // What was not durable then never will be.
        is_eio(fs.sync_all().await);

        for (offset, flags) in [(0, DIRECT), (100_000, BUFFERED)] {
            assert_eq!(read(&fs, ctx, inode, offset, 50_000, flags).await, [7; 50_000]);
        }
        fs.run(|fs| fs.lookup(&ctx, InodeId::ROOT, b"not durable")).await.unwrap();
        assert_eq!(fs.get_attr(&ctx, inode).unwrap().size, LEN as u64);
        is_eio(fs.unmount().await);
        assert_eq!(disk.writes(), writes, "nothing is written after a failure");
    });
}
