//! Regular files and block devices, by io_uring and without the host's page cache.
//!
//! | operation | how |
//! | --- | --- |
//! | read, write | READV, WRITEV with O_DIRECT; FUA see below |
//! | flush | FSYNC (data and what is needed to find it, such as new extents of a sparse file) |
//! | discard | FALLOCATE, punching a hole; nothing where that is not supported |
//! | write zeroes | FALLOCATE, zeroing or punching a range; else by writing zeros |
//!
//! `fallocate` works on block devices as it does on files (Linux 4.9), so one code path serves both.
//!
//! **FUA** is RWF_DSYNC where that is one command to the disk: on block devices, whose layer makes a flush of it when it
//! has to, and for files on a disk that knows FUA or has no volatile cache. For other files the kernel flushes in a
//! queue of its own behind such a write. Its thread has an ordinary priority whatever ours is, so that on a busy machine
//! a write waits for a time slice of somebody else (3 ms were measured, where the disk needs 0.1). An FSYNC behind the
//! write is made by a thread of ours, costs the same otherwise, and is what is done for such files.
//!
//! Where a file system refuses O_DIRECT, the page cache is used, with a warning in the log.
//!
//! Invariants:
//! - an operation's buffers and vectors live, at a fixed address, until the kernel has finished with them;
//! - an [`Io`] ends only after the whole transfer: short transfers go on where they stopped.

#![expect(unsafe_code, reason = "vectors for the kernel hold raw addresses")]

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

use io_uring::opcode;
use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags};
use reactor::uring::{Carrier, Client, Uring};
use rustix::fs::{AtFlags, FileType, FlockOperation, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;

use crate::open::{OpenError, OpenOptions};
use crate::{AlignedBuf, Bdev, BdevError, Completion, Io, IoBuffers, Limits, WriteFlags};

/// Segments per call: the kernel's limit (UIO_MAXIOV).
const SEGMENTS_MAX: usize = 1024;

/// Bytes per call. The kernel's limit is 2 GiB less a page; this is a round number below.
const TRANSFER_MAX: usize = 1 << 30;

/// Unit of writing zeros where the device has no better way. Picked: large enough to be fast on a disk.
const ZEROS: usize = 1 << 20;

/// Block size in the page cache, which takes any.
const BUFFERED_BLOCK: u32 = 512;

/// Direct alignment to assume where the kernel does not tell (before Linux 6.1): no device asks for more.
const DIRECT_ALIGN: u32 = 4096;

/// Largest block size of the contract in [`Limits`].
const BLOCK_MAX: u32 = 65536;

/// How long to wait for whoever has the image. The kernel takes a ring apart, and closes the files that it
/// was used on, some time after its process has ended: the image of a killed program is in use until then.
/// Picked: far above what that takes, and a delay that a person hardly notices.
const LOCK_PATIENCE: Duration = Duration::from_secs(1);

/// Time between two attempts. Picked: a ring is gone after a few.
const LOCK_RETRY: Duration = Duration::from_millis(10);

/// A file or block device.
pub struct UringDevice {
    file: File,
    limits: Limits,
    read_only: bool,
    is_block_device: bool,
    /// FUA is RWF_DSYNC.
    dsync: bool,
    uring: Rc<Uring>,
    ops: RefCell<Ops>,
    zero_method: Cell<ZeroMethod>,
    zeros: RefCell<Option<Rc<AlignedBuf>>>,
    this: Weak<Self>,
}

/// How a range is zeroed, from the best way to the last resort.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ZeroMethod {
    ZeroRange,
    PunchHole,
    Write,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Read,
    Write { fua: bool },
    Flush,
    Discard,
    Zero { method: ZeroMethod, fua: bool },
}

/// An operation under way. Its vectors are on the heap, so they keep their place when it moves.
struct Op {
    action: Action,
    offset: u64,
    len: u64,
    done: u64,
    buffers: IoBuffers,
    vectors: Vec<libc::iovec>,
    completion: Option<Completion>,
}

/// Operations by token; each place, with the room of its vectors, is used again.
#[derive(Default)]
struct Ops {
    all: Vec<Op>,
    free: Vec<u32>,
}

