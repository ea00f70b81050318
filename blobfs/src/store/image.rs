//! From the device to memory: superblock, chunk map, tree, journal. Writes nothing.
//!
//! Everything read here may be hostile: each structure is checked before it is used, and what contradicts
//! another structure ends the load.

use std::collections::HashSet;
use std::rc::Rc;

use bdev::{AlignedBuf, Bdev, BdevError, IoBuffers};
use reactor::sync::join_all;

use super::checkpoint::buffer_align;
use super::chunks::Chunks;
use super::tree::{KEY_MIN, Tree};
use super::{OpenError, blocks};
use crate::error::{Corruption, FsError};
use crate::ondisk::journal::{self, BlockId, JOURNAL_HEADER_LEN, Record};
use crate::ondisk::node::{Expected, Node};
use crate::ondisk::superblock::{
    COUNTER_MAX, JournalTail, NodePtr, SUPERBLOCK_LEN, SUPERBLOCK_OFFSETS, Superblock, SuperblockError,
};
use crate::ondisk::{Key, chunk_map};
use crate::units::BlockAddr;

/// Nodes that are read at a time.
const READS_AT_A_TIME: usize = 64;

/// The state that the journal's end describes.
pub(crate) struct Image {
    pub(crate) superblock: Superblock,
    pub(super) tree: Tree,
    pub(super) chunks: Chunks,
    pub(super) map_pages: Vec<BlockAddr>,
    /// Where the valid part of the journal ends.
    pub(super) journal_end: JournalTail,
    pub(crate) last_txn: u64,
    pub(super) next_id: u64,
    /// Journal blocks and transactions that were replayed.
    pub(crate) replayed: Replayed,
}

/// What a replay did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Replayed {
    pub(crate) blocks: u64,
    pub(crate) txns: u64,
}

/// Both copies of the superblock as they are.
///
/// # Errors
/// The device's.
pub async fn read_superblocks(
    bdev: &Rc<dyn Bdev>,
) -> Result<[Result<Superblock, SuperblockError>; 2], BdevError> {
    let len = SUPERBLOCK_LEN.next_multiple_of(bdev.limits().block_size as usize);
    let mut copies = [Err(SuperblockError::NoMagic), Err(SuperblockError::NoMagic)];
    for (copy, offset) in copies.iter_mut().zip(SUPERBLOCK_OFFSETS) {
        if offset + len as u64 > bdev.limits().size {
            continue;
        }
        let bytes = read(bdev, offset, len).await?;
        if let Some(bytes) = bytes.first_chunk::<SUPERBLOCK_LEN>() {
            *copy = Superblock::decode(bytes);
        }
    }
    Ok(copies)
}

/// The superblock that counts.
///
/// # Errors
/// No usable copy; a damaged one, unless `accept_older`: it may have been the newer one.
pub fn choose_superblock(
    copies: [Result<Superblock, SuperblockError>; 2],
    accept_older: bool,
) -> Result<Superblock, OpenError> {
    match copies {
        [Ok(a), Ok(b)] if a.uuid != b.uuid => Err(OpenError::MixedSuperblocks),
        [Ok(a), Ok(b)] => Ok(if a.generation > b.generation { a } else { b }),
        [Ok(good), Err(error)] | [Err(error), Ok(good)] => match accept_older {
            true => Ok(good),
            false => Err(OpenError::DamagedSuperblock { error }),
        },
        [Err(SuperblockError::NoMagic), Err(SuperblockError::NoMagic)] => Err(OpenError::NotAFileSystem),
        [Err(error), Err(_)] => Err(OpenError::BadSuperblock { error }),
    }
}

/// Reads bytes in transfers that the device takes.
pub(crate) async fn read(bdev: &Rc<dyn Bdev>, offset: u64, len: usize) -> Result<Rc<AlignedBuf>, BdevError> {
    let buf = Rc::new(AlignedBuf::zeroed(len, buffer_align(bdev)));
    let buffers = IoBuffers::from_aligned(&buf);
    let part = bdev.limits().max_transfer.max(1);
    let mut done = 0;
    while done < len {
        let count = part.min(len - done);
        bdev.read(offset + done as u64, buffers.slice(done, count)).await?;
        done += count;
    }
    Ok(buf)
}

fn corrupt(superblock: &Superblock, structure: &'static str, addr: u64, problem: String) -> OpenError {
    let offset = addr.saturating_mul(u64::from(superblock.block_size));
    FsError::from(Corruption { structure, offset, problem }).into()
}

impl Image {
    /// Loads everything that the superblock names and replays the journal.
    pub(crate) async fn load(bdev: &Rc<dyn Bdev>, superblock: Superblock) -> Result<Self, OpenError> {
        let (chunks, map_pages) = load_chunks(bdev, &superblock).await?;
        let tree = load_tree(bdev, &superblock, &chunks).await?;
        let mut image = Self {
            tree,
            chunks,
            map_pages,
            journal_end: superblock.tail,
            last_txn: superblock.last_txn,
            next_id: superblock.next_id,
            replayed: Replayed::default(),
            superblock,
        };
        image.replay(bdev).await?;
        Ok(image)
    }

