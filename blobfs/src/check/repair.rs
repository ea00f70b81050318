//! Repair: from what is left on a device to a file system that the checker finds clean.
//!
//! # How
//!
//! Every finding comes with a remedy (`remedy`): which items go, change or are made. A repair collects them,
//! lays them over the items *in memory* (`edits`), and surveys the result as if it were on the device. What
//! that finds leads to more remedies, until a survey finds nothing. Only then the first byte of metadata is
//! written: the checker itself has called the result clean before it exists.
//!
//! The result is written by `rebuild`: leaves that stay as they are stay where they are; leaves that change,
//! all inner nodes, the bitmaps and the chunk map are written to places that were free in everything that was
//! found, and the journal is folded in. Then both superblocks are switched, one after the other. So a repair
//! that is interrupted leaves what was there before, byte for byte, as far as anything refers to it; and a
//! repair that finishes has also put right what no item says: superblocks, bitmaps, counters, use of
//! metadata places.
//!
//! Why not transactions on an opened store: the store refuses a device at the first contradiction, and must.
//! Why not a whole new tree: that would need as much free space as there is metadata, on a device that may be
//! full, to change one link count.
//!
//! # What is kept
//!
//! As much as can be. What hangs on a lost inner node is found again by way of the chunk map, which marks
//! exactly the nodes in use. Content, entries and attributes whose inode is lost get a new inode, which only
//! root can read. What has links but no name is named in `lost+found`; what has neither was an orphan and
//! becomes one again. Of two users of the same blocks both keep them: the second one gets a copy. Blocks whose checksum
//! is lost keep what they hold, which then counts as right.
//!
//! # Why it ends
//!
//! Remedies remove items, set fields to what was counted, or add what is missing; each survey sees fewer
//! contradictions than the one before. Against images made to prove the contrary there is a limit
//! ([`ROUNDS_MAX`]); beyond it nothing is written.

use std::rc::Rc;

use bdev::{Bdev, BdevError, IoBuffers, WriteFlags};
use serde::Serialize;

use super::edits::Edits;
use super::finding::{FINDINGS_MAX, Finding, Findings};
use super::items::{Census, DT_DIR, LOST_AND_FOUND, LoggedHome, Presence, SLOT_MAX};
use super::journal::newest_epoch;
use super::remedy::{Change, InodeEdit, ItemEdit, Remedy};
use super::superblocks::{self, Choice};
use super::survey::{Subject, Survey, check_logged, check_owners};
use super::tree::{self, Rescued};
use super::usage::BlockSet;
use super::{Progress, Report, check_with, rebuild};
use crate::error::{Corruption, FsError};
use crate::fs::libc_mode::S_IFDIR;
use crate::ondisk::superblock::{COUNTER_MAX, Superblock};
use crate::ondisk::{
    DirentRef, ExtentFlags, ExtentItem, InodeItem, Key, SLOT_BITS, SumGroup, Timestamp, block_sum,
    encode_dirent, name_hash,
};
use crate::store::{Home, IDS_SKIPPED, Logged, OpenError, check_features, read, write_homes};
use crate::units::{BlockAddr, InodeId};

/// Surveys after which a repair gives up. Real damage takes two to five.
const ROUNDS_MAX: u32 = 32;

/// Bytes of file data that are copied at a time.
const COPY_LEN: u64 = 1 << 20;

/// What a repair may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consent {
    /// Only what gives nothing up: if anything else is needed, nothing is changed.
    NothingLost,
    /// Whatever is needed.
    Everything,
}

/// How a repair is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RepairOptions {
    /// What it may do.
    pub consent: Consent,
    /// Time of what it makes.
    pub now: Timestamp,
}

/// A finding and what was done about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// What was wrong.
    pub finding: Finding,
    /// What was done; nothing, if the repair as a whole was not done.
    pub action: Option<&'static str>,
}

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepairReport {
    /// Everything that was wrong, in the order in which it was found. What came to light only when something
    /// else had been repaired stands behind it.
    pub findings: Vec<Repaired>,
    /// Findings beyond those that are kept.
    pub findings_left_out: u64,
    /// Something was written.
    pub changed: bool,
    /// Why nothing was written although something was found.
    pub refused: Option<&'static str>,
    /// A check of the device as it is now.
    pub after: Report,
}

