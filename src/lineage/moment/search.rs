//! Goes through the segment indexes on a path and finds where a target is.

use super::clock::{Anchor, Edge, Passage, Passed};
use super::reach::Reach;
use super::unreachable::Unreachable;
use super::{ArchiveView, BackupPoint, Moment, Request, Target};

use crate::lineage::history::Path;
use crate::lineage::stored::Span;
use crate::pg::{Lsn, TimelineId, Timestamp};
use crate::wal::transactions::{Completeness, SegmentIndex, TransactionEnd};

mod answer;
mod narrow;

/// How far past a time a clock must have gone on undisturbed for nothing behind it to matter, and how long before it a
/// backup must have ended for nothing before it to matter.
const SETTLED_MICROS: i64 = 3_600_000_000;

/// A restore point's record has 98 bytes; a page header may lie in its middle.
const NAMED_RECORD_BYTES_MAX: u64 = 144;

/// A search for one target: made from what is stored, given the indexes, asked for the moment.
#[derive(Debug)]
pub struct Search<'a> {
    target: Target,
    exclusive: bool,
    reach: Reach<'a>,
    /// The backup that is the target.
    named_backup: Option<&'a BackupPoint>,
    elsewhere: Vec<TimelineId>,
    scan_from: Lsn,
    /// Up to here everything was indexed.
    position: Lsn,
    /// The last index that was given ended with WAL known no further.
    is_tail: bool,
    unindexed: Vec<Span>,
    passage: Option<Passage>,
    /// Claims that lie before `position` have been looked at.
    claims_seen: usize,
    last_end: Option<TransactionEnd>,
    last_record: Option<Record>,
    found: Vec<Found>,
    /// The clock passed the time where nobody can restore to.
    behind: Option<Edge>,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    lsn: Lsn,
    end_lsn: Lsn,
}

/// One position that the target names.
#[derive(Debug, Clone)]
struct Found {
    place: FoundPlace,
    included: Option<TransactionEnd>,
    excluded: Option<TransactionEnd>,
}

#[derive(Debug, Clone, Copy)]
enum FoundPlace {
    /// Before the next transaction end from here on; after the last record if there is none.
    BeforeNextEnd,
    /// At a record; `end_lsn` is where the record ends that recovery must read last, and a backup must have ended by
    /// `consistent_by`.
    At { lsn: Lsn, end_lsn: Lsn, inclusive: bool, consistent_by: Lsn },
}

/// Finds the moment, given all indexes on the path from [`Search::scan_from`] on in LSN order.
///
/// # Errors
/// See [`Unreachable`].
pub fn resolve<'i>(
    request: &Request,
    view: &ArchiveView<'_>,
    indexes: impl IntoIterator<Item = &'i SegmentIndex>,
) -> Result<Moment, Unreachable> {
    let mut search = Search::new(request, view)?;
    for index in indexes {
        search.push(index);
    }
    search.finish()
}

