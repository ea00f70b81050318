//! Sound images with something of everything in them, in several states.

use std::rc::Rc;
use std::sync::OnceLock;

use bdev::Bdev;
use blobfs::Fs;
use blobfs::FsError;
use blobfs::fs::{Context, CreateSpec, FallocateMode, IoFlags, NewNode, XattrMode};
use blobfs::units::InodeId;
use reactor::Reactor;

use crate::disk::{Geometry, bytes_of, mount, new_reactor, private, wind_down};

/// A copy of a base image.
pub(super) fn image(number: u8) -> Vec<u8> {
    static IMAGES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    let images = IMAGES.get_or_init(|| {
        let build = |geometry: Geometry, state| build(&geometry, state);
        vec![
            build(Geometry::TINY, State::Journal),
            build(Geometry::TINY, State::Unmounted),
            build(Geometry::PAGE, State::Journal),
            build(Geometry::TINY, State::New),
            build(Geometry::TINY_SUMS, State::Journal),
        ]
    });
    images[usize::from(number) % images.len()].clone()
}

/// How an image was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// By mkfs and the first mount.
    New,
    /// Unmounted.
    Unmounted,
    /// By a power cut, with the last changes in the journal and an inode without a name.
    Journal,
}

fn build(geometry: &Geometry, state: State) -> Vec<u8> {
    let reactor = new_reactor();
    let device = geometry.format(&reactor);
    let (inner, bdev) = (reactor.clone(), device.clone());
    let filled = reactor.block_on(async move { fill(&bdev, &inner, state).await });
    filled.expect("a new file system takes some files");
    let bytes = bytes_of(&device);
    wind_down(&reactor);
    bytes
}

async fn fill(device: &Rc<dyn Bdev>, reactor: &Rc<Reactor>, state: State) -> Result<(), FsError> {
    let mounted = async || mount(device, reactor, false).await.expect("a new file system mounts");
    let maker = Maker::new(mounted().await);
    if state == State::New {
        return maker.fs.unmount().await;
    }
    maker.first_part().await?;
    maker.fs.unmount().await?;
    if state == State::Unmounted {
        return Ok(());
    }
    let maker = Maker::new(mounted().await);
    maker.second_part().await?;
    maker.fs.sync_all().await
}

struct Maker {
    fs: Rc<Fs>,
    ctx: Context,
}

impl Maker {
    fn new(fs: Rc<Fs>) -> Self {
        let session = fs.open_session();
        Self { fs, ctx: Context { session, request: 1, uid: 0, gid: 0, pid: 1, supplementary_gid: None } }
    }

    async fn make(&self, parent: InodeId, name: &str, node: NewNode<'_>) -> Result<InodeId, FsError> {
        let spec = CreateSpec { node, mode: 0o755, umask: 0, security: &[] };
        let made = self.fs.run(|fs| fs.create(&self.ctx, parent, name.as_bytes(), &spec)).await?;
        Ok(made.attr.inode)
    }

    async fn write(&self, file: InodeId, offset: u64, len: usize) -> Result<(), FsError> {
        let bytes = private(&vec![b'x'; len]);
        self.fs.write(self.ctx, file, offset, bytes, IoFlags::default()).await?;
        self.fs.sync_inode(file, false).await
    }

    async fn file(&self, parent: InodeId, name: &str, len: usize) -> Result<InodeId, FsError> {
        let file = self.make(parent, name, NewNode::File).await?;
        self.write(file, 0, len).await?;
        Ok(file)
    }

    async fn set_xattr(&self, file: InodeId, name: &str, len: usize) -> Result<(), FsError> {
        let (name, value) = (name.as_bytes(), vec![b'v'; len]);
        if self.fs.xattr_fits(name, &value) {
            return self
                .fs
                .run(|fs| fs.set_xattr(&self.ctx, file, name, &value, XattrMode::Set, false))
                .await;
        }
        self.fs.store_xattr(self.ctx, file, name, &value, XattrMode::Set).await
    }

    /// Directories, files of each kind of content, links, attributes.
    async fn first_part(&self) -> Result<(), FsError> {
        let root = InodeId::ROOT;
        self.file(root, "inline", 100).await?;
        let holes = self.file(root, "holes", 20_000).await?;
        self.write(holes, 100_000, 5000).await?;
        self.fs.fallocate(self.ctx, holes, FallocateMode::PunchHole, 4096, 8192).await?;
        let ahead = self.file(root, "ahead", 3000).await?;
        let mode = FallocateMode::Allocate { keep_size: true };
        self.fs.fallocate(self.ctx, ahead, mode, 0, 30_000).await?;
        self.make(root, "symlink", NewNode::Symlink(b"dir/inner")).await?;
        self.make(root, "fifo", NewNode::Special { file_type: 0o010_000, rdev: 0 }).await?;
        let dir = self.make(root, "dir", NewNode::Directory).await?;
        let inner = self.file(dir, "inner", 6000).await?;
        self.fs.run(|fs| fs.link(&self.ctx, inner, root, b"link")).await?;
        self.set_xattr(inner, "user.short", 20).await?;
        self.set_xattr(inner, "user.long", 3000).await?;
        for number in 0..14 {
            self.make(dir, &format!("entry number {number}"), NewNode::File).await?;
        }
        Ok(())
    }

    /// Changes of what is there, and a file that is open when the power goes.
    async fn second_part(&self) -> Result<(), FsError> {
        let root = InodeId::ROOT;
        let new = self.file(root, "new", 9000).await?;
        self.set_xattr(new, "user.new", 10).await?;
        let dir = self.fs.run(|fs| fs.lookup(&self.ctx, root, b"dir")).await?.attr.inode;
        for number in 0..8 {
            let name = format!("entry number {number}");
            self.fs.run(|fs| fs.unlink(&self.ctx, dir, name.as_bytes())).await?;
        }
        self.make(dir, "below", NewNode::Directory).await?;
        let held = self.file(dir, "held", 4000).await?;
        self.fs.run(|fs| fs.unlink(&self.ctx, dir, b"held")).await?;
        assert!(self.fs.check_known(self.ctx.session, held).is_ok(), "an open file stays");
        Ok(())
    }
}
