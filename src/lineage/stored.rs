//! Which bytes of WAL are in storage.
//!
//! Whole segments, parts and merged tails are all ranges `[start, end)` of a timeline; what they cover together counts.
//! On a path, bytes before the start of a leg that are stored under the leg's timeline count for its parent: the first
//! segment of a timeline begins with a copy of its parent's.

use std::collections::BTreeMap;

use super::history::{Leg, Path};
use crate::pg::{Lsn, TimelineId};

/// A range `[start_lsn, end_lsn)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    pub start_lsn: Lsn,
    pub end_lsn: Lsn,
}

/// The stored ranges of each timeline, joined where they touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredRanges {
    spans: BTreeMap<TimelineId, BTreeMap<Lsn, Lsn>>,
}

impl StoredRanges {
    /// Notes that `[start_lsn, end_lsn)` of `timeline` is stored.
    pub fn add(&mut self, timeline: TimelineId, start_lsn: Lsn, end_lsn: Lsn) {
        if end_lsn <= start_lsn {
            return;
        }
        let spans = self.spans.entry(timeline).or_default();
        let (mut start, mut end) = (start_lsn, end_lsn);
        let touching = |spans: &BTreeMap<Lsn, Lsn>, start: Lsn, end: Lsn| {
            spans.range(..=end).next_back().filter(|(_, known)| **known >= start).map(|(s, e)| (*s, *e))
        };
        while let Some((known_start, known_end)) = touching(spans, start, end) {
            spans.remove(&known_start);
            start = start.min(known_start);
            end = end.max(known_end);
        }
        spans.insert(start, end);
    }

    /// The ranges of one timeline, in order, none touching the next.
    pub fn spans(&self, timeline: TimelineId) -> impl Iterator<Item = Span> + '_ {
        let spans = self.spans.get(&timeline).into_iter().flatten();
        spans.map(|(start_lsn, end_lsn)| Span { start_lsn: *start_lsn, end_lsn: *end_lsn })
    }

    /// The timelines of which anything is stored.
    pub fn timelines(&self) -> impl Iterator<Item = TimelineId> + '_ {
        self.spans.keys().copied()
    }

    /// Up to where `timeline` is stored without a hole from `lsn` on; `lsn` itself when not even its byte is.
    pub fn contiguous_end(&self, timeline: TimelineId, lsn: Lsn) -> Lsn {
        self.span_at(timeline, lsn).map_or(lsn, |span| span.end_lsn)
    }

    /// Whether the byte at `lsn` of `timeline` is stored.
    pub fn contains(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.span_at(timeline, lsn).is_some()
    }

    /// What is missing of `timeline` between its first and its last stored byte.
    pub fn holes(&self, timeline: TimelineId) -> Vec<Span> {
        let spans: Vec<Span> = self.spans(timeline).collect();
        holes_between(&spans)
    }

    /// Up to where the path is stored without a hole from `lsn` on.
    pub fn contiguous_end_on(&self, path: &Path, lsn: Lsn) -> Lsn {
        let mut position = lsn;
        loop {
            let reach = |leg: &Leg| {
                let usable = position < leg.end_lsn;
                let span = usable.then(|| self.span_at(leg.timeline, position)).flatten()?;
                Some(span.end_lsn.min(leg.end_lsn))
            };
            match path.legs().iter().filter_map(reach).max() {
                Some(end) if end > position => position = end,
                _ => return position,
            }
        }
    }

    /// What is stored of the path from `lsn` on, in order; where one range ends and the next begins, something is missing.
    pub fn spans_on(&self, path: &Path, lsn: Lsn) -> Vec<Span> {
        let mut merged = StoredRanges::default();
        let timeline = path.timeline();
        for leg in path.legs() {
            for span in self.spans(leg.timeline) {
                let end_lsn = span.end_lsn.min(leg.end_lsn);
                merged.add(timeline, span.start_lsn.max(lsn), end_lsn);
            }
        }
        merged.spans(timeline).collect()
    }

    fn span_at(&self, timeline: TimelineId, lsn: Lsn) -> Option<Span> {
        let (start_lsn, end_lsn) = self.spans.get(&timeline)?.range(..=lsn).next_back()?;
        (lsn < *end_lsn).then_some(Span { start_lsn: *start_lsn, end_lsn: *end_lsn })
    }
}

