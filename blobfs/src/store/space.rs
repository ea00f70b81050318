//! Free data blocks in memory, what is promised, and what waits before it is free again.
//!
//! The truth on the device are the bitmap items; the free runs of a group are derived from its item when
//! something of the group is to be allocated or freed for the first time. How many blocks are free in all is
//! known from the start: the superblock says so. Map and bitmaps differ while the file system runs: an
//! allocation leaves the map at once and enters the bitmap with its transaction; a freed range leaves the
//! bitmap with its transaction and enters the map later.
//!
//! Invariants:
//! - `reserved <= free`: a reservation can always be turned into blocks;
//! - of an unknown group the bitmap is the whole truth;
//! - a range in quarantine enters the map only when the transaction that freed it is durable and every
//!   device operation that began before it has ended.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;

use reactor::sync::Notify;

use super::CHUNK_NODES_MIN;
use crate::ondisk::superblock::Superblock;
use crate::units::{BlockAddr, BlockRange, TxnSeq};

/// Device operations under way, by the time they began.
#[derive(Default)]
pub(super) struct IoEpochs {
    now: u64,
    active: BTreeMap<u64, usize>,
    ended: Notify,
}

impl IoEpochs {
    /// An operation begins.
    pub(super) fn begin(&mut self) -> u64 {
        *self.active.entry(self.now).or_default() += 1;
        self.now
    }

    /// An operation that began at `epoch` has ended.
    pub(super) fn end(&mut self, epoch: u64) {
        if let Some(count) = self.active.get_mut(&epoch) {
            *count -= 1;
            if *count == 0 {
                self.active.remove(&epoch);
                self.ended.notify_all();
            }
        }
    }

    /// Notified when operations end.
    pub(super) fn ended(&self) -> &Notify {
        &self.ended
    }

    /// Draws a line: operations from now on begin after the returned time.
    fn line(&mut self) -> u64 {
        self.now += 1;
        self.now
    }

    /// Whether every operation that began before `line` has ended.
    fn passed(&self, line: u64) -> bool {
        self.active.first_key_value().is_none_or(|(first, _)| *first >= line)
    }
}

struct Quarantined {
    range: BlockRange,
    /// The transaction that freed it.
    seq: TxnSeq,
    line: u64,
}

/// The free map.
pub(super) struct Space {
    group_blocks: u64,
    groups: u64,
    /// One bit per group: its free runs are in `runs`.
    known: Vec<u64>,
    known_groups: u64,
    /// Free runs of the known groups: start and count.
    runs: BTreeMap<u64, u64>,
    /// Blocks in `runs`.
    known_free: u64,
    /// Blocks of the smallest chunk of nodes.
    chunk_blocks: u64,
    /// Blocks in `runs` that such chunks can be made of.
    claimable: u64,
    /// Free blocks of all groups.
    free: u64,
    reserved: u64,
    quarantine: VecDeque<Quarantined>,
    /// Ranges that are to be discarded before they are free.
    discards: Option<Vec<BlockRange>>,
    /// Blocks in quarantine or being discarded.
    held_back: u64,
    /// Blocks that were let go, in all.
    let_go: u64,
    epochs: Rc<RefCell<IoEpochs>>,
    /// Where the next search begins when nobody names a goal.
    cursor: u64,
}

/// Runs that a search looks at before it takes the longest so far. Picked: keeps a search on a fragmented
/// device short; a higher number gives longer extents.
const SEARCH_RUNS: usize = 64;

/// What a search for free blocks ends with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Search {
    /// Blocks, from now on taken.
    Taken(BlockRange),
    /// The free runs of this group have to be known first ([`Space::learn`]).
    Group(u64),
    /// There are none.
    Nothing,
}

impl Space {
    /// `free` blocks, in groups that are all unknown. With `discard` freed ranges are discarded.
    pub(super) fn new(superblock: &Superblock, free: u64, discard: bool) -> Self {
        let group_blocks = u64::from(superblock.group_blocks);
        let groups = superblock.block_count.div_ceil(group_blocks);
        Self {
            group_blocks,
            groups,
            known: vec![0; groups.div_ceil(64) as usize],
            known_groups: 0,
            runs: BTreeMap::new(),
            known_free: 0,
            chunk_blocks: u64::from(CHUNK_NODES_MIN) * superblock.node_blocks(),
            claimable: 0,
            free,
            reserved: 0,
            quarantine: VecDeque::new(),
            discards: discard.then(Vec::new),
            held_back: 0,
            let_go: 0,
            epochs: Rc::default(),
            cursor: superblock.first_data_block(),
        }
    }

