//! Size, allocation ahead, holes, deletion.

use std::ops::{ControlFlow, Range};
use std::rc::Rc;

use reactor::sync::yield_now;

use super::ToBlocks;
use super::extent::{Piece, Remap};
use super::range_lock::{Mode, RangeGuard};
use super::sums::{GROUP_CHANGE_LEN, GROUP_DELETE_LEN};
use super::write::{REDEMPTIONS_MAX, Source};
use crate::error::{Corruption, FsError, Try, Wait};
use crate::fs::{Context, FallocateMode, Fs, Inode, IoFlags, SeekTarget, regular_file};
use crate::ondisk::{ExtentFlags, FILE_SIZE_MAX, InodeFlags, InodeItem, Key, sum_groups};
use crate::store::{Demand, Reservation};
use crate::txn::{Origin, Txn};
use crate::units::{InodeId, MapId};

/// Bytes that the change of one extent takes in a transaction, at most: a rewritten head and tail, a freed
/// range.
const EXTENT_CHANGE_LEN: usize = 192;

/// A file that is ready for allocation in a range.
struct Prepared {
    /// What fills the holes of the range.
    reservation: Reservation,
    _range: RangeGuard,
    _to_blocks: ToBlocks,
}

/// A change of size that a transaction carries.
pub(crate) struct Truncated {
    item: InodeItem,
    /// From this file block on, blocks are freed afterwards: they are too many for the transaction.
    cut: Option<u64>,
}

impl Truncated {
    /// The inode's item with the new size.
    pub(crate) fn item(&self) -> InodeItem {
        self.item
    }

    /// The transaction has been applied; `item` is what it put.
    pub(crate) fn apply(self, fs: &Rc<Fs>, inode: &Rc<Inode>, item: InodeItem) {
        fs.cut_cache(inode, item.size);
        inode.settle(item);
        if let Some(from) = self.cut {
            fs.cut_later(inode, from);
        }
    }
}

/// Size.
impl Fs {
    /// Whether a file can grow to `size` at once.
    pub(super) fn is_ready_to_grow(&self, inode: &Inode, size: u64) -> bool {
        let live = inode.live.borrow();
        if size <= live.size {
            return true;
        }
        if inode.data.cut_from.get().is_some() {
            return false;
        }
        if live.flags.contains(InodeFlags::INLINE) {
            return size <= self.inline_max();
        }
        if !self.is_tail_reserved(inode) {
            return false;
        }
        let aligned = live.size.is_multiple_of(u64::from(self.store.block_size()));
        aligned || live.blocks == 0 || inode.data.tail_clean.get()
    }

    /// Makes a file ready to grow to `size`: its content is in blocks if it will be too large for the tree,
    /// and the bytes behind its end are zero on the device.
    ///
    /// # Errors
    /// The device's, lack of room.
    pub(crate) async fn prepare_growth(self: &Rc<Self>, inode: &Rc<Inode>, size: u64) -> Result<(), FsError> {
        while !self.is_ready_to_grow(inode, size) {
            inode.check_alive()?;
            self.cut_done(inode).await?;
            if inode.live.borrow().flags.contains(InodeFlags::INLINE) {
                self.move_to_blocks(inode).await?;
                continue;
            }
            if self.is_ready_to_grow(inode, size) {
                break;
            }
            // In the cache the bytes behind the end are zero: the page as it is does it.
            if !self.is_tail_reserved(inode) {
                let page = inode.live.borrow().size / self.cache.page_size();
                self.dirty_page(inode, page).await?;
                continue;
            }
            let failures = inode.data.failures.get();
            let (map, end) = {
                let live = inode.live.borrow();
                (live.map, live.size)
            };
            let last = end / u64::from(self.store.block_size());
            let piece = self.run(|fs| fs.piece_at(map, last, last + 1)).await?;
            if piece.stored.is_some_and(|stored| !stored.unwritten) {
                let page = end / self.cache.page_size();
                self.dirty_page(inode, page).await?;
                self.write_back(inode, page..page + 1).await?;
            }
            // Another's write-back may have taken the page, and failed.
            if inode.data.failures.get() == failures && inode.live.borrow().size == end {
                inode.data.tail_clean.set(true);
            }
        }
        Ok(())
    }

