//! What goes over the socket. Fields are only ever added.

use serde::{Deserialize, Serialize};

use crate::daemon::snapshot::{ArchiveSnapshot, BackupProgress, EnvironmentSnapshot, Snapshot, State};
use crate::error::Failure;

pub const STATUS_PATH: &str = "/v1/status";

/// The path that asks for a backup.
pub fn backup_path(environment: &str) -> String {
    format!("/v1/environments/{environment}/backup")
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    /// Times are RFC 3339 in UTC.
    pub started_at: String,
    pub now: String,
    pub environments: Vec<EnvironmentStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvironmentStatus {
    pub name: String,
    /// `starting`, `streaming`, `waiting`, `conflict`, `failed`, `stopped`.
    pub state: String,
    pub since: String,
    pub detail: Option<String>,
    pub failure: Option<Failure>,
    pub restarts: u64,
    pub archive: Option<ArchiveStatus>,
    pub backup: Option<BackupEvent>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveStatus {
    pub timeline: u32,
    /// End of the server's WAL, as the stream said last.
    pub server_lsn: String,
    /// What of it is not stored.
    pub bytes_behind: u64,
    pub received_lsn: String,
    pub stored_lsn: String,
    pub covered_until: Option<String>,
    pub exposure: Exposure,
    pub gaps: u64,
}

/// How long bytes wait from their arrival until they are stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exposure {
    /// Age of the oldest that waits now.
    pub oldest_ms: u64,
    /// Of the last thousand or so that were stored.
    pub p50_ms: Option<u64>,
    pub p99_ms: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum BackupEvent {
    Running { phase: String, bytes_done: u64, bytes_total: Option<u64> },
    Done { backup: String, bytes_stored: u64, summary: String },
    Failed { error: Failure },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    pub error: Failure,
}

impl From<&Snapshot> for Status {
    fn from(snapshot: &Snapshot) -> Self {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_at: snapshot.started_at.to_string(),
            now: snapshot.taken_at.to_string(),
            environments: snapshot.environments.iter().map(EnvironmentStatus::from).collect(),
        }
    }
}

impl From<&EnvironmentSnapshot> for EnvironmentStatus {
    fn from(snapshot: &EnvironmentSnapshot) -> Self {
        let state = match snapshot.state {
            State::Starting => "starting",
            State::Streaming => "streaming",
            State::Waiting => "waiting",
            State::Conflict => "conflict",
            State::Failed => "failed",
            State::Stopped => "stopped",
        };
        EnvironmentStatus {
            name: snapshot.name.clone(),
            state: state.to_owned(),
            since: snapshot.since.to_string(),
            detail: snapshot.detail.clone(),
            failure: snapshot.failure.clone(),
            restarts: snapshot.restarts,
            archive: snapshot.archive.as_ref().map(ArchiveStatus::from),
            backup: snapshot.backup.as_ref().map(BackupEvent::from),
        }
    }
}

impl From<&ArchiveSnapshot> for ArchiveStatus {
    fn from(snapshot: &ArchiveSnapshot) -> Self {
        ArchiveStatus {
            timeline: snapshot.timeline.0,
            server_lsn: snapshot.server_lsn.to_string(),
            bytes_behind: snapshot.server_lsn.checked_since(snapshot.stored_lsn).unwrap_or(0),
            received_lsn: snapshot.received_lsn.to_string(),
            stored_lsn: snapshot.stored_lsn.to_string(),
            covered_until: snapshot.covered_until.map(|time| time.to_string()),
            exposure: Exposure {
                oldest_ms: snapshot.exposure.oldest_ms,
                p50_ms: snapshot.exposure.p50_ms,
                p99_ms: snapshot.exposure.p99_ms,
            },
            gaps: snapshot.gaps,
        }
    }
}

impl From<&BackupProgress> for BackupEvent {
    fn from(progress: &BackupProgress) -> Self {
        match progress.clone() {
            BackupProgress::Running { phase, bytes_done, bytes_total } => {
                BackupEvent::Running { phase, bytes_done, bytes_total }
            }
            BackupProgress::Done { backup, bytes_stored, summary } => {
                BackupEvent::Done { backup, bytes_stored, summary }
            }
            BackupProgress::Failed(error) => BackupEvent::Failed { error },
        }
    }
}
