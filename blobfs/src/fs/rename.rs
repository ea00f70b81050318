//! Moving names: one transaction, whatever it touches.

use std::rc::Rc;

use smallvec::SmallVec;

use super::create::{changed_directory, file_type_of};
use super::dir::{Place, check_name};
use super::mount::libc_mode::{S_IFCHR, S_IFDIR, S_IFMT};
use super::{Context, CreateSpec, Fs, Inode, NewNode, RenameMode};
use crate::error::{FsError, Try, Wait};
use crate::ondisk::{DirentRef, InodeItem, Key, Timestamp, encode_dirent};
use crate::txn::Txn;
use crate::units::InodeId;

/// A place in the name space.
#[derive(Clone, Copy)]
struct Name<'a> {
    parent: InodeId,
    name: &'a [u8],
}

/// Inode items that a rename changes; the same directory may be touched more than once.
#[derive(Default)]
struct Changed(SmallVec<[(Rc<Inode>, InodeItem); 4]>);

impl Changed {
    fn item(&mut self, inode: &Rc<Inode>) -> &mut InodeItem {
        let at = self.0.iter().position(|(changed, _)| changed.id == inode.id).unwrap_or_else(|| {
            self.0.push((inode.clone(), inode.stored_item()));
            self.0.len() - 1
        });
        &mut self.0[at].1
    }

    fn directory(&mut self, inode: &Rc<Inode>, entries: i64, subdirs: i32, now: Timestamp) {
        let item = self.item(inode);
        *item = changed_directory(*item, entries, subdirs, now);
    }
}

fn is_directory(inode: &Inode) -> bool {
    inode.live.borrow().mode & S_IFMT == S_IFDIR
}

impl Fs {
    /// Moves `name` of `parent` to `new_name` of `new_parent`. With `whiteout` a character device 0:0 takes
    /// the old place.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::Exists`] (by mode), [`FsError::NotEmpty`], [`FsError::IsADirectory`],
    /// [`FsError::NotADirectory`], [`FsError::Invalid`] for a move below itself, [`FsError::ReadOnly`].
    pub fn rename(
        self: &Rc<Self>,
        ctx: &Context,
        (parent, name): (InodeId, &[u8]),
        (new_parent, new_name): (InodeId, &[u8]),
        mode: RenameMode,
        whiteout: bool,
    ) -> Try<()> {
        self.check_writable()?;
        check_name(name)?;
        check_name(new_name)?;
        let from = Name { parent, name };
        let to = Name { parent: new_parent, name: new_name };
        match mode {
            RenameMode::Exchange if whiteout => Err(FsError::Invalid.into()),
            RenameMode::Exchange => self.exchange(ctx, from, to),
            RenameMode::Replace | RenameMode::NoReplace => {
                self.move_name(ctx, from, to, mode == RenameMode::NoReplace, whiteout)
            }
        }
    }

    fn move_name(
        self: &Rc<Self>,
        ctx: &Context,
        from: Name<'_>,
        to: Name<'_>,
        no_replace: bool,
        whiteout: bool,
    ) -> Try<()> {
        let old_dir = self.directory(from.parent)?;
        let new_dir = self.live_directory(to.parent)?;
        let (from_key, id) = self.find_existing(from.parent, from.name)?;
        let source = self.inode(id)?;
        let moves_directory = is_directory(&source);
        if moves_directory {
            self.check_not_below(id, to.parent)?;
        }
        let (to_key, target) = match self.find(to.parent, to.name)? {
            Place::Found { .. } if no_replace => return Err(FsError::Exists.into()),
            Place::Found { inode, .. } if inode == id => return Ok(()),
            Place::Found { key, inode } => (key, Some(self.inode(inode)?)),
            Place::Free(Some(key)) => (key, None),
            Place::Free(None) => return Err(FsError::NoSpace.into()),
        };
        if let Some(target) = &target {
            self.check_replaceable(moves_directory, target)?;
        }
        if target.is_some() && self.has_unwritten_content(&source) {
            // The new content is on the device before the old one goes.
            return Err(Wait::WriteBack(id).into());
        }
        let now = self.now();
        let mut txn = self.begin(ctx);
        let mut changed = Changed::default();
        txn.delete(from_key);
        if whiteout {
            let device = CreateSpec {
                node: NewNode::Special { file_type: S_IFCHR, rdev: 0 },
                mode: 0,
                umask: 0,
                security: &[],
            };
            let (whiteout, item) = self.new_inode(ctx, &old_dir, &device, &mut txn)?;
            let entry = DirentRef { inode: whiteout, file_type: file_type_of(item.mode), name: from.name };
            txn.put_with(from_key, |out| encode_dirent(entry, out));
        }
        let subdir = i32::from(moves_directory);
        changed.directory(&old_dir, if whiteout { 0 } else { -1 }, -subdir, now);
        changed.directory(&new_dir, i64::from(target.is_none()), subdir, now);
        let replaced = target.map(|target| {
            let replaces_directory = is_directory(&target);
            if replaces_directory {
                changed.directory(&new_dir, 0, -1, now);
            }
            self.drop_name(&mut txn, target, now)
        });
        self.put_moved(&mut txn, &mut changed, &source, to_key, to, now);
        self.commit_changed(txn, changed)?;
        if let Some(replaced) = replaced {
            replaced.apply(self);
        }
        Ok(())
    }

