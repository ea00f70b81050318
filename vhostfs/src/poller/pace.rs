//! Spin or sleep: what an idle poller does until there is work.
//!
//! A spinning poller answers at once, but burns its core; a sleeping one costs the guest a wake-up. Spinning
//! for a while after the last work gets both right as long as the client has a core of its own. On a shared
//! core it is the worst of all choices: the client cannot run, and so cannot send anything, until the poller
//! sleeps. That shows: the whole spin finds nothing, and then a request comes as soon as the poller is
//! asleep. After a few such misses in a row the poller sleeps at once, and now and then spins again to see
//! whether the client has moved.
//!
//! While threads of the kernel are at work on an operation, the poller does not spin either: they are woken on the CPU
//! that the operation came from, and wait there until the poller sleeps. (A write to a file on ext4 needs one to end, a
//! flush another one: with spinning, a 4 KiB write with fsync took 290 us, of which the disk had 60.)

use std::time::{Duration, Instant};

use super::PollMode;

/// How long to spin without work. Picked: longer than a guest takes to send the next request of a sequence
/// (about 35 us under User-Mode Linux), so that such a sequence never waits for a wake-up. Twice as long was
/// measured to be worse where nothing is pinned and waking a CPU is slow (inside a virtual machine): the scheduler
/// keeps a spinning poller and its guest apart, and both are faster on one core.
const SPIN: Duration = Duration::from_micros(100);

/// Misses in a row that show a shared core. Picked: one or two happen by chance.
const MISSES: u32 = 4;

/// Sleeps between two trials to spin on a shared core. Picked: a trial costs one [`SPIN`], so this keeps
/// their cost below a percent of what a thousand requests cost, and finds a moved client within milliseconds
/// under load.
const SLEEPS_PER_TRIAL: u32 = 1000;

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    Spin,
    Sleep,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    mode: PollMode,
    /// Since when there has been no work, while spinning.
    idle_since: Option<Instant>,
    misses: u32,
    sleeps: u32,
    /// The sleep that begins says nothing about the client.
    is_forced: bool,
}

impl Pace {
    pub(super) fn new(mode: PollMode) -> Self {
        Self { mode, idle_since: None, misses: 0, sleeps: 0, is_forced: false }
    }

    /// A turn had work.
    #[inline]
    pub(super) fn worked(&mut self) {
        if self.idle_since.take().is_some() {
            self.misses = 0;
        }
    }

    /// A turn had none. `waits_for_threads`: the kernel's are at work for the poller.
    pub(super) fn rest(&mut self, now: Instant, waits_for_threads: bool) -> Rest {
        self.is_forced = waits_for_threads;
        let spins = match self.mode {
            PollMode::Busy => true,
            PollMode::Interrupt => false,
            PollMode::Adaptive if waits_for_threads => false,
            PollMode::Adaptive => {
                let may_spin = self.misses < MISSES || self.sleeps >= SLEEPS_PER_TRIAL;
                may_spin && now - *self.idle_since.get_or_insert(now) < SPIN
            }
        };
        if spins { Rest::Spin } else { Rest::Sleep }
    }

    /// Something ended a sleep that lasted this long.
    pub(super) fn woke(&mut self, slept: Duration) {
        let spun = self.idle_since.take().is_some();
        if self.is_forced {
            return;
        }
        if !spun {
            self.sleeps += 1;
        } else if slept < SPIN {
            self.misses = MISSES.min(self.misses + 1);
            self.sleeps = 0;
        } else {
            // Nobody was waiting for the core: the client had nothing to do.
            self.misses = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICROSECOND: Duration = Duration::from_micros(1);

    /// Counts the turns of one microsecond that the poller spins before it sleeps.
    fn spin(pace: &mut Pace, now: &mut Instant) -> u32 {
        let mut turns = 0;
        while pace.rest(*now, false) == Rest::Spin {
            *now += MICROSECOND;
            turns += 1;
            assert!(turns < 1000);
        }
        turns
    }

    #[test]
    fn it_spins_and_then_sleeps_when_idle() {
        let (mut pace, mut now) = (Pace::new(PollMode::Adaptive), Instant::now());
        for _ in 0..20 {
            assert_eq!(spin(&mut pace, &mut now), 100);
            pace.woke(Duration::from_secs(1));
            pace.worked();
        }
    }

    #[test]
    fn it_notices_a_client_that_needs_the_core_and_one_that_does_not_any_more() {
        let (mut pace, mut now) = (Pace::new(PollMode::Adaptive), Instant::now());
        for _ in 0..MISSES {
            assert_eq!(spin(&mut pace, &mut now), 100);
            pace.woke(5 * MICROSECOND);
            pace.worked();
        }
        for _ in 0..SLEEPS_PER_TRIAL {
            assert_eq!(spin(&mut pace, &mut now), 0);
            pace.woke(5 * MICROSECOND);
            pace.worked();
        }
        // A trial that misses: back to sleeping.
        assert_eq!(spin(&mut pace, &mut now), 100);
        pace.woke(5 * MICROSECOND);
        pace.worked();
        assert_eq!(spin(&mut pace, &mut now), 0);
        for _ in 0..SLEEPS_PER_TRIAL {
            pace.woke(5 * MICROSECOND);
            pace.worked();
            pace.rest(now, false);
        }
        // A trial in which a request comes while spinning.
        assert_eq!(pace.rest(now, false), Rest::Spin);
        pace.worked();
        assert_eq!(spin(&mut pace, &mut now), 100);
    }

    #[test]
    fn it_leaves_its_core_to_the_threads_that_it_waits_for() {
        let (mut pace, now) = (Pace::new(PollMode::Adaptive), Instant::now());
        assert_eq!(pace.rest(now, true), Rest::Sleep);
        pace.woke(5 * MICROSECOND);
        pace.worked();
        // That says nothing about the client.
        for _ in 0..2 * MISSES {
            assert_eq!(pace.rest(now, false), Rest::Spin);
            assert_eq!(pace.rest(now, true), Rest::Sleep);
            pace.woke(5 * MICROSECOND);
            pace.worked();
        }
    }

    #[test]
    fn the_other_modes_never_change_their_mind() {
        let now = Instant::now();
        let (mut busy, mut interrupt) = (Pace::new(PollMode::Busy), Pace::new(PollMode::Interrupt));
        for _ in 0..10 {
            assert_eq!(busy.rest(now + Duration::from_secs(1), true), Rest::Spin);
            assert_eq!(interrupt.rest(now, false), Rest::Sleep);
            interrupt.woke(MICROSECOND);
        }
    }
}
