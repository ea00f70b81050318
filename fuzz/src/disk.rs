//! Devices that targets work on: prepared once, then copied for each execution.

use std::rc::Rc;
use std::time::Duration;

use bdev::memory::Memory;
use bdev::{AlignedBuf, Bdev, IoBuffers, WriteFlags};
use blobfs::Fs;
use blobfs::check::{Report, check};
use blobfs::fs::MountOptions;
use blobfs::store::{MkfsOptions, OpenError, OpenOptions, Store, mkfs};
use reactor::{Reactor, VirtualClock};

/// Smallest block of the devices, in bytes.
const SECTOR: u32 = 512;

/// Memory for file data: several times what an input can write at once, so that some of it is evicted.
const CACHE: usize = 1 << 20;

/// Sizes of a small file system, so that nodes split, the journal wraps and space runs out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) device: u64,
    pub(crate) block: u32,
    pub(crate) node: u32,
    /// Blocks of data have checksums.
    pub(crate) sums: bool,
}

impl Geometry {
    pub(crate) const TINY: Self = Self { device: 1 << 20, block: 512, node: 1024, sums: false };
    pub(crate) const TINY_SUMS: Self = Self { sums: true, ..Self::TINY };
    pub(crate) const PAGE: Self = Self { device: 2 << 20, block: 4096, node: 4096, sums: false };

    /// A device with a new file system.
    pub(crate) fn format(&self, reactor: &Rc<Reactor>) -> Rc<dyn Bdev> {
        let device: Rc<dyn Bdev> = Memory::new(self.device, SECTOR);
        let options = MkfsOptions {
            // Not random: an input does the same every time.
            uuid: [7; 16],
            hash_key: [1, 2],
            block_size: self.block,
            node_size: self.node,
            group_blocks: 256,
            journal_size: 64 << 10,
            data_checksum: self.sums,
            ..MkfsOptions::default()
        };
        let formatted = device.clone();
        reactor.block_on(async move { mkfs(&formatted, &options).await }).expect("room for a file system");
        device
    }
}

/// A reactor whose time passes when nothing else is to do.
pub(crate) fn new_reactor() -> Rc<Reactor> {
    Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(1_000_000))))
}

/// Lets work in the background end, timers too: tasks that wait keep the file system, which keeps the reactor.
pub(crate) fn wind_down(reactor: &Rc<Reactor>) {
    reactor.block_on(reactor.sleep(Duration::from_secs(60)));
    while reactor.turn() {}
}

/// A device that holds these bytes.
pub(crate) fn device_of(bytes: &[u8]) -> Rc<dyn Bdev> {
    let device = Memory::new(bytes.len() as u64, SECTOR);
    // Most of it is zeros, which need no memory. (Compared as a whole: a look at each byte would be recorded.)
    const ZEROS: [u8; 4096] = [0; 4096];
    for (number, page) in bytes.chunks(ZEROS.len()).enumerate().filter(|(_, page)| *page != ZEROS) {
        let written = device.write(number as u64 * 4096, private(page), WriteFlags::NONE).try_result();
        assert_eq!(written, Some(Ok(())), "memory takes what fits");
    }
    device
}

/// What a device holds.
pub(crate) fn bytes_of(device: &Rc<dyn Bdev>) -> Vec<u8> {
    let mut bytes = vec![0; device.limits().size as usize];
    let buffers = private(&bytes);
    assert_eq!(device.read(0, buffers.clone()).try_result(), Some(Ok(())), "memory has all of its bytes");
    buffers.copy_to(0, &mut bytes);
    bytes
}

/// Memory with these bytes.
pub(crate) fn private(bytes: &[u8]) -> IoBuffers {
    let buffers = IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(bytes.len(), 8)));
    buffers.copy_from(0, bytes);
    buffers
}

/// Mounts what a device holds.
pub(crate) async fn mount(
    device: &Rc<dyn Bdev>,
    reactor: &Rc<Reactor>,
    readonly: bool,
) -> Result<Rc<Fs>, OpenError> {
    let options = OpenOptions { readonly, dirty_bytes_max: 96 << 10, ..OpenOptions::default() };
    let store = Store::open(device.clone(), reactor.clone(), options).await?;
    let options = MountOptions {
        readonly,
        cache_size: CACHE,
        cache_pages_min: CACHE / 4096,
        metadata_cache_size: 256 << 10,
    };
    Ok(Fs::mount(store, options).await?)
}

/// Checks what a device holds.
pub(crate) fn fsck(device: &Rc<dyn Bdev>, reactor: &Rc<Reactor>) -> Result<Report, OpenError> {
    let device = device.clone();
    reactor.block_on(async move { check(&device).await })
}