    fn exchange(&self, ctx: &Context, a: Name<'_>, b: Name<'_>) -> Try<()> {
        let (a_dir, b_dir) = (self.directory(a.parent)?, self.directory(b.parent)?);
        let (a_key, a_id) = self.find_existing(a.parent, a.name)?;
        let (b_key, b_id) = self.find_existing(b.parent, b.name)?;
        let (a_inode, b_inode) = (self.inode(a_id)?, self.inode(b_id)?);
        if a_id == b_id {
            return Ok(());
        }
        let (a_is, b_is) = (is_directory(&a_inode), is_directory(&b_inode));
        if a_is {
            self.check_not_below(a_id, b.parent)?;
        }
        if b_is {
            self.check_not_below(b_id, a.parent)?;
        }
        let now = self.now();
        let mut txn = self.begin(ctx);
        let mut changed = Changed::default();
        changed.directory(&a_dir, 0, i32::from(b_is) - i32::from(a_is), now);
        changed.directory(&b_dir, 0, i32::from(a_is) - i32::from(b_is), now);
        self.put_moved(&mut txn, &mut changed, &a_inode, b_key, b, now);
        self.put_moved(&mut txn, &mut changed, &b_inode, a_key, a, now);
        self.commit_changed(txn, changed)
    }

    /// `inode` appears at `key`.
    fn put_moved(
        &self,
        txn: &mut Txn,
        changed: &mut Changed,
        inode: &Rc<Inode>,
        key: Key,
        to: Name<'_>,
        now: Timestamp,
    ) {
        let item = changed.item(inode);
        item.ctime = now;
        if item.mode & S_IFMT == S_IFDIR {
            item.parent = to.parent;
        }
        let entry = DirentRef { inode: inode.id, file_type: file_type_of(item.mode), name: to.name };
        txn.put_with(key, |out| encode_dirent(entry, out));
    }

    fn commit_changed(&self, mut txn: Txn, changed: Changed) -> Try<()> {
        for (inode, item) in &changed.0 {
            txn.put_inode(inode.id, item);
        }
        self.store.commit(&txn)?;
        for (inode, item) in changed.0 {
            inode.settle(item);
        }
        Ok(())
    }

    /// Whether something may take the place of `target`.
    fn check_replaceable(&self, by_directory: bool, target: &Inode) -> Try<()> {
        match (by_directory, is_directory(target)) {
            (true, false) => Err(FsError::NotADirectory.into()),
            (false, true) => Err(FsError::IsADirectory.into()),
            (true, true) if !self.is_empty(target.id)? => Err(FsError::NotEmpty.into()),
            _ => Ok(()),
        }
    }

    /// Fails when `directory` is `below` or an ancestor of it: a directory cannot hold itself.
    fn check_not_below(&self, directory: InodeId, below: InodeId) -> Try<()> {
        if self.is_below(below, directory)? { Err(FsError::Invalid.into()) } else { Ok(()) }
    }
}
