//! What a listing showed of one incarnation, in little memory whatever its length; pure.
//!
//! WAL is folded into ranges, claims into the newest of each run of a clock, packs into a count for each backup: what is kept
//! grows with backups and timelines alone.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use crate::lineage::{History, Path, StoredRanges};
use crate::pg::{Lsn, SegmentSize, TimelineId, Timestamp};
use crate::repository::backup_object::{BackupCommit, BackupIntent};
use crate::repository::catalogue::{BackupMarks, WalObject};
use crate::repository::layout::{BackupMark, CoverageName, PinName};
use crate::repository::pin::Pin;
use crate::repository::{BackupId, Generation, Incarnation, Key};

/// Of each run of a clock so many of the newest claims are kept: one that cannot be read gives way to the one before it.
const CLAIMS_OF_RUN_MAX: usize = 4;

/// One incarnation, as a listing showed it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub incarnation: Incarnation,
    pub segment_size: SegmentSize,
    /// The store's clock when the listing began.
    pub now: DateTime<Utc>,
    pub stored: StoredRanges,
    /// When the store got the newest WAL of each timeline.
    pub newest_wal: BTreeMap<TimelineId, DateTime<Utc>>,
    pub history: History,
    /// Why it is not known how the timelines descend from each other.
    pub unsure: Option<String>,
    claims: BTreeMap<(TimelineId, u32), Vec<SeenClaim>>,
    pub backups: BTreeMap<BackupId, SeenBackup>,
    pub pins: Vec<SeenPin>,
    /// Up to where WAL was removed before.
    pub removed: BTreeMap<TimelineId, Lsn>,
}

/// A claim, by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenClaim {
    pub name: CoverageName,
    pub key: Key,
    pub at: DateTime<Utc>,
}

/// An object that was there since `at`; `None` when it cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamped<T> {
    pub at: DateTime<Utc>,
    pub facts: Option<T>,
}

/// What is known of one id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SeenBackup {
    pub intent: Option<Stamped<IntentFacts>>,
    pub commit: Option<Stamped<CommitFacts>>,
    /// Who has announced to look whether it may go.
    pub leaving: Vec<String>,
    pub dropped_at: Option<DateTime<Utc>>,
    pub packs: Packs,
}

/// Some packs, in sum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Packs {
    pub count: u64,
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IntentFacts {
    pub generation: Option<Generation>,
    pub base: Option<BackupId>,
    pub timeline: TimelineId,
    pub wal_lsn: Lsn,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitFacts {
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub stop_lsn: Lsn,
    pub stopped_at: Timestamp,
    /// The packs that it wrote itself.
    pub own: Packs,
    /// Packs of other backups that it reaches.
    pub others: Vec<(BackupId, u32)>,
}

/// A pin of a backup of this incarnation; `None` when it cannot be read: then it holds until somebody removes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenPin {
    pub name: PinName,
    pub pin: Option<Pin>,
}

impl Seen {
    pub fn new(incarnation: Incarnation, segment_size: SegmentSize, now: DateTime<Utc>) -> Seen {
        Seen {
            incarnation,
            segment_size,
            now,
            stored: StoredRanges::default(),
            newest_wal: BTreeMap::new(),
            history: History::default(),
            unsure: None,
            claims: BTreeMap::new(),
            backups: BTreeMap::new(),
            pins: Vec::new(),
            removed: BTreeMap::new(),
        }
    }

    pub fn see_wal(&mut self, object: &WalObject) {
        let (timeline, size) = (object.range.timeline, self.segment_size);
        self.stored.add(timeline, object.range.start_lsn(size), object.range.end_lsn(size));
        let newest = self.newest_wal.entry(timeline).or_insert(object.last_modified);
        *newest = object.last_modified.max(*newest);
    }

    pub fn see_claim(&mut self, claim: SeenClaim) {
        let run = self.claims.entry((claim.name.timeline, claim.name.run)).or_default();
        let place = run.partition_point(|known| order(&known.name) < order(&claim.name));
        run.insert(place, claim);
        if run.len() > CLAIMS_OF_RUN_MAX {
            run.remove(0);
        }
    }

    pub fn see_pack(&mut self, backup: &BackupId, bytes: u64) {
        if !self.backups.contains_key(backup) {
            self.backups.insert(backup.clone(), SeenBackup::default());
        }
        if let Some(known) = self.backups.get_mut(backup) {
            known.packs.count += 1;
            known.packs.bytes = known.packs.bytes.saturating_add(bytes);
        }
    }

