//! Every device and wrapper against the conformance suite, and what is special about files.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use bdev::conformance::{Keeps, run};
use bdev::fault::FaultDevice;
use bdev::memory::Memory;
use bdev::null::Null;
use bdev::open::ByteSize;
use bdev::sim::{Effect, Fault, OpKind, SimDisk};
use bdev::{AlignedBuf, Bdev, BdevError, ImageSpec, IoBuffers, OpenError, OpenOptions, WriteFlags, open};
use reactor::{Reactor, SystemClock, VirtualClock};
use rustix::fs::FlockOperation;

const SIZE: u64 = 4 << 20;

fn reactor() -> Rc<Reactor> {
    Reactor::new(Rc::new(SystemClock::new()))
}

fn open_path(path: &Path, options: &OpenOptions, reactor: &Reactor) -> Result<Rc<dyn Bdev>, OpenError> {
    open(&ImageSpec::Path(path.into()), options, reactor)
}

fn creating(size: u64) -> OpenOptions {
    OpenOptions { create: Some(size), ..OpenOptions::default() }
}

fn block(fill: u8) -> IoBuffers {
    let mut buf = AlignedBuf::zeroed(4096, 4096);
    buf.fill(fill);
    IoBuffers::from_aligned(&Rc::new(buf))
}

#[test]
fn memory() {
    for block_size in [512, 4096] {
        run(&(Memory::new(SIZE, block_size) as Rc<dyn Bdev>), &reactor(), Keeps::Data);
    }
}

#[test]
fn null() {
    run(&(Null::new(SIZE, 4096) as Rc<dyn Bdev>), &reactor(), Keeps::Nothing);
}

#[test]
fn simulated_disk() {
    for block_size in [512, 4096] {
        run(&(SimDisk::new(SIZE, block_size, 1) as Rc<dyn Bdev>), &reactor(), Keeps::Data);
    }
}

#[test]
fn simulated_disk_with_latency() {
    let reactor = Reactor::new(Rc::new(VirtualClock::new(Duration::ZERO)));
    let disk = SimDisk::new(SIZE, 512, 2);
    disk.set_latency(&reactor, Duration::from_micros(5)..Duration::from_millis(3));
    run(&(disk as Rc<dyn Bdev>), &reactor, Keeps::Data);
}

#[test]
fn fault_wrapper_without_faults() {
    let device = FaultDevice::new(Memory::new(SIZE, 512));
    run(&(device as Rc<dyn Bdev>), &reactor(), Keeps::Data);
}

#[test]
fn fault_wrapper_with_faults() {
    let (device, reactor) = (FaultDevice::new(Memory::new(SIZE, 4096)), reactor());
    device.inject(Fault::nth(OpKind::Write, 1, Effect::Lost));
    reactor.block_on(device.write(0, block(1), WriteFlags::NONE)).unwrap();
    reactor.block_on(device.write(0, block(2), WriteFlags::NONE)).unwrap();
    let read = block(0);
    reactor.block_on(device.read(0, read.clone())).unwrap();
    let mut first = [0];
    read.copy_to(0, &mut first);
    assert_eq!(first, [1]);
    device.fail_reads(0..4096);
    assert!(matches!(reactor.block_on(device.read(0, block(0))), Err(BdevError::Io { .. })));
}

#[test]
fn file_with_direct_io() {
    // Not /tmp, which may be in memory: the build's own folder is on a disk.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let reactor = reactor();
    let device = open_path(&dir.path().join("disk.img"), &creating(SIZE), &reactor).unwrap();
    run(&device, &reactor, Keeps::Data);
}

#[test]
fn file_in_memory() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let reactor = reactor();
    let device = open_path(&dir.path().join("disk.img"), &creating(SIZE), &reactor).unwrap();
    run(&device, &reactor, Keeps::Data);
}

/// A loop device over a sparse file, detached when dropped.
struct Loop {
    path: String,
    _dir: tempfile::TempDir,
}

impl Loop {
    fn attach(sector: u32) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let file = dir.path().join("backing");
        std::fs::File::create(&file).unwrap().set_len(SIZE).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show", "--direct-io=off", "--sector-size", &sector.to_string()])
            .arg(&file)
            .output()
            .expect("losetup is installed");
        assert!(output.status.success(), "losetup: {}", String::from_utf8_lossy(&output.stderr));
        Self { path: String::from_utf8(output.stdout).unwrap().trim().to_owned(), _dir: dir }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").args(["--detach", &self.path]).status();
        assert!(detached.is_ok_and(|status| status.success()), "{} stays attached", self.path);
    }
}

