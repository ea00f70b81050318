//! From the cache to the device.
//!
//! Dirty pages are written in batches: blocks are allocated for those that have none, all writes of a batch
//! are under way together, then transactions map the blocks and move the stored size. A batch is a task of
//! its own, so that it ends as a whole whoever waits for it.
//!
//! A page may change while it is being written: it is dirty again then, and written again. Where blocks have
//! checksums it may not (`sums`).

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bdev::{IoBuffers, WriteFlags};
use reactor::JoinHandle;
use reactor::sync::{Notified, join_all};

use super::arena::Slot;
use super::extent::{Remap, Stored};
use super::load::joined;
use super::pages::{PageMap, PageState};
use super::range_lock::{Mode, RangeGuard};
use super::sums::GROUP_CHANGE_LEN;
use crate::error::{FsError, Try};
use crate::fs::{Fs, Inode};
use crate::ondisk::{ExtentFlags, InodeFlags, InodeItem, Key, SUM_GROUP_BLOCKS};
use crate::store::{Allocation, Demand, Reservation};
use crate::txn::{Origin, Txn};
use crate::units::{BlockAddr, BlockRange, MapId};

/// How long a change may stay in memory alone.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);

/// Pages and runs of a batch.
const BATCH_PAGES: usize = 256;
const BATCH_RUNS: usize = 64;

/// Batches of a file under way at the same time.
const BATCHES_AT_ONCE: usize = 4;

/// Mappings per transaction, at most: more would not save anything.
const MAPPINGS_PER_TXN: usize = 32;

/// Bytes that a mapping takes in a transaction, at most, without checksums: an allocated and a freed range, an extent
/// and its neighbours.
const MAPPING_LEN: usize = 256;

/// Files that are written at the same time when everything is.
pub(super) const FILES_AT_ONCE: usize = 32;

/// Blocks that hold data now and enter the tree next, with their checksums if the file system has such.
pub(super) enum Mapping {
    /// New blocks for the file blocks from `start` on, in place of those that are there.
    Fresh { start: u64, allocation: Allocation, sums: Vec<u32> },
    /// Blocks that were allocated ahead.
    Written { start: u64, range: BlockRange, sums: Vec<u32> },
}

impl Mapping {
    /// The first file block, the blocks, and their checksums.
    fn parts(&self) -> (u64, BlockRange, &[u32]) {
        match self {
            Self::Fresh { start, allocation, sums } => (*start, allocation.range(), sums),
            Self::Written { start, range, sums } => (*start, *range, sums),
        }
    }

    /// The file block behind the last one.
    fn end(&self) -> u64 {
        let (start, range, _) = self.parts();
        start + u64::from(range.count)
    }
}

/// Pages under way.
struct Batch {
    runs: Vec<Range<u64>>,
    slots: Vec<(u64, Slot)>,
    reservation: Option<Reservation>,
    /// Size of the file when the batch was taken: blocks behind it are not written.
    size: u64,
    /// Logged pages: all that is to be done is to write them.
    is_logged: bool,
    /// Pages that have changed since they were logged, if they were.
    changed: Vec<u64>,
}

impl Batch {
    /// Page behind the last one.
    fn end(&self) -> u64 {
        self.runs.last().map_or(0, |run| run.end)
    }
}

/// Where the bytes of a batch went.
enum Place {
    Tree,
    Blocks,
}

/// Which pages are written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Dirty,
    Logged,
}

impl Fs {
    /// Writes the pages of `pages` that are dirty now and waits until they are on the device (not yet
    /// durable). One sweep: pages that become dirty behind it are left for the next.
    ///
    /// # Errors
    /// The device's; lack of room that could not be foreseen. The pages count as clean then.
    pub(super) async fn write_back(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        pages: Range<u64>,
    ) -> Result<(), FsError> {
        self.write_some(inode, pages, Which::Dirty).await
    }

