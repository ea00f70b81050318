//! One request as the driver laid it out: memory to read, then memory to write.

use bdev::Segment;
use virtio_queue::desc::split::Descriptor;

use super::{QUEUE_SIZE_MAX, RingError};
use crate::guest_mem::GuestMemory;

/// Why the rest of a chain cannot be used although the ring is fine. What was parsed before the defect stays
/// in the chain, so that the device can answer with an error where the reply's header finds room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainFault {
    /// A buffer outside guest memory.
    Address,
    /// A device-readable buffer behind a device-writable one (virtio 1.3, 2.7.4.2).
    Order,
}

/// A popped chain. One value is reused for all chains of a poller, so that parsing allocates nothing.
#[derive(Debug, Default)]
pub struct Chain {
    pub(super) head: u16,
    descriptors: usize,
    bytes: usize,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_fault: Option<ChainFault>,
    writable_fault: Option<ChainFault>,
}

impl Chain {
    /// An empty chain, to be filled by [`super::Ring::pop`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Index of the first descriptor: the chain's name in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Descriptors it is made of, for budgets.
    pub fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Bytes of all its buffers, for budgets.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// What the device may read, up to the first defect.
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// What the device may write, up to the first defect.
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Whether the driver gave something to write, in memory or not.
    #[inline]
    pub fn has_writable(&self) -> bool {
        !self.writable.is_empty() || self.writable_fault.is_some()
    }

    /// The defect, if there is one.
    #[inline]
    pub fn fault(&self) -> Option<ChainFault> {
        self.readable_fault.or(self.writable_fault)
    }

    #[inline]
    fn clear(&mut self, head: u16) {
        self.head = head;
        self.descriptors = 0;
        self.bytes = 0;
        self.readable.clear();
        self.writable.clear();
        self.readable_fault = None;
        self.writable_fault = None;
    }

    /// Adds one buffer.
    #[inline]
    fn add(&mut self, descriptor: Descriptor, memory: &GuestMemory) {
        let (gpa, len) = (descriptor.addr().0, u64::from(descriptor.len()));
        self.bytes = self.bytes.saturating_add(len as usize);
        let (segments, fault) = if descriptor.is_write_only() {
            (&mut self.writable, &mut self.writable_fault)
        } else if !self.has_writable() {
            (&mut self.readable, &mut self.readable_fault)
        } else {
            self.readable_fault.get_or_insert(ChainFault::Order);
            return;
        };
        // Behind a defect the positions of bytes are not known any more.
        if fault.is_none() && memory.translate(gpa, len, segments).is_err() {
            *fault = Some(ChainFault::Address);
        }
    }
}

/// Follows the chain from `head` through `table` and, at its end, an indirect table.
#[inline]
pub(super) fn parse(
    chain: &mut Chain,
    head: u16,
    queue_size: u16,
    indirect: bool,
    memory: &GuestMemory,
    entry: impl Fn(usize) -> Option<[u8; 16]>,
) -> Result<(), RingError> {
    chain.clear(head);
    let mut walk = Walk { chain, memory, limit: usize::from(queue_size) };
    let Some(descriptor) = walk.follow(usize::from(head), usize::from(queue_size), entry)? else {
        return Ok(());
    };
    if !indirect || descriptor.has_next() {
        return Err(RingError::IndirectMisplaced { head });
    }
    let len = descriptor.len();
    if len == 0 || len % 16 != 0 || len / 16 > QUEUE_SIZE_MAX {
        return Err(RingError::IndirectLength { len });
    }
    let table = memory.table(descriptor.addr().0, u64::from(len)).map_err(RingError::IndirectTable)?;
    match walk.follow(0, len as usize / 16, |index| table.entry(index))? {
        None => Ok(()),
        Some(_) => Err(RingError::IndirectMisplaced { head }),
    }
}

struct Walk<'a> {
    chain: &'a mut Chain,
    memory: &'a GuestMemory,
    /// A longer chain has a loop (virtio 1.3, 2.7.5.3.1: not longer than the queue, indirect or not).
    limit: usize,
}

impl Walk<'_> {
    /// Adds the buffers of one table from `index` on, up to its end or the indirect descriptor returned.
    #[inline]
    fn follow(
        &mut self,
        mut index: usize,
        entries: usize,
        entry: impl Fn(usize) -> Option<[u8; 16]>,
    ) -> Result<Option<Descriptor>, RingError> {
        loop {
            let raw = entry(index).ok_or(RingError::DescriptorIndex { index, entries })?;
            let descriptor = decode(raw);
            if descriptor.refers_to_indirect_table() {
                return Ok(Some(descriptor));
            }
            if self.chain.descriptors == self.limit {
                return Err(RingError::Loop { head: self.chain.head });
            }
            self.chain.descriptors += 1;
            self.chain.add(descriptor, self.memory);
            if !descriptor.has_next() {
                return Ok(None);
            }
            index = usize::from(descriptor.next());
        }
    }
}

/// `struct virtq_desc` (virtio 1.3, 2.7.5): address, length, flags, next, little-endian.
#[inline]
fn decode(raw: [u8; 16]) -> Descriptor {
    let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = raw;
    Descriptor::new(
        u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        u32::from_le_bytes([l0, l1, l2, l3]),
        u16::from_le_bytes([f0, f1]),
        u16::from_le_bytes([n0, n1]),
    )
}
