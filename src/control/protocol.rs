//! What goes over the socket. Fields are only ever added.

use serde::{Deserialize, Serialize};

use crate::daemon::guardian::{Bound, SlotReport};
use crate::daemon::jobs::{JobRecord, LogLine};
use crate::daemon::snapshot::{
    ArchiveSnapshot, BackupProgress, BackupsSnapshot, EnvironmentSnapshot, NewestBackup, Snapshot, StoreState,
    Timestamp, Wal,
};
use crate::error::Failure;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    /// Times are RFC 3339 in UTC.
    pub started_at: String,
    pub now: String,
    pub environments: Vec<EnvironmentStatus>,
    /// Those that wait or run, without their logs; also of environments that are not archived from here.
    #[serde(default)]
    pub jobs: Vec<JobReport>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvironmentStatus {
    pub name: String,
    /// `starting`, `protected`, `lagging`, `unprotected`, `conflict`, `stopped`.
    pub state: String,
    pub since: String,
    pub detail: Option<String>,
    pub failure: Option<Failure>,
    pub restarts: u64,
    /// How WAL flows: `starting`, `streaming`, `store-failing`, `disconnected`, `waiting`, `conflict`, `stopped`.
    #[serde(default)]
    pub wal: String,
    /// How long WAL may lie outside the store.
    #[serde(default)]
    pub rpo_ms: u64,
    pub archive: Option<ArchiveStatus>,
    pub backup: Option<BackupEvent>,
    #[serde(default)]
    pub backups: BackupsStatus,
    #[serde(default)]
    pub slots: Vec<SlotStatus>,
    /// What the store holds; read at `surveyed_at`, its end as it is now.
    pub store: Option<StoreState>,
    pub surveyed_at: Option<String>,
    /// Why the store could not be read the last time.
    pub store_failure: Option<Failure>,
}

/// The backups that there are and will be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupsStatus {
    /// Whether one leads to the WAL that is archived now.
    pub usable: Option<bool>,
    pub newest: Option<NewestBackupStatus>,
    /// In the past while one is wanted.
    pub next_at: Option<Timestamp>,
    pub overdue: bool,
    pub failure: Option<Failure>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewestBackupStatus {
    pub id: String,
    pub ended_at: Timestamp,
    pub bytes: u64,
    pub stored_bytes: u64,
}

/// Our replication slot on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotStatus {
    pub host: String,
    pub slot: String,
    /// `fine`, `warning`, `alarm`.
    pub level: String,
    pub active: bool,
    pub retained_bytes: u64,
    /// What can be kept beyond that, and what bounds it: `max_slot_wal_keep_size` or `disk`.
    pub room_bytes: Option<u64>,
    pub bound: Option<String>,
    pub wal_bytes_per_second: Option<u64>,
    pub seconds_left: Option<u64>,
    pub danger: Option<String>,
    pub advice: Option<String>,
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

/// A job, as `GET /v1/jobs/JOB` and each line of `…/follow` show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobReport {
    pub job: String,
    pub environment: String,
    /// `backup`, `restore`, `sandbox`, `prune`, `verify`, `incident`.
    pub kind: String,
    /// `accepted`, `queued`, `running`, `done`, `failed`, `cancelled`, `interrupted`.
    pub state: String,
    /// Whether it has ended.
    pub is_final: bool,
    pub asked_by: String,
    pub ticket: Option<String>,
    pub request: serde_json::Value,
    /// The host and socket of the daemon whose job it is.
    pub daemon: String,
    pub accepted_at: String,
    pub began_at: Option<String>,
    pub ended_at: Option<String>,
    pub phase: Option<String>,
    pub bytes_done: u64,
    pub bytes_total: Option<u64>,
    pub cancel_asked: bool,
    /// In a stream, only the lines that are new.
    pub log: Vec<JobLogLine>,
    pub result: Option<serde_json::Value>,
    pub error: Option<Failure>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobLogLine {
    pub number: u64,
    pub at: String,
    pub text: String,
}

/// The answer to `GET /v1/jobs`, oldest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jobs {
    pub jobs: Vec<JobReport>,
}

/// The answer to a request that begins a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    pub job: String,
    pub state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorReply {
    pub error: Failure,
}

