//! Where to go on: the server's history against what is stored. Pure.
//!
//! Of the timelines on the server's path the newest that has stored WAL is the one to go on with; when it is stored up to
//! its switch point, the next one begins at the start of the segment that holds the switch point. A hole ends the stored
//! prefix unless it is a recorded gap: stored bytes outweigh a gap, a gap outweighs nothing. A hole may also lie before the
//! first stored byte: PUTs end out of order, so a timeline is looked at from where its stream must have begun.
//!
//! What the server sends again is compared with what is stored. Where little or nothing of the unit is stored, the stored
//! unit before it is asked for too: else a server that was set back, and has come to this position again with other content,
//! would be followed.
//!
//! Invariants: `start_lsn` begins a unit and `start_lsn ≤ first byte that is not stored`; `reported` is on the server's
//! history and `reported ≤` stored end.

use super::assembler::unit_bytes;
use crate::pg::timeline::HistoryFile;
use crate::pg::{Lsn, SegmentSize, TimelineId};
use crate::repository::catalogue::{Gap, WalListing};
use crate::repository::layout::WalRange;

/// Less stored content than this may be the same in two pasts: a page header and what a server writes by itself.
const COMPARED_BYTES_MIN: u64 = 64 << 10;

/// What the server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerPosition {
    pub timeline: TimelineId,
    pub flush_lsn: Lsn,
    /// From where on our slot keeps WAL, where the server says so.
    pub slot_restart_lsn: Option<Lsn>,
    /// The ancestors of `timeline`; empty on timeline 1.
    pub history: HistoryFile,
}

/// One timeline of the server's path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathStep {
    pub timeline: TimelineId,
    /// Where it was forked from its parent; zero for the first.
    pub begin_lsn: Lsn,
    /// Where the path leaves it; `None` for the server's current one.
    pub switch_lsn: Option<Lsn>,
}

/// What to ask the server for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resume {
    pub timeline: TimelineId,
    /// The start of a segment (or of a 64 MiB range of a larger one).
    pub start_lsn: Lsn,
    /// What may be reported as flushed before anything new is stored.
    pub reported_lsn: Lsn,
    /// First byte of this timeline that is not stored.
    pub stored_lsn: Lsn,
    /// Where the unbroken stored stream begins that ends at `stored_lsn`.
    pub contiguous_from: Lsn,
    /// Ranges at or after `start_lsn`: what arrives must have the same content.
    pub known: Vec<WalRange>,
}

impl Resume {
    /// Whether more is asked for than is lacking, only to be compared.
    pub fn asks_for_comparison(&self, size: SegmentSize) -> bool {
        self.start_lsn < unit_start(self.stored_lsn, size)
    }

    /// The same without the unit before, for a server that has it no more.
    #[must_use]
    pub fn without_comparison(mut self, size: SegmentSize) -> Resume {
        self.start_lsn = self.start_lsn.max(unit_start(self.stored_lsn, size));
        self.reported_lsn = self.reported_lsn.max(self.start_lsn);
        self.known.retain(|range| range.end_lsn(size) > self.start_lsn);
        self
    }
}

/// Why archiving must not go on by itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    #[error("the server is at {flush} on timeline {timeline}, behind the stored end {stored}: it was set back")]
    ServerBehind { timeline: TimelineId, flush: Lsn, stored: Lsn },
    #[error("the server is on timeline {server}, the repository already holds timeline {stored}")]
    OlderTimeline { server: TimelineId, stored: TimelineId },
    #[error("the server's timeline {server} does not descend from what is stored (timelines {stored})")]
    NoCommonHistory { server: TimelineId, stored: String },
    #[error("the server sends other content for {start}..{end} of timeline {timeline} than is stored")]
    OtherContent { timeline: TimelineId, start: Lsn, end: Lsn },
    #[error("the server has system identifier {server}, the repository belongs to {stored}")]
    OtherSystem { server: crate::pg::SystemId, stored: crate::pg::SystemId },
    #[error("the server's WAL segments have {server} bytes, the stored ones {stored}")]
    OtherSegmentSize { server: u64, stored: u64 },
    #[error("two primaries answer: {0}")]
    TwoPrimaries(String),
}

/// The server's path, oldest timeline first.
pub fn path(position: &ServerPosition) -> Vec<PathStep> {
    let mut begin_lsn = Lsn::ZERO;
    let mut steps = Vec::new();
    for entry in &position.history.entries {
        let switch_lsn = Some(entry.switch_lsn);
        steps.push(PathStep { timeline: entry.timeline, begin_lsn, switch_lsn });
        begin_lsn = entry.switch_lsn;
    }
    steps.push(PathStep { timeline: position.timeline, begin_lsn, switch_lsn: None });
    steps
}

