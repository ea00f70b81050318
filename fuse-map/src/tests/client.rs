//! A FUSE client for tests.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bdev::memory::Memory;
use bdev::sim::SimDisk;
use bdev::{AlignedBuf, Bdev, IoBuffers};
use blobfs::Fs;
use blobfs::check::check;
use blobfs::fs::MountOptions;
use blobfs::store::{MkfsOptions, OpenOptions, Store, mkfs};
use blobfs::units::InodeId;
use reactor::{Reactor, VirtualClock};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::abi::*;
use crate::op;
use crate::{CachePolicy, Export, Handled, Request, Session};

/// Bytes of the device: large enough for the usual node size.
const DEVICE: u64 = 64 << 20;
/// What room for a reply is filled with, to see what was written.
const UNTOUCHED: u8 = 0xaa;
/// Room for replies, if nothing else is asked for.
const ROOM: usize = 64 << 10;

pub(super) const ROOT: u64 = FUSE_ROOT_ID;

pub(super) const EXCLUSIVE: Export =
    Export { root: InodeId::ROOT, readonly: false, cache: CachePolicy::Exclusive };
pub(super) const NO_CACHE: Export = Export { cache: CachePolicy::None, ..EXCLUSIVE };

/// A file system that clients can connect to.
pub(super) struct World {
    pub(super) reactor: Rc<Reactor>,
    pub(super) fs: Rc<Fs>,
    device: Rc<dyn Bdev>,
}

impl World {
    /// An empty file system in memory.
    pub(super) fn new() -> Self {
        let reactor = Self::reactor();
        let device: Rc<dyn Bdev> = Memory::new(DEVICE, 4096);
        Self::format(&device, &reactor);
        Self::mount(device, reactor)
    }

    /// An empty file system on a simulated disk.
    pub(super) fn on_disk() -> (Self, Rc<SimDisk>) {
        let reactor = Self::reactor();
        let disk = SimDisk::new(DEVICE, 4096, 1);
        let device: Rc<dyn Bdev> = disk.clone();
        Self::format(&device, &reactor);
        (Self::mount(device, reactor), disk)
    }

    fn reactor() -> Rc<Reactor> {
        Reactor::new(Rc::new(VirtualClock::new(Duration::from_secs(1_000_000))))
    }

    fn format(device: &Rc<dyn Bdev>, reactor: &Rc<Reactor>) {
        let device = device.clone();
        // Not random: the same requests get the same replies in every run.
        let options = MkfsOptions { uuid: [7; 16], hash_key: [1, 2], ..MkfsOptions::default() };
        reactor.block_on(async move { mkfs(&device, &options).await }).unwrap();
    }

    /// What a device holds.
    pub(super) fn mount(device: Rc<dyn Bdev>, reactor: Rc<Reactor>) -> Self {
        let (inner, image) = (reactor.clone(), device.clone());
        let fs = reactor.block_on(async move {
            let store = Store::open(image, inner, OpenOptions::default()).await.unwrap();
            Fs::mount(store, MountOptions::default()).await.unwrap()
        });
        Self { reactor, fs, device }
    }

    /// A client that has not sent INIT yet.
    pub(super) fn connect(&self, export: Export) -> Client {
        Client {
            session: Session::new(self.fs.clone(), export),
            reactor: self.reactor.clone(),
            unique: Cell::new(0),
            uid: Cell::new(0),
            gid: Cell::new(0),
        }
    }

    /// A client that offered all that Linux offers.
    pub(super) fn client(&self, export: Export) -> Client {
        let client = self.connect(export);
        client.init(InitFlags::all()).unwrap();
        client
    }

    /// Unmounts; the checker finds nothing wrong.
    pub(super) fn assert_sound(self) {
        self.settle();
        let Self { reactor, fs, device } = self;
        let report = reactor.block_on(async move {
            fs.unmount().await.unwrap();
            check(&device).await.unwrap()
        });
        assert!(report.is_clean(), "{:?}", report.findings);
    }

    /// Lets background work end.
    pub(super) fn settle(&self) {
        while self.reactor.turn() {}
    }

    /// Lets time go by.
    pub(super) fn sleep(&self, duration: Duration) {
        self.reactor.block_on(self.reactor.sleep(duration));
    }
}

/// An exclusive client of a new file system.
pub(super) fn exclusive() -> (World, Client) {
    let world = World::new();
    let client = world.client(EXCLUSIVE);
    (world, client)
}

