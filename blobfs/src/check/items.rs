//! Items, one by one in key order, and what they add up to.
//!
//! What can be told from an item and those of the same owner is checked here; what the owners say about each
//! other is kept, small, for `links`.

use std::rc::Rc;

use hashbrown::HashMap;

use super::Counts;
use super::finding::{Finding, Findings};
use super::remedy::{Change, InodeEdit, NameRule, Remedy};
use super::usage::BlockSet;
use crate::fs::libc_mode::{S_IFDIR, S_IFLNK, S_IFMT, S_IFREG};
use crate::fs::{XATTR_SIZE_MAX, check_name, check_name_space, stays_in_item, xattr_flags};
use crate::ondisk::superblock::{COUNTER_MAX, Superblock};
use crate::ondisk::{
    DirentRef, ExtentFlags, ExtentItem, FILE_SIZE_MAX, InodeFlags, InodeItem, Key, Kind, SLOT_BITS,
    SUM_GROUP_BLOCKS, SumGroup, XattrRef, name_hash,
};
use crate::store::{Logged, in_data_area};
use crate::units::{BlockRange, InodeId, MapId};

/// `DT_DIR`.
pub(super) const DT_DIR: u8 = 4;

/// `DT_LNK`.
const DT_LNK: u8 = 10;

/// Nobody can tell any more whether the blocks hold what was written.
const SUMMED_ANEW: &str = "made of what the blocks hold";

/// Permission bits of a mode.
const PERMISSIONS: u32 = 0o7777;

/// The last slot of a hash.
pub(super) const SLOT_MAX: u64 = (1 << SLOT_BITS) - 1;

/// Name of the directory for what has no name any more, in the root.
pub(super) const LOST_AND_FOUND: &[u8] = b"lost+found";

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
    /// There is no item, but a repair makes one.
    pub(super) made_anew: bool,
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
    /// Not all names have that type.
    pub(super) types_differ: bool,
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

    /// What a repair does with a claim that another one contradicts.
    fn give_up(&self) -> Remedy {
        match *self {
            Self::Inode(inode, _) => {
                let edit = InodeEdit { map: Some(inode), ..InodeEdit::default() };
                Remedy::lossy("the second one lost its content").edit_inode(inode, edit)
            }
            Self::Xattr { inode, offset, .. } => {
                Remedy::delete(Key::xattr(InodeId(inode), offset), "the attribute was removed")
            }
        }
    }
}

/// A run of bytes of a file that is in the journal only, and the device byte where it belongs.
#[derive(Debug, Clone, Copy)]
pub(super) struct LoggedHome {
    pub(super) inode: InodeId,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) device: u64,
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

/// Blocks of one map that hold data, as far as checksums are kept of them.
#[derive(Default)]
struct WrittenBlocks {
    /// First file block, the same on the device, how many; in order.
    runs: Vec<(u64, u64, u64)>,
    /// Checksums of the groups in front of this block were seen, or are known to be missing.
    summed: u64,
}

impl WrittenBlocks {
    /// Adds blocks behind those that are there; others overlap, which is reported elsewhere.
    fn add(&mut self, start: u64, device: u64, count: u64) {
        match self.runs.last_mut() {
            Some((first, _, known)) if *first + *known > start => {}
            Some((first, at, known)) if *first + *known == start && *at + *known == device => *known += count,
            _ => self.runs.push((start, device, count)),
        }
    }

    /// Those in the group at `group`: the first one inside the group, the same on the device, how many.
    fn group(&self, group: u64) -> Vec<(usize, u64, u64)> {
        let from = self.runs.partition_point(|(start, _, count)| start + count <= group);
        let inside = self.runs[from..].iter().take_while(|(start, ..)| *start < group + SUM_GROUP_BLOCKS);
        let part = |(start, device, count): &(u64, u64, u64)| {
            let (first, end) = ((*start).max(group), (start + count).min(group + SUM_GROUP_BLOCKS));
            ((first - group) as usize, device + (first - start), end - first)
        };
        inside.map(part).collect()
    }