/// Decides where to go on; when nothing is stored yet, where the slot keeps WAL from.
///
/// # Errors
/// [`Conflict`] when going on would mix two pasts.
pub fn plan(
    position: &ServerPosition,
    listing: &WalListing,
    gaps: &[Gap],
    size: SegmentSize,
) -> Result<Resume, Conflict> {
    let steps = path(position);
    let Some(newest) = listing.ranges.iter().map(|o| o.range.timeline).max() else {
        return Ok(begin_at_slot(position, &steps, size));
    };
    if position.timeline < newest {
        return Err(Conflict::OlderTimeline { server: position.timeline, stored: newest });
    }
    let noted = |step: &PathStep| {
        let stored = listing.ranges.iter().any(|o| o.range.timeline == step.timeline);
        stored || gaps.iter().any(|g| g.timeline == step.timeline)
    };
    let Some((index, step)) = steps.iter().enumerate().rfind(|(_, step)| noted(step)) else {
        let mut stored: Vec<String> = listing.ranges.iter().map(|o| o.range.timeline.to_string()).collect();
        stored.dedup();
        return Err(Conflict::NoCommonHistory { server: position.timeline, stored: stored.join(", ") });
    };
    let begin = stream_begin(position, &steps, index, noted, size);
    let (contiguous_from, stored_lsn) = prefix(listing, gaps, step.timeline, begin, size);
    let ranges = || listing.ranges.iter().map(|o| &o.range).filter(|r| r.timeline == step.timeline);
    if let Some(switch) = step.switch_lsn
        && stored_lsn >= switch
        && let Some(next) = after_switch(&steps, index, switch)
    {
        return Ok(begin_timeline(next, switch, contiguous_from, size));
    }
    // Only what the server had flushed was ever stored, behind a hole too.
    let stored_end = ranges().map(|r| r.end_lsn(size)).max().unwrap_or(stored_lsn).max(stored_lsn);
    if step.switch_lsn.is_none() && position.flush_lsn < stored_end {
        let (timeline, flush) = (step.timeline, position.flush_lsn);
        return Err(Conflict::ServerBehind { timeline, flush, stored: stored_end });
    }
    let start_lsn = compared_from(contiguous_from, stored_lsn, size);
    // What lies past the switch point is a diverged tail: this server never sends it.
    let sent = |r: &&WalRange| step.switch_lsn.is_none_or(|switch| r.end_lsn(size) <= switch);
    let known = ranges().filter(|r| r.end_lsn(size) > start_lsn).filter(sent).cloned().collect();
    // What is stored of the unit itself counts only when the server has sent the same bytes again.
    let reported_lsn = start_lsn.max(step.begin_lsn.min(stored_lsn));
    Ok(Resume { timeline: step.timeline, start_lsn, reported_lsn, stored_lsn, contiguous_from, known })
}

/// The first stream of an empty repository begins where the slot keeps WAL from, which may be before the last fork: on the
/// timeline that wrote that position. Without a slot position, where the server is.
fn begin_at_slot(position: &ServerPosition, steps: &[PathStep], size: SegmentSize) -> Resume {
    let from = position.slot_restart_lsn.unwrap_or(position.flush_lsn);
    let wrote = steps.iter().find(|step| step.switch_lsn.is_none_or(|switch| from < switch));
    let timeline = wrote.map_or(position.timeline, |step| step.timeline);
    let start_lsn = size.start_of(from);
    let (reported_lsn, stored_lsn, contiguous_from) = (start_lsn, start_lsn, start_lsn);
    Resume { timeline, start_lsn, reported_lsn, stored_lsn, contiguous_from, known: Vec::new() }
}

fn unit_start(lsn: Lsn, size: SegmentSize) -> Lsn {
    let unit = unit_bytes(size);
    Lsn(lsn.0 / unit * unit)
}

/// The start of the unit that holds `stored_lsn`, or of the one before when that is stored and this one says little.
fn compared_from(contiguous_from: Lsn, stored_lsn: Lsn, size: SegmentSize) -> Lsn {
    let start = unit_start(stored_lsn, size);
    let before = start.0.checked_sub(unit_bytes(size)).map(Lsn).filter(|before| *before >= contiguous_from);
    match before {
        Some(before) if stored_lsn.0 - start.0 < COMPARED_BYTES_MIN => before,
        _ => start,
    }
}

