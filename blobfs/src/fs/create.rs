//! New names and new inodes.

use std::rc::Rc;

use super::dir::{Place, check_name};
use super::mount::libc_mode::{PERMISSIONS, S_IFDIR, S_IFLNK, S_IFMT, S_IFREG, S_ISGID, S_IXGRP};
use super::{Context, CreateSpec, Entry, Fs, Inode, NewNode};
use crate::error::{FsError, Try};
use crate::ondisk::{DirentRef, InodeFlags, InodeItem, Key, encode_dirent};
use crate::txn::Txn;
use crate::units::{InodeId, MapId};

/// Hard links of one inode, as on other Linux file systems.
const LINKS_MAX: u32 = 65_000;

/// `DT_*` of a mode.
pub(super) fn file_type_of(mode: u32) -> u8 {
    ((mode & S_IFMT) >> 12) as u8
}

/// A directory's attributes after an entry came (`+1`) or went (`-1`), and likewise a subdirectory.
pub(super) fn changed_directory(
    mut item: InodeItem,
    entries: i64,
    subdirs: i32,
    now: crate::ondisk::Timestamp,
) -> InodeItem {
    item.size = item.size.saturating_add_signed(entries);
    item.nlink = item.nlink.saturating_add_signed(subdirs);
    item.mtime = now;
    item.ctime = now;
    item
}

/// Set-group-id of what is made in a set-group-id directory of group `gid`: a directory hands it on; a program
/// gets the privilege only from a member of the group.
fn inherited_set_gid(ctx: &Context, mode: u32, gid: u32) -> u32 {
    const PROGRAM: u32 = S_ISGID | S_IXGRP;
    let is_member = ctx.uid == 0 || ctx.gid == gid || ctx.supplementary_gid == Some(gid);
    match mode & S_IFMT {
        S_IFDIR => mode | S_ISGID,
        _ if mode & PROGRAM == PROGRAM && !is_member => mode & !S_ISGID,
        _ => mode,
    }
}

impl Fs {
    /// Creates an inode under a new name. The session's count of it is one.
    ///
    /// # Errors
    /// [`FsError::Exists`], [`FsError::NotADirectory`], name errors, [`FsError::NoSpace`] (also for a full
    /// hash bucket), [`FsError::ReadOnly`].
    pub fn create(&self, ctx: &Context, parent: InodeId, name: &[u8], spec: &CreateSpec<'_>) -> Try<Entry> {
        self.check_writable()?;
        self.check_session_room(ctx.session)?;
        check_name(name)?;
        let directory = self.live_directory(parent)?;
        let key = self.vacant(parent, name)?;
        let mut txn = self.begin(ctx);
        let (id, item) = self.new_inode(ctx, &directory, spec, &mut txn)?;
        let entry = DirentRef { inode: id, file_type: file_type_of(item.mode), name };
        txn.put_with(key, |out| encode_dirent(entry, out));
        let subdirs = i32::from(item.mode & S_IFMT == S_IFDIR);
        let changed = changed_directory(*directory.live.borrow(), 1, subdirs, self.now());
        txn.put_inode(parent, &changed);
        self.store.commit(&txn)?;
        directory.settle(changed);
        Ok(self.introduce(ctx, id, item))
    }

    /// Creates a regular file without a name; it vanishes when it is forgotten before it was linked.
    ///
    /// # Errors
    /// As [`Fs::create`].
    pub fn create_tmpfile(&self, ctx: &Context, parent: InodeId, spec: &CreateSpec<'_>) -> Try<Entry> {
        self.check_writable()?;
        self.check_session_room(ctx.session)?;
        let directory = self.live_directory(parent)?;
        let mut txn = self.begin(ctx);
        let (id, mut item) = self.new_inode(ctx, &directory, spec, &mut txn)?;
        item.nlink = 0;
        txn.put_inode(id, &item);
        txn.put(Key::orphan(id), &[]);
        self.store.commit(&txn)?;
        Ok(self.introduce(ctx, id, item))
    }

