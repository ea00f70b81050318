//! Writing into the cache.
//!
//! A round of a write first finds out everything that it needs (`plan`), then takes it, then changes pages
//! and attributes, without waiting in between. Whatever is missing is a [`Need`], which the asynchronous
//! side satisfies before it tries again.

use std::ops::Range;
use std::rc::Rc;

use bdev::{Cursor, IoBuffers};
use smallvec::SmallVec;

use super::arena::Slot;
use super::extent::Piece;
use super::log::LOGGED_MAX;
use super::pages::PageState;
use super::range_lock::Mode;
use crate::error::{FsError, Stop, Try, Wait};
use crate::fs::{Context, Fs, Inode, IoFlags, SetAttr, regular_file, without_privileges};
use crate::ondisk::{FILE_SIZE_MAX, InodeFlags};
use crate::store::{Demand, Reservation};
use crate::units::InodeId;

/// How often who finds no space has what others were promised written: they may be promised as much again meanwhile.
pub(super) const REDEMPTIONS_MAX: usize = 4;

/// What a round of a write waits for.
enum Need {
    /// A page that is written in part has to be loaded first.
    Load(u64),
    /// Somebody changes the mapping of these pages.
    Range(Range<u64>),
    /// The file must be made ready to grow to this size.
    Growth(u64),
    /// A logged page that would need more blocks has to be written first.
    WriteBack(u64),
    /// A page must not change before its write has ended.
    EndOfWrite(u64),
    /// Too much is dirty, or no slot is to be had.
    Relief,
    /// There is no space, unless writing what others were promised gives some.
    Redemption,
    /// The store.
    Store(Wait),
    /// It cannot succeed.
    Fail(FsError),
}

impl From<Stop> for Need {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Wait(wait) => Self::Store(wait),
            Stop::Fail(error) => Self::Fail(error),
        }
    }
}

impl From<FsError> for Need {
    fn from(error: FsError) -> Self {
        Self::Fail(error)
    }
}

/// Where written bytes come from.
#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Buffers(&'a IoBuffers),
    Zeros,
}

/// A page that a round changes.
struct Target {
    page: u64,
    /// `None` for one that is not cached: it is written as a whole, or lies behind the end of the file.
    slot: Option<Slot>,
    /// What to reserve for it.
    reserve: Demand,
}

type Plan = SmallVec<[Target; 4]>;

impl Fs {
    /// Writes into the cache without waiting, or declines.
    pub fn try_write(
        self: &Rc<Self>,
        ctx: &Context,
        inode: InodeId,
        offset: u64,
        src: &IoBuffers,
        flags: IoFlags,
    ) -> Option<Result<usize, FsError>> {
        if flags.direct || flags.sync || flags.dsync {
            return None;
        }
        let inode = self.inodes.borrow().get(&inode)?.clone();
        let start = if flags.append { inode.live.borrow().size } else { offset };
        if src.len() as u64 > self.cache.round_bytes() {
            return None;
        }
        let bytes = start..start.checked_add(src.len() as u64)?;
        match self.write_round(ctx, &inode, &bytes, Source::Buffers(src), flags) {
            Ok(()) => Some(Ok(src.len())),
            Err(Need::Fail(FsError::NoSpace)) => None,
            Err(Need::Fail(error)) => Some(Err(error)),
            Err(_) => None,
        }
    }

    /// Writes `src` at `offset` (with `append`: at the end); few bytes that are to be durable at once go through the
    /// cache, even if they are direct: the journal is the shorter way. Fewer bytes when an error comes after some.
    ///
    /// # Errors
    /// [`FsError::FileTooLarge`], [`FsError::NoSpace`], [`FsError::ReadOnly`], kinds as for reading, the
    /// device's.
    pub async fn write(
        self: &Rc<Self>,
        ctx: Context,
        inode: InodeId,
        offset: u64,
        src: IoBuffers,
        flags: IoFlags,
    ) -> Result<usize, FsError> {
        let id = inode;
        let inode = self.run(|fs| fs.inode(id)).await?;
        let is_synced = flags.sync || flags.dsync;
        let way = IoFlags { direct: flags.direct && !(is_synced && src.len() as u64 <= LOGGED_MAX), ..flags };
        let (bytes, written) = if flags.append {
            self.append(&ctx, &inode, &src, way).await?
        } else {
            let written = self.write_at(&ctx, &inode, offset, &src, way).await?;
            (offset..offset.saturating_add(written as u64), written)
        };
        if is_synced {
            self.sync_inode(id, !flags.sync).await?;
        } else if flags.direct {
            self.write_back(&inode, self.cache.pages(&bytes)).await?;
        }
        Ok(written)
    }