/// The timeline to go on with at `switch`; one that was left where it began has no WAL.
fn after_switch(steps: &[PathStep], index: usize, switch: Lsn) -> Option<&PathStep> {
    let later = steps.get(index + 1..).unwrap_or_default();
    later.iter().find(|step| step.switch_lsn.is_none_or(|end| end > switch))
}

/// Where the stream of the timeline `steps[index]` must have begun: at the segment of the fork, when anything of an ancestor
/// is stored, else where the slot keeps WAL from, when that is before the first stored byte.
fn stream_begin(
    position: &ServerPosition,
    steps: &[PathStep],
    index: usize,
    noted: impl Fn(&PathStep) -> bool,
    size: SegmentSize,
) -> Option<Lsn> {
    let step = steps.get(index)?;
    match steps.get(..index).unwrap_or_default().iter().any(noted) {
        true => Some(size.start_of(step.begin_lsn)),
        false => position.slot_restart_lsn.map(|lsn| size.start_of(lsn.max(step.begin_lsn))),
    }
}

/// The beginning of a timeline: from the start of the segment that holds its switch point.
pub fn begin_timeline(step: &PathStep, switch: Lsn, contiguous_from: Lsn, size: SegmentSize) -> Resume {
    let (timeline, start_lsn) = (step.timeline, size.start_of(switch));
    Resume { timeline, start_lsn, reported_lsn: switch, stored_lsn: start_lsn, contiguous_from, known: Vec::new() }
}

