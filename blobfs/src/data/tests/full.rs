//! A device without free blocks: what a write has said is written has room for its metadata, too.

use super::*;

const BLOCK: usize = 512;
const PAGE: usize = 4096;
/// So large that the nodes which only deletions may use do not hold the metadata of all its blocks.
const LARGE: u64 = 320 << 20;

/// A mount whose only file has all free blocks, allocated ahead piece by piece.
fn all_allocated(data_checksum: bool) -> (Mount, InodeId, u64) {
    let options =
        MkfsOptions { block_size: BLOCK as u32, node_size: 1024, data_checksum, ..MkfsOptions::default() };
    let mount = Mount::sized(LARGE, options, false);
    let inode = mount.create("file");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    let len = mount.reactor.block_on(async move {
        let (mut len, mut piece) = (0, 1 << 20);
        while piece >= BLOCK as u64 {
            let mode = FallocateMode::Allocate { keep_size: false };
            match fs.fallocate(ctx, inode, mode, len, piece).await {
                Ok(()) => len += piece,
                Err(FsError::NoSpace) => piece /= 2,
                Err(error) => panic!("{error}"),
            }
        }
        fs.sync_inode(inode, false).await.unwrap();
        len
    });
    assert!(len > LARGE / 2);
    (mount, inode, len)
}

/// Writes a block at each of `offsets`, until one finds no space; gives how many were written. All of them have to be
/// there after a sync.
fn write_blocks(data_checksum: bool, flags: IoFlags, step: usize) -> (usize, usize) {
    let (mount, inode, len) = all_allocated(data_checksum);
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    let offsets: Vec<u64> = (0..len / PAGE as u64 * PAGE as u64).step_by(step).collect();
    let wanted = offsets.len();
    let to_write = offsets.clone();
    let written = mount.reactor.block_on(async move {
        for (done, offset) in to_write.iter().enumerate() {
            let content = [1 + (done % 250) as u8; PAGE];
            match fs.write(ctx, inode, *offset, buffer(&content), flags).await {
                Ok(count) => assert_eq!(count, PAGE),
                Err(FsError::NoSpace) => {
                    fs.sync_inode(inode, false).await.unwrap();
                    return done;
                }
                Err(error) => panic!("{error}"),
            }
        }
        fs.sync_inode(inode, false).await.unwrap();
        wanted
    });
    let mount = mount.remount();
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        for (done, offset) in offsets[..written].iter().enumerate() {
            let expected = [1 + (done % 250) as u8; PAGE];
            assert_eq!(read(&fs, ctx, inode, *offset, PAGE, BUFFERED).await, expected, "byte {offset}");
        }
        // There is still room to delete.
        fs.run(|fs| fs.unlink(&ctx, InodeId::ROOT, b"file")).await.unwrap();
    });
    (written, wanted)
}

#[test]
fn scattered_writes_into_blocks_allocated_ahead_lose_nothing() {
    for data_checksum in [false, true] {
        for flags in [BUFFERED, DIRECT] {
            let (written, wanted) = write_blocks(data_checksum, flags, 2 * PAGE);
            // So many extents have no room, but those for which nodes are kept back have.
            assert!((2000..wanted).contains(&written), "{written} of {wanted}");
        }
    }
}

#[test]
fn blocks_allocated_ahead_are_written_in_order_to_the_last_one() {
    for flags in [BUFFERED, DIRECT] {
        let (written, wanted) = write_blocks(false, flags, PAGE);
        assert_eq!(written, wanted);
    }
}

