//! What is in a golden image: made through the public calls, and compared through them.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::rc::Rc;

use bdev::{AlignedBuf, IoBuffers};
use blobfs::fs::{Attr, Context, CreateSpec, FallocateMode, Fs, IoFlags, NewNode, XattrMode};
use blobfs::units::InodeId;
use blobfs::{FsError, Try};

const FILE: CreateSpec<'static> = CreateSpec { node: NewNode::File, mode: 0o640, umask: 0, security: &[] };

/// A default ACL (version 2): owner rwx, group r-x, others nothing.
const DEFAULT_ACL: &[u8] = &[
    2, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255,
    255,
];

/// Files in the directory that makes the tree deep.
const MANY: usize = 80;

/// An inode as it is seen from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    mode: u32,
    nlink: u32,
    uid: u32,
    gid: u32,
    rdev: u32,
    size: u64,
    mtime: i64,
    /// Of files (the first bytes) and symbolic links.
    content: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// By path.
pub(crate) type Tree = BTreeMap<String, Seen>;

/// A mounted file system and who calls.
pub(crate) struct Client {
    fs: Rc<Fs>,
    ctx: Context,
}

impl Client {
    pub(crate) fn new(fs: Rc<Fs>) -> Self {
        let session = fs.open_session();
        let ctx = Context { session, request: 1, uid: 1000, gid: 100, pid: 1, supplementary_gid: None };
        Self { fs, ctx }
    }

    async fn run<T>(&self, mut call: impl FnMut(&Rc<Fs>, &Context) -> Try<T>) -> Result<T, FsError> {
        self.fs.run(|fs| call(fs, &self.ctx)).await
    }

    async fn create(&self, parent: InodeId, name: &str, spec: CreateSpec<'_>) -> Result<InodeId, FsError> {
        let created = self.run(|fs, ctx| fs.create(ctx, parent, name.as_bytes(), &spec)).await?;
        Ok(created.attr.inode)
    }

    async fn write(&self, inode: InodeId, offset: u64, bytes: &[u8]) -> Result<(), FsError> {
        let mut buf = AlignedBuf::zeroed(bytes.len(), 512);
        buf.copy_from_slice(bytes);
        let src = IoBuffers::from_aligned(&Rc::new(buf));
        let written = self.fs.write(self.ctx, inode, offset, src, IoFlags::default()).await?;
        assert_eq!(written, bytes.len());
        Ok(())
    }

    async fn read(&self, inode: InodeId, len: usize) -> Result<Vec<u8>, FsError> {
        let buf = Rc::new(AlignedBuf::zeroed(len, 512));
        let dst = IoBuffers::from_aligned(&buf);
        let got = self.fs.read(self.ctx, inode, 0, dst, IoFlags::default()).await?;
        Ok(buf[..got].to_vec())
    }

    /// One of everything.
    pub(crate) async fn fill(&self) -> Result<(), FsError> {
        let root = InodeId::ROOT;
        let directory = CreateSpec { node: NewNode::Directory, mode: 0o2750, ..FILE };
        let dir = self.create(root, "dir", directory).await?;
        self.run(|fs, ctx| {
            fs.set_xattr(ctx, dir, b"system.posix_acl_default", DEFAULT_ACL, XattrMode::Set, false)
        })
        .await?;
        let small = self.create(root, "small", FILE).await?;
        self.write(small, 0, b"a small file\n").await?;
        self.run(|fs, ctx| fs.link(ctx, small, dir, b"hard")).await?;
        self.run(|fs, ctx| fs.set_xattr(ctx, small, b"user.note", b"golden", XattrMode::Set, false)).await?;
        let large = self.create(dir, "large", FILE).await?;
        self.write(large, 0, &pattern(40_000)).await?;
        let punch = FallocateMode::PunchHole;
        self.fs.fallocate(self.ctx, large, punch, 10_000, 9_000).await?;
        self.fs.store_xattr(self.ctx, large, b"user.large", &pattern(2_000), XattrMode::Set).await?;
        let sparse = self.create(root, "sparse", FILE).await?;
        self.write(sparse, 60_000, b"far away").await?;
        let unwritten = FallocateMode::Allocate { keep_size: false };
        self.fs.fallocate(self.ctx, sparse, unwritten, 0, 4_096).await?;
        let target = NewNode::Symlink(b"dir/large");
        self.create(root, "soft", CreateSpec { node: target, ..FILE }).await?;
        let device = NewNode::Special { file_type: 0o020_000, rdev: 0x103 };
        self.create(root, "null", CreateSpec { node: device, ..FILE }).await?;
        let fifo = NewNode::Special { file_type: 0o010_000, rdev: 0 };
        self.create(root, "fifo", CreateSpec { node: fifo, ..FILE }).await?;
        self.create(root, &"n".repeat(255), FILE).await?;
        let many = self.create(dir, "many", directory).await?;
        for number in 0..MANY {
            self.create(many, &format!("file {number}"), FILE).await?;
        }
        Ok(())
    }

    /// What only the journal of the second image holds.
    pub(crate) async fn change(&self) -> Result<(), FsError> {
        let root = InodeId::ROOT;
        let late = self.create(root, "late", FILE).await?;
        self.write(late, 0, &[0xff; 5_000]).await?;
        self.write(late, 4_096, &pattern(5_000)[4_096..]).await?;
        self.run(|fs, ctx| fs.unlink(ctx, root, b"fifo")).await?;
        let rename = |fs: &Rc<Fs>, ctx: &Context| {
            fs.rename(ctx, (root, b"soft"), (root, b"moved"), Default::default(), false)
        };
        self.run(rename).await
    }

