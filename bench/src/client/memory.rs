//! The guest's memory: one memfd, mapped here and shared with the device.
//!
//! Both sides write it at any time, so it is never seen through a reference: bytes are copied in and out, and the
//! ring's indexes are atomics. Ranges are handed out once and never taken back; a guest lives for one benchmark.
#![expect(
    unsafe_code,
    reason = "the mapping is shared with another process, which no reference may assume away"
)]

use std::{
    fs::File,
    ptr::{self, NonNull},
    sync::atomic::AtomicU16,
};

use rustix::{
    fs::MemfdFlags,
    mm::{MapFlags, ProtFlags},
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::ClientError;

/// Guest physical address of the memory's first byte. Not 0, so that a zeroed address is a wrong one.
pub const GPA_BASE: u64 = 0x1_0000_0000;

/// Bytes of a page, the unit in which a Linux guest describes file data.
pub const PAGE_SIZE: usize = 4096;

/// Part of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Offset of the first byte in the memory.
    pub offset: usize,
    /// Bytes.
    pub len: usize,
}

impl Range {
    /// Guest physical address of the first byte.
    pub fn gpa(self) -> u64 {
        GPA_BASE + self.offset as u64
    }
}

/// Memory of a guest, shared with the device.
#[derive(Debug)]
pub struct Memory {
    file: File,
    base: NonNull<u8>,
    len: usize,
    allocated: usize,
}

impl Memory {
    /// Makes memory of `len` bytes, a multiple of [`PAGE_SIZE`], all zeros and all resident.
    ///
    /// Resident because a page fault in the first round would be counted as the server's time.
    pub fn new(len: usize) -> Result<Self, ClientError> {
        let file = File::from(rustix::fs::memfd_create("bench-guest", MemfdFlags::CLOEXEC)?);
        file.set_len(len as u64)?;
        let flags = MapFlags::SHARED | MapFlags::POPULATE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing that exists.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0)?
        };
        let base = NonNull::new(base.cast()).ok_or(ClientError::OutOfMemory)?;
        Ok(Self { file, base, len, allocated: 0 })
    }

    /// Takes `len` bytes that start at a multiple of `align`, a power of two.
    pub fn allocate(&mut self, len: usize, align: usize) -> Result<Range, ClientError> {
        let offset = self.allocated.next_multiple_of(align);
        let end = offset.checked_add(len).filter(|end| *end <= self.len).ok_or(ClientError::OutOfMemory)?;
        self.allocated = end;
        Ok(Range { offset, len })
    }

    /// Bytes of memory.
    pub fn len_bytes(&self) -> usize {
        self.len
    }

    /// Address of the first byte in this process: the "user address" of vhost-user.
    pub fn user_base(&self) -> u64 {
        self.base.addr().get() as u64
    }

    /// The memory's file, to be shared.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Copies bytes into the memory.
    ///
    /// # Panics
    /// If they do not fit: the caller's mistake.
    #[inline]
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        // SAFETY: `check` found the range inside the mapping, which no reference points to.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.as_ptr().add(offset), bytes.len()) }
    }

    /// Copies bytes out of the memory.
    ///
    /// # Panics
    /// If the range is not inside the memory: the caller's mistake.
    #[inline]
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.check(offset, bytes.len());
        // SAFETY: as in `write`; `bytes` is this process's own.
        unsafe { ptr::copy_nonoverlapping(self.base.as_ptr().add(offset), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// Copies a value into the memory.
    #[inline]
    pub fn store<T: IntoBytes + Immutable>(&self, offset: usize, value: &T) {
        self.write(offset, value.as_bytes());
    }

    /// Copies a value out of the memory.
    #[inline]
    pub fn load<T: FromBytes + IntoBytes>(&self, offset: usize) -> T {
        let mut value = T::new_zeroed();
        self.read(offset, value.as_mut_bytes());
        value
    }

    /// A 16-bit word that both sides may access at once.
    ///
    /// # Panics
    /// If it is not inside the memory or not at an even offset: the caller's mistake.
    #[inline]
    pub fn word(&self, offset: usize) -> &AtomicU16 {
        self.check(offset, 2);
        assert!(offset.is_multiple_of(2));
        // SAFETY: inside the mapping, which lives as long as `self`, and aligned, since the mapping is to pages;
        // all accesses to ring indexes on this side go through this function.
        unsafe { AtomicU16::from_ptr(self.base.as_ptr().add(offset).cast()) }
    }

    #[inline]
    fn check(&self, offset: usize, len: usize) {
        assert!(offset <= self.len && len <= self.len - offset, "outside the guest's memory");
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this is the mapping of `new`, and what borrowed it borrowed `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}
