//! How long bytes were in danger: from their arrival to the store's answer.
//!
//! Memory: at most [`WAITING_MAX`] arrivals and [`RECENT_MAX`] measurements. What arrives within a moment, or beyond that
//! number, counts from the earliest of it: exposure is never said to be less than it was.

use std::collections::VecDeque;
use std::time::Duration;

use serde::Serialize;
use tokio::time::Instant;

use crate::pg::Lsn;

const WAITING_MAX: usize = 4096;
const RECENT_MAX: usize = 1024;
/// Arrivals this close together are one.
const MOMENT: Duration = Duration::from_millis(5);

/// The figures of a moment, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ExposureFigures {
    /// Age of the oldest byte that has arrived and is not stored; 0 when all is.
    pub oldest_ms: u64,
    /// Of the last measurements; `None` before the first.
    pub p50_ms: Option<u64>,
    pub p99_ms: Option<u64>,
}

/// What waits, and how long what was stored had waited.
#[derive(Debug)]
pub struct Exposure {
    /// Everything before this was stored before the stream began.
    from: Lsn,
    waiting: VecDeque<(Lsn, Instant)>,
    recent: VecDeque<Duration>,
}

impl Exposure {
    pub fn new(from: Lsn) -> Self {
        Exposure { from, waiting: VecDeque::new(), recent: VecDeque::new() }
    }

    /// Everything up to `end_lsn` has arrived.
    pub fn arrived(&mut self, end_lsn: Lsn, now: Instant) {
        if end_lsn <= self.from {
            return;
        }
        let full = self.waiting.len() >= WAITING_MAX;
        match self.waiting.back_mut() {
            Some((end, since)) if full || now.saturating_duration_since(*since) < MOMENT => *end = end_lsn,
            _ => self.waiting.push_back((end_lsn, now)),
        }
    }

    /// Everything up to `end_lsn` is stored.
    pub fn stored(&mut self, end_lsn: Lsn, now: Instant) {
        while let Some((_, since)) = self.waiting.pop_front_if(|(end, _)| *end <= end_lsn) {
            if self.recent.len() == RECENT_MAX {
                self.recent.pop_front();
            }
            self.recent.push_back(now.saturating_duration_since(since));
        }
    }

    pub fn figures(&self, now: Instant) -> ExposureFigures {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let mut sorted: Vec<Duration> = self.recent.iter().copied().collect();
        sorted.sort_unstable();
        let at = |percent: usize| sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1)));
        ExposureFigures {
            oldest_ms: self.waiting.front().map_or(0, |(_, since)| millis(now.saturating_duration_since(*since))),
            p50_ms: at(50).copied().map(millis),
            p99_ms: at(99).copied().map(millis),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(begin: Instant, ms: u64) -> Instant {
        begin + Duration::from_millis(ms)
    }

    #[test]
    fn each_arrival_waits_until_all_before_its_end_is_stored() {
        let begin = Instant::now();
        let mut exposure = Exposure::new(Lsn(50));
        exposure.arrived(Lsn(50), begin);
        assert_eq!(exposure.figures(begin), ExposureFigures::default());
        exposure.arrived(Lsn(100), begin);
        exposure.arrived(Lsn(120), after(begin, 1));
        exposure.arrived(Lsn(200), after(begin, 300));
        assert_eq!(exposure.figures(after(begin, 400)).oldest_ms, 400);
        exposure.stored(Lsn(119), after(begin, 400));
        assert_eq!(exposure.figures(after(begin, 500)).oldest_ms, 500, "the two of one moment wait for the later end");
        exposure.stored(Lsn(120), after(begin, 600));
        let figures = exposure.figures(after(begin, 700));
        assert_eq!(figures, ExposureFigures { oldest_ms: 400, p50_ms: Some(600), p99_ms: Some(600) });
        exposure.stored(Lsn(200), after(begin, 700));
        let figures = exposure.figures(after(begin, 900));
        assert_eq!(figures, ExposureFigures { oldest_ms: 0, p50_ms: Some(600), p99_ms: Some(600) });
    }

    #[test]
    fn a_long_outage_is_measured_within_bounds_and_never_too_short() {
        let begin = Instant::now();
        let mut exposure = Exposure::new(Lsn(0));
        let arrivals = WAITING_MAX as u64 + 500;
        for i in 1..=arrivals {
            exposure.arrived(Lsn(i), after(begin, i * 10));
        }
        assert_eq!(exposure.waiting.len(), WAITING_MAX);
        exposure.stored(Lsn(arrivals), after(begin, arrivals * 10));
        assert_eq!((exposure.waiting.len(), exposure.recent.len()), (0, RECENT_MAX));
        assert!(exposure.figures(begin).p50_ms.expect("measured") >= 500 * 10);
    }
}
