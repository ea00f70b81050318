//! Transfers between the client's memory and the device, coherent with the cache.
//!
//! Only whole blocks go this way; a transfer with an end inside a block goes through the cache and is written
//! back at once. Memory that misses the device's alignment is bounced, that piece only; so is all where blocks have
//! checksums, because a client may change its memory at any time.

use std::ops::Range;
use std::rc::Rc;

use bdev::IoBuffers;
use reactor::sync::join_all;

use super::ToBlocks;
use super::bounce::{BUFFER_LEN, Bounce};
use super::extent::{Piece, Stored};
use super::pages::PageMap;
use super::range_lock::{Mode, RangeGuard};
use super::sums::ReadBlocks;
use super::write::REDEMPTIONS_MAX;
use super::write_back::Mapping;
use crate::error::FsError;
use crate::fs::{Context, Fs, Inode, IoFlags, regular_file};
use crate::ondisk::{FILE_SIZE_MAX, InodeFlags};
use crate::store::IoToken;
use crate::units::{BlockAddr, InodeId, MapId};

/// A direct read that is one operation of the device, under way.
#[must_use = "its result decides what the reply is"]
pub struct DirectRead {
    io: bdev::Io,
    len: usize,
    _range: RangeGuard,
    _token: IoToken,
}

impl DirectRead {
    /// What it gave, when it has ended.
    pub fn try_result(&self) -> Option<Result<usize, FsError>> {
        Some(self.io.try_result()?.map(|()| self.len).map_err(FsError::from))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The device's.
    pub async fn finish(self) -> Result<usize, FsError> {
        self.io.await?;
        Ok(self.len)
    }
}

/// Whole blocks that are read into memory of our own.
struct Bounced {
    /// Bytes of the file that are wanted.
    wanted: Range<u64>,
    /// The blocks that they are in, and the first one on the device.
    blocks: Range<u64>,
    addr: BlockAddr,
}

/// A part of a direct read: what it reads, and where to.
struct Part<'a> {
    bytes: Range<u64>,
    dst: &'a IoBuffers,
    /// Memory for the blocks of all of `bytes`, if any are bounced.
    bounce: Option<Bounce>,
}

impl Fs {
    /// Whether a write can bypass the cache: whole blocks, of a file that is not small.
    pub(super) fn goes_direct(&self, inode: &Inode, offset: u64, src: &IoBuffers) -> bool {
        let block = u64::from(self.store.block_size());
        let len = src.len() as u64;
        let live = inode.live.borrow();
        let small = live.blocks == 0 && live.size.max(offset.saturating_add(len)) <= self.inline_max();
        !small && offset.is_multiple_of(block) && len.is_multiple_of(block)
    }

    /// Takes pages for a transfer: nothing of them is newer in the cache than on the device.
    async fn lock_written(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        pages: &Range<u64>,
        mode: Mode,
    ) -> Result<RangeGuard, FsError> {
        self.lock_without(inode, pages, mode, PageMap::is_unwritten).await
    }

    /// Begins a read of whole blocks that lie together on the device, when nothing has to be waited for before; or
    /// declines. Without a task, and without memory of its own: most direct reads are such.
    pub fn begin_direct_read(
        self: &Rc<Self>,
        inode: InodeId,
        offset: u64,
        dst: &IoBuffers,
        flags: IoFlags,
    ) -> Option<DirectRead> {
        let block = u64::from(self.store.block_size());
        let end = offset.checked_add(dst.len() as u64)?;
        let is_whole = offset.is_multiple_of(block) && end.is_multiple_of(block) && offset < end;
        if !flags.direct
            || !is_whole
            || self.store.has_overlay(inode)
            || self.store.has_data_sums()
            || !self.store.bdev().limits().accepts(dst)
        {
            return None;
        }
        let inodes = self.inodes.borrow();
        let inode = inodes.get(&inode)?;
        let map = {
            let live = inode.live.borrow();
            let is_on_device = regular_file(live.mode).is_ok() && !live.flags.contains(InodeFlags::INLINE);
            (is_on_device && end <= live.size).then_some(live.map)?
        };
        let pages = self.cache.pages(&(offset..end));
        if inode.data.pages.borrow().is_unwritten(&pages) {
            return None;
        }
        let range = RangeGuard::try_acquire(inode, pages, Mode::Transfer)?;
        let blocks = offset / block..end / block;
        let piece = self.piece_at(map, blocks.start, blocks.end).ok()?;
        let stored =
            piece.stored.filter(|stored| !stored.unwritten && piece.count == blocks.end - blocks.start)?;
        self.touch_atime(inode);
        let token = self.store.begin_io();
        let io = self.store.bdev().read(stored.addr.0 * block, dst.clone());
        Some(DirectRead { io, len: dst.len(), _range: range, _token: token })
    }

