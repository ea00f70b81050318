//! A wrapper that lets chosen operations of any device fail, as [`crate::sim`] does for its own disk.
//!
//! A failing operation never reaches the wrapped device: an error and a short transfer have moved nothing.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use crate::sim::faults::Faults;
use crate::sim::{Effect, Fault, OpKind};
use crate::{Bdev, BdevError, Io, IoBuffers, Limits, WriteFlags};

/// A device some of whose operations fail.
pub struct FaultDevice {
    inner: Rc<dyn Bdev>,
    faults: RefCell<Faults>,
}

/// What becomes of an operation.
enum Verdict {
    /// It goes to the wrapped device, at this offset.
    Forward(u64),
    Ended(Result<(), BdevError>),
}

impl FaultDevice {
    /// A wrapper that forwards everything until faults are injected.
    pub fn new(inner: Rc<dyn Bdev>) -> Rc<Self> {
        Rc::new(Self { inner, faults: RefCell::default() })
    }

    /// Adds a fault to those that later operations meet.
    pub fn inject(&self, fault: Fault) {
        self.faults.borrow_mut().inject(fault);
    }

    /// Makes reads of any block of `range` fail with EIO until the block is written.
    pub fn fail_reads(&self, range: Range<u64>) {
        self.faults.borrow_mut().fail_reads(range);
    }

    /// Takes all faults away.
    pub fn clear_faults(&self) {
        *self.faults.borrow_mut() = Faults::default();
    }

    fn judge(&self, kind: OpKind, range: &Range<u64>) -> Verdict {
        let mut faults = self.faults.borrow_mut();
        let offset = range.start;
        let len = range.end - offset;
        if kind == OpKind::Read
            && let Some(offset) = faults.first_bad(range)
        {
            return Verdict::Ended(Err(BdevError::Io { offset, errno: libc::EIO }));
        }
        let verdict = match faults.draw(kind) {
            None => Verdict::Forward(offset),
            Some(Effect::Error { errno }) => Verdict::Ended(Err(BdevError::Io { offset, errno })),
            Some(Effect::Short) => {
                Verdict::Ended(Err(BdevError::Short { offset, done: 0, len: len as usize }))
            }
            Some(Effect::Timeout { .. }) => {
                Verdict::Ended(Err(BdevError::Io { offset, errno: libc::ETIMEDOUT }))
            }
            // The wrapped device decides what is durable.
            Some(Effect::Delayed { .. }) if kind != OpKind::Flush => Verdict::Forward(offset),
            Some(Effect::Lost | Effect::Delayed { .. }) => Verdict::Ended(Ok(())),
            Some(Effect::Misdirected) => Verdict::Forward(self.elsewhere(offset, len)),
        };
        if let (Verdict::Forward(to), OpKind::Write | OpKind::WriteZeroes) = (&verdict, kind) {
            faults.heal(&(*to..*to + len));
        }
        verdict
    }

    /// The same distance from the device's other end.
    fn elsewhere(&self, offset: u64, len: u64) -> u64 {
        self.inner.limits().size - len - offset
    }

    fn checked(&self, range: &Range<u64>, run: impl FnOnce() -> Io) -> Io {
        match self.inner.limits().check_range(range) {
            Ok(()) => run(),
            Err(error) => Io::ready(Err(error)),
        }
    }
}

impl Bdev for FaultDevice {
    fn limits(&self) -> &Limits {
        self.inner.limits()
    }

    fn read(&self, offset: u64, buffers: IoBuffers) -> Io {
        if let Err(error) = self.limits().check_transfer(offset, &buffers) {
            return Io::ready(Err(error));
        }
        match self.judge(OpKind::Read, &(offset..offset + buffers.len() as u64)) {
            Verdict::Forward(offset) => self.inner.read(offset, buffers),
            Verdict::Ended(result) => Io::ready(result),
        }
    }

    fn write(&self, offset: u64, buffers: IoBuffers, flags: WriteFlags) -> Io {
        if let Err(error) = self.limits().check_transfer(offset, &buffers) {
            return Io::ready(Err(error));
        }
        match self.judge(OpKind::Write, &(offset..offset + buffers.len() as u64)) {
            Verdict::Forward(offset) => self.inner.write(offset, buffers, flags),
            Verdict::Ended(result) => Io::ready(result),
        }
    }

    fn flush(&self) -> Io {
        match self.judge(OpKind::Flush, &(0..0)) {
            Verdict::Forward(_) => self.inner.flush(),
            Verdict::Ended(result) => Io::ready(result),
        }
    }

    fn discard(&self, range: Range<u64>) -> Io {
        self.checked(&range, || match self.judge(OpKind::Discard, &range) {
            Verdict::Forward(start) => self.inner.discard(start..start + (range.end - range.start)),
            Verdict::Ended(result) => Io::ready(result),
        })
    }

    fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Io {
        self.checked(&range, || match self.judge(OpKind::WriteZeroes, &range) {
            Verdict::Forward(start) => {
                self.inner.write_zeroes(start..start + (range.end - range.start), flags)
            }
            Verdict::Ended(result) => Io::ready(result),
        })
    }
}
