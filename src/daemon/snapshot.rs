//! What the service knows about itself, as a value: the state of every environment at one moment.

use std::time::Duration;

use super::guardian::SlotReport;
pub use crate::archive::State as Wal;
use crate::archive::{ArchiveStatus, ExposureFigures};
use crate::error::Failure;
pub use crate::operations::state::StoreState;
pub use crate::pg::Timestamp;
use crate::pg::{Lsn, TimelineId};
use crate::util::units::{show_bytes, show_duration};

/// Bytes that have not been stored in time lag when they are older than twice the bound and this.
const LAG_SLACK: Duration = Duration::from_secs(10);
/// And WAL of the server that has not even been received, from this on.
const LAG_BYTES_MAX: u64 = 256 << 20;

/// The whole service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub started_at: Timestamp,
    pub taken_at: Timestamp,
    pub environments: Vec<EnvironmentSnapshot>,
}

/// One environment, as its task last said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvironmentSnapshot {
    pub name: String,
    pub state: State,
    /// Since when it is in this state.
    pub since: Timestamp,
    /// A sentence about the state, for people.
    pub detail: Option<String>,
    /// Why the task ended the last time, until it runs well again.
    pub failure: Option<Failure>,
    pub restarts: u64,
    /// How long WAL may lie outside the store.
    pub rpo: Duration,
    /// Whether WAL flows, and if not, why.
    pub wal: Wal,
    /// Something that somebody should look at, though WAL flows.
    pub alarm: Option<String>,
    pub archive: Option<ArchiveSnapshot>,
    pub backup: Option<BackupProgress>,
    pub backups: BackupsSnapshot,
    /// Our slot, on each host that has it.
    pub slots: Vec<SlotReport>,
    /// What the store held when it was read last.
    pub store: Option<StoreState>,
    pub surveyed_at: Option<Timestamp>,
    /// Why it could not be read the last time.
    pub store_failure: Option<Failure>,
}

/// How well an environment is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The task begins: store and server are being asked.
    Starting,
    /// WAL flows, is stored in time, and a backup leads to it.
    Protected,
    /// WAL flows and is stored, but later than it should be.
    Lagging,
    /// What is committed now could be lost, or not be restored.
    Unprotected,
    /// Somebody must decide: another cluster, another writer or other content.
    Conflict,
    Stopped,
}

/// Where the archive stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveSnapshot {
    pub timeline: TimelineId,
    /// End of the server's WAL, as the stream said last.
    pub server_lsn: Lsn,
    pub received_lsn: Lsn,
    /// Contiguous end of what is in the store.
    pub stored_lsn: Lsn,
    /// Newest moment that the stored WAL provably contains.
    pub covered_until: Option<Timestamp>,
    pub exposure: ExposureFigures,
    pub gaps: u64,
}

/// The backups that there are and will be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackupsSnapshot {
    /// Whether one leads to the WAL that is archived now; `None` until the store was asked.
    pub is_usable: Option<bool>,
    pub newest: Option<NewestBackup>,
    /// By the schedule; in the past while one is wanted.
    pub next_at: Option<Timestamp>,
    pub is_wanted: bool,
    /// One has been wanted for too long.
    pub is_overdue: bool,
    /// Why the last one failed, until one ends well.
    pub failure: Option<Failure>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewestBackup {
    pub id: String,
    pub ended_at: Timestamp,
    pub bytes: u64,
    pub stored_bytes: u64,
}

/// How far a backup is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupProgress {
    /// Accepted; `phase` says what is being done: `checkpoint`, `waiting for WAL`.
    Running {
        phase: String,
        bytes_done: u64,
        bytes_total: Option<u64>,
    },
    Done {
        backup: String,
        bytes_stored: u64,
        summary: String,
    },
    Failed(Failure),
}

impl BackupProgress {
    pub fn accepted() -> Self {
        BackupProgress::Running { phase: "accepted".to_owned(), bytes_done: 0, bytes_total: None }
    }

    pub fn is_final(&self) -> bool {
        !matches!(self, BackupProgress::Running { .. })
    }
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Starting => "starting",
            State::Protected => "protected",
            State::Lagging => "lagging",
            State::Unprotected => "unprotected",
            State::Conflict => "conflict",
            State::Stopped => "stopped",
        }
    }
}

impl ArchiveSnapshot {
    /// WAL of the server that is not stored.
    pub fn bytes_behind(&self) -> u64 {
        self.server_lsn.checked_since(self.stored_lsn).unwrap_or(0)
    }
}

