//! Places for tree nodes: metadata chunks and what is used inside them.
//!
//! A place that the last durable checkpoint uses is never given away: [`Chunks::release`] is called only
//! once a checkpoint that does not use it is durable.

use std::collections::BTreeMap;

use crate::ondisk::chunk_map::{ChunkEntry, mask};
use crate::units::BlockAddr;

/// All chunks of a file system.
pub(crate) struct Chunks {
    node_blocks: u64,
    /// By first block: use bits and number of nodes.
    chunks: BTreeMap<u64, ChunkEntry>,
    free: usize,
    total: usize,
    /// First block of the chunk where the last place was found.
    cursor: u64,
}

impl Chunks {
    /// No chunks.
    pub(crate) fn new(node_blocks: u64) -> Self {
        Self { node_blocks, chunks: BTreeMap::new(), free: 0, total: 0, cursor: 0 }
    }

    /// Places in all.
    pub(super) fn total(&self) -> usize {
        self.total
    }

    /// Places that can be given away.
    pub(super) fn free(&self) -> usize {
        self.free
    }

    /// Number of chunks.
    pub(crate) fn count(&self) -> usize {
        self.chunks.len()
    }

    /// All chunks in order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = ChunkEntry> + '_ {
        self.chunks.values().copied()
    }

    /// Whether blocks belong to a chunk.
    pub(crate) fn overlaps(&self, start: u64, count: u64) -> bool {
        let before = self.chunks.range(..start + count).next_back();
        before.is_some_and(|(_, chunk)| chunk.start + u64::from(chunk.nodes) * self.node_blocks > start)
    }

    /// Adds a chunk; `false` when it overlaps one that is there.
    pub(crate) fn add(&mut self, entry: ChunkEntry) -> bool {
        if self.overlaps(entry.start, u64::from(entry.nodes) * self.node_blocks) {
            return false;
        }
        self.free += (entry.nodes - entry.used.count_ones()) as usize;
        self.total += entry.nodes as usize;
        self.chunks.insert(entry.start, entry);
        true
    }

    /// A free place, from now on used.
    pub(super) fn allocate(&mut self) -> Option<BlockAddr> {
        if self.free == 0 {
            return None;
        }
        let has_room = |(_, chunk): &(&u64, &mut ChunkEntry)| chunk.used != mask(chunk.nodes);
        let found = match self.chunks.range_mut(self.cursor..).find(has_room) {
            Some(found) => Some(found),
            None => self.chunks.iter_mut().find(has_room),
        };
        let (start, chunk) = found?;
        let index = u64::from((!chunk.used).trailing_zeros());
        chunk.used |= 1 << index;
        self.free -= 1;
        self.cursor = *start;
        Some(BlockAddr(start + index * self.node_blocks))
    }

    /// Removes a chunk that no place of is used; `false` when there is no such chunk.
    pub(crate) fn remove_empty(&mut self, start: u64, nodes: u32) -> bool {
        let empty = self.chunks.get(&start).is_some_and(|chunk| chunk.used == 0 && chunk.nodes == nodes);
        if empty {
            self.chunks.remove(&start);
            self.free -= nodes as usize;
            self.total -= nodes as usize;
        }
        empty
    }

    /// An empty chunk, the one with the highest address: the search for places begins at the lowest.
    pub(super) fn empty(&self) -> Option<ChunkEntry> {
        self.chunks.values().rev().find(|chunk| chunk.used == 0).copied()
    }

    /// First block of the chunk that a place lies in, and the place's bit.
    pub(crate) fn find(&self, addr: BlockAddr) -> Option<(u64, u64)> {
        let (start, chunk) = self.chunks.range(..=addr.0).next_back()?;
        let distance = addr.0 - start;
        let index = distance / self.node_blocks;
        let is_place = distance.is_multiple_of(self.node_blocks) && index < u64::from(chunk.nodes);
        is_place.then(|| (*start, 1 << index))
    }

    /// Whether a place lies in a chunk and is used.
    pub(crate) fn is_used(&self, addr: BlockAddr) -> bool {
        self.find(addr).is_some_and(|(start, bit)| self.chunks[&start].used & bit != 0)
    }

    /// Gives a place back.
    pub(super) fn release(&mut self, addr: BlockAddr) {
        let Some((start, bit)) = self.find(addr) else {
            debug_assert!(false, "{addr:?} is no place of a node");
            return;
        };
        let chunk = self.chunks.get_mut(&start).expect("just found");
        debug_assert!(chunk.used & bit != 0, "{addr:?} is given back twice");
        chunk.used &= !bit;
        self.free += 1;
    }
}
