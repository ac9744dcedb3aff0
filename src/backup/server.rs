//! Files from a running server, by `BASE_BACKUP`: REPLICATION is the only right that it needs, and any distance will do.
//!
//! Damaged pages do not fail the backup: the server names them in warnings and reports them once more after the last byte;
//! they are part of what is recorded.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use async_trait::async_trait;

use super::source::{ChecksumKind, Event, Meta, Source, SourceEnd, SourceError, SourcePosition, SourceStart};
use crate::replication::{
    BackupEntry, BackupEvent, BaseBackup, BaseBackupOptions, ConnectConfig, ManifestChecksums, ReplicationError,
    ServerMessage, Session,
};
use crate::repository::backup_object::{DamagedBlock, Tablespace};

/// A server whose files are to be read.
pub struct ServerSource {
    config: ConnectConfig,
    host_index: usize,
    options: BaseBackupOptions,
    state: State,
}

enum State {
    New,
    Connected(Box<Session>),
    Running(Box<BaseBackup>),
    Ended,
}

impl ServerSource {
    /// Nothing is sent yet.
    pub fn new(config: ConnectConfig, host_index: usize, options: BaseBackupOptions) -> Self {
        ServerSource { config, host_index, options, state: State::New }
    }

    /// On a connection that is open already.
    pub fn on(session: Session, config: ConnectConfig, options: BaseBackupOptions) -> Self {
        ServerSource { config, host_index: 0, options, state: State::Connected(Box::new(session)) }
    }

    /// Connects when there is no connection yet. A session is a connection between commands.
    pub async fn session(&mut self) -> Result<&mut Session, SourceError> {
        if matches!(self.state, State::New) {
            self.state = State::Connected(Box::new(Session::connect(&self.config, self.host_index).await?));
        }
        match &mut self.state {
            State::Connected(session) => Ok(session),
            _ => Err(SourceError::Malformed("the connection is busy with a backup".into())),
        }
    }
}

#[async_trait]
impl Source for ServerSource {
    async fn position(&mut self) -> Result<SourcePosition, SourceError> {
        let session = self.session().await?;
        let identity = session.identify_system().await?;
        let from_standby = session.in_hot_standby();
        Ok(SourcePosition { timeline: identity.timeline, lsn: identity.flush_lsn, from_standby })
    }

    async fn begin(&mut self) -> Result<SourceStart, SourceError> {
        self.session().await?;
        let State::Connected(session) = std::mem::replace(&mut self.state, State::Ended) else {
            return Err(SourceError::Malformed("the backup has begun already".into()));
        };
        let (start, backup) = session.base_backup(&self.options).await?;
        self.state = State::Running(Box::new(backup));
        let checksums = match self.options.manifest_checksums {
            ManifestChecksums::Crc32c => ChecksumKind::Crc32c,
            ManifestChecksums::Sha256 => ChecksumKind::Sha256,
        };
        Ok(SourceStart {
            timeline: start.timeline,
            start_lsn: start.start_lsn,
            bytes_estimate: Some(start.size_kb().saturating_mul(1024)),
            tablespaces: start.tablespaces.into_iter().map(tablespace).collect(),
            checksums: Some(checksums),
        })
    }

