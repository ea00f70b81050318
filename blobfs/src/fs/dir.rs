//! Directory entries: one item each, at (hash of the name, slot).
//!
//! The offset of an entry's key never changes while the entry exists, and is its readdir cookie: a scan
//! that resumes behind a cookie sees every entry that was there all the time exactly once, whatever is
//! created or removed meanwhile.

use std::ops::ControlFlow;

use super::mount::libc_mode::{S_IFDIR, S_IFMT};
use super::{Context, DirEntry, Entry, Fs, Inode};
use crate::error::{Corruption, FsError, Stop, Try};
use crate::ondisk::{DirentRef, Key, SLOT_BITS};
use crate::units::InodeId;

/// Longest name in bytes.
pub(crate) const NAME_LEN_MAX: usize = 255;

/// Cookie of ".", and of "..": offsets of real entries are at least `1 << SLOT_BITS`.
const COOKIE_DOT: u64 = 1;
const COOKIE_DOT_DOT: u64 = 2;

/// `DT_DIR`.
const DT_DIR: u8 = 4;

/// Where a name is, or could be.
pub(super) enum Place {
    /// The entry exists.
    Found {
        /// Its key.
        key: Key,
        /// What it names.
        inode: InodeId,
    },
    /// There is no such entry; `None` when all slots of the hash are taken.
    Free(Option<Key>),
}

/// Fails for what cannot be the name of an entry.
pub(crate) fn check_name(name: &[u8]) -> Result<(), FsError> {
    match name {
        b"" | b"." | b".." => Err(FsError::Invalid),
        _ if name.len() > NAME_LEN_MAX => Err(FsError::NameTooLong),
        _ if name.iter().any(|byte| matches!(byte, b'/' | 0)) => Err(FsError::Invalid),
        _ => Ok(()),
    }
}

fn malformed_dirent(directory: InodeId) -> FsError {
    Corruption { structure: "directory entry", offset: directory.0, problem: "malformed".into() }.into()
}

fn malformed_parents(directory: InodeId) -> FsError {
    Corruption { structure: "directory", offset: directory.0, problem: "is its own ancestor".into() }.into()
}

impl Fs {
    /// The directory with that number.
    pub(super) fn directory(&self, id: InodeId) -> Try<std::rc::Rc<Inode>> {
        let inode = self.inode(id)?;
        let mode = inode.live.borrow().mode;
        if mode & S_IFMT == S_IFDIR { Ok(inode) } else { Err(FsError::NotADirectory.into()) }
    }

    /// Looks for `name` among the slots of its hash.
    pub(super) fn find(&self, directory: InodeId, name: &[u8]) -> Try<Place> {
        let base = self.store.name_hash(name) << SLOT_BITS;
        let end = base + (1 << SLOT_BITS);
        let mut free = base;
        let mut found = None;
        let mut damaged = false;
        self.store.scan(&Key::dirent(directory, base), &Key::dirent(directory, end), |key, value| {
            let Some(entry) = DirentRef::decode(value) else {
                damaged = true;
                return ControlFlow::Break(());
            };
            if entry.name == name {
                found = Some((*key, entry.inode));
                return ControlFlow::Break(());
            }
            if key.offset == free {
                free += 1;
            }
            ControlFlow::Continue(())
        })?;
        if damaged {
            return Err(malformed_dirent(directory).into());
        }
        Ok(match found {
            Some((key, inode)) => Place::Found { key, inode },
            None => Place::Free((free < end).then(|| Key::dirent(directory, free))),
        })
    }

    /// The entry of that name, which must exist.
    pub(super) fn find_existing(&self, directory: InodeId, name: &[u8]) -> Try<(Key, InodeId)> {
        match self.find(directory, name)? {
            Place::Found { key, inode } => Ok((key, inode)),
            Place::Free(_) => Err(FsError::NotFound.into()),
        }
    }

    /// Finds an entry by name; "." and ".." too. The session's count of the inode grows by one.
    ///
    /// # Errors
    /// [`FsError::NotFound`], [`FsError::NotADirectory`], [`FsError::NameTooLong`].
    pub fn lookup(&self, ctx: &Context, parent: InodeId, name: &[u8]) -> Try<Entry> {
        self.check_session_room(ctx.session)?;
        let directory = self.directory(parent)?;
        let id = match name {
            b"." => parent,
            b".." => directory.live.borrow().parent,
            _ => {
                check_name(name)?;
                self.find_existing(parent, name)?.1
            }
        };
        self.tell(ctx, id)
    }

