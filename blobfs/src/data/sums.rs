//! Checksums of file data, for file systems that have them.
//!
//! Each block of an extent that is not unwritten has a checksum in the tree ([`crate::ondisk::SumGroup`]). It is
//! put there by the transaction that maps the block and goes with the one that takes the mapping away, so that the
//! two never contradict each other; what is read from the device is compared with it before anybody sees it.
//!
//! That needs, and only such file systems pay for it:
//!
//! - a block that is mapped is never overwritten, because a power cut would leave one that is neither the old nor
//!   the new one, or has the other's checksum: changes go to new blocks, and the transaction that maps them frees the
//!   old ones. Blocks that were allocated ahead are written where they are: nobody reads them before;
//! - the bytes do not change between the sum and the end of the write: who writes into a page that is on its way to the
//!   device waits, and what comes from a client's memory directly is copied first;
//! - nothing is logged in the journal: it would be written over mapped blocks later;
//! - direct reads are checked in memory that the client cannot change.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::time::Duration;

use bdev::IoBuffers;

use super::extent::Piece;
use crate::error::{Corruption, FsError, Try};
use crate::fs::Fs;
use crate::ondisk::{Key, SUM_GROUP_BLOCKS, SUM_GROUP_LEN, SumGroup, block_sum, sum_groups};
use crate::txn::Txn;
use crate::units::{BlockAddr, InodeId, MapId};

/// Bytes that the checksums of a group take in a transaction, at most.
pub(super) const GROUP_CHANGE_LEN: usize = 32 + SUM_GROUP_LEN;

/// Bytes that their removal takes.
pub(super) const GROUP_DELETE_LEN: usize = 32;

/// Lines about wrong data in each [`PERIOD`]. Picked: enough to see what happens; a client can read a bad block as
/// often as it likes.
const LINES: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

/// Counts lines about wrong data.
#[derive(Default)]
pub(super) struct Reports {
    since: Cell<Duration>,
    lines: Cell<u32>,
}

impl Reports {
    /// Whether one more line may be written at time `now`.
    fn allow(&self, now: Duration) -> bool {
        if now.saturating_sub(self.since.get()) >= PERIOD {
            self.since.set(now);
            self.lines.set(0);
        }
        self.lines.set(self.lines.get().saturating_add(1));
        self.lines.get() <= LINES
    }
}

/// Blocks that were read.
pub(crate) struct ReadBlocks<'a> {
    /// Whose they are.
    pub(crate) inode: InodeId,
    /// Part of a value of an extended attribute, not of the file.
    pub(crate) xattr: bool,
    /// The first one, in the file or value.
    pub(crate) start: u64,
    /// The same on the device.
    pub(crate) addr: BlockAddr,
    /// Their checksums; none at all on a file system without.
    pub(crate) sums: &'a [u32],
}

fn malformed(map: MapId) -> FsError {
    Corruption { structure: "checksums", offset: map.0, problem: "malformed".into() }.into()
}

/// What is known of the checksums in `range`, which lies inside the group at `group`.
fn part(group: u64, range: &Range<u64>) -> Range<usize> {
    let inside = |block: u64| block.clamp(group, group.saturating_add(SUM_GROUP_BLOCKS)) - group;
    inside(range.start) as usize..inside(range.end) as usize
}

impl Fs {
    /// Whether a write of these blocks needs new ones.
    pub(super) fn is_written_anew(&self, piece: &Piece) -> bool {
        piece.stored.is_none_or(|stored| self.store.has_data_sums() && !stored.unwritten)
    }

    /// Bytes that the checksums of a run of `blocks` take in a transaction, at most.
    pub(super) fn sums_len(&self, blocks: u64) -> usize {
        match self.store.has_data_sums() {
            true => (blocks / SUM_GROUP_BLOCKS + 2) as usize * GROUP_CHANGE_LEN,
            false => 0,
        }
    }

