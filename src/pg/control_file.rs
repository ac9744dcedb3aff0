//! `global/pg_control`: what a cluster says about itself while it is down.
//!
//! Source: `src/include/catalog/pg_control.h`, 14–18, on 64-bit little-endian machines. The offsets are the same in all of
//! them but for the nonce and the CRC, which 18 moves by a new flag; 17 puts the checkpoint's `wal_level` into what was
//! padding. A file whose CRC does not fit is refused: nothing in it means anything then.

use serde::{Deserialize, Serialize};

use super::{Lsn, Major, SegmentSize, SystemId, TimelineId, Timestamp};

/// The decoded file. Fields that no part of this program reads are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlFile {
    pub system_id: SystemId,
    /// `pg_control_version`: 1300 for 14–16, 1700, 1800.
    pub control_version: u32,
    pub catalog_version: u32,
    pub state: ClusterState,
    /// When the file was last written.
    pub time: Timestamp,
    /// Where the latest checkpoint record starts.
    pub checkpoint_lsn: Lsn,
    pub checkpoint: Checkpoint,
    /// Recovery must come so far before the cluster is consistent; zero outside archive recovery.
    pub min_recovery_lsn: Lsn,
    pub min_recovery_timeline: TimelineId,
    /// Redo position of the backup that is being recovered, until its end is reached.
    pub backup_start_lsn: Lsn,
    pub backup_end_lsn: Lsn,
    pub backup_end_required: bool,
    pub parameters: RecoveryParameters,
    pub block_size: u32,
    /// Blocks in one file of a relation, 131072 for 1 GiB.
    pub relation_segment_blocks: u32,
    pub wal_block_size: u32,
    pub segment_size: SegmentSize,
    /// 0 when pages carry no checksums.
    pub data_checksum_version: u32,
}

/// The copy of the latest checkpoint record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    pub redo_lsn: Lsn,
    pub timeline: TimelineId,
    pub previous_timeline: TimelineId,
    /// 64 bits: epoch and transaction id.
    pub next_xid: u64,
    pub time: Timestamp,
}

/// `DBState`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClusterState {
    StartingUp,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    InProduction,
}

/// `WalLevel`; ordered, a higher one writes more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WalLevel {
    Minimal,
    Replica,
    Logical,
}

/// The settings that a server replaying this cluster's WAL must have at least as large
/// (`CheckRequiredParameterValues`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryParameters {
    pub wal_level: WalLevel,
    pub wal_log_hints: bool,
    pub max_connections: u32,
    pub max_worker_processes: u32,
    pub max_wal_senders: u32,
    pub max_prepared_transactions: u32,
    pub max_locks_per_transaction: u32,
    pub track_commit_timestamp: bool,
}

/// Why the bytes are not a control file that this program reads.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeControlFileError {
    #[error("pg_control has {0} bytes, too few")]
    Short(usize),
    #[error(
        "pg_control has format version {0}, which belongs to no PostgreSQL from 14 to 18 on a little-endian machine"
    )]
    Version(u32),
    #[error("the CRC of pg_control is wrong: the file is damaged")]
    Crc,
    #[error("pg_control: {field} has the impossible value {value}")]
    Value { field: &'static str, value: u64 },
}

impl ControlFile {
    /// The size of the file; only its first part is used.
    pub const FILE_BYTES: usize = 8192;

