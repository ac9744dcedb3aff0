//! Which stored object gives which bytes of which segment; pure.
//!
//! A segment is taken from the newest timeline of the path that begins in it or before it, as PostgreSQL does. Bytes
//! below a switch point are the same on both timelines (the server copies them), so the parent's objects fill what the
//! child's lack there, and the other way round.

use std::collections::BTreeMap;

use super::plan::{Nearest, PathStep, PlanError, PlannedObject, PlannedSegment};
use crate::pg::{Lsn, SegmentNo, SegmentSize, TimelineId};
use crate::repository::catalogue::{WalListing, WalObject};

/// The stored ranges by segment.
pub struct StoredWal<'a> {
    size: SegmentSize,
    ranges: BTreeMap<(TimelineId, SegmentNo), Vec<&'a WalObject>>,
}

/// Objects of one timeline whose bytes below `limit` may be used.
#[derive(Clone, Copy)]
struct Source {
    timeline: TimelineId,
    limit: u64,
}

impl<'a> StoredWal<'a> {
    pub fn new(listing: &'a WalListing, size: SegmentSize) -> Self {
        let mut ranges: BTreeMap<_, Vec<&WalObject>> = BTreeMap::new();
        for object in &listing.ranges {
            ranges.entry((object.range.timeline, object.range.segment)).or_default().push(object);
        }
        StoredWal { size, ranges }
    }

    fn of(&self, timeline: TimelineId, segment: SegmentNo) -> &[&'a WalObject] {
        self.ranges.get(&(timeline, segment)).map_or(&[], Vec::as_slice)
    }

    /// Objects that cover `[0, needed)` of a segment, taking the furthest reaching one each time.
    fn cover(&self, segment: SegmentNo, sources: &[Source], needed: u64) -> Result<Vec<PlannedObject>, PlanError> {
        let mut objects: Vec<PlannedObject> = Vec::new();
        let mut at = 0;
        while at < needed {
            let candidates =
                sources.iter().flat_map(|s| self.of(s.timeline, segment).iter().map(move |o| (o, s.limit)));
            let usable = candidates.filter(|(o, limit)| o.range.from <= at && o.range.to.min(*limit) > at);
            let best = usable.max_by_key(|(o, limit)| (o.range.to.min(*limit), o.range.whole));
            let Some((object, limit)) = best else {
                return Err(self.hole(segment, sources, at, needed));
            };
            self.check_conflict(object)?;
            let use_to = object.range.to.min(limit).min(needed);
            objects.push(PlannedObject {
                key: object.key.as_str().to_owned(),
                from: object.range.from,
                to: object.range.to,
                use_from: at,
                // A whole object is taken whole: what lies behind the stop is not replayed, but not wrong either.
                use_to: if limit >= object.range.to { object.range.to } else { use_to },
                stored_bytes: object.bytes,
            });
            at = use_to;
        }
        Ok(objects)
    }

    fn hole(&self, segment: SegmentNo, sources: &[Source], at: u64, needed: u64) -> PlanError {
        let timeline = sources.first().map_or(TimelineId(1), |s| s.timeline);
        let later = self.of(timeline, segment).iter().map(|o| o.range.from).filter(|from| *from > at).min();
        let start = segment.start_lsn(self.size);
        let (start, end) = (start.saturating_add(at), start.saturating_add(later.unwrap_or(needed)));
        PlanError::Hole { timeline, start, end, cause: String::new(), nearest: Nearest::default() }
    }

    /// Another object of the same range with another hash: nobody can say which one is right.
    fn check_conflict(&self, object: &WalObject) -> Result<(), PlanError> {
        let range = &object.range;
        let other = self
            .of(range.timeline, range.segment)
            .iter()
            .find(|o| (o.range.from, o.range.to) == (range.from, range.to) && o.range.hash != range.hash);
        match other {
            None => Ok(()),
            Some(other) => Err(PlanError::WalConflict {
                first: object.key.as_str().to_owned(),
                second: other.key.as_str().to_owned(),
            }),
        }
    }
}

/// Every segment from the backup's start to the end of the path, and the last one of each timeline that was left.
pub fn segments(stored: &StoredWal<'_>, path: &[PathStep], start_lsn: Lsn) -> Result<Vec<PlannedSegment>, PlanError> {
    let size = stored.size;
    let end_lsn = path.last().map_or(start_lsn, |s| s.end_lsn);
    let last = size.segment_of(Lsn(end_lsn.0.saturating_sub(1)).max(start_lsn));
    let mut planned = Vec::new();
    let mut segment = size.segment_of(start_lsn);
    while segment <= last {
        planned.extend(left_segments(stored, path, segment)?);
        planned.push(one_segment(stored, path, segment, end_lsn)?);
        segment = segment.next();
    }
    Ok(planned)
}