    async fn write_at(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        offset: u64,
        src: &IoBuffers,
        flags: IoFlags,
    ) -> Result<usize, FsError> {
        if flags.direct && self.goes_direct(inode, offset, src) {
            self.write_direct(ctx, inode, offset, src, flags).await
        } else {
            self.write_buffered(ctx, inode, offset, Source::Buffers(src), src.len() as u64, flags).await
        }
    }

    /// Writes `src` at the end of the file, in pieces if it is longer than a round; the first one gives the file its
    /// times. Gives the hull of what was written, and how much that was.
    async fn append(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        src: &IoBuffers,
        flags: IoFlags,
    ) -> Result<(Range<u64>, usize), FsError> {
        let mut round = self.cache.round_bytes();
        let (mut hull, mut done): (Option<Range<u64>>, usize) = (None, 0);
        while done < src.len() || hull.is_none() {
            let before = inode.live.borrow().size;
            let rest = src.slice(done, src.len() - done);
            let flags = if hull.is_some() { flags.without_times() } else { flags };
            match self.append_piece(ctx, inode, &rest, round, flags).await {
                Ok(bytes) => {
                    done += (bytes.end - bytes.start) as usize;
                    hull = Some(hull.map_or(bytes.start, |hull| hull.start)..bytes.end);
                }
                // Unless a part of it, written directly, is there.
                Err(FsError::NoSpace)
                    if round > self.cache.page_size() && inode.live.borrow().size == before =>
                {
                    round = self.cache.page_size();
                }
                Err(_) if hull.is_some() => break,
                Err(error) => return Err(error),
            }
        }
        Ok((hull.unwrap_or_default(), done))
    }

    /// Writes at the end that the file has when the bytes enter: whoever had to wait looks for it again, since
    /// others may have moved it. All of `src`, or about `round` bytes of it, up to the end of a page: a power cut
    /// between two rounds never leaves a part of a sector.
    async fn append_piece(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        src: &IoBuffers,
        round: u64,
        flags: IoFlags,
    ) -> Result<Range<u64>, FsError> {
        let at_the_end = || {
            let (size, page) = (inode.live.borrow().size, self.cache.page_size());
            // A round of bytes fits wherever in a page it begins.
            let most = (size / page * page).saturating_add(round + page);
            size..size.saturating_add(src.len() as u64).min(most)
        };
        let part = |bytes: &Range<u64>| src.slice(0, (bytes.end - bytes.start) as usize);
        let mut bytes = at_the_end();
        while flags.direct && !src.is_empty() && self.goes_direct(inode, bytes.start, &part(&bytes)) {
            self.admit_direct(ctx, inode, &bytes, flags).await?;
            if self.write_blocks_direct(inode, bytes.clone(), &part(&bytes), flags).await? {
                return Ok(bytes);
            }
            bytes = at_the_end();
        }
        self.when_ready(inode, |fs| {
            bytes = at_the_end();
            fs.write_round(ctx, inode, &bytes, Source::Buffers(&part(&bytes)), flags)
        })
        .await?;
        Ok(bytes)
    }

