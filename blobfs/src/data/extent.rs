//! Which device blocks hold a range of a file.

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

    /// Adds the removal of the mapping of `range` to `txn`; with `free` the blocks go too. Gives the number
    /// of blocks that were mapped.
    pub(super) fn unmap(&self, txn: &mut Txn, map: MapId, range: &Range<u64>, free: bool) -> Try<u64> {
        let mut unmapped = 0;
        for (start, item) in self.extents(map, range)? {
            let end = start + u64::from(item.blocks);
            let device = item.device_range().start.0;
            let (cut_start, cut_end) = (start.max(range.start), end.min(range.end));
            let part =
                |from: u64, to: u64| BlockRange::new(BlockAddr(device + (from - start)), (to - from) as u32);
            if cut_start == start {
                txn.delete(Key::extent(map, start));
            } else {
                txn.put(
                    Key::extent(map, start),
                    &ExtentItem::plain(part(start, cut_start), item.flags).encode(),
                );
            }
            if cut_end < end {
                txn.put(
                    Key::extent(map, cut_end),
                    &ExtentItem::plain(part(cut_end, end), item.flags).encode(),
                );
            }
            if free {
                txn.free(part(cut_start, cut_end));
            }
            unmapped += cut_end - cut_start;
        }
        Ok(unmapped)
    }

    /// Adds a mapping of `range`'s blocks from file block `start` on to `txn`, joined to the extent before it
    /// when that continues on the device. Nothing may be mapped there.
    pub(super) fn map(
        &self,
        txn: &mut Txn,
        map: MapId,
        start: u64,
        range: BlockRange,
        flags: ExtentFlags,
    ) -> Try<()> {
        let before = match start.checked_sub(1) {
            Some(last) => self.extents(map, &(last..start))?.pop(),
            None => None,
        };
        // Only what this transaction has not changed itself.
        let untouched = |key: &Key| {
            !txn.changes().iter().any(|change| match change {
                crate::txn::Change::Put { key: changed, .. }
                | crate::txn::Change::Delete { key: changed } => changed == key,
                _ => false,
            })
        };
        if let Some((before_start, item)) = before {
            let key = Key::extent(map, before_start);
            let device = item.device_range();
            let joined = device.count.checked_add(range.count);
            let continues = device.end() == range.start && item.flags == flags && item.stored_offset == 0;
            if let Some(count) = joined.filter(|_| continues && untouched(&key)) {
                txn.put(key, &ExtentItem::plain(BlockRange::new(device.start, count), flags).encode());
                return Ok(());
            }
        }
        txn.put(Key::extent(map, start), &ExtentItem::plain(range, flags).encode());
        Ok(())
    }
}
