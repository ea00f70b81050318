//! The suite that every device and every wrapper passes.
//!
//! [`run`] panics at the first deviation from the contract in [`crate`], naming the case. It overwrites the
//! device, which must have at least 1 MiB.

use std::rc::Rc;

use reactor::Reactor;

use crate::{AlignedBuf, Bdev, BdevError, Io, IoBuffers, Segment, WriteFlags};

/// What the device does with what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeps {
    /// Reads give what was written.
    Data,
    /// Reads give zeros (`null:`).
    Nothing,
}

/// Runs every case on a device.
///
/// # Panics
/// When the device does not keep the contract.
pub fn run(device: &Rc<dyn Bdev>, reactor: &Rc<Reactor>, keeps: Keeps) {
    let limits = device.limits();
    assert!(limits.size >= 1 << 20, "the suite needs a device of 1 MiB");
    let bench = Bench { device, reactor, keeps, block: limits.block_size as usize, size: limits.size };
    bench.limits_are_sane();
    bench.first_and_last_block();
    bench.zero_length();
    bench.outside_the_device();
    bench.misaligned();
    bench.many_segments();
    bench.unaligned_segments();
    bench.write_zeroes();
    bench.discard();
    bench.flush_and_fua();
    bench.concurrent();
    bench.buffers_dropped_in_flight();
}

struct Bench<'a> {
    device: &'a Rc<dyn Bdev>,
    reactor: &'a Rc<Reactor>,
    keeps: Keeps,
    block: usize,
    size: u64,
}

/// Bytes that differ from block to block and from seed to seed, and are never zero.
fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| ((i / 512) as u8).wrapping_mul(31).wrapping_add(i as u8).wrapping_add(seed) | 1)
        .collect()
}

