//! Inodes without a name: deleted once nobody knows them, piece by piece, over a crash too.
//!
//! An orphan item is written in the transaction that takes the last name and removed in the one that takes
//! the inode, so that a mount finds whatever was left between the two.

use std::ops::ControlFlow;
use std::rc::Rc;

use reactor::sync::yield_now;

use super::Fs;
use crate::error::{FsError, Try};
use crate::ondisk::Key;
use crate::txn::{Origin, Txn};
use crate::units::InodeId;

/// Bytes that the removal of an attribute takes in a transaction, at least.
const XATTR_CHANGE_LEN: usize = 32;

/// Bytes that the removal of the inode itself takes in a transaction, at most: three items.
const INODE_CHANGE_LEN: usize = 128;

impl Fs {
    /// Nobody may need `id` any more: deletes it in the background if it has no name and no session knows it.
    pub(super) fn release(self: &Rc<Self>, id: InodeId) {
        if self.is_released(id) {
            let fs = self.clone();
            self.store.reactor().spawn(async move { fs.delete_released(id).await });
        }
    }

    /// Deletes an inode that has no name and that nobody knows.
    pub(super) async fn delete_released(self: &Rc<Self>, id: InodeId) {
        if !self.is_released(id) {
            return;
        }
        if let Err(error) = self.delete(id).await {
            tracing::warn!(inode = id.0, %error, "deletion postponed to the next mount");
        }
    }

    fn is_released(&self, id: InodeId) -> bool {
        let nameless = self.inodes.borrow().get(&id).is_some_and(|inode| inode.live.borrow().nlink == 0);
        nameless && !self.is_known(id)
    }

    /// Deletes what was left without a name before this mount, in the background.
    pub(super) async fn delete_orphans(self: &Rc<Self>) -> Result<(), FsError> {
        let newest = InodeId(self.store.next_id());
        let Some(first) = self.run(|fs| fs.orphan_between(InodeId(0), newest)).await? else { return Ok(()) };
        let fs = self.clone();
        self.store.reactor().spawn(async move {
            if let Err(error) = fs.delete_orphans_between(first, newest).await {
                tracing::warn!(%error, "deletions postponed to the next mount");
            }
        });
        Ok(())
    }

    async fn delete_orphans_between(self: &Rc<Self>, first: InodeId, newest: InodeId) -> Result<(), FsError> {
        let mut next = Some(first);
        while let Some(id) = next {
            self.delete(id).await?;
            next = self.run(|fs| fs.orphan_between(InodeId(id.0 + 1), newest)).await?;
        }
        Ok(())
    }

    fn orphan_between(&self, from: InodeId, to: InodeId) -> Try<Option<InodeId>> {
        let mut first = None;
        self.store.scan(&Key::orphan(from), &Key::orphan(to), |key, _| {
            first = Some(InodeId(key.offset));
            ControlFlow::Break(())
        })?;
        Ok(first)
    }

    async fn delete(self: &Rc<Self>, id: InodeId) -> Result<(), FsError> {
        let _guard = match self.run(|fs| fs.inode(id)).await {
            Ok(inode) => {
                let guard = self.stop_data(&inode).await;
                self.forget_logged(&inode);
                Some(guard)
            }
            Err(FsError::Stale) => None,
            Err(error) => return Err(error),
        };
        while !self.run(|fs| fs.delete_piece(id)).await? {
            yield_now().await;
        }
        Ok(())
    }

    /// One transaction of a deletion; true when the inode is gone.
    fn delete_piece(self: &Rc<Self>, id: InodeId) -> Try<bool> {
        let inode = match self.inode(id) {
            Err(crate::Stop::Fail(FsError::Stale)) => return self.drop_orphan_item(id),
            other => other?,
        };
        let item = inode.stored_item();
        if item.nlink != 0 || self.is_known(id) {
            return Ok(true);
        }
        let mut txn = Txn::new(Origin::default());
        let mut whole = self.delete_data(&mut txn, item.map, 0)?;
        if whole {
            whole = self.delete_xattrs(&mut txn, id)?;
        }
        if whole {
            if self.store.get(&Key::inline(item.map), |value| value.is_some())? {
                txn.delete(Key::inline(item.map));
            }
            self.end_cut(&mut txn, id)?;
            txn.delete(Key::orphan(id));
            txn.delete(Key::inode(id));
        }
        self.store.commit(&txn)?;
        if whole {
            self.drop_pages(&inode);
            self.inodes.borrow_mut().remove(&id);
        }
        Ok(whole)
    }

    /// An orphan item without an inode: only a damaged image has one.
    fn drop_orphan_item(&self, id: InodeId) -> Try<bool> {
        let mut txn = Txn::new(Origin::default());
        txn.delete(Key::orphan(id));
        self.store.commit(&txn)?;
        Ok(true)
    }

    /// Adds the removal of extended attributes to `txn`, as many as fit; true when those are all.
    fn delete_xattrs(&self, txn: &mut Txn, id: InodeId) -> Try<bool> {
        let room = self.store.txn_len_max().saturating_sub(INODE_CHANGE_LEN);
        let mut keys = Vec::new();
        let mut all = true;
        self.store.scan(&Key::xattr(id, 0), &Key::xattr(id, u64::MAX), |key, _| {
            all = keys.len() < room / XATTR_CHANGE_LEN;
            if !all {
                return ControlFlow::Break(());
            }
            keys.push(*key);
            ControlFlow::Continue(())
        })?;
        for key in keys {
            // Whole, whatever it takes: the transaction that set it took more.
            let mut one = Txn::new(Origin::default());
            self.drop_xattr(&mut one, id, key)?;
            if !txn.is_empty() && txn.journal_bytes() + one.journal_bytes() > room {
                return Ok(false);
            }
            txn.append(&one);
        }
        Ok(all)
    }
}
