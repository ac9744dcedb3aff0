//! The cluster's files, as `BASE_BACKUP` sends them, one event at a time.
//!
//! Memory is bounded: an event is at most a piece of one message, nothing is read ahead. Until 14 there is one copy for
//! each tablespace and one for the manifest; from 15 on a single copy whose messages say what they are. WAL is never asked
//! for (it is archived), and the server does not wait for its own archiver.
//! Damaged pages come as [`BackupEvent::Notice`]; the server then fails after the last byte, which is
//! [`ReplicationError::ChecksumsFailed`]: whoever wants the backup all the same repeats it without verification.
//! Source: PostgreSQL documentation "Streaming Replication Protocol", `BASE_BACKUP`;
//! `src/backend/backup/{basebackup,basebackup_copy}.c` (14: `src/backend/replication/basebackup.c`), 14–18.

use std::path::PathBuf;

use bytes::Bytes;

use super::ServerMessage;
use super::connection::{Connection, Rows};
use super::error::{Doing, ReplicationError};
use super::session::Session;
use super::tar::{TarEntry, TarEvent, TarKind, TarReader};
use super::wire::{Cursor, Frame, decode_row};
use crate::pg::{Lsn, Major, TimelineId};

/// With what the server's manifest vouches for each file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ManifestChecksums {
    /// Costs the server nearly nothing.
    #[default]
    Crc32c,
    /// Costs the server a third to a half of the throughput.
    Sha256,
}

/// What to ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// Stands in `backup_label`.
    pub label: String,
    /// Checkpoint at once instead of spread over time.
    pub fast_checkpoint: bool,
    pub manifest_checksums: ManifestChecksums,
    /// Pages are checked by the server; a wrong one fails the backup after its last byte.
    pub verify_checksums: bool,
    /// kB a second, 32 to 1048576.
    pub max_rate_kb: Option<u32>,
}

/// What the server says before the first file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupStart {
    pub start_lsn: Lsn,
    pub timeline: TimelineId,
    pub tablespaces: Vec<Tablespace>,
    /// The data directory's estimated size, without tablespaces.
    pub base_size_kb: u64,
}

/// A tablespace outside the data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    pub oid: u32,
    pub path: String,
    /// Estimated.
    pub size_kb: u64,
}

/// WAL up to here is needed to make the backup consistent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupEnd {
    pub end_lsn: Lsn,
    pub timeline: TimelineId,
}

/// Where an entry belongs: its path is relative to the data directory or to the tablespace's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupEntry {
    /// `None` is the data directory.
    pub tablespace: Option<u32>,
    pub path: PathBuf,
    pub mode: u32,
    /// Seconds since 1970.
    pub mtime: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupEvent {
    /// `Data` up to `size` bytes and `EndOfFile` follow.
    File {
        entry: BackupEntry,
        size: u64,
    },
    Directory(BackupEntry),
    Symlink {
        entry: BackupEntry,
        target: PathBuf,
    },
    /// A piece of the current file.
    Data(Bytes),
    EndOfFile,
    /// A piece of the manifest, after all files.
    Manifest(Bytes),
    /// Bytes that the server has read so far; from 15 on.
    Progress(u64),
    /// [`ServerMessage::checksum_failure`] tells a damaged page.
    Notice(ServerMessage),
    /// The last event: everything has come.
    End(BackupEnd),
}

/// A running `BASE_BACKUP`. Dropping it ends the connection, and with it the server's work.
#[derive(Debug)]
pub struct BaseBackup {
    connection: Connection,
    /// Until 14: the archives in the order of the copies.
    archives: Option<std::vec::IntoIter<Option<u32>>>,
    part: Part,
    tar: TarReader,
    end: Option<BackupEnd>,
    failure: Option<ReplicationError>,
    done: bool,
}

/// What the bytes that come are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    /// Before the first archive, and between two copies.
    Between,
    Archive(Option<u32>),
    Manifest,
    /// Everything has come.
    After,
}

impl Default for BaseBackupOptions {
    fn default() -> Self {
        BaseBackupOptions {
            label: "pgrecall".to_owned(),
            fast_checkpoint: true,
            manifest_checksums: ManifestChecksums::default(),
            verify_checksums: true,
            max_rate_kb: None,
        }
    }
}

