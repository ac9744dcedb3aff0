//! When the next backup of one environment is to begin. Pure: both clocks are arguments.
//!
//! The wall clock says when a backup is due, and may jump; a clock that only goes forward measures pauses and patience. What was
//! missed while nobody ran, or while one backup took longer than a day, is caught up by one backup. A backup that failed is tried
//! again after a pause that grows, and says so when it has been due for long.
//!
//! Invariants: between two due times at most one backup begins that ends well; after a jump of the clock, in either direction,
//! the next one begins within an interval of the schedule.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use chrono_tz::Tz;

use crate::util::cron::Cron;
use crate::util::digest::Digest;

const PAUSE_MIN: Duration = Duration::from_secs(5);
const PAUSE_MAX: Duration = Duration::from_secs(30 * 60);
/// A backup that has been due for so long, or until the next one is, and does not run: somebody should look.
const OVERDUE_AFTER: Duration = Duration::from_hours(6);
/// And one that has been running or waiting for its turn for so long.
const OVERDUE_RUNNING_AFTER: Duration = Duration::from_hours(24);

/// A moment by both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    pub wall: DateTime<Utc>,
    /// Since some fixed moment of this process.
    pub steady: Duration,
}

/// When backups of one environment are due.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    cron: Cron,
    zone: Tz,
    /// So many environments do not all begin at once: each a fixed time later, by its name.
    offset: TimeDelta,
}

impl Schedule {
    /// `spread` is what the environments are spread over.
    pub fn new(environment: &str, cron: Cron, zone: Tz, spread: Duration) -> Self {
        let Digest(hash) = Digest::sha256(environment.as_bytes());
        let place = hash.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let seconds = (u128::from(spread.as_secs()) * u128::from(place)) >> 32;
        let offset = TimeDelta::seconds(i64::try_from(seconds).unwrap_or(0));
        Schedule { cron, zone, offset }
    }

    /// The first due time after `time`.
    pub fn next_after(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let cron_time = time.checked_sub_signed(self.offset)?;
        self.cron.next_after(self.zone, cron_time)?.checked_add_signed(self.offset)
    }
}

/// What is due, and what was done about it.
#[derive(Debug, Clone)]
pub struct Timetable {
    schedule: Schedule,
    /// Due times up to here are dealt with; `None` until somebody said what there is.
    anchor: Option<DateTime<Utc>>,
    /// The first due time after `anchor`.
    next: Option<DateTime<Utc>>,
    /// Since when a backup is wanted that has not ended well yet.
    wanted_since: Option<Duration>,
    is_running: bool,
    pause: Duration,
    not_before: Duration,
}

impl Timetable {
    pub fn new(schedule: Schedule) -> Self {
        let (anchor, next, wanted_since, is_running) = (None, None, None, false);
        Timetable { schedule, anchor, next, wanted_since, is_running, pause: PAUSE_MIN, not_before: Duration::ZERO }
    }

    /// The store was asked: when the newest backup that counts ended. Without one, nothing was missed before `now`.
    pub fn learn(&mut self, newest_end: Option<DateTime<Utc>>, now: Now) {
        let known = newest_end.unwrap_or(now.wall).min(now.wall);
        self.deal_with(self.anchor.map_or(known, |anchor| anchor.max(known)));
    }

    /// A backup is wanted whatever the schedule says.
    pub fn demand(&mut self, now: Now) {
        self.wanted_since.get_or_insert(now.steady);
    }

    /// Whether a backup is to begin now.
    pub fn is_due(&mut self, now: Now) -> bool {
        if self.anchor.is_some_and(|anchor| anchor > now.wall) {
            // The clock was set back. What was due between the two times was dealt with or is not now.
            self.deal_with(now.wall);
        }
        if self.next.is_some_and(|next| next <= now.wall) {
            self.demand(now);
        }
        self.wanted_since.is_some() && !self.is_running && self.may_try(now)
    }

    /// A backup begins, for whatever reason.
    pub fn began(&mut self) {
        self.is_running = true;
    }

    /// It ended well: nothing that was due until now is wanted any more.
    pub fn succeeded(&mut self, now: Now) {
        self.is_running = false;
        self.wanted_since = None;
        self.pause = PAUSE_MIN;
        self.not_before = Duration::ZERO;
        self.deal_with(now.wall);
    }

    pub fn failed(&mut self, now: Now) {
        self.is_running = false;
        self.put_off(now);
    }

    /// Whatever was to be tried is tried again later, and each time later.
    pub fn put_off(&mut self, now: Now) {
        self.not_before = now.steady.saturating_add(self.pause);
        self.pause = self.pause.saturating_mul(2).min(PAUSE_MAX);
    }

    /// Whether a pause is over.
    pub fn may_try(&self, now: Now) -> bool {
        now.steady >= self.not_before
    }

    /// Whether a backup is due and has not ended well yet.
    pub fn is_wanted(&self) -> bool {
        self.wanted_since.is_some()
    }

    /// When the next backup is due by the wall clock; in the past while one is wanted.
    pub fn next(&self, now: Now) -> Option<DateTime<Utc>> {
        match self.wanted_since {
            Some(since) => {
                let waited = now.steady.saturating_sub(since);
                let due = now.wall.checked_sub_signed(TimeDelta::from_std(waited).ok()?)?;
                Some(self.next.map_or(due, |next| next.min(due)))
            }
            None => self.next,
        }
    }

    /// For how long a backup has been wanted in vain, when that is too long.
    pub fn overdue(&self, now: Now) -> Option<Duration> {
        let waited = now.steady.checked_sub(self.wanted_since?)?;
        let limit = if self.is_running { OVERDUE_RUNNING_AFTER } else { OVERDUE_AFTER.min(self.interval()) };
        (waited >= limit).then_some(waited)
    }

    /// From the due time that is wanted to the one after it.
    fn interval(&self) -> Duration {
        let after = self.next.and_then(|next| (self.schedule.next_after(next)? - next).to_std().ok());
        after.unwrap_or(OVERDUE_AFTER)
    }

    fn deal_with(&mut self, until: DateTime<Utc>) {
        self.anchor = Some(until);
        self.next = self.schedule.next_after(until);
    }
}

#[cfg(test)]
mod tests;
