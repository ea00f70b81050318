//! Files against plain vectors: buffered and direct, with a cache that is much too small, remounts, blocks
//! that are smaller than pages, and many operations at the same time on a slow device.

mod appends;
mod device_errors;
mod discards;
mod full;
mod log;
mod sums;
mod times;
mod tiny_cache;
mod together;

use std::future::Future;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use bdev::sim::SimDisk;
use bdev::{AlignedBuf, Bdev, IoBuffers};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use reactor::sync::join_all;
use reactor::{Reactor, VirtualClock};

use crate::FsError;
use crate::fs::{
    Context, CreateSpec, FallocateMode, Fs, IoFlags, MountOptions, NewNode, RenameMode, SeekTarget, SetAttr,
};
use crate::ondisk::{ExtentFlags, ExtentItem, FILE_SIZE_MAX, InodeItem, Key};
use crate::store::{MkfsOptions, OpenOptions, Store, mkfs};
use crate::txn::{Origin, Txn};
use crate::units::{BlockAddr, BlockRange, InodeId, MapId};

const DISK: u64 = 48 << 20;
/// More than the smallest cache holds.
const FILE_MAX: u64 = 6 << 20;
const DIRECT: IoFlags = flags(true);
const BUFFERED: IoFlags = flags(false);

const fn flags(direct: bool) -> IoFlags {
    IoFlags { direct, append: false, dsync: false, sync: false, from_cache: false, kill_privileges: false }
}

/// A mounted file system on a simulated disk.
struct Mount {
    reactor: Rc<Reactor>,
    disk: Rc<SimDisk>,
    fs: Rc<Fs>,
    ctx: Context,
}

impl Mount {
    fn new(block_size: u32, latency: bool) -> Self {
        Self::made(MkfsOptions { block_size, ..MkfsOptions::default() }, latency)
    }

    fn made(options: MkfsOptions, latency: bool) -> Self {
        Self::sized(DISK, options, latency)
    }

    fn sized(disk: u64, options: MkfsOptions, latency: bool) -> Self {
        // The order of names, and so which nodes they are in, is the same in every run.
        let options = MkfsOptions { uuid: [7; 16], hash_key: [1, 2], ..options };
        let reactor = Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(1_000_000))));
        let disk = SimDisk::new(disk, 512, 7);
        let device: Rc<dyn Bdev> = disk.clone();
        reactor.block_on(async move { mkfs(&device, &options).await }).unwrap();
        if latency {
            disk.set_latency(&reactor, Duration::from_micros(10)..Duration::from_millis(3));
        }
        Self::open(reactor, disk)
    }

    fn open(reactor: Rc<Reactor>, disk: Rc<SimDisk>) -> Self {
        let device = disk.clone();
        Self::on(reactor, disk, device, MountOptions { cache_size: 0, ..MountOptions::default() })
    }

    /// On a device that leads to the disk.
    fn on(reactor: Rc<Reactor>, disk: Rc<SimDisk>, device: Rc<dyn Bdev>, options: MountOptions) -> Self {
        let at = reactor.clone();
        let fs = reactor.block_on(async move {
            let store = Store::open(device, at, OpenOptions::default()).await.unwrap();
            Fs::mount(store, options).await.unwrap()
        });
        let session = fs.open_session();
        let ctx = Context { session, request: 1, uid: 0, gid: 0, pid: 1, supplementary_gid: None };
        Self { reactor, disk, fs, ctx }
    }

    fn remount(self) -> Self {
        let fs = self.fs.clone();
        self.reactor.block_on(async move { fs.unmount().await }).unwrap();
        Self::open(self.reactor.clone(), self.disk.clone())
    }

    fn create(&self, name: &'static str) -> InodeId {
        let ctx = self.ctx;
        let fs = self.fs.clone();
        let spec = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };
        let made = async move { fs.run(|fs| fs.create(&ctx, InodeId::ROOT, name.as_bytes(), &spec)).await };
        self.reactor.block_on(made).unwrap().attr.inode
    }
}

fn buffer(bytes: &[u8]) -> IoBuffers {
    let mut buf = Rc::new(AlignedBuf::zeroed(bytes.len(), 4096));
    Rc::get_mut(&mut buf).unwrap().copy_from_slice(bytes);
    IoBuffers::from_aligned(&buf)
}

