//! io_uring: the one way in which a reactor waits for the kernel.
//!
//! Operations are queued without a system call; the whole batch goes to the kernel once per turn
//! ([`Driver::submit`]). Completions are read from shared memory; the kernel is entered for them only when
//! it says that it has deferred work. [`Driver::park`] is one `io_uring_enter` that submits and waits.
//! A poller with its own set of descriptors sleeps on [`Uring::wake_fd`], which is signalled only while the
//! poller says that it sleeps.
//!
//! Left to others: what the operations mean ([`Client`]).
//!
//! Invariants:
//! - an operation's slot is taken from queueing until its last completion; its number is the `user_data`, so
//!   no completion meets another operation;
//! - the client of an operation stays alive as long as the operation, and with it the memory that the kernel
//!   uses; [`Driver::close`] waits for the end of all of them;
//! - no borrow is held while a client runs.

#![expect(unsafe_code, reason = "submission entries carry raw addresses")]

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{Ordering, fence};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};
use rustix::event::{EventfdFlags, eventfd};

use crate::executor::Driver;

/// Who is told about the end of an operation.
pub trait Client {
    /// The operation that was queued with `token` has ended with `result`: as the system call of the same
    /// name, or minus an error number.
    fn complete(&self, token: u32, result: i32);
}

/// Who carries out an operation inside the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// The device, its interrupts and this thread.
    Device,
    /// A thread of the kernel as well, behind the device or in place of it.
    Thread,
}

/// Completions that fit the ring, per submission entry. Operations under way may outnumber the entries of
/// the submission queue; beyond this the kernel keeps completions in its own memory, at a cost.
const COMPLETIONS_PER_ENTRY: u32 = 4;

/// Marks completions of cancellations, which nobody waits for.
const CANCELLATION: u64 = u64::MAX;

/// An io_uring instance as the driver of one reactor.
pub struct Uring {
    ring: RefCell<IoUring>,
    /// Entries that found the submission queue full.
    backlog: RefCell<VecDeque<Entry>>,
    slots: RefCell<Slots>,
    /// Completions on their way from the ring to their clients; kept for its allocation.
    reaped: RefCell<Vec<(u64, i32)>>,
    /// Signalled at completions between [`Driver::arm`] and [`Driver::disarm`].
    wake: OnceCell<OwnedFd>,
}

struct Operation {
    client: Rc<dyn Client>,
    token: u32,
    carrier: Carrier,
}

#[derive(Default)]
struct Slots {
    operations: Vec<Option<Operation>>,
    free: Vec<u32>,
    /// Operations that are with a [`Carrier::Thread`].
    in_threads: usize,
}

impl Slots {
    fn take(&mut self, operation: Operation) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.operations.push(None);
            (self.operations.len() - 1) as u32
        });
        self.in_threads += usize::from(operation.carrier == Carrier::Thread);
        self.operations[index as usize] = Some(operation);
        index
    }

    fn release(&mut self, user_data: u64) -> Option<Operation> {
        let index = u32::try_from(user_data).ok()?;
        let operation = self.operations.get_mut(index as usize)?.take()?;
        self.in_threads -= usize::from(operation.carrier == Carrier::Thread);
        self.free.push(index);
        Some(operation)
    }

    fn in_flight(&self) -> usize {
        self.operations.len() - self.free.len()
    }
}

impl Uring {
    /// A ring with room for `entries` operations per submission. It belongs to the calling thread.
    ///
    /// # Errors
    /// When the kernel has no io_uring, or does not let this process have one.
    pub fn new(entries: u32) -> io::Result<Rc<Self>> {
        Ok(Rc::new(Self {
            ring: RefCell::new(build(entries)?),
            backlog: RefCell::default(),
            slots: RefCell::default(),
            reaped: RefCell::default(),
            wake: OnceCell::new(),
        }))
    }

