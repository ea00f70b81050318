//! Attributes whose values fit no item: their blocks, and power cuts while they are set.

use std::rc::Rc;
use std::time::Duration;

use bdev::sim::{CrashChoice, Effect, Fault, OpKind, SimDisk};
use reactor::{Reactor, VirtualClock};

use super::*;
use crate::fs::tests::{Bench, DIRECTORY, FILE};
use crate::store::{MkfsOptions, OpenOptions, Store, mkfs};

const NAME: &[u8] = b"user.large";

/// A value that depends on `seed` in every block.
fn value(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 100 + seed) as u8).collect()
}

/// Sets the attribute, from outside of tasks.
fn set(bench: &Bench, inode: InodeId, value: &[u8], mode: XattrMode) -> Result<(), FsError> {
    let (fs, ctx, value) = (bench.fs.clone(), bench.ctx, value.to_vec());
    bench.reactor.block_on(async move {
        match fs.xattr_fits(NAME, &value) {
            true => fs.run(|fs| fs.set_xattr(&ctx, inode, NAME, &value, mode, false)).await,
            false => fs.store_xattr(ctx, inode, NAME, &value, mode).await,
        }
    })
}

fn get(bench: &Bench, inode: InodeId) -> Result<Vec<u8>, FsError> {
    let (fs, ctx) = (bench.fs.clone(), bench.ctx);
    bench.reactor.block_on(async move { fs.read_xattr(ctx, inode, NAME).await })
}

fn free(bench: &Bench) -> u64 {
    bench.fs.stat_fs().free
}

#[test]
fn blocks_come_with_a_large_value_and_go_with_it() {
    let bench = Bench::new();
    let (ctx, file) = (bench.ctx, bench.create(InodeId::ROOT, "f", FILE));
    let before = free(&bench);
    let blocks_of = |len: usize| {
        set(&bench, file, &value(len, len), XattrMode::Set).unwrap();
        assert_eq!(get(&bench, file).unwrap(), value(len, len));
        before - free(&bench)
    };
    assert_eq!(blocks_of(65_536), 16);
    assert_eq!(blocks_of(8193), 3);
    assert_eq!(blocks_of(100), 0);
    assert_eq!(blocks_of(65_536), 16);
    assert_eq!(bench.attr(file).unwrap().sectors, 0);
    bench.run(move |fs| fs.remove_xattr(&ctx, file, NAME)).unwrap();
    assert_eq!(free(&bench), before);
    assert_eq!(get(&bench, file), Err(FsError::NoAttribute));
}

#[test]
fn a_deleted_inode_gives_the_blocks_of_its_values_back() {
    let bench = Bench::new();
    let ctx = bench.ctx;
    let before = free(&bench);
    for (spec, is_file) in [(FILE, true), (DIRECTORY, false)] {
        let node = bench.create(InodeId::ROOT, "x", spec);
        set(&bench, node, &value(65_536, 1), XattrMode::Set).unwrap();
        bench
            .run(move |fs| match is_file {
                true => fs.unlink(&ctx, InodeId::ROOT, b"x"),
                false => fs.rmdir(&ctx, InodeId::ROOT, b"x"),
            })
            .unwrap();
        assert_eq!(get(&bench, node).unwrap(), value(65_536, 1));
        bench.fs.forget(ctx.session, node, 1);
        bench.settle();
        assert_eq!(free(&bench), before);
    }
}

/// One transaction does not hold the removal of all of them.
#[test]
fn an_inode_with_many_large_values_is_deleted_in_pieces() {
    let disk = SimDisk::new(8 << 20, 512, 1);
    let bench = on_disk(&disk, true);
    let ctx = bench.ctx;
    let file = bench.create(InodeId::ROOT, "f", FILE);
    let before = free(&bench);
    for i in 0..1500 {
        let fs = bench.fs.clone();
        let name = format!("user.{i}");
        let set = async move { fs.store_xattr(ctx, file, name.as_bytes(), &[1; 2000], XattrMode::Set).await };
        bench.reactor.block_on(set).unwrap();
    }
    bench.run(move |fs| fs.unlink(&ctx, InodeId::ROOT, b"f")).unwrap();
    bench.fs.forget(ctx.session, file, 1);
    bench.settle();
    sync(&bench).unwrap();
    assert_eq!(bench.attr(file), Err(FsError::Stale));
    // What is not given back became room for tree nodes.
    assert!(before - free(&bench) < 1500 * 4 / 2);
}

