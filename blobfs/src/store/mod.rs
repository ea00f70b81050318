//! The transactional item store: what the rest of the file system stands on.
//!
//! One ordered map from [`Key`] to bytes, changed only by whole transactions; data blocks that are
//! reserved, allocated and freed through the same transactions; durability on request.
//!
//! | module | what it provides |
//! | --- | --- |
//! | `tree` | the items in memory: copy-on-write nodes, snapshots |
//! | `chunks` | places for tree nodes on the device |
//! | `space` | free data blocks, reservations, quarantine of freed blocks |
//! | `blocks` | the bitmap items that `space` is derived from |
//! | `journal` | the open journal block and the circular area |
//! | `checkpoint` | writing dirty nodes and the superblock |
//! | `image` | reading all that back |
//! | `open` | making and opening a file system |
//!
//! A transaction changes the tree at once and is appended to the open journal block. A *commit* round
//! writes that block; a *checkpoint* round writes the dirty nodes and empties the journal. Both run as
//! tasks of their own, one of each kind at a time, so nobody who waits for one can leave it half done.
//!
//! **All nodes are in memory**, from the mount to the end: memory and the time of a mount grow with the
//! metadata, and [`Wait::Nodes`] is never returned. Freed blocks are not discarded on the device.
//!
//! Invariants:
//! - nothing that the newest durable superblock or a durable journal block names is overwritten;
//! - there is always a free place for every dirty node and for the chunk map: admission
//!   ([`Store::commit`]) refuses what would break that, so a checkpoint never lacks room;
//! - journal blocks are written one after the other: a durable block has only durable predecessors;
//! - after a failed write or flush, or an inconsistency, nothing is written any more.

mod blocks;
mod checkpoint;
mod chunks;
mod image;
mod journal;
mod open;
mod space;
mod tree;

use std::cell::{Cell, RefCell};
use std::ops::ControlFlow;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bdev::{Bdev, IoBuffers, WriteFlags};
use reactor::Reactor;
use reactor::sync::Notify;

use crate::error::{Corruption, FsError, Try, Wait};
use crate::ondisk::Key;
use crate::ondisk::chunk_map::CHUNK_NODES;
use crate::ondisk::journal::{Record, TxnHeader};
use crate::ondisk::node::{NODE_HEADER_LEN, SLOT_LEN};
use crate::ondisk::superblock::Superblock;
use crate::txn::{Change, Txn};
use crate::units::{BlockAddr, BlockRange, TxnSeq};

use checkpoint::Checkpoint;
use journal::{Journal, Room, SealedBlock};
use space::{IoEpochs, Space};
use tree::Tree;

pub(crate) use blocks::{chunk_in_data_area, groups, in_data_area};
pub(crate) use chunks::Chunks;
pub use image::{choose_superblock, read_superblocks};
pub(crate) use image::{read, read_journal_block};
pub(crate) use open::check_features;
pub use open::{MkfsError, MkfsOptions, OpenError, OpenOptions, mkfs};

/// How long a transaction may stay in memory without anybody asking for it.
const COMMIT_INTERVAL: Duration = Duration::from_secs(5);

/// Smallest chunk, in nodes, that is worth claiming when free space is fragmented.
const CHUNK_NODES_MIN: u32 = 16;

/// Chunks that one transaction may claim in front of it: their records fit the journal's room for claims.
const CLAIMS_MAX: usize = 16;

/// Nodes that only shrinking transactions may use, so that a full device can still delete.
fn reserve_nodes(superblock: &Superblock) -> usize {
    (superblock.block_count / superblock.node_blocks() / 64).clamp(64, 1024) as usize
}

fn item_len_max(superblock: &Superblock) -> usize {
    crate::ondisk::node::item_len_max(superblock.node_size as usize)
}

/// A tree node that is not in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeRef {
    pub(crate) addr: BlockAddr,
}

/// Keeps what a wait brought into memory there until the operation ends.
#[derive(Default)]
pub struct Pins;

/// Blocks (and the metadata to map them) that later allocations can count on. Dropping it gives back what
/// was not used.
pub struct Reservation {
    store: Rc<Store>,
    blocks: u64,
}

