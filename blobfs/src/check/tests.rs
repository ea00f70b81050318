//! Every finding is planted and found, and nothing else is reported with it.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bdev::sim::{CrashChoice, SimDisk};
use bdev::{AlignedBuf, IoBuffers};
use proptest::prelude::*;
use reactor::{Reactor, VirtualClock};

use super::*;
use crate::fs::{Context, CreateSpec, FallocateMode, Fs, IoFlags, MountOptions, NewNode, SetAttr, XattrMode};
use crate::ondisk::journal::{BlockId, JOURNAL_HEADER_LEN, Record, TxnHeader, append_txn, seal_block};
use crate::ondisk::node::seal;
use crate::ondisk::superblock::{NodePtr, SUPERBLOCK_LEN, SUPERBLOCK_OFFSETS};
use crate::ondisk::{
    DirentRef, ExtentFlags, ExtentItem, InodeFlags, InodeItem, Kind, SLOT_BITS, encode_dirent,
    encode_xattr_inline, encode_xattr_stored, name_hash,
};
use crate::store::{MkfsOptions, OpenOptions, Store, mkfs};
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

#[track_caller]
fn findings_of(disk: &Rc<SimDisk>) -> Vec<Finding> {
    report_of(disk).unwrap().findings
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
        let src = IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(len, BLOCK as usize)));
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

fn empty_disk(reactor: &Rc<Reactor>) -> Rc<SimDisk> {
    let disk = SimDisk::new(DEVICE, BLOCK, 1);
    let options = MkfsOptions {
        hash_key: [1, 2],
        block_size: BLOCK,
        node_size: NODE as u32,
        group_blocks: 512,
        journal_size: 64 * 1024,
        ..MkfsOptions::default()
    };
    let bdev: Rc<dyn Bdev> = disk.clone();
    reactor.block_on(async move { mkfs(&bdev, &options).await }).unwrap();
    disk
}

impl Sample {
    fn new() -> Self {
        let reactor = reactor();
        let disk = empty_disk(&reactor);
        let (mounted, mut sample) = Self::fill(disk, reactor);
        mounted.unmount();
        assert!(report_of(&sample.disk).unwrap().is_clean());
        assert_eq!(sample.superblock().root_level, 2, "tests count on the tree's shape");
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
        let mut reservation = self.0.reserve(u64::from(count)).unwrap();
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

#[test]
fn damaged_superblocks_are_found() {
    let sample = Sample::new();
    let superblock = sample.superblock();
    let newest = (superblock.generation % 2) as usize;
    let older = 1 - newest;
    sample.disk.poke(SUPERBLOCK_OFFSETS[older] + 100, &[0xff; 4]);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[..], [Finding::Superblock { copy, .. }] if copy == older), "{found:?}");
    assert!(problem(&found[0]).contains("checksum"));
    sample.disk.poke(SUPERBLOCK_OFFSETS[newest] + 100, &[0xff; 4]);
    let report = report_of(&sample.disk).unwrap();
    assert_eq!(report.findings.len(), 2);
    assert!(!report.complete && !report.is_clean());

    let sample = Sample::new();
    let mut wrong = superblock.clone();
    wrong.node_size = 100;
    sample.disk.poke(SUPERBLOCK_OFFSETS[older], &wrong.encode());
    let found = findings_of(&sample.disk);
    assert!(problem(&found[0]).contains("node size"), "{found:?}");
}

#[test]
fn copies_of_the_superblock_that_contradict_each_other_are_found() {
    let change = |with: &dyn Fn(&mut Superblock)| {
        let sample = Sample::new();
        let newest = sample.superblock();
        let mut older = Superblock { generation: newest.generation - 1, ..newest };
        with(&mut older);
        sample.disk.poke(SUPERBLOCK_OFFSETS[(older.generation % 2) as usize], &older.encode());
        findings_of(&sample.disk)
    };
    assert_eq!(change(&|_| ()), []);
    let copies = |field| [Finding::SuperblockCopies { field }];
    assert_eq!(change(&|older| older.uuid[0] ^= 1), copies("the UUID"));
    assert_eq!(change(&|older| older.group_blocks = 256), copies("the group size"));
    assert_eq!(change(&|older| older.hash_key[0] += 1), copies("the hash key"));
    assert_eq!(change(&|older| older.journal_blocks += 1), copies("the place of the journal"));
    assert_eq!(change(&|older| older.generation -= 2), copies("the generation by more than one"));

    let sample = Sample::new();
    let newest = sample.superblock();
    let place = Superblock { generation: newest.generation + 1, ..newest.clone() };
    let copy = (newest.generation % 2) as usize;
    sample.disk.poke(SUPERBLOCK_OFFSETS[copy], &place.encode());
    let found = findings_of(&sample.disk);
    assert!(found.contains(&Finding::SuperblockPlace { copy, generation: place.generation }), "{found:?}");
}

#[test]
fn a_counter_that_would_give_a_number_twice_is_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.next_id = 5);
    let used = sample.superblock().last_txn;
    let found = findings_of(&sample.disk);
    assert!(matches!(found[..], [Finding::NextId { next_id: 5, used }] if used > 20), "{found:?} {used}");
}

#[test]
fn a_wrong_number_of_free_blocks_is_found() {
    let sample = Sample::new();
    let counted = sample.superblock().free_blocks;
    sample.set_superblock(|superblock| superblock.free_blocks -= 3);
    assert_eq!(findings_of(&sample.disk), [Finding::FreeBlocks { stated: counted - 3, counted }]);
}

