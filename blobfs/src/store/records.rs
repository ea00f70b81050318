//! What the records of transactions need in memory, and what they do: the same for a transaction that is
//! committed and for one that is replayed.

use super::blocks;
use super::chunks::Chunks;
use super::tree::{Plan, Tree, Unplanned};
use crate::ondisk::journal::Record;
use crate::ondisk::superblock::Superblock;

/// Why a record cannot be applied: it contradicts items, bitmaps or chunks.
pub(super) type Contradiction = &'static str;

impl From<Unplanned> for Contradiction {
    fn from(_: Unplanned) -> Self {
        "needs a node that is not in memory"
    }
}

/// Adds what a record needs to `plan`.
pub(super) fn plan(tree: &Tree, superblock: &Superblock, plan: &mut Plan, record: &Record<'_>) {
    let (start, count) = match record {
        Record::Put(key, _) => return tree.plan(plan, key, false),
        Record::Delete(key) => return tree.plan(plan, key, true),
        Record::Alloc(range) | Record::Free(range) => (range.start.0, u64::from(range.count)),
        Record::Claim { start, nodes } | Record::GiveBack { start, nodes } => {
            (*start, u64::from(*nodes) * superblock.node_blocks())
        }
        Record::Log { .. } | Record::Settle { .. } => return,
    };
    if blocks::in_data_area(superblock, start, count) {
        for (key, _) in blocks::groups(superblock, start, count) {
            tree.plan(plan, &key, false);
        }
    }
}

/// Applies a record that was planned, in its turn. On an error a part of it may be applied.
pub(super) fn apply(
    tree: &mut Tree,
    chunks: &mut Chunks,
    superblock: &Superblock,
    plan: &mut Plan,
    record: &Record<'_>,
) -> Result<(), Contradiction> {
    match record {
        Record::Put(key, value) => {
            if value.len() > super::item_len_max(superblock) {
                return Err("puts an item that is too long");
            }
            tree.put(plan, key, value)?;
        }
        Record::Delete(key) => {
            if !tree.delete(plan, key)? {
                return Err("deletes an item that does not exist");
            }
        }
        Record::Alloc(range) => blocks::mark(tree, chunks, superblock, plan, *range, true)?,
        Record::Free(range) => blocks::mark(tree, chunks, superblock, plan, *range, false)?,
        Record::Claim { start, nodes } => blocks::claim(tree, chunks, superblock, plan, *start, *nodes)?,
        Record::GiveBack { start, nodes } => {
            blocks::give_back(tree, chunks, superblock, plan, *start, *nodes)?;
        }
        Record::Log { .. } | Record::Settle { .. } => {}
    }
    Ok(())
}

/// The blocks that a record gives back: first and number.
pub(super) fn frees(superblock: &Superblock, record: &Record<'_>) -> Option<(u64, u64)> {
    match record {
        Record::Free(range) => Some((range.start.0, u64::from(range.count))),
        Record::GiveBack { start, nodes } => Some((*start, u64::from(*nodes) * superblock.node_blocks())),
        Record::Put(..)
        | Record::Delete(_)
        | Record::Alloc(_)
        | Record::Claim { .. }
        | Record::Log { .. }
        | Record::Settle { .. } => None,
    }
}

/// Blocks that a record makes free, or uses up (negative).
pub(super) fn blocks_freed(superblock: &Superblock, record: &Record<'_>) -> i64 {
    match record {
        Record::Put(..) | Record::Delete(_) | Record::Log { .. } | Record::Settle { .. } => 0,
        Record::Alloc(range) => -i64::from(range.count),
        Record::Free(range) => i64::from(range.count),
        Record::Claim { nodes, .. } => -((u64::from(*nodes) * superblock.node_blocks()) as i64),
        Record::GiveBack { nodes, .. } => (u64::from(*nodes) * superblock.node_blocks()) as i64,
    }
}
