//! Waiting longer and longer between attempts.

use std::time::Duration;

/// Delays that double from `first` to `max`, each shortened by up to a quarter at random so that many callers spread out.
#[derive(Debug, Clone)]
pub struct Backoff {
    next: Duration,
    first: Duration,
    max: Duration,
}

impl Backoff {
    pub fn new(first: Duration, max: Duration) -> Self {
        Backoff { next: first, first, max }
    }

    /// The next delay.
    pub fn delay(&mut self) -> Duration {
        let full = self.next;
        self.next = full.saturating_mul(2).min(self.max);
        full.mul_f64(1.0 - 0.25 * rand::random::<f64>())
    }

    /// Called after a success: the next delay is the first one again.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_limit() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(350));
        for full in [100u64, 200, 350, 350] {
            let delay = backoff.delay();
            assert!(delay <= Duration::from_millis(full) && delay >= Duration::from_millis(full * 3 / 4), "{delay:?}");
        }
        backoff.reset();
        assert!(backoff.delay() <= Duration::from_millis(100));
    }
}
