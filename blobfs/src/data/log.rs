//! Small synced writes: into the journal, in one device write.
//!
//! A sync that finds little dirty puts the bytes themselves into a transaction, which also maps the blocks that
//! they will go to and moves size and times. The pages stay dirty, marked *logged*, and are written to their
//! blocks later: with the other dirty pages, or before the checkpoint that lets the journal go.
//!
//! While a replay would find logged bytes ([`FileLog::pages`]), whatever changes the same bytes without logging
//! them is followed by a record that *settles* them: otherwise a replay would bring the old ones back.
//!
//! - Truncation and holes settle in their own transaction, before the blocks are free.
//! - Write-back and direct writes note what they changed ([`Fs::note_changed`]); the next sync of the file settles
//!   that behind a flush, before it is acknowledged. Until then a replay may show the old bytes, as if the
//!   unsynced change had not happened.
//!
//! Invariants:
//! - a logged page has all its blocks, up to the end of the file, so its write-back needs no transaction and waits
//!   for no checkpoint: a write that would need more blocks waits until the page is no longer logged;
//! - logged pages are in batches of their own, for the same reason;
//! - nobody who holds a range for a change has logged pages in it.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;

use reactor::sync::join_all;

use super::arena::Slot;
use super::extent::{Piece, Stored};
use super::range_lock::{Mode, RangeGuard};
use super::write_back::{FILES_AT_ONCE, Mapping};
use crate::error::{FsError, Stop, Try, Wait};
use crate::fs::{Fs, Inode};
use crate::ondisk::InodeFlags;
use crate::store::{Demand, LoggedData, Reservation};
use crate::txn::{Origin, Txn};
use crate::units::{BlockRange, MapId, TxnSeq};

/// Bytes that a sync puts into the journal, at most. Picked: what databases write between two syncs. They are
/// written twice, which for more of them costs more than the flush that it saves.
pub(super) const LOGGED_MAX: u64 = 16 * 1024;

/// Bytes that an inode's item takes in a transaction, at most.
const INODE_CHANGE_LEN: usize = 192;

/// Ranges that one transaction settles.
const SETTLED_PER_TXN: usize = 64;

/// What the journal has of one file's data.
#[derive(Default)]
pub(super) struct FileLog {
    /// The last transaction that logged some.
    last: Cell<TxnSeq>,
    /// Hull of the pages that were logged.
    pages: RefCell<Range<u64>>,
    /// Bytes that have changed on the device since they were logged.
    unsettled: RefCell<Vec<Range<u64>>>,
}

impl FileLog {
    /// Whether changes wait to be settled.
    pub(super) fn is_unsettled(&self) -> bool {
        !self.unsettled.borrow().is_empty()
    }

    fn note(&self, seq: TxnSeq, pages: Range<u64>, was_live: bool) {
        self.last.set(seq);
        let mut hull = self.pages.borrow_mut();
        *hull = if was_live { hull.start.min(pages.start)..hull.end.max(pages.end) } else { pages };
    }
}

/// A page to be logged, and what was reserved for it.
struct Logging {
    page: u64,
    slot: Slot,
    reservation: Reservation,
}

impl Fs {
    /// Whether a replay would find data of the file.
    pub(super) fn has_log(&self, inode: &Inode) -> bool {
        self.store.is_logged(inode.data.log.last.get())
    }

    /// Logs everything of a file that is dirty and not logged yet, with its attributes. False, and nothing is
    /// changed, where that is not the way: much is dirty, some of it is on its way to the device already, the file
    /// is small enough for the tree, the journal has no room for it, or blocks have checksums.
    ///
    /// # Errors
    /// Those of [`crate::store::Store::commit`].
    pub(super) fn log_dirty(self: &Rc<Self>, inode: &Rc<Inode>) -> Try<bool> {
        if inode.data.log.unsettled.borrow().len() > SETTLED_PER_TXN {
            // The rest must not be settled behind what is logged now.
            self.settle_changed(inode)?;
        }
        let Some(pages) = self.loggable(inode) else { return Ok(false) };
        if pages.is_empty() {
            return Ok(true);
        }
        let mut logging = Vec::with_capacity(pages.len());
        for (page, slot) in pages {
            let mut reservation = self.store.reserve(Demand::NONE)?;
            if let Some(reserved) = self.cache.take_reserved(&self.cache.take_reservation(inode, slot)) {
                reservation.merge(reserved);
            }
            logging.push(Logging { page, slot, reservation });
        }
        let logged = match self.log_pages(inode, &mut logging) {
            // One transaction counts on the worst for all of them; write-back needs less at a time.
            Err(Stop::Fail(FsError::NoSpace)) => Ok(false),
            logged => logged,
        };
        if !matches!(logged, Ok(true)) {
            for Logging { slot, mut reservation, .. } in logging {
                let left = reservation.left();
                self.cache.reserve_for(inode, slot, &mut reservation, &left);
            }
        }
        logged
    }

