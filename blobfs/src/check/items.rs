//! Items, one by one in key order, and what they add up to.
//!
//! What can be told from an item and those of the same owner is checked here; what the owners say about each
//! other is kept, small, for `links`.

use hashbrown::HashMap;

use super::Counts;
use super::finding::{Finding, Findings};
use super::usage::BlockSet;
use crate::fs::libc_mode::{S_IFDIR, S_IFLNK, S_IFMT, S_IFREG};
use crate::fs::{XATTR_SIZE_MAX, check_name, check_name_space, stays_in_item, xattr_flags};
use crate::ondisk::superblock::Superblock;
use crate::ondisk::{
    DirentRef, ExtentFlags, ExtentItem, FILE_SIZE_MAX, InodeFlags, InodeItem, Key, Kind, SLOT_BITS, XattrRef,
    name_hash,
};
use crate::store::in_data_area;

/// `DT_DIR`.
pub(super) const DT_DIR: u8 = 4;

/// `DT_*` of the kinds that an inode can be: FIFO, character device, directory, block device, regular file,
/// symbolic link, socket.
const FILE_TYPES: [u8; 7] = [1, 2, DT_DIR, 6, 8, 10, 12];

/// What is known of an inode number: by its own item, by the orphan item, by the names that lead to it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct InodeState {
    /// Whether there is an item, and whether it can be read.
    pub(super) item: Presence,
    pub(super) orphan: bool,
    /// A truncation is to be finished.
    pub(super) intent: bool,
    /// The map of the same number is its own.
    pub(super) owns_map: bool,
    /// `DT_*`.
    pub(super) file_type: u8,
    pub(super) nlink: u32,
    pub(super) parent: u64,
    /// Names that lead to it.
    pub(super) names: u64,
    /// One of these names: directory, offset, `DT_*`.
    pub(super) named_in: u64,
    pub(super) named_at: u64,
    pub(super) named_type: u8,
}

impl InodeState {
    pub(super) fn is_directory(&self) -> bool {
        self.file_type == DT_DIR
    }
}

/// Whether an inode has an item.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Presence {
    #[default]
    Missing,
    /// There is one, but nothing can be said about the inode.
    Unreadable,
    Readable,
}

/// What hangs on a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Content {
    /// Length of inline content.
    inline: Option<u64>,
    /// Blocks of all extents.
    blocks: u64,
    /// Some of them read as zeros or may be shared.
    special: bool,
    /// File block behind the last extent.
    end: u64,
}

/// Who a map belongs to that is not the map of its own number.
#[derive(Debug, Clone, Copy)]
pub(super) enum Claim {
    Inode(u64, InodeItem),
    Xattr { inode: u64, offset: u64, size: u32 },
}

impl Claim {
    fn inode(&self) -> u64 {
        match self {
            Self::Inode(inode, _) | Self::Xattr { inode, .. } => *inode,
        }
    }
}

/// Names of one hash, to find those that are there twice.
#[derive(Default)]
struct Bucket {
    hash: u64,
    names: Vec<Vec<u8>>,
}

impl Bucket {
    /// Adds a name; false when it was there.
    fn add(&mut self, hash: u64, name: &[u8]) -> bool {
        if self.hash != hash {
            self.hash = hash;
            self.names.clear();
        }
        let is_new = self.names.iter().all(|known| known != name);
        self.names.push(name.to_vec());
        is_new
    }
}

/// The owner whose items are being seen.
#[derive(Default)]
struct Owner {
    number: u64,
    /// Some of its items may be unknown.
    partial: bool,
    inode: Option<InodeItem>,
    unreadable: bool,
    entries: u64,
    names: Bucket,
    xattrs: u64,
    xattr_flags: InodeFlags,
    xattr_names: Bucket,
    content: Content,
}

/// What all items add up to.
pub(super) struct Census<'a> {
    pub(super) superblock: &'a Superblock,
    /// Blocks that the bitmaps call used.
    pub(super) recorded: BlockSet,
    /// Blocks that something uses.
    pub(super) used: BlockSet,
    pub(super) inodes: HashMap<u64, InodeState>,
    /// Highest number of an inode or map.
    pub(super) highest: u64,
    pub(super) counts: Counts,
    contents: HashMap<u64, Content>,
    claims: HashMap<u64, Claim>,
    owner: Owner,
    /// Whoever comes next may have lost items.
    after_gap: bool,
}

