//! Filling pages from the device, for readers and ahead of them.
//!
//! A load is a task of its own: whoever waits for it may go away, the pages are finished all the same.

use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;

use bdev::{IoBuffers, Segment};
use reactor::sync::join_all;

use super::arena::Slot;
use super::extent::{Piece, Stored};
use super::range_lock::{Mode, RangeGuard};
use super::sums::ReadBlocks;
use crate::error::{Corruption, FsError};
use crate::fs::{Fs, Inode};
use crate::ondisk::{InodeFlags, InodeItem, Key};

/// Pages per load: 1 MiB of the usual size, as the largest request.
pub(super) const LOAD_PAGES: u64 = 256;

/// First window of a sequential reader, in pages.
const WINDOW_MIN: u64 = 32;

/// How a file is being read.
#[derive(Default)]
pub(super) struct Stream {
    /// Byte behind the last read.
    next: Cell<u64>,
    /// Pages to read ahead; 0: not sequential.
    window: Cell<u64>,
    /// Page behind everything that was read ahead.
    ahead: Cell<u64>,
}

impl Stream {
    /// Notes a read of `bytes` in `pages`. Gives the pages to load ahead, if any; empty for most reads.
    pub(super) fn note(&self, bytes: &Range<u64>, pages: &Range<u64>) -> Range<u64> {
        let next = self.next.replace(bytes.end);
        if bytes.start != next {
            self.window.set(0);
            return 0..0;
        }
        let window = self.window.get();
        if window == 0 {
            self.window.set(WINDOW_MIN);
            self.ahead.set(pages.end);
        } else if pages.end + window / 2 < self.ahead.get() {
            return 0..0;
        } else {
            self.window.set((window * 2).min(LOAD_PAGES));
        }
        let start = self.ahead.get().max(pages.end);
        let end = pages.end + self.window.get();
        self.ahead.set(end.max(start));
        start..end.max(start)
    }
}

impl Fs {
    /// Waits until the first page of `pages` is loaded, and loads as many of the others as are absent and
    /// find room.
    pub(super) async fn load(self: &Rc<Self>, inode: &Rc<Inode>, pages: Range<u64>) -> Result<(), FsError> {
        loop {
            let first = inode.data.pages.borrow().get(pages.start);
            if first.loaded {
                return Ok(());
            }
            if first.slot.is_some() {
                inode.data.changed().await;
                continue;
            }
            // Before the look for room: other loads may end between that and the wait.
            let relieved = self.cache.relieved.notified();
            let (fs, file, range) = (self.clone(), inode.clone(), pages.clone());
            let task = self.store.reactor().spawn(async move { fs.load_absent(&file, range).await });
            if !task.await? {
                self.relief(relieved).await;
            }
        }
    }

    /// Loads pages that will be wanted soon, if there is room.
    pub(super) fn load_ahead(self: &Rc<Self>, inode: &Rc<Inode>, pages: Range<u64>) {
        let end = inode.live.borrow().size.div_ceil(self.cache.page_size());
        let pages = pages.start..pages.end.min(end);
        if pages.is_empty() || inode.data.pages.borrow().first_missing(&pages).is_none() {
            return;
        }
        let (fs, file) = (self.clone(), inode.clone());
        drop(self.store.reactor().spawn(async move {
            // A reader that comes to the place will meet the error again.
            let _ = fs.load_absent(&file, pages).await;
        }));
    }

    /// Loads the first run of absent pages in `pages`. False when no slot was to be had.
    async fn load_absent(self: &Rc<Self>, inode: &Rc<Inode>, pages: Range<u64>) -> Result<bool, FsError> {
        let _guard = RangeGuard::acquire(inode, pages.clone(), Mode::Transfer).await;
        let mut taken: Vec<(u64, Slot)> = Vec::new();
        for page in pages.start..pages.end.min(pages.start + LOAD_PAGES) {
            if inode.data.pages.borrow().get(page).slot.is_some() {
                if taken.is_empty() {
                    continue;
                }
                break;
            }
            let Some(slot) = self.take_slot(inode.id, page, &(0..0)) else { break };
            inode.data.pages.borrow_mut().insert(page, slot);
            taken.push((page, slot));
        }
        let Some(&(first, _)) = taken.first() else {
            return Ok(inode.data.pages.borrow().get(pages.start).slot.is_some());
        };
        let mut pages: Vec<Result<bool, FsError>> = match self.fill(inode, first, &taken).await {
            Ok(pages) => pages,
            Err(error) => vec![Err(error); taken.len()],
        };
        for ((page, slot), filled) in taken.into_iter().zip(&pages) {
            match filled {
                Ok(mapped) => inode.data.pages.borrow_mut().set_loaded(page, *mapped),
                Err(_) => {
                    inode.data.pages.borrow_mut().remove(page);
                    self.free_slot(slot);
                }
            }
        }
        inode.data.notify();
        self.cache.relieved.notify_all();
        // A reader that comes to one of the others will meet its error.
        pages.swap_remove(0).map(|_| true)
    }