async fn write(fs: &Rc<Fs>, ctx: Context, inode: InodeId, offset: u64, bytes: &[u8], flags: IoFlags) {
    let src = buffer(bytes);
    let written = match fs.try_write(&ctx, inode, offset, &src, flags) {
        Some(result) => result,
        None => fs.write(ctx, inode, offset, src, flags).await,
    };
    assert_eq!(written, Ok(bytes.len()));
}

async fn read(fs: &Rc<Fs>, ctx: Context, inode: InodeId, offset: u64, len: usize, flags: IoFlags) -> Vec<u8> {
    let buf = Rc::new(AlignedBuf::zeroed(len, 4096));
    let dst = IoBuffers::from_aligned(&buf);
    let got = match fs.try_read(&ctx, inode, offset, &dst, flags) {
        Some(result) => result,
        None => fs.read(ctx, inode, offset, dst, flags).await,
    };
    buf[..got.unwrap()].to_vec()
}

async fn resize(fs: &Rc<Fs>, ctx: Context, inode: InodeId, size: u64) {
    let change = SetAttr { size: Some(size), ..SetAttr::default() };
    fs.run(|fs| fs.set_attr(&ctx, inode, &change)).await.unwrap();
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Write { offset: u64, len: usize, direct: bool },
    Append { len: usize },
    Resize(u64),
    Fallocate(FallocateMode, u64, u64),
    Read { offset: u64, len: usize, direct: bool },
    Sync { data_only: bool },
    Seek(u64),
}

fn step(rng: &mut StdRng, max: u64) -> Step {
    let direct = rng.random_ratio(1, 3);
    let small = rng.random_ratio(1, 2);
    let longest = if rng.random_ratio(1, 4) { 1 << 20 } else { 9000 };
    let mut offset = rng.random_range(0..if small { 10_000.min(max) } else { max });
    let mut len = rng.random_range(1..longest);
    if rng.random_ratio(1, 2) {
        offset &= !4095;
        len = (len as u64).next_multiple_of(4096) as usize;
    }
    len = len.min((max - offset) as usize).max(1);
    let keep_size = rng.random();
    match rng.random_range(0..16) {
        0..6 => Step::Write { offset, len, direct },
        6 => Step::Append { len: len.min(5000) },
        7 => Step::Resize(offset),
        8 => Step::Fallocate(FallocateMode::PunchHole, offset, len as u64),
        9 => Step::Fallocate(FallocateMode::Zero { keep_size }, offset, len as u64),
        10 => Step::Fallocate(FallocateMode::Allocate { keep_size }, offset, len as u64),
        11 => Step::Sync { data_only: rng.random() },
        12 => Step::Seek(offset),
        _ => Step::Read { offset, len, direct },
    }
}

/// Does a step on a file and on its model, and compares.
async fn take(fs: Rc<Fs>, ctx: Context, inode: InodeId, model: &mut Vec<u8>, step: Step, byte: u8) {
    let grow = |model: &mut Vec<u8>, end: u64| model.resize(model.len().max(end as usize), 0);
    let cut = |model: &Vec<u8>, from: u64, len: u64| {
        let end = model.len() as u64;
        from.min(end) as usize..from.saturating_add(len).min(end) as usize
    };
    match step {
        Step::Write { offset, len, direct } => {
            let bytes: Vec<u8> = (0..len).map(|at| byte ^ (at >> 8) as u8 | 1).collect();
            write(&fs, ctx, inode, offset, &bytes, flags(direct)).await;
            grow(model, offset + len as u64);
            model[offset as usize..][..len].copy_from_slice(&bytes);
        }
        Step::Append { len } => {
            let bytes = vec![byte | 1; len];
            write(&fs, ctx, inode, 0, &bytes, IoFlags { append: true, ..BUFFERED }).await;
            model.extend_from_slice(&bytes);
        }
        Step::Resize(size) => {
            resize(&fs, ctx, inode, size).await;
            model.resize(size as usize, 0);
        }
        Step::Fallocate(mode, offset, len) => {
            fs.fallocate(ctx, inode, mode, offset, len).await.unwrap();
            match mode {
                FallocateMode::PunchHole | FallocateMode::Zero { keep_size: true } => {}
                FallocateMode::Allocate { keep_size: true } => {}
                _ => grow(model, offset + len),
            }
            if !matches!(mode, FallocateMode::Allocate { .. }) {
                let zeroed = cut(model, offset, len);
                model[zeroed].fill(0);
            }
        }
        Step::Read { offset, len, direct } => {
            let got = read(&fs, ctx, inode, offset, len, flags(direct)).await;
            let wanted = &model[cut(model, offset, len as u64)];
            assert!(got == wanted, "{}", difference(&got, wanted, offset));
        }
        Step::Sync { data_only } => fs.sync_inode(inode, data_only).await.unwrap(),
        Step::Seek(offset) => check_seek(&fs, ctx, inode, model, offset).await,
    }
}

