//! Waiting for each other on one thread.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

/// A list of tasks that wait for "something changed".
///
/// Whoever changes the state calls [`Notify::notify_all`]; whoever waits checks its condition again after
/// each wake-up. A wait that began before the notification never misses it.
#[derive(Clone, Default)]
pub struct Notify {
    inner: Rc<NotifyInner>,
}

#[derive(Default)]
struct NotifyInner {
    round: Cell<u64>,
    waiters: RefCell<Vec<Waker>>,
}

impl Notify {
    /// A list without waiters.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes everybody who waits now.
    pub fn notify_all(&self) {
        self.inner.round.set(self.inner.round.get() + 1);
        for waker in self.inner.waiters.take() {
            waker.wake();
        }
    }

    /// A future that is ready after the next [`Notify::notify_all`] that follows this call.
    pub fn notified(&self) -> Notified {
        Notified { inner: self.inner.clone(), round: self.inner.round.get() }
    }
}

/// Future of [`Notify::notified`].
pub struct Notified {
    inner: Rc<NotifyInner>,
    round: u64,
}

impl Future for Notified {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.inner.round.get() != self.round {
            return Poll::Ready(());
        }
        let mut waiters = self.inner.waiters.borrow_mut();
        if !waiters.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiters.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

/// Lets other tasks run before going on: between the slices of long work.
pub async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Waits for all of `futures`, polling each to its end; results keep their order.
pub async fn join_all<F: Future>(futures: impl IntoIterator<Item = F>) -> Vec<F::Output> {
    let mut pending: Vec<_> = futures.into_iter().map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|cx| {
        let mut all = true;
        for (future, result) in &mut pending {
            if result.is_none() {
                match future.as_mut().poll(cx) {
                    Poll::Ready(value) => *result = Some(value),
                    Poll::Pending => all = false,
                }
            }
        }
        if all { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    pending.into_iter().filter_map(|(_, result)| result).collect()
}
