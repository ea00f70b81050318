//! Memory of a guest, as its frontend shares it: regions, address translation, checked views.
//!
//! A [`Region`] is one mapping of a file descriptor that a frontend sent. A [`GuestMemory`] is an immutable
//! table of regions; changing the table makes a new one, so that what is in flight keeps the one it was
//! translated with. Guest physical addresses (`gpa`) and the frontend's own addresses (`uva`) become
//! [`Segment`]s or [`RingArea`]s here and nowhere else.
//!
//! Invariants:
//! - a region stays mapped as long as anything that was translated in it is held: segments travel with an
//!   `Rc` of their table, ring areas with one of their region;
//! - every access through a [`RingArea`] or [`TableView`] is bounds-checked, reads memory once, and hands
//!   out a copy: the guest may change the memory at any time;
//! - a frontend that shrinks its file does not end the process: the first access behind the new end raises
//!   SIGBUS, whose handler puts zero pages in place of the region and marks it broken ([`Region::is_broken`]).
//!   The owning session ends; nobody else notices.

#![expect(unsafe_code, reason = "mapped guest memory, volatile accesses to it, and the SIGBUS handler")]

mod fault;

use std::cell::Cell;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

use bdev::Segment;
use rustix::fs::fstat;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::descriptor::{Descriptor, DescriptorError};

pub use fault::{fault_count, install_fault_handler};

/// What a frontend says about one region (vhost-user, "Memory region description").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionDescription {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Address of the first byte in the frontend.
    pub uva: u64,
    /// Length in bytes.
    pub len: u64,
    /// Offset of the first byte in the file.
    pub mmap_offset: u64,
}

impl RegionDescription {
    /// Whether no end of the region overflows and there is at least one byte.
    fn is_sane(&self) -> bool {
        let fits = |start: u64| start.checked_add(self.len).is_some();
        let offset_fits = self.mmap_offset.checked_add(self.len).is_some_and(|end| end <= i64::MAX as u64);
        self.len > 0 && fits(self.gpa) && fits(self.uva) && offset_fits
    }

    fn overlaps(&self, other: &Self) -> bool {
        let overlap = |a: u64, b: u64| a < b + other.len && b < a + self.len;
        overlap(self.gpa, other.gpa) || overlap(self.uva, other.uva)
    }
}