#[test]
fn what_cannot_be_set_leaves_the_value_before() {
    let bench = Bench::new();
    let file = bench.create(InodeId::ROOT, "f", FILE);
    assert_eq!(set(&bench, file, &value(9000, 1), XattrMode::Replace), Err(FsError::NoAttribute));
    set(&bench, file, &value(9000, 1), XattrMode::Create).unwrap();
    let before = free(&bench);
    assert_eq!(set(&bench, file, &value(9000, 2), XattrMode::Create), Err(FsError::Exists));
    assert_eq!(set(&bench, file, &vec![0; 65_537], XattrMode::Set), Err(FsError::TooBig));
    assert_eq!(get(&bench, file).unwrap(), value(9000, 1));
    assert_eq!(free(&bench), before);
    for name in [ACL_ACCESS, CAPABILITY] {
        let (fs, ctx) = (bench.fs.clone(), bench.ctx);
        let stored = bench
            .reactor
            .block_on(async move { fs.store_xattr(ctx, file, name, &[0; 9000], XattrMode::Set).await });
        assert_eq!(stored, Err(FsError::NoSpace), "what a change of the mode needs lies in its item");
    }
}

#[test]
fn a_full_device_takes_no_large_value_and_gives_one_back() {
    let bench = Bench::new();
    let mut files = Vec::new();
    let error = loop {
        let file = bench.create(InodeId::ROOT, format!("f{}", files.len()).leak(), FILE);
        match set(&bench, file, &value(65_536, files.len()), XattrMode::Set) {
            Ok(()) => files.push(file),
            Err(error) => break error,
        }
    };
    assert_eq!(error, FsError::NoSpace);
    for (i, file) in files.iter().enumerate() {
        assert_eq!(get(&bench, *file).unwrap(), value(65_536, i));
    }
    let ctx = bench.ctx;
    for file in files {
        bench.run(move |fs| fs.remove_xattr(&ctx, file, NAME)).unwrap();
    }
    let file = bench.create(InodeId::ROOT, "again", FILE);
    set(&bench, file, &value(65_536, 7), XattrMode::Set).unwrap();
}

/// Small blocks, so that a value has many.
fn on_disk(disk: &Rc<SimDisk>, format: bool) -> Bench {
    let reactor = Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(1))));
    let (disk, inner) = (disk.clone(), reactor.clone());
    let store = reactor.block_on(async move {
        if format {
            let options = MkfsOptions { block_size: 512, node_size: 1024, ..MkfsOptions::default() };
            let device: Rc<dyn bdev::Bdev> = disk.clone();
            mkfs(&device, &options).await.unwrap();
        }
        Store::open(disk, inner, OpenOptions::default()).await.unwrap()
    });
    Bench::mount(reactor, store)
}

fn sync(bench: &Bench) -> Result<(), FsError> {
    let fs = bench.fs.clone();
    bench.reactor.block_on(async move { fs.sync_all().await })
}

/// The checker finds nothing.
fn assert_sound(disk: &Rc<SimDisk>) {
    let device: Rc<dyn bdev::Bdev> = disk.clone();
    let reactor = Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(1))));
    let report = reactor.block_on(async move { crate::check::check(&device).await }).unwrap();
    assert!(report.is_clean(), "{:?}", report.findings);
}

fn file_of(bench: &Bench) -> InodeId {
    let ctx = bench.ctx;
    bench.run(move |fs| fs.lookup(&ctx, InodeId::ROOT, b"f")).unwrap().attr.inode
}