fn difference(got: &[u8], wanted: &[u8], offset: u64) -> String {
    let at = got.iter().zip(wanted).position(|(got, wanted)| got != wanted);
    format!(
        "{} bytes for {}, first difference at byte {:?} of a read at {offset}",
        got.len(),
        wanted.len(),
        at
    )
}

/// Everything that is said to be a hole is zero, and data is found where it is.
async fn check_seek(fs: &Rc<Fs>, ctx: Context, inode: InodeId, model: &[u8], offset: u64) {
    let data = fs.run(|fs| fs.seek(&ctx, inode, offset, SeekTarget::Data)).await;
    let first = model.iter().skip(offset as usize).position(|byte| *byte != 0).map(|at| offset + at as u64);
    match (data, first) {
        (Ok(data), Some(first)) => assert!(data <= first, "data at {first}, told {data}"),
        (Err(FsError::NoData), first) => assert_eq!(first, None),
        (Ok(data), None) => assert!(data < model.len() as u64),
        (Err(error), _) => panic!("{error}"),
    }
}

async fn check_all(fs: Rc<Fs>, ctx: Context, inode: InodeId, model: &[u8]) {
    let attr = fs.run(|fs| fs.get_attr(&ctx, inode)).await.unwrap();
    assert_eq!(attr.size, model.len() as u64);
    let got = read(&fs, ctx, inode, 0, model.len() + 1, BUFFERED).await;
    assert!(got == model, "{}", difference(&got, model, 0));
}

/// Random steps on a few files, one after the other, with remounts.
fn run_steps(seed: u64, block_size: u32, latency: bool, steps: usize) {
    run_steps_on(Mount::new(block_size, latency), seed, steps);
}

fn run_steps_on(mut mount: Mount, seed: u64, steps: usize) {
    let mut rng = StdRng::seed_from_u64(seed);
    let block_size = mount.fs.store.block_size();
    let free = mount.fs.stat_fs().free;
    let names = ["a", "b", "c"];
    let mut files: Vec<(InodeId, Vec<u8>, u64)> = names
        .iter()
        .zip([3000, 100_000, FILE_MAX])
        .map(|(name, max)| (mount.create(name), Vec::new(), max))
        .collect();
    for number in 0..steps {
        if rng.random_ratio(1, 60) {
            mount = mount.remount();
        }
        let which = rng.random_range(0..files.len());
        let (inode, model, max) = &mut files[which];
        let step = step(&mut rng, *max);
        let (fs, ctx, inode, byte) = (mount.fs.clone(), mount.ctx, *inode, rng.random());
        let mut taken = std::mem::take(model);
        let context = format!("seed {seed}, step {number}: {step:?} on {}", names[which]);
        *model = mount.reactor.block_on(async move {
            let guard = Named(Some(context));
            take(fs.clone(), ctx, inode, &mut taken, step, byte).await;
            if number % 20 == 0 {
                check_all(fs, ctx, inode, &taken).await;
            }
            guard.passed();
            taken
        });
    }
    mount = mount.remount();
    for (inode, model, _) in files {
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        mount.reactor.block_on(async move {
            check_all(fs.clone(), ctx, inode, &model).await;
            resize(&fs, ctx, inode, 0).await;
        });
    }
    let fs = mount.fs.clone();
    mount.reactor.block_on(async move { fs.sync_all().await }).unwrap();
    let left = free - mount.fs.stat_fs().free;
    assert!(left * u64::from(block_size) < 1 << 20, "{left} blocks are lost");
}

/// Prints where a failure happened.
struct Named(Option<String>);

impl Named {
    fn passed(mut self) {
        self.0 = None;
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        if let Some(context) = &self.0 {
            eprintln!("{context}");
        }
    }
}

#[test]
fn files_hold_what_vectors_would_with_a_cache_that_is_too_small() {
    for seed in 0..4 {
        run_steps(seed, 4096, false, 400);
    }
}

