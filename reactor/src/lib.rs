//! The one thread that everything of a file system runs on.
//!
//! A [`Reactor`] owns a slab of tasks, a timer queue and a list of [`Driver`]s (io_uring, vhost-user
//! sockets, virtqueues). One [`Reactor::turn`] reaps the drivers, fires timers and runs the tasks that
//! became ready; nothing in it blocks. All state has one owner thread, so nothing here takes a lock:
//! handles are `Rc`, wakers push a task number on a thread-local queue.
//!
//! Left to others: what the tasks do, and the choice between spinning and sleeping (the daemon's poller).
//!
//! Invariants:
//! - a task is polled only from `turn`, never from inside another task's poll;
//! - a waker of a finished task is harmless (task numbers carry a generation);
//! - time comes from the injected [`Clock`] alone, so a test that brings a [`VirtualClock`] is exact.

mod clock;
mod executor;
pub mod sync;

pub use clock::{Clock, SystemClock, VirtualClock};
pub use executor::{Driver, JoinHandle, Reactor, Sleep};
