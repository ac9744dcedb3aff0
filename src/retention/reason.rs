//! Why something is kept or goes, as a person reads it.

use std::fmt;

use chrono::{DateTime, SecondsFormat, Utc};

use super::policy::GRACE;
use crate::pg::Timestamp;
use crate::repository::BackupId;

/// Whether something stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Keep(Reason),
    Remove(Reason),
}

/// Why; each reads on from "kept: " or "removed: ".
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    // Of backups.
    Oldest,
    WithinWindow,
    NoneBefore,
    Pinned { name: String, until: Timestamp },
    BeingTaken,
    BeforeWindow { instead: BackupId },
    OldTail,
    Abandoned,
    Dropped(DateTime<Utc>),
    DamagedBackup,
    Unclaimed,
    // Of everything.
    NoCoverage,
    TimelinesUnknown(String),
    NeedsUnknown(BackupId),
    New,
    UnknownName,
    Record,
    // Of objects.
    OfBackup { id: BackupId, fate: Box<Reason> },
    WillBeDropped { id: BackupId, why: Box<Reason> },
    Ripe(BackupId),
    ReachedBy(BackupId),
    BaseOf(BackupId),
    DroppedMark,
    ReplayOf(BackupId),
    NoBackup,
    BeforeOldest,
    TailInWindow,
    Descent,
    Superseded,
    PinHolds(Timestamp),
    PinExpired(Timestamp),
    DamagedPin,
}

impl Verdict {
    pub fn is_keep(&self) -> bool {
        matches!(self, Verdict::Keep(_))
    }

    pub fn reason(&self) -> &Reason {
        match self {
            Verdict::Keep(reason) | Verdict::Remove(reason) => reason,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Reason::Oldest => "it leads to the oldest moment of the window",
            Reason::WithinWindow => "it ended within the window, or not surely before it",
            Reason::NoneBefore => "no whole backup is surely older than the window",
            Reason::BeingTaken => "it is being taken",
            Reason::OldTail => "the tail that it is of left the window",
            Reason::Abandoned => "it was begun long ago, or by a writer that is gone, and never finished",
            Reason::DamagedBackup => "its commit object cannot be read",
            Reason::Unclaimed => "no intent, commit object or mark says what it is",
            Reason::NoCoverage => "no covered moment is proven, so nobody knows where the window ends",
            Reason::New => "it came while the repository was looked at",
            Reason::UnknownName => "its name is not known to this version",
            Reason::Record => "it is a record that is always kept",
            Reason::DroppedMark => "a mark of a dropped backup is never removed",
            Reason::NoBackup => "no backup leads to it yet, and one may",
            Reason::BeforeOldest => "no backup or intent needs WAL that old, nor what tells of it",
            Reason::TailInWindow => "it is of a tail that is within the window",
            Reason::Descent => "it says how the timelines descend from each other",
            Reason::Superseded => "a later one says more",
            Reason::DamagedPin => "a pin that cannot be read holds until it is removed by hand",
            Reason::Pinned { name, until } => return write!(f, "it is pinned as {name:?} until {until}"),
            Reason::BeforeWindow { instead } => {
                return write!(f, "it ended before the window, to whose oldest moment backup {instead} leads");
            }
            Reason::Dropped(at) => {
                let goes = at.checked_add_signed(GRACE).unwrap_or(*at).to_rfc3339_opts(SecondsFormat::Secs, true);
                return write!(f, "it was dropped; a restore that began before may read it until {goes}");
            }
            Reason::TimelinesUnknown(why) => return write!(f, "{why}, so nobody knows which backups lead where"),
            Reason::NeedsUnknown(id) => {
                return write!(f, "backup {id}, or what it is built on, cannot be read, so nobody knows what it needs");
            }
            Reason::OfBackup { id, fate } => return write!(f, "backup {id}: {fate}"),
            Reason::WillBeDropped { id, why } => {
                return write!(f, "backup {id} is dropped by the next prune, and this goes a day later: {why}");
            }
            Reason::Ripe(id) => return write!(f, "backup {id} was dropped more than a day ago"),
            Reason::ReachedBy(id) => return write!(f, "backup {id} reaches it"),
            Reason::BaseOf(id) => return write!(f, "backup {id} is being built on it"),
            Reason::ReplayOf(id) => return write!(f, "replay of backup {id} needs it"),
            Reason::PinHolds(until) => return write!(f, "it holds until {until}"),
            Reason::PinExpired(until) => return write!(f, "it held until {until}"),
        };
        f.write_str(text)
    }
}
