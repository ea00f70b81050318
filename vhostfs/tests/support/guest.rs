//! The guest's side: memory in a memfd, rings in it, and a vhost-user frontend that shares it.

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Guest physical address and frontend address of the first byte.
pub const GPA: u64 = 0x1000_0000;
pub const UVA: u64 = 0x7f00_0000_0000;
pub const MEMORY_LEN: u64 = 1 << 20;

/// Offsets of one queue's parts, and of the memory that buffers are taken from.
const QUEUE_STRIDE: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
pub const BUFFERS: u64 = 0x40000;

/// Memory of a guest and the driver side of its queues.
pub struct Guest {
    pub memory: std::fs::File,
    pub queue_size: u16,
    available: Vec<u16>,
    seen_used: Vec<u16>,
}

impl Guest {
    pub fn new(queue_size: u16) -> Self {
        let memory = std::fs::File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY_LEN).unwrap();
        Self { memory, queue_size, available: vec![0; 8], seen_used: vec![0; 8] }
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, offset).unwrap();
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    fn read_word(&self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset, 2).try_into().unwrap())
    }

    /// Writes a descriptor into a table at `table`.
    pub fn descriptor(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut raw = addr.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.write(table + u64::from(index) * 16, &raw);
    }

    /// Offset of a queue's descriptor table.
    pub fn table(&self, queue: u16) -> u64 {
        u64::from(queue) * QUEUE_STRIDE
    }

    /// Makes the chain from `head` available.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let index = self.available[usize::from(queue)];
        let slot = u64::from(index % self.queue_size);
        self.write(self.table(queue) + AVAILABLE + 4 + slot * 2, &head.to_le_bytes());
        self.set_available(queue, index.wrapping_add(1));
    }

    /// Sets the index of the available ring to anything.
    pub fn set_available(&mut self, queue: u16, index: u16) {
        self.available[usize::from(queue)] = index;
        self.write(self.table(queue) + AVAILABLE + 2, &index.to_le_bytes());
    }

    /// Sets flags and event index of the available ring.
    pub fn set_interrupts(&self, queue: u16, flags: u16, event: u16) {
        let ring = self.table(queue) + AVAILABLE;
        self.write(ring, &flags.to_le_bytes());
        self.write(ring + 4 + u64::from(self.queue_size) * 2, &event.to_le_bytes());
    }

    /// Index of the used ring.
    pub fn used_index(&self, queue: u16) -> u16 {
        self.read_word(self.table(queue) + USED + 2)
    }

    /// Sets the flags of the used ring, which are the device's, to anything.
    pub fn poison_kicks(&self, queue: u16, flags: u16) {
        self.write(self.table(queue) + USED, &flags.to_le_bytes());
    }

    /// Flags and event index of the used ring: what the device says about kicks.
    pub fn kicks(&self, queue: u16) -> (u16, u16) {
        let ring = self.table(queue) + USED;
        (self.read_word(ring), self.read_word(ring + 4 + u64::from(self.queue_size) * 8))
    }

    /// Used entries (head, length) that were not seen before.
    pub fn take_used(&mut self, queue: u16) -> Vec<(u32, u32)> {
        let end = self.used_index(queue);
        let mut used = Vec::new();
        while self.seen_used[usize::from(queue)] != end {
            let slot = u64::from(self.seen_used[usize::from(queue)] % self.queue_size);
            let raw = self.read(self.table(queue) + USED + 4 + slot * 8, 8);
            let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
            used.push((word(0), word(4)));
            self.seen_used[usize::from(queue)] = self.seen_used[usize::from(queue)].wrapping_add(1);
        }
        used
    }

    /// Forgets the rings, as a driver does that starts anew.
    pub fn reset(&mut self) {
        self.available.fill(0);
        self.seen_used.fill(0);
        self.write(0, &vec![0; (QUEUE_STRIDE * 8) as usize]);
    }

    /// A FUSE request in a chain of two descriptors from `head`, with buffers of its own per head: request
    /// and reply. Returns the offset of the reply.
    pub fn request(&mut self, queue: u16, head: u16, opcode: u32, payload: &[u8]) -> u64 {
        self.request_about(queue, head, opcode, 0, payload)
    }

    /// As [`Guest::request`], about a node.
    pub fn request_about(&mut self, queue: u16, head: u16, opcode: u32, node: u64, payload: &[u8]) -> u64 {
        let request = BUFFERS + u64::from(queue) * 0x20000 + u64::from(head) * 0x1000;
        let reply = request + 0x800;
        self.write(request, &fuse_request(opcode, u64::from(head) + 100, payload));
        self.write(request + 16, &node.to_le_bytes());
        let table = self.table(queue);
        let len = 40 + payload.len() as u32;
        self.descriptor(table, head, GPA + request, len, NEXT, head + 1);
        self.descriptor(table, head + 1, GPA + reply, 0x800, WRITE, 0);
        self.offer(queue, head);
        reply
    }
}

/// A FUSE request's bytes.
pub fn fuse_request(opcode: u32, unique: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (40 + payload.len() as u32).to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.resize(40, 0);
    bytes.extend(payload);
    bytes
}