    /// # Errors
    /// When the version is unknown, the CRC does not fit or a field holds what no server writes.
    pub fn decode(bytes: &[u8]) -> Result<ControlFile, DecodeControlFileError> {
        let fields = Fields(bytes);
        let control_version = fields.u32(8)?;
        let crc_offset = match control_version {
            1300 | 1700 => 288,
            1800 => 292,
            other => return Err(DecodeControlFileError::Version(other)),
        };
        let covered = bytes.get(..crc_offset).ok_or(DecodeControlFileError::Short(bytes.len()))?;
        if crc32c::crc32c(covered) != fields.u32(crc_offset)? {
            return Err(DecodeControlFileError::Crc);
        }
        let segment_bytes = fields.u32(228)?;
        let segment_size = SegmentSize::new(u64::from(segment_bytes))
            .map_err(|_| DecodeControlFileError::Value { field: "xlog_seg_size", value: segment_bytes.into() })?;
        Ok(ControlFile {
            system_id: SystemId(fields.u64(0)?),
            control_version,
            catalog_version: fields.u32(12)?,
            state: fields.state(16)?,
            time: fields.time(24)?,
            checkpoint_lsn: Lsn(fields.u64(32)?),
            checkpoint: fields.checkpoint()?,
            min_recovery_lsn: Lsn(fields.u64(136)?),
            min_recovery_timeline: TimelineId(fields.u32(144)?),
            backup_start_lsn: Lsn(fields.u64(152)?),
            backup_end_lsn: Lsn(fields.u64(160)?),
            backup_end_required: fields.flag(168)?,
            parameters: fields.parameters()?,
            block_size: fields.u32(216)?,
            relation_segment_blocks: fields.u32(220)?,
            wal_block_size: fields.u32(224)?,
            segment_size,
            data_checksum_version: fields.u32(252)?,
        })
    }

    /// The major version, known by its catalogue version; `None` for a development build.
    pub fn major(&self) -> Option<Major> {
        match self.catalog_version {
            202_107_181 => Some(Major(14)),
            202_209_061 => Some(Major(15)),
            202_307_071 => Some(Major(16)),
            202_406_281 => Some(Major(17)),
            202_506_291 => Some(Major(18)),
            _ => None,
        }
    }

    pub fn has_data_checksums(&self) -> bool {
        self.data_checksum_version != 0
    }
}

impl RecoveryParameters {
    /// For each setting the larger of the two.
    #[must_use]
    pub fn raised_to(&self, other: &RecoveryParameters) -> RecoveryParameters {
        RecoveryParameters {
            wal_level: self.wal_level.max(other.wal_level),
            wal_log_hints: self.wal_log_hints || other.wal_log_hints,
            max_connections: self.max_connections.max(other.max_connections),
            max_worker_processes: self.max_worker_processes.max(other.max_worker_processes),
            max_wal_senders: self.max_wal_senders.max(other.max_wal_senders),
            max_prepared_transactions: self.max_prepared_transactions.max(other.max_prepared_transactions),
            max_locks_per_transaction: self.max_locks_per_transaction.max(other.max_locks_per_transaction),
            track_commit_timestamp: self.track_commit_timestamp || other.track_commit_timestamp,
        }
    }
}

impl WalLevel {
    pub fn from_number(number: u32) -> Option<WalLevel> {
        match number {
            0 => Some(WalLevel::Minimal),
            1 => Some(WalLevel::Replica),
            2 => Some(WalLevel::Logical),
            _ => None,
        }
    }

    /// As `wal_level` is written in a configuration file.
    pub fn name(self) -> &'static str {
        match self {
            WalLevel::Minimal => "minimal",
            WalLevel::Replica => "replica",
            WalLevel::Logical => "logical",
        }
    }
}

