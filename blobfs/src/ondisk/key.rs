//! Keys of the item tree: (owner, kind, offset), ordered in that order.

use std::hash::Hasher;

use crate::units::{InodeId, MapId};

/// Kind of an item. Numbers leave gaps for kinds that come later; the order decides what lies together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Owner 0, offset = group index: free-space bitmap of an allocation group.
    Group = 0x10,
    /// Owner 0, offset = inode number: an inode without a name that is still open, or being deleted.
    Orphan = 0x20,
    /// Owner 0, offset = inode: a truncation whose blocks are still to be freed.
    Intent = 0x28,
    /// Owner 0, offset = volume number (later).
    Volume = 0x30,
    /// Owner 0, offset = block address: reference count of shared extents (later).
    RefCount = 0x38,
    /// Owner 0, offset = project id (later).
    Quota = 0x40,
    /// Owner = inode, offset 0: the inode.
    Inode = 0x50,
    /// Owner = map, offset 0: the whole content of a small file or symbolic link.
    Inline = 0x58,
    /// Owner = directory inode, offset = name hash and slot: a directory entry.
    Dirent = 0x60,
    /// Owner = inode, offset = name hash and slot: an extended attribute.
    Xattr = 0x70,
    /// Owner = map, offset = file block: an extent.
    Extent = 0x80,
    /// Owner = map, offset = first file block of a group: checksums of the group's blocks.
    Checksum = 0x88,
}

impl Kind {
    /// The kind with that number.
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            0x10 => Self::Group,
            0x20 => Self::Orphan,
            0x28 => Self::Intent,
            0x30 => Self::Volume,
            0x38 => Self::RefCount,
            0x40 => Self::Quota,
            0x50 => Self::Inode,
            0x58 => Self::Inline,
            0x60 => Self::Dirent,
            0x70 => Self::Xattr,
            0x80 => Self::Extent,
            0x88 => Self::Checksum,
            _ => return None,
        })
    }
}

/// Bits of a name's keyed hash in the offset of an entry.
pub const NAME_HASH_BITS: u32 = 55;

/// Bits below the hash that tell entries with equal hashes apart. 55 + 8 bits keep a readdir cookie, which
/// is the offset itself, below 2^63.
pub const SLOT_BITS: u32 = 8;

/// Keyed hash of a name: [`NAME_HASH_BITS`] bits, never 0.
pub fn name_hash(hash_key: [u64; 2], name: &[u8]) -> u64 {
    let [first, second] = hash_key;
    let mut hasher = siphasher::sip::SipHasher13::new_with_keys(first, second);
    hasher.write(name);
    (hasher.finish() >> (64 - NAME_HASH_BITS)).max(1)
}

/// Key of an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Inode or map number; 0 for items of the file system as a whole.
    pub owner: u64,
    /// Kind of the item.
    pub kind: Kind,
    /// Position within owner and kind; its meaning is the kind's.
    pub offset: u64,
}

impl Key {
    /// Key of an item of `owner`.
    pub fn new(owner: u64, kind: Kind, offset: u64) -> Self {
        Self { owner, kind, offset }
    }

    /// Key of an inode item.
    pub fn inode(inode: InodeId) -> Self {
        Self::new(inode.0, Kind::Inode, 0)
    }

    /// Key of a directory entry, or where the search for it starts.
    pub fn dirent(directory: InodeId, offset: u64) -> Self {
        Self::new(directory.0, Kind::Dirent, offset)
    }

    /// Key of an extended attribute.
    pub fn xattr(inode: InodeId, offset: u64) -> Self {
        Self::new(inode.0, Kind::Xattr, offset)
    }

    /// Key of inline data.
    pub fn inline(map: MapId) -> Self {
        Self::new(map.0, Kind::Inline, 0)
    }

    /// Key of the extent that starts at `file_block`.
    pub fn extent(map: MapId, file_block: u64) -> Self {
        Self::new(map.0, Kind::Extent, file_block)
    }

    /// Key of the checksums of the group that begins at `file_block`.
    pub fn sums(map: MapId, file_block: u64) -> Self {
        Self::new(map.0, Kind::Checksum, file_block)
    }

    /// Key of an orphan.
    pub fn orphan(inode: InodeId) -> Self {
        Self::new(0, Kind::Orphan, inode.0)
    }

    /// Key of the intent to finish an inode's truncation.
    pub fn intent(inode: InodeId) -> Self {
        Self::new(0, Kind::Intent, inode.0)
    }

    /// Key of a group's bitmap.
    pub fn group(index: u64) -> Self {
        Self::new(0, Kind::Group, index)
    }
}
