//! Events from other threads. Nothing else of a reactor may be touched by them.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use crate::uring::Uring;

/// The reactor's end: waits for [`RemoteWaker::wake`].
pub struct RemoteEvent {
    uring: Rc<Uring>,
    fd: Arc<OwnedFd>,
}

/// The other threads' end.
#[derive(Clone)]
pub struct RemoteWaker {
    fd: Arc<OwnedFd>,
}

impl RemoteEvent {
    /// An event that has not happened, with one waker for it.
    ///
    /// # Errors
    /// When the process has no descriptors left.
    pub fn new(uring: &Rc<Uring>) -> io::Result<(Self, RemoteWaker)> {
        let fd = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        Ok((Self { uring: uring.clone(), fd: fd.clone() }, RemoteWaker { fd }))
    }

    /// Waits until a waker was used since the last wait. Several uses may count as one.
    pub async fn wait(&self) {
        // A read takes the whole count; it fails only when there is none.
        while rustix::io::read(&*self.fd, &mut [0; 8]).is_err() {
            self.uring.readable(self.fd.as_fd()).await;
        }
    }
}

impl RemoteWaker {
    /// Makes the event happen. Callable from any thread; never blocks.
    pub fn wake(&self) {
        // Any count does. The only error is a full counter: then the event has happened long since.
        let _ = rustix::io::write(&*self.fd, &[1; 8]);
    }
}