impl Bench<'_> {
    fn wait(&self, io: Io) -> Result<(), BdevError> {
        self.reactor.block_on(io)
    }

    fn buffer(&self, bytes: &[u8]) -> Rc<AlignedBuf> {
        let mut buf = AlignedBuf::zeroed(bytes.len(), self.block.max(4096));
        buf.copy_from_slice(bytes);
        Rc::new(buf)
    }

    fn write(&self, offset: u64, bytes: &[u8], flags: WriteFlags) {
        let buffers = IoBuffers::from_aligned(&self.buffer(bytes));
        assert_eq!(self.wait(self.device.write(offset, buffers, flags)), Ok(()), "write at {offset}");
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let buf = self.buffer(&vec![0xee; len]);
        let io = self.device.read(offset, IoBuffers::from_aligned(&buf));
        assert_eq!(self.wait(io), Ok(()), "read at {offset}");
        buf.to_vec()
    }

    fn expect(&self, offset: u64, bytes: &[u8], case: &str) {
        let read = self.read(offset, bytes.len());
        match self.keeps {
            Keeps::Data => assert!(read == bytes, "{case}: other bytes at {offset} than were written"),
            Keeps::Nothing => assert!(read.iter().all(|&byte| byte == 0), "{case}: not zeros at {offset}"),
        }
    }

    fn limits_are_sane(&self) {
        let limits = self.device.limits();
        assert!(limits.block_size.is_power_of_two() && (512..=65536).contains(&limits.block_size));
        assert!(limits.dma_align.is_power_of_two() && limits.dma_align <= limits.block_size.max(4096));
        assert_eq!(limits.size % u64::from(limits.block_size), 0);
        assert!(limits.max_segments >= 1 && limits.max_transfer >= self.block);
        assert_eq!(limits.max_transfer.min(1 << 62) % self.block.min(1 << 16), 0);
    }

    fn first_and_last_block(&self) {
        for offset in [0, self.size - self.block as u64] {
            let bytes = pattern(self.block, 3);
            self.write(offset, &bytes, WriteFlags::NONE);
            self.expect(offset, &bytes, "first and last block");
        }
    }

    fn zero_length(&self) {
        for offset in [0, self.size] {
            assert_eq!(self.wait(self.device.read(offset, IoBuffers::empty())), Ok(()));
            assert_eq!(self.wait(self.device.write(offset, IoBuffers::empty(), WriteFlags::FUA)), Ok(()));
            assert_eq!(self.wait(self.device.discard(offset..offset)), Ok(()));
            assert_eq!(self.wait(self.device.write_zeroes(offset..offset, WriteFlags::NONE)), Ok(()));
        }
    }

    fn outside_the_device(&self) {
        let block = self.block as u64;
        let last = pattern(self.block, 9);
        self.write(self.size - block, &last, WriteFlags::NONE);
        let two = IoBuffers::from_aligned(&self.buffer(&vec![0xaa; 2 * self.block]));
        // Straddling the end, behind it, and so far out that the sum overflows.
        for offset in [self.size - block, self.size, u64::MAX - block + 1] {
            let refused =
                |result| assert!(matches!(result, Err(BdevError::OutOfRange { .. })), "at {offset}");
            refused(self.wait(self.device.read(offset, two.clone())));
            refused(self.wait(self.device.write(offset, two.clone(), WriteFlags::NONE)));
            if let Some(end) = offset.checked_add(2 * block) {
                refused(self.wait(self.device.discard(offset..end)));
                refused(self.wait(self.device.write_zeroes(offset..end, WriteFlags::NONE)));
            }
        }
        self.expect(self.size - block, &last, "a refused write changes nothing");
        let backwards = std::ops::Range { start: 2 * block, end: block };
        assert!(self.wait(self.device.discard(backwards)).is_err());
    }

    fn misaligned(&self) {
        let one = IoBuffers::from_aligned(&self.buffer(&vec![0; self.block]));
        let refused = |result| assert!(matches!(result, Err(BdevError::Misaligned { .. })), "{result:?}");
        for offset in [1, self.block as u64 / 2] {
            refused(self.wait(self.device.read(offset, one.clone())));
            refused(self.wait(self.device.write(offset, one.clone(), WriteFlags::NONE)));
            refused(self.wait(self.device.discard(offset..self.block as u64 * 2)));
            refused(self.wait(self.device.write_zeroes(0..offset, WriteFlags::NONE)));
        }
        refused(self.wait(self.device.read(0, one.slice(0, self.block / 2))));
    }

    fn many_segments(&self) {
        let count = self.device.limits().max_segments.min(100);
        let bytes = pattern(count * self.block, 17);
        let buf = self.buffer(&bytes);
        let whole = IoBuffers::from_aligned(&buf);
        let part = |i: usize| whole.slice(i * self.block, self.block).segments()[0];
        // Back to front in memory, front to back on the device.
        let buffers = IoBuffers::new((0..count).rev().map(part), buf.clone());
        assert_eq!(self.wait(self.device.write(0, buffers, WriteFlags::NONE)), Ok(()));
        let reversed: Vec<u8> = bytes.chunks(self.block).rev().flatten().copied().collect();
        self.expect(0, &reversed, "many segments");
    }

    fn unaligned_segments(&self) {
        let align = self.device.limits().dma_align as usize;
        let buf = self.buffer(&pattern(2 * self.block, 5));
        let whole = IoBuffers::from_aligned(&buf);
        let piece = |start, len| -> Segment { whole.slice(start, len).segments()[0] };
        // An odd start and odd lengths that together make one block.
        let odd = IoBuffers::new([piece(1, 7), piece(9, self.block - 7)], buf.clone());
        let result = self.wait(self.device.write(0, odd.clone(), WriteFlags::NONE));
        if align > 1 {
            assert!(matches!(result, Err(BdevError::Misaligned { .. })), "{result:?}");
            return;
        }
        assert_eq!(result, Ok(()));
        let mut bytes = vec![0; self.block];
        odd.copy_to(0, &mut bytes);
        self.expect(0, &bytes, "unaligned segments");
    }

    /// Three blocks of pattern with something done to the middle one.
    fn around(&self, case: &str, middle: impl FnOnce(std::ops::Range<u64>) -> Io) -> Vec<u8> {
        let block = self.block;
        let bytes = pattern(3 * block, 11);
        self.write(0, &bytes, WriteFlags::NONE);
        assert_eq!(self.wait(middle(block as u64..2 * block as u64)), Ok(()), "{case}");
        self.expect(0, &bytes[..block], case);
        self.expect(2 * block as u64, &bytes[2 * block..], case);
        self.read(block as u64, block)
    }

    fn write_zeroes(&self) {
        for flags in [WriteFlags::NONE, WriteFlags::FUA] {
            let middle = self.around("write zeroes", |range| self.device.write_zeroes(range, flags));
            assert!(middle.iter().all(|&byte| byte == 0), "a zeroed range reads as zeros");
        }
        self.write(0, &pattern(1 << 20, 1), WriteFlags::NONE);
        assert_eq!(self.wait(self.device.write_zeroes(0..self.size, WriteFlags::NONE)), Ok(()));
        assert!(self.read(0, 1 << 20).iter().all(|&byte| byte == 0), "a zeroed device reads as zeros");
    }

    fn discard(&self) {
        // Content is undefined afterwards, so only the neighbours are looked at.
        self.around("discard", |range| self.device.discard(range));
        let bytes = pattern(self.block, 23);
        self.write(self.block as u64, &bytes, WriteFlags::NONE);
        self.expect(self.block as u64, &bytes, "write after discard");
    }

    fn flush_and_fua(&self) {
        let bytes = pattern(self.block, 29);
        self.write(0, &bytes, WriteFlags::NONE);
        assert_eq!(self.wait(self.device.flush()), Ok(()));
        self.write(self.block as u64, &bytes, WriteFlags::FUA);
        self.expect(0, &bytes, "flush");
        self.expect(self.block as u64, &bytes, "FUA");
    }

    fn concurrent(&self) {
        let blocks: Vec<_> =
            (0..64).map(|i| (i as u64 * self.block as u64, pattern(self.block, i))).collect();
        let writes = blocks.iter().map(|(offset, bytes)| {
            self.device.write(*offset, IoBuffers::from_aligned(&self.buffer(bytes)), WriteFlags::NONE)
        });
        let writes: Vec<Io> = writes.chain([self.device.flush()]).collect();
        let results = self.reactor.block_on(reactor::sync::join_all(writes));
        assert!(results.iter().all(Result::is_ok), "concurrent writes: {results:?}");
        for (offset, bytes) in &blocks {
            self.expect(*offset, bytes, "concurrent writes");
        }
    }

    /// Neither the future nor the caller's handle is needed for a write to arrive.
    fn buffers_dropped_in_flight(&self) {
        let bytes = pattern(8 * self.block, 37);
        let buf = self.buffer(&bytes);
        let held = Rc::downgrade(&buf);
        drop(self.device.write(0, IoBuffers::from_aligned(&buf), WriteFlags::NONE));
        drop(buf);
        for _ in 0..1000 {
            if held.strong_count() == 0 {
                break;
            }
            // A later operation gives the reactor something to wait for.
            assert_eq!(self.wait(self.device.flush()), Ok(()));
        }
        assert_eq!(held.strong_count(), 0, "the device lets go of buffers when it has finished");
        self.expect(0, &bytes, "dropped while under way");
    }
}
