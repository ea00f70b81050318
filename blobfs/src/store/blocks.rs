//! Changing the use of blocks in the bitmap items of the tree.

use super::chunks::Chunks;
use super::space::Space;
use super::tree::Tree;
use crate::ondisk::chunk_map::{CHUNK_NODES, ChunkEntry};
use crate::ondisk::superblock::Superblock;
use crate::ondisk::{Key, bitmap};
use crate::units::BlockRange;

/// Whether blocks belong to file data: neither superblocks, journal nor outside.
pub(crate) fn in_data_area(superblock: &Superblock, start: u64, count: u64) -> bool {
    let end = start.checked_add(count);
    count > 0
        && start >= superblock.first_data_block()
        && end.is_some_and(|end| end <= superblock.block_count)
}

/// Whether a chunk can be there.
pub(crate) fn chunk_in_data_area(superblock: &Superblock, start: u64, nodes: u32) -> bool {
    (1..=CHUNK_NODES).contains(&nodes)
        && in_data_area(superblock, start, u64::from(nodes) * superblock.node_blocks())
}

/// The groups that a range touches, with the bits in each.
pub(crate) fn groups(
    superblock: &Superblock,
    start: u64,
    count: u64,
) -> impl Iterator<Item = (Key, std::ops::Range<usize>)> + use<> {
    let per_group = u64::from(superblock.group_blocks);
    let end = start + count;
    (start / per_group..end.div_ceil(per_group)).map(move |group| {
        let base = group * per_group;
        let from = start.max(base) - base;
        let to = end.min(base + per_group) - base;
        (Key::group(group), from as usize..to as usize)
    })
}

/// Changes bits of the bitmap items. On an error some may be changed.
pub(super) fn mark_bits(
    tree: &mut Tree,
    superblock: &Superblock,
    start: u64,
    count: u64,
    used: bool,
) -> Result<(), &'static str> {
    let len = superblock.group_blocks as usize / 8;
    for (key, bits) in groups(superblock, start, count) {
        if used && tree.get(&key).is_none() {
            tree.put(&key, &vec![0; len]);
        }
        let changed =
            tree.update(&key, |bytes| bytes.len() == len && bitmap::change(bytes, bits.clone(), used));
        if changed != Some(true) {
            return Err(if used {
                "uses blocks that are used already"
            } else {
                "frees blocks that are free"
            });
        }
    }
    Ok(())
}

/// Marks data blocks as used or free, as a transaction says.
pub(super) fn mark(
    tree: &mut Tree,
    chunks: &Chunks,
    superblock: &Superblock,
    range: BlockRange,
    used: bool,
) -> Result<(), &'static str> {
    let (start, count) = (range.start.0, u64::from(range.count));
    if !in_data_area(superblock, start, count) || chunks.overlaps(start, count) {
        return Err("names blocks that are no data blocks");
    }
    mark_bits(tree, superblock, start, count, used)
}

/// Turns free blocks into a metadata chunk.
pub(super) fn claim(
    tree: &mut Tree,
    chunks: &mut Chunks,
    superblock: &Superblock,
    start: u64,
    nodes: u32,
) -> Result<(), &'static str> {
    if !chunk_in_data_area(superblock, start, nodes) {
        return Err("claims a chunk outside the data area");
    }
    mark_bits(tree, superblock, start, u64::from(nodes) * superblock.node_blocks(), true)?;
    match chunks.add(ChunkEntry { start, used: 0, nodes }) {
        true => Ok(()),
        false => Err("claims blocks of another chunk"),
    }
}

/// The free map that the bitmap items describe.
pub(super) fn free_map(tree: &Tree, superblock: &Superblock) -> Space {
    let mut space = Space::new();
    for (start, count) in free_runs(tree, superblock) {
        space.insert(start, count);
    }
    space
}

/// Free blocks as the bitmap items say, in runs that end at group boundaries.
pub(super) fn free_runs(tree: &Tree, superblock: &Superblock) -> Vec<(u64, u64)> {
    let per_group = u64::from(superblock.group_blocks);
    let mut runs = Vec::new();
    for group in 0..superblock.block_count.div_ceil(per_group) {
        let base = group * per_group;
        let len = per_group.min(superblock.block_count - base);
        match tree.get(&Key::group(group)) {
            None => runs.push((base, len)),
            Some(bits) => {
                let free = bitmap::free_runs(bits, len as usize);
                runs.extend(free.into_iter().map(|run| (base + run.start as u64, run.len() as u64)));
            }
        }
    }
    runs
}
