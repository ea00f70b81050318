//! Ending in an orderly way when the user or the system asks for it.
//!
//! The first SIGINT or SIGTERM is noticed between two device operations; a second one ends the program at once,
//! for a device that does not answer.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::failure::Status;

/// Whether a signal has come.
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes SIGINT and SIGTERM over.
    pub(crate) fn install() -> io::Result<Self> {
        let came = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the signal that sets the flag does not find it set.
            flag::register_conditional_shutdown(signal, Status::FsckCancelled as i32, came.clone())?;
            flag::register(signal, came.clone())?;
        }
        Ok(Self(came))
    }

    /// The result of `work`, or `None` when a signal came before it was there: then `work` is dropped where it waits.
    pub(crate) async fn before<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = pin!(work);
        poll_fn(|context| match self.0.load(Ordering::Relaxed) {
            true => Poll::Ready(None),
            false => work.as_mut().poll(context).map(Some),
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Context;

    #[test]
    fn work_that_waits_is_given_up_when_a_signal_comes() {
        let interrupt = Interrupt(Arc::default());
        let mut context = Context::from_waker(std::task::Waker::noop());
        let mut done = pin!(interrupt.before(async { 1 }));
        assert_eq!(done.as_mut().poll(&mut context), Poll::Ready(Some(1)));
        let mut waiting = pin!(interrupt.before(std::future::pending::<()>()));
        assert_eq!(waiting.as_mut().poll(&mut context), Poll::Pending);
        interrupt.0.store(true, Ordering::Relaxed);
        assert_eq!(waiting.as_mut().poll(&mut context), Poll::Ready(None));
    }
}
