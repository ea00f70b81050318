//! `stat`, changes of attributes, `statfs`.

use std::rc::Rc;

use super::dir::NAME_LEN_MAX;
use super::mount::libc_mode::{PERMISSIONS, S_IFDIR, S_IFMT, S_IFREG, S_ISGID, S_ISUID, S_IXGRP};
use super::{Attr, Context, Fs, Inode, SetAttr, SetTime, StatFs};
use crate::error::{FsError, Try};
use crate::ondisk::{InodeFlags, InodeItem, Timestamp};
use crate::units::InodeId;

/// Bytes that one more inode takes, about: its item, its entry and their share of tree nodes. Turns free
/// space into the number of inodes that `statfs` must name.
const BYTES_PER_INODE: u64 = 512;

/// What is left of a mode when privileges are dropped.
pub(crate) fn without_privileges(mode: u32) -> u32 {
    let mode = mode & !S_ISUID;
    if mode & S_IXGRP != 0 { mode & !S_ISGID } else { mode }
}

impl Fs {
    /// What `stat` shows of an inode.
    pub(crate) fn attr_of(&self, inode: &Inode) -> Attr {
        let item = inode.live.borrow();
        let block_size = self.store.block_size();
        let size = if item.mode & S_IFMT == S_IFDIR { u64::from(block_size) } else { item.size };
        Attr {
            inode: inode.id,
            mode: item.mode,
            nlink: item.nlink,
            uid: item.uid,
            gid: item.gid,
            rdev: item.rdev,
            size,
            sectors: self.sectors(inode, &item),
            block_size,
            atime: item.atime,
            mtime: item.mtime,
            ctime: item.ctime,
            btime: item.btime,
        }
    }

    /// Space of an inode in units of 512 bytes, buffered and inline data counted: some programs take a file
    /// without any for one without data.
    fn sectors(&self, inode: &Inode, item: &InodeItem) -> u64 {
        let blocks = item.blocks + inode.data.pending_blocks();
        match blocks {
            0 if item.mode & S_IFMT == S_IFREG && item.flags.contains(InodeFlags::INLINE) => {
                item.size.div_ceil(512)
            }
            blocks => blocks * u64::from(self.store.block_size() / 512),
        }
    }

    /// Attributes of an inode.
    ///
    /// # Errors
    /// [`FsError::Stale`].
    pub fn get_attr(&self, _ctx: &Context, inode: InodeId) -> Try<Attr> {
        Ok(self.attr_of(&*self.inode(inode)?))
    }

    /// Changes attributes and gives the new ones.
    ///
    /// # Errors
    /// [`FsError::Invalid`] for the size of anything but a regular file ([`FsError::IsADirectory`] for a
    /// directory), [`FsError::FileTooLarge`], [`FsError::NoSpace`], [`FsError::ReadOnly`].
    pub fn set_attr(self: &Rc<Self>, ctx: &Context, inode: InodeId, change: &SetAttr) -> Try<Attr> {
        self.check_writable()?;
        let inode = self.inode(inode)?;
        let now = self.now();
        let mut txn = self.begin(ctx);
        let truncated = match change.size {
            Some(size) => {
                regular_file(inode.live.borrow().mode)?;
                Some(self.truncate(&mut txn, &inode, size)?)
            }
            None => {
                txn.show_no_data();
                None
            }
        };
        let mut item = truncated.as_ref().map_or_else(|| inode.stored_item(), |truncated| truncated.item());
        apply(&mut item, change, now);
        self.follow_mode(&mut txn, &inode, &mut item, change)?;
        txn.put_inode(inode.id, &item);
        self.store.commit(&txn)?;
        match truncated {
            Some(truncated) => truncated.apply(self, &inode, item),
            None => inode.settle(item),
        }
        Ok(self.attr_of(&inode))
    }

    /// Space and limits.
    pub fn stat_fs(&self) -> StatFs {
        let space = self.store.space();
        let block_size = self.store.block_size();
        let per_block = (u64::from(block_size) / BYTES_PER_INODE).max(1);
        StatFs {
            block_size,
            blocks: space.total,
            free: space.available,
            inodes: space.total * per_block,
            free_inodes: space.available * per_block,
            name_len_max: NAME_LEN_MAX as u32,
        }
    }
}

/// Fails for what has no data of its own.
pub(crate) fn regular_file(mode: u32) -> Result<(), FsError> {
    match mode & S_IFMT {
        S_IFREG => Ok(()),
        S_IFDIR => Err(FsError::IsADirectory),
        _ => Err(FsError::Invalid),
    }
}

fn apply(item: &mut InodeItem, change: &SetAttr, now: Timestamp) {
    if change.kill_privileges && item.mode & S_IFMT != S_IFDIR {
        item.mode = without_privileges(item.mode);
    }
    if let Some(mode) = change.mode {
        item.mode = item.mode & S_IFMT | mode & PERMISSIONS;
    }
    item.uid = change.uid.unwrap_or(item.uid);
    item.gid = change.gid.unwrap_or(item.gid);
    if change.size.is_some() {
        item.mtime = now;
    }
    let time = |set: SetTime| match set {
        SetTime::Now => now,
        SetTime::At(time) => time,
    };
    item.atime = change.atime.map_or(item.atime, time);
    item.mtime = change.mtime.map_or(item.mtime, time);
    item.ctime = change.ctime.unwrap_or(now);
}
