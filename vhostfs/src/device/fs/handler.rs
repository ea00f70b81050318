//! What the device asks of a FUSE server.

use std::future::Future;
use std::pin::Pin;

use bdev::IoBuffers;

/// One FUSE request in guest memory.
pub struct Request {
    /// Header and arguments.
    pub readable: IoBuffers,
    /// Room for the reply.
    pub writable: IoBuffers,
}

/// What became of a request.
pub enum Handled {
    /// A reply of this many bytes lies in `writable`.
    Done(usize),
    /// The request has no reply (FORGET, BATCH_FORGET).
    NoReply,
    /// The request waits for the device; the future gives the reply's length.
    Pending(Pin<Box<dyn Future<Output = usize>>>),
    /// Not even a reply header finds room, or the request has no whole header.
    Unanswerable,
}

/// A FUSE server: one session, as long as the device exists.
pub trait FuseHandler: 'static {
    /// Handles one request. Never blocks, and never panics whatever the guest sent.
    fn handle(&self, request: Request) -> Handled;

    /// Drops what the guest holds: lookups, pins, locks. Requests under way write nothing any more.
    fn reset(&self);
}