#[test]
fn files_hold_what_vectors_would_with_blocks_smaller_than_pages() {
    for seed in 10..13 {
        run_steps(seed, 512, false, 300);
        run_steps(seed, 1024, true, 200);
    }
}

#[test]
fn files_hold_what_vectors_would_on_a_slow_device() {
    for seed in 20..23 {
        run_steps(seed, 4096, true, 300);
    }
}

/// Many clients in one file at once, each in a part of its own; parts share pages and blocks.
#[test]
fn clients_in_different_parts_of_a_file_do_not_disturb_each_other() {
    for seed in 0..4 {
        let mount = Mount::new(4096, true);
        let inode = mount.create("shared");
        const PART: u64 = 150_001;
        let clients =
            (0..8u64).map(|client| {
                let (fs, ctx) = (mount.fs.clone(), mount.ctx);
                async move {
                    run_client(fs, ctx, inode, seed << 8 | client, client * PART..(client + 1) * PART).await
                }
            });
        let all = join_all(clients.collect::<Vec<_>>());
        let parts = mount.reactor.block_on(all);
        let model: Vec<u8> = parts.concat();
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        mount.reactor.block_on(async move {
            resize(&fs, ctx, inode, model.len() as u64).await;
            check_all(fs, ctx, inode, &model).await;
        });
    }
}

async fn run_client(fs: Rc<Fs>, ctx: Context, inode: InodeId, seed: u64, part: Range<u64>) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let size = part.end - part.start;
    let mut model = vec![0; size as usize];
    for _ in 0..60 {
        let offset = rng.random_range(0..size);
        let len = rng.random_range(1..=(size - offset).min(40_000));
        let at = part.start + offset;
        let range = offset as usize..(offset + len) as usize;
        let direct = rng.random_ratio(1, 3);
        match rng.random_range(0..10) {
            0..5 => {
                let bytes = vec![rng.random(); len as usize];
                write(&fs, ctx, inode, at, &bytes, flags(direct)).await;
                model[range].copy_from_slice(&bytes);
            }
            5 => {
                fs.fallocate(ctx, inode, FallocateMode::PunchHole, at, len).await.unwrap();
                model[range].fill(0);
            }
            6 => fs.sync_inode(inode, true).await.unwrap(),
            _ => {
                let got = read(&fs, ctx, inode, at, len as usize, flags(direct)).await;
                // Where nobody has written yet the file may end early.
                let wanted = &model[range][..got.len()];
                assert!(got == wanted, "seed {seed}: {}", difference(&got, wanted, at));
                assert!(
                    model[(offset as usize + got.len())..(offset + len) as usize]
                        .iter()
                        .all(|byte| *byte == 0)
                );
            }
        }
    }
    model
}

#[test]
fn a_small_file_is_kept_in_the_tree_and_moves_out_when_it_grows() {
    let mount = Mount::new(4096, false);
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    let sectors = move |fs: &Rc<Fs>| fs.get_attr(&ctx, inode).unwrap().sectors;
    mount.reactor.block_on(async move {
        write(&fs, ctx, inode, 0, &[7; 1200], BUFFERED).await;
        fs.sync_inode(inode, false).await.unwrap();
        assert_eq!(sectors(&fs), 3);
        resize(&fs, ctx, inode, 1000).await;
        resize(&fs, ctx, inode, 1500).await;
        write(&fs, ctx, inode, 10_000, &[9; 10], DIRECT).await;
        let mut wanted = vec![7; 1000];
        wanted.resize(10_000, 0);
        wanted.extend([9; 10]);
        check_all(fs.clone(), ctx, inode, &wanted).await;
        fs.sync_inode(inode, true).await.unwrap();
        assert_eq!(sectors(&fs), 16);
    });
}

#[test]
fn a_failed_write_back_is_told_once_to_the_next_sync() {
    let mount = Mount::new(4096, false);
    let inode = mount.create("f");
    let (fs, ctx, disk) = (mount.fs.clone(), mount.ctx, mount.disk.clone());
    mount.reactor.block_on(async move {
        write(&fs, ctx, inode, 0, &[1; 100_000], BUFFERED).await;
        disk.inject(bdev::sim::Fault::every(bdev::sim::OpKind::Write, bdev::sim::Effect::Error { errno: 5 }));
        assert!(matches!(fs.sync_inode(inode, true).await, Err(FsError::Device(_))));
        disk.clear_faults();
        fs.sync_inode(inode, true).await.unwrap();
        // What could not be written is gone, and its blocks are free.
        write(&fs, ctx, inode, 0, &[2; 50_000], BUFFERED).await;
        fs.sync_inode(inode, true).await.unwrap();
        assert_eq!(read(&fs, ctx, inode, 0, 50_000, BUFFERED).await, [2; 50_000]);
    });
}