    /// Adds the change of a file's size to `txn`; the caller puts the item.
    pub(crate) fn truncate(&self, txn: &mut Txn, inode: &Rc<Inode>, size: u64) -> Try<Truncated> {
        if size > FILE_SIZE_MAX {
            return Err(FsError::FileTooLarge.into());
        }
        if !self.is_ready_to_grow(inode, size) {
            return Err(Wait::Growth(inode.id, size).into());
        }
        if inode.data.lock.is_refused(&(size / self.cache.page_size()..u64::MAX), Mode::Change) {
            return Err(Wait::Range(inode.id).into());
        }
        let mut item = inode.stored_item();
        if size < inode.live.borrow().size {
            self.settle_truncated(txn, inode, size)?;
        }
        if item.flags.contains(InodeFlags::INLINE) {
            self.truncate_inline(txn, &item, size)?;
            item.size = size;
            return Ok(Truncated { item, cut: None });
        }
        let from = size.div_ceil(u64::from(self.store.block_size()));
        let mut freeing = Txn::new(Origin::default());
        let cut = match inode.data.cut_from.get() {
            Some(pending) => Some(from.min(pending)),
            None => {
                let (whole, freed) = self.free_from(&mut freeing, item.map, from)?;
                if whole {
                    item.blocks = item.blocks.saturating_sub(freed);
                    txn.append(&freeing);
                }
                (!whole).then_some(from)
            }
        };
        if let Some(from) = cut {
            txn.put(Key::intent(inode.id), &from.to_le_bytes());
            // On a full device, this is what gives room.
            txn.keep_promise();
        }
        item.size = size;
        Ok(Truncated { item, cut })
    }

    /// The content of an inline file, cut to a smaller size. A larger one needs no change: it reads as zeros.
    fn truncate_inline(&self, txn: &mut Txn, item: &InodeItem, size: u64) -> Try<()> {
        self.store.get(&Key::inline(item.map), |content| {
            if let Some(content) = content.filter(|content| content.len() as u64 > size) {
                txn.put(Key::inline(item.map), &content[..size as usize]);
            }
        })
    }

    /// The file ends at `size` now: pages behind it go, and so do the bytes of the last one.
    fn cut_cache(&self, inode: &Inode, size: u64) {
        let old = inode.live.replace_with(|live| InodeItem { size, ..*live }).size;
        inode.stored_size.set(size);
        if size > old {
            // It could grow, so there are zeros behind its old end, and nothing is behind its new one.
            inode.data.tail_clean.set(true);
        }
        if size >= old {
            return;
        }
        inode.data.tail_clean.set(false);
        let page_size = self.cache.page_size();
        self.drop_range(inode, &(size.div_ceil(page_size)..u64::MAX));
        let last = inode.data.pages.borrow().get(size / page_size);
        if let Some(slot) = last.slot {
            self.cache.memory(slot).slice((size % page_size) as usize, page_size as usize).zero();
            inode.data.pages.borrow_mut().clear_mapped(size / page_size);
        }
    }
}

/// Truncations that one transaction cannot hold.
impl Fs {
    /// Frees the blocks from file block `from` on in the background. The file does not grow before that.
    fn cut_later(self: &Rc<Self>, inode: &Rc<Inode>, from: u64) {
        if inode.data.cut_from.replace(Some(from)).is_some() {
            // The task that is at it goes on from there.
            return;
        }
        let (fs, inode) = (self.clone(), inode.clone());
        drop(self.store.reactor().spawn(async move {
            loop {
                match fs.run(|fs| fs.cut_piece(&inode)).await {
                    Ok(false) => yield_now().await,
                    Ok(true) => break,
                    Err(error) => {
                        tracing::warn!(inode = inode.id.0, %error, "truncation postponed to the next mount");
                        inode.data.cut_error.replace(Some(error));
                        return inode.data.notify();
                    }
                }
            }
            inode.data.cut_from.set(None);
            inode.data.notify();
        }));
    }

    /// Waits until the blocks behind a truncation are free.
    ///
    /// # Errors
    /// What keeps them from being freed before the next mount.
    async fn cut_done(&self, inode: &Inode) -> Result<(), FsError> {
        while inode.data.cut_from.get().is_some() {
            if let Some(error) = &*inode.data.cut_error.borrow() {
                return Err(error.clone());
            }
            inode.data.changed().await;
        }
        Ok(())
    }