    /// Writes `len` bytes round by round; the first one gives the file its times.
    pub(super) async fn write_buffered(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        offset: u64,
        src: Source<'_>,
        len: u64,
        flags: IoFlags,
    ) -> Result<usize, FsError> {
        let end = offset.checked_add(len).filter(|end| *end <= FILE_SIZE_MAX).ok_or(FsError::FileTooLarge)?;
        let mut round = self.cache.round_bytes();
        let mut at = offset;
        while at < end {
            let next = (at / round + 1).saturating_mul(round).min(end);
            let part = match src {
                Source::Buffers(src) => Some(src.slice((at - offset) as usize, (next - at) as usize)),
                Source::Zeros => None,
            };
            let source = part.as_ref().map_or(Source::Zeros, Source::Buffers);
            let bytes = at..next;
            let flags = if at > offset { flags.without_times() } else { flags };
            match self.when_ready(inode, |fs| fs.write_round(ctx, inode, &bytes, source, flags)).await {
                Ok(()) => at = next,
                // The pages of a round count on the worst, each of them.
                Err(FsError::NoSpace) if round > self.cache.page_size() => round = self.cache.page_size(),
                Err(_) if at > offset => break,
                Err(error) => return Err(error),
            }
        }
        Ok((at - offset) as usize)
    }

    /// Makes a page dirty with the bytes that it has.
    pub(super) async fn dirty_page(self: &Rc<Self>, inode: &Rc<Inode>, page: u64) -> Result<(), FsError> {
        self.when_ready(inode, |fs| {
            let is_behind = page > 0 && page * fs.cache.page_size() >= inode.live.borrow().size;
            if is_behind || inode.gone.get() {
                // It was cut off meanwhile.
                return Ok(());
            }
            let pages = page..page + 1;
            if inode.data.lock.is_refused(&pages, Mode::Transfer) {
                return Err(Need::Range(pages));
            }
            let state = inode.data.pages.borrow().get(page);
            let Some(slot) = state.slot.filter(|_| state.loaded) else { return Err(Need::Load(page)) };
            let lacking = fs.lacking(inode, page, &state)?;
            if lacking != Demand::NONE && state.logged {
                return Err(Need::WriteBack(page));
            }
            let mut reservation = fs.promise(lacking)?;
            fs.cache.reserve_for(inode, slot, &mut reservation, &lacking);
            fs.mark_dirty(inode, page);
            Ok(())
        })
        .await
    }

    /// Makes a round again and again until it has what it needs.
    async fn when_ready(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        mut round: impl FnMut(&Rc<Self>) -> Result<(), Need>,
    ) -> Result<(), FsError> {
        let mut redemptions = 0;
        loop {
            match round(self) {
                Ok(()) => return Ok(()),
                Err(Need::Fail(error)) => return Err(error),
                Err(Need::Load(page)) => self.load(inode, page..page + 1).await?,
                Err(Need::Range(pages)) => {
                    if inode.data.lock.is_refused(&pages, Mode::Transfer) {
                        inode.data.changed().await;
                    }
                }
                Err(Need::EndOfWrite(page)) => {
                    if inode.data.pages.borrow().get(page).writing {
                        inode.data.changed().await;
                    }
                }
                Err(Need::Growth(size)) => Box::pin(self.prepare_growth(inode, size)).await?,
                Err(Need::WriteBack(page)) => self.write_back(inode, page..page + 1).await?,
                Err(Need::Relief) => self.relief(self.cache.relieved.notified()).await,
                Err(Need::Redemption) if redemptions == REDEMPTIONS_MAX => return Err(FsError::NoSpace),
                Err(Need::Redemption) => {
                    self.redeem().await;
                    redemptions += 1;
                }
                Err(Need::Store(wait)) => self.wait(wait).await?,
            }
        }
    }

    /// One round: all of `bytes`, or nothing.
    fn write_round(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        bytes: &Range<u64>,
        src: Source<'_>,
        flags: IoFlags,
    ) -> Result<(), Need> {
        self.check_writable()?;
        inode.check_alive()?;
        regular_file(inode.live.borrow().mode)?;
        // Zeros go over what there is.
        let end = if matches!(src, Source::Zeros) { inode.live.borrow().size } else { u64::MAX };
        let bytes = &(bytes.start..bytes.end.min(end));
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.end > FILE_SIZE_MAX {
            return Err(FsError::FileTooLarge.into());
        }
        if !self.is_ready_to_grow(inode, bytes.end) {
            return Err(Need::Growth(bytes.end));
        }
        let pages = self.cache.pages(bytes);
        if inode.data.lock.is_refused(&pages, Mode::Transfer) {
            return Err(Need::Range(pages));
        }
        self.drop_privileges(ctx, inode, flags)?;
        let mut plan = self.plan(inode, bytes)?;
        if self.cache.is_crowded() {
            return Err(Need::Relief);
        }
        let mut reservation = match plan.iter().map(|target| target.reserve).sum() {
            Demand::NONE => None,
            demand => Some(self.promise(demand)?),
        };
        self.take_slots(inode, bytes, &mut plan)?;
        self.change_pages(inode, bytes, &plan, src, reservation.as_mut());
        self.note_write(inode, bytes.end, flags);
        Ok(())
    }