    /// The first group in front of `until` that has blocks and whose checksums were not seen.
    fn first_group(&self, until: u64) -> Option<u64> {
        let at = self.runs.partition_point(|(start, _, count)| start + count <= self.summed);
        let block = self.runs.get(at)?.0.max(self.summed);
        (block < until).then_some(block / SUM_GROUP_BLOCKS * SUM_GROUP_BLOCKS)
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
    written: WrittenBlocks,
}

/// What all items add up to.
pub(super) struct Census {
    superblock: Superblock,
    /// Blocks that the bitmaps call used.
    pub(super) recorded: BlockSet,
    /// Blocks that something uses.
    pub(super) used: BlockSet,
    /// Those that something else uses, too.
    pub(super) used_twice: BlockSet,
    /// Entries of the root that begin like the directory for what was lost.
    pub(super) lost_and_found: Vec<(Vec<u8>, u64)>,
    pub(super) inodes: HashMap<u64, InodeState>,
    /// Highest number of an inode or map.
    pub(super) highest: u64,
    pub(super) counts: Counts,
    /// File data that is in the journal only.
    logged: Rc<Logged>,
    /// Maps of the files that have some, and the files.
    logged_maps: HashMap<u64, InodeId>,
    /// The blocks that it belongs to.
    pub(super) homes: Vec<LoggedHome>,
    contents: HashMap<u64, Content>,
    claims: HashMap<u64, Claim>,
    owner: Owner,
    /// Whoever comes next may have lost items.
    after_gap: bool,
}

impl Census {
    /// No items yet.
    pub(super) fn new(superblock: &Superblock, logged: &Rc<Logged>) -> Self {
        Self {
            superblock: superblock.clone(),
            recorded: BlockSet::new(superblock),
            used: BlockSet::new(superblock),
            used_twice: BlockSet::new(superblock),
            lost_and_found: Vec::new(),
            inodes: HashMap::new(),
            highest: 0,
            counts: Counts::default(),
            logged: logged.clone(),
            logged_maps: HashMap::new(),
            homes: Vec::new(),
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
            Kind::Volume | Kind::RefCount | Kind::Quota => "a kind that this version does not have",
            _ if of_file_system != (key.owner == 0) => "the owner is wrong for this kind",
            _ if key.owner >= COUNTER_MAX => "the owner is a number that is never given away",
            Kind::Inode | Kind::Inline if key.offset != 0 => "the offset is not 0",
            _ => return self.known_item(key, value, findings),
        };
        let kind = format!("{:?}", key.kind);
        let finding = Finding::Item { owner: key.owner, kind, offset: key.offset, problem };
        findings.push(finding, Remedy::delete(*key, "removed"));
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
            Kind::Checksum => self.sums(key.offset, value, findings),
            Kind::Volume | Kind::RefCount | Kind::Quota => {}
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
        findings.push(
            Finding::Group { group, problem },
            Remedy::safe("counted anew").and_delete(Key::group(group)),
        );
    }

    fn orphan(&mut self, inode: u64, value: &[u8], findings: &mut Findings) {
        if !value.is_empty() {
            let remedy = Remedy::safe("emptied").put(Key::orphan(InodeId(inode)), Vec::new());
            findings.push(Finding::Orphan { inode, problem: "the item is not empty" }, remedy);
        }
        self.inodes.entry(inode).or_default().orphan = true;
        self.counts.orphans += 1;
    }

