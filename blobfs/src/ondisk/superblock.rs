//! The superblock: identity and geometry, and where the newest checkpoint is.
//!
//! Two copies at fixed offsets, written in turn; the one with the higher generation counts. A copy fits one
//! 512-byte sector, the smallest unit that a power cut does not tear, so a copy is old or new, never mixed.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::crc32c;

/// Byte offsets of the two copies. A checkpoint of generation `g` writes copy `g % 2`.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [4096, 8192];

/// Bytes of a copy.
pub const SUPERBLOCK_LEN: usize = 512;

/// First byte behind the area that both copies and the boot sector keep.
pub const RESERVED_LEN: u64 = 12_288;

/// First bytes of a superblock.
pub const SUPERBLOCK_MAGIC: [u8; 8] = *b"vfsblob\0";

/// Version of the layout of the superblock itself.
pub const FORMAT_VERSION: u32 = 3;

/// Oldest version that is read. Version 2 has no logged data; its first checkpoint by this code makes it version 3.
pub const FORMAT_VERSION_MIN: u32 = 2;

/// Incompatible feature: every block of file data has a checksum in the tree.
pub const INCOMPAT_DATA_SUMS: u64 = 1 << 0;

/// Incompatible features that this code can mount.
pub const INCOMPAT_KNOWN: u64 = INCOMPAT_DATA_SUMS;

/// Features without which this code may still read, but not write.
pub const RO_COMPAT_KNOWN: u64 = 0;

/// Smallest and largest block and node size in bytes; node offsets are 16 bits wide.
pub const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512..=16_384;

/// Smallest and largest node size: a name of 255 bytes must fit a third of a node, an offset 16 bits.
pub const NODE_SIZES: std::ops::RangeInclusive<u32> = 1024..=32_768;

/// Address of a node (or chunk map page) with what it must contain. All zero for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NodePtr {
    /// First block.
    pub addr: u64,
    /// Checkpoint that wrote it.
    pub generation: u64,
    /// CRC-32C in its header.
    pub crc: u32,
}

/// [`NodePtr`] as stored.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RawPtr {
    addr: U64,
    generation: U64,
    crc: U32,
    reserved: U32,
}

impl RawPtr {
    pub(crate) const SIZE: usize = 24;
}

const _: () = assert!(size_of::<RawPtr>() == RawPtr::SIZE);

impl From<NodePtr> for RawPtr {
    fn from(ptr: NodePtr) -> Self {
        Self {
            addr: ptr.addr.into(),
            generation: ptr.generation.into(),
            crc: ptr.crc.into(),
            reserved: U32::ZERO,
        }
    }
}

impl From<RawPtr> for NodePtr {
    fn from(raw: RawPtr) -> Self {
        Self { addr: raw.addr.get(), generation: raw.generation.get(), crc: raw.crc.get() }
    }
}

/// Where the journal goes on after a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JournalTail {
    /// Byte position inside the journal.
    pub pos: u64,
    /// Sequence number of the next journal block.
    pub seq: u64,
    /// CRC-32C of the block before it; 0 for none.
    pub previous_crc: u32,
}