    /// Reads pages `first..` into their slots. Says which of them are mapped as a whole, and which do not have their
    /// checksums.
    async fn fill(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        first: u64,
        taken: &[(u64, Slot)],
    ) -> Result<Vec<Result<bool, FsError>>, FsError> {
        let item = *inode.live.borrow();
        let page_size = self.cache.page_size();
        let memory: Vec<Segment> = taken.iter().map(|(_, slot)| self.cache.memory(*slot)).collect();
        if item.flags.contains(InodeFlags::INLINE) {
            self.fill_inline(inode, &item, first, &memory).await?;
            return Ok(vec![Ok(false); taken.len()]);
        }
        let block = u64::from(self.store.block_size());
        let per_page = page_size / block;
        let blocks = first * per_page..(first + taken.len() as u64) * per_page;
        let (pieces, sums) = self.run(|fs| fs.pieces_and_sums(item.map, &blocks)).await?;
        let buffers = IoBuffers::new(joined(&memory), self.cache.hold());
        // Blocks behind the end may be on their way out of the file.
        let is_inside = |page: u64| (page + 1) * page_size <= item.size;
        let mut mapped: Vec<bool> = taken.iter().map(|(page, _)| is_inside(*page)).collect();
        let io = self.store.begin_io();
        let mut reads = Vec::new();
        for Piece { start, count, stored } in &pieces {
            let at = ((start - blocks.start) * block) as usize;
            let part = buffers.slice(at, (count * block) as usize);
            match stored {
                Some(Stored { addr, unwritten: false }) => self.queue_reads(addr.0 * block, part, &mut reads),
                _ => {
                    part.zero(0, part.len());
                    let touched = start / per_page..(start + count).div_ceil(per_page);
                    mapped[(touched.start - first) as usize..(touched.end - first) as usize].fill(false);
                }
            }
        }
        for result in join_all(reads).await {
            result?;
        }
        drop(io);
        let wrong = self.wrong_in(inode, &pieces, &blocks, &buffers, &sums);
        self.store.overlay(inode.id, first * page_size, &buffers);
        // The file may have grown meanwhile, but never over bytes that are read here: they were zeroed first.
        let end = item.size.saturating_sub(first * page_size).min(buffers.len() as u64) as usize;
        buffers.zero(end, buffers.len() - end);
        let mut filled: Vec<_> = mapped.into_iter().map(Ok).collect();
        for (at, error) in wrong {
            filled[(at / per_page) as usize] = Err(error);
        }
        Ok(filled)
    }

    /// Those of `blocks`, counted from the first one, that do not have their checksums, if there are any.
    fn wrong_in(
        &self,
        inode: &Inode,
        pieces: &[Piece],
        blocks: &Range<u64>,
        buffers: &IoBuffers,
        sums: &[u32],
    ) -> Vec<(u64, FsError)> {
        let mut wrong = Vec::new();
        if sums.is_empty() {
            return wrong;
        }
        let block = self.store.block_size() as usize;
        for Piece { start, count, stored } in pieces {
            let Some(Stored { addr, unwritten: false }) = *stored else { continue };
            let (first, count) = ((start - blocks.start) as usize, *count as usize);
            let bytes = &buffers.slice(first * block, count * block);
            let sums = &sums[first..first + count];
            let read = ReadBlocks { inode: inode.id, xattr: false, start: *start, addr, sums };
            let found = self.wrong_blocks(&read, self.each_sum(bytes)).into_iter();
            wrong.extend(found.map(|(at, error)| ((first + at) as u64, error)));
        }
        wrong
    }

    async fn fill_inline(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        item: &InodeItem,
        first: u64,
        memory: &[Segment],
    ) -> Result<(), FsError> {
        for page in memory {
            page.zero();
        }
        if first != 0 {
            return Ok(());
        }
        let size = item.size as usize;
        let found = self
            .run(|fs| {
                fs.store.get(&Key::inline(item.map), |value| {
                    value.map(|value| memory[0].copy_from(&value[..value.len().min(size)])).is_some()
                })
            })
            .await?;
        if found || size == 0 {
            return Ok(());
        }
        let problem = "missing".to_owned();
        Err(Corruption { structure: "inline content", offset: inode.id.0, problem }.into())
    }

    /// Starts reads of a run of blocks, each within the device's limits.
    pub(super) fn queue_reads(&self, offset: u64, buffers: IoBuffers, reads: &mut Vec<bdev::Io>) {
        for (at, part) in self.transfers(&buffers) {
            reads.push(self.store.bdev().read(offset + at, part));
        }
    }

    /// `buffers` in parts that the device takes at once, with their positions. Alignment is the caller's.
    pub(super) fn transfers(&self, buffers: &IoBuffers) -> Vec<(u64, IoBuffers)> {
        let limits = self.store.bdev().limits();
        if buffers.len() <= limits.max_transfer && buffers.segments().len() <= limits.max_segments {
            return vec![(0, buffers.clone())];
        }
        // Segments are whole blocks or more, so that as many blocks never have more segments.
        let block = self.store.block_size() as usize;
        let most = (limits.max_segments * block).min(limits.max_transfer) / block * block;
        let most = most.max(block);
        (0..buffers.len()).step_by(most).map(|at| (at as u64, buffers.slice(at, most))).collect()
    }
}

/// Segments with neighbours joined.
pub(super) fn joined(segments: &[Segment]) -> Vec<Segment> {
    let mut joined: Vec<Segment> = Vec::with_capacity(segments.len());
    for segment in segments {
        match joined.last_mut().and_then(|last| last.followed_by(segment)) {
            Some(both) => *joined.last_mut().expect("there is a last one") = both,
            None => joined.push(*segment),
        }
    }
    joined
}