    /// Calls `each` for the groups of `map` that `blocks` touches and that have an item.
    fn each_sum_group(&self, map: MapId, blocks: &Range<u64>, mut each: impl FnMut(u64, &[u8])) -> Try<()> {
        let first = blocks.start / SUM_GROUP_BLOCKS * SUM_GROUP_BLOCKS;
        self.store.scan(&Key::sums(map, first), &Key::sums(map, blocks.end.max(first)), |key, value| {
            each(key.offset, value);
            ControlFlow::Continue(())
        })
    }

    /// Checksums of `blocks`, 0 for each that has none; nothing at all on a file system without.
    pub(crate) fn sums(&self, map: MapId, blocks: &Range<u64>) -> Try<Vec<u32>> {
        if !self.store.has_data_sums() {
            return Ok(Vec::new());
        }
        let mut sums = vec![0; (blocks.end - blocks.start) as usize];
        let mut damaged = false;
        self.each_sum_group(map, blocks, |group, value| {
            let Some(SumGroup(known)) = SumGroup::decode(value) else {
                damaged = true;
                return;
            };
            let from = &known[part(group, blocks)];
            let at = (group.max(blocks.start) - blocks.start) as usize;
            sums[at..at + from.len()].copy_from_slice(from);
        })?;
        if damaged { Err(malformed(map).into()) } else { Ok(sums) }
    }

    /// `blocks` in pieces, with their checksums.
    pub(super) fn pieces_and_sums(&self, map: MapId, blocks: &Range<u64>) -> Try<(Vec<Piece>, Vec<u32>)> {
        Ok((self.pieces(map, blocks.clone())?, self.sums(map, blocks)?))
    }

    /// Adds checksums to `txn`: of runs of blocks, each with its first one. No two of them may have a block in common.
    pub(crate) fn put_sums<'s>(
        &self,
        txn: &mut Txn,
        map: MapId,
        runs: impl Iterator<Item = (u64, &'s [u32])>,
    ) -> Try<()> {
        let mut groups: BTreeMap<u64, SumGroup> = BTreeMap::new();
        for (start, sums) in runs.filter(|(_, sums)| !sums.is_empty()) {
            let blocks = start..start + sums.len() as u64;
            for at in sum_groups(&blocks) {
                let group = match groups.get_mut(&at) {
                    Some(group) => group,
                    None => {
                        let known = self.sum_group(map, at)?;
                        groups.entry(at).or_insert(known)
                    }
                };
                let first = (at.max(start) - start) as usize;
                let new = &mut group.0[part(at, &blocks)];
                new.copy_from_slice(&sums[first..first + new.len()]);
            }
        }
        groups.iter().for_each(|(at, group)| txn.put(Key::sums(map, *at), &group.encode()));
        Ok(())
    }

    fn sum_group(&self, map: MapId, at: u64) -> Try<SumGroup> {
        let found = self.store.get(&Key::sums(map, at), |value| value.map(SumGroup::decode))?;
        match found {
            None => Ok(SumGroup::EMPTY),
            Some(group) => Ok(group.ok_or_else(|| malformed(map))?),
        }
    }

    /// Adds the removal of the checksums of `blocks` to `txn`.
    pub(crate) fn clear_sums(&self, txn: &mut Txn, map: MapId, blocks: &Range<u64>) -> Try<()> {
        if !self.store.has_data_sums() || blocks.is_empty() {
            return Ok(());
        }
        let mut damaged = false;
        self.each_sum_group(map, blocks, |at, value| {
            let key = Key::sums(map, at);
            if blocks.start <= at && at.saturating_add(SUM_GROUP_BLOCKS) <= blocks.end {
                return txn.delete(key);
            }
            let Some(mut group) = SumGroup::decode(value) else {
                damaged = true;
                return;
            };
            group.0[part(at, blocks)].fill(0);
            match group.encode() {
                left if left.is_empty() => txn.delete(key),
                left if left != value => txn.put(key, &left),
                _ => {}
            }
        })?;
        if damaged { Err(malformed(map).into()) } else { Ok(()) }
    }

