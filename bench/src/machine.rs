//! The machine: which cores a run uses, and what they can do at best.
//!
//! Calibration rows stand beside the results, so that figures of two machines, or of one machine on two days, can be
//! compared: a memory copy bounds every row that moves data, an eventfd round trip every row that wakes somebody.

use std::{
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::{
    event::{EventfdFlags, eventfd},
    fd::OwnedFd,
    thread::{CpuSet, sched_setaffinity},
};

/// Core of the synthetic client.
pub const CLIENT_CORE: usize = 0;
/// Core of the server, and of everything in the one-core rows.
pub const SERVER_CORE: usize = 1;

/// Bytes of each of the two buffers of the copy: far beyond the caches.
const COPY_LEN: usize = 256 << 20;

/// Keeps the calling thread on a core.
pub fn pin_to(core: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    sched_setaffinity(None, &set).with_context(|| format!("run on core {core}: two cores are needed"))
}

/// What the cores do at best.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Calibration {
    /// Copy between two large buffers, in bytes per nanosecond.
    pub memcpy_gb_s: f64,
    /// Wake a thread on the other core through an eventfd, and be woken by it, in microseconds.
    pub eventfd_round_trip_us: f64,
}

impl Calibration {
    /// Measures for about a second.
    pub fn measure() -> anyhow::Result<Self> {
        Ok(Self { memcpy_gb_s: memcpy_gb_s(), eventfd_round_trip_us: eventfd_round_trip_us()? })
    }
}

fn memcpy_gb_s() -> f64 {
    let from = vec![1_u8; COPY_LEN];
    let mut to = vec![0_u8; COPY_LEN];
    let mut best = f64::MAX;
    for _ in 0..5 {
        let begin = Instant::now();
        to.copy_from_slice(&from);
        std::hint::black_box(&mut to);
        best = best.min(begin.elapsed().as_secs_f64());
    }
    COPY_LEN as f64 / best / 1e9
}

fn eventfd_round_trip_us() -> anyhow::Result<f64> {
    let there = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    let back = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    let (there_too, back_too) = (there.clone(), back.clone());
    let echo = thread::spawn(move || -> anyhow::Result<()> {
        pin_to(SERVER_CORE)?;
        // A count of two is the request to end.
        while wait(&there_too)? == 1 {
            signal(&back_too, 1)?;
        }
        Ok(())
    });
    let mut samples = Vec::new();
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(500) {
        let sent = Instant::now();
        signal(&there, 1)?;
        wait(&back)?;
        samples.push(sent.elapsed().as_secs_f64() * 1e6);
    }
    signal(&there, 2)?;
    echo.join().map_err(|_| anyhow::anyhow!("the echoing thread panicked"))??;
    Ok(median(&mut samples))
}

fn signal(fd: &OwnedFd, count: u64) -> io::Result<()> {
    rustix::io::write(fd, zerocopy::IntoBytes::as_bytes(&count))?;
    Ok(())
}

fn wait(fd: &OwnedFd) -> io::Result<u64> {
    let mut count = 0_u64;
    rustix::io::read(fd, zerocopy::IntoBytes::as_mut_bytes(&mut count))?;
    Ok(count)
}

/// Median; 0 of nothing.
pub fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