    /// An event descriptor for a poller that sleeps on several descriptors, edge-triggered, between
    /// [`Driver::arm`] and [`Driver::disarm`]. (The ring's own descriptor would not do: as long as completions
    /// wait for this thread to ask for them, it does not wake who polls it.)
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn wake_fd(&self) -> io::Result<BorrowedFd<'_>> {
        if self.wake.get().is_none() {
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            let mut ring = self.ring.borrow_mut();
            ring.completion().disable_eventfd();
            ring.submitter().register_eventfd(fd.as_raw_fd())?;
            drop(ring);
            let _ = self.wake.set(fd);
        }
        Ok(self.wake.get().expect("was set").as_fd())
    }

    /// Queues an operation for the next submission; `client` hears of its end, with `token`. Returns a
    /// number that [`Uring::cancel`] takes as long as the operation has not ended.
    ///
    /// # Safety
    /// All memory that the entry names must stay valid, and be written by nobody else where the kernel
    /// writes, until the operation has ended. The client may own that memory: it is kept as long.
    pub unsafe fn queue(&self, entry: Entry, client: Rc<dyn Client>, token: u32, carrier: Carrier) -> u32 {
        let index = self.slots.borrow_mut().take(Operation { client, token, carrier });
        self.push(entry.user_data(u64::from(index)));
        index
    }

    /// Asks the kernel to end an operation early; its client is told as usual.
    pub fn cancel(&self, operation: u32) {
        self.push(opcode::AsyncCancel::new(u64::from(operation)).build().user_data(CANCELLATION));
    }

    /// A future that is ready once `fd` is readable, has hung up or has an error.
    pub fn readable<'fd>(self: &Rc<Self>, fd: BorrowedFd<'fd>) -> Readable<'fd> {
        Readable { uring: self.clone(), fd, poll: None }
    }

    fn push(&self, entry: Entry) {
        let mut backlog = self.backlog.borrow_mut();
        if !backlog.is_empty() {
            backlog.push_back(entry);
            return;
        }
        // SAFETY: `queue`'s contract keeps what the entry names valid; the entries of this module name
        // nothing.
        if unsafe { self.ring.borrow_mut().submission().push(&entry) }.is_err() {
            backlog.push_back(entry);
        }
    }

    /// Moves entries from the backlog to the submission queue. Returns whether some are left.
    fn refill(&self, ring: &mut IoUring) -> bool {
        let mut backlog = self.backlog.borrow_mut();
        let mut queue = ring.submission();
        while let Some(entry) = backlog.front() {
            // SAFETY: as in `push`.
            if unsafe { queue.push(entry) }.is_err() {
                return true;
            }
            backlog.pop_front();
        }
        false
    }

    /// Gives everything that is queued to the kernel.
    fn flush(&self) {
        let mut ring = self.ring.borrow_mut();
        loop {
            let left = self.refill(&mut ring);
            if ring.submission().is_empty() || !entered(&ring.submit()) || !left {
                return;
            }
        }
    }

    /// Hands completions to their clients. Returns whether there were any.
    fn reap(&self) -> bool {
        let mut reaped = self.reaped.take();
        reaped.extend(self.ring.borrow_mut().completion().map(|entry| (entry.user_data(), entry.result())));
        let any = !reaped.is_empty();
        for (user_data, result) in reaped.drain(..) {
            let operation = self.slots.borrow_mut().release(user_data);
            if let Some(Operation { client, token, .. }) = operation {
                client.complete(token, result);
            }
        }
        *self.reaped.borrow_mut() = reaped;
        any
    }

    /// Enters the kernel if it has work of this ring that only this thread can do.
    fn run_deferred(&self) {
        let mut ring = self.ring.borrow_mut();
        let queue = ring.submission();
        let needed = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        if needed {
            entered(&ring.submit());
        }
    }

    fn wait(&self, timeout: Option<Duration>) {
        let mut ring = self.ring.borrow_mut();
        self.refill(&mut ring);
        let entered_for = match timeout {
            None => ring.submit_and_wait(1),
            Some(timeout) => {
                let time = Timespec::new().sec(timeout.as_secs()).nsec(timeout.subsec_nanos());
                ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
            }
        };
        entered(&entered_for);
    }
}

