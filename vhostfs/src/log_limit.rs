//! A limit for log lines that a guest or frontend can provoke.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// Lines per [`PERIOD`]. Picked: enough to see what happens, not enough to fill a disk.
const LINES: u32 = 20;
const PERIOD: Duration = Duration::from_secs(10);

/// Counts the lines about one frontend's socket.
#[derive(Debug)]
pub struct LogLimit {
    since: Cell<Instant>,
    lines: Cell<u32>,
}

impl LogLimit {
    /// A fresh limit.
    pub fn new() -> Self {
        Self { since: Cell::new(Instant::now()), lines: Cell::new(0) }
    }

    /// Whether one more line may be written now. Says once how many were left out when a period ends.
    pub fn allows(&self) -> bool {
        if self.since.get().elapsed() >= PERIOD {
            let suppressed = self.lines.get().saturating_sub(LINES);
            if suppressed > 0 {
                tracing::warn!("{suppressed} messages about frontends were left out");
            }
            self.since.set(Instant::now());
            self.lines.set(0);
        }
        self.lines.set(self.lines.get().saturating_add(1));
        self.lines.get() <= LINES
    }
}

impl Default for LogLimit {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off() {
        let limit = LogLimit::new();
        assert_eq!((0..1000).filter(|_| limit.allows()).count(), LINES as usize);
    }
}