#[test]
fn a_power_cut_leaves_the_old_value_or_the_new_one_whole() {
    let (old, new) = (value(20_000, 1), value(30_000, 2));
    let disk = SimDisk::new(1 << 20, 512, 1);
    let bench = on_disk(&disk, true);
    bench.create(InodeId::ROOT, "f", FILE);
    set(&bench, file_of(&bench), &old, XattrMode::Set).unwrap();
    sync(&bench).unwrap();
    disk.record();
    set(&bench, file_of(&bench), &new, XattrMode::Set).unwrap();
    sync(&bench).unwrap();
    let synced = disk.position();
    let mut history = disk.take_history();
    let mut seen = [0, 0];
    for point in 0..=synced {
        for seed in 0..6 {
            let choice = match seed {
                0 => CrashChoice::Nothing,
                1 => CrashChoice::Everything,
                seed => CrashChoice::Random { seed },
            };
            let disk = SimDisk::from_image(history.state_at(point, choice), 512, 1);
            assert_sound(&disk);
            let recovered = on_disk(&disk, false);
            let found = get(&recovered, file_of(&recovered)).unwrap();
            let is_new = found == new;
            assert!(is_new || found == old, "neither value, at {point} with {choice:?}");
            assert!(is_new || point < synced, "what was synced is lost, with {choice:?}");
            seen[usize::from(is_new)] += 1;
        }
    }
    assert!(seen[0] > 0 && seen[1] > 0, "both were seen: {seen:?}");
}

/// The deletion of an inode whose values fill many transactions, cut at every write.
#[test]
fn a_power_cut_during_a_deletion_leaves_a_sound_file_system() {
    let disk = SimDisk::new(2 << 20, 512, 1);
    let bench = on_disk(&disk, true);
    let ctx = bench.ctx;
    let file = bench.create(InodeId::ROOT, "f", FILE);
    for i in 0..300 {
        let fs = bench.fs.clone();
        let name = format!("user.{i}");
        let set = async move { fs.store_xattr(ctx, file, name.as_bytes(), &[1; 1500], XattrMode::Set).await };
        bench.reactor.block_on(set).unwrap();
    }
    sync(&bench).unwrap();
    disk.record();
    bench.run(move |fs| fs.unlink(&ctx, InodeId::ROOT, b"f")).unwrap();
    bench.fs.forget(ctx.session, file, 1);
    bench.settle();
    sync(&bench).unwrap();
    assert_eq!(bench.attr(file), Err(FsError::Stale));
    let last = disk.position();
    let mut history = disk.take_history();
    for point in 0..=last {
        let disk = SimDisk::from_image(history.state_at(point, CrashChoice::Everything), 512, 1);
        assert_sound(&disk);
        let recovered = on_disk(&disk, false);
        let found = recovered.run(move |fs| fs.lookup(&ctx, InodeId::ROOT, b"f"));
        assert!(found.is_ok() || recovered.attr(file) == Err(FsError::Stale), "deleted by the mount");
    }
}

#[test]
fn a_failed_write_leaves_the_value_before() {
    let disk = SimDisk::new(1 << 20, 512, 1);
    let bench = on_disk(&disk, true);
    let file = bench.create(InodeId::ROOT, "f", FILE);
    set(&bench, file, &value(20_000, 1), XattrMode::Set).unwrap();
    sync(&bench).unwrap();
    let before = free(&bench);
    disk.inject(Fault::nth(OpKind::Write, 0, Effect::Error { errno: 5 }));
    assert!(matches!(set(&bench, file, &value(30_000, 2), XattrMode::Set), Err(FsError::Device(_))));
    disk.clear_faults();
    assert_eq!(get(&bench, file).unwrap(), value(20_000, 1));
    sync(&bench).unwrap();
    assert_eq!(free(&bench), before);
}

#[test]
fn damaged_values_are_told_from_whole_ones() {
    let bench = Bench::new();
    let file = bench.create(InodeId::ROOT, "f", FILE);
    set(&bench, file, &value(20_000, 1), XattrMode::Set).unwrap();
    let ctx = bench.ctx;
    // The last extent is gone.
    bench
        .run(move |fs| {
            let Some(Found::Stored(stored)) = fs.xattr(file, NAME)? else { panic!("stored") };
            let extents = fs.stored_extents(&stored)?;
            let mut txn = fs.begin(&ctx);
            txn.delete(extents.last().unwrap().0);
            fs.store.commit(&txn).map(drop)
        })
        .unwrap();
    assert!(matches!(get(&bench, file), Err(FsError::Corrupt(_))));
    let removed = bench.run(move |fs| fs.remove_xattr(&ctx, file, NAME));
    assert!(matches!(removed, Err(FsError::Corrupt(_))));
}
