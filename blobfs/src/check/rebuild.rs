//! Writes a repaired tree beside the one that is there.
//!
//! Order of writes, and what each step prevents:
//!
//! 1. changed leaves, bitmaps, inner nodes and the chunk map, to places and blocks that nothing of what was
//!    found uses: a power cut, or an error, leaves what was there as repairable as before;
//! 2. FLUSH: a superblock must not become durable before what it names;
//! 3. the copy of the superblock that does *not* count so far, durable by FUA. From here on the repaired tree
//!    counts: its generation is higher;
//! 4. the other copy with the next generation: two valid copies that follow each other, so that a mount needs
//!    no consent.
//!
//! Between 3 and 4 nothing that the older copy names is overwritten. A journal that cannot be read is cleared
//! last of all.
//!
//! Leaves that do not change are named by the new inner nodes where they are. They are read again while the
//! tree is written, so memory does not grow with it; if a part that could be read before cannot be read now,
//! nothing is switched.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use bdev::{AlignedBuf, Bdev, IoBuffers, WriteFlags};

use super::Progress;
use super::edits::{Edits, Merge, Origin};
use super::finding::Findings;
use super::repair::unsteady;
use super::survey::Subject;
use super::tree::{Leaf, Places, Rescued, Step, Walk};
use super::usage::BlockSet;
use crate::error::FsError;
use crate::ondisk::chunk_map::{self, CHUNK_NODES, ChunkEntry};
use crate::ondisk::node::{ABSENT, Node, SLOT_LEN};
use crate::ondisk::superblock::{NodePtr, Superblock};
use crate::ondisk::{Key, Kind};
use crate::store::{
    Chunks, OpenError, chunk_in_data_area, page_buffer, reserve_nodes, write_page, write_superblock,
};
use crate::units::BlockAddr;

/// Pages that are written at a time.
const WRITES_AT_A_TIME: usize = 32;

/// Bytes of the journal that are cleared at a time.
const CLEAR_LEN: u64 = 1 << 20;

/// What is to be written.
pub(super) struct Plan<'a> {
    /// The superblock, except for what is known only when the tree is written.
    pub(super) superblock: Superblock,
    pub(super) edits: &'a Edits,
    pub(super) rescued: &'a [Rescued],
    /// Parts of the tree that cannot be read.
    pub(super) gaps: u64,
    /// Blocks in use when the repair is done; what the rebuild itself needs is added.
    pub(super) used: BlockSet,
    /// Blocks that more than one thing uses.
    pub(super) used_twice: BlockSet,
    /// Blocks that must not be written.
    pub(super) avoid: BlockSet,
}

/// Writes the repaired tree and switches to it.
///
/// # Errors
/// The device's; no room; reads that give other results than before. Nothing was switched then, unless it
/// was the device that failed to write a superblock.
pub(super) async fn rebuild(
    subject: Subject<'_>,
    plan: Plan<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<(), OpenError> {
    let Subject { bdev, superblock: old, journal, mut places, .. } = subject;
    let total = places.marked();
    let mut room = Room::new(&plan, &places);
    let mut writer = Writer::new(bdev, &plan.superblock);
    places.walk_again();
    let mut walk = Walk::new(bdev, &old, plan.rescued);
    let mut merge = Merge::new(&journal.items, plan.edits);
    let (mut gaps, mut ignored) = (0, Findings::limited());
    let mut leaf_items = Vec::new();
    while let Some(step) = walk.next(&mut places, &mut ignored).await {
        match step {
            Step::Gap => gaps += 1,
            Step::Leaf(leaf) => {
                let changed = merge_leaf(&mut merge, &leaf, &mut leaf_items);
                if changed || !room.keeps(leaf.ptr) {
                    writer.add_items(&leaf_items, &mut room).await?;
                } else {
                    writer.keep_leaf(leaf_items[0].0, leaf.ptr, &mut room).await?;
                }
            }
        }
        progress(Progress { done: walk.nodes, total });
    }
    if gaps != plan.gaps {
        return Err(unsteady());
    }
    leaf_items.clear();
    merge.end(&mut |key, value, _| collect(&mut leaf_items, key, value));
    writer.add_items(&leaf_items, &mut room).await?;
    writer.end_leaf(&mut room).await?;
    let superblock = writer.finish(&mut room).await?;
    switch(bdev, superblock).await?;
    if journal.unreadable {
        clear_journal(bdev, &old).await?;
    }
    Ok(())
}

/// Writes zeros over the journal, which nobody needs any more: a mount could not read it either. A disk gives
/// sectors that it cannot read other places when they are written.
async fn clear_journal(bdev: &Rc<dyn Bdev>, superblock: &Superblock) -> Result<(), OpenError> {
    let (start, len) =
        (superblock.journal_start * u64::from(superblock.block_size), superblock.journal_bytes());
    let part = (bdev.limits().max_transfer as u64).min(CLEAR_LEN).min(len);
    let align = bdev.limits().dma_align.max(bdev.limits().block_size) as usize;
    let zeros = IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(part as usize, align)));
    let mut done = 0;
    while done < len {
        let count = part.min(len - done);
        bdev.write(start + done, zeros.slice(0, count as usize), WriteFlags::NONE).await?;
        done += count;
    }
    if bdev.limits().volatile_cache {
        bdev.flush().await?;
    }
    Ok(())
}