/// What a superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Features that older code may ignore.
    pub compat: u64,
    /// Features that older code must not write.
    pub ro_compat: u64,
    /// Features that older code must not touch.
    pub incompat: u64,
    /// Identity; every structure carries it.
    pub uuid: [u8; 16],
    /// Name for people, padded with zeros.
    pub label: [u8; 32],
    /// Bytes of a block, the unit of addresses.
    pub block_size: u32,
    /// Bytes of a tree node; a multiple of the block size.
    pub node_size: u32,
    /// Blocks whose use one bitmap item holds.
    pub group_blocks: u32,
    /// Blocks of the file system.
    pub block_count: u64,
    /// First block of the journal.
    pub journal_start: u64,
    /// Blocks of the journal.
    pub journal_blocks: u64,
    /// Key of the name hash.
    pub hash_key: [u64; 2],
    /// Number of the checkpoint.
    pub generation: u64,
    /// Number of the mount that writes journal blocks after this checkpoint.
    pub epoch: u64,
    /// Whether the file system was closed: nothing follows in the journal.
    pub clean: bool,
    /// Level of the root node; leaves are level 0.
    pub root_level: u8,
    /// Root of the item tree.
    pub root: NodePtr,
    /// First page of the chunk map.
    pub chunk_map: NodePtr,
    /// Where replay starts.
    pub tail: JournalTail,
    /// Next inode or map number.
    pub next_id: u64,
    /// Last transaction inside the checkpoint.
    pub last_txn: u64,
    /// Blocks that the bitmaps of the checkpoint call free.
    pub free_blocks: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    crc: U32,
    version: U32,
    compat: U64,
    ro_compat: U64,
    incompat: U64,
    uuid: [u8; 16],
    label: [u8; 32],
    block_size: U32,
    node_size: U32,
    group_blocks: U32,
    checksum_kind: U32,
    block_count: U64,
    journal_start: U64,
    journal_blocks: U64,
    hash_key: [U64; 2],
    generation: U64,
    epoch: U64,
    clean: u8,
    root_level: u8,
    reserved: [u8; 6],
    root: RawPtr,
    chunk_map: RawPtr,
    tail_pos: U64,
    tail_seq: U64,
    tail_previous_crc: U32,
    reserved2: U32,
    next_id: U64,
    last_txn: U64,
    free_blocks: U64,
    reserved3: [u8; 248],
}

const _: () = assert!(size_of::<Raw>() == SUPERBLOCK_LEN);

/// Bytes in front of what the checksum covers: magic and the checksum.
const CRC_FROM: usize = 12;

/// Checksums are CRC-32C.
const CHECKSUM_CRC32C: u32 = 1;

/// Why bytes are no superblock that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// The magic is missing: not a file system of this kind.
    #[error("no superblock")]
    NoMagic,
    /// The checksum is wrong.
    #[error("checksum {found:#010x} instead of {expected:#010x}")]
    Checksum {
        /// Checksum of what is there.
        expected: u32,
        /// Checksum that is stored.
        found: u32,
    },
    /// A layout that this code does not know.
    #[error("format version {version}, known are {FORMAT_VERSION_MIN} to {FORMAT_VERSION}")]
    Version {
        /// The version found.
        version: u32,
    },
    /// Numbers that contradict each other.
    #[error("{0}")]
    Geometry(&'static str),
}

impl Superblock {
    /// The bytes of a copy.
    pub fn encode(&self) -> [u8; SUPERBLOCK_LEN] {
        let raw = Raw {
            magic: SUPERBLOCK_MAGIC,
            crc: U32::ZERO,
            version: FORMAT_VERSION.into(),
            compat: self.compat.into(),
            ro_compat: self.ro_compat.into(),
            incompat: self.incompat.into(),
            uuid: self.uuid,
            label: self.label,
            block_size: self.block_size.into(),
            node_size: self.node_size.into(),
            group_blocks: self.group_blocks.into(),
            checksum_kind: CHECKSUM_CRC32C.into(),
            block_count: self.block_count.into(),
            journal_start: self.journal_start.into(),
            journal_blocks: self.journal_blocks.into(),
            hash_key: self.hash_key.map(U64::new),
            generation: self.generation.into(),
            epoch: self.epoch.into(),
            clean: self.clean.into(),
            root_level: self.root_level,
            reserved: [0; 6],
            root: self.root.into(),
            chunk_map: self.chunk_map.into(),
            tail_pos: self.tail.pos.into(),
            tail_seq: self.tail.seq.into(),
            tail_previous_crc: self.tail.previous_crc.into(),
            reserved2: U32::ZERO,
            next_id: self.next_id.into(),
            last_txn: self.last_txn.into(),
            free_blocks: self.free_blocks.into(),
            reserved3: [0; 248],
        };
        let mut bytes: [u8; SUPERBLOCK_LEN] = zerocopy::transmute!(raw);
        let crc = crc32c(&bytes[CRC_FROM..]);
        bytes[CRC_FROM - 4..CRC_FROM].copy_from_slice(U32::new(crc).as_bytes());
        bytes
    }