#[test]
#[ignore = "loop devices need root; `cargo xtask test` runs this through sudo"]
fn block_device() {
    assert!(rustix::process::geteuid().is_root(), "loop devices need root");
    for sector in [512, 4096] {
        let disk = Loop::attach(sector);
        let reactor = reactor();
        let device = open_path(Path::new(&disk.path), &OpenOptions::default(), &reactor).unwrap();
        assert_eq!((device.limits().size, device.limits().block_size), (SIZE, sector));
        assert!(device.limits().dma_align >= sector, "direct I/O is in use");
        run(&device, &reactor, Keeps::Data);
        let again = open_path(Path::new(&disk.path), &OpenOptions::default(), &reactor);
        assert!(matches!(again, Err(OpenError::InUse { .. })));
    }
}

#[test]
fn a_file_in_use_is_refused_and_free_again_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let reactor = reactor();
    let reading = OpenOptions { read_only: true, ..OpenOptions::default() };
    let refused = |options: &OpenOptions| {
        let error = open_path(&path, options, &reactor).map(drop).unwrap_err();
        assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    };

    let writer = open_path(&path, &creating(SIZE), &reactor).unwrap();
    refused(&OpenOptions::default());
    refused(&reading);
    drop(writer);

    let reader = open_path(&path, &reading, &reactor).unwrap();
    let second = open_path(&path, &reading, &reactor).unwrap();
    refused(&OpenOptions::default());
    let written = reactor.block_on(reader.write(0, block(1), WriteFlags::NONE));
    assert!(matches!(written, Err(BdevError::Io { .. })));
    drop((reader, second));
    open_path(&path, &OpenOptions::default(), &reactor).unwrap();
}

#[test]
fn the_end_of_another_user_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let reactor = reactor();
    drop(open_path(&path, &creating(SIZE), &reactor).unwrap());
    let other = std::fs::File::open(&path).unwrap();
    rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
    let ending = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        drop(other);
    });
    open_path(&path, &OpenOptions::default(), &reactor).unwrap();
    ending.join().unwrap();
}

#[test]
fn the_lock_ends_with_the_device_though_the_file_stays_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let reactor = reactor();
    let device = open_path(&path, &creating(SIZE), &reactor).unwrap();
    let own = own_descriptor(&path);
    drop(device);
    assert_eq!(std::fs::read_link(format!("/proc/self/fd/{}", own.as_raw_fd())).unwrap(), path);
    let other = std::fs::File::open(&path).unwrap();
    rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive).unwrap();
}

/// A duplicate of this process's descriptor of the file at `path`, as one in the kernel's hands would be.
#[expect(unsafe_code, reason = "the number of a descriptor comes from /proc")]
fn own_descriptor(path: &Path) -> OwnedFd {
    let opened = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let found =
        opened.into_iter().find(|fd| std::fs::read_link(fd).is_ok_and(|target| target == path)).unwrap();
    let number: RawFd = found.file_name().unwrap().to_str().unwrap().parse().unwrap();
    // SAFETY: the device that owns the descriptor is open during this call.
    rustix::io::dup(unsafe { BorrowedFd::borrow_raw(number) }).unwrap()
}

#[test]
fn what_is_no_device_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let reactor = reactor();
    let open = |name: &str, options: &OpenOptions| {
        open_path(&dir.path().join(name), options, &reactor).map(drop).unwrap_err()
    };
    assert!(matches!(open("missing", &OpenOptions::default()), OpenError::NotFound { .. }));
    let reading = OpenOptions { read_only: true, create: Some(SIZE) };
    assert!(matches!(open("missing", &reading), OpenError::NotFound { .. }));
    assert!(!dir.path().join("missing").exists());
    assert!(matches!(open("", &OpenOptions::default()), OpenError::NotADevice { .. }));
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(open("fifo", &OpenOptions::default()), OpenError::NotADevice { .. }));
    std::fs::write(dir.path().join("empty"), b"").unwrap();
    assert!(matches!(open("empty", &OpenOptions::default()), OpenError::Empty { .. }));
}

#[test]
fn a_created_file_is_sparse() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let size = "1T".parse::<ByteSize>().unwrap().0;
    let device = open_path(&path, &creating(size), &reactor()).unwrap();
    assert_eq!(device.limits().size, size);
    assert!(rustix::fs::stat(&path).unwrap().st_blocks < 2048);
}
