//! Device side of virtqueues: descriptor chains in, used entries out.
//!
//! | module | what it provides |
//! | --- | --- |
//! | [`chain`] | one request: its readable and writable memory, parsed and bounds-checked |
//! | [`split`] | the split virtqueue (virtio 1.3, 2.7) |
//!
//! [`Ring`] is what a queue works with, whatever the layout of the ring. Everything that the guest writes is
//! read once into a local and checked there. A ring knows neither sockets nor devices: who signals, and what
//! is done with a chain, is decided above.

pub mod chain;
pub mod split;

use std::rc::Rc;

use crate::guest_mem::{GuestMemory, OutsideMemory};
use chain::Chain;
use split::SplitRing;

/// Largest queue (virtio 1.3, 2.7: queue size is at most 32768).
pub const QUEUE_SIZE_MAX: u32 = 32768;

/// Where the frontend says a ring lies, in its own addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// What was negotiated for the rings of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RingFeatures {
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub indirect: bool,
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_index: bool,
}

/// A defect that leaves the ring unusable: there is no request that an error reply could go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The driver claims more available chains than the queue holds.
    #[error("available index {available} is more than the queue size away from {next}")]
    AvailableIndex {
        /// What the driver wrote.
        available: u16,
        /// The next one the device would take.
        next: u16,
    },
    /// A descriptor index behind the end of its table.
    #[error("descriptor index {index} is outside its table of {entries}")]
    DescriptorIndex {
        /// The index.
        index: usize,
        /// Entries of the table.
        entries: usize,
    },
    /// More descriptors than the queue has: a loop, or a driver that breaks the rules.
    #[error("descriptor chain from {head} has a loop or is longer than the queue")]
    Loop {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect descriptor inside an indirect table, with a successor, or not negotiated.
    #[error("indirect descriptor in chain from {head} where none may be")]
    IndirectMisplaced {
        /// First descriptor of the chain.
        head: u16,
    },
    /// An indirect table that is empty, too long, or no multiple of 16 bytes.
    #[error("indirect descriptor table of {len} bytes")]
    IndirectLength {
        /// Its length.
        len: u32,
    },
    /// An indirect table outside guest memory.
    #[error("indirect descriptor table: {0}")]
    IndirectTable(OutsideMemory),
}

/// A running ring.
#[derive(Debug)]
pub enum Ring {
    /// Split layout.
    Split(SplitRing),
}

impl Ring {
    /// Attaches to a ring whose next chain to take is number `next_available`.
    ///
    /// # Errors
    /// [`OutsideMemory`] when an area is not in guest memory or misaligned.
    pub fn attach(
        memory: &Rc<GuestMemory>,
        addresses: &RingAddresses,
        size: u16,
        features: RingFeatures,
        next_available: u16,
    ) -> Result<Self, OutsideMemory> {
        SplitRing::attach(memory, addresses, size, features, next_available).map(Self::Split)
    }

    /// Follows the ring to other addresses or another memory table, keeping its indexes.
    ///
    /// # Errors
    /// As [`Ring::attach`]; the ring is then as it was.
    pub fn relocate(
        &mut self,
        memory: &Rc<GuestMemory>,
        addresses: &RingAddresses,
    ) -> Result<(), OutsideMemory> {
        match self {
            Self::Split(ring) => ring.relocate(memory, addresses),
        }
    }

    /// Takes the next available chain into `chain`. Returns whether there was one.
    ///
    /// # Errors
    /// [`RingError`]; the ring is then unusable.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        match self {
            Self::Split(ring) => ring.pop(chain),
        }
    }

    /// Whether a chain is available, without taking it.
    #[inline]
    pub fn has_available(&self) -> bool {
        match self {
            Self::Split(ring) => ring.has_available(),
        }
    }

    /// Writes the used entry of the chain that began at `head`. The driver sees it after [`Ring::publish`].
    #[inline]
    pub fn push_used(&mut self, head: u16, written: u32) {
        match self {
            Self::Split(ring) => ring.push_used(head, written),
        }
    }

    /// Shows all pushed entries to the driver at once. Returns whether it wants to be notified.
    #[inline]
    pub fn publish(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.publish(),
        }
    }

    /// Asks the driver for kicks. Returns whether chains became available meanwhile, of which no kick will
    /// tell: look again before sleeping.
    pub fn enable_kicks(&mut self) -> bool {
        match self {
            Self::Split(ring) => ring.enable_kicks(),
        }
    }

    /// Tells the driver that kicks are not needed.
    pub fn disable_kicks(&mut self) {
        match self {
            Self::Split(ring) => ring.disable_kicks(),
        }
    }

    /// Number of the next chain to take: the vring base that the frontend gets back.
    pub fn next_available(&self) -> u16 {
        match self {
            Self::Split(ring) => ring.next_available(),
        }
    }

    /// The memory table that chains are translated with.
    #[inline]
    pub fn memory(&self) -> &Rc<GuestMemory> {
        match self {
            Self::Split(ring) => ring.memory(),
        }
    }
}