type Items = Vec<(Key, Vec<u8>)>;

/// Bitmaps are counted anew, so those that are there are left out.
fn collect(items: &mut Items, key: &Key, value: &[u8]) {
    if key.kind != Kind::Group {
        items.push((*key, value.to_vec()));
    }
}

/// Merges a leaf's items with all that changes; whether that makes it another leaf.
fn merge_leaf(merge: &mut Merge<'_>, leaf: &Leaf, items: &mut Items) -> bool {
    items.clear();
    let (before, mut from_tree) = (merge.changed, 0);
    let mut see = |key: &Key, value: &[u8], origin: Origin| {
        from_tree += usize::from(origin == Origin::Tree);
        collect(items, key, value);
    };
    for index in 0..leaf.node.count() {
        merge.item(&leaf.node.key(index), leaf.node.value(index), &mut see);
    }
    let whole = from_tree == leaf.node.count() && items.len() == from_tree;
    merge.changed != before || !whole || items.is_empty()
}

/// Writes both copies of the superblock.
async fn switch(bdev: &Rc<dyn Bdev>, superblock: Superblock) -> Result<(), OpenError> {
    if bdev.limits().volatile_cache {
        bdev.flush().await?;
    }
    write_superblock(bdev, &superblock).await?;
    let second = Superblock { generation: superblock.generation + 1, ..superblock };
    Ok(write_superblock(bdev, &second).await?)
}

/// Metadata chunks, before and after, and which places can be written.
struct Room {
    superblock: Superblock,
    /// As the new chunk map says.
    chunks: BTreeMap<u64, ChunkEntry>,
    /// Places that can be written.
    free: VecDeque<u64>,
    used: BlockSet,
    avoid: BlockSet,
    /// Nodes of the next chunk, and where the search for free blocks goes on: there is no room for a chunk of this
    /// size before.
    next_chunk: (u32, u64),
}

impl Room {
    fn new(plan: &Plan<'_>, places: &Places) -> Self {
        let superblock = plan.superblock.clone();
        let mut room = Self {
            chunks: places
                .chunks
                .entries()
                .map(|entry| (entry.start, ChunkEntry { used: 0, ..entry }))
                .collect(),
            free: VecDeque::new(),
            used: plan.used.clone(),
            avoid: plan.avoid.clone(),
            next_chunk: (CHUNK_NODES, superblock.first_data_block()),
            superblock,
        };
        let node_blocks = room.superblock.node_blocks();
        for entry in places.chunks.entries() {
            let unmarked = (0..entry.nodes).filter(|place| entry.used & 1 << place == 0);
            let blocks = unmarked.map(|place| entry.start + u64::from(place) * node_blocks);
            room.free.extend(blocks.filter(|block| {
                !places.is_reached(*block) && !plan.used_twice.touches(&room.superblock, *block, node_blocks)
            }));
        }
        room.adopt(&places.chunks, &places.reached());
        room
    }

    /// Makes chunks of places that pointers lead to, but that are in no chunk.
    fn adopt(&mut self, chunks: &Chunks, reached: &[u64]) {
        let node_blocks = self.superblock.node_blocks();
        let mut last: Option<u64> = None;
        for block in reached {
            let mine = chunk_in_data_area(&self.superblock, *block, 1)
                && !chunks.overlaps(*block, node_blocks)
                && !self.used.touches(&self.superblock, *block, node_blocks);
            if !mine {
                continue;
            }
            self.take_blocks(*block, node_blocks);
            let joined = last.and_then(|start| self.chunks.get_mut(&start)).filter(|chunk| {
                chunk.nodes < CHUNK_NODES && chunk.start + u64::from(chunk.nodes) * node_blocks == *block
            });
            match joined {
                Some(chunk) => chunk.nodes += 1,
                None => {
                    self.chunks.insert(*block, ChunkEntry { start: *block, used: 0, nodes: 1 });
                    last = Some(*block);
                }
            }
        }
    }

    fn take_blocks(&mut self, start: u64, count: u64) {
        self.used.change(&self.superblock, start, count, true);
        self.avoid.change(&self.superblock, start, count, true);
    }

