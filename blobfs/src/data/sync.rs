//! Durability.

use std::rc::Rc;

use crate::error::{FsError, Try};
use crate::fs::{Fs, Inode};
use crate::txn::{Origin, Txn};
use crate::units::InodeId;

impl Fs {
    /// Puts attributes that are ahead of the tree into it; the size only up to the first page that neither the device
    /// nor the journal has as it is.
    pub(crate) fn fold(&self, inode: &Rc<Inode>) -> Try<()> {
        if !inode.gone.get() {
            self.settle_changed(inode)?;
        }
        if !inode.ahead.get() || inode.gone.get() {
            return Ok(());
        }
        let mut item = inode.stored_item();
        item.size = item.size.max(self.written_size(inode));
        let mut txn = Txn::new(Origin::default());
        txn.keep_promise();
        if item.size == inode.stored_size.get() {
            txn.show_no_data();
        }
        self.commit_item(&mut txn, inode, item)
    }

    /// What the stored size may become: what lies before it is on the device, in the journal, or holes.
    fn written_size(&self, inode: &Inode) -> u64 {
        let page_size = self.cache.page_size();
        let from = inode.stored_size.get() / page_size;
        let unsynced = inode.data.pages.borrow().first_unsynced(&(from..u64::MAX));
        let size = inode.live.borrow().size;
        unsynced.map_or(size, |page| size.min(page * page_size))
    }

    /// Writes what is dirty of a file now, and puts its attributes into the tree. Others may write meanwhile; the size
    /// that the file has now, should it not shrink, is stored afterwards.
    ///
    /// # Errors
    /// As [`Fs::write_back`].
    pub(crate) async fn write_back_and_fold(self: &Rc<Self>, inode: &Rc<Inode>) -> Result<(), FsError> {
        let size = inode.live.borrow().size;
        loop {
            self.write_back_file(inode).await?;
            self.run(|fs| fs.fold(inode)).await?;
            if inode.has_stored(size) {
                return Ok(());
            }
        }
    }

    /// Makes a file's or directory's data and attributes durable; with `data_only` not times alone.
    ///
    /// # Errors
    /// The device's; from then on the file system is read-only. Also that of an earlier write-back, once.
    pub async fn sync_inode(self: &Rc<Self>, inode: InodeId, data_only: bool) -> Result<(), FsError> {
        let inode = self.run(|fs| fs.inode(inode)).await?;
        let size = inode.live.borrow().size;
        loop {
            let is_logged = self.run(|fs| fs.log_dirty(&inode)).await;
            let written = match is_logged {
                Ok(true) => Ok(()),
                Ok(false) => self.write_back_file(&inode).await,
                Err(error) => Err(error),
            };
            let earlier = inode.data.error.take();
            written?;
            earlier.map_or(Ok(()), Err)?;
            if !data_only || inode.data.log.is_unsettled() || !inode.has_stored(size) {
                self.run(|fs| fs.fold(&inode)).await?;
            }
            if inode.has_stored(size) {
                break;
            }
        }
        self.store.sync_data(self.store.last_seq(), inode.data.written.get()).await
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// As [`Fs::sync_inode`]; also that of an earlier write-back of any file, once.
    pub async fn sync_all(self: &Rc<Self>) -> Result<(), FsError> {
        let written = self.write_back_all().await;
        let earlier = self.cache.failure.take();
        self.store.sync(self.store.last_seq()).await?;
        written?;
        earlier.map_or(Ok(()), Err)
    }
}
