//! A frontend's end of a socket, its memory, and the driver's side of the queues in it.

use std::io::{ErrorKind, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::echo::LATER;
use super::message::{FileKind, Message, PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, WITH_REPLY, longs, words};
use crate::memory::{SharedMemory, descriptor};

/// Address of the memory's first byte in the guest, and in the frontend.
pub(super) const GPA: u64 = 0x1000_0000;
pub(super) const UVA: u64 = 0x7f00_0000_0000;
pub(super) const MEMORY_LEN: u64 = 0x1_0000;

const QUEUES: u8 = 3;
const QUEUE_SIZE: u16 = 8;
/// Where requests and replies lie.
const BUFFERS: u64 = 0x8000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// Header flags: version, reply, need a reply.
const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
/// Protocol feature: acknowledgements.
const REPLY_ACK: u64 = 1 << 3;

/// Descriptors of one message: the protocol's limit and one more.
const FILES_MAX: usize = 33;

/// Where a queue usually lies in the memory.
pub(super) struct VringPlace {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

impl VringPlace {
    pub(super) fn of(queue: u8) -> Self {
        let start = u64::from(queue % QUEUES) * 0x1000;
        Self { descriptors: start, available: start + 0x400, used: start + 0x800 }
    }
}

/// See the module.
pub(super) struct Frontend {
    socket: Option<UnixStream>,
    memory: SharedMemory,
    kicks: Vec<OwnedFd>,
    available: [u16; QUEUES as usize],
    /// Used index at the last request.
    used: [u16; QUEUES as usize],
    /// Bytes of replies that were received.
    received: Vec<u8>,
    /// Codes of the messages that are answered.
    expected: Vec<u32>,
    acknowledged: bool,
    /// The backend may have closed the connection, for a good reason.
    may_be_closed: bool,
}

impl Frontend {
    pub(super) fn new(socket: UnixStream) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        Self {
            socket: Some(socket),
            memory: SharedMemory::new(MEMORY_LEN),
            kicks: (0..QUEUES).map(|_| new_event()).collect(),
            available: Default::default(),
            used: Default::default(),
            received: Vec::new(),
            expected: Vec::new(),
            acknowledged: false,
            may_be_closed: false,
        }
    }

    /// Negotiates, shares the memory and starts all queues.
    pub(super) fn start(&mut self) {
        self.tell(SET_PROTOCOL_FEATURES, &longs(&[PROTOCOL_FEATURES]), &[]);
        self.acknowledged = true;
        self.tell(2, &longs(&[1 << 32 | 1 << 30 | 1 << 28]), &[]);
        let table = [words(&[1, 0]), longs(&[GPA, MEMORY_LEN, UVA, 0])].concat();
        let memory = self.memory.descriptor();
        self.tell(5, &table, &[memory.as_fd()]);
        for queue in 0..QUEUES {
            let index = u32::from(queue);
            self.tell(8, &words(&[index, QUEUE_SIZE.into()]), &[]);
            self.tell(10, &words(&[index, 0]), &[]);
            let VringPlace { descriptors, available, used } = VringPlace::of(queue);
            let places = longs(&[UVA + descriptors, UVA + used, UVA + available, 0]);
            self.tell(9, &[words(&[index, 0]), places].concat(), &[]);
            let (kick, call) =
                (self.kicks[usize::from(queue)].try_clone().expect("a descriptor"), new_event());
            self.tell(12, &longs(&[queue.into()]), &[kick.as_fd()]);
            self.tell(13, &longs(&[queue.into()]), &[call.as_fd()]);
            self.tell(18, &words(&[index, 1]), &[]);
        }
    }

    /// A proper message that needs no reply.
    fn tell(&mut self, code: u32, payload: &[u8], files: &[BorrowedFd<'_>]) {
        self.send_bytes(&frame([code, VERSION, payload.len() as u32], payload), files);
    }

    pub(super) fn send(
        &mut self,
        code: u32,
        need_reply: bool,
        payload: &[u8],
        files: &[FileKind],
        message: &Message,
    ) {
        if files.len() > FILES_MAX - 1 || payload.len() > 4096 {
            self.may_be_closed = true;
        }
        let flags = if need_reply { VERSION | NEED_REPLY } else { VERSION };
        self.send_with(&frame([code, flags, payload.len() as u32], payload), files);
        // Who sends the number with another payload says so by chance only.
        match message.protocol_features() {
            Some(features) if features & !PROTOCOL_FEATURES == 0 => {
                self.acknowledged = features & REPLY_ACK != 0;
            }
            None if code == SET_PROTOCOL_FEATURES => self.may_be_closed = true,
            _ => {}
        }
        if WITH_REPLY.contains(&code) || (need_reply && self.acknowledged) {
            self.expected.push(code);
        }
    }

    /// What is answered is not known afterwards.
    pub(super) fn send_malformed(&mut self, header: [u32; 3], payload: &[u8], files: &[FileKind]) {
        self.may_be_closed = true;
        self.send_with(&frame(header, payload), files);
    }

    fn send_with(&mut self, bytes: &[u8], files: &[FileKind]) {
        let open = files.iter().take(FILES_MAX).map(|file| file.open(&|| self.memory.descriptor()));
        let files: Vec<OwnedFd> = open.collect();
        self.send_bytes(bytes, &files.iter().map(AsFd::as_fd).collect::<Vec<_>>());
    }

    fn send_bytes(&mut self, bytes: &[u8], files: &[BorrowedFd<'_>]) {
        let Some(socket) = &self.socket else { return };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(files)), "room for descriptors");
        }
        match sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(sent) if sent == bytes.len() => {}
            // A backend that has gone, or does not read because it waits.
            Ok(_) | Err(_) => self.may_be_closed = true,
        }
    }

    /// Takes in what the backend has sent.
    pub(super) fn read_replies(&mut self) {
        let Some(socket) = &mut self.socket else { return };
        let mut buffer = [0; 4096];
        loop {
            match socket.read(&mut buffer) {
                Ok(0) => {
                    assert!(self.may_be_closed, "the backend closed the connection");
                    self.socket = None;
                    return;
                }
                Ok(len) => self.received.extend(&buffer[..len]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => {
                    assert!(self.may_be_closed, "the backend closed the connection");
                    self.socket = None;
                    return;
                }
            }
        }
    }

    /// Replies are well-formed, and those that were asked for.
    pub(super) fn check_replies(&self) {
        let (mut rest, mut codes) = (self.received.as_slice(), Vec::new());
        while let Some((header, behind)) = rest.split_first_chunk::<12>() {
            let word =
                |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            let len = word(8) as usize;
            assert_eq!(word(4), VERSION | REPLY, "flags of a reply");
            assert!(len <= behind.len(), "a reply of {len} bytes of which {} came", behind.len());
            codes.push(word(0));
            rest = &behind[len..];
        }
        assert!(rest.is_empty() || self.may_be_closed, "a part of a reply");
        if !self.may_be_closed {
            assert_eq!(codes, self.expected, "messages that were answered");
        }
    }

    pub(super) fn close(&mut self) {
        self.may_be_closed = true;
        self.socket = None;
    }

    /// A frontend that takes its memory away is thrown out.
    pub(super) fn resize(&mut self, quarters: u8) {
        self.may_be_closed = true;
        self.memory.resize(MEMORY_LEN / 4 * u64::from(quarters));
    }

    pub(super) fn kick(&self, queue: u8) {
        let kick = &self.kicks[usize::from(queue % QUEUES)];
        rustix::io::write(kick, &longs(&[1])).expect("a counter far from its limit");
    }

    /// Writes where there is memory.
    fn poke(&self, at: u64, bytes: &[u8]) {
        if at + bytes.len() as u64 <= MEMORY_LEN {
            self.memory.write(at, bytes);
        }
    }

    pub(super) fn descriptor(&self, queue: u8, index: u8, to: u16, len: u16, flags: u8, next: u8) {
        let at = VringPlace::of(queue).descriptors + u64::from(index % 16) * 16;
        let bytes = descriptor(GPA + u64::from(to), len.into(), (flags & 7).into(), (next % 16).into());
        self.poke(at, &bytes);
    }

    pub(super) fn set_available(&mut self, queue: u8, index: u16) {
        self.available[usize::from(queue % QUEUES)] = index;
        self.poke(VringPlace::of(queue).available + 2, &index.to_le_bytes());
    }

    pub(super) fn offer(&mut self, queue: u8, head: u16) {
        let index = self.available[usize::from(queue % QUEUES)];
        let at = VringPlace::of(queue).available + 4 + u64::from(index % QUEUE_SIZE) * 2;
        self.poke(at, &head.to_le_bytes());
        self.set_available(queue, index.wrapping_add(1));
        self.kick(queue);
    }

    /// A request of an empty body, and room for its reply.
    pub(super) fn request(&mut self, queue: u8, later: bool) {
        let mut request = words(&[40, if later { LATER } else { 3 }]);
        request.extend(longs(&[77, 1]));
        request.resize(40, 0);
        let place = VringPlace::of(queue);
        let buffer = BUFFERS + u64::from(queue % QUEUES) * 0x1000;
        self.poke(buffer, &request);
        self.poke(place.descriptors, &descriptor(GPA + buffer, 40, NEXT, 1));
        self.poke(place.descriptors + 16, &descriptor(GPA + buffer + 0x800, 0x100, WRITE, 0));
        self.used[usize::from(queue % QUEUES)] = self.memory.read_word(place.used + 2);
        self.offer(queue, 0);
    }

    /// Whether the last request was answered.
    pub(super) fn has_reply(&self, queue: u8) -> bool {
        let before = self.used[usize::from(queue % QUEUES)];
        self.memory.read_word(VringPlace::of(queue).used + 2) == before.wrapping_add(1)
    }
}

fn new_event() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("an event descriptor")
}

fn frame(header: [u32; 3], payload: &[u8]) -> Vec<u8> {
    [words(&header), payload.to_vec()].concat()
}
