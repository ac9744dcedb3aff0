//! Why a backup did not become visible.

use std::path::PathBuf;
use std::time::Duration;

use super::source::SourceError;
use crate::error::{Code, Failure};
use crate::pg::{Lsn, TimelineId};
use crate::repository::codec::CodecError;
use crate::repository::{BackupId, RepositoryError};

/// Why a backup did not become visible.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("compress a frame: {0}")]
    Compress(CodecError),
    #[error("start a thread that compresses: {0}")]
    Thread(std::io::Error),
    #[error("sort the list of files in {}: {source}", folder.display())]
    Scratch { folder: PathBuf, source: std::io::Error },
    /// WAL from the start on would be missing.
    #[error("the backup would start at {start_lsn} on timeline {timeline}, and WAL is not stored from there on")]
    StartNotStored { timeline: TimelineId, start_lsn: Lsn },
    #[error("the WAL of the backup, up to {stop_lsn} on timeline {timeline}, was not stored within {} s", waited.as_secs())]
    StopNotStored { timeline: TimelineId, stop_lsn: Lsn, waited: Duration },
    #[error("the server went from timeline {from} to {to} while the backup was taken")]
    TimelineChanged { from: TimelineId, to: TimelineId },
    #[error("{count} files are not as the server's manifest says: {}", examples.join("; "))]
    Mismatch { count: u64, examples: Vec<String> },
    /// What came cannot be a backup of this cluster.
    #[error("{0}")]
    Unfit(String),
    #[error("ask for the stored WAL: {0:#}")]
    Wal(anyhow::Error),
    #[error("another writer has taken over this repository since generation {own}")]
    Superseded { own: String },
    #[error("backup {id} was given up by a prune before it was finished")]
    Dropped { id: BackupId },
    #[error("the backup was cancelled")]
    Cancelled,
}

impl BackupError {
    /// Whether another backup may work without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            BackupError::Source(e) => e.is_retryable(),
            BackupError::Repository(e) => e.is_retryable(),
            BackupError::TimelineChanged { .. }
            | BackupError::StopNotStored { .. }
            | BackupError::Mismatch { .. }
            | BackupError::Wal(_)
            | BackupError::Dropped { .. } => true,
            _ => false,
        }
    }

    /// As a person or a script is told.
    pub fn to_failure(&self) -> Failure {
        let failure = Failure::new(self.code(), self.to_string());
        let failure = match self.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        };
        if self.is_retryable() { failure.retryable() } else { failure }
    }

    fn code(&self) -> Code {
        match self {
            BackupError::Source(e) => e.code(),
            BackupError::Repository(e) if e.is_corrupt() => Code::Corrupt,
            BackupError::Repository(_) | BackupError::Wal(_) | BackupError::StopNotStored { .. } => Code::Store,
            BackupError::Scratch { .. } | BackupError::Thread(_) => Code::Host,
            BackupError::StartNotStored { .. } | BackupError::TimelineChanged { .. } => Code::Postgres,
            BackupError::Mismatch { .. } | BackupError::Unfit(_) => Code::Corrupt,
            BackupError::Superseded { .. } | BackupError::Dropped { .. } => Code::Conflict,
            BackupError::Compress(_) => Code::Internal,
            BackupError::Cancelled => Code::Cancelled,
        }
    }

    /// What an operator can do.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            BackupError::Source(e) => return e.hint(),
            BackupError::Repository(RepositoryError::Store(e)) => e.hint()?,
            BackupError::Scratch { .. } | BackupError::Thread(_) => {
                "Make room there, or set TMPDIR to a directory that has some."
            }
            BackupError::StartNotStored { .. } => {
                "A backup needs the WAL from its start on. Let the daemon archive this server first, and look at `pgrecall status`."
            }
            BackupError::StopNotStored { .. } => {
                "Look at `pgrecall status`: the WAL that the backup needs does not reach the store. Take the backup again when it does."
            }
            BackupError::TimelineChanged { .. } => "Take the backup again: the server was promoted meanwhile.",
            BackupError::Mismatch { .. } => {
                "Bytes changed on their way from the server. Take the backup again; if it happens again, check the memory and the network of both hosts."
            }
            BackupError::Superseded { .. } => {
                "Another daemon works with this repository. Stop one of the two; `pgrecall status` names the other."
            }
            BackupError::Dropped { .. } => {
                "Take the backup again; this one took longer than abandoned backups are kept."
            }
            _ => return None,
        };
        Some(text.to_owned())
    }
}
