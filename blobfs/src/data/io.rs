//! Reading and writing.

use std::ops::Range;
use std::rc::Rc;

use bdev::{AlignedBuf, IoBuffers, WriteFlags};

use super::DataLock;
use super::extent::{Piece, Stored};
use crate::error::FsError;
use crate::fs::{Context, Fs, Inode, IoFlags, regular_file, without_privileges};
use crate::ondisk::{ExtentFlags, InodeItem};
use crate::store::Allocation;
use crate::txn::{Origin, Txn};
use crate::units::{BlockAddr, BlockRange, InodeId};

/// Largest file: offsets are signed in the protocol.
pub(super) const FILE_SIZE_MAX: u64 = i64::MAX as u64;

/// File blocks that one round of a write maps: bounds its buffer to 1 MiB at the usual block size.
const ROUND_BLOCKS: u64 = 256;

impl Fs {
    fn blocks_of(&self, bytes: &Range<u64>) -> Range<u64> {
        let block = u64::from(self.store.block_size());
        bytes.start / block..bytes.end.div_ceil(block)
    }

    /// Reads without waiting, or declines: only what lies behind the end of the file.
    pub fn try_read(
        &self,
        _ctx: &Context,
        inode: InodeId,
        offset: u64,
        dst: &IoBuffers,
        _flags: IoFlags,
    ) -> Option<Result<usize, FsError>> {
        let inodes = self.inodes.borrow();
        let item = *inodes.get(&inode)?.live.borrow();
        let file = regular_file(item.mode);
        match file {
            Err(error) => Some(Err(error)),
            Ok(()) if offset >= item.size || dst.is_empty() => Some(Ok(0)),
            Ok(()) => None,
        }
    }

    /// Reads up to `dst.len()` bytes at `offset`; fewer at the end of the file. Holes read as zeros.
    ///
    /// # Errors
    /// [`FsError::IsADirectory`], [`FsError::Invalid`] for other kinds, the device's.
    pub async fn read(
        self: &Rc<Self>,
        _ctx: Context,
        inode: InodeId,
        offset: u64,
        dst: IoBuffers,
        _flags: IoFlags,
    ) -> Result<usize, FsError> {
        let inode = self.run(|fs| fs.inode(inode)).await?;
        let _lock = DataLock::acquire(&inode).await;
        let item = *inode.live.borrow();
        regular_file(item.mode)?;
        let len = (dst.len() as u64).min(item.size.saturating_sub(offset));
        let bytes = offset..offset + len;
        if bytes.is_empty() {
            return Ok(0);
        }
        let blocks = self.blocks_of(&bytes);
        let pieces = self.run(|fs| fs.pieces(item.map, blocks.clone())).await?;
        let _io = self.store.begin_io();
        for piece in pieces {
            self.read_piece(&piece, &bytes, &dst).await?;
        }
        Ok(len as usize)
    }

    async fn read_piece(&self, piece: &Piece, bytes: &Range<u64>, dst: &IoBuffers) -> Result<(), FsError> {
        let block = u64::from(self.store.block_size());
        let start = (piece.start * block).max(bytes.start);
        let end = ((piece.start + piece.count) * block).min(bytes.end);
        let at = (start - bytes.start) as usize;
        let part = dst.slice(at, (end - start) as usize);
        let Some(Stored { addr, unwritten: false }) = piece.stored else {
            dst.zero(at, part.len());
            return Ok(());
        };
        let skip = start - piece.start * block;
        let device = addr.0 * block + skip;
        let limits = self.store.bdev().limits();
        let sector = u64::from(limits.block_size);
        if device.is_multiple_of(sector)
            && (part.len() as u64).is_multiple_of(sector)
            && limits.accepts(&part)
        {
            return Ok(self.store.bdev().read(device, part).await?);
        }
        let bounce = self.read_blocks(addr, piece.count).await?;
        dst.copy_from(at, &bounce[skip as usize..skip as usize + part.len()]);
        Ok(())
    }