    /// The operations under way.
    pub(super) fn epochs(&self) -> &Rc<RefCell<IoEpochs>> {
        &self.epochs
    }

    /// Free blocks.
    pub(super) fn free(&self) -> u64 {
        self.free
    }

    /// Blocks that are promised.
    pub(super) fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Freed blocks that are not free yet.
    pub(super) fn held_back(&self) -> u64 {
        self.held_back
    }

    /// Freed blocks that became free, counted from the start.
    pub(super) fn let_go(&self) -> u64 {
        self.let_go
    }

    /// Whether a commit would let ranges go out of quarantine.
    pub(super) fn waits_for_commit(&self, durable: TxnSeq) -> bool {
        self.quarantine.iter().any(|entry| entry.seq > durable)
    }

    /// Promises blocks; the caller has checked that they are there.
    pub(super) fn reserve(&mut self, blocks: u64) {
        self.reserved += blocks;
        debug_assert!(self.reserved <= self.free);
    }

    /// Takes a promise back.
    pub(super) fn unreserve(&mut self, blocks: u64) {
        self.reserved -= blocks;
    }

    /// Whether the free runs of a group are known.
    pub(super) fn knows(&self, group: u64) -> bool {
        self.known[(group / 64) as usize] & 1 << (group % 64) != 0
    }

    /// The free runs of a group, as its bitmap says. Nothing of the group may have been allocated, freed or
    /// put into quarantine before.
    ///
    /// # Errors
    /// When the groups have other free blocks than the superblock says.
    pub(super) fn learn(&mut self, group: u64, runs: Vec<Range<u64>>) -> Result<(), String> {
        debug_assert!(!self.knows(group));
        let found: u64 = runs.iter().map(|run| run.end - run.start).sum();
        let left = self.free - self.known_free;
        let last = self.known_groups + 1 == self.groups;
        if found > left || last && found < left {
            return Err(format!("{found} blocks are free, but {left} should be in what was not read yet"));
        }
        self.known[(group / 64) as usize] |= 1 << (group % 64);
        self.known_groups += 1;
        for run in runs {
            self.insert_run(run.start, run.end - run.start);
        }
        Ok(())
    }

    /// Makes a range of known groups allocatable.
    pub(super) fn insert(&mut self, start: u64, count: u64) {
        self.insert_run(start, count);
        self.free += count;
    }

    fn insert_run(&mut self, start: u64, count: u64) {
        let (mut start, mut end) = (start, start + count);
        if let Some((&before, &len)) = self.runs.range(..start).next_back() {
            debug_assert!(before + len <= start, "blocks {start}..{end} are free already");
            if before + len == start {
                self.remove_run(before);
                start = before;
            }
        }
        if let Some(len) = self.remove_run(end) {
            end += len;
        }
        self.add_run(start, end - start);
        self.known_free += count;
    }

    fn add_run(&mut self, start: u64, len: u64) {
        self.runs.insert(start, len);
        self.claimable += len / self.chunk_blocks * self.chunk_blocks;
    }

    fn remove_run(&mut self, start: u64) -> Option<u64> {
        let len = self.runs.remove(&start)?;
        self.claimable -= len / self.chunk_blocks * self.chunk_blocks;
        Some(len)
    }

    /// Free blocks of the known groups that chunks of nodes can be made of.
    pub(super) fn claimable(&self) -> u64 {
        self.claimable
    }

    /// Free blocks of the groups that are not known.
    pub(super) fn unknown_free(&self) -> u64 {
        self.free - self.known_free
    }

    /// A group that is not known and may have free blocks: the last one, since data is written from the front.
    pub(super) fn unknown_group(&self) -> Option<u64> {
        (0..self.groups).rev().find(|group| !self.knows(*group)).filter(|_| self.known_free != self.free)
    }

    /// Blocks of the smallest chunk of nodes.
    pub(super) fn chunk_blocks(&self) -> u64 {
        self.chunk_blocks
    }

    /// The first unknown group from `group` on, and behind the last one from the start, if any can have free
    /// blocks.
    fn unknown_from(&self, group: u64) -> Option<u64> {
        if self.known_free == self.free {
            return None;
        }
        let unknown = |group: &u64| !self.knows(*group);
        (group..self.groups).find(unknown).or_else(|| (0..group.min(self.groups)).find(unknown))
    }