impl<'a> Search<'a> {
    /// Begins a search.
    ///
    /// # Errors
    /// What is known without any index: a timeline or backup that does not exist, no backup to start from.
    pub fn new(request: &Request, view: &ArchiveView<'a>) -> Result<Search<'a>, Unreachable> {
        let named_backup = match &request.target {
            Target::Backup(id) => {
                let backup = view.backups.iter().find(|backup| backup.id == *id);
                Some(backup.ok_or_else(|| Unreachable::UnknownBackup { id: id.clone() })?)
            }
            _ => None,
        };
        let known = |timeline: TimelineId| {
            let unknown = || Unreachable::UnknownTimeline { timeline, known: view.history.timelines() };
            view.history.path_to(timeline).ok_or_else(unknown)
        };
        let mut path = known(request.timeline.unwrap_or(view.followed))?;
        if let Some(backup) = named_backup.filter(|backup| !path.holds(backup.timeline, backup.stop_lsn)) {
            if request.timeline.is_some() {
                return Err(Unreachable::OnAnotherTimeline { timelines: vec![backup.timeline] });
            }
            path = known(backup.timeline)?;
        }
        let elsewhere = timelines_with(&request.target, view, &path);
        let reach = Reach::new(view, path);
        let Some((first, _)) = reach.backups.first().copied() else {
            return Err(Unreachable::NoBackup { timeline: reach.path.timeline() });
        };
        let passage = match request.target {
            Target::Time(time) => {
                let anchors = reach.backups.iter().map(|(b, _)| Anchor { lsn: b.stop_lsn, time: b.stop_time });
                Some(Passage::new(time, request.exclusive, anchors.collect()))
            }
            _ => None,
        };
        let scan_from = scan_from(&request.target, view, &reach, named_backup).max(first.start_lsn);
        let claims_seen = reach.claims.partition_point(|claim| claim.lsn < scan_from);
        Ok(Search {
            target: request.target.clone(),
            exclusive: request.exclusive,
            reach,
            named_backup,
            elsewhere,
            scan_from,
            position: scan_from,
            is_tail: false,
            unindexed: Vec::new(),
            passage,
            claims_seen,
            last_end: None,
            last_record: None,
            found: Vec::new(),
            behind: None,
        })
    }

    /// The timelines on which the target is looked for.
    pub fn path(&self) -> &Path {
        &self.reach.path
    }

    /// The indexes of the segments on [`Search::path`] are wanted from the one that holds this position on.
    pub fn scan_from(&self) -> Lsn {
        self.scan_from
    }

    /// Whether further indexes can change nothing.
    pub fn is_done(&self) -> bool {
        match self.target {
            Target::Lsn(lsn) => self.is_past_goal() && self.end_after(lsn).is_some(),
            Target::Time(time) => {
                // One passage, and the clock was seen to go on from there for an hour and never to come back.
                let settled = Timestamp(time.0.saturating_add(SETTLED_MICROS));
                let seen = self.reach.claims.iter().take(self.claims_seen);
                let is_past = seen.rev().any(|claim| claim.until() > settled);
                let later = self.reach.claims.iter().skip(self.claims_seen);
                let one = self.found.first().is_some_and(|found| found.excluded.is_some()) && self.found.len() == 1;
                one && is_past && later.into_iter().all(|claim| claim.server_time > settled)
            }
            // What comes first after it is told, too.
            Target::Backup(_) => self.is_past_goal() && self.found.first().is_none_or(|f| f.excluded.is_some()),
            Target::Latest | Target::Xid(_) | Target::Name(_) => false,
        }
    }

    /// Takes the next index. Indexes of other timelines are passed over.
    pub fn push(&mut self, index: &SegmentIndex) {
        let Some(leg) = self.reach.path.leg(index.timeline) else { return };
        let to = index.end_lsn.min(leg.end_lsn);
        // A segment past the fork belongs to a diverged tail.
        if index.start_lsn >= leg.end_lsn {
            return;
        }
        if to <= self.position && index.completeness != Completeness::Tail {
            return;
        }
        if index.start_lsn > self.position {
            self.jump(index.start_lsn);
        }
        self.note_named(index, leg.end_lsn);
        let from = self.position;
        for end in index.ends.iter().filter(|end| end.lsn >= from && end.lsn < to) {
            // What is not stored yet cannot be read in recovery.
            if self.reach.span_at(end.lsn).is_some_and(|span| end.end_lsn <= span.end_lsn) {
                self.note_end(index, *end);
            }
        }
        self.note_last_record(index, leg.end_lsn);
        self.position = self.position.max(to);
        self.is_tail = index.completeness == Completeness::Tail;
    }

    /// Between `position` and `to` nothing was given: lost WAL, or WAL without an index.
    fn jump(&mut self, to: Lsn) {
        let stored: Vec<Span> = self.reach.spans.clone();
        for span in stored.iter().filter(|span| span.end_lsn > self.position && span.start_lsn < to) {
            let start_lsn = span.start_lsn.max(self.position);
            // The end of a tail is a record whose rest is missing, not an index that is.
            let cut_off = start_lsn == self.position && self.is_tail && span.end_lsn < to;
            if !cut_off {
                self.unindexed.push(Span { start_lsn, end_lsn: span.end_lsn.min(to) });
            }
        }
        let position = self.position;
        let holes = self.reach.holes();
        for hole in holes.into_iter().filter(|hole| hole.end_lsn > position && hole.start_lsn < to) {
            self.look_at_claims(hole.start_lsn);
            self.settle_open(None);
            if let Some(passage) = &mut self.passage {
                passage.gap(hole);
            }
        }
        self.position = to;
    }

    /// Restore points and ends of backups, where they are what is looked for.
    fn note_named(&mut self, index: &SegmentIndex, leg_end: Lsn) {
        let is_new = |lsn: Lsn| lsn >= self.position && lsn < leg_end && self.reach.span_at(lsn).is_some();
        let at = match &self.target {
            Target::Name(name) => {
                let points = index.restore_points.iter().filter(|point| point.name == *name);
                points.map(|point| point.lsn).filter(|lsn| is_new(*lsn)).collect::<Vec<_>>()
            }
            Target::Backup(_) => {
                let start = self.named_backup.map(|backup| backup.start_lsn);
                let ends = index.backup_ends.iter().filter(|end| Some(end.what) == start);
                ends.map(|end| end.lsn).filter(|lsn| is_new(*lsn)).collect()
            }
            _ => return,
        };
        for lsn in at {
            let before = index.ends.iter().rfind(|end| end.lsn < lsn && end.lsn >= self.position);
            let included = before.copied().or(self.last_end);
            let excluded = index.ends.iter().find(|end| end.lsn > lsn).copied();
            let inclusive = !self.exclusive || self.named_backup.is_some();
            let record_end = lsn.saturating_add(NAMED_RECORD_BYTES_MAX);
            let end_lsn = index.last_record_end_lsn.map_or(record_end, |last| last.min(record_end));
            self.found.push(Found {
                place: FoundPlace::At { lsn, end_lsn, inclusive, consistent_by: lsn },
                included,
                excluded,
            });
        }
    }

    fn note_end(&mut self, index: &SegmentIndex, end: TransactionEnd) {
        self.look_at_claims(end.lsn);
        self.settle_open(Some(end));
        match self.target {
            Target::Time(_) => {
                let passed = self.passage.as_mut().and_then(|passage| passage.end(end.lsn, end.time));
                self.note_passed(passed);
                self.settle_open(Some(end));
            }
            Target::Xid(xid) if is_xid(index, &end, xid) => {
                let inclusive = !self.exclusive;
                let consistent_by = if inclusive { end.end_lsn } else { end.lsn };
                let place = FoundPlace::At { lsn: end.lsn, end_lsn: end.end_lsn, inclusive, consistent_by };
                let (included, excluded) = if self.exclusive { (self.last_end, Some(end)) } else { (Some(end), None) };
                self.found.push(Found { place, included, excluded });
            }
            Target::Lsn(lsn) => {
                let in_it = end.lsn < lsn || (end.lsn == lsn && !self.exclusive);
                if !in_it && self.found.is_empty() {
                    let inclusive = !self.exclusive;
                    let place = FoundPlace::At { lsn, end_lsn: end.end_lsn, inclusive, consistent_by: lsn };
                    self.found.push(Found { place, included: self.last_end, excluded: Some(end) });
                }
            }
            Target::Latest | Target::Name(_) | Target::Backup(_) | Target::Xid(_) => {}
        }
        self.last_end = Some(end);
    }

    fn note_last_record(&mut self, index: &SegmentIndex, leg_end: Lsn) {
        // The first record past the goal is the one to stop at; one behind lost WAL would not do.
        if self.is_past_goal() {
            return;
        }
        let last = index.last_record_lsn.zip(index.last_record_end_lsn).map(|(lsn, end_lsn)| Record { lsn, end_lsn });
        let whole = last.filter(|record| record.lsn < leg_end && self.is_stored(*record));
        // The last record itself may not be stored whole: the transaction end before it is.
        let record = whole.or(self.last_end.map(|end| Record { lsn: end.lsn, end_lsn: end.end_lsn }));
        if record.map(|record| record.lsn) > self.last_record.map(|record| record.lsn) {
            self.last_record = record;
        }
    }

    fn is_stored(&self, record: Record) -> bool {
        self.reach.span_at(record.lsn).is_some_and(|span| record.end_lsn <= span.end_lsn)
    }

    /// Looks at the clocks of the claims up to `lsn`.
    fn look_at_claims(&mut self, lsn: Lsn) {
        while let Some(claim) = self.reach.claims.get(self.claims_seen).copied().filter(|claim| claim.lsn <= lsn) {
            self.claims_seen += 1;
            let passed = self.passage.as_mut().and_then(|passage| passage.claim(claim));
            self.note_passed(passed);
        }
    }

    fn note_passed(&mut self, passed: Option<Passed>) {
        match passed {
            Some(Passed::Here) => {
                let (included, excluded) = (self.last_end, None);
                self.found.push(Found { place: FoundPlace::BeforeNextEnd, included, excluded });
            }
            Some(Passed::Behind(edge)) => self.behind = Some(edge),
            None => {}
        }
    }

    /// What was found and waits for the next transaction end gets it; where none can follow, the last record.
    fn settle_open(&mut self, next: Option<TransactionEnd>) {
        let Some(found) = self.found.last_mut().filter(|found| found.excluded.is_none()) else { return };
        match (found.place, next) {
            (FoundPlace::BeforeNextEnd, Some(end)) => {
                let (lsn, end_lsn) = (end.lsn, end.end_lsn);
                found.place = FoundPlace::At { lsn, end_lsn, inclusive: false, consistent_by: lsn };
                found.excluded = Some(end);
            }
            (FoundPlace::BeforeNextEnd, None) => {
                if let Some(Record { lsn, end_lsn }) = self.last_record {
                    found.place = FoundPlace::At { lsn, end_lsn, inclusive: true, consistent_by: end_lsn };
                }
            }
            (FoundPlace::At { .. }, next) => found.excluded = next,
        }
    }

    /// A record starts at or after the position that is the target.
    fn is_past_goal(&self) -> bool {
        let goal = match self.target {
            Target::Lsn(lsn) => Some(lsn),
            _ => self.named_backup.map(|backup| backup.stop_lsn),
        };
        goal.is_some_and(|goal| self.last_record.is_some_and(|record| record.lsn >= goal))
    }

    fn end_after(&self, lsn: Lsn) -> Option<TransactionEnd> {
        self.found.first().and_then(|found| found.excluded).filter(|end| end.lsn >= lsn)
    }
}

fn is_xid(index: &SegmentIndex, end: &TransactionEnd, wanted: u64) -> bool {
    match u32::try_from(wanted) {
        Ok(low) => end.xid.0 == low,
        // Without a checkpoint nearby the epoch is unknown, and the lower half must do.
        Err(_) => index.full_xid(end).map_or(end.xid == crate::pg::FullXid(wanted).low(), |full| full.0 == wanted),
    }
}

/// Other timelines that hold an LSN that this path does not.
fn timelines_with(target: &Target, view: &ArchiveView<'_>, path: &Path) -> Vec<TimelineId> {
    let Target::Lsn(lsn) = target else { return Vec::new() };
    let others = view.stored.timelines().filter(|timeline| *timeline != path.timeline_at(*lsn));
    others.filter(|timeline| view.stored.contains(*timeline, *lsn)).collect()
}

/// From where on the indexes matter.
fn scan_from(target: &Target, view: &ArchiveView<'_>, reach: &Reach<'_>, named: Option<&BackupPoint>) -> Lsn {
    let first = reach.backups.first().map_or(Lsn::ZERO, |(backup, _)| backup.stop_lsn);
    // A segment before the one in question: the record in question may have begun there.
    let around = |lsn: Lsn| {
        let start = view.segment_size.start_of(Lsn(lsn.0.saturating_sub(1)));
        Lsn(start.0.saturating_sub(view.segment_size.bytes()))
    };
    match target {
        Target::Latest => around(reach.end_lsn()),
        Target::Lsn(lsn) => around(*lsn),
        Target::Backup(_) => named.map_or(first, |backup| backup.start_lsn),
        Target::Xid(_) | Target::Name(_) => first,
        Target::Time(time) => {
            // The newest backup that ended well before the time, if no clock was seen past the time before it.
            let well_before = |backup: &BackupPoint| {
                let settled = backup.stop_time.0.saturating_add(SETTLED_MICROS) <= time.0;
                let mut earlier = reach.claims.iter().take_while(|claim| claim.lsn <= backup.stop_lsn);
                settled && earlier.all(|claim| claim.server_time <= *time)
            };
            let newest = reach.backups.iter().rev().find(|(backup, _)| well_before(backup));
            newest.map_or(first, |(backup, _)| backup.stop_lsn)
        }
    }
}
