//! Changing the use of blocks in the bitmap items of the tree.

use std::ops::Range;

use super::chunks::Chunks;
use super::records::Contradiction;
use super::tree::{Plan, Tree};
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
) -> impl Iterator<Item = (Key, Range<usize>)> + use<> {
    let per_group = u64::from(superblock.group_blocks);
    let end = start + count;
    (start / per_group..end.div_ceil(per_group)).map(move |group| {
        let base = group * per_group;
        let from = start.max(base) - base;
        let to = end.min(base + per_group) - base;
        (Key::group(group), from as usize..to as usize)
    })
}

/// Numbers of the groups that a range touches, as far as they exist.
pub(super) fn group_numbers(superblock: &Superblock, start: u64, count: u64) -> Range<u64> {
    let per_group = u64::from(superblock.group_blocks);
    let end = start.saturating_add(count).min(superblock.block_count);
    start / per_group..end.div_ceil(per_group)
}

/// Changes bits of the bitmap items, which are the next ones of the plan. On an error some may be changed.
pub(super) fn mark_bits(
    tree: &mut Tree,
    superblock: &Superblock,
    plan: &mut Plan,
    start: u64,
    count: u64,
    used: bool,
) -> Result<(), Contradiction> {
    let len = superblock.group_blocks as usize / 8;
    for (key, bits) in groups(superblock, start, count) {
        // A group without an item is wholly free.
        let mut fresh = if used { vec![0; len] } else { Vec::new() };
        let absent = used.then_some(&mut fresh[..]);
        let change = |bytes: &mut [u8]| bytes.len() == len && bitmap::change(bytes, bits, used);
        if tree.update(plan, &key, absent, change)? != Some(true) {
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
    plan: &mut Plan,
    range: BlockRange,
    used: bool,
) -> Result<(), Contradiction> {
    let (start, count) = (range.start.0, u64::from(range.count));
    if !in_data_area(superblock, start, count) || chunks.overlaps(start, count) {
        return Err("names blocks that are no data blocks");
    }
    mark_bits(tree, superblock, plan, start, count, used)
}

/// Turns free blocks into a metadata chunk.
pub(super) fn claim(
    tree: &mut Tree,
    chunks: &mut Chunks,
    superblock: &Superblock,
    plan: &mut Plan,
    start: u64,
    nodes: u32,
) -> Result<(), Contradiction> {
    if !chunk_in_data_area(superblock, start, nodes) {
        return Err("claims a chunk outside the data area");
    }
    mark_bits(tree, superblock, plan, start, u64::from(nodes) * superblock.node_blocks(), true)?;
    match chunks.add(ChunkEntry { start, used: 0, nodes }) {
        true => Ok(()),
        false => Err("claims blocks of another chunk"),
    }
}

/// Turns an empty metadata chunk into free blocks.
pub(super) fn give_back(
    tree: &mut Tree,
    chunks: &mut Chunks,
    superblock: &Superblock,
    plan: &mut Plan,
    start: u64,
    nodes: u32,
) -> Result<(), Contradiction> {
    if !chunks.remove_empty(start, nodes) {
        return Err("gives back a chunk that is used or does not exist");
    }
    mark_bits(tree, superblock, plan, start, u64::from(nodes) * superblock.node_blocks(), false)
}

/// The free runs of a group whose bitmap item is `bits`.
///
/// # Errors
/// What is wrong with the bitmap.
pub(super) fn free_runs(
    superblock: &Superblock,
    chunks: &Chunks,
    group: u64,
    bits: Option<&[u8]>,
) -> Result<Vec<Range<u64>>, String> {
    let per_group = u64::from(superblock.group_blocks);
    let base = group * per_group;
    let len = per_group.min(superblock.block_count - base);
    let runs: Vec<Range<u64>> = match bits {
        None => std::iter::once(base..base + len).collect(),
        Some(bits) if bits.len() as u64 * 8 != per_group => return Err(format!("has {} bytes", bits.len())),
        Some(bits) => bitmap::free_runs(bits, len as usize)
            .into_iter()
            .map(|run| base + run.start as u64..base + run.end as u64)
            .collect(),
    };
    // A hostile bitmap must not let data be written over metadata.
    let metadata = |run: &&Range<u64>| {
        run.start < superblock.first_data_block() || chunks.overlaps(run.start, run.end - run.start)
    };
    match runs.iter().find(metadata) {
        Some(run) => Err(format!("calls blocks {run:?} free, which hold metadata")),
        None => Ok(runs),
    }
}