#[test]
fn other_devices_are_not_checked() {
    let empty = SimDisk::new(DEVICE, BLOCK, 1);
    assert_eq!(report_of(&empty), Err(OpenError::NotAFileSystem));
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.incompat = 8);
    assert_eq!(report_of(&sample.disk), Err(OpenError::Incompatible { features: 8 }));
}

/// A journal block that follows the newest checkpoint.
fn append_block(sample: &Sample, skip: u64, txn: u64, records: &[Record<'_>]) -> u64 {
    let superblock = sample.superblock();
    let mut block = vec![0; JOURNAL_HEADER_LEN];
    let header = TxnHeader {
        len: 0.into(),
        count: 0.into(),
        seq: (superblock.last_txn + txn).into(),
        session: 0.into(),
        request: 0.into(),
        next_id: superblock.next_id.into(),
    };
    append_txn(&mut block, header, records.iter().copied());
    let id = BlockId {
        uuid: superblock.uuid,
        epoch: superblock.epoch,
        seq: superblock.tail.seq + skip,
        previous_crc: superblock.tail.previous_crc,
    };
    seal_block(&mut block, &id);
    let start = superblock.journal_start * u64::from(BLOCK) + superblock.tail.pos;
    sample.disk.poke(start + skip * u64::from(BLOCK), &block);
    superblock.journal_start + superblock.tail.pos / u64::from(BLOCK)
}

#[test]
fn journal_blocks_that_cannot_be_applied_are_found() {
    let far = BlockRange::new(BlockAddr(1 << 40), 1);
    let superblocks = BlockRange::new(BlockAddr(8), 1);
    let key = Key::new(999, Kind::Dirent, 0);
    let cases: [(u64, Record<'_>, &str); 7] = [
        (1, Record::Delete(key), "deletes an item that does not exist"),
        (1, Record::Alloc(far), "no data blocks"),
        (1, Record::Free(superblocks), "no data blocks"),
        (1, Record::Free(BlockRange::new(BlockAddr(2000), 1)), "frees blocks that are free"),
        (1, Record::Put(key, &[0; 400]), "too long"),
        (1, Record::Put(Key::group(0), &[0; 64]), "bitmap"),
        (2, Record::Delete(key), "not in sequence"),
    ];
    for (txn, record, expected) in cases {
        let sample = Sample::new();
        sample.set_superblock(|superblock| superblock.clean = false);
        let block = append_block(&sample, 0, txn, &[record]);
        let found = findings_of(&sample.disk);
        let Finding::Journal { block: at, problem, .. } = &found[0] else { panic!("{found:?}") };
        assert_eq!((*at, found.len()), (block, 1), "{found:?}");
        assert!(problem.contains(expected), "{problem}");
    }
}

#[test]
fn a_claim_of_blocks_in_use_is_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.clean = false);
    let used = {
        let store = open(&SimDisk::from_image(sample.disk.snapshot(), BLOCK, 1), &sample.reactor);
        Items(store).extents(sample.file)[&0].addr.0
    };
    append_block(&sample, 0, 1, &[Record::Claim { start: used, nodes: 1 }]);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[0], Finding::BlocksUsedTwice { start, .. } if start == used), "{found:?}");
    assert!(matches!(found[1], Finding::Journal { .. }), "{found:?}");
    append_block(&sample, 0, 1, &[Record::Claim { start: 2, nodes: 1 }]);
    let found = findings_of(&sample.disk);
    assert_eq!(found[0], Finding::Chunk { block: 2, problem: "lies outside the data area" });
}

#[test]
fn a_journal_that_goes_on_behind_a_clean_superblock_is_found() {
    let sample = Sample::new();
    append_block(&sample, 0, 1, &[]);
    assert_eq!(findings_of(&sample.disk), [Finding::CleanWithJournal { blocks: 1 }]);
}

#[test]
fn a_hole_in_the_journal_is_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.clean = false);
    append_block(&sample, 3, 4, &[]);
    let expected = sample.superblock().tail.seq;
    assert_eq!(findings_of(&sample.disk), [Finding::JournalGap { expected, found: expected + 3 }]);
}

#[test]
fn damaged_nodes_are_found_and_named() {
    type Patch = fn(&mut [u8]);
    let cases: [(&[usize], Patch, &str); 9] = [
        (&[], |page| page[0] ^= 1, "magic"),
        (&[LAST], |page| page[8] ^= 1, "block"),
        (&[LAST, LAST], |page| page[16] ^= 1, "another file system"),
        (&[LAST, 0], |page| page[32] ^= 1, "generation"),
        (&[LAST], |page| page[40] += 1, "level"),
        (&[LAST, LAST], |page| page[42..44].fill(0xff), "slots do not fit"),
        (&[LAST, LAST], |page| page[64 + 8] = 0xee, "unknown kind"),
        (&[LAST, LAST], |page| page[64 + 10..64 + 12].fill(0xff), "value of slot 0"),
        (&[1], |page| page[42..44].fill(0), "inner node without children"),
    ];
    for (path, with, expected) in cases {
        let sample = Sample::new();

        let block = sample.patch_node(path, with);
        let report = report_of(&sample.disk).unwrap();
        let found = &report.findings;
        assert!(matches!(found[..], [Finding::Node { block: at, .. }] if at == block), "{found:?}");
        assert!(problem(&found[0]).contains(expected), "{found:?}");
        assert!(!report.complete);
    }
}