/// Whether the kernel took what was queued. If not, it stays queued for the next turn: completions have to
/// be reaped first (EBUSY), memory is short (EAGAIN, ENOMEM), a signal or the end of a wait came between.
fn entered(result: &io::Result<usize>) -> bool {
    let Err(error) = result else { return true };
    match error.raw_os_error() {
        Some(libc::EBUSY | libc::EAGAIN | libc::ENOMEM | libc::EINTR | libc::ETIME) => false,
        // Anything else is a broken ring: the descriptor closed or taken by another thread.
        _ => panic!("io_uring_enter: {error}"),
    }
}

/// The newest features that the kernel has: completions wait for this thread to ask for them instead of
/// interrupting it (6.1), or at least do not interrupt it (5.19).
fn build(entries: u32) -> io::Result<IoUring> {
    let base = || {
        let mut builder = IoUring::builder();
        builder.setup_clamp().setup_cqsize(entries.saturating_mul(COMPLETIONS_PER_ENTRY).next_power_of_two());
        builder
    };
    base()
        .setup_submit_all()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .build(entries)
        .or_else(|_| base().setup_submit_all().setup_coop_taskrun().setup_taskrun_flag().build(entries))
        .or_else(|_| base().build(entries))
}

impl Driver for Uring {
    fn poll(&self) -> bool {
        self.run_deferred();
        self.reap()
    }

    fn submit(&self) {
        self.flush();
    }

    fn in_flight(&self) -> usize {
        self.slots.borrow().in_flight()
    }

    fn waits_for_threads(&self) -> bool {
        self.slots.borrow().in_threads > 0
    }

    fn park(&self, timeout: Option<Duration>) {
        self.wait(timeout);
    }

    fn arm(&self) -> bool {
        let mut ring = self.ring.borrow_mut();
        ring.completion().enable_eventfd();
        // A completion sees the flag, or is seen here.
        fence(Ordering::SeqCst);
        let queue = ring.submission();
        let deferred = queue.taskrun() || queue.cq_overflow();
        drop(queue);
        deferred || !ring.completion().is_empty()
    }

    fn disarm(&self) {
        self.ring.borrow_mut().completion().disable_eventfd();
    }

    /// Ends polls at once and waits for everything else: the kernel may be using memory.
    fn close(&self) {
        let operations = self.slots.borrow().operations.len() as u32;
        for operation in 0..operations {
            if self.slots.borrow().operations[operation as usize].is_some() {
                self.cancel(operation);
            }
        }
        while self.in_flight() > 0 {
            self.flush();
            if !self.reap() {
                self.wait(None);
            }
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        // Clients usually own this ring, so nothing is under way here unless a client owns nothing.
        self.close();
    }
}

/// Future of [`Uring::readable`]. Dropping it ends the poll.
pub struct Readable<'fd> {
    uring: Rc<Uring>,
    fd: BorrowedFd<'fd>,
    poll: Option<(u32, Rc<PollState>)>,
}

#[derive(Default)]
struct PollState {
    done: Cell<bool>,
    waiter: RefCell<Option<Waker>>,
}

impl Client for PollState {
    fn complete(&self, _token: u32, _result: i32) {
        self.done.set(true);
        let waiter = self.waiter.take();
        if let Some(waker) = waiter {
            waker.wake();
        }
    }
}

impl Future for Readable<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.poll.is_none() {
            let state = Rc::<PollState>::default();
            let entry = opcode::PollAdd::new(Fd(self.fd.as_raw_fd()), libc::POLLIN as u32).build();
            // SAFETY: a poll names no memory.
            let operation = unsafe { self.uring.queue(entry, state.clone(), 0, Carrier::Device) };
            self.poll = Some((operation, state));
        }
        let Some((_, state)) = &self.poll else { return Poll::Pending };
        if state.done.get() {
            return Poll::Ready(());
        }
        *state.waiter.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Readable<'_> {
    fn drop(&mut self) {
        if let Some((operation, state)) = self.poll.take()
            && !state.done.get()
        {
            self.uring.cancel(operation);
        }
    }
}

#[cfg(test)]
mod tests;