impl Reservation {
    /// Data blocks left in the reservation.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Moves `blocks` of the reservation into one of its own.
    pub fn split(&mut self, blocks: u64) -> Reservation {
        let blocks = blocks.min(self.blocks);
        self.blocks -= blocks;
        Reservation { store: self.store.clone(), blocks }
    }

    /// Adds another reservation to this one.
    pub fn merge(&mut self, mut other: Reservation) {
        self.blocks += std::mem::take(&mut other.blocks);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.store.space.borrow_mut().unreserve(self.blocks);
    }
}

/// Blocks picked for data that is about to be written, not yet part of the tree. Name the range in
/// `Txn::alloc`, commit, then call [`Allocation::committed`]; dropped before that, the blocks are free again
/// once the device operations of that time have ended.
pub struct Allocation {
    store: Rc<Store>,
    range: BlockRange,
    committed: bool,
}

impl Allocation {
    /// The blocks.
    pub fn range(&self) -> BlockRange {
        self.range
    }

    /// The transaction that names the blocks has been applied.
    pub fn committed(mut self) {
        self.committed = true;
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if !self.committed {
            // No transaction has to become durable first.
            self.store.space.borrow_mut().quarantine(self.range, TxnSeq(0));
        }
    }
}

/// Held by a device operation on data blocks from mapping lookup to completion: blocks freed meanwhile are
/// not reused before it is dropped.
pub struct IoToken {
    epochs: Rc<RefCell<IoEpochs>>,
    epoch: u64,
}

impl Drop for IoToken {
    fn drop(&mut self) {
        self.epochs.borrow_mut().end(self.epoch);
    }
}

/// Space, in file system blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceUsage {
    /// Data and metadata blocks of the file system.
    pub total: u64,
    /// Blocks that can still be reserved for data.
    pub available: u64,
}

/// Rounds of a task that runs once at a time and that many may wait for.
#[derive(Default)]
struct Rounds {
    started: Cell<u64>,
    finished: Cell<u64>,
    changed: Notify,
}

impl Rounds {
    fn is_running(&self) -> bool {
        self.started.get() != self.finished.get()
    }

    fn start(&self) -> u64 {
        debug_assert!(!self.is_running());
        self.started.set(self.started.get() + 1);
        self.started.get()
    }

    fn finish(&self) {
        self.finished.set(self.started.get());
        self.changed.notify_all();
    }

    /// Waits until nothing runs.
    async fn idle(&self) {
        while self.is_running() {
            self.changed.notified().await;
        }
    }
}

/// The store. One per mounted file system, on one thread.
pub struct Store {
    this: Weak<Store>,
    bdev: Rc<dyn Bdev>,
    reactor: Rc<Reactor>,
    /// Identity, geometry and epoch; what changes with each checkpoint is kept in the fields below.
    superblock: Superblock,
    tree: RefCell<Tree>,
    chunks: RefCell<Chunks>,
    /// Where the chunk map of the last checkpoint is.
    map_pages: RefCell<Vec<BlockAddr>>,
    space: RefCell<Space>,
    journal: RefCell<Journal>,
    next_id: Cell<u64>,
    seq: Cell<u64>,
    durable: Cell<TxnSeq>,
    generation: Cell<u64>,
    reserve_nodes: usize,
    dirty_max: usize,
    readonly: bool,
    closed: Cell<bool>,
    /// The first failure.
    failed: RefCell<Option<FsError>>,
    commits: Rounds,
    checkpoints: Rounds,
    timer_armed: Cell<bool>,
}

impl Store {
    /// The device, for data I/O.
    pub fn bdev(&self) -> &Rc<dyn Bdev> {
        &self.bdev
    }

    /// The thread's reactor.
    pub fn reactor(&self) -> &Rc<Reactor> {
        &self.reactor
    }

    /// Bytes of a file system block.
    pub fn block_size(&self) -> u32 {
        self.superblock.block_size
    }

    /// Largest value of an item in bytes. Larger things (attribute values, long symbolic links on tiny
    /// geometries) go to extents.
    pub fn item_len_max(&self) -> usize {
        item_len_max(&self.superblock)
    }