#[test]
fn a_node_with_a_wrong_checksum_is_found() {
    let sample = Sample::new();
    let block = sample.patch_node(&[LAST, LAST], |_| ());
    sample.disk.poke(block * u64::from(BLOCK) + 700, &[0xaa; 8]);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[..], [Finding::Node { block: at, level: 0, .. }] if at == block), "{found:?}");
    assert!(problem(&found[0]).contains("checksum"), "{found:?}");
}

#[test]
fn a_node_that_cannot_be_read_is_found() {
    let sample = Sample::new();
    let block = sample.patch_node(&[LAST, LAST], |_| ());
    let start = block * u64::from(BLOCK);
    sample.disk.fail_reads(start..start + NODE as u64);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[..], [Finding::Node { block: at, level: 0, .. }] if at == block), "{found:?}");
    assert!(problem(&found[0]).contains("device error"), "{found:?}");
}

#[test]
fn keys_out_of_order_or_outside_their_node_are_found() {
    let sample = Sample::new();
    // Exchanges the first two keys of an inner node.
    sample.patch_node(&[], |page| {
        let (first, second) = page[64..112].split_at_mut(24);
        first[..9].swap_with_slice(&mut second[..9]);
        first[16..].swap_with_slice(&mut second[16..]);
    });
    assert!(problem(&findings_of(&sample.disk)[0]).contains("out of order"));

    let sample = Sample::new();
    let block = sample.patch_node(&[LAST, LAST], |page| page[64..72].fill(0));
    let found = findings_of(&sample.disk);
    assert!(matches!(found[..], [Finding::Node { block: at, .. }] if at == block), "{found:?}");
    assert!(problem(&found[0]).contains("outside the range"), "{found:?}");
}

#[test]
fn pointers_into_nowhere_are_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.root.addr = u64::MAX);
    let found = findings_of(&sample.disk);
    assert!(found.iter().any(|finding| matches!(finding, Finding::Node { block: u64::MAX, .. })));
    sample.set_superblock(|superblock| superblock.chunk_map.addr = 1 << 40);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[0], Finding::ChunkMap { .. }), "{found:?}");
    assert!(problem(&found[0]).contains("outside"), "{found:?}");
}

#[test]
fn a_node_with_two_parents_is_found() {
    let sample = Sample::new();
    let mut twice = 0;
    sample.patch_node(&[0], |page| {
        let (first, second) = (value_at(page, 0), value_at(page, 1));
        page.copy_within(first..first + 24, second);
        twice = u64::from_le_bytes(page[first..first + 8].try_into().unwrap());
    });
    assert_eq!(findings_of(&sample.disk), [Finding::PlaceUsedTwice { block: twice }]);
}

#[test]
fn a_node_of_a_later_generation_is_found() {
    let sample = Sample::new();
    sample.set_superblock(|superblock| superblock.root.generation += 100);
    assert!(problem(&findings_of(&sample.disk)[0]).contains("newer"));
}

#[test]
fn wrong_chunk_maps_are_found() {
    // Entries begin at byte 64: first block, used bits, places.
    let sample = Sample::new();
    let used = |page: &[u8]| u64::from_le_bytes(page[72..80].try_into().unwrap());
    let mut leaked = 0;
    sample.patch_map(|page| {
        let start = u64::from_le_bytes(page[64..72].try_into().unwrap());
        let place = (!used(page)).trailing_zeros();
        leaked = start + u64::from(place) * 2;
        let marked = used(page) | 1 << place;
        page[72..80].copy_from_slice(&marked.to_le_bytes());
    });
    assert_eq!(findings_of(&sample.disk), [Finding::PlaceLeaked { block: leaked }]);

    let sample = Sample::new();
    let mut lost = 0;
    sample.patch_map(|page| {
        let start = u64::from_le_bytes(page[64..72].try_into().unwrap());
        let place = used(page).trailing_zeros();
        lost = start + u64::from(place) * 2;
        let marked = used(page) & !(1 << place);
        page[72..80].copy_from_slice(&marked.to_le_bytes());
    });
    assert_eq!(findings_of(&sample.disk), [Finding::PlaceNotMarked { block: lost }]);

    let sample = Sample::new();
    let block = sample.patch_map(|page| page[80] = 99);
    let found = findings_of(&sample.disk);
    assert!(matches!(found[0], Finding::ChunkMap { block: at, .. } if at == block), "{found:?}");

    let sample = Sample::new();
    sample.patch_map(|page| page[64..72].fill(0));
    let found = findings_of(&sample.disk);
    assert_eq!(found[0], Finding::Chunk { block: 0, problem: "lies outside the data area" });

    let sample = Sample::new();
    let mut first = 0;
    sample.patch_map(|page| {
        page.copy_within(64..88, 88);
        first = u64::from_le_bytes(page[64..72].try_into().unwrap());
    });
    let found = findings_of(&sample.disk);
    assert_eq!(found[0], Finding::Chunk { block: first, problem: "overlaps another chunk" });

    // A page that names itself as the next one.
    let sample = Sample::new();
    let ptr = sample.superblock().chunk_map;
    sample.patch_map(|page| page[44..52].copy_from_slice(&ptr.addr.to_le_bytes()));
    let found = findings_of(&sample.disk);
    assert_eq!(found, [Finding::PlaceUsedTwice { block: ptr.addr }]);
}

