//! What a server says when it refuses, and what can go wrong on the way to it.

use std::fmt;
use std::io;

use bytes::Bytes;

use super::conninfo::ConninfoError;
use super::wire::Cursor;

/// An ErrorResponse or NoticeResponse.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerMessage {
    /// Never translated where the server sends field `V`: ERROR, FATAL, PANIC, WARNING, NOTICE, …
    pub severity: String,
    /// Five characters.
    pub sqlstate: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    /// The function of the server that reported it; unlike the message it does not depend on `lc_messages`.
    pub routine: Option<String>,
}

/// A page that `BASE_BACKUP` found damaged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChecksumFailure {
    /// As the server names it, such as `./base/5/16396`.
    pub file: String,
    pub block: u32,
}

/// Why a replication connection, a command on it or a query failed.
#[derive(Debug, thiserror::Error)]
pub enum ReplicationError {
    #[error(transparent)]
    Conninfo(#[from] ConninfoError),
    #[error("connect to {host}: {source}")]
    Unreachable { host: String, source: io::Error },
    #[error("connect to {host}: no answer within {seconds} s")]
    ConnectTimeout { host: String, seconds: u64 },
    #[error("secure the connection to {host}: {reason}")]
    Tls { host: String, reason: String },
    #[error("authenticate: {0}")]
    Authentication(Box<ServerMessage>),
    /// The server asks for what we cannot or will not do.
    #[error("authenticate: {0}")]
    AuthenticationRefused(String),
    /// 57P03: it starts, stops or recovers.
    #[error("the server does not accept connections: {0}")]
    NotAccepting(Box<ServerMessage>),
    /// The server ended the stream because it shuts down or was told to end this connection (57P01, 57P02).
    #[error("the server ended the connection: {0}")]
    ServerStopping(Box<ServerMessage>),
    #[error("the WAL asked for is no longer on the server: {0}")]
    SegmentRemoved(Box<ServerMessage>),
    #[error("the position asked for is not in this server's history: {0}")]
    NotInHistory(Box<ServerMessage>),
    /// We ask for what this server has not written yet: it is behind us.
    #[error("the position asked for is ahead of this server: {0}")]
    AheadOfServer(Box<ServerMessage>),
    #[error("the slot is in use: {message}")]
    SlotInUse { holder_pid: Option<i32>, message: Box<ServerMessage> },
    #[error("the slot is missing: {0}")]
    SlotMissing(Box<ServerMessage>),
    #[error("the slot cannot be used any more: {0}")]
    SlotInvalidated(Box<ServerMessage>),
    /// `BASE_BACKUP` sent everything, and found damaged pages on the way.
    #[error("pages with wrong checksums: {0}")]
    ChecksumsFailed(Box<ServerMessage>),
    #[error("the role lacks a right ({message}); run: {statement}")]
    MissingGrant { statement: String, message: String },
    #[error("{0}")]
    Server(Box<ServerMessage>),
    #[error("the connection is lost: {0}")]
    ConnectionLost(#[from] io::Error),
    /// The server said something that the protocol does not allow here.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
    /// A command of ours that this server is too old for.
    #[error("{0}")]
    Unsupported(String),
}

/// In what a server error was received; the same SQLSTATE means different things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    Starting,
    Command,
    Streaming,
}

impl ServerMessage {
    /// From the body of an ErrorResponse or NoticeResponse; what is missing stays empty.
    pub fn decode(body: Bytes) -> ServerMessage {
        let mut message = ServerMessage::default();
        let mut plain_severity = String::new();
        let mut cursor = Cursor::new(body);
        while let Ok(field) = cursor.u8() {
            let Ok(value) = cursor.cstr() else { break };
            match field {
                0 => break,
                b'S' => plain_severity = value,
                b'V' => message.severity = value,
                b'C' => message.sqlstate = value,
                b'M' => message.message = value,
                b'D' => message.detail = Some(value),
                b'H' => message.hint = Some(value),
                b'R' => message.routine = Some(value),
                _ => {}
            }
        }
        if message.severity.is_empty() {
            message.severity = plain_severity;
        }
        message
    }

    /// The damaged page, when this is a notice of `BASE_BACKUP` about one.
    pub fn checksum_failure(&self) -> Option<ChecksumFailure> {
        let about = self.message.contains("checksum verification failed in file");
        if !about {
            return None;
        }
        let mut quoted = self.message.split('"');
        let file = quoted.nth(1)?.to_owned();
        let block = quoted.next()?.split("block ").nth(1)?;
        let digits: String = block.chars().take_while(char::is_ascii_digit).collect();
        Some(ChecksumFailure { file, block: digits.parse().ok()? })
    }

    fn was_reported_by(&self, routine: &str) -> bool {
        self.routine.as_deref() == Some(routine)
    }

    /// The process that holds a slot; PostgreSQL says it only in the text (`… is active for PID 123`).
    fn pid_in_text(&self) -> Option<i32> {
        let tail = self.message.rsplit_once("PID ")?.1;
        tail.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok()
    }
}

impl fmt::Display for ServerMessage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}: {}", self.severity, self.sqlstate, self.message)?;
        if let Some(detail) = &self.detail {
            write!(f, " ({detail})")?;
        }
        Ok(())
    }
}