impl BaseBackupOptions {
    fn command(&self, major: Major) -> String {
        // The grammar of replication commands knows no backslashes.
        let label = self.label.replace('\'', "''");
        let checksums = match self.manifest_checksums {
            ManifestChecksums::Crc32c => "CRC32C",
            ManifestChecksums::Sha256 => "SHA256",
        };
        let mut options = vec![format!("LABEL '{label}'")];
        if major < Major(15) {
            options.push("PROGRESS NOWAIT TABLESPACE_MAP MANIFEST 'yes'".to_owned());
            options.push(format!("MANIFEST_CHECKSUMS '{checksums}'"));
            options.extend(self.fast_checkpoint.then(|| "FAST".to_owned()));
            options.extend((!self.verify_checksums).then(|| "NOVERIFY_CHECKSUMS".to_owned()));
            options.extend(self.max_rate_kb.map(|rate| format!("MAX_RATE {rate}")));
            return format!("BASE_BACKUP {}", options.join(" "));
        }
        let checkpoint = if self.fast_checkpoint { "fast" } else { "spread" };
        options.push("PROGRESS true, WAIT false, TABLESPACE_MAP true, MANIFEST 'yes'".to_owned());
        options.push(format!("MANIFEST_CHECKSUMS '{checksums}', CHECKPOINT '{checkpoint}'"));
        options.push(format!("VERIFY_CHECKSUMS {}", self.verify_checksums));
        options.extend(self.max_rate_kb.map(|rate| format!("MAX_RATE {rate}")));
        format!("BASE_BACKUP ({})", options.join(", "))
    }
}

impl BackupStart {
    /// The estimated size of everything.
    pub fn size_kb(&self) -> u64 {
        self.tablespaces.iter().fold(self.base_size_kb, |sum, tablespace| sum.saturating_add(tablespace.size_kb))
    }
}

impl Session {
    /// Starts a base backup: returns when the server has made its checkpoint, which may take minutes when it is not fast.
    ///
    /// # Errors
    /// `Server`: 42501 where the server's own user cannot read a file (`could not open file "./…"`) comes later, from
    /// [`BaseBackup::next`].
    pub async fn base_backup(self, options: &BaseBackupOptions) -> Result<(BackupStart, BaseBackup), ReplicationError> {
        BaseBackup::start(self.connection, options).await
    }
}

impl BaseBackup {
    async fn start(
        mut connection: Connection,
        options: &BaseBackupOptions,
    ) -> Result<(BackupStart, Self), ReplicationError> {
        let major = connection.parameters.major()?;
        connection.send_query(&options.command(major)).await?;
        let mut results: Vec<Rows> = Vec::new();
        loop {
            let Frame { tag, body } = connection.io.reader.next().await?;
            match tag {
                b'T' => results.push(Rows::with_columns(body)?),
                b'D' => {
                    let rows = results.last_mut().ok_or_else(|| unexpected(tag))?;
                    rows.rows.push(decode_row(body)?);
                }
                b'C' => {}
                b'H' => break,
                b'E' => return Err(connection.failure(body, Doing::Command)?),
                tag => connection.passing(tag, body)?,
            }
        }
        let [start, tablespaces] = results.as_slice() else {
            return Err(ReplicationError::protocol(format!("BASE_BACKUP begins with {} row sets", results.len())));
        };
        let position = position(start.rows.first().map(Vec::as_slice).unwrap_or_default())?;
        let (start, order) = read_tablespaces(position, tablespaces)?;
        let mut archives = (major < Major(15)).then(|| order.into_iter());
        // The first copy has begun.
        let part = match &mut archives {
            Some(archives) => archives.next().map_or(Part::Manifest, Part::Archive),
            None => Part::Between,
        };
        let tar = TarReader::default();
        let backup = BaseBackup { connection, archives, part, tar, end: None, failure: None, done: false };
        Ok((start, backup))
    }

    /// What comes next; after `End` or an error there is nothing more.
    ///
    /// Cancel safety: nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// `ChecksumsFailed` after the last byte; `Protocol` when an archive is not what it should be; `Server`,
    /// `ServerStopping`, `ConnectionLost`.
    pub async fn next(&mut self) -> Result<BackupEvent, ReplicationError> {
        if self.done {
            return Err(ReplicationError::protocol("the base backup has ended"));
        }
        loop {
            if let Part::Archive(tablespace) = self.part
                && let Some(event) = self.tar.next().map_err(|e| ReplicationError::protocol(e.to_string()))?
            {
                return Ok(from_tar(tablespace, event));
            }
            let frame = self.connection.io.reader.next().await?;
            if let Some(event) = self.take(frame)? {
                return Ok(event);
            }
        }
    }