/// A client of a new file system that caches nothing.
pub(super) fn uncached() -> (World, Client) {
    let world = World::new();
    let client = world.client(NO_CACHE);
    (world, client)
}

/// A client. Numbers of errors are positive.
pub(super) struct Client {
    pub(super) session: Rc<Session>,
    reactor: Rc<Reactor>,
    unique: Cell<u64>,
    pub(super) uid: Cell<u32>,
    pub(super) gid: Cell<u32>,
}

/// A request that is being handled.
pub(super) struct Sent {
    pub(super) handled: Handled,
    writable: IoBuffers,
    unique: u64,
}

/// Private memory with these bytes, in pieces so that no struct and no name lies in one segment.
fn memory(bytes: &[u8]) -> IoBuffers {
    let buf = Rc::new(AlignedBuf::zeroed(bytes.len(), 4096));
    let whole = IoBuffers::from_aligned(&buf);
    whole.copy_from(0, bytes);
    let pieces = [whole.slice(0, 7), whole.slice(7, 36), whole.slice(43, 5), whole.slice(48, bytes.len())];
    IoBuffers::new(pieces.iter().flat_map(|piece| piece.segments().iter().copied()), buf)
}

/// `head`, then the same memory with `unit` in it `times` over.
pub(super) fn repeated(head: &[u8], unit: &[u8], times: usize) -> IoBuffers {
    let buf = Rc::new(AlignedBuf::zeroed(head.len() + unit.len(), 8));
    let whole = IoBuffers::from_aligned(&buf);
    whole.copy_from(0, &[head, unit].concat());
    let [head, unit] = [whole.slice(0, head.len()), whole.slice(head.len(), unit.len())];
    let repeated = unit.segments().iter().copied().cycle().take(times);
    IoBuffers::new(head.segments().iter().copied().chain(repeated), buf)
}

impl Client {
    /// A header for a request with `body_len` bytes of arguments.
    pub(super) fn header(&self, opcode: u32, nodeid: u64, body_len: usize) -> fuse_in_header {
        self.unique.set(self.unique.get() + 2);
        fuse_in_header {
            len: (size_of::<fuse_in_header>() + body_len) as u32,
            opcode,
            unique: self.unique.get(),
            nodeid,
            uid: self.uid.get(),
            gid: self.gid.get(),
            pid: 1,
            total_extlen: 0,
            padding: 0,
        }
    }

    /// Sends bytes as they are.
    pub(super) fn send_bytes(&self, bytes: &[u8], unique: u64, room: usize) -> Sent {
        let writable = memory(&vec![UNTOUCHED; room]);
        let request = Request { readable: memory(bytes), writable: writable.clone() };
        Sent { handled: self.session.handle(request), writable, unique }
    }

    pub(super) fn send(&self, opcode: u32, nodeid: u64, body: &[u8], room: usize) -> Sent {
        let header = self.header(opcode, nodeid, body.len());
        self.send_bytes(&[header.as_bytes(), body].concat(), header.unique, room)
    }

    /// Waits for the reply.
    pub(super) fn finish(&self, sent: Sent) -> Result<Vec<u8>, i32> {
        let len = match sent.handled {
            Handled::Done(len) => len,
            Handled::Pending(reply) => self.reactor.block_on(reply),
            Handled::NoReply => panic!("no reply"),
            Handled::Unanswerable => panic!("unanswerable"),
        };
        sent_reply(&sent.writable, sent.unique, len)
    }

    /// Waits for the end of a request that gets no reply; true when nothing was written.
    pub(super) fn finish_silently(&self, sent: Sent) -> bool {
        let Handled::Pending(reply) = sent.handled else { panic!("the request does not wait") };
        let len = self.reactor.block_on(reply);
        let mut bytes = vec![0; sent.writable.len()];
        sent.writable.copy_to(0, &mut bytes);
        len == 0 && bytes.iter().all(|byte| *byte == UNTOUCHED)
    }

    /// A request and its reply's body.
    pub(super) fn call(&self, opcode: u32, nodeid: u64, args: &[&[u8]]) -> Result<Vec<u8>, i32> {
        self.finish(self.send(opcode, nodeid, &args.concat(), ROOM))
    }

    /// A request whose reply's body is a struct.
    pub(super) fn get<T: FromBytes + KnownLayout + Immutable>(
        &self,
        opcode: u32,
        nodeid: u64,
        args: &[&[u8]],
    ) -> Result<T, i32> {
        self.call(opcode, nodeid, args).map(|body| read::<T>(&body))
    }

