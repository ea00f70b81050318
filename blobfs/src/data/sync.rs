//! Durability.

use std::rc::Rc;

use super::DataLock;
use crate::error::{FsError, Try};
use crate::fs::{Fs, Inode};
use crate::txn::{Origin, Txn};
use crate::units::InodeId;

impl Fs {
    /// Waits until the data operation that holds an inode's lock has ended.
    pub(crate) async fn wait_for_data(self: &Rc<Self>, inode: InodeId) -> Result<(), FsError> {
        let inode = self.run(|fs| fs.inode(inode)).await?;
        drop(DataLock::acquire(&inode).await);
        Ok(())
    }

    /// Makes an inode ready to grow: the bytes behind its end are zero.
    pub(crate) async fn prepare_growth(self: &Rc<Self>, inode: InodeId) -> Result<(), FsError> {
        let inode = self.run(|fs| fs.inode(inode)).await?;
        let _lock = DataLock::acquire(&inode).await;
        self.clean_tail(&inode).await
    }

    /// Puts attributes that are ahead of the tree into it.
    fn fold(&self, inode: &Rc<Inode>) -> Try<()> {
        if !inode.ahead.get() {
            return Ok(());
        }
        let item = inode.stored_item();
        let mut txn = Txn::new(Origin::default());
        txn.put_inode(inode.id, &item);
        self.store.commit(&txn)?;
        inode.settle(item);
        Ok(())
    }

    /// Makes a file's or directory's data and attributes durable; with `data_only` not times alone.
    ///
    /// # Errors
    /// The device's; from then on the file system is read-only.
    pub async fn sync_inode(self: &Rc<Self>, inode: InodeId, data_only: bool) -> Result<(), FsError> {
        let inode = self.run(|fs| fs.inode(inode)).await?;
        if !data_only {
            self.run(|fs| fs.fold(&inode)).await?;
        }
        self.store.sync(self.store.last_seq()).await
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// As [`Fs::sync_inode`].
    pub async fn sync_all(self: &Rc<Self>) -> Result<(), FsError> {
        let ahead: Vec<_> =
            self.inodes.borrow().values().filter(|inode| inode.ahead.get()).cloned().collect();
        for inode in ahead {
            self.run(|fs| fs.fold(&inode)).await?;
        }
        self.store.sync(self.store.last_seq()).await
    }
}
