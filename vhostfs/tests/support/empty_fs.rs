//! A FUSE server with an empty root directory: enough for a guest to mount.
//!
//! For tests it also answers two requests that FUSE does not have: one echoes its payload, one echoes it as
//! soon as it is released.

use std::cell::Cell;
use std::rc::Rc;

use bdev::IoBuffers;
use reactor::sync::Notify;
use vhostfs::device::fs::{FuseHandler, Handled, Request};

/// Echoes the payload at once.
pub const ECHO: u32 = 0x7001;
/// Echoes the payload after [`EmptyFs::release`].
pub const ECHO_LATER: u32 = 0x7002;

pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const STATFS: u32 = 17;
pub const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const DESTROY: u32 = 38;
pub const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;
pub const SYNCFS: u32 = 50;

const IN_HEADER_LEN: usize = 40;
const OUT_HEADER_LEN: usize = 16;

/// See the module. Clones are the same server.
#[derive(Clone, Default)]
pub struct EmptyFs {
    state: Rc<State>,
}

#[derive(Default)]
struct State {
    released: Cell<bool>,
    release: Notify,
    waiting: Cell<usize>,
    resets: Cell<usize>,
}

#[allow(dead_code, reason = "the example needs none of this")]
impl EmptyFs {
    /// Lets every [`ECHO_LATER`] be answered, now and later.
    pub fn release(&self) {
        self.state.released.set(true);
        self.state.release.notify_all();
    }

    /// Requests that wait to be released.
    pub fn waiting(&self) -> usize {
        self.state.waiting.get()
    }

    /// How often the device was reset.
    pub fn resets(&self) -> usize {
        self.state.resets.get()
    }
}

impl FuseHandler for EmptyFs {
    fn handle(&self, request: Request) -> Handled {
        let mut header = [0; IN_HEADER_LEN];
        if request.readable.copy_to(0, &mut header) < IN_HEADER_LEN {
            return request.refuse(libc::EINVAL);
        }
        let opcode = u32::from_le_bytes(header[4..8].try_into().unwrap());
        if matches!(opcode, FORGET | BATCH_FORGET) {
            return Handled::NoReply;
        }
        if request.writable.len() < OUT_HEADER_LEN {
            return Handled::Unanswerable;
        }
        let unique: [u8; 8] = header[8..16].try_into().unwrap();
        let payload = request.readable.slice(IN_HEADER_LEN, usize::MAX);
        match opcode {
            ECHO => Handled::Done(echo(&request.writable, unique, &payload)),
            ECHO_LATER => self.echo_later(request.writable, unique, payload),
            _ => Handled::Done(answer(opcode, &request.writable, unique)),
        }
    }

    fn reset(&self) {
        self.state.resets.set(self.state.resets.get() + 1);
    }
}

impl EmptyFs {
    fn echo_later(&self, writable: IoBuffers, unique: [u8; 8], payload: IoBuffers) -> Handled {
        let state = self.state.clone();
        state.waiting.set(state.waiting.get() + 1);
        Handled::Pending(Box::pin(async move {
            while !state.released.get() {
                state.release.notified().await;
            }
            state.waiting.set(state.waiting.get() - 1);
            echo(&writable, unique, &payload)
        }))
    }
}

fn answer(opcode: u32, writable: &IoBuffers, unique: [u8; 8]) -> usize {
    let body = match opcode {
        INIT => init(),
        GETATTR => attributes(),
        STATFS => {
            let mut body = vec![0; 80];
            body[40..44].copy_from_slice(&4096u32.to_le_bytes());
            body[44..48].copy_from_slice(&255u32.to_le_bytes());
            body[48..52].copy_from_slice(&4096u32.to_le_bytes());
            body
        }
        OPENDIR => vec![0; 16],
        READDIR | READDIRPLUS | RELEASEDIR | DESTROY | SYNCFS => Vec::new(),
        LOOKUP => return reply(writable, unique, -libc::ENOENT, &[]),
        _ => return reply(writable, unique, -libc::ENOSYS, &[]),
    };
    reply(writable, unique, 0, &body)
}

/// `struct fuse_init_out`.
fn init() -> Vec<u8> {
    let mut body = vec![0; 64];
    for (offset, value) in [(0, 7u32), (4, 38), (8, 128 << 10), (20, 1 << 20), (24, 1)] {
        body[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
    body
}

/// `struct fuse_attr_out` of the root.
fn attributes() -> Vec<u8> {
    let mut body = vec![0; 104];
    body[0] = 1; // valid for a second
    body[16] = 1; // inode
    for (offset, value) in [(16 + 60, 0o40755u32), (16 + 64, 2), (16 + 80, 4096)] {
        body[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
    body
}

fn echo(writable: &IoBuffers, unique: [u8; 8], payload: &IoBuffers) -> usize {
    let mut bytes = vec![0; payload.len()];
    payload.copy_to(0, &mut bytes);
    reply(writable, unique, 0, &bytes)
}

fn reply(writable: &IoBuffers, unique: [u8; 8], error: i32, body: &[u8]) -> usize {
    let body = &body[..body.len().min(writable.len() - OUT_HEADER_LEN)];
    let len = OUT_HEADER_LEN + body.len();
    writable.copy_from(0, &(len as u32).to_le_bytes());
    writable.copy_from(4, &error.to_le_bytes());
    writable.copy_from(8, &unique);
    writable.copy_from(OUT_HEADER_LEN, body);
    len
}