    /// Reserves what buffered data will need.
    fn promise(&self, demand: Demand) -> Result<Reservation, Need> {
        match self.store.reserve(demand) {
            Err(Stop::Fail(FsError::NoSpace)) if self.store.has_promises() => Err(Need::Redemption),
            reserved => Ok(reserved?),
        }
    }

    /// Set-id bits and capabilities go before the first byte changes.
    pub(super) fn drop_privileges(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        flags: IoFlags,
    ) -> Try<()> {
        let item = *inode.live.borrow();
        let has = without_privileges(item.mode) != item.mode || item.flags.contains(InodeFlags::CAPABILITY);
        if flags.kill_privileges && has {
            let change = SetAttr { kill_privileges: true, ..SetAttr::default() };
            self.set_attr(ctx, inode.id, &change)?;
        }
        Ok(())
    }

    /// What has to be changed.
    fn plan(&self, inode: &Rc<Inode>, bytes: &Range<u64>) -> Result<Plan, Need> {
        let page_size = self.cache.page_size();
        let size = inode.live.borrow().size;
        let mut plan = Plan::new();
        for page in self.cache.pages(bytes) {
            let state = inode.data.pages.borrow().get(page);
            let start = page * page_size;
            // Behind the end of the file is nothing to keep.
            let whole = bytes.start <= start && (start + page_size).min(size) <= bytes.end;
            let fresh = whole || start >= size;
            if !state.loaded && (state.slot.is_some() || !fresh) {
                return Err(Need::Load(page));
            }
            if state.writing && self.store.has_data_sums() {
                return Err(Need::EndOfWrite(page));
            }
            let reserve = self.lacking(inode, page, &state)?;
            if reserve != Demand::NONE && state.logged {
                return Err(Need::WriteBack(page));
            }
            plan.push(Target { page, slot: state.slot, reserve });
        }
        Ok(plan)
    }

    /// What a page needs, before it changes, beyond what it has or is reserved for it.
    fn lacking(&self, inode: &Inode, page: u64, state: &PageState) -> Try<Demand> {
        let has_sums = self.store.has_data_sums();
        let per_page = self.cache.page_size() / u64::from(self.store.block_size());
        // What is being written will be mapped, unless that is a small file on its way into the tree.
        let has_block = || state.dirty || state.writing && inode.live.borrow().blocks > 0;
        if !has_sums && (state.mapped || per_page == 1 && has_block()) {
            return Ok(Demand::NONE);
        }
        let reserved = state.slot.map_or(Demand::NONE, |slot| self.cache.reserved_for(slot));
        if has_sums && reserved.blocks() >= per_page {
            return Ok(Demand::NONE);
        }
        let blocks = page * per_page..(page + 1) * per_page;
        // With several blocks in a page, a truncation may have taken some, and a write under way leaves out
        // those behind the end of the file.
        let needed = match has_sums && state.writing {
            // They will be mapped.
            true => Demand::of_replaced(&blocks, has_sums),
            false => self.demand_of(inode, blocks)?,
        };
        Ok(needed.beyond(&reserved))
    }

    /// Whether the last page, should it be dirty, has what it needs once the file is longer.
    pub(super) fn is_tail_reserved(&self, inode: &Inode) -> bool {
        let size = inode.live.borrow().size;
        let page = size / self.cache.page_size();
        let state = inode.data.pages.borrow().get(page);
        let ends_inside = !size.is_multiple_of(self.cache.page_size());
        !(ends_inside && state.dirty) || self.lacking(inode, page, &state) == Ok(Demand::NONE)
    }

