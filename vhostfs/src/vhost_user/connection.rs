//! Frames over a vhost-user socket.
//!
//! A frame is a header of three words (request, flags, size), a payload and descriptors. Input is taken as
//! it comes: a frame that is not complete stays here until it is, and nobody waits for it. Output that the
//! socket does not take stays here too.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags,
    Shutdown, recvmsg, sendmsg, shutdown,
};
use vhost::vhost_user::message::{MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserHeaderFlag};

use crate::descriptor::{Closer, Descriptor};
use crate::events::{Events, Key, WatchedFd};

/// Request, flags, size: 32 bits each.
const HEADER_LEN: usize = 12;

/// The protocol's version, in the low bits of the flags.
const VERSION: u32 = 1;

/// Replies that a frontend may leave unread: far more than any frontend has outstanding.
const OUTPUT_MAX: usize = 64 << 10;

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionError {
    /// The frontend closed it.
    #[error("closed by the frontend")]
    Closed,
    /// A header that is none: framing is lost.
    #[error("malformed message header (request {request}, flags {flags:#x}, size {size})")]
    Header {
        /// Request number.
        request: u32,
        /// Flags.
        flags: u32,
        /// Size of the payload.
        size: u32,
    },
    /// More descriptors than a message may have.
    #[error("too many descriptors in one message")]
    Descriptors,
    /// The frontend does not read its replies.
    #[error("replies are not read")]
    Unread,
    /// The kernel reported an error.
    #[error("socket error: {0}")]
    Socket(#[from] Errno),
}

/// A complete message from a frontend.
#[derive(Debug)]
pub struct Frame {
    /// Request number.
    pub code: u32,
    /// Whether the frontend waits for a reply even if the message has none of its own.
    pub need_reply: bool,
    /// The payload.
    pub payload: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<Descriptor>,
}

/// A connected frontend.
#[derive(Debug)]
pub struct Connection {
    socket: WatchedFd,
    input: Vec<u8>,
    fds: Vec<Descriptor>,
    closer: Closer,
    output: VecDeque<u8>,
    /// The socket may have input; cleared when it says that it has none.
    readable: bool,
}

impl Connection {
    /// Takes over a connected socket; its events come with `key`.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn new(socket: OwnedFd, events: &Rc<Events>, key: Key) -> Result<Self, ConnectionError> {
        let closer = events.closer().clone();
        let socket = WatchedFd::stream(Descriptor::foreign(socket, &closer), events, key)?;
        let (input, fds, output) = (Vec::new(), Vec::new(), VecDeque::new());
        Ok(Self { socket, input, fds, closer, output, readable: true })
    }

    /// An event says that something changed.
    pub fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Whether [`Connection::receive`] may find something.
    pub fn is_readable(&self) -> bool {
        self.readable
    }

    /// The next complete message, if it is there.
    ///
    /// # Errors
    /// [`ConnectionError`]; the connection is then to be dropped.
    pub fn receive(&mut self) -> Result<Option<Frame>, ConnectionError> {
        loop {
            let wanted = self.wanted()?;
            if wanted == self.input.len() {
                return Ok(Some(self.take_frame()));
            }
            if !self.readable || !self.fill(wanted)? {
                return Ok(None);
            }
        }
    }

    /// Length of the frame as far as it is known.
    fn wanted(&self) -> Result<usize, ConnectionError> {
        if self.input.len() < HEADER_LEN {
            return Ok(HEADER_LEN);
        }
        let (request, flags, size) = (self.header(0), self.header(1), self.header(2));
        let is_reply = flags & VhostUserHeaderFlag::REPLY.bits() != 0;
        let version = flags & VhostUserHeaderFlag::VERSION.bits();
        if version != VERSION || is_reply || size as usize > MAX_MSG_SIZE {
            return Err(ConnectionError::Header { request, flags, size });
        }
        Ok(HEADER_LEN + size as usize)
    }

    fn header(&self, word: usize) -> u32 {
        self.input[word * 4..][..4].try_into().map_or(0, u32::from_ne_bytes)
    }

    /// Reads up to `wanted` bytes of one frame, never of the next: descriptors belong to the frame whose
    /// bytes they came with. Returns whether there were any.
    fn fill(&mut self, wanted: usize) -> Result<bool, ConnectionError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_ATTACHED_FD_ENTRIES))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let start = self.input.len();
        self.input.resize(wanted, 0);
        let mut slices = [IoSliceMut::new(&mut self.input[start..])];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.socket, &mut slices, &mut control, flags);
        self.input.truncate(start + received.as_ref().map_or(0, |received| received.bytes));
        let received = match received {
            Ok(received) => received,
            Err(Errno::AGAIN) => {
                self.readable = false;
                return Ok(false);
            }
            Err(Errno::INTR) => return Ok(true),
            Err(error) => return Err(error.into()),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds.map(|fd| Descriptor::foreign(fd, &self.closer)));
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > MAX_ATTACHED_FD_ENTRIES {
            return Err(ConnectionError::Descriptors);
        }
        if received.bytes == 0 { Err(ConnectionError::Closed) } else { Ok(true) }
    }

    fn take_frame(&mut self) -> Frame {
        let (code, flags) = (self.header(0), self.header(1));
        let payload = self.input[HEADER_LEN..].to_vec();
        self.input.clear();
        let need_reply = flags & VhostUserHeaderFlag::NEED_REPLY.bits() != 0;
        Frame { code, need_reply, payload, fds: std::mem::take(&mut self.fds) }
    }

    /// Queues a reply to message `code` and sends what the socket takes.
    ///
    /// # Errors
    /// [`ConnectionError`]; the connection is then to be dropped.
    #[expect(clippy::host_endian_bytes, reason = "vhost-user is a protocol between processes of one machine")]
    pub fn reply(&mut self, code: u32, payload: &[u8]) -> Result<(), ConnectionError> {
        let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
        for word in [code, flags, payload.len() as u32] {
            self.output.extend(word.to_ne_bytes());
        }
        self.output.extend(payload);
        if self.output.len() > OUTPUT_MAX {
            return Err(ConnectionError::Unread);
        }
        self.flush()
    }

    /// Sends what the socket takes of the replies that are left.
    ///
    /// # Errors
    /// [`ConnectionError`]; the connection is then to be dropped.
    pub fn flush(&mut self) -> Result<(), ConnectionError> {
        while !self.output.is_empty() {
            let (first, second) = self.output.as_slices();
            let slices = [IoSlice::new(first), IoSlice::new(second)];
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.socket, &slices, &mut SendAncillaryBuffer::default(), flags) {
                Ok(sent) => drop(self.output.drain(..sent)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Drop for Connection {
    /// The frontend learns of the end at once, whenever the socket is closed.
    fn drop(&mut self) {
        // Of one that is not connected any more there is nobody to tell.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}