    /// The chunk that a place lies in, and its bit.
    fn find(&mut self, block: u64) -> Option<(&mut ChunkEntry, u64)> {
        let node_blocks = self.superblock.node_blocks();
        let (_, chunk) = self.chunks.range_mut(..=block).next_back()?;
        let distance = block - chunk.start;
        let place = distance / node_blocks;
        let fits = distance.is_multiple_of(node_blocks) && place < u64::from(chunk.nodes);
        fits.then_some((chunk, 1 << place))
    }

    /// Whether a node can stay where it is.
    fn keeps(&mut self, ptr: NodePtr) -> bool {
        self.find(ptr.addr).is_some()
    }

    /// A place is used from now on.
    fn mark(&mut self, block: u64) {
        if let Some((chunk, bit)) = self.find(block) {
            chunk.used |= bit;
        }
    }

    /// A place to write to.
    fn take(&mut self) -> Result<u64, OpenError> {
        if self.free.is_empty() {
            self.claim()?;
        }
        let block = self.free.pop_front().ok_or(FsError::NoSpace)?;
        self.mark(block);
        Ok(block)
    }

    /// Makes a chunk of free blocks, as large as there is room for.
    fn claim(&mut self) -> Result<(), OpenError> {
        let node_blocks = self.superblock.node_blocks();
        loop {
            let (nodes, from) = self.next_chunk;
            let count = u64::from(nodes) * node_blocks;
            if nodes == 0 {
                return Err(FsError::NoSpace.into());
            }
            let Some(start) = self.avoid.find_free(&self.superblock, from, count) else {
                self.next_chunk = (nodes / 2, self.superblock.first_data_block());
                continue;
            };
            self.next_chunk = (nodes, start + count);
            self.take_blocks(start, count);
            self.chunks.insert(start, ChunkEntry { start, used: 0, nodes });
            self.free.extend((0..u64::from(nodes)).map(|place| start + place * node_blocks));
            return Ok(());
        }
    }

    /// Places that are free once the repaired tree counts.
    fn free_afterwards(&self) -> usize {
        self.chunks.values().map(|chunk| (chunk.nodes - chunk.used.count_ones()) as usize).sum()
    }

    fn map_pages(&self) -> usize {
        let per_page = chunk_map::entries_per_page(self.superblock.node_size as usize);
        self.chunks.len().div_ceil(per_page).max(1)
    }
}

/// Writes nodes and keeps what leads to them.
struct Writer<'a> {
    bdev: &'a Rc<dyn Bdev>,
    superblock: Superblock,
    /// The leaf that is being filled.
    leaf: Node,
    /// Finished leaves in key order.
    leaves: Vec<(Key, NodePtr)>,
    writes: Vec<bdev::Io>,
}

impl<'a> Writer<'a> {
    fn new(bdev: &'a Rc<dyn Bdev>, superblock: &Superblock) -> Self {
        let leaf = Node::new(superblock.node_size as usize, 0);
        Self { bdev, superblock: superblock.clone(), leaf, leaves: Vec::new(), writes: Vec::new() }
    }

    async fn add_items(&mut self, items: &[(Key, Vec<u8>)], room: &mut Room) -> Result<(), OpenError> {
        for (key, value) in items {
            if self.leaf.used() + SLOT_LEN + value.len() > self.leaf.capacity() {
                self.end_leaf(room).await?;
            }
            self.leaf.insert(self.leaf.count(), key, value);
        }
        Ok(())
    }

    /// A leaf stays where it is.
    async fn keep_leaf(&mut self, first: Key, ptr: NodePtr, room: &mut Room) -> Result<(), OpenError> {
        self.end_leaf(room).await?;
        room.mark(ptr.addr);
        self.leaves.push((first, ptr));
        Ok(())
    }

    /// Writes the leaf that is being filled, if there is something in it.
    async fn end_leaf(&mut self, room: &mut Room) -> Result<(), OpenError> {
        if self.leaf.count() == 0 {
            return Ok(());
        }
        let leaf = std::mem::replace(&mut self.leaf, Node::new(self.superblock.node_size as usize, 0));
        let first = leaf.key(0);
        let ptr = self.write_node(&leaf, &[], room).await?;
        self.leaves.push((first, ptr));
        Ok(())
    }

    async fn write_node(
        &mut self,
        node: &Node,
        children: &[NodePtr],
        room: &mut Room,
    ) -> Result<NodePtr, OpenError> {
        let generation = self.superblock.generation;
        let mut ptr = NodePtr { addr: room.take()?, generation, crc: 0 };
        let mut page = page_buffer(self.bdev, &self.superblock);
        ptr.crc = node.encode(ptr, self.superblock.uuid, children, &mut page);
        self.write(ptr.addr, page).await?;
        Ok(ptr)
    }