    /// Device blocks as bytes.
    async fn read_blocks(&self, addr: BlockAddr, count: u64) -> Result<Rc<AlignedBuf>, FsError> {
        let block = u64::from(self.store.block_size());
        let buf = Rc::new(AlignedBuf::zeroed((count * block) as usize, 4096));
        self.store.bdev().read(addr.0 * block, IoBuffers::from_aligned(&buf)).await?;
        Ok(buf)
    }

    /// Writes without waiting, or declines: there is no cache to write into.
    pub fn try_write(
        &self,
        _ctx: &Context,
        _inode: InodeId,
        _offset: u64,
        src: &IoBuffers,
        _flags: IoFlags,
    ) -> Option<Result<usize, FsError>> {
        src.is_empty().then_some(Ok(0))
    }

    /// Writes all of `src` at `offset` (with `append`: at the end).
    ///
    /// # Errors
    /// [`FsError::FileTooLarge`], [`FsError::NoSpace`], [`FsError::ReadOnly`], kinds as for reading, the
    /// device's. What was written before the error stays.
    pub async fn write(
        self: &Rc<Self>,
        ctx: Context,
        inode: InodeId,
        offset: u64,
        src: IoBuffers,
        flags: IoFlags,
    ) -> Result<usize, FsError> {
        self.check_writable()?;
        let id = inode;
        let inode = self.run(|fs| fs.inode(id)).await?;
        {
            let _lock = DataLock::acquire(&inode).await;
            let item = *inode.live.borrow();
            regular_file(item.mode)?;
            let offset = if flags.append { item.size } else { offset };
            let end = offset.checked_add(src.len() as u64).filter(|end| *end <= FILE_SIZE_MAX);
            let end = end.ok_or(FsError::FileTooLarge)?;
            if end > item.size {
                self.clean_tail(&inode).await?;
            }
            let round = ROUND_BLOCKS * u64::from(self.store.block_size());
            let mut at = offset;
            while at < end {
                let next = (at / round + 1).saturating_mul(round).min(end);
                let part = src.slice((at - offset) as usize, (next - at) as usize);
                self.write_round(&ctx, &inode, at..next, &part, flags).await?;
                at = next;
            }
        }
        if flags.sync || flags.dsync {
            self.sync_inode(id, !flags.sync).await?;
        }
        Ok(src.len())
    }

    async fn write_round(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        bytes: Range<u64>,
        src: &IoBuffers,
        flags: IoFlags,
    ) -> Result<(), FsError> {
        let map = inode.live.borrow().map;
        let blocks = self.blocks_of(&bytes);
        let pieces = self.run(|fs| fs.pieces(map, blocks.clone())).await?;
        let _io = self.store.begin_io();
        let mut fresh: Vec<(u64, Allocation)> = Vec::new();
        let mut converted: Vec<(u64, BlockRange)> = Vec::new();
        let holes = pieces.iter().filter(|piece| piece.stored.is_none()).map(|piece| piece.count).sum();
        let mut reservation = self.run(|fs| fs.store.reserve(holes)).await?;
        for piece in &pieces {
            match piece.stored {
                Some(Stored { addr, unwritten }) => {
                    self.write_piece(piece.start..piece.start + piece.count, addr, !unwritten, &bytes, src)
                        .await?;
                    if unwritten {
                        converted.push((piece.start, BlockRange::new(addr, piece.count as u32)));
                    }
                }
                None => {
                    let mut at = piece.start;
                    while at < piece.start + piece.count {
                        let want = (piece.start + piece.count - at) as u32;
                        let allocation = self.allocate(&mut reservation, want).await?;
                        let range = allocation.range();
                        let covered = at..at + u64::from(range.count);
                        self.write_piece(covered, range.start, false, &bytes, src).await?;
                        fresh.push((at, allocation));
                        at += u64::from(range.count);
                    }
                }
            }
        }
        self.run(|fs| fs.commit_write(ctx, inode, bytes.end, &fresh, &converted, flags)).await?;
        for (_, allocation) in fresh {
            allocation.committed();
        }
        Ok(())
    }

