//! From where a position can be reached, and if from nowhere, why.

use super::unreachable::{Nearest, Place, Unreachable};
use super::{ArchiveView, BackupPoint, Gap};
use crate::lineage::coverage::{Claim, Covered, covered_until, proven};
use crate::lineage::history::Path;
use crate::lineage::stored::{Span, StoredRanges, holes_between};
use crate::pg::{Lsn, TimelineId, Timestamp};

/// What is stored of one path, and the backups on it.
#[derive(Debug)]
pub(super) struct Reach<'a> {
    pub path: Path,
    /// Stored WAL from the first backup's start on.
    pub spans: Vec<Span>,
    /// Backups on the path whose own WAL is stored, by the position of their end.
    pub backups: Vec<(&'a BackupPoint, Lsn)>,
    pub claims: Vec<&'a Claim>,
    gaps: &'a [Gap],
    stored: &'a StoredRanges,
}

/// A position as recovery must reach it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Needs {
    /// A backup must have ended by here.
    pub consistent_by: Lsn,
    /// WAL is read up to here.
    pub wal_end: Lsn,
}

impl<'a> Reach<'a> {
    pub fn new(view: &ArchiveView<'a>, path: Path) -> Reach<'a> {
        let on_path = view.backups.iter().filter(|backup| path.holds(backup.timeline, backup.stop_lsn));
        let mut backups: Vec<(&BackupPoint, Lsn)> = on_path
            .map(|backup| (backup, view.stored.contiguous_end_on(&path, backup.start_lsn)))
            .filter(|(backup, end)| *end >= backup.stop_lsn)
            .collect();
        backups.sort_by_key(|(backup, _)| (backup.stop_lsn, backup.start_lsn));
        let first = backups.iter().map(|(backup, _)| backup.start_lsn).min().unwrap_or(Lsn::MAX);
        let spans = view.stored.spans_on(&path, first);
        let claims = proven(view.claims, &path, &spans);
        Reach { path, spans, backups, claims, gaps: view.gaps, stored: view.stored }
    }

    pub fn holes(&self) -> Vec<Span> {
        holes_between(&self.spans)
    }

    /// The end of everything stored, holes or not.
    pub fn end_lsn(&self) -> Lsn {
        self.spans.last().map_or(Lsn::ZERO, |span| span.end_lsn)
    }

    pub fn span_at(&self, lsn: Lsn) -> Option<Span> {
        self.spans.iter().find(|span| span.start_lsn <= lsn && lsn < span.end_lsn).copied()
    }

    pub fn covered(&self) -> Option<Covered> {
        covered_until(&self.claims)
    }

    /// The newest backup from which recovery gets there.
    pub fn backup_for(&self, needs: Needs) -> Result<&'a BackupPoint, Unreachable> {
        let ended = self.backups.iter().rev().filter(|(backup, _)| backup.stop_lsn <= needs.consistent_by);
        if let Some((backup, _)) = ended.clone().find(|(_, end)| *end >= needs.wal_end) {
            return Ok(backup);
        }
        match ended.clone().map(|(_, end)| *end).max() {
            Some(end) if end < self.end_lsn() => Err(self.in_gap(end)),
            Some(_) => Err(Unreachable::NotCovered { nearest: self.nearest(needs.consistent_by) }),
            None => Err(self.before_backups(needs.consistent_by)),
        }
    }

    /// The timeline to recover to: the one of `lsn`, so that a server that goes on from there descends from it. Where its
    /// last segment is stored only as the copy that a later timeline begins with, that one.
    pub fn stop_timeline(&self, backup: &BackupPoint, lsn: Lsn, wal_end: Lsn) -> TimelineId {
        let holder = self.path.timeline_at(lsn);
        let later = self.path.legs().iter().map(|leg| leg.timeline).skip_while(|timeline| *timeline != holder);
        let reaches = |timeline: &TimelineId| {
            let path = self.path.up_to(*timeline);
            path.holds(backup.timeline, backup.stop_lsn)
                && self.stored.contiguous_end_on(&path, backup.start_lsn) >= wal_end
        };
        later.into_iter().find(reaches).unwrap_or(self.path.timeline())
    }

    /// No backup had ended yet.
    pub fn before_backups(&self, lsn: Lsn) -> Unreachable {
        let nearest = self.nearest(lsn);
        let around = self.backups.iter().find(|(backup, _)| backup.start_lsn <= lsn && lsn < backup.stop_lsn);
        match around {
            Some((backup, _)) => Unreachable::InsideBackup { backup: backup.id.clone(), nearest },
            None => Unreachable::BeforeWindow { nearest },
        }
    }

    /// In or behind the hole that begins at or after `lsn`.
    pub fn in_gap(&self, lsn: Lsn) -> Unreachable {
        let hole = self.holes().into_iter().find(|hole| lsn < hole.end_lsn);
        let gap = hole.unwrap_or(Span { start_lsn: lsn, end_lsn: self.end_lsn() });
        let overlaps = |noted: &&Gap| {
            noted.start_lsn < gap.end_lsn && gap.start_lsn < noted.end_lsn && self.path.leg(noted.timeline).is_some()
        };
        let noted = self.gaps.iter().any(|noted| overlaps(&noted));
        Unreachable::InGap { gap, noted, nearest: self.nearest(gap.start_lsn) }
    }

    /// The nearest places on both sides that surely work: proven moments, and ends of backups.
    pub fn nearest(&self, lsn: Lsn) -> Nearest {
        let end_of = |(backup, _): &(&BackupPoint, Lsn)| self.place(backup.stop_lsn, Some(backup.stop_time));
        let claim = self.claims.iter().rev().find(|claim| claim.lsn <= lsn && self.is_reachable(claim.lsn));
        let claim = claim.map(|claim| self.place(claim.lsn, Some(claim.until())));
        let backup = self.backups.iter().rev().find(|(backup, _)| backup.stop_lsn <= lsn).map(end_of);
        let earlier = claim.into_iter().chain(backup).max_by_key(|place| place.lsn);
        let later = self.backups.iter().find(|(backup, _)| backup.stop_lsn > lsn).map(end_of);
        Nearest { earlier, later }
    }

    pub fn place(&self, lsn: Lsn, time: Option<Timestamp>) -> Place {
        Place { timeline: self.path.timeline_at(lsn), lsn, time }
    }

    fn is_reachable(&self, lsn: Lsn) -> bool {
        self.backups.iter().any(|(backup, end)| backup.stop_lsn <= lsn && lsn <= *end)
    }
}