impl From<&JobRecord> for JobReport {
    fn from(record: &JobRecord) -> Self {
        let (spec, progress) = (&record.spec, &record.progress);
        JobReport {
            job: record.id.to_string(),
            environment: spec.environment.clone(),
            kind: spec.kind.as_str().to_owned(),
            state: record.state.as_str().to_owned(),
            is_final: record.state.is_final(),
            asked_by: spec.asked_by.user.clone(),
            ticket: spec.ticket.clone(),
            request: spec.request.clone(),
            daemon: record.daemon.clone(),
            accepted_at: record.accepted_at.to_string(),
            began_at: record.began_at.map(|time| time.to_string()),
            ended_at: record.ended_at.map(|time| time.to_string()),
            phase: Some(progress.phase.clone()).filter(|phase| !phase.is_empty()),
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            cancel_asked: record.cancel_asked,
            log: record.log.iter().map(JobLogLine::from).collect(),
            result: record.result.clone(),
            error: record.failure.clone(),
        }
    }
}

impl From<&LogLine> for JobLogLine {
    fn from(line: &LogLine) -> Self {
        JobLogLine { number: line.number, at: line.at.to_string(), text: line.text.clone() }
    }
}

impl From<&Snapshot> for Status {
    fn from(snapshot: &Snapshot) -> Self {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started_at: snapshot.started_at.to_string(),
            now: snapshot.taken_at.to_string(),
            environments: snapshot.environments.iter().map(EnvironmentStatus::from).collect(),
            jobs: Vec::new(),
        }
    }
}

impl From<&EnvironmentSnapshot> for EnvironmentStatus {
    fn from(snapshot: &EnvironmentSnapshot) -> Self {
        let wal = match snapshot.wal {
            Wal::Starting => "starting",
            Wal::Streaming => "streaming",
            Wal::StoreFailing(_) => "store-failing",
            Wal::Disconnected(_) => "disconnected",
            Wal::Waiting(_) => "waiting",
            Wal::Conflict(_) => "conflict",
            Wal::Stopped => "stopped",
        };
        EnvironmentStatus {
            name: snapshot.name.clone(),
            state: snapshot.state.as_str().to_owned(),
            since: snapshot.since.to_string(),
            detail: snapshot.detail.clone(),
            failure: snapshot.failure.clone(),
            restarts: snapshot.restarts,
            wal: wal.to_owned(),
            rpo_ms: u64::try_from(snapshot.rpo.as_millis()).unwrap_or(u64::MAX),
            archive: snapshot.archive.as_ref().map(ArchiveStatus::from),
            backup: snapshot.backup.as_ref().map(BackupEvent::from),
            backups: BackupsStatus::from(&snapshot.backups),
            slots: snapshot.slots.iter().map(SlotStatus::from).collect(),
            store: snapshot.current_store(),
            surveyed_at: snapshot.surveyed_at.map(|time| time.to_string()),
            store_failure: snapshot.store_failure.clone(),
        }
    }
}

impl From<&BackupsSnapshot> for BackupsStatus {
    fn from(snapshot: &BackupsSnapshot) -> Self {
        let newest = |newest: &NewestBackup| NewestBackupStatus {
            id: newest.id.clone(),
            ended_at: newest.ended_at,
            bytes: newest.bytes,
            stored_bytes: newest.stored_bytes,
        };
        BackupsStatus {
            usable: snapshot.is_usable,
            newest: snapshot.newest.as_ref().map(newest),
            next_at: snapshot.next_at,
            overdue: snapshot.is_overdue,
            failure: snapshot.failure.clone(),
        }
    }
}

impl From<&SlotReport> for SlotStatus {
    fn from(report: &SlotReport) -> Self {
        let bound = |bound| match bound {
            Bound::SlotLimit => "max_slot_wal_keep_size".to_owned(),
            Bound::Disk => "disk".to_owned(),
        };
        SlotStatus {
            host: report.host.clone(),
            slot: report.slot.clone(),
            level: report.level.as_str().to_owned(),
            active: report.is_active,
            retained_bytes: report.retained_bytes,
            room_bytes: report.room.map(|(bytes, _)| bytes),
            bound: report.room.map(|(_, of)| bound(of)),
            wal_bytes_per_second: report.bytes_per_second,
            seconds_left: report.time_left.map(|left| left.as_secs()),
            danger: report.danger.as_ref().map(|danger| danger.what.clone()),
            advice: report.danger.as_ref().map(|danger| danger.advice.clone()),
        }
    }
}

impl From<&ArchiveSnapshot> for ArchiveStatus {
    fn from(snapshot: &ArchiveSnapshot) -> Self {
        ArchiveStatus {
            timeline: snapshot.timeline.0,
            server_lsn: snapshot.server_lsn.to_string(),
            bytes_behind: snapshot.bytes_behind(),
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
