//! Scrub: a check that also reads the data of every file.
//!
//! A check reads all metadata and proves that it fits together; data is only named by it. A scrub then reads
//! every block that an extent maps, in the order in which they lie on the device, compares it with its checksum if the
//! file system has such, and says which file and offset each bad one belongs to. Blocks that are allocated but were
//! never written are not read: nobody would see what they hold.
//!
//! Nothing is written. Whoever is told early can restore the file, or have the disk replaced, while a good
//! copy exists elsewhere.

use std::rc::Rc;

use bdev::{AlignedBuf, Bdev, BdevError};
use hashbrown::{HashMap, HashSet};
use reactor::sync::join_all;
use serde::Serialize;

use super::edits::Edits;
use super::finding::{FINDINGS_MAX, Findings};
use super::items::InodeState;
use super::superblocks::{self, Choice};
use super::survey::Subject;
use super::{Progress, Report};
use crate::ondisk::superblock::Superblock;
use crate::ondisk::{
    DirentRef, ExtentFlags, ExtentItem, FILE_SIZE_MAX, InodeItem, Key, Kind, SUM_GROUP_BLOCKS, SumGroup,
    XattrRef, block_sum,
};
use crate::store::{OpenError, check_features, in_data_area, read};
use crate::units::InodeId;

/// Bytes that are read at a time, if the device takes so many.
const READ_LEN: u64 = 1 << 20;

/// Reads that are under way at the same time: enough to keep a disk busy.
const READS_AT_A_TIME: usize = 8;

/// What is in memory at the same time beside the list of extents. The tree is walked once for so much, to collect the
/// checksums. Picked: few walks, and about 200 MiB at most.
const BATCH_MAX: BatchMax = BatchMax { blocks: 16 << 20, parts: 4 << 20 };

/// Bounds of a [`Batch`]; the last part may go beyond the first one.
#[derive(Debug, Clone, Copy)]
struct BatchMax {
    /// Blocks, each with a checksum of four bytes.
    blocks: u64,
    /// Parts, of which an extent of one block is one: 36 bytes each.
    parts: usize,
}

/// How far a scrub has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrubProgress {
    /// It reads metadata.
    Metadata(Progress),
    /// It reads data.
    Data {
        /// Bytes read.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
}

/// Data that the device does not give, or not as it was written: nobody can read it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unreadable {
    /// The inode.
    pub inode: u64,
    /// One of its names, from the root on; nothing if it has none.
    pub path: Option<String>,
    /// It is the value of an extended attribute, not the file's content.
    pub xattr: bool,
    /// Where in the file or value, in bytes.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// First block on the device.
    pub block: u64,
    /// What the device says, or how the checksums differ.
    pub error: String,
}

/// What a scrub found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct ScrubReport {
    /// What the check of the metadata found.
    pub check: Report,
    /// Data that cannot be read, in the order in which it lies on the device.
    pub unreadable: Vec<Unreadable>,
    /// Runs of unreadable blocks beyond those that are kept.
    pub unreadable_left_out: u64,
    /// Bytes of data that were read.
    pub data_bytes: u64,
}

impl ScrubReport {
    /// Whether everything is there and right.
    pub fn is_clean(&self) -> bool {
        self.check.is_clean() && self.unreadable.is_empty()
    }
}

/// Checks a file system and reads all of its data.
///
/// # Errors
/// As [`super::check`].
pub async fn scrub(
    bdev: &Rc<dyn Bdev>,
    progress: &mut dyn FnMut(ScrubProgress),
) -> Result<ScrubReport, OpenError> {
    let mut findings = Findings::limited();
    let superblock = match superblocks::choose(bdev, &mut findings).await? {
        Choice::Usable { superblock, .. } => superblock,
        Choice::Neither => {
            let check = Report { findings: findings.into_list(), ..Report::default() };
            return Ok(ScrubReport { check, ..ScrubReport::default() });
        }
    };
    check_features(&superblock, bdev, true)?;
    let mut subject = Subject::read(bdev, superblock, &mut findings).await;
    let mut inodes = HashMap::new();
    let mut metadata = |done| progress(ScrubProgress::Metadata(done));
    let check = subject.check(findings, &mut inodes, &mut metadata).await;
    let extents = Extent::all(&mut subject).await;
    let mut reader = Reader::new(bdev, &subject.superblock, &extents);
    for mut batch in Batch::all(&extents, reader.part_blocks, BATCH_MAX) {
        batch.load_sums(&mut subject).await;
        reader.read(&batch, progress).await;
    }
    let bad = std::mem::take(&mut reader.bad);
    Ok(ScrubReport {
        check,
        data_bytes: reader.done,
        unreadable_left_out: reader.left_out,
        unreadable: name(&mut subject, &inodes, bad).await,
    })
}