    /// The superblock in `bytes`, with a geometry that makes sense.
    ///
    /// # Errors
    /// See [`SuperblockError`].
    pub fn decode(bytes: &[u8; SUPERBLOCK_LEN]) -> Result<Self, SuperblockError> {
        let raw: &Raw = zerocopy::transmute_ref!(bytes);
        if raw.magic != SUPERBLOCK_MAGIC {
            return Err(SuperblockError::NoMagic);
        }
        let expected = crc32c(&bytes[CRC_FROM..]);
        if raw.crc.get() != expected {
            return Err(SuperblockError::Checksum { expected, found: raw.crc.get() });
        }
        let is_known = (FORMAT_VERSION_MIN..=FORMAT_VERSION).contains(&raw.version.get());
        if !is_known || raw.checksum_kind.get() != CHECKSUM_CRC32C {
            return Err(SuperblockError::Version { version: raw.version.get() });
        }
        let superblock = Self::from_raw(raw);
        superblock.check_geometry().map_err(SuperblockError::Geometry)?;
        Ok(superblock)
    }

    fn from_raw(raw: &Raw) -> Self {
        Self {
            compat: raw.compat.get(),
            ro_compat: raw.ro_compat.get(),
            incompat: raw.incompat.get(),
            uuid: raw.uuid,
            label: raw.label,
            block_size: raw.block_size.get(),
            node_size: raw.node_size.get(),
            group_blocks: raw.group_blocks.get(),
            block_count: raw.block_count.get(),
            journal_start: raw.journal_start.get(),
            journal_blocks: raw.journal_blocks.get(),
            hash_key: raw.hash_key.map(U64::get),
            generation: raw.generation.get(),
            epoch: raw.epoch.get(),
            clean: raw.clean != 0,
            root_level: raw.root_level,
            root: raw.root.into(),
            chunk_map: raw.chunk_map.into(),
            tail: JournalTail {
                pos: raw.tail_pos.get(),
                seq: raw.tail_seq.get(),
                previous_crc: raw.tail_previous_crc.get(),
            },
            next_id: raw.next_id.get(),
            last_txn: raw.last_txn.get(),
            free_blocks: raw.free_blocks.get(),
        }
    }

    /// Checks that the numbers agree with each other; past this line they are trusted.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check_geometry(&self) -> Result<(), &'static str> {
        let block = u64::from(self.block_size);
        if !self.block_size.is_power_of_two() || !BLOCK_SIZES.contains(&self.block_size) {
            return Err("block size is not a power of two from 512 to 16384");
        }
        if !self.node_size.is_power_of_two() || !NODE_SIZES.contains(&self.node_size) {
            return Err("node size is not a power of two from 1024 to 32768");
        }
        if self.node_size < self.block_size {
            return Err("a node is smaller than a block");
        }
        if !self.group_blocks.is_power_of_two()
            || !(64..=self.group_blocks_max()).contains(&self.group_blocks)
        {
            return Err("the bitmap of a group does not fit an item");
        }
        if self.block_count.checked_mul(block).is_none() {
            return Err("more blocks than a device can have");
        }
        let journal_end = self.journal_start.checked_add(self.journal_blocks);
        let reserved = RESERVED_LEN.div_ceil(block);
        if self.journal_start < reserved || journal_end.is_none_or(|end| end > self.block_count) {
            return Err("the journal lies outside the device");
        }
        if self.journal_bytes() < JOURNAL_LEN_MIN
            || self.tail.pos > self.journal_bytes()
            || !self.tail.pos.is_multiple_of(block)
        {
            return Err("the journal is too small, or its tail lies outside");
        }
        if self.free_blocks > self.block_count - self.first_data_block() {
            return Err("more blocks are free than there are");
        }
        if self.root_level > LEVEL_MAX {
            return Err("the tree is too deep");
        }
        let counters = [self.generation, self.epoch, self.tail.seq, self.next_id, self.last_txn];
        if counters.iter().any(|counter| *counter > COUNTER_MAX) {
            return Err("a counter is beyond what it can reach");
        }
        Ok(())
    }

    /// Largest power of two of blocks whose bitmap fits an item.
    pub fn group_blocks_max(&self) -> u32 {
        let bits = super::node::item_len_max(self.node_size as usize) as u32 * 8;
        1 << bits.ilog2()
    }

    /// Whether every block of file data has a checksum.
    pub fn has_data_sums(&self) -> bool {
        self.incompat & INCOMPAT_DATA_SUMS != 0
    }

    /// Bytes of the journal.
    pub fn journal_bytes(&self) -> u64 {
        self.journal_blocks * u64::from(self.block_size)
    }

    /// Blocks of a node.
    pub fn node_blocks(&self) -> u64 {
        u64::from(self.node_size / self.block_size)
    }

    /// First block that is neither reserved nor journal.
    pub fn first_data_block(&self) -> u64 {
        self.journal_start + self.journal_blocks
    }

    /// The label as text, without its padding.
    pub fn label_text(&self) -> String {
        let len = self.label.iter().position(|&byte| byte == 0).unwrap_or(self.label.len());
        String::from_utf8_lossy(&self.label[..len]).into_owned()
    }
}

