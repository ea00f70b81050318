//! Numbers that must not be swapped.

use std::fmt;
use std::ops::Range;

/// An inode number: 64 bits, drawn from one counter, never reused. The same counter gives map ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub u64);

impl InodeId {
    /// The root directory of the file system.
    pub const ROOT: Self = Self(1);
}

impl fmt::Display for InodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What extents hang on: an inode names its map, so that two inodes can later share a frozen one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MapId(pub u64);

/// A device address in file system blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockAddr(pub u64);

/// A run of device blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockRange {
    /// First block.
    pub start: BlockAddr,
    /// Number of blocks.
    pub count: u32,
}

impl BlockRange {
    /// `count` blocks from `start` on.
    pub fn new(start: BlockAddr, count: u32) -> Self {
        Self { start, count }
    }

    /// Block behind the last one.
    pub fn end(&self) -> BlockAddr {
        BlockAddr(self.start.0 + u64::from(self.count))
    }

    /// The same range in bytes of the device.
    pub fn bytes(&self, block_size: u32) -> Range<u64> {
        self.start.0 * u64::from(block_size)..self.end().0 * u64::from(block_size)
    }
}

/// Position of a transaction in the order of acknowledgement; starts at 1, grows by one each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct TxnSeq(pub u64);