    fn intent(&mut self, inode: u64, value: &[u8], findings: &mut Findings) {
        if value.len() != 8 {
            let remedy = Remedy::delete(Key::intent(InodeId(inode)), "removed: the file keeps its blocks");
            findings.push(Finding::Intent { inode, problem: "has the wrong length" }, remedy);
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
            let key = Key::inode(InodeId(number));
            let remedy = match with_valid_times(value) {
                Some(item) => Remedy::safe("impossible times set to 0").put(key, item),
                None => Remedy::delete(key, "removed"),
            };
            return findings.push(Finding::Inode { inode: number, problem: "malformed" }, remedy);
        };
        state.item = Presence::Readable;
        state.file_type = file_type(item.mode);
        state.nlink = item.nlink;
        state.parent = item.parent.0;
        state.owns_map = item.map.0 == number;
        self.owner.inode = Some(item);
        // What belongs to an orphan is deleted with it.
        if item.nlink > 0 && self.logged.contains(InodeId(number)) {
            self.logged_maps.insert(item.map.0, InodeId(number));
        }
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
        let key = Key::dirent(InodeId(directory), offset);
        let mut found =
            |problem, remedy| findings.push(Finding::Entry { directory, offset, problem }, remedy);
        let removed = || Remedy::delete(key, "removed");
        let Some(entry) = DirentRef::decode(value) else { return found("malformed", removed()) };
        let (hash, expected) = (offset >> SLOT_BITS, name_hash(self.superblock.hash_key, entry.name));
        if check_name(entry.name).is_err() {
            found("a name that no entry can have", removed());
        } else if hash != expected {
            let moved = Key::dirent(InodeId(directory), moved_offset(expected));
            let remedy = Remedy::lossy("moved there").and_delete(key).insert(moved, value);
            found("the offset is not the hash of the name", remedy);
        }
        if !self.owner.names.add(hash, entry.name) {
            found("the name is there twice", removed());
        }
        if directory == InodeId::ROOT.0 && entry.name.starts_with(LOST_AND_FOUND) {
            self.lost_and_found.push((entry.name.to_vec(), entry.inode.0));
        }
        let state = self.inodes.entry(entry.inode.0).or_default();
        state.names += 1;
        if state.names == 1 {
            (state.named_in, state.named_at, state.named_type) = (directory, offset, entry.file_type);
        } else if state.named_type != entry.file_type {
            let finding = Finding::EntryType {
                directory,
                offset,
                inode: entry.inode.0,
                file_type: entry.file_type,
                expected: state.named_type,
            };
            state.types_differ = true;
            findings.push(finding, Remedy::safe("set to the type of the inode"));
        }
    }

    fn xattr(&mut self, offset: u64, value: &[u8], findings: &mut Findings) {
        let inode = self.owner.number;
        self.owner.xattrs += 1;
        self.counts.xattrs += 1;
        let key = Key::xattr(InodeId(inode), offset);
        let mut found = |problem, remedy| findings.push(Finding::Xattr { inode, offset, problem }, remedy);
        let Some(xattr) = XattrRef::decode(value) else {
            return found("malformed", Remedy::delete(key, "removed"));
        };
        let removed = || match xattr {
            XattrRef::Inline { .. } => Remedy::delete(key, "removed"),
            XattrRef::Stored { map, .. } => {
                Remedy::delete(key, "removed, with its value").with(Change::DropExtents(map.0))
            }
        };
        let (name, hash) = (xattr.name(), offset >> SLOT_BITS);
        let expected = name_hash(self.superblock.hash_key, name);
        if hash != expected {
            let moved = Key::xattr(InodeId(inode), moved_offset(expected));
            let remedy = Remedy::lossy("moved there").and_delete(key).insert(moved, value);
            found("the offset is not the hash of the name", remedy);
        }
        if !self.owner.xattr_names.add(hash, name) {
            found("the name is there twice", removed());
        }
        if check_name_space(name).is_err() {
            found("a name that no attribute can have", removed());
        }
        let len = match xattr {
            XattrRef::Inline { value, .. } => value.len(),
            XattrRef::Stored { size, .. } => size as usize,
        };
        let stored_map = match xattr {
            XattrRef::Inline { .. } => None,
            XattrRef::Stored { map, .. } => Some(map.0),
        };
        let no_map = stored_map.is_some_and(|map| !is_map(map));
        if len > XATTR_SIZE_MAX || no_map || stored_map.is_some() && (len == 0 || stays_in_item(name)) {
            found("a value that cannot be there", removed());
            if no_map {
                return;
            }
        }
        self.owner.xattr_flags |= xattr_flags(name);
        if let XattrRef::Stored { map, size, .. } = xattr {
            self.claim(map.0, Claim::Xattr { inode, offset, size }, findings);
        }
    }