/// What follows a completion.
enum Next {
    Again,
    Ended(Result<(), BdevError>),
}

impl UringDevice {
    /// Opens or creates the file or block device at `path` and locks it, shared for reading alone. Blocks for
    /// up to a second while somebody else has it.
    ///
    /// # Errors
    /// See [`OpenError`]; [`OpenError::InUse`] if somebody else has it.
    pub fn open(path: &Path, options: &OpenOptions, uring: Rc<Uring>) -> Result<Rc<Self>, OpenError> {
        let image = path.display().to_string();
        let fail = |errno| OpenError::from_errno(&image, errno);
        let Opened { file, kind, is_new } = open_locked(path, &image, options)?;
        let limits = match probe(&file, kind, &image) {
            Ok(limits) if limits.size > 0 => limits,
            unusable => {
                if is_new {
                    // Nobody else has used a file that did not exist a moment ago.
                    let _ = rustix::fs::unlink(path);
                }
                return Err(unusable.map_or_else(fail, |_| OpenError::Empty { image: image.clone() }));
            }
        };
        let is_block_device = kind == FileType::BlockDevice;
        let dsync = is_block_device || lies_on_durable_disk(&file);
        Ok(Rc::new_cyclic(|this| Self {
            file,
            limits,
            is_block_device,
            dsync,
            read_only: options.read_only,
            uring,
            ops: RefCell::default(),
            zero_method: Cell::new(ZeroMethod::ZeroRange),
            zeros: RefCell::default(),
            this: this.clone(),
        }))
    }

    fn start(&self, action: Action, offset: u64, len: u64, buffers: IoBuffers) -> Io {
        let changes = !matches!(action, Action::Read | Action::Flush);
        if changes && self.read_only {
            return Io::ready(Err(BdevError::Io { offset, errno: libc::EROFS }));
        }
        if len == 0 && action != Action::Flush {
            return Io::ready(Ok(()));
        }
        let (io, completion) = Io::pending();
        let token = self.ops.borrow_mut().take(action, offset, len, buffers, completion);
        self.queue(token);
        io
    }

    fn queue(&self, token: u32) {
        let Some(this) = self.this.upgrade() else { return };
        let mut ops = self.ops.borrow_mut();
        let op = &mut ops.all[token as usize];
        let carrier = self.carrier(op.action);
        let entry = self.entry(op);
        // SAFETY: the entry names the heap memory of an operation's vectors, which stays as it is until its
        // completion arrives in `complete`, and memory that the operation's `buffers` hold (or the device's
        // page of zeros, which is never written). The client given here, this device, owns both.
        unsafe { self.uring.queue(entry, this, token, carrier) };
    }

    /// Who carries out the next system call of an operation. A file system ends a direct write in a thread, since it may
    /// have to change what it knows of the file.
    fn carrier(&self, action: Action) -> Carrier {
        match action {
            Action::Read => Carrier::Device,
            Action::Write { .. } | Action::Zero { method: ZeroMethod::Write, .. } if self.is_block_device => {
                Carrier::Device
            }
            Action::Write { .. } | Action::Flush | Action::Discard | Action::Zero { .. } => Carrier::Thread,
        }
    }