    /// Gives an inode one more name. The session's count of it grows by one.
    ///
    /// # Errors
    /// [`FsError::NotPermitted`] for a directory, [`FsError::TooManyLinks`], and those of [`Fs::create`].
    pub fn link(&self, ctx: &Context, inode: InodeId, new_parent: InodeId, new_name: &[u8]) -> Try<Entry> {
        self.check_writable()?;
        self.check_session_room(ctx.session)?;
        check_name(new_name)?;
        let directory = self.live_directory(new_parent)?;
        let target = self.inode(inode)?;
        let mut item = target.stored_item();
        if item.mode & S_IFMT == S_IFDIR {
            return Err(FsError::NotPermitted.into());
        }
        if item.nlink >= LINKS_MAX {
            return Err(FsError::TooManyLinks.into());
        }
        let key = self.vacant(new_parent, new_name)?;
        let now = self.now();
        let mut txn = self.begin(ctx);
        if item.nlink == 0 {
            // The last session may have forgotten it while this call waited, and then it is being deleted.
            self.check_known(ctx.session, inode)?;
            txn.delete(Key::orphan(inode));
        }
        item.nlink += 1;
        item.ctime = now;
        txn.put_inode(inode, &item);
        let entry = DirentRef { inode, file_type: file_type_of(item.mode), name: new_name };
        txn.put_with(key, |out| encode_dirent(entry, out));
        let changed = changed_directory(*directory.live.borrow(), 1, 0, now);
        txn.put_inode(new_parent, &changed);
        self.store.commit(&txn)?;
        target.settle(item);
        directory.settle(changed);
        self.remember(ctx.session, inode);
        Ok(Entry { attr: self.attr_of(&target) })
    }

    /// A directory that still has a name: nothing can be created in a removed one.
    pub(super) fn live_directory(&self, id: InodeId) -> Try<Rc<Inode>> {
        let directory = self.directory(id)?;
        let gone = directory.live.borrow().nlink == 0;
        if gone { Err(FsError::NotFound.into()) } else { Ok(directory) }
    }

    /// The key for a new entry of that name.
    pub(super) fn vacant(&self, directory: InodeId, name: &[u8]) -> Try<Key> {
        match self.find(directory, name)? {
            Place::Found { .. } => Err(FsError::Exists.into()),
            Place::Free(Some(key)) => Ok(key),
            Place::Free(None) => Err(FsError::NoSpace.into()),
        }
    }

    fn introduce(&self, ctx: &Context, id: InodeId, item: InodeItem) -> Entry {
        let inode = Inode::new(id, item);
        let attr = self.attr_of(&inode);
        self.inodes.borrow_mut().insert(id, inode);
        self.remember(ctx.session, id);
        Entry { attr }
    }

    /// Adds a new inode and what belongs to it to `txn`.
    pub(super) fn new_inode(
        &self,
        ctx: &Context,
        directory: &Inode,
        spec: &CreateSpec<'_>,
        txn: &mut Txn,
    ) -> Try<(InodeId, InodeItem)> {
        let id = InodeId(self.store.next_id());
        let now = self.now();
        let parent = *directory.live.borrow();
        let (file_type, rdev) = match spec.node {
            NewNode::File => (S_IFREG, 0),
            NewNode::Directory => (S_IFDIR, 0),
            NewNode::Symlink(_) => (S_IFLNK, 0),
            NewNode::Special { file_type, rdev } => (file_type & S_IFMT, rdev),
        };
        let is_directory = file_type == S_IFDIR;
        let acls = self.inherited_acls(directory, spec, file_type)?;
        let mut mode = file_type | acls.mode & PERMISSIONS;
        let gid = if parent.mode & S_ISGID != 0 { parent.gid } else { ctx.gid };
        if parent.mode & S_ISGID != 0 {
            mode = inherited_set_gid(ctx, mode, gid);
        }
        let mut item = InodeItem {
            mode,
            nlink: if is_directory { 2 } else { 1 },
            uid: ctx.uid,
            gid,
            rdev,
            flags: InodeFlags::default(),
            project: parent.project,
            size: 0,
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            map: MapId(id.0),
            parent_map: MapId(0),
            parent: if is_directory { directory.id } else { InodeId(0) },
        };
        if let NewNode::Symlink(target) = spec.node {
            self.check_symlink(target)?;
            item.size = target.len() as u64;
            item.flags |= InodeFlags::INLINE;
            txn.put(Key::inline(item.map), target);
        }
        for (name, value) in spec.security {
            self.put_new_xattr(txn, id, &mut item, name, value)?;
        }
        acls.store(self, txn, id, &mut item)?;
        txn.put_inode(id, &item);
        Ok((id, item))
    }

    fn check_symlink(&self, target: &[u8]) -> Result<(), FsError> {
        // PATH_MAX with its NUL, or what one item holds on a device with tiny nodes.
        let max = self.store.item_len_max().min(4095);
        match target.len() {
            0 => Err(FsError::Invalid),
            len if len > max => Err(FsError::NameTooLong),
            _ => Ok(()),
        }
    }

    /// Target of a symbolic link.
    ///
    /// # Errors
    /// [`FsError::Invalid`] for anything else.
    pub fn read_link(&self, _ctx: &Context, inode: InodeId) -> Try<Vec<u8>> {
        let item = *self.inode(inode)?.live.borrow();
        if item.mode & S_IFMT != S_IFLNK {
            return Err(FsError::Invalid.into());
        }
        let target = self.store.get(&Key::inline(item.map), |value| value.map(<[u8]>::to_vec))?;
        target.ok_or_else(|| super::xattr::damaged("symbolic link", inode).into())
    }
}
