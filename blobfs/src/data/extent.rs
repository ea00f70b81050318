//! Which device blocks hold a range of a file.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};

use crate::error::{Corruption, FsError, Try};
use crate::fs::Fs;
use crate::ondisk::{ExtentFlags, ExtentItem, Key};
use crate::txn::Txn;
use crate::units::{BlockAddr, BlockRange, MapId};

/// Part of a file: `start` and `count` in file blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start: u64,
    pub(super) count: u64,
    /// Where it is, or `None` for a hole.
    pub(super) stored: Option<Stored>,
}

/// Device blocks of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) addr: BlockAddr,
    /// They read as zeros.
    pub(super) unwritten: bool,
}

impl Piece {
    /// All of the extent that begins at file block `start`.
    fn of(start: u64, item: &ExtentItem) -> Self {
        let stored = Stored {
            addr: item.device_range().start,
            unwritten: item.flags.contains(ExtentFlags::UNWRITTEN),
        };
        Self { start, count: u64::from(item.blocks), stored: Some(stored) }
    }

    /// The part of the piece inside `range`.
    fn cut(self, range: &Range<u64>) -> Self {
        let start = self.start.max(range.start);
        let end = (self.start + self.count).min(range.end);
        let skip = start - self.start;
        let stored = self.stored.map(|s| Stored { addr: BlockAddr(s.addr.0 + skip), ..s });
        Self { start, count: end - start, stored }
    }
}

fn malformed(map: MapId) -> FsError {
    Corruption { structure: "extent", offset: map.0, problem: "malformed".into() }.into()
}

impl Fs {
    /// Extents of `map` that touch `range` (file blocks), whole, in order.
    pub(super) fn extents(&self, map: MapId, range: &Range<u64>) -> Try<Vec<(u64, ExtentItem)>> {
        let mut extents = Vec::new();
        let mut damaged = false;
        let mut from = range.start;
        if let Some((start, item)) = self.last_extent(map, range.start)? {
            if start + u64::from(item.blocks) > range.start {
                extents.push((start, item));
            }
            from = (start + 1).max(range.start);
        }
        self.store.scan(&Key::extent(map, from), &Key::extent(map, range.end.max(from)), |key, value| {
            match self.store.extent(key.offset, value) {
                Some(item) => extents.push((key.offset, item)),
                None => damaged = true,
            }
            ControlFlow::Continue(())
        })?;
        if damaged { Err(malformed(map).into()) } else { Ok(extents) }
    }

    /// The last extent of `map` that begins before file block `start`, with its first file block.
    pub(super) fn extent_before(&self, map: MapId, start: u64) -> Try<Option<(u64, ExtentItem)>> {
        let Some(last) = start.checked_sub(1) else { return Ok(None) };
        self.last_extent(map, last)
    }

    /// The last extent of `map` that begins at or before file block `block`.
    pub(super) fn last_extent(&self, map: MapId, block: u64) -> Try<Option<(u64, ExtentItem)>> {
        let found =
            self.store.last_at_or_before(&Key::extent(map, block), &Key::extent(map, 0), |found| {
                found.map(|(key, value)| (key.offset, self.store.extent(key.offset, value)))
            })?;
        match found {
            None => Ok(None),
            Some((start, Some(item))) => Ok(Some((start, item))),
            Some((_, None)) => Err(malformed(map).into()),
        }
    }

    /// The piece that file block `at` is in, from there on, cut at `end`.
    pub(super) fn piece_at(&self, map: MapId, at: u64, end: u64) -> Try<Piece> {
        if let Some((start, item)) = self.last_extent(map, at)?
            && start + u64::from(item.blocks) > at
        {
            return Ok(Piece::of(start, &item).cut(&(at..end)));
        }
        let mut next = end;
        self.store.scan(&Key::extent(map, at), &Key::extent(map, end), |key, _| {
            next = key.offset;
            ControlFlow::Break(())
        })?;
        Ok(Piece { start: at, count: next - at, stored: None })
    }

