//! Whether WAL is there without a hole, from the oldest backup of each timeline to its end; and whether the end is as far
//! as it was once: a coverage claim is written only when all WAL up to its position is stored.

use super::{Inspection, Report, RepositoryError, Severity};
use crate::pg::timeline::HistoryFile;
use crate::pg::{Lsn, SegmentSize, TimelineId};
use crate::repository::backup_object::BackupCommit;
use crate::repository::catalogue::{self, Gap, WalListing};
use crate::repository::layout::{parse_coverage, prefix};
use crate::repository::wal_object;

/// What a backup, or a timeline that branched off, needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Needed {
    timeline: TimelineId,
    start: Lsn,
    /// At least up to here; further as far as anything is stored.
    end: Lsn,
}

/// Bytes `[start, end)` that are not stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hole {
    timeline: TimelineId,
    start: Lsn,
    end: Lsn,
}

impl Inspection<'_> {
    pub(super) async fn continuity(
        &self,
        backups: &[BackupCommit],
        wal: &WalListing,
        report: &mut Report,
    ) -> Result<(), RepositoryError> {
        let (incarnation, size) = (self.known.incarnation, self.known.identity.segment_size);
        let histories = self.histories(wal, report).await?;
        let claimed = self.claimed().await?;
        let needed = |wal: &WalListing| {
            let mut needed = needed(backups, &histories, wal, size);
            for need in &mut needed {
                let claimed = claimed.iter().filter(|(timeline, _)| *timeline == need.timeline).map(|(_, lsn)| *lsn);
                need.end = claimed.fold(need.end, Lsn::max);
            }
            needed
        };
        let mut holes = holes(&needed(wal), wal, size);
        if !holes.is_empty() {
            // A hole is believed when a second listing shows it too.
            let again = catalogue::list_wal(self.repository, incarnation, size).await?;
            holes = self::holes(&needed(&again), &again, size);
        }
        let gaps =
            if holes.is_empty() { Vec::new() } else { catalogue::list_gaps(self.repository, incarnation).await? };
        for hole in holes {
            let place = format!("WAL [{}, {}) of timeline {}", hole.start, hole.end, hole.timeline);
            match gaps.iter().find(|g| covers(g, &hole)) {
                Some(gap) => report.add(Severity::Note, place, format!("it was lost: {}", gap.cause)),
                None => report.add(Severity::Problem, place, "it is missing: what lies behind it cannot be reached"),
            }
        }
        Ok(())
    }

    /// How far each claim says that WAL is stored.
    async fn claimed(&self) -> Result<Vec<(TimelineId, Lsn)>, RepositoryError> {
        let listed = self.repository.store().list(&prefix::coverage(self.known.incarnation)).await?;
        Ok(listed.iter().filter_map(|o| parse_coverage(&o.key)).map(|claim| (claim.timeline, claim.lsn)).collect())
    }

    async fn histories(
        &self,
        wal: &WalListing,
        report: &mut Report,
    ) -> Result<Vec<(TimelineId, HistoryFile)>, RepositoryError> {
        let mut histories: Vec<(TimelineId, HistoryFile)> = Vec::new();
        for object in &wal.histories {
            let loaded = wal_object::load_history(self.repository, &object.key, object.hash).await;
            let Some(file) = report.note(object.key.as_str(), loaded)? else { continue };
            if histories.iter().any(|(timeline, _)| *timeline == object.timeline) {
                report.add(Severity::Problem, object.key.as_str(), "timeline has two histories with other content");
            }
            histories.push((object.timeline, file));
        }
        let mut without: Vec<TimelineId> = wal.ranges.iter().map(|o| o.range.timeline).collect();
        without.dedup();
        let first = without.first().copied();
        for timeline in without {
            let known = histories.iter().any(|(t, _)| *t == timeline);
            if !known && timeline != TimelineId(1) && Some(timeline) != first {
                report.add(Severity::Problem, format!("history of timeline {timeline}"), "it is missing");
            }
        }
        for (first, second) in wal.ranges.iter().zip(wal.ranges.iter().skip(1)) {
            let place = |o: &catalogue::WalObject| (o.range.timeline, o.range.segment, o.range.from, o.range.to);
            if place(first) == place(second) {
                let what = format!("other content is stored for the same bytes as {}", second.key.as_str());
                report.add(Severity::Problem, first.key.as_str(), what);
            }
        }
        Ok(histories)
    }
}

fn covers(gap: &Gap, hole: &Hole) -> bool {
    gap.timeline == hole.timeline && gap.start_lsn < hole.end && gap.end_lsn > hole.start
}

/// From the oldest backup of each timeline, and from the switch point of each timeline that descends from one.
fn needed(
    backups: &[BackupCommit],
    histories: &[(TimelineId, HistoryFile)],
    wal: &WalListing,
    size: SegmentSize,
) -> Vec<Needed> {
    let mut timelines: Vec<TimelineId> = wal.ranges.iter().map(|o| o.range.timeline).collect();
    timelines.extend(backups.iter().map(|b| b.timeline));
    timelines.sort();
    timelines.dedup();
    let oldest = |timeline| backups.iter().filter(|b| b.timeline == timeline).map(|b| b.start_lsn).min();
    let mut needed = Vec::new();
    for timeline in timelines {
        let history = histories.iter().find(|(t, _)| *t == timeline).map(|(_, h)| h);
        // A backup on an ancestor leads here, when it ended before that ancestor was left.
        let entries = history.map_or(&[][..], |h| h.entries.as_slice());
        let ancestor =
            entries.iter().any(|e| backups.iter().any(|b| b.timeline == e.timeline && b.stop_lsn <= e.switch_lsn));
        let switch = entries.last().map(|e| e.switch_lsn).filter(|_| ancestor);
        let Some(start) = [switch, oldest(timeline)].into_iter().flatten().min() else { continue };
        let stop = backups.iter().filter(|b| b.timeline == timeline).map(|b| b.stop_lsn).max();
        // A descendant has its own copy of the segment that holds the switch point, and needs all before that one.
        let left = histories.iter().flat_map(|(_, h)| &h.entries).filter(|e| e.timeline == timeline);
        let left = left.map(|e| size.start_of(e.switch_lsn)).max();
        needed.push(Needed { timeline, start, end: [stop, left].into_iter().flatten().fold(start, Lsn::max) });
    }
    needed
}

fn holes(needed: &[Needed], wal: &WalListing, size: SegmentSize) -> Vec<Hole> {
    let mut holes = Vec::new();
    for need in needed {
        let mut ranges: Vec<(Lsn, Lsn)> = wal
            .ranges
            .iter()
            .filter(|o| o.range.timeline == need.timeline)
            .map(|o| (o.range.start_lsn(size), o.range.end_lsn(size)))
            .collect();
        ranges.sort_unstable();
        let mut at = need.start;
        for (start, end) in ranges {
            if start > at {
                holes.push(Hole { timeline: need.timeline, start: at, end: start });
            }
            at = at.max(end);
        }
        if at < need.end {
            holes.push(Hole { timeline: need.timeline, start: at, end: need.end });
        }
    }
    holes
}
