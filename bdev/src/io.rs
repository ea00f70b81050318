//! The future of one device operation, and the side that completes it.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::BdevError;

enum State {
    Pending(Option<Waker>),
    Done(Result<(), BdevError>),
}

/// A device operation under way. Ready with the operation's result; dropping it does not cancel anything.
#[must_use = "an I/O's result decides what is durable"]
pub struct Io(Inner);

enum Inner {
    Ready(Result<(), BdevError>),
    Shared(Rc<RefCell<State>>),
}

impl Io {
    /// An operation that has already ended.
    pub fn ready(result: Result<(), BdevError>) -> Self {
        Self(Inner::Ready(result))
    }

    /// An operation and the handle that a device ends it with.
    pub fn pending() -> (Self, Completion) {
        let state = Rc::new(RefCell::new(State::Pending(None)));
        (Self(Inner::Shared(state.clone())), Completion(Some(state)))
    }

    /// The result, when the operation has ended.
    pub fn try_result(&self) -> Option<Result<(), BdevError>> {
        match &self.0 {
            Inner::Ready(result) => Some(*result),
            Inner::Shared(state) => match &*state.borrow() {
                State::Done(result) => Some(*result),
                State::Pending(_) => None,
            },
        }
    }
}

impl Future for Io {
    type Output = Result<(), BdevError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &self.0 {
            Inner::Ready(result) => Poll::Ready(*result),
            Inner::Shared(state) => match &mut *state.borrow_mut() {
                State::Done(result) => Poll::Ready(*result),
                State::Pending(waker) => {
                    *waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            },
        }
    }
}

/// The device's side of an [`Io`]. Dropped without [`Completion::complete`], the operation fails with
/// [`BdevError::Gone`]: no waiter hangs because a device went away.
pub struct Completion(Option<Rc<RefCell<State>>>);

impl Completion {
    /// Ends the operation and wakes whoever waits for it.
    pub fn complete(mut self, result: Result<(), BdevError>) {
        self.finish(result);
    }

    fn finish(&mut self, result: Result<(), BdevError>) {
        let Some(state) = self.0.take() else { return };
        let before = std::mem::replace(&mut *state.borrow_mut(), State::Done(result));
        if let State::Pending(Some(waker)) = before {
            waker.wake();
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        self.finish(Err(BdevError::Gone));
    }
}