    fn extent(&mut self, file_block: u64, value: &[u8], findings: &mut Findings) {
        let map = self.owner.number;
        self.counts.extents += 1;
        let key = Key::extent(MapId(map), file_block);
        let mut found = |problem, remedy| findings.push(Finding::Extent { map, file_block, problem }, remedy);
        let removed = || Remedy::delete(key, "removed: reads as zeros");
        let Some(item) = ExtentItem::decode(value) else { return found("malformed", removed()) };
        let device = item.device_range();
        let (start, count) = (device.start.0, u64::from(device.count));
        let content = &mut self.owner.content;
        let last_byte = file_block.checked_add(count - 1).and_then(|last| {
            last.checked_mul(u64::from(self.superblock.block_size)).filter(|byte| *byte <= FILE_SIZE_MAX)
        });
        if last_byte.is_none() {
            return found("lies behind the largest file", removed());
        }
        if file_block < content.end {
            found("overlaps the one before it", removed());
        }
        if !ExtentFlags::all().contains(item.flags) {
            let known = ExtentItem { flags: item.flags & ExtentFlags::all(), ..item };
            found("has unknown flags", Remedy::safe("cleared").put(key, known.encode().to_vec()));
        }
        content.end = content.end.max(file_block + count);
        content.blocks += count;
        content.special |= !item.flags.is_empty();
        self.counts.data_blocks += count;
        if !in_data_area(&self.superblock, start, count) {
            return found("lies outside the data area", removed());
        }
        if !item.flags.contains(ExtentFlags::UNWRITTEN) {
            if self.superblock.has_data_sums() {
                self.owner.written.add(file_block, start, count);
            }
            self.find_homes(map, file_block, &device);
        }
        for (start, end) in self.used.change(&self.superblock, start, count, true) {
            let remedy =
                Remedy::lossy("the extent got a copy of its own").with(Change::CopyExtent(key, item));
            findings.push(Finding::BlocksUsedTwice { map, file_block, start, end }, remedy);
            self.used_twice.change(&self.superblock, start, end - start, true);
        }
    }

    /// Compares the checksums of a group with the blocks of the owner, all of which were seen.
    fn sums(&mut self, file_block: u64, value: &[u8], findings: &mut Findings) {
        let map = self.owner.number;
        let key = Key::sums(MapId(map), file_block);
        let finding = |problem| Finding::Checksums { map, file_block, problem };
        let byte = file_block.checked_mul(u64::from(self.superblock.block_size));
        let misplaced = if !self.superblock.has_data_sums() {
            Some("on a file system without checksums")
        } else if !file_block.is_multiple_of(SUM_GROUP_BLOCKS) {
            Some("do not begin with a group")
        } else if byte.is_none_or(|byte| byte > FILE_SIZE_MAX) {
            Some("lie behind the end of the largest file")
        } else {
            None
        };
        if let Some(problem) = misplaced {
            return findings.push(finding(problem), Remedy::safe("removed").and_delete(key));
        }
        if self.owner.partial {
            return;
        }
        self.missing_sums(file_block, findings);
        self.owner.written.summed = file_block + SUM_GROUP_BLOCKS;
        let Some(SumGroup(mut sums)) = SumGroup::decode(value) else {
            return findings.push(finding("malformed"), Remedy::delete(key, "removed"));
        };
        let runs = self.owner.written.group(file_block);
        let is_written = |block: usize| {
            runs.iter().any(|(first, _, count)| (*first..first + *count as usize).contains(&block))
        };
        let extra = (0..sums.len()).filter(|block| sums[*block] != 0 && !is_written(*block)).count();
        if extra > 0 {
            (0..sums.len()).filter(|block| !is_written(*block)).for_each(|block| sums[block] = 0);
            let remedy = Remedy::safe("removed");
            let left = SumGroup(sums).encode();
            findings.push(
                finding("of blocks that hold no data"),
                match left.is_empty() {
                    true => remedy.and_delete(key),
                    false => remedy.put(key, left),
                },
            );
        }
        let lacking = runs.iter().flat_map(|(first, device, count)| {
            (0..*count).map(move |at| (first + at as usize, device + at, 1))
        });
        let lacking: Vec<_> = lacking.filter(|(block, ..)| sums[*block] == 0).collect();
        if !lacking.is_empty() {
            let change = Change::SumAnew { key, sums: Box::new(SumGroup(sums)), runs: lacking };
            findings.push(finding("some blocks have none"), Remedy::lossy(SUMMED_ANEW).with(change));
        }
    }

    /// Reports the groups in front of `until` that have no item although they have data.
    fn missing_sums(&mut self, until: u64, findings: &mut Findings) {
        while let Some(group) = self.owner.written.first_group(until) {
            let map = self.owner.number;
            let change = Change::SumAnew {
                key: Key::sums(MapId(map), group),
                sums: Box::new(SumGroup::EMPTY),
                runs: self.owner.written.group(group),
            };
            let finding = Finding::Checksums { map, file_block: group, problem: "are missing" };
            findings.push(finding, Remedy::lossy(SUMMED_ANEW).with(change));
            self.owner.written.summed = group + SUM_GROUP_BLOCKS;
        }
    }

