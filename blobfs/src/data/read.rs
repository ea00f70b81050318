//! Reading.

use std::rc::Rc;

use bdev::IoBuffers;

use super::load::LOAD_PAGES;
use crate::error::FsError;
use crate::fs::{Context, Fs, Inode, IoFlags, regular_file};
use crate::ondisk::InodeFlags;
use crate::units::InodeId;

impl Fs {
    /// Reads without waiting when everything is cached, or declines.
    #[inline]
    pub fn try_read(
        self: &Rc<Self>,
        _ctx: &Context,
        inode: InodeId,
        offset: u64,
        dst: &IoBuffers,
        flags: IoFlags,
    ) -> Option<Result<usize, FsError>> {
        if flags.direct {
            return None;
        }
        let inodes = self.inodes.borrow();
        let inode = inodes.get(&inode)?;
        let (mode, size) = {
            let live = inode.live.borrow();
            (live.mode, live.size)
        };
        if let Err(error) = regular_file(mode) {
            return Some(Err(error));
        }
        let len = (dst.len() as u64).min(size.saturating_sub(offset));
        if len == 0 {
            return Some(Ok(0));
        }
        let bytes = offset..offset + len;
        let pages = self.cache.pages(&bytes);
        if inode.data.pages.borrow().first_missing(&pages).is_some() {
            return None;
        }
        self.cache.copy_out(inode, &bytes, dst.cursor());
        let ahead = inode.data.stream.note(&bytes, &pages);
        self.touch_atime(inode);
        if !ahead.is_empty() {
            self.load_ahead(inode, ahead);
        }
        Some(Ok(len as usize))
    }

    /// Reads up to `dst.len()` bytes at `offset`; fewer at the end of the file, and when an error comes after
    /// some. Holes read as zeros.
    ///
    /// # Errors
    /// [`FsError::IsADirectory`], [`FsError::Invalid`] for other kinds, the device's.
    pub async fn read(
        self: &Rc<Self>,
        _ctx: Context,
        inode: InodeId,
        offset: u64,
        dst: IoBuffers,
        flags: IoFlags,
    ) -> Result<usize, FsError> {
        if let Some(read) = self.begin_direct_read(inode, offset, &dst, flags) {
            return read.finish().await;
        }
        let inode = self.run(|fs| fs.inode(inode)).await?;
        regular_file(inode.live.borrow().mode)?;
        let inline = inode.live.borrow().flags.contains(InodeFlags::INLINE);
        let result = if flags.direct && !inline && !self.store.has_overlay(inode.id) {
            self.read_direct(&inode, offset, &dst).await
        } else {
            self.read_buffered(&inode, offset, &dst).await
        };
        self.touch_atime(&inode);
        result
    }

    async fn read_buffered(
        self: &Rc<Self>,
        inode: &Rc<Inode>,
        offset: u64,
        dst: &IoBuffers,
    ) -> Result<usize, FsError> {
        let mut done = 0;
        let wanted = offset..offset.saturating_add(dst.len() as u64);
        let ahead = inode.data.stream.note(&wanted, &self.cache.pages(&wanted));
        loop {
            let size = inode.live.borrow().size;
            let start = offset + done as u64;
            let bytes = start..wanted.end.min(size);
            if bytes.is_empty() {
                return Ok(done);
            }
            let pages = self.cache.pages(&bytes);
            let missing = inode.data.pages.borrow().first_missing(&pages);
            let ready = missing.map_or(bytes.end, |page| page * self.cache.page_size());
            if ready > start {
                let dst = dst.slice(done, (ready - start) as usize);
                self.cache.copy_out(inode, &(start..ready), dst.cursor());
                done += (ready - start) as usize;
            }
            let Some(missing) = missing else { continue };
            // What is read ahead adjoins: one load for both.
            let end = if ahead.start == pages.end { ahead.end } else { pages.end };
            let end = end.min(size.div_ceil(self.cache.page_size())).min(missing + LOAD_PAGES);
            match self.load(inode, missing..end).await {
                Ok(()) => {}
                Err(_) if done > 0 => return Ok(done),
                Err(error) => return Err(error),
            }
        }
    }

    /// The access time moves when it would otherwise be older than a change (`relatime`).
    #[inline]
    pub(super) fn touch_atime(self: &Rc<Self>, inode: &Rc<Inode>) {
        let stale = {
            let live = inode.live.borrow();
            live.atime <= live.mtime || live.atime <= live.ctime
        };
        if stale {
            self.set_atime(inode);
        }
    }

    #[cold]
    fn set_atime(self: &Rc<Self>, inode: &Rc<Inode>) {
        if self.check_writable().is_ok() {
            inode.live.borrow_mut().atime = self.now();
            self.note_ahead(inode);
        }
    }
}
