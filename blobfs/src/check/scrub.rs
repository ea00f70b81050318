//! Scrub: a check that also reads the data of every file.
//!
//! A check reads all metadata and proves that it fits together; data is only named by it. A scrub then reads
//! every block that an extent maps, in the order in which they lie on the device, compares it with its checksum if the
//! file system has such, and says which file and offset each bad one belongs to. Blocks that are allocated but were
//! never written are not read: nobody would see what they hold.
//!
//! Nothing is written. Whoever is told early can restore the file, or have the disk replaced, while a good
//! copy exists elsewhere.

use std::collections::BTreeMap;
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
    DirentRef, ExtentFlags, ExtentItem, InodeItem, Key, Kind, SUM_GROUP_BLOCKS, SumGroup, XattrRef, block_sum,
};
use crate::store::{OpenError, check_features, in_data_area, read};
use crate::units::InodeId;

/// Bytes that are read at a time, if the device takes so many.
const READ_LEN: u64 = 1 << 20;

/// Reads that are under way at the same time: enough to keep a disk busy.
const READS_AT_A_TIME: usize = 8;

/// Blocks whose checksums are in memory at the same time: 64 MiB of them. The tree is walked once for so many.
const SUMS_AT_A_TIME: u64 = 16 << 20;

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
    for some in reader.parts(&extents) {
        let sums = Sums::of(&mut subject, &some).await;
        reader.read(&some, &sums, progress).await;
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
    /// All extents that hold data, in the order in which they lie on the device.
    async fn all(subject: &mut Subject<'_>) -> Vec<Self> {
        let superblock = subject.superblock.clone();
        let mut extents = Vec::new();
        let each = &mut |key: &Key, value: &[u8]| {
            if key.kind != Kind::Extent {
                return;
            }
            let Some(item) = ExtentItem::decode(value) else { return };
            let range = item.device_range();
            let (start, count) = (range.start.0, u64::from(range.count));
            if in_data_area(&superblock, start, count) && !item.flags.contains(ExtentFlags::UNWRITTEN) {
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

/// Checksums of some extents.
#[derive(Default)]
struct Sums {
    /// By map and file block: how many blocks, and where their checksums begin.
    places: BTreeMap<(u64, u64), (u64, usize)>,
    /// 0 for blocks that have none.
    sums: Vec<u32>,
}

impl Sums {
    /// The checksums of `extents`; none at all on a file system without.
    async fn of(subject: &mut Subject<'_>, extents: &[Extent]) -> Self {
        let mut all = Self::default();
        if !subject.superblock.has_data_sums() {
            return all;
        }
        for extent in extents {
            all.places.insert((extent.map, extent.file_block), (extent.count, all.sums.len()));
            all.sums.resize(all.sums.len() + extent.count as usize, 0);
        }
        let each = &mut |key: &Key, value: &[u8]| {
            if key.kind == Kind::Checksum
                && let Some(group) = SumGroup::decode(value)
            {
                all.add(key.owner, key.offset, &group);
            }
        };
        subject.each_item(&Edits::default(), each).await;
        all
    }

    fn add(&mut self, map: u64, group: u64, SumGroup(known): &SumGroup) {
        let end = group.saturating_add(SUM_GROUP_BLOCKS);
        let touched = self.places.range((map, 0)..(map, end)).rev();
        for ((_, start), (count, at)) in touched.take_while(|((_, start), (count, _))| start + count > group)
        {
            for block in group.max(*start)..end.min(start + count) {
                self.sums[at + (block - start) as usize] = known[(block - group) as usize];
            }
        }
    }

    /// Those of a part of an extent, which begins at a place that [`Sums::of`] was told.
    fn part(&self, extent: &Extent) -> &[u32] {
        let place = self.places.get(&(extent.map, extent.file_block));
        place.map_or(&[], |(count, at)| &self.sums[*at..at + *count as usize])
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
    part_blocks: u64,
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
            part_blocks: (part / block_size).max(1),
            total: extents.iter().map(|extent| extent.count * block_size).sum(),
            done: 0,
            bad: Vec::new(),
            left_out: 0,
        }
    }

    /// Extents in parts that are read at once, so many together as have their checksums in memory.
    fn parts<'e>(&self, extents: &'e [Extent]) -> impl Iterator<Item = Vec<Extent>> + use<'e> {
        let step = self.part_blocks;
        let mut parts = extents.iter().flat_map(move |extent| {
            (0..extent.count.div_ceil(step)).map(move |number| Extent {
                start: extent.start + number * step,
                count: step.min(extent.count - number * step),
                map: extent.map,
                file_block: extent.file_block + number * step,
            })
        });
        std::iter::from_fn(move || {
            let (mut some, mut blocks) = (Vec::new(), 0);
            while blocks < SUMS_AT_A_TIME
                && let Some(part) = parts.next()
            {
                blocks += part.count;
                some.push(part);
            }
            (!some.is_empty()).then_some(some)
        })
    }

    async fn read(&mut self, parts: &[Extent], sums: &Sums, progress: &mut dyn FnMut(ScrubProgress)) {
        for batch in parts.chunks(READS_AT_A_TIME) {
            let results = join_all(batch.iter().map(|part| self.blocks(part.start, part.count))).await;
            for (part, result) in batch.iter().zip(results) {
                let sums = sums.part(part);
                let checked = result.map_err(Bad::from).and_then(|bytes| self.compare(&bytes, sums));
                if checked.is_err() {
                    self.find_bad_blocks(part, sums).await;
                }
                self.done += part.count * self.block_size;
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
    async fn find_bad_blocks(&mut self, part: &Extent, sums: &[u32]) {
        for number in 0..part.count {
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
