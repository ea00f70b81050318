//! A synthetic guest: a vhost-user frontend with real virtqueues in shared memory that speaks FUSE.
//!
//! | module | is |
//! |---|---|
//! | [`memory`] | the guest's memory: a memfd shared with the device |
//! | [`ring`] | the driver's side of a split virtqueue |
//! | [`channel`] | a queue with slots for requests and replies, laid out as Linux's driver does |
//! | [`fuse`] | the protocol's structs |
//! | [`Client`] | a mounted guest: one function per operation, each waiting for its reply |
//!
//! Offer requests on a [`Channel`], publish them once, take replies by polling; about 50 ns of
//! the client's own time per request, no system call unless the device asks for a kick.

pub mod channel;
pub mod fuse;
pub mod memory;
pub mod ring;

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _},
    path::Path,
};

use vhost::{
    VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend as _,
        message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use vmm_sys_util::eventfd::EventFd;
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes};

use self::{
    channel::{Channel, ChannelOptions, Data},
    fuse::{
        AttrOut, CreateIn, CreateOut, EntryOut, ForgetOne, FsyncIn, GetattrIn, InitIn, InitOut, MkdirIn,
        Opcode, OpenIn, OpenOut, ReadIn, ReleaseIn, SecctxHeader, WriteIn, WriteOut, bytes,
    },
    memory::{GPA_BASE, Memory},
};

/// Feature bits of virtio 1.3, clause 6.
const RING_INDIRECT_DESC: u64 = 1 << 28;
const RING_EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// Nodes in one BATCH_FORGET: what fits into a slot's page.
const FORGETS_PER_REQUEST: usize = 200;

/// Slots of the high-priority queue, which only forgets.
const FORGET_DEPTH: u16 = 4;

/// What can go wrong with a client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// A system call failed.
    #[error("system call")]
    Io(#[from] io::Error),
    /// The vhost-user conversation failed.
    #[error("vhost-user")]
    VhostUser(#[from] vhost::Error),
    /// The guest's memory is used up: a mistake in the options.
    #[error("the guest's memory is too small for its queues")]
    OutOfMemory,
    /// The ring is too small for the slots: a mistake in the options.
    #[error("the ring has too few descriptors; the device has no indirect ones")]
    RingTooSmall,
    /// A reply did not come within a minute.
    #[error("no reply within a minute")]
    NoReply,
    /// The device gave back a chain that it was never given.
    #[error("the device used head {0}, which was never offered")]
    UnknownHead(u32),
    /// The server answered a request with an error.
    #[error("{opcode:?}: {}", io::Error::from_raw_os_error(*errno))]
    Errno {
        /// The request.
        opcode: Opcode,
        /// Positive errno.
        errno: i32,
    },
    /// The server's answer makes no sense.
    #[error("{opcode:?}: {problem}")]
    Answer {
        /// The request.
        opcode: Opcode,
        /// What is wrong with its answer.
        problem: &'static str,
    },
}

impl From<rustix::io::Errno> for ClientError {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::Io(errno.into())
    }
}

/// How a guest is made.
#[derive(Debug, Clone, Copy)]
pub struct ClientOptions {
    /// Request queues.
    pub queues: u16,
    /// Entries of each ring, a power of two.
    pub ring_size: u16,
    /// Requests under way at once in each request queue.
    pub depth: u16,
    /// Bytes of file data that one request can carry.
    pub data_len: usize,
}

impl Default for ClientOptions {
    /// One queue of 1024 entries, as with QEMU's `queue-size=1024`; 32 requests of up to 1 MiB.
    fn default() -> Self {
        Self { queues: 1, ring_size: 1024, depth: 32, data_len: 1 << 20 }
    }
}

/// A guest connected to a device.
pub struct Client {
    /// The conversation with the device, which ends with it.
    _frontend: Frontend,
    memory: Memory,
    /// The high-priority queue, then the request queues.
    channels: Vec<Channel>,
    init: InitOut,
    no_open: bool,
}