impl<'a> Census<'a> {
    /// No items yet.
    pub(super) fn new(superblock: &'a Superblock) -> Self {
        Self {
            superblock,
            recorded: BlockSet::new(superblock),
            used: BlockSet::new(superblock),
            inodes: HashMap::new(),
            highest: 0,
            counts: Counts::default(),
            contents: HashMap::new(),
            claims: HashMap::new(),
            owner: Owner::default(),
            after_gap: false,
        }
    }

    /// The next item.
    pub(super) fn item(&mut self, key: &Key, value: &[u8], findings: &mut Findings) {
        if key.owner != self.owner.number || self.after_gap {
            self.end_owner(findings);
            let partial = std::mem::take(&mut self.after_gap);
            self.owner = Owner { number: key.owner, partial, ..Owner::default() };
        }
        let of_file_system = matches!(key.kind, Kind::Group | Kind::Orphan | Kind::Intent);
        let problem = match key.kind {
            Kind::Volume | Kind::RefCount | Kind::Quota | Kind::Checksum => {
                "a kind that this version does not have"
            }
            _ if of_file_system != (key.owner == 0) => "the owner is wrong for this kind",
            Kind::Inode | Kind::Inline if key.offset != 0 => "the offset is not 0",
            _ => return self.known_item(key, value, findings),
        };
        let kind = format!("{:?}", key.kind);
        findings.push(Finding::Item { owner: key.owner, kind, offset: key.offset, problem });
    }

    /// Items between the last one and the next one are unknown.
    pub(super) fn gap(&mut self, findings: &mut Findings) {
        self.owner.partial = true;
        self.end_owner(findings);
        self.owner = Owner::default();
        self.after_gap = true;
    }

    /// There are no more items.
    pub(super) fn end(&mut self, findings: &mut Findings) {
        self.end_owner(findings);
        self.owner = Owner::default();
    }

    fn known_item(&mut self, key: &Key, value: &[u8], findings: &mut Findings) {
        self.highest = self.highest.max(key.owner);
        match key.kind {
            Kind::Group => self.group(key.offset, value, findings),
            Kind::Orphan => self.orphan(key.offset, value, findings),
            Kind::Intent => self.intent(key.offset, value, findings),
            Kind::Inode => self.inode(value, findings),
            Kind::Inline => self.owner.content.inline = Some(value.len() as u64),
            Kind::Dirent => self.entry(key.offset, value, findings),
            Kind::Xattr => self.xattr(key.offset, value, findings),
            Kind::Extent => self.extent(key.offset, value, findings),
            Kind::Volume | Kind::RefCount | Kind::Quota | Kind::Checksum => {}
        }
    }

    fn group(&mut self, group: u64, bits: &[u8], findings: &mut Findings) {
        let per_group = u64::from(self.superblock.group_blocks);
        let problem = if group >= self.superblock.block_count.div_ceil(per_group) {
            "lies behind the end of the device"
        } else if bits.len() as u64 != per_group / 8 {
            "has the wrong length"
        } else {
            return self.recorded.set_group(group, bits);
        };
        findings.push(Finding::Group { group, problem });
    }

    fn orphan(&mut self, inode: u64, value: &[u8], findings: &mut Findings) {
        if !value.is_empty() {
            findings.push(Finding::Orphan { inode, problem: "the item is not empty" });
        }
        self.inodes.entry(inode).or_default().orphan = true;
        self.counts.orphans += 1;
    }

    fn intent(&mut self, inode: u64, value: &[u8], findings: &mut Findings) {
        if value.len() != 8 {
            findings.push(Finding::Intent { inode, problem: "has the wrong length" });
        }
        self.inodes.entry(inode).or_default().intent = true;
    }

    fn inode(&mut self, value: &[u8], findings: &mut Findings) {
        let number = self.owner.number;
        self.counts.inodes += 1;
        let state = self.inodes.entry(number).or_default();
        let Some(item) = InodeItem::decode(value) else {
            state.item = Presence::Unreadable;
            self.owner.unreadable = true;
            findings.push(Finding::Inode { inode: number, problem: "malformed" });
            return;
        };
        state.item = Presence::Readable;
        state.file_type = file_type(item.mode);
        state.nlink = item.nlink;
        state.parent = item.parent.0;
        state.owns_map = item.map.0 == number;
        self.owner.inode = Some(item);
        match item.mode & S_IFMT {
            S_IFDIR => self.counts.directories += 1,
            S_IFREG => self.counts.files += 1,
            S_IFLNK => self.counts.symlinks += 1,
            _ => self.counts.special_files += 1,
        }
    }

