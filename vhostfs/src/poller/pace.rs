//! Spin, give way or sleep: what an idle poller does until there is work.
//!
//! A spinning poller answers at once, but burns its core; a sleeping one costs the guest a wake-up. So the
//! poller spins for a while after the last work, before it sleeps. The while, the window, follows the client:
//! it grows while sleeps turn out short, and shrinks to nothing while they are long.
//!
//! While it spins, it gives way: should its client share the core, it runs, and has sent its next request when
//! the poller comes back, without a kick and a wake-up. Where that does not help (somebody else has the core
//! for long, or the scheduler does not switch), spins find nothing and sleeps are short, because spinning is
//! what keeps the client from sending. After a few such misses in a row the poller sleeps at once, and now and
//! then spins again to see whether the client has moved.

use std::time::{Duration, Instant};

use super::PollMode;

/// Longest time to spin without work. Picked: longer than a guest takes to take an answer and to send the next
/// request (35 us in User-Mode Linux itself, and another 50 us where its sleeping CPU has to be woken).
const WINDOW_MAX: Duration = Duration::from_micros(200);

/// Shortest time worth spinning. Picked: a wake-up costs more.
const WINDOW_MIN: Duration = Duration::from_micros(25);

/// Turns of a spin per time that it gives way. Picked: a turn takes a tenth of a microsecond, giving way to
/// nobody twice that.
const TURNS_PER_YIELD: u32 = 8;

/// Misses in a row that show that spinning is in vain. Picked: as many happen while the window grows.
const MISSES: u32 = 4;

/// Sleeps between two trials to spin after misses. Picked: a trial costs one window, so this keeps their cost
/// below a percent of what a thousand requests cost, and finds a moved client within milliseconds under load.
const SLEEPS_PER_TRIAL: u32 = 1000;

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// Look again at once.
    Spin,
    /// Let others run that wait for the core, then look again; see [`Pace::gave_way`].
    GiveWay,
    /// Sleep until something happens; see [`Pace::woke`].
    Sleep,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    mode: PollMode,
    window: Duration,
    /// Since when there has been no work, while spinning.
    idle_since: Option<Instant>,
    turns: u32,
    /// Somebody else had the core for longer than a spin may take.
    crowded: bool,
    misses: u32,
    sleeps: u32,
}

impl Pace {
    pub(super) fn new(mode: PollMode) -> Self {
        Self { mode, window: WINDOW_MAX, idle_since: None, turns: 0, crowded: false, misses: 0, sleeps: 0 }
    }

    /// A turn had work.
    #[inline]
    pub(super) fn worked(&mut self) {
        if self.idle_since.take().is_some() && !std::mem::take(&mut self.crowded) {
            self.misses = 0;
        }
    }

    /// A turn had none.
    pub(super) fn rest(&mut self, now: Instant) -> Rest {
        match self.mode {
            PollMode::Busy => Rest::Spin,
            PollMode::Interrupt => Rest::Sleep,
            PollMode::Adaptive => self.adapt(now),
        }
    }

    fn adapt(&mut self, now: Instant) -> Rest {
        let may_spin = self.misses < MISSES || self.sleeps >= SLEEPS_PER_TRIAL;
        if !may_spin || self.crowded || self.window.is_zero() {
            return Rest::Sleep;
        }
        if now - *self.idle_since.get_or_insert(now) >= self.window {
            return Rest::Sleep;
        }
        self.turns = (self.turns + 1) % TURNS_PER_YIELD;
        if self.turns == 0 { Rest::GiveWay } else { Rest::Spin }
    }

    /// Giving way took this long.
    pub(super) fn gave_way(&mut self, took: Duration) {
        if took >= WINDOW_MAX {
            self.crowded = true;
            self.miss();
        }
    }

    /// Something ended a sleep that lasted this long.
    pub(super) fn woke(&mut self, slept: Duration) {
        let spun = self.idle_since.take().is_some();
        let crowded = std::mem::take(&mut self.crowded);
        if !spun && self.misses == MISSES {
            self.sleeps += 1;
        } else if slept >= WINDOW_MAX {
            // Nobody was waiting for the core: the client had nothing to do.
            self.misses = 0;
            self.window = if self.window > WINDOW_MIN { self.window / 2 } else { Duration::ZERO };
        } else {
            self.window = (self.window * 2).clamp(WINDOW_MIN, WINDOW_MAX);
            if spun && !crowded {
                self.miss();
            }
        }
    }