    /// Where the last part of `blocks` begins whose checksums at most `groups_max` items hold.
    pub(super) fn sums_behind(&self, blocks: &Range<u64>, groups_max: usize) -> u64 {
        match self.store.has_data_sums() {
            true => {
                let last = blocks.end.div_ceil(SUM_GROUP_BLOCKS);
                blocks.start.max(last.saturating_sub(groups_max.max(1) as u64) * SUM_GROUP_BLOCKS)
            }
            false => blocks.start,
        }
    }

    /// Where the first part of `blocks` ends whose checksums at most `groups_max` items hold.
    pub(super) fn sums_until(&self, map: MapId, blocks: &Range<u64>, groups_max: usize) -> Try<u64> {
        if !self.store.has_data_sums() {
            return Ok(blocks.end);
        }
        let (mut count, mut end) = (0, blocks.end);
        let from = Key::sums(map, blocks.start / SUM_GROUP_BLOCKS * SUM_GROUP_BLOCKS);
        self.store.scan(&from, &Key::sums(map, blocks.end), |key, _| {
            count += 1;
            if count <= groups_max.max(1) {
                return ControlFlow::Continue(());
            }
            end = key.offset;
            ControlFlow::Break(())
        })?;
        Ok(end)
    }

    /// Checksums of whole blocks that are about to be written; none on a file system without.
    pub(crate) fn sums_of(&self, bytes: &IoBuffers) -> Vec<u32> {
        match self.store.has_data_sums() {
            true => self.each_sum(bytes).collect(),
            false => Vec::new(),
        }
    }

    /// The same of what was read, block by block, into memory that may be shared.
    pub(super) fn each_sum(&self, bytes: &IoBuffers) -> impl Iterator<Item = u32> {
        let mut block = vec![0; self.store.block_size() as usize];
        let mut cursor = bytes.cursor();
        (0..bytes.len() / block.len()).map(move |_| {
            cursor.copy_to(&mut block);
            block_sum(&block)
        })
    }

    /// Compares blocks that were read with their checksums, if there are any. What is wrong is logged.
    ///
    /// # Errors
    /// [`FsError::WrongData`].
    pub(crate) fn verify(&self, read: &ReadBlocks<'_>, bytes: &[u8]) -> Result<(), FsError> {
        let found = bytes.chunks_exact(self.store.block_size() as usize).map(block_sum);
        self.wrong_blocks(read, found).into_iter().next().map_or(Ok(()), |(_, error)| Err(error))
    }

    /// The blocks that do not have their checksums, counted from the first one that was read, each with an error;
    /// `found` are the checksums of what they hold. They are logged.
    pub(super) fn wrong_blocks(
        &self,
        read: &ReadBlocks<'_>,
        found: impl Iterator<Item = u32>,
    ) -> Vec<(usize, FsError)> {
        let found = found.zip(read.sums).enumerate();
        let wrong = found.filter(|(_, (found, expected))| found != *expected);
        wrong.map(|(at, (found, _))| (at, self.wrong_data(read, at, found))).collect()
    }

    #[cold]
    fn wrong_data(&self, read: &ReadBlocks<'_>, at: usize, found: u32) -> FsError {
        let block_size = u64::from(self.store.block_size());
        let (inode, offset) = (read.inode.0, (read.start + at as u64) * block_size);
        let (block, expected) = (read.addr.0 + at as u64, read.sums[at]);
        let expected = match expected {
            0 => "none".to_owned(),
            sum => format!("{sum:#010x}"),
        };
        let found = format!("{found:#010x}");
        if self.cache.reports.allow(self.store.reactor().clock().monotonic()) {
            let what = if read.xattr { "value of an extended attribute" } else { "file data" };
            tracing::error!(inode, offset, block, expected, found, "{what} does not have its checksum");
        }
        let problem = format!("checksum {found} instead of {expected}, byte {offset} of inode {inode}");
        FsError::WrongData(Corruption { structure: "file data", offset: block * block_size, problem })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_reports_is_cut_off_and_begins_anew_later() {
        let reports = Reports::default();
        let at = |seconds| Duration::from_secs(seconds);
        assert_eq!((0..100).filter(|_| reports.allow(at(100))).count(), LINES as usize);
        assert!(!reports.allow(at(105)) && reports.allow(at(110)));
    }
}
