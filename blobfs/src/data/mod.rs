//! File data: cache, extents, reading, writing, truncation.
//!
//! | module | what it provides |
//! | --- | --- |
//! | `arena`, `cache` | memory of the data cache, and which page is given away |
//! | `pages` | the cached pages of one file and their states |
//! | `range_lock` | who may touch which part of a file |
//! | `read`, `load` | reading; filling pages, read-ahead |
//! | `write`, `write_back` | writing into the cache; from the cache to the device |
//! | `direct`, `bounce` | transfers between the client's memory and the device; memory of our own for them |
//! | `space` | truncation, allocation ahead, holes, deletion |
//! | `log` | small synced writes: into the journal |
//! | `sums` | checksums of blocks, where a file system has them |
//! | `extent` | which device blocks hold a range of a file, and changes of that |
//! | `sync` | durability |
//!
//! Buffered data stays in the cache until its file is synced, five seconds have passed or a quarter of the
//! cache is dirty; blocks are allocated only then, so extents are long. A file of at most
//! `INLINE_MAX` bytes without blocks is written into the tree itself.
//!
//! Invariants:
//! - an extent enters the tree only after its data is on the device, and the stored size of a file moves in
//!   the transaction that maps its data;
//! - what a client was told is written has its blocks reserved;
//! - on the device, bytes of a file's last block behind the end of the file are unspecified until the file
//!   grows: whatever makes it grow first zeroes them (`tail_clean`). In the cache they are always zero;
//! - a file that is inline is no longer than `INLINE_MAX`: it is moved to blocks before it grows over that.

mod arena;
mod bounce;
mod cache;
mod direct;
mod extent;
mod load;
mod log;
mod pages;
mod range_lock;
mod read;
mod space;
mod sums;
mod sync;
mod write;
mod write_back;

use std::cell::{Cell, OnceCell, RefCell};
use std::future::Future;
use std::rc::Rc;

use reactor::sync::Notify;

use crate::error::Try;
use crate::fs::{Fs, Inode};
use crate::ondisk::InodeItem;
use crate::txn::Txn;

pub(crate) use cache::{Cache, PAGES_MIN};
pub use direct::DirectRead;
pub(crate) use range_lock::RangeGuard;
pub(crate) use sums::ReadBlocks;

/// Largest file that is kept in the tree, in bytes, if an item can hold it. Picked: most small files of a
/// source tree fit, and a tree node of the usual size holds several.
const INLINE_MAX: u64 = 2048;

/// Data state of one inode.
#[derive(Default)]
pub struct FileData {
    pages: RefCell<pages::PageMap>,
    lock: range_lock::RangeLock,
    /// A lock, a load or a write has ended. Made when somebody waits.
    changed: OnceCell<Notify>,
    /// On the cache's list of files to write.
    listed: Cell<bool>,
    /// Blocks reserved for dirty pages that the file does not have yet.
    pending_blocks: Cell<u64>,
    /// On the device, the last block's bytes behind the end of the file are zero.
    tail_clean: Cell<bool>,
    /// Blocks from here on, in file blocks, are being freed.
    cut_from: Cell<Option<u64>>,
    /// Why they cannot be freed before the next mount.
    cut_error: RefCell<Option<crate::FsError>>,
    stream: load::Stream,
    /// What the journal has of it.
    log: log::FileLog,
    /// What a flush has to cover for everything that was written to the device.
    written: Cell<crate::store::DataStamp>,
    /// A write-back failed since the last sync.
    error: RefCell<Option<crate::FsError>>,
    /// Write-backs that failed.
    failures: Cell<u64>,
    /// Those who are about to map blocks ([`ToBlocks`]).
    to_blocks: Cell<u32>,
}

/// Held by who is going to map blocks of a file without having all of its range: meanwhile it is not written into the
/// tree.
struct ToBlocks(Rc<Inode>);

impl ToBlocks {
    fn new(inode: &Rc<Inode>) -> Self {
        inode.data.to_blocks.set(inode.data.to_blocks.get() + 1);
        Self(inode.clone())
    }
}

impl Drop for ToBlocks {
    fn drop(&mut self) {
        self.0.data.to_blocks.set(self.0.data.to_blocks.get() - 1);
    }
}

impl FileData {
    /// Blocks that buffered data will add to the file.
    pub(crate) fn pending_blocks(&self) -> u64 {
        self.pending_blocks.get()
    }

    /// Whether nothing would be lost with it: no page, no lock, no reservation, no error to be reported, no blocks to be
    /// freed.
    pub(crate) fn is_idle(&self) -> bool {
        self.pages.borrow().is_empty()
            && self.lock.is_idle()
            && !self.listed.get()
            && self.pending_blocks.get() == 0
            && self.error.borrow().is_none()
            && self.cut_from.get().is_none()
            && !self.log.is_unsettled()
    }

    /// A sync has to cover what has this stamp.
    pub(crate) fn count_as_written(&self, stamp: crate::store::DataStamp) {
        self.written.set(stamp);
    }

    /// Waits until somebody else's work on the data has ended, if there is any.
    pub(crate) async fn end_of_work(&self) {
        if !self.lock.is_idle() {
            self.changed().await;
        }
    }

    /// The next end of a lock, load or write.
    fn changed(&self) -> impl Future<Output = ()> + use<> {
        self.changed.get_or_init(Notify::new).notified()
    }

    fn notify(&self) {
        if let Some(changed) = self.changed.get() {
            changed.notify_all();
        }
    }
}

impl Fs {
    /// Largest file that is kept in the tree.
    fn inline_max(&self) -> u64 {
        INLINE_MAX.min(self.store.item_len_max() as u64)
    }

    /// Whether buffered data of a file waits for its write-back. While a file without a byte moves to blocks its first
    /// page does, too, but it is none.
    fn is_dirty(&self, inode: &Inode) -> bool {
        let pages = inode.live.borrow().size.div_ceil(self.cache.page_size());
        inode.data.pages.borrow().is_unwritten(&(0..pages))
    }

    /// Whether data of a file waits for its write-back, or only the size (all that was behind the stored one has been
    /// punched out), or data has been written that a replay would bring older bytes over.
    pub(crate) fn has_unwritten_content(&self, inode: &Inode) -> bool {
        let is_sized = inode.stored_size.get() == inode.live.borrow().size;
        !is_sized || self.is_dirty(inode) || inode.data.log.is_unsettled()
    }

    /// Commits `txn` with the inode's new item.
    fn commit_item(&self, txn: &mut Txn, inode: &Inode, item: InodeItem) -> Try<()> {
        txn.put_inode(inode.id, &item);
        self.store.commit(txn)?;
        inode.settle(item);
        Ok(())
    }

    /// Waits until nothing is under way in a file's data, and keeps it so.
    pub(crate) async fn stop_data(&self, inode: &Rc<Inode>) -> RangeGuard {
        RangeGuard::acquire(inode, 0..u64::MAX, range_lock::Mode::Change).await
    }

    /// An inode without a name is being deleted: what the journal has of its data matters no more.
    pub(crate) fn forget_logged(&self, inode: &Inode) {
        inode.data.pages.borrow_mut().forget_logged();
    }
}

#[cfg(test)]
mod tests;
