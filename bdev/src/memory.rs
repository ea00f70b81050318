//! A device in anonymous memory: every operation completes in the call.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use crate::{AlignedBuf, Bdev, BdevError, Io, IoBuffers, Limits, WriteFlags};

/// `memory:SIZE`.
pub struct Memory {
    limits: Limits,
    bytes: RefCell<AlignedBuf>,
}

impl Memory {
    /// A device of `size` zero bytes, a multiple of `block_size`.
    pub fn new(size: u64, block_size: u32) -> Rc<Self> {
        let limits = Limits {
            size,
            block_size,
            dma_align: 1,
            max_segments: usize::MAX,
            max_transfer: usize::MAX,
            volatile_cache: false,
            discard: true,
            write_zeroes: true,
        };
        Rc::new(Self { limits, bytes: RefCell::new(AlignedBuf::zeroed(size as usize, 4096)) })
    }

    fn transfer(&self, offset: u64, buffers: &IoBuffers, copy: impl FnOnce(&mut AlignedBuf, usize)) -> Io {
        if let Err(error) = self.limits.check_transfer(offset, buffers) {
            return Io::ready(Err(error));
        }
        copy(&mut self.bytes.borrow_mut(), offset as usize);
        Io::ready(Ok(()))
    }

    fn clear(&self, range: &Range<u64>) -> Result<(), BdevError> {
        self.limits.check_range(range)?;
        self.bytes.borrow_mut()[range.start as usize..range.end as usize].fill(0);
        Ok(())
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