    /// Applies the valid part of the journal: from the checkpoint's tail on, each block that is the next one.
    async fn replay(&mut self, bdev: &Rc<dyn Bdev>) -> Result<(), OpenError> {
        while let Some((block, next)) = read_journal_block(bdev, &self.superblock, self.journal_end).await? {
            self.apply_block(&block)?;
            self.journal_end = next;
            self.replayed.blocks += 1;
        }
        Ok(())
    }

    fn apply_block(&mut self, block: &[u8]) -> Result<(), OpenError> {
        let problem = |image: &Self, what: &str| {
            let pos = image.superblock.journal_start
                + image.journal_end.pos / u64::from(image.superblock.block_size);
            corrupt(&image.superblock, "journal block", pos, what.to_owned())
        };
        debug_assert!(block.len() >= JOURNAL_HEADER_LEN);
        let txns = journal::decode_block(block).ok_or_else(|| problem(self, "malformed record"))?;
        for txn in txns {
            if Some(txn.header.seq.get()) != self.last_txn.checked_add(1) {
                return Err(problem(self, "transactions are not in sequence"));
            }
            if txn.header.next_id.get() > COUNTER_MAX {
                return Err(problem(self, "a number beyond what its counter can reach"));
            }
            for record in &txn.records {
                self.apply(record).map_err(|what| problem(self, what))?;
            }
            self.last_txn = txn.header.seq.get();
            self.next_id = self.next_id.max(txn.header.next_id.get());
            self.replayed.txns += 1;
        }
        Ok(())
    }

