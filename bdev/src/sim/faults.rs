//! Faults that operations of a device meet: which operation, and what happens to it.

use std::ops::Range;
use std::time::Duration;

/// Kind of a device operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpKind {
    /// [`crate::Bdev::read`].
    Read,
    /// [`crate::Bdev::write`].
    Write,
    /// [`crate::Bdev::flush`].
    Flush,
    /// [`crate::Bdev::discard`].
    Discard,
    /// [`crate::Bdev::write_zeroes`].
    WriteZeroes,
}

/// What happens to an operation that meets a fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// It fails with an error number of the kernel (EIO, ETIMEDOUT, ENOSPC ...). How much of a write
    /// arrived is open; a failed flush may lose what it was to make durable.
    Error {
        /// The error number.
        errno: i32,
    },
    /// It transfers half of its blocks and says so. A flush makes nothing durable and fails.
    Short,
    /// It is acknowledged without having happened. A read leaves the buffers as they are.
    Lost,
    /// It is acknowledged and went to another place. A flush makes nothing durable.
    Misdirected,
    /// A write is acknowledged and shown to readers, and stays in the cache whatever flush or FUA asks for, until so
    /// many flushes have ended. Of a flush: it makes nothing durable. A read is as ever.
    Delayed {
        /// Flushes that do not cover it.
        flushes: u32,
    },
    /// It hangs for so long and fails with ETIMEDOUT; what it did is as open as after an error. A disk without a
    /// clock ([`super::SimDisk::set_clock`]) fails it at once.
    Timeout {
        /// How long it hangs.
        after: Duration,
    },
}

/// A fault that some operations of a kind meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Kind of operations; `None` for every kind.
    pub kind: Option<OpKind>,
    /// Operations of the kind that pass before, counted from the injection.
    pub skip: u64,
    /// Operations that meet the fault after those.
    pub count: u64,
    /// What happens to them.
    pub effect: Effect,
}

impl Fault {
    /// The fault of one operation: the `nth` of its kind from now on, counted from zero.
    pub fn nth(kind: OpKind, nth: u64, effect: Effect) -> Self {
        Self { kind: Some(kind), skip: nth, count: 1, effect }
    }

    /// The fault of every operation of a kind from now on.
    pub fn every(kind: OpKind, effect: Effect) -> Self {
        Self { kind: Some(kind), skip: 0, count: u64::MAX, effect }
    }

    /// A device that fails every operation from its `nth` on, counted from zero.
    pub fn dead_from(nth: u64) -> Self {
        Self { kind: None, skip: nth, count: u64::MAX, effect: Effect::Error { errno: libc::EIO } }
    }
}

/// The faults of one device.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    injected: Vec<Fault>,
    /// Ranges that cannot be read; may overlap.
    bad: Vec<Range<u64>>,
}

impl Faults {
    pub(crate) fn inject(&mut self, fault: Fault) {
        self.injected.push(fault);
    }

    pub(crate) fn fail_reads(&mut self, range: Range<u64>) {
        self.bad.push(range);
    }

    /// What happens to the next operation of this kind.
    pub(crate) fn draw(&mut self, kind: OpKind) -> Option<Effect> {
        let mut effect = None;
        for fault in self.injected.iter_mut().filter(|fault| fault.kind.is_none_or(|k| k == kind)) {
            if fault.skip > 0 {
                fault.skip -= 1;
            } else if fault.count > 0 {
                fault.count -= 1;
                effect = effect.or(Some(fault.effect));
            }
        }
        self.injected.retain(|fault| fault.count > 0);
        effect
    }

    /// First unreadable byte of a range.
    pub(crate) fn first_bad(&self, range: &Range<u64>) -> Option<u64> {
        let overlaps = self.bad.iter().filter(|bad| bad.start < range.end && range.start < bad.end);
        overlaps.map(|bad| bad.start.max(range.start)).min()
    }

    /// A written range can be read again.
    pub(crate) fn heal(&mut self, range: &Range<u64>) {
        if self.bad.is_empty() {
            return;
        }
        let parts =
            |bad: Range<u64>| [bad.start..bad.end.min(range.start), bad.start.max(range.end)..bad.end];
        self.bad = self.bad.drain(..).flat_map(parts).filter(|part| part.start < part.end).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_meets_exactly_the_operations_it_names() {
        let mut faults = Faults::default();
        faults.inject(Fault::nth(OpKind::Write, 2, Effect::Lost));
        let met: Vec<_> = (0..5).map(|_| faults.draw(OpKind::Write)).collect();
        assert_eq!(met, [None, None, Some(Effect::Lost), None, None]);
        assert_eq!(faults.draw(OpKind::Read), None);
    }

    #[test]
    fn a_write_into_the_middle_heals_the_middle() {
        let mut faults = Faults::default();
        faults.fail_reads(0..4096);
        faults.heal(&(1024..2048));
        assert_eq!(faults.first_bad(&(1024..2048)), None);
        assert_eq!(faults.first_bad(&(512..4096)), Some(512));
        assert_eq!(faults.first_bad(&(1024..4096)), Some(2048));
    }
}
