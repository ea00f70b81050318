//! Durability.

use std::rc::Rc;

use crate::error::{FsError, Try};
use crate::fs::{Fs, Inode};
use crate::txn::{Origin, Txn};
use crate::units::InodeId;

impl Fs {
    /// Puts attributes that are ahead of the tree into it; the size only when no data waits for its
    /// write-back, for then nothing but holes is behind the stored one.
    pub(crate) fn fold(&self, inode: &Rc<Inode>) -> Try<()> {
        if !inode.gone.get() {
            self.settle_changed(inode)?;
        }
        if !inode.ahead.get() || inode.gone.get() {
            return Ok(());
        }
        let mut item = inode.stored_item();
        if !inode.data.is_dirty() {
            item.size = inode.live.borrow().size;
        }
        let mut txn = Txn::new(Origin::default());
        txn.keep_promise();
        if item.size == inode.stored_size.get() {
            txn.show_no_data();
        }
        self.commit_item(&mut txn, inode, item)
    }

    /// Makes a file's or directory's data and attributes durable; with `data_only` not times alone.
    ///
    /// # Errors
    /// The device's; from then on the file system is read-only. Also that of an earlier write-back, once.
    pub async fn sync_inode(self: &Rc<Self>, inode: InodeId, data_only: bool) -> Result<(), FsError> {
        let inode = self.run(|fs| fs.inode(inode)).await?;
        let is_logged = self.run(|fs| fs.log_dirty(&inode)).await;
        let written = match is_logged {
            Ok(true) => Ok(()),
            Ok(false) => self.write_back_file(&inode).await,
            Err(error) => Err(error),
        };
        let earlier = inode.data.error.take();
        written?;
        earlier.map_or(Ok(()), Err)?;
        let is_ahead = inode.data.log.is_unsettled() || inode.stored_size.get() != inode.live.borrow().size;
        if !data_only || is_ahead {
            self.run(|fs| fs.fold(&inode)).await?;
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