    /// What a write of `blocks` needs.
    fn demand_of(&self, inode: &Inode, blocks: Range<u64>) -> Try<Demand> {
        let (map, has_blocks) = {
            let live = inode.live.borrow();
            (live.map, live.blocks > 0)
        };
        if !has_blocks {
            return Ok(Demand::of_holes(&blocks, self.store.has_data_sums()));
        }
        Ok(self.pieces(map, blocks)?.iter().map(|piece| self.demand_of_piece(piece)).sum())
    }

    /// The same of a piece of a file.
    pub(super) fn demand_of_piece(&self, piece: &Piece) -> Demand {
        let (blocks, has_sums) = (piece.start..piece.start + piece.count, self.store.has_data_sums());
        match piece.stored {
            None => Demand::of_holes(&blocks, has_sums),
            Some(stored) if stored.unwritten => Demand::of_ahead(&blocks, has_sums),
            Some(_) if has_sums => Demand::of_replaced(&blocks, has_sums),
            Some(_) => Demand::NONE,
        }
    }

    /// Gives the new pages of a plan their slots, all or none, with zeros around `bytes`.
    fn take_slots(&self, inode: &Rc<Inode>, bytes: &Range<u64>, plan: &mut Plan) -> Result<(), Need> {
        if plan.iter().all(|target| target.slot.is_some()) {
            return Ok(());
        }
        let mut taken: SmallVec<[Slot; 4]> = SmallVec::new();
        let pages = self.cache.pages(bytes);
        for target in plan.iter().filter(|target| target.slot.is_none()) {
            let Some(slot) = self.take_slot(inode.id, target.page, &pages) else {
                self.cache.return_slots(&taken);
                return Err(Need::Relief);
            };
            taken.push(slot);
        }
        let mut pages = inode.data.pages.borrow_mut();
        for (target, slot) in plan.iter_mut().filter(|target| target.slot.is_none()).zip(taken) {
            let (memory, covered) = (self.cache.memory(slot), self.inside(target.page, bytes));
            memory.slice(0, covered.start).zero();
            memory.slice(covered.end, usize::MAX).zero();
            pages.insert(target.page, slot);
            pages.set_loaded(target.page, false);
            target.slot = Some(slot);
        }
        Ok(())
    }
}

/// Changing pages.
impl Fs {
    /// The part of a page that `bytes` of the file cover, in bytes of the page.
    fn inside(&self, page: u64, bytes: &Range<u64>) -> Range<usize> {
        let (start, size) = (page * self.cache.page_size(), self.cache.page_size());
        let within = |offset: u64| offset.saturating_sub(start).min(size) as usize;
        within(bytes.start)..within(bytes.end)
    }

    fn change_pages(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        bytes: &Range<u64>,
        plan: &Plan,
        src: Source<'_>,
        mut reservation: Option<&mut Reservation>,
    ) {
        let mut cursor: Option<Cursor<'_>> = match src {
            Source::Buffers(src) => Some(src.cursor()),
            Source::Zeros => None,
        };
        for Target { page, slot, reserve } in plan {
            let Some(slot) = *slot else { continue };
            let range = self.inside(*page, bytes);
            let part = self.cache.memory(slot).slice(range.start, range.len());
            match &mut cursor {
                Some(cursor) => {
                    cursor.drain(part);
                }
                None => part.zero(),
            }
            if let Some(reservation) = reservation.as_deref_mut() {
                self.cache.reserve_for(inode, slot, reservation, reserve);
            }
            self.cache.touch(slot);
            self.mark_dirty(inode, *page);
        }
    }

    /// Attributes after a write up to byte `end`.
    pub(super) fn note_write(self: &Rc<Self>, inode: &Rc<Inode>, end: u64, flags: IoFlags) {
        {
            let mut live = inode.live.borrow_mut();
            if end > live.size {
                live.size = end;
                // The new last page is in the cache, with zeros behind the end, or its block is written whole.
                inode.data.tail_clean.set(true);
            }
            if !flags.from_cache {
                live.mtime = self.now();
                live.ctime = live.mtime;
            }
        }
        self.note_ahead(inode);
    }
}