    /// Takes the marks of an id; what its objects say follows.
    pub fn see_marks(&mut self, marks: &BackupMarks) -> &mut SeenBackup {
        let known = self.backups.entry(marks.id.clone()).or_default();
        for (mark, at) in marks.marks.iter().zip(&marks.times) {
            match mark {
                BackupMark::Intent => known.intent = Some(Stamped { at: *at, facts: None }),
                BackupMark::Commit => known.commit = Some(Stamped { at: *at, facts: None }),
                BackupMark::Leaving(by) => known.leaving.push(by.clone()),
                BackupMark::Dropped => known.dropped_at = Some(*at),
            }
        }
        known
    }

    /// The timeline that is archived now, in the newest incarnation.
    pub fn newest_timeline(&self) -> Option<TimelineId> {
        self.stored.timelines().last()
    }

    /// The claims whose WAL is stored on the path, the furthest first.
    pub fn proven_claims(&self, path: &Path) -> Vec<&SeenClaim> {
        let spans = self.stored.spans_on(path, Lsn::ZERO);
        let proven = |claim: &&SeenClaim| {
            let CoverageName { timeline, lsn, .. } = claim.name;
            path.holds(timeline, lsn) && spans.iter().any(|span| span.reaches(lsn))
        };
        let mut claims: Vec<&SeenClaim> = self.claims.values().flatten().filter(proven).collect();
        claims.sort_by_key(|claim| std::cmp::Reverse((claim.name.timeline, claim.name.lsn, claim.name.server_time)));
        claims
    }

    /// The newest moment that anything of the timeline speaks of, by whichever clock is ahead.
    pub fn newest_moment(&self, timeline: TimelineId) -> Option<Timestamp> {
        let wal = self.newest_wal.get(&timeline).map(|at| Timestamp::from(*at));
        let claims = self.claims.range((timeline, 0)..=(timeline, u32::MAX)).flat_map(|(_, run)| run);
        let claims = claims.map(|claim| claim.name.server_time).max();
        let commits = self.backups.values().filter_map(|backup| backup.commit.as_ref());
        let ends = commits.filter_map(|commit| {
            let facts = commit.facts.as_ref().filter(|facts| facts.timeline == timeline)?;
            Some(facts.stopped_at.max(commit.at.into()))
        });
        [wal, claims, ends.max()].into_iter().flatten().max()
    }
}

fn order(name: &CoverageName) -> (Lsn, Timestamp) {
    (name.lsn, name.server_time)
}

impl SeenBackup {
    /// Visible to readers.
    pub fn exists(&self) -> bool {
        self.commit.is_some() && self.dropped_at.is_none()
    }

    /// Whether anything but packs and marks of removal speaks of it.
    pub fn is_known(&self) -> bool {
        self.commit.is_some() || self.intent.is_some()
    }

    /// The commit's facts, when it can be read.
    pub fn committed(&self) -> Option<&CommitFacts> {
        self.commit.as_ref()?.facts.as_ref()
    }
}

impl CommitFacts {
    /// What matters here of a commit object: it names every pack that it reaches.
    pub fn of(commit: &BackupCommit) -> CommitFacts {
        let mut own = Packs::default();
        let mut others = Vec::new();
        for entry in &commit.packs {
            if entry.pack.backup == commit.id {
                own.count += 1;
                own.bytes = own.bytes.saturating_add(entry.bytes);
            } else {
                others.push((entry.pack.backup.clone(), entry.pack.number));
            }
        }
        let tables = commit.tables.packs.iter().filter(|pack| pack.backup != commit.id);
        others.extend(tables.map(|pack| (pack.backup.clone(), pack.number)));
        CommitFacts {
            timeline: commit.timeline,
            start_lsn: commit.start_lsn,
            stop_lsn: commit.stop_lsn,
            stopped_at: commit.stopped_at,
            own,
            others,
        }
    }
}

impl IntentFacts {
    pub fn of(intent: &BackupIntent) -> IntentFacts {
        IntentFacts {
            generation: intent.generation(),
            base: intent.base.clone(),
            timeline: intent.timeline,
            wal_lsn: intent.wal_lsn,
        }
    }
}
