//! A mounted file system on a simulated disk, and operations on it through the public calls.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::time::Duration;

use bdev::sim::{Image, SimDisk};
use bdev::{AlignedBuf, Bdev, IoBuffers};
use blobfs::check::{Counts, check};
use blobfs::fs::{
    Attr, Context, CreateSpec, Fs, IoFlags, MountOptions, NewNode, RenameMode, SeekTarget, SetAttr, SetTime,
    XattrValue,
};
use blobfs::ondisk::Timestamp;
use blobfs::store::{MkfsOptions, OpenOptions, Store, mkfs};
use blobfs::units::InodeId;
use blobfs::{FsError, Try};
#[cfg(test)]
use reactor::JoinHandle;
use reactor::{Reactor, VirtualClock};

use crate::operation::{
    Durability, NewKind, Operation, Target, is_direct, pattern, symlink_target, xattr_name,
};
use crate::oracle::{Body, Changes, Content, Node, SECTOR, State, split};

pub(crate) const UID: u32 = 1000;
pub(crate) const GID: u32 = 100;

/// Sizes of a file system for a test: tiny, so that nodes split, the journal wraps and space runs out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) device: u64,
    pub(crate) sector: u32,
    pub(crate) block: u32,
    pub(crate) node: u32,
    pub(crate) journal: u64,
    /// Bytes of changed nodes that force a checkpoint.
    pub(crate) dirty: usize,
    /// Pages of the data cache: so few that they are written back and evicted all the time.
    pub(crate) pages: usize,
    /// Blocks have checksums.
    pub(crate) sums: bool,
}

impl Geometry {
    pub(crate) const TINY: Self = Self {
        device: 1 << 20,
        sector: 512,
        block: 512,
        node: 1024,
        journal: 64 << 10,
        dirty: 96 << 10,
        pages: 24,
        sums: false,
    };
    /// Blocks of several sectors, which a power cut tears.
    pub(crate) const TORN: Self = Self { device: 2 << 20, block: 2048, node: 2048, ..Self::TINY };
    pub(crate) const PAGE: Self = Self {
        device: 4 << 20,
        sector: 4096,
        block: 4096,
        node: 4096,
        journal: 256 << 10,
        dirty: 256 << 10,
        pages: 32,
        sums: false,
    };
    pub(crate) const TINY_SUMS: Self = Self { sums: true, ..Self::TINY };
    pub(crate) const PAGE_SUMS: Self = Self { sums: true, ..Self::PAGE };
    pub(crate) const ALL: [Self; 5] = [Self::TINY, Self::TORN, Self::PAGE, Self::TINY_SUMS, Self::PAGE_SUMS];
    /// What the elements of [`Geometry::ALL`] are called.
    pub(crate) const NAMES: [&'static str; 5] = ["tiny", "torn", "page", "tiny-sums", "page-sums"];

    /// A disk with an empty file system that was mounted once, so that it has its root directory.
    pub(crate) fn format(&self, seed: u64) -> Rc<SimDisk> {
        let world = World::mount(&self.mkfs(seed), self, 0).expect("a new file system mounts");
        world.unmount().expect("the first unmount")
    }

    /// A disk with this content. Whatever its blocks are, a power cut may leave a part of one.
    pub(crate) fn disk(&self, image: Image, seed: u64) -> Rc<SimDisk> {
        let disk = SimDisk::from_image(image, self.sector, seed);
        disk.set_tear_unit(SECTOR as u32);
        disk
    }

    /// A disk on which mkfs was run.
    pub(crate) fn mkfs(&self, seed: u64) -> Rc<SimDisk> {
        let disk = self.disk(Image::zeroed(self.device), seed);
        let options = self.mkfs_options(seed);
        let bdev: Rc<dyn Bdev> = disk.clone();
        new_reactor(0).block_on(async move { mkfs(&bdev, &options).await }).expect("mkfs");
        disk
    }

    /// Seeds differ in identity and in the order of names.
    pub(crate) fn mkfs_options(&self, seed: u64) -> MkfsOptions {
        let mut uuid = [7; 16];
        uuid[..8].copy_from_slice(&seed.to_le_bytes());
        MkfsOptions {
            uuid,
            hash_key: [seed, 3],
            label: "simulation".to_owned(),
            block_size: self.block,
            node_size: self.node,
            group_blocks: 512,
            journal_size: self.journal,
            data_checksum: self.sums,
            ..MkfsOptions::default()
        }
    }
}

/// Checks every structure that a disk holds.
///
/// # Errors
/// What is wrong.
pub(crate) fn fsck(disk: &Rc<SimDisk>) -> Result<Counts, String> {
    let bdev: Rc<dyn Bdev> = disk.clone();
    let report = new_reactor(0).block_on(async move { check(&bdev).await });
    let report = report.map_err(|error| format!("fsck: {error}"))?;
    match report.is_clean() {
        true => Ok(report.counts),
        false => Err(format!("fsck: {:?}", report.findings)),
    }
}

/// A reactor whose wall clock starts after `seconds`.
pub(crate) fn new_reactor(seconds: u64) -> Rc<Reactor> {
    Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(1_000_000 + seconds))))
}

