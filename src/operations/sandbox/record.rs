//! `sandbox.json`: what a sandbox is, beside its data and only about them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, Major, TimelineId, Timestamp};
use crate::repository::JobId;
use crate::util::durable_fs;

/// Name of the record in a sandbox's directory.
pub const RECORD_FILE: &str = "sandbox.json";
const RECORD_BYTES_MAX: u64 = 256 << 10;

/// What becomes of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Files are fetched, WAL is replayed.
    Making,
    /// Its server is to run; one that ended is started again.
    Running,
    /// Somebody stopped its server.
    Stopped,
    /// Its server ended and does not start any more.
    Failed,
    /// It belongs to an operator, and is left alone.
    Released,
    /// It is being removed.
    Removing,
}

/// Who asked for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    pub uid: Option<u32>,
    pub user: String,
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// That of the job that made it.
    pub id: JobId,
    pub environment: String,
    pub asked_by: Asked,
    pub ticket: Option<String>,
    /// The target, as it was asked for.
    pub target: String,
    pub timeline: TimelineId,
    pub target_lsn: Lsn,
    pub inclusive: bool,
    pub backup: String,
    pub major: Major,
    pub created_at: Timestamp,
    /// `None` once it was released.
    pub expires_at: Option<Timestamp>,
    /// Whether its end was announced.
    #[serde(default)]
    pub warned: bool,
    pub state: State,
    /// How often in a row its server did not start.
    #[serde(default)]
    pub failed_starts: u32,
    /// The role for people, and whether it may write.
    pub role: String,
    pub writable: bool,
    /// A superuser of the cluster, once it is known.
    pub superuser: Option<String>,
    pub socket_directory: PathBuf,
    pub port: u16,
    /// What the plan said that it takes, for the quota.
    pub planned_bytes: u64,
    /// Where PostgreSQL's programs are looked for first.
    #[serde(default)]
    pub postgres_bin_dirs: Vec<PathBuf>,
    #[serde(default)]
    pub databases: Vec<String>,
    /// Sentences that a person should read.
    #[serde(default)]
    pub remarks: Vec<String>,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{} is no record of a sandbox: {why}", path.display())]
    Unreadable { path: PathBuf, why: String },
}

impl RecordError {
    pub fn is_missing(&self) -> bool {
        matches!(self, RecordError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    }
}

impl Record {
    /// Reads the record of a sandbox's directory.
    ///
    /// # Errors
    /// Also when it is the record of another sandbox: a directory that was copied is none.
    pub fn load(place: &Path) -> Result<Record, RecordError> {
        let path = place.join(RECORD_FILE);
        let io = |source| RecordError::Io { action: "read", path: path.clone(), source };
        let unreadable = |why: String| RecordError::Unreadable { path: path.clone(), why };
        if std::fs::metadata(&path).map_err(io)?.len() > RECORD_BYTES_MAX {
            return Err(unreadable("it is too large".to_owned()));
        }
        let bytes = std::fs::read(&path).map_err(io)?;
        let record: Record = serde_json::from_slice(&bytes).map_err(|error| unreadable(error.to_string()))?;
        let named = |index: usize| place.iter().rev().nth(index).and_then(|name| name.to_str());
        if named(0) != Some(record.id.as_str()) || named(1) != Some(&record.environment) {
            return Err(unreadable(format!("it speaks of {} of {}", record.id, record.environment)));
        }
        Ok(record)
    }

    pub fn save(&self, place: &Path) -> Result<(), RecordError> {
        let path = place.join(RECORD_FILE);
        let bytes = serde_json::to_vec_pretty(self).expect("a record has only text keys");
        durable_fs::write(&path, &bytes, 0o600).map_err(|source| RecordError::Io { action: "write", path, source })
    }

    /// How long it still lives; zero when it is over, `None` when it has no end.
    pub fn time_left(&self, now: Timestamp) -> Option<Duration> {
        let left = self.expires_at?.0.saturating_sub(now.0);
        Some(Duration::from_micros(u64::try_from(left).unwrap_or(0)))
    }
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Making => "making",
            State::Running => "running",
            State::Stopped => "stopped",
            State::Failed => "failed",
            State::Released => "released",
            State::Removing => "removing",
        }
    }
}

/// The name of the role that is made for people.
pub fn role_of(id: &JobId) -> String {
    format!("pgrecall_{id}")
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// An id for each number.
    pub fn id(number: u32) -> JobId {
        JobId::new(Timestamp(0), number)
    }

    pub fn record(number: u32, environment: &str) -> Record {
        Record {
            id: id(number),
            environment: environment.to_owned(),
            asked_by: Asked { uid: Some(1000), user: "ann".to_owned() },
            ticket: Some("T-1".to_owned()),
            target: "latest".to_owned(),
            timeline: TimelineId(1),
            target_lsn: Lsn(0x100),
            inclusive: true,
            backup: "20261118T110640Z-cdef01".to_owned(),
            major: Major(18),
            created_at: Timestamp(0),
            expires_at: Some(Timestamp(5_000_000)),
            warned: false,
            state: State::Stopped,
            failed_starts: 0,
            role: "pgrecall_x".to_owned(),
            writable: false,
            superuser: None,
            socket_directory: PathBuf::from("/nowhere"),
            port: 5432,
            planned_bytes: 100,
            postgres_bin_dirs: Vec::new(),
            databases: Vec::new(),
            remarks: Vec::new(),
        }
    }

    #[test]
    fn a_record_comes_back_from_its_own_directory_only() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let record = record(1, "shop");
        for (environment, number, expected) in [("shop", 1, true), ("shop", 2, false), ("blog", 1, false)] {
            let place = dir.path().join(environment).join(id(number).as_str());
            std::fs::create_dir_all(&place).expect("make it");
            record.save(&place).expect("write");
            let same = Record::load(&place).is_ok_and(|loaded| loaded == record);
            assert_eq!(same, expected, "{environment} {number}");
        }
        assert!(Record::load(&dir.path().join("shop/none")).expect_err("there is none").is_missing());
        let broken = dir.path().join("shop").join(id(1).as_str());
        durable_fs::write(&broken.join(RECORD_FILE), b"{", 0o600).expect("write");
        assert!(!Record::load(&broken).expect_err("half a record").is_missing());
    }

    #[test]
    fn what_is_left_is_never_below_zero() {
        let record = record(1, "shop");
        assert_eq!(record.time_left(Timestamp(3_000_000)), Some(Duration::from_secs(2)));
        assert_eq!(record.time_left(Timestamp(9_000_000)), Some(Duration::ZERO));
        assert_eq!(Record { expires_at: None, ..record }.time_left(Timestamp(0)), None);
    }
}
