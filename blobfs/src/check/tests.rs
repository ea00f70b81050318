//! Every finding is planted and found, nothing else is reported with it, and a repair of it leaves a clean file
//! system in which everything that was not damaged is as it was.

mod items;
mod links;
mod random;
mod repair;
mod scrub;
mod structure;
mod sums;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bdev::sim::{CrashChoice, SimDisk};
use bdev::{AlignedBuf, IoBuffers};
use proptest::prelude::*;
use reactor::{Reactor, VirtualClock};

use super::*;
use crate::fs::{Context, CreateSpec, FallocateMode, Fs, IoFlags, MountOptions, NewNode, SetAttr, XattrMode};
use crate::ondisk::journal::{
    BlockId, JOURNAL_HEADER_LEN, RECORD_HEADER_LEN, Record, TxnHeader, append_txn, block_header, seal_block,
};
use crate::ondisk::node::seal;
use crate::ondisk::superblock::{NodePtr, SUPERBLOCK_LEN, SUPERBLOCK_OFFSETS, Superblock};
use crate::ondisk::{
    DirentRef, ExtentFlags, ExtentItem, InodeFlags, InodeItem, Key, Kind, SLOT_BITS, encode_dirent,
    encode_xattr_inline, encode_xattr_stored, name_hash,
};
use crate::store::{Demand, MkfsOptions, OpenOptions, Store, mkfs};
use crate::txn::{Origin, Txn};
use crate::units::{BlockAddr, BlockRange, InodeId, MapId};
use crate::{FsError, Stop, Try};

const DEVICE: u64 = 2 << 20;
const BLOCK: u32 = 512;
const NODE: usize = 1024;

/// The last child of a node.
const LAST: usize = usize::MAX;

const FILE: CreateSpec<'static> = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };
const DIRECTORY: CreateSpec<'static> = CreateSpec { node: NewNode::Directory, ..FILE };

fn reactor() -> Rc<Reactor> {
    Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(1_000_000))))
}

fn report_of(disk: &Rc<SimDisk>) -> Result<Report, OpenError> {
    let bdev: Rc<dyn Bdev> = disk.clone();
    let writes = disk.writes();
    let report = reactor().block_on(async move { check(&bdev).await });
    assert_eq!(disk.writes(), writes, "a check writes nothing");
    report
}

/// What a check finds. A repair of that must leave a sound file system.
#[track_caller]
fn findings_of(disk: &Rc<SimDisk>) -> Vec<Finding> {
    let findings = report_of(disk).unwrap().findings;
    let copy = SimDisk::from_image(disk.snapshot(), BLOCK, 1);
    if report_of(&copy).unwrap().findings == findings {
        repair::repairs(&copy, &findings);
    }
    findings
}

/// What the sample's files hold: bytes that tell inode and place.
fn pattern(inode: InodeId, offset: u64, len: usize) -> Vec<u8> {
    (offset..offset + len as u64).map(|at| (at / 64 + inode.0 * 7 + 1) as u8).collect()
}

/// A disk with a file system, and numbers of what is in it.
struct Sample {
    disk: Rc<SimDisk>,
    reactor: Rc<Reactor>,
    /// Directory "dir" of the root.
    dir: InodeId,
    /// Directory "sub" of "dir", and "deep" of that.
    sub: InodeId,
    deep: InodeId,
    /// File "file" of the root and "link" of "dir", with two extents and an attribute "user.a".
    file: InodeId,
    /// Symbolic link "soft" of the root.
    soft: InodeId,
}

/// A mounted file system with a client.
struct Mounted {
    reactor: Rc<Reactor>,
    fs: Rc<Fs>,
    ctx: Context,
}

impl Mounted {
    fn new(disk: &Rc<SimDisk>, reactor: &Rc<Reactor>) -> Self {
        let store = open(disk, reactor);
        let fs = reactor.block_on(Fs::mount(store, MountOptions::default())).unwrap();
        let session = fs.open_session();
        let ctx = Context { session, request: 1, uid: 0, gid: 0, pid: 1, supplementary_gid: None };
        Self { reactor: reactor.clone(), fs, ctx }
    }