    /// Takes 1 to `want` contiguous blocks: at `goal`, else in a long enough run behind it, else the longest
    /// found. Asks for groups that are not known as long as that may give a longer run, and with `hurry` only
    /// when there is nothing else.
    pub(super) fn take(&mut self, goal: Option<BlockAddr>, want: u64, hurry: bool) -> Search {
        let goal = goal.map_or(self.cursor, |goal| goal.0);
        let group = (goal / self.group_blocks).min(self.groups - 1);
        if !hurry && !self.knows(group) && self.known_free != self.free {
            return Search::Group(group);
        }
        let best = self.search(goal, want);
        let enough = best.is_some_and(|(run, at)| at == goal || self.runs[&run] >= want);
        let unknown = if enough || hurry && best.is_some() { None } else { self.unknown_from(group) };
        match (unknown, best) {
            (Some(group), _) => Search::Group(group),
            (None, None) => Search::Nothing,
            (None, Some((run, at))) => {
                let count = want.min(run + self.runs[&run] - at);
                self.cut(run, at, count);
                self.cursor = at + count;
                Search::Taken(BlockRange::new(BlockAddr(at), count as u32))
            }
        }
    }

    /// A run, and where in it to begin.
    fn search(&self, goal: u64, want: u64) -> Option<(u64, u64)> {
        let around = self.runs.range(..=goal).next_back().filter(|(start, len)| **start + **len > goal);
        if let Some((&start, _)) = around {
            return Some((start, goal));
        }
        let mut best: Option<(u64, u64)> = None;
        for (&start, &len) in self.runs.range(goal..).chain(self.runs.range(..goal)).take(SEARCH_RUNS) {
            if len >= want {
                return Some((start, start));
            }
            if best.is_none_or(|(_, longest)| len > longest) {
                best = Some((start, len));
            }
        }
        best.map(|(start, _)| (start, start))
    }

    /// Takes a whole run of `count` blocks near the end of the device, away from file data.
    pub(super) fn take_exact(&mut self, count: u64) -> Search {
        let found = self.runs.iter().rev().find(|(_, len)| **len >= count);
        if let Some((&run, &len)) = found {
            let at = run + len - count;
            self.cut(run, at, count);
            return Search::Taken(BlockRange::new(BlockAddr(at), count as u32));
        }
        self.unknown_group().map_or(Search::Nothing, Search::Group)
    }

    /// Removes blocks from a run.
    fn cut(&mut self, run: u64, at: u64, count: u64) {
        let len = self.remove_run(run).expect("a run that was found");
        if at > run {
            self.add_run(run, at - run);
        }
        if at + count < run + len {
            self.add_run(at + count, run + len - at - count);
        }
        self.known_free -= count;
        self.free -= count;
    }

    /// Puts a range that transaction `seq` freed into quarantine.
    pub(super) fn quarantine(&mut self, range: BlockRange, seq: TxnSeq) {
        let line = self.epochs.borrow_mut().line();
        self.held_back += u64::from(range.count);
        self.quarantine.push_back(Quarantined { range, seq, line });
    }

    /// Lets go what has waited long enough.
    pub(super) fn release(&mut self, durable: TxnSeq) {
        while let Some(entry) = self.quarantine.front() {
            if entry.seq > durable || !self.epochs.borrow().passed(entry.line) {
                return;
            }
            let range = entry.range;
            self.quarantine.pop_front();
            match &mut self.discards {
                Some(discards) => discards.push(range),
                None => self.let_range_go(range),
            }
        }
    }

    /// Ranges that are to be discarded now, in order and joined; each goes to [`Space::let_range_go`] then.
    pub(super) fn take_discards(&mut self) -> Vec<BlockRange> {
        let mut ranges = self.discards.as_mut().map(std::mem::take).unwrap_or_default();
        ranges.sort_unstable_by_key(|range| range.start.0);
        let mut joined: Vec<BlockRange> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match joined.last_mut().filter(|last| last.end() == range.start) {
                Some(last) if last.count.checked_add(range.count).is_some() => last.count += range.count,
                _ => joined.push(range),
            }
        }
        joined
    }

    /// A range that was freed is allocatable.
    pub(super) fn let_range_go(&mut self, range: BlockRange) {
        let count = u64::from(range.count);
        self.held_back -= count;
        self.let_go += count;
        self.insert(range.start.0, count);
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "free runs of a group with one run")]
mod tests {
    use super::*;
    use crate::ondisk::superblock::tests::sample;