    /// A request whose reply has no body.
    pub(super) fn done(&self, opcode: u32, nodeid: u64, args: &[&[u8]]) -> Result<(), i32> {
        self.call(opcode, nodeid, args).map(|body| assert!(body.is_empty(), "{body:?}"))
    }

    /// INIT as Linux 7.2 sends it.
    pub(super) fn init(&self, offered: InitFlags) -> Result<fuse_init_out, i32> {
        let init = fuse_init_in {
            major: 7,
            minor: 45,
            max_readahead: 1 << 20,
            flags: (offered | InitFlags::FUSE_INIT_EXT).bits() as u32,
        };
        let ext = fuse_init_ext_in { flags2: (offered.bits() >> 32) as u32, unused: [0; 11] };
        self.get(op::FUSE_INIT, 0, &[init.as_bytes(), ext.as_bytes()])
    }

    pub(super) fn lookup(&self, parent: u64, name: &str) -> Result<fuse_entry_out, i32> {
        self.get(op::FUSE_LOOKUP, parent, &[&c(name)])
    }

    /// Node id of a name, or the error; a negative entry is an error here, too.
    pub(super) fn find(&self, parent: u64, name: &str) -> Result<u64, i32> {
        match self.lookup(parent, name)?.nodeid {
            0 => Err(libc::ENOENT),
            nodeid => Ok(nodeid),
        }
    }

    pub(super) fn forget(&self, nodeid: u64, nlookup: u64) {
        let args = fuse_forget_in { nlookup };
        let sent = self.send(op::FUSE_FORGET, nodeid, args.as_bytes(), 0);
        assert!(matches!(sent.handled, Handled::NoReply));
    }

    pub(super) fn getattr(&self, nodeid: u64) -> Result<fuse_attr, i32> {
        let args = fuse_getattr_in::new_zeroed();
        let out: fuse_attr_out = self.get(op::FUSE_GETATTR, nodeid, &[args.as_bytes()])?;
        Ok(out.attr)
    }

    pub(super) fn setattr(
        &self,
        nodeid: u64,
        valid: SetattrValid,
        args: fuse_setattr_in,
    ) -> Result<fuse_attr, i32> {
        let args = fuse_setattr_in { valid: valid.bits(), ..args };
        let out: fuse_attr_out = self.get(op::FUSE_SETATTR, nodeid, &[args.as_bytes()])?;
        Ok(out.attr)
    }

    pub(super) fn mkdir(&self, parent: u64, name: &str) -> Result<u64, i32> {
        let args = fuse_mkdir_in { mode: 0o755, umask: 0o022 };
        let out: fuse_entry_out = self.get(op::FUSE_MKDIR, parent, &[args.as_bytes(), &c(name)])?;
        Ok(out.nodeid)
    }

    pub(super) fn mknod(&self, parent: u64, name: &str, mode: u32, rdev: u32) -> Result<fuse_entry_out, i32> {
        let args = fuse_mknod_in { mode, rdev, umask: 0o022, padding: 0 };
        self.get(op::FUSE_MKNOD, parent, &[args.as_bytes(), &c(name)])
    }

    pub(super) fn symlink(&self, parent: u64, name: &str, target: &str) -> Result<u64, i32> {
        let out: fuse_entry_out = self.get(op::FUSE_SYMLINK, parent, &[&c(name), &c(target)])?;
        Ok(out.nodeid)
    }

    /// CREATE with these open flags.
    pub(super) fn open_new(
        &self,
        parent: u64,
        name: &str,
        flags: i32,
        open_flags: u32,
    ) -> Result<fuse_create_out, i32> {
        let flags = (flags | libc::O_CREAT).cast_unsigned();
        let args = fuse_create_in { flags, mode: 0o100_666, umask: 0o022, open_flags };
        self.get(op::FUSE_CREATE, parent, &[args.as_bytes(), &c(name)])
    }

    /// A new file.
    pub(super) fn file(&self, parent: u64, name: &str) -> u64 {
        self.open_new(parent, name, libc::O_EXCL, 0).unwrap().entry.nodeid
    }

    pub(super) fn link(&self, nodeid: u64, parent: u64, name: &str) -> Result<fuse_entry_out, i32> {
        let args = fuse_link_in { oldnodeid: nodeid };
        self.get(op::FUSE_LINK, parent, &[args.as_bytes(), &c(name)])
    }

