//! The data cache: a limited number of pages, shared by all files of a file system.
//!
//! It knows which file uses a slot, and finds one to give away when none is free: slots are looked at in a
//! circle, and one whose page nobody has used since the last round, and that needs no write-back, is taken
//! (second chance). Which pages a file has is the file's own business (`pages`).
//!
//! Dirty pages are bounded: writers wait behind [`Cache::is_crowded`]. Each dirty page that has no blocks yet
//! holds a reservation for them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use bdev::Segment;
use reactor::sync::Notify;

use super::arena::{Arena, Slot};
use super::bounce::BounceMemory;
use super::load::LOAD_PAGES;
use super::sums::Reports;
use crate::error::FsError;
use crate::fs::{Fs, Inode};
use crate::store::{Demand, Reservation};
use crate::units::InodeId;

/// Smallest page in bytes: what guests map and most devices write at once.
const PAGE_SIZE_MIN: usize = 4096;

/// Fewest pages unless a mount asks for fewer: a few requests of the largest size make progress at the same time.
pub(crate) const PAGES_MIN: usize = 1024;

struct Owner {
    inode: InodeId,
    page: u64,
    reserved: Cell<PageDemand>,
    referenced: Cell<bool>,
}

/// What is reserved for a page; it has few blocks.
#[derive(Clone, Copy, Default)]
struct PageDemand {
    holes: u8,
    replaced: u8,
    pieces: u8,
}

impl PageDemand {
    fn with(self, more: &Demand) -> Self {
        let sum = |reserved: u8, more: u64| reserved.saturating_add(u8::try_from(more).unwrap_or(u8::MAX));
        Self {
            holes: sum(self.holes, more.holes),
            replaced: sum(self.replaced, more.replaced),
            pieces: sum(self.pieces, more.pieces),
        }
    }
}

impl From<PageDemand> for Demand {
    fn from(reserved: PageDemand) -> Self {
        let PageDemand { holes, replaced, pieces } = reserved;
        Self { holes: holes.into(), replaced: replaced.into(), pieces: pieces.into() }
    }
}

#[derive(Default)]
struct Slots {
    /// Of every slot that was ever used.
    owners: Vec<Owner>,
    free: Vec<Slot>,
    /// Where the next search begins.
    hand: usize,
}

/// See the module.
pub(crate) struct Cache {
    arena: Rc<Arena>,
    page_shift: u32,
    slots: RefCell<Slots>,
    /// What dirty pages will need.
    reserved: RefCell<Option<Reservation>>,
    /// Pages that are dirty or being written.
    unwritten: Cell<usize>,
    /// Files with dirty pages, or with attributes that are ahead of the tree.
    dirty: RefCell<BTreeMap<InodeId, Rc<Inode>>>,
    /// Files of which a replay would find data in the journal: they stay in memory. Some may not be such any more.
    pub(super) logged: RefCell<BTreeMap<InodeId, Rc<Inode>>>,
    /// A page has become clean, loaded or free.
    pub(super) relieved: Notify,
    /// A write-back of some file failed since everything was synced.
    pub(super) failure: RefCell<Option<FsError>>,
    pub(super) flushing: Cell<bool>,
    pub(super) timer_armed: Cell<bool>,
    /// Lines of the log about data that does not have its checksum.
    pub(super) reports: Reports,
    /// Memory for direct transfers that cannot use the client's.
    pub(super) bounce_memory: Rc<BounceMemory>,
}

impl Cache {
    /// A cache of about `size` bytes, and of `pages_min` pages at least.
    ///
    /// # Errors
    /// [`FsError::OutOfMemory`] when that much address space is not to be had.
    pub(crate) fn new(size: usize, pages_min: usize, block_size: usize) -> Result<Self, FsError> {
        let page_size = PAGE_SIZE_MIN.max(block_size);
        let pages = u32::try_from((size / page_size).max(pages_min)).map_err(|_| FsError::OutOfMemory)?;
        let arena = Arena::new(pages, page_size).map_err(|error| {
            tracing::error!(%error, size, "no memory for the data cache");
            FsError::OutOfMemory
        })?;
        Ok(Self {
            arena: Rc::new(arena),
            page_shift: page_size.trailing_zeros(),
            slots: RefCell::default(),
            reserved: RefCell::default(),
            unwritten: Cell::new(0),
            dirty: RefCell::default(),
            logged: RefCell::default(),
            relieved: Notify::new(),
            failure: RefCell::default(),
            flushing: Cell::new(false),
            timer_armed: Cell::new(false),
            reports: Reports::default(),
            bounce_memory: Rc::default(),
        })
    }

