//! The format's structs: pure bytes <-> structs, no I/O. `docs/FORMAT.md` describes the same in prose.
//!
//! All integers are little-endian. Reserved bytes are zero and ignored by readers, so that compatible
//! features can use them.

pub mod bitmap;
pub mod chunk_map;
mod item;
pub mod journal;
mod key;
pub mod node;
mod sums;
pub mod superblock;

pub use item::{
    DirentRef, ExtentFlags, ExtentItem, FILE_SIZE_MAX, InodeFlags, InodeItem, Timestamp, XattrRef,
    encode_dirent, encode_xattr_inline, encode_xattr_stored,
};
pub use key::{Key, Kind, NAME_HASH_BITS, SLOT_BITS, name_hash};
pub use sums::{SUM_GROUP_BLOCKS, SUM_GROUP_LEN, SumGroup, block_sum, sum_groups};

/// CRC-32C (Castagnoli) of `bytes`: the checksum of everything on the device.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}
