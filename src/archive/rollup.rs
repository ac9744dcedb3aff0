//! Rolls the indexes of whole runs of segments up, so that finding a moment reads few objects.
//!
//! Derived like the indexes themselves: a roll-up that is missing is made in a later round, one that lacks a segment (an
//! index that could not be made) leaves readers to read that segment's own.

use std::collections::BTreeSet;

use futures::{StreamExt, TryStreamExt};

use super::uploader::Destination;
use crate::pg::{SegmentName, SegmentNo, TimelineId};
use crate::repository::index::{self, ROLLUP_SIZES, StoredIndexes};
use crate::repository::{Key, RepositoryError};
use crate::wal::transactions::Row;

/// Indexes that are read at the same time.
const READS_MAX: usize = 8;

/// Makes the roll-ups that are missing of runs that end below `before`. Returns how many.
pub async fn roll_up(
    destination: &Destination,
    timeline: TimelineId,
    before: SegmentNo,
    mut stored: StoredIndexes,
) -> Result<u64, RepositoryError> {
    let mut made = 0;
    let mut smaller = None;
    for size in ROLLUP_SIZES {
        let first = |segment: &SegmentNo| SegmentNo(segment.0 / size * size);
        let runs: BTreeSet<SegmentNo> = stored.segments.keys().map(first).collect();
        // The index of a run's last segment waits for a record that may end in the next.
        let ended = |first: &SegmentNo| first.0.saturating_add(size) < before.0;
        for first in runs.into_iter().filter(ended) {
            if stored.rollups.contains_key(&(size, first)) {
                continue;
            }
            let rows = match smaller {
                None => rows_of_indexes(destination, &stored, first, size).await?,
                Some(smaller) => rows_of_rollups(destination, &stored, first, (size, smaller)).await?,
            };
            let Some(rows) = rows.filter(|rows| rows.len() > 1) else { continue };
            let name = SegmentName::new(timeline, first, destination.segment_size);
            let key = index::write_rollup(&destination.repository, destination.incarnation, name, size, &rows).await?;
            stored.rollups.insert((size, first), key);
            made += 1;
        }
        smaller = Some(size);
    }
    Ok(made)
}

async fn rows_of_indexes(
    destination: &Destination,
    stored: &StoredIndexes,
    first: SegmentNo,
    size: u64,
) -> Result<Option<Vec<Row>>, RepositoryError> {
    let run = first..SegmentNo(first.0.saturating_add(size));
    let keys: Vec<Key> = stored.segments.range(run).map(|(_, key)| key.clone()).collect();
    if keys.len() < 2 {
        return Ok(None);
    }
    let reads = futures::stream::iter(keys).map(|key| {
        let repository = destination.repository.clone();
        async move { index::read(&repository, &key).await }
    });
    let indexes: Vec<_> = reads.buffered(READS_MAX).try_collect().await?;
    Ok(Some(indexes.iter().flatten().map(Row::of).collect()))
}

/// `None` when a smaller one is damaged.
async fn rows_of_rollups(
    destination: &Destination,
    stored: &StoredIndexes,
    first: SegmentNo,
    (size, smaller): (u64, u64),
) -> Result<Option<Vec<Row>>, RepositoryError> {
    let mut rows = Vec::new();
    let end = SegmentNo(first.0.saturating_add(size));
    for (_, key) in stored.rollups.range((smaller, first)..(smaller, end)) {
        let Some(some) = index::read_rollup(&destination.repository, key).await? else { return Ok(None) };
        rows.extend(some);
    }
    Ok(Some(rows))
}