    /// Keeps the memory of pages alive in an I/O.
    pub(super) fn hold(&self) -> Rc<Arena> {
        self.arena.clone()
    }

    /// Bytes of a page.
    #[inline]
    pub(super) fn page_size(&self) -> u64 {
        1 << self.page_shift
    }

    /// Most bytes that one round of a write changes: its pages must find room beside what is dirty and what others
    /// are loading, however small the cache is.
    #[inline]
    pub(super) fn round_bytes(&self) -> u64 {
        LOAD_PAGES.min(u64::from(self.arena.slots() / 4).max(1)) << self.page_shift
    }

    /// Pages that `bytes` touches.
    #[inline]
    pub(super) fn pages(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start >> self.page_shift..bytes.end.div_ceil(1 << self.page_shift)
    }

    /// Memory of a slot.
    #[inline]
    pub(super) fn memory(&self, slot: Slot) -> Segment {
        self.arena.page(slot)
    }

    /// A page was used.
    #[inline]
    pub(super) fn touch(&self, slot: Slot) {
        self.slots.borrow().owners[slot.0 as usize].referenced.set(true);
    }

    /// Gives back what a round took in vain. Nobody hears of it: there is no more to be had than before.
    pub(super) fn return_slots(&self, slots: &[Slot]) {
        self.slots.borrow_mut().free.extend_from_slice(slots);
    }

    /// Copies `bytes` of a file, whose pages are all loaded, into `dst`.
    #[inline]
    pub(super) fn copy_out(&self, inode: &Inode, bytes: &Range<u64>, mut dst: bdev::Cursor<'_>) {
        let slots = self.slots.borrow();
        let mut at = bytes.start;
        inode.data.pages.borrow().each_slot(&self.pages(bytes), |slot| {
            let skip = (at & (self.page_size() - 1)) as usize;
            let len = (self.page_size() - skip as u64).min(bytes.end - at);
            dst.fill(self.arena.page(slot).slice(skip, len as usize));
            slots.owners[slot.0 as usize].referenced.set(true);
            at += len;
        });
    }
}

/// Slots.
impl Fs {
    /// A slot for a page of a file: free, or taken from a page that is clean and none of the file's own `kept` ones.
    /// `None` when there is none now. No file's page map may be borrowed.
    pub(super) fn take_slot(&self, inode: InodeId, page: u64, kept: &Range<u64>) -> Option<Slot> {
        let cache = &self.cache;
        let owner = || Owner { inode, page, reserved: Cell::default(), referenced: Cell::new(true) };
        let mut slots = cache.slots.borrow_mut();
        let slot = match slots.free.pop() {
            Some(slot) => slot,
            None if slots.owners.len() < cache.arena.slots() as usize => {
                let slot = Slot(slots.owners.len() as u32);
                slots.owners.push(owner());
                return Some(slot);
            }
            None => self.evict_one(&mut slots, |owner| owner.inode == inode && kept.contains(&owner.page))?,
        };
        slots.owners[slot.0 as usize] = owner();
        Some(slot)
    }

    fn evict_one(&self, slots: &mut Slots, is_kept: impl Fn(&Owner) -> bool) -> Option<Slot> {
        let count = slots.owners.len();
        let inodes = self.inodes.borrow();
        for _ in 0..2 * count {
            let at = slots.hand;
            slots.hand = (at + 1) % count;
            let owner = &slots.owners[at];
            if owner.referenced.replace(false) || is_kept(owner) {
                continue;
            }
            let Some(inode) = inodes.get(&owner.inode) else { continue };
            if inode.data.pages.borrow_mut().evict(owner.page).is_some() {
                return Some(Slot(at as u32));
            }
        }
        None
    }

    /// Gives a slot back whose page is in no file any more and has nothing reserved.
    pub(super) fn free_slot(&self, slot: Slot) {
        self.cache.slots.borrow_mut().free.push(slot);
        self.cache.relieved.notify_all();
    }

    /// Takes pages out of a file, whatever their state. Nobody may be reading or writing them.
    pub(super) fn drop_range(&self, inode: &Inode, pages: &Range<u64>) {
        if inode.data.pages.borrow().is_empty() {
            return;
        }
        let present = inode.data.pages.borrow().present(pages);
        for page in present {
            let state = inode.data.pages.borrow().get(page);
            let slot = inode.data.pages.borrow_mut().remove(page);
            if state.dirty || state.writing {
                self.cache.unwritten.set(self.cache.unwritten.get() - 1);
            }
            if let Some(slot) = slot {
                drop(self.cache.take_reserved(&self.cache.take_reservation(inode, slot)));
                self.free_slot(slot);
            }
        }
        self.settle_dirty(inode);
    }
}

