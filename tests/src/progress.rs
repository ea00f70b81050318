//! Steps that say what they do and how long it took.

use std::{
    sync::LazyLock,
    time::{Duration, Instant},
};

/// Start of the run: the first use of this module.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Runs `work`, printing `what` before it and its time after it.
pub fn step<T>(what: &str, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let began = START.elapsed();
    println!("[{:7.1} s] {what}", began.as_secs_f64());
    let result = work();
    let took = START.elapsed().saturating_sub(began);
    let outcome = if result.is_ok() { "done" } else { "FAILED" };
    println!("[{:7.1} s] {what}: {outcome} in {}", START.elapsed().as_secs_f64(), seconds(took));
    result
}

/// Prints one line with the time since the run began.
pub fn note(text: &str) {
    println!("[{:7.1} s] {text}", START.elapsed().as_secs_f64());
}

/// A duration the way all tables show it.
pub fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}