#[test]
fn free_blocks_in_short_runs_are_no_room_for_nodes() {
    // Too short for a chunk of nodes.
    const STEP: u64 = 2 * PAGE as u64;
    let (mount, inode, len) = all_allocated(false);
    let (hole, other) = (mount.create("hole"), mount.create("other"));
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    let written = mount.reactor.block_on(async move {
        for offset in (0..len - STEP).step_by(STEP as usize) {
            let punched = fs.fallocate(ctx, inode, FallocateMode::PunchHole, offset, PAGE as u64).await;
            match punched {
                Ok(()) => {}
                Err(FsError::NoSpace) => break,
                Err(error) => panic!("{error}"),
            }
        }
        fs.sync_all().await.unwrap();
        let mut written = Vec::new();
        for number in 0..3000 {
            let (file, offset) =
                if number % 2 == 0 { (hole, number * STEP) } else { (other, number * 3 * STEP) };
            let src = buffer(&[number as u8; PAGE]);
            match fs.write(ctx, file, offset, src, BUFFERED).await {
                Ok(PAGE) => written.push((file, offset, number as u8)),
                Err(FsError::NoSpace) => break,
                other => panic!("{other:?}"),
            }
        }
        for file in [hole, other, inode] {
            fs.sync_inode(file, false).await.unwrap();
        }
        written
    });
    let mount = mount.remount();
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        for (file, offset, byte) in written {
            assert_eq!(read(&fs, ctx, file, offset, PAGE, BUFFERED).await, [byte; PAGE]);
        }
        fs.run(|fs| fs.unlink(&ctx, InodeId::ROOT, b"file")).await.unwrap();
    });
}

#[test]
fn names_do_not_take_the_room_that_data_was_promised() {
    let (mount, inode, len) = all_allocated(false);
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        let spec = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };
        let (mut short, mut promised) = (Vec::new(), Vec::new());
        for number in 0.. {
            let name = format!("{number}");
            match fs.run(|fs| fs.create(&ctx, InodeId::ROOT, name.as_bytes(), &spec)).await {
                Ok(_) => short.push(name),
                Err(FsError::NoSpace) => break,
                Err(error) => panic!("{error}"),
            }
        }
        let offsets: Vec<u64> = (0..len - PAGE as u64).step_by(4 * PAGE).take(300).collect();
        for offset in offsets {
            match fs.write(ctx, inode, offset, buffer(&[7; PAGE]), BUFFERED).await {
                Ok(_) => promised.push(offset),
                Err(FsError::NoSpace) => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(promised.len() > 100, "{}", promised.len());
        for name in short {
            let (from, to) = (name.as_bytes(), format!("{name:x>250}"));
            let (from, to) = ((InodeId::ROOT, from), (InodeId::ROOT, to.as_bytes()));
            match fs.run(|fs| fs.rename(&ctx, from, to, RenameMode::NoReplace, false)).await {
                Ok(()) => {}
                Err(FsError::NoSpace) => break,
                Err(error) => panic!("{error}"),
            }
        }
        fs.sync_inode(inode, false).await.unwrap();
        for offset in promised {
            assert_eq!(read(&fs, ctx, inode, offset, PAGE, DIRECT).await, [7; PAGE]);
        }
    });
}

#[test]
fn who_asks_for_more_than_there_is_hears_of_it_while_others_write() {
    let options = MkfsOptions { block_size: 4096, ..MkfsOptions::default() };
    let mount = Mount::sized(DISK, options, true);
    let (small, large) = (mount.create("small"), mount.create("large"));
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    let told = Rc::new(std::cell::Cell::new(false));
    let (writer, asker, is_told) = (fs.clone(), fs, told.clone());
    let writing = async move {
        for number in 0..20_000 {
            if is_told.get() {
                return;
            }
            write(&writer, ctx, small, number % 500 * 8192, &[1; 4096], BUFFERED).await;
            if number % 100 == 0 {
                writer.fallocate(ctx, small, FallocateMode::PunchHole, 0, 500 * 8192).await.unwrap();
            }
            writer.store.reactor().sleep(Duration::from_micros(100)).await;
        }
        panic!("nobody was told");
    };
    let asking = async move {
        asker.store.reactor().sleep(Duration::from_millis(50)).await;
        let mode = FallocateMode::Allocate { keep_size: false };
        assert_eq!(asker.fallocate(ctx, large, mode, 0, 10 * DISK).await, Err(FsError::NoSpace));
        told.set(true);
    };
    let both: [std::pin::Pin<Box<dyn Future<Output = ()>>>; 2] = [Box::pin(writing), Box::pin(asking)];
    mount.reactor.block_on(join_all(both));
}
