//! The same tests for as long as one likes: `cargo xtask crash` sets how long, and where to begin.

use std::env;
use std::time::{Duration, Instant};

/// How long to go on, in seconds. Not set: the short run of the test suite.
const SECONDS: &str = "VHOSTFS_CRASH_SECONDS";

/// The first seed or number of a sequence.
const SEED: &str = "VHOSTFS_CRASH_SEED";

fn variable(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text}")))
}

/// The seeds or numbers to take: those of the short run, or one after the other until the time is over.
pub(crate) fn numbers(short: impl Iterator<Item = u64> + 'static) -> Box<dyn Iterator<Item = u64>> {
    let Some(seconds) = variable(SECONDS) else { return Box::new(short) };
    let first = variable(SEED).unwrap_or(0);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut told = Instant::now();
    Box::new((first..).take_while(move |number| {
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            eprintln!("at number {number}, {} s left", end.saturating_duration_since(told).as_secs());
        }
        Instant::now() < end
    }))
}