/// Why a region or a table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Empty, or an end that overflows.
    #[error("memory region {0:x?} is empty or overflows")]
    Malformed(RegionDescription),
    /// Two regions share addresses.
    #[error("memory region {0:x?} overlaps another")]
    Overlap(RegionDescription),
    /// No region has this description.
    #[error("no memory region {0:x?}")]
    Unknown(RegionDescription),
    /// The table is full.
    #[error("more than {max} memory regions")]
    TooMany {
        /// Regions that a table may have.
        max: usize,
    },
    /// An access to the file could block the poller.
    #[error(transparent)]
    File(#[from] DescriptorError),
    /// The kernel refused to map it.
    #[error("memory region cannot be mapped")]
    Map(#[from] rustix::io::Errno),
}

/// One mapped region.
#[derive(Debug)]
pub struct Region {
    description: RegionDescription,
    mapping: *mut u8,
    mapping_len: usize,
    /// Of the region's first byte.
    host: *mut u8,
    slot: fault::Slot,
}

impl Region {
    /// Maps `file` as described. A file whose pages are produced by somebody who may never answer is refused: an
    /// access could block the poller for ever.
    ///
    /// # Errors
    /// [`MemoryError`] when the description is malformed or the file cannot be mapped.
    pub fn map(description: RegionDescription, file: &mut Descriptor) -> Result<Rc<Self>, MemoryError> {
        if !description.is_sane() {
            return Err(MemoryError::Malformed(description));
        }
        file.check_memory()?;
        // hugetlbfs reports its page size here, and wants offsets and lengths in multiples of it.
        let page = (fstat(&*file)?.st_blksize as u64).max(4096).next_power_of_two();
        let offset = description.mmap_offset & !(page - 1);
        let skip = (description.mmap_offset - offset) as usize;
        let mapping_len = (skip + description.len as usize)
            .checked_next_multiple_of(page as usize)
            .ok_or(MemoryError::Malformed(description))?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
        let mapping = unsafe {
            mmap(
                std::ptr::null_mut(),
                mapping_len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file.as_fd(),
                offset,
            )?
        }
        .cast::<u8>();
        let Some(slot) = fault::Slot::register(mapping.addr(), mapping_len) else {
            // SAFETY: mapped above, not handed out.
            unsafe { munmap(mapping.cast(), mapping_len) }?;
            return Err(MemoryError::TooMany { max: fault::SLOTS });
        };
        Ok(Rc::new(Self { description, mapping, mapping_len, host: mapping.wrapping_add(skip), slot }))
    }

    /// Whether the frontend shrank the file below the region.
    pub fn is_broken(&self) -> bool {
        self.slot.is_broken()
    }

    /// What the frontend said about it.
    pub fn description(&self) -> &RegionDescription {
        &self.description
    }

    /// Offset of `address` from `start` with the bytes left from there, when it lies in the region.
    fn find(&self, start: u64, address: u64) -> Option<(usize, usize)> {
        let offset = address.checked_sub(start)?;
        (offset < self.description.len).then(|| (offset as usize, (self.description.len - offset) as usize))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.slot.release();
        // SAFETY: mapped by `map` with this length; nobody holds an `Rc` of the region any more, so no
        // segment or area in it is left (module invariant).
        if let Err(error) = unsafe { munmap(self.mapping.cast(), self.mapping_len) } {
            tracing::error!(%error, "guest memory could not be unmapped");
        }
    }
}

/// An address range that no region covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at {address:#x} are not in the memory table")]
pub struct OutsideMemory {
    /// First address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
}

/// An immutable table of regions.
#[derive(Debug, Default)]
pub struct GuestMemory {
    regions: Vec<Rc<Region>>,
    /// Index of the region that the last translation hit: requests of a guest mostly hit the same one.
    last: Cell<usize>,
}

impl GuestMemory {
    /// Regions that one table may have: QEMU has a handful plus one per hotplugged DIMM.
    pub const REGIONS_MAX: usize = 64;

    /// A table of these regions.
    ///
    /// # Errors
    /// [`MemoryError::TooMany`] or [`MemoryError::Overlap`].
    pub fn new(regions: Vec<Rc<Region>>) -> Result<Rc<Self>, MemoryError> {
        if regions.len() > Self::REGIONS_MAX {
            return Err(MemoryError::TooMany { max: Self::REGIONS_MAX });
        }
        for (index, region) in regions.iter().enumerate() {
            if regions[..index].iter().any(|other| region.description.overlaps(&other.description)) {
                return Err(MemoryError::Overlap(region.description));
            }
        }
        Ok(Rc::new(Self { regions, last: Cell::new(0) }))
    }

    /// This table with one region more.
    ///
    /// # Errors
    /// As [`GuestMemory::new`].
    pub fn with(&self, region: Rc<Region>) -> Result<Rc<Self>, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(region);
        Self::new(regions)
    }

    /// This table without the region at these addresses, and that region.
    ///
    /// # Errors
    /// [`MemoryError::Unknown`].
    pub fn without(&self, description: &RegionDescription) -> Result<(Rc<Self>, Rc<Region>), MemoryError> {
        let same = |region: &Rc<Region>| {
            let known = &region.description;
            (known.gpa, known.uva, known.len) == (description.gpa, description.uva, description.len)
        };
        let index = self.regions.iter().position(same).ok_or(MemoryError::Unknown(*description))?;
        let mut regions = self.regions.clone();
        let removed = regions.remove(index);
        Ok((Self::new(regions)?, removed))
    }

    /// The regions.
    pub fn regions(&self) -> &[Rc<Region>] {
        &self.regions
    }

    /// Whether the frontend shrank the file below any region.
    pub fn is_broken(&self) -> bool {
        self.regions.iter().any(|region| region.is_broken())
    }

    /// The region that `gpa` lies in, with the offset there and the bytes left from there.
    #[inline]
    fn find_gpa(&self, gpa: u64) -> Option<(&Rc<Region>, usize, usize)> {
        let hit = |region: &Region| region.find(region.description.gpa, gpa);
        if let Some(region) = self.regions.get(self.last.get())
            && let Some((offset, left)) = hit(region)
        {
            return Some((region, offset, left));
        }
        self.regions.iter().enumerate().find_map(|(index, region)| {
            let (offset, left) = hit(region)?;
            self.last.set(index);
            Some((region, offset, left))
        })
    }

    /// Appends the memory of `len` bytes at `gpa` to `out`, in several pieces where regions adjoin.
    ///
    /// The segments are valid as long as this table is held; whoever puts them into an
    /// [`bdev::IoBuffers`] gives a clone of the table's `Rc` as its hold.
    ///
    /// # Errors
    /// [`OutsideMemory`]; `out` is then as it was.
    #[inline]
    pub fn translate(&self, gpa: u64, len: u64, out: &mut Vec<Segment>) -> Result<(), OutsideMemory> {
        let before = out.len();
        let (mut at, mut left) = (gpa, len as usize);
        while left > 0 {
            let Some((region, offset, available)) = self.find_gpa(at) else {
                out.truncate(before);
                return Err(OutsideMemory { address: gpa, len });
            };
            let part = left.min(available);
            // SAFETY: `find_gpa` proved `part` bytes from `offset` to lie inside the mapping, which lives as
            // long as the table (see above). No Rust reference to guest memory is ever made.
            out.push(unsafe { Segment::new(region.host.wrapping_add(offset), part) });
            left -= part;
            // Cannot overflow: a region's end does not, and `part` stays inside it.
            at += part as u64;
        }
        Ok(())
    }

    /// A view of a descriptor table in one piece.
    ///
    /// # Errors
    /// [`OutsideMemory`].
    #[inline]
    pub fn table(&self, gpa: u64, len: u64) -> Result<TableView<'_>, OutsideMemory> {
        match self.find_gpa(gpa) {
            Some((region, offset, left)) if left as u64 >= len => Ok(TableView {
                start: region.host.wrapping_add(offset),
                len: len as usize,
                memory: PhantomData,
            }),
            _ => Err(OutsideMemory { address: gpa, len }),
        }
    }

    /// The ring memory of `len` bytes at the frontend's address `uva`, aligned to `align` in this process.
    ///
    /// # Errors
    /// [`OutsideMemory`], also for a misaligned address.
    pub fn ring_area(&self, uva: u64, len: usize, align: usize) -> Result<RingArea, OutsideMemory> {
        let outside = OutsideMemory { address: uva, len: len as u64 };
        let found = self.regions.iter().find_map(|region| {
            let (offset, left) = region.find(region.description.uva, uva)?;
            Some((region, region.host.wrapping_add(offset), left))
        });
        match found {
            Some((region, start, left)) if left >= len && start.addr().is_multiple_of(align) => {
                Ok(RingArea { start, len, region: region.clone() })
            }
            _ => Err(outside),
        }
    }
}