impl EnvironmentSnapshot {
    pub fn new(name: &str, now: Timestamp) -> Self {
        EnvironmentSnapshot {
            name: name.to_owned(),
            state: State::Starting,
            since: now,
            detail: None,
            failure: None,
            restarts: 0,
            rpo: Duration::ZERO,
            wal: Wal::Starting,
            alarm: None,
            archive: None,
            backup: None,
            backups: BackupsSnapshot::default(),
            slots: Vec::new(),
            store: None,
            surveyed_at: None,
            store_failure: None,
        }
    }

    /// Enters a state; `since` moves only when it is another one.
    pub fn enter(&mut self, state: State, detail: Option<String>, now: Timestamp) {
        if self.state != state {
            self.state = state;
            self.since = now;
        }
        self.detail = detail;
    }

    /// Takes over what the archiver says of itself.
    pub fn note_archive(&mut self, status: &ArchiveStatus, now: Timestamp) {
        self.wal = status.state.clone();
        self.alarm = status.alarm.as_ref().map(|primaries| format!("more than one primary answers: {primaries}"));
        if self.wal == Wal::Streaming {
            self.failure = None;
        }
        self.archive = status.timeline.map(|timeline| ArchiveSnapshot {
            timeline,
            server_lsn: status.server_lsn,
            received_lsn: status.received_lsn,
            stored_lsn: status.stored.map_or(Lsn::ZERO, |stream| stream.end_lsn),
            covered_until: status.covered_until,
            exposure: status.exposure,
            gaps: u64::from(status.gaps_found),
        });
        self.judge(now);
    }

    /// Decides how well the environment is protected, from all that is known.
    pub fn judge(&mut self, now: Timestamp) {
        let (state, detail) = self.verdict();
        self.enter(state, detail, now);
    }

    fn verdict(&self) -> (State, Option<String>) {
        match &self.wal {
            Wal::Starting => match &self.failure {
                Some(failure) => (State::Unprotected, Some(format!("failed to {failure}"))),
                None => (State::Starting, None),
            },
            Wal::StoreFailing(why) => (State::Unprotected, Some(format!("the store takes nothing: {why}"))),
            Wal::Disconnected(why) => (State::Unprotected, Some(format!("no connection to the server: {why}"))),
            Wal::Waiting(why) => (State::Unprotected, Some(why.clone())),
            Wal::Conflict(why) => {
                let way_out = format!("`pgrecall incarnation open {0} --confirm {0}` goes on", self.name);
                (State::Conflict, Some(format!("{why}; {way_out} with the server as it is, and keeps the old past")))
            }
            Wal::Stopped => (State::Stopped, None),
            Wal::Streaming => self.verdict_streaming(),
        }
    }

    fn verdict_streaming(&self) -> (State, Option<String>) {
        match self.backups.is_usable {
            None => return (State::Starting, Some("asking the store for backups".to_owned())),
            Some(false) => {
                let what = "no backup leads to the WAL that is archived now";
                let more = match (&self.backup, &self.backups.failure) {
                    (Some(BackupProgress::Running { .. }), _) => "; one is being taken".to_owned(),
                    (_, Some(failure)) => format!("; the last one failed to {failure}"),
                    _ => String::new(),
                };
                return (State::Unprotected, Some(format!("{what}{more}")));
            }
            Some(true) => {}
        }
        if let Some(lag) = self.archive.as_ref().and_then(|archive| lag(archive, self.rpo)) {
            return (State::Lagging, Some(lag));
        }
        let overdue = self.backups.is_overdue.then(|| match &self.backups.failure {
            Some(failure) => format!("a backup is overdue: the last one failed to {failure}"),
            None => "a backup is overdue".to_owned(),
        });
        let dangers = self.slots.iter().filter_map(|slot| Some(slot.danger.as_ref()?.what.clone()));
        let notes: Vec<String> = self.alarm.iter().cloned().chain(overdue).chain(dangers).collect();
        (State::Protected, (!notes.is_empty()).then(|| notes.join("; ")))
    }

    /// What the store holds now: as it was read, with the end that the archive has reached since.
    pub fn current_store(&self) -> Option<StoreState> {
        let mut store = self.store.clone()?;
        let Some(archive) = self.archive.as_ref().filter(|archive| store.timeline == Some(archive.timeline.0)) else {
            return Some(store);
        };
        let read_to = store.stored_to_lsn.as_deref().and_then(|lsn| lsn.parse::<Lsn>().ok());
        if read_to.is_none_or(|read_to| read_to >= archive.stored_lsn) {
            return Some(store);
        }
        let end = archive.stored_lsn.to_string();
        let open = store.window.last_mut().filter(|interval| Some(&interval.to_lsn) == store.stored_to_lsn.as_ref());
        if let Some(interval) = open {
            interval.to_lsn.clone_from(&end);
            interval.to = interval.to.max(archive.covered_until);
            store.covered_until = interval.to;
        }
        store.stored_to_lsn = Some(end);
        Some(store)
    }
}