#[test]
fn bitmaps_that_disagree_with_what_is_used_are_found() {
    let sample = Sample::new();
    let mut range = BlockRange::new(BlockAddr(0), 0);
    let found = sample.found(|items, txn| {
        range = items.free_blocks(3);
        txn.alloc(range);
    });
    assert_eq!(found, [Finding::BlocksLeaked { start: range.start.0, end: range.end().0 }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        range = items.extents(sample.file)[&0].device_range();
        txn.free(range);
    });
    assert_eq!(found, [Finding::BlocksNotMarked { start: range.start.0, end: range.end().0 }]);
}

#[test]
fn malformed_bitmaps_are_found() {
    let sample = Sample::new();
    let group = DEVICE / u64::from(BLOCK) / 512;
    let found = sample.found(|_, txn| txn.put(Key::group(group), &[0; 64]));
    assert_eq!(found, [Finding::Group { group, problem: "lies behind the end of the device" }]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::group(3), &[0; 7]));
    assert_eq!(found[0], Finding::Group { group: 3, problem: "has the wrong length" });
}

#[test]
fn items_that_cannot_be_are_found() {
    let item = |key: Key| {
        let sample = Sample::new();
        let found = sample.found(|_, txn| txn.put(key, &[]));
        let [Finding::Item { owner, offset, problem, .. }] = found[..] else { panic!("{found:?}") };
        assert_eq!((owner, offset), (key.owner, key.offset));
        problem
    };
    for kind in [Kind::Volume, Kind::RefCount, Kind::Quota] {
        assert_eq!(item(Key::new(0, kind, 1)), "a kind that this version does not have");
    }
    assert_eq!(item(Key::new(3, Kind::Checksum, 1)), "a kind that this version does not have");
    assert_eq!(item(Key::new(3, Kind::Orphan, 3)), "the owner is wrong for this kind");
    assert_eq!(item(Key::new(0, Kind::Xattr, 300)), "the owner is wrong for this kind");
    assert_eq!(item(Key::new(3, Kind::Inode, 7)), "the offset is not 0");
}

#[test]
fn intents_that_cannot_be_are_found() {
    let intent = |inode, problem| Finding::Intent { inode, problem };
    let sample = Sample::new();
    let file = sample.file;
    let found = sample.found(move |_, txn| txn.put(Key::intent(file), &[0; 7]));
    assert_eq!(found, [intent(file.0, "has the wrong length")]);
    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::intent(InodeId(77_777)), &[0; 8]));
    assert!(found.contains(&intent(77_777, "does not exist")), "{found:?}");
}

#[test]
fn wrong_extents_are_found() {
    let sample = Sample::new();
    let map = sample.file.0;
    let extent = |file_block, problem| Finding::Extent { map, file_block, problem };
    let found = sample.found(|_, txn| txn.put(Key::extent(MapId(map), 500), &[0; 24]));
    assert_eq!(found, [extent(500, "malformed")]);

    // Two file blocks in the same device blocks, and no count of blocks for it.
    let sample = Sample::new();
    let mut device = BlockRange::new(BlockAddr(0), 0);
    let found = sample.found(|items, txn| {
        let item = items.extents(sample.file)[&0];
        device = item.device_range();
        txn.put(Key::extent(MapId(map), 500), &item.encode());
        items.change(txn, sample.file, |inode| inode.blocks += u64::from(device.count));
    });
    let (start, end) = (device.start.0, device.end().0);
    assert_eq!(found, [Finding::BlocksUsedTwice { map, file_block: 500, start, end }]);

    let wrong = |file_block: u64, change: fn(&mut ExtentItem), expected: &'static str| {
        let sample = Sample::new();
        let found = sample.found(|items, txn| {
            let range = items.free_blocks(2);
            let mut item = ExtentItem::plain(range, ExtentFlags::empty());
            change(&mut item);
            txn.put(Key::extent(MapId(map), file_block), &item.encode());
        });
        assert!(found.contains(&extent(file_block, expected)), "{found:?}");
    };
    wrong(1, |_| (), "overlaps the one before it");
    wrong(1 << 60, |_| (), "lies behind the largest file");
    wrong(500, |item| item.addr = BlockAddr(5), "lies outside the data area");
    wrong(500, |item| item.addr = BlockAddr(1 << 50), "lies outside the data area");
    wrong(500, |item| item.flags = ExtentFlags::from_bits_retain(0x40), "has unknown flags");
}

#[test]
fn maps_without_an_owner_or_with_two_are_found() {
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        let map = items.0.next_id();
        txn.put(Key::inline(MapId(map)), b"content");
    });
    assert!(matches!(found[..], [Finding::MapUnowned { .. }]), "{found:?}");

    let sample = Sample::new();
    let (map, other) = (sample.file.0, sample.soft.0 + 2);
    let found = sample.found(|items, txn| {
        items.change(txn, InodeId(other), |item| item.map = MapId(map));
    });
    assert_eq!(found, [Finding::MapOwnedTwice { map, inode: map, other }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        let map = MapId(items.0.next_id());
        for inode in [other, other + 1] {
            items.change(txn, InodeId(inode), |item| item.map = map);
        }
    });
    let [Finding::MapOwnedTwice { inode, other: second, .. }] = found[..] else { panic!("{found:?}") };
    assert_eq!((inode, second), (other, other + 1));
}

