//! Records of the WAL itself: checkpoints, restore points, switches, parameters.
//!
//! Source: `src/include/catalog/pg_control.h` (`CheckPoint`, `XLOG_*`), `xl_parameter_change`, `xl_restore_point`,
//! `xl_end_of_recovery` in `src/include/access/xlog_internal.h`, 14–18.

use super::PayloadError;
use crate::pg::control_file::{self, RecoveryParameters};
use crate::pg::{FullXid, Lsn, TimelineId, Timestamp};
use crate::wal::bytes::Bytes;
use crate::wal::format::Format;

pub const CHECKPOINT_SHUTDOWN: u8 = 0x00;
pub const CHECKPOINT_ONLINE: u8 = 0x10;
pub const SWITCH: u8 = 0x40;
pub const BACKUP_END: u8 = 0x50;
pub const PARAMETER_CHANGE: u8 = 0x60;
pub const RESTORE_POINT: u8 = 0x70;
pub const END_OF_RECOVERY: u8 = 0x90;
pub const OVERWRITE_CONTRECORD: u8 = 0xD0;

const RESTORE_POINT_NAME_BYTES: usize = 64;

/// `wal_level` as its number in WAL: 0 minimal, 1 replica, 2 logical.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WalLevel(pub i32);

/// What a record of the WAL itself says, where it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum XlogRecord {
    Checkpoint(Checkpoint),
    /// The end of the base backup that began at `start_lsn`.
    BackupEnd {
        start_lsn: Lsn,
    },
    ParameterChange(Parameters),
    RestorePoint {
        name: String,
        time: Timestamp,
    },
    EndOfRecovery(EndOfRecovery),
    /// The record at `overwritten_lsn` was never finished.
    OverwriteContrecord {
        overwritten_lsn: Lsn,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    pub shutdown: bool,
    pub redo_lsn: Lsn,
    pub timeline: TimelineId,
    /// Differs from `timeline` in the first record of a new timeline.
    pub previous_timeline: TimelineId,
    pub next_xid: FullXid,
    pub time: Timestamp,
    /// Since 17.
    pub wal_level: Option<WalLevel>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndOfRecovery {
    pub time: Timestamp,
    pub timeline: TimelineId,
    pub previous_timeline: TimelineId,
    /// Since 17.
    pub wal_level: Option<WalLevel>,
}

/// Settings that a server which replays this WAL must not have lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Parameters {
    pub max_connections: i32,
    pub max_worker_processes: i32,
    pub max_wal_senders: i32,
    pub max_prepared_transactions: i32,
    pub max_locks_per_transaction: i32,
    pub wal_level: WalLevel,
    pub wal_log_hints: bool,
    pub track_commit_timestamp: bool,
}

impl Parameters {
    /// What a server that replays past the record must be set to at least.
    pub fn needed(&self) -> RecoveryParameters {
        let number = |value: i32| u32::try_from(value).unwrap_or(0);
        let level = u32::try_from(self.wal_level.0).ok().and_then(control_file::WalLevel::from_number);
        RecoveryParameters {
            wal_level: level.unwrap_or(control_file::WalLevel::Replica),
            wal_log_hints: self.wal_log_hints,
            max_connections: number(self.max_connections),
            max_worker_processes: number(self.max_worker_processes),
            max_wal_senders: number(self.max_wal_senders),
            max_prepared_transactions: number(self.max_prepared_transactions),
            max_locks_per_transaction: number(self.max_locks_per_transaction),
            track_commit_timestamp: self.track_commit_timestamp,
        }
    }
}

/// What the record says; `None` for operations that do not matter here.
///
/// # Errors
/// When the data is shorter than this major writes it.
pub fn decode(format: Format, op: u8, main: &[u8]) -> Result<Option<XlogRecord>, PayloadError> {
    let mut fields = Bytes::new(main);
    let (name, decoded) = match op {
        CHECKPOINT_SHUTDOWN | CHECKPOINT_ONLINE => {
            let checkpoint = checkpoint(format, op == CHECKPOINT_SHUTDOWN, &mut fields);
            ("CHECKPOINT", checkpoint.map(XlogRecord::Checkpoint))
        }
        BACKUP_END => ("BACKUP_END", fields.u64().map(|lsn| XlogRecord::BackupEnd { start_lsn: Lsn(lsn) })),
        PARAMETER_CHANGE => ("PARAMETER_CHANGE", parameters(&mut fields).map(XlogRecord::ParameterChange)),
        RESTORE_POINT => ("RESTORE_POINT", restore_point(&mut fields)),
        END_OF_RECOVERY => ("END_OF_RECOVERY", end_of_recovery(format, &mut fields).map(XlogRecord::EndOfRecovery)),
        OVERWRITE_CONTRECORD => {
            let lsn = fields.u64().map(Lsn);
            ("OVERWRITE_CONTRECORD", lsn.map(|overwritten_lsn| XlogRecord::OverwriteContrecord { overwritten_lsn }))
        }
        _ => return Ok(None),
    };
    decoded.map(Some).ok_or(PayloadError(name))
}

fn checkpoint(format: Format, shutdown: bool, fields: &mut Bytes<'_>) -> Option<Checkpoint> {
    let redo_lsn = Lsn(fields.u64()?);
    let (timeline, previous_timeline) = (TimelineId(fields.u32()?), TimelineId(fields.u32()?));
    let _full_page_writes = fields.u32()?;
    let wal_level = fields.i32()?;
    let next_xid = FullXid(fields.u64()?);
    let _oids_and_multixacts = fields.take(32)?;
    let time = Timestamp::from_unix_seconds(fields.i64()?);
    let wal_level = format.has_wal_level_in_checkpoints().then_some(WalLevel(wal_level));
    Some(Checkpoint { shutdown, redo_lsn, timeline, previous_timeline, next_xid, time, wal_level })
}

fn end_of_recovery(format: Format, fields: &mut Bytes<'_>) -> Option<EndOfRecovery> {
    let time = Timestamp::from_pg_micros(fields.i64()?);
    let (timeline, previous_timeline) = (TimelineId(fields.u32()?), TimelineId(fields.u32()?));
    let wal_level = if format.has_wal_level_in_checkpoints() { Some(WalLevel(fields.i32()?)) } else { None };
    Some(EndOfRecovery { time, timeline, previous_timeline, wal_level })
}

fn parameters(fields: &mut Bytes<'_>) -> Option<Parameters> {
    Some(Parameters {
        max_connections: fields.i32()?,
        max_worker_processes: fields.i32()?,
        max_wal_senders: fields.i32()?,
        max_prepared_transactions: fields.i32()?,
        max_locks_per_transaction: fields.i32()?,
        wal_level: WalLevel(fields.i32()?),
        wal_log_hints: fields.u8()? != 0,
        track_commit_timestamp: fields.u8()? != 0,
    })
}

fn restore_point(fields: &mut Bytes<'_>) -> Option<XlogRecord> {
    let time = Timestamp::from_pg_micros(fields.i64()?);
    let padded = fields.take(RESTORE_POINT_NAME_BYTES)?;
    let name = padded.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(XlogRecord::RestorePoint { name: String::from_utf8_lossy(name).into_owned(), time })
}
