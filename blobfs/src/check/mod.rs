//! The checker: reads what a device holds and reports everything that contradicts the format.
//!
//! It never writes. A journal that was not replayed yet is laid over the checkpoint in memory, so that what
//! is checked is what a mount would find.
//!
//! | module | what it checks |
//! | --- | --- |
//! | `finding` | nothing: every finding as a type |
//! | `journal` | journal blocks, and what they make of the items |
//! | `tree` | chunk map, nodes, places in metadata chunks |
//! | `items` | each item, and those of one owner against each other |
//! | `links` | inodes against names |
//! | `usage` | sets of blocks, to compare the bitmaps with what is in use |
//!
//! The checker reads the tree by itself instead of through the store: the store refuses a device at the
//! first thing that is wrong. Memory grows with the number of inodes (about 100 bytes each), with the
//! allocation groups in use (two bits per block) and with what the journal holds; not with the tree.
//!
//! When part of the tree cannot be read, what that part held is unknown: what could only be missing from
//! there (names, owners, users of blocks) is then not reported, and [`Report::complete`] is false.

mod finding;
mod items;
mod journal;
mod links;
mod tree;
mod usage;

#[cfg(test)]
mod tests;

use std::rc::Rc;

use bdev::Bdev;
use serde::Serialize;

use crate::error::FsError;
use crate::ondisk::Key;
use crate::ondisk::chunk_map::ChunkEntry;
use crate::ondisk::superblock::{Superblock, SuperblockError};
use crate::store::{OpenError, check_features, choose_superblock, in_data_area, read_superblocks};

pub use finding::Finding;
use finding::Findings;
use items::Census;
use journal::{BlockPlace, Journal, SpaceChange};
use tree::{Places, Step, Walk};

/// What there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Tree nodes.
    pub nodes: u64,
    /// Metadata chunks.
    pub chunks: u64,
    /// Journal blocks that a mount would replay.
    pub journal_blocks: u64,
    /// Transactions in them.
    pub journal_transactions: u64,
    /// Inodes of all kinds.
    pub inodes: u64,
    /// Directories.
    pub directories: u64,
    /// Regular files.
    pub files: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Devices, FIFOs and sockets.
    pub special_files: u64,
    /// Inodes without a name, which the next mount deletes.
    pub orphans: u64,
    /// Directory entries.
    pub entries: u64,
    /// Extended attributes.
    pub xattrs: u64,
    /// Extents.
    pub extents: u64,
    /// Blocks of all extents.
    pub data_blocks: u64,
    /// Blocks that nothing uses.
    pub free_blocks: u64,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Report {
    /// Everything that is wrong, in the order in which it was found; empty for a sound file system.
    pub findings: Vec<Finding>,
    /// Findings beyond those that are kept.
    pub findings_left_out: u64,
    /// Everything could be read, so that every check was made.
    pub complete: bool,
    /// What there is.
    pub counts: Counts,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty() && self.complete
    }
}

/// How far a check has come: nodes read, of how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Nodes read.
    pub done: u64,
    /// Nodes that the chunk map calls used.
    pub total: u64,
}

/// Checks a file system.
///
/// # Errors
/// When the device holds no file system that this code can check (none at all, one of another version, a
/// part of one), or when neither superblock nor journal can be read.
pub async fn check(bdev: &Rc<dyn Bdev>) -> Result<Report, OpenError> {
    check_with(bdev, &mut |_| ()).await
}