#[test]
fn a_map_of_another_number_is_checked_like_any_other() {
    let sample = Sample::new();
    sample.damage(|items, txn| {
        let map = MapId(items.0.next_id());
        txn.delete(Key::inline(MapId(sample.soft.0)));
        txn.put(Key::inline(map), b"dir/sub");
        items.change(txn, sample.soft, |item| item.map = map);
    });
    assert_eq!(findings_of(&sample.disk), []);
    let found = sample.found(|items, txn| items.change(txn, sample.soft, |item| item.size = 3));
    assert_eq!(found, [Finding::Size { inode: sample.soft.0, size: 3, expected: 7 }]);
}

#[test]
fn wrong_inodes_are_found() {
    let wrong = |inode: fn(&Sample) -> InodeId, with: fn(&mut InodeItem), expected: &str| {
        let sample = Sample::new();
        let inode = inode(&sample);
        let found = sample.found(|items, txn| items.change(txn, inode, with));
        let named = found.iter().any(
            |finding| matches!(finding, Finding::Inode { inode: at, problem } if *at == inode.0 && *problem == expected),
        );
        assert!(named, "{expected}: {found:?}");
    };
    type Pick = fn(&Sample) -> InodeId;
    let (file, dir, soft): (Pick, Pick, Pick) =
        (|sample| sample.file, |sample| sample.dir, |sample| sample.soft);
    wrong(file, |item| item.mode = 0o030_644, "the mode is of no kind");
    wrong(file, |item| item.mode |= 1 << 20, "the mode is of no kind");
    wrong(file, |item| item.flags |= InodeFlags::from_bits_retain(1 << 30), "has unknown flags");
    wrong(file, |item| item.size = u64::MAX, "the size is impossible");
    wrong(file, |item| item.map = MapId(0), "has no map");
    wrong(file, |item| item.parent_map = MapId(4), "has a parent map, which this version does not have");
    wrong(file, |item| item.parent = InodeId(1), "has a parent, but is no directory");
    wrong(file, |item| item.flags = InodeFlags::empty(), "the flags deny an extended attribute");
    wrong(file, |item| item.flags |= InodeFlags::INLINE, "lacks its inline content");
    wrong(file, |item| item.mode = 0o060_644, "has extents, but is no file or has inline content");
    wrong(dir, |item| item.mode = 0o100_755, "has directory entries, but is no directory");
    wrong(soft, |item| item.flags = InodeFlags::empty(), "has inline content, but no flag for it");
    wrong(
        soft,
        |item| item.mode = 0o010_777,
        "has inline content, but is neither a file nor a symbolic link",
    );

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        txn.delete(Key::inline(MapId(sample.soft.0)));
        items.change(txn, sample.soft, |item| item.flags = InodeFlags::empty());
    });
    let problem = "is a symbolic link without a target";
    assert_eq!(found, [Finding::Inode { inode: sample.soft.0, problem }]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::inode(sample.file), &[1; 20]));
    assert_eq!(found, [Finding::Inode { inode: sample.file.0, problem: "malformed" }]);
}

#[test]
fn wrong_counts_are_found() {
    let sample = Sample::new();
    let (file, dir) = (sample.file, sample.dir);
    let found = sample.found(|items, txn| items.change(txn, file, |item| item.nlink = 7));
    assert_eq!(found, [Finding::LinkCount { inode: file.0, nlink: 7, expected: 2 }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| items.change(txn, dir, |item| item.nlink = 2));
    assert_eq!(found, [Finding::LinkCount { inode: dir.0, nlink: 2, expected: 3 }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| items.change(txn, dir, |item| item.size = 40));
    assert_eq!(found, [Finding::Size { inode: dir.0, size: 40, expected: 3 }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| items.change(txn, file, |item| item.blocks += 1));
    assert_eq!(found, [Finding::Blocks { inode: file.0, blocks: 25, expected: 24 }]);
}

#[test]
fn wrong_parents_are_found() {
    let sample = Sample::new();
    let (dir, sub) = (sample.dir.0, sample.sub.0);
    let found = sample.found(|items, txn| items.change(txn, sample.sub, |item| item.parent = InodeId::ROOT));
    assert_eq!(found, [Finding::Parent { inode: sub, parent: 1, expected: dir }]);

    let sample = Sample::new();
    let found =
        sample.found(|items, txn| items.change(txn, InodeId::ROOT, |item| item.parent = InodeId(dir)));
    assert_eq!(found, [Finding::Parent { inode: 1, parent: dir, expected: 1 }]);
}

#[test]
fn what_no_name_leads_to_is_found() {
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        txn.delete(items.entry(InodeId::ROOT, "soft"));
        items.change(txn, InodeId::ROOT, |item| item.size -= 1);
    });
    assert_eq!(found, [Finding::Unreachable { inode: sample.soft.0 }]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        txn.delete(items.entry(sample.sub, "deep"));
        items.change(txn, sample.sub, |item| (item.size, item.nlink) = (item.size - 1, 2));
    });
    assert_eq!(found, [Finding::Unreachable { inode: sample.deep.0 }]);
}

#[test]
fn directories_below_themselves_are_found() {
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        // "sub" moves from "dir" into "deep", which is below it.
        txn.delete(items.entry(sample.dir, "sub"));
        items.change(txn, sample.dir, |item| (item.size, item.nlink) = (item.size - 1, 2));
        let entry = DirentRef { inode: sample.sub, file_type: 4, name: b"sub" };
        txn.put_with(items.entry(sample.deep, "sub"), |out| encode_dirent(entry, out));
        items.change(txn, sample.deep, |item| (item.size, item.nlink) = (1, 3));
        items.change(txn, sample.sub, |item| item.parent = sample.deep);
    });
    let expected = [sample.sub, sample.deep].map(|inode| Finding::Disconnected { inode: inode.0 });
    assert_eq!(found, expected);
}

