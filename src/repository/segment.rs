//! The bytes of a segment, from its whole object or put together from its parts.
//!
//! Invariants: bytes come from ranges whose content matched the hash in their name; a range that is gone meanwhile is
//! looked for again by listing the segment's timeline, because parts are replaced by wholes.

use std::ops::Range;

use bytes::{Bytes, BytesMut};

use super::catalogue::{WalObject, list_wal_timeline};
use super::format::{Repository, RepositoryError};
use super::layout::{Incarnation, WalRange};
use super::wal_object;
use crate::pg::{SegmentNo, SegmentSize, TimelineId};

/// Reads one stored range and checks it against its name.
pub async fn read_range(repository: &Repository, object: &WalObject) -> Result<Bytes, RepositoryError> {
    wal_object::read_range(repository, &object.key, &object.range).await
}

/// The fewest ranges that cover a segment from `bounds.start` without a hole, and the offset that they reach (at most
/// `bounds.end`). `ranges` are those of one segment.
pub fn cover<'a>(ranges: &[&'a WalRange], bounds: Range<u64>) -> (Vec<&'a WalRange>, u64) {
    let (mut chosen, mut reached) = (Vec::new(), bounds.start);
    while reached < bounds.end {
        let next = ranges.iter().filter(|r| r.from <= reached && r.to > reached).max_by_key(|r| (r.to, r.whole));
        let Some(next) = next else { break };
        chosen.push(*next);
        reached = next.to.min(bounds.end);
    }
    (chosen, reached)
}

/// Reads a segment from its beginning as far as it is stored without a hole; at most its full length.
///
/// `objects` are the stored ranges of this segment as a listing showed them; an object that is gone is looked for once more.
pub async fn read_segment(
    repository: &Repository,
    incarnation: Incarnation,
    size: SegmentSize,
    objects: &[WalObject],
) -> Result<Bytes, RepositoryError> {
    read_bounds(repository, incarnation, size, objects, 0..size.bytes()).await
}

/// As [`read_segment`], for `bounds` in the segment.
pub async fn read_bounds(
    repository: &Repository,
    incarnation: Incarnation,
    size: SegmentSize,
    objects: &[WalObject],
    bounds: Range<u64>,
) -> Result<Bytes, RepositoryError> {
    let gone = match read_covering(repository, objects, bounds.clone()).await {
        Err(error) if error.is_not_found() => error,
        result => return result,
    };
    let Some(first) = objects.first() else { return Err(gone) };
    let (timeline, segment) = (first.range.timeline, first.range.segment);
    let fresh = list_segment(repository, incarnation, timeline, segment, size).await?;
    read_covering(repository, &fresh, bounds).await
}

/// The stored ranges of one segment, freshly listed.
pub async fn list_segment(
    repository: &Repository,
    incarnation: Incarnation,
    timeline: TimelineId,
    segment: SegmentNo,
    size: SegmentSize,
) -> Result<Vec<WalObject>, RepositoryError> {
    let listing = list_wal_timeline(repository, incarnation, timeline, size).await?;
    Ok(listing.ranges.into_iter().filter(|o| o.range.segment == segment).collect())
}

async fn read_covering(
    repository: &Repository,
    objects: &[WalObject],
    bounds: Range<u64>,
) -> Result<Bytes, RepositoryError> {
    let ranges: Vec<&WalRange> = objects.iter().map(|o| &o.range).collect();
    let (chosen, reached) = cover(&ranges, bounds.clone());
    let mut bytes = BytesMut::new();
    if chosen.len() > 1 {
        bytes.reserve(usize::try_from(reached - bounds.start).unwrap_or(0));
    }
    for range in chosen {
        let Some(object) = objects.iter().find(|o| o.range == *range) else { continue };
        let content = read_range(repository, object).await?;
        let known = bounds.start.saturating_add(bytes.len() as u64).saturating_sub(range.from);
        let wanted = bounds.end.min(range.to).saturating_sub(range.from);
        let (known, wanted) = (usize::try_from(known).unwrap_or(usize::MAX), usize::try_from(wanted).unwrap_or(0));
        if (known, wanted) == (0, content.len()) && (range.from, range.to) == (bounds.start, bounds.end) {
            return Ok(content);
        }
        bytes.extend_from_slice(content.get(known..wanted).unwrap_or_default());
    }
    Ok(bytes.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::layout::ContentHash;

    fn range(from: u64, to: u64) -> WalRange {
        let (timeline, segment) = (TimelineId(1), SegmentNo(1));
        WalRange { timeline, segment, from, to, hash: ContentHash::default(), whole: false }
    }

    fn check(ranges: &[(u64, u64)], chosen: &[(u64, u64)], reached: u64) {
        let ranges: Vec<WalRange> = ranges.iter().map(|(from, to)| range(*from, *to)).collect();
        let (found, end) = cover(&ranges.iter().collect::<Vec<_>>(), 0..100);
        assert_eq!(found.iter().map(|r| (r.from, r.to)).collect::<Vec<_>>(), chosen);
        assert_eq!(end, reached);
    }

    #[test]
    fn parts_cover_greedily_up_to_the_first_hole() {
        check(&[(0, 10), (10, 30), (30, 40)], &[(0, 10), (10, 30), (30, 40)], 40);
        check(&[(0, 10), (0, 30), (5, 20), (25, 60)], &[(0, 30), (25, 60)], 60);
        check(&[(0, 10), (20, 100)], &[(0, 10)], 10);
        check(&[(0, 10), (5, 50), (0, 100)], &[(0, 100)], 100);
        check(&[(1, 100)], &[], 0);
    }
}