    /// The next system call of an operation.
    fn entry(&self, op: &mut Op) -> Entry {
        let fd = Fd(self.file.as_raw_fd());
        let (offset, left) = (op.offset + op.done, op.len - op.done);
        let fallocate = |mode| opcode::Fallocate::new(fd, left).offset(offset).mode(mode).build();
        match op.action {
            Action::Read => {
                op.fill_vectors();
                opcode::Readv::new(fd, op.vectors.as_ptr(), op.vectors.len() as u32).offset(offset).build()
            }
            Action::Write { fua } => {
                op.fill_vectors();
                write_entry(fd, op, offset, fua && self.dsync)
            }
            Action::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            Action::Discard => fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE),
            Action::Zero { method: ZeroMethod::ZeroRange, .. } => {
                fallocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE)
            }
            Action::Zero { method: ZeroMethod::PunchHole, .. } => {
                fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            }
            Action::Zero { method: ZeroMethod::Write, fua } => {
                op.buffers = self.zeros().slice(0, left.min(ZEROS as u64) as usize);
                op.vectors.clear();
                op.vectors.extend(op.buffers.segments().iter().map(vector));
                write_entry(fd, op, offset, fua && self.dsync)
            }
        }
    }

    /// Zeros to write, made when first needed.
    fn zeros(&self) -> IoBuffers {
        let mut zeros = self.zeros.borrow_mut();
        let zeros = zeros.get_or_insert_with(|| Rc::new(AlignedBuf::zeroed(ZEROS, BLOCK_MAX as usize)));
        IoBuffers::from_aligned(zeros)
    }

    /// Takes in the result of one system call.
    fn advance(&self, op: &mut Op, result: i32) -> Next {
        if matches!(-result, libc::EINTR | libc::EAGAIN) {
            return Next::Again;
        }
        if result < 0 {
            return self.failed(op, -result);
        }
        match op.action {
            Action::Read | Action::Write { .. } | Action::Zero { method: ZeroMethod::Write, .. } => {
                op.done += result as u64;
                match result {
                    _ if op.done >= op.len => self.written(op),
                    0 => Next::Ended(Err(op.short())),
                    _ => Next::Again,
                }
            }
            Action::Zero { fua: true, .. } => {
                op.action = Action::Flush;
                Next::Again
            }
            Action::Flush | Action::Discard | Action::Zero { .. } => Next::Ended(Ok(())),
        }
    }

    /// What follows when all of a transfer is done.
    fn written(&self, op: &mut Op) -> Next {
        match op.action {
            Action::Write { fua: true } | Action::Zero { fua: true, .. } if !self.dsync => {
                op.action = Action::Flush;
                Next::Again
            }
            _ => Next::Ended(Ok(())),
        }
    }

    fn failed(&self, op: &mut Op, errno: i32) -> Next {
        let unsupported = matches!(errno, libc::EOPNOTSUPP | libc::ENOTTY | libc::ENOSYS);
        match op.action {
            // Content may be anything after a discard, so also what it was.
            Action::Discard if unsupported => Next::Ended(Ok(())),
            Action::Zero { method, fua } if unsupported && method != ZeroMethod::Write => {
                let method = match method {
                    ZeroMethod::ZeroRange => ZeroMethod::PunchHole,
                    ZeroMethod::PunchHole | ZeroMethod::Write => ZeroMethod::Write,
                };
                self.zero_method.set(method);
                op.action = Action::Zero { method, fua };
                Next::Again
            }
            _ => Next::Ended(Err(BdevError::Io { offset: op.offset + op.done, errno })),
        }
    }

    fn start_range(&self, range: &Range<u64>, action: Action) -> Io {
        match self.limits.check_range(range) {
            Ok(()) => self.start(action, range.start, range.end - range.start, IoBuffers::empty()),
            Err(error) => Io::ready(Err(error)),
        }
    }

    fn start_transfer(&self, offset: u64, buffers: IoBuffers, action: Action) -> Io {
        match self.limits.check_transfer(offset, &buffers) {
            Ok(()) => self.start(action, offset, buffers.len() as u64, buffers),
            Err(error) => Io::ready(Err(error)),
        }
    }
}

fn write_entry(fd: Fd, op: &Op, offset: u64, dsync: bool) -> Entry {
    let flags = if dsync { libc::RWF_DSYNC } else { 0 };
    let write = opcode::Writev::new(fd, op.vectors.as_ptr(), op.vectors.len() as u32);
    write.offset(offset).rw_flags(flags).build()
}

fn vector(segment: &crate::Segment) -> libc::iovec {
    libc::iovec { iov_base: segment.as_ptr().cast(), iov_len: segment.len() }
}

impl Op {
    /// Points the vectors at what is left of the transfer.
    fn fill_vectors(&mut self) {
        self.vectors.clear();
        let mut skip = self.done as usize;
        for segment in self.buffers.segments() {
            let part = segment.slice(skip, usize::MAX);
            skip = skip.saturating_sub(segment.len());
            if !part.is_empty() {
                self.vectors.push(vector(&part));
            }
        }
    }

