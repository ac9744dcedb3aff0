//! When a part of the unfinished segment is put.
//!
//! Exposure (the age of the oldest received byte that is not stored) stays within `rpo`: a part starts at the latest
//! `rpo`/2 after its first byte, earlier when recent PUTs took long. `rpo` zero: at once, whenever a PUT may start.

use std::time::Duration;

use tokio::time::Instant;

/// How much the newest latency counts in the running mean.
const WEIGHT: f64 = 0.2;

/// Decides when bytes that wait must go.
#[derive(Debug, Clone)]
pub struct Pacing {
    rpo: Duration,
    /// Running mean of recent PUTs.
    latency: Duration,
    /// When the oldest byte arrived that no PUT has taken up yet.
    waiting_since: Option<Instant>,
}

impl Pacing {
    pub fn new(rpo: Duration) -> Self {
        Pacing { rpo, latency: Duration::ZERO, waiting_since: None }
    }

    /// Changes the exposure allowed, when the connection becomes synchronous or stops being so.
    pub fn set_rpo(&mut self, rpo: Duration) {
        self.rpo = rpo;
    }

    pub fn rpo(&self) -> Duration {
        self.rpo
    }

    /// Bytes arrived that no PUT has taken up.
    pub fn arrived(&mut self, now: Instant) {
        self.waiting_since.get_or_insert(now);
    }

    /// Everything that arrived was taken up by a PUT.
    pub fn taken_up(&mut self) {
        self.waiting_since = None;
    }

    /// The server wants to hear soon: what waits is due now.
    pub fn hurry(&mut self, now: Instant) {
        if self.waiting_since.is_some() {
            self.waiting_since = now.checked_sub(self.rpo).or(self.waiting_since);
        }
    }

    pub fn put_took(&mut self, latency: Duration) {
        self.latency = self.latency.mul_f64(1.0 - WEIGHT) + latency.mul_f64(WEIGHT);
    }

    /// When the next part must start; `None` when nothing waits.
    pub fn due(&self) -> Option<Instant> {
        let expected = self.latency.mul_f64(1.5);
        let delay = (self.rpo / 2).min(self.rpo.saturating_sub(expected));
        self.waiting_since.map(|since| since + delay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delay_after(rpo_ms: u64, put_ms: u64) -> Duration {
        let mut pacing = Pacing::new(Duration::from_millis(rpo_ms));
        for _ in 0..100 {
            pacing.put_took(Duration::from_millis(put_ms));
        }
        let now = Instant::now();
        pacing.arrived(now);
        pacing.arrived(now + Duration::from_millis(1));
        pacing.due().expect("something waits") - now
    }

    #[test]
    fn half_the_rpo_with_fast_puts_less_with_slow_ones() {
        assert_eq!(delay_after(1000, 0), Duration::from_millis(500));
        assert_eq!(delay_after(1000, 200), Duration::from_millis(500));
        let slow = delay_after(1000, 600);
        assert!(slow < Duration::from_millis(110), "{slow:?}");
        assert_eq!(delay_after(1000, 2000), Duration::ZERO);
        assert_eq!(delay_after(0, 0), Duration::ZERO);
    }

    #[test]
    fn nothing_waits_nothing_is_due() {
        let mut pacing = Pacing::new(Duration::from_secs(1));
        pacing.hurry(Instant::now());
        assert_eq!(pacing.due(), None);
        let now = Instant::now();
        pacing.arrived(now);
        pacing.hurry(now);
        assert!(pacing.due().expect("waiting") <= now);
        pacing.taken_up();
        assert_eq!(pacing.due(), None);
    }
}
