//! Truncation, allocation ahead, holes.

use std::ops::{ControlFlow, Range};
use std::rc::Rc;

use super::DataLock;
use super::io::FILE_SIZE_MAX;
use crate::error::{FsError, Stop, Try, Wait};
use crate::fs::{Context, FallocateMode, Fs, Inode, IoFlags, SeekTarget, regular_file};
use crate::ondisk::{ExtentFlags, ExtentItem, InodeItem, Key};
use crate::txn::{Origin, Txn};
use crate::units::{InodeId, MapId};

/// Bytes that the change of one extent takes in a transaction, at most: a rewritten head and tail, a freed
/// range.
const EXTENT_CHANGE_LEN: usize = 192;

/// A truncation that a transaction carries.
pub(crate) struct Truncated {
    item: InodeItem,
    shrinks: bool,
}

impl Truncated {
    /// The inode's item with the new size.
    pub(crate) fn item(&self) -> InodeItem {
        self.item
    }

    /// The transaction has been applied; `item` is what it put.
    pub(crate) fn apply(self, inode: &Inode, item: InodeItem) {
        inode.settle(item);
        if self.shrinks {
            inode.data.tail_clean.set(false);
        }
    }
}

impl Fs {
    /// Adds the change of a file's size to `txn`; the caller puts the item.
    pub(crate) fn truncate(&self, txn: &mut Txn, inode: &Rc<Inode>, size: u64) -> Try<Truncated> {
        if size > FILE_SIZE_MAX {
            return Err(FsError::FileTooLarge.into());
        }
        if inode.data.locked.get() {
            return Err(Wait::Range(inode.id).into());
        }
        let mut item = inode.stored_item();
        let shrinks = size < item.size;
        if size > item.size && !inode.data.tail_clean.get() {
            return Err(Wait::WriteBack(inode.id).into());
        }
        let block = u64::from(self.store.block_size());
        let mut piece = Txn::new(Origin::default());
        let (whole, freed) = self.free_from(&mut piece, item.map, size.div_ceil(block))?;
        item.blocks = item.blocks.saturating_sub(freed);
        if !whole {
            // A step on the way, as a transaction of its own; the caller comes again.
            let kept = self.end_of_map(item.map, &piece)? * block;
            item.size = item.size.min(kept.max(size));
            piece.put_inode(inode.id, &item);
            self.store.commit(&piece)?;
            inode.settle(item);
            inode.data.tail_clean.set(false);
            return Err(Stop::Wait(Wait::Commit));
        }
        txn.append(&piece);
        item.size = size;
        Ok(Truncated { item, shrinks })
    }

    /// First block behind everything that stays mapped when `txn` is applied: the start of the lowest extent
    /// that it deletes.
    fn end_of_map(&self, map: MapId, txn: &Txn) -> Try<u64> {
        let deleted = txn.changes().iter().filter_map(|change| match change {
            crate::txn::Change::Delete { key } if key.owner == map.0 => Some(key.offset),
            _ => None,
        });
        Ok(deleted.min().unwrap_or(0))
    }

    /// Frees the extents of `map` from file block `from` on, as many of the last ones as fit a transaction.
    /// True when those are all.
    pub(crate) fn delete_data(&self, txn: &mut Txn, map: MapId, from: u64) -> Try<bool> {
        Ok(self.free_from(txn, map, from)?.0)
    }

    fn free_from(&self, txn: &mut Txn, map: MapId, from: u64) -> Try<(bool, u64)> {
        let room = (self.store.txn_len_max() / 2).saturating_sub(txn.journal_bytes());
        let most = (room / EXTENT_CHANGE_LEN).max(1);
        let mut freed = 0;
        let mut end = u64::MAX;
        for _ in 0..most {
            let last = self.store.last_at_or_before(
                &Key::extent(map, end.saturating_sub(1)),
                &Key::extent(map, 0),
                |found| found.map(|(key, value)| (key.offset, ExtentItem::decode(value))),
            )?;
            let Some((start, Some(item))) = last else { return Ok((true, freed)) };
            let extent_end = start + u64::from(item.blocks);
            if extent_end <= from {
                return Ok((true, freed));
            }
            freed += self.unmap(txn, map, &(start.max(from)..extent_end), true)?;
            if start <= from {
                return Ok((true, freed));
            }
            end = start;
        }
        Ok((false, freed))
    }

    /// Forgets what is cached of a deleted inode.
    pub(crate) fn drop_pages(&self, _inode: &Inode) {}

    /// Allocates, punches or zeroes a range.
    ///
    /// # Errors
    /// [`FsError::Invalid`] for an empty range, [`FsError::FileTooLarge`], [`FsError::NoSpace`],
    /// [`FsError::ReadOnly`], kinds as for reading.
    pub async fn fallocate(
        self: &Rc<Self>,
        ctx: Context,
        inode: InodeId,
        mode: FallocateMode,
        offset: u64,
        len: u64,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        let id = inode;
        let inode = self.run(|fs| fs.inode(id)).await?;
        regular_file(inode.live.borrow().mode)?;
        let end = offset.checked_add(len).filter(|end| *end <= FILE_SIZE_MAX).ok_or(FsError::FileTooLarge)?;
        if len == 0 {
            return Err(FsError::Invalid);
        }
        match mode {
            FallocateMode::PunchHole => self.zero_range(ctx, &inode, offset..end, true).await,
            FallocateMode::Zero { keep_size } => {
                self.zero_range(ctx, &inode, offset..end, false).await?;
                self.allocate_range(&inode, offset..end, keep_size).await
            }
            FallocateMode::Allocate { keep_size } => {
                self.allocate_range(&inode, offset..end, keep_size).await
            }
        }
    }

