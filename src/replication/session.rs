//! A replication connection between commands.
//!
//! Physical replication connections take no SQL (0A000), only the commands here; `sql` is for the rest. A call whose
//! future was dropped leaves the session unusable: the next call says so.
//! Source: PostgreSQL documentation "Streaming Replication Protocol"; `src/backend/replication/walsender.c`, 14–18.

use std::time::Duration;

use bytes::Bytes;

use super::connection::{Connection, Purpose, Rows};
use super::conninfo::ConnectConfig;
use super::error::ReplicationError;
use super::stream::{StartReplication, WalStream};
use crate::pg::{Lsn, Major, SegmentSize, SystemId, TimelineId};

/// Every command here is answered from memory or a small file.
pub(super) const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// What `IDENTIFY_SYSTEM` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SystemIdentity {
    pub system_id: SystemId,
    pub timeline: TimelineId,
    /// The end of what is flushed (on a standby: replayed).
    pub flush_lsn: Lsn,
}

/// A history file as the server has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimelineHistory {
    pub timeline: TimelineId,
    /// Byte for byte, to be stored as it is; `pg::timeline::HistoryFile` reads it.
    pub content: Bytes,
}

/// What `READ_REPLICATION_SLOT` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotPosition {
    /// `None`: the slot keeps nothing (yet, or any more).
    pub restart_lsn: Option<Lsn>,
    pub restart_timeline: Option<TimelineId>,
}

/// A connection that waits for a command.
#[derive(Debug)]
pub struct Session {
    pub(super) connection: Connection,
}

impl Session {
    /// Connects to one host of the configuration.
    ///
    /// # Errors
    /// `Unreachable`, `ConnectTimeout`, `Tls`, `Authentication`, `AuthenticationRefused`, `NotAccepting`, `Conninfo`.
    pub async fn connect(config: &ConnectConfig, host_index: usize) -> Result<Session, ReplicationError> {
        let connection = Connection::open(config, host_index, Purpose::Replication).await?;
        Ok(Session { connection })
    }

    /// The process of the server that serves this connection.
    pub fn backend_pid(&self) -> i32 {
        self.connection.backend_pid
    }

    /// As the server writes it: `18.4 (Debian 18.4-1.pgdg12+1)`.
    pub fn server_version(&self) -> &str {
        self.connection.parameter("server_version").unwrap_or_default()
    }

    /// # Errors
    /// `Protocol` when the server did not say.
    pub fn major(&self) -> Result<Major, ReplicationError> {
        self.connection.parameters.major()
    }

    /// Whether the server was in recovery when it last said so; it reports a promotion with the next answer.
    pub fn in_hot_standby(&self) -> bool {
        self.connection.parameter("in_hot_standby") == Some("on")
    }

    pub async fn identify_system(&mut self) -> Result<SystemIdentity, ReplicationError> {
        let rows = self.command("IDENTIFY_SYSTEM").await?;
        Ok(SystemIdentity {
            system_id: field(&rows, "systemid")?,
            timeline: TimelineId(field(&rows, "timeline")?),
            flush_lsn: field(&rows, "xlogpos")?,
        })
    }

    /// `SHOW name`, with the unit that the server adds.
    pub async fn show(&mut self, name: &str) -> Result<String, ReplicationError> {
        let rows = self.command(&format!("SHOW {}", quoted_identifier(name))).await?;
        let column = rows.columns.first().cloned().unwrap_or_default();
        rows.text(0, &column).ok_or_else(|| ReplicationError::protocol(format!("SHOW {name} has no value")))
    }

    pub async fn segment_size(&mut self) -> Result<SegmentSize, ReplicationError> {
        let text = self.show("wal_segment_size").await?;
        let wrong = || ReplicationError::protocol(format!("wal_segment_size is {text:?}"));
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at_checked(digits).ok_or_else(wrong)?;
        let factor: u64 = match unit {
            "B" | "" => 1,
            "kB" => 1 << 10,
            "MB" => 1 << 20,
            "GB" => 1 << 30,
            _ => return Err(wrong()),
        };
        let bytes = number.parse().ok().and_then(|n: u64| n.checked_mul(factor)).ok_or_else(wrong)?;
        SegmentSize::new(bytes).map_err(|_| wrong())
    }

