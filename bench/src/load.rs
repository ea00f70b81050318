//! The load loop: keeps a number of requests under way for a time, and counts.

use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::client::{Client, channel::Channel, memory::Memory};

/// Latencies kept of one round; more would only sharpen the last digit.
const SAMPLES_MAX: usize = 1 << 20;

/// Replies between two looks at the clock where latencies are not taken.
const REPLIES_PER_CLOCK: u64 = 64;

/// Requests shown to the device at once while replies keep coming. Picked: few enough that the server always has some,
/// and the barrier that publishing needs is still shared.
const REQUESTS_PER_PUBLISH: u64 = 8;

/// What one kind of request is and what its reply must be.
pub trait Workload {
    /// Writes the next request into a slot. False: there is nothing more to send.
    fn offer(&mut self, channel: &mut Channel, memory: &Memory, slot: usize) -> bool;

    /// Checks a slot's reply. Returns how many operations it ends: 0 if it is one of several that make one.
    fn check(&mut self, channel: &Channel, memory: &Memory, slot: usize) -> anyhow::Result<u64>;
}

/// What a round gave.
#[derive(Debug, Clone, Default)]
pub struct Round {
    /// Operations that ended.
    pub operations: u64,
    /// Time from the first request to the last reply.
    pub elapsed: Duration,
    /// Nanoseconds of each operation, only at depth 1.
    pub latencies: Vec<u32>,
    /// The server's CPU time.
    pub server_cpu: Duration,
}

impl Round {
    /// Operations per second.
    pub fn rate(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64()
    }

    /// The server's CPU time per operation in microseconds.
    pub fn cpu_us(&self) -> f64 {
        self.server_cpu.as_secs_f64() * 1e6 / self.operations.max(1) as f64
    }

    /// A quantile of the latencies in microseconds.
    pub fn quantile_us(&mut self, quantile: f64) -> Option<f64> {
        let last = self.latencies.len().checked_sub(1)?;
        let index = (last as f64 * quantile) as usize;
        let (_, value, _) = self.latencies.select_nth_unstable(index);
        Some(f64::from(*value) / 1e3)
    }
}

/// Runs a workload on the first request queue until `budget` is over or the workload ends.
pub fn run(
    client: &mut Client,
    workload: &mut dyn Workload,
    depth: usize,
    budget: Duration,
) -> anyhow::Result<Round> {
    let (channel, memory) = client.queue(1);
    ensure!(depth >= 1 && depth <= channel.depth(), "the client has {} slots", channel.depth());
    if depth == 1 {
        one_by_one(channel, memory, workload, budget)
    } else {
        many(channel, memory, workload, depth, budget)
    }
}

/// Depth 1, with the latency of each operation.
fn one_by_one(
    channel: &mut Channel,
    memory: &Memory,
    workload: &mut dyn Workload,
    budget: Duration,
) -> anyhow::Result<Round> {
    let mut latencies = Vec::with_capacity(SAMPLES_MAX);
    let begin = Instant::now();
    let (mut operations, mut operation_begin, mut now) = (0, begin, begin);
    while now - begin < budget && workload.offer(channel, memory, 0) {
        channel.publish(memory)?;
        channel.wait_reply(memory)?;
        let ended = workload.check(channel, memory, 0)?;
        now = Instant::now();
        if ended > 0 {
            operations += ended;
            if latencies.len() < SAMPLES_MAX {
                latencies.push(u32::try_from((now - operation_begin).as_nanos()).unwrap_or(u32::MAX));
            }
            operation_begin = now;
        }
    }
    Ok(Round { operations, elapsed: now - begin, latencies, server_cpu: Duration::ZERO })
}

/// Any depth, published in batches as replies come.
fn many(
    channel: &mut Channel,
    memory: &Memory,
    workload: &mut dyn Workload,
    depth: usize,
    budget: Duration,
) -> anyhow::Result<Round> {
    let begin = Instant::now();
    let (mut operations, mut replies, mut under_way, mut more) = (0, 0_u64, 0_usize, true);
    for slot in 0..depth {
        more = more && workload.offer(channel, memory, slot);
        under_way += usize::from(more);
    }
    channel.publish(memory)?;
    while under_way > 0 {
        let mut next = Some(channel.wait_reply(memory)?);
        while let Some(slot) = next {
            operations += workload.check(channel, memory, slot)?;
            under_way -= 1;
            replies += 1;
            if replies.is_multiple_of(REPLIES_PER_CLOCK) {
                more = more && begin.elapsed() < budget;
            }
            more = more && workload.offer(channel, memory, slot);
            under_way += usize::from(more);
            if replies.is_multiple_of(REQUESTS_PER_PUBLISH) {
                channel.publish(memory)?;
            }
            next = channel.take_reply(memory)?;
        }
        channel.publish(memory)?;
    }
    Ok(Round { operations, elapsed: begin.elapsed(), latencies: Vec::new(), server_cpu: Duration::ZERO })
}