    pub(super) async fn read_direct(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        offset: u64,
        dst: &IoBuffers,
    ) -> Result<usize, FsError> {
        let wanted = offset..offset.saturating_add(dst.len() as u64);
        let _guard = self.lock_written(inode, &self.cache.pages(&wanted), Mode::Transfer).await?;
        let item = *inode.live.borrow();
        let bytes = offset..wanted.end.min(item.size);
        if bytes.is_empty() {
            return Ok(0);
        }
        let block = u64::from(self.store.block_size());
        let is_whole = bytes.start.is_multiple_of(block) && bytes.end.is_multiple_of(block);
        // Parts of memory that is aligned are, too, if they are whole blocks of at least the alignment.
        let is_aligned = self.is_aligned(dst) && u64::from(self.store.bdev().limits().dma_align) <= block;
        let is_bounced = !is_whole || !is_aligned || self.store.has_data_sums();
        let most = if is_bounced { BUFFER_LEN as u64 } else { u64::MAX };
        let mut at = bytes.start;
        while at < bytes.end {
            let end = (at / block * block).saturating_add(most).min(bytes.end);
            let dst = dst.slice((at - bytes.start) as usize, (end - at) as usize);
            let bounce = match is_bounced {
                true => {
                    let len = end.next_multiple_of(block) - at / block * block;
                    Some(self.cache.bounce_memory.take(len as usize).await)
                }
                false => None,
            };
            self.read_part(inode, item.map, &Part { bytes: at..end, dst: &dst, bounce }).await?;
            at = end;
        }
        Ok((bytes.end - bytes.start) as usize)
    }

    async fn read_part(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        map: MapId,
        part: &Part<'_>,
    ) -> Result<(), FsError> {
        let block = u64::from(self.store.block_size());
        let blocks = part.bytes.start / block..part.bytes.end.div_ceil(block);
        let (pieces, sums) = self.run(|fs| fs.pieces_and_sums(map, &blocks)).await?;
        let io = self.store.begin_io();
        let (mut reads, mut bounced) = (Vec::new(), Vec::new());
        for piece in &pieces {
            self.read_piece(piece, part, &mut reads, &mut bounced);
        }
        let results = join_all(reads).await;
        drop(io);
        results.into_iter().collect::<Result<(), _>>()?;
        let Some(bounce) = &part.bounce else { return Ok(()) };
        for Bounced { wanted, blocks: read, addr } in bounced {
            let within = |byte: u64| (byte - blocks.start * block) as usize;
            let sums = sums.get((read.start - blocks.start) as usize..).unwrap_or_default();
            let of = ReadBlocks { inode: inode.id, xattr: false, start: read.start, addr, sums };
            self.verify(&of, &bounce.bytes()[within(read.start * block)..within(read.end * block)])?;
            let bytes = &bounce.bytes()[within(wanted.start)..within(wanted.end)];
            part.dst.copy_from((wanted.start - part.bytes.start) as usize, bytes);
        }
        Ok(())
    }

    fn read_piece(
        &self,
        piece: &Piece,
        &Part { ref bytes, dst, ref bounce }: &Part<'_>,
        reads: &mut Vec<bdev::Io>,
        bounced: &mut Vec<Bounced>,
    ) {
        let block = u64::from(self.store.block_size());
        let start = (piece.start * block).max(bytes.start);
        let end = ((piece.start + piece.count) * block).min(bytes.end);
        let at = (start - bytes.start) as usize;
        let Some(Stored { addr, unwritten: false }) = piece.stored else {
            dst.zero(at, (end - start) as usize);
            return;
        };
        let device = |byte: u64| addr.0 * block + (byte - piece.start * block);
        // Whole blocks go straight; what is left at the ends, or all that is unaligned or has checksums, is bounced.
        let first = start.next_multiple_of(block).min(end);
        let whole = first..(end / block * block).max(first);
        let middle = dst.slice((whole.start - bytes.start) as usize, (whole.end - whole.start) as usize);
        let rest = if self.is_aligned(&middle) && !self.store.has_data_sums() {
            if !middle.is_empty() {
                self.queue_reads(device(whole.start), middle, reads);
            }
            [start..whole.start, whole.end..end]
        } else {
            [start..end, end..end]
        };
        let Some(bounce) = bounce else {
            debug_assert!(rest.iter().all(Range::is_empty), "{bytes:?} was to go straight");
            return;
        };
        for wanted in rest.into_iter().filter(|wanted| !wanted.is_empty()) {
            let blocks = wanted.start / block..wanted.end.div_ceil(block);
            let skip = (blocks.start - bytes.start / block) * block;
            let len = (blocks.end - blocks.start) * block;
            let addr = BlockAddr(addr.0 + blocks.start - piece.start);
            self.queue_reads(addr.0 * block, bounce.buffers().slice(skip as usize, len as usize), reads);
            bounced.push(Bounced { wanted, blocks, addr });
        }
    }

