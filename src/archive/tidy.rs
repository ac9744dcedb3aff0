//! Parts become segments, and go when they are no longer needed.
//!
//! A segment that exists only as parts is assembled from them. A part goes only when a confirmed object of the same
//! timeline holds the same bytes (the part's hash is the hash of that range of it), and not before an hour by the store's
//! clock, because a restore may be reading it. The tail of an abandoned timeline is sealed: its parts become one.
//!
//! Cost: one listing of the timeline an hour, and what there is to do.

use std::collections::BTreeMap;

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};

use super::assembler::unit_bytes;
use super::uploader::Destination;
use crate::pg::{SegmentNo, TimelineId};
use crate::repository::catalogue::{WalObject, list_wal_timeline};
use crate::repository::codec::Kind;
use crate::repository::layout::{ContentHash, WalRange};
use crate::repository::segment::{cover, read_range, read_segment};
use crate::repository::{Key, RepositoryError};

/// How long a part stays after it was written, at least.
const PART_AGE_MIN: TimeDelta = TimeDelta::hours(1);

/// What a round of tidying did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tidied {
    pub assembled: u64,
    pub parts_deleted: u64,
}

/// Assembles what exists only as parts and deletes what is covered, on one timeline, below `before` (segments at or after
/// it are still being written). `now` is this host's clock; ages are those of the store.
pub async fn tidy(
    destination: &Destination,
    timeline: TimelineId,
    before: SegmentNo,
    now: DateTime<Utc>,
) -> Result<Tidied, RepositoryError> {
    let Destination { repository, incarnation, segment_size } = destination;
    let listing = list_wal_timeline(repository, *incarnation, timeline, *segment_size).await?;
    let mut segments: BTreeMap<SegmentNo, Vec<WalObject>> = BTreeMap::new();
    for object in listing.ranges {
        if object.range.segment < before {
            segments.entry(object.range.segment).or_default().push(object);
        }
    }
    let mut done = Tidied::default();
    for objects in segments.values().filter(|o| o.iter().any(|o| !o.range.whole)) {
        done.assembled += u64::from(assemble(destination, objects).await?);
        let old = |o: &&WalObject| now.signed_duration_since(o.last_modified) > PART_AGE_MIN;
        let parts: Vec<&WalObject> = objects.iter().filter(|o| is_small_part(destination, o)).filter(old).collect();
        if !parts.is_empty() {
            done.parts_deleted += delete_covered(destination, objects, &parts).await?;
        }
    }
    Ok(done)
}

/// Merges the parts of the last segment of an abandoned timeline into one range from the segment's start to its end.
pub async fn seal(destination: &Destination, timeline: TimelineId, segment: SegmentNo) -> Result<(), RepositoryError> {
    let Destination { repository, incarnation, segment_size } = destination;
    let listing = list_wal_timeline(repository, *incarnation, timeline, *segment_size).await?;
    let objects: Vec<WalObject> = listing.ranges.into_iter().filter(|o| o.range.segment == segment).collect();
    if objects.len() < 2 || segment_size.bytes() > unit_bytes(*segment_size) {
        return Ok(());
    }
    let bytes = read_segment(repository, *incarnation, *segment_size, &objects).await?;
    put_range(destination, timeline, segment, bytes).await
}

/// A part that a whole unit may replace; the 64 MiB ranges of large segments stay.
fn is_small_part(destination: &Destination, object: &WalObject) -> bool {
    let length = object.range.to.saturating_sub(object.range.from);
    !object.range.whole && length < unit_bytes(destination.segment_size)
}

/// Puts the whole segment when its parts cover it and it is not there. Larger segments stay ranges.
async fn assemble(destination: &Destination, objects: &[WalObject]) -> Result<bool, RepositoryError> {
    let Destination { repository, incarnation, segment_size } = destination;
    let ranges: Vec<&WalRange> = objects.iter().map(|o| &o.range).collect();
    let complete = cover(&ranges, 0..segment_size.bytes()).1 == segment_size.bytes();
    let single = segment_size.bytes() == unit_bytes(*segment_size);
    let Some(first) = ranges.first() else { return Ok(false) };
    if !single || !complete || ranges.iter().any(|r| r.whole) {
        return Ok(false);
    }
    let bytes = read_segment(repository, *incarnation, *segment_size, objects).await?;
    put_range(destination, first.timeline, first.segment, bytes).await?;
    Ok(true)
}

async fn put_range(
    destination: &Destination,
    timeline: TimelineId,
    segment: SegmentNo,
    bytes: Bytes,
) -> Result<(), RepositoryError> {
    let Destination { repository, incarnation, segment_size } = destination;
    let hash = ContentHash::of(&repository.codec().digest(&bytes));
    let to = bytes.len() as u64;
    let range = WalRange { timeline, segment, from: 0, to, hash, whole: to == segment_size.bytes() };
    let key = Key::wal(*incarnation, &range, *segment_size);
    repository.write(&key, Kind::Wal, bytes).await.map(drop)
}

