//! The image behind the device: opened or made, mounted, and left clean.
//!
//! Only `memory:SIZE` can be served: the item store keeps its items in memory, so an image would lose them.

use std::io;
use std::rc::Rc;

use bdev::memory::Memory;
use blobfs::fs::{Context, MountOptions, SessionId};
use blobfs::store::Store;
use blobfs::units::InodeId;
use blobfs::{Fs, FsError};
use fuse_map::{CachePolicy, Export, Session};
use reactor::Reactor;
use vhostfs::poller::Poller;

use crate::config::{GuestCache, ServeArgs, Size};
use crate::failure::Failure;

/// Block size of a device in memory.
const BLOCK_SIZE: u32 = 4096;

/// Smallest device in bytes: some blocks of data beside the reserved ones at its start.
const SIZE_MIN: u64 = 1 << 20;

/// A mounted file system and the export of it.
pub(crate) struct Filesystem {
    fs: Rc<Fs>,
    export: Export,
}

impl Filesystem {
    /// Makes the file system and finds the directory to serve.
    pub(crate) fn open(args: &ServeArgs, reactor: &Rc<Reactor>) -> Result<Self, Failure> {
        let image = args.image.as_deref().unwrap_or_default();
        let size = memory_size(image)?;
        let store = Store::volatile(Memory::new(size, BLOCK_SIZE), reactor.clone());
        let options = MountOptions {
            readonly: args.readonly,
            cache_size: args.cache_size.0 as usize,
            metadata_cache_size: args.metadata_cache_size.0 as usize,
        };
        let failed = |error: FsError| Failure::new(image, error, "check the image");
        let fs = reactor.block_on(Fs::mount(store, options)).map_err(failed)?;
        let root = match args.root.clone() {
            Some(path) => find_root(&fs, reactor, path)?,
            None => InodeId::ROOT,
        };
        let cache = match args.guest_cache {
            GuestCache::Exclusive => CachePolicy::Exclusive,
            GuestCache::None => CachePolicy::None,
        };
        Ok(Self { fs, export: Export { root, readonly: args.readonly, cache } })
    }

    /// The FUSE server over the export.
    pub(crate) fn handler(&self) -> Rc<Session> {
        Session::new(self.fs.clone(), self.export)
    }

    /// Lets the device's completions wake the poller: memory completes in the call.
    pub(crate) fn wake(&self, _poller: &mut Poller) -> io::Result<()> {
        Ok(())
    }

    /// Commits everything.
    pub(crate) fn close(self, reactor: &Rc<Reactor>) -> Result<(), Failure> {
        let failed = |error: FsError| Failure::new("unmount", error, "check the device");
        let fs = self.fs;
        reactor.block_on(async move { fs.unmount().await }).map_err(failed)
    }
}

/// Bytes of `memory:SIZE`, in whole blocks.
fn memory_size(image: &str) -> Result<u64, Failure> {
    let Some(size) = image.strip_prefix("memory:") else {
        return Err(Failure::new(image, "image files cannot be served yet", "use memory:SIZE"));
    };
    let size: Size = size.parse().map_err(|error: String| Failure::usage(image, error))?;
    if size.0 < SIZE_MIN {
        return Err(Failure::new(image, "too small for a file system", "give it at least 1M"));
    }
    Ok(size.0 / u64::from(BLOCK_SIZE) * u64::from(BLOCK_SIZE))
}

/// The directory at `path` of the file system.
fn find_root(fs: &Rc<Fs>, reactor: &Rc<Reactor>, path: String) -> Result<InodeId, Failure> {
    let fs = fs.clone();
    let found = {
        let path = path.clone();
        reactor.block_on(async move {
            let session = fs.open_session();
            let found = walk(&fs, session, &path).await;
            fs.close_session(session);
            found
        })
    };
    found.map_err(|error| Failure::new("--root", format!("{path}: {error}"), "name a directory of the image"))
}

async fn walk(fs: &Rc<Fs>, session: SessionId, path: &str) -> Result<InodeId, FsError> {
    let ctx = Context { session, request: 0, uid: 0, gid: 0, pid: 0, supplementary_gid: None };
    let mut at = InodeId::ROOT;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        at = fs.run(|fs| fs.lookup(&ctx, at, name.as_bytes())).await?.attr.inode;
    }
    // Only a directory can be looked into.
    fs.run(|fs| fs.lookup(&ctx, at, b".")).await.map(|entry| entry.attr.inode)
}
