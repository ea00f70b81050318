//! The one thread that everything of a file system runs on.
//!
//! A [`Reactor`] owns a slab of tasks, a timer queue and a list of [`Driver`]s (io_uring, vhost-user
//! sockets, virtqueues). One [`Reactor::turn`] reaps the drivers, fires timers and runs the tasks that
//! became ready, then lets the drivers submit what was queued; nothing in it blocks. All state has one owner thread, so nothing here takes a lock:
//! handles are `Rc`, wakers push a task number on a thread-local queue of their reactor. Another thread
//! reaches a reactor only through a [`RemoteWaker`].
//!
//! Left to others: what the tasks do, and the choice between spinning and sleeping (the daemon's poller).
//!
//! Invariants:
//! - a task is polled only from `turn`, never from inside another task's poll (`block_on` there panics);
//! - a waker of a finished task is harmless (task numbers carry a serial of the thread), also after its
//!   reactor has gone and another one has taken its place;
//! - a reactor that is dropped drops its tasks, then waits for the operations of its drivers;
//! - time comes from the injected [`Clock`] alone, so a test that brings a [`VirtualClock`] is exact.

mod clock;
mod executor;
mod remote;
pub mod sync;
pub mod uring;

pub use clock::{Clock, SystemClock, VirtualClock};
pub use executor::{Driver, JoinHandle, Reactor, Sleep};
pub use remote::{RemoteEvent, RemoteWaker};
