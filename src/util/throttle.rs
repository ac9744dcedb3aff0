//! So many bytes a second, shared by everybody who holds the same throttle.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// What was not used may be made up for within this time, so that a short pause costs no speed.
const BURST: Duration = Duration::from_secs(1);

/// A bound on a rate. Who comes first is served first; nobody waits for more than what was taken before.
#[derive(Debug)]
pub struct Throttle {
    bytes_per_second: u64,
    /// When all that was taken so far has had its time.
    free_at: Mutex<Instant>,
    #[cfg(test)]
    taken_bytes: std::sync::atomic::AtomicU64,
}

impl Throttle {
    pub fn new(bytes_per_second: u64) -> Self {
        Throttle {
            bytes_per_second: bytes_per_second.max(1),
            free_at: Mutex::new(Instant::now()),
            #[cfg(test)]
            taken_bytes: Default::default(),
        }
    }

    /// All that was taken so far.
    #[cfg(test)]
    pub fn taken_bytes(&self) -> u64 {
        self.taken_bytes.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Takes so many bytes, and waits until the ones before have had their time.
    ///
    /// Cancel safety: what was taken stays taken.
    pub async fn take(&self, bytes: u64) {
        #[cfg(test)]
        self.taken_bytes.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed);
        let begin = self.reserve(bytes, Instant::now());
        tokio::time::sleep_until(begin).await;
    }

    /// Enters the bytes into the account; returns when they may move.
    fn reserve(&self, bytes: u64, now: Instant) -> Instant {
        let micros = u128::from(bytes) * 1_000_000 / u128::from(self.bytes_per_second);
        let time = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = (*free_at).max(now.checked_sub(BURST).unwrap_or(now));
        // A century ahead is as good as any later time, and does not overflow.
        *free_at = begin.checked_add(time).unwrap_or(begin);
        begin.max(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_for_all_together_and_a_pause_is_made_up_for() {
        let throttle = Throttle::new(1000);
        let begin = Instant::now() + BURST;
        let check = |bytes, now_ms, expected_ms| {
            let at = throttle.reserve(bytes, begin + Duration::from_millis(now_ms));
            assert_eq!((at - begin).as_millis(), expected_ms, "{bytes} bytes at {now_ms} ms");
        };
        *throttle.free_at.lock().expect("not poisoned") = begin;
        check(500, 0, 0);
        check(2000, 0, 500);
        check(100, 1000, 2500);
        // Ten seconds later one second's worth may move at once, and no more.
        check(1000, 12_600, 12_600);
        check(1000, 12_600, 12_600);
        check(1, 12_600, 13_600);
    }
}
