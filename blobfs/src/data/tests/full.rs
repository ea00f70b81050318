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