    /// The pages that a sync would have to log; `None` if it should not log at all.
    fn loggable(&self, inode: &Rc<Inode>) -> Option<Vec<(u64, Slot)>> {
        let live = *inode.live.borrow();
        let most = (LOGGED_MAX.min(self.store.txn_len_max() as u64) / self.cache.page_size()) as usize;
        if live.flags.contains(InodeFlags::INLINE)
            || self.store.has_data_sums()
            || self.fits_inline(inode)
            || inode.data.cut_from.get().is_some()
            || inode.check_alive().is_err()
        {
            return None;
        }
        let pages = inode.data.pages.borrow().unsynced(most)?;
        let (Some((first, _)), Some((last, _))) = (pages.first(), pages.last()) else { return Some(pages) };
        let is_locked = inode.data.lock.is_refused(&(*first..last + 1), Mode::WriteBack);
        let ends_inside = last * self.cache.page_size() < live.size;
        let fits = self.store.can_log(pages.len() * self.cache.page_size() as usize);
        (fits && ends_inside && !is_locked).then_some(pages)
    }

    fn log_pages(self: &Rc<Self>, inode: &Rc<Inode>, logging: &mut [Logging]) -> Try<bool> {
        let mut mappings = Vec::new();
        let placed = self.place_logged(inode, logging, &mut mappings);
        let committed = match placed {
            Ok(true) => self.commit_logged(inode, logging, &mappings),
            other => other,
        };
        let is_done = matches!(committed, Ok(true));
        for (at, mapping) in mappings {
            match mapping {
                Mapping::Fresh { allocation, .. } if is_done => allocation.committed(),
                Mapping::Fresh { allocation, .. } => logging[at].reservation.take_back(allocation),
                Mapping::Written { .. } => {}
            }
        }
        committed
    }

    /// Finds blocks for the parts of the pages that have none; each mapping comes with the index of its page.
    /// False where one transaction cannot map them all.
    fn place_logged(
        self: &Rc<Self>,
        inode: &Inode,
        logging: &mut [Logging],
        mappings: &mut Vec<(usize, Mapping)>,
    ) -> Try<bool> {
        let block = u64::from(self.store.block_size());
        let per_page = self.cache.page_size() / block;
        let (map, end) = {
            let live = inode.live.borrow();
            (live.map, live.size.div_ceil(block))
        };
        let mut written = None;
        for (at, Logging { page, reservation, .. }) in logging.iter_mut().enumerate() {
            let blocks = *page * per_page..((*page + 1) * per_page).min(end);
            for Piece { start, count, stored } in self.pieces(map, blocks)? {
                match stored {
                    Some(Stored { unwritten: false, .. }) => {}
                    Some(Stored { addr, .. }) => {
                        let range = BlockRange::new(addr, count as u32);
                        if written
                            .replace((at, Mapping::Written { start, range, sums: Vec::new() }))
                            .is_some()
                        {
                            return Ok(false);
                        }
                    }
                    None => self.allocate_logged(map, start..start + count, at, reservation, mappings)?,
                }
            }
        }
        // A transaction sees extents as they were before it: what may split one comes last.
        mappings.extend(written);
        Ok(true)
    }

    fn allocate_logged(
        self: &Rc<Self>,
        map: MapId,
        blocks: Range<u64>,
        at: usize,
        reservation: &mut Reservation,
        mappings: &mut Vec<(usize, Mapping)>,
    ) -> Try<()> {
        let mut start = blocks.start;
        while start < blocks.end {
            let lacking = (blocks.end - start).saturating_sub(reservation.blocks());
            if lacking > 0 {
                reservation.merge(self.store.reserve(Demand { holes: lacking, ..Demand::NONE })?);
            }
            let goal = self.goal_behind(map, start, mappings.last().map(|(_, mapping)| mapping))?;
            let allocation = self.store.allocate(reservation, goal, (blocks.end - start) as u32)?;
            let count = u64::from(allocation.range().count);
            mappings.push((at, Mapping::Fresh { start, allocation, sums: Vec::new() }));
            start += count;
        }
        Ok(())
    }

    fn commit_logged(
        &self,
        inode: &Rc<Inode>,
        logging: &[Logging],
        mappings: &[(usize, Mapping)],
    ) -> Try<bool> {
        let page_size = self.cache.page_size();
        let mut item = inode.stored_item();
        let size = inode.live.borrow().size;
        let mut txn = Txn::new(Origin::default());
        txn.keep_promise();
        self.add_mappings(&mut txn, &mut item, mappings.iter().map(|(_, mapping)| mapping))?;
        let unsettled = self.add_settled(&mut txn, inode);
        if unsettled == 0 && self.store.is_durable(inode.data.written.get()) {
            txn.show_no_data();
        }
        let block = u64::from(self.store.block_size());
        for Logging { page, slot, .. } in logging {
            let start = page * page_size;
            // Whole blocks, with zeros behind the end of the file: a replay never mixes two versions of a sector.
            let len = (size - start).min(page_size).next_multiple_of(block) as usize;
            txn.log(inode.id, start, len, |bytes| {
                bdev::IoBuffers::new([self.cache.memory(*slot)], self.cache.hold()).copy_to(0, bytes);
            });
        }
        if txn.journal_bytes() > self.store.txn_len_max() - INODE_CHANGE_LEN {
            return Ok(false);
        }
        item.size = size;
        let was_live = self.has_log(inode);
        self.commit_item(&mut txn, inode, item)?;
        inode.data.log.unsettled.borrow_mut().drain(..unsettled);
        let mut pages = inode.data.pages.borrow_mut();
        for Logging { page, .. } in logging {
            pages.set_logged(*page, (page + 1) * page_size <= size);
        }
        let hull = logging[0].page..logging[logging.len() - 1].page + 1;
        inode.data.log.note(self.store.last_seq(), hull, was_live);
        if !was_live {
            self.cache.logged.borrow_mut().insert(inode.id, inode.clone());
        }
        Ok(true)
    }
}