impl ReplicationError {
    /// Sorts an ErrorResponse by what a caller does about it.
    pub(super) fn from_server(doing: Doing, message: ServerMessage) -> ReplicationError {
        let boxed = Box::new(message);
        match (boxed.sqlstate.as_str(), doing) {
            ("57P03", _) => ReplicationError::NotAccepting(boxed),
            ("57P01" | "57P02", _) => ReplicationError::ServerStopping(boxed),
            (code, Doing::Starting) if code.starts_with("28") => ReplicationError::Authentication(boxed),
            ("58P01", Doing::Streaming) => ReplicationError::SegmentRemoved(boxed),
            ("55006", _) => ReplicationError::SlotInUse { holder_pid: boxed.pid_in_text(), message: boxed },
            ("42704", Doing::Command | Doing::Streaming) if boxed.message.contains("slot") => {
                ReplicationError::SlotMissing(boxed)
            }
            ("42704", Doing::Streaming) => ReplicationError::SlotMissing(boxed),
            ("55000", Doing::Streaming)
                if boxed.was_reported_by("ReplicationSlotAcquire") || boxed.message.contains("replication slot") =>
            {
                ReplicationError::SlotInvalidated(boxed)
            }
            ("XX000", Doing::Streaming) => Self::from_start_position(boxed),
            _ => ReplicationError::Server(boxed),
        }
    }

    /// `StartReplication` reports both with XX000: a fork has a detail, a position ahead has none. The English text is
    /// looked at first, the rest is for servers with another `lc_messages`.
    fn from_start_position(message: Box<ServerMessage>) -> ReplicationError {
        let text = &message.message;
        if text.contains("is not in this server's history") || message.was_reported_by("tliSwitchPoint") {
            return ReplicationError::NotInHistory(message);
        }
        if text.contains("is ahead of the WAL flush position") {
            return ReplicationError::AheadOfServer(message);
        }
        match (message.was_reported_by("StartReplication"), message.detail.is_some()) {
            (true, true) => ReplicationError::NotInHistory(message),
            (true, false) => ReplicationError::AheadOfServer(message),
            (false, _) => ReplicationError::Server(message),
        }
    }

    /// Whether the same call may work later without anybody doing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            ReplicationError::Unreachable { .. }
            | ReplicationError::ConnectTimeout { .. }
            | ReplicationError::NotAccepting(_)
            | ReplicationError::ServerStopping(_)
            | ReplicationError::SlotInUse { .. }
            | ReplicationError::ConnectionLost(_) => true,
            // Out of memory, disk, connections; the operating system; serialization.
            ReplicationError::Server(message) => ["53", "58", "40"].iter().any(|c| message.sqlstate.starts_with(c)),
            _ => false,
        }
    }

    /// What the server said, when it said something.
    pub fn server_message(&self) -> Option<&ServerMessage> {
        match self {
            ReplicationError::Authentication(m)
            | ReplicationError::NotAccepting(m)
            | ReplicationError::ServerStopping(m)
            | ReplicationError::SegmentRemoved(m)
            | ReplicationError::NotInHistory(m)
            | ReplicationError::AheadOfServer(m)
            | ReplicationError::SlotInUse { message: m, .. }
            | ReplicationError::SlotMissing(m)
            | ReplicationError::SlotInvalidated(m)
            | ReplicationError::ChecksumsFailed(m)
            | ReplicationError::Server(m) => Some(m),
            _ => None,
        }
    }

    pub(super) fn protocol(text: impl Into<String>) -> ReplicationError {
        ReplicationError::Protocol(text.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(sqlstate: &str, text: &str) -> ServerMessage {
        ServerMessage {
            severity: "ERROR".to_owned(),
            sqlstate: sqlstate.to_owned(),
            message: text.to_owned(),
            ..ServerMessage::default()
        }
    }

    #[test]
    fn fields_of_an_error_response() {
        let body =
            b"SFEHLER\0VERROR\0C55006\0Mreplication slot \"a\" is active for PID 4711\0RReplicationSlotAcquire\0\0";
        let message = ServerMessage::decode(Bytes::from_static(body));
        assert_eq!((message.severity.as_str(), message.sqlstate.as_str()), ("ERROR", "55006"));
        let error = ReplicationError::from_server(Doing::Streaming, message);
        assert!(matches!(error, ReplicationError::SlotInUse { holder_pid: Some(4711), .. }), "{error:?}");
    }

    #[test]
    fn a_fork_and_a_server_behind_are_told_apart_in_any_language() {
        let mut other_language = message("XX000", "…");
        other_language.routine = Some("StartReplication".to_owned());
        let error = ReplicationError::from_server(Doing::Streaming, other_language.clone());
        assert!(matches!(error, ReplicationError::AheadOfServer(_)), "{error:?}");
        other_language.detail = Some("…".to_owned());
        let error = ReplicationError::from_server(Doing::Streaming, other_language);
        assert!(matches!(error, ReplicationError::NotInHistory(_)), "{error:?}");
    }

    #[test]
    fn a_damaged_page_is_read_from_its_notice() {
        let text = "checksum verification failed in file \"./base/5/16396\", block 6: calculated 4A1 but expected 4A2";
        let failure = message("01000", text).checksum_failure();
        assert_eq!(failure, Some(ChecksumFailure { file: "./base/5/16396".to_owned(), block: 6 }));
        assert_eq!(message("01000", "file \"x\"").checksum_failure(), None);
    }
}
