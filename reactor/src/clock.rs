//! Injected time.

use std::cell::Cell;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Where a [`crate::Reactor`] takes its time from.
pub trait Clock {
    /// Monotonic time since an arbitrary start.
    fn monotonic(&self) -> Duration;

    /// Wall-clock time since 1970-01-01 UTC.
    fn realtime(&self) -> Duration;

    /// Whether the clock only moves when [`Clock::advance`] is called.
    fn is_virtual(&self) -> bool {
        false
    }

    /// Moves a virtual clock forward to `monotonic`; a real clock ignores it.
    fn advance(&self, monotonic: Duration) {
        let _ = monotonic;
    }
}

/// The machine's own clocks.
#[derive(Debug)]
pub struct SystemClock {
    start: Instant,
}

impl SystemClock {
    /// A clock whose monotonic time starts now.
    pub fn new() -> Self {
        Self { start: Instant::now() }
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SystemClock {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    fn realtime(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

/// A clock for simulations: it stands still until the reactor has nothing else to do, then jumps to the
/// next timer.
#[derive(Debug)]
pub struct VirtualClock {
    now: Cell<Duration>,
    realtime_offset: Duration,
}

impl VirtualClock {
    /// A clock at monotonic zero whose wall clock starts at `realtime`.
    pub fn new(realtime: Duration) -> Self {
        Self { now: Cell::new(Duration::ZERO), realtime_offset: realtime }
    }
}

impl Clock for VirtualClock {
    fn monotonic(&self) -> Duration {
        self.now.get()
    }

    fn realtime(&self) -> Duration {
        self.realtime_offset + self.now.get()
    }

    fn is_virtual(&self) -> bool {
        true
    }

    fn advance(&self, monotonic: Duration) {
        if monotonic > self.now.get() {
            self.now.set(monotonic);
        }
    }
}
