//! What the daemon asks a running server now and then.
//!
//! Source: PostgreSQL documentation "System Views", "System Administration Functions", 14–18.

use std::time::Duration;

use super::{Sql, literal};
use crate::pg::{Lsn, Major, SegmentSize, TimelineId, Timestamp};
use crate::replication::{ReplicationError, Rows};

/// A reading of the server's clock, and a position that was asked for *after* it: everything committed before the time
/// lies below the position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClockReading {
    pub server_time: Timestamp,
    pub insert_lsn: Lsn,
    pub timeline: TimelineId,
}

/// A row of `pg_replication_slots`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotState {
    pub name: String,
    pub physical: bool,
    pub active_pid: Option<i32>,
    pub restart_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// Bytes of WAL that may still be written before the slot is in danger; `None` without a limit.
    pub safe_wal_bytes: Option<i64>,
    /// From 17 on.
    pub invalidation_reason: Option<String>,
    /// For how long nobody has used it; from 17 on, while nobody does.
    pub inactive_seconds: Option<i64>,
}

/// Whether commits wait for us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncState {
    pub synchronous_standby_names: String,
    /// `async`, `potential`, `sync` or `quorum`; `None` when our walsender is not streaming, or not visible.
    pub sync_state: Option<String>,
}

impl SyncState {
    /// Whether commits may be waiting for our flush position now.
    pub fn commits_wait_for_us(&self) -> bool {
        matches!(self.sync_state.as_deref(), Some("sync" | "quorum"))
    }
}

/// Settings that decide how WAL is written and kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalSettings {
    pub segment_size: SegmentSize,
    /// `None` is -1: slots keep WAL until the disk is full.
    pub max_slot_wal_keep_bytes: Option<u64>,
    pub wal_writer_delay: Duration,
    /// 18 and later, where it is not 0.
    pub idle_slot_timeout: Option<Duration>,
}

/// A backend whose commit waits for a synchronous standby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncWait {
    pub pid: i32,
    pub database: String,
    pub user: String,
    /// Since its statement began.
    pub waiting: Duration,
}

impl Sql {
    /// The server's clock, then the insert position; `None` in recovery, where no position may stand for a time.
    pub async fn clock_reading(&mut self) -> Result<Option<ClockReading>, ReplicationError> {
        let sql = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS micros; \
                   SELECT l AS lsn, substr(pg_walfile_name(l), 1, 8) AS timeline FROM pg_current_wal_insert_lsn() AS l";
        let results = match self.query_all(sql).await {
            Ok(results) => results,
            Err(ReplicationError::Server(message)) if message.sqlstate == "55000" => return Ok(None),
            Err(e) => {
                return Err(
                    self.missing_grant(e, "EXECUTE ON FUNCTION pg_current_wal_insert_lsn(), pg_walfile_name(pg_lsn)")
                );
            }
        };
        let [clock, position] = results.as_slice() else {
            return Err(ReplicationError::protocol("two statements without two answers"));
        };
        let timeline = required::<String>(position, 0, "timeline")?;
        let timeline = TimelineId::from_hex(&timeline);
        Ok(Some(ClockReading {
            server_time: Timestamp(required(clock, 0, "micros")?),
            insert_lsn: required(position, 0, "lsn")?,
            timeline: timeline.ok_or_else(|| ReplicationError::protocol("a WAL file name without a timeline"))?,
        }))
    }

    pub async fn is_in_recovery(&mut self) -> Result<bool, ReplicationError> {
        let rows = self.query("SELECT pg_is_in_recovery() AS r").await?;
        Ok(rows.text(0, "r").as_deref() == Some("t"))
    }

