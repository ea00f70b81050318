//! The loop that everything of one thread runs in.
//!
//! One turn: messages of frontends; a bounded share of chains from each queue, in rotation; one turn of the
//! reactor (completions, timers, ready tasks, submission); then all answers are published, with at most one
//! notification per queue. Nothing in a turn blocks, so a slow, silent or malicious frontend costs the
//! others no more than its share.
//!
//! Between turns without work the poller spins or sleeps ([`PollMode`]). Before it sleeps, it asks every ring
//! for kicks and looks once more; it sleeps in one system call on everything that can wake it.

mod endpoint;
mod pace;

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use reactor::Reactor;

use crate::device::VirtioDevice;
use crate::events::{Event, Events, Key, WatchedFd};
use crate::guest_mem::fault_count;
use crate::ring::chain::Chain;
use endpoint::Endpoint;
pub use endpoint::{Source, Tenure};
use pace::{Pace, Rest};

/// Turns between two looks at sockets and signals while there is work: their latency under load, against one
/// system call. Picked: some ten microseconds against less than a nanosecond per request.
const TURNS_PER_LOOK: u32 = 64;

/// How long to sleep at most while a ring has no kick descriptor.
const KICKLESS_SLEEP: Duration = Duration::from_millis(1);

/// What the poller does when there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PollMode {
    /// Spins while there is work, sleeps when idle.
    #[default]
    Adaptive,
    /// Never sleeps.
    Busy,
    /// Sleeps at once.
    Interrupt,
}

/// Keys of the poller's own descriptors: the stop signal, then two per endpoint.
const STOP_KEY: usize = 0;

fn listener_key(endpoint: usize) -> Key {
    Key::of(1 + endpoint * 2)
}

fn session_key(endpoint: usize) -> Key {
    Key::of(2 + endpoint * 2)
}

/// One thread's devices and their frontends.
pub struct Poller {
    reactor: Rc<Reactor>,
    events: Rc<Events>,
    watched: Vec<WatchedFd>,
    endpoints: Vec<Endpoint>,
    pace: Pace,
    stopping: bool,
    /// Endpoint to begin the next turn with.
    first: usize,
    turns_to_look: u32,
    faults_seen: u64,
    chain: Chain,
    happened: Vec<Event>,
}

impl Poller {
    /// A poller without devices.
    ///
    /// # Errors
    /// When the kernel refuses a poll set.
    pub fn new(reactor: Rc<Reactor>, mode: PollMode) -> io::Result<Self> {
        Ok(Self {
            reactor,
            events: Events::new()?,
            watched: Vec::new(),
            endpoints: Vec::new(),
            pace: Pace::new(mode),
            stopping: false,
            first: 0,
            turns_to_look: 0,
            faults_seen: fault_count(),
            chain: Chain::new(),
            happened: Vec::new(),
        })
    }

    /// Adds a device, whose frontends come from `source`.
    ///
    /// # Errors
    /// When the kernel refuses to watch the socket.
    pub fn add_device(
        &mut self,
        device: Rc<dyn VirtioDevice>,
        source: Source,
        tenure: Tenure,
    ) -> io::Result<()> {
        let index = self.endpoints.len();
        let keys = (listener_key(index), session_key(index));
        self.endpoints.push(Endpoint::new(device, source, tenure, &self.events, keys)?);
        Ok(())
    }

    /// Wakes the poller whenever `fd` becomes readable: completions of a reactor's driver, for example.
    ///
    /// # Errors
    /// When the kernel refuses to watch it.
    pub fn wake_on(&mut self, fd: OwnedFd) -> io::Result<()> {
        self.watched.push(WatchedFd::input(fd, &self.events, Key::WAKE)?);
        Ok(())
    }

    /// Stops the poller once `fd` becomes readable.
    ///
    /// # Errors
    /// When the kernel refuses to watch it.
    pub fn stop_on(&mut self, fd: OwnedFd) -> io::Result<()> {
        self.watched.push(WatchedFd::input(fd, &self.events, Key::of(STOP_KEY))?);
        Ok(())
    }