    fn short(&self) -> BdevError {
        BdevError::Short { offset: self.offset, done: self.done as usize, len: self.len as usize }
    }
}

impl Ops {
    fn take(
        &mut self,
        action: Action,
        offset: u64,
        len: u64,
        buffers: IoBuffers,
        completion: Completion,
    ) -> u32 {
        let Some(token) = self.free.pop() else {
            let completion = Some(completion);
            let vectors = Vec::new();
            self.all.push(Op { action, offset, len, done: 0, buffers, vectors, completion });
            return (self.all.len() - 1) as u32;
        };
        let op = &mut self.all[token as usize];
        (op.action, op.offset, op.len, op.done) = (action, offset, len, 0);
        op.buffers = buffers;
        op.completion = Some(completion);
        token
    }
}

impl Client for UringDevice {
    fn complete(&self, token: u32, result: i32) {
        let next = self.advance(&mut self.ops.borrow_mut().all[token as usize], result);
        let Next::Ended(result) = next else { return self.queue(token) };
        let (buffers, completion) = {
            let mut ops = self.ops.borrow_mut();
            ops.free.push(token);
            let op = &mut ops.all[token as usize];
            (std::mem::replace(&mut op.buffers, IoBuffers::empty()), op.completion.take())
        };
        // Their owners may do anything when they go or wake up: nothing is borrowed here.
        drop(buffers);
        if let Some(completion) = completion {
            completion.complete(result);
        }
    }
}

impl Bdev for UringDevice {
    fn limits(&self) -> &Limits {
        &self.limits
    }

    fn read(&self, offset: u64, buffers: IoBuffers) -> Io {
        self.start_transfer(offset, buffers, Action::Read)
    }

    fn write(&self, offset: u64, buffers: IoBuffers, flags: WriteFlags) -> Io {
        self.start_transfer(offset, buffers, Action::Write { fua: flags.fua })
    }

    fn flush(&self) -> Io {
        self.start(Action::Flush, 0, 0, IoBuffers::empty())
    }

    fn discard(&self, range: Range<u64>) -> Io {
        self.start_range(&range, Action::Discard)
    }

    fn write_zeroes(&self, range: Range<u64>, flags: WriteFlags) -> Io {
        self.start_range(&range, Action::Zero { method: self.zero_method.get(), fua: flags.fua })
    }
}

impl Drop for UringDevice {
    /// Gives the lock back at once: operations, of which none is under way, may keep the file open for a
    /// while.
    fn drop(&mut self) {
        let unlocked = rustix::fs::flock(&self.file, FlockOperation::Unlock);
        debug_assert!(unlocked.is_ok());
    }
}

/// A file or device that is open and locked.
struct Opened {
    file: File,
    kind: FileType,
    /// Created by this very call.
    is_new: bool,
}

/// Opens, creates and locks. What is in use is refused before anything is changed.
fn open_locked(path: &Path, image: &str, options: &OpenOptions) -> Result<Opened, OpenError> {
    let fail = |errno| OpenError::from_errno(image, errno);
    let access = if options.read_only { OFlags::RDONLY } else { OFlags::RDWR };
    // Non-blocking: the name may be a FIFO, and opening that must not hang.
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened = match rustix::fs::open(path, flags, rustix::fs::Mode::empty()) {
        Err(Errno::NOENT) if options.create.is_some() && !options.read_only => {
            return create(path, image, options.create.unwrap_or_default());
        }
        other => other.map_err(fail)?,
    };
    let stat = rustix::fs::fstat(&opened).map_err(fail)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let file = match kind {
        FileType::RegularFile => opened,
        FileType::BlockDevice if options.read_only => opened,
        // O_EXCL: refused while the kernel or another program uses it.
        FileType::BlockDevice => {
            let exclusive = || rustix::fs::open(path, flags | OFlags::EXCL, rustix::fs::Mode::empty());
            patiently(exclusive).map_err(fail)?
        }
        _ => return Err(OpenError::NotADevice { image: image.to_owned() }),
    };
    lock(&file, options.read_only).map_err(fail)?;
    Ok(Opened { file: file.into(), kind, is_new: false })
}

