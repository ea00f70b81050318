//! Virtio devices: what is done with a chain.
//!
//! | module | what it provides |
//! | --- | --- |
//! | [`fs`] | virtio-fs (virtio 1.3, 5.11) over a FUSE server |
//!
//! A [`VirtioDevice`] sees chains and answers them; it knows neither sockets nor rings.

pub mod fs;

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use crate::guest_mem::GuestMemory;
use crate::ring::chain::Chain;

/// How a device answers a chain.
pub enum Served {
    /// Answered; this many bytes were written.
    Done(usize),
    /// Under way; the future gives the bytes written.
    Pending(Pin<Box<dyn Future<Output = usize>>>),
    /// The chain has no room for any answer: the queue is broken.
    Unanswerable,
}

/// One device, as long as its socket exists; its frontends come and go.
pub trait VirtioDevice {
    /// Feature bits of the device type (0 to 23 and 50 to 127).
    fn features(&self) -> u64;

    /// Number of virtqueues.
    fn queue_count(&self) -> u16;

    /// The configuration space.
    fn config(&self) -> &[u8];

    /// Answers `chain` of queue number `queue`, whose segments lie in `memory`. Does not block.
    fn serve(&self, queue: u16, chain: &Chain, memory: &Rc<GuestMemory>) -> Served;

    /// Forgets everything that belongs to the present frontend. Requests under way end without effect on it.
    fn reset(&self);
}
