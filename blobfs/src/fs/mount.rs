//! Mounting, unmounting and waiting.

use std::ops::ControlFlow;
use std::rc::Rc;

use super::{Fs, Inode};
use crate::data::{Cache, PAGES_MIN};
use crate::error::{Corruption, FsError, Stop, Try, Wait};
use crate::ondisk::{InodeFlags, InodeItem, Key, Kind};
use crate::store::{LoggedData, Pins, Store};
use crate::txn::{Origin, Txn};
use crate::units::{InodeId, MapId};

/// How a file system is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountOptions {
    /// Refuse every change.
    pub readonly: bool,
    /// Bytes of the data cache.
    pub cache_size: usize,
    /// Fewest pages of the data cache, whatever `cache_size` says. Below the default large requests wait for each
    /// other more often than they get on; a test that looks for evictions asks for a few times its largest request.
    pub cache_pages_min: usize,
    /// Bytes of the node cache.
    pub metadata_cache_size: usize,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            readonly: false,
            cache_size: 256 << 20,
            cache_pages_min: PAGES_MIN,
            metadata_cache_size: 64 << 20,
        }
    }
}

impl Fs {
    /// Mounts what the store holds. A new store gets its root directory; inodes that lost their last name
    /// before the last end are deleted.
    ///
    /// # Errors
    /// The device's, or corruption.
    pub async fn mount(store: Rc<Store>, options: MountOptions) -> Result<Rc<Self>, FsError> {
        store.set_cache_bytes(options.metadata_cache_size);
        let cache = Cache::new(options.cache_size, options.cache_pages_min, store.block_size() as usize)?;
        let (inodes, sessions) = Default::default();
        let fs = Rc::new(Self { store, cache, inodes, sessions, options });
        let logged_data: std::rc::Weak<dyn LoggedData> = Rc::downgrade(&(fs.clone() as Rc<dyn LoggedData>));
        fs.store.set_logged_data(logged_data);
        if !fs.run(|fs| fs.has_root()).await? {
            fs.run(|fs| fs.make_root()).await?;
        }
        if !options.readonly {
            fs.resume_cuts().await?;
            fs.delete_orphans().await?;
        }
        Ok(fs)
    }

    /// Whether there is a root directory; only a new file system has none.
    fn has_root(&self) -> Try<bool> {
        let root = Key::inode(InodeId::ROOT);
        if self.store.get(&root, |item| item.is_some())? {
            return Ok(true);
        }
        let mut is_new = true;
        self.store.scan(
            &Key::new(root.owner, Kind::Inode, 0),
            &Key::new(u64::MAX, Kind::Inode, 0),
            |_, _| {
                is_new = false;
                ControlFlow::Break(())
            },
        )?;
        if is_new {
            return Ok(false);
        }
        let problem = "the root directory is missing".into();
        Err(FsError::from(Corruption { structure: "inode item", offset: root.owner, problem }).into())
    }

    fn make_root(&self) -> Try<()> {
        let now = self.now();
        let item = InodeItem {
            mode: libc_mode::S_IFDIR | 0o755,
            nlink: 2,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: InodeFlags::default(),
            project: 0,
            size: 0,
            blocks: 0,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            map: MapId(InodeId::ROOT.0),
            parent_map: MapId(0),
            parent: InodeId::ROOT,
        };
        let mut txn = Txn::new(Origin::default());
        txn.put_inode(InodeId::ROOT, &item);
        self.store.commit(&txn)?;
        self.inodes.borrow_mut().insert(InodeId::ROOT, Inode::new(InodeId::ROOT, item));
        Ok(())
    }

    /// Whether changes are refused.
    ///
    /// # Errors
    /// [`FsError::ReadOnly`].
    pub(crate) fn check_writable(&self) -> Result<(), FsError> {
        if self.options.readonly { Err(FsError::ReadOnly) } else { self.store.check_writable() }
    }

    /// Waits for what a call waits for; then the call is made again.
    ///
    /// # Errors
    /// What prevents the wait from ever ending: the device's error, or corruption.
    pub async fn wait(self: &Rc<Self>, wait: Wait) -> Result<(), FsError> {
        self.wait_pinned(wait, &mut Pins::default()).await
    }

    /// Waits for what a call waits for on behalf of an operation that waits several times: what its waits
    /// bring into memory stays there until `pins` goes.
    ///
    /// # Errors
    /// As [`Fs::wait`].
    pub async fn wait_pinned(self: &Rc<Self>, wait: Wait, pins: &mut Pins) -> Result<(), FsError> {
        match wait {
            Wait::Range(_) | Wait::WriteBack(_) | Wait::Growth(..) => {
                pins.clear();
                Box::pin(self.wait_for_data(wait)).await
            }
            Wait::Nodes(_) | Wait::Commit | Wait::Checkpoint | Wait::Space => {
                self.store.wait_pinned(&wait, pins).await
            }
        }
    }

    async fn wait_for_data(self: &Rc<Self>, wait: Wait) -> Result<(), FsError> {
        let (Wait::Range(id) | Wait::WriteBack(id) | Wait::Growth(id, _)) = wait else { return Ok(()) };
        let inode = self.run(|fs| fs.inode(id)).await?;
        match wait {
            Wait::WriteBack(_) => self.write_back_and_fold(&inode).await,
            Wait::Growth(_, size) => self.prepare_growth(&inode, size).await,
            _ => {
                inode.data.end_of_work().await;
                Ok(())
            }
        }
    }

    /// Makes everything durable and marks the file system as clean; nothing may be called afterwards.
    ///
    /// # Errors
    /// The device's.
    pub async fn unmount(self: &Rc<Self>) -> Result<(), FsError> {
        if self.options.readonly {
            return Ok(());
        }
        self.sync_all().await?;
        self.store.close().await
    }

    /// Makes a call again and again until it does not have to wait.
    ///
    /// # Errors
    /// Those of the call and of its waits.
    pub async fn run<T>(self: &Rc<Self>, mut call: impl FnMut(&Rc<Self>) -> Try<T>) -> Result<T, FsError> {
        let mut pins = Pins::default();
        loop {
            match call(self) {
                Ok(value) => return Ok(value),
                Err(Stop::Fail(error)) => return Err(error),
                Err(Stop::Wait(wait)) => self.wait_pinned(wait, &mut pins).await?,
            }
        }
    }
}

/// File types of `st_mode`, as POSIX systems number them.
pub(crate) mod libc_mode {
    pub(crate) const S_IFMT: u32 = 0o170_000;
    /// What is no file type: permissions, set-id bits, the sticky bit. A client may set any other bit, too.
    pub(crate) const PERMISSIONS: u32 = 0o7777;
    pub(crate) const S_IFDIR: u32 = 0o040_000;
    pub(crate) const S_IFREG: u32 = 0o100_000;
    pub(crate) const S_IFLNK: u32 = 0o120_000;
    pub(crate) const S_IFCHR: u32 = 0o020_000;
    pub(crate) const S_ISUID: u32 = 0o4000;
    pub(crate) const S_ISGID: u32 = 0o2000;
    /// Group execute: with set-group-id it is a privilege, without it a mark for mandatory locks.
    pub(crate) const S_IXGRP: u32 = 0o010;
}
