//! One pass over everything that a file system consists of.
//!
//! A [`Subject`] is what stays the same from pass to pass: superblock, journal, metadata places. A *survey*
//! walks the tree, with the journal and the edits of a repair laid over it, and adds up what it sees in a
//! [`Census`]. What is left to compare once all items were seen, [`Subject::check_whole`] compares.

use std::rc::Rc;

use bdev::Bdev;
use hashbrown::HashMap;

use super::edits::{Edits, Merge, Origin};
use super::finding::{Finding, Findings};
use super::items::{Census, InodeState};
use super::journal::{BlockPlace, Journal, SpaceChange};
use super::remedy::Remedy;
use super::tree::{Places, Rescued, Step, Walk};
use super::{Counts, Progress, Report, links};
use crate::ondisk::chunk_map::ChunkEntry;
use crate::ondisk::superblock::Superblock;
use crate::ondisk::{Key, Kind};
use crate::store::in_data_area;

/// What is checked.
pub(super) struct Subject<'a> {
    pub(super) bdev: &'a Rc<dyn Bdev>,
    pub(super) superblock: Superblock,
    pub(super) journal: Journal,
    pub(super) places: Places,
    /// What is lost is gone: the rest is judged as if it were everything. Otherwise nothing is concluded from
    /// what may only be lost.
    pub(super) lost_is_gone: bool,
    /// What the last survey counted.
    pub(super) counts: Counts,
}

/// What a pass over all items found.
pub(super) struct Survey {
    pub(super) census: Census,
    /// Parts of the tree that could not be read.
    pub(super) gaps: u64,
    /// Part of the bitmaps is among what could not be read.
    pub(super) bitmaps_lost: bool,
    /// Journal blocks that delete what does not exist.
    pub(super) missing: Vec<BlockPlace>,
}

impl<'a> Subject<'a> {
    /// Reads journal and chunk map.
    pub(super) async fn read(
        bdev: &'a Rc<dyn Bdev>,
        superblock: Superblock,
        findings: &mut Findings,
    ) -> Self {
        let journal = Journal::read(bdev, &superblock, findings).await;
        let places = Places::read(bdev, &superblock, findings).await;
        let mut subject =
            Self { bdev, superblock, journal, places, lost_is_gone: false, counts: Counts::default() };
        subject.claim_chunks(findings);
        subject
    }

    /// Whether journal and chunk map are whole.
    pub(super) fn whole(&self) -> bool {
        self.journal.whole && self.places.whole
    }

    /// Looks at every item once. What is wrong with nodes is added to `structure`, the rest to `findings`.
    pub(super) async fn survey(
        &mut self,
        edits: &Edits,
        rescued: &[Rescued],
        structure: &mut Findings,
        findings: &mut Findings,
        progress: &mut dyn FnMut(Progress),
    ) -> Survey {
        self.places.walk_again();
        let mut census = Census::new(&self.superblock, &self.journal.logged);
        self.use_metadata(&mut census);
        let mut walk = Walk::new(self.bdev, &self.superblock, rescued);
        let mut merge = Merge::new(&self.journal.items, edits);
        let total = self.places.marked();
        let (mut gaps, mut bitmaps_lost, mut bitmaps_end) = (0, false, false);
        while let Some(step) = walk.next(&mut self.places, structure).await {
            match step {
                Step::Leaf(leaf) => {
                    let mut see = |key: &Key, value: &[u8], _: Origin| census.item(key, value, findings);
                    for index in 0..leaf.node.count() {
                        merge.item(&leaf.node.key(index), leaf.node.value(index), &mut see);
                    }
                    bitmaps_end |= (0..leaf.node.count()).any(|index| !is_group(&leaf.node.key(index)));
                }
                Step::Gap => {
                    if !self.lost_is_gone {
                        census.gap(findings);
                    }
                    bitmaps_lost |= !bitmaps_end;
                    gaps += 1;
                }
            }
            progress(Progress { done: walk.nodes, total });
        }
        merge.end(&mut |key, value, _| census.item(key, value, findings));
        census.end(findings);
        self.counts = Counts {
            nodes: walk.nodes,
            chunks: self.places.chunks.count() as u64,
            journal_blocks: self.journal.blocks,
            journal_transactions: self.journal.transactions,
            free_blocks: self.superblock.block_count.saturating_sub(census.used.len()),
            ..census.counts
        };
        Survey { census, gaps, bitmaps_lost, missing: merge.missing }
    }

    /// Checks everything, and leaves what is known of the inodes.
    pub(super) async fn check(
        &mut self,
        mut findings: Findings,
        inodes: &mut HashMap<u64, InodeState>,
        progress: &mut dyn FnMut(Progress),
    ) -> Report {
        let mut of_items = Findings::limited();
        let mut survey = self.survey(&Edits::default(), &[], &mut findings, &mut of_items, progress).await;
        findings.append(of_items);
        let whole = survey.gaps == 0 && self.whole();
        if whole {
            self.check_whole(&mut survey, &mut findings);
        }
        self.check_counter(&survey.census, &mut findings);
        *inodes = survey.census.inodes;
        Report {
            findings_left_out: findings.left_out,
            findings: findings.into_list(),
            complete: whole,
            counts: self.counts,
        }
    }