#[test]
fn a_full_device_refuses_writes_before_it_takes_them() {
    let mount = Mount::new(4096, false);
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        let piece = vec![5; 1 << 20];
        let mut offset = 0;
        let error = loop {
            match fs.write(ctx, inode, offset, buffer(&piece), BUFFERED).await {
                Ok(len) => offset += len as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(error, FsError::NoSpace);
        assert!(offset > DISK / 2);
        fs.sync_inode(inode, false).await.unwrap();
        check_all(fs.clone(), ctx, inode, &vec![5; offset as usize]).await;
        resize(&fs, ctx, inode, 0).await;
        write(&fs, ctx, inode, 0, &piece, BUFFERED).await;
        fs.sync_inode(inode, false).await.unwrap();
    });
}

/// A file of many extents: every other block is written.
async fn perforate(fs: &Rc<Fs>, ctx: Context, inode: InodeId, blocks: u64) {
    for block in 0..blocks {
        write(fs, ctx, inode, block * 8192, &[3; 4096], DIRECT).await;
    }
    fs.sync_inode(inode, false).await.unwrap();
}

#[test]
fn a_truncation_that_no_transaction_holds_is_at_once_and_is_finished_after_a_crash() {
    const BLOCKS: u64 = 1500;
    let mount = Mount::new(4096, false);
    let free = mount.fs.stat_fs().free;
    let inode = mount.create("f");
    let (fs, ctx, disk) = (mount.fs.clone(), mount.ctx, mount.disk.clone());
    let crashed = mount.reactor.block_on(async move {
        perforate(&fs, ctx, inode, BLOCKS).await;
        fs.run(|fs| fs.set_attr(&ctx, inode, &SetAttr { size: Some(5000), ..SetAttr::default() }))
            .await
            .unwrap();
        let attr = fs.get_attr(&ctx, inode).unwrap();
        assert_eq!(attr.size, 5000);
        assert!(attr.sectors > 8 * BLOCKS / 2, "the blocks are freed later");
        // What becomes durable now is the truncation, but hardly what it frees.
        fs.store.sync(fs.store.last_seq()).await.unwrap();
        let crashed = disk.crash(bdev::sim::CrashChoice::Nothing);
        // It grows only over what has been freed.
        resize(&fs, ctx, inode, 20_000).await;
        let got = read(&fs, ctx, inode, 0, 30_000, BUFFERED).await;
        assert!(got[..4096] == [3; 4096] && got[4096..] == [0; 20_000 - 4096]);
        assert_eq!(fs.get_attr(&ctx, inode).unwrap().sectors, 8);
        crashed
    });
    let mount = Mount::open(mount.reactor.clone(), crashed);
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        assert_eq!(fs.get_attr(&ctx, inode).unwrap().size, 5000);
        resize(&fs, ctx, inode, 20_000).await;
        let got = read(&fs, ctx, inode, 0, 30_000, BUFFERED).await;
        assert!(got[..4096] == [3; 4096] && got[4096..] == [0; 20_000 - 4096]);
        fs.sync_all().await.unwrap();
        assert!(free - fs.stat_fs().free < 200, "{} of {free}", fs.stat_fs().free);
    });
}

#[test]
fn bytes_that_were_cut_off_do_not_come_back_behind_a_truncation_to_the_same_size() {
    let mount = Mount::new(4096, false);
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        write(&fs, ctx, inode, 0, &[1; 4096], BUFFERED).await;
        fs.sync_all().await.unwrap();
        for size in [1000, 1000, 4096] {
            resize(&fs, ctx, inode, size).await;
        }
        fs.sync_all().await.unwrap();
        let got = read(&fs, ctx, inode, 0, 4096, DIRECT).await;
        assert!(got == [vec![1; 1000], vec![0; 3096]].concat());
    });
}

