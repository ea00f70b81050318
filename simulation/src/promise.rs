//! What a power cut may leave of a workload.
//!
//! - Everything that an acknowledged sync covered is there.
//! - The rest is a prefix of the operations on names and attributes, in the order of acknowledgement; an
//!   operation under way is there or not.
//! - Each sector of a file's data holds what it held at some time since the last sync that covered it (which
//!   for a hole or a fresh file means zeros), as far as the truncations of the prefix leave it. So no file
//!   ever shows bytes that were not written to it. The size is between those of that time.
//! - A file that a rename put in another's place has the data that it had then.
//!
//! Data is not part of the prefix: buffered writes may reach the device before or after later operations.

use std::collections::BTreeMap;
use std::rc::Rc;

use blobfs::units::InodeId;

use crate::oracle::{Content, Node, SECTOR, Sector, State};
use crate::workload::{Log, same_inodes, same_metadata};

/// The oldest states that may be seen of an inode.
#[derive(Debug, Clone, Copy, Default)]
struct Oldest {
    data: usize,
    times: usize,
}

/// What was promised at a point of the disk's history.
pub(crate) struct Promise<'a> {
    log: &'a Log,
    /// The shortest prefix: number of the state behind it.
    pub(crate) first: usize,
    /// The longest one.
    pub(crate) last: usize,
    all: usize,
    inodes: BTreeMap<InodeId, Oldest>,
    /// Operations that had begun and syncs that were acknowledged: promises of one log that have these in common
    /// are the same.
    pub(crate) of: (usize, usize),
}

impl<'a> Promise<'a> {
    /// The promise at a point of the history that was recorded with the log.
    pub(crate) fn at(log: &'a Log, point: usize) -> Self {
        let mut promise = Self { log, first: 0, last: 0, all: 0, inodes: BTreeMap::new(), of: (0, 0) };
        promise.last = log.begun.iter().filter(|begun| **begun < point).count();
        let acknowledged = log.syncs.iter().filter(|sync| sync.acknowledged <= point).count();
        promise.of = (promise.last, acknowledged);
        for sync in log.syncs.iter().filter(|sync| sync.acknowledged <= point) {
            // What a sync covers has begun, even when nothing had to be written for it.
            promise.last = promise.last.max(sync.state);
            let Some(id) = sync.inode else {
                if !sync.data_lost {
                    promise.all = sync.state;
                }
                promise.first = promise.first.max(sync.state);
                continue;
            };
            let oldest = promise.inodes.entry(id).or_default();
            if !sync.data_lost {
                oldest.data = sync.state;
            }
            if !sync.data_only {
                oldest.times = sync.state;
            }
            if let Some(node) = log.states[sync.state].nodes.get(&id) {
                let changes = &node.changes;
                let covered = if sync.data_only { changes.essential } else { changes.metadata };
                promise.first = promise.first.max(covered);
            }
        }
        promise
    }

    /// Compares what was found with every state that may be there; gives the number of the one that is.
    ///
    /// # Errors
    /// The differences to each of them.
    pub(crate) fn verify(&self, found: &State) -> Result<usize, String> {
        let mut problems = Vec::new();
        for number in (self.first..=self.last).rev() {
            match self.compare(number, found) {
                Ok(()) => return Ok(number),
                Err(problem) => problems.push(format!("  not state {number}: {problem}")),
            }
        }
        Err(format!("nothing between states {} and {}:\n{}", self.first, self.last, problems.join("\n")))
    }

    fn compare(&self, number: usize, found: &State) -> Result<(), String> {
        let mut expected = self.log.states[number].clone();
        for id in expected.nameless() {
            expected.nodes.remove(&id);
        }
        same_inodes(&expected, found)?;
        for (id, node) in &expected.nodes {
            let found = found.node(*id);
            let same = same_metadata(node, found).and_then(|()| match (node.content(), found.content()) {
                (Some(_), Some(content)) => {
                    let versions = self.versions(*id, node);
                    versions.check_size(content)?;
                    versions.check_sectors(content)?;
                    versions.check_times(found)
                }
                _ => crate::workload::same_times(node, found),
            });
            same.map_err(|problem| format!("inode {id}: {problem}"))?;
        }
        Ok(())
    }