/// Settling.
impl Fs {
    /// Bytes of a file have changed on the device: if they were logged, the next sync settles them.
    pub(super) fn note_changed(self: &Rc<Self>, inode: &Rc<Inode>, bytes: &Range<u64>) {
        let Some(bytes) = self.logged_part(inode, bytes) else { return };
        {
            let mut unsettled = inode.data.log.unsettled.borrow_mut();
            match unsettled.last_mut() {
                Some(last) if last.start <= bytes.end && bytes.start <= last.end => {
                    *last = last.start.min(bytes.start)..last.end.max(bytes.end);
                }
                _ => unsettled.push(bytes),
            }
        }
        self.note_ahead(inode);
    }

    /// The part of a range that may have been logged.
    fn logged_part(&self, inode: &Inode, bytes: &Range<u64>) -> Option<Range<u64>> {
        if !self.has_log(inode) {
            return None;
        }
        let pages = inode.data.log.pages.borrow();
        let (first, behind) = (pages.start * self.cache.page_size(), pages.end * self.cache.page_size());
        let part = bytes.start.max(first)..bytes.end.min(behind);
        (part.start < part.end).then_some(part)
    }

    /// What a truncation to `size` settles, in its transaction. A block that loses only some of its bytes must have
    /// the rest on the device before.
    ///
    /// # Errors
    /// A wait for that.
    pub(super) fn settle_truncated(&self, txn: &mut Txn, inode: &Inode, size: u64) -> Try<()> {
        let block = u64::from(self.store.block_size());
        let start = size / block * block;
        let page = size / self.cache.page_size();
        if start < size
            && self.logged_part(inode, &(start..size)).is_some()
            && inode.data.pages.borrow().get(page).logged
        {
            return Err(Wait::WriteBack(inode.id).into());
        }
        self.settle_in(txn, inode, &(start..u64::MAX));
        Ok(())
    }

    /// Settles bytes in the transaction that takes them from the file. True if there was something to settle.
    pub(super) fn settle_in(&self, txn: &mut Txn, inode: &Inode, bytes: &Range<u64>) -> bool {
        let part = self.logged_part(inode, bytes);
        let is_logged = part.is_some();
        part.into_iter().for_each(|part| txn.settle(inode.id, part));
        is_logged
    }

    /// Settles some of what has changed; gives the number of ranges, which the caller drops once the transaction
    /// is applied.
    fn add_settled(&self, txn: &mut Txn, inode: &Inode) -> usize {
        let unsettled = inode.data.log.unsettled.borrow();
        let some = &unsettled[..unsettled.len().min(SETTLED_PER_TXN)];
        some.iter().for_each(|bytes| txn.settle(inode.id, bytes.clone()));
        some.len()
    }

    /// Settles what has changed on the device since it was logged.
    ///
    /// # Errors
    /// Those of [`crate::store::Store::commit`].
    pub(super) fn settle_changed(&self, inode: &Inode) -> Try<()> {
        while inode.data.log.is_unsettled() {
            let mut txn = Txn::new(Origin::default());
            txn.keep_promise();
            let settled = self.add_settled(&mut txn, inode);
            self.store.commit(&txn)?;
            inode.data.log.unsettled.borrow_mut().drain(..settled);
        }
        Ok(())
    }
}

/// The way home.
impl Fs {
    /// Takes a range for a change, with no logged page in it. Such pages wait for whoever holds the range, and
    /// checkpoints for such pages: the holder may have to wait for a checkpoint.
    ///
    /// # Errors
    /// The device's.
    pub(super) async fn lock_for_change(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        pages: Range<u64>,
    ) -> Result<RangeGuard, FsError> {
        self.lock_without(inode, &pages, Mode::Change, |map, pages| map.first_logged(pages).is_some()).await
    }
}

impl LoggedData for Fs {
    fn write_home(self: Rc<Self>) -> Pin<Box<dyn Future<Output = Result<(), FsError>>>> {
        Box::pin(async move {
            self.cache.logged.borrow_mut().retain(|_, inode| self.has_log(inode));
            let files: Vec<Rc<Inode>> = self.cache.logged.borrow().values().cloned().collect();
            for some in files.chunks(FILES_AT_ONCE) {
                let writes = some.iter().map(|inode| self.write_logged(inode));
                join_all(writes).await.into_iter().collect::<Result<(), _>>()?;
            }
            Ok(())
        })
    }
}
