//! The FUSE wire protocol over `blobfs`. Knows no transport: a [`Request`] is memory to read and memory for
//! the reply, whether it came over a virtqueue or out of `/dev/fuse`.
//!
//! | module | what it provides |
//! | --- | --- |
//! | `abi` | the kernel's structs and constants under their kernel names |
//! | `op` | the table of opcodes: one line each |
//! | `decode` | the one place where lengths, names and offsets of the client are checked |
//! | `map` | a short function per opcode: arguments -> `blobfs` call -> reply |
//! | `reply` | replies in the wire's form |
//! | `session` | a client: INIT, node ids, reset |
//! | `errno` | errors as error numbers |
//!
//! # How a request waits
//!
//! A function of `map` calls `blobfs` at once. What is answered from memory is answered in the same call,
//! without a task. Only a call that returns a wait becomes a future ([`Handled::Pending`]): it satisfies the
//! wait, calls again with the same decoded arguments, and encodes the reply.
//!
//! # Invariants
//!
//! - Whatever the client sent, nothing panics, and nothing outside the export is reached: node 1 is the
//!   export's root, and every other node must have been given to the client before.
//! - A future of a session that was reset meanwhile writes no reply. One that waits to call `blobfs` again does not
//!   call any more, so that no name and no lookup changes afterwards. READ, WRITE, FSYNC, SYNCFS, FALLOCATE and
//!   large attribute values are one call that waits inside `blobfs` and goes on to its end: what the client asked to
//!   be written before it left is still written.

mod abi;
mod decode;
mod errno;
mod map;
mod op;
mod reply;
mod session;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::pin::Pin;

use bdev::IoBuffers;

use errno::Errno;
use reply::Reply;

pub use session::{CachePolicy, Export, Session};

/// One FUSE request in the client's memory.
pub struct Request {
    /// Header and arguments.
    pub readable: IoBuffers,
    /// Room for the reply.
    pub writable: IoBuffers,
}

impl Request {
    /// Answers a request that did not arrive whole (its parts before a defect did) with an error number of the
    /// kernel, as far as it can be told what it was: one without a reply is left out, and so is one of an unknown
    /// kind that has no room for a reply.
    #[cold]
    pub fn refuse(&self, errno: i32) -> Handled {
        let head = decode::head(&self.readable);
        let one_way = match head.opcode {
            Some(opcode) => op::is_one_way(opcode),
            None => self.writable.is_empty(),
        };
        if one_way {
            return Handled::NoReply;
        }
        if self.writable.len() < reply::HEADER_LEN {
            return Handled::Unanswerable;
        }
        let reply = Reply { writable: &self.writable, unique: head.unique };
        Handled::Done(reply.error(Errno(errno)))
    }
}

/// What became of a request.
pub enum Handled {
    /// A reply of this many bytes lies in `writable`.
    Done(usize),
    /// The request has no reply (FORGET, BATCH_FORGET, or it asked for none).
    NoReply,
    /// The request waits for the device; the future gives the reply's length, 0 when the session was reset
    /// meanwhile.
    Pending(Pin<Box<dyn Future<Output = usize>>>),
    /// Not even a reply header finds room.
    Unanswerable,
}
