//! What was freed is discarded once that is durable, and nothing else is.

use bdev::sim::OpKind;

use super::*;
use crate::fs::FallocateMode::PunchHole;

const LEN: u64 = 300 << 10;

/// Byte ranges of the device that hold these bytes of a file, in order.
async fn device_ranges(fs: &Rc<Fs>, inode: InodeId, bytes: Range<u64>) -> Vec<Range<u64>> {
    let block = u64::from(fs.store.block_size());
    let inode = fs.run(|fs| fs.inode(inode)).await.unwrap();
    let map = inode.live.borrow().map;
    let pieces = fs.run(|fs| fs.pieces(map, bytes.start / block..bytes.end.div_ceil(block))).await.unwrap();
    let stored = |piece: &super::super::extent::Piece| {
        piece.stored.map(|stored| stored.addr.0 * block..(stored.addr.0 + piece.count) * block)
    };
    pieces.iter().filter_map(stored).collect()
}

/// Ranges in order, those that adjoin as one.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut().filter(|last| last.end == range.start) {
            Some(last) => last.end = range.end,
            None => joined.push(range),
        }
    }
    joined
}

/// Discards so far; a new list begins.
fn discards(disk: &SimDisk) -> Vec<Range<u64>> {
    let asked = disk.take_trace();
    disk.trace();
    joined(asked.into_iter().filter(|asked| asked.kind == OpKind::Discard).map(|asked| asked.range).collect())
}

#[test]
fn exactly_what_was_freed_is_discarded_and_only_once_that_is_durable() {
    let mount = Mount::new(4096, false);
    let files = ["a", "b", "c", "d", "e", "f"].map(|name| (name, mount.create(name)));
    let (fs, ctx, disk) = (mount.fs.clone(), mount.ctx, mount.disk.clone());
    let reactor = mount.reactor.clone();
    let kept = mount.reactor.block_on(async move {
        for (number, (_, inode)) in files.iter().enumerate() {
            write(&fs, ctx, *inode, 0, &vec![number as u8 + 1; LEN as usize], BUFFERED).await;
            fs.sync_inode(*inode, false).await.unwrap();
        }
        disk.trace();

        // Deleted, cut, and with a hole. The others stay.
        let mut freed = Vec::new();
        for (name, inode) in [files[0], files[2]] {
            freed.extend(device_ranges(&fs, inode, 0..LEN).await);
            fs.run(|fs| fs.unlink(&ctx, InodeId::ROOT, name.as_bytes())).await.unwrap();
            fs.forget(ctx.session, inode, 1);
        }
        freed.extend(device_ranges(&fs, files[3].1, 100 << 10..LEN).await);
        resize(&fs, ctx, files[3].1, 100 << 10).await;
        freed.extend(device_ranges(&fs, files[4].1, 0..128 << 10).await);
        fs.fallocate(ctx, files[4].1, PunchHole, 0, 128 << 10).await.unwrap();
        assert!(discards(&disk).is_empty(), "discarded before it is durable that it is free");

        // The data of deleted files is freed by a task.
        reactor.sleep(Duration::from_secs(1)).await;
        fs.sync_all().await.unwrap();
        reactor.sleep(Duration::from_secs(1)).await;
        assert_eq!(discards(&disk), joined(freed));

        // Written over where they are: nothing is freed.
        write(&fs, ctx, files[1].1, 0, &vec![2; LEN as usize], DIRECT).await;
        fs.sync_all().await.unwrap();
        reactor.sleep(Duration::from_secs(10)).await;
        assert!(discards(&disk).is_empty());
        [
            (files[1].1, vec![2; LEN as usize]),
            (files[3].1, vec![4; 100 << 10]),
            (files[4].1, {
                let mut holed = vec![5; LEN as usize];
                holed[..128 << 10].fill(0);
                holed
            }),
        ]
    });
    // A discard leaves garbage: what is still in use was not hit, whatever a power cut takes back.
    let crashed = mount.disk.crash(bdev::sim::CrashChoice::Nothing);
    for mount in [Mount::open(mount.reactor.clone(), crashed), mount.remount()] {
        for (inode, content) in kept.clone() {
            let (fs, ctx) = (mount.fs.clone(), mount.ctx);
            mount.reactor.block_on(async move { check_all(fs, ctx, inode, &content).await });
        }
    }
}
