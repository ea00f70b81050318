//! A device that stores nothing: reads give zeros, writes vanish. For measuring what lies above.

use std::ops::Range;
use std::rc::Rc;

use crate::{Bdev, BdevError, Io, IoBuffers, Limits, WriteFlags};

/// `null:SIZE`.
pub struct Null {
    limits: Limits,
}

impl Null {
    /// A device of `size` bytes, a multiple of `block_size`.
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
            sparse: false,
        };
        Rc::new(Self { limits })
    }
}

impl Bdev for Null {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read(&self, offset: u64, buffers: IoBuffers) -> Io {
        let checked = self.limits.check_transfer(offset, &buffers);
        if checked.is_ok() {
            buffers.zero(0, buffers.len());
        }
        Io::ready(checked)
    }

    fn write(&self, offset: u64, buffers: IoBuffers, _flags: WriteFlags) -> Io {
        Io::ready(self.limits.check_transfer(offset, &buffers))
    }

    fn flush(&self) -> Io {
        Io::ready(Ok::<(), BdevError>(()))
    }

    fn discard(&self, range: Range<u64>) -> Io {
        Io::ready(self.limits.check_range(&range))
    }

    fn write_zeroes(&self, range: Range<u64>, _flags: WriteFlags) -> Io {
        Io::ready(self.limits.check_range(&range))
    }
}