    fn run<T: 'static>(&self, call: impl FnMut(&Rc<Fs>) -> Try<T> + 'static) -> T {
        let fs = self.fs.clone();
        self.reactor.block_on(async move { fs.run(call).await }).unwrap()
    }

    fn create(&self, parent: InodeId, name: &str, spec: CreateSpec<'static>) -> InodeId {
        let (ctx, name) = (self.ctx, name.to_owned());
        self.run(move |fs| fs.create(&ctx, parent, name.as_bytes(), &spec)).attr.inode
    }

    fn write(&self, inode: InodeId, offset: u64, len: usize) {
        let (fs, ctx) = (self.fs.clone(), self.ctx);
        let mut bytes = AlignedBuf::zeroed(len, BLOCK as usize);
        bytes.copy_from_slice(&pattern(inode, offset, len));
        let src = IoBuffers::from_aligned(&Rc::new(bytes));
        let write = async move { fs.write(ctx, inode, offset, src, IoFlags::default()).await };
        assert_eq!(self.reactor.block_on(write), Ok(len));
    }

    fn sync(&self) {
        let fs = self.fs.clone();
        self.reactor.block_on(async move { fs.sync_all().await }).unwrap();
    }

    fn unmount(self) {
        self.reactor.block_on(async move { self.fs.unmount().await }).unwrap();
    }
}

fn open(disk: &Rc<SimDisk>, reactor: &Rc<Reactor>) -> Rc<Store> {
    let (disk, inner) = (disk.clone(), reactor.clone());
    let opened = async move { Store::open(disk, inner, OpenOptions::default()).await };
    let store = reactor.block_on(opened).unwrap();
    read_all(&store, reactor);
    store
}

/// Mounts, which writes, and closes again.
fn mount(disk: &Rc<SimDisk>) -> Result<(), OpenError> {
    let (disk, reactor) = (disk.clone(), reactor());
    let inner = reactor.clone();
    let open = async move { Store::open(disk, inner, OpenOptions::default()).await };
    reactor.block_on(async move {
        let fs = Fs::mount(open.await?, MountOptions::default()).await?;
        fs.unmount().await?;
        Ok(())
    })
}

fn small_geometry() -> MkfsOptions {
    MkfsOptions {
        hash_key: [1, 2],
        block_size: BLOCK,
        node_size: NODE as u32,
        group_blocks: 512,
        journal_size: 64 * 1024,
        ..MkfsOptions::default()
    }
}

fn empty_disk(reactor: &Rc<Reactor>) -> Rc<SimDisk> {
    made_disk(reactor, &small_geometry())
}

fn made_disk(reactor: &Rc<Reactor>, options: &MkfsOptions) -> Rc<SimDisk> {
    let disk = SimDisk::new(DEVICE, BLOCK, 1);
    let options = options.clone();
    let bdev: Rc<dyn Bdev> = disk.clone();
    reactor.block_on(async move { mkfs(&bdev, &options).await }).unwrap();
    disk
}

impl Sample {
    fn new() -> Self {
        let sample = Self::made(&small_geometry());
        assert_eq!(sample.superblock().root_level, 2, "tests count on the tree's shape");
        sample
    }

    /// The same on a file system whose blocks have checksums.
    fn with_sums() -> Self {
        Self::made(&MkfsOptions { data_checksum: true, ..small_geometry() })
    }

    fn made(options: &MkfsOptions) -> Self {
        let reactor = reactor();
        let disk = made_disk(&reactor, options);
        let (mounted, mut sample) = Self::fill(disk, reactor);
        mounted.unmount();
        assert!(report_of(&sample.disk).unwrap().is_clean());
        // Later mounts start from here.
        sample.reactor = self::reactor();
        sample
    }

    fn fill(disk: Rc<SimDisk>, reactor: Rc<Reactor>) -> (Mounted, Self) {
        let mounted = Mounted::new(&disk, &reactor);
        let dir = mounted.create(InodeId::ROOT, "dir", DIRECTORY);
        let sub = mounted.create(dir, "sub", DIRECTORY);
        let deep = mounted.create(sub, "deep", DIRECTORY);
        let file = mounted.create(InodeId::ROOT, "file", FILE);
        let target = NewNode::Symlink(b"dir/sub");
        let soft = mounted.create(InodeId::ROOT, "soft", CreateSpec { node: target, ..FILE });
        let fifo = NewNode::Special { file_type: 0o010_000, rdev: 0 };
        mounted.create(dir, "fifo", CreateSpec { node: fifo, ..FILE });
        mounted.write(file, 0, 8192);
        mounted.write(file, 32768, 4096);
        let ctx = mounted.ctx;
        mounted.run(move |fs| fs.link(&ctx, file, dir, b"link"));
        mounted.run(move |fs| fs.set_xattr(&ctx, file, b"user.a", b"value", XattrMode::Set, false));
        for number in 0..100 {
            mounted.create(sub, &format!("small {number}"), FILE);
        }
        (mounted, Self { disk, reactor, dir, sub, deep, file, soft })
    }

