//! Everything that can be wrong, one variant each, with its place.

use serde::Serialize;

use super::remedy::{Change, Remedy};

/// One thing that is wrong. The text that it displays names the structure, its place and the problem.
///
/// Blocks are file system blocks; `copy`, `group` and file blocks count from 0.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize)]
#[serde(tag = "finding", rename_all = "snake_case")]
pub enum Finding {
    /// A copy of the superblock cannot be used. It may have been the newer one.
    #[error("superblock, copy {copy}: {problem}")]
    Superblock {
        /// Which one.
        copy: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A copy of the superblock holds a generation that belongs into the other one.
    #[error("superblock, copy {copy}: generation {generation} belongs into the other copy")]
    SuperblockPlace {
        /// Which one.
        copy: usize,
        /// Its generation.
        generation: u64,
    },
    /// The copies contradict each other.
    #[error("superblock: the copies differ in {field}")]
    SuperblockCopies {
        /// In what.
        field: &'static str,
    },
    /// The number of free blocks is not what the bitmaps say.
    #[error("superblock: {stated} free blocks, the bitmaps have {counted}")]
    FreeBlocks {
        /// What the superblock says.
        stated: u64,
        /// What the bitmaps of the checkpoint say.
        counted: u64,
    },
    /// The counter for inodes and maps stands at or below a number that is in use.
    #[error("superblock: next number {next_id} although {used} is in use")]
    NextId {
        /// Next number to give away, journal included.
        next_id: u64,
        /// Highest number in use.
        used: u64,
    },
    /// The superblock says that nothing follows in the journal, but something does.
    #[error("superblock: marked clean, but {blocks} journal blocks follow")]
    CleanWithJournal {
        /// Blocks that a replay would take.
        blocks: u64,
    },
    /// A valid journal block cannot be applied.
    #[error("journal block {sequence} at block {block}: {problem}")]
    Journal {
        /// Its sequence number.
        sequence: u64,
        /// Where it starts.
        block: u64,
        /// What is wrong.
        problem: String,
    },
    /// The journal breaks off, but a later block of it is there: something acknowledged is lost.
    #[error(
        "journal: ends before block {expected} although block {found} is there: acknowledged changes are lost"
    )]
    JournalGap {
        /// Sequence number that is missing.
        expected: u64,
        /// Sequence number that was found behind it.
        found: u64,
    },
    /// The journal has data of a file that the file has no blocks for.
    #[error("inode {inode}: the journal has {bytes} bytes of it that no block is there for")]
    LoggedData {
        /// The file.
        inode: u64,
        /// How many bytes.
        bytes: u64,
    },
    /// A page of the chunk map cannot be used.
    #[error("chunk map page at block {block}: {problem}")]
    ChunkMap {
        /// Where it is.
        block: u64,
        /// What is wrong.
        problem: String,
    },
    /// A metadata chunk is where none can be.
    #[error("metadata chunk at block {block}: {problem}")]
    Chunk {
        /// Its first block.
        block: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// A place of a metadata chunk is marked as used, but holds nothing.
    #[error("metadata place at block {block}: marked as used, but nothing is there")]
    PlaceLeaked {
        /// Where it is.
        block: u64,
    },
    /// A node or page of the chunk map is at a place that is not marked as used.
    #[error("metadata place at block {block}: in use, but not marked as used")]
    PlaceNotMarked {
        /// Where it is.
        block: u64,
    },
    /// Two pointers lead to the same node or page.
    #[error("metadata place at block {block}: used twice")]
    PlaceUsedTwice {
        /// Where it is.
        block: u64,
    },
    /// A tree node cannot be used.
    #[error("node at block {block}, level {level}: {problem}")]
    Node {
        /// Where it is.
        block: u64,
        /// Its level above the leaves, as the nodes above say.
        level: u8,
        /// What is wrong.
        problem: String,
    },
    /// An item whose key makes no sense.
    #[error("item {owner}/{kind}/{offset}: {problem}")]
    Item {
        /// Owner in its key.
        owner: u64,
        /// Kind in its key.
        kind: String,
        /// Offset in its key.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// A bitmap item has the wrong length or is of no group.
    #[error("bitmap of group {group}: {problem}")]
    Group {
        /// Group number.
        group: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// Blocks that nothing uses are marked as used.
    #[error("blocks {start}..{end}: marked as used, but nothing uses them")]
    BlocksLeaked {
        /// First one.
        start: u64,
        /// Behind the last one.
        end: u64,
    },
    /// Blocks that something uses are marked as free.
    #[error("blocks {start}..{end}: in use, but marked as free")]
    BlocksNotMarked {
        /// First one.
        start: u64,
        /// Behind the last one.
        end: u64,
    },
    /// An extent uses blocks that something else uses.
    #[error(
        "extent of map {map} at file block {file_block}: blocks {start}..{end} are used by something else too"
    )]
    BlocksUsedTwice {
        /// Its map.
        map: u64,
        /// Its first file block.
        file_block: u64,
        /// First block.
        start: u64,
        /// Behind the last one.
        end: u64,
    },
    /// An extent is malformed or in the wrong place.
    #[error("extent of map {map} at file block {file_block}: {problem}")]
    Extent {
        /// Its map.
        map: u64,
        /// Its first file block.
        file_block: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// Extents or inline content that no inode or extended attribute owns.
    #[error("map {map}: belongs to no inode and no extended attribute")]
    MapUnowned {
        /// The map.
        map: u64,
    },
    /// Two inodes or extended attributes own the same map.
    #[error("map {map}: belongs to inode {inode} and to inode {other}")]
    MapOwnedTwice {
        /// The map.
        map: u64,
        /// One owner, or the one that the attribute is of.
        inode: u64,
        /// The other.
        other: u64,
    },
    /// A field of an inode makes no sense.
    #[error("inode {inode}: {problem}")]
    Inode {
        /// Its number.
        inode: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// An inode's number of links is not the number of its names.
    #[error("inode {inode}: {nlink} links instead of {expected}")]
    LinkCount {
        /// Its number.
        inode: u64,
        /// Stored number.
        nlink: u32,
        /// Counted number.
        expected: u64,
    },
    /// A directory's size is not the number of its entries, or a symbolic link's not its target's length.
    #[error("inode {inode}: size {size} instead of {expected}")]
    Size {
        /// Its number.
        inode: u64,
        /// Stored size.
        size: u64,
        /// Counted size.
        expected: u64,
    },
    /// An inode's number of blocks is not that of its extents.
    #[error("inode {inode}: {blocks} blocks instead of {expected}")]
    Blocks {
        /// Its number.
        inode: u64,
        /// Stored number.
        blocks: u64,
        /// Counted number.
        expected: u64,
    },
    /// A directory names another parent than the one that has an entry for it.
    #[error("inode {inode}: parent {parent}, but its entry is in directory {expected}")]
    Parent {
        /// Its number.
        inode: u64,
        /// Stored parent.
        parent: u64,
        /// Directory with the entry.
        expected: u64,
    },
    /// There is no root directory although there are inodes.
    #[error("inode 1: there is no root directory")]
    NoRoot,
    /// An inode that no name leads to and that is no orphan.
    #[error("inode {inode}: no name leads to it")]
    Unreachable {
        /// Its number.
        inode: u64,
    },
    /// A directory that cannot be reached from the root: it is below itself, or below one that is.
    #[error("inode {inode}: a directory that is not connected to the root")]
    Disconnected {
        /// Its number.
        inode: u64,
    },
    /// A directory with more than one name.
    #[error("inode {inode}: a directory with {names} names")]
    DirectoryNames {
        /// Its number.
        inode: u64,
        /// Number of names.
        names: u64,
    },
    /// A directory entry is malformed or in the wrong place.
    #[error("directory {directory}, entry {offset:#x}: {problem}")]
    Entry {
        /// The directory.
        directory: u64,
        /// Offset in its key.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// A directory entry for an inode that does not exist.
    #[error("directory {directory}, entry {offset:#x}: names inode {inode}, which does not exist")]
    EntryDangling {
        /// The directory.
        directory: u64,
        /// Offset in its key.
        offset: u64,
        /// The inode.
        inode: u64,
    },
    /// A directory entry whose type is not that of its inode.
    #[error(
        "directory {directory}, entry {offset:#x}: type {file_type}, but inode {inode} is of type {expected}"
    )]
    EntryType {
        /// The directory.
        directory: u64,
        /// Offset in its key.
        offset: u64,
        /// The inode.
        inode: u64,
        /// `DT_*` of the entry.
        file_type: u8,
        /// `DT_*` of the inode.
        expected: u8,
    },
    /// The intent to finish a truncation that cannot be one.
    #[error("intent of inode {inode}: {problem}")]
    Intent {
        /// The inode.
        inode: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// An orphan item that should not be there.
    #[error("orphan {inode}: {problem}")]
    Orphan {
        /// The inode.
        inode: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// Checksums of file data are not those of the blocks that a map has.
    #[error("checksums of map {map} from block {file_block}: {problem}")]
    Checksums {
        /// The map.
        map: u64,
        /// The first file block of their group.
        file_block: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// An extended attribute is malformed or in the wrong place.
    #[error("extended attribute {offset:#x} of inode {inode}: {problem}")]
    Xattr {
        /// The inode.
        inode: u64,
        /// Offset in its key.
        offset: u64,
        /// What is wrong.
        problem: &'static str,
    },
}

/// Findings that a report keeps. A badly damaged image could have millions, which nobody reads.
pub(super) const FINDINGS_MAX: usize = 10_000;

/// Findings as they come, each with how it is repaired.
pub(super) struct Findings {
    pub(super) list: Vec<(Finding, Remedy)>,
    /// How many more there were.
    pub(super) left_out: u64,
    /// Changes that belong to remedies of the list.
    pub(super) more: Vec<Change>,
    max: usize,
}

impl Findings {
    /// No findings yet; a report's number of them is kept.
    pub(super) fn limited() -> Self {
        Self { list: Vec::new(), left_out: 0, more: Vec::new(), max: FINDINGS_MAX }
    }

    /// No findings yet; all are kept, since each is to be repaired.
    pub(super) fn unlimited() -> Self {
        Self { max: usize::MAX, ..Self::limited() }
    }

    pub(super) fn push(&mut self, finding: Finding, remedy: Remedy) {
        if self.list.len() < self.max {
            self.list.push((finding, remedy));
        } else {
            self.left_out += 1;
        }
    }

    /// Whether repairing all of it gives something up.
    pub(super) fn lose(&self) -> bool {
        self.list.iter().any(|(_, remedy)| remedy.loses)
    }

    /// Takes over what another list holds.
    pub(super) fn append(&mut self, other: Self) {
        self.left_out += other.left_out;
        self.more.extend(other.more);
        other.list.into_iter().for_each(|(finding, remedy)| self.push(finding, remedy));
    }

    /// More is to be changed for what was reported before.
    pub(super) fn also(&mut self, change: Change) {
        self.more.push(change);
    }

    /// The findings alone.
    pub(super) fn into_list(self) -> Vec<Finding> {
        self.list.into_iter().map(|(finding, _)| finding).collect()
    }
}
