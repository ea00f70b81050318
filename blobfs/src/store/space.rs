//! Free data blocks in memory, what is promised, and what waits before it is free again.
//!
//! The truth on the device are the bitmap items; this map is derived from them at mount. They differ while
//! the file system runs: an allocation leaves the map at once and enters the bitmap with its transaction; a
//! freed range leaves the bitmap with its transaction and enters the map later.
//!
//! Invariants:
//! - `reserved <= free`: a reservation can always be turned into blocks;
//! - a range in quarantine enters the map only when the transaction that freed it is durable and every
//!   device operation that began before it has ended.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use crate::units::{BlockAddr, BlockRange, TxnSeq};

/// Device operations under way, by the time they began.
#[derive(Default)]
pub(super) struct IoEpochs {
    now: u64,
    active: BTreeMap<u64, usize>,
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
            }
        }
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
    /// Free runs: start and count.
    runs: BTreeMap<u64, u64>,
    free: u64,
    reserved: u64,
    quarantine: VecDeque<Quarantined>,
    quarantined: u64,
    epochs: Rc<RefCell<IoEpochs>>,
    /// Where the next search begins when nobody names a goal.
    cursor: u64,
}

/// Runs that a search looks at before it takes the longest so far. Picked: keeps a search on a fragmented
/// device short; a higher number gives longer extents.
const SEARCH_RUNS: usize = 64;

impl Space {
    /// Nothing free.
    pub(super) fn new() -> Self {
        Self {
            runs: BTreeMap::new(),
            free: 0,
            reserved: 0,
            quarantine: VecDeque::new(),
            quarantined: 0,
            epochs: Rc::default(),
            cursor: 0,
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
    pub(super) fn quarantined(&self) -> u64 {
        self.quarantined
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

    /// Makes a range allocatable.
    pub(super) fn insert(&mut self, start: u64, count: u64) {
        let (mut start, mut end) = (start, start + count);
        if let Some((&before, &len)) = self.runs.range(..start).next_back() {
            debug_assert!(before + len <= start, "blocks {start}..{end} are free already");
            if before + len == start {
                self.runs.remove(&before);
                start = before;
            }
        }
        if let Some(len) = self.runs.remove(&end) {
            end += len;
        }
        self.runs.insert(start, end - start);
        self.free += count;
    }

    /// Takes 1 to `want` contiguous blocks: at `goal`, else in a long enough run behind it, else the longest
    /// found. `None` when nothing is free.
    pub(super) fn take(&mut self, goal: Option<BlockAddr>, want: u64) -> Option<BlockRange> {
        let goal = goal.map_or(self.cursor, |goal| goal.0);
        let (run, at) = self.search(goal, want)?;
        let len = self.runs[&run];
        let count = want.min(run + len - at);
        self.cut(run, at, count);
        self.cursor = at + count;
        Some(BlockRange::new(BlockAddr(at), count as u32))
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
    pub(super) fn take_exact(&mut self, count: u64) -> Option<u64> {
        let (&run, &len) = self.runs.iter().rev().find(|(_, len)| **len >= count)?;
        let at = run + len - count;
        self.cut(run, at, count);
        Some(at)
    }

    /// Removes blocks from a run.
    fn cut(&mut self, run: u64, at: u64, count: u64) {
        let len = self.runs.remove(&run).expect("a run that was found");
        if at > run {
            self.runs.insert(run, at - run);
        }
        if at + count < run + len {
            self.runs.insert(at + count, run + len - at - count);
        }
        self.free -= count;
    }

    /// Puts a range that transaction `seq` freed into quarantine.
    pub(super) fn quarantine(&mut self, range: BlockRange, seq: TxnSeq) {
        let line = self.epochs.borrow_mut().line();
        self.quarantined += u64::from(range.count);
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
            self.quarantined -= u64::from(range.count);
            self.insert(range.start.0, u64::from(range.count));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quarantine_waits_for_the_commit_and_for_earlier_operations() {
        let mut space = Space::new();
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
        let mut space = Space::new();
        space.insert(10, 5);
        space.insert(20, 5);
        space.insert(15, 5);
        assert_eq!(space.take(Some(BlockAddr(12)), 4), Some(BlockRange::new(BlockAddr(12), 4)));
        assert_eq!(space.take(Some(BlockAddr(100)), 50), Some(BlockRange::new(BlockAddr(16), 9)));
        assert_eq!(space.take_exact(3), None);
        assert_eq!(space.take_exact(2), Some(10));
        assert_eq!((space.free(), space.take(None, 1)), (0, None));
    }
}