/// Checks a file system and tells how far it has come.
///
/// # Errors
/// As [`check`].
pub async fn check_with(
    bdev: &Rc<dyn Bdev>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, OpenError> {
    let mut findings = Findings::default();
    let Some(superblock) = check_superblocks(bdev, &mut findings).await? else {
        return Ok(Report { findings: findings.list, ..Report::default() });
    };
    check_features(&superblock, bdev, true)?;
    let checker = Checker { bdev, superblock: &superblock, findings };
    checker.run(progress).await
}

/// Checks both copies; gives the one that counts, or the one that is left.
async fn check_superblocks(
    bdev: &Rc<dyn Bdev>,
    findings: &mut Findings,
) -> Result<Option<Superblock>, OpenError> {
    let copies = read_superblocks(bdev).await?;
    for (copy, result) in copies.iter().enumerate() {
        match result {
            Ok(superblock) if superblock.generation % 2 != copy as u64 => {
                findings.push(Finding::SuperblockPlace { copy, generation: superblock.generation });
            }
            Ok(_) => {}
            Err(error) => findings.push(Finding::Superblock { copy, problem: error.to_string() }),
        }
    }
    if let [Ok(a), Ok(b)] = &copies {
        compare_copies(a, b, findings);
        if a.uuid != b.uuid {
            return Ok(None);
        }
    }
    match choose_superblock(copies, true) {
        Ok(superblock) => Ok(Some(superblock)),
        // Damage, not another program's data.
        Err(OpenError::BadSuperblock {
            error: SuperblockError::Checksum { .. } | SuperblockError::Geometry(_) | SuperblockError::NoMagic,
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Checks what a checkpoint never changes.
fn compare_copies(a: &Superblock, b: &Superblock, findings: &mut Findings) {
    let fields = [
        ("the UUID", a.uuid == b.uuid),
        ("the generation by more than one", a.generation.abs_diff(b.generation) == 1),
        ("the block size", a.block_size == b.block_size),
        ("the node size", a.node_size == b.node_size),
        ("the group size", a.group_blocks == b.group_blocks),
        ("the place of the journal", {
            (a.journal_start, a.journal_blocks) == (b.journal_start, b.journal_blocks)
        }),
        ("the hash key", a.hash_key == b.hash_key),
    ];
    for (field, _) in fields.into_iter().filter(|(_, same)| !same) {
        findings.push(Finding::SuperblockCopies { field });
    }
}

struct Checker<'a> {
    bdev: &'a Rc<dyn Bdev>,
    superblock: &'a Superblock,
    findings: Findings,
}

impl Checker<'_> {
    async fn run(mut self, progress: &mut dyn FnMut(Progress)) -> Result<Report, OpenError> {
        let superblock = self.superblock;
        let journal = Journal::read(self.bdev, superblock, &mut self.findings).await;
        let mut journal = journal.map_err(|error| OpenError::Failed(FsError::from(error)))?;
        let mut places = Places::read(self.bdev, superblock, &mut self.findings).await;
        let total = places.marked();
        let space = std::mem::take(&mut journal.space);
        self.claim_chunks(&space, &mut places);
        let mut census = Census::new(superblock);
        self.use_metadata(&mut census, &places);

        let mut walk = Walk::new(self.bdev, superblock);
        let overlay = std::mem::take(&mut journal.items);
        let mut items = Overlay { items: overlay.into_iter().peekable(), missing: Vec::new() };
        let mut whole = true;
        while let Some(step) = walk.next(&mut places, &mut self.findings).await {
            match step {
                Step::Leaf(leaf) => {
                    for index in 0..leaf.count() {
                        let (key, value) = (leaf.key(index), leaf.value(index));
                        items.lay_over(&key, value, &mut census, &mut self.findings);
                    }
                }
                Step::Gap => {
                    census.gap(&mut self.findings);
                    whole = false;
                }
            }
            progress(Progress { done: walk.nodes, total });
        }
        items.finish(&mut census, &mut self.findings);
        whole &= journal.whole && places.whole;
        if whole {
            self.check_whole(&mut census, &places, &space, &items.missing);
        }
        if census.highest >= journal.next_id {
            self.findings.push(Finding::NextId { next_id: journal.next_id, used: census.highest });
        }
        let counts = Counts {
            nodes: walk.nodes,
            chunks: places.chunks.count() as u64,
            journal_blocks: journal.blocks,
            journal_transactions: journal.transactions,
            free_blocks: superblock.block_count.saturating_sub(census.used.len()),
            ..census.counts
        };
        let Findings { list, left_out } = self.findings;
        Ok(Report { findings: list, findings_left_out: left_out, complete: whole, counts })
    }

    /// Adds the chunks that the journal claims, and removes those that it gives back.
    fn claim_chunks(&mut self, space: &[(BlockPlace, SpaceChange)], places: &mut Places) {
        for (place, change) in space {
            match *change {
                SpaceChange::Mark { .. } => {}
                SpaceChange::Claim { start, nodes } => {
                    places.add(self.superblock, ChunkEntry { start, used: 0, nodes }, &mut self.findings);
                }
                SpaceChange::GiveBack { start, nodes } => {
                    if !places.chunks.remove_empty(start, nodes) {
                        let problem = "gives back a chunk that is used or does not exist";
                        self.findings.push(place.finding(problem));
                    }
                }
            }
        }
    }

    /// Superblocks, journal and metadata chunks use their blocks.
    fn use_metadata(&self, census: &mut Census<'_>, places: &Places) {
        let superblock = self.superblock;
        census.used.change(superblock, 0, superblock.first_data_block(), true);
        for chunk in places.chunks.entries() {
            let count = u64::from(chunk.nodes) * superblock.node_blocks();
            census.used.change(superblock, chunk.start, count, true);
        }
    }

    /// The checks that need every item.
    fn check_whole(
        &mut self,
        census: &mut Census<'_>,
        places: &Places,
        space: &[(BlockPlace, SpaceChange)],
        missing: &[BlockPlace],
    ) {
        let findings = &mut self.findings;
        for place in missing {
            findings.push(place.finding("deletes an item that does not exist"));
        }
        places.find_leaked(findings);
        census.check_maps(findings);
        links::check(&census.inodes, findings);
        let counted = self.superblock.block_count.saturating_sub(census.recorded.len());
        let stated = self.superblock.free_blocks;
        if counted != stated {
            self.findings.push(Finding::FreeBlocks { stated, counted });
        }
        self.replay_space(census, space);
        for (start, end) in census.recorded.without(&census.used) {
            self.findings.push(Finding::BlocksLeaked { start, end });
        }
        for (start, end) in census.used.without(&census.recorded) {
            self.findings.push(Finding::BlocksNotMarked { start, end });
        }
    }

    /// Changes the bitmaps as the journal says.
    fn replay_space(&mut self, census: &mut Census<'_>, space: &[(BlockPlace, SpaceChange)]) {
        let superblock = self.superblock;
        for (place, change) in space {
            let (start, count, used) = match *change {
                SpaceChange::Mark { start, count, used } => (start, count, used),
                SpaceChange::Claim { start, nodes } => {
                    (start, u64::from(nodes) * superblock.node_blocks(), true)
                }
                SpaceChange::GiveBack { start, nodes } => {
                    (start, u64::from(nodes) * superblock.node_blocks(), false)
                }
            };
            if !in_data_area(superblock, start, count) {
                self.findings.push(place.finding("names blocks that are no data blocks"));
            } else if !census.recorded.change(superblock, start, count, used).is_empty() {
                let problem =
                    if used { "uses blocks that are used already" } else { "frees blocks that are free" };
                self.findings.push(place.finding(problem));
            }
        }
    }
}

/// The journal's items, to be merged with the tree's in key order.
struct Overlay {
    items: std::iter::Peekable<std::collections::btree_map::IntoIter<Key, journal::Overlaid>>,
    /// Journal blocks that delete what does not exist.
    missing: Vec<BlockPlace>,
}

impl Overlay {
    /// Gives the census everything up to an item of the tree.
    fn lay_over(&mut self, key: &Key, value: &[u8], census: &mut Census<'_>, findings: &mut Findings) {
        while let Some((new, change)) = self.items.next_if(|(new, _)| new < key) {
            self.add(&new, change, census, findings);
        }
        match self.items.next_if(|(new, _)| new == key) {
            Some((_, change)) => {
                if let Some(value) = change.value {
                    census.item(key, &value, findings);
                }
            }
            None => census.item(key, value, findings),
        }
    }

    /// Gives the census what is behind the tree's last item.
    fn finish(&mut self, census: &mut Census<'_>, findings: &mut Findings) {
        while let Some((key, change)) = self.items.next() {
            self.add(&key, change, census, findings);
        }
        census.end(findings);
    }

    /// A change of what the tree does not hold.
    fn add(
        &mut self,
        key: &Key,
        change: journal::Overlaid,
        census: &mut Census<'_>,
        findings: &mut Findings,
    ) {
        if change.must_exist {
            self.missing.push(change.block);
        }
        if let Some(value) = change.value {
            census.item(key, &value, findings);
        }
    }
}