    /// Frees some blocks; true when those were the last.
    fn cut_piece(&self, inode: &Rc<Inode>) -> Try<bool> {
        let Some(from) = inode.data.cut_from.get() else { return Ok(true) };
        if inode.gone.get() {
            return Ok(true);
        }
        let mut item = inode.stored_item();
        let mut txn = Txn::new(Origin::default());
        let (whole, freed) = self.free_from(&mut txn, item.map, from)?;
        item.blocks = item.blocks.saturating_sub(freed);
        txn.put_inode(inode.id, &item);
        if whole {
            txn.delete(Key::intent(inode.id));
        }
        self.store.commit(&txn)?;
        inode.settle(item);
        Ok(whole)
    }

    /// After a mount: goes on with the truncations that the last one left.
    ///
    /// # Errors
    /// The device's, corruption.
    pub(crate) async fn resume_cuts(self: &Rc<Self>) -> Result<(), FsError> {
        let mut cuts: Vec<(InodeId, Option<u64>)> = Vec::new();
        self.run(|fs| {
            cuts.clear();
            let (from, to) = (Key::intent(InodeId(0)), Key::intent(InodeId(u64::MAX)));
            fs.store.scan(&from, &to, |key, value| {
                cuts.push((InodeId(key.offset), value.try_into().ok().map(u64::from_le_bytes)));
                ControlFlow::Continue(())
            })
        })
        .await?;
        for (id, from) in cuts {
            let damaged = || Corruption { structure: "intent", offset: id.0, problem: "malformed".into() };
            let inode = self.run(|fs| fs.inode(id)).await?;
            self.cut_later(&inode, from.ok_or_else(damaged)?);
        }
        Ok(())
    }

    /// Adds the end of an intent of a deleted inode to `txn`.
    pub(crate) fn end_cut(&self, txn: &mut Txn, id: InodeId) -> Try<()> {
        if self.store.get(&Key::intent(id), |value| value.is_some())? {
            txn.delete(Key::intent(id));
        }
        Ok(())
    }
}

/// Deletion.
impl Fs {
    /// Frees the extents of `map` from file block `from` on, as many of the last ones as fit a transaction.
    /// True when those are all.
    pub(crate) fn delete_data(&self, txn: &mut Txn, map: MapId, from: u64) -> Try<bool> {
        Ok(self.free_from(txn, map, from)?.0)
    }

    fn free_from(&self, txn: &mut Txn, map: MapId, from: u64) -> Try<(bool, u64)> {
        let mut room = (self.store.txn_len_max() / 2).saturating_sub(txn.journal_bytes());
        if self.store.has_data_sums() {
            // Those of the lowest group may have to be rewritten.
            room = room.saturating_sub(GROUP_CHANGE_LEN);
        }
        let mut remap = Remap::new(self, map);
        let (mut freed, mut end, mut whole) = (0, u64::MAX, false);
        while !whole && (freed == 0 || room >= EXTENT_CHANGE_LEN) {
            let last = self.last_extent(map, end.saturating_sub(1))?;
            let last = last.map(|(start, item)| start..start + u64::from(item.blocks));
            let Some(extent) = last.filter(|extent| extent.end > from) else {
                whole = true;
                break;
            };
            room = room.saturating_sub(EXTENT_CHANGE_LEN);
            let first = extent.start.max(from);
            end = self.sums_behind(&(first..extent.end), room / GROUP_DELETE_LEN);
            freed += remap.unmap(&(end..extent.end), true)?;
            if end > first {
                break;
            }
            if self.store.has_data_sums() {
                room = room.saturating_sub(sum_groups(&(end..extent.end)).count() * GROUP_DELETE_LEN);
            }
            whole = extent.start <= from;
        }
        remap.finish(txn);
        self.clear_sums(txn, map, &(end..u64::MAX))?;
        Ok((whole, freed))
    }

    /// The inode has been deleted: nothing of it is cached any more, and nobody can write into it.
    pub(crate) fn drop_pages(&self, inode: &Inode) {
        inode.gone.set(true);
        self.drop_range(inode, &(0..u64::MAX));
        self.unlist(inode);
    }
}

