//! From what a person asks for to a position that PostgreSQL will reach.
//!
//! PostgreSQL is never given a time: when no transaction ended after it, recovery would fail. The state at a time T is the
//! state before the first transaction end *in LSN order* whose time is past T; when there is none, T must be covered, and
//! the target is the last complete record. Times in WAL are not monotonic. Inversions of milliseconds are usual and
//! ignored; where a clock ran back by more than a second around T, T names several points, and none is chosen.
//!
//! [`Search`] is given the segment indexes on the path in LSN order and keeps only a few of their entries.
//!
//! Invariant: a [`Moment`] lies in WAL that is stored without a hole from its backup's start on, not before that backup's
//! end, and PostgreSQL reads every record that it needs to see in order to stop there.

use crate::pg::{Lsn, SegmentSize, TimelineId, Timestamp};
use crate::wal::transactions::TransactionEnd;

mod clock;
mod reach;
mod search;
pub mod target;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "numbers of the tests themselves")]
mod tests;
mod unreachable;
pub mod window;

use super::coverage::Claim;
use super::history::History;
use super::stored::StoredRanges;
pub use search::{Search, resolve};
pub use target::{ParseTargetError, TARGET_FORMS, Target, parse_time};
pub use unreachable::{Nearest, Place, Unreachable};

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub target: Target,
    /// Stop before the target instead of after it; for a time: without the transactions that ended at that very moment.
    pub exclusive: bool,
    /// The timeline to end on; without it the one that is followed.
    pub timeline: Option<TimelineId>,
}

/// A backup, as far as it matters for what can be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupPoint {
    pub id: String,
    pub timeline: TimelineId,
    /// Replay starts here.
    pub start_lsn: Lsn,
    /// Only from here on the restored files are consistent.
    pub stop_lsn: Lsn,
    /// When it ended, by the server's clock.
    pub stop_time: Timestamp,
}

/// WAL that is noted as lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub end_lsn: Lsn,
}

/// What is in storage.
#[derive(Debug, Clone, Copy)]
pub struct ArchiveView<'a> {
    pub segment_size: SegmentSize,
    pub history: &'a History,
    /// The timeline that is archived now: where "latest" is, and what targets are looked for on.
    pub followed: TimelineId,
    pub stored: &'a StoredRanges,
    pub backups: &'a [BackupPoint],
    /// In the order in which they were made.
    pub claims: &'a [Claim],
    pub gaps: &'a [Gap],
}

/// Where PostgreSQL stops; what `recovery_target_lsn`, `_inclusive` and `_timeline` say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExactStop {
    pub timeline: TimelineId,
    /// Inclusive: the last record is the first that starts here or later. Exclusive: that record is left out.
    pub lsn: Lsn,
    pub inclusive: bool,
}

/// A target that can be reached, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    pub stop: ExactStop,
    /// The newest backup from which it can be reached.
    pub backup: String,
    /// WAL `[wal_start_lsn, wal_end_lsn)` on the path to `stop.timeline` is needed; PostgreSQL reads up to its end.
    pub wal_start_lsn: Lsn,
    pub wal_end_lsn: Lsn,
    /// The last transaction that is in; `None` when none ended in the part of the WAL that was looked at.
    pub last_included: Option<TransactionEnd>,
    /// The first transaction that is not.
    pub first_excluded: Option<TransactionEnd>,
}

impl Moment {
    /// What would say the same to PostgreSQL itself, for people who want to check.
    pub fn native_settings(&self) -> Vec<(&'static str, String)> {
        vec![
            ("recovery_target_timeline", self.stop.timeline.to_string()),
            ("recovery_target_lsn", self.stop.lsn.to_string()),
            ("recovery_target_inclusive", if self.stop.inclusive { "on" } else { "off" }.to_owned()),
        ]
    }

    /// Other targets of PostgreSQL that keep the same transactions.
    pub fn equivalents(&self) -> Vec<String> {
        let setting = |end: TransactionEnd, inclusive: &str| {
            format!("recovery_target_xid = '{}', recovery_target_inclusive = {inclusive}", end.xid)
        };
        let included = self.last_included.map(|end| setting(end, "on"));
        included.into_iter().chain(self.first_excluded.map(|end| setting(end, "off"))).collect()
    }
}
