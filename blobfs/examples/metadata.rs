//! What metadata costs: items of the store, then one large directory, created, mounted again and listed.
//!
//! ```text
//! cargo run --release -p blobfs --example metadata -- [ENTRIES] [METADATA CACHE IN MIB]
//! ```

use std::cell::Cell;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::time::Instant;

use bdev::memory::Memory;
use blobfs::fs::{Context, CreateSpec, MountOptions, NewNode};
use blobfs::ondisk::{Key, Kind};
use blobfs::store::{MkfsOptions, OpenOptions, Store, mkfs};
use blobfs::txn::{Origin, Txn};
use blobfs::units::InodeId;
use blobfs::{Fs, FsError, Stop};
use reactor::{Reactor, SystemClock};

/// Bytes of the device with the directory.
const DEVICE: u64 = 4 << 30;

const FILE: CreateSpec<'static> = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let entries = args.next().map_or(Ok(1_000_000), |text| text.parse())?;
    let cache: usize = args.next().map_or(Ok(64), |text| text.parse())?;
    store_costs()?;
    directory(entries, cache << 20)?;
    Ok(())
}

/// Resident memory of this process in MiB, less what a device of `device` bytes in memory takes of it.
fn resident_mib(device: u64) -> u64 {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let (mut size, mut resident) = (0, 0);
    for line in maps.lines() {
        let kib = |text: &str| text.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
        if let Some(text) = line.strip_prefix("Size:") {
            size = kib(text);
        } else if let Some(text) = line.strip_prefix("Rss:") {
            resident += if size >= device / 1024 { 0 } else { kib(text) };
        }
    }
    resident / 1024
}

fn per_op(what: &str, count: u64, start: Instant) {
    let nanos = start.elapsed().as_nanos() as u64 / count.max(1);
    println!("{what:<44} {nanos:>8} ns each, {count} times");
}

/// Lookups and transactions in a store whose nodes are all cached.
fn store_costs() -> Result<(), FsError> {
    const ITEMS: u64 = 200_000;
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let store = Store::volatile(Memory::new(1 << 30, 4096), reactor.clone());
    let inner = store.clone();
    reactor.block_on(async move {
        // All numbers, in an order that jumps about.
        let key = |number: u64| Key::new(1 + number % ITEMS * 77_777 % ITEMS, Kind::Inode, 0);
        for round in ["insert", "replace"] {
            let start = Instant::now();
            let mut txn = Txn::new(Origin::default());
            for number in 0..ITEMS {
                txn.clear(Origin::default());
                txn.put(key(number), &[round.len() as u8; 136]);
                commit(&inner, &txn).await?;
            }
            per_op(&format!("store: {round} one item"), ITEMS, start);
        }
        for _ in 0..2 {
            let start = Instant::now();
            let mut found = 0;
            for number in 0..5 * ITEMS {
                found += u64::from(inner.get(&key(number), |value| value.is_some()) == Ok(true));
            }
            per_op("store: get", 5 * ITEMS, start);
            assert_eq!(found, 5 * ITEMS);
        }
        Ok(())
    })
}

async fn commit(store: &Rc<Store>, txn: &Txn) -> Result<(), FsError> {
    loop {
        match store.commit(txn) {
            Ok(_) => return Ok(()),
            Err(Stop::Fail(error)) => return Err(error),
            Err(Stop::Wait(wait)) => drop(store.wait(&wait).await?),
        }
    }
}

async fn mount(device: Rc<Memory>, reactor: Rc<Reactor>, cache: usize) -> Result<Rc<Fs>, FsError> {
    let store = Store::open(device, reactor, OpenOptions::default()).await.expect("a sound file system");
    Fs::mount(store, MountOptions { metadata_cache_size: cache, ..MountOptions::default() }).await
}

/// A directory of so many files: created, mounted again, listed, looked up.
fn directory(entries: u64, cache: usize) -> Result<(), FsError> {
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let device = Memory::new(DEVICE, 4096);
    let bdev: Rc<dyn bdev::Bdev> = device.clone();
    let inner = reactor.clone();
    reactor.block_on(async move {
        mkfs(&bdev, &MkfsOptions::default()).await.expect("a large device");
        let fs = mount(device.clone(), inner.clone(), cache).await?;
        let start = Instant::now();
        let ctx = context(&fs);
        for number in 0..entries {
            let name = format!("file {number}");
            let made = fs.run(|fs| fs.create(&ctx, InodeId::ROOT, name.as_bytes(), &FILE)).await?;
            fs.forget(ctx.session, made.attr.inode, 1);
        }
        per_op("directory: create", entries, start);
        fs.close_session(ctx.session);
        fs.unmount().await?;
        drop(fs);
        println!("resident, unmounted: {} MiB", resident_mib(DEVICE));

        let start = Instant::now();
        let fs = mount(device, inner, cache).await?;
        println!("directory: mount {:?}", start.elapsed());
        let ctx = context(&fs);
        println!("resident, mounted: {} MiB", resident_mib(DEVICE));
        let start = Instant::now();
        let listed = list(&fs, &ctx).await?;
        per_op("directory: list", listed, start);
        assert_eq!(listed, entries + 2);
        println!("resident, listed: {} MiB", resident_mib(DEVICE));
        let start = Instant::now();
        for number in 0..entries {
            let name = format!("file {number}");
            fs.run(|fs| fs.lookup(&ctx, InodeId::ROOT, name.as_bytes())).await?;
        }
        per_op("directory: lookup", entries, start);
        println!("resident, all looked up: {} MiB", resident_mib(DEVICE));
        fs.unmount().await
    })
}

fn context(fs: &Rc<Fs>) -> Context {
    Context { session: fs.open_session(), request: 0, uid: 0, gid: 0, pid: 0, supplementary_gid: None }
}

async fn list(fs: &Rc<Fs>, ctx: &Context) -> Result<u64, FsError> {
    let (cookie, count) = (Cell::new(0), Cell::new(0));
    loop {
        let before = count.get();
        fs.run(|fs| {
            let mut left = 256;
            fs.read_dir(ctx, InodeId::ROOT, cookie.get(), &mut |entry| {
                cookie.set(entry.cookie);
                count.set(count.get() + 1);
                left -= 1;
                if left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
        })
        .await?;
        if count.get() == before {
            return Ok(count.get());
        }
    }
}