    /// Serves until told to stop, or until no endpoint can get a frontend any more. When it returns, every
    /// request that was taken has been answered, and no frontend is connected.
    ///
    /// # Errors
    /// When the kernel refuses to wait for events.
    pub fn run(&mut self) -> io::Result<()> {
        while !self.is_finished() {
            if self.turn()? {
                self.pace.worked();
            } else if !self.is_finished() {
                self.idle()?;
            }
        }
        self.endpoints.clear();
        Ok(())
    }

    fn is_finished(&self) -> bool {
        if self.stopping {
            return self.endpoints.iter().all(|endpoint| !endpoint.is_busy());
        }
        self.endpoints.iter().all(Endpoint::is_finished)
    }

    /// One turn. Returns whether there was anything to do.
    ///
    /// # Errors
    /// When the kernel refuses to wait for events.
    pub fn turn(&mut self) -> io::Result<bool> {
        if self.turns_to_look == 0 {
            self.look(Some(Duration::ZERO))?;
        }
        self.turns_to_look -= 1;
        let mut busy = self.attend_frontends();
        if !self.stopping {
            busy |= self.take_requests();
        }
        busy |= self.reactor.turn();
        for endpoint in &self.endpoints {
            endpoint.publish();
        }
        Ok(busy)
    }

    fn attend_frontends(&mut self) -> bool {
        let faults = fault_count();
        let check_memory = std::mem::replace(&mut self.faults_seen, faults) != faults;
        let mut busy = false;
        for endpoint in &mut self.endpoints {
            if check_memory {
                endpoint.check_memory();
            }
            busy |= endpoint.attend(&self.events, self.stopping);
        }
        busy
    }

    fn take_requests(&mut self) -> bool {
        let count = self.endpoints.len();
        let mut busy = false;
        for offset in 0..count {
            let endpoint = &mut self.endpoints[(self.first + offset) % count];
            busy |= endpoint.take_requests(&self.reactor, &mut self.chain);
        }
        self.first = (self.first + 1) % count.max(1);
        busy
    }

    /// Takes in what the kernel has to tell, waiting for it at most `timeout`.
    fn look(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        self.turns_to_look = TURNS_PER_LOOK;
        self.events.wait(timeout, &mut self.happened)?;
        for event in &self.happened {
            let Some(index) = event.key.index() else { continue };
            if index == STOP_KEY {
                self.stopping = true;
                continue;
            }
            let endpoint = (index - 1) / 2;
            if let Some(endpoint) = self.endpoints.get_mut(endpoint) {
                endpoint.notice(event);
            }
        }
        Ok(())
    }

    /// Nothing was to do: spins on, or sleeps.
    fn idle(&mut self) -> io::Result<()> {
        let now = Instant::now();
        match self.pace.rest(now, self.reactor.waits_for_threads()) {
            Rest::Spin => std::hint::spin_loop(),
            Rest::Sleep if self.sleep()? => self.pace.woke(now.elapsed()),
            Rest::Sleep => self.pace.worked(),
        }
        Ok(())
    }

    /// Sleeps until something happens. Returns whether it did: there may be work already.
    fn sleep(&mut self) -> io::Result<bool> {
        let mut wakeful = self.reactor.prepare_sleep();
        for endpoint in &self.endpoints {
            wakeful |= endpoint.prepare_sleep();
        }
        if !wakeful {
            self.look(self.sleep_limit())?;
        }
        self.reactor.finish_sleep();
        for endpoint in &self.endpoints {
            endpoint.finish_sleep();
        }
        Ok(!wakeful)
    }

    /// Time to the next thing that no descriptor tells about.
    fn sleep_limit(&self) -> Option<Duration> {
        let now = self.reactor.clock().monotonic();
        let timer = self.reactor.next_timer().map(|when| when.saturating_sub(now));
        let kickless = self.endpoints.iter().any(Endpoint::needs_polling).then_some(KICKLESS_SLEEP);
        match (timer, kickless) {
            (Some(timer), Some(kickless)) => Some(timer.min(kickless)),
            (timer, kickless) => timer.or(kickless),
        }
    }
}