    pub(super) fn unlink(&self, parent: u64, name: &str) -> Result<(), i32> {
        self.done(op::FUSE_UNLINK, parent, &[&c(name)])
    }

    pub(super) fn rmdir(&self, parent: u64, name: &str) -> Result<(), i32> {
        self.done(op::FUSE_RMDIR, parent, &[&c(name)])
    }

    pub(super) fn rename(
        &self,
        (parent, name): (u64, &str),
        (newdir, new_name): (u64, &str),
        flags: u32,
    ) -> Result<(), i32> {
        let args = fuse_rename2_in { newdir, flags, padding: 0 };
        self.done(op::FUSE_RENAME2, parent, &[args.as_bytes(), &c(name), &c(new_name)])
    }

    pub(super) fn write(&self, nodeid: u64, offset: u64, bytes: &[u8]) -> Result<u32, i32> {
        self.write_as(nodeid, offset, bytes, 0, 0)
    }

    pub(super) fn write_as(
        &self,
        nodeid: u64,
        offset: u64,
        bytes: &[u8],
        flags: i32,
        write_flags: u32,
    ) -> Result<u32, i32> {
        let args = fuse_write_in {
            offset,
            size: bytes.len() as u32,
            write_flags,
            flags: flags.cast_unsigned(),
            ..fuse_write_in::new_zeroed()
        };
        let out: fuse_write_out = self.get(op::FUSE_WRITE, nodeid, &[args.as_bytes(), bytes])?;
        Ok(out.size)
    }

    pub(super) fn read(&self, nodeid: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let args = fuse_read_in { offset, size, ..fuse_read_in::new_zeroed() };
        self.finish(self.send(op::FUSE_READ, nodeid, args.as_bytes(), size as usize + 16))
    }

    pub(super) fn fsync(&self, nodeid: u64) -> Result<(), i32> {
        self.done(op::FUSE_FSYNC, nodeid, &[fuse_fsync_in::new_zeroed().as_bytes()])
    }

    pub(super) fn fallocate(&self, nodeid: u64, mode: i32, offset: u64, length: u64) -> Result<(), i32> {
        let args = fuse_fallocate_in { fh: 0, offset, length, mode: mode.cast_unsigned(), padding: 0 };
        self.done(op::FUSE_FALLOCATE, nodeid, &[args.as_bytes()])
    }

    pub(super) fn setxattr(&self, nodeid: u64, name: &str, value: &[u8], flags: i32) -> Result<(), i32> {
        let args = fuse_setxattr_in {
            size: value.len() as u32,
            flags: flags.cast_unsigned(),
            setxattr_flags: 0,
            padding: 0,
        };
        self.done(op::FUSE_SETXATTR, nodeid, &[args.as_bytes(), &c(name), value])
    }

    /// The value of an attribute, into a buffer of `size` bytes.
    pub(super) fn getxattr(&self, nodeid: u64, name: &str, size: u32) -> Result<Vec<u8>, i32> {
        let args = fuse_getxattr_in { size, padding: 0 };
        let body = [args.as_bytes(), &c(name)].concat();
        self.finish(self.send(op::FUSE_GETXATTR, nodeid, &body, 16 + (size as usize).max(8)))
    }

    pub(super) fn removexattr(&self, nodeid: u64, name: &str) -> Result<(), i32> {
        self.done(op::FUSE_REMOVEXATTR, nodeid, &[&c(name)])
    }
}

/// Checks a reply's form; its body, or its error.
fn sent_reply(writable: &IoBuffers, unique: u64, len: usize) -> Result<Vec<u8>, i32> {
    let mut bytes = vec![0; writable.len()];
    writable.copy_to(0, &mut bytes);
    assert!((16..=bytes.len()).contains(&len), "{len} bytes in a room of {}", bytes.len());
    let header: fuse_out_header = read(&bytes);
    assert_eq!(header.len as usize, len);
    assert_eq!(header.unique, unique);
    match header.error {
        0 => Ok(bytes[16..len].to_vec()),
        error => {
            assert!((-4095..0).contains(&error), "{error}");
            assert_eq!(len, 16, "an error has no body");
            Err(-error)
        }
    }
}

/// The struct at the front of `bytes`.
pub(super) fn read<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> T {
    T::read_from_prefix(bytes).expect("a whole struct").0
}

/// A string with its NUL.
pub(super) fn c(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}