    fn entry(&mut self, offset: u64, value: &[u8], findings: &mut Findings) {
        let directory = self.owner.number;
        self.owner.entries += 1;
        self.counts.entries += 1;
        let mut found = |problem| findings.push(Finding::Entry { directory, offset, problem });
        let Some(entry) = DirentRef::decode(value) else { return found("malformed") };
        let hash = offset >> SLOT_BITS;
        if check_name(entry.name).is_err() {
            found("a name that no entry can have");
        }
        if hash != name_hash(self.superblock.hash_key, entry.name) {
            found("the offset is not the hash of the name");
        }
        if !self.owner.names.add(hash, entry.name) {
            found("the name is there twice");
        }
        let state = self.inodes.entry(entry.inode.0).or_default();
        state.names += 1;
        if state.names == 1 {
            (state.named_in, state.named_at, state.named_type) = (directory, offset, entry.file_type);
        } else if state.named_type != entry.file_type {
            findings.push(Finding::EntryType {
                directory,
                offset,
                inode: entry.inode.0,
                file_type: entry.file_type,
                expected: state.named_type,
            });
        }
    }

    fn xattr(&mut self, offset: u64, value: &[u8], findings: &mut Findings) {
        let inode = self.owner.number;
        self.owner.xattrs += 1;
        self.counts.xattrs += 1;
        let mut found = |problem| findings.push(Finding::Xattr { inode, offset, problem });
        let Some(xattr) = XattrRef::decode(value) else { return found("malformed") };
        let (name, hash) = (xattr.name(), offset >> SLOT_BITS);
        if hash != name_hash(self.superblock.hash_key, name) {
            found("the offset is not the hash of the name");
        }
        if !self.owner.xattr_names.add(hash, name) {
            found("the name is there twice");
        }
        if check_name_space(name).is_err() {
            found("a name that no attribute can have");
        }
        let len = match xattr {
            XattrRef::Inline { value, .. } => value.len(),
            XattrRef::Stored { size, .. } => size as usize,
        };
        let stored = matches!(xattr, XattrRef::Stored { .. });
        if len > XATTR_SIZE_MAX || stored && (len == 0 || stays_in_item(name)) {
            found("a value that cannot be there");
        }
        self.owner.xattr_flags |= xattr_flags(name);
        if let XattrRef::Stored { map, size, .. } = xattr {
            self.claim(map.0, Claim::Xattr { inode, offset, size }, findings);
        }
    }

    fn extent(&mut self, file_block: u64, value: &[u8], findings: &mut Findings) {
        let map = self.owner.number;
        self.counts.extents += 1;
        let mut found = |problem| findings.push(Finding::Extent { map, file_block, problem });
        let Some(item) = ExtentItem::decode(value) else { return found("malformed") };
        let device = item.device_range();
        let (start, count) = (device.start.0, u64::from(device.count));
        let content = &mut self.owner.content;
        let last_byte = file_block.checked_add(count - 1).and_then(|last| {
            last.checked_mul(u64::from(self.superblock.block_size)).filter(|byte| *byte <= FILE_SIZE_MAX)
        });
        if last_byte.is_none() {
            return found("lies behind the largest file");
        }
        if file_block < content.end {
            found("overlaps the one before it");
        }
        if !ExtentFlags::all().contains(item.flags) {
            found("has unknown flags");
        }
        content.end = content.end.max(file_block + count);
        content.blocks += count;
        content.special |= !item.flags.is_empty();
        self.counts.data_blocks += count;
        if !in_data_area(self.superblock, start, count) {
            return found("lies outside the data area");
        }
        for (start, end) in self.used.change(self.superblock, start, count, true) {
            findings.push(Finding::BlocksUsedTwice { map, file_block, start, end });
        }
    }

    fn claim(&mut self, map: u64, claim: Claim, findings: &mut Findings) {
        self.highest = self.highest.max(map);
        let inode = claim.inode();
        if let Some(other) = self.claims.insert(map, claim) {
            findings.push(Finding::MapOwnedTwice { map, inode: other.inode(), other: inode });
        }
    }

    /// Checks what an owner's items say about each other.
    fn end_owner(&mut self, findings: &mut Findings) {
        let number = self.owner.number;
        let content = std::mem::take(&mut self.owner.content);
        let inode = self.owner.inode.take();
        if number == 0 {
            return;
        }
        match inode {
            Some(item) => {
                self.check_fields(number, &item, findings);
                if !self.owner.partial {
                    self.check_size(number, &item, findings);
                }
                if item.map.0 != number {
                    self.claim(item.map.0, Claim::Inode(number, item), findings);
                } else if !self.owner.partial {
                    let orphan = self.inodes[&number].orphan;
                    check_content(number, &item, content, orphan, findings);
                }
            }
            None if !self.owner.unreadable && !self.owner.partial => {
                let mut found = |problem| findings.push(Finding::Inode { inode: number, problem });
                if self.owner.entries > 0 {
                    found("does not exist, but has directory entries");
                }
                if self.owner.xattrs > 0 {
                    found("does not exist, but has extended attributes");
                }
            }
            None => {}
        }
        if content != Content::default() && inode.is_none_or(|item| item.map.0 != number) {
            self.contents.insert(number, content);
        }
    }