    /// Notes where logged data of an extent belongs.
    fn find_homes(&mut self, map: u64, file_block: u64, device: &BlockRange) {
        let Some(inode) = self.logged_maps.get(&map) else { return };
        let block = u64::from(self.superblock.block_size);
        let first = file_block * block;
        let bytes = first..first + u64::from(device.count) * block;
        self.homes.extend(self.logged.parts(*inode, &bytes).map(|(offset, part)| LoggedHome {
            inode: *inode,
            offset,
            len: part.len() as u64,
            device: device.start.0 * block + (offset - first),
        }));
    }

    /// Files with a name that have logged data but too few blocks for it, with the bytes that have no place.
    pub(super) fn homeless(&self) -> Vec<(InodeId, u64)> {
        let mut missing: HashMap<InodeId, u64> = HashMap::new();
        for inode in self.logged_maps.values() {
            let all = self.logged.parts(*inode, &(0..u64::MAX)).map(|(_, bytes)| bytes.len() as u64).sum();
            missing.insert(*inode, all);
        }
        for home in &self.homes {
            missing.entry(home.inode).and_modify(|bytes| *bytes = bytes.saturating_sub(home.len));
        }
        let mut missing: Vec<_> = missing.into_iter().filter(|(_, bytes)| *bytes > 0).collect();
        missing.sort_unstable();
        missing
    }