/// Allocation ahead and holes.
impl Fs {
    /// Allocates, punches or zeroes a range.
    ///
    /// # Errors
    /// [`FsError::Invalid`] for an empty range, [`FsError::FileTooLarge`], [`FsError::NoSpace`],
    /// [`FsError::ReadOnly`], kinds as for reading.
    pub async fn fallocate(
        self: &Rc<Self>,
        ctx: Context,
        inode: InodeId,
        mode: FallocateMode,
        offset: u64,
        len: u64,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        let inode = self.run(|fs| fs.inode(inode)).await?;
        regular_file(inode.live.borrow().mode)?;
        let end = offset.checked_add(len).filter(|end| *end <= FILE_SIZE_MAX).ok_or(FsError::FileTooLarge)?;
        if len == 0 {
            return Err(FsError::Invalid);
        }
        match mode {
            FallocateMode::PunchHole => self.zero_range(&ctx, &inode, offset..end).await,
            FallocateMode::Zero { keep_size } => {
                self.zero_range(&ctx, &inode, offset..end).await?;
                let prepared = self.prepare_range(&inode, &(offset..end), keep_size).await?;
                self.allocate_range(&inode, offset..end, prepared, keep_size).await
            }
            FallocateMode::Allocate { keep_size } => {
                let prepared = self.prepare_range(&inode, &(offset..end), keep_size).await?;
                // Once, before the first transaction: a power cut may show the time of any of them.
                self.note_write(&inode, 0, IoFlags::default());
                self.allocate_range(&inode, offset..end, prepared, keep_size).await
            }
        }
    }

    /// Makes a file ready for allocation in a range, keeps others away from it, and reserves what fills its holes.
    async fn prepare_range(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        bytes: &Range<u64>,
        keep_size: bool,
    ) -> Result<Prepared, FsError> {
        let pages = self.cache.pages(bytes);
        let mut redemptions = 0;
        let to_blocks = ToBlocks::new(inode);
        loop {
            self.move_to_blocks(inode).await?;
            self.cut_done(inode).await?;
            if !keep_size {
                self.prepare_growth(inode, bytes.end).await?;
            }
            let guard = self.lock_for_change(inode, pages.clone()).await?;
            let inline = inode.live.borrow().flags.contains(InodeFlags::INLINE);
            let cut = inode.data.cut_from.get().is_some();
            if inline || cut || !keep_size && !self.is_ready_to_grow(inode, bytes.end) {
                continue;
            }
            match self.reserve_holes(inode, &self.blocks(bytes)).await {
                Err(FsError::NoSpace) if self.store.has_promises() && redemptions < REDEMPTIONS_MAX => {
                    drop(guard);
                    self.redeem().await;
                    redemptions += 1;
                }
                reserved => {
                    return Ok(Prepared { reservation: reserved?, _range: guard, _to_blocks: to_blocks });
                }
            }
        }
    }

    /// Blocks that `bytes` of a file touch.
    fn blocks(&self, bytes: &Range<u64>) -> Range<u64> {
        let block = u64::from(self.store.block_size());
        bytes.start / block..bytes.end.div_ceil(block)
    }

    /// Allocates the holes of a range that has been prepared.
    async fn allocate_range(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        bytes: Range<u64>,
        prepared: Prepared,
        keep_size: bool,
    ) -> Result<(), FsError> {
        let Prepared { mut reservation, _range, _to_blocks } = prepared;
        let Range { start: mut at, end } = self.blocks(&bytes);
        while at < end {
            at = self.allocate_hole(inode, at, end, &mut reservation).await?;
        }
        drop(reservation);
        // Blocks that are allocated are no data that could be missing: the size may follow at once.
        self.run(|fs| {
            inode.check_alive()?;
            let mut item = inode.stored_item();
            if !keep_size {
                item.size = item.size.max(bytes.end);
            }
            let mut txn = Txn::new(Origin::default());
            txn.put_inode(inode.id, &item);
            fs.store.commit(&txn)?;
            if item.size > inode.live.borrow().size {
                inode.live.borrow_mut().size = item.size;
                inode.data.tail_clean.set(true);
            }
            inode.settle(item);
            Ok(())
        })
        .await
    }

    /// Reserves what fills the holes of `blocks`.
    async fn reserve_holes(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        blocks: &Range<u64>,
    ) -> Result<Reservation, FsError> {
        self.reserve_for(inode, blocks, |piece| match piece.stored {
            // They are not written yet, and have no checksums.
            None => Demand { holes: piece.count, pieces: 1, ..Demand::NONE },
            Some(_) => Demand::NONE,
        })
        .await
    }