    /// Changes items behind the file system's back, and closes the store.
    #[track_caller]
    fn damage(&self, with: impl FnOnce(&Items, &mut Txn)) {
        let store = open(&self.disk, &self.reactor);
        let mut txn = Txn::new(Origin::default());
        with(&Items(store.clone()), &mut txn);
        store.commit(&txn).unwrap();
        self.reactor.block_on(async move { store.close().await }).unwrap();
    }

    /// What is found after a damage.
    #[track_caller]
    fn found(&self, with: impl FnOnce(&Items, &mut Txn)) -> Vec<Finding> {
        self.damage(with);
        findings_of(&self.disk)
    }

    fn superblock(&self) -> Superblock {
        newest(&self.disk)
    }

    /// Rewrites the newest copy.
    fn set_superblock(&self, with: impl FnOnce(&mut Superblock)) {
        let mut superblock = self.superblock();
        let copy = (superblock.generation % 2) as usize;
        with(&mut superblock);
        self.disk.poke(SUPERBLOCK_OFFSETS[copy], &superblock.encode());
    }

    /// Changes a page that a path of child numbers from the root leads to ([`LAST`] for the last child), and
    /// repairs the checksums on the way to it. Gives its block.
    fn patch_node(&self, path: &[usize], with: impl FnOnce(&mut [u8])) -> u64 {
        let superblock = self.superblock();
        let root = self.patch(superblock.root, path, with);
        self.set_superblock(|superblock| superblock.root = root.0);
        root.1
    }

    fn patch(&self, mut ptr: NodePtr, path: &[usize], with: impl FnOnce(&mut [u8])) -> (NodePtr, u64) {
        let offset = ptr.addr * u64::from(BLOCK);
        let mut page = vec![0; NODE];
        self.disk.peek(offset, &mut page);
        let mut block = ptr.addr;
        match path {
            [] => with(&mut page),
            [child, rest @ ..] => {
                let last = usize::from(u16::from_le_bytes([page[42], page[43]])) - 1;
                let at = value_at(&page, last.min(*child));
                let raw = &page[at..at + 24];
                let word = |at: usize| u64::from_le_bytes(raw[at..at + 8].try_into().unwrap());
                let child = NodePtr { addr: word(0), generation: word(8), crc: word(16) as u32 };
                let (child, patched) = self.patch(child, rest, with);
                block = patched;
                page[at..at + 8].copy_from_slice(&child.addr.to_le_bytes());
                page[at + 8..at + 16].copy_from_slice(&child.generation.to_le_bytes());
                page[at + 16..at + 20].copy_from_slice(&child.crc.to_le_bytes());
            }
        }
        ptr.crc = seal(&mut page);
        self.disk.poke(offset, &page);
        (ptr, block)
    }

    /// Changes the first page of the chunk map.
    fn patch_map(&self, with: impl FnOnce(&mut [u8])) -> u64 {
        let ptr = self.superblock().chunk_map;
        let (ptr, block) = self.patch(ptr, &[], with);
        self.set_superblock(|superblock| superblock.chunk_map = ptr);
        block
    }
}

/// Where the value of a slot of a node is.
fn value_at(page: &[u8], slot: usize) -> usize {
    let at = 64 + slot * 24 + 10;
    usize::from(u16::from_le_bytes([page[at], page[at + 1]]))
}

fn newest(disk: &SimDisk) -> Superblock {
    let copies = SUPERBLOCK_OFFSETS.map(|offset| {
        let mut bytes = [0; SUPERBLOCK_LEN];
        disk.peek(offset, &mut bytes);
        Superblock::decode(&bytes).unwrap()
    });
    copies.into_iter().max_by_key(|superblock| superblock.generation).unwrap()
}

/// Brings all nodes into memory, so that calls need not wait.
fn read_all(store: &Rc<Store>, reactor: &Rc<Reactor>) {
    let (from, to) = (Key::group(0), Key::new(u64::MAX, Kind::Checksum, u64::MAX));
    while let Err(stop) = store.scan(&from, &to, |_, _| std::ops::ControlFlow::Continue(())) {
        let Stop::Wait(wait) = stop else { return };
        let store = store.clone();
        reactor.block_on(async move { store.wait(&wait).await.map(drop) }).unwrap();
    }
}

/// The items of a store.
struct Items(Rc<Store>);

impl Items {
    fn value(&self, key: Key) -> Vec<u8> {
        self.0.get(&key, |value| value.unwrap().to_vec()).unwrap()
    }

