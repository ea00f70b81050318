//! A device in anonymous memory: every operation completes in the call.
//!
//! Its memory is mapped, not allocated: pages that were never written take no room, and a discarded range
//! gives its pages back.

#![expect(unsafe_code, reason = "mapped memory")]

use std::cell::RefCell;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::rc::Rc;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::{Bdev, BdevError, Io, IoBuffers, Limits, WriteFlags};

/// Unit in which the kernel takes pages back.
const PAGE: usize = 4096;

/// `memory:SIZE`.
pub struct Memory {
    limits: Limits,
    bytes: RefCell<Mapping>,
}

impl Memory {
    /// A device of `size` zero bytes, a multiple of `block_size`.
    ///
    /// # Panics
    /// When the process has no address space for it.
    pub fn new(size: u64, block_size: u32) -> Rc<Self> {
        Self::try_new(size, block_size).expect("address space for the device")
    }

    /// A device of `size` zero bytes, a multiple of `block_size`.
    ///
    /// # Errors
    /// When the process has no address space for it.
    pub fn try_new(size: u64, block_size: u32) -> rustix::io::Result<Rc<Self>> {
        let limits = Limits {
            size,
            block_size,
            dma_align: 1,
            max_segments: usize::MAX,
            max_transfer: usize::MAX,
            volatile_cache: false,
            discard: true,
            write_zeroes: true,
            sparse: false,
        };
        Ok(Rc::new(Self { limits, bytes: RefCell::new(Mapping::zeroed(size as usize)?) }))
    }

    fn transfer(&self, offset: u64, buffers: &IoBuffers, copy: impl FnOnce(&mut [u8], usize)) -> Io {
        if let Err(error) = self.limits.check_transfer(offset, buffers) {
            return Io::ready(Err(error));
        }
        copy(&mut self.bytes.borrow_mut(), offset as usize);
        Io::ready(Ok(()))
    }

    fn clear(&self, range: &Range<u64>) -> Result<(), BdevError> {
        self.limits.check_range(range)?;
        self.bytes.borrow_mut().clear(range.start as usize..range.end as usize);
        Ok(())
    }
}

/// Private zeroed memory straight from the kernel. (`alloc_zeroed` would write all of it: beyond the
/// allocator's own alignment it does not rely on the kernel's zeros.)
struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn zeroed(len: usize) -> rustix::io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice overlaps nothing.
        let ptr = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len.max(1), prot, flags)? };
        let ptr = NonNull::new(ptr.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { ptr, len })
    }

    /// Zeroes a range and gives its whole pages back.
    fn clear(&mut self, range: Range<usize>) {
        let pages = range.start.next_multiple_of(PAGE)..range.end / PAGE * PAGE;
        if pages.start >= pages.end {
            self[range].fill(0);
            return;
        }
        self[range.start..pages.start].fill(0);
        self[pages.end..range.end].fill(0);
        let whole = &mut self[pages];
        // SAFETY: these whole pages of a private mapping are borrowed exclusively; afterwards they read as
        // zeros, which is as good a content for a byte slice as any.
        let given_back =
            unsafe { rustix::mm::madvise(whole.as_mut_ptr().cast(), whole.len(), Advice::LinuxDontNeed) };
        if given_back.is_err() {
            whole.fill(0);
        }
    }
}

impl Deref for Mapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has `len` readable bytes and belongs to `self`.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Mapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping has `len` writable bytes, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `zeroed` with this length; no borrow outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.ptr.as_ptr().cast(), self.len.max(1)) };
        debug_assert!(unmapped.is_ok());
    }
}

impl Bdev for Memory {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read(&self, offset: u64, buffers: IoBuffers) -> Io {
        self.transfer(offset, &buffers, |bytes, at| {
            buffers.copy_from(0, &bytes[at..at + buffers.len()]);
        })
    }

    fn write(&self, offset: u64, buffers: IoBuffers, _flags: WriteFlags) -> Io {
        self.transfer(offset, &buffers, |bytes, at| {
            buffers.copy_to(0, &mut bytes[at..at + buffers.len()]);
        })
    }

    fn flush(&self) -> Io {
        Io::ready(Ok(()))
    }

    fn discard(&self, range: Range<u64>) -> Io {
        Io::ready(self.clear(&range))
    }

    fn write_zeroes(&self, range: Range<u64>, _flags: WriteFlags) -> Io {
        Io::ready(self.clear(&range))
    }
}