/// Deletes the parts whose bytes a longer confirmed object holds. That object is read, so that what is deleted is proven
/// to be there in a form that opens.
async fn delete_covered(
    destination: &Destination,
    objects: &[WalObject],
    parts: &[&WalObject],
) -> Result<u64, RepositoryError> {
    let repository = &destination.repository;
    let longer = |o: &&WalObject| parts.iter().any(|p| p.range != o.range && holds(&o.range, &p.range));
    let Some(holder) = objects.iter().filter(longer).max_by_key(|o| o.range.to - o.range.from) else { return Ok(0) };
    let content = read_range(repository, holder).await?;
    let mut deleted = 0;
    for part in parts.iter().filter(|p| p.range != holder.range && holds(&holder.range, &p.range)) {
        let offset = |at: u64| usize::try_from(at - holder.range.from).unwrap_or(usize::MAX);
        let Some(same) = content.get(offset(part.range.from)..offset(part.range.to)) else { continue };
        if ContentHash::of(&repository.codec().digest(same)) == part.range.hash {
            repository.store().delete(&part.key).await?;
            deleted += 1;
        } else {
            tracing::error!(
                object = part.key.as_str(),
                other = holder.key.as_str(),
                "two contents for one range of WAL"
            );
        }
    }
    Ok(deleted)
}

fn holds(outer: &WalRange, inner: &WalRange) -> bool {
    outer.from <= inner.from && inner.to <= outer.to
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::{SegmentSize, SystemId};
    use crate::repository::Repository;
    use crate::repository::layout::Incarnation;
    use crate::repository::location::Location;
    use crate::repository::store::{Store, StoreSettings};

    async fn destination(dir: &tempfile::TempDir) -> Destination {
        let location = Location::File(dir.path().to_path_buf());
        let store = Store::open(&location, "shop", StoreSettings::default()).expect("open");
        let repository = Repository::open_or_create(store, 1, None).await.expect("create");
        let segment_size = SegmentSize::new(1 << 20).expect("1 MiB");
        Destination { repository, incarnation: Incarnation { ordinal: 1, system_id: SystemId(1) }, segment_size }
    }

    fn content() -> Vec<u8> {
        (0..1 << 20).map(|i: u32| (i % 253) as u8).collect()
    }

    async fn put(destination: &Destination, segment: u64, from: usize, bytes: &[u8]) {
        let Destination { repository, incarnation, segment_size } = destination;
        let hash = ContentHash::of(&repository.codec().digest(bytes));
        let (from, to) = (from as u64, (from + bytes.len()) as u64);
        let (timeline, segment) = (TimelineId(1), SegmentNo(segment));
        let range = WalRange { timeline, segment, from, to, hash, whole: to - from == segment_size.bytes() };
        let key = Key::wal(*incarnation, &range, *segment_size);
        repository.write(&key, Kind::Wal, bytes.to_vec().into()).await.expect("write");
    }

    async fn listed(destination: &Destination) -> Vec<(u64, u64, u64)> {
        let Destination { repository, incarnation, segment_size } = destination;
        let listing = list_wal_timeline(repository, *incarnation, TimelineId(1), *segment_size).await.expect("list");
        listing.ranges.iter().map(|o| (o.range.segment.0, o.range.from, o.range.to)).collect()
    }

    #[tokio::test]
    async fn parts_are_assembled_at_once_and_deleted_after_an_hour() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let destination = destination(&dir).await;
        let bytes = content();
        put(&destination, 1, 0, &bytes[..700]).await;
        put(&destination, 1, 700, &bytes[700..]).await;
        put(&destination, 2, 0, &bytes[..9]).await;
        let now = crate::util::clock::now();
        let soon = tidy(&destination, TimelineId(1), SegmentNo(2), now).await.expect("tidy");
        assert_eq!(soon, Tidied { assembled: 1, parts_deleted: 0 });
        let later = now + TimeDelta::minutes(61);
        let done = tidy(&destination, TimelineId(1), SegmentNo(2), later).await.expect("tidy");
        assert_eq!(done, Tidied { assembled: 0, parts_deleted: 2 });
        assert_eq!(listed(&destination).await, [(1, 0, 1 << 20), (2, 0, 9)]);
    }

    #[tokio::test]
    async fn a_part_with_other_content_or_a_hole_stays() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let destination = destination(&dir).await;
        let bytes = content();
        put(&destination, 1, 0, &bytes).await;
        put(&destination, 1, 100, &bytes[..50]).await;
        put(&destination, 2, 0, &bytes[..50]).await;
        put(&destination, 2, 60, &bytes[60..]).await;
        let later = crate::util::clock::now() + TimeDelta::hours(2);
        let done = tidy(&destination, TimelineId(1), SegmentNo(9), later).await.expect("tidy");
        assert_eq!(done, Tidied::default());
        assert_eq!(listed(&destination).await.len(), 4);
    }

    #[tokio::test]
    async fn a_sealed_tail_is_one_range() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let destination = destination(&dir).await;
        let bytes = content();
        put(&destination, 1, 0, &bytes[..50]).await;
        put(&destination, 1, 50, &bytes[50..90]).await;
        seal(&destination, TimelineId(1), SegmentNo(1)).await.expect("seal");
        let later = crate::util::clock::now() + TimeDelta::hours(2);
        tidy(&destination, TimelineId(1), SegmentNo(9), later).await.expect("tidy");
        assert_eq!(listed(&destination).await, [(1, 0, 90)]);
    }
}