    async fn allocate_range(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        bytes: Range<u64>,
        keep_size: bool,
    ) -> Result<(), FsError> {
        let _lock = DataLock::acquire(inode).await;
        let block = u64::from(self.store.block_size());
        let blocks = bytes.start / block..bytes.end.div_ceil(block);
        if !keep_size && bytes.end > inode.live.borrow().size {
            self.clean_tail(inode).await?;
        }
        let map = inode.live.borrow().map;
        let pieces = self.run(|fs| fs.pieces(map, blocks.clone())).await?;
        let holes = pieces.iter().filter(|piece| piece.stored.is_none()).map(|piece| piece.count).sum();
        let mut reservation = self.run(|fs| fs.store.reserve(holes)).await?;
        for hole in pieces.iter().filter(|piece| piece.stored.is_none()) {
            let mut at = hole.start;
            while at < hole.start + hole.count {
                let want = u32::try_from(hole.start + hole.count - at).unwrap_or(u32::MAX);
                let allocation = self.allocate(&mut reservation, want).await?;
                let range = allocation.range();
                self.run(|fs| {
                    let mut txn = Txn::new(Origin::default());
                    let mut item = inode.stored_item();
                    item.blocks += u64::from(range.count);
                    txn.alloc(range);
                    fs.map(&mut txn, item.map, at, range, ExtentFlags::UNWRITTEN)?;
                    txn.put_inode(inode.id, &item);
                    fs.store.commit(&txn)?;
                    inode.settle(item);
                    Ok(())
                })
                .await?;
                allocation.committed();
                at += u64::from(range.count);
            }
        }
        self.run(|fs| {
            let mut item = inode.stored_item();
            if !keep_size {
                item.size = item.size.max(bytes.end);
            }
            item.ctime = fs.now();
            item.mtime = item.ctime;
            let mut txn = Txn::new(Origin::default());
            txn.put_inode(inode.id, &item);
            fs.store.commit(&txn)?;
            inode.settle(item);
            Ok(())
        })
        .await
    }

    /// Makes a range read as zeros: whole blocks lose their mapping, partial ones are overwritten.
    async fn zero_range(
        self: &Rc<Self>,
        ctx: Context,
        inode: &Rc<Inode>,
        bytes: Range<u64>,
        touch: bool,
    ) -> Result<(), FsError> {
        let block = u64::from(self.store.block_size());
        let size = inode.live.borrow().size;
        let whole = bytes.start.div_ceil(block)..bytes.end / block;
        let head = bytes.start..(whole.start * block).min(bytes.end);
        let tail = (whole.end * block).max(head.end)..bytes.end;
        for edge in [head, tail] {
            let edge = edge.start.min(size)..edge.end.min(size);
            let mapped = edge.start / block..edge.end.div_ceil(block);
            let map = inode.live.borrow().map;
            let stored = !edge.is_empty()
                && self
                    .run(|fs| fs.pieces(map, mapped.clone()))
                    .await?
                    .iter()
                    .any(|piece| piece.stored.is_some());
            if stored {
                let zeros = Rc::new(bdev::AlignedBuf::zeroed((edge.end - edge.start) as usize, 512));
                let src = bdev::IoBuffers::from_aligned(&zeros);
                self.write(ctx, inode.id, edge.start, src, IoFlags::default()).await?;
            }
        }
        let _lock = DataLock::acquire(inode).await;
        if whole.start < whole.end {
            // In rounds, so that each fits a transaction however many extents there are.
            let mut left = whole.clone();
            while !left.is_empty() {
                left = self.run(|fs| fs.punch_round(inode, &left)).await?;
            }
        }
        if touch {
            let mut live = inode.live.borrow_mut();
            live.mtime = self.now();
            live.ctime = live.mtime;
            inode.ahead.set(true);
        }
        Ok(())
    }

    /// Unmaps the first extents of `blocks`; gives what is left.
    fn punch_round(&self, inode: &Rc<Inode>, blocks: &Range<u64>) -> Try<Range<u64>> {
        let mut item = inode.stored_item();
        let most = (self.store.txn_len_max() / 2 / EXTENT_CHANGE_LEN).max(1);
        let mut ends = Vec::new();
        let from = Key::extent(item.map, blocks.start);
        self.store.scan(&from, &Key::extent(item.map, blocks.end), |key, _| {
            ends.push(key.offset);
            if ends.len() > most { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        let end = if ends.len() > most { ends[most] } else { blocks.end };
        let mut txn = Txn::new(Origin::default());
        let freed = self.unmap(&mut txn, item.map, &(blocks.start..end), true)?;
        if freed > 0 {
            item.blocks = item.blocks.saturating_sub(freed);
            txn.put_inode(inode.id, &item);
            self.store.commit(&txn)?;
            inode.settle(item);
        }
        Ok(end..blocks.end)
    }

    /// The next byte at or behind `offset` that is data or a hole.
    ///
    /// # Errors
    /// [`FsError::NoData`] when there is none before the end of the file, kinds as for reading.
    pub fn seek(&self, _ctx: &Context, inode: InodeId, offset: u64, target: SeekTarget) -> Try<u64> {
        let item = *self.inode(inode)?.live.borrow();
        regular_file(item.mode)?;
        if offset >= item.size {
            return Err(FsError::NoData.into());
        }
        let block = u64::from(self.store.block_size());
        let blocks = offset / block..item.size.div_ceil(block);
        for piece in self.pieces(item.map, blocks)? {
            let is_data = piece.stored.is_some_and(|stored| !stored.unwritten);
            if is_data == (target == SeekTarget::Data) {
                return Ok((piece.start * block).max(offset));
            }
        }
        match target {
            SeekTarget::Data => Err(FsError::NoData.into()),
            SeekTarget::Hole => Ok(item.size),
        }
    }
}