/// Makes a sparse file of `size` bytes.
fn create(path: &Path, image: &str, size: u64) -> Result<Opened, OpenError> {
    let fail = |errno| OpenError::from_errno(image, errno);
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    let file = rustix::fs::open(path, flags, mode).map_err(fail)?;
    let sized = lock(&file, false).and_then(|()| rustix::fs::ftruncate(&file, size));
    if let Err(errno) = sized {
        // Nobody else has used a file that did not exist a moment ago.
        let _ = rustix::fs::unlink(path);
        return Err(fail(errno));
    }
    Ok(Opened { file: file.into(), kind: FileType::RegularFile, is_new: true })
}

fn lock(file: &impl std::os::fd::AsFd, shared: bool) -> rustix::io::Result<()> {
    let how =
        if shared { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
    patiently(|| rustix::fs::flock(file, how))
}

/// Tries again for [`LOCK_PATIENCE`] while the image is in use.
fn patiently<T>(attempt: impl Fn() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    let begin = Instant::now();
    loop {
        match attempt() {
            Err(Errno::BUSY | Errno::AGAIN) if begin.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(LOCK_RETRY);
            }
            done => return done,
        }
    }
}

/// Switches to direct I/O if possible and finds out what the device asks for.
fn probe(file: &File, kind: FileType, image: &str) -> rustix::io::Result<Limits> {
    let (block_size, dma_align) = match direct_alignment(file, kind)? {
        Some(alignment) => alignment,
        None => {
            tracing::warn!(
                "{image}: the file system has no direct I/O; using the page cache, which costs memory and time"
            );
            (BUFFERED_BLOCK, 1)
        }
    };
    let size = rustix::fs::seek(file, SeekFrom::End(0))?;
    Ok(Limits {
        size: size - size % u64::from(block_size),
        block_size,
        dma_align,
        max_segments: SEGMENTS_MAX,
        max_transfer: TRANSFER_MAX,
        volatile_cache: true,
        discard: true,
        write_zeroes: true,
        sparse: kind == FileType::RegularFile,
    })
}

/// Whether the disk that a file lies on makes a single write durable. False where that is not to be found out: for
/// network file systems and those over several disks.
fn lies_on_durable_disk(file: &File) -> bool {
    let Ok(stat) = rustix::fs::fstat(file) else { return false };
    let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
    let disk = format!("/sys/dev/block/{major}:{minor}");
    let says = |attribute: &str, value: &str| {
        // A partition has no queue of its own; its folder lies in that of its disk.
        [format!("{disk}/queue/{attribute}"), format!("{disk}/../queue/{attribute}")]
            .iter()
            .find_map(|path| std::fs::read_to_string(path).ok())
            .is_some_and(|text| text.trim_end() == value)
    };
    says("fua", "1") || says("write_cache", "write through")
}

/// Block size and alignment of segments for direct I/O; `None` if the file is to be used without.
fn direct_alignment(file: &File, kind: FileType) -> rustix::io::Result<Option<(u32, u32)>> {
    let flags = rustix::fs::fcntl_getfl(file)?.difference(OFlags::NONBLOCK);
    let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    let told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    let refused = told && stat.stx_dio_offset_align == 0;
    if refused || rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT).is_err() {
        rustix::fs::fcntl_setfl(file, flags)?;
        return Ok(None);
    }
    let sector = if kind == FileType::BlockDevice { rustix::fs::ioctl_blksszget(file)? } else { 0 };
    let (offset, memory) =
        if told { (stat.stx_dio_offset_align, stat.stx_dio_mem_align) } else { (DIRECT_ALIGN, DIRECT_ALIGN) };
    let block_size = if sector != 0 && !told { sector } else { offset.max(sector) }.max(512);
    if !block_size.is_power_of_two() || block_size > BLOCK_MAX {
        rustix::fs::fcntl_setfl(file, flags)?;
        return Ok(None);
    }
    // Kernels before 6.18 ask for whole blocks in every segment, not only in their sum.
    Ok(Some((block_size, memory.max(block_size))))
}