    /// Reserves what a write of `blocks` takes. Not while a device operation is announced: freed blocks may be waiting
    /// for its end.
    pub(super) async fn reserve_to_write(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        blocks: &Range<u64>,
    ) -> Result<Reservation, FsError> {
        self.reserve_for(inode, blocks, |piece| self.demand_of_piece(piece)).await
    }

    async fn reserve_for(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        blocks: &Range<u64>,
        demand_of: impl Fn(&Piece) -> Demand,
    ) -> Result<Reservation, FsError> {
        let map = inode.live.borrow().map;
        let (mut at, mut demand) = (blocks.start, Demand::NONE);
        while at < blocks.end {
            let piece = self.run(|fs| fs.piece_at(map, at, blocks.end)).await?;
            demand = demand + demand_of(&piece);
            at += piece.count;
        }
        self.run(|fs| fs.store.reserve(demand)).await
    }

    /// Allocates the begin of the hole at `at`, if there is one; gives what comes next.
    async fn allocate_hole(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        at: u64,
        end: u64,
        reservation: &mut Reservation,
    ) -> Result<u64, FsError> {
        let map = inode.live.borrow().map;
        let hole = self.run(|fs| fs.piece_at(map, at, end)).await?;
        if hole.stored.is_some() {
            return Ok(at + hole.count);
        }
        let want = u32::try_from(hole.count).unwrap_or(u32::MAX);
        let goal = self.goal(inode, at, &[]).await?;
        self.ensure_reserved(reservation, u64::from(want)).await?;
        let allocation = self.allocate(reservation, goal, want).await?;
        let range = allocation.range();
        self.run(|fs| {
            inode.check_alive()?;
            let mut txn = Txn::new(Origin::default());
            let mut item = inode.stored_item();
            item.blocks += u64::from(range.count);
            txn.alloc(range);
            let mut remap = Remap::new(fs, item.map);
            remap.map(at, range, ExtentFlags::UNWRITTEN)?;
            remap.finish(&mut txn);
            fs.commit_item(&mut txn, inode, item)
        })
        .await?;
        allocation.committed();
        if range.count == want {
            drop(reservation.split(&Demand { pieces: 1, ..Demand::NONE }));
        }
        Ok(at + u64::from(range.count))
    }

    /// Makes a range read as zeros: whole pages lose their blocks, parts of pages are overwritten.
    async fn zero_range(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        bytes: Range<u64>,
    ) -> Result<(), FsError> {
        inode.check_alive()?;
        // Once, before the first transaction: a power cut may show the time of any of them.
        self.note_write(inode, 0, IoFlags::default());
        let (mut bytes, size) = (bytes, inode.live.borrow().size);
        while !self.zero_range_as_it_is(ctx, inode, &bytes).await? {
            // What is appended from now on is none of it.
            bytes.end = bytes.end.min(size).max(bytes.start);
        }
        Ok(())
    }

    /// The same, unless the file became another one meanwhile: it grew behind the range, or moved into the tree. False
    /// then, and it is to be done again.
    async fn zero_range_as_it_is(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        asked: &Range<u64>,
    ) -> Result<bool, FsError> {
        let page_size = self.cache.page_size();
        let is_inline = || inode.live.borrow().flags.contains(InodeFlags::INLINE);
        let (size, inline) = (inode.live.borrow().size, is_inline());
        let is_to_the_end = asked.end >= size;
        let bytes =
            asked.start..if is_to_the_end { asked.end.next_multiple_of(page_size) } else { asked.end };
        let whole = if inline { 0..0 } else { bytes.start.div_ceil(page_size)..bytes.end / page_size };
        let edges = match whole.start < whole.end {
            true => [bytes.start..whole.start * page_size, whole.end * page_size..bytes.end],
            false => [bytes.clone(), 0..0],
        };
        let flags = IoFlags::default().without_times();
        for edge in edges {
            let edge = edge.start..edge.end.min(size);
            if edge.start < edge.end && self.holds_data(inode, &edge).await? {
                let len = edge.end - edge.start;
                if self.write_buffered(ctx, inode, edge.start, Source::Zeros, len, flags).await?
                    < len as usize
                {
                    return Err(FsError::NoSpace);
                }
            }
        }
        if whole.start < whole.end {
            let _guard = self.lock_for_change(inode, whole.clone()).await?;
            inode.check_alive()?;
            if is_inline() || is_to_the_end && inode.live.borrow().size > size {
                return Ok(false);
            }
            let was_dirty = inode.data.pages.borrow().is_unwritten(&whole);
            self.drop_range(inode, &whole);
            let per_page = page_size / u64::from(self.store.block_size());
            let punched = self.punch_blocks(inode, whole.start * per_page..whole.end * per_page).await;
            if let (true, Err(error)) = (was_dirty, &punched) {
                // Neither the hole nor what was buffered is there.
                inode.data.error.borrow_mut().get_or_insert_with(|| error.clone());
                self.cache.failure.borrow_mut().get_or_insert_with(|| error.clone());
            }
            punched?;
        }
        Ok(true)
    }

