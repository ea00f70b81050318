//! The transactional item store: what the rest of the file system stands on.
//!
//! One ordered map from [`Key`] to bytes, changed only by whole transactions; data blocks that are
//! reserved, allocated and freed through the same transactions; durability on request.
//!
//! | module | what it provides |
//! | --- | --- |
//! | `tree` | the items, as much of them as is in memory: nodes, plans of changes, snapshots |
//! | `load` | reading the nodes that are missing |
//! | `records` | what the records of transactions need and do |
//! | `chunks` | places for tree nodes on the device |
//! | `space` | free data blocks, reservations, quarantine of freed blocks |
//! | `blocks` | the bitmap items that `space` is derived from |
//! | `journal` | the open journal block and the circular area |
//! | `rounds` | commits and checkpoints: when what becomes durable |
//! | `checkpoint` | writing dirty nodes and the superblock |
//! | `logged` | file data that a replay finds in the journal |
//! | `image` | where a mount begins: root, chunk map, journal |
//! | `open` | making and opening a file system |
//!
//! A transaction changes the tree at once and is appended to the open journal block. A *commit* round
//! writes that block; a *checkpoint* round writes the dirty nodes and empties the journal (`rounds`).
//!
//! **Memory.** Nodes are read when they are needed: a call that misses some returns [`Wait::Nodes`] with all
//! that it knows it needs, and has changed nothing. Clean nodes are evicted when the cache is full
//! ([`Store::set_cache_bytes`]); dirty ones stay, and force a checkpoint before they fill half of it. A commit
//! first finds all nodes that it may touch, and what a merge may take in beside them; applying it then
//! neither misses nor fails.
//!
//! **Freed blocks** are held back until the transaction is durable and device operations that began before
//! have ended, then discarded in the background if the device can do that, and only then free.
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
mod load;
mod logged;
mod open;
mod promise;
mod records;
mod rounds;
mod space;
mod tree;

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::ops::ControlFlow;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::Duration;

use bdev::Bdev;
use reactor::Reactor;

use crate::error::{Corruption, FsError, Try, Wait};
use crate::ondisk::chunk_map::CHUNK_NODES;
use crate::ondisk::journal::{Record, TxnHeader};
use crate::ondisk::node::{NODE_HEADER_LEN, SLOT_LEN};
use crate::ondisk::superblock::Superblock;
use crate::ondisk::{ExtentItem, FILE_SIZE_MAX, Key, Kind};
use crate::txn::{Change, Txn};
use crate::units::{BlockAddr, BlockRange, TxnSeq};

use journal::{Journal, Room};
use load::Loads;
use rounds::{Flushes, Rounds};
use space::{IoEpochs, Search, Space};
use tree::{Plan, Tree};

pub(crate) use blocks::{chunk_in_data_area, groups, in_data_area};
pub(crate) use checkpoint::{page_buffer, write_page, write_superblock};
pub(crate) use chunks::Chunks;
pub(crate) use image::{JournalReader, read};
pub use image::{choose_superblock, read_superblocks};
pub use load::Pins;
pub(crate) use logged::{Home, Logged, write_homes};
pub(crate) use open::{IDS_SKIPPED, check_features};
pub use open::{MkfsError, MkfsOptions, OpenError, OpenOptions, mkfs};
pub use promise::{Demand, Reservation};
pub use rounds::DataStamp;
pub(crate) use rounds::LoggedData;
pub use tree::NodeRef;

/// How long a transaction may stay in memory without anybody asking for it.
const COMMIT_INTERVAL: Duration = Duration::from_secs(5);

/// Places that a checkpoint leaves for what comes next when it gives chunks back. Picked: the next claim is some way off.
const SURPLUS_MIN: usize = 2 * CHUNK_NODES as usize;

/// Part of the nodes in use that may be unused besides.
const SURPLUS_SHARE: usize = 4;

/// Smallest chunk, in nodes, that is worth claiming when free space is fragmented.
const CHUNK_NODES_MIN: u32 = 16;

