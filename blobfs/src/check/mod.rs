//! The checker: reads what a device holds and reports everything that contradicts the format.
//!
//! [`check`] never writes. A journal that was not replayed yet is laid over the checkpoint in memory, so that
//! what is checked is what a mount would find. [`repair`] makes a file system that [`check`] finds clean.
//! [`scrub`] also reads the data.
//!
//! | module | what it does |
//! | --- | --- |
//! | `finding` | every finding as a type |
//! | `remedy` | what a repair does about one |
//! | `superblocks` | checks the two copies and chooses one |
//! | `journal` | checks journal blocks, and what they make of the items |
//! | `tree` | checks chunk map, nodes, places in metadata chunks; finds leaves whose inner nodes are lost |
//! | `edits` | lays the journal and a repair's changes over the items of the tree |
//! | `survey` | one pass over everything |
//! | `items` | checks each item, and those of one owner against each other |
//! | `links` | checks inodes against names |
//! | `usage` | sets of blocks, to compare the bitmaps with what is in use |
//! | `repair` | decides what is changed, and when it is enough |
//! | `rebuild` | writes the repaired tree beside the old one |
//! | `scrub` | reads the blocks of files |
//!
//! The checker reads the tree by itself instead of through the store: the store refuses a device at the
//! first thing that is wrong. Memory grows with the number of inodes (about 100 bytes each), with the
//! allocation groups in use (two bits per block) and with what the journal holds; not with the tree (where blocks have
//! checksums: with the extents of the largest file). A repair
//! needs more by what it changes. One million files take 180 MiB to check and 300 MiB to repair.
//!
//! When part of the tree cannot be read, what that part held is unknown: what could only be missing from
//! there (names, owners, users of blocks) is then not reported, and [`Report::complete`] is false.

mod edits;
mod finding;
mod items;
mod journal;
mod links;
mod rebuild;
mod remedy;
mod repair;
mod scrub;
mod superblocks;
mod survey;
mod tree;
mod usage;

#[cfg(test)]
mod tests;

use std::rc::Rc;

use bdev::Bdev;
use hashbrown::HashMap;
use serde::Serialize;

use crate::store::{OpenError, check_features};

pub use finding::Finding;
use finding::Findings;
pub use repair::{Consent, RepairOptions, RepairReport, Repaired, repair};
pub use scrub::{ScrubProgress, ScrubReport, Unreadable, scrub};
use superblocks::Choice;
use survey::Subject;

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
    let mut findings = Findings::limited();
    let chosen = match superblocks::choose(bdev, &mut findings).await? {
        Choice::Usable { superblock, .. } => superblock,
        Choice::Neither => return Ok(Report { findings: findings.into_list(), ..Report::default() }),
    };
    check_features(&chosen, bdev, true)?;
    let mut subject = Subject::read(bdev, chosen, &mut findings).await;
    Ok(subject.check(findings, &mut HashMap::new(), progress).await)
}
