//! How long a mount takes that finds a long journal.
//!
//! ```text
//! cargo run --release -p blobfs --example recovery -- IMAGE [JOURNAL IN MIB]
//! ```
//!
//! Makes a file system on `IMAGE`, a file that must not be there, and fills so much of its journal: the first time by
//! synced writes of 4 KiB, each of which is a block of the journal, the second time by changes of attributes, of which
//! there are many in a block. The process that does this ends without unmounting; then a mount is measured.

use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Instant;

use bdev::{AlignedBuf, Bdev, ImageSpec, IoBuffers};
use blobfs::fs::{Context, CreateSpec, IoFlags, MountOptions, NewNode, SetAttr};
use blobfs::store::{MkfsOptions, OpenOptions, Store, choose_superblock, mkfs, read_superblocks};
use blobfs::units::InodeId;
use blobfs::{Fs, FsError};
use reactor::{Reactor, SystemClock};

const FILE: CreateSpec<'static> = CreateSpec { node: NewNode::File, mode: 0o644, umask: 0, security: &[] };

/// Bytes of a synced write, and those that it takes in the journal with its records.
const WRITE_LEN: u64 = 4096;
const SYNCED_LEN: u64 = 2 * WRITE_LEN;

/// Bytes of the journal that a change of attributes takes: the inode and what is around it.
const CHANGE_LEN: u64 = 200;

/// Files whose attributes are changed.
const FILES: usize = 1000;

/// What fills the journal.
const KINDS: [&str; 2] = ["writes", "attributes"];

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let image = args.first().ok_or("name a path for the image")?;
    let journal_mib = args.get(1).map_or(Ok(256), |text| text.parse())?;
    if let Some(kind) = args.get(2) {
        fill(Path::new(image), journal_mib << 20, kind)?;
        // Nothing is unmounted.
        std::process::exit(0);
    }
    for kind in KINDS {
        let size = journal_mib.to_string();
        let status = Command::new(std::env::current_exe()?).args([image, &size, kind]).status()?;
        if !status.success() {
            return Err(format!("filling the journal ended with {status}").into());
        }
        recover(Path::new(image), kind)?;
        std::fs::remove_file(image)?;
    }
    Ok(())
}

fn open(path: &Path, create: Option<u64>, reactor: &Reactor) -> Result<Rc<dyn Bdev>, bdev::OpenError> {
    let options = bdev::OpenOptions { create, ..bdev::OpenOptions::default() };
    bdev::open(&ImageSpec::Path(path.into()), &options, reactor)
}

async fn mount(device: Rc<dyn Bdev>, reactor: Rc<Reactor>) -> Result<Rc<Fs>, Box<dyn Error>> {
    let store = Store::open(device, reactor, OpenOptions::default()).await?;
    Ok(Fs::mount(store, MountOptions::default()).await?)
}

/// Fills `journal` bytes of the journal, which is a little more than twice as long: a checkpoint begins at half.
fn fill(path: &Path, journal: u64, kind: &str) -> Result<(), Box<dyn Error>> {
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let device = open(path, Some(4 * journal + (64 << 20)), &reactor)?;
    let (inner, is_data) = (reactor.clone(), kind == KINDS[0]);
    reactor.block_on(async move {
        let options = MkfsOptions { journal_size: 2 * journal + (16 << 20), ..MkfsOptions::default() };
        mkfs(&device, &options).await?;
        let fs = mount(device.clone(), inner.clone()).await?;
        let count = if is_data { journal / SYNCED_LEN } else { journal / CHANGE_LEN };
        let files = make_files(&fs, if is_data { 1 } else { FILES }).await?;
        if is_data {
            write_all(&fs, files[0], count * WRITE_LEN, 1 << 20, IoFlags::default()).await?;
        }
        fs.unmount().await?;
        drop(fs);
        let fs = mount(device, inner).await?;
        if is_data {
            let synced = IoFlags { dsync: true, ..IoFlags::default() };
            write_all(&fs, files[0], count * WRITE_LEN, WRITE_LEN, synced).await?;
        } else {
            change_all(&fs, &files, count).await?;
        }
        Ok(())
    })
}

fn context(fs: &Rc<Fs>) -> Context {
    Context { session: fs.open_session(), request: 0, uid: 0, gid: 0, pid: 0, supplementary_gid: None }
}

async fn make_files(fs: &Rc<Fs>, count: usize) -> Result<Vec<InodeId>, FsError> {
    let ctx = context(fs);
    let mut files = Vec::new();
    for number in 0..count {
        let name = format!("file {number}");
        let made = fs.run(|fs| fs.create(&ctx, InodeId::ROOT, name.as_bytes(), &FILE)).await?;
        files.push(made.attr.inode);
    }
    fs.close_session(ctx.session);
    Ok(files)
}

/// Writes a file from its start to `len`.
async fn write_all(fs: &Rc<Fs>, file: InodeId, len: u64, step: u64, flags: IoFlags) -> Result<(), FsError> {
    let ctx = context(fs);
    let mut bytes = AlignedBuf::zeroed(step as usize, 4096);
    bytes.fill(0x5a);
    let bytes = IoBuffers::from_aligned(&Rc::new(bytes));
    for offset in (0..len).step_by(step as usize) {
        fs.write(ctx, file, offset, bytes.clone(), flags).await?;
    }
    fs.sync_all().await
}

/// Changes the modes of files in turn.
async fn change_all(fs: &Rc<Fs>, files: &[InodeId], count: u64) -> Result<(), FsError> {
    let ctx = context(fs);
    for (number, file) in (0..count).zip(files.iter().cycle()) {
        let mode = if (number / files.len() as u64).is_multiple_of(2) { 0o600 } else { 0o644 };
        let change = SetAttr { mode: Some(mode), ..SetAttr::default() };
        fs.run(|fs| fs.set_attr(&ctx, *file, &change)).await?;
    }
    fs.sync_all().await
}

fn recover(path: &Path, kind: &str) -> Result<(), Box<dyn Error>> {
    let reactor = Reactor::new(Rc::new(SystemClock::new()));
    let device = open(path, None, &reactor)?;
    let (inner, looked_at) = (reactor.clone(), device.clone());
    let copies = reactor.block_on(async move { read_superblocks(&looked_at).await })?;
    let before = choose_superblock(copies, false)?.last_txn;
    let start = Instant::now();
    let store = reactor.block_on(async move { Store::open(device, inner, OpenOptions::default()).await })?;
    let (took, count) = (start.elapsed(), store.last_seq().0 - before);
    println!("{kind}: recovery of {count} transactions in {:.2} s", took.as_secs_f64());
    Ok(reactor.block_on(async move { store.close().await })?)
}