    /// All slots of the server.
    pub async fn slots(&mut self) -> Result<Vec<SlotState>, ReplicationError> {
        let (reason, inactive) = match self.major()? < Major(17) {
            true => ("NULL", "NULL"),
            false => ("invalidation_reason", "extract(epoch FROM clock_timestamp() - inactive_since)::bigint"),
        };
        let sql = format!(
            "SELECT slot_name, slot_type = 'physical' AS physical, active_pid, restart_lsn, wal_status, safe_wal_size, \
             {reason} AS reason, {inactive} AS inactive FROM pg_replication_slots ORDER BY slot_name"
        );
        let rows = self.query(&sql).await?;
        (0..rows.rows.len())
            .map(|row| {
                Ok(SlotState {
                    name: required(&rows, row, "slot_name")?,
                    physical: rows.text(row, "physical").as_deref() == Some("t"),
                    active_pid: optional(&rows, row, "active_pid")?,
                    restart_lsn: optional(&rows, row, "restart_lsn")?,
                    wal_status: rows.text(row, "wal_status"),
                    safe_wal_bytes: optional(&rows, row, "safe_wal_size")?,
                    invalidation_reason: rows.text(row, "reason"),
                    inactive_seconds: optional(&rows, row, "inactive")?,
                })
            })
            .collect()
    }

    /// What the server makes of the walsender `pid`; a role sees its own without further rights.
    pub async fn sync_state(&mut self, pid: i32) -> Result<SyncState, ReplicationError> {
        let sql = format!(
            "SELECT current_setting('synchronous_standby_names') AS names, \
             (SELECT sync_state FROM pg_stat_replication WHERE pid = {pid}) AS state"
        );
        let rows = self.query(&sql).await?;
        let synchronous_standby_names = rows.text(0, "names").unwrap_or_default();
        Ok(SyncState { synchronous_standby_names, sync_state: rows.text(0, "state") })
    }

    pub async fn wal_settings(&mut self) -> Result<WalSettings, ReplicationError> {
        // pg_settings has the numbers in these units: bytes (wal_segment_size), MB, ms, and s (18) or min.
        let sql = "SELECT name, setting, unit FROM pg_settings WHERE name IN ('wal_segment_size', \
                   'max_slot_wal_keep_size', 'wal_writer_delay', 'idle_replication_slot_timeout')";
        let rows = self.query(sql).await?;
        let find = |name: &str| (0..rows.rows.len()).find(|row| rows.text(*row, "name").as_deref() == Some(name));
        let number = |name: &str| -> Result<Option<i64>, ReplicationError> {
            let Some(row) = find(name) else { return Ok(None) };
            let value: i64 = required(&rows, row, "setting")?;
            let factor = match rows.text(row, "unit").as_deref() {
                Some("MB") => 1 << 20,
                Some("8kB") => 8192,
                Some("s") => 1000,
                Some("min") => 60_000,
                _ => 1,
            };
            Ok(Some(if value < 0 { -1 } else { value.saturating_mul(factor) }))
        };
        let missing = |name: &str| ReplicationError::protocol(format!("the server has no {name}"));
        let bytes = number("wal_segment_size")?.and_then(|n| u64::try_from(n).ok());
        let segment_size = bytes.and_then(|n| SegmentSize::new(n).ok()).ok_or_else(|| missing("wal_segment_size"))?;
        let delay = number("wal_writer_delay")?.and_then(|n| u64::try_from(n).ok());
        let idle = number("idle_replication_slot_timeout")?.and_then(|n| u64::try_from(n).ok()).filter(|n| *n != 0);
        Ok(WalSettings {
            segment_size,
            max_slot_wal_keep_bytes: number("max_slot_wal_keep_size")?.and_then(|n| u64::try_from(n).ok()),
            wal_writer_delay: Duration::from_millis(delay.ok_or_else(|| missing("wal_writer_delay"))?),
            idle_slot_timeout: idle.map(Duration::from_millis),
        })
    }

    /// The path of the data directory on the server's host.
    ///
    /// # Errors
    /// `MissingGrant`.
    pub async fn data_directory(&mut self) -> Result<String, ReplicationError> {
        match self.query("SELECT current_setting('data_directory') AS d").await {
            Ok(rows) => required(&rows, 0, "d"),
            Err(e) => Err(self.missing_grant(e, "pg_read_all_settings")),
        }
    }

