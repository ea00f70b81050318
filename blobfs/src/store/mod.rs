//! The transactional item store: what the rest of the file system stands on.
//!
//! **Volatile so far**: items and the free map live in memory and end with the process; only file data is
//! written to the device. The calls are those of the persistent store.
//!
//! One ordered map from [`Key`] to bytes, changed only by whole transactions; data blocks that are
//! reserved, allocated and freed through the same transactions; durability on request.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::rc::Rc;

use bdev::Bdev;
use reactor::Reactor;

use crate::error::{FsError, Try, Wait};
use crate::ondisk::Key;
use crate::txn::{Change, Txn};
use crate::units::{BlockAddr, BlockRange, TxnSeq};

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
        self.store.reserved.set(self.store.reserved.get() - self.blocks);
    }
}

/// Blocks picked for data that is about to be written, not yet part of the tree. Name the range in
/// `Txn::alloc`, commit, then call [`Allocation::committed`]; dropped before that, the blocks are free again.
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
            self.store.give_back(self.range);
        }
    }
}

/// Held by a device operation on data blocks from mapping lookup to completion: blocks freed meanwhile are
/// not reused before it is dropped.
pub struct IoToken;

/// Space, in file system blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceUsage {
    /// Data and metadata blocks of the file system.
    pub total: u64,
    /// Blocks that can still be reserved for data.
    pub available: u64,
}

/// The store. One per mounted file system, on one thread.
pub struct Store {
    bdev: Rc<dyn Bdev>,
    reactor: Rc<Reactor>,
    items: RefCell<BTreeMap<Key, Vec<u8>>>,
    free: RefCell<BTreeMap<u64, u64>>,
    free_blocks: Cell<u64>,
    reserved: Cell<u64>,
    next_id: Cell<u64>,
    seq: Cell<u64>,
}

impl Store {
    /// An empty store over `bdev` that keeps its items in memory only.
    pub fn volatile(bdev: Rc<dyn Bdev>, reactor: Rc<Reactor>) -> Rc<Self> {
        let blocks = bdev.limits().size / 4096;
        Rc::new(Self {
            bdev,
            reactor,
            items: RefCell::default(),
            free: RefCell::new(BTreeMap::from([(16, blocks - 16)])),
            free_blocks: Cell::new(blocks - 16),
            reserved: Cell::new(0),
            next_id: Cell::new(2),
            seq: Cell::new(0),
        })
    }

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
        4096
    }

    /// Largest value of an item in bytes. Larger things (attribute values, long symbolic links on tiny
    /// geometries) go to extents.
    pub fn item_len_max(&self) -> usize {
        3072
    }

    /// Largest transaction in bytes ([`Txn::journal_bytes`]). Longer work goes in pieces under an intent.
    pub fn txn_len_max(&self) -> usize {
        32 * 1024
    }

    /// Keyed hash of a name: [`crate::ondisk::NAME_HASH_BITS`] bits, never 0.
    pub fn name_hash(&self, name: &[u8]) -> u64 {
        use std::hash::Hasher;
        let mut hasher = siphasher::sip::SipHasher13::new_with_keys(1, 2);
        hasher.write(name);
        (hasher.finish() >> (64 - crate::ondisk::NAME_HASH_BITS)).max(1)
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
        Ok(with(self.items.borrow().get(key).map(Vec::as_slice)))
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
        for (key, value) in self.items.borrow().range((Bound::Included(from), Bound::Excluded(to))) {
            if each(key, value).is_break() {
                break;
            }
        }
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
        let items = self.items.borrow();
        let found = items.range(not_before..=key).next_back();
        Ok(with(found.map(|(key, value)| (key, value.as_slice()))))
    }

    /// Applies a transaction to the items in memory and appends it to the open journal block, at once and
    /// as a whole. Nothing is durable before a [`Store::sync`] of the returned number.
    ///
    /// # Errors
    /// A wait (nothing was changed); [`FsError::ReadOnly`] after a failed journal.
    pub fn commit(&self, txn: &Txn) -> Try<TxnSeq> {
        let mut items = self.items.borrow_mut();
        for change in txn.changes() {
            match change {
                Change::Put { key, value } => {
                    items.insert(*key, txn.value(value).to_vec());
                }
                Change::Delete { key } => {
                    assert!(items.remove(key).is_some(), "delete of an item that does not exist: {key:?}");
                }
                Change::Alloc(_) => {}
                Change::Free(range) => self.give_back(*range),
            }
        }
        self.seq.set(self.seq.get() + 1);
        Ok(TxnSeq(self.seq.get()))
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
        let _ = seq;
        Ok(self.bdev.flush().await?)
    }

    /// Waits for what a call waits for. Pins keep loaded nodes until the operation ends.
    ///
    /// # Errors
    /// The device's error or corruption found while loading.
    pub async fn wait(self: &Rc<Self>, wait: &Wait) -> Result<Pins, FsError> {
        let _ = wait;
        Ok(Pins)
    }

    /// Reserves data blocks and the metadata to map them.
    ///
    /// # Errors
    /// A wait while a commit or checkpoint may give space back; then [`FsError::NoSpace`].
    pub fn reserve(self: &Rc<Self>, blocks: u64) -> Try<Reservation> {
        if self.reserved.get() + blocks > self.free_blocks.get() {
            return Err(FsError::NoSpace.into());
        }
        self.reserved.set(self.reserved.get() + blocks);
        Ok(Reservation { store: self.clone(), blocks })
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
        let mut free = self.free.borrow_mut();
        let _ = goal;
        let (start, count) =
            free.iter().next().map(|(start, count)| (*start, *count)).expect("reserved blocks exist");
        free.remove(&start);
        let taken = count.min(want);
        if taken < count {
            free.insert(start + taken, count - taken);
        }
        from.blocks -= taken;
        self.reserved.set(self.reserved.get() - taken);
        self.free_blocks.set(self.free_blocks.get() - taken);
        let range = BlockRange::new(BlockAddr(start), taken as u32);
        Ok(Allocation { store: self.clone(), range, committed: false })
    }

    fn give_back(&self, range: BlockRange) {
        self.free_blocks.set(self.free_blocks.get() + u64::from(range.count));
        self.free.borrow_mut().insert(range.start.0, u64::from(range.count));
    }

    /// Announces a device operation on data blocks; see [`IoToken`].
    pub fn begin_io(&self) -> IoToken {
        IoToken
    }

    /// Space as `statfs` shows it: reservations are subtracted.
    pub fn space(&self) -> SpaceUsage {
        SpaceUsage {
            total: self.bdev.limits().size / 4096,
            available: self.free_blocks.get() - self.reserved.get(),
        }
    }

    /// Fails when the file system is read-only (mounted so, or after an error).
    ///
    /// # Errors
    /// [`FsError::ReadOnly`].
    pub fn check_writable(&self) -> Result<(), FsError> {
        Ok(())
    }
}
