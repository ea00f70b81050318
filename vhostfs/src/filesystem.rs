//! The image behind the device: opened or made, mounted, and left clean.

use std::io;
use std::rc::Rc;

use bdev::Bdev;
use bdev::open::{ImageSpec, OpenError, open};
use blobfs::fs::{Context, MountOptions, SessionId};
use blobfs::store::{self, MkfsOptions, Store};
use blobfs::units::InodeId;
use blobfs::{Fs, FsError};
use fuse_map::{CachePolicy, Export, Session};
use reactor::Reactor;
use vhostfs::poller::Poller;

use crate::config::{GuestCache, ServeArgs};
use crate::failure::Failure;

/// A mounted file system and the export of it.
pub(crate) struct Filesystem {
    fs: Rc<Fs>,
    export: Export,
    reactor: Rc<Reactor>,
    /// Operations of the device complete on the reactor's ring.
    uses_ring: bool,
}

impl Filesystem {
    /// Opens the image, creating and formatting it if it does not exist and a size is given, and mounts it.
    pub(crate) fn open(args: &ServeArgs, reactor: &Rc<Reactor>) -> Result<Self, Failure> {
        let image = args.image.as_deref().unwrap_or_default();
        let spec: ImageSpec = image.parse().map_err(|error: OpenError| Failure::complete(&error))?;
        if args.root.is_some() && !args.readonly {
            // What cannot be served is told before anything is changed.
            check_root(args, &spec, reactor)?;
        }
        let store = open_store(args, &spec, reactor)?;
        let options = MountOptions {
            readonly: args.readonly,
            cache_size: args.cache_size.0 as usize,
            metadata_cache_size: args.metadata_cache_size.0 as usize,
            ..MountOptions::default()
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
        let export = Export { root, readonly: args.readonly, cache };
        Ok(Self { fs, export, reactor: reactor.clone(), uses_ring: matches!(spec, ImageSpec::Path(_)) })
    }

    /// The FUSE server over the export.
    pub(crate) fn handler(&self) -> Rc<Session> {
        Session::new(self.fs.clone(), self.export)
    }

    /// Lets the device's completions wake the poller; memory completes in the call.
    pub(crate) fn wake(&self, poller: &mut Poller) -> io::Result<()> {
        if !self.uses_ring {
            return Ok(());
        }
        poller.wake_on(self.reactor.uring()?.wake_fd()?.try_clone_to_owned()?)
    }

    /// Commits everything and marks the file system clean.
    pub(crate) fn close(self, reactor: &Rc<Reactor>) -> Result<(), Failure> {
        let failed = |error: FsError| Failure::new("unmount", error, "check the device");
        let fs = self.fs;
        reactor.block_on(async move { fs.unmount().await }).map_err(failed)
    }
}

/// The store on the image. A device that lives no longer than the process, and a file that this call
/// created, are formatted; anything else must hold a file system.
fn open_store(args: &ServeArgs, spec: &ImageSpec, reactor: &Rc<Reactor>) -> Result<Rc<Store>, Failure> {
    let image = spec.to_string();
    if let ImageSpec::Null(_) = spec {
        let why = "a device that keeps nothing cannot hold a file system";
        return Err(Failure::new(image, why, "use a file, a block device or memory:SIZE"));
    }
    let is_new = is_new(spec);
    let create = args.size.filter(|_| is_new && !args.readonly).map(|size| size.0);
    let options = bdev::open::OpenOptions { read_only: args.readonly, create };
    let device = open(spec, &options, reactor).map_err(|error| Failure::complete(&error))?;
    if is_new && let Err(failure) = format(&image, device.clone(), reactor) {
        if let ImageSpec::Path(path) = spec {
            // Nothing is left of an image that cannot be made.
            let _ = std::fs::remove_file(path);
        }
        return Err(failure);
    }
    let options = store::OpenOptions { readonly: args.readonly, ..store::OpenOptions::default() };
    let opened = reactor.block_on(Store::open(device, reactor.clone(), options));
    opened.map_err(|error| {
        let advice = match error {
            store::OpenError::NotAFileSystem => {
                format!(
                    "format it with 'blobfs mkfs {image}', which loses what it holds, or use another image"
                )
            }
            store::OpenError::DamagedSuperblock { .. }
            | store::OpenError::MixedSuperblocks
            | store::OpenError::Failed(FsError::Corrupt(_)) => {
                format!("see what is wrong with 'blobfs fsck {image}' and repair it with --repair")
            }
            _ => "use an image that blobfs made, undamaged and whole".to_owned(),
        };
        Failure::new(image, error, advice)
    })
}

fn check_root(args: &ServeArgs, spec: &ImageSpec, reactor: &Rc<Reactor>) -> Result<(), Failure> {
    if let (Some(path), true) = (&args.root, is_new(spec)) {
        let why = format!("{path}: an image that is made now has no directories");
        return Err(Failure::new("--root", why, "leave it out"));
    }
    let readonly = ServeArgs { readonly: true, ..args.clone() };
    let checked = Filesystem::open(&readonly, reactor)?;
    let fs = Rc::downgrade(&checked.fs);
    drop(checked);
    // The session that looked for it ends in a task, which keeps the image open, and so locked, until then.
    while fs.strong_count() > 0 {
        reactor.turn();
    }
    Ok(())
}

/// Whether there is no file system yet, because the device lives no longer than the process or its file does not
/// exist.
fn is_new(spec: &ImageSpec) -> bool {
    match spec {
        ImageSpec::Path(path) => !path.exists(),
        ImageSpec::Memory(_) | ImageSpec::Null(_) => true,
    }
}

fn format(image: &str, device: Rc<dyn Bdev>, reactor: &Rc<Reactor>) -> Result<(), Failure> {
    let options = MkfsOptions::for_device(device.limits());
    let made = reactor.block_on(async move { store::mkfs(&device, &options).await });
    made.map(drop).map_err(|error| Failure::new(image, error, "give it a larger --size"))
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
