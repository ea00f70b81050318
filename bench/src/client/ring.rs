//! The split virtqueue, driver side (virtio 1.3, 2.7).
//!
//! Chains keep their places, and the same heads are offered again and again: that is one store into the available ring
//! and one into its index. What the caller puts there is not checked.
//!
//! The driver polls: it never wants a notification. It kicks when the device asks for it.

use std::sync::atomic::{Ordering, fence};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{
    ClientError,
    memory::{Memory, Range},
};

/// More data follows in the descriptor `next`.
pub const DESCRIPTOR_NEXT: u16 = 1;
/// The device writes this buffer.
pub const DESCRIPTOR_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const DESCRIPTOR_INDIRECT: u16 = 4;

/// Bytes of a descriptor.
pub const DESCRIPTOR_LEN: usize = 16;

/// `flags` of the available ring: no notifications, please.
const NO_INTERRUPT: u16 = 1;
/// `flags` of the used ring: no kicks, please.
const NO_NOTIFY: u16 = 1;

/// `struct virtq_desc`, in the byte order of the only machines that run this: little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Descriptor {
    /// Guest physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// `DESCRIPTOR_*` bits.
    pub flags: u16,
    /// Index of the chain's next descriptor.
    pub next: u16,
}

/// `struct virtq_used_elem`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct UsedElement {
    /// Head of the chain.
    pub head: u32,
    /// Bytes the device says it has written.
    pub written: u32,
}

/// Where a ring's parts lie in the guest's memory.
#[derive(Debug, Clone, Copy)]
pub struct RingLayout {
    /// Descriptor table.
    pub descriptors: Range,
    /// Available ring, with the driver's event index at its end.
    pub available: Range,
    /// Used ring, with the device's event index at its end.
    pub used: Range,
}

/// Driver side of one split virtqueue.
#[derive(Debug)]
pub struct Ring {
    layout: RingLayout,
    size: u16,
    event_index: bool,
    next_available: u16,
    /// The index that the device was last shown.
    published: u16,
    next_used: u16,
    /// Where the event index stands: the device would notify when it passes this.
    unwanted: u16,
}

/// How far behind the used index the event index may fall before it is moved. It must never be passed, and moving it
/// costs a cache line that the device reads.
const EVENT_LEAD: u16 = 0x4000;

impl Ring {
    /// Lays out an empty ring of `size` (a power of two) entries in fresh memory.
    pub fn new(memory: &mut Memory, size: u16, event_index: bool) -> Result<Self, ClientError> {
        let entries = usize::from(size);
        let layout = RingLayout {
            descriptors: memory.allocate(entries * DESCRIPTOR_LEN, 4096)?,
            available: memory.allocate(6 + entries * 2, 4096)?,
            used: memory.allocate(6 + entries * 8, 4096)?,
        };
        let mut ring =
            Self { layout, size, event_index, next_available: 0, published: 0, next_used: 0, unwanted: 0 };
        ring.refuse_notifications(memory);
        Ok(ring)
    }