/// Start and end of the unbroken stored stream of a timeline that begins at its first byte, or at `begin` when that is
/// before, and goes on after recorded gaps.
pub fn prefix(
    listing: &WalListing,
    gaps: &[Gap],
    timeline: TimelineId,
    begin: Option<Lsn>,
    size: SegmentSize,
) -> (Lsn, Lsn) {
    let ranges = listing.ranges.iter().map(|o| &o.range).filter(|r| r.timeline == timeline);
    let stored = ranges.map(|r| (r.start_lsn(size), r.end_lsn(size), false));
    let gaps = gaps.iter().filter(|g| g.timeline == timeline).map(|g| (g.start_lsn, g.end_lsn, true));
    let mut spans: Vec<(Lsn, Lsn, bool)> = stored.chain(gaps).collect();
    // At one place what is stored comes before a gap.
    spans.sort_by_key(|(start, end, gap)| (*start, *gap, *end));
    let Some((first, ..)) = spans.first() else { return (Lsn::ZERO, Lsn::ZERO) };
    let mut from = begin.map_or(*first, |begin| begin.min(*first));
    let mut reached = from;
    for (start, end, gap) in spans {
        if start > reached {
            break;
        }
        if end > reached {
            reached = end;
            from = if gap { end } else { from };
        }
    }
    (from, reached)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::timeline::HistoryEntry;
    use crate::pg::{SegmentNo, Timestamp};
    use crate::repository::catalogue::WalObject;
    use crate::repository::layout::ContentHash;

    const SIZE: SegmentSize = SegmentSize::MIB_16;
    const SEG: u64 = 16 << 20;

    fn range(timeline: u32, segment: u64, from: u64, to: u64) -> WalRange {
        let (timeline, segment) = (TimelineId(timeline), SegmentNo(segment));
        WalRange { timeline, segment, from, to, hash: ContentHash::default(), whole: to - from == SEG }
    }

    fn listing(ranges: &[WalRange]) -> WalListing {
        let object = |range: &WalRange| WalObject {
            range: range.clone(),
            key: crate::repository::Key::for_tests("x"),
            bytes: 1,
            last_modified: Default::default(),
        };
        WalListing { ranges: ranges.iter().map(object).collect(), histories: Vec::new() }
    }

    fn server(timeline: u32, flush: u64, history: &[(u32, u64)]) -> ServerPosition {
        let entry = |(timeline, lsn): &(u32, u64)| HistoryEntry {
            timeline: TimelineId(*timeline),
            switch_lsn: Lsn(*lsn),
            reason: String::new(),
        };
        let history = HistoryFile { entries: history.iter().map(entry).collect() };
        ServerPosition { timeline: TimelineId(timeline), flush_lsn: Lsn(flush), slot_restart_lsn: None, history }
    }

    fn go_on(position: &ServerPosition, ranges: &[WalRange]) -> Resume {
        plan(position, &listing(ranges), &[], SIZE).expect("no conflict")
    }

    #[test]
    fn an_empty_repository_begins_where_the_slot_keeps_wal_from_on_the_timeline_that_wrote_it() {
        let fork = 4 * SEG + 500;
        let begin = |slot_restart_lsn: Option<u64>| {
            let slot_restart_lsn = slot_restart_lsn.map(Lsn);
            let position = ServerPosition { slot_restart_lsn, ..server(3, 6 * SEG + 9, &[(1, SEG + 7), (2, fork)]) };
            let resume = go_on(&position, &[]);
            assert_eq!((resume.reported_lsn, resume.stored_lsn), (resume.start_lsn, resume.start_lsn));
            (resume.timeline.0, resume.start_lsn.0 / SEG)
        };
        assert_eq!(begin(None), (3, 6), "without a slot's position, where the server is");
        assert_eq!(begin(Some(5 * SEG + 1)), (3, 5));
        assert_eq!(begin(Some(fork)), (3, 4), "the fork's segment belongs to the new timeline, too");
        assert_eq!(begin(Some(fork - 1)), (2, 4), "before the fork");
        assert_eq!(begin(Some(SEG)), (1, 1), "before both");
    }

    #[test]
    fn within_a_segment_the_whole_of_it_is_asked_for_again() {
        let resume =
            go_on(&server(1, 3 * SEG, &[]), &[range(1, 1, 0, SEG), range(1, 2, 0, 100), range(1, 2, 100, 1 << 20)]);
        assert_eq!((resume.start_lsn, resume.stored_lsn), (Lsn(2 * SEG), Lsn(2 * SEG + (1 << 20))));
        assert_eq!((resume.reported_lsn, resume.known.len()), (Lsn(2 * SEG), 2));
        assert_eq!(resume.contiguous_from, Lsn(SEG));
        assert!(!resume.asks_for_comparison(SIZE));
    }

    #[test]
    fn at_a_border_the_stored_unit_before_is_asked_for_again() {
        for little in [0, 300] {
            let mut ranges = vec![range(1, 1, 0, SEG), range(1, 2, 0, 4000), range(1, 2, 4000, SEG)];
            ranges.extend((little > 0).then(|| range(1, 3, 0, little)));
            let resume = go_on(&server(1, 3 * SEG + little, &[]), &ranges);
            assert_eq!((resume.start_lsn, resume.reported_lsn), (Lsn(2 * SEG), Lsn(2 * SEG)));
            assert_eq!((resume.stored_lsn, resume.known.len()), (Lsn(3 * SEG + little), ranges.len() - 1));
            assert!(resume.asks_for_comparison(SIZE));
            let alone = resume.without_comparison(SIZE);
            assert_eq!((alone.start_lsn, alone.reported_lsn), (Lsn(3 * SEG), Lsn(3 * SEG)));
            assert_eq!((alone.stored_lsn, alone.known.len()), (Lsn(3 * SEG + little), ranges.len() - 3));
            assert!(!alone.asks_for_comparison(SIZE));
        }
        // What is not stored cannot be compared.
        assert_eq!(go_on(&server(1, 3 * SEG, &[]), &[range(1, 2, 500, SEG)]).start_lsn, Lsn(3 * SEG));
    }

    #[test]
    fn the_first_hole_ends_the_prefix_unless_it_is_a_recorded_gap() {
        let ranges = [range(1, 1, 0, SEG), range(1, 3, 0, SEG)];
        let resume = go_on(&server(1, 9 * SEG, &[]), &ranges);
        assert_eq!((resume.start_lsn, resume.stored_lsn, resume.known.len()), (Lsn(SEG), Lsn(2 * SEG), 2));
        let gap = Gap {
            timeline: TimelineId(1),
            start_lsn: Lsn(2 * SEG),
            end_lsn: Lsn(3 * SEG),
            found_at: Timestamp(0),
            cause: String::new(),
        };
        let resume = plan(&server(1, 9 * SEG, &[]), &listing(&ranges), &[gap], SIZE).expect("fine");
        assert_eq!((resume.contiguous_from, resume.stored_lsn), (Lsn(3 * SEG), Lsn(4 * SEG)));
    }

    #[test]
    fn a_promoted_standby_behind_the_archive_is_first_told_the_fork() {
        let fork = 2 * SEG + 500;
        let resume = go_on(&server(2, fork + 10, &[(1, fork)]), &[range(1, 1, 0, SEG), range(1, 2, 0, 9000)]);
        assert_eq!((resume.timeline, resume.start_lsn), (TimelineId(2), Lsn(2 * SEG)));
        assert_eq!(resume.reported_lsn, Lsn(fork));
    }

    #[test]
    fn what_lacks_of_the_old_timeline_is_asked_for_first() {
        let fork = 4 * SEG + 500;
        let resume =
            go_on(&server(3, fork + 10, &[(1, SEG + 7), (2, fork)]), &[range(2, 1, 0, SEG), range(2, 2, 0, 50)]);
        assert_eq!((resume.timeline, resume.start_lsn), (TimelineId(2), Lsn(SEG)));
        assert_eq!(resume.stored_lsn, Lsn(2 * SEG + 50));
    }

    #[test]
    fn a_sibling_left_by_a_restore_does_not_hinder_a_later_timeline() {
        let fork = SEG + 700;
        let resume = go_on(&server(3, 2 * SEG, &[(1, fork)]), &[range(1, 1, 0, SEG), range(2, 1, 0, 900)]);
        assert_eq!((resume.timeline, resume.reported_lsn), (TimelineId(3), Lsn(fork)));
    }

    #[test]
    fn a_hole_at_the_very_beginning_of_a_timeline_is_not_skipped() {
        let fork = 4 * SEG + 500;
        let history = [(1, fork)];
        // The PUT of timeline 2's first segment was still under way when the ones behind it had ended.
        let ranges = [range(1, 3, 0, SEG), range(1, 4, 0, 500), range(2, 5, 0, SEG)];
        let resume = go_on(&server(2, 9 * SEG, &history), &ranges);
        assert_eq!((resume.timeline, resume.start_lsn), (TimelineId(2), Lsn(4 * SEG)));
        assert_eq!((resume.reported_lsn, resume.known.len()), (Lsn(4 * SEG), 1));
        // The same of the first timeline, where the slot knows what it keeps.
        let position = ServerPosition { slot_restart_lsn: Some(Lsn(SEG)), ..server(1, 9 * SEG, &[]) };
        assert_eq!(go_on(&position, &[range(1, 2, 0, SEG)]).start_lsn, Lsn(SEG));
    }

    #[test]
    fn a_diverged_tail_is_not_waited_for() {
        let fork = 2 * SEG + 500;
        let ranges = [range(1, 1, 0, SEG), range(1, 2, 400, 900)];
        let resume = go_on(&server(2, fork + 10, &[(1, fork)]), &ranges);
        let known = [range(1, 1, 0, SEG)];
        assert_eq!((resume.timeline, resume.start_lsn), (TimelineId(1), Lsn(SEG)));
        assert_eq!((resume.stored_lsn, &resume.known[..]), (Lsn(2 * SEG), &known[..]));
    }

    #[test]
    fn a_server_behind_a_range_after_a_hole_was_set_back() {
        let stored = listing(&[range(1, 1, 0, SEG), range(1, 3, 0, SEG)]);
        let conflict = plan(&server(1, 3 * SEG, &[]), &stored, &[], SIZE).expect_err("conflict");
        assert!(matches!(conflict, Conflict::ServerBehind { stored, .. } if stored == Lsn(4 * SEG)));
    }

    #[test]
    fn a_timeline_without_wal_is_passed_over() {
        let fork = 2 * SEG + 500;
        let ranges = [range(1, 1, 0, SEG), range(1, 2, 0, 500)];
        let resume = go_on(&server(3, fork + 10, &[(1, fork), (2, fork)]), &ranges);
        assert_eq!((resume.timeline, resume.reported_lsn), (TimelineId(3), Lsn(fork)));
    }

    #[test]
    fn a_gap_at_the_beginning_of_a_timeline_ends_the_search_there() {
        let fork = 2 * SEG + 500;
        let (timeline, start_lsn, end_lsn) = (TimelineId(2), Lsn(2 * SEG), Lsn(6 * SEG));
        let gap = Gap { timeline, start_lsn, end_lsn, found_at: Timestamp(0), cause: String::new() };
        let stored = listing(&[range(1, 1, 0, SEG), range(1, 2, 0, 500)]);
        let position = server(2, 9 * SEG, &[(1, fork)]);
        let resume = plan(&position, &stored, &[gap], SIZE).expect("fine");
        assert_eq!((resume.timeline, resume.start_lsn), (TimelineId(2), Lsn(6 * SEG)));
    }

    #[test]
    fn two_pasts_are_never_mixed() {
        let stored = listing(&[range(2, 1, 0, SEG)]);
        let conflict = |position| plan(&position, &stored, &[], SIZE).expect_err("conflict");
        assert!(matches!(conflict(server(1, 9 * SEG, &[])), Conflict::OlderTimeline { .. }));
        assert!(matches!(conflict(server(3, 9 * SEG, &[(1, SEG)])), Conflict::NoCommonHistory { .. }));
        assert!(matches!(conflict(server(2, SEG + 5, &[(1, SEG)])), Conflict::ServerBehind { .. }));
    }
}