impl Client {
    /// Connects and mounts: FUSE_INIT as a Linux 6.12 guest sends it.
    pub fn connect(socket: &Path, options: ClientOptions) -> Result<Self, ClientError> {
        let mut client = Self::start(socket, options)?;
        client.init()?;
        Ok(client)
    }

    /// Connects and starts the queues, but sends no request.
    fn start(socket: &Path, options: ClientOptions) -> Result<Self, ClientError> {
        let queues = u64::from(options.queues) + 1;
        let mut frontend = Frontend::connect(socket, queues)?;
        let features = negotiate(&mut frontend)?;
        let mut memory = Memory::new(memory_len(options))?;
        let mut channels = Vec::new();
        for queue in 0..=options.queues {
            let is_request_queue = queue > 0;
            channels.push(Channel::new(
                &mut memory,
                ChannelOptions {
                    ring_size: options.ring_size,
                    depth: if is_request_queue { options.depth } else { FORGET_DEPTH },
                    data_len: if is_request_queue { options.data_len } else { 0 },
                    indirect: features & RING_INDIRECT_DESC != 0,
                    event_index: features & RING_EVENT_IDX != 0,
                },
            )?);
        }
        frontend.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: GPA_BASE,
            memory_size: memory.len_bytes() as u64,
            userspace_addr: memory.user_base(),
            mmap_offset: 0,
            mmap_handle: memory.file().as_raw_fd(),
        }])?;
        for (index, channel) in channels.iter_mut().enumerate() {
            start_queue(&mut frontend, &memory, index, channel)?;
        }
        Ok(Self { _frontend: frontend, memory, channels, init: InitOut::new_zeroed(), no_open: false })
    }

    /// Mounts: FUSE_INIT, and a look at whether the server wants OPEN at all.
    fn init(&mut self) -> Result<(), ClientError> {
        let init = InitIn {
            major: fuse::VERSION.0,
            minor: fuse::VERSION.1,
            max_readahead: 128 << 10,
            flags: fuse::GUEST_FLAGS as u32,
            flags2: (fuse::GUEST_FLAGS >> 32) as u32,
            unused: [0; 11],
        };
        self.init = self.call(Opcode::Init, 0, &[bytes(&init)])?;
        // Directories are asked for separately by Linux, but servers that do without one do without the other.
        let open = OpenIn { flags: 0, open_flags: 0 };
        match self.call::<OpenOut>(Opcode::Opendir, fuse::ROOT_ID, &[bytes(&open)]) {
            Ok(open) => self.close(Opcode::Releasedir, fuse::ROOT_ID, open.fh)?,
            Err(ClientError::Errno { errno: fuse::ENOSYS, .. }) => self.no_open = true,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Both words of the flags that the server granted.
    pub fn flags(&self) -> u64 {
        u64::from(self.init.flags) | u64::from(self.init.flags2) << 32
    }

    /// Largest WRITE in bytes, which is also what this client reads at most.
    pub fn max_write(&self) -> u32 {
        self.init.max_write
    }

    /// A queue and the memory it lies in. Queue 0 is the high-priority queue, request queues follow.
    pub fn queue(&mut self, index: usize) -> (&mut Channel, &Memory) {
        (&mut self.channels[index], &self.memory)
    }

    /// Sends a request on the first request queue and waits for its answer, which has the size of `T`.
    pub fn call<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        opcode: Opcode,
        nodeid: u64,
        args: &[&[u8]],
    ) -> Result<T, ClientError> {
        self.call_with(opcode, nodeid, args, Data::None, 0)
    }

    fn call_with<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        opcode: Opcode,
        nodeid: u64,
        args: &[&[u8]],
        data: Data,
        extension_len: u16,
    ) -> Result<T, ClientError> {
        let (channel, memory) = (&mut self.channels[1], &self.memory);
        channel.offer(memory, 0, (opcode, nodeid), args, (Some(size_of::<T>() as u32), data));
        if extension_len > 0 {
            channel.set_extension_len(memory, 0, extension_len);
        }
        channel.publish(memory)?;
        let slot = channel.wait_reply(memory)?;
        match channel.reply_header(memory, slot).error {
            0 => Ok(channel.answer(memory, slot)),
            error => Err(ClientError::Errno { opcode, errno: error.saturating_neg() }),
        }
    }

    /// LOOKUP.
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, ClientError> {
        self.call(Opcode::Lookup, parent, &[name.as_bytes(), b"\0"])
    }

    /// GETATTR.
    pub fn getattr(&mut self, node: u64) -> Result<AttrOut, ClientError> {
        self.call(Opcode::Getattr, node, &[bytes(&GetattrIn { getattr_flags: 0, dummy: 0, fh: 0 })])
    }

    /// MKDIR.
    pub fn mkdir(&mut self, parent: u64, name: &str) -> Result<EntryOut, ClientError> {
        let args = MkdirIn { mode: 0o755, umask: 0 };
        let extension = self.create_extension();
        let parts = [bytes(&args), name.as_bytes(), b"\0", extension.as_slice()];
        self.call_with(Opcode::Mkdir, parent, &parts, Data::None, extension.len() as u16)
    }

    /// CREATE of a regular file, opened for reading and writing with these flags added.
    pub fn create(&mut self, parent: u64, name: &str, flags: u32) -> Result<CreateOut, ClientError> {
        let args = create_args(flags);
        let extension = self.create_extension();
        let parts = [bytes(&args), name.as_bytes(), b"\0", extension.as_slice()];
        self.call_with(Opcode::Create, parent, &parts, Data::None, extension.len() as u16)
    }

    /// What follows a create's name: an empty security context, if both sides know of them.
    pub fn create_extension(&self) -> Vec<u8> {
        if self.flags() & fuse::SECURITY_CTX == 0 {
            return Vec::new();
        }
        bytes(&SecctxHeader { size: size_of::<SecctxHeader>() as u32, nr_secctx: 0 }).to_vec()
    }

    /// UNLINK.
    pub fn unlink(&mut self, parent: u64, name: &str) -> Result<(), ClientError> {
        self.call(Opcode::Unlink, parent, &[name.as_bytes(), b"\0"])
    }

    /// OPEN; file handle 0 without asking if the server does without.
    pub fn open(&mut self, node: u64, flags: u32) -> Result<u64, ClientError> {
        self.open_with(Opcode::Open, node, flags)
    }

    fn open_with(&mut self, opcode: Opcode, node: u64, flags: u32) -> Result<u64, ClientError> {
        if self.no_open {
            return Ok(0);
        }
        let open: OpenOut = self.call(opcode, node, &[bytes(&OpenIn { flags, open_flags: 0 })])?;
        Ok(open.fh)
    }

    /// RELEASE; nothing if the server does without OPEN.
    pub fn release(&mut self, node: u64, fh: u64) -> Result<(), ClientError> {
        if self.no_open { Ok(()) } else { self.close(Opcode::Release, node, fh) }
    }

    fn close(&mut self, opcode: Opcode, node: u64, fh: u64) -> Result<(), ClientError> {
        let args = ReleaseIn { fh, flags: 0, release_flags: 0, lock_owner: 0 };
        self.call(opcode, node, &[bytes(&args)])
    }

    /// WRITE of all of `data`, at most [`max_write`](Self::max_write) bytes.
    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        self.memory.write(self.channels[1].data_offset(0), data);
        let args = write_args(fh, offset, data.len() as u32, 0);
        let to_device = Data::ToDevice(args.size);
        let out: WriteOut = self.call_with(Opcode::Write, node, &[bytes(&args)], to_device, 0)?;
        if out.size != args.size {
            return Err(ClientError::Answer { opcode: Opcode::Write, problem: "short write" });
        }
        Ok(())
    }

    /// FSYNC of data and metadata.
    pub fn fsync(&mut self, node: u64, fh: u64) -> Result<(), ClientError> {
        self.call(Opcode::Fsync, node, &[bytes(&FsyncIn { fh, fsync_flags: 0, padding: 0 })])
    }

    /// BATCH_FORGET of nodes that were looked up once each.
    pub fn forget_all(&mut self, nodes: &[u64]) -> Result<(), ClientError> {
        for nodes in nodes.chunks(FORGETS_PER_REQUEST) {
            let one = |nodeid: &u64| ForgetOne { nodeid: *nodeid, nlookup: 1 };
            let list: Vec<ForgetOne> = nodes.iter().map(one).collect();
            let count = fuse::BatchForgetIn { count: list.len() as u32, dummy: 0 };
            self.send_forget(Opcode::BatchForget, 0, &[bytes(&count), list.as_bytes()])?;
        }
        Ok(())
    }

    fn send_forget(&mut self, opcode: Opcode, node: u64, args: &[&[u8]]) -> Result<(), ClientError> {
        let (channel, memory) = (&mut self.channels[0], &self.memory);
        channel.offer(memory, 0, (opcode, node), args, (None, Data::None));
        channel.publish(memory)?;
        channel.wait_reply(memory).map(drop)
    }
}