    /// The connection, after `End` or `ChecksumsFailed`.
    ///
    /// # Errors
    /// `Protocol` before.
    pub fn into_session(self) -> Result<Session, ReplicationError> {
        if !self.done {
            return Err(ReplicationError::protocol("the base backup has not ended"));
        }
        Ok(Session { connection: self.connection })
    }

    fn take(&mut self, frame: Frame) -> Result<Option<BackupEvent>, ReplicationError> {
        let Frame { tag, body } = frame;
        match tag {
            b'd' if self.archives.is_some() => self.take_data(body),
            b'd' => self.take_message(body),
            b'c' => {
                self.end_archive()?;
                self.part =
                    if self.archives.is_some() && self.part != Part::Manifest { Part::Between } else { Part::After };
                Ok(None)
            }
            b'H' => {
                let archives = self.archives.as_mut().filter(|_| self.part == Part::Between);
                let archives = archives.ok_or_else(|| unexpected(tag))?;
                self.part = archives.next().map_or(Part::Manifest, Part::Archive);
                Ok(None)
            }
            b'T' | b'C' if self.part == Part::After => Ok(None),
            b'D' if self.part == Part::After => {
                let (end_lsn, timeline) = position(&decode_row(body)?)?;
                self.end = Some(BackupEnd { end_lsn, timeline });
                Ok(None)
            }
            b'E' => {
                self.failure = Some(self.sort_failure(body)?);
                Ok(None)
            }
            b'Z' => self.ready(),
            b'N' => Ok(Some(BackupEvent::Notice(ServerMessage::decode(body)))),
            tag => self.connection.passing(tag, body).map(|()| None),
        }
    }

    /// XX001 after the last byte speaks of pages that were named in notices; elsewhere it is like any other error.
    fn sort_failure(&self, body: Bytes) -> Result<ReplicationError, ReplicationError> {
        Ok(match self.connection.failure(body, Doing::Command)? {
            ReplicationError::Server(message) if message.sqlstate == "XX001" && self.part == Part::After => {
                ReplicationError::ChecksumsFailed(message)
            }
            other => other,
        })
    }

    fn ready(&mut self) -> Result<Option<BackupEvent>, ReplicationError> {
        self.done = true;
        self.connection.busy = false;
        match (self.failure.take(), self.end) {
            (Some(failure), _) => Err(failure),
            (None, Some(end)) if self.part == Part::After => Ok(Some(BackupEvent::End(end))),
            _ => Err(ReplicationError::protocol("BASE_BACKUP ended before its last row")),
        }
    }

    fn take_data(&mut self, body: Bytes) -> Result<Option<BackupEvent>, ReplicationError> {
        match self.part {
            Part::Archive(_) => {
                self.tar.push(body);
                Ok(None)
            }
            Part::Manifest => Ok((!body.is_empty()).then_some(BackupEvent::Manifest(body))),
            Part::Between | Part::After => Err(unexpected(b'd')),
        }
    }

    /// A message of the single copy of 15 and later.
    fn take_message(&mut self, body: Bytes) -> Result<Option<BackupEvent>, ReplicationError> {
        let mut cursor = Cursor::new(body);
        match cursor.u8()? {
            b'd' => self.take_data(cursor.rest()),
            b'p' => Ok(u64::try_from(cursor.i64()?).ok().map(BackupEvent::Progress)),
            b'n' => {
                self.end_archive()?;
                self.part = Part::Archive(archive_owner(&cursor.cstr()?)?);
                Ok(None)
            }
            b'm' => {
                self.end_archive()?;
                self.part = Part::Manifest;
                Ok(None)
            }
            other => {
                let other = char::from(other).escape_default();
                Err(ReplicationError::protocol(format!("BASE_BACKUP sent '{other}'")))
            }
        }
    }

    fn end_archive(&mut self) -> Result<(), ReplicationError> {
        if matches!(self.part, Part::Archive(_)) {
            let tar = std::mem::take(&mut self.tar);
            tar.finish().map_err(|e| ReplicationError::protocol(e.to_string()))?;
        }
        Ok(())
    }
}

