//! What a check, a repair and a scrub of many files cost: an image with that many is made, then each is timed, with
//! the memory that it takes at most.
//!
//! ```text
//! cargo run --release -p blobfs --example check -- IMAGE [FILES] [FILES OF A DIRECTORY]
//! ```
//!
//! Every second file holds 100 bytes inside the tree, the others an extent.

use std::fs;
use std::rc::Rc;
use std::time::Instant;

use bdev::open::{ImageSpec, OpenOptions, open};
use bdev::{AlignedBuf, Bdev, IoBuffers};
use blobfs::Fs;
use blobfs::check::{Consent, RepairOptions, check, repair, scrub};
use blobfs::fs::{Context, CreateSpec, FallocateMode, IoFlags, MountOptions, NewNode};
use blobfs::ondisk::Timestamp;
use blobfs::ondisk::superblock::{SUPERBLOCK_LEN, SUPERBLOCK_OFFSETS};
use blobfs::store::{self, MkfsOptions, Store, mkfs};
use blobfs::units::InodeId;
use reactor::{Reactor, SystemClock};

type Failure = Box<dyn std::error::Error>;

const FILE: CreateSpec<'static> = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };
const DIRECTORY: CreateSpec<'static> = CreateSpec { node: NewNode::Directory, ..FILE };

/// Bytes of a file that is kept inside the tree.
const SMALL: usize = 100;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let image = args.next().ok_or("name an image that may be overwritten")?;
    let files = args.next().map_or(Ok(1_000_000), |text| text.parse())?;
    let per_directory = args.next().map_or(Ok(1000), |text| text.parse())?;
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let options = OpenOptions { read_only: false, create: Some(16 << 30) };
    // What is there is overwritten; there may be nothing.
    let _ = fs::remove_file(&image);
    let device = open(&ImageSpec::Path(image.into()), &options, &reactor)?;
    let (inner, at) = (device.clone(), reactor.clone());
    reactor.block_on(async move { make(inner, at, files, per_directory).await })?;

    let inner = device.clone();
    let report = measure("check", || reactor.block_on(async move { check(&inner).await }))?;
    println!("{:#?}", report.counts);
    assert!(report.is_clean(), "{:?}", report.findings);
    let inner = device.clone();
    let report = measure("scrub", || reactor.block_on(async move { scrub(&inner, &mut |_| ()).await }))?;
    assert!(report.is_clean());
    damage(&reactor, &device)?;
    let inner = device.clone();
    let options = RepairOptions { consent: Consent::Everything, now: Timestamp::default() };
    let report = measure("repair of a superblock and the root", || {
        reactor.block_on(async move { repair(&inner, options, &mut |_| ()).await })
    })?;
    assert!(report.changed && report.after.is_clean(), "{report:?}");
    Ok(())
}

/// Runs something and tells how long it took and the memory at its height.
fn measure<T>(what: &str, run: impl FnOnce() -> T) -> T {
    // The kernel counts the height anew; without the right to ask for that it counts from the start.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let start = Instant::now();
    let result = run();
    let took = start.elapsed();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("").trim();
    println!("{what}: {took:.2?}, {peak} at most");
    result
}

async fn make(
    device: Rc<dyn Bdev>,
    reactor: Rc<Reactor>,
    files: u64,
    per_directory: u64,
) -> Result<(), Failure> {
    mkfs(&device, &MkfsOptions::default()).await?;
    let store = Store::open(device, reactor, store::OpenOptions::default()).await?;
    let fs = Fs::mount(store, MountOptions::default()).await?;
    let session = fs.open_session();
    let ctx = Context { session, request: 0, uid: 0, gid: 0, pid: 0, supplementary_gid: None };
    let start = Instant::now();
    let mut directory = InodeId::ROOT;
    for number in 0..files {
        if number % per_directory == 0 {
            let name = format!("directory {number}");
            let made = fs.run(|fs| fs.create(&ctx, InodeId::ROOT, name.as_bytes(), &DIRECTORY)).await?;
            directory = made.attr.inode;
        }
        let name = format!("file {number}");
        let file = fs.run(|fs| fs.create(&ctx, directory, name.as_bytes(), &FILE)).await?.attr.inode;
        if number % 2 == 0 {
            let src = IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(SMALL, 4096)));
            fs.write(ctx, file, 0, src, IoFlags::default()).await?;
        } else {
            fs.fallocate(ctx, file, FallocateMode::Allocate { keep_size: false }, 0, 4096).await?;
        }
        fs.forget(ctx.session, file, 1);
    }
    fs.close_session(ctx.session);
    fs.unmount().await?;
    println!("{files} files made in {:.2?}", start.elapsed());
    Ok(())
}

/// Damages the older superblock and the root of the tree.
fn damage(reactor: &Rc<Reactor>, device: &Rc<dyn Bdev>) -> Result<(), Failure> {
    let device = device.clone();
    reactor.block_on(async move {
        let copies = store::read_superblocks(&device).await?;
        let newest = copies.into_iter().flatten().max_by_key(|copy| copy.generation);
        let newest = newest.ok_or("no superblock")?;
        let older = SUPERBLOCK_OFFSETS[((newest.generation + 1) % 2) as usize];
        let root = newest.root.addr * u64::from(newest.block_size);
        for (offset, len) in [(older, SUPERBLOCK_LEN), (root, newest.node_size as usize)] {
            let bytes = IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(len, 4096)));
            device.write(offset, bytes, bdev::WriteFlags::NONE).await?;
        }
        Ok(())
    })
}