/// Blocks of a file that are to be read.
#[derive(Debug, Clone, Copy)]
struct Extent {
    start: u64,
    count: u64,
    map: u64,
    file_block: u64,
}

impl Extent {
    /// All extents that hold data, in the order in which they lie on the device. Those that cannot be, which the check
    /// has found, are left out: no file reaches beyond [`FILE_SIZE_MAX`], and no data beyond the device.
    async fn all(subject: &mut Subject<'_>) -> Vec<Self> {
        let superblock = subject.superblock.clone();
        let file_end = FILE_SIZE_MAX.div_ceil(u64::from(superblock.block_size));
        let mut extents = Vec::new();
        let each = &mut |key: &Key, value: &[u8]| {
            if key.kind != Kind::Extent {
                return;
            }
            let Some(item) = ExtentItem::decode(value) else { return };
            let range = item.device_range();
            let (start, count) = (range.start.0, u64::from(range.count));
            let in_file = key.offset.checked_add(count).is_some_and(|end| end <= file_end);
            let written = !item.flags.contains(ExtentFlags::UNWRITTEN);
            if in_file && written && in_data_area(&superblock, start, count) {
                extents.push(Self { start, count, map: key.owner, file_block: key.offset });
            }
        };
        subject.each_item(&Edits::default(), each).await;
        extents.sort_unstable_by_key(|extent| extent.start);
        Self::clip(&mut extents);
        extents
    }

    /// Leaves every block to one extent: those of a damaged image may have blocks in common.
    fn clip(extents: &mut Vec<Self>) {
        let mut end = 0_u64;
        for extent in extents.iter_mut() {
            let before = end.saturating_sub(extent.start).min(extent.count);
            extent.start += before;
            extent.file_block += before;
            extent.count -= before;
            end = end.max(extent.start + extent.count);
        }
        extents.retain(|extent| extent.count > 0);
    }
}

/// Blocks of an extent that are read at once.
#[derive(Debug, Clone, Copy)]
struct Part {
    start: u64,
    map: u64,
    file_block: u64,
    count: u32,
    /// Where its checksums begin in [`Batch::sums`].
    sums_at: u32,
}

impl Part {
    /// Its place in the order in which the tree has the checksums.
    fn file_place(&self) -> (u64, u64) {
        (self.map, self.file_block)
    }

    fn file_end(&self) -> u64 {
        self.file_block + u64::from(self.count)
    }
}

/// Parts that are read between two walks of the tree, in the order in which they lie on the device, with their
/// checksums.
struct Batch {
    parts: Vec<Part>,
    blocks: u64,
    /// Indices of the parts in the order of [`Part::file_place`].
    by_file: Vec<u32>,
    /// 0 for blocks that have none; nothing at all on a file system without.
    sums: Vec<u32>,
}

impl Batch {
    /// All extents in parts of at most `part_blocks`.
    fn all(extents: &[Extent], part_blocks: u32, max: BatchMax) -> impl Iterator<Item = Self> {
        let step = u64::from(part_blocks);
        let mut parts = extents.iter().flat_map(move |extent| {
            (0..extent.count.div_ceil(step)).map(move |number| Part {
                start: extent.start + number * step,
                map: extent.map,
                file_block: extent.file_block + number * step,
                count: step.min(extent.count - number * step) as u32,
                sums_at: 0,
            })
        });
        std::iter::from_fn(move || {
            let mut batch = Self { parts: Vec::new(), blocks: 0, by_file: Vec::new(), sums: Vec::new() };
            while batch.blocks < max.blocks
                && batch.parts.len() < max.parts
                && let Some(part) = parts.next()
            {
                batch.parts.push(Part { sums_at: batch.blocks as u32, ..part });
                batch.blocks += u64::from(part.count);
            }
            (!batch.parts.is_empty()).then_some(batch)
        })
    }