/// How far behind the archive is, when that is too far.
fn lag(archive: &ArchiveSnapshot, rpo: Duration) -> Option<String> {
    let oldest = Duration::from_millis(archive.exposure.oldest_ms);
    let behind = archive.bytes_behind();
    let late = oldest > rpo * 2 + LAG_SLACK;
    (late || behind > LAG_BYTES_MAX).then(|| {
        let oldest = show_duration(oldest);
        format!("{} are not stored yet, the oldest that has arrived for {oldest}", show_bytes(behind))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streaming() -> EnvironmentSnapshot {
        let mut snapshot = EnvironmentSnapshot::new("shop", Timestamp(0));
        snapshot.rpo = Duration::from_secs(1);
        snapshot.wal = Wal::Streaming;
        snapshot.backups.is_usable = Some(true);
        snapshot.archive = Some(ArchiveSnapshot {
            timeline: TimelineId(1),
            server_lsn: Lsn(1000),
            received_lsn: Lsn(1000),
            stored_lsn: Lsn(900),
            covered_until: None,
            exposure: ExposureFigures::default(),
            gaps: 0,
        });
        snapshot
    }

    fn check(change: impl FnOnce(&mut EnvironmentSnapshot), state: State, says: &str) {
        let mut snapshot = streaming();
        change(&mut snapshot);
        snapshot.judge(Timestamp(7));
        let detail = snapshot.detail.unwrap_or_default();
        assert_eq!(snapshot.state, state, "{detail}");
        assert!(detail.contains(says), "{detail:?} says {says:?}");
    }

    #[test]
    fn protected_is_what_can_be_restored_up_to_now() {
        check(|_| {}, State::Protected, "");
        check(|s| s.wal = Wal::Starting, State::Starting, "");
        check(|s| s.wal = Wal::StoreFailing("403".into()), State::Unprotected, "takes nothing: 403");
        check(|s| s.wal = Wal::Disconnected("refused".into()), State::Unprotected, "no connection");
        check(|s| s.wal = Wal::Conflict("two pasts".into()), State::Conflict, "incarnation open shop");
        check(|s| s.wal = Wal::Stopped, State::Stopped, "");
        check(|s| s.backups.is_usable = None, State::Starting, "asking the store");
        check(|s| s.backups.is_usable = Some(false), State::Unprotected, "no backup leads");
        let late = |s: &mut EnvironmentSnapshot| s.archive.as_mut().expect("one").exposure.oldest_ms = 12_001;
        check(late, State::Lagging, "100 B are not stored yet, the oldest that has arrived for 12.0 s");
        let behind = |s: &mut EnvironmentSnapshot| s.archive.as_mut().expect("one").server_lsn = Lsn(1 << 30);
        check(behind, State::Lagging, "1.00 GiB");
        check(|s| s.backups.is_overdue = true, State::Protected, "a backup is overdue");
        check(|s| s.alarm = Some("two primaries".into()), State::Protected, "two primaries");
    }

    #[test]
    fn the_end_of_the_window_follows_the_archive() {
        use crate::operations::state::RestorableInterval;
        let lsn = |n: u64| Lsn(n).to_string();
        let interval = RestorableInterval {
            from: Some(Timestamp(1)),
            from_lsn: lsn(100),
            to: Some(Timestamp(5)),
            to_lsn: lsn(500),
            ended_by: None,
        };
        let mut snapshot = streaming();
        snapshot.store = Some(StoreState {
            repository: "file:///r/shop".into(),
            incarnation: "1-7".into(),
            system_id: "7".into(),
            major: 18,
            timeline: Some(1),
            stored_from_lsn: Some(lsn(50)),
            stored_to_lsn: Some(lsn(500)),
            covered_until: Some(Timestamp(5)),
            window: vec![interval],
            diverged_tails: Vec::new(),
            backup_count: 1,
            backups: Vec::new(),
            damaged_backups: Vec::new(),
            gaps: Vec::new(),
        });
        snapshot.archive.as_mut().expect("one").covered_until = Some(Timestamp(9));
        let now = snapshot.current_store().expect("a store");
        assert_eq!((now.window[0].to, now.window[0].to_lsn.clone()), (Some(Timestamp(9)), lsn(900)));
        assert_eq!((now.stored_to_lsn, now.covered_until), (Some(lsn(900)), Some(Timestamp(9))));
        // Of another timeline nothing is known yet.
        snapshot.archive.as_mut().expect("one").timeline = TimelineId(2);
        assert_eq!(snapshot.current_store(), snapshot.store);
    }
}