#[test]
fn a_missing_root_is_found() {
    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.delete(Key::inode(InodeId::ROOT)));
    assert!(found.contains(&Finding::NoRoot), "{found:?}");

    let sample = Sample::new();
    let found = sample.found(|items, txn| items.change(txn, InodeId::ROOT, |item| item.mode = 0o100_644));
    assert!(found.contains(&Finding::Inode { inode: 1, problem: "the root is no directory" }), "{found:?}");

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        items.put_entry(txn, sample.deep, "root", InodeId::ROOT, 4);
        items.change(txn, sample.deep, |item| (item.size, item.nlink) = (1, 3));
    });
    assert_eq!(found, [Finding::DirectoryNames { inode: 1, names: 1 }]);
}

#[test]
fn a_directory_with_two_names_is_found() {
    let sample = Sample::new();
    let found = sample.found(|items, txn| items.put_entry(txn, sample.deep, "again", sample.dir, 4));
    assert!(found.contains(&Finding::DirectoryNames { inode: sample.dir.0, names: 2 }), "{found:?}");
}

#[test]
fn wrong_entries_are_found() {
    let sample = Sample::new();
    let directory = sample.deep.0;
    let put = |name: &'static [u8], key: &dyn Fn(&Items) -> Key| {
        let sample = Sample::new();
        sample.found(|items, txn| {
            let entry = DirentRef { inode: sample.soft, file_type: 10, name };
            txn.put_with(key(items), |out| encode_dirent(entry, out));
            items.change(txn, sample.deep, |item| item.size = 1);
            items.change(txn, sample.soft, |item| item.nlink = 2);
        })
    };
    let own_hash = |name: &'static [u8]| {
        move |items: &Items| Key::dirent(InodeId(directory), items.0.name_hash(name) << SLOT_BITS)
    };
    let offset = |name: &[u8]| name_hash([1, 2], name) << SLOT_BITS;
    assert_eq!(put(b"fine", &own_hash(b"fine")), []);
    for name in [&b"a/b"[..], b"..", b"nul\0"] {
        let problem = "a name that no entry can have";
        assert_eq!(put(name, &own_hash(name)), [Finding::Entry { directory, offset: offset(name), problem }]);
    }
    let found = put(b"name", &own_hash(b"other"));
    let problem = "the offset is not the hash of the name";
    assert_eq!(found, [Finding::Entry { directory, offset: offset(b"other"), problem }]);

    let found = sample.found(|items, txn| {
        for slot in 0..2 {
            let entry = DirentRef { inode: sample.soft, file_type: 10, name: b"twice" };
            let mut key = items.entry(sample.deep, "twice");
            key.offset += slot;
            txn.put_with(key, |out| encode_dirent(entry, out));
        }
        items.change(txn, sample.deep, |item| item.size = 2);
        items.change(txn, sample.soft, |item| item.nlink = 3);
    });
    let (offset, problem) = (offset(b"twice") + 1, "the name is there twice");
    assert_eq!(found, [Finding::Entry { directory, offset, problem }]);

    let sample = Sample::new();
    let mut key = Key::dirent(sample.deep, 0);
    let found = sample.found(|items, txn| {
        key = items.entry(sample.deep, "short");
        txn.put(key, b"short");
        items.change(txn, sample.deep, |item| item.size = 1);
    });
    assert_eq!(found, [Finding::Entry { directory, offset: key.offset, problem: "malformed" }]);
}

#[test]
fn entries_that_lead_nowhere_or_to_another_kind_are_found() {
    let sample = Sample::new();
    let directory = sample.deep.0;
    let offset = name_hash([1, 2], b"lost") << SLOT_BITS;
    let found = sample.found(|items, txn| items.put_entry(txn, sample.deep, "lost", InodeId(7777), 8));
    assert_eq!(found, [Finding::EntryDangling { directory, offset, inode: 7777 }]);

    let sample = Sample::new();
    let mut key = Key::dirent(sample.dir, 0);
    let found = sample.found(|items, txn| {
        key = items.entry(InodeId::ROOT, "soft");
        let entry = DirentRef { inode: sample.soft, file_type: 8, name: b"soft" };
        txn.put_with(key, |out| encode_dirent(entry, out));
    });
    let (inode, offset) = (sample.soft.0, key.offset);
    assert_eq!(found, [Finding::EntryType { directory: 1, offset, inode, file_type: 8, expected: 10 }]);

    // Of two names only the second one has the wrong type.
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        key = items.entry(sample.dir, "link");
        let entry = DirentRef { inode: sample.file, file_type: 10, name: b"link" };
        txn.put_with(key, |out| encode_dirent(entry, out));
    });
    let (directory, inode, offset) = (sample.dir.0, sample.file.0, key.offset);
    assert_eq!(found, [Finding::EntryType { directory, offset, inode, file_type: 10, expected: 8 }]);
}