/// A descriptor table in guest memory, borrowed from its [`GuestMemory`].
#[derive(Debug, Clone, Copy)]
pub struct TableView<'m> {
    start: *mut u8,
    len: usize,
    memory: PhantomData<&'m GuestMemory>,
}

impl TableView<'_> {
    /// A copy of the 16 bytes of entry `index`; `None` behind the end.
    #[inline]
    pub fn entry(&self, index: usize) -> Option<[u8; 16]> {
        copy_entry(self.start, self.len, index)
    }
}

#[inline]
fn copy_entry(start: *mut u8, len: usize, index: usize) -> Option<[u8; 16]> {
    let offset = index.checked_mul(16)?;
    if offset.checked_add(16)? > len {
        return None;
    }
    let mut copy = [0; 16];
    // SAFETY: the callers' views cover `len` mapped bytes at `start`, and the 16 bytes were checked to lie
    // inside. The guest may write at the same time; the copy is then any mix of bytes, and it is this copy
    // that gets checked and used.
    unsafe { std::ptr::copy_nonoverlapping(start.add(offset), copy.as_mut_ptr(), 16) };
    Some(copy)
}

/// One of the three areas of a virtqueue. Keeps its region mapped.
///
/// # Panics
/// The accessors assert that they stay inside the area: offsets come from a ring's own arithmetic, never from
/// the guest. (The one index that does, of a descriptor, gives `None`.)
#[derive(Debug)]
pub struct RingArea {
    start: *mut u8,
    len: usize,
    region: Rc<Region>,
}

impl RingArea {
    /// The region it lies in.
    pub fn region(&self) -> &Rc<Region> {
        &self.region
    }

    /// A copy of the 16 bytes of entry `index`; `None` behind the end.
    #[inline]
    pub fn entry(&self, index: usize) -> Option<[u8; 16]> {
        copy_entry(self.start, self.len, index)
    }

    #[inline]
    fn word(&self, offset: usize) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2) && offset + 2 <= self.len, "ring access outside its area");
        // SAFETY: inside the mapped area and aligned (the area's start is aligned to at least 2, checked by
        // `GuestMemory::ring_area`); the guest accesses it with atomic or volatile accesses of its own.
        unsafe { AtomicU16::from_ptr(self.start.add(offset).cast()) }
    }

    /// Reads the little-endian word at byte `offset`; later reads of guest memory stay behind it.
    #[inline]
    pub fn load_acquire(&self, offset: usize) -> u16 {
        u16::from_le(self.word(offset).load(Ordering::Acquire))
    }

    /// Reads the little-endian word at byte `offset`.
    #[inline]
    pub fn load(&self, offset: usize) -> u16 {
        u16::from_le(self.word(offset).load(Ordering::Relaxed))
    }

    /// Writes the little-endian word at byte `offset`.
    #[inline]
    pub fn store(&self, offset: usize, value: u16) {
        self.word(offset).store(value.to_le(), Ordering::Relaxed);
    }

    /// Writes the little-endian word at byte `offset`, after all earlier writes to guest memory.
    #[inline]
    pub fn store_release(&self, offset: usize, value: u16) {
        self.word(offset).store(value.to_le(), Ordering::Release);
    }

    /// Writes a pair of little-endian 32-bit words at byte `offset`, a multiple of 4.
    #[inline]
    pub fn store_pair(&self, offset: usize, first: u32, second: u32) {
        assert!(offset.is_multiple_of(4) && offset + 8 <= self.len, "ring access outside its area");
        // SAFETY: inside the mapped area and aligned to 4: the used ring, the only area with pairs, starts at
        // a multiple of 4 (its caller asks `ring_area` for that).
        unsafe {
            let at = self.start.add(offset).cast::<u32>();
            at.write_volatile(first.to_le());
            at.add(1).write_volatile(second.to_le());
        }
    }
}

#[cfg(test)]
mod tests;