    async fn next(&mut self) -> Result<Event, SourceError> {
        let State::Running(backup) = &mut self.state else {
            return Err(SourceError::Malformed("the backup has not begun, or has ended".into()));
        };
        loop {
            match backup.next().await {
                Ok(BackupEvent::Data(bytes)) => return Ok(Event::Data(bytes)),
                Ok(BackupEvent::File { entry, size }) => return Ok(Event::File(meta(&entry, size)?)),
                Ok(BackupEvent::EndOfFile) => return Ok(Event::FileEnd),
                Ok(BackupEvent::Directory(entry)) => return Ok(Event::Directory(meta(&entry, 0)?)),
                Ok(BackupEvent::Symlink { entry, target }) => {
                    return Ok(Event::Symlink { meta: meta(&entry, 0)?, target: utf8(&target)? });
                }
                Ok(BackupEvent::Manifest(piece)) => return Ok(Event::Manifest(piece)),
                Ok(BackupEvent::Progress(_)) => {}
                Ok(BackupEvent::Notice(message)) => match damage(&message) {
                    Some(block) => return Ok(Event::Damaged(block)),
                    None => tracing::debug!(notice = %message, "the server says something about the backup"),
                },
                Ok(BackupEvent::End(end)) => {
                    self.state = State::Ended;
                    return Ok(Event::End(Some(SourceEnd { timeline: end.timeline, stop_lsn: end.end_lsn })));
                }
                Err(ReplicationError::ChecksumsFailed(_)) => {
                    self.state = State::Ended;
                    return Ok(Event::End(None));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// With the server's estimate of its size.
fn tablespace(found: crate::replication::base_backup::Tablespace) -> Tablespace {
    let bytes = found.size_kb.saturating_mul(1024);
    Tablespace { oid: found.oid, path: found.path, bytes }
}

fn meta(entry: &BackupEntry, bytes: u64) -> Result<Meta, SourceError> {
    let path = utf8(&entry.path)?;
    let path = match entry.tablespace {
        None => path,
        Some(oid) => format!("pg_tblspc/{oid}/{path}"),
    };
    let modified = i64::try_from(entry.mtime).unwrap_or(i64::MAX);
    Ok(Meta { path, mode: entry.mode, modified, bytes })
}

fn utf8(path: &Path) -> Result<String, SourceError> {
    let not_utf8 = |_| SourceError::NotUtf8 { path: path.display().to_string() };
    std::str::from_utf8(path.as_os_str().as_bytes()).map(str::to_owned).map_err(not_utf8)
}

/// The server names the first pages of a file one by one, and then says how many there were.
fn damage(message: &ServerMessage) -> Option<DamagedBlock> {
    let text = message.message.clone();
    let relative = |file: &str| file.trim_start_matches("./").to_owned();
    if let Some(failure) = message.checksum_failure() {
        return Some(DamagedBlock { file: relative(&failure.file), block: Some(failure.block.into()), message: text });
    }
    let file = text.contains("checksum verification failures").then(|| text.split('"').nth(1)).flatten()?;
    Some(DamagedBlock { file: relative(file), block: None, message: text.clone() })
}

impl SourceError {
    /// What an operator can do about what the server said.
    pub(super) fn server_hint(error: &ReplicationError) -> Option<String> {
        if matches!(error, ReplicationError::ConnectionLost(_)) {
            let text = "The connection was cut. Take the backup again; if it happens again, look at the server's log and the \
                        network between the two hosts.";
            return Some(text.to_owned());
        }
        let Some(message) = error.server_message() else { return error.hint() };
        let own = match message.sqlstate.as_str() {
            "42501" if message.message.contains("file") || message.message.contains("directory") => {
                "The server's own user cannot read this file in its data directory, and then refuses the whole backup. \
                 Move the file away, or give it to that user."
            }
            "42501" => "The role needs the right: ALTER ROLE … REPLICATION.",
            "53300" => {
                "Every place for replication is taken: a backup needs one beside the archive's. Raise max_wal_senders \
                 (and max_connections) and restart the server, or end another replication connection."
            }
            "57P01" | "57P02" => "Somebody ended the connection, or the server was stopped. Take the backup again.",
            _ => return error.hint(),
        };
        Some(own.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_pages_are_read_from_warnings() {
        let check = |text: &str, expected: Option<(&str, Option<u64>)>| {
            let found = damage(&ServerMessage { message: text.into(), ..ServerMessage::default() });
            let found = found.as_ref().map(|d| (d.file.as_str(), d.block));
            assert_eq!(found, expected, "{text}");
        };
        let one = "checksum verification failed in file \"./base/5/16396\", block 6: calculated 4A1 but expected 4A2";
        check(one, Some(("base/5/16396", Some(6))));
        let total = "file \"./base/5/16396\" has a total of 7 checksum verification failures";
        check(total, Some(("base/5/16396", None)));
        check("something else \"./base/5/16396\"", None);
    }
}
