//! Block devices. Knows no file system.
//!
//! | module | what it provides |
//! | --- | --- |
//! | [`buffer`] | aligned buffers, borrowed guest segments, the lists of them that an I/O takes |
//! | [`io`] | the future of one I/O and its completion side |
//! | [`mod@open`] | a device by its name: file, block device, `memory:SIZE`, `null:SIZE` |
//! | [`memory`] | a device in anonymous memory (`memory:SIZE`) |
//! | [`uring`] | regular files and block devices by io_uring |
//! | [`null`] | a device that stores nothing (`null:SIZE`) |
//! | [`fault`] | a wrapper that lets operations of any device fail |
//! | [`sim`] | a simulated disk with a volatile cache, power cuts and faults |
//! | `conformance` | the suite that every device passes (feature `testing`) |
//!
//! # Contract of [`Bdev`]
//!
//! - Offsets and lengths are bytes. The caller keeps to [`Limits`]: multiples of `block_size`, inside
//!   `size`, segments aligned to `dma_align` and at most `max_segments` and `max_transfer` per call. A
//!   device checks this and fails with [`BdevError::Misaligned`] or [`BdevError::OutOfRange`] without
//!   touching anything; it never panics.
//! - A call starts the operation at once (or queues it for the next submission); the returned [`Io`]
//!   completes when it is done. Dropping the `Io` does not cancel it: the device keeps the buffers (their
//!   `hold`) until the operation has ended.
//! - Operations under way at the same time have no order between them. A reader of a range that is being
//!   written sees any mix of old and new `block_size` blocks.
//! - *Written is not durable.* A completed write is durable after a [`Bdev::flush`] that began later has
//!   completed, or at its own completion with [`WriteFlags::FUA`].
//! - `discard` makes a range's content undefined; `write_zeroes` makes it read as zeros.
//! - After [`BdevError::Io`] of a write or flush the content of the range is undefined and earlier
//!   unflushed writes may be lost: callers stop relying on the device.

pub mod buffer;
#[cfg(feature = "testing")]
pub mod conformance;
pub mod fault;
pub mod io;
pub mod memory;
pub mod null;
pub mod open;
pub mod sim;
pub mod uring;

use std::ops::Range;

pub use buffer::{AlignedBuf, Cursor, IoBuffers, Segment};
pub use io::{Completion, Io};
pub use open::{ImageSpec, OpenError, OpenOptions, open};

/// What a device can do and what it asks of its callers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the device; a multiple of `block_size`.
    pub size: u64,
    /// Smallest unit of reading and writing in bytes: a power of two, 512 to 65536. Also the unit that a
    /// power cut does not tear.
    pub block_size: u32,
    /// Alignment of segment addresses and segment lengths in bytes: a power of two.
    pub dma_align: u32,
    /// Segments per call.
    pub max_segments: usize,
    /// Bytes per call; a multiple of `block_size`.
    pub max_transfer: usize,
    /// Whether completed writes may be lost in a power cut before a flush.
    pub volatile_cache: bool,
    /// Whether `discard` gives storage back.
    pub discard: bool,
    /// Whether `write_zeroes` is cheaper than writing zeros.
    pub write_zeroes: bool,
    /// Whether storage is found when a block is first written, as for a file with holes: that write and the flush
    /// behind it take longer than later ones.
    pub sparse: bool,
}

impl Limits {
    /// Checks a range against the contract.
    ///
    /// # Errors
    /// [`BdevError::Misaligned`] or [`BdevError::OutOfRange`].
    pub fn check_range(&self, range: &Range<u64>) -> Result<(), BdevError> {
        let block = u64::from(self.block_size);
        if !range.start.is_multiple_of(block) || !range.end.is_multiple_of(block) {
            return Err(BdevError::Misaligned {
                offset: range.start,
                len: range.end.wrapping_sub(range.start),
            });
        }
        if range.start > range.end || range.end > self.size {
            return Err(BdevError::OutOfRange { offset: range.start, end: range.end, size: self.size });
        }
        Ok(())
    }

    /// Checks the buffers of a transfer at `offset` against the contract.
    ///
    /// # Errors
    /// As [`Limits::check_range`]; [`BdevError::Misaligned`] also for a segment that misses `dma_align`.
    pub fn check_transfer(&self, offset: u64, buffers: &IoBuffers) -> Result<(), BdevError> {
        let len = buffers.len() as u64;
        let end = offset.checked_add(len).ok_or(BdevError::OutOfRange {
            offset,
            end: u64::MAX,
            size: self.size,
        })?;
        self.check_range(&(offset..end))?;
        if !self.accepts(buffers) {
            return Err(BdevError::Misaligned { offset, len });
        }
        Ok(())
    }

    /// Whether the device takes these buffers as they are: alignment, number of segments and length.
    pub fn accepts(&self, buffers: &IoBuffers) -> bool {
        let mask = self.dma_align as usize - 1;
        buffers.segments().len() <= self.max_segments
            && buffers.len() <= self.max_transfer
            && buffers.segments().iter().all(|s| (s.addr() | s.len()) & mask == 0)
    }
}

/// Options of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteFlags {
    /// Complete only when the data is durable (force unit access).
    pub fua: bool,
}

impl WriteFlags {
    /// Durable after a later flush.
    pub const NONE: Self = Self { fua: false };
    /// Durable at completion.
    pub const FUA: Self = Self { fua: true };
}

/// Why a device operation failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BdevError {
    /// Offset, length or a segment is not a multiple of what [`Limits`] asks for.
    #[error("misaligned access at byte {offset}, {len} bytes")]
    Misaligned {
        /// First byte of the access.
        offset: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The range ends behind the device's end.
    #[error("access to bytes {offset}..{end} of a device of {size} bytes")]
    OutOfRange {
        /// First byte of the access.
        offset: u64,
        /// End of the access.
        end: u64,
        /// Size of the device in bytes.
        size: u64,
    },
    /// The device or the kernel reported an error.
    #[error("device error {errno} ({}) at byte {offset}", std::io::Error::from_raw_os_error(*errno))]
    Io {
        /// First byte of the access.
        offset: u64,
        /// Error number of the kernel.
        errno: i32,
    },
    /// The device transferred fewer bytes than it was asked for, and will not go on.
    #[error("short transfer at byte {offset}: {done} of {len} bytes")]
    Short {
        /// First byte of the access.
        offset: u64,
        /// Bytes transferred.
        done: usize,
        /// Bytes asked for.
        len: usize,
    },
    /// The device was taken away.
    #[error("device is gone")]
    Gone,
}

/// A block device; see the module for the contract.
pub trait Bdev {
    /// What the device can do. Constant as long as it is open.
    fn limits(&self) -> &Limits;

    /// Reads `buffers.len()` bytes at `offset` into `buffers`.
    fn read(&self, offset: u64, buffers: IoBuffers) -> Io;

    /// Writes `buffers` at `offset`.
    fn write(&self, offset: u64, buffers: IoBuffers, flags: WriteFlags) -> Io;

    /// Makes every write that completed before this call durable.
    fn flush(&self) -> Io;

    /// Tells the device that the content of `range` is not needed any more.
    fn discard(&self, range: Range<u64>) -> Io;

    /// Makes `range` read as zeros.
    fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Io;
}
