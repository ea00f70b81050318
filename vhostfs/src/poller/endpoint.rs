//! One device and whoever is its frontend at the moment.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use reactor::Reactor;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use crate::descriptor::Descriptor;
use crate::device::VirtioDevice;
use crate::events::{Event, Events, Key, WatchedFd};
use crate::log_limit::LogLimit;
use crate::ring::chain::Chain;
use crate::vhost_user::session::{Session, SessionEnd};

/// Where a device's frontends come from.
#[derive(Debug)]
pub enum Source {
    /// A listening socket, non-blocking. While one frontend is connected, others wait in its backlog.
    Listener(OwnedFd),
    /// The one frontend that is connected already.
    Connected(OwnedFd),
}

/// What happens when a frontend leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tenure {
    /// The next one is served.
    Successive,
    /// The endpoint is finished.
    Once,
}

pub(super) struct Endpoint {
    device: Rc<dyn VirtioDevice>,
    listener: Option<WatchedFd>,
    /// The listener may have a connection; cleared when it says that it has none.
    acceptable: bool,
    session: Option<Session>,
    session_key: Key,
    tenure: Tenure,
    limit: Rc<LogLimit>,
    /// Queue to begin the next turn with.
    first: usize,
}

impl Endpoint {
    pub(super) fn new(
        device: Rc<dyn VirtioDevice>,
        source: Source,
        tenure: Tenure,
        events: &Rc<Events>,
        (listener_key, session_key): (Key, Key),
    ) -> io::Result<Self> {
        let mut endpoint = Self {
            device,
            listener: None,
            acceptable: true,
            session: None,
            session_key,
            tenure,
            limit: Rc::default(),
            first: 0,
        };
        match source {
            Source::Listener(fd) => {
                let listener = Descriptor::foreign(fd, events.closer());
                endpoint.listener = Some(WatchedFd::input(listener, events, listener_key)?);
            }
            Source::Connected(fd) => endpoint.connect(fd, events).map_err(io::Error::other)?,
        }
        Ok(endpoint)
    }

    fn connect(&mut self, socket: OwnedFd, events: &Rc<Events>) -> Result<(), SessionEnd> {
        self.session = Some(Session::new(socket, &self.device, events, self.session_key, &self.limit)?);
        if self.limit.allows() {
            tracing::info!("frontend connected");
        }
        Ok(())
    }

    /// Whether requests are under way.
    pub(super) fn is_busy(&self) -> bool {
        self.session.as_ref().is_some_and(Session::is_busy)
    }

    /// Whether there is no frontend and there will be none.
    pub(super) fn is_finished(&self) -> bool {
        self.session.is_none() && self.listener.is_none()
    }

    /// An event of one of the sockets.
    pub(super) fn notice(&mut self, event: &Event) {
        if event.key != self.session_key {
            self.acceptable = true;
            return;
        }
        let Some(session) = &mut self.session else { return };
        session.set_readable();
        if event.hangup {
            // Also while a message waits: nobody is there to be answered.
            self.end_session(None);
        }
    }

    pub(super) fn check_memory(&mut self) {
        if let Some(Err(end)) = self.session.as_ref().map(Session::check_memory) {
            self.end_session(Some(end));
        }
    }

    fn end_session(&mut self, end: Option<SessionEnd>) {
        self.session = None;
        if self.tenure == Tenure::Once {
            self.listener = None;
        }
        if !self.limit.allows() {
            return;
        }
        match end {
            None | Some(SessionEnd::Connection(crate::vhost_user::connection::ConnectionError::Closed)) => {
                tracing::info!("frontend disconnected");
            }
            Some(end) => tracing::warn!("frontend disconnected: {end}"),
        }
    }

    /// Accepts a frontend, or handles the messages of the one that is there. Returns whether anything happened.
    pub(super) fn attend(&mut self, events: &Rc<Events>, stopping: bool) -> bool {
        match &mut self.session {
            Some(session) => match session.handle_messages() {
                Ok(any) => any,
                Err(end) => {
                    self.end_session(Some(end));
                    true
                }
            },
            None => !stopping && self.acceptable && self.accept(events),
        }
    }

    fn accept(&mut self, events: &Rc<Events>) -> bool {
        let Some(listener) = &self.listener else { return false };
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                if let Err(end) = self.connect(socket, events) {
                    self.end_session(Some(end));
                }
                true
            }
            Err(Errno::INTR | Errno::CONNABORTED) => true,
            Err(error) => {
                self.acceptable = false;
                if error != Errno::AGAIN && self.limit.allows() {
                    tracing::warn!(%error, "a frontend cannot be accepted");
                }
                false
            }
        }
    }

    /// Takes a turn's share from each queue, beginning with another one each time.
    pub(super) fn take_requests(&mut self, reactor: &Reactor, chain: &mut Chain) -> bool {
        let Some(session) = &self.session else { return false };
        let count = session.queues().len();
        let mut busy = false;
        for offset in 0..count {
            busy |= session.process_queue((self.first + offset) % count, reactor, chain);
        }
        self.first = (self.first + 1) % count.max(1);
        busy
    }

    fn queues(&self) -> impl Iterator<Item = &Rc<crate::queue::Queue>> {
        self.session.iter().flat_map(|session| session.queues())
    }

    pub(super) fn publish(&self) {
        self.queues().for_each(|queue| queue.publish());
    }

    /// Asks for kicks. Returns whether there is something to do first.
    pub(super) fn prepare_sleep(&self) -> bool {
        let mut wakeful = match &self.session {
            Some(session) => session.has_messages(),
            None => self.acceptable && self.listener.is_some(),
        };
        for queue in self.queues() {
            wakeful |= queue.prepare_sleep();
        }
        wakeful
    }

    pub(super) fn finish_sleep(&self) {
        self.queues().for_each(|queue| queue.finish_sleep());
    }

    pub(super) fn needs_polling(&self) -> bool {
        self.queues().any(|queue| queue.needs_polling())
    }
}