    /// Writes the logged pages of a file.
    ///
    /// # Errors
    /// The device's.
    pub(super) async fn write_logged(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<(), FsError> {
        self.write_some(inode, 0..u64::MAX, Which::Logged).await
    }

    async fn write_some(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        pages: Range<u64>,
        which: Which,
    ) -> Result<(), FsError> {
        let end = inode.live.borrow().size.div_ceil(self.cache.page_size()).min(pages.end);
        let mut at = pages.start;
        let mut under_way = VecDeque::new();
        loop {
            let next = match which {
                Which::Dirty => inode.data.pages.borrow().first_unwritten(&(at..end)),
                Which::Logged => inode.data.pages.borrow().first_logged(&(at..end)),
            };
            let Some(next) = next else { break };
            if under_way.len() == BATCHES_AT_ONCE
                && let Some(batch) = under_way.pop_front()
            {
                batch.await?;
                continue;
            }
            if inode.data.pages.borrow().get(next).writing {
                inode.data.changed().await;
                continue;
            }
            let Some((guard, batch)) = self.take_batch(inode, &(next..end)) else {
                inode.data.changed().await;
                continue;
            };
            at = batch.end();
            under_way.push_back(self.spawn_batch(inode, guard, batch, false));
        }
        for batch in under_way {
            batch.await?;
        }
        self.settle_dirty(inode);
        Ok(())
    }

    /// Takes pages, none of which `is_in_the_way`: such are written before, and written again if there are new ones
    /// once the range is to be had.
    ///
    /// # Errors
    /// As [`Fs::write_back`].
    pub(super) async fn lock_without(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        pages: &Range<u64>,
        mode: Mode,
        is_in_the_way: impl Fn(&PageMap, &Range<u64>) -> bool,
    ) -> Result<RangeGuard, FsError> {
        let is_in_the_way = || {
            // What is behind the end is not written.
            let end = inode.live.borrow().size.div_ceil(self.cache.page_size());
            is_in_the_way(&inode.data.pages.borrow(), &(pages.start..pages.end.min(end).max(pages.start)))
        };
        loop {
            if is_in_the_way() {
                self.write_back(inode, pages.clone()).await?;
            }
            let guard = RangeGuard::acquire(inode, pages.clone(), mode).await;
            if !is_in_the_way() {
                return Ok(guard);
            }
        }
    }

    /// Writes all of a file.
    ///
    /// # Errors
    /// As [`Fs::write_back`].
    pub(crate) async fn write_back_file(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<(), FsError> {
        self.write_back(inode, 0..u64::MAX).await
    }

    /// Moves the content of an inline file to blocks.
    pub(super) async fn move_to_blocks(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<(), FsError> {
        while inode.live.borrow().flags.contains(InodeFlags::INLINE) {
            inode.check_alive()?;
            self.dirty_page(inode, 0).await?;
            inode.check_alive()?;
            match self.take_batch(inode, &(0..1)) {
                Some((guard, batch)) => self.spawn_batch(inode, guard, batch, true).await?,
                None => inode.data.changed().await,
            }
        }
        Ok(())
    }

    /// Writes a batch in a task.
    fn spawn_batch(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        guard: RangeGuard,
        batch: Batch,
        to_blocks: bool,
    ) -> JoinHandle<Result<(), FsError>> {
        let (fs, inode) = (self.clone(), inode.clone());
        self.store.reactor().spawn(async move {
            let result = fs.write_batch(&inode, batch, to_blocks).await;
            drop(guard);
            result
        })
    }

    async fn write_batch(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        mut batch: Batch,
        to_blocks: bool,
    ) -> Result<(), FsError> {
        let pages: Vec<u64> = batch.slots.iter().map(|(page, _)| *page).collect();
        // Blocks behind the end of the file were not written: the last page may still lack some.
        let whole_pages = batch.size / self.cache.page_size();
        let changed = std::mem::take(&mut batch.changed);
        let is_logged = batch.is_logged;
        let result = self.write_pages(inode, batch, to_blocks).await;
        let mapped = matches!(result, Ok(Place::Blocks));
        for page in pages {
            self.page_written(inode, page, mapped && page < whole_pages);
        }
        let page_size = self.cache.page_size();
        changed.iter().for_each(|page| self.note_changed(inode, &(page * page_size..(page + 1) * page_size)));
        if let Err(error) = &result {
            if is_logged {
                // What was synced is in the journal only, and must stay there.
                self.store.fail(error.clone());
            }
            tracing::error!(inode = inode.id.0, %error, "write-back failed: buffered data is lost");
            inode.data.failures.set(inode.data.failures.get() + 1);
            inode.data.error.borrow_mut().get_or_insert_with(|| error.clone());
            self.cache.failure.borrow_mut().get_or_insert_with(|| error.clone());
        }
        self.settle_dirty(inode);
        inode.data.notify();
        self.cache.relieved.notify_all();
        result.map(drop)
    }

    async fn write_pages(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        batch: Batch,
        to_blocks: bool,
    ) -> Result<Place, FsError> {
        if batch.is_logged {
            self.write_home(inode, &batch).await?;
            return Ok(Place::Blocks);
        }
        if !to_blocks && self.fits_inline(inode) {
            match self.write_inline(inode, &batch).await {
                Ok(true) => return Ok(Place::Tree),
                // Blocks are reserved for it, so much room in the tree is not.
                Ok(false) | Err(FsError::NoSpace) => {}
                Err(error) => return Err(error),
            }
        }
        self.write_blocks(inode, batch).await?;
        Ok(Place::Blocks)
    }

    /// Whether a file may be kept in the tree.
    pub(super) fn fits_inline(&self, inode: &Inode) -> bool {
        let live = inode.live.borrow();
        live.blocks == 0 && live.size <= self.inline_max() && inode.data.to_blocks.get() == 0
    }

    /// Takes the first dirty pages of `pages` and the lock on their range, unless somebody else has it.
    fn take_batch(self: &Rc<Self>, inode: &Rc<Inode>, pages: &Range<u64>) -> Option<(RangeGuard, Batch)> {
        let mut cached = inode.data.pages.borrow_mut();
        let mut runs = cached.dirty_runs(pages, BATCH_PAGES, BATCH_RUNS);
        let is_logged = cached.get(runs.first()?.start).logged;
        if is_logged {
            // Between runs may be a range of somebody who waits for the checkpoint that waits for this batch.
            runs.truncate(1);
        }
        let hull = runs.first()?.start..runs.last()?.end;
        let guard = match is_logged {
            true => RangeGuard::try_acquire_first(inode, hull)?,
            false => RangeGuard::try_acquire(inode, hull, Mode::WriteBack)?,
        };
        let has_log = self.has_log(inode);
        let (mut slots, mut changed) = (Vec::new(), Vec::new());
        let mut reserved = Demand::NONE;
        for page in runs.iter().cloned().flatten() {
            let PageState { slot: Some(slot), synced, .. } = cached.get(page) else { continue };
            if has_log && !synced {
                changed.push(page);
            }
            cached.begin_writing(page);
            reserved = reserved + self.cache.take_reservation(inode, slot);
            slots.push((page, slot));
        }
        let size = inode.live.borrow().size;
        let reservation = self.cache.take_reserved(&reserved);
        Some((guard, Batch { runs, slots, reservation, size, is_logged, changed }))
    }

    /// Puts a small file into the tree. False if it has grown meanwhile.
    async fn write_inline(self: &Rc<Self>, inode: &Rc<Inode>, batch: &Batch) -> Result<bool, FsError> {
        let Some((0, slot)) = batch.slots.first() else { return Ok(false) };
        let page = IoBuffers::new([self.cache.memory(*slot)], self.cache.hold());
        self.run(|fs| {
            inode.check_alive()?;
            if !fs.fits_inline(inode) {
                return Ok(false);
            }
            let mut item = inode.stored_item();
            item.size = inode.live.borrow().size;
            item.flags |= InodeFlags::INLINE;
            let mut content = vec![0; item.size as usize];
            page.copy_to(0, &mut content);
            // Not kept at any price: what is promised is a block.
            let mut txn = Txn::new(Origin::default());
            txn.put(Key::inline(item.map), &content);
            txn.show_no_data();
            fs.commit_item(&mut txn, inode, item)?;
            Ok(true)
        })
        .await
    }

    /// File blocks of a batch, and the memory of their pages, run by run.
    fn sources(&self, batch: &Batch) -> Vec<(Range<u64>, IoBuffers)> {
        let block = u64::from(self.store.block_size());
        let per_page = self.cache.page_size() / block;
        let end_of_file = batch.size.div_ceil(block);
        let mut slots = batch.slots.iter().map(|(_, slot)| self.cache.memory(*slot));
        let source = |run: &Range<u64>| {
            let memory: Vec<_> = slots.by_ref().take((run.end - run.start) as usize).collect();
            let blocks = run.start * per_page..(run.end * per_page).min(end_of_file);
            (blocks, IoBuffers::new(joined(&memory), self.cache.hold()))
        };
        batch.runs.iter().map(source).collect()
    }

    async fn write_blocks(self: &Rc<Self>, inode: &Rc<Inode>, batch: Batch) -> Result<(), FsError> {
        let sources = self.sources(&batch);
        let stored_size = batch.size.min(batch.end() * self.cache.page_size());
        let mut reservation = self.run(|fs| fs.store.reserve(Demand::NONE)).await?;
        if let Some(reserved) = batch.reservation {
            reservation.merge(reserved);
        }
        let io = self.store.begin_write();
        let (mut writes, mut mappings) = (Vec::new(), Vec::new());
        let mut placed = Ok(());
        for (blocks, buffers) in &sources {
            placed =
                self.place_run(inode, blocks, buffers, &mut reservation, &mut writes, &mut mappings).await;
            if placed.is_err() {
                break;
            }
        }
        // Before blocks or pages are used for something else, every write has ended.
        let written = join_all(writes).await;
        inode.data.written.set(io.end());
        placed?;
        written.into_iter().collect::<Result<(), _>>()?;
        self.commit_mappings(inode, mappings, stored_size).await
    }

    /// Writes logged pages to their blocks. Blocks that are gone from the file meanwhile are left out.
    async fn write_home(self: &Rc<Self>, inode: &Rc<Inode>, batch: &Batch) -> Result<(), FsError> {
        let block = u64::from(self.store.block_size());
        let map = inode.live.borrow().map;
        let io = self.store.begin_write();
        let mut writes = Vec::new();
        let mut found = Ok(());
        for (blocks, buffers) in self.sources(batch) {
            let pieces = self.run(|fs| fs.pieces(map, blocks.clone())).await;
            for piece in pieces.as_deref().unwrap_or_default() {
                let Some(Stored { addr, unwritten: false }) = piece.stored else { continue };
                let part = buffers
                    .slice(((piece.start - blocks.start) * block) as usize, (piece.count * block) as usize);
                self.queue_writes(addr, part, &mut writes);
            }
            found = found.and(pieces.map(drop));
        }
        let written = join_all(writes).await;
        inode.data.written.set(io.end());
        found?;
        Ok(written.into_iter().collect::<Result<(), _>>()?)
    }

    /// Starts the writes of the file blocks `blocks` and notes what has to be mapped afterwards.
    pub(super) async fn place_run(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        blocks: &Range<u64>,
        buffers: &IoBuffers,
        reservation: &mut Reservation,
        writes: &mut Vec<bdev::Io>,
        mappings: &mut Vec<Mapping>,
    ) -> Result<(), FsError> {
        let block = u64::from(self.store.block_size());
        let map = inode.live.borrow().map;
        let pieces = self.run(|fs| fs.pieces(map, blocks.clone())).await?;
        let part = |start: u64, count: u64| {
            buffers.slice(((start - blocks.start) * block) as usize, (count * block) as usize)
        };
        let most = self.mapping_blocks_max();
        for piece in pieces {
            if let Some(Stored { addr, unwritten: false }) = piece.stored
                && !self.is_written_anew(&piece)
            {
                self.queue_writes(addr, part(piece.start, piece.count), writes);
                continue;
            }
            let (mut at, end) = (piece.start, piece.start + piece.count);
            while at < end {
                let want = (end - at).min(most);
                let ahead = piece.stored.filter(|stored| stored.unwritten);
                let (range, allocation) = match ahead {
                    Some(stored) => {
                        let addr = BlockAddr(stored.addr.0 + (at - piece.start));
                        (BlockRange::new(addr, want as u32), None)
                    }
                    None => {
                        self.ensure_reserved(reservation, want).await?;
                        let goal = self.goal(inode, at, mappings).await?;
                        let allocation = self.allocate(reservation, goal, want as u32).await?;
                        (allocation.range(), Some(allocation))
                    }
                };
                let bytes = part(at, u64::from(range.count));
                let (start, sums) = (at, self.sums_of(&bytes));
                self.queue_writes(range.start, bytes, writes);
                mappings.push(match allocation {
                    Some(allocation) => Mapping::Fresh { start, allocation, sums },
                    None => Mapping::Written { start, range, sums },
                });
                at += u64::from(range.count);
            }
        }
        Ok(())
    }

    /// Blocks of a mapping, so many that a transaction has room for it.
    fn mapping_blocks_max(&self) -> u64 {
        match self.store.has_data_sums() {
            true => {
                let groups = (self.store.txn_len_max() / 2).saturating_sub(MAPPING_LEN) / GROUP_CHANGE_LEN;
                groups.saturating_sub(2).max(1) as u64 * SUM_GROUP_BLOCKS
            }
            false => u64::MAX,
        }
    }

    /// Where the next blocks of the file should lie: behind those before them.
    pub(super) async fn goal(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        start: u64,
        mappings: &[Mapping],
    ) -> Result<Option<BlockAddr>, FsError> {
        let map = inode.live.borrow().map;
        self.run(|fs| fs.goal_behind(map, start, mappings.last())).await
    }

    /// The same, `last` being the last mapping that was made.
    pub(super) fn goal_behind(
        &self,
        map: MapId,
        start: u64,
        last: Option<&Mapping>,
    ) -> Try<Option<BlockAddr>> {
        if let Some(Mapping::Fresh { start: before, allocation, .. }) = last
            && before + u64::from(allocation.range().count) == start
        {
            return Ok(Some(allocation.range().end()));
        }
        let before = self.extent_before(map, start)?;
        Ok(before.map(|(at, item)| BlockAddr(item.device_range().start.0 + (start - at))))
    }

    pub(super) fn queue_writes(&self, addr: BlockAddr, buffers: IoBuffers, writes: &mut Vec<bdev::Io>) {
        let offset = addr.0 * u64::from(self.store.block_size());
        for (at, part) in self.transfers(&buffers) {
            writes.push(self.store.bdev().write(offset + at, part, WriteFlags::NONE));
        }
    }

    pub(super) async fn ensure_reserved(
        self: &Rc<Self>,
        reservation: &mut Reservation,
        blocks: u64,
    ) -> Result<(), FsError> {
        let lacking = blocks.saturating_sub(reservation.blocks());
        if lacking > 0 {
            let demand = Demand { holes: lacking, ..Demand::NONE };
            reservation.merge(self.run(|fs| fs.store.reserve(demand)).await?);
        }
        Ok(())
    }

    pub(super) async fn allocate(
        self: &Rc<Self>,
        reservation: &mut Reservation,
        goal: Option<BlockAddr>,
        want: u32,
    ) -> Result<Allocation, FsError> {
        loop {
            match self.store.allocate(reservation, goal, want) {
                Ok(allocation) => return Ok(allocation),
                Err(crate::Stop::Fail(error)) => return Err(error),
                Err(crate::Stop::Wait(wait)) => self.wait(wait).await?,
            }
        }
    }

    /// Maps written blocks, and moves the stored size up to `size`: with each transaction behind what it maps, or a power
    /// cut would leave data behind the end, which is seen when the file grows.
    pub(super) async fn commit_mappings(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        mut mappings: Vec<Mapping>,
        size: u64,
    ) -> Result<(), FsError> {
        let mut most = MAPPINGS_PER_TXN;
        loop {
            let rest = mappings.split_off(self.first_part(&mappings, most));
            let mapped = match mappings.last() {
                Some(last) if !rest.is_empty() => last.end() * u64::from(self.store.block_size()),
                _ => size,
            };
            match self.run(|fs| fs.commit_some(inode, &mappings, mapped.min(size))).await {
                Err(FsError::NoSpace) if mappings.len() > 1 => {
                    // A transaction counts on the worst for each of its changes: fewer need fewer nodes at a time.
                    most = mappings.len() / 2;
                    mappings.extend(rest);
                    continue;
                }
                committed => committed?,
            }
            for mapping in mappings {
                if let Mapping::Fresh { allocation, .. } = mapping {
                    allocation.committed();
                }
            }
            if rest.is_empty() {
                return Ok(());
            }
            mappings = rest;
        }
    }

    /// How many mappings go into one transaction, `most` at most.
    fn first_part(&self, mappings: &[Mapping], most: usize) -> usize {
        let mut room = self.store.txn_len_max() / 2;
        let fits = |mapping: &&Mapping| {
            let len = MAPPING_LEN + self.sums_len(u64::from(mapping.parts().1.count));
            let fits = len <= room;
            room = room.saturating_sub(len);
            fits
        };
        let fitting = mappings.iter().take(most).take_while(fits).count();
        fitting.max(1).min(mappings.len())
    }

    fn commit_some(&self, inode: &Rc<Inode>, mappings: &[Mapping], size: u64) -> Try<()> {
        inode.check_alive()?;
        let mut item = inode.stored_item();
        let mut txn = Txn::new(Origin::default());
        txn.keep_promise();
        if item.flags.contains(InodeFlags::INLINE) {
            txn.delete(Key::inline(item.map));
            item.flags.remove(InodeFlags::INLINE);
        }
        self.add_mappings(&mut txn, &mut item, mappings)?;
        item.size = item.size.max(size);
        if txn.is_empty() && item.size == inode.stored_size.get() {
            // Overwritten in place: the times follow with the next sync.
            return Ok(());
        }
        self.commit_item(&mut txn, inode, item)
    }

    /// Adds mappings to a transaction. Blocks that were mapped before are free then.
    pub(super) fn add_mappings<'a>(
        &self,
        txn: &mut Txn,
        item: &mut InodeItem,
        mappings: impl IntoIterator<Item = &'a Mapping>,
    ) -> Try<()> {
        let mut remap = Remap::new(self, item.map);
        let mut sums = Vec::new();
        for mapping in mappings {
            let (start, range, of_mapping) = mapping.parts();
            let blocks = start..start + u64::from(range.count);
            match mapping {
                Mapping::Written { .. } => drop(remap.unmap(&blocks, false)?),
                Mapping::Fresh { .. } => {
                    let replaced = remap.unmap(&blocks, true)?;
                    txn.alloc(range);
                    item.blocks = (item.blocks + u64::from(range.count)).saturating_sub(replaced);
                }
            }
            remap.map(start, range, ExtentFlags::empty())?;
            sums.push((start, of_mapping));
        }
        remap.finish(txn);
        self.put_sums(txn, item.map, sums.into_iter())
    }
}

/// When it happens.
impl Fs {
    /// Waits until some pages have become clean or loaded since `relieved` was made: that is, since before it was seen
    /// that there is no room.
    pub(super) async fn relief(self: &Rc<Self>, relieved: Notified) {
        // Else pages are being loaded: a flush with nothing to do would end at once, and so would this.
        if self.cache.has_unwritten() {
            self.start_flush();
        }
        relieved.await;
    }

    /// Keeps the promises that buffered data holds: it takes less room on the device than is reserved for it. Not for
    /// holders of a range, in which such data may be. Who finds no space afterwards finds none.
    pub(crate) async fn redeem(self: &Rc<Self>) {
        // Failures are kept for the next syncs.
        let _ = Box::pin(self.write_back_all()).await;
    }

    /// Attributes are ahead of the tree: they follow with the next flush at the latest.
    pub(super) fn note_ahead(self: &Rc<Self>, inode: &Rc<Inode>) {
        if inode.gone.get() {
            return;
        }
        inode.ahead.set(true);
        self.list_dirty(inode);
        if !self.cache.timer_armed.get() {
            self.arm_flush_timer();
        }
    }

    /// Writes everything in some time.
    pub(super) fn arm_flush_timer(self: &Rc<Self>) {
        self.cache.timer_armed.set(true);
        let (fs, reactor) = (Rc::downgrade(self), self.store.reactor().clone());
        drop(self.store.reactor().spawn(async move {
            reactor.sleep(FLUSH_INTERVAL).await;
            if let Some(fs) = fs.upgrade() {
                fs.cache.timer_armed.set(false);
                fs.start_flush();
            }
        }));
    }

    /// Writes everything that is dirty now, in the background.
    pub(super) fn start_flush(self: &Rc<Self>) {
        if self.cache.flushing.replace(true) {
            return;
        }
        let fs: Weak<Self> = Rc::downgrade(self);
        drop(self.store.reactor().spawn(async move {
            let Some(fs) = fs.upgrade() else { return };
            // Failures are kept for the next syncs.
            let _ = fs.write_back_all().await;
            fs.cache.flushing.set(false);
            fs.cache.relieved.notify_all();
            let writable = fs.check_writable().is_ok();
            if writable && !fs.cache.is_clean() && !fs.cache.timer_armed.get() {
                fs.arm_flush_timer();
            }
        }));
    }

    /// Writes everything that is dirty now.
    ///
    /// # Errors
    /// The first one; the other files are written all the same.
    pub(super) async fn write_back_all(self: &Rc<Self>) -> Result<(), FsError> {
        let mut first = Ok(());
        let files = self.cache.dirty_files();
        for some in files.chunks(FILES_AT_ONCE) {
            let writes = some.iter().map(|inode| {
                let (fs, inode) = (self.clone(), inode.clone());
                async move {
                    fs.write_back_and_fold(&inode).await?;
                    fs.settle_dirty(&inode);
                    Ok(())
                }
            });
            for result in join_all(writes).await {
                first = first.and(result);
            }
        }
        first
    }
}