#[cfg(test)]
mod tests {
    use reactor::{Reactor, SystemClock};

    use super::*;

    const LEN: usize = 8192;

    /// A device over /dev/null, which takes every write and has no FSYNC: that is EINVAL.
    fn device_without_fsync(dsync: bool) -> (Rc<Reactor>, Rc<UringDevice>) {
        let reactor = Reactor::new(Rc::new(SystemClock::new()));
        let file = File::options().write(true).open("/dev/null").unwrap();
        let uring = reactor.uring().unwrap();
        let device = Rc::new_cyclic(|this| UringDevice {
            file,
            limits: Limits {
                size: 1 << 20,
                block_size: 512,
                dma_align: 512,
                max_segments: SEGMENTS_MAX,
                max_transfer: TRANSFER_MAX,
                volatile_cache: true,
                discard: true,
                write_zeroes: true,
                sparse: true,
            },
            read_only: false,
            is_block_device: false,
            dsync,
            uring,
            ops: RefCell::default(),
            zero_method: Cell::new(ZeroMethod::Write),
            zeros: RefCell::default(),
            this: this.clone(),
        });
        (reactor, device)
    }

    fn buffers() -> IoBuffers {
        IoBuffers::from_aligned(&Rc::new(AlignedBuf::zeroed(LEN, 4096)))
    }

    fn op(action: Action) -> Op {
        let (offset, len, buffers) = (4096, LEN as u64, buffers());
        Op { action, offset, len, done: 0, buffers, vectors: Vec::new(), completion: None }
    }

    #[test]
    fn the_error_of_the_fsync_behind_a_durable_write_is_that_of_the_write() {
        let (reactor, device) = device_without_fsync(false);
        let refused = |result| matches!(result, Err(BdevError::Io { errno: libc::EINVAL, .. }));
        assert_eq!(reactor.block_on(device.write(0, buffers(), WriteFlags::NONE)), Ok(()));
        assert!(refused(reactor.block_on(device.write(0, buffers(), WriteFlags::FUA))));
        assert_eq!(reactor.block_on(device.write_zeroes(0..4096, WriteFlags::NONE)), Ok(()));
        assert!(refused(reactor.block_on(device.write_zeroes(0..4096, WriteFlags::FUA))));
        assert!(refused(reactor.block_on(device.flush())));
    }

    #[test]
    fn where_a_single_write_is_durable_no_fsync_follows() {
        let (reactor, device) = device_without_fsync(true);
        assert_eq!(reactor.block_on(device.write(0, buffers(), WriteFlags::FUA)), Ok(()));
    }

    #[test]
    fn a_short_durable_write_goes_on_before_its_fsync() {
        let (_reactor, device) = device_without_fsync(false);
        for result in [0, -libc::EIO] {
            let mut op = op(Action::Write { fua: true });
            assert!(matches!(device.advance(&mut op, 4096), Next::Again));
            assert_eq!((op.action, op.done), (Action::Write { fua: true }, 4096));
            assert!(matches!(device.advance(&mut op, -libc::EAGAIN), Next::Again));
            assert_eq!((op.action, op.done), (Action::Write { fua: true }, 4096));
            assert!(matches!(device.advance(&mut op, 4096), Next::Again));
            assert_eq!(op.action, Action::Flush);
            // Interrupted, it is made again.
            assert!(matches!(device.advance(&mut op, -libc::EINTR), Next::Again));
            assert_eq!(op.action, Action::Flush);
            let ended = device.advance(&mut op, result);
            assert!(matches!(ended, Next::Ended(end) if end.is_ok() == (result == 0)));
        }
    }

    #[test]
    fn a_durable_write_that_fails_or_ends_early_has_no_fsync() {
        let (_reactor, device) = device_without_fsync(false);
        for result in [0, -libc::EIO] {
            let mut op = op(Action::Write { fua: true });
            assert!(matches!(device.advance(&mut op, 4096), Next::Again));
            assert!(matches!(device.advance(&mut op, result), Next::Ended(Err(_))));
        }
    }
}