    /// A copy of what is to be written.
    async fn bounce_out(&self, src: &IoBuffers) -> Bounce {
        let bounce = self.cache.bounce_memory.take(src.len()).await;
        let buffers = bounce.buffers();
        let mut cursor = src.cursor();
        for segment in buffers.segments() {
            cursor.drain(*segment);
        }
        bounce
    }

    /// Whether the device takes the addresses as they are.
    fn is_aligned(&self, buffers: &IoBuffers) -> bool {
        let mask = self.store.bdev().limits().dma_align as usize - 1;
        let block = self.store.block_size() as usize;
        let splits = buffers.len() > self.store.bdev().limits().max_transfer;
        buffers.segments().iter().all(|segment| {
            (segment.addr() | segment.len()) & mask == 0 && (!splits || segment.len().is_multiple_of(block))
        }) && buffers.segments().len() <= self.store.bdev().limits().max_segments
    }

    pub(super) async fn write_direct(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        offset: u64,
        src: &IoBuffers,
        flags: IoFlags,
    ) -> Result<usize, FsError> {
        let end = offset.saturating_add(src.len() as u64);
        self.admit_direct(ctx, inode, &(offset..end), flags).await?;
        let mut round = BUFFER_LEN as u64;
        let mut at = offset;
        while at < end {
            let next = (at / round + 1).saturating_mul(round).min(end);
            let part = src.slice((at - offset) as usize, (next - at) as usize);
            let flags = if at > offset { flags.without_times() } else { flags };
            match self.write_blocks_direct(inode, at..next, &part, flags).await {
                Ok(_) => at = next,
                Err(FsError::NoSpace) if round > self.cache.page_size() => round = self.cache.page_size(),
                Err(_) if at > offset => break,
                Err(error) => return Err(error),
            }
        }
        Ok((at - offset) as usize)
    }

    /// What comes before the first block of a direct write.
    pub(super) async fn admit_direct(
        self: &Rc<Self>,
        ctx: &Context,
        inode: &Rc<Inode>,
        bytes: &Range<u64>,
        flags: IoFlags,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        regular_file(inode.live.borrow().mode)?;
        if bytes.end > FILE_SIZE_MAX {
            return Err(FsError::FileTooLarge);
        }
        self.run(|fs| fs.drop_privileges(ctx, inode, flags)).await
    }

    /// Writes whole blocks. False, and nothing is written, if they were to be appended and the file does not end
    /// where they begin any more.
    pub(super) async fn write_blocks_direct(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        bytes: Range<u64>,
        src: &IoBuffers,
        flags: IoFlags,
    ) -> Result<bool, FsError> {
        let pages = self.cache.pages(&bytes);
        let block = u64::from(self.store.block_size());
        let blocks = bytes.start / block..bytes.end / block;
        let mut redemptions = 0;
        let _to_blocks = ToBlocks::new(inode);
        let (_guard, mut reservation) = loop {
            self.prepare_growth(inode, bytes.end).await?;
            let guard = self.lock_written(inode, &pages, Mode::Change).await?;
            if inode.live.borrow().flags.contains(InodeFlags::INLINE) {
                drop(guard);
                self.move_to_blocks(inode).await?;
                continue;
            }
            if !self.is_ready_to_grow(inode, bytes.end) {
                continue;
            }
            match self.reserve_to_write(inode, &blocks).await {
                Err(FsError::NoSpace) if self.store.has_promises() && redemptions < REDEMPTIONS_MAX => {
                    drop(guard);
                    self.redeem().await;
                    redemptions += 1;
                }
                reserved => break (guard, reserved?),
            }
        };
        inode.check_alive()?;
        if flags.append && inode.live.borrow().size != bytes.start {
            return Ok(false);
        }
        self.drop_range(inode, &pages);
        let is_bounced = self.store.has_data_sums() || !self.is_aligned(src);
        let bounce = if is_bounced { Some(self.bounce_out(src).await) } else { None };
        let bounced = bounce.as_ref().map(Bounce::buffers);
        let source = bounced.as_ref().unwrap_or(src);
        let io = self.store.begin_write();
        let (mut writes, mut mappings): (Vec<bdev::Io>, Vec<Mapping>) = (Vec::new(), Vec::new());
        let placed =
            self.place_run(inode, &blocks, source, &mut reservation, &mut writes, &mut mappings).await;
        let written = join_all(writes).await;
        inode.data.written.set(io.end());
        self.note_changed(inode, &bytes);
        placed?;
        written.into_iter().collect::<Result<(), _>>()?;
        self.commit_mappings(inode, mappings, bytes.end).await?;
        self.note_write(inode, bytes.end, flags);
        Ok(true)
    }
}
