//! Where a backup's files come from: a stream of events, pulled one after the other.
//!
//! Order of a source's life: [`Source::position`], [`Source::begin`], then [`Source::next`] until [`Event::End`]. Files
//! do not overlap: after [`Event::File`] come its bytes, then [`Event::FileEnd`]. The manifest, when there is one, comes
//! after the last file.

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::Code;
use crate::pg::{Lsn, TimelineId};
use crate::replication::ReplicationError;
use crate::repository::backup_object::{DamagedBlock, Tablespace};

/// Reads the files of a cluster, or of anything that looks like one.
#[async_trait]
pub trait Source: Send {
    /// Where the server is before the backup begins.
    async fn position(&mut self) -> Result<SourcePosition, SourceError>;

    /// Begins the backup: a checkpoint at once, then the first row.
    async fn begin(&mut self) -> Result<SourceStart, SourceError>;

    /// The next event; [`Event::End`] is the last one.
    async fn next(&mut self) -> Result<Event, SourceError>;
}

/// A server's place in its history.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourcePosition {
    pub timeline: TimelineId,
    pub lsn: Lsn,
    /// A standby's backup starts at its last restartpoint, which lies before `lsn`.
    pub from_standby: bool,
}

/// What is known when the backup has begun.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceStart {
    pub timeline: TimelineId,
    /// Replay begins here.
    pub start_lsn: Lsn,
    pub tablespaces: Vec<Tablespace>,
    /// About how many bytes will come.
    pub bytes_estimate: Option<u64>,
    /// The checksums of the manifest that will come; `None` when none comes.
    pub checksums: Option<ChecksumKind>,
}

/// How the manifest tells whether a file arrived as it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChecksumKind {
    Crc32c,
    Sha256,
}

/// One step of the stream. Paths are relative to the data directory; files of tablespace N lie below `pg_tblspc/N/`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    File(Meta),
    Data(Bytes),
    FileEnd,
    Directory(Meta),
    Symlink {
        meta: Meta,
        target: String,
    },
    /// The server found a page damaged while it read it.
    Damaged(DamagedBlock),
    /// A piece of the server's manifest.
    Manifest(Bytes),
    /// `None` when the server reported damaged pages instead: then the manifest says where the backup ends.
    End(Option<SourceEnd>),
}

/// What a file is called and what the file system says of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Seconds since 1970.
    pub modified: i64,
    pub bytes: u64,
}

/// Where the backup ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SourceEnd {
    pub timeline: TimelineId,
    /// The cluster is consistent when replay has reached this.
    pub stop_lsn: Lsn,
}

/// Why files could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("read {path}: {source}")]
    Io { path: String, source: std::io::Error },
    /// The server, or the way to it.
    #[error(transparent)]
    Server(#[from] ReplicationError),
    #[error("the name of the file {path:?} is not UTF-8")]
    NotUtf8 { path: String },
    /// What came is not what a source may send.
    #[error("{0}")]
    Malformed(String),
}

impl SourceError {
    /// Whether another backup may work without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            // The standby was promoted meanwhile.
            SourceError::Server(e) if e.server_message().is_some_and(|m| m.sqlstate == "55000") => true,
            SourceError::Server(e) => e.is_retryable(),
            _ => false,
        }
    }

    pub fn code(&self) -> Code {
        match self {
            SourceError::Server(e) => e.code(),
            _ => Code::Postgres,
        }
    }

    /// What an operator can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            SourceError::Server(e) => Self::server_hint(e),
            SourceError::NotUtf8 { .. } => {
                Some("PostgreSQL makes no such files: move it out of the data directory, or rename it.".into())
            }
            _ => None,
        }
    }
}
