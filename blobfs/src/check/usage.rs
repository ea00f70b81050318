//! Blocks of the device, one bit each, kept only for groups in which something is set.

use hashbrown::HashMap;

use crate::ondisk::bitmap;
use crate::ondisk::superblock::Superblock;
use crate::store::groups;

/// A set of blocks.
#[derive(Clone)]
pub(super) struct BlockSet {
    group_blocks: u64,
    groups: HashMap<u64, Vec<u8>>,
}

impl BlockSet {
    /// No blocks.
    pub(super) fn new(superblock: &Superblock) -> Self {
        Self { group_blocks: u64::from(superblock.group_blocks), groups: HashMap::new() }
    }

    /// Takes a group's bits as they are.
    pub(super) fn set_group(&mut self, group: u64, bits: &[u8]) {
        self.groups.insert(group, bits.to_vec());
    }

    /// Adds or removes a run of blocks. Gives the runs that were in (or out of) the set already.
    pub(super) fn change(
        &mut self,
        superblock: &Superblock,
        start: u64,
        count: u64,
        used: bool,
    ) -> Vec<(u64, u64)> {
        let mut unchanged = Vec::new();
        let len = superblock.group_blocks as usize / 8;
        for (key, bits) in groups(superblock, start, count) {
            let group = key.offset;
            let bytes = self.groups.entry(group).or_insert_with(|| vec![0; len]);
            if bitmap::change(bytes, bits.clone(), used) {
                continue;
            }
            for bit in bits {
                if !bitmap::change(bytes, bit..bit + 1, used) {
                    push_run(&mut unchanged, group * self.group_blocks + bit as u64);
                }
            }
        }
        unchanged
    }

    /// Blocks that are in this set and not in `other`, in runs.
    pub(super) fn without(&self, other: &Self) -> Vec<(u64, u64)> {
        let mut numbers: Vec<u64> = self.groups.keys().copied().collect();
        numbers.sort_unstable();
        let mut runs = Vec::new();
        for group in numbers {
            let (bytes, others) = (&self.groups[&group], other.groups.get(&group));
            if others == Some(bytes) {
                continue;
            }
            for (index, byte) in bytes.iter().enumerate() {
                let more = byte & !others.and_then(|others| others.get(index)).copied().unwrap_or(0);
                for bit in (0..8).filter(|bit| more & 1 << bit != 0) {
                    push_run(&mut runs, group * self.group_blocks + index as u64 * 8 + bit);
                }
            }
        }
        runs
    }

    /// Adds all blocks of another set.
    pub(super) fn add_all(&mut self, other: &Self) {
        for (group, more) in &other.groups {
            let bytes = self.groups.entry(*group).or_insert_with(|| vec![0; more.len()]);
            bytes.iter_mut().zip(more).for_each(|(byte, more)| *byte |= more);
        }
    }

    /// Adds all blocks of groups of which nothing is known.
    pub(super) fn add_unknown_groups(&mut self, known: &Self, superblock: &Superblock) {
        for group in 0..superblock.block_count.div_ceil(self.group_blocks) {
            if !known.groups.contains_key(&group) {
                self.groups.insert(group, vec![0xff; superblock.group_blocks as usize / 8]);
            }
        }
    }

    /// Whether one of these blocks is in the set.
    pub(super) fn touches(&self, superblock: &Superblock, start: u64, count: u64) -> bool {
        groups(superblock, start, count).any(|(key, mut bits)| {
            let bytes = self.groups.get(&key.offset);
            bytes.is_some_and(|bytes| bits.any(|bit| bytes[bit / 8] & 1 << (bit % 8) != 0))
        })
    }

    /// The first run of `count` blocks, from `from` on, of which none is in the set.
    pub(super) fn find_free(&self, superblock: &Superblock, from: u64, count: u64) -> Option<u64> {
        let (mut start, mut at) = (from, from);
        while at < superblock.block_count {
            let group = at / self.group_blocks;
            let end = ((group + 1) * self.group_blocks).min(superblock.block_count);
            let runs = match self.groups.get(&group) {
                None => std::iter::once(at..end).collect(),
                Some(bytes) => self.free_runs_of(bytes, group, at, end),
            };
            for run in runs {
                if run.start != at {
                    start = run.start;
                }
                at = run.end;
                if at - start >= count {
                    return Some(start);
                }
            }
            if at != end {
                (start, at) = (end, end);
            }
        }
        None
    }

    fn free_runs_of(&self, bytes: &[u8], group: u64, from: u64, end: u64) -> Vec<std::ops::Range<u64>> {
        let base = group * self.group_blocks;
        bitmap::free_runs(bytes, (end - base) as usize)
            .into_iter()
            .map(|run| (base + run.start as u64).max(from)..base + run.end as u64)
            .filter(|run| run.start < run.end)
            .collect()
    }

    /// The groups in which something is set, in order, with their bits.
    pub(super) fn bitmaps(&self) -> impl Iterator<Item = (u64, &[u8])> {
        let mut numbers: Vec<u64> = self.groups.keys().copied().collect();
        numbers.sort_unstable();
        numbers.into_iter().map(|group| (group, &self.groups[&group][..]))
    }

    /// Number of blocks.
    pub(super) fn len(&self) -> u64 {
        let ones = |bytes: &Vec<u8>| bytes.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        self.groups.values().map(ones).sum()
    }
}

/// Adds a block to the last of ascending runs, or begins one. A run is its first block and the one behind
/// its last.
fn push_run(runs: &mut Vec<(u64, u64)>, block: u64) {
    match runs.last_mut() {
        Some((_, end)) if *end == block => *end += 1,
        _ => runs.push((block, block + 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ondisk::superblock::tests::sample;

    #[test]
    fn runs_cross_groups_and_overlaps_are_told() {
        let superblock = Superblock { group_blocks: 64, ..sample() };
        let mut set = BlockSet::new(&superblock);
        assert!(set.change(&superblock, 60, 10, true).is_empty());
        assert_eq!(set.change(&superblock, 58, 4, true), [(60, 62)]);
        assert_eq!(set.len(), 12);
        assert_eq!(set.without(&BlockSet::new(&superblock)), [(58, 70)]);
        assert_eq!(set.change(&superblock, 68, 4, false), [(70, 72)]);
        let mut other = BlockSet::new(&superblock);
        other.change(&superblock, 62, 2, true);
        assert_eq!(set.without(&other), [(58, 62), (64, 68)]);
    }

    #[test]
    fn free_runs_are_found_across_groups() {
        let superblock = Superblock { group_blocks: 64, block_count: 300, ..sample() };
        let mut set = BlockSet::new(&superblock);
        set.change(&superblock, 0, 60, true);
        set.change(&superblock, 70, 2, true);
        assert_eq!(set.find_free(&superblock, 0, 10), Some(60));
        assert_eq!(set.find_free(&superblock, 0, 11), Some(72));
        assert_eq!(set.find_free(&superblock, 65, 5), Some(65));
        assert_eq!(set.find_free(&superblock, 0, 228), Some(72));
        assert_eq!(set.find_free(&superblock, 0, 229), None);
        assert!(set.touches(&superblock, 69, 2) && !set.touches(&superblock, 60, 10));
        let mut all = BlockSet::new(&superblock);
        all.add_unknown_groups(&set, &superblock);
        all.add_all(&set);
        assert_eq!(all.find_free(&superblock, 0, 11), Some(72));
        assert_eq!(all.find_free(&superblock, 0, 57), None);
    }
}