    /// Where the parts lie.
    pub fn layout(&self) -> RingLayout {
        self.layout
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Writes an entry of the descriptor table.
    pub fn set_descriptor(&self, memory: &Memory, index: u16, descriptor: Descriptor) {
        memory.store(self.layout.descriptors.offset + usize::from(index) * DESCRIPTOR_LEN, &descriptor);
    }

    /// Puts a head into the available ring; [`publish`](Self::publish) shows it to the device.
    #[inline]
    pub fn offer(&mut self, memory: &Memory, head: u16) {
        let slot = usize::from(self.next_available & (self.size - 1));
        memory.word(self.layout.available.offset + 4 + slot * 2).store(head, Ordering::Relaxed);
        self.next_available = self.next_available.wrapping_add(1);
    }

    /// Shows the device everything offered. Returns whether it asked for a kick.
    #[inline]
    pub fn publish(&mut self, memory: &Memory) -> bool {
        let before = self.published;
        self.published = self.next_available;
        memory.word(self.layout.available.offset + 2).store(self.next_available, Ordering::Release);
        // The device does the opposite: it asks for a kick, then looks at the index (2.7.10).
        fence(Ordering::SeqCst);
        if !self.event_index {
            return memory.word(self.layout.used.offset).load(Ordering::Relaxed) & NO_NOTIFY == 0;
        }
        let event = memory.word(self.layout.used.offset + 4 + usize::from(self.size) * 8);
        passes(event.load(Ordering::Relaxed), before, self.next_available)
    }

    /// The next used entry, if the device has put one there.
    #[inline]
    pub fn take_used(&mut self, memory: &Memory) -> Option<UsedElement> {
        if memory.word(self.layout.used.offset + 2).load(Ordering::Acquire) == self.next_used {
            return None;
        }
        let slot = usize::from(self.next_used & (self.size - 1));
        let element = memory.load(self.layout.used.offset + 4 + slot * 8);
        self.next_used = self.next_used.wrapping_add(1);
        if self.unwanted.wrapping_sub(self.next_used) < EVENT_LEAD {
            self.refuse_notifications(memory);
        }
        Some(element)
    }

    /// Asks for no notifications: by the flag, and by an event index that is half the index space away.
    fn refuse_notifications(&mut self, memory: &Memory) {
        memory.word(self.layout.available.offset).store(NO_INTERRUPT, Ordering::Relaxed);
        self.unwanted = self.next_used.wrapping_add(1 << 15);
        let event = memory.word(self.layout.available.offset + 4 + usize::from(self.size) * 2);
        event.store(self.unwanted, Ordering::Relaxed);
    }
}

/// Whether an index that moves from `before` to `after` passes `event` (2.7.10, `vring_need_event`).
#[inline]
fn passes(event: u16, before: u16, after: u16) -> bool {
    after.wrapping_sub(event).wrapping_sub(1) < after.wrapping_sub(before)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the device's side of the ring sees and does.
    struct Device {
        used: u16,
    }

    impl Device {
        fn use_head(&mut self, memory: &Memory, ring: &Ring, head: u16) {
            let slot = usize::from(self.used & (ring.size - 1));
            let at = ring.layout.used.offset + 4 + slot * 8;
            memory.store(at, &UsedElement { head: head.into(), written: 1 });
            self.used = self.used.wrapping_add(1);
            memory.word(ring.layout.used.offset + 2).store(self.used, Ordering::Release);
        }
    }

    #[test]
    fn heads_go_round_the_ring_and_no_notification_is_ever_wanted() {
        let mut memory = Memory::new(1 << 16).unwrap();
        let mut ring = Ring::new(&mut memory, 8, true).unwrap();
        let mut device = Device { used: 0 };
        for round in 0..200_000_u32 {
            let head = u16::try_from(round % 8).unwrap();
            ring.offer(&memory, head);
            ring.publish(&memory);
            let before = device.used;
            device.use_head(&memory, &ring, head);
            let event = memory.word(ring.layout.available.offset + 4 + 16).load(Ordering::Relaxed);
            assert!(!passes(event, before, device.used), "round {round}");
            assert_eq!(ring.take_used(&memory).map(|used| used.head), Some(head.into()));
            assert_eq!(ring.take_used(&memory), None);
        }
    }

    #[test]
    fn it_kicks_only_when_the_device_asks() {
        let mut memory = Memory::new(1 << 16).unwrap();
        for event_index in [false, true] {
            let mut ring = Ring::new(&mut memory, 8, event_index).unwrap();
            ring.offer(&memory, 0);
            assert!(ring.publish(&memory), "event index 0 and flags 0 ask for the first chain");
            // The device has event index 0 behind it, or sets the flag.
            memory.word(ring.layout.used.offset).store(NO_NOTIFY, Ordering::Relaxed);
            ring.offer(&memory, 1);
            assert!(!ring.publish(&memory));
            memory.word(ring.layout.used.offset).store(0, Ordering::Relaxed);
            memory.word(ring.layout.used.offset + 4 + 64).store(2, Ordering::Relaxed);
            ring.offer(&memory, 2);
            assert!(ring.publish(&memory));
        }
    }
}