/// Arguments of INIT of a kernel that offers these flags.
pub fn init_request(flags: u32) -> Vec<u8> {
    words(&[7, 38, 1 << 20, flags])
}

/// Length, error and unique number of a reply.
pub fn fuse_reply(raw: &[u8]) -> (u32, i32, u64) {
    (
        u32::from_le_bytes(raw[0..4].try_into().unwrap()),
        i32::from_le_bytes(raw[4..8].try_into().unwrap()),
        u64::from_le_bytes(raw[8..16].try_into().unwrap()),
    )
}

/// Message numbers and flags.
pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const RESET_DEVICE: u32 = 34;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const NEED_REPLY: u32 = 8;
}

/// Event descriptors of one queue.
pub struct QueueEvents {
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub error: OwnedFd,
}

impl QueueEvents {
    fn new() -> Self {
        let new = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        Self { kick: new(), call: new(), error: new() }
    }
}

/// How often an event descriptor was signalled since the last look.
pub fn signals(fd: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    match rustix::io::read(fd, &mut count) {
        Ok(_) => u64::from_le_bytes(count),
        Err(_) => 0,
    }
}

/// A frontend's end of a vhost-user socket.
pub struct Frontend {
    socket: UnixStream,
    pub queues: Vec<QueueEvents>,
}

impl Frontend {
    pub fn new(socket: UnixStream) -> Self {
        socket.set_nonblocking(true).unwrap();
        Self { socket, queues: (0..4).map(|_| QueueEvents::new()).collect() }
    }

    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
        assert_eq!(sent, bytes.len());
    }

    pub fn send(&self, code: u32, flags: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_raw(&message(code, flags, payload), fds);
    }

    /// The next reply (message number, payload), if it is there.
    pub fn receive(&mut self) -> Option<(u32, Vec<u8>)> {
        let mut header = [0; 12];
        self.socket.read_exact(&mut header).ok()?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
        assert_eq!(word(4), 5, "a reply of version 1");
        let mut payload = vec![0; word(8) as usize];
        self.socket.read_exact(&mut payload).unwrap();
        Some((word(0), payload))
    }

    /// Whether the backend closed the connection.
    pub fn is_closed(&mut self) -> bool {
        matches!(self.socket.read(&mut [0]), Ok(0))
            || matches!(self.socket.write(&[]), Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe)
    }

    pub fn share(&self, guest: &Guest) {
        let mut payload = words(&[1, 0]);
        payload.extend(region(GPA, MEMORY_LEN, UVA, 0));
        self.send(code::SET_MEM_TABLE, 0, &payload, &[guest.memory.as_fd()]);
    }

    /// Negotiates, shares the memory and starts the first `count` queues.
    pub fn start(&self, guest: &Guest, features: u64, count: u16) {
        self.send(code::SET_OWNER, 0, &[], &[]);
        self.send(code::SET_PROTOCOL_FEATURES, 0, &(1u64 | 8 | 0x200 | 0x2000 | 0x8000).to_le_bytes(), &[]);
        self.send(code::SET_FEATURES, 0, &(1u64 << 32 | 1 << 30 | features).to_le_bytes(), &[]);
        self.share(guest);
        for queue in 0..count {
            self.start_queue(guest, queue);
        }
    }

    pub fn start_queue(&self, guest: &Guest, queue: u16) {
        self.start_queue_at(guest, queue, 0);
    }

    /// Starts a queue whose next chain is number `base`.
    pub fn start_queue_at(&self, guest: &Guest, queue: u16, base: u32) {
        let index = u32::from(queue);
        self.send(code::SET_VRING_NUM, 0, &words(&[index, guest.queue_size.into()]), &[]);
        self.send(code::SET_VRING_BASE, 0, &words(&[index, base]), &[]);
        self.send(code::SET_VRING_ADDR, 0, &vring_addr(queue, UVA + guest.table(queue)), &[]);
        let events = &self.queues[usize::from(queue)];
        let payload = u64::from(queue).to_le_bytes();
        self.send(code::SET_VRING_KICK, 0, &payload, &[events.kick.as_fd()]);
        self.send(code::SET_VRING_CALL, 0, &payload, &[events.call.as_fd()]);
        self.send(code::SET_VRING_ERR, 0, &payload, &[events.error.as_fd()]);
        self.send(code::SET_VRING_ENABLE, 0, &words(&[index, 1]), &[]);
    }
}

pub fn message(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = words(&[code, 1 | flags, payload.len() as u32]);
    bytes.extend(payload);
    bytes
}

pub fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Payload of SET_VRING_ADDR for a queue whose table lies at `table` in the frontend.
pub fn vring_addr(queue: u16, table: u64) -> Vec<u8> {
    let mut payload = words(&[u32::from(queue), 0]);
    for address in [table, table + USED, table + AVAILABLE, 0] {
        payload.extend(address.to_le_bytes());
    }
    payload
}

/// A region description: guest address, length, frontend address, file offset.
pub fn region(gpa: u64, len: u64, uva: u64, offset: u64) -> Vec<u8> {
    [gpa, len, uva, offset].iter().flat_map(|value| value.to_le_bytes()).collect()
}
