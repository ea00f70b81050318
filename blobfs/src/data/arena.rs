//! Memory of the data cache: one mapping of page-sized slots.
//!
//! The mapping is backed by a memfd, so that a guest can later be shown a part of it. Slots are touched only
//! when used: an empty cache takes no memory.

#![expect(unsafe_code, reason = "a shared mapping, and addresses inside it")]

use std::io;
use std::ptr::NonNull;

use bdev::Segment;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Number of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot(pub(super) u32);

/// The mapping.
pub(super) struct Arena {
    base: NonNull<u8>,
    slots: u32,
    page_size: usize,
}

impl Arena {
    /// Maps `slots` pages.
    pub(super) fn new(slots: u32, page_size: usize) -> io::Result<Self> {
        let len = slots as usize * page_size;
        let fd = memfd_create("vhostfs-cache", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len as u64)?;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::NORESERVE);
        // SAFETY: a new mapping at an address that the kernel picks; nothing else refers to it.
        let base = unsafe { mmap(std::ptr::null_mut(), len, prot, flags, &fd, 0)? };
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, slots, page_size })
    }

    /// Number of slots.
    pub(super) fn slots(&self) -> u32 {
        self.slots
    }

    /// The memory of a slot. Whoever puts it into an I/O keeps this arena alive as its hold.
    #[inline]
    pub(super) fn page(&self, slot: Slot) -> Segment {
        assert!(slot.0 < self.slots);
        let addr = self.base.as_ptr().wrapping_add(slot.0 as usize * self.page_size);
        // SAFETY: inside the mapping (checked), which lives as long as the arena; no Rust reference to it is
        // ever made, bytes are copied through segments.
        unsafe { Segment::new(addr, self.page_size) }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: this mapping was made by `new` with this length, and nobody uses it any more.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.slots as usize * self.page_size) };
    }
}