    /// Gives every item that can be read, in key order. What is wrong is not reported.
    pub(super) async fn each_item(&mut self, edits: &Edits, each: &mut dyn FnMut(&Key, &[u8])) {
        self.places.walk_again();
        let mut walk = Walk::new(self.bdev, &self.superblock, &[]);
        let mut merge = Merge::new(&self.journal.items, edits);
        let mut ignored = Findings::limited();
        while let Some(step) = walk.next(&mut self.places, &mut ignored).await {
            let Step::Leaf(leaf) = step else { continue };
            for index in 0..leaf.node.count() {
                let (key, value) = (leaf.node.key(index), leaf.node.value(index));
                merge.item(&key, value, &mut |key, value, _| each(key, value));
            }
        }
        merge.end(&mut |key, value, _| each(key, value));
    }

    /// Checks the counter of inodes and maps.
    pub(super) fn check_counter(&self, census: &Census, findings: &mut Findings) {
        if census.highest >= self.journal.next_id {
            let finding = Finding::NextId { next_id: self.journal.next_id, used: census.highest };
            findings.push(finding, Remedy::safe("set"));
        }
    }

    /// Adds the chunks that the journal claims, and removes those that it gives back.
    fn claim_chunks(&mut self, findings: &mut Findings) {
        for (place, change) in &self.journal.space {
            match *change {
                SpaceChange::Mark { .. } => {}
                SpaceChange::Claim { start, nodes } => {
                    self.places.add(&self.superblock, ChunkEntry { start, used: 0, nodes }, findings);
                }
                SpaceChange::GiveBack { start, nodes } => {
                    if !self.places.chunks.remove_empty(start, nodes) {
                        let problem = "gives back a chunk that is used or does not exist";
                        findings.push(place.finding(problem), Remedy::lossy("not given back"));
                    }
                }
            }
        }
    }

    /// Superblocks, journal and metadata chunks use their blocks.
    fn use_metadata(&self, census: &mut Census) {
        let superblock = &self.superblock;
        census.used.change(superblock, 0, superblock.first_data_block(), true);
        for chunk in self.places.chunks.entries() {
            let count = u64::from(chunk.nodes) * superblock.node_blocks();
            census.used.change(superblock, chunk.start, count, true);
        }
    }

    /// The checks that need every item.
    pub(super) fn check_whole(&self, survey: &mut Survey, findings: &mut Findings) {
        for place in &survey.missing {
            findings.push(place.finding("deletes an item that does not exist"), Remedy::lossy("passed over"));
        }
        self.places.find_leaked(findings);
        check_owners(&mut survey.census, findings);
        check_logged(&survey.census, findings);
        self.check_bitmaps(&mut survey.census, findings);
    }

    /// Compares the bitmaps with what is in use.
    fn check_bitmaps(&self, census: &mut Census, findings: &mut Findings) {
        let counted = self.superblock.block_count.saturating_sub(census.recorded.len());
        let stated = self.superblock.free_blocks;
        if counted != stated {
            findings.push(Finding::FreeBlocks { stated, counted }, Remedy::safe("counted anew"));
        }
        self.replay_space(census, findings);
        for (start, end) in census.recorded.without(&census.used) {
            findings.push(Finding::BlocksLeaked { start, end }, Remedy::safe("marked as free"));
        }
        for (start, end) in census.used.without(&census.recorded) {
            findings.push(Finding::BlocksNotMarked { start, end }, Remedy::safe("marked as used"));
        }
    }

    /// Changes the bitmaps as the journal says.
    fn replay_space(&self, census: &mut Census, findings: &mut Findings) {
        let superblock = &self.superblock;
        for (place, change) in &self.journal.space {
            let (start, count, used) = match *change {
                SpaceChange::Mark { start, count, used } => (start, count, used),
                SpaceChange::Claim { start, nodes } => {
                    (start, u64::from(nodes) * superblock.node_blocks(), true)
                }
                SpaceChange::GiveBack { start, nodes } => {
                    (start, u64::from(nodes) * superblock.node_blocks(), false)
                }
            };
            let problem = if !in_data_area(superblock, start, count) {
                "names blocks that are no data blocks"
            } else if census.recorded.change(superblock, start, count, used).is_empty() {
                continue;
            } else if used {
                "uses blocks that are used already"
            } else {
                "frees blocks that are free"
            };
            findings.push(place.finding(problem), Remedy::lossy("passed over"));
        }
    }
}

/// Checks that file data which is in the journal only has blocks to go to.
pub(super) fn check_logged(census: &Census, findings: &mut Findings) {
    for (inode, bytes) in census.homeless() {
        findings.push(Finding::LoggedData { inode: inode.0, bytes }, Remedy::lossy("given up"));
    }
}

/// Compares maps with who owns them, and inodes with names, once all items were seen.
pub(super) fn check_owners(census: &mut Census, findings: &mut Findings) {
    census.check_maps(findings);
    links::check(&census.inodes, findings);
}

fn is_group(key: &Key) -> bool {
    key.kind == Kind::Group
}