/// Arguments of CREATE for a regular file.
pub fn create_args(flags: u32) -> CreateIn {
    let flags = fuse::O_RDWR | fuse::O_CREAT | flags;
    CreateIn { flags, mode: fuse::S_IFREG | 0o644, umask: 0o022, open_flags: 0 }
}

/// Arguments of READ; `flags` are the file's, such as `O_DIRECT`.
pub fn read_args(fh: u64, offset: u64, size: u32, flags: u32) -> ReadIn {
    let flags = fuse::O_RDWR | flags;
    ReadIn { fh, offset, size, read_flags: 0, lock_owner: 0, flags, padding: 0 }
}

/// Arguments of WRITE; `flags` are the file's, such as `O_DIRECT`.
pub fn write_args(fh: u64, offset: u64, size: u32, flags: u32) -> WriteIn {
    let flags = fuse::O_RDWR | flags;
    WriteIn { fh, offset, size, write_flags: 0, lock_owner: 0, flags, padding: 0 }
}

/// Memory for the rings and slots of a guest with these options.
fn memory_len(options: ClientOptions) -> usize {
    // Two pages of request and reply, and a table of 16 bytes for each page of data and four more.
    let slot = options.data_len.next_multiple_of(4096) * (4096 + 16) / 4096 + 3 * 4096;
    let ring = usize::from(options.ring_size) * 32 + 4 * 4096;
    let queue = ring + slot * usize::from(options.depth);
    (queue * usize::from(options.queues) + ring + slot * usize::from(FORGET_DEPTH)).next_multiple_of(1 << 20)
}