    async fn load_sums(&mut self, subject: &mut Subject<'_>) {
        if !subject.superblock.has_data_sums() {
            return;
        }
        self.expect_sums();
        let each = &mut |key: &Key, value: &[u8]| {
            if key.kind == Kind::Checksum
                && let Some(group) = SumGroup::decode(value)
            {
                self.add_group(key.owner, key.offset, &group);
            }
        };
        subject.each_item(&Edits::default(), each).await;
    }

    fn expect_sums(&mut self) {
        self.sums = vec![0; self.blocks as usize];
        self.by_file = (0..self.parts.len() as u32).collect();
        self.by_file.sort_unstable_by_key(|index| self.parts[*index as usize].file_place());
    }

    fn add_group(&mut self, map: u64, group: u64, SumGroup(known): &SumGroup) {
        let end = group.saturating_add(SUM_GROUP_BLOCKS);
        let part = |index: &u32| &self.parts[*index as usize];
        let before_end = self.by_file.partition_point(|index| part(index).file_place() < (map, end));
        let touched = self.by_file[..before_end].iter().rev().map(part);
        for part in touched.take_while(|part| part.map == map && part.file_end() > group) {
            for block in group.max(part.file_block)..end.min(part.file_end()) {
                let at = u64::from(part.sums_at) + (block - part.file_block);
                self.sums[at as usize] = known[(block - group) as usize];
            }
        }
    }

    fn sums_of(&self, part: &Part) -> &[u32] {
        let at = part.sums_at as usize;
        self.sums.get(at..at + part.count as usize).unwrap_or_default()
    }
}

/// Why a block is bad.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Bad {
    #[error(transparent)]
    Device(#[from] BdevError),
    #[error("has no checksum")]
    NoSum,
    #[error("checksum {found:#010x} instead of {expected:#010x}")]
    Sum { expected: u32, found: u32 },
}

/// A run of blocks of one extent that are bad for the same kind of reason.
struct BadRun {
    map: u64,
    file_block: u64,
    block: u64,
    count: u64,
    /// That of the first one.
    error: Bad,
}

/// Reads extents.
struct Reader<'a> {
    bdev: &'a Rc<dyn Bdev>,
    block_size: u64,
    part_blocks: u32,
    total: u64,
    done: u64,
    bad: Vec<BadRun>,
    left_out: u64,
}

impl<'a> Reader<'a> {
    fn new(bdev: &'a Rc<dyn Bdev>, superblock: &Superblock, extents: &[Extent]) -> Self {
        let block_size = u64::from(superblock.block_size);
        let part = READ_LEN.min(bdev.limits().max_transfer as u64);
        Self {
            bdev,
            block_size,
            part_blocks: (part / block_size).max(1) as u32,
            total: extents.iter().map(|extent| extent.count * block_size).sum(),
            done: 0,
            bad: Vec::new(),
            left_out: 0,
        }
    }

    async fn read(&mut self, batch: &Batch, progress: &mut dyn FnMut(ScrubProgress)) {
        for parts in batch.parts.chunks(READS_AT_A_TIME) {
            let reads = parts.iter().map(|part| self.blocks(part.start, u64::from(part.count)));
            let results = join_all(reads).await;
            for (part, result) in parts.iter().zip(results) {
                let sums = batch.sums_of(part);
                let checked = result.map_err(Bad::from).and_then(|bytes| self.compare(&bytes, sums));
                if checked.is_err() {
                    self.find_bad_blocks(part, sums).await;
                }
                self.done += u64::from(part.count) * self.block_size;
            }
            progress(ScrubProgress::Data { done: self.done, total: self.total });
        }
    }