fn from_tar(tablespace: Option<u32>, event: TarEvent) -> BackupEvent {
    match event {
        TarEvent::Data(bytes) => BackupEvent::Data(bytes),
        TarEvent::EndOfFile => BackupEvent::EndOfFile,
        TarEvent::Entry(TarEntry { path, kind, mode, mtime }) => {
            let entry = BackupEntry { tablespace, path, mode, mtime };
            match kind {
                TarKind::File { size } => BackupEvent::File { entry, size },
                TarKind::Directory => BackupEvent::Directory(entry),
                TarKind::Symlink { target } => BackupEvent::Symlink { entry, target },
            }
        }
    }
}

/// `base.tar`, or `<oid>.tar` of a tablespace.
fn archive_owner(name: &str) -> Result<Option<u32>, ReplicationError> {
    let wrong = || ReplicationError::protocol(format!("BASE_BACKUP sent an archive called {name:?}"));
    match name.strip_suffix(".tar").ok_or_else(wrong)? {
        "base" => Ok(None),
        oid => oid.parse().map(Some).map_err(|_| wrong()),
    }
}

/// The row of a position: LSN and timeline.
fn position(row: &[Option<Bytes>]) -> Result<(Lsn, TimelineId), ReplicationError> {
    let lsn = text(row, 0).and_then(|text| text.parse().ok());
    let timeline = text(row, 1).and_then(|text| text.parse().ok()).map(TimelineId);
    lsn.zip(timeline).ok_or_else(|| ReplicationError::protocol("BASE_BACKUP sent no position"))
}

/// The tablespaces, and the order of the archives.
fn read_tablespaces(
    (start_lsn, timeline): (Lsn, TimelineId),
    rows: &Rows,
) -> Result<(BackupStart, Vec<Option<u32>>), ReplicationError> {
    let mut start = BackupStart { start_lsn, timeline, tablespaces: Vec::new(), base_size_kb: 0 };
    let mut order = Vec::new();
    for row in &rows.rows {
        let size_kb = text(row, 2).and_then(|text| text.parse().ok()).unwrap_or(0);
        let Some(oid) = text(row, 0) else {
            start.base_size_kb = size_kb;
            order.push(None);
            continue;
        };
        let oid = oid.parse().map_err(|_| ReplicationError::protocol(format!("a tablespace's oid is {oid:?}")))?;
        let path = text(row, 1).ok_or_else(|| ReplicationError::protocol("a tablespace has no path"))?;
        start.tablespaces.push(Tablespace { oid, path, size_kb });
        order.push(Some(oid));
    }
    Ok((start, order))
}

fn text(row: &[Option<Bytes>], index: usize) -> Option<String> {
    let bytes = row.get(index)?.as_ref()?;
    Some(String::from_utf8_lossy(bytes).into_owned())
}

fn unexpected(tag: u8) -> ReplicationError {
    ReplicationError::protocol(format!("unexpected message '{}' in a base backup", char::from(tag).escape_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(major: u16, options: &BaseBackupOptions, expected: &str) {
        assert_eq!(options.command(Major(major)), expected);
    }

    #[test]
    fn both_grammars() {
        let options = BaseBackupOptions { label: "it's".to_owned(), max_rate_kb: Some(64), ..Default::default() };
        let old = "BASE_BACKUP LABEL 'it''s' PROGRESS NOWAIT TABLESPACE_MAP MANIFEST 'yes' \
                   MANIFEST_CHECKSUMS 'CRC32C' FAST MAX_RATE 64";
        check(14, &options, old);
        let new = "BASE_BACKUP (LABEL 'it''s', PROGRESS true, WAIT false, TABLESPACE_MAP true, MANIFEST 'yes', \
                   MANIFEST_CHECKSUMS 'CRC32C', CHECKPOINT 'fast', VERIFY_CHECKSUMS true, MAX_RATE 64)";
        check(18, &options, new);
    }

    #[test]
    fn archives_are_named_by_their_tablespace() {
        assert_eq!(archive_owner("base.tar").expect("a name"), None);
        assert_eq!(archive_owner("16384.tar").expect("a name"), Some(16384));
        assert!(archive_owner("base.tar.gz").is_err() && archive_owner("../x.tar").is_err());
    }
}