    pub(super) async fn allocate(
        self: &Rc<Self>,
        reservation: &mut crate::store::Reservation,
        want: u32,
    ) -> Result<Allocation, FsError> {
        loop {
            match self.store.allocate(reservation, None, want) {
                Ok(allocation) => return Ok(allocation),
                Err(crate::Stop::Fail(error)) => return Err(error),
                Err(crate::Stop::Wait(wait)) => self.wait(wait).await?,
            }
        }
    }

    /// Writes the part of `bytes` (whose content is `src`) that lies in `blocks`, which are at `addr`. Blocks
    /// that it covers in part are completed with what they hold (`old`) or zeros.
    async fn write_piece(
        &self,
        blocks: Range<u64>,
        addr: BlockAddr,
        old: bool,
        bytes: &Range<u64>,
        src: &IoBuffers,
    ) -> Result<(), FsError> {
        let block = u64::from(self.store.block_size());
        let whole = blocks.start * block..blocks.end * block;
        let start = whole.start.max(bytes.start);
        let end = whole.end.min(bytes.end);
        let part = src.slice((start - bytes.start) as usize, (end - start) as usize);
        if start == whole.start && end == whole.end && self.store.bdev().limits().accepts(&part) {
            return Ok(self.store.bdev().write(addr.0 * block, part, WriteFlags::NONE).await?);
        }
        let partial = start != whole.start || end != whole.end;
        let mut buf = match partial && old {
            true => self.read_blocks(addr, blocks.end - blocks.start).await?,
            false => Rc::new(AlignedBuf::zeroed((whole.end - whole.start) as usize, 4096)),
        };
        let at = (start - whole.start) as usize;
        let target = Rc::get_mut(&mut buf).expect("the read has ended");
        part.copy_to(0, &mut target[at..at + part.len()]);
        Ok(self.store.bdev().write(addr.0 * block, IoBuffers::from_aligned(&buf), WriteFlags::NONE).await?)
    }

    fn commit_write(
        &self,
        ctx: &Context,
        inode: &Rc<Inode>,
        end: u64,
        fresh: &[(u64, Allocation)],
        converted: &[(u64, BlockRange)],
        flags: IoFlags,
    ) -> crate::Try<()> {
        let mut item = inode.stored_item();
        let before = item;
        item.size = item.size.max(end);
        if !flags.from_cache {
            item.mtime = self.now();
            item.ctime = item.mtime;
        }
        if flags.kill_privileges {
            item.mode = without_privileges(item.mode);
        }
        let mut txn = Txn::new(Origin { session: ctx.session.0, request: ctx.request });
        for (start, range) in converted {
            self.unmap(&mut txn, item.map, &(*start..start + u64::from(range.count)), false)?;
            self.map(&mut txn, item.map, *start, *range, ExtentFlags::empty())?;
        }
        for (start, allocation) in fresh {
            let range = allocation.range();
            txn.alloc(range);
            self.map(&mut txn, item.map, *start, range, ExtentFlags::empty())?;
            item.blocks += u64::from(range.count);
        }
        let only_times = InodeItem { mtime: before.mtime, ctime: before.ctime, ..item } == before;
        if txn.is_empty() && only_times {
            *inode.live.borrow_mut() = item;
            inode.ahead.set(true);
            return Ok(());
        }
        txn.put_inode(inode.id, &item);
        self.store.commit(&txn)?;
        inode.settle(item);
        Ok(())
    }

    /// Zeroes the last block behind the end of the file, before the file grows over it.
    pub(super) async fn clean_tail(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<(), FsError> {
        let block = u64::from(self.store.block_size());
        let item = *inode.live.borrow();
        let tail = item.size % block;
        if tail != 0 && !inode.data.tail_clean.get() {
            let last = item.size / block;
            let pieces = self.run(|fs| fs.pieces(item.map, last..last + 1)).await?;
            if let Some(Stored { addr, unwritten: false }) = pieces[0].stored {
                let mut buf = self.read_blocks(addr, 1).await?;
                Rc::get_mut(&mut buf).expect("the read has ended")[tail as usize..].fill(0);
                let write =
                    self.store.bdev().write(addr.0 * block, IoBuffers::from_aligned(&buf), WriteFlags::NONE);
                write.await?;
            }
        }
        inode.data.tail_clean.set(true);
        Ok(())
    }
}