/// Chunks that one transaction may claim in front of it: their records fit the journal's room for claims.
const CLAIMS_MAX: usize = 16;

/// How long device operations may keep freed blocks from being reused before space is said to be out.
const SPACE_PATIENCE: Duration = Duration::from_secs(1);

/// Smallest node cache, in nodes: a few of the largest transactions find room in the quarter for dirty nodes.
const CACHE_NODES_MIN: usize = 256;

/// Groups whose bitmaps one allocation looks into for a longer run than it has found.
const GROUPS_TRIED_MAX: usize = 4;

/// Shortest run of freed blocks that is worth a discard, in bytes. Picked: what file systems on the host
/// allocate at a time; a flash page is smaller.
const DISCARD_LEN_MIN: u64 = 64 * 1024;

/// Nodes that only shrinking transactions may use, so that a full device can still delete.
pub(crate) fn reserve_nodes(superblock: &Superblock) -> usize {
    (superblock.block_count / superblock.node_blocks() / 64).clamp(64, 1024) as usize
}

fn item_len_max(superblock: &Superblock) -> usize {
    crate::ondisk::node::item_len_max(superblock.node_size as usize)
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

/// The same for writes of data: what they wrote has to be flushed.
pub struct WriteToken {
    flushes: Rc<Flushes>,
    _io: IoToken,
}

impl WriteToken {
    /// The writes have ended; gives the stamp of what they wrote.
    pub fn end(self) -> DataStamp {
        self.flushes.note_written()
    }
}

impl Drop for WriteToken {
    fn drop(&mut self) {
        self.flushes.note_written();
    }
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
    /// Blocks that nothing uses: reserved ones, and those that wait to be free again, are among them.
    pub free: u64,
    /// Free blocks that acknowledged writes will need.
    pub reserved: u64,
    /// Blocks that can still be reserved for data.
    pub available: u64,
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
    /// Runs of blocks that reservations have promised room in the tree for.
    promised_pieces: Cell<u64>,
    /// A demand for which there was no room, and the generation of the superblock then.
    refused: Cell<Option<(Demand, u64)>>,
    journal: RefCell<Journal>,
    next_id: Cell<u64>,
    seq: Cell<u64>,
    durable: Cell<TxnSeq>,
    generation: Cell<u64>,
    reserve_nodes: usize,
    dirty_bytes_max: usize,
    /// Dirty nodes at which changes wait for a checkpoint.
    dirty_max: Cell<usize>,
    /// Nodes that all operations together may pin.
    pinned_max: Cell<usize>,
    loads: Loads,
    /// Memory for the plan of a transaction.
    plan: RefCell<Plan>,
    /// Blocks that the bitmap items call free.
    free_blocks: Cell<u64>,
    /// Last transaction inside a durable checkpoint of this mount.
    checkpointed: Cell<u64>,
    readonly: bool,
    closed: Cell<bool>,
    /// The first failure.
    failed: RefCell<Option<FsError>>,
    commits: Rounds,
    checkpoints: Rounds,
    flushes: Rc<Flushes>,
    /// Who knows the data that is in the journal only.
    logged_data: RefCell<Option<Weak<dyn LoggedData>>>,
    /// Data of files that is in the journal only, found by a read-only mount.
    logged: RefCell<Logged>,
    /// A checkpoint is about to be cut: nothing is logged.
    log_closed: Cell<bool>,
    /// Rounds of discarding freed blocks.
    discarding: Rounds,
    /// [`surplus_max`] behind the last checkpoint, or the least since then.
    surplus_max: Cell<usize>,
    timer_armed: Cell<bool>,
    /// [`Space::let_go`] when a wait for blocks that are held back was given up.
    futile_wait: Cell<Option<u64>>,
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

    /// Whether every block of file data has a checksum.
    #[inline]
    pub fn has_data_sums(&self) -> bool {
        self.superblock.has_data_sums()
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

    /// Seed for tables in memory: differs between file systems, and is the same in every run of a simulation.
    pub(crate) fn hash_seed(&self) -> u64 {
        self.superblock.hash_key[0]
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
        let tree = self.tree.borrow();
        match tree.get(key) {
            Ok(value) => Ok(with(value)),
            Err(missing) => Err(Wait::Nodes(vec![missing]).into()),
        }
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
        let scanned = self.tree.borrow().scan(from, to, &mut each);
        scanned.map(drop).map_err(|missing| Wait::Nodes(missing).into())
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
        match tree.last_at_or_before(key, not_before) {
            Ok(found) => Ok(with(found.as_ref().map(|(key, value)| (key, *value)))),
            Err(missing) => Err(Wait::Nodes(vec![missing]).into()),
        }
    }

    /// The extent in an item's value, `start` being its first file block; `None` unless it can be one of file
    /// data: inside the largest file, and in blocks of the data area that are in no metadata chunk.
    pub(crate) fn extent(&self, start: u64, value: &[u8]) -> Option<ExtentItem> {
        let item = ExtentItem::decode(value)?;
        // Those that it maps: it uses no others, whatever it calls stored.
        let (device, count) = (item.device_range().start.0, u64::from(item.blocks));
        let end = start.checked_add(count)?;
        let possible = end <= FILE_SIZE_MAX.div_ceil(u64::from(self.block_size()))
            && in_data_area(&self.superblock, device, count)
            && !self.chunks.borrow().overlaps(device, count);
        possible.then_some(item)
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
        let plan = &mut *self.plan.borrow_mut();
        let records = || txn.changes().iter().map(|change| record(txn, change));
        self.prepare(plan, records)?;
        if self.admit_nodes(txn, plan)? {
            // What claims changed may have taken nodes of the plan out of memory.
            self.prepare(plan, records)?;
        }
        self.apply(plan, txn.origin(), records)?;
        if txn.shows_data() {
            self.journal.borrow_mut().show_data();
        }
        self.after_commit();
        Ok(self.last_seq())
    }

    /// Checks everything that could keep a transaction from being logged.
    fn admit(&self, txn: &Txn) -> Try<()> {
        let item_len_max = self.item_len_max();
        let fits = |change: &Change| match change {
            Change::Put { value, .. } => value.len() <= item_len_max,
            Change::Delete { .. }
            | Change::Alloc(_)
            | Change::Free(_)
            | Change::Log { .. }
            | Change::Settle { .. } => true,
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
        match self.tree.borrow().dirty() >= self.dirty_max.get() {
            true => Err(Wait::Checkpoint.into()),
            false => Ok(()),
        }
    }

    /// Plans records: afterwards every node that they touch is in memory, and the free runs of the groups in
    /// which they free something are known.
    fn prepare<'a, I>(&self, plan: &mut Plan, records: impl Fn() -> I) -> Try<()>
    where
        I: Iterator<Item = Record<'a>>,
    {
        {
            let tree = self.tree.borrow();
            tree.begin_plan(plan);
            records().for_each(|record| records::plan(&tree, &self.superblock, plan, &record));
            tree.end_plan(plan).map_err(Wait::Nodes)?;
        }
        for record in records() {
            if let Some((start, count)) = records::frees(&self.superblock, &record) {
                for group in blocks::group_numbers(&self.superblock, start, count) {
                    self.learn(group)?;
                }
            }
        }
        Ok(())
    }

    /// Makes the free runs of a group known.
    fn learn(&self, group: u64) -> Try<()> {
        if self.space.borrow().knows(group) {
            return Ok(());
        }
        let tree = self.tree.borrow();
        let bits = tree.get(&Key::group(group)).map_err(|missing| Wait::Nodes(vec![missing]))?;
        let runs = blocks::free_runs(&self.superblock, &self.chunks.borrow(), group, bits);
        let learned = runs.and_then(|runs| self.space.borrow_mut().learn(group, runs));
        learned.map_err(|problem| bad_bitmap(group, problem).into())
    }

    /// Sees to it that there will be a place for every node that the transaction makes dirty. True if chunks were claimed
    /// for that.
    fn admit_nodes(&self, txn: &Txn, plan: &Plan) -> Try<bool> {
        let is_promised = txn.is_promised();
        let kept = if is_promised || shrinks(txn) { 0 } else { self.reserve_nodes };
        let owed = if is_promised || kept == 0 { 0 } else { self.promised_nodes() as i64 };
        let is_enough =
            |places, need| places >= need && (owed == 0 || places + self.claimable_nodes() >= need + owed);
        let height = self.tree.borrow().height();
        let most = txn.changes().len() * 2 * height * 4 + self.put_nodes(txn) + 8;
        if is_enough(self.slack(), (most + kept) as i64) {
            return Ok(false);
        }
        // The ways to the keys, two neighbours each by splits or one by a merge, what the bytes fill, and a
        // new root.
        let footprint = self.tree.borrow_mut().footprint(plan);
        let need = (footprint.clean + 2 * footprint.touched + self.put_nodes(txn) + 4 + kept) as i64;
        let mut claims = 0;
        while claims < CLAIMS_MAX && self.slack() < need {
            let kept = if is_promised { 0 } else { promise::metadata_blocks(self.space.borrow().reserved()) };
            if !self.claim_chunk(u64::from(CHUNK_NODES), kept)? {
                break;
            }
            claims += 1;
        }
        if is_enough(self.slack(), need) {
            return Ok(claims > 0);
        }
        let after_checkpoint = {
            let chunks = self.chunks.borrow();
            let used = self.tree.borrow().live() + 2 * self.map_pages_max();
            chunks.total() as i64 - used as i64
        };
        if is_enough(after_checkpoint, need) {
            Err(Wait::Checkpoint.into())
        } else if self.may_get_space() {
            Err(Wait::Space.into())
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

    /// Places beyond those that the tree and the changes to come need, once a checkpoint has been written.
    fn surplus(&self) -> usize {
        let used = self.tree.borrow().live() + 2 * self.map_pages_max();
        self.chunks.borrow().total().saturating_sub(used + self.kept_nodes() - self.promised_nodes())
    }

    /// Unused places that are not given back: the reserve, and what may become dirty until the next checkpoint.
    fn kept_nodes(&self) -> usize {
        2 * self.reserve_nodes + self.promised_nodes() + self.dirty_max.get().min(self.tree.borrow().live())
    }

    /// Notes how many places are unused. True when deletions have left so many that a checkpoint should give chunks
    /// back now, rather than when it is due anyway: without it, `statfs` would show less free space than there is for as long as little
    /// happens. The share of the nodes in use makes it few checkpoints while very many files are deleted.
    fn notes_surplus(&self) -> bool {
        let surplus = self.surplus();
        let most = self.surplus_max.get().min(surplus_max(surplus));
        self.surplus_max.set(most);
        surplus >= most + self.tree.borrow().live() / SURPLUS_SHARE
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
                Change::Delete { .. } | Change::Free(_) | Change::Log { .. } | Change::Settle { .. } => 0,
            })
            .sum();
        6 * bytes / (self.superblock.node_size as usize - NODE_HEADER_LEN) + 1
    }

    /// Turns free blocks into places for nodes, by a transaction of its own: for so many as are needed, or a chunk of
    /// them. Blocks that are reserved for data are not touched, and `kept` others are left. `false` when there are no
    /// such blocks.
    fn claim_chunk(&self, needed: u64, kept: u64) -> Try<bool> {
        let needed = u32::try_from(needed.next_power_of_two()).unwrap_or(CHUNK_NODES);
        let mut nodes = needed.clamp(CHUNK_NODES_MIN, CHUNK_NODES);
        let node_blocks = self.superblock.node_blocks();
        self.release_space();
        let start = loop {
            let count = u64::from(nodes) * node_blocks;
            let fits = {
                let space = self.space.borrow();
                space.free() - space.reserved() >= count.saturating_add(kept)
            };
            let found = if fits { self.space.borrow_mut().take_exact(count) } else { Search::Nothing };
            match found {
                Search::Taken(range) => break range.start.0,
                Search::Group(group) => self.learn(group)?,
                Search::Nothing => nodes /= 2,
            }
            if nodes < CHUNK_NODES_MIN {
                return Ok(false);
            }
        };
        let claimed = self.log_chunk(nodes, Record::Claim { start, nodes });
        if !matches!(claimed, Ok(true)) && self.check_failed().is_ok() {
            self.space.borrow_mut().insert(start, u64::from(nodes) * node_blocks);
        }
        claimed
    }

    /// Applies and logs the claim of a chunk, or that one is given back; `nodes` are the places that this
    /// adds. `false` when there are too few for the nodes that it makes dirty itself.
    fn log_chunk(&self, nodes: u32, record: Record<'_>) -> Try<bool> {
        // The ways to at most two groups, and their items may have to be added.
        let own = (8 * self.tree.borrow().height() + 8) as i64;
        if self.slack() + i64::from(nodes) < own {
            return Ok(false);
        }
        let mut plan = Plan::default();
        self.prepare(&mut plan, || std::iter::once(record))?;
        self.apply(&mut plan, crate::txn::Origin::default(), || std::iter::once(record))?;
        Ok(true)
    }

    /// Applies records that were prepared and logs them as a transaction.
    fn apply<'a, I>(
        &self,
        plan: &mut Plan,
        origin: crate::txn::Origin,
        records: impl Fn() -> I,
    ) -> Result<(), FsError>
    where
        I: Iterator<Item = Record<'a>>,
    {
        let seq = TxnSeq(self.seq.get() + 1);
        if let Err(problem) = self.change(plan, seq, records()) {
            let problem = problem.to_owned();
            let error = FsError::from(Corruption { structure: "transaction", offset: seq.0, problem });
            self.fail(error.clone());
            return Err(error);
        }
        self.append(origin, records());
        Ok(())
    }

    fn change<'a>(
        &self,
        plan: &mut Plan,
        seq: TxnSeq,
        records: impl Iterator<Item = Record<'a>>,
    ) -> Result<(), records::Contradiction> {
        let (mut tree, mut chunks) = (self.tree.borrow_mut(), self.chunks.borrow_mut());
        for record in records {
            let free = self.free_blocks.get();
            let free = free.checked_add_signed(records::blocks_freed(&self.superblock, &record));
            self.free_blocks.set(free.ok_or("uses more blocks than are free")?);
            records::apply(&mut tree, &mut chunks, &self.superblock, plan, &record)?;
            if let Some((start, count)) = records::frees(&self.superblock, &record) {
                let range = BlockRange::new(BlockAddr(start), count as u32);
                self.space.borrow_mut().quarantine(range, seq);
            }
        }
        tree.make_room(0);
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
        let due = self.journal.borrow().is_half_full()
            || self.tree.borrow().dirty() > self.dirty_max.get() / 2
            || self.notes_surplus();
        if due && !self.checkpoints.is_running() {
            this.start_checkpoint(false);
        }
    }

    /// Number of the last applied transaction.
    pub fn last_seq(&self) -> TxnSeq {
        TxnSeq(self.seq.get())
    }

    /// Waits for what a call waits for. The pins keep loaded nodes in memory; an operation that waits several
    /// times collects them by [`Store::wait_pinned`].
    ///
    /// # Errors
    /// The device's error or corruption found while loading.
    pub async fn wait(self: &Rc<Self>, wait: &Wait) -> Result<Pins, FsError> {
        let mut pins = Pins::default();
        self.wait_pinned(wait, &mut pins).await?;
        Ok(pins)
    }

    /// Waits for what a call of the operation that holds `pins` waits for.
    ///
    /// # Errors
    /// As [`Store::wait`].
    pub async fn wait_pinned(self: &Rc<Self>, wait: &Wait, pins: &mut Pins) -> Result<(), FsError> {
        if let Wait::Nodes(missing) = wait {
            return self.load_nodes(missing, pins).await;
        }
        pins.clear();
        match wait {
            Wait::Commit => self.sync(self.last_seq()).await,
            Wait::Checkpoint => self.checkpoint().await,
            Wait::Space => self.wait_for_space().await,
            Wait::Nodes(_) | Wait::WriteBack(_) | Wait::Growth(..) | Wait::Range(_) => Ok(()),
        }
    }

    /// Sets the memory for tree nodes. At least 256 nodes find room whatever is asked for; an operation that
    /// needs more than the cache holds gets it.
    pub fn set_cache_bytes(&self, bytes: usize) {
        let node_size = self.superblock.node_size as usize;
        let capacity = (bytes / tree::node_cost(node_size)).max(CACHE_NODES_MIN);
        self.dirty_max.set((self.dirty_bytes_max / node_size).min(capacity / 4).max(CACHE_NODES_MIN / 4));
        self.pinned_max.set(capacity / 4);
        self.tree.borrow_mut().set_capacity(capacity);
    }

    /// Lets blocks go that were held back long enough, after a discard when the device can do that.
    fn release_space(&self) {
        self.space.borrow_mut().release(self.durable.get());
        if self.discarding.is_running() {
            return;
        }
        let ranges = self.space.borrow_mut().take_discards();
        let Some(store) = self.this.upgrade().filter(|_| !ranges.is_empty()) else { return };
        self.discarding.start();
        drop(self.reactor.spawn(async move {
            store.discard(ranges).await;
            store.discarding.finish();
        }));
    }

    /// Discards ranges one after the other; each is free as soon as that is done. Failing does no harm.
    async fn discard(&self, ranges: Vec<BlockRange>) {
        for range in ranges {
            let bytes = range.bytes(self.superblock.block_size);
            if bytes.end - bytes.start >= DISCARD_LEN_MIN
                && self.check_failed().is_ok()
                && let Err(error) = self.bdev.discard(bytes).await
            {
                tracing::debug!(%error, "discard");
            }
            self.space.borrow_mut().let_range_go(range);
        }
    }

    /// Whether blocks are held back and a wait for them was not in vain already. A discard always ends.
    fn may_get_space(&self) -> bool {
        let space = self.space.borrow();
        let was_futile = self.futile_wait.get() == Some(space.let_go());
        space.held_back() > 0 && (self.discarding.is_running() || !was_futile)
    }

    /// Waits until a device operation on data has ended; `false` when that takes too long: the operation may
    /// belong to one that waits itself.
    async fn operation_ended(&self) -> bool {
        let mut ended = pin!(self.space.borrow().epochs().borrow().ended().notified());
        let mut late = pin!(self.reactor.sleep(SPACE_PATIENCE));
        poll_fn(|cx| match ended.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(true),
            Poll::Pending => late.as_mut().poll(cx).map(|()| false),
        })
        .await
    }

    /// Waits until some of the blocks that are held back are free, or none is held back any more, or it is
    /// no use to wait.
    async fn wait_for_space(self: &Rc<Self>) -> Result<(), FsError> {
        let before = self.space.borrow().let_go();
        loop {
            self.check_failed()?;
            self.release_space();
            let (let_go, held_back, uncommitted) = {
                let space = self.space.borrow();
                (space.let_go(), space.held_back(), space.waits_for_commit(self.durable.get()))
            };
            if let_go != before || held_back == 0 {
                return Ok(());
            }
            if uncommitted {
                self.sync(self.last_seq()).await?;
            } else if self.discarding.is_running() {
                self.discarding.changed.notified().await;
            } else if !self.operation_ended().await {
                self.futile_wait.set(Some(let_go));
                return Ok(());
            }
        }
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
        let want = u64::from(want).min(from.blocks());
        assert!(want > 0, "allocation from an empty reservation");
        let mut tried = 0;
        let range = loop {
            let found = self.space.borrow_mut().take(goal, want, tried >= GROUPS_TRIED_MAX);
            match found {
                Search::Taken(range) => break range,
                Search::Group(group) => self.learn(group)?,
                Search::Nothing => {
                    let error = bad_bitmap(0, "the groups have no free blocks left".to_owned());
                    self.fail(error.clone());
                    return Err(error.into());
                }
            }
            tried += 1;
        };
        from.use_up(u64::from(range.count));
        Ok(Allocation { store: self.clone(), range, committed: false })
    }

    /// Announces a device operation on data blocks; see [`IoToken`].
    pub fn begin_io(&self) -> IoToken {
        let epochs = self.space.borrow().epochs().clone();
        let epoch = epochs.borrow_mut().begin();
        IoToken { epochs, epoch }
    }

    /// Announces writes of data; see [`WriteToken`].
    pub fn begin_write(&self) -> WriteToken {
        WriteToken { flushes: self.flushes.clone(), _io: self.begin_io() }
    }

    /// Space as `statfs` shows it: reservations and what metadata keeps are subtracted; blocks that a commit
    /// will free count as free.
    pub fn space(&self) -> SpaceUsage {
        let space = self.space.borrow();
        let (free, reserved) = (space.free() + space.held_back(), space.reserved());
        SpaceUsage {
            total: self.superblock.block_count,
            free,
            reserved,
            available: (free - reserved).saturating_sub(self.headroom(&space)),
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
    pub(crate) fn fail(&self, error: FsError) {
        let mut failed = self.failed.borrow_mut();
        if failed.is_none() {
            tracing::error!(%error, "the file system is read-only from now on");
            *failed = Some(error);
        }
    }
}

/// The most unused places for which no checkpoint is started, when one has left `surplus`: it may have had to, since
/// some place of each chunk is used, and the next one would fare no better.
fn surplus_max(surplus: usize) -> usize {
    if surplus < SURPLUS_MIN { SURPLUS_MIN } else { surplus + CHUNK_NODES as usize }
}

/// Whether a transaction is one that gives room, which a full device has to allow. A new name or value may be longer than
/// that in whose place it comes, and a hole may split an extent.
fn shrinks(txn: &Txn) -> bool {
    let (mut gives, mut extents) = (false, 0);
    for change in txn.changes() {
        match change {
            Change::Put { key, .. } if matches!(key.kind, Kind::Dirent | Kind::Xattr) => return false,
            Change::Put { key, .. } if key.kind == Kind::Extent => extents += 1,
            Change::Delete { key } if key.kind == Kind::Extent => (gives, extents) = (true, extents - 1),
            Change::Delete { .. } | Change::Free(_) => gives = true,
            Change::Put { .. } | Change::Alloc(_) | Change::Log { .. } | Change::Settle { .. } => {}
        }
    }
    gives && extents <= 1
}

fn bad_bitmap(group: u64, problem: String) -> FsError {
    Corruption { structure: "group bitmap", offset: group, problem }.into()
}

fn record<'a>(txn: &'a Txn, change: &Change) -> Record<'a> {
    match change {
        Change::Put { key, value } => Record::Put(*key, txn.value(value)),
        Change::Delete { key } => Record::Delete(*key),
        Change::Alloc(range) => Record::Alloc(*range),
        Change::Free(range) => Record::Free(*range),
        Change::Log { inode, offset, bytes } => {
            Record::Log { inode: *inode, offset: *offset, bytes: txn.value(bytes) }
        }
        Change::Settle { inode, bytes } => {
            Record::Settle { inode: *inode, start: bytes.start, end: bytes.end }
        }
    }
}

#[cfg(test)]
mod tests;