    async fn blocks(&self, start: u64, count: u64) -> Result<Rc<AlignedBuf>, BdevError> {
        let (offset, len) = (start * self.block_size, count * self.block_size);
        read(self.bdev, offset, len as usize).await
    }

    /// Compares blocks with their checksums, if there are such.
    fn compare(&self, bytes: &[u8], sums: &[u32]) -> Result<(), Bad> {
        for (block, expected) in bytes.chunks(self.block_size as usize).zip(sums) {
            match (block_sum(block), *expected) {
                (_, 0) => return Err(Bad::NoSum),
                (found, expected) if found != expected => return Err(Bad::Sum { expected, found }),
                _ => {}
            }
        }
        Ok(())
    }

    /// Reads a part block by block.
    async fn find_bad_blocks(&mut self, part: &Part, sums: &[u32]) {
        for number in 0..u64::from(part.count) {
            let block = part.start + number;
            let sum = sums.get(number as usize..).unwrap_or_default();
            let read = self.blocks(block, 1).await;
            if let Err(error) = read.map_err(Bad::from).and_then(|bytes| self.compare(&bytes, sum)) {
                self.add_bad(part.map, part.file_block + number, block, error);
            }
        }
    }

    fn add_bad(&mut self, map: u64, file_block: u64, block: u64, error: Bad) {
        let full = self.bad.len() >= FINDINGS_MAX;
        let last = self.bad.last_mut().filter(|run| {
            run.map == map
                && run.block + run.count == block
                && run.file_block + run.count == file_block
                && std::mem::discriminant(&run.error) == std::mem::discriminant(&error)
        });
        match last {
            Some(run) => run.count += 1,
            None if full => self.left_out += 1,
            None => self.bad.push(BadRun { map, file_block, block, count: 1, error }),
        }
    }
}

/// Finds out which files runs belong to.
async fn name(
    subject: &mut Subject<'_>,
    inodes: &HashMap<u64, InodeState>,
    bad: Vec<BadRun>,
) -> Vec<Unreadable> {
    if bad.is_empty() {
        return Vec::new();
    }
    let owners = owners(subject, bad.iter().map(|run| run.map).collect()).await;
    let owner = |map: u64| owners.get(&map).copied().unwrap_or((map, false));
    let names = Names::of(subject, inodes, bad.iter().map(|run| owner(run.map).0)).await;
    let block_size = u64::from(subject.superblock.block_size);
    let describe = |run: BadRun| {
        let (inode, xattr) = owner(run.map);
        Unreadable {
            inode,
            path: names.path(inode),
            xattr,
            offset: run.file_block * block_size,
            len: run.count * block_size,
            block: run.block,
            error: run.error.to_string(),
        }
    };
    bad.into_iter().map(describe).collect()
}

/// Whose maps these are, as far as that is not the inode of the same number; true for an attribute's.
async fn owners(subject: &mut Subject<'_>, maps: HashSet<u64>) -> HashMap<u64, (u64, bool)> {
    let mut owners = HashMap::new();
    let each = &mut |key: &Key, value: &[u8]| {
        let owned = match key.kind {
            Kind::Inode => InodeItem::decode(value).map(|item| (item.map.0, false)),
            Kind::Xattr => match XattrRef::decode(value) {
                Some(XattrRef::Stored { map, .. }) => Some((map.0, true)),
                _ => None,
            },
            _ => None,
        };
        if let Some((map, xattr)) = owned.filter(|(map, _)| maps.contains(map)) {
            owners.insert(map, (key.owner, xattr));
        }
    };
    subject.each_item(&Edits::default(), each).await;
    owners
}

/// Names of some inodes and of all directories above them.
struct Names<'a> {
    inodes: &'a HashMap<u64, InodeState>,
    /// By directory and offset of the entry.
    names: HashMap<(u64, u64), Vec<u8>>,
}