    fn known(runs: Vec<Range<u64>>) -> Space {
        let superblock = Superblock { block_count: 16_000, ..sample() };
        let free = runs.iter().map(|run| run.end - run.start).sum();
        let mut space = Space::new(&superblock, free, false);
        space.learn(0, runs).unwrap();
        space
    }

    fn taken(start: u64, count: u32) -> Search {
        Search::Taken(BlockRange::new(BlockAddr(start), count))
    }

    #[test]
    fn quarantine_waits_for_the_commit_and_for_earlier_operations() {
        let mut space = known(Vec::new());
        let early = space.epochs().borrow_mut().begin();
        space.quarantine(BlockRange::new(BlockAddr(10), 5), TxnSeq(3));
        let late = space.epochs().borrow_mut().begin();
        space.release(TxnSeq(2));
        assert_eq!(space.free(), 0);
        space.release(TxnSeq(3));
        assert_eq!(space.free(), 0);
        space.epochs().borrow_mut().end(early);
        space.release(TxnSeq(2));
        assert_eq!(space.free(), 0);
        space.release(TxnSeq(3));
        assert_eq!(space.free(), 5);
        space.epochs().borrow_mut().end(late);
    }

    #[test]
    fn runs_join_and_split() {
        let mut space = known(vec![10..15, 20..25]);
        space.insert(15, 5);
        assert_eq!(space.take(Some(BlockAddr(12)), 4, false), taken(12, 4));
        assert_eq!(space.take(Some(BlockAddr(100)), 50, false), taken(16, 9));
        assert_eq!(space.take_exact(3), Search::Nothing);
        assert_eq!(space.take_exact(2), taken(10, 2));
        assert_eq!((space.free(), space.take(None, 1, false)), (0, Search::Nothing));
    }

    #[test]
    fn groups_are_asked_for_near_the_goal_and_only_as_needed() {
        let superblock = Superblock { block_count: 5 * 16_384, ..sample() };
        let mut space = Space::new(&superblock, 30, false);
        let goal = |group: u64| Some(BlockAddr(group * 16_384 + 7));
        assert_eq!(space.take(goal(3), 10, false), Search::Group(3));
        space.learn(3, vec![50_000..50_004]).unwrap();
        assert_eq!(space.take(goal(3), 10, false), Search::Group(4));
        assert_eq!(space.take(goal(3), 10, true), taken(50_000, 4));
        assert_eq!(space.take_exact(8), Search::Group(4));
        space.learn(4, Vec::new()).unwrap();
        assert_eq!(space.take(goal(3), 10, true), Search::Group(0));
        space.learn(0, vec![100..126]).unwrap();
        // Nothing can be free in the others: they are not asked for.
        assert_eq!(space.take(goal(2), 10, false), taken(100, 10));
        assert_eq!(space.take_exact(20), Search::Nothing);
    }

    #[test]
    fn bitmaps_that_contradict_the_superblock_are_noticed() {
        let superblock = Superblock { block_count: 2 * 16_384, ..sample() };
        let mut space = Space::new(&superblock, 30, false);
        assert!(space.learn(0, vec![10..41]).is_err());
        space.learn(0, vec![10..20]).unwrap();
        assert!(space.learn(1, vec![16_400..16_410]).is_err());
        space.learn(1, vec![16_400..16_420]).unwrap();
    }

    #[test]
    fn discarded_ranges_are_joined_and_free_only_afterwards() {
        let superblock = Superblock { block_count: 16_000, ..sample() };
        let mut space = Space::new(&superblock, 0, true);
        space.learn(0, Vec::new()).unwrap();
        for start in [30, 10, 15] {
            space.quarantine(BlockRange::new(BlockAddr(start), 5), TxnSeq(1));
        }
        space.release(TxnSeq(1));
        assert_eq!((space.free(), space.held_back()), (0, 15));
        let ranges = space.take_discards();
        assert_eq!(ranges, [BlockRange::new(BlockAddr(10), 10), BlockRange::new(BlockAddr(30), 5)]);
        ranges.into_iter().for_each(|range| space.let_range_go(range));
        assert_eq!((space.free(), space.held_back(), space.let_go()), (15, 0, 15));
    }
}