    /// Backends whose commits have waited for a synchronous standby longer than `at_least`, the oldest first.
    ///
    /// # Errors
    /// `MissingGrant`: without it the server shows other roles' backends without what they wait for.
    pub async fn sync_waits(&mut self, at_least: Duration) -> Result<Vec<SyncWait>, ReplicationError> {
        self.require_role("pg_read_all_stats").await?;
        let sql = format!(
            "SELECT pid, coalesce(datname, '') AS database, coalesce(usename, '') AS username, \
             (extract(epoch FROM clock_timestamp() - coalesce(query_start, xact_start)) * 1000)::bigint AS waiting \
             FROM pg_stat_activity WHERE wait_event = 'SyncRep' \
             AND clock_timestamp() - coalesce(query_start, xact_start) > {} * interval '1 millisecond' \
             ORDER BY waiting DESC LIMIT 100",
            at_least.as_millis()
        );
        let rows = self.query(&sql).await?;
        (0..rows.rows.len())
            .map(|row| {
                let waiting: i64 = required(&rows, row, "waiting")?;
                Ok(SyncWait {
                    pid: required(&rows, row, "pid")?,
                    database: required(&rows, row, "database")?,
                    user: required(&rows, row, "username")?,
                    waiting: Duration::from_millis(u64::try_from(waiting).unwrap_or(0)),
                })
            })
            .collect()
    }

    /// Ends the connection of a backend; false when there is no such backend. Only ever for a pid of our own lease record,
    /// with the time that its connection began, because the server uses pids again.
    ///
    /// # Errors
    /// `MissingGrant`; a role may end its own connections without.
    pub async fn terminate_backend(&mut self, pid: i32, began: Option<Timestamp>) -> Result<bool, ReplicationError> {
        let same = match began {
            Some(time) => {
                format!("AND abs(extract(epoch FROM backend_start) * 1000000 - {}) < 1000", time.0)
            }
            None => String::new(),
        };
        let sql = format!("SELECT pg_terminate_backend(pid) AS done FROM pg_stat_activity WHERE pid = {pid} {same}");
        match self.query(&sql).await {
            Ok(rows) => Ok(rows.text(0, "done").as_deref() == Some("t")),
            Err(e) => Err(self.missing_grant(e, "pg_signal_backend")),
        }
    }

    /// When the connection of a backend began, as the server counts; `None` when there is none.
    pub async fn backend_start(&mut self, pid: i32) -> Result<Option<Timestamp>, ReplicationError> {
        let sql = format!(
            "SELECT (extract(epoch FROM backend_start) * 1000000)::bigint AS micros FROM pg_stat_activity \
             WHERE pid = {pid}"
        );
        let rows = self.query(&sql).await?;
        Ok(optional(&rows, 0, "micros")?.map(Timestamp))
    }

    /// An error unless our role has the rights of a predefined one.
    pub(super) async fn require_role(&mut self, role: &str) -> Result<(), ReplicationError> {
        let sql = format!("SELECT pg_has_role(current_user, {}, 'USAGE') AS has", literal(role));
        if self.query(&sql).await?.text(0, "has").as_deref() == Some("t") {
            return Ok(());
        }
        let statement = self.grant(role);
        Err(ReplicationError::MissingGrant { statement, message: format!("{role} is not granted") })
    }
}

/// A column that must be there and be what is wanted.
pub(super) fn required<T: std::str::FromStr>(rows: &Rows, row: usize, column: &str) -> Result<T, ReplicationError> {
    let value = optional(rows, row, column)?;
    value.ok_or_else(|| ReplicationError::protocol(format!("the answer has no {column}")))
}

pub(super) fn optional<T: std::str::FromStr>(
    rows: &Rows,
    row: usize,
    column: &str,
) -> Result<Option<T>, ReplicationError> {
    let Some(text) = rows.text(row, column) else { return Ok(None) };
    match text.parse() {
        Ok(value) => Ok(Some(value)),
        Err(_) => Err(ReplicationError::protocol(format!("{column} is {text:?}"))),
    }
}
