//! What of a segment's WAL must be known to turn any restore target into an exact position.
//!
//! [`Indexer`] reads WAL as it passes and gives a [`SegmentIndex`] for every segment; [`SegmentIndex::encode`] and
//! [`SegmentIndex::decode`] are its bytes in storage, without the envelope (compression, hash) that storage adds.
//!
//! A record belongs to the segment in which it starts, also when it ends in the next one. Entries are in LSN order. Times
//! are the server's and not monotonic: a search by time goes through the entries in LSN order.

use crate::pg::{FullXid, Lsn, Major, TimelineId, Timestamp, Xid};

mod codec;
mod indexer;
mod rollup;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "numbers of the tests themselves")]
mod tests;

pub use super::rmgr::tblspc::MadeTablespace;
pub use super::rmgr::xact::EndKind;
pub use super::rmgr::xlog::{Checkpoint, EndOfRecovery, Parameters, WalLevel};
pub use codec::{DecodeError, INDEX_VERSION};
pub use indexer::Indexer;
pub use rollup::{Row, decode_rows, encode_rows};

/// What happened in the records that start in one segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentIndex {
    /// The timeline in the segment's name. The first segment of a timeline begins with a copy of its parent's.
    pub timeline: TimelineId,
    /// Where the segment starts.
    pub start_lsn: Lsn,
    /// Every record that starts before this is in the index; where it is whole, the end of the segment.
    pub end_lsn: Lsn,
    pub completeness: Completeness,
    /// The version of the server; unknown when not one page could be read.
    pub major: Option<Major>,
    pub first_record_lsn: Option<Lsn>,
    /// The last complete record; with it as inclusive target everything in the index is restored.
    pub last_record_lsn: Option<Lsn>,
    /// Where that record ends, which may be past the segment's end.
    pub last_record_end_lsn: Option<Lsn>,
    /// The next transaction id at some moment in or before this segment: gives the epoch of the ids in `ends`.
    pub near_xid: Option<FullXid>,
    /// A record of a resource manager passed that no known version has: its changes are unknown, its end is not.
    pub has_unknown_rmgr: bool,
    pub ends: Vec<TransactionEnd>,
    pub restore_points: Vec<RestorePoint>,
    pub parameter_changes: Vec<At<Parameters>>,
    pub checkpoints: Vec<At<Checkpoint>>,
    /// Ends of base backups, with the start of the backup that ended.
    pub backup_ends: Vec<At<Lsn>>,
    pub ends_of_recovery: Vec<At<EndOfRecovery>>,
    /// Outside the data directory.
    pub made_tablespaces: Vec<At<MadeTablespace>>,
}

/// Whether the index holds all of its segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Completeness {
    /// Every record that starts in the segment is in the index.
    Whole,
    /// WAL was known only up to `end_lsn`, because there is no more of it yet or ever.
    Tail,
    /// WAL from `lsn` on could not be understood.
    Broken { lsn: Lsn, reason: String },
}

/// The end of a transaction (or the rollback of a subtransaction).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransactionEnd {
    /// Start of the record; as exclusive target everything before this end is restored.
    pub lsn: Lsn,
    pub end_lsn: Lsn,
    pub kind: EndKind,
    pub xid: Xid,
    pub time: Timestamp,
}

/// A position that somebody named with `pg_create_restore_point`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestorePoint {
    pub lsn: Lsn,
    pub name: String,
    pub time: Timestamp,
}

/// Something that a record at `lsn` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct At<T> {
    pub lsn: Lsn,
    pub what: T,
}

/// What of an index is needed to know whether a search must look into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    pub first: Timestamp,
    pub last: Timestamp,
    pub least: Timestamp,
    pub greatest: Timestamp,
}

impl SegmentIndex {
    /// An index of nothing yet.
    pub fn empty(timeline: TimelineId, start_lsn: Lsn) -> SegmentIndex {
        SegmentIndex {
            timeline,
            start_lsn,
            end_lsn: start_lsn,
            completeness: Completeness::Tail,
            major: None,
            first_record_lsn: None,
            last_record_lsn: None,
            last_record_end_lsn: None,
            near_xid: None,
            has_unknown_rmgr: false,
            ends: Vec::new(),
            restore_points: Vec::new(),
            parameter_changes: Vec::new(),
            checkpoints: Vec::new(),
            backup_ends: Vec::new(),
            ends_of_recovery: Vec::new(),
            made_tablespaces: Vec::new(),
        }
    }

    pub fn is_whole(&self) -> bool {
        self.completeness == Completeness::Whole
    }

    /// The times of the transaction ends; `None` when there are none.
    pub fn times(&self) -> Option<Times> {
        let (first, last) = (self.ends.first()?.time, self.ends.last()?.time);
        let start = Times { first, last, least: first, greatest: first };
        Some(self.ends.iter().fold(start, |times, end| Times {
            least: times.least.min(end.time),
            greatest: times.greatest.max(end.time),
            ..times
        }))
    }

    /// The id of `end` with its epoch.
    pub fn full_xid(&self, end: &TransactionEnd) -> Option<FullXid> {
        end.xid.full_near(self.near_xid?)
    }
}
