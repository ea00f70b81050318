//! Event descriptors that frontends send, and the one set of descriptors that a poller sleeps on.
//!
//! Everything is edge-triggered: a descriptor reports once per change and nobody has to read it. So kick
//! descriptors are never read at all, which spares a system call per kick and makes it irrelevant whether
//! they block (UML's do).
//!
//! A descriptor that comes from a frontend is accepted only if it is of a kind that cannot make the poller
//! wait ([`Descriptor::check_events`]), and switched to non-blocking. (One hole is left: a frontend that switches
//! its own event descriptor back to blocking and fills its counter. Only a write through io_uring would close it.)

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use crate::descriptor::{Closer, Descriptor, DescriptorError};

/// Events taken from the kernel per call. Picked: more wait for the next turn.
const EVENTS_PER_CALL: usize = 64;

/// A descriptor by which the frontend is told something.
#[derive(Debug)]
pub struct EventFd(Descriptor);

impl EventFd {
    /// Takes a descriptor from a frontend.
    ///
    /// # Errors
    /// [`DescriptorError`].
    pub fn new(mut fd: Descriptor) -> Result<Self, DescriptorError> {
        fd.check_events()?;
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    /// Signals it. A full counter or pipe has been signalled already; a closed one has no listener.
    #[inline]
    pub fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_le_bytes());
    }
}

/// How a driver's kicks are noticed.
#[derive(Debug)]
pub enum Kick {
    /// A descriptor wakes the poller.
    Watched(WatchedFd),
    /// There is none: the ring has to be looked at.
    Polled,
}

impl Kick {
    /// Watches a descriptor from a frontend.
    ///
    /// # Errors
    /// [`DescriptorError`].
    pub fn watch(mut fd: Descriptor, events: &Rc<Events>) -> Result<Self, DescriptorError> {
        fd.check_events()?;
        Ok(Self::Watched(WatchedFd::input(fd, events, Key::WAKE)?))
    }
}

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    /// Nothing in particular: the poller looks at its queues anyway.
    pub const WAKE: Self = Self(0);

    /// The poller's own thing number `index`.
    pub fn of(index: usize) -> Self {
        Self(1 + index as u64)
    }

    /// The number given to [`Key::of`].
    pub fn index(self) -> Option<usize> {
        self.0.checked_sub(1).map(|index| index as usize)
    }
}

/// One change of a watched descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Event {
    /// What it is about.
    pub key: Key,
    /// The other side of a socket is gone entirely.
    pub hangup: bool,
}

/// A set of descriptors to sleep on.
#[derive(Debug)]
pub struct Events {
    epoll: OwnedFd,
    closer: Closer,
}

impl Events {
    /// An empty set.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn new() -> io::Result<Rc<Self>> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Rc::new(Self { epoll, closer: Closer::start()? }))
    }

    /// Who closes what frontends send.
    pub fn closer(&self) -> &Closer {
        &self.closer
    }

    fn add(&self, fd: BorrowedFd<'_>, key: Key, interest: epoll::EventFlags) -> rustix::io::Result<()> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(key.0), interest | epoll::EventFlags::ET)
    }

    /// Waits at most `timeout` (for ever without one) and puts what happened into `happened`.
    ///
    /// # Errors
    /// What the kernel reports, except interruption by a signal.
    pub fn wait(&self, timeout: Option<Duration>, happened: &mut Vec<Event>) -> io::Result<()> {
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        let mut raw = [const { MaybeUninit::uninit() }; EVENTS_PER_CALL];
        happened.clear();
        match epoll::wait(&self.epoll, &mut raw, timeout.as_ref()) {
            Ok((raw, _)) => happened.extend(raw.iter().map(|event| Event {
                key: Key(event.data.u64()),
                hangup: { event.flags }.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR),
            })),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// A descriptor in a set; it leaves the set when dropped. (Closing alone would not do: the frontend holds the
/// same open file.)
#[derive(Debug)]
pub struct WatchedFd {
    fd: Descriptor,
    events: Rc<Events>,
}

impl WatchedFd {
    /// Watches `fd` for input.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn input(fd: impl Into<Descriptor>, events: &Rc<Events>, key: Key) -> rustix::io::Result<Self> {
        Self::new(fd.into(), events, key, epoll::EventFlags::IN)
    }

    /// Watches a socket for input, room for output, and its end.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn stream(fd: Descriptor, events: &Rc<Events>, key: Key) -> rustix::io::Result<Self> {
        Self::new(fd, events, key, epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP)
    }

    fn new(
        fd: Descriptor,
        events: &Rc<Events>,
        key: Key,
        interest: epoll::EventFlags,
    ) -> rustix::io::Result<Self> {
        events.add(fd.as_fd(), key, interest)?;
        Ok(Self { fd, events: events.clone() })
    }
}

impl AsFd for WatchedFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for WatchedFd {
    fn drop(&mut self) {
        if let Err(error) = epoll::delete(&self.events.epoll, &self.fd) {
            tracing::error!(fd = self.fd.as_fd().as_raw_fd(), %error, "descriptor cannot leave the poll set");
        }
    }
}