    /// Finds an inode of any kind by its number, for a client that kept a file handle. The session's count of
    /// it grows by one. An inode without a name is found only by those who know it.
    ///
    /// # Errors
    /// [`FsError::Stale`].
    pub fn lookup_inode(&self, ctx: &Context, id: InodeId) -> Try<Entry> {
        self.check_session_room(ctx.session)?;
        let nameless = self.inode(id)?.live.borrow().nlink == 0;
        if nameless {
            self.check_known(ctx.session, id)?;
        }
        self.tell(ctx, id)
    }

    fn tell(&self, ctx: &Context, id: InodeId) -> Try<Entry> {
        let inode = self.inode(id)?;
        self.remember(ctx.session, id);
        Ok(Entry { attr: self.attr_of(&inode) })
    }

    /// Whether a directory lies in the tree below `root`, or is it. Everything lies below the root of the
    /// file system. Of anything but a directory it is not known where it lies: false.
    ///
    /// # Errors
    /// [`FsError::Stale`], corruption when the parents form a circle.
    pub fn is_inside(&self, id: InodeId, root: InodeId) -> Try<bool> {
        if root == InodeId::ROOT {
            return Ok(true);
        }
        if self.inode(id)?.live.borrow().mode & S_IFMT != S_IFDIR {
            return Ok(false);
        }
        self.is_below(id, root)
    }

    /// Whether `directory` is `ancestor`, or lies below it.
    pub(super) fn is_below(&self, directory: InodeId, ancestor: InodeId) -> Try<bool> {
        let mut at = directory;
        // Brent's search for a circle, which only a damaged image has.
        let (mut mark, mut steps, mut limit) = (at, 0_u64, 2_u64);
        while at != ancestor {
            if at == InodeId::ROOT {
                return Ok(false);
            }
            at = self.directory(at)?.live.borrow().parent;
            if at == mark {
                return Err(malformed_parents(directory).into());
            }
            steps += 1;
            if steps == limit {
                (mark, steps, limit) = (at, 0, limit * 2);
            }
        }
        Ok(true)
    }

    /// Calls `each` for the entries behind `cookie` (0 = from the start) until it breaks.
    ///
    /// # Errors
    /// [`FsError::NotADirectory`]. A wait only when nothing was given yet: a caller that got something comes
    /// again with the last cookie.
    pub fn read_dir(
        &self,
        _ctx: &Context,
        dir: InodeId,
        cookie: u64,
        each: &mut dyn FnMut(DirEntry<'_>) -> ControlFlow<()>,
    ) -> Try<()> {
        let directory = self.directory(dir)?;
        let parent = directory.live.borrow().parent;
        let mut given = false;
        for (inode, name, own) in [(dir, &b"."[..], COOKIE_DOT), (parent, b"..", COOKIE_DOT_DOT)] {
            if cookie < own {
                given = true;
                if each(DirEntry { inode, file_type: DT_DIR, name, cookie: own }).is_break() {
                    return Ok(());
                }
            }
        }
        let mut damaged = false;
        let from = Key::dirent(dir, cookie.saturating_add(1));
        let scanned = self.store.scan(&from, &Key::dirent(dir, u64::MAX), |key, value| {
            let Some(entry) = DirentRef::decode(value) else {
                damaged = true;
                return ControlFlow::Break(());
            };
            given = true;
            let DirentRef { inode, file_type, name } = entry;
            each(DirEntry { inode, file_type, name, cookie: key.offset })
        });
        match scanned {
            Err(Stop::Wait(_)) if given => Ok(()),
            Ok(()) if damaged && !given => Err(malformed_dirent(dir).into()),
            other => other,
        }
    }

    /// Whether a directory has entries.
    pub(super) fn is_empty(&self, dir: InodeId) -> Try<bool> {
        let mut empty = true;
        self.store.scan(&Key::dirent(dir, 0), &Key::dirent(dir, u64::MAX), |_, _| {
            empty = false;
            ControlFlow::Break(())
        })?;
        Ok(empty)
    }
}