    /// `range` (file blocks) in pieces without gaps.
    pub(super) fn pieces(&self, map: MapId, range: Range<u64>) -> Try<Vec<Piece>> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        for (start, item) in self.extents(map, &range)? {
            let piece = Piece::of(start, &item).cut(&range);
            if piece.start > at {
                pieces.push(Piece { start: at, count: piece.start - at, stored: None });
            }
            at = piece.start + piece.count;
            pieces.push(piece);
        }
        if at < range.end {
            pieces.push(Piece { start: at, count: range.end - at, stored: None });
        }
        Ok(pieces)
    }
}

/// Changes of a map by one transaction. Later changes see the earlier ones, which the tree does not have yet.
pub(super) struct Remap<'a> {
    fs: &'a Fs,
    map: MapId,
    /// Extents that were looked at, as the tree has them.
    before: BTreeMap<u64, ExtentItem>,
    /// What becomes of them.
    after: BTreeMap<u64, ExtentItem>,
    freed: Vec<BlockRange>,
}

impl<'a> Remap<'a> {
    /// No changes yet.
    pub(super) fn new(fs: &'a Fs, map: MapId) -> Self {
        Self { fs, map, before: BTreeMap::new(), after: BTreeMap::new(), freed: Vec::new() }
    }

    /// Looks at the extents that touch `range`.
    fn load(&mut self, range: &Range<u64>) -> Try<()> {
        for (start, item) in self.fs.extents(self.map, range)? {
            if self.before.insert(start, item).is_none() {
                self.after.insert(start, item);
            }
        }
        Ok(())
    }

    /// Takes the mapping of `range` away; with `free` the blocks go too. Gives the number of blocks that were mapped.
    pub(super) fn unmap(&mut self, range: &Range<u64>, free: bool) -> Try<u64> {
        self.load(range)?;
        let touched: Vec<(u64, ExtentItem)> = self
            .after
            .range(..range.end)
            .rev()
            .map(|(start, item)| (*start, *item))
            .take_while(|(start, item)| start + u64::from(item.blocks) > range.start)
            .collect();
        let mut unmapped = 0;
        for (start, item) in touched {
            let end = start + u64::from(item.blocks);
            let device = item.device_range().start.0;
            let (cut_start, cut_end) = (start.max(range.start), end.min(range.end));
            let part =
                |from: u64, to: u64| BlockRange::new(BlockAddr(device + (from - start)), (to - from) as u32);
            self.after.remove(&start);
            for (from, to) in [(start, cut_start), (cut_end, end)].into_iter().filter(|(from, to)| from < to)
            {
                self.after.insert(from, ExtentItem::plain(part(from, to), item.flags));
            }
            if free {
                self.freed.push(part(cut_start, cut_end));
            }
            unmapped += cut_end - cut_start;
        }
        Ok(unmapped)
    }

    /// Maps the blocks of `range` from file block `start` on, joined to the extent before them when that continues on
    /// the device. Nothing may be mapped there.
    pub(super) fn map(&mut self, start: u64, range: BlockRange, flags: ExtentFlags) -> Try<()> {
        self.load(&(start.saturating_sub(1)..start + u64::from(range.count)))?;
        let before = self.after.range(..start).next_back().map(|(at, item)| (*at, *item));
        if let Some((at, item)) = before {
            let device = item.device_range();
            let adjoins = at + u64::from(item.blocks) == start && device.end() == range.start;
            let count = device.count.checked_add(range.count);
            if let Some(count) = count.filter(|_| adjoins && item.flags == flags) {
                self.after.insert(at, ExtentItem::plain(BlockRange::new(device.start, count), flags));
                return Ok(());
            }
        }
        self.after.insert(start, ExtentItem::plain(range, flags));
        Ok(())
    }

    /// Adds the changes to `txn`.
    pub(super) fn finish(self, txn: &mut Txn) {
        for start in self.before.keys().filter(|start| !self.after.contains_key(start)) {
            txn.delete(Key::extent(self.map, *start));
        }
        for (start, item) in self.after.iter().filter(|(start, item)| self.before.get(start) != Some(item)) {
            txn.put(Key::extent(self.map, *start), &item.encode());
        }
        self.freed.into_iter().for_each(|range| txn.free(range));
    }
}