/// The file's bytes, read at the offsets of the C structure.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&self, offset: usize) -> Result<[u8; N], DecodeControlFileError> {
        let bytes = self.0.get(offset..).and_then(|rest| rest.first_chunk::<N>());
        bytes.copied().ok_or(DecodeControlFileError::Short(self.0.len()))
    }

    fn u32(&self, offset: usize) -> Result<u32, DecodeControlFileError> {
        self.array(offset).map(u32::from_le_bytes)
    }

    fn u64(&self, offset: usize) -> Result<u64, DecodeControlFileError> {
        self.array(offset).map(u64::from_le_bytes)
    }

    fn flag(&self, offset: usize) -> Result<bool, DecodeControlFileError> {
        self.array::<1>(offset).map(|byte| byte != [0])
    }

    fn time(&self, offset: usize) -> Result<Timestamp, DecodeControlFileError> {
        self.array(offset).map(|bytes| Timestamp::from_unix_seconds(i64::from_le_bytes(bytes)))
    }

    fn state(&self, offset: usize) -> Result<ClusterState, DecodeControlFileError> {
        Ok(match self.u32(offset)? {
            0 => ClusterState::StartingUp,
            1 => ClusterState::ShutDown,
            2 => ClusterState::ShutDownInRecovery,
            3 => ClusterState::ShuttingDown,
            4 => ClusterState::InCrashRecovery,
            5 => ClusterState::InArchiveRecovery,
            6 => ClusterState::InProduction,
            other => return Err(DecodeControlFileError::Value { field: "state", value: other.into() }),
        })
    }

    fn checkpoint(&self) -> Result<Checkpoint, DecodeControlFileError> {
        Ok(Checkpoint {
            redo_lsn: Lsn(self.u64(40)?),
            timeline: TimelineId(self.u32(48)?),
            previous_timeline: TimelineId(self.u32(52)?),
            next_xid: self.u64(64)?,
            time: self.time(104)?,
        })
    }

    fn parameters(&self) -> Result<RecoveryParameters, DecodeControlFileError> {
        let level = self.u32(172)?;
        let wal_level = WalLevel::from_number(level)
            .ok_or(DecodeControlFileError::Value { field: "wal_level", value: level.into() })?;
        Ok(RecoveryParameters {
            wal_level,
            wal_log_hints: self.flag(176)?,
            max_connections: self.u32(180)?,
            max_worker_processes: self.u32(184)?,
            max_wal_senders: self.u32(188)?,
            max_prepared_transactions: self.u32(192)?,
            max_locks_per_transaction: self.u32(196)?,
            track_commit_timestamp: self.flag(200)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A file as a server of this control version would write it, with the given bytes put at offsets.
    fn file(control_version: u32, fields: &[(usize, &[u8])]) -> Vec<u8> {
        let mut bytes = vec![0; ControlFile::FILE_BYTES];
        let mut put = |offset: usize, value: &[u8]| bytes[offset..offset + value.len()].copy_from_slice(value);
        put(8, &control_version.to_le_bytes());
        put(228, &(16u32 << 20).to_le_bytes());
        fields.iter().for_each(|(offset, value)| put(*offset, value));
        let crc_offset = if control_version == 1800 { 292 } else { 288 };
        let crc = crc32c::crc32c(&bytes[..crc_offset]);
        bytes[crc_offset..crc_offset + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn fields_are_read_where_the_server_puts_them() {
        for version in [1300, 1700, 1800] {
            let bytes = file(
                version,
                &[
                    (0, &7u64.to_le_bytes()),
                    (12, &202_506_291u32.to_le_bytes()),
                    (16, &5u32.to_le_bytes()),
                    (40, &0x300_0028u64.to_le_bytes()),
                    (48, &3u32.to_le_bytes()),
                    (172, &2u32.to_le_bytes()),
                    (180, &250u32.to_le_bytes()),
                ],
            );
            let control = ControlFile::decode(&bytes).expect("well formed");
            assert_eq!(control.system_id, SystemId(7));
            assert_eq!(control.major(), Some(Major(18)));
            assert_eq!(control.state, ClusterState::InArchiveRecovery);
            assert_eq!(control.checkpoint.redo_lsn, Lsn(0x300_0028));
            assert_eq!(control.checkpoint.timeline, TimelineId(3));
            assert_eq!(control.parameters.wal_level, WalLevel::Logical);
            assert_eq!(control.parameters.max_connections, 250);
        }
    }

    #[test]
    fn damage_is_noticed() {
        let good = file(1800, &[]);
        let mut flipped = good.clone();
        flipped[100] ^= 1;
        assert_eq!(ControlFile::decode(&flipped), Err(DecodeControlFileError::Crc));
        assert_eq!(ControlFile::decode(&good[..200]), Err(DecodeControlFileError::Short(200)));
        assert_eq!(ControlFile::decode(&file(1201, &[])), Err(DecodeControlFileError::Version(1201)));
        let wrong = ControlFile::decode(&file(1700, &[(16, &9u32.to_le_bytes())]));
        assert_eq!(wrong, Err(DecodeControlFileError::Value { field: "state", value: 9 }));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_error_or_a_value(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = ControlFile::decode(&bytes);
        }
    }
}