impl<'a> Names<'a> {
    async fn of(
        subject: &mut Subject<'_>,
        inodes: &'a HashMap<u64, InodeState>,
        wanted: impl Iterator<Item = u64>,
    ) -> Self {
        let mut entries = HashSet::new();
        for inode in wanted {
            entries.extend(Self::entries(inodes, inode).unwrap_or_default());
        }
        let mut names = HashMap::new();
        let each = &mut |key: &Key, value: &[u8]| {
            if key.kind == Kind::Dirent && entries.contains(&(key.owner, key.offset)) {
                let name = DirentRef::decode(value).map(|entry| entry.name.to_vec());
                names.insert((key.owner, key.offset), name.unwrap_or_default());
            }
        };
        subject.each_item(&Edits::default(), each).await;
        Self { inodes, names }
    }

    /// The entries that lead to an inode, from below; `None` when they do not come from the root.
    fn entries(inodes: &HashMap<u64, InodeState>, inode: u64) -> Option<Vec<(u64, u64)>> {
        let (mut at, mut entries) = (inode, Vec::new());
        while at != InodeId::ROOT.0 {
            let state = inodes.get(&at).filter(|state| state.names > 0)?;
            let entry = (state.named_in, state.named_at);
            // A damaged image can have directories below themselves.
            if entries.len() > inodes.len() {
                return None;
            }
            entries.push(entry);
            at = state.named_in;
        }
        Some(entries)
    }

    fn path(&self, inode: u64) -> Option<String> {
        let entries = Self::entries(self.inodes, inode)?;
        let names = entries.iter().rev().map(|entry| self.names.get(entry).map(Vec::as_slice));
        let names: Option<Vec<&[u8]>> = names.collect();
        Some(format!("/{}", String::from_utf8_lossy(&names?.join(&b'/'))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_block(start: u64, map: u64, file_block: u64) -> Extent {
        Extent { start, count: 1, map, file_block }
    }

    #[test]
    fn batches_are_bounded_by_blocks_and_by_parts() {
        let shredded: Vec<_> = (0..10).map(|number| one_block(100 + number, 7, 2 * number)).collect();
        let sizes = |extents: &[Extent], max| -> Vec<(usize, u64)> {
            Batch::all(extents, 4, max).map(|batch| (batch.parts.len(), batch.blocks)).collect()
        };
        assert_eq!(sizes(&shredded, BatchMax { blocks: 100, parts: 4 }), [(4, 4), (4, 4), (2, 2)]);
        assert_eq!(sizes(&shredded, BatchMax { blocks: 6, parts: 100 }), [(6, 6), (4, 4)]);
        let large = [Extent { start: 100, count: 18, map: 7, file_block: 0 }];
        assert_eq!(sizes(&large, BatchMax { blocks: 8, parts: 100 }), [(2, 8), (2, 8), (1, 2)]);
        assert_eq!(sizes(&large, BatchMax { blocks: 100, parts: 3 }), [(3, 12), (2, 6)]);
    }

    #[test]
    fn checksums_come_to_the_blocks_of_their_file_wherever_these_lie() {
        // Backwards on the device, two files in turn, and one extent that two groups belong to.
        let mut extents: Vec<_> =
            (0..20).map(|number| one_block(50 - number, 7 + number % 2, number)).collect();
        extents.sort_unstable_by_key(|extent| extent.start);
        extents.push(Extent { start: 60, count: 10, map: 7, file_block: SUM_GROUP_BLOCKS - 5 });
        let max = BatchMax { blocks: 100, parts: 100 };
        let mut batches: Vec<_> = Batch::all(&extents, 4, max).collect();
        let [batch] = batches.as_mut_slice() else { panic!("one batch") };
        batch.expect_sums();
        let sum = |map: u64, block: u64| (1000 * map + block) as u32;
        for map in [6, 7, 8, 9] {
            for group in [0, SUM_GROUP_BLOCKS] {
                let sums = std::array::from_fn(|at| sum(map, group + at as u64));
                batch.add_group(map, group, &SumGroup(sums));
            }
        }
        for part in &batch.parts {
            let expected: Vec<_> = (part.file_block..part.file_end()).map(|at| sum(part.map, at)).collect();
            assert_eq!(batch.sums_of(part), expected, "{part:?}");
        }
    }
}