    fn claim(&mut self, map: u64, claim: Claim, findings: &mut Findings) {
        self.highest = self.highest.max(map);
        let inode = claim.inode();
        if let Some(other) = self.claims.insert(map, claim) {
            let finding = Finding::MapOwnedTwice { map, inode: other.inode(), other: inode };
            findings.push(finding, claim.give_up());
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
        if !self.owner.partial {
            self.missing_sums(u64::MAX, findings);
        }
        match inode {
            Some(item) => {
                let orphan = self.inodes.get(&number).is_some_and(|state| state.orphan);
                if orphan && self.owner.entries > 0 && number != InodeId::ROOT.0 {
                    let edit = InodeEdit { nlink: Some(2), ..InodeEdit::default() };
                    let remedy = Remedy::lossy("no orphan any more").and_delete(Key::orphan(InodeId(number)));
                    let finding = Finding::Orphan { inode: number, problem: "is a directory with entries" };
                    findings.push(finding, remedy.edit_inode(number, edit));
                }
                self.check_fields(number, &item, content.end, findings);
                if !self.owner.partial {
                    self.check_size(number, &item, findings);
                }
                if item.map.0 != number && is_map(item.map.0) {
                    self.claim(item.map.0, Claim::Inode(number, item), findings);
                } else if !self.owner.partial {
                    let orphan = self.inodes[&number].orphan;
                    check_content(number, &item, content, orphan, findings);
                }
            }
            None if !self.owner.unreadable && !self.owner.partial => {
                let entries = self.owner.entries;
                let mut found = |problem| {
                    let remedy = match entries {
                        0 => made_anew(number, S_IFREG | 0o600, 1, &Content::default(), &self.superblock),
                        _ => made_directory(number, entries),
                    };
                    findings.push(Finding::Inode { inode: number, problem }, remedy);
                };
                if entries > 0 {
                    found("does not exist, but has directory entries");
                }
                if self.owner.xattrs > 0 {
                    found("does not exist, but has extended attributes");
                }
                if entries > 0 || self.owner.xattrs > 0 {
                    self.inodes.entry(number).or_default().made_anew = true;
                }
            }
            None => {}
        }
        if content != Content::default() && inode.is_none_or(|item| item.map.0 != number) {
            self.contents.insert(number, content);
        }
    }

    fn check_fields(&self, number: u64, item: &InodeItem, end: u64, findings: &mut Findings) {
        let is_directory = item.mode & S_IFMT == S_IFDIR;
        let entries = self.owner.entries > 0;
        let edit = InodeEdit::default();
        let directory = InodeEdit { mode: Some(S_IFDIR | item.mode & PERMISSIONS), ..edit };
        let file = InodeEdit { mode: Some(S_IFREG | item.mode & PERMISSIONS), ..edit };
        let as_it_is = InodeEdit { mode: Some(item.mode & 0o177_777), ..edit };
        let known_type = FILE_TYPES.contains(&file_type(item.mode));
        let kind = if known_type { as_it_is } else { file };
        let unknown = item.flags.bits() & !InodeFlags::all().bits();
        let size = end.saturating_mul(u64::from(self.superblock.block_size)).min(FILE_SIZE_MAX);
        // With each whether it is a guess, by which something may be given up.
        let checks = [
            (!known_type || item.mode > 0o177_777, "the mode is of no kind", kind, true),
            (unknown != 0, "has unknown flags", InodeEdit { flags_cleared: unknown, ..edit }, false),
            (
                item.size > FILE_SIZE_MAX,
                "the size is impossible",
                InodeEdit { size: Some(size), ..edit },
                true,
            ),
            (!is_map(item.map.0), "has no map", InodeEdit { map: Some(number), ..edit }, true),
            (
                item.parent_map.0 != 0,
                "has a parent map, which this version does not have",
                InodeEdit { parent_map: Some(0), ..edit },
                false,
            ),
            (
                item.project != 0,
                "has a project, which this version does not have",
                InodeEdit { no_project: true, ..edit },
                false,
            ),
            (
                !is_directory && item.parent.0 != 0,
                "has a parent, but is no directory",
                InodeEdit { parent: Some(0), ..edit },
                false,
            ),
            (!is_directory && entries, "has directory entries, but is no directory", directory, true),
            (
                !item.flags.contains(self.owner.xattr_flags),
                "the flags deny an extended attribute",
                InodeEdit { flags_set: self.owner.xattr_flags, ..edit },
                false,
            ),
        ];
        for (_, problem, edit, guess) in checks.into_iter().filter(|(wrong, ..)| *wrong) {
            let remedy = if guess { Remedy::lossy("set right") } else { Remedy::safe("set right") };
            findings.push(Finding::Inode { inode: number, problem }, remedy.edit_inode(number, edit));
        }
    }

    fn check_size(&self, number: u64, item: &InodeItem, findings: &mut Findings) {
        let expected = self.owner.entries;
        if item.mode & S_IFMT == S_IFDIR && item.size != expected {
            let edit = InodeEdit { size: Some(expected), ..InodeEdit::default() };
            let remedy = Remedy::inode(number, "set", edit);
            findings.push(Finding::Size { inode: number, size: item.size, expected }, remedy);
        }
    }

    /// Checks maps against who owns them, once all items were seen.
    pub(super) fn check_maps(&mut self, findings: &mut Findings) {
        let mut claims: Vec<(u64, Claim)> = self.claims.drain().collect();
        claims.sort_unstable_by_key(|(map, _)| *map);
        for (map, claim) in claims {
            if self.inodes.get(&map).is_some_and(|state| state.owns_map) {
                let finding = Finding::MapOwnedTwice { map, inode: map, other: claim.inode() };
                findings.push(finding, claim.give_up());
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
                        let key = Key::xattr(InodeId(inode), offset);
                        let remedy = Remedy::delete(key, "removed, with its value");
                        let remedy = remedy.with(Change::DropExtents(map));
                        findings.push(Finding::Xattr { inode, offset, problem }, remedy);
                    }
                }
            }
        }
        let mut unowned: Vec<(u64, Content)> = self.contents.drain().collect();
        unowned.sort_unstable_by_key(|(map, _)| *map);
        for (map, content) in unowned {
            let state = self.inodes.entry(map).or_default();
            // Whose inode cannot be read, that inode is reported.
            if state.item == Presence::Unreadable {
                continue;
            }
            let is_link = state.names > 0 && state.named_type == DT_LNK && content.inline.is_some();
            let mode = if is_link { S_IFLNK | 0o777 } else { S_IFREG | 0o600 };
            let remedy = match state.item {
                // Its own content is another map's; this one cannot become an inode.
                Presence::Readable => Remedy::lossy("removed")
                    .and_delete(Key::inline(MapId(map)))
                    .with(Change::DropExtents(map)),
                _ => made_anew(map, mode, state.names.max(1), &content, &self.superblock),
            };
            state.made_anew |= state.item == Presence::Missing;
            findings.push(Finding::MapUnowned { map }, remedy);
        }
    }
}

/// Whether a map can have that number.
fn is_map(number: u64) -> bool {
    (1..COUNTER_MAX).contains(&number)
}

/// Where an entry or attribute that lay in the wrong place goes: the slot that is given away last.
fn moved_offset(hash: u64) -> u64 {
    hash << SLOT_BITS | SLOT_MAX
}