    /// What the journal has as file data: it is newer than the file's blocks.
    pub(crate) async fn log(&self) -> Result<(), FsError> {
        let late = self.run(|fs, ctx| fs.lookup(ctx, InodeId::ROOT, b"late")).await?.attr.inode;
        self.write(late, 0, &pattern(4_096)).await?;
        self.fs.sync_inode(late, false).await
    }

    pub(crate) async fn sync(&self) -> Result<(), FsError> {
        self.fs.sync_all().await
    }

    pub(crate) async fn unmount(self) -> Result<(), FsError> {
        self.fs.unmount().await
    }

    /// Everything below the root.
    pub(crate) async fn tree(&self) -> Result<Tree, FsError> {
        let mut tree = Tree::new();
        let mut directories = vec![(String::new(), InodeId::ROOT)];
        while let Some((path, directory)) = directories.pop() {
            for name in self.names(directory).await? {
                let entry = self.run(|fs, ctx| fs.lookup(ctx, directory, &name)).await?;
                let path = format!("{path}/{}", String::from_utf8_lossy(&name));
                if entry.attr.mode & 0o170_000 == 0o040_000 {
                    directories.push((path.clone(), entry.attr.inode));
                }
                tree.insert(path, self.see(&entry.attr).await?);
            }
        }
        Ok(tree)
    }

    async fn names(&self, directory: InodeId) -> Result<Vec<Vec<u8>>, FsError> {
        let mut names = Vec::new();
        let mut cookie = 0;
        loop {
            let before = cookie;
            self.run(|fs, ctx| {
                fs.read_dir(ctx, directory, cookie, &mut |entry| {
                    cookie = entry.cookie;
                    if !matches!(entry.name, b"." | b"..") {
                        names.push(entry.name.to_vec());
                    }
                    ControlFlow::Continue(())
                })
            })
            .await?;
            if cookie == before {
                return Ok(names);
            }
        }
    }

    async fn see(&self, attr: &Attr) -> Result<Seen, FsError> {
        let inode = attr.inode;
        let content = match attr.mode & 0o170_000 {
            0o100_000 => self.read(inode, 64 << 10).await?,
            0o120_000 => self.run(|fs, ctx| fs.read_link(ctx, inode)).await?,
            _ => Vec::new(),
        };
        let mut xattrs = BTreeMap::new();
        let list = self.run(|fs, ctx| fs.list_xattr(ctx, inode)).await?;
        for name in list.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            let value = self.fs.read_xattr(self.ctx, inode, name).await?;
            xattrs.insert(name.to_vec(), value);
        }
        // Of a directory, stat shows a size that says nothing.
        let size = if attr.mode & 0o170_000 == 0o040_000 { 0 } else { attr.size };
        let &Attr { mode, nlink, uid, gid, rdev, mtime, .. } = attr;
        Ok(Seen { mode, nlink, uid, gid, rdev, size, mtime: mtime.seconds, content, xattrs })
    }
}

/// Bytes that differ from block to block.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 512 + at % 251) as u8).collect()
}

/// Time of everything in an image, in seconds.
pub(crate) const TIME: u64 = 1_600_000_000;

/// What must be in an image.
pub(crate) fn expected(changed: bool) -> Tree {
    let file = Seen {
        mode: 0o100_640,
        nlink: 1,
        uid: 1000,
        gid: 100,
        rdev: 0,
        size: 0,
        mtime: TIME as i64,
        content: Vec::new(),
        xattrs: BTreeMap::new(),
    };
    let with = |content: Vec<u8>| Seen { size: content.len() as u64, content, ..file.clone() };
    let xattr = |name: &[u8], value: &[u8]| BTreeMap::from([(name.to_vec(), value.to_vec())]);
    let mut large = pattern(40_000);
    large[10_000..19_000].fill(0);
    let sparse = [vec![0; 60_000], b"far away".to_vec()].concat();
    let small = Seen { nlink: 2, xattrs: xattr(b"user.note", b"golden"), ..with(b"a small file\n".to_vec()) };
    let acl = xattr(b"system.posix_acl_default", DEFAULT_ACL);
    let directory = |nlink| Seen { mode: 0o042_750, nlink, xattrs: acl.clone(), ..file.clone() };
    let mut tree = Tree::from([
        ("/dir".to_owned(), directory(3)),
        ("/dir/many".to_owned(), directory(2)),
        ("/small".to_owned(), small.clone()),
        ("/dir/hard".to_owned(), small),
        ("/dir/large".to_owned(), Seen { xattrs: xattr(b"user.large", &pattern(2_000)), ..with(large) }),
        ("/sparse".to_owned(), with(sparse)),
        ("/soft".to_owned(), Seen { mode: 0o120_777, ..with(b"dir/large".to_vec()) }),
        ("/null".to_owned(), Seen { mode: 0o020_640, rdev: 0x103, ..file.clone() }),
        ("/fifo".to_owned(), Seen { mode: 0o010_640, ..file.clone() }),
        (format!("/{}", "n".repeat(255)), file.clone()),
    ]);
    tree.extend((0..MANY).map(|number| (format!("/dir/many/file {number}"), file.clone())));
    if changed {
        tree.insert("/late".to_owned(), with(pattern(5_000)));
        tree.remove("/fifo");
        if let Some(link) = tree.remove("/soft") {
            tree.insert("/moved".to_owned(), link);
        }
    }
    tree
}
