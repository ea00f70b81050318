//! The format's structs: pure bytes <-> structs, no I/O. `docs/FORMAT.md` describes the same in prose.
//!
//! All integers are little-endian. Reserved bytes are zero and checked to be zero by fsck only, so that
//! compatible features can use them.

mod item;
mod key;

pub use item::{
    DirentRef, ExtentFlags, ExtentItem, InodeFlags, InodeItem, Timestamp, XattrRef, encode_dirent,
    encode_xattr_inline, encode_xattr_stored,
};
pub use key::{Key, Kind, NAME_HASH_BITS, SLOT_BITS};
