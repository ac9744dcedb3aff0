//! What can be restored, all of it: the intervals on the timeline that is followed, and the tails that it left behind.

use super::reach::Reach;
use super::{ArchiveView, Place};
use crate::lineage::stored::Span;
use crate::pg::{Lsn, TimelineId, Timestamp};

/// Every moment of it can be restored: from the end of a backup to the end of the unbroken WAL behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    pub from: Place,
    pub to_lsn: Lsn,
    pub to_timeline: TimelineId,
    /// The newest moment that is proven; not before that of `from`.
    pub to_time: Option<Timestamp>,
}

/// WAL of a timeline past the point where the followed one left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DivergedTail {
    pub timeline: TimelineId,
    pub fork_lsn: Lsn,
    pub end_lsn: Lsn,
}

/// The intervals on the followed timeline, oldest first; what lies between two of them cannot be restored.
pub fn intervals(view: &ArchiveView<'_>) -> Vec<Interval> {
    let Some(path) = view.history.path_to(view.followed) else { return Vec::new() };
    let reach = Reach::new(view, path);
    let mut intervals: Vec<Interval> = Vec::new();
    for (backup, end_lsn) in &reach.backups {
        match intervals.last_mut().filter(|interval| interval.to_lsn == *end_lsn) {
            Some(interval) => interval.to_time = interval.to_time.max(Some(backup.stop_time)),
            None => intervals.push(Interval {
                from: reach.place(backup.stop_lsn, Some(backup.stop_time)),
                to_lsn: *end_lsn,
                to_timeline: reach.path.timeline_at(Lsn(end_lsn.0.saturating_sub(1))),
                to_time: Some(backup.stop_time),
            }),
        }
    }
    for interval in &mut intervals {
        let within = |lsn: Lsn| interval.from.lsn <= lsn && lsn <= interval.to_lsn;
        let claims = reach.claims.iter().filter(|claim| within(claim.lsn));
        interval.to_time = interval.to_time.max(claims.map(|claim| claim.until()).max());
    }
    intervals
}

/// What is stored of timelines past where the followed one left them, by timeline.
pub fn diverged_tails(view: &ArchiveView<'_>) -> Vec<DivergedTail> {
    let Some(followed) = view.history.path_to(view.followed) else { return Vec::new() };
    let tail = |timeline: TimelineId| {
        let own = view.history.path_to(timeline)?;
        let began = own.leg(timeline)?.start_lsn;
        let fork_lsn = own.common_end(&followed).max(began);
        let end_lsn = view.stored.spans(timeline).map(|Span { end_lsn, .. }| end_lsn).max()?;
        (timeline != view.followed && end_lsn > fork_lsn).then_some(DivergedTail { timeline, fork_lsn, end_lsn })
    };
    view.stored.timelines().filter_map(tail).collect()
}