/// What an operation gave.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Given {
    pub(crate) made: Option<InodeId>,
    /// Bytes that a write accepted.
    pub(crate) written: Option<usize>,
}

/// A mounted file system and the one client that it has.
pub(crate) struct World {
    pub(crate) disk: Rc<SimDisk>,
    pub(crate) reactor: Rc<Reactor>,
    pub(crate) store: Rc<Store>,
    client: Client,
}

/// A client's session.
#[derive(Clone)]
struct Client {
    fs: Rc<Fs>,
    reactor: Rc<Reactor>,
    ctx: Context,
    /// Inodes that it was told of by the operation under way.
    told: Rc<RefCell<Vec<InodeId>>>,
}

impl World {
    /// Mounts what a disk holds; `seconds` of wall clock time have passed since the tests' beginning.
    pub(crate) fn mount(disk: &Rc<SimDisk>, geometry: &Geometry, seconds: u64) -> Result<Self, String> {
        Self::mount_with(disk, geometry, seconds, false)
    }

    /// As [`World::mount`], with the older superblock when the other one is damaged.
    pub(crate) fn mount_older(disk: &Rc<SimDisk>, geometry: &Geometry, seconds: u64) -> Result<Self, String> {
        Self::mount(disk, geometry, seconds).or_else(|_| Self::mount_with(disk, geometry, seconds, true))
    }

    fn mount_with(
        disk: &Rc<SimDisk>,
        geometry: &Geometry,
        seconds: u64,
        accept_older_superblock: bool,
    ) -> Result<Self, String> {
        let options = OpenOptions {
            dirty_bytes_max: geometry.dirty,
            cache_bytes: 0,
            accept_older_superblock,
            ..OpenOptions::default()
        };
        let caches = MountOptions {
            cache_size: 0,
            cache_pages_min: geometry.pages,
            metadata_cache_size: 0,
            ..MountOptions::default()
        };
        let reactor = new_reactor(seconds);
        let (bdev, inner) = (disk.clone(), reactor.clone());
        let mounted = reactor.block_on(async move {
            let store = Store::open(bdev, inner, options).await.map_err(|error| format!("open: {error}"))?;
            let fs = Fs::mount(store.clone(), caches).await;
            fs.map(|fs| (store, fs)).map_err(|error| format!("mount: {error}"))
        });
        let (store, fs) = mounted?;
        let ctx = Context {
            session: fs.open_session(),
            request: 1,
            uid: UID,
            gid: GID,
            pid: 1,
            supplementary_gid: None,
        };
        let client = Client { fs, reactor: reactor.clone(), ctx, told: Rc::default() };
        Ok(Self { disk: disk.clone(), reactor, store, client })
    }