    /// Largest transaction in bytes ([`Txn::journal_bytes`]). Longer work goes in pieces under an intent.
    pub fn txn_len_max(&self) -> usize {
        self.journal.borrow().txn_len_max().min(32 * 1024)
    }

    /// Keyed hash of a name: [`crate::ondisk::NAME_HASH_BITS`] bits, never 0.
    pub fn name_hash(&self, name: &[u8]) -> u64 {
        crate::ondisk::name_hash(self.superblock.hash_key, name)
    }

    /// A number for a new inode or map; never given twice, not even after a crash.
    pub fn next_id(&self) -> u64 {
        self.next_id.replace(self.next_id.get() + 1)
    }

    /// Calls `with` with the item's value, or `None` when there is no such item.
    ///
    /// # Errors
    /// [`Wait::Nodes`] when a node on the way is not cached; corruption found on the way.
    pub fn get<R>(&self, key: &Key, with: impl FnOnce(Option<&[u8]>) -> R) -> Try<R> {
        Ok(with(self.tree.borrow().get(key)))
    }

    /// Calls `each` for the items from `from` (inclusive) to `to` (exclusive) in order until it breaks.
    ///
    /// # Errors
    /// As [`Store::get`]. `each` was then called for the items before the missing node: a caller keeps
    /// what it got and resumes behind it.
    pub fn scan(
        &self,
        from: &Key,
        to: &Key,
        mut each: impl FnMut(&Key, &[u8]) -> ControlFlow<()>,
    ) -> Try<()> {
        let _ = self.tree.borrow().scan(from, to, &mut each);
        Ok(())
    }

    /// Calls `with` for the last item whose key is `<= key` and `>= not_before`, or with `None`.
    ///
    /// # Errors
    /// As [`Store::get`].
    pub fn last_at_or_before<R>(
        &self,
        key: &Key,
        not_before: &Key,
        with: impl FnOnce(Option<(&Key, &[u8])>) -> R,
    ) -> Try<R> {
        let tree = self.tree.borrow();
        let found = tree.last_at_or_before(key).filter(|(found, _)| found >= not_before);
        Ok(with(found.as_ref().map(|(key, value)| (key, *value))))
    }

    /// Applies a transaction to the items in memory and appends it to the open journal block, at once and
    /// as a whole. Nothing is durable before a [`Store::sync`] of the returned number.
    ///
    /// # Errors
    /// A wait (nothing was changed); [`FsError::ReadOnly`] after a failed journal; [`FsError::NoSpace`] for
    /// metadata; [`FsError::TooBig`] for what no transaction or item can hold; corruption when the
    /// transaction contradicts the items or bitmaps, after which the store is read-only.
    pub fn commit(&self, txn: &Txn) -> Try<TxnSeq> {
        self.check_writable()?;
        self.admit(txn)?;
        let seq = self.seq.get() + 1;
        if let Err(problem) = self.apply(txn, TxnSeq(seq)) {
            let error = FsError::from(Corruption {
                structure: "transaction",
                offset: txn.origin().session,
                problem: problem.to_owned(),
            });
            self.fail(error.clone());
            return Err(error.into());
        }
        self.append(txn.origin(), txn.changes().iter().map(|change| record(txn, change)));
        self.after_commit();
        Ok(TxnSeq(seq))
    }

    /// Checks everything that could keep a transaction from being applied, logged and checkpointed.
    fn admit(&self, txn: &Txn) -> Try<()> {
        let item_len_max = self.item_len_max();
        let fits = |change: &Change| match change {
            Change::Put { value, .. } => value.len() <= item_len_max,
            Change::Delete { .. } | Change::Alloc(_) | Change::Free(_) => true,
        };
        let len = txn.journal_bytes();
        if len > self.journal.borrow().txn_len_max() || !txn.changes().iter().all(fits) {
            return Err(FsError::TooBig.into());
        }
        match self.journal.borrow().room(len) {
            Room::Enough => {}
            Room::AfterCommit => return Err(Wait::Commit.into()),
            Room::AfterCheckpoint => return Err(Wait::Checkpoint.into()),
        }
        if self.tree.borrow().dirty() >= self.dirty_max {
            return Err(Wait::Checkpoint.into());
        }
        self.admit_nodes(txn)
    }

