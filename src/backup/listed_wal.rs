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
}

#[async_trait]
impl StoredWal for ListedWal {
    async fn covers(&self, timeline: TimelineId, lsn: Lsn) -> anyhow::Result<bool> {
        let begun = tokio::time::Instant::now();
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        loop {
            // Archiving extends the last span; what lies before a hole is not connected with what will come.
            let ranges = self.ranges(timeline).await?;
            if ranges.spans(timeline).last().is_some_and(|span| span.start_lsn <= lsn) {
                return Ok(true);
            }
            if begun.elapsed() >= COVERS_WAIT {
                return Ok(false);
            }
            tokio::time::sleep(backoff.delay()).await;
        }
    }

    async fn wait_stored(&self, timeline: TimelineId, start_lsn: Lsn, stop_lsn: Lsn) -> anyhow::Result<()> {
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        while self.ranges(timeline).await?.contiguous_end(timeline, start_lsn) < stop_lsn {
            tokio::time::sleep(backoff.delay()).await;
        }
        Ok(())
    }
}