#[test]
fn items_of_a_missing_inode_are_found() {
    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        let id = items.0.next_id();
        let entry = DirentRef { inode: sample.soft, file_type: 10, name: b"x" };
        txn.put_with(items.entry(InodeId(id), "x"), |out| encode_dirent(entry, out));
        txn.put_with(items.xattr(InodeId(id), "user.x"), |out| encode_xattr_inline(b"user.x", b"", out));
        items.change(txn, sample.soft, |item| item.nlink = 2);
    });
    let problems: Vec<_> = found
        .iter()
        .map(|finding| match finding {
            Finding::Inode { problem, .. } => *problem,
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(
        problems,
        ["does not exist, but has directory entries", "does not exist, but has extended attributes"]
    );
}

#[test]
fn wrong_orphans_are_found() {
    let sample = Sample::new();
    let orphan = |inode: InodeId, problem| Finding::Orphan { inode: inode.0, problem };
    let found = sample.found(|_, txn| txn.put(Key::orphan(sample.soft), &[]));
    assert_eq!(found, [orphan(sample.soft, "has links"), orphan(sample.soft, "has a name")]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::orphan(InodeId(9999)), &[]));
    assert_eq!(found, [orphan(InodeId(9999), "does not exist")]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::orphan(InodeId(9999)), b"x"));
    assert_eq!(found[0], orphan(InodeId(9999), "the item is not empty"));

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put(Key::orphan(InodeId::ROOT), &[]));
    assert_eq!(found, [orphan(InodeId::ROOT, "is the root")]);
}

#[test]
fn wrong_extended_attributes_are_found() {
    let sample = Sample::new();
    let inode = sample.file.0;
    let xattr = |key: Key, problem| Finding::Xattr { inode, offset: key.offset, problem };
    let mut key = Key::xattr(sample.file, 0);
    let found = sample.found(|items, txn| {
        key = items.xattr(sample.file, "user.b");
        txn.put(key, &[9, 9]);
    });
    assert_eq!(found, [xattr(key, "malformed")]);

    let sample = Sample::new();
    let found = sample.found(|_, txn| txn.put_with(key, |out| encode_xattr_inline(b"user.c", b"", out)));
    assert_eq!(found, [xattr(key, "the offset is not the hash of the name")]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        key = items.xattr(sample.file, "user.a");
        key.offset += 3;
        txn.put_with(key, |out| encode_xattr_inline(b"user.a", b"", out));
    });
    assert_eq!(found, [xattr(key, "the name is there twice")]);

    let sample = Sample::new();
    let found = sample.found(|items, txn| {
        key = items.xattr(sample.file, "system.posix_acl_access");
        txn.put_with(key, |out| encode_xattr_inline(b"system.posix_acl_access", b"", out));
    });
    assert_eq!(found, [Finding::Inode { inode, problem: "the flags deny an extended attribute" }]);
}

#[test]
fn values_of_attributes_outside_their_item_are_checked() {
    let store_value = |name: &str, flags: ExtentFlags, size: u32| {
        let sample = Sample::new();
        let file = sample.file;
        sample.found(|items, txn| {
            let (map, range) = (MapId(items.0.next_id()), items.free_blocks(4));
            txn.alloc(range);
            txn.put(Key::extent(map, 0), &ExtentItem::plain(range, flags).encode());
            txn.put_with(items.xattr(file, name), |out| {
                encode_xattr_stored(name.as_bytes(), map, size, out);
            });
            items.change(txn, file, |item| item.flags |= InodeFlags::all() - InodeFlags::INLINE);
        })
    };
    let problems = |name: &str, flags, size| {
        let found = store_value(name, flags, size);
        let problem = |finding: &Finding| match finding {
            Finding::Xattr { problem, .. } => *problem,
            other => panic!("{other}"),
        };
        found.iter().map(problem).collect::<Vec<_>>()
    };
    let plain = ExtentFlags::empty();
    assert_eq!(problems("user.large", plain, 4 * BLOCK - 7), [""; 0]);
    let wrong_size = "its map does not hold a value of its size";
    assert_eq!(problems("user.large", plain, 4 * BLOCK + 1), [wrong_size]);
    assert_eq!(problems("user.large", ExtentFlags::UNWRITTEN, 4 * BLOCK), [wrong_size]);
    let misplaced = "a value that cannot be there";
    assert_eq!(problems("user.large", plain, 0), [misplaced, wrong_size]);
    assert_eq!(problems("user.large", plain, 65_537), [misplaced, wrong_size]);
    assert_eq!(problems("system.posix_acl_access", plain, 4 * BLOCK), [misplaced]);
    assert_eq!(problems("other.large", plain, 4 * BLOCK), ["a name that no attribute can have"]);
}

#[test]
fn a_gap_in_the_tree_is_not_reported_as_everything_that_may_be_missing() {
    for child in [0, 1, 2, LAST] {
        let sample = Sample::new();
        sample.patch_node(&[1, child], |page| page[0] ^= 1);
        let report = report_of(&sample.disk).unwrap();
        assert!(!report.complete);
        assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
    }
}

#[test]
fn findings_are_limited_but_counted() {
    let mut findings = Findings::default();
    for block in 0..10_100 {
        findings.push(Finding::PlaceLeaked { block });
    }
    assert_eq!((findings.list.len(), findings.left_out), (10_000, 100));
}