    /// Sees to it that there will be a place for every node that the transaction makes dirty.
    fn admit_nodes(&self, txn: &Txn) -> Try<()> {
        let shrinks =
            txn.changes().iter().any(|change| matches!(change, Change::Delete { .. } | Change::Free(_)));
        let kept = if shrinks || txn.is_promised() { 0 } else { self.reserve_nodes };
        let height = self.tree.borrow().height();
        let most = txn.changes().len() * 2 * height * 4 + self.put_nodes(txn) + 8;
        if self.slack() >= (most + kept) as i64 {
            return Ok(());
        }
        let need = (self.nodes_needed(txn) + kept) as i64;
        for _ in 0..CLAIMS_MAX {
            if self.slack() >= need || !self.claim_chunk() {
                break;
            }
        }
        if self.slack() >= need {
            return Ok(());
        }
        let after_checkpoint = {
            let chunks = self.chunks.borrow();
            let used = self.tree.borrow().live() + 2 * self.map_pages_max();
            chunks.total() as i64 - used as i64
        };
        if after_checkpoint >= need {
            Err(Wait::Checkpoint.into())
        } else if self.space.borrow().waits_for_commit(self.durable.get()) {
            Err(Wait::Commit.into())
        } else {
            Err(FsError::NoSpace.into())
        }
    }

    /// Pages of the chunk map, with one more chunk than there are.
    fn map_pages_max(&self) -> usize {
        checkpoint::map_pages(self.chunks.borrow().count() + 1, self.superblock.node_size as usize)
    }

    /// Places beyond those that the next checkpoint needs by now.
    fn slack(&self) -> i64 {
        let promised = self.tree.borrow().dirty() + self.map_pages_max();
        self.chunks.borrow().free() as i64 - promised as i64
    }

    /// Nodes that the bytes which a transaction puts can fill, when split nodes are a third full.
    fn put_nodes(&self, txn: &Txn) -> usize {
        let group_len = self.superblock.group_blocks as usize / 8;
        let bytes: usize = txn
            .changes()
            .iter()
            .map(|change| match change {
                Change::Put { value, .. } => SLOT_LEN + value.len(),
                Change::Alloc(range) => {
                    let groups = range.count as usize / self.superblock.group_blocks as usize + 2;
                    groups * (SLOT_LEN + group_len)
                }
                Change::Delete { .. } | Change::Free(_) => 0,
            })
            .sum();
        6 * bytes / (self.superblock.node_size as usize - NODE_HEADER_LEN) + 1
    }

    /// Nodes that the transaction can make dirty: those on the ways to its keys, two neighbours each by
    /// splits or one by a merge, what its bytes fill, and a new root.
    fn nodes_needed(&self, txn: &Txn) -> usize {
        let mut keys = Vec::new();
        for change in txn.changes() {
            match change {
                Change::Put { key, .. } | Change::Delete { key } => keys.push(*key),
                Change::Alloc(range) | Change::Free(range) => {
                    let groups = blocks::groups(&self.superblock, range.start.0, u64::from(range.count));
                    keys.extend(groups.map(|(key, _)| key));
                }
            }
        }
        let footprint = self.tree.borrow_mut().footprint(keys.iter());
        footprint.clean + 2 * footprint.touched + self.put_nodes(txn) + 4
    }

    /// Turns free blocks into places for nodes, by a transaction of its own. Blocks that are reserved for
    /// data are not touched.
    fn claim_chunk(&self) -> bool {
        let mut nodes = CHUNK_NODES;
        let node_blocks = self.superblock.node_blocks();
        let start = loop {
            let count = u64::from(nodes) * node_blocks;
            let mut space = self.space.borrow_mut();
            space.release(self.durable.get());
            if space.free() - space.reserved() >= count
                && let Some(start) = space.take_exact(count)
            {
                break start;
            }
            nodes /= 2;
            if nodes < CHUNK_NODES_MIN {
                return false;
            }
        };
        // The claim dirties the ways to at most two groups, and may have to add their items.
        let own = (8 * self.tree.borrow().height() + 8) as i64;
        if self.slack() + i64::from(nodes) < own {
            self.space.borrow_mut().insert(start, u64::from(nodes) * node_blocks);
            return false;
        }
        let claimed = {
            let (mut tree, mut chunks) = (self.tree.borrow_mut(), self.chunks.borrow_mut());
            blocks::claim(&mut tree, &mut chunks, &self.superblock, start, nodes)
        };
        match claimed {
            Ok(()) => {
                let claim = Record::Claim { start, nodes };
                self.append(crate::txn::Origin::default(), std::iter::once(claim));
                true
            }
            Err(problem) => {
                let problem = problem.to_owned();
                self.fail(Corruption { structure: "group bitmap", offset: 0, problem }.into());
                false
            }
        }
    }

