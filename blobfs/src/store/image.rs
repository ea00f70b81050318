//! From the device to memory: superblock, chunk map, the tree's root, journal. Writes nothing.
//!
//! Of the tree only what the journal changes is read, so the time that this takes does not depend on the
//! file system's size.
//!
//! Everything read here may be hostile: each structure is checked before it is used, and what contradicts
//! another structure ends the load.

use std::ops::Range;
use std::rc::Rc;

use bdev::{AlignedBuf, Bdev, BdevError, IoBuffers};

use super::checkpoint::buffer_align;
use super::chunks::Chunks;
use super::load::{check_place, fetch};
use super::logged::Logged;
use super::tree::{Plan, Tree};
use super::{OpenError, blocks, records};
use crate::error::{Corruption, FsError};
use crate::ondisk::chunk_map;
use crate::ondisk::journal::{self, BlockId, JOURNAL_HEADER_LEN, Record};
use crate::ondisk::node::{Expected, Node};
use crate::ondisk::superblock::{
    COUNTER_MAX, JournalTail, NodePtr, SUPERBLOCK_LEN, SUPERBLOCK_OFFSETS, Superblock, SuperblockError,
};
use crate::units::BlockAddr;

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
    /// Blocks that the bitmaps call free.
    pub(super) free_blocks: u64,
    /// Journal blocks and transactions that were replayed.
    pub(crate) replayed: Replayed,
    /// File data that is in the journal only.
    pub(crate) logged: Logged,
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
    /// Loads chunk map and root and replays the journal. The tree keeps all that this reads.
    pub(crate) async fn load(bdev: &Rc<dyn Bdev>, superblock: Superblock) -> Result<Self, OpenError> {
        let (chunks, map_pages) = load_chunks(bdev, &superblock).await?;
        let tree = load_root(bdev, &superblock, &chunks, map_pages.len()).await?;
        let mut image = Self {
            tree,
            free_blocks: superblock.free_blocks,
            chunks,
            map_pages,
            journal_end: superblock.tail,
            last_txn: superblock.last_txn,
            next_id: superblock.next_id,
            replayed: Replayed::default(),
            logged: Logged::default(),
            superblock,
        };
        image.replay(bdev).await?;
        Ok(image)
    }

    /// Applies the valid part of the journal: from the checkpoint's tail on, each block that is the next one.
    async fn replay(&mut self, bdev: &Rc<dyn Bdev>) -> Result<(), OpenError> {
        let mut reader = JournalReader::new(bdev, &self.superblock);
        while let Some((block, next)) = reader.next(self.journal_end).await? {
            self.apply_block(bdev, &block).await?;
            self.journal_end = next;
            self.replayed.blocks += 1;
        }
        Ok(())
    }

    async fn apply_block(&mut self, bdev: &Rc<dyn Bdev>, block: &[u8]) -> Result<(), OpenError> {
        let pos =
            self.superblock.journal_start + self.journal_end.pos / u64::from(self.superblock.block_size);
        let superblock = self.superblock.clone();
        let problem = |what: &str| corrupt(&superblock, "journal block", pos, what.to_owned());
        debug_assert!(block.len() >= JOURNAL_HEADER_LEN);
        let txns = journal::decode_block(block).ok_or_else(|| problem("malformed record"))?;
        // What the whole block needs is read together.
        let mut plan = Plan::default();
        let all = || txns.iter().flat_map(|txn| &txn.records);
        self.bring(bdev, &mut plan, all).await?;
        for txn in &txns {
            if Some(txn.header.seq.get()) != self.last_txn.checked_add(1) {
                return Err(problem("transactions are not in sequence"));
            }
            if txn.header.next_id.get() > COUNTER_MAX {
                return Err(problem("a number beyond what its counter can reach"));
            }
            self.bring(bdev, &mut plan, || txn.records.iter()).await?;
            for record in &txn.records {
                self.apply(&mut plan, record).map_err(problem)?;
            }
            self.last_txn = txn.header.seq.get();
            self.next_id = self.next_id.max(txn.header.next_id.get());
            self.replayed.txns += 1;
        }
        Ok(())
    }

    /// Plans records, with all the nodes that they need in memory.
    async fn bring<'a, I: Iterator<Item = &'a Record<'a>>>(
        &mut self,
        bdev: &Rc<dyn Bdev>,
        plan: &mut Plan,
        records: impl Fn() -> I,
    ) -> Result<(), FsError> {
        loop {
            self.tree.begin_plan(plan);
            records().for_each(|record| records::plan(&self.tree, &self.superblock, plan, record));
            match self.tree.end_plan(plan) {
                Ok(()) => return Ok(()),
                Err(missing) => {
                    fetch(bdev, &self.superblock, &self.chunks, &mut self.tree, &missing).await?;
                }
            }
        }
    }

    fn apply(&mut self, plan: &mut Plan, record: &Record<'_>) -> Result<(), &'static str> {
        self.logged.apply(&self.superblock, record)?;
        let free = self.free_blocks.checked_add_signed(records::blocks_freed(&self.superblock, record));
        self.free_blocks = free.ok_or("uses more blocks than are free")?;
        records::apply(&mut self.tree, &mut self.chunks, &self.superblock, plan, record)
    }
}