    fn check_fields(&self, number: u64, item: &InodeItem, findings: &mut Findings) {
        let is_directory = item.mode & S_IFMT == S_IFDIR;
        let checks = [
            (!FILE_TYPES.contains(&file_type(item.mode)) || item.mode > 0o177_777, "the mode is of no kind"),
            (!InodeFlags::all().contains(item.flags), "has unknown flags"),
            (item.size > FILE_SIZE_MAX, "the size is impossible"),
            (item.map.0 == 0, "has no map"),
            (item.parent_map.0 != 0, "has a parent map, which this version does not have"),
            (!is_directory && item.parent.0 != 0, "has a parent, but is no directory"),
            (!is_directory && self.owner.entries > 0, "has directory entries, but is no directory"),
            (!item.flags.contains(self.owner.xattr_flags), "the flags deny an extended attribute"),
        ];
        for (_, problem) in checks.into_iter().filter(|(wrong, _)| *wrong) {
            findings.push(Finding::Inode { inode: number, problem });
        }
    }

    fn check_size(&self, number: u64, item: &InodeItem, findings: &mut Findings) {
        let expected = self.owner.entries;
        if item.mode & S_IFMT == S_IFDIR && item.size != expected {
            findings.push(Finding::Size { inode: number, size: item.size, expected });
        }
    }

    /// Checks maps against who owns them, once all items were seen.
    pub(super) fn check_maps(&mut self, findings: &mut Findings) {
        let mut claims: Vec<(u64, Claim)> = self.claims.drain().collect();
        claims.sort_unstable_by_key(|(map, _)| *map);
        for (map, claim) in claims {
            if self.inodes.get(&map).is_some_and(|state| state.owns_map) {
                findings.push(Finding::MapOwnedTwice { map, inode: map, other: claim.inode() });
                continue;
            }
            let content = self.contents.remove(&map).unwrap_or_default();
            match claim {
                Claim::Inode(number, item) => {
                    let orphan = self.inodes[&number].orphan;
                    check_content(number, &item, content, orphan, findings);
                }
                Claim::Xattr { inode, offset, size } => {
                    let blocks = u64::from(size).div_ceil(u64::from(self.superblock.block_size));
                    if content != (Content { blocks, end: blocks, ..Content::default() }) {
                        let problem = "its map does not hold a value of its size";
                        findings.push(Finding::Xattr { inode, offset, problem });
                    }
                }
            }
        }
        let mut unowned: Vec<u64> = self.contents.drain().map(|(map, _)| map).collect();
        unowned.sort_unstable();
        unowned.retain(|map| {
            // Whose inode cannot be read, that inode is reported.
            self.inodes.get(map).is_none_or(|state| state.item != Presence::Unreadable)
        });
        unowned.into_iter().for_each(|map| findings.push(Finding::MapUnowned { map }));
    }
}

/// Checks an inode against the content of its map.
fn check_content(inode: u64, item: &InodeItem, content: Content, orphan: bool, findings: &mut Findings) {
    let kind = item.mode & S_IFMT;
    let mut found = |problem| findings.push(Finding::Inode { inode, problem });
    let inline = content.inline.is_some();
    if inline != item.flags.contains(InodeFlags::INLINE) {
        found(if inline { "has inline content, but no flag for it" } else { "lacks its inline content" });
    }
    if inline && !matches!(kind, S_IFREG | S_IFLNK) {
        found("has inline content, but is neither a file nor a symbolic link");
    }
    if kind == S_IFLNK && !inline && !item.flags.contains(InodeFlags::INLINE) {
        found("is a symbolic link without a target");
    }
    if content.blocks > 0 && (kind != S_IFREG || inline) {
        found("has extents, but is no file or has inline content");
    }
    if let Some(expected) = content.inline
        && (kind == S_IFLNK && item.size != expected || item.size < expected)
    {
        findings.push(Finding::Size { inode, size: item.size, expected });
    }
    // What is being deleted loses its extents first.
    if item.blocks != content.blocks && !orphan {
        findings.push(Finding::Blocks { inode, blocks: item.blocks, expected: content.blocks });
    }
}

fn file_type(mode: u32) -> u8 {
    ((mode & S_IFMT) >> 12) as u8
}