    fn apply(&self, txn: &Txn, seq: TxnSeq) -> Result<(), &'static str> {
        let mut tree = self.tree.borrow_mut();
        let chunks = self.chunks.borrow();
        for change in txn.changes() {
            match change {
                Change::Put { key, value } => tree.put(key, txn.value(value)),
                Change::Delete { key } => {
                    if !tree.delete(key) {
                        return Err("deletes an item that does not exist");
                    }
                }
                Change::Alloc(range) => blocks::mark(&mut tree, &chunks, &self.superblock, *range, true)?,
                Change::Free(range) => {
                    blocks::mark(&mut tree, &chunks, &self.superblock, *range, false)?;
                    self.space.borrow_mut().quarantine(*range, seq);
                }
            }
        }
        Ok(())
    }

    fn append<'a>(&self, origin: crate::txn::Origin, records: impl Iterator<Item = Record<'a>>) {
        self.seq.set(self.seq.get() + 1);
        let header = TxnHeader {
            len: 0.into(),
            count: 0.into(),
            seq: self.seq.get().into(),
            session: origin.session.into(),
            request: origin.request.into(),
            next_id: self.next_id.get().into(),
        };
        self.journal.borrow_mut().append(header, records);
    }

    /// Starts what a transaction makes due: the timer, a commit, a checkpoint.
    fn after_commit(&self) {
        let Some(this) = self.this.upgrade() else { return };
        if !self.timer_armed.replace(true) {
            let weak = self.this.clone();
            let sleep = self.reactor.sleep(COMMIT_INTERVAL);
            drop(self.reactor.spawn(async move {
                sleep.await;
                if let Some(store) = weak.upgrade() {
                    store.timer_armed.set(false);
                    if store.journal.borrow().is_open() && store.check_writable().is_ok() {
                        // A failure is latched; whoever asks next is told.
                        let _ = store.sync(store.last_seq()).await;
                    }
                }
            }));
        }
        if self.journal.borrow().is_long() && !self.commits.is_running() {
            this.start_commit();
        }
        let due = self.journal.borrow().is_half_full() || self.tree.borrow().dirty() > self.dirty_max / 2;
        if due && !self.checkpoints.is_running() {
            this.start_checkpoint(false);
        }
    }

    /// Number of the last applied transaction.
    pub fn last_seq(&self) -> TxnSeq {
        TxnSeq(self.seq.get())
    }

    /// Waits until every transaction up to `seq` is durable, together with all data whose writes completed
    /// before the call. Concurrent calls share a commit.
    ///
    /// # Errors
    /// The device's error; from then on the store is read-only.
    pub async fn sync(self: &Rc<Self>, seq: TxnSeq) -> Result<(), FsError> {
        if self.readonly {
            return Ok(());
        }
        let nothing_to_do = seq <= self.durable.get() && !self.bdev.limits().volatile_cache;
        // A round that runs already may have flushed before the caller's data was written.
        let wanted = self.commits.started.get() + 1;
        loop {
            self.check_failed()?;
            if nothing_to_do || self.commits.finished.get() >= wanted {
                return Ok(());
            }
            if self.commits.is_running() {
                self.commits.changed.notified().await;
            } else {
                self.start_commit();
            }
        }
    }

    /// Seals the open block now and writes it in a task.
    fn start_commit(self: &Rc<Self>) {
        self.commits.start();
        let sealed = self.journal.borrow_mut().seal();
        let store = self.clone();
        drop(self.reactor.spawn(async move {
            if let Err(error) = store.write_block(sealed).await {
                store.fail(error);
            }
            store.commits.finish();
        }));
    }

    /// Makes data and then the block durable:
    ///
    /// 1. FLUSH: the block's extents name data that was written, but may be in the device's cache only;
    /// 2. the block with FUA: only now may anybody be told that its transactions are durable.
    async fn write_block(&self, sealed: Option<SealedBlock>) -> Result<(), FsError> {
        self.check_failed()?;
        if self.bdev.limits().volatile_cache {
            self.bdev.flush().await?;
        }
        if let Some(block) = sealed {
            self.bdev.write(block.offset, IoBuffers::from_aligned(&block.bytes), WriteFlags::FUA).await?;
            self.durable.set(block.last_txn);
            self.space.borrow_mut().release(block.last_txn);
        }
        Ok(())
    }

    /// Writes all nodes that were changed by now, and empties the journal.
    async fn checkpoint(self: &Rc<Self>) -> Result<(), FsError> {
        // A round that runs already was cut before the caller's transactions.
        let wanted = self.checkpoints.started.get() + 1;
        loop {
            self.check_failed()?;
            if self.checkpoints.finished.get() >= wanted {
                return Ok(());
            }
            if self.checkpoints.is_running() {
                self.checkpoints.changed.notified().await;
            } else {
                self.start_checkpoint(false);
            }
        }
    }

    fn start_checkpoint(self: &Rc<Self>, clean: bool) {
        self.checkpoints.start();
        let store = self.clone();
        drop(self.reactor.spawn(async move {
            if let Err(error) = store.checkpoint_round(clean).await {
                store.fail(error);
            }
            store.checkpoints.finish();
        }));
    }

    /// One checkpoint. The open block is sealed and the dirty nodes are taken in one step, so the
    /// checkpoint stands exactly at the end of a journal block.
    async fn checkpoint_round(self: &Rc<Self>, clean: bool) -> Result<(), FsError> {
        self.commits.idle().await;
        self.check_failed()?;
        self.start_commit();
        let cut = self.cut_checkpoint(clean);
        self.commits.idle().await;
        self.check_failed()?;
        self.write_checkpoint(cut).await
    }

    /// Cuts a checkpoint at the end of the last sealed block; the open block must be empty.
    fn cut_checkpoint(&self, clean: bool) -> (Checkpoint, u64) {
        debug_assert!(!self.journal.borrow().is_open());
        let (tail, position) = self.journal.borrow().end();
        let superblock = Superblock {
            generation: self.generation.get() + 1,
            clean,
            tail,
            next_id: self.next_id.get(),
            last_txn: self.seq.get(),
            ..self.superblock.clone()
        };
        let (mut tree, mut chunks) = (self.tree.borrow_mut(), self.chunks.borrow_mut());
        let checkpoint =
            Checkpoint::cut(&mut tree, &mut chunks, &mut self.map_pages.borrow_mut(), superblock);
        (checkpoint, position)
    }

    async fn write_checkpoint(&self, (checkpoint, position): (Checkpoint, u64)) -> Result<(), FsError> {
        let written = checkpoint.write(&self.bdev).await?;
        self.generation.set(written.superblock.generation);
        written.settle(&mut self.tree.borrow_mut(), &mut self.chunks.borrow_mut());
        self.journal.borrow_mut().free_up_to(position);
        Ok(())
    }

    /// Makes everything durable, writes a last checkpoint and marks the file system as clean. Afterwards
    /// every change is refused.
    ///
    /// # Errors
    /// The device's error.
    pub async fn close(self: &Rc<Self>) -> Result<(), FsError> {
        if self.readonly || self.closed.replace(true) {
            return Ok(());
        }
        self.checkpoints.idle().await;
        self.check_failed()?;
        self.start_checkpoint(true);
        self.checkpoints.idle().await;
        self.check_failed()
    }

    /// Waits for what a call waits for. Pins keep loaded nodes until the operation ends.
    ///
    /// # Errors
    /// The device's error or corruption found while loading.
    pub async fn wait(self: &Rc<Self>, wait: &Wait) -> Result<Pins, FsError> {
        match wait {
            Wait::Commit => self.sync(self.last_seq()).await?,
            Wait::Checkpoint => self.checkpoint().await?,
            Wait::Nodes(_) | Wait::Memory | Wait::WriteBack(_) | Wait::Growth(..) | Wait::Range(_) => {}
        }
        Ok(Pins)
    }

    /// Reserves data blocks and the metadata to map them.
    ///
    /// # Errors
    /// A wait while a commit or checkpoint may give space back; then [`FsError::NoSpace`].
    pub fn reserve(self: &Rc<Self>, blocks: u64) -> Try<Reservation> {
        let mut space = self.space.borrow_mut();
        space.release(self.durable.get());
        let free = space.free() - space.reserved();
        let wanted = match blocks {
            0 => 0,
            blocks => blocks.saturating_add(self.headroom(space.reserved().saturating_add(blocks))),
        };
        if wanted > free {
            return Err(match space.waits_for_commit(self.durable.get()) {
                true => Wait::Commit.into(),
                false => FsError::NoSpace.into(),
            });
        }
        space.reserve(blocks);
        Ok(Reservation { store: self.clone(), blocks })
    }

    /// Free blocks that data must leave to metadata while `promised` blocks are still to be mapped: what the
    /// reserve of nodes lacks, and a node entry or two for each extent of a block.
    fn headroom(&self, promised: u64) -> u64 {
        let lacking = (2 * self.reserve_nodes as i64 - self.slack()).max(0) as u64;
        lacking * self.superblock.node_blocks() + promised / 32
    }

    /// Takes a run of 1 to `want` contiguous blocks out of a reservation, near `goal` when possible.
    ///
    /// # Errors
    /// A wait for bitmap nodes. Never [`FsError::NoSpace`] while the reservation has blocks.
    pub fn allocate(
        self: &Rc<Self>,
        from: &mut Reservation,
        goal: Option<BlockAddr>,
        want: u32,
    ) -> Try<Allocation> {
        let want = u64::from(want).min(from.blocks);
        assert!(want > 0, "allocation from an empty reservation");
        let mut space = self.space.borrow_mut();
        let range = space.take(goal, want).expect("reserved blocks are free");
        from.blocks -= u64::from(range.count);
        space.unreserve(u64::from(range.count));
        Ok(Allocation { store: self.clone(), range, committed: false })
    }

    /// Announces a device operation on data blocks; see [`IoToken`].
    pub fn begin_io(&self) -> IoToken {
        let epochs = self.space.borrow().epochs().clone();
        let epoch = epochs.borrow_mut().begin();
        IoToken { epochs, epoch }
    }

    /// Space as `statfs` shows it: reservations and what metadata keeps are subtracted; blocks that a commit
    /// will free count as free.
    pub fn space(&self) -> SpaceUsage {
        let space = self.space.borrow();
        let free = space.free() + space.quarantined() - space.reserved();
        SpaceUsage {
            total: self.superblock.block_count,
            available: free.saturating_sub(self.headroom(space.reserved())),
        }
    }

    /// Fails when the file system is read-only (mounted so, closed, or after an error).
    ///
    /// # Errors
    /// [`FsError::ReadOnly`].
    pub fn check_writable(&self) -> Result<(), FsError> {
        match self.readonly || self.closed.get() || self.failed.borrow().is_some() {
            true => Err(FsError::ReadOnly),
            false => Ok(()),
        }
    }

    /// What the superblock says about identity and geometry.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    fn check_failed(&self) -> Result<(), FsError> {
        self.failed.borrow().clone().map_or(Ok(()), Err)
    }

    /// Latches the first failure: from now on nothing is written.
    fn fail(&self, error: FsError) {
        let mut failed = self.failed.borrow_mut();
        if failed.is_none() {
            tracing::error!(%error, "the file system is read-only from now on");
            *failed = Some(error);
        }
    }
}

fn record<'a>(txn: &'a Txn, change: &Change) -> Record<'a> {
    match change {
        Change::Put { key, value } => Record::Put(*key, txn.value(value)),
        Change::Delete { key } => Record::Delete(*key),
        Change::Alloc(range) => Record::Alloc(*range),
        Change::Free(range) => Record::Free(*range),
    }
}

#[cfg(test)]
mod tests;