    pub(crate) fn now(&self) -> Timestamp {
        let now = self.reactor.clock().realtime();
        Timestamp { seconds: now.as_secs() as i64, nanoseconds: now.subsec_nanos() }
    }

    /// Lets time pass.
    pub(crate) fn sleep(&self, duration: Duration) {
        self.reactor.block_on(self.reactor.sleep(duration));
    }

    /// Lets background work end. Time passes.
    pub(crate) fn settle(&self) {
        self.sleep(Duration::from_secs(60));
        while self.reactor.turn() {}
    }

    /// Performs an operation; `state` says what the client knows.
    pub(crate) fn perform(&self, operation: &Operation, state: &State) -> Result<Given, FsError> {
        let (client, operation) = (self.client.clone(), operation.clone());
        let nameless = state.nameless();
        let last_name = match &operation {
            Operation::Unlink { path, hold: true } => {
                state.resolve(path).is_ok_and(|id| state.node(id).nlink == 1)
            }
            _ => false,
        };
        self.reactor.block_on(async move { client.perform(&operation, &nameless, last_name).await })
    }

    /// Starts an operation beside others.
    #[cfg(test)]
    pub(crate) fn start(&self, operation: &Operation) -> JoinHandle<Result<Given, FsError>> {
        let (client, operation) = (self.client.clone(), operation.clone());
        self.reactor.spawn(async move { client.dispatch(&operation, &[], false).await })
    }

    /// Starts a direct read beside other operations.
    #[cfg(test)]
    pub(crate) fn start_read(&self, id: InodeId, len: usize) -> JoinHandle<Result<Vec<u8>, FsError>> {
        let client = self.client.clone();
        self.reactor.spawn(async move {
            let flags = IoFlags { direct: true, ..IoFlags::default() };
            client.read_as(id, 0, len, flags).await
        })
    }

    /// Waits for the end of what was started.
    #[cfg(test)]
    pub(crate) fn end<T: 'static>(&self, started: JoinHandle<T>) -> T {
        self.reactor.block_on(started)
    }

    /// Unmounts; the file system is clean afterwards.
    pub(crate) fn unmount(&self) -> Result<Rc<SimDisk>, FsError> {
        let fs = self.client.fs.clone();
        fs.close_session(self.client.ctx.session);
        while self.reactor.turn() {}
        self.reactor.block_on(async move { fs.unmount().await })?;
        Ok(self.disk.clone())
    }

    pub(crate) fn attr(&self, id: InodeId) -> Result<Attr, FsError> {
        let client = self.client.clone();
        self.reactor.block_on(async move { client.call(move |fs, ctx| fs.get_attr(ctx, id)).await })
    }

    /// Content of a file.
    pub(crate) fn content(&self, id: InodeId) -> Result<Content, FsError> {
        let client = self.client.clone();
        self.reactor.block_on(async move { client.content(id).await })
    }

    /// Content of a file as far as it can be read, a block at a time: what cannot be read is left out.
    pub(crate) fn readable(&self, id: InodeId, block: u32, direct: bool) -> Result<Content, FsError> {
        let client = self.client.clone();
        self.reactor.block_on(async move { client.readable(id, u64::from(block), direct).await })
    }

    /// Everything that can be reached from the root, and the files that the client knows.
    pub(crate) fn walk(&self, nameless: &[InodeId]) -> Result<State, FsError> {
        let (client, nameless) = (self.client.clone(), nameless.to_vec());
        self.reactor.block_on(async move { client.walk(nameless).await })
    }

    /// Compares what an unmounted file system believed of its space with what a check has counted.
    ///
    /// # Errors
    /// The difference.
    pub(crate) fn same_space(&self, counts: &Counts) -> Result<(), String> {
        let space = self.store.space();
        match (space.free, space.reserved) == (counts.free_blocks, 0) {
            true => Ok(()),
            false => Err(format!(
                "{} blocks are free, of them {} reserved; the check counts {} free ones",
                space.free, space.reserved, counts.free_blocks
            )),
        }
    }

    /// Bytes that can be written, as `statfs` shows it.
    #[cfg(test)]
    pub(crate) fn available(&self) -> u64 {
        let space = self.client.fs.stat_fs();
        space.free * u64::from(space.block_size)
    }
}