    /// Unmaps `blocks` in rounds, so that each fits a transaction however many extents there are.
    async fn punch_blocks(self: &Rc<Self>, inode: &Rc<Inode>, blocks: Range<u64>) -> Result<(), FsError> {
        let mut left = blocks;
        while !left.is_empty() {
            left = self.run(|fs| fs.punch_round(inode, &left)).await?;
        }
        Ok(())
    }

    /// Whether any byte of a range may differ from zero.
    async fn holds_data(self: &Rc<Self>, inode: &Rc<Inode>, bytes: &Range<u64>) -> Result<bool, FsError> {
        let live = *inode.live.borrow();
        if live.flags.contains(InodeFlags::INLINE)
            || !inode.data.pages.borrow().present(&self.cache.pages(bytes)).is_empty()
        {
            return Ok(true);
        }
        let blocks = self.blocks(bytes);
        let pieces = self.run(|fs| fs.pieces(live.map, blocks.clone())).await?;
        Ok(pieces.iter().any(|piece| piece.stored.is_some()))
    }

    /// Unmaps the first extents of `blocks`; gives what is left.
    fn punch_round(&self, inode: &Rc<Inode>, blocks: &Range<u64>) -> Try<Range<u64>> {
        let mut item = inode.stored_item();
        let most = (self.store.txn_len_max() / 2 / EXTENT_CHANGE_LEN).max(1);
        let mut ends = Vec::new();
        let from = Key::extent(item.map, blocks.start);
        self.store.scan(&from, &Key::extent(item.map, blocks.end), |key, _| {
            ends.push(key.offset);
            if ends.len() > most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let end = if ends.len() > most { ends[most] } else { blocks.end };
        let end = self.sums_until(item.map, &(blocks.start..end), most)?;
        let mut txn = Txn::new(Origin::default());
        let mut remap = Remap::new(self, item.map);
        let freed = remap.unmap(&(blocks.start..end), true)?;
        remap.finish(&mut txn);
        self.clear_sums(&mut txn, item.map, &(blocks.start..end))?;
        let block = u64::from(self.store.block_size());
        let is_settled = self.settle_in(&mut txn, inode, &(blocks.start * block..end.saturating_mul(block)));
        if freed > 0 || is_settled {
            item.blocks = item.blocks.saturating_sub(freed);
            self.commit_item(&mut txn, inode, item)?;
        }
        Ok(end..blocks.end)
    }

    /// The next byte at or behind `offset` that is data or a hole. Buffered data is written back first.
    ///
    /// # Errors
    /// [`FsError::NoData`] when there is none before the end of the file, kinds as for reading.
    pub fn seek(&self, _ctx: &Context, inode: InodeId, offset: u64, target: SeekTarget) -> Try<u64> {
        let inode = self.inode(inode)?;
        let item = *inode.live.borrow();
        regular_file(item.mode)?;
        if offset >= item.size {
            return Err(FsError::NoData.into());
        }
        if item.flags.contains(InodeFlags::INLINE) {
            return Ok(if target == SeekTarget::Data { offset } else { item.size });
        }
        if self.is_dirty(&inode) {
            return Err(Wait::WriteBack(inode.id).into());
        }
        let block = u64::from(self.store.block_size());
        let (mut at, end) = (offset / block, item.size.div_ceil(block));
        while at < end {
            let piece = self.piece_at(item.map, at, end)?;
            let is_data = piece.stored.is_some_and(|stored| !stored.unwritten);
            if is_data == (target == SeekTarget::Data) {
                return Ok((piece.start * block).max(offset));
            }
            at += piece.count;
        }
        match target {
            SeekTarget::Data => Err(FsError::NoData.into()),
            SeekTarget::Hole => Ok(item.size),
        }
    }
}
