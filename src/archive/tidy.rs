//! Parts become segments, and go when they are no longer needed.
//!
//! A unit (a segment, or 64 MiB of a larger one) that exists only as parts is assembled from them. A part goes only when a confirmed object of the same
//! timeline holds the same bytes (the part's hash is the hash of that range of it), and not before an hour by the store's
//! clock, because a restore may be reading it. The tail of an abandoned timeline is sealed: its parts become one.
//!
//! Cost: one listing of the WAL a round, and what there is to do.

use std::ops::Range;

use chrono::{DateTime, TimeDelta, Utc};

use super::assembler::unit_bytes;
use super::budget::Budget;
use super::uploader::Destination;
use crate::pg::{SegmentNo, SegmentSize, TimelineId};
use crate::repository::catalogue::{WalObject, list_wal, list_wal_timeline};
use crate::repository::codec::Kind;
use crate::repository::layout::{ContentHash, WalRange};
use crate::repository::segment::{cover, read_bounds, read_range};
use crate::repository::{Key, Repository, RepositoryError};

/// How long a part stays after it was written, at least.
const PART_AGE_MIN: TimeDelta = TimeDelta::hours(1);

/// What a round of tidying did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tidied {
    pub assembled: u64,
    pub parts_deleted: u64,
    /// Units that could not be tidied, and why the first of them could not.
    pub failed: u64,
    pub trouble: Option<String>,
}

/// How far a timeline is written.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    pub timeline: TimelineId,
    /// Segments of this timeline at or after this one are still being written; older timelines were left for good.
    pub before: SegmentNo,
}

/// Assembles what exists only as parts and deletes what is covered, on all timelines. `now` is this host's clock; ages are
/// those of the store. A unit that is damaged keeps nothing but itself from being tidied; when the store does not work,
/// the rest is left for the next round. Every unit waits for its turn in `budget`.
///
/// # Errors
/// When the WAL cannot be listed.
pub async fn tidy(
    destination: &Destination,
    written: Written,
    now: DateTime<Utc>,
    budget: &Budget,
) -> Result<Tidied, RepositoryError> {
    let Destination { repository, incarnation, segment_size } = destination;
    let listing = list_wal(repository, *incarnation, *segment_size).await?;
    let mut done = Tidied::default();
    for unit in units(listing.ranges, *segment_size) {
        let abandoned = unit.timeline < written.timeline;
        let ended = abandoned || (unit.timeline == written.timeline && unit.segment < written.before);
        if !ended || !unit.objects.iter().any(|o| unit.is_part(o)) {
            continue;
        }
        let _turn = budget.housekeeper().await;
        if let Err(error) = unit.tidy(destination, abandoned, now, &mut done).await {
            done.failed += 1;
            let store_works = error.is_corrupt() || error.is_not_found();
            done.trouble.get_or_insert(error.to_string());
            if !store_works {
                break;
            }
        }
    }
    Ok(done)
}

/// Merges the parts of the last segment of an abandoned timeline into one range from the unit's start to its end.
pub async fn seal(destination: &Destination, timeline: TimelineId, segment: SegmentNo) -> Result<(), RepositoryError> {
    let Destination { repository, incarnation, segment_size } = destination;
    let listing = list_wal_timeline(repository, *incarnation, timeline, *segment_size).await?;
    let of_segment = listing.ranges.into_iter().filter(|o| o.range.segment == segment).collect();
    for unit in units(of_segment, *segment_size) {
        unit.assemble(destination, true).await?;
    }
    Ok(())
}

/// What is stored of one storage unit: a segment, or 64 MiB of a larger one.
struct Unit {
    timeline: TimelineId,
    segment: SegmentNo,
    bounds: Range<u64>,
    objects: Vec<WalObject>,
}

fn units(ranges: Vec<WalObject>, size: SegmentSize) -> Vec<Unit> {
    let bytes = unit_bytes(size);
    let mut units: Vec<Unit> = Vec::new();
    for object in ranges {
        let (timeline, segment) = (object.range.timeline, object.range.segment);
        let start = object.range.from / bytes * bytes;
        match units.last_mut() {
            Some(unit) if (unit.timeline, unit.segment, unit.bounds.start) == (timeline, segment, start) => {
                unit.objects.push(object);
            }
            _ => units.push(Unit { timeline, segment, bounds: start..start + bytes, objects: vec![object] }),
        }
    }
    units
}