#[test]
fn a_page_that_is_read_while_its_blocks_are_freed_does_not_count_as_mapped() {
    let mount = Mount::new(512, false);
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        perforate(&fs, ctx, inode, 1500).await;
        // Inside a page that has all its blocks.
        resize(&fs, ctx, inode, 8192 + 1000).await;
        let file = fs.run(|fs| fs.inode(inode)).await.unwrap();
        assert!(file.data.cut_from.get().is_some(), "the blocks are freed later");
        assert_eq!(read(&fs, ctx, inode, 8192, 4096, BUFFERED).await, [3; 1000]);
        while file.data.cut_from.get().is_some() {
            // Nothing of it would be known if it left memory.
            assert!(!file.data.is_idle());
            fs.store.reactor().sleep(Duration::from_millis(1)).await;
        }
        assert!(!file.data.pages.borrow().get(2).mapped);
    });
}

#[test]
fn a_hole_that_fails_after_it_dropped_buffered_data_is_told_to_the_next_sync() {
    let mount = Mount::new(4096, false);
    let inode = mount.create("f");
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    mount.reactor.block_on(async move {
        write(&fs, ctx, inode, 0, &[1; 65_536], BUFFERED).await;
        fs.sync_all().await.unwrap();
        write(&fs, ctx, inode, 5 * 4096, &[2; 4096], BUFFERED).await;
        let mut txn = Txn::new(Origin::default());
        txn.put(Key::extent(MapId(inode.0), 5), &[0; 3]);
        fs.store.commit(&txn).unwrap();
        let punched = fs.fallocate(ctx, inode, FallocateMode::PunchHole, 5 * 4096, 4096).await;
        assert!(matches!(punched, Err(FsError::Corrupt(_))), "{punched:?}");
        let synced = fs.sync_inode(inode, false).await;
        assert!(matches!(synced, Err(FsError::Corrupt(_))), "{synced:?}");
    });
}

/// A power cut between two transactions that map the blocks of one batch.
#[test]
fn data_behind_the_end_of_a_file_after_a_power_cut_is_not_seen_when_it_grows() {
    const PAGES: u64 = 100;
    // What is in the open block before decides between which of them it ends.
    for names in (0..60).step_by(3) {
        // A small journal, and so short transactions.
        let small = MkfsOptions {
            block_size: 512,
            node_size: 1024,
            journal_size: 64 << 10,
            ..MkfsOptions::default()
        };
        let mount = Mount::sized(8 << 20, small, false);
        let inode = mount.create("f");
        mount.disk.set_latency(&mount.reactor, Duration::from_micros(10)..Duration::from_micros(20));
        let (fs, ctx, disk) = (mount.fs.clone(), mount.ctx, mount.disk.clone());
        let cuts = mount.reactor.block_on(async move {
            fs.sync_all().await.unwrap();
            for page in 0..PAGES {
                write(&fs, ctx, inode, page * 8192, &[3; 4096], BUFFERED).await;
            }
            let spec = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };
            for name in 0..names {
                let name = name.to_string();
                fs.run(|fs| fs.create(&ctx, InodeId::ROOT, name.as_bytes(), &spec)).await.unwrap();
            }
            let (at, done) = (fs.clone(), Rc::new(std::cell::Cell::new(false)));
            let is_done = done.clone();
            drop(fs.store.reactor().spawn(async move {
                at.sync_inode(inode, false).await.unwrap();
                is_done.set(true);
            }));
            let mut cuts = Vec::new();
            while !done.get() {
                fs.store.reactor().sleep(Duration::from_micros(5)).await;
                cuts.push(disk.crash(bdev::sim::CrashChoice::Nothing));
            }
            cuts
        });
        for cut in cuts {
            let mount = Mount::open(mount.reactor.clone(), cut);
            let (fs, ctx) = (mount.fs.clone(), mount.ctx);
            mount.reactor.block_on(async move {
                let before = fs.run(|fs| fs.get_attr(&ctx, inode)).await.unwrap().size;
                resize(&fs, ctx, inode, PAGES * 8192).await;
                let got = read(&fs, ctx, inode, 0, (PAGES * 8192) as usize, BUFFERED).await;
                let data = got.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
                assert!(data <= before, "the file had {before} bytes, and has data up to {data}");
            });
        }
    }
}