    fn apply(&mut self, record: &Record<'_>) -> Result<(), &'static str> {
        let superblock = &self.superblock;
        match record {
            Record::Put(key, value) => {
                if value.len() > super::item_len_max(superblock) {
                    return Err("an item is too long");
                }
                self.tree.put(key, value);
            }
            Record::Delete(key) => {
                if !self.tree.delete(key) {
                    return Err("deletes an item that does not exist");
                }
            }
            Record::Alloc(range) => blocks::mark(&mut self.tree, &self.chunks, superblock, *range, true)?,
            Record::Free(range) => blocks::mark(&mut self.tree, &self.chunks, superblock, *range, false)?,
            Record::Claim { start, nodes } => {
                blocks::claim(&mut self.tree, &mut self.chunks, superblock, *start, *nodes)?;
            }
        }
        Ok(())
    }
}

/// The valid journal block that follows `end`: at that place, or at the start when it did not fit there.
/// With it comes the end behind it.
pub(crate) async fn read_journal_block(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    end: JournalTail,
) -> Result<Option<(Vec<u8>, JournalTail)>, BdevError> {
    for pos in [end.pos, 0] {
        if let Some(found) = journal_block_at(bdev, superblock, end, pos).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

async fn journal_block_at(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    end: JournalTail,
    pos: u64,
) -> Result<Option<(Vec<u8>, JournalTail)>, BdevError> {
    let (area, unit) = (superblock.journal_bytes(), u64::from(superblock.block_size));
    let start = superblock.journal_start * unit + pos;
    if pos + unit > area {
        return Ok(None);
    }
    let id = BlockId {
        uuid: superblock.uuid,
        epoch: superblock.epoch,
        seq: end.seq,
        previous_crc: end.previous_crc,
    };
    let head = read(bdev, start, unit as usize).await?;
    let Some(len) = journal::block_len(&head, &id) else { return Ok(None) };
    let padded = (len as u64).next_multiple_of(unit);
    if pos + padded > area {
        return Ok(None);
    }
    let block = read(bdev, start, padded as usize).await?;
    let Some(crc) = journal::check_block(&block[..len]) else { return Ok(None) };
    let next = JournalTail { pos: pos + padded, seq: end.seq.wrapping_add(1), previous_crc: crc };
    Ok(Some((block[..len].to_vec(), next)))
}

async fn load_chunks(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
) -> Result<(Chunks, Vec<BlockAddr>), OpenError> {
    let mut chunks = Chunks::new(superblock.node_blocks());
    let mut pages = Vec::new();
    let mut next = Some(superblock.chunk_map);
    while let Some(ptr) = next {
        let problem = |what: String| corrupt(superblock, "chunk map", ptr.addr, what);
        // A checksum that covers its own successor's cannot form a circle, but hostile images need not be
        // made by the rules.
        if pages.contains(&BlockAddr(ptr.addr)) {
            return Err(problem("the pages form a circle".to_owned()));
        }
        let page = read_page(bdev, superblock, ptr, "chunk map").await?;
        let (entries, following) = chunk_map::decode_page(&page, ptr, superblock.uuid).map_err(problem)?;
        for entry in entries {
            if !blocks::chunk_in_data_area(superblock, entry.start, entry.nodes) || !chunks.add(entry) {
                return Err(problem(format!("chunk at block {} overlaps something", entry.start)));
            }
        }
        pages.push(BlockAddr(ptr.addr));
        next = following;
    }
    let inside = pages.iter().all(|page| chunks.is_used(*page));
    match inside {
        true => Ok((chunks, pages)),
        false => {
            Err(corrupt(superblock, "chunk map", superblock.chunk_map.addr, "does not list itself".into()))
        }
    }
}

async fn read_page(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    ptr: NodePtr,
    structure: &'static str,
) -> Result<Rc<AlignedBuf>, OpenError> {
    let end = ptr.addr.checked_add(superblock.node_blocks());
    if end.is_none_or(|end| end > superblock.block_count) {
        return Err(corrupt(superblock, structure, ptr.addr, "lies outside the device".to_owned()));
    }
    Ok(read(bdev, ptr.addr * u64::from(superblock.block_size), superblock.node_size as usize).await?)
}

/// A node that was read and whose children are still to be.
struct Parent {
    slot: u32,
    children: Vec<NodePtr>,
    /// Keys that the node may hold: from, and up to but not including.
    bounds: (Key, Option<Key>),
    level: u8,
    separators: Vec<Key>,
}

async fn load_tree(bdev: &Rc<dyn Bdev>, superblock: &Superblock, chunks: &Chunks) -> Result<Tree, OpenError> {
    let mut tree = Tree::unloaded(superblock.node_size as usize);
    let mut seen = HashSet::new();
    let mut load = Load { bdev, superblock, chunks, tree: &mut tree, seen: &mut seen };
    let bounds = (KEY_MIN, None);
    let page = read_page(bdev, superblock, superblock.root, "node").await?;
    let root = load.take(&page, superblock.root, superblock.root_level, bounds)?;
    load.tree.set_root(root.slot);
    let mut parents = vec![root];
    while let Some(parent) = parents.pop() {
        parents.extend(load.children_of(parent).await?);
    }
    Ok(tree)
}

struct Load<'a> {
    bdev: &'a Rc<dyn Bdev>,
    superblock: &'a Superblock,
    chunks: &'a Chunks,
    tree: &'a mut Tree,
    seen: &'a mut HashSet<u64>,
}

impl Load<'_> {
    async fn children_of(&mut self, parent: Parent) -> Result<Vec<Parent>, OpenError> {
        if parent.level == 0 {
            return Ok(Vec::new());
        }
        let mut slots = Vec::with_capacity(parent.children.len());
        let mut inner = Vec::new();
        for (batch_number, batch) in parent.children.chunks(READS_AT_A_TIME).enumerate() {
            let reads = batch.iter().map(|ptr| read_page(self.bdev, self.superblock, *ptr, "node"));
            let pages = join_all(reads).await;
            for (number, (ptr, page)) in batch.iter().zip(pages).enumerate() {
                let index = batch_number * READS_AT_A_TIME + number;
                let from = if index == 0 { parent.bounds.0 } else { parent.separators[index] };
                let to = parent.separators.get(index + 1).copied().or(parent.bounds.1);
                let node = self.take(&page?, *ptr, parent.level - 1, (from, to))?;
                slots.push(node.slot);
                if node.level > 0 {
                    inner.push(node);
                }
            }
        }
        self.tree.set_children(parent.slot, slots);
        Ok(inner)
    }

    fn take(
        &mut self,
        page: &[u8],
        ptr: NodePtr,
        level: u8,
        bounds: (Key, Option<Key>),
    ) -> Result<Parent, OpenError> {
        let problem = |what: String| corrupt(self.superblock, "node", ptr.addr, what);
        if !self.chunks.is_used(BlockAddr(ptr.addr)) {
            return Err(problem("lies in no metadata chunk, or the chunk map calls it free".to_owned()));
        }
        if !self.seen.insert(ptr.addr) {
            return Err(problem("has two parents".to_owned()));
        }
        let expected = Expected { ptr, level, uuid: self.superblock.uuid };
        let (node, children) = Node::decode(page, &expected).map_err(problem)?;
        let keys: Vec<Key> = (0..node.count()).map(|index| node.key(index)).collect();
        let below = keys.first().is_some_and(|key| *key < bounds.0);
        let above = keys.last().zip(bounds.1).is_some_and(|(key, end)| *key >= end);
        if below || above {
            return Err(problem("keys lie outside the range of its parent's slot".to_owned()));
        }
        if node.count() == 0 && ptr != self.superblock.root {
            return Err(problem("is empty".to_owned()));
        }
        let slot = self.tree.adopt(node, ptr);
        let separators = if level > 0 { keys } else { Vec::new() };
        Ok(Parent { slot, children, bounds, level, separators })
    }
}
