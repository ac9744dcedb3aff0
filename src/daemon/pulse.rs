//! Whether a task makes progress.
//!
//! A task beats while it turns in its loop, and rests while it does something that has a limit of its own, such as opening a
//! store: a slow store of one environment must not look like a service that hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const RESTS: u64 = u64::MAX;

/// Of one task; clones are of the same one.
#[derive(Debug, Clone)]
pub struct Pulse {
    begin: Instant,
    /// Milliseconds from `begin` to the last beat.
    last_ms: Arc<AtomicU64>,
}

impl Default for Pulse {
    fn default() -> Self {
        Pulse { begin: Instant::now(), last_ms: Arc::new(AtomicU64::new(RESTS)) }
    }
}

impl Pulse {
    pub fn beat(&self) {
        let now = u64::try_from(self.begin.elapsed().as_millis()).unwrap_or(RESTS - 1);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    /// Nothing is expected until the next beat.
    pub fn rest(&self) {
        self.last_ms.store(RESTS, Ordering::Relaxed);
    }

    /// Since the last beat; `None` while it rests.
    pub fn silence(&self) -> Option<Duration> {
        let last = self.last_ms.load(Ordering::Relaxed);
        (last != RESTS).then(|| self.begin.elapsed().saturating_sub(Duration::from_millis(last)))
    }
}