#[test]
fn a_rename_over_a_file_takes_a_size_along_that_no_data_is_behind() {
    let mount = Mount::new(4096, false);
    let (source, target) = (mount.create("new"), mount.create("old"));
    let (fs, ctx, disk) = (mount.fs.clone(), mount.ctx, mount.disk.clone());
    let crashed = mount.reactor.block_on(async move {
        write(&fs, ctx, target, 0, &[1; 100], BUFFERED).await;
        fs.sync_all().await.unwrap();
        write(&fs, ctx, source, 50_000, &[1; 30_000], BUFFERED).await;
        fs.fallocate(ctx, source, FallocateMode::PunchHole, 45_000, 50_000).await.unwrap();
        let (from, to) = ((InodeId::ROOT, &b"new"[..]), (InodeId::ROOT, &b"old"[..]));
        fs.run(|fs| fs.rename(&ctx, from, to, RenameMode::Replace, false)).await.unwrap();
        fs.store.sync(fs.store.last_seq()).await.unwrap();
        disk.crash(bdev::sim::CrashChoice::Nothing)
    });
    let mount = Mount::open(mount.reactor.clone(), crashed);
    let (fs, ctx) = (mount.fs.clone(), mount.ctx);
    let looked_up = async move { fs.run(|fs| fs.lookup(&ctx, InodeId::ROOT, b"old")).await };
    assert_eq!(mount.reactor.block_on(looked_up).unwrap().attr.size, 80_000);
}

#[test]
fn inodes_of_impossible_size_are_corruption() {
    for change in [|item: &mut InodeItem| item.size = 1 << 63, |item: &mut InodeItem| item.blocks = 1 << 62] {
        let mut mount = Mount::new(4096, false);
        let inode = mount.create("file");
        let mut item =
            mount.fs.store.get(&Key::inode(inode), |item| InodeItem::decode(item.unwrap())).unwrap().unwrap();
        change(&mut item);
        let mut txn = Txn::new(Origin::default());
        txn.put_inode(inode, &item);
        mount.fs.store.commit(&txn).unwrap();
        mount = mount.remount();
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        let found =
            mount.reactor.block_on(async move { fs.run(|fs| fs.lookup(&ctx, InodeId::ROOT, b"file")).await });
        assert!(matches!(found, Err(FsError::Corrupt(_))), "{found:?}");
    }
}

#[test]
fn a_lost_root_directory_is_corruption_and_not_made_anew() {
    let mount = Mount::new(4096, false);
    mount.create("file");
    let mut txn = Txn::new(Origin::default());
    txn.delete(Key::inode(InodeId::ROOT));
    mount.fs.store.commit(&txn).unwrap();
    let (fs, device, at) = (mount.fs.clone(), mount.disk.clone(), mount.reactor.clone());
    let mounted = mount.reactor.block_on(async move {
        fs.unmount().await.unwrap();
        let store = Store::open(device, at, OpenOptions::default()).await.unwrap();
        Fs::mount(store, MountOptions::default()).await.map(drop)
    });
    assert!(matches!(mounted, Err(FsError::Corrupt(_))), "{mounted:?}");
}

#[test]
fn extents_that_are_no_file_data_are_corruption_and_touch_nothing() {
    let mount = Mount::new(4096, false);
    let blocks = DISK / 4096;
    let plain = |addr: u64| {
        let range = BlockRange::new(BlockAddr(addr), 8);
        ExtentItem::plain(range, ExtentFlags::empty()).encode()
    };
    let last_block = FILE_SIZE_MAX.div_ceil(4096);
    for (name, start, value) in [
        ("superblock", 0, plain(0)),
        ("journal", 0, plain(64)),
        ("beyond the device", 0, plain(blocks - 4)),
        ("beyond all bytes", 0, plain(1 << 52)),
        ("beyond the largest file", last_block - 4, plain(blocks / 2)),
    ] {
        let (inode, at) = (mount.create(name), (start * 4096).min(FILE_SIZE_MAX - 8192));
        let (fs, ctx) = (mount.fs.clone(), mount.ctx);
        mount.reactor.block_on(async move { resize(&fs, ctx, inode, at + 8192).await });
        let mut txn = Txn::new(Origin::default());
        txn.put(Key::extent(MapId(inode.0), start), &value);
        mount.fs.store.commit(&txn).unwrap();
        let (fs, before) = (mount.fs.clone(), mount.disk.writes());
        mount.reactor.block_on(async move {
            let read = fs.read(ctx, inode, at, buffer(&[0; 4096]), DIRECT).await;
            let written = fs.write(ctx, inode, at, buffer(&[1; 4096]), DIRECT).await;
            for result in [read, written] {
                assert!(matches!(result, Err(FsError::Corrupt(_))), "{name}: {result:?}");
            }
        });
        assert_eq!(mount.disk.writes(), before, "{name}");
    }
}