    fn inode(&self, inode: InodeId) -> InodeItem {
        InodeItem::decode(&self.value(Key::inode(inode))).unwrap()
    }

    /// Puts an inode with a change.
    fn change(&self, txn: &mut Txn, inode: InodeId, with: impl FnOnce(&mut InodeItem)) {
        let mut item = self.inode(inode);
        with(&mut item);
        txn.put_inode(inode, &item);
    }

    /// Key of the entry of that name.
    fn entry(&self, directory: InodeId, name: &str) -> Key {
        Key::dirent(directory, self.0.name_hash(name.as_bytes()) << SLOT_BITS)
    }

    fn put_entry(&self, txn: &mut Txn, directory: InodeId, name: &str, inode: InodeId, file_type: u8) {
        let entry = DirentRef { inode, file_type, name: name.as_bytes() };
        txn.put_with(self.entry(directory, name), |out| encode_dirent(entry, out));
        self.change(txn, directory, |item| item.size += 1);
    }

    fn xattr(&self, inode: InodeId, name: &str) -> Key {
        Key::xattr(inode, self.0.name_hash(name.as_bytes()) << SLOT_BITS)
    }

    /// First and second extent of the file, as keys and items.
    fn extents(&self, file: InodeId) -> BTreeMap<u64, ExtentItem> {
        let mut extents = BTreeMap::new();
        let (from, to) = (Key::extent(MapId(file.0), 0), Key::extent(MapId(file.0), u64::MAX));
        self.0
            .scan(&from, &to, |key, value| {
                extents.insert(key.offset, ExtentItem::decode(value).unwrap());
                std::ops::ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(extents.len(), 2);
        extents
    }

    /// A free run of blocks.
    fn free_blocks(&self, count: u32) -> BlockRange {
        let mut reservation =
            self.0.reserve(Demand { holes: u64::from(count), pieces: 1, ..Demand::NONE }).unwrap();
        let allocation = self.0.allocate(&mut reservation, None, count).unwrap();
        let range = allocation.range();
        assert_eq!(range.count, count);
        // The test names the blocks itself.
        allocation.committed();
        range
    }
}

fn problem(finding: &Finding) -> String {
    match finding {
        Finding::Node { problem, .. }
        | Finding::ChunkMap { problem, .. }
        | Finding::Superblock { problem, .. }
        | Finding::Journal { problem, .. } => problem.clone(),
        other => panic!("{other}"),
    }
}

#[test]
fn a_sound_file_system_is_clean_and_counted() {
    let sample = Sample::new();
    let report = report_of(&sample.disk).unwrap();
    assert!(report.is_clean());
    let counts = report.counts;
    assert_eq!((counts.directories, counts.files, counts.symlinks, counts.special_files), (4, 101, 1, 1));
    assert_eq!((counts.entries, counts.xattrs, counts.extents, counts.data_blocks), (107, 1, 2, 24));
    assert_eq!((counts.journal_blocks, counts.orphans), (0, 0));
    assert!(counts.nodes > 5);
}

#[test]
fn a_new_file_system_is_clean() {
    let report = report_of(&empty_disk(&reactor())).unwrap();
    assert!(report.is_clean());
    assert_eq!(report.counts.inodes, 0);
}

#[test]
fn a_journal_that_was_not_replayed_counts() {
    let reactor = reactor();
    let (mounted, sample) = Sample::fill(empty_disk(&reactor), reactor);
    mounted.sync();
    let report = report_of(&sample.disk.crash(CrashChoice::Nothing)).unwrap();
    assert_eq!(report.findings, []);
    assert!(report.counts.journal_transactions > 20);
    assert_eq!((report.counts.directories, report.counts.files), (4, 101));
}

#[test]
fn what_a_crash_leaves_half_deleted_is_clean() {
    let reactor = reactor();
    let (mounted, sample) = Sample::fill(empty_disk(&reactor), reactor);
    let ctx = mounted.ctx;
    let (dir, sub) = (sample.dir, sample.sub);
    mounted.run(move |fs| fs.create_tmpfile(&ctx, dir, &FILE));
    let open_file = mounted.create(dir, "open", FILE);
    mounted.write(open_file, 0, 4096);
    mounted.sync();
    mounted.run(move |fs| fs.unlink(&ctx, dir, b"open"));
    mounted.run(move |fs| fs.rmdir(&ctx, sub, b"deep"));
    mounted.sync();
    let report = report_of(&sample.disk.crash(CrashChoice::Nothing)).unwrap();
    assert_eq!(report.findings, []);
    assert_eq!(report.counts.orphans, 3);
}
