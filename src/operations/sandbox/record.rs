//! `sandbox.json`: what a sandbox is, beside its data and only about them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, Major, TimelineId, Timestamp};
use crate::util::durable_fs;

/// Name of the record in a sandbox's directory.
pub const RECORD_FILE: &str = "sandbox.json";
const RECORD_BYTES_MAX: u64 = 256 << 10;
const ID_BYTES_MAX: usize = 40;

/// The id of the job that made a sandbox; safe in names of files and of roles.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxId(String);

/// A text that is the id of no sandbox.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the id of a sandbox")]
pub struct ParseSandboxIdError(String);

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
    pub id: SandboxId,
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

impl SandboxId {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of the role that is made for people.
    pub fn role(&self) -> String {
        format!("pgrecall_{}", self.0)
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for SandboxId {
    type Error = ParseSandboxIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let plain = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
        match (1..=ID_BYTES_MAX).contains(&text.len()) && text.bytes().all(plain) {
            true => Ok(SandboxId(text)),
            false => Err(ParseSandboxIdError(text)),
        }
    }
}

impl FromStr for SandboxId {
    type Err = ParseSandboxIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.to_owned().try_into()
    }
}

impl From<SandboxId> for String {
    fn from(id: SandboxId) -> String {
        id.0
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn record(id: &str, environment: &str) -> Record {
        Record {
            id: id.parse().expect("an id"),
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
        let record = record("job_1", "shop");
        for (environment, id, expected) in [("shop", "job_1", true), ("shop", "job_2", false), ("blog", "job_1", false)]
        {
            let place = dir.path().join(environment).join(id);
            std::fs::create_dir_all(&place).expect("make it");
            record.save(&place).expect("write");
            assert_eq!(Record::load(&place).is_ok_and(|loaded| loaded == record), expected, "{environment}/{id}");
        }
        assert!(Record::load(&dir.path().join("shop/none")).expect_err("there is none").is_missing());
        let broken = dir.path().join("shop/job_1");
        durable_fs::write(&broken.join(RECORD_FILE), b"{", 0o600).expect("write");
        assert!(!Record::load(&broken).expect_err("half a record").is_missing());
    }

    #[test]
    fn ids_are_no_paths() {
        for text in ["", "..", "a/b", "A", "a-b", "é", &"a".repeat(41)] {
            assert!(text.parse::<SandboxId>().is_err(), "{text}");
        }
        assert_eq!("20261118t110640z_cdef01".parse::<SandboxId>().expect("an id").role().len(), 32);
    }

    #[test]
    fn what_is_left_is_never_below_zero() {
        let record = record("job_1", "shop");
        assert_eq!(record.time_left(Timestamp(3_000_000)), Some(Duration::from_secs(2)));
        assert_eq!(record.time_left(Timestamp(9_000_000)), Some(Duration::ZERO));
        assert_eq!(Record { expires_at: None, ..record }.time_left(Timestamp(0)), None);
    }
}