/// Reservations of dirty pages.
impl Cache {
    /// Keeps more for a page.
    pub(super) fn reserve_for(&self, inode: &Inode, slot: Slot, from: &mut Reservation, demand: &Demand) {
        if *demand == Demand::NONE {
            return;
        }
        let part = from.split(demand);
        match &mut *self.reserved.borrow_mut() {
            Some(reserved) => reserved.merge(part),
            none => *none = Some(part),
        }
        let slots = self.slots.borrow();
        let reserved = &slots.owners[slot.0 as usize].reserved;
        reserved.set(reserved.get().with(demand));
        inode.data.pending_blocks.set(inode.data.pending_blocks.get() + demand.holes);
    }

    /// What is reserved for a page.
    pub(super) fn reserved_for(&self, slot: Slot) -> Demand {
        self.slots.borrow().owners[slot.0 as usize].reserved.get().into()
    }

    /// Takes what is reserved for a page.
    pub(super) fn take_reservation(&self, inode: &Inode, slot: Slot) -> Demand {
        let reserved: Demand = self.slots.borrow().owners[slot.0 as usize].reserved.take().into();
        inode.data.pending_blocks.set(inode.data.pending_blocks.get() - reserved.holes);
        reserved
    }

    /// Takes a part out of what is reserved.
    pub(super) fn take_reserved(&self, demand: &Demand) -> Option<Reservation> {
        if *demand == Demand::NONE {
            return None;
        }
        self.reserved.borrow_mut().as_mut().map(|reserved| reserved.split(demand))
    }
}

/// Dirty pages.
impl Fs {
    /// A page has changed: counts it, and sees to it that it is written some time.
    pub(super) fn mark_dirty(self: &Rc<Self>, inode: &Rc<Inode>, page: u64) {
        let cache = &self.cache;
        let (was_clean, writing) = {
            let mut pages = inode.data.pages.borrow_mut();
            (pages.set_dirty(page), pages.get(page).writing)
        };
        if !was_clean {
            return;
        }
        if !writing {
            cache.unwritten.set(cache.unwritten.get() + 1);
        }
        self.list_dirty(inode);
        if cache.is_busy() {
            self.start_flush();
        } else if !cache.timer_armed.get() {
            self.arm_flush_timer();
        }
    }

    /// A write of a page has ended.
    pub(super) fn page_written(&self, inode: &Inode, page: u64, mapped: bool) {
        let mut pages = inode.data.pages.borrow_mut();
        pages.end_writing(page, mapped);
        if !pages.get(page).dirty {
            self.cache.unwritten.set(self.cache.unwritten.get() - 1);
        }
    }

    /// Puts a file on the list of those that have to be written.
    pub(super) fn list_dirty(&self, inode: &Rc<Inode>) {
        if !inode.data.listed.replace(true) {
            self.cache.dirty.borrow_mut().insert(inode.id, inode.clone());
        }
    }

    /// Takes a file off the list when everything of it is written.
    pub(super) fn settle_dirty(&self, inode: &Inode) {
        let is_settled = !inode.ahead.get() && !inode.data.log.is_unsettled();
        if inode.data.listed.get() && is_settled && !inode.data.pages.borrow().is_unwritten(&(0..u64::MAX)) {
            self.unlist(inode);
        }
    }

    /// Takes a file off the list.
    pub(super) fn unlist(&self, inode: &Inode) {
        if inode.data.listed.replace(false) {
            self.cache.dirty.borrow_mut().remove(&inode.id);
        }
    }
}

impl Cache {
    /// Files that have to be written.
    pub(super) fn dirty_files(&self) -> Vec<Rc<Inode>> {
        self.dirty.borrow().values().cloned().collect()
    }

    /// Whether nothing is dirty.
    pub(super) fn is_clean(&self) -> bool {
        self.dirty.borrow().is_empty()
    }

    /// Whether any page is dirty or being written.
    pub(super) fn has_unwritten(&self) -> bool {
        self.unwritten.get() > 0
    }

    /// Enough is dirty that writing it should not wait for its time: a quarter.
    fn is_busy(&self) -> bool {
        self.unwritten.get() >= self.arena.slots() as usize / 4
    }

    /// So much is dirty that writers have to wait: half.
    pub(super) fn is_crowded(&self) -> bool {
        self.unwritten.get() >= self.arena.slots() as usize / 2
    }
}