    async fn write(&mut self, block: u64, page: AlignedBuf) -> Result<(), OpenError> {
        self.writes.push(write_page(self.bdev, &self.superblock, BlockAddr(block), page));
        if self.writes.len() >= WRITES_AT_A_TIME {
            self.drain().await?;
        }
        Ok(())
    }

    async fn drain(&mut self) -> Result<(), OpenError> {
        let writes = std::mem::take(&mut self.writes);
        Ok(reactor::sync::join_all(writes).await.into_iter().collect::<Result<(), _>>()?)
    }

    /// Writes what is above and before the leaves: bitmaps, inner nodes, chunk map. Gives the superblock.
    async fn finish(mut self, room: &mut Room) -> Result<Superblock, OpenError> {
        self.claim_rest(room)?;
        let others = std::mem::take(&mut self.leaves);
        let bitmaps: Items =
            room.used.bitmaps().map(|(group, bits)| (Key::group(group), bits.to_vec())).collect();
        self.add_items(&bitmaps, room).await?;
        self.end_leaf(room).await?;
        self.leaves.extend(others);
        let (root, root_level) = self.write_inner(room).await?;
        let chunk_map = self.write_map(room).await?;
        self.drain().await?;
        let free_blocks = self.superblock.block_count - room.used.len();
        Ok(Superblock { root, root_level, chunk_map, free_blocks, ..self.superblock })
    }

    /// Claims places for all that is to come, so that the bitmaps are final; and, if there is room for it,
    /// those that a mount keeps free.
    fn claim_rest(&self, room: &mut Room) -> Result<(), OpenError> {
        let reserve = reserve_nodes(&self.superblock);
        loop {
            let needed = self.places_needed(room);
            if room.free.len() < needed {
                room.claim()?;
            } else if room.free_afterwards() >= needed + reserve || room.claim().is_err() {
                return Ok(());
            }
        }
    }

    /// An upper bound of the places for bitmaps, inner nodes and chunk map.
    fn places_needed(&self, room: &Room) -> usize {
        let node_size = self.superblock.node_size as usize;
        let capacity = Node::new(node_size, 0).capacity();
        let per_leaf = capacity / (SLOT_LEN + self.superblock.group_blocks as usize / 8);
        let bitmaps = room.used.bitmaps().count().div_ceil(per_leaf);
        let fan_out = capacity / (2 * SLOT_LEN);
        let (mut level, mut inner) = (self.leaves.len() + bitmaps, 1);
        while level > 1 {
            level = level.div_ceil(fan_out);
            inner += level;
        }
        bitmaps + inner + room.map_pages()
    }

    /// Writes the inner nodes; gives the root and its level.
    async fn write_inner(&mut self, room: &mut Room) -> Result<(NodePtr, u8), OpenError> {
        let node_size = self.superblock.node_size as usize;
        let (mut level, mut below) = (0, std::mem::take(&mut self.leaves));
        while below.len() > 1 {
            level += 1;
            let fan_out = Node::new(node_size, level).capacity() / (2 * SLOT_LEN);
            let mut above = Vec::with_capacity(below.len().div_ceil(fan_out));
            for children in below.chunks(fan_out) {
                let mut node = Node::new(node_size, level);
                for (index, (key, _)) in children.iter().enumerate() {
                    node.insert_child(index, key, ABSENT);
                }
                let pointers: Vec<NodePtr> = children.iter().map(|(_, ptr)| *ptr).collect();
                above.push((children[0].0, self.write_node(&node, &pointers, room).await?));
            }
            below = above;
        }
        // The bitmap of superblocks and journal is always there.
        let root = below.first().map(|(_, ptr)| *ptr).ok_or(FsError::NoSpace)?;
        Ok((root, level))
    }

    /// Writes the chunk map, its last page first.
    async fn write_map(&mut self, room: &mut Room) -> Result<NodePtr, OpenError> {
        let pages = (0..room.map_pages()).map(|_| room.take()).collect::<Result<Vec<u64>, _>>()?;
        let entries: Vec<ChunkEntry> = room.chunks.values().copied().collect();
        let per_page = chunk_map::entries_per_page(self.superblock.node_size as usize);
        let mut next = NodePtr::default();
        for (number, addr) in pages.iter().enumerate().rev() {
            let from = (number * per_page).min(entries.len());
            let to = (from + per_page).min(entries.len());
            let mut ptr = NodePtr { addr: *addr, generation: self.superblock.generation, crc: 0 };
            let mut page = page_buffer(self.bdev, &self.superblock);
            ptr.crc = chunk_map::encode_page(&entries[from..to], ptr, next, self.superblock.uuid, &mut page);
            self.write(*addr, page).await?;
            next = ptr;
        }
        Ok(next)
    }
}
