//! What a repair does about a finding: a text for people, and changes of items.
//!
//! A finding and its remedy are made at the same place, where everything that led to the finding is known.
//! Remedies are only collected here; [`super::edits`] lays them over the items, and `super::repair` decides
//! whether they are applied at all.

use crate::ondisk::{ExtentItem, InodeFlags, InodeItem, Key, SumGroup};
use crate::units::{InodeId, MapId};

/// How a finding is repaired.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Remedy {
    /// What was done, in a few words.
    pub(super) text: &'static str,
    /// Something is given up, or may be: not done without consent.
    pub(super) loses: bool,
    /// What becomes of the items. Nothing for what a repair writes anew in any case: superblocks, bitmaps,
    /// chunk map, inner nodes, journal.
    pub(super) changes: Vec<Change>,
}

/// A change of the items.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// Of one item.
    Item(Key, ItemEdit),
    /// Of all names of an inode.
    Names(u64, NameRule),
    /// A map loses its extents and their checksums.
    DropExtents(u64),
    /// An extent gets a copy of its blocks.
    CopyExtent(Key, ExtentItem),
    /// Blocks get the checksums of what they hold.
    SumAnew {
        /// Of their group.
        key: Key,
        /// The checksums of the others.
        sums: Box<SumGroup>,
        /// The blocks: the first one inside the group, the same on the device, how many.
        runs: Vec<(usize, u64, u64)>,
    },
    /// An inode without a name gets one in the directory for what was lost.
    Attach {
        /// The inode.
        inode: u64,
        /// Its `DT_*`.
        file_type: u8,
    },
}

/// What becomes of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ItemEdit {
    /// It goes.
    Delete,
    /// It gets this value, or is made.
    Put(Vec<u8>),
    /// It is made; what is there stays.
    Insert(Vec<u8>),
    /// Fields of an inode change.
    Inode(InodeEdit),
}

/// Fields of an inode that change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct InodeEdit {
    pub(super) mode: Option<u32>,
    pub(super) nlink: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) blocks: Option<u64>,
    pub(super) map: Option<u64>,
    pub(super) parent: Option<u64>,
    pub(super) parent_map: Option<u64>,
    pub(super) no_project: bool,
    pub(super) flags_set: InodeFlags,
    /// Unknown ones may be among them.
    pub(super) flags_cleared: u32,
}

impl InodeEdit {
    /// Takes the fields of a later edit over.
    pub(super) fn merge(&mut self, later: Self) {
        self.mode = later.mode.or(self.mode);
        self.nlink = later.nlink.or(self.nlink);
        self.size = later.size.or(self.size);
        self.blocks = later.blocks.or(self.blocks);
        self.map = later.map.or(self.map);
        self.parent = later.parent.or(self.parent);
        self.parent_map = later.parent_map.or(self.parent_map);
        self.no_project |= later.no_project;
        let cleared = InodeFlags::from_bits_retain(later.flags_cleared);
        self.flags_set = (self.flags_set - cleared) | later.flags_set;
        self.flags_cleared = (self.flags_cleared | later.flags_cleared) & !later.flags_set.bits();
    }

    /// The item's bytes with the edit; as they are when they are no inode.
    pub(super) fn apply(&self, value: &[u8]) -> Vec<u8> {
        let Some(mut item) = InodeItem::decode(value) else { return value.to_vec() };
        item.mode = self.mode.unwrap_or(item.mode);
        item.nlink = self.nlink.unwrap_or(item.nlink);
        item.size = self.size.unwrap_or(item.size);
        item.blocks = self.blocks.unwrap_or(item.blocks);
        item.map = self.map.map_or(item.map, MapId);
        item.parent = self.parent.map_or(item.parent, InodeId);
        item.parent_map = self.parent_map.map_or(item.parent_map, MapId);
        item.project = if self.no_project { 0 } else { item.project };
        item.flags -= InodeFlags::from_bits_retain(self.flags_cleared);
        item.flags |= self.flags_set;
        item.encode().to_vec()
    }
}

/// What becomes of all names of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct NameRule {
    /// None stays.
    pub(super) drop: bool,
    /// Only the one at this directory and offset stays.
    pub(super) only: Option<(u64, u64)>,
    /// They get this `DT_*`.
    pub(super) file_type: Option<u8>,
}

impl NameRule {
    /// Takes a later rule over.
    pub(super) fn merge(&mut self, later: Self) {
        self.drop |= later.drop;
        self.only = later.only.or(self.only);
        self.file_type = later.file_type.or(self.file_type);
    }
}

impl Remedy {
    /// A repair that gives nothing up.
    pub(super) fn safe(text: &'static str) -> Self {
        Self { text, loses: false, changes: Vec::new() }
    }

    /// A repair that gives something up, or may.
    pub(super) fn lossy(text: &'static str) -> Self {
        Self { text, loses: true, changes: Vec::new() }
    }

    /// With a change.
    pub(super) fn with(mut self, change: Change) -> Self {
        self.changes.push(change);
        self
    }

    /// Fields of an inode are set; nothing is given up.
    pub(super) fn inode(inode: u64, text: &'static str, edit: InodeEdit) -> Self {
        Self::safe(text).edit_inode(inode, edit)
    }

    /// With a change of an inode's fields.
    pub(super) fn edit_inode(self, inode: u64, edit: InodeEdit) -> Self {
        self.with(Change::Item(Key::inode(InodeId(inode)), ItemEdit::Inode(edit)))
    }

    /// An item is removed.
    pub(super) fn delete(key: Key, text: &'static str) -> Self {
        Self::lossy(text).and_delete(key)
    }

    /// With the removal of an item.
    pub(super) fn and_delete(self, key: Key) -> Self {
        self.with(Change::Item(key, ItemEdit::Delete))
    }

    /// With a new item, unless there is one of that key.
    pub(super) fn insert(self, key: Key, value: &[u8]) -> Self {
        self.with(Change::Item(key, ItemEdit::Insert(value.to_vec())))
    }

    /// With a new value for an item.
    pub(super) fn put(self, key: Key, value: Vec<u8>) -> Self {
        self.with(Change::Item(key, ItemEdit::Put(value)))
    }
}