/// Repairs a file system. Nothing is written when nothing is wrong.
///
/// # Errors
/// As [`super::check`]; and when the device fails while the repair is written: what was there before is there
/// still then, or the repair is complete but for the second superblock.
pub async fn repair(
    bdev: &Rc<dyn Bdev>,
    options: RepairOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<RepairReport, OpenError> {
    let mut findings = Findings::unlimited();
    let (superblock, copy, both) = match superblocks::choose(bdev, &mut findings).await? {
        Choice::Usable { superblock, copy, both } => (superblock, copy, both),
        Choice::Neither => {
            let reason = "no copy of the superblock can be used";
            return refused(bdev, findings, reason, progress).await;
        }
    };
    check_features(&superblock, bdev, false)?;
    let mut subject = Subject::read(bdev, superblock, &mut findings).await;
    subject.lost_is_gone = true;
    let mut repairer = Repairer::new(subject, options);
    let survey = repairer.first_survey(&mut findings, progress).await;
    if findings.list.is_empty() {
        let after = Report { complete: true, counts: repairer.subject.counts, ..Report::default() };
        return Ok(RepairReport { after, ..finished(Vec::new(), None) });
    }
    let (survey, found) = match repairer.until_clean(survey, findings, progress).await? {
        Outcome::Clean(survey, found) => (survey, found),
        Outcome::Refused(found, reason) => return refused(bdev, found, reason, progress).await,
    };
    match repairer.write(survey, copy, both, progress).await {
        Ok(()) => {}
        Err(OpenError::Failed(FsError::NoSpace)) => {
            let reason = "there is no room to write the repaired tree";
            return refused(bdev, found, reason, progress).await;
        }
        Err(error) => return Err(error),
    }
    let after = check_with(bdev, progress).await?;
    let repaired = |(finding, remedy): (Finding, Remedy)| Repaired { finding, action: Some(remedy.text) };
    Ok(RepairReport {
        changed: true,
        after,
        ..finished(found.list.into_iter().map(repaired).collect(), None)
    })
}

fn finished(mut findings: Vec<Repaired>, refused: Option<&'static str>) -> RepairReport {
    let left_out = findings.len().saturating_sub(FINDINGS_MAX) as u64;
    findings.truncate(FINDINGS_MAX);
    RepairReport { findings, findings_left_out: left_out, changed: false, refused, after: Report::default() }
}

/// Nothing is changed.
async fn refused(
    bdev: &Rc<dyn Bdev>,
    findings: Findings,
    reason: &'static str,
    progress: &mut dyn FnMut(Progress),
) -> Result<RepairReport, OpenError> {
    let left = findings.into_list().into_iter().map(|finding| Repaired { finding, action: None });
    let after = check_with(bdev, progress).await?;
    Ok(RepairReport { after, ..finished(left.collect(), Some(reason)) })
}

/// How working a repair out ends. Either way with all that was found.
#[expect(clippy::large_enum_variant, reason = "there is one of it")]
enum Outcome {
    /// A survey that finds nothing any more.
    Clean(Survey, Findings),
    /// Why it is not done.
    Refused(Findings, &'static str),
}

/// A repair that is being worked out.
struct Repairer<'a> {
    subject: Subject<'a>,
    edits: Edits,
    rescued: Vec<Rescued>,
    /// Parts of the tree that cannot be read.
    gaps: u64,
    /// Blocks that must not be written: in use, or called so by the bitmaps, in any state that was found.
    avoid: BlockSet,
    /// Where the search for free blocks goes on.
    cursor: u64,
    /// There is no free run of so many blocks.
    too_many: u64,
    next_id: u64,
    /// The directory for what has no name, once it is known or made.
    lost_and_found: Option<InodeId>,
    options: RepairOptions,
    round: u32,
}

impl<'a> Repairer<'a> {
    fn new(subject: Subject<'a>, options: RepairOptions) -> Self {
        Self {
            edits: Edits::default(),
            rescued: Vec::new(),
            gaps: 0,
            avoid: BlockSet::new(&subject.superblock),
            cursor: subject.superblock.first_data_block(),
            too_many: u64::MAX,
            next_id: subject.journal.next_id,
            lost_and_found: None,
            options,
            round: 0,
            subject,
        }
    }

    /// The survey of what is there, with the leaves below lost inner nodes.
    async fn first_survey(&mut self, findings: &mut Findings, progress: &mut dyn FnMut(Progress)) -> Survey {
        let before = findings.list.len();
        let mut items = Findings::unlimited();
        let mut survey = self.survey(findings, &mut items, progress).await;
        if survey.gaps > 0 && self.subject.places.whole {
            let (bdev, superblock) = (self.subject.bdev, &self.subject.superblock);
            self.rescued = tree::rescue(bdev, superblock, &self.subject.places).await;
            findings.list.truncate(before);
            items = Findings::unlimited();
            survey = self.survey(findings, &mut items, progress).await;
        }
        findings.append(items);
        self.gaps = survey.gaps;
        self.protect(&survey);
        // What is lost would be reported once more as places and blocks that nothing uses.
        if survey.gaps == 0 && self.rescued.is_empty() && self.subject.whole() {
            self.subject.check_whole(&mut survey, findings);
        } else {
            check_owners(&mut survey.census, findings);
            check_logged(&survey.census, findings);
        }
        self.subject.check_counter(&survey.census, findings);
        survey
    }

    async fn survey(
        &mut self,
        structure: &mut Findings,
        items: &mut Findings,
        progress: &mut dyn FnMut(Progress),
    ) -> Survey {
        self.subject.survey(&self.edits, &self.rescued, structure, items, progress).await
    }

    /// From now on no block that a survey knows as used is written.
    fn protect(&mut self, survey: &Survey) {
        let census = &survey.census;
        self.avoid.add_all(&census.recorded);
        self.avoid.add_all(&census.used);
        if survey.bitmaps_lost {
            self.avoid.add_unknown_groups(&census.recorded, &self.subject.superblock);
        }
        self.next_id = self.next_id.max(census.highest + 1);
    }

    /// Applies remedies and surveys again, until nothing is found.
    async fn until_clean(
        &mut self,
        mut survey: Survey,
        mut findings: Findings,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Outcome, OpenError> {
        let mut found = Findings::unlimited();
        loop {
            let reason = if findings.list.is_empty() {
                return Ok(Outcome::Clean(survey, found));
            } else if self.options.consent == Consent::NothingLost && findings.lose() {
                "something would be lost"
            } else if self.round == ROUNDS_MAX {
                "it does not come to an end"
            } else {
                self.round += 1;
                self.apply_all(findings, &survey.census, &mut found).await?;
                (survey, findings) = self.next_survey(progress).await?;
                continue;
            };
            found.append(findings);
            return Ok(Outcome::Refused(found, reason));
        }
    }

    /// The survey of what the remedies make.
    async fn next_survey(
        &mut self,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(Survey, Findings), OpenError> {
        // Of nodes it finds what the first survey found: that is gone when the tree is written.
        let (mut structure, mut items) = (Findings::limited(), Findings::unlimited());
        let mut survey = self.survey(&mut structure, &mut items, progress).await;
        if survey.gaps != self.gaps {
            return Err(unsteady());
        }
        self.protect(&survey);
        check_owners(&mut survey.census, &mut items);
        Ok((survey, items))
    }

    /// Applies the remedies of a survey.
    async fn apply_all(
        &mut self,
        findings: Findings,
        census: &Census,
        found: &mut Findings,
    ) -> Result<(), OpenError> {
        self.lost_and_found = self.find_lost_and_found(census);
        findings.more.into_iter().for_each(|change| self.edits.add(change));
        for (finding, mut remedy) in findings.list {
            if self.apply(&mut remedy, census).await? {
                found.push(finding, remedy);
            }
        }
        Ok(())
    }

    /// Applies a remedy; false when it has to wait for the next round.
    async fn apply(&mut self, remedy: &mut Remedy, census: &Census) -> Result<bool, OpenError> {
        for change in std::mem::take(&mut remedy.changes) {
            match change {
                Change::Attach { inode, file_type } => {
                    let root = census.inodes.get(&InodeId::ROOT.0);
                    if root.is_none_or(|root| root.item != Presence::Readable || !root.is_directory()) {
                        return Ok(false);
                    }
                    self.attach(InodeId(inode), file_type, census);
                }
                Change::CopyExtent(key, item) => {
                    if !self.copy(key, item).await? {
                        remedy.text = "the extent was removed: it cannot be copied";
                        self.edits.add(Change::Item(key, ItemEdit::Delete));
                    }
                }
                Change::SumAnew { key, sums, runs } => self.sum(key, *sums, &runs).await?,
                change => self.edits.add(change),
            }
        }
        Ok(true)
    }

    /// A directory for what has no name that is there already.
    fn find_lost_and_found(&self, census: &Census) -> Option<InodeId> {
        let is_directory = |inode: &u64| {
            let state = census.inodes.get(inode);
            state.is_some_and(|state| state.item == Presence::Readable && state.is_directory())
        };
        let mut inodes = census.lost_and_found.iter().map(|(_, inode)| *inode);
        inodes.find(is_directory).map(InodeId)
    }

    /// Names an inode in the directory for what has no name.
    fn attach(&mut self, inode: InodeId, file_type: u8, census: &Census) {
        let directory = match self.lost_and_found {
            Some(directory) => directory,
            None => self.make_lost_and_found(census),
        };
        // A name that is taken is found by the next survey, which asks for another one.
        let name = match self.round {
            1 => format!("#{}", inode.0),
            round => format!("#{}.{round}", inode.0),
        };
        self.insert_entry(directory, name.as_bytes(), inode, file_type);
        if file_type == DT_DIR {
            let edit = InodeEdit { parent: Some(directory.0), ..InodeEdit::default() };
            self.edits.add(Change::Item(Key::inode(inode), ItemEdit::Inode(edit)));
        }
    }

    fn make_lost_and_found(&mut self, census: &Census) -> InodeId {
        let taken = |name: &[u8]| census.lost_and_found.iter().any(|(known, _)| known == name);
        let mut name = LOST_AND_FOUND.to_vec();
        while taken(&name) {
            name.push(b'_');
        }
        let inode = InodeId(self.next_id);
        self.next_id += 1;
        let item = InodeItem {
            nlink: 2,
            parent: InodeId::ROOT,
            atime: self.options.now,
            mtime: self.options.now,
            ctime: self.options.now,
            btime: self.options.now,
            ..InodeItem::empty(inode, S_IFDIR | 0o700)
        };
        self.edits.add(Change::Item(Key::inode(inode), ItemEdit::Put(item.encode().to_vec())));
        self.insert_entry(InodeId::ROOT, &name, inode, DT_DIR);
        self.lost_and_found = Some(inode);
        inode
    }

    fn insert_entry(&mut self, directory: InodeId, name: &[u8], inode: InodeId, file_type: u8) {
        let hash = name_hash(self.subject.superblock.hash_key, name);
        let mut value = Vec::new();
        encode_dirent(DirentRef { inode, file_type, name }, &mut value);
        let key = Key::dirent(directory, hash << SLOT_BITS | SLOT_MAX);
        self.edits.add(Change::Item(key, ItemEdit::Insert(value)));
    }

    /// The first block of a free run.
    fn find_free(&mut self, count: u64) -> Option<u64> {
        if count >= self.too_many {
            return None;
        }
        let superblock = &self.subject.superblock;
        let first = superblock.first_data_block();
        let behind = self.avoid.find_free(superblock, self.cursor, count);
        let found = behind.or_else(|| self.avoid.find_free(superblock, first, count));
        match found {
            Some(start) => self.cursor = start + count,
            None => self.too_many = count,
        }
        found
    }

    /// Gives an extent a copy of its blocks, in free ones; false when there are none or they cannot be read.
    async fn copy(&mut self, key: Key, item: ExtentItem) -> Result<bool, OpenError> {
        let superblock = self.subject.superblock.clone();
        let count = u64::from(item.blocks);
        let Some(start) = self.find_free(count) else { return Ok(false) };
        let from = item.device_range().start.0;
        let written = !item.flags.contains(ExtentFlags::UNWRITTEN);
        if written && !copy_blocks(self.subject.bdev, &superblock, from, start, count).await? {
            return Ok(false);
        }
        self.avoid.change(&superblock, start, count, true);
        let copy =
            ExtentItem { addr: BlockAddr(start), stored_blocks: item.blocks, stored_offset: 0, ..item };
        self.edits.add(Change::Item(key, ItemEdit::Put(copy.encode().to_vec())));
        Ok(true)
    }

    /// Gives blocks the checksums of what they hold. One that cannot be read gets some checksum: it is no better and no
    /// worse off.
    async fn sum(
        &mut self,
        key: Key,
        mut sums: SumGroup,
        runs: &[(usize, u64, u64)],
    ) -> Result<(), OpenError> {
        let block = u64::from(self.subject.superblock.block_size);
        for (first, device, count) in runs {
            for at in 0..*count {
                let bytes = read(self.subject.bdev, (device + at) * block, block as usize).await;
                sums.0[first + at as usize] = bytes.map_or(u32::MAX, |bytes| block_sum(&bytes));
            }
        }
        self.edits.add(Change::Item(key, ItemEdit::Put(sums.encode())));
        Ok(())
    }

    /// Writes the result.
    async fn write(
        mut self,
        survey: Survey,
        copy: usize,
        both: bool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), OpenError> {
        let old = &self.subject.superblock;
        // Numbers of transactions that were not durable must not come back.
        let skipped = if old.clean { 0 } else { IDS_SKIPPED };
        // Those of damaged superblocks may be older than what is in the journal, all of which must never be replayed.
        let newest_epoch = match newest_epoch(self.subject.bdev, old).await {
            Ok(newest) => newest,
            Err(_) => {
                self.subject.journal.unreadable = true;
                old.epoch
            }
        };
        // A newer superblock that was lost may have had the next epochs.
        let epochs = if both { 1 } else { 1 << 20 };
        // The copy that counts is written last, so the new generation is of the other one.
        let step = if (old.generation + 1) % 2 == copy as u64 { 2 } else { 1 };
        let superblock = Superblock {
            generation: old.generation + step,
            epoch: (newest_epoch + epochs).min(COUNTER_MAX),
            clean: true,
            tail: self.subject.journal.end,
            next_id: (self.next_id + skipped).min(COUNTER_MAX),
            last_txn: self.subject.journal.last_txn,
            ..old.clone()
        };
        write_logged(self.subject.bdev, &self.subject.journal.logged, &survey.census.homes)
            .await
            .map_err(|error| OpenError::Failed(error.into()))?;
        let plan = rebuild::Plan {
            superblock,
            edits: &self.edits,
            rescued: &self.rescued,
            gaps: self.gaps,
            used: survey.census.used,
            used_twice: survey.census.used_twice,
            avoid: self.avoid,
        };
        rebuild::rebuild(self.subject, plan, progress).await
    }
}

/// Writes file data that is in the journal only to its blocks, before the journal is let go. First what was read of the
/// journal becomes durable, so that an interruption leaves it to be read and written again.
async fn write_logged(bdev: &Rc<dyn Bdev>, logged: &Logged, homes: &[LoggedHome]) -> Result<(), BdevError> {
    if !homes.is_empty() && bdev.limits().volatile_cache {
        bdev.flush().await?;
    }
    let mut pieces = Vec::new();
    for home in homes {
        let range = home.offset..home.offset + home.len;
        let parts = logged.parts(home.inode, &range);
        pieces.extend(parts.map(|(at, bytes)| Home { device: home.device + (at - home.offset), bytes }));
    }
    write_homes(bdev, &pieces).await
}

/// Copies blocks to free ones; false when they cannot be read.
async fn copy_blocks(
    bdev: &Rc<dyn Bdev>,
    superblock: &Superblock,
    from: u64,
    to: u64,
    count: u64,
) -> Result<bool, BdevError> {
    let block = u64::from(superblock.block_size);
    let part = COPY_LEN.min(bdev.limits().max_transfer as u64) / block;
    let mut done = 0;
    while done < count {
        let blocks = part.max(1).min(count - done);
        let Ok(bytes) = read(bdev, (from + done) * block, (blocks * block) as usize).await else {
            return Ok(false);
        };
        bdev.write((to + done) * block, IoBuffers::from_aligned(&bytes), WriteFlags::NONE).await?;
        done += blocks;
    }
    Ok(true)
}

/// The device gives other answers than before: nothing can be concluded from them.
pub(super) fn unsteady() -> OpenError {
    let problem = "reads give other results than before".to_owned();
    FsError::from(Corruption { structure: "device", offset: 0, problem }).into()
}