impl Span {
    /// Whether everything up to `lsn`, which may be the end, is in it.
    pub fn reaches(&self, lsn: Lsn) -> bool {
        self.start_lsn <= lsn && lsn <= self.end_lsn
    }

    pub fn bytes(&self) -> u64 {
        self.end_lsn.saturating_since(self.start_lsn)
    }
}

/// What lies between spans that are in order.
pub fn holes_between(spans: &[Span]) -> Vec<Span> {
    let pairs = spans.iter().zip(spans.iter().skip(1));
    pairs.map(|(before, after)| Span { start_lsn: before.end_lsn, end_lsn: after.start_lsn }).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ONE: TimelineId = TimelineId(1);
    const TWO: TimelineId = TimelineId(2);

    fn stored(ranges: &[(TimelineId, u64, u64)]) -> StoredRanges {
        let mut stored = StoredRanges::default();
        for (timeline, start, end) in ranges {
            stored.add(*timeline, Lsn(*start), Lsn(*end));
        }
        stored
    }

    #[test]
    fn ranges_that_touch_or_overlap_are_one() {
        let stored = stored(&[(ONE, 10, 20), (ONE, 30, 40), (ONE, 20, 25), (ONE, 5, 12), (ONE, 7, 7)]);
        let spans: Vec<_> = stored.spans(ONE).map(|span| (span.start_lsn.0, span.end_lsn.0)).collect();
        assert_eq!(spans, [(5, 25), (30, 40)]);
        assert_eq!(stored.holes(ONE), [Span { start_lsn: Lsn(25), end_lsn: Lsn(30) }]);
        for (lsn, end) in [(4, 4), (5, 25), (24, 25), (25, 25), (30, 40), (40, 40)] {
            assert_eq!(stored.contiguous_end(ONE, Lsn(lsn)), Lsn(end), "{lsn}");
        }
    }

    #[test]
    fn a_path_goes_on_where_its_timeline_was_left() {
        let path = Path::new(&"1\t0/20\tx\n".parse().expect("well formed"), TWO);
        // Timeline 1 has a diverged tail past 0x20; timeline 2 begins with the start of the segment.
        let both = stored(&[(ONE, 0x8, 0x30), (TWO, 0x10, 0x40)]);
        assert_eq!(both.contiguous_end_on(&path, Lsn(0x8)), Lsn(0x40));
        // The copy in the child's first segment stands in for the parent's tail, but not the parent for the child.
        let copy = stored(&[(ONE, 0x8, 0x10), (TWO, 0x10, 0x40)]);
        assert_eq!(copy.contiguous_end_on(&path, Lsn(0x8)), Lsn(0x40));
        let late = stored(&[(ONE, 0x8, 0x30), (TWO, 0x28, 0x40)]);
        assert_eq!(late.contiguous_end_on(&path, Lsn(0x8)), Lsn(0x20));
        let spans: Vec<_> = late.spans_on(&path, Lsn(0)).iter().map(|s| (s.start_lsn.0, s.end_lsn.0)).collect();
        assert_eq!(spans, [(0x8, 0x20), (0x28, 0x40)]);
    }

    proptest! {
        /// Against a plain list of bytes.
        #[test]
        fn ranges_are_sets_of_bytes(ranges in proptest::collection::vec((0_u64..60, 0_u64..60), 0..12)) {
            let mut bytes = [false; 61];
            let mut stored = StoredRanges::default();
            for (start, end) in ranges {
                stored.add(ONE, Lsn(start), Lsn(end));
                (start..end).for_each(|byte| bytes[usize::try_from(byte).expect("small")] = true);
            }
            for (at, expected) in bytes.iter().enumerate() {
                prop_assert_eq!(stored.contains(ONE, Lsn(at as u64)), *expected);
                let run = bytes[at..].iter().take_while(|byte| **byte).count();
                prop_assert_eq!(stored.contiguous_end(ONE, Lsn(at as u64)), Lsn((at + run) as u64));
            }
        }
    }
}
