//! Looking after the sandboxes: those that are over go, servers that ended are started again, what was never finished is
//! removed.

use std::path::Path;

use futures::StreamExt;

use super::record::{RECORD_FILE, Record, State};
use super::{Area, Claim};
use crate::error::Failure;
use crate::pg::Timestamp;
use crate::util::units::show_duration;

/// Sandboxes that are looked at together: a server that starts slowly delays few others.
const TOGETHER: usize = 4;
/// After a crash its processes may hold the shared memory for a while.
const STARTS_MAX: u32 = 6;

/// Something that was done for a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It had ended by itself, or with the host.
    StartedAgain(Record),
    /// It had ended, and does not start now; the next pass tries again.
    NotStarted(Record, Failure),
    /// It did not start several times, and is left until somebody starts it.
    Failed(Record, Failure),
    /// Its end is near.
    Warned(Record),
    /// Its time was over.
    Expired(Record),
    /// The daemon ended while it was made, or while it was removed.
    Removed(Record),
    /// It is to be removed and cannot be; the next pass tries again.
    NotRemoved(Record, Failure),
}

impl Area {
    /// One pass over all sandboxes. Those that somebody is working on are passed over.
    ///
    /// Cancel safety: what a drop interrupts is done by the next pass.
    ///
    /// # Errors
    /// When the area cannot be listed.
    pub async fn keep(&self, now: Timestamp) -> Result<Vec<Event>, Failure> {
        let listing = self.list()?;
        for (place, problem) in &listing.others {
            self.sweep(place, problem);
        }
        let records = listing.sandboxes.into_iter().map(|found| found.record);
        let looked = futures::stream::iter(records).map(|record| self.keep_one(record, now));
        let events: Vec<Option<Event>> = looked.buffer_unordered(TOGETHER).collect().await;
        Ok(events.into_iter().flatten().collect())
    }

    async fn keep_one(&self, record: Record, now: Timestamp) -> Option<Event> {
        let claim = self.try_claim(&record.id)?;
        // Read again: it may have been changed before it was ours.
        let record = Record::load(&self.place_of(&record)).ok()?;
        if matches!(record.state, State::Making | State::Removing) {
            return Some(self.remove_now(record, &claim, Event::Removed).await);
        }
        let left = record.time_left(now)?;
        if left.is_zero() {
            return Some(self.remove_now(record, &claim, Event::Expired).await);
        }
        if record.state == State::Running && matches!(self.postmaster(&record), Ok(None)) {
            return Some(self.start_again(record).await);
        }
        if left <= self.settings().warn_before && !record.warned {
            return self.warn(record, left);
        }
        None
    }

    async fn remove_now(&self, record: Record, claim: &Claim, event: impl FnOnce(Record) -> Event) -> Event {
        match self.remove(&record, claim).await {
            Ok(()) => event(record),
            Err(failure) => Event::NotRemoved(record, failure),
        }
    }

    async fn start_again(&self, record: Record) -> Event {
        let begun = self.start_server(&record).await;
        let failed_starts = if begun.is_ok() { 0 } else { record.failed_starts.saturating_add(1) };
        let mut noted = Record { failed_starts, ..record.clone() };
        if let Err(failure) = &begun
            && failed_starts >= STARTS_MAX
        {
            noted.state = State::Failed;
            noted.remarks.push(failure.message.clone());
        }
        // When this cannot be written, the next pass counts again.
        if noted != record
            && let Err(error) = noted.save(&self.place_of(&noted))
        {
            tracing::warn!(sandbox = %noted.id, error = %error, "the state of a sandbox cannot be noted");
        }
        match begun {
            Ok(_) => Event::StartedAgain(noted),
            Err(failure) if noted.state == State::Failed => Event::Failed(noted, failure),
            Err(failure) => Event::NotStarted(noted, failure),
        }
    }

    fn warn(&self, record: Record, left: std::time::Duration) -> Option<Event> {
        let record = Record { warned: true, ..record };
        match record.save(&self.place_of(&record)) {
            Ok(()) => Some(Event::Warned(record)),
            Err(error) => {
                let left = show_duration(left);
                tracing::warn!(sandbox = %record.id, error = %error, left, "the end of a sandbox cannot be noted");
                None
            }
        }
    }

    /// A directory without a record: one that was killed before it wrote any, or after it removed it.
    fn sweep(&self, place: &Path, problem: &str) {
        let named = |path: &Path| path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        let Some(_claim) = named(place).and_then(|id| self.try_claim(&id)) else { return };
        // Only an empty one goes by itself, however its record was lost.
        if place.join(RECORD_FILE).exists() || std::fs::remove_dir(place).is_err() {
            tracing::warn!(directory = %place.display(), problem, "no sandbox: it is left as it is");
        }
    }
}