#[test]
fn random_damage_is_no_panic_and_what_is_called_clean_mounts() {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    let sample = Sample::new();
    let image = sample.disk.snapshot();
    let mut rng = SmallRng::seed_from_u64(3);
    for _ in 0..300 {
        let disk = SimDisk::from_image(image.clone(), BLOCK, 1);
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(4096..DEVICE - 64);
            disk.poke(at, &[rng.random(); 5]);
        }
        let clean = report_of(&disk).is_ok_and(|report| report.is_clean());
        let opened = mount(&disk);
        assert!(opened.is_ok() || !clean, "clean, but {opened:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// Pages and superblocks with arbitrary content and right checksums.
    #[test]
    fn hostile_content_with_right_checksums_is_no_panic(
        path in prop::collection::vec(0..2_usize, 0..3),
        at in 0..NODE,
        bytes in prop::collection::vec(any::<u8>(), 1..40),
        field in 12..SUPERBLOCK_LEN,
    ) {
        let sample = Sample::new();
        sample.patch_node(&path, |page| {
            let end = (at + bytes.len()).min(NODE);
            page[at..end].copy_from_slice(&bytes[..end - at]);
        });
        let _ = report_of(&sample.disk);
        let _ = mount(&sample.disk);

        let copy = SUPERBLOCK_OFFSETS[(sample.superblock().generation % 2) as usize];
        let mut block = [0; SUPERBLOCK_LEN];
        sample.disk.peek(copy, &mut block);
        let end = (field + bytes.len()).min(SUPERBLOCK_LEN);
        block[field..end].copy_from_slice(&bytes[..end - field]);
        let crc = crate::ondisk::crc32c(&block[12..]);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        sample.disk.poke(copy, &block);
        let _ = report_of(&sample.disk);
        let _ = mount(&sample.disk);
    }

    /// Whatever the file system does, its image is clean: closed, and after a power cut.
    #[test]
    fn an_image_of_the_file_system_is_clean_at_any_time(seed in any::<u64>(), steps in 1..60_usize) {
        let reactor = reactor();
        let disk = empty_disk(&reactor);
        let mounted = Mounted::new(&disk, &reactor);
        random_operations(&mounted, seed, steps);
        mounted.sync();
        random_operations(&mounted, seed ^ 1, steps);
        for choice in [CrashChoice::Nothing, CrashChoice::Everything, CrashChoice::Random { seed }] {
            let report = report_of(&disk.crash(choice)).unwrap();
            prop_assert_eq!(report.findings, []);
        }
        mounted.unmount();
        prop_assert_eq!(findings_of(&disk), []);
    }
}

/// Operations on a few names, whether they succeed or not.
fn random_operations(mounted: &Mounted, seed: u64, steps: usize) {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};
    let mut rng = SmallRng::seed_from_u64(seed);
    for _ in 0..steps {
        let (kind, a, b) = (rng.random_range(0..10), rng.random_range(0..6_u8), rng.random_range(0..6_u8));
        let (offset, len) = (rng.random_range(0..30_000), rng.random_range(1..9_000));
        let (fs, ctx) = (mounted.fs.clone(), mounted.ctx);
        let operation = async move { random_operation(&fs, ctx, kind, [a, b], offset, len).await };
        // A name that exists, or does not: all the same.
        let _ = mounted.reactor.block_on(operation);
    }
}

async fn random_operation(
    fs: &Rc<Fs>,
    ctx: Context,
    kind: u8,
    names: [u8; 2],
    offset: u64,
    len: usize,
) -> Result<(), FsError> {
    let [name, other] = names.map(|name| [b'a' + name]);
    let root = InodeId::ROOT;
    let parent = match fs.run(|fs| fs.lookup(&ctx, root, &other)).await {
        Ok(entry) if entry.attr.mode & 0o170_000 == 0o040_000 => entry.attr.inode,
        _ => root,
    };
    let found = fs.run(|fs| fs.lookup(&ctx, parent, &name)).await.map(|entry| entry.attr.inode);
    match kind {
        0 => fs.run(|fs| fs.create(&ctx, root, &name, &DIRECTORY)).await.map(drop),
        1 => fs.run(|fs| fs.create(&ctx, parent, &name, &FILE)).await.map(drop),
        2 => fs.run(|fs| fs.unlink(&ctx, parent, &name)).await,
        3 => fs.run(|fs| fs.rmdir(&ctx, parent, &name)).await,
        4 => {
            let call = |fs: &Rc<Fs>| {
                fs.rename(
                    &ctx,
                    (parent, &name),
                    (root, &other),
                    crate::fs::RenameMode::Replace,
                    len.is_multiple_of(2),
                )
            };
            fs.run(call).await
        }
        5 => {
            let inode = found?;
            fs.run(|fs| fs.link(&ctx, inode, root, &other)).await.map(drop)
        }
        6 => {
            let inode = found?;
            let change = SetAttr { size: Some(offset), ..SetAttr::default() };
            fs.run(|fs| fs.set_attr(&ctx, inode, &change)).await.map(drop)
        }
        7 => {
            let inode = found?;
            let name = [b"user.", &other[..]].concat();
            let value = vec![b'v'; offset as usize % 3000];
            if fs.xattr_fits(&name, &value) {
                fs.run(|fs| fs.set_xattr(&ctx, inode, &name, &value, XattrMode::Set, false)).await
            } else {
                fs.store_xattr(ctx, inode, &name, &value, XattrMode::Set).await
            }
        }
        8 => fs.fallocate(ctx, found?, FallocateMode::PunchHole, offset, len as u64).await,
        _ => {
            let src = IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(len, BLOCK as usize)));
            fs.write(ctx, found?, offset, src, IoFlags::default()).await.map(drop)
        }
    }
}
