//! virtio-fs (virtio 1.3, 5.11): queue 0 is the high-priority queue, the others carry requests.
//!
//! A chain's readable part is a FUSE request, its writable part is room for the reply. What a request means
//! is up to the [`FuseHandler`]; here a chain becomes a [`Request`], and a chain that is not intact is answered
//! with an error where its reply header finds room.

use std::rc::Rc;

use bdev::IoBuffers;

use super::{Served, VirtioDevice};
use crate::guest_mem::GuestMemory;
use crate::ring::chain::{Chain, ChainFault};

mod handler;

pub use handler::{FuseHandler, Handled, Request};

/// Length of the tag in the configuration space (virtio 1.3, 5.11.4).
pub const TAG_LEN: usize = 36;

/// Request queues that a device may have. QEMU accepts up to 1024 and Linux uses one per CPU; a bound on what
/// the poller looks at in each turn, and eight bits for the queue number in vhost-user's messages.
pub const REQUEST_QUEUES_MAX: u16 = 128;

/// Why a device was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FsDeviceError {
    /// The tag is empty or too long.
    #[error("tag is {len} bytes long, 1 to {TAG_LEN} are possible")]
    Tag {
        /// Its length.
        len: usize,
    },
    /// No request queue, or too many.
    #[error("{count} request queues, 1 to {REQUEST_QUEUES_MAX} are possible")]
    RequestQueues {
        /// Their number.
        count: u16,
    },
}

/// A virtio-fs device.
pub struct FsDevice<H> {
    handler: H,
    /// `struct virtio_fs_config`: tag, then the number of request queues.
    config: [u8; TAG_LEN + 4],
    queue_count: u16,
}

impl<H: FuseHandler> FsDevice<H> {
    /// A device that guests mount by `tag`.
    ///
    /// # Errors
    /// [`FsDeviceError`].
    pub fn new(handler: H, tag: &str, request_queues: u16) -> Result<Self, FsDeviceError> {
        if tag.is_empty() || tag.len() > TAG_LEN {
            return Err(FsDeviceError::Tag { len: tag.len() });
        }
        if request_queues == 0 || request_queues > REQUEST_QUEUES_MAX {
            return Err(FsDeviceError::RequestQueues { count: request_queues });
        }
        let mut config = [0; TAG_LEN + 4];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_LEN..].copy_from_slice(&u32::from(request_queues).to_le_bytes());
        Ok(Self { handler, config, queue_count: 1 + request_queues })
    }
}

impl<H: FuseHandler> VirtioDevice for FsDevice<H> {
    fn features(&self) -> u64 {
        0
    }

    fn queue_count(&self) -> u16 {
        self.queue_count
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    #[inline]
    fn serve(&self, _queue: u16, chain: &Chain, memory: &Rc<GuestMemory>) -> Served {
        let readable = IoBuffers::new(chain.readable().iter().copied(), memory.clone());
        let writable = IoBuffers::new(chain.writable().iter().copied(), memory.clone());
        let request = Request { readable, writable };
        let handled = match chain.fault() {
            None => self.handler.handle(request),
            Some(fault) => refuse(&request, chain, fault),
        };
        match handled {
            Handled::Done(len) => Served::Done(len),
            Handled::NoReply => Served::Done(0),
            Handled::Pending(reply) => Served::Pending(reply),
            Handled::Unanswerable => Served::Unanswerable,
        }
    }

    fn reset(&self) {
        self.handler.reset();
    }
}

/// Answers a chain of which only the parts before a defect are there.
#[cold]
fn refuse(request: &Request, chain: &Chain, fault: ChainFault) -> Handled {
    // An answer was asked for where none can be placed, whatever the request was.
    if request.writable.is_empty() && chain.has_writable() {
        return Handled::Unanswerable;
    }
    request.refuse(match fault {
        ChainFault::Address => libc::EFAULT,
        ChainFault::Order => libc::EINVAL,
    })
}
