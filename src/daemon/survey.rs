//! What the store holds of an environment, read now and then, so that `status` need not ask a store for every environment.
//!
//! Read when the service starts, and again when something changed what can be restored: another timeline, a gap, a backup; else
//! every hour, for what others do to the store. Between two readings the end of the window follows the archive
//! ([`super::snapshot::EnvironmentSnapshot::current_store`]).

use std::time::Duration;

use tokio::sync::watch;

use super::snapshot::EnvironmentSnapshot;
use crate::archive::ArchiveStatus;
use crate::error::{Code, Failure};
use crate::operations::state;
use crate::pg::{Lsn, TimelineId};
use crate::repository::Repository;
use crate::util::clock;
use crate::util::retry::Backoff;

const INTERVAL: Duration = Duration::from_hours(1);
/// Before a reading: what happens together is read once, and many environments do not all read at the same moment.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_SPREAD: Duration = Duration::from_secs(5);
const TIME_MAX: Duration = Duration::from_secs(300);

/// Reads the store for the snapshot.
pub struct Surveyor {
    pub repository: Repository,
    pub archive: watch::Receiver<ArchiveStatus>,
    pub snapshot: watch::Sender<EnvironmentSnapshot>,
}

/// What changes with what can be restored.
#[derive(PartialEq, Eq)]
struct Mark {
    timeline: Option<TimelineId>,
    stored_from: Option<Lsn>,
    gaps: u32,
}

impl Mark {
    fn of(status: &ArchiveStatus) -> Mark {
        let stored_from = status.stored.map(|stored| stored.start_lsn);
        Mark { timeline: status.timeline, stored_from, gaps: status.gaps_found }
    }
}

impl Surveyor {
    /// Never ends.
    ///
    /// Cancel safety: safe.
    pub async fn run(mut self) {
        let mut backoff = Backoff::new(Duration::from_secs(30), INTERVAL);
        let mut snapshot = self.snapshot.subscribe();
        loop {
            tokio::time::sleep(PAUSE_MIN + PAUSE_SPREAD.mul_f64(rand::random())).await;
            let mark = Mark::of(&self.archive.borrow());
            let newest = newest(&snapshot.borrow());
            let pause = match self.read().await {
                Ok(()) => {
                    backoff.reset();
                    INTERVAL
                }
                Err(failure) => {
                    tracing::debug!(error = %failure, "read what the store holds: failed, will be tried again");
                    self.snapshot.send_modify(|snapshot| snapshot.store_failure = Some(failure));
                    backoff.delay()
                }
            };
            tokio::select! {
                Ok(_) = self.archive.wait_for(|status| Mark::of(status) != mark) => {}
                Ok(_) = snapshot.wait_for(|snapshot| self::newest(snapshot) != newest) => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn read(&self) -> Result<(), Failure> {
        let late = |_| Failure::new(Code::Store, format!("read what the store holds within {} s", TIME_MAX.as_secs()));
        let read = tokio::time::timeout(TIME_MAX, state::load(&self.repository)).await;
        let mut store = read.map_err(late)??;
        if let Some(store) = &mut store {
            // The others are listed by who wants to see them.
            let newest = store.backups.pop();
            store.backups = newest.into_iter().collect();
        }
        self.snapshot.send_modify(|snapshot| {
            snapshot.store = store;
            snapshot.store_failure = None;
            snapshot.surveyed_at = Some(clock::now().into());
        });
        Ok(())
    }
}

fn newest(snapshot: &EnvironmentSnapshot) -> Option<String> {
    snapshot.backups.newest.as_ref().map(|newest| newest.id.clone())
}