fn one_segment(
    stored: &StoredWal<'_>,
    path: &[PathStep],
    segment: SegmentNo,
    end_lsn: Lsn,
) -> Result<PlannedSegment, PlanError> {
    let (size, start) = (stored.size, segment.start_lsn(stored.size));
    // The first step begins within this segment or before it.
    let own = path.iter().rposition(|s| size.segment_of(s.start_lsn) <= segment).unwrap_or(0);
    let step = path.get(own).copied().unwrap_or(PathStep { timeline: TimelineId(1), start_lsn: start, end_lsn });
    let needed_bytes = end_lsn.saturating_since(start).min(size.bytes()).max(1);
    let mut sources = vec![Source { timeline: step.timeline, limit: size.bytes() }];
    sources.extend(ancestors(path, own, start));
    let objects = stored.cover(segment, &sources, needed_bytes)?;
    Ok(PlannedSegment { timeline: step.timeline, segment, objects, needed_bytes, left: false })
}

/// Older timelines of the path, each usable below the point where it was left.
fn ancestors(path: &[PathStep], own: usize, start: Lsn) -> impl Iterator<Item = Source> + '_ {
    let older = path.iter().take(own).rev();
    older
        .map(move |s| Source { timeline: s.timeline, limit: s.end_lsn.saturating_since(start) })
        .filter(|s| s.limit > 0)
}

/// The segments in which older timelines were left, up to that point: a transaction that was prepared before the switch
/// is read back from `pg_wal` under the old timeline's name.
fn left_segments(
    stored: &StoredWal<'_>,
    path: &[PathStep],
    segment: SegmentNo,
) -> Result<Vec<PlannedSegment>, PlanError> {
    let (size, start) = (stored.size, segment.start_lsn(stored.size));
    let mut left = Vec::new();
    for (index, step) in path.iter().enumerate().take(path.len().saturating_sub(1)) {
        let needed_bytes = step.end_lsn.saturating_since(start).min(size.bytes());
        let inside = size.segment_of(step.end_lsn) == segment && size.offset_of(step.end_lsn) > 0;
        if !inside || step.end_lsn <= step.start_lsn {
            continue;
        }
        // Its own objects, else those of the timelines that came after or before: the bytes are the same.
        let mut sources = vec![Source { timeline: step.timeline, limit: needed_bytes }];
        sources.extend(ancestors(path, index, start));
        let later = path.iter().skip(index + 1).map(|s| Source { timeline: s.timeline, limit: needed_bytes });
        sources.extend(later);
        let objects = stored.cover(segment, &sources, needed_bytes)?;
        left.push(PlannedSegment { timeline: step.timeline, segment, objects, needed_bytes, left: true });
    }
    Ok(left)
}

/// The timelines whose objects a planned segment is taken from.
pub fn timelines_of(planned: &PlannedSegment) -> Vec<TimelineId> {
    let mut timelines = vec![planned.timeline];
    for timeline in planned.objects.iter().filter_map(|o| timeline_in(&o.key)) {
        if !timelines.contains(&timeline) {
            timelines.push(timeline);
        }
    }
    timelines
}

/// Covers a planned segment from another listing, with the same timelines and the same limits.
pub fn cover_again(stored: &StoredWal<'_>, planned: &PlannedSegment) -> Result<Vec<PlannedObject>, PlanError> {
    let own = if planned.left { planned.needed_bytes } else { stored.size.bytes() };
    let sources: Vec<Source> = timelines_of(planned)
        .into_iter()
        .map(|timeline| {
            let used = planned.objects.iter().filter(|o| timeline_in(&o.key) == Some(timeline)).map(|o| o.use_to);
            let limit = if timeline == planned.timeline { own } else { used.max().unwrap_or(0) };
            Source { timeline, limit }
        })
        .collect();
    stored.cover(planned.segment, &sources, planned.needed_bytes)
}

/// The timeline of a key below `<incarnation>/wal/<timeline>/`.
fn timeline_in(key: &str) -> Option<TimelineId> {
    let (_, rest) = key.split_once("/wal/")?;
    TimelineId::from_hex(rest.split('/').next()?)
}
