//! The stored WAL as the repository lists it: for a backup that runs beside whichever process archives.

use std::time::Duration;

use async_trait::async_trait;

use super::full::StoredWal;
use crate::lineage::StoredRanges;
use crate::pg::{Lsn, SegmentSize, TimelineId};
use crate::repository::{Incarnation, Repository, catalogue};
use crate::util::retry::Backoff;

/// How long the first WAL of a timeline may take to appear.
const COVERS_WAIT: Duration = Duration::from_secs(15);
/// Pauses between listings.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// Lists until it sees what it waits for.
pub struct ListedWal {
    pub repository: Repository,
    pub incarnation: Incarnation,
    pub segment_size: SegmentSize,
}

impl ListedWal {
    async fn ranges(&self, timeline: TimelineId) -> anyhow::Result<StoredRanges> {
        let size = self.segment_size;
        let listing = catalogue::list_wal_timeline(&self.repository, self.incarnation, timeline, size).await?;
        let mut ranges = StoredRanges::default();
        for object in listing.ranges {
            ranges.add(timeline, object.range.start_lsn(size), object.range.end_lsn(size));
        }
        Ok(ranges)
    }

    async fn covers_within(&self, patience: Duration, timeline: TimelineId, lsn: Lsn) -> anyhow::Result<bool> {
        let begun = tokio::time::Instant::now();
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        loop {
            // Archiving extends the last span; what lies before a hole is not connected with what will come.
            let ranges = self.ranges(timeline).await?;
            if ranges.spans(timeline).last().is_some_and(|span| span.start_lsn <= lsn) {
                return Ok(true);
            }
            if begun.elapsed() >= patience {
                return Ok(false);
            }
            tokio::time::sleep(backoff.delay()).await;
        }
    }
}

#[async_trait]
impl StoredWal for ListedWal {
    async fn covers(&self, timeline: TimelineId, lsn: Lsn) -> anyhow::Result<bool> {
        self.covers_within(COVERS_WAIT, timeline, lsn).await
    }

    async fn wait_stored(&self, timeline: TimelineId, start_lsn: Lsn, stop_lsn: Lsn) -> anyhow::Result<()> {
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        while self.ranges(timeline).await?.contiguous_end(timeline, start_lsn) < stop_lsn {
            tokio::time::sleep(backoff.delay()).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::testing::{SIZE, T1, T2, World, segment_size};

    fn start_of(segment: u64) -> Lsn {
        Lsn(segment * SIZE)
    }

    async fn listed(segments: &[u64]) -> (World, ListedWal) {
        let world = World::new(None).await;
        for segment in segments {
            world.put_segment(T1, *segment).await;
        }
        let (repository, incarnation) = (world.repository.clone(), world.known.incarnation);
        (world, ListedWal { repository, incarnation, segment_size: segment_size() })
    }

    #[tokio::test]
    async fn only_what_archiving_goes_on_from_covers_a_position() {
        let (world, wal) = listed(&[3, 4, 6]).await;
        let covers = async |timeline, lsn| wal.covers_within(Duration::ZERO, timeline, lsn).await.expect("listed");
        assert!(covers(T1, start_of(6)).await && covers(T1, Lsn(start_of(7).0 + 5)).await);
        assert!(!covers(T1, start_of(4)).await, "a hole is between it and what will come");
        assert!(!covers(T2, start_of(6)).await && !covers(T1, Lsn(start_of(3).0 - 1)).await);
        world.put_segment(T1, 5).await;
        assert!(covers(T1, start_of(4)).await);
    }

    #[tokio::test]
    async fn the_first_wal_of_a_timeline_is_waited_for() {
        let (world, wal) = listed(&[]).await;
        let (covered, _) = tokio::join!(wal.covers(T1, start_of(3)), world.put_segment(T1, 3));
        assert!(covered.expect("listed"));
    }

    #[tokio::test]
    async fn wal_is_stored_only_without_a_hole_and_to_its_last_byte() {
        let (world, wal) = listed(&[3, 5]).await;
        let end = Lsn(start_of(6).0 + 100);
        let waiting = async || wal.wait_stored(T1, Lsn(start_of(3).0 + 40), end).await.expect("listed");
        let waits = async || tokio::time::timeout(Duration::from_millis(600), waiting()).await.is_err();
        assert!(waits().await, "a hole");
        world.put_segment(T1, 4).await;
        assert!(waits().await, "the end lacks");
        world.put_range(T1, 6, 0, 99).await;
        assert!(waits().await, "its last byte lacks");
        tokio::join!(waiting(), world.put_range(T1, 6, 99, 100));
    }
}