    /// A spin was in vain.
    fn miss(&mut self) {
        self.misses = MISSES.min(self.misses + 1);
        self.sleeps = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MICROSECOND: Duration = Duration::from_micros(1);

    fn adaptive() -> (Pace, Instant) {
        (Pace::new(PollMode::Adaptive), Instant::now())
    }

    /// Lets the poller rest, a microsecond per turn, until it sleeps or `work` comes; gives the turns.
    fn spin(pace: &mut Pace, now: &mut Instant, work: u32) -> u32 {
        for turn in 0..work {
            match pace.rest(*now) {
                Rest::Spin => {}
                Rest::GiveWay => pace.gave_way(MICROSECOND),
                Rest::Sleep => return turn,
            }
            *now += MICROSECOND;
        }
        work
    }

    /// Spins as long as it wants to, then sleeps for `slept` microseconds until work comes.
    fn sleep(pace: &mut Pace, now: &mut Instant, slept: u32) -> u32 {
        let spun = spin(pace, now, 10_000);
        pace.woke(slept * MICROSECOND);
        pace.worked();
        spun
    }

    #[test]
    fn the_window_shrinks_to_nothing_while_idle_and_grows_again_under_load() {
        let (mut pace, mut now) = adaptive();
        let mut idle = || sleep(&mut pace, &mut now, 1000);
        assert_eq!([idle(), idle(), idle(), idle(), idle(), idle()], [200, 100, 50, 25, 0, 0]);
        let mut loaded = || sleep(&mut pace, &mut now, 150);
        assert_eq!([loaded(), loaded(), loaded(), loaded()], [0, 25, 50, 100]);
        assert_eq!(spin(&mut pace, &mut now, 150), 150, "work comes while it spins");
    }

    #[test]
    fn it_gives_way_now_and_then_while_it_spins() {
        let (mut pace, now) = adaptive();
        let rests: Vec<_> = (0..2 * TURNS_PER_YIELD).map(|_| pace.rest(now)).collect();
        assert_eq!(rests.iter().filter(|rest| **rest == Rest::GiveWay).count(), 2);
        assert!(!rests.contains(&Rest::Sleep));
    }

    #[test]
    fn it_sleeps_at_once_where_spinning_is_in_vain_and_tries_again_later() {
        let (mut pace, mut now) = adaptive();
        for _ in 0..MISSES {
            assert_eq!(sleep(&mut pace, &mut now, 5), 200);
        }
        for _ in 0..SLEEPS_PER_TRIAL {
            assert_eq!(sleep(&mut pace, &mut now, 5), 0);
        }
        // A trial that misses: back to sleeping.
        assert_eq!(sleep(&mut pace, &mut now, 5), 200);
        for _ in 0..SLEEPS_PER_TRIAL {
            assert_eq!(sleep(&mut pace, &mut now, 5), 0);
        }
        // A trial in which work comes while spinning.
        assert_eq!(spin(&mut pace, &mut now, 10), 10);
        pace.worked();
        assert_eq!(spin(&mut pace, &mut now, 150), 150);
    }

    #[test]
    fn it_stops_giving_way_to_somebody_who_keeps_the_core() {
        let (mut pace, mut now) = adaptive();
        for _ in 0..MISSES {
            assert_eq!(spin(&mut pace, &mut now, 10), 10);
            pace.gave_way(3000 * MICROSECOND);
            assert_eq!(pace.rest(now), Rest::Sleep);
            // A request has come meanwhile, or comes soon.
            pace.worked();
        }
        assert_eq!(sleep(&mut pace, &mut now, 5), 0);
    }

    #[test]
    fn the_other_modes_never_change_their_mind() {
        let now = Instant::now();
        let (mut busy, mut interrupt) = (Pace::new(PollMode::Busy), Pace::new(PollMode::Interrupt));
        for _ in 0..10 {
            assert_eq!(busy.rest(now + Duration::from_secs(1)), Rest::Spin);
            assert_eq!(interrupt.rest(now), Rest::Sleep);
            interrupt.woke(MICROSECOND);
        }
    }
}