    /// What may be seen of the file that `node` is in the prefix.
    fn versions(&self, id: InodeId, node: &Node) -> Versions {
        let inode = self.inodes.get(&id).copied().unwrap_or_default();
        let lost_before = |state: usize| self.log.failed.is_some_and(|failed| failed < state);
        let settled = if lost_before(node.changes.settled) { 0 } else { node.changes.settled };
        let oldest_data = self.all.max(inode.data).max(settled);
        let oldest_times = self.all.max(inode.times).max(node.changes.metadata);
        let mut versions = Versions {
            list: Vec::new(),
            truncations: node.changes.truncations.clone(),
            oldest_data,
            oldest_times,
        };
        for number in oldest_data.min(oldest_times)..=self.last {
            let Some(version) = self.log.states[number].nodes.get(&id) else { continue };
            match versions.list.last_mut() {
                Some(last) if Rc::ptr_eq(&last.node, version) => last.until = number,
                _ => versions.list.push(Version { until: number, node: version.clone() }),
            }
        }
        versions
    }
}

/// A file as it was for a while.
struct Version {
    /// The last state in which it was so.
    until: usize,
    node: Rc<Node>,
}

impl Version {
    fn content(&self) -> &Content {
        self.node.content().expect("an inode never changes its kind")
    }
}

/// What may be seen of a file.
struct Versions {
    list: Vec<Version>,
    /// Truncations of the prefix: state and size.
    truncations: Vec<(usize, u64)>,
    oldest_data: usize,
    oldest_times: usize,
}

impl Versions {
    fn data(&self) -> impl Iterator<Item = &Version> {
        self.list.iter().filter(|version| version.until >= self.oldest_data)
    }

    fn check_size(&self, found: &Content) -> Result<(), String> {
        let truncated = self.truncations.last().map_or(0, |(number, _)| *number);
        let sizes = self.data().filter(|version| version.until >= truncated);
        let sizes = sizes.map(|version| version.content().size);
        let (least, most) =
            sizes.fold((u64::MAX, 0), |(least, most), size| (least.min(size), most.max(size)));
        match (least..=most).contains(&found.size) {
            true => Ok(()),
            false => Err(format!("the size is {}, expected {least} to {most}", found.size)),
        }
    }

    fn check_sectors(&self, found: &Content) -> Result<(), String> {
        let mut numbers: Vec<u64> = found.stored().collect();
        for version in self.data() {
            numbers.extend(version.content().stored());
        }
        numbers.sort_unstable();
        numbers.dedup();
        for number in numbers.into_iter().filter(|number| number * SECTOR < found.size) {
            let shown = found.sector(number);
            let allowed = self.data().any(|version| {
                let later = self.truncations.iter().filter(|(at, _)| *at > version.until);
                let limit = later.map(|(_, size)| *size).min().unwrap_or(u64::MAX).min(found.size);
                cut(version.content().sector(number), number, limit) == *shown
            });
            if !allowed {
                return Err(format!(
                    "sector {number} begins with {:02x?}, which it never held since state {}",
                    &shown[..16],
                    self.oldest_data
                ));
            }
        }
        Ok(())
    }

    fn check_times(&self, found: &Node) -> Result<(), String> {
        let versions = || self.list.iter().filter(|version| version.until >= self.oldest_times);
        if !versions().any(|version| version.node.mtime == found.mtime) {
            return Err(format!("mtime {:?} was never shown", found.mtime));
        }
        if !versions().any(|version| version.node.ctime == found.ctime) {
            return Err(format!("ctime {:?} was never shown", found.ctime));
        }
        Ok(())
    }
}

/// A sector of a file that ends at `limit`.
pub(crate) fn cut(sector: &Sector, number: u64, limit: u64) -> Sector {
    let mut sector = *sector;
    let kept = limit.saturating_sub(number * SECTOR).min(SECTOR) as usize;
    sector[kept..].fill(0);
    sector
}
