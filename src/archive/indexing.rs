//! Indexes segments as they pass; never delays WAL.
//!
//! Complete units come through a bounded queue. One that did not fit leaves its segment without an index: [`catch_up`]
//! makes what is missing from the store.

use tokio::sync::mpsc;

use super::assembler::Unit;
use super::budget::Budget;
use super::rollup::roll_up;
use super::uploader::Destination;
use crate::pg::{SegmentNo, TimelineId};
use crate::repository::RepositoryError;
use crate::repository::catalogue::list_wal_timeline;
use crate::repository::identity::KnownIncarnation;
use crate::repository::index;
use crate::wal::reader::Stream;
use crate::wal::transactions::{Indexer, SegmentIndex};

/// Units that may wait to be indexed; each is up to a segment (16 MiB by default) that the uploads hold anyway.
pub const UNITS_WAITING_MAX: usize = 2;

/// Indexes what comes until the sender is gone.
pub async fn run(destination: Destination, mut units: mpsc::Receiver<(TimelineId, Unit)>) {
    let mut indexer: Option<(TimelineId, Indexer)> = None;
    while let Some((timeline, unit)) = units.recv().await {
        let (start, end) = (unit.start_lsn, unit.start_lsn.saturating_add(unit.bytes.len() as u64));
        let size = destination.segment_size;
        let system_id = Some(destination.incarnation.system_id);
        let goes_on =
            |(old, i): &(TimelineId, Indexer)| *old == timeline && i.position() >= start && i.position() <= end;
        let mut current = match indexer.take().filter(goes_on) {
            Some((_, current)) => current,
            None if size.start_of(start) == start => {
                Indexer::new(Stream { timeline, segment_size: size, system_id }, start)
            }
            None => continue,
        };
        let fed = tokio::task::spawn_blocking(move || {
            current.feed(unit.start_lsn, &unit.bytes);
            current
        });
        let Ok(mut current) = fed.await else { continue };
        for index in current.take_finished() {
            store(&destination, &index).await;
        }
        indexer = Some((timeline, current));
    }
}

/// Makes the indexes that are missing on a timeline below `before`, each when it has its turn in `budget`, and rolls them up.
/// Returns how many were missing.
pub async fn catch_up(
    destination: &Destination,
    known: &KnownIncarnation,
    timeline: TimelineId,
    before: SegmentNo,
    budget: &Budget,
) -> Result<u64, RepositoryError> {
    let Destination { repository, incarnation, segment_size } = destination;
    let listing = list_wal_timeline(repository, *incarnation, timeline, *segment_size).await?;
    let stored = index::list(repository, *incarnation, timeline, *segment_size).await?;
    let mut segments: Vec<SegmentNo> = listing.ranges.iter().map(|o| o.range.segment).collect();
    segments.dedup();
    let mut made = 0;
    for segment in segments.into_iter().filter(|s| *s < before && !stored.segments.contains_key(s)) {
        let _turn = budget.housekeeper().await;
        let index = match index::build(repository, known, timeline, segment, &listing.ranges).await {
            Ok(index) => index,
            Err(error) if error.is_corrupt() => {
                tracing::warn!(%timeline, segment = segment.0, %error, "a segment of WAL is damaged: it has no index");
                continue;
            }
            Err(error) => return Err(error),
        };
        if index.completeness != crate::wal::transactions::Completeness::Tail {
            index::write(repository, *incarnation, *segment_size, &index).await?;
            made += 1;
        }
    }
    let stored = match made {
        0 => stored,
        _ => index::list(repository, *incarnation, timeline, *segment_size).await?,
    };
    roll_up(destination, timeline, before, stored).await?;
    Ok(made)
}

async fn store(destination: &Destination, index: &SegmentIndex) {
    let Destination { repository, incarnation, segment_size } = destination;
    if let Err(error) = index::write(repository, *incarnation, *segment_size, index).await {
        tracing::debug!(lsn = %index.start_lsn, %error, "store the index of a segment: failed, it is made later");
    }
}
