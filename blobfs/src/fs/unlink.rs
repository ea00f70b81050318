//! Names that go.

use std::rc::Rc;

use super::create::changed_directory;
use super::dir::check_name;
use super::mount::libc_mode::{S_IFDIR, S_IFMT};
use super::{Context, Fs, Inode};
use crate::error::{FsError, Try};
use crate::ondisk::{InodeItem, Key, Timestamp};
use crate::txn::Txn;
use crate::units::InodeId;

/// An inode that loses a name in a transaction.
pub(super) struct Unlinked {
    inode: Rc<Inode>,
    item: InodeItem,
}

impl Unlinked {
    /// The transaction has been applied.
    pub(super) fn apply(self, fs: &Rc<Fs>) {
        let gone = self.item.nlink == 0;
        let id = self.inode.id;
        self.inode.settle(self.item);
        if gone {
            fs.release(id);
        }
    }
}

impl Fs {
    /// Removes a name of anything but a directory. The last name gone, the inode is deleted once no session
    /// knows it.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::IsADirectory`], [`FsError::NotADirectory`], [`FsError::ReadOnly`].
    pub fn unlink(self: &Rc<Self>, ctx: &Context, parent: InodeId, name: &[u8]) -> Try<()> {
        self.remove(ctx, parent, name, false)
    }

    /// Removes an empty directory.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotADirectory`], [`FsError::NotEmpty`], [`FsError::ReadOnly`].
    pub fn rmdir(self: &Rc<Self>, ctx: &Context, parent: InodeId, name: &[u8]) -> Try<()> {
        self.remove(ctx, parent, name, true)
    }

    fn remove(self: &Rc<Self>, ctx: &Context, parent: InodeId, name: &[u8], directory: bool) -> Try<()> {
        self.check_writable()?;
        check_name(name)?;
        let holder = self.directory(parent)?;
        let (key, id) = self.find_existing(parent, name)?;
        let target = self.inode(id)?;
        let is_directory = target.live.borrow().mode & S_IFMT == S_IFDIR;
        match (directory, is_directory) {
            (true, false) => return Err(FsError::NotADirectory.into()),
            (false, true) => return Err(FsError::IsADirectory.into()),
            (true, true) if !self.is_empty(id)? => return Err(FsError::NotEmpty.into()),
            _ => {}
        }
        let now = self.now();
        let mut txn = self.begin(ctx);
        txn.delete(key);
        let unlinked = self.drop_name(&mut txn, target, now);
        let changed = changed_directory(*holder.live.borrow(), -1, -i32::from(is_directory), now);
        txn.put_inode(parent, &changed);
        self.store.commit(&txn)?;
        holder.settle(changed);
        unlinked.apply(self);
        Ok(())
    }

    /// Adds the loss of one name of `inode` (of a directory: its only one) to `txn`.
    pub(super) fn drop_name(&self, txn: &mut Txn, inode: Rc<Inode>, now: Timestamp) -> Unlinked {
        let mut item = inode.stored_item();
        item.nlink = if item.mode & S_IFMT == S_IFDIR { 0 } else { item.nlink.saturating_sub(1) };
        item.ctime = now;
        if item.nlink == 0 {
            txn.put(Key::orphan(inode.id), &[]);
        }
        txn.put_inode(inode.id, &item);
        Unlinked { inode, item }
    }
}