/// An inode item whose impossible times are 0; `None` when something else is wrong with it.
fn with_valid_times(value: &[u8]) -> Option<Vec<u8>> {
    let mut item = value.to_vec();
    InodeItem::clear_impossible_times(&mut item);
    InodeItem::decode(&item).map(|_| item)
}

/// An inode that is made anew for content or attributes whose inode is lost.
fn made_anew(inode: u64, mode: u32, names: u64, content: &Content, superblock: &Superblock) -> Remedy {
    let size = content.end.saturating_mul(u64::from(superblock.block_size)).min(FILE_SIZE_MAX);
    let flags = match content.inline {
        Some(_) => InodeFlags::INLINE | InodeFlags::XATTRS,
        None => InodeFlags::XATTRS,
    };
    let item = InodeItem {
        nlink: u32::try_from(names).unwrap_or(u32::MAX),
        flags,
        size: content.inline.unwrap_or(size),
        blocks: content.blocks,
        ..InodeItem::empty(InodeId(inode), mode)
    };
    let key = Key::inode(InodeId(inode));
    Remedy::lossy("an inode was made for it, only root can read it").put(key, item.encode().to_vec())
}

/// A directory that is made anew for entries whose inode is lost.
fn made_directory(inode: u64, entries: u64) -> Remedy {
    let flags = InodeFlags::XATTRS;
    let item =
        InodeItem { nlink: 2, size: entries, flags, ..InodeItem::empty(InodeId(inode), S_IFDIR | 0o700) };
    let key = Key::inode(InodeId(inode));
    Remedy::lossy("a directory was made for them, only root can read it").put(key, item.encode().to_vec())
}

/// Checks an inode against the content of its map.
fn check_content(inode: u64, item: &InodeItem, content: Content, orphan: bool, findings: &mut Findings) {
    let kind = item.mode & S_IFMT;
    let inline = content.inline.is_some();
    let flag = item.flags.contains(InodeFlags::INLINE);
    let mut found = |problem, remedy| findings.push(Finding::Inode { inode, problem }, remedy);
    let set_flag = InodeEdit { flags_set: InodeFlags::INLINE, ..InodeEdit::default() };
    let clear_flag = InodeEdit { flags_cleared: InodeFlags::INLINE.bits(), ..InodeEdit::default() };
    let no_inline = || Remedy::delete(Key::inline(item.map), "removed").edit_inode(inode, clear_flag);
    if inline && !matches!(kind, S_IFREG | S_IFLNK) {
        found("has inline content, but is neither a file nor a symbolic link", no_inline());
    } else if inline && !flag && content.blocks > 0 {
        found("has inline content, but no flag for it", no_inline());
    } else if inline && !flag {
        let remedy = Remedy::inode(inode, "flag set", set_flag);
        found("has inline content, but no flag for it", remedy);
    } else if flag && !inline {
        let remedy = Remedy::lossy("flag cleared").edit_inode(inode, clear_flag);
        found("lacks its inline content", remedy);
    }
    if kind == S_IFLNK && !inline && !flag {
        let names = NameRule { drop: true, ..NameRule::default() };
        let remedy = Remedy::delete(Key::inode(InodeId(inode)), "removed, with its names");
        let remedy = remedy.with(Change::Names(inode, names));
        found("is a symbolic link without a target", remedy);
    }
    if content.blocks > 0 && (kind != S_IFREG || inline) {
        let remedy = match kind == S_IFREG && !flag {
            true => no_inline(),
            false => Remedy::lossy("extents removed").with(Change::DropExtents(item.map.0)),
        };
        found("has extents, but is no file or has inline content", remedy);
    }
    if let Some(expected) = content.inline
        && (kind == S_IFLNK && item.size != expected || item.size < expected)
    {
        let edit = InodeEdit { size: Some(expected), ..InodeEdit::default() };
        let remedy = Remedy::inode(inode, "set", edit);
        findings.push(Finding::Size { inode, size: item.size, expected }, remedy);
    }
    // What is being deleted loses its extents first.
    if item.blocks != content.blocks && !orphan {
        let edit = InodeEdit { blocks: Some(content.blocks), ..InodeEdit::default() };
        let remedy = Remedy::inode(inode, "set", edit);
        findings.push(Finding::Blocks { inode, blocks: item.blocks, expected: content.blocks }, remedy);
    }
}

fn file_type(mode: u32) -> u8 {
    ((mode & S_IFMT) >> 12) as u8
}
