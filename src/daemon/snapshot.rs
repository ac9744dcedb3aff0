//! What the service knows about itself, as a value: the state of every environment at one moment.

use crate::archive::ExposureFigures;
use crate::error::Failure;
use crate::pg::{Lsn, TimelineId, Timestamp};

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
    pub archive: Option<ArchiveSnapshot>,
    pub backup: Option<BackupProgress>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The task begins: store and server are being asked.
    Starting,
    /// WAL flows.
    Streaming,
    /// The task works but WAL does not flow: the server, the slot or the store is waited for.
    Waiting,
    /// Somebody must decide: another cluster, another writer or other content.
    Conflict,
    /// The task ended with an error and is started again after a pause.
    Failed,
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

impl EnvironmentSnapshot {
    pub fn new(name: &str, now: Timestamp) -> Self {
        EnvironmentSnapshot {
            name: name.to_owned(),
            state: State::Starting,
            since: now,
            detail: None,
            failure: None,
            restarts: 0,
            archive: None,
            backup: None,
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
}