impl Unit {
    fn is_part(&self, object: &WalObject) -> bool {
        (object.range.from, object.range.to) != (self.bounds.start, self.bounds.end)
    }

    async fn tidy(
        &self,
        destination: &Destination,
        abandoned: bool,
        now: DateTime<Utc>,
        done: &mut Tidied,
    ) -> Result<(), RepositoryError> {
        done.assembled += u64::from(self.assemble(destination, abandoned).await?);
        let old = |o: &&WalObject| now.signed_duration_since(o.last_modified) > PART_AGE_MIN;
        let parts: Vec<&WalObject> = self.objects.iter().filter(|o| self.is_part(o)).filter(old).collect();
        self.delete_covered(&destination.repository, &parts, &mut done.parts_deleted).await
    }

    /// Puts the unit when its parts cover it and it is not there; of a `left` timeline, which gets no more, as far as they do.
    async fn assemble(&self, destination: &Destination, left: bool) -> Result<bool, RepositoryError> {
        let Destination { repository, incarnation, segment_size } = destination;
        let ranges: Vec<&WalRange> = self.objects.iter().map(|o| &o.range).collect();
        let (chosen, reached) = cover(&ranges, self.bounds.clone());
        if chosen.len() < 2 || (reached < self.bounds.end && !left) {
            return Ok(false);
        }
        let bounds = self.bounds.start..reached;
        let bytes = read_bounds(repository, *incarnation, *segment_size, &self.objects, bounds.clone()).await?;
        if bytes.len() as u64 != bounds.end - bounds.start {
            // Something went while this was looked at: the next round sees what is there then.
            return Ok(false);
        }
        let hash = ContentHash::of(&repository.codec().digest(&bytes));
        let (timeline, segment, from, to) = (self.timeline, self.segment, bounds.start, bounds.end);
        let whole = to - from == segment_size.bytes();
        let range = WalRange { timeline, segment, from, to, hash, whole };
        let key = Key::wal(*incarnation, &range, *segment_size);
        repository.write(&key, Kind::Wal, bytes).await?;
        Ok(true)
    }

    /// Deletes the parts whose bytes a longer confirmed object holds. That object is read, so that what is deleted is
    /// proven to be there in a form that opens.
    async fn delete_covered(
        &self,
        repository: &Repository,
        parts: &[&WalObject],
        deleted: &mut u64,
    ) -> Result<(), RepositoryError> {
        let longer = |o: &&WalObject| parts.iter().any(|p| p.range != o.range && holds(&o.range, &p.range));
        let holder = self.objects.iter().filter(longer).max_by_key(|o| o.range.to - o.range.from);
        let Some(holder) = holder else { return Ok(()) };
        let content = read_range(repository, holder).await?;
        for part in parts.iter().filter(|p| p.range != holder.range && holds(&holder.range, &p.range)) {
            let offset = |at: u64| usize::try_from(at - holder.range.from).unwrap_or(usize::MAX);
            let Some(same) = content.get(offset(part.range.from)..offset(part.range.to)) else { continue };
            if ContentHash::of(&repository.codec().digest(same)) == part.range.hash {
                repository.store().delete(&part.key).await?;
                *deleted += 1;
            } else {
                let (object, other) = (part.key.as_str(), holder.key.as_str());
                tracing::error!(object, other, "two contents for one range of WAL");
            }
        }
        Ok(())
    }
}