/// Bytes of the journal that are read together, at most. Picked: a disk gives them about as fast as it can.
const WINDOW_MAX: u64 = 1 << 20;

/// Reads the journal block by block, with one read of the device for many.
pub(crate) struct JournalReader {
    bdev: Rc<dyn Bdev>,
    superblock: Superblock,
    /// Position in the area, and the bytes from there on.
    window: (u64, Rc<AlignedBuf>),
    /// Bytes to read next: more each time, since most mounts find an empty journal.
    ahead: u64,
    /// Where reading ahead has failed, in bytes of the area. A failing read may take a disk seconds, so nothing is read
    /// ahead from there or into there again, whatever the number of blocks in front of the bad place.
    fails: Range<u64>,
}

impl JournalReader {
    pub(crate) fn new(bdev: &Rc<dyn Bdev>, superblock: &Superblock) -> Self {
        Self {
            bdev: bdev.clone(),
            superblock: superblock.clone(),
            window: (0, Rc::new(AlignedBuf::zeroed(0, buffer_align(bdev)))),
            ahead: u64::from(superblock.block_size),
            fails: 0..0,
        }
    }

    /// The valid journal block that follows `end`: at that place, or at the start when it did not fit there.
    /// With it comes the end behind it.
    pub(crate) async fn next(
        &mut self,
        end: JournalTail,
    ) -> Result<Option<(Vec<u8>, JournalTail)>, BdevError> {
        for pos in [end.pos, 0] {
            if let Some(found) = self.block_at(end, pos).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    async fn block_at(
        &mut self,
        end: JournalTail,
        pos: u64,
    ) -> Result<Option<(Vec<u8>, JournalTail)>, BdevError> {
        let (area, unit) = (self.superblock.journal_bytes(), u64::from(self.superblock.block_size));
        if pos + unit > area {
            return Ok(None);
        }
        let id = BlockId {
            uuid: self.superblock.uuid,
            epoch: self.superblock.epoch,
            seq: end.seq,
            previous_crc: end.previous_crc,
        };
        let head = self.bytes(pos, unit).await?;
        let Some(len) = journal::block_len(head, &id) else { return Ok(None) };
        let padded = (len as u64).next_multiple_of(unit);
        if pos + padded > area {
            return Ok(None);
        }
        let block = &self.bytes(pos, padded).await?[..len];
        let Some(crc) = journal::check_block(block) else { return Ok(None) };
        let next = JournalTail { pos: pos + padded, seq: end.seq.wrapping_add(1), previous_crc: crc };
        Ok(Some((block.to_vec(), next)))
    }

    /// Bytes of the area.
    async fn bytes(&mut self, pos: u64, len: u64) -> Result<&[u8], BdevError> {
        let holds = |(start, bytes): &(u64, Rc<AlignedBuf>)| {
            *start <= pos && pos + len <= *start + bytes.len() as u64
        };
        if !holds(&self.window) {
            self.window = (pos, self.read(pos, len).await?);
        }
        let at = (pos - self.window.0) as usize;
        Ok(&self.window.1[at..at + len as usize])
    }

    /// Reads `len` bytes and some behind them. Those are left out if there is an error in them: they may be of no use.
    async fn read(&mut self, pos: u64, len: u64) -> Result<Rc<AlignedBuf>, BdevError> {
        let area = self.superblock.journal_bytes();
        let start = self.superblock.journal_start * u64::from(self.superblock.block_size);
        let ahead_max = match pos {
            _ if self.fails.contains(&pos) => 0,
            _ if pos < self.fails.start => self.fails.start - pos,
            _ => area - pos,
        };
        let window = self.ahead.min(ahead_max).max(len);
        self.ahead = (2 * self.ahead).min(WINDOW_MAX);
        match read(&self.bdev, start + pos, window as usize).await {
            Err(_) if window > len => {
                self.fails = pos..pos + window;
                read(&self.bdev, start + pos, len as usize).await
            }
            bytes => bytes,
        }
    }
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

async fn load_root(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    chunks: &Chunks,
    map_pages: usize,
) -> Result<Tree, OpenError> {
    let ptr = superblock.root;
    let page = read_page(bdev, superblock, ptr, "node").await?;
    check_place(superblock, chunks, BlockAddr(ptr.addr))?;
    let expected = Expected { ptr, level: superblock.root_level, uuid: superblock.uuid };
    let problem = |what: String| corrupt(superblock, "node", ptr.addr, what);
    let root = Node::decode(&page, &expected).map_err(problem)?;
    let live = (chunks.total() - chunks.free()).saturating_sub(map_pages);
    Ok(Tree::load(root, ptr, superblock.node_size as usize, live, usize::MAX))
}