    /// Makes sure that a physical slot exists, reserving WAL from the last redo pointer when it is new. Says whether it
    /// is new.
    pub async fn create_physical_slot(&mut self, name: &str) -> Result<bool, ReplicationError> {
        check_slot_name(name)?;
        let command = format!("CREATE_REPLICATION_SLOT {} PHYSICAL RESERVE_WAL", quoted_identifier(name));
        match self.command(&command).await {
            Ok(_) => Ok(true),
            Err(ReplicationError::Server(message)) if message.sqlstate == "42710" => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// # Errors
    /// `SlotMissing`, `SlotInUse`.
    pub async fn drop_slot(&mut self, name: &str) -> Result<(), ReplicationError> {
        check_slot_name(name)?;
        self.command(&format!("DROP_REPLICATION_SLOT {}", quoted_identifier(name))).await.map(|_| ())
    }

    /// The slot's position; `None` when there is no such slot.
    ///
    /// # Errors
    /// `Unsupported` before 15: ask `pg_replication_slots` over SQL there.
    pub async fn read_slot(&mut self, name: &str) -> Result<Option<SlotPosition>, ReplicationError> {
        check_slot_name(name)?;
        if self.major()? < Major(15) {
            return Err(ReplicationError::Unsupported("PostgreSQL 14 has no READ_REPLICATION_SLOT".to_owned()));
        }
        let rows = self.command(&format!("READ_REPLICATION_SLOT {}", quoted_identifier(name))).await?;
        if rows.text(0, "slot_type").is_none() {
            return Ok(None);
        }
        let restart_lsn = rows.text(0, "restart_lsn").map(|text| parse("restart_lsn", &text)).transpose()?;
        let restart_timeline = rows.text(0, "restart_tli").map(|text| parse("restart_tli", &text)).transpose()?;
        Ok(Some(SlotPosition { restart_lsn, restart_timeline: restart_timeline.map(TimelineId) }))
    }

    /// The history file of a timeline above 1.
    ///
    /// # Errors
    /// `Server` with SQLSTATE 58P01 when the server has no such file.
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<TimelineHistory, ReplicationError> {
        let rows = self.command(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let content = rows.rows.first().and_then(|row| row.get(1)).cloned().flatten();
        let name = rows.text(0, "filename").unwrap_or_default();
        match content {
            Some(content) if name == timeline.history_name() => Ok(TimelineHistory { timeline, content }),
            _ => Err(ReplicationError::protocol(format!("TIMELINE_HISTORY {timeline} brought {name:?}"))),
        }
    }

    /// Starts streaming WAL; the session comes back when the stream ends orderly.
    ///
    /// # Errors
    /// `SegmentRemoved`, `NotInHistory`, `AheadOfServer`, `SlotInUse`, `SlotMissing`, `SlotInvalidated`. The session is
    /// gone then: connect again.
    pub async fn start_replication(self, from: &StartReplication) -> Result<WalStream, ReplicationError> {
        if let Some(slot) = &from.slot {
            check_slot_name(slot)?;
        }
        WalStream::start(self.connection, from).await
    }

    /// Ends the connection.
    pub async fn close(self) {
        self.connection.terminate().await;
    }

    async fn command(&mut self, command: &str) -> Result<Rows, ReplicationError> {
        let mut results = self.connection.query_within(command, COMMAND_TIMEOUT).await?;
        Ok(results.pop().unwrap_or_default())
    }
}

/// PostgreSQL's rule for slot names; checked here because a wrong one is a mistake in the configuration.
fn check_slot_name(name: &str) -> Result<(), ReplicationError> {
    let plain = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_');
    if (1..=63).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    let text = format!("{name:?} is no name for a replication slot (1 to 63 of a-z, 0-9, _)");
    Err(ReplicationError::Unsupported(text))
}

pub(super) fn quoted_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn field<T: std::str::FromStr>(rows: &Rows, column: &str) -> Result<T, ReplicationError> {
    let text = rows.text(0, column).ok_or_else(|| ReplicationError::protocol(format!("the answer has no {column}")))?;
    parse(column, &text)
}

fn parse<T: std::str::FromStr>(what: &str, text: &str) -> Result<T, ReplicationError> {
    text.parse().map_err(|_| ReplicationError::protocol(format!("{what} is {text:?}")))
}