impl Drop for World {
    /// Lets background work end: it holds the file system and the reactor.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.settle();
        }
    }
}

impl Client {
    async fn call<T: 'static>(
        &self,
        mut call: impl FnMut(&Rc<Fs>, &Context) -> Try<T> + 'static,
    ) -> Result<T, FsError> {
        let ctx = self.ctx;
        self.fs.run(move |fs| call(fs, &ctx)).await
    }

    async fn resolve(&self, path: &str) -> Result<InodeId, FsError> {
        let mut at = InodeId::ROOT;
        for name in path.split('/').filter(|name| !name.is_empty()) {
            let name = name.as_bytes().to_vec();
            let found = self.call(move |fs, ctx| fs.lookup(ctx, at, &name)).await?;
            at = found.attr.inode;
            self.told.borrow_mut().push(at);
        }
        Ok(at)
    }

    /// Directory and name.
    async fn place(&self, path: &str) -> Result<(InodeId, Vec<u8>), FsError> {
        let (directory, name) = split(path);
        Ok((self.resolve(directory).await?, name.as_bytes().to_vec()))
    }

    async fn target(&self, target: &Target, nameless: &[InodeId]) -> Result<InodeId, FsError> {
        match target {
            Target::Path(path) => self.resolve(path).await,
            Target::Nameless(number) => {
                nameless.get(number % nameless.len().max(1)).copied().ok_or(FsError::NotFound)
            }
        }
    }

    /// Performs an operation and forgets what it was told of meanwhile.
    async fn perform(
        &self,
        operation: &Operation,
        nameless: &[InodeId],
        hold: bool,
    ) -> Result<Given, FsError> {
        let result = self.dispatch(operation, nameless, hold).await;
        for inode in self.told.take() {
            self.fs.forget(self.ctx.session, inode, 1);
        }
        result
    }

    async fn dispatch(
        &self,
        operation: &Operation,
        nameless: &[InodeId],
        hold: bool,
    ) -> Result<Given, FsError> {
        match operation {
            Operation::Create { path, kind, mode } => return self.create(path, *kind, *mode).await,
            Operation::Tmpfile { directory } => return self.tmpfile(directory).await,
            Operation::Link { target, path } => {
                let id = self.target(target, nameless).await?;
                let (directory, name) = self.place(path).await?;
                self.call(move |fs, ctx| fs.link(ctx, id, directory, &name)).await?;
                self.told.borrow_mut().push(id);
            }
            Operation::Unlink { path, .. } => self.unlink(path, hold).await?,
            Operation::Rmdir { path } => {
                let (directory, name) = self.place(path).await?;
                self.call(move |fs, ctx| fs.rmdir(ctx, directory, &name)).await?;
            }
            Operation::Rename { from, to, mode, whiteout } => {
                return self.rename(from, to, *mode, *whiteout).await;
            }
            Operation::Chmod { target, mode } => {
                let change = SetAttr { mode: Some(*mode), ..SetAttr::default() };
                self.set_attr(target, nameless, change).await?;
            }
            Operation::Chown { target, uid, gid } => {
                let change = SetAttr { uid: Some(*uid), gid: Some(*gid), ..SetAttr::default() };
                self.set_attr(target, nameless, change).await?;
            }
            Operation::Utimes { target, seconds } => {
                let time = Some(SetTime::At(Timestamp { seconds: *seconds, nanoseconds: 1 }));
                let change = SetAttr { atime: time, mtime: time, ..SetAttr::default() };
                self.set_attr(target, nameless, change).await?;
            }
            Operation::Truncate { target, size } => {
                let change = SetAttr { size: Some(*size), ..SetAttr::default() };
                self.set_attr(target, nameless, change).await?;
            }
            Operation::Write { target, offset, len, tag, append, durability, from_cache } => {
                let id = self.target(target, nameless).await?;
                return self.write(id, *offset, *len, *tag, *append, *durability, *from_cache).await;
            }
            Operation::Fallocate { target, mode, offset, len } => {
                let id = self.target(target, nameless).await?;
                self.fs.fallocate(self.ctx, id, *mode, *offset, *len).await?;
            }
            Operation::SetXattr { target, name, len, tag, mode } => {
                let id = self.target(target, nameless).await?;
                let (name, value, mode) = (xattr_name(*name), pattern(*tag, 0, *len), *mode);
                match self.fs.xattr_fits(&name, &value) {
                    true => {
                        self.call(move |fs, ctx| fs.set_xattr(ctx, id, &name, &value, mode, false)).await?
                    }
                    false => self.fs.store_xattr(self.ctx, id, &name, &value, mode).await?,
                }
            }
            Operation::RemoveXattr { target, name } => {
                let id = self.target(target, nameless).await?;
                let name = xattr_name(*name);
                self.call(move |fs, ctx| fs.remove_xattr(ctx, id, &name)).await?;
            }
            Operation::Fsync { target, data_only } => {
                let id = self.target(target, nameless).await?;
                self.fs.sync_inode(id, *data_only).await?;
            }
            Operation::Syncfs => self.fs.sync_all().await?,
            Operation::Forget { nameless: number } => {
                if let Ok(id) = self.target(&Target::Nameless(*number), nameless).await {
                    self.fs.forget(self.ctx.session, id, u64::MAX);
                }
            }
            Operation::Sleep { seconds } => self.reactor.sleep(Duration::from_secs(*seconds)).await,
        }
        Ok(Given::default())
    }

    async fn create(&self, path: &str, kind: NewKind, mode: u32) -> Result<Given, FsError> {
        let (directory, name) = self.place(path).await?;
        let target = match kind {
            NewKind::Symlink { target_len } => symlink_target(target_len),
            _ => Vec::new(),
        };
        let entry = self
            .call(move |fs, ctx| {
                let node = match kind {
                    NewKind::File => NewNode::File,
                    NewKind::Directory => NewNode::Directory,
                    NewKind::Symlink { .. } => NewNode::Symlink(&target),
                    NewKind::Fifo => NewNode::Special { file_type: 0o010_000, rdev: 0 },
                    NewKind::CharDevice { rdev } => NewNode::Special { file_type: 0o020_000, rdev },
                };
                fs.create(ctx, directory, &name, &CreateSpec { node, mode, umask: 0, security: &[] })
            })
            .await?;
        self.told.borrow_mut().push(entry.attr.inode);
        Ok(Given { made: Some(entry.attr.inode), ..Given::default() })
    }

    async fn tmpfile(&self, directory: &str) -> Result<Given, FsError> {
        let directory = self.resolve(directory).await?;
        let spec = CreateSpec { node: NewNode::File, mode: 0o600, umask: 0, security: &[] };
        let entry = self.call(move |fs, ctx| fs.create_tmpfile(ctx, directory, &spec)).await?;
        Ok(Given { made: Some(entry.attr.inode), ..Given::default() })
    }

    async fn unlink(&self, path: &str, hold: bool) -> Result<(), FsError> {
        let (directory, name) = self.place(path).await?;
        let held = if hold { Some(self.resolve(path).await?) } else { None };
        let result = self.call(move |fs, ctx| fs.unlink(ctx, directory, &name)).await;
        if result.is_ok() && held.is_some() {
            self.told.borrow_mut().pop();
        }
        result
    }

    async fn rename(&self, from: &str, to: &str, mode: RenameMode, whiteout: bool) -> Result<Given, FsError> {
        let (old, old_name) = self.place(from).await?;
        let (new, new_name) = self.place(to).await?;
        let moved = old_name.clone();
        self.call(move |fs, ctx| fs.rename(ctx, (old, &moved), (new, &new_name), mode, whiteout)).await?;
        if !whiteout {
            return Ok(Given::default());
        }
        // Once more after an error: the rename is done.
        let find = || {
            let name = old_name.clone();
            self.call(move |fs, ctx| fs.lookup(ctx, old, &name))
        };
        let made = match find().await {
            Ok(entry) => entry.attr.inode,
            Err(_) => find().await?.attr.inode,
        };
        self.told.borrow_mut().push(made);
        Ok(Given { made: Some(made), ..Given::default() })
    }

    async fn set_attr(&self, target: &Target, nameless: &[InodeId], change: SetAttr) -> Result<(), FsError> {
        let id = self.target(target, nameless).await?;
        self.call(move |fs, ctx| fs.set_attr(ctx, id, &change)).await.map(drop)
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of an operation")]
    async fn write(
        &self,
        id: InodeId,
        offset: u64,
        len: usize,
        tag: u64,
        append: bool,
        durability: Durability,
        from_cache: bool,
    ) -> Result<Given, FsError> {
        let size = self.call(move |fs, ctx| fs.get_attr(ctx, id)).await?.size;
        let at = if append { size } else { offset };
        let mut buf = AlignedBuf::zeroed(len, 4096);
        buf.copy_from_slice(&pattern(tag, at, len));
        let flags = IoFlags {
            append,
            sync: durability == Durability::Full,
            dsync: durability == Durability::Data,
            direct: is_direct(tag) && !from_cache,
            from_cache,
            ..IoFlags::default()
        };
        let src = IoBuffers::from_aligned(&Rc::new(buf));
        let written = match self.fs.try_write(&self.ctx, id, offset, &src, flags) {
            Some(written) => written?,
            None => self.fs.write(self.ctx, id, offset, src, flags).await?,
        };
        Ok(Given { written: Some(written), ..Given::default() })
    }

    async fn read(&self, id: InodeId, offset: u64, len: usize) -> Result<Vec<u8>, FsError> {
        self.read_as(id, offset, len, IoFlags::default()).await
    }

    async fn read_as(
        &self,
        id: InodeId,
        offset: u64,
        len: usize,
        flags: IoFlags,
    ) -> Result<Vec<u8>, FsError> {
        let buf = Rc::new(AlignedBuf::zeroed(len, 4096));
        let dst = IoBuffers::from_aligned(&buf);
        let got = match self.fs.try_read(&self.ctx, id, offset, &dst, flags) {
            Some(got) => got?,
            None => self.fs.read(self.ctx, id, offset, dst, flags).await?,
        };
        Ok(buf[..got].to_vec())
    }

    /// Small files as a whole, of larger ones what is no hole.
    async fn content(&self, id: InodeId) -> Result<Content, FsError> {
        const WHOLE_MAX: u64 = 256 << 10;
        let size = self.call(move |fs, ctx| fs.get_attr(ctx, id)).await?.size;
        let mut content = Content::default();
        content.resize(size);
        let mut at = 0;
        while at < size {
            let mut end = size;
            if size > WHOLE_MAX {
                let data = self.call(move |fs, ctx| fs.seek(ctx, id, at, SeekTarget::Data)).await;
                at = match data {
                    Err(FsError::NoData) => break,
                    other => other? / SECTOR * SECTOR,
                };
                end = self.call(move |fs, ctx| fs.seek(ctx, id, at, SeekTarget::Hole)).await?;
            }
            let len = (end - at).min(WHOLE_MAX) as usize;
            let bytes = self.read(id, at, len).await?;
            if bytes.is_empty() {
                break;
            }
            content.fill(at, &bytes);
            at += bytes.len() as u64;
        }
        Ok(content)
    }

    /// See [`World::readable`]. Holes are left out, too, as far as the file says where they are.
    async fn readable(&self, id: InodeId, block: u64, direct: bool) -> Result<Content, FsError> {
        let size = self.call(move |fs, ctx| fs.get_attr(ctx, id)).await?.size;
        let flags = IoFlags { direct, ..IoFlags::default() };
        let mut content = Content::default();
        content.resize(size);
        let mut at = 0;
        while at < size {
            let Ok(data) = self.call(move |fs, ctx| fs.seek(ctx, id, at, SeekTarget::Data)).await else {
                break;
            };
            let hole = self.call(move |fs, ctx| fs.seek(ctx, id, data, SeekTarget::Hole)).await?;
            at = data / block * block;
            while at < hole {
                let len = block.min(size - at) as usize;
                if let Ok(bytes) = self.read_as(id, at, len, flags).await {
                    content.fill(at, &bytes);
                }
                at += block;
            }
        }
        Ok(content)
    }

    async fn walk(&self, nameless: Vec<InodeId>) -> Result<State, FsError> {
        let mut state = State::default();
        let mut todo = nameless;
        state.held.extend(todo.iter().copied());
        todo.push(InodeId::ROOT);
        while let Some(id) = todo.pop() {
            if state.nodes.contains_key(&id) {
                continue;
            }
            let node = self.node(id).await?;
            if let Body::Directory { entries, .. } = &node.body {
                todo.extend(entries.values());
            }
            state.nodes.insert(id, Rc::new(node));
        }
        Ok(state)
    }

    async fn node(&self, id: InodeId) -> Result<Node, FsError> {
        let attr = self.call(move |fs, ctx| fs.get_attr(ctx, id)).await?;
        let body = match attr.mode & 0o170_000 {
            0o100_000 => Body::File(self.content(id).await?),
            0o040_000 => self.directory(id).await?,
            0o120_000 => Body::Symlink(self.call(move |fs, ctx| fs.read_link(ctx, id)).await?),
            _ => Body::Special { rdev: attr.rdev },
        };
        let mut xattrs = BTreeMap::new();
        let names = self.call(move |fs, ctx| fs.list_xattr(ctx, id)).await?;
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let name = name.to_vec();
            let wanted = name.clone();
            let value = match self.call(move |fs, ctx| fs.get_xattr(ctx, id, &wanted)).await? {
                XattrValue::Here(value) => value,
                XattrValue::Stored(_) => self.fs.read_xattr(self.ctx, id, &name).await?,
            };
            xattrs.insert(name, value);
        }
        Ok(Node {
            mode: attr.mode,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            atime: Some(attr.atime),
            mtime: attr.mtime,
            ctime: attr.ctime,
            xattrs,
            body,
            changes: Changes::default(),
        })
    }

    async fn directory(&self, id: InodeId) -> Result<Body, FsError> {
        let read = self.call(move |fs, ctx| {
            let mut entries = BTreeMap::new();
            let mut parent = None;
            let mut cookie = 0;
            // A scan may give what it has and end.
            loop {
                let before = cookie;
                fs.read_dir(ctx, id, cookie, &mut |entry| {
                    cookie = entry.cookie;
                    match entry.name {
                        b"." => {}
                        b".." => parent = Some(entry.inode),
                        name => drop(entries.insert(name.to_vec(), entry.inode)),
                    }
                    ControlFlow::Continue(())
                })?;
                if cookie == before {
                    return Ok((entries.clone(), parent));
                }
            }
        });
        let (entries, parent) = read.await?;
        Ok(Body::Directory { entries, parent: parent.expect("every directory has \"..\"") })
    }
}
