//! The split virtqueue, device side (virtio 1.3, 2.7).
//!
//! Invariants:
//! - `next_available - used entries pushed` never exceeds the queue size: a chain is popped once and pushed
//!   at most once;
//! - used entries are written before the index that shows them (release store), and chains are read after
//!   the index that shows them (acquire load);
//! - between the last store that the driver must see and the last load that decides about a notification
//!   stands a full barrier, on both sides of the ring, so that one of the two sees the other.

use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{VRING_AVAIL_F_NO_INTERRUPT, VRING_USED_F_NO_NOTIFY};

use super::chain::{self, Chain};
use super::{RingAddresses, RingError, RingFeatures};
use crate::guest_mem::{GuestMemory, OutsideMemory, RingArea};

/// Offset of `flags` in both the available and the used ring.
const FLAGS: usize = 0;
/// Offset of `idx` in both.
const INDEX: usize = 2;
/// Offset of the first entry in both.
const ENTRIES: usize = 4;

#[derive(Debug)]
struct Areas {
    memory: Rc<GuestMemory>,
    descriptors: RingArea,
    available: RingArea,
    used: RingArea,
}

impl Areas {
    fn locate(memory: &Rc<GuestMemory>, at: &RingAddresses, size: u16) -> Result<Self, OutsideMemory> {
        let size = usize::from(size);
        Ok(Self {
            memory: memory.clone(),
            descriptors: memory.ring_area(at.descriptors, size * 16, 16)?,
            // Both rings end in the other side's event index, whether negotiated or not (2.7.6, 2.7.8).
            available: memory.ring_area(at.available, ENTRIES + size * 2 + 2, 2)?,
            used: memory.ring_area(at.used, ENTRIES + size * 8 + 2, 4)?,
        })
    }
}

/// Device side of one split virtqueue. Indexes count without end, modulo 2^16.
#[derive(Debug)]
pub struct SplitRing {
    areas: Areas,
    size: u16,
    features: RingFeatures,
    next_available: u16,
    /// The driver's index when it was last read.
    seen_available: u16,
    next_used: u16,
    published_used: u16,
    /// `published_used` at the last decision about a notification; `None` after attaching.
    signalled_used: Option<u16>,
}

impl SplitRing {
    /// See [`super::Ring::attach`]. `size` is a power of two.
    pub(super) fn attach(
        memory: &Rc<GuestMemory>,
        addresses: &RingAddresses,
        size: u16,
        features: RingFeatures,
        next_available: u16,
    ) -> Result<Self, OutsideMemory> {
        debug_assert!(size.is_power_of_two());
        let areas = Areas::locate(memory, addresses, size)?;
        // The frontend hands over only the available side; the used side is what the driver has seen.
        let next_used = areas.used.load_acquire(INDEX);
        let mut ring = Self {
            areas,
            size,
            features,
            next_available,
            seen_available: next_available,
            next_used,
            published_used: next_used,
            signalled_used: None,
        };
        ring.disable_kicks();
        Ok(ring)
    }

    pub(super) fn relocate(
        &mut self,
        memory: &Rc<GuestMemory>,
        addresses: &RingAddresses,
    ) -> Result<(), OutsideMemory> {
        self.areas = Areas::locate(memory, addresses, self.size)?;
        Ok(())
    }

    #[inline]
    pub(super) fn memory(&self) -> &Rc<GuestMemory> {
        &self.areas.memory
    }

    pub(super) fn next_available(&self) -> u16 {
        self.next_available
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & (self.size - 1))
    }

    #[inline]
    pub(super) fn has_available(&self) -> bool {
        self.next_available != self.seen_available || self.areas.available.load(INDEX) != self.next_available
    }

    #[inline]
    pub(super) fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if self.next_available == self.seen_available && !self.look_for_available()? {
            return Ok(false);
        }
        let head = self.areas.available.load(ENTRIES + self.slot(self.next_available) * 2);
        let descriptors = &self.areas.descriptors;
        let memory = &self.areas.memory;
        chain::parse(chain, head, self.size, self.features.indirect, memory, |index| {
            descriptors.entry(index)
        })?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    /// Reads the driver's index. The chains it shows are all checked against the queue size here.
    #[inline]
    fn look_for_available(&mut self) -> Result<bool, RingError> {
        let available = self.areas.available.load_acquire(INDEX);
        if available.wrapping_sub(self.next_available) > self.size {
            return Err(RingError::AvailableIndex { available, next: self.next_available });
        }
        self.seen_available = available;
        Ok(available != self.next_available)
    }

    #[inline]
    pub(super) fn push_used(&mut self, head: u16, written: u32) {
        let offset = ENTRIES + self.slot(self.next_used) * 8;
        self.areas.used.store_pair(offset, u32::from(head), written);
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        if self.next_used == self.published_used {
            return false;
        }
        self.areas.used.store_release(INDEX, self.next_used);
        self.published_used = self.next_used;
        fence(Ordering::SeqCst);
        let before = self.signalled_used.replace(self.next_used);
        if !self.features.event_index {
            return self.areas.available.load(FLAGS) & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0;
        }
        let event = self.areas.available.load(ENTRIES + usize::from(self.size) * 2);
        before.is_none_or(|before| passes(event, before, self.next_used))
    }

    pub(super) fn enable_kicks(&mut self) -> bool {
        if self.features.event_index {
            self.areas.used.store(ENTRIES + usize::from(self.size) * 8, self.next_available);
        } else {
            self.areas.used.store(FLAGS, 0);
        }
        fence(Ordering::SeqCst);
        self.has_available()
    }

    pub(super) fn disable_kicks(&mut self) {
        // With an event index there is nothing to do: it stays behind what the driver adds from now on.
        if !self.features.event_index {
            self.areas.used.store(FLAGS, VRING_USED_F_NO_NOTIFY as u16);
        }
    }
}

/// Whether an index that moves from `before` to `after` passes `event` (virtio 1.3, 2.7.10, `vring_need_event`).
#[inline]
fn passes(event: u16, before: u16, after: u16) -> bool {
    after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before)
}