fn holds(outer: &WalRange, inner: &WalRange) -> bool {
    outer.from <= inner.from && inner.to <= outer.to
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;
    use crate::pg::SystemId;
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

    fn written(timeline: u32, before: u64) -> Written {
        Written { timeline: TimelineId(timeline), before: SegmentNo(before) }
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

    async fn listed_keys(destination: &Destination) -> Vec<Key> {
        let Destination { repository, incarnation, segment_size } = destination;
        let listing = list_wal(repository, *incarnation, *segment_size).await.expect("list");
        listing.ranges.into_iter().map(|o| o.key).collect()
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
        let soon = tidy(&destination, written(1, 2), now, &Budget::new(0)).await.expect("tidy");
        assert_eq!(soon, Tidied { assembled: 1, ..Tidied::default() });
        let later = now + TimeDelta::minutes(61);
        let done = tidy(&destination, written(1, 2), later, &Budget::new(0)).await.expect("tidy");
        assert_eq!(done, Tidied { parts_deleted: 2, ..Tidied::default() });
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
        let done = tidy(&destination, written(1, 9), later, &Budget::new(0)).await.expect("tidy");
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
        tidy(&destination, written(1, 9), later, &Budget::new(0)).await.expect("tidy");
        assert_eq!(listed(&destination).await, [(1, 0, 90)]);
    }

    #[tokio::test]
    async fn the_tail_of_a_timeline_that_was_left_becomes_one_range_in_a_later_round() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let destination = destination(&dir).await;
        let bytes = content();
        put(&destination, 1, 0, &bytes[..50]).await;
        put(&destination, 1, 50, &bytes[50..90]).await;
        put(&destination, 1, 200, &bytes[200..300]).await;
        let later = crate::util::clock::now() + TimeDelta::hours(2);
        let written_on = tidy(&destination, written(1, 1), later, &Budget::new(0)).await.expect("tidy");
        assert_eq!(written_on, Tidied::default(), "it is still written");
        tidy(&destination, written(2, 1), later, &Budget::new(0)).await.expect("tidy");
        tidy(&destination, written(2, 1), later, &Budget::new(0)).await.expect("tidy");
        assert_eq!(listed(&destination).await, [(1, 0, 90), (1, 200, 300)]);
    }

    #[tokio::test]
    async fn large_segments_are_assembled_by_ranges() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut destination = destination(&dir).await;
        destination.segment_size = SegmentSize::new(128 << 20).expect("128 MiB");
        let unit = vec![7; 64 << 20];
        put(&destination, 1, 64 << 20, &unit[..1000]).await;
        put(&destination, 1, (64 << 20) + 1000, &unit[1000..]).await;
        let later = crate::util::clock::now() + TimeDelta::hours(2);
        let done = tidy(&destination, written(1, 9), later, &Budget::new(0)).await.expect("tidy");
        assert_eq!(done, Tidied { assembled: 1, ..Tidied::default() });
        let done = tidy(&destination, written(1, 9), later, &Budget::new(0)).await.expect("tidy");
        assert_eq!(done, Tidied { parts_deleted: 2, ..Tidied::default() });
        assert_eq!(listed(&destination).await, [(1, 64 << 20, 128 << 20)]);
    }

    #[tokio::test]
    async fn a_damaged_part_keeps_no_other_segment_from_being_tidied() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let destination = destination(&dir).await;
        let bytes = content();
        for segment in [1, 2] {
            put(&destination, segment, 0, &bytes[..700]).await;
            put(&destination, segment, 700, &bytes[700..]).await;
        }
        let first = listed_keys(&destination).await.remove(0);
        let path = dir.path().join("shop").join(first.as_str());
        crate::util::durable_fs::write(&path, b"damaged", 0o600).expect("damage");
        let now = crate::util::clock::now();
        let done = tidy(&destination, written(1, 9), now, &Budget::new(0)).await.expect("tidy");
        assert_eq!((done.assembled, done.failed), (1, 1));
        assert!(done.trouble.is_some_and(|trouble| trouble.contains(first.as_str())));
    }

    #[tokio::test]
    async fn no_more_units_are_read_at_a_time_than_the_budget_has_turns() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let destination = destination(&dir).await;
        let bytes = content();
        put(&destination, 1, 0, &bytes[..700]).await;
        put(&destination, 1, 700, &bytes[700..]).await;
        let (budget, now) = (Budget::new(0), crate::util::clock::now());
        let mut turns = Vec::new();
        while let Some(Some(turn)) = budget.housekeeper().now_or_never() {
            turns.push(turn);
        }
        let mut tidying = Box::pin(tidy(&destination, written(1, 9), now, &budget));
        // Another, with a budget of its own, looks at the same again and again meanwhile.
        let other = Budget::new(0);
        let looked = async {
            for _ in 0..20 {
                tidy(&destination, written(1, 9), now, &other).await.expect("tidy");
            }
        };
        tokio::select! {
            biased;
            _ = &mut tidying => panic!("it does not wait for its turn"),
            () = looked => {}
        }
        turns.pop();
        assert!(tidying.await.is_ok());
    }
}