/// Deepest tree: with four entries per inner node this is beyond any device.
pub const LEVEL_MAX: u8 = 24;

/// Counters grow by steps of at most 2^20, so they never come near this, and sums with them never overflow.
pub const COUNTER_MAX: u64 = 1 << 62;

/// Smallest journal: eight blocks of the largest transaction that a tiny geometry has.
pub const JOURNAL_LEN_MIN: u64 = 64 * 1024;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> Superblock {
        Superblock {
            compat: 1,
            ro_compat: 0,
            incompat: 0,
            uuid: [7; 16],
            label: [0; 32],
            block_size: 4096,
            node_size: 16_384,
            group_blocks: 16_384,
            block_count: 1 << 20,
            journal_start: 3,
            journal_blocks: 64,
            hash_key: [1, 2],
            generation: 9,
            epoch: 3,
            clean: true,
            root_level: 2,
            root: NodePtr { addr: 100, generation: 8, crc: 77 },
            chunk_map: NodePtr { addr: 104, generation: 9, crc: 78 },
            tail: JournalTail { pos: 4096, seq: 5, previous_crc: 6 },
            next_id: 44,
            last_txn: 17,
            free_blocks: 1000,
        }
    }

    #[test]
    fn a_superblock_comes_back_as_it_was_written() {
        assert_eq!(Superblock::decode(&sample().encode()), Ok(sample()));
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let bytes = sample().encode();
        for at in 0..bytes.len() {
            let mut damaged = bytes;
            damaged[at] ^= 0x10;
            assert!(Superblock::decode(&damaged).is_err(), "byte {at}");
        }
    }

    #[test]
    fn contradictions_are_refused_even_with_a_right_checksum() {
        let broken = [
            Superblock { node_size: 512, ..sample() },
            Superblock { block_size: 3000, ..sample() },
            Superblock { journal_start: 2, ..sample() },
            Superblock { journal_blocks: u64::MAX, ..sample() },
            Superblock { block_count: u64::MAX, ..sample() },
            Superblock { group_blocks: 1 << 30, ..sample() },
            Superblock { free_blocks: 1 << 20, ..sample() },
            Superblock { tail: JournalTail { pos: 1 << 40, ..sample().tail }, ..sample() },
            Superblock { tail: JournalTail { seq: u64::MAX, ..sample().tail }, ..sample() },
            Superblock { generation: u64::MAX, ..sample() },
            Superblock { epoch: u64::MAX, ..sample() },
            Superblock { next_id: u64::MAX, ..sample() },
            Superblock { last_txn: u64::MAX, ..sample() },
        ];
        for superblock in broken {
            let result = Superblock::decode(&superblock.encode());
            assert!(matches!(result, Err(SuperblockError::Geometry(_))), "{superblock:?}");
        }
    }
}