/// Agrees on features; returns the virtio ones.
fn negotiate(frontend: &mut Frontend) -> Result<u64, ClientError> {
    frontend.set_owner()?;
    let wanted =
        VERSION_1 | RING_INDIRECT_DESC | RING_EVENT_IDX | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let features = frontend.get_features()? & wanted;
    if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
        let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        let protocol = frontend.get_protocol_features()? & wanted;
        frontend.set_protocol_features(protocol)?;
    }
    frontend.set_features(features)?;
    Ok(features)
}

fn start_queue(
    frontend: &mut Frontend,
    memory: &Memory,
    index: usize,
    channel: &mut Channel,
) -> Result<(), ClientError> {
    let (size, layout) = (channel.ring().size(), channel.ring().layout());
    let user = |offset: usize| memory.user_base() + offset as u64;
    frontend.set_vring_num(index, size)?;
    frontend.set_vring_addr(
        index,
        &VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: user(layout.descriptors.offset),
            used_ring_addr: user(layout.used.offset),
            avail_ring_addr: user(layout.available.offset),
            log_addr: None,
        },
    )?;
    frontend.set_vring_base(index, 0)?;
    frontend.set_vring_call(index, &EventFd::new(0)?)?;
    frontend.set_vring_kick(index, &borrowed_event(channel.kick_fd())?)?;
    frontend.set_vring_enable(index, true)?;
    Ok(())
}

/// A duplicate in the type that the `vhost` crate asks for.
#[expect(unsafe_code, reason = "EventFd has no other constructor from a descriptor")]
fn borrowed_event(fd: &std::os::fd::OwnedFd) -> io::Result<EventFd> {
    // SAFETY: the descriptor was made on this line and is given away.
    Ok(unsafe { EventFd::from_raw_fd(fd.try_clone()?.into_raw_fd()) })
}
