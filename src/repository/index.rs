//! The stored index of each segment: derived, rebuilt from WAL when it is missing, old or damaged.
//!
//! Any number of index objects may exist for a segment; a reader takes the newest version that verifies.

use std::collections::BTreeMap;

use super::catalogue::WalObject;
use super::codec::Kind;
use super::format::{Repository, RepositoryError};
use super::identity::KnownIncarnation;
use super::layout::{self, ContentHash, Incarnation, Key, prefix};
use super::segment::read_segment;
use crate::pg::{SegmentName, SegmentNo, SegmentSize, TimelineId};
use crate::wal::reader::Stream;
use crate::wal::transactions::{INDEX_VERSION, Indexer, SegmentIndex};

/// Far above the index of the busiest segment of 64 MiB.
const INDEX_BYTES_MAX: u64 = 256 << 20;

/// The index objects of a timeline, by segment.
pub type StoredIndexes = BTreeMap<SegmentNo, Key>;

/// Stores the index of a segment.
pub async fn write(
    repository: &Repository,
    incarnation: Incarnation,
    size: SegmentSize,
    index: &SegmentIndex,
) -> Result<(), RepositoryError> {
    let content = index.encode();
    let hash = ContentHash::of(&repository.codec().digest(&content));
    let segment = SegmentName::new(index.timeline, size.segment_of(index.start_lsn), size);
    let key = Key::index(incarnation, segment, INDEX_VERSION, hash);
    repository.write(&key, Kind::Index, content.into()).await.map(drop)
}

/// Lists the indexes of a timeline that this program can read.
pub async fn list(
    repository: &Repository,
    incarnation: Incarnation,
    timeline: TimelineId,
    size: SegmentSize,
) -> Result<StoredIndexes, RepositoryError> {
    let listed = repository.store().list(&prefix::index_timeline(incarnation, timeline)).await?;
    let readable = listed.into_iter().filter_map(|object| {
        let (name, version, _) = layout::parse_index(&object.key)?;
        (version == INDEX_VERSION).then_some((name.segment(size)?, object.key))
    });
    Ok(readable.collect())
}

/// Reads a stored index; `None` when it does not verify and must be made again.
pub async fn read(repository: &Repository, key: &Key) -> Result<Option<SegmentIndex>, RepositoryError> {
    match repository.read(key, Kind::Index, INDEX_BYTES_MAX).await {
        Ok(content) => Ok(SegmentIndex::decode(&content).ok()),
        Err(error) if error.is_corrupt() || error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes the index of a segment from its WAL, reading on into the next one for a record that crosses the border.
///
/// `ranges` are the stored ranges of the timeline, at least of this segment and the next.
pub async fn build(
    repository: &Repository,
    known: &KnownIncarnation,
    timeline: TimelineId,
    segment: SegmentNo,
    ranges: &[WalObject],
) -> Result<SegmentIndex, RepositoryError> {
    let size = known.identity.segment_size;
    let stream = Stream { timeline, segment_size: size, system_id: Some(known.identity.system_id) };
    let mut indexer = Indexer::new(stream, segment.start_lsn(size));
    let mut next = segment;
    loop {
        let objects: Vec<WalObject> = of_segment(ranges, timeline, next).cloned().collect();
        if objects.is_empty() {
            return Ok(indexer.current());
        }
        let bytes = read_segment(repository, known.incarnation, size, &objects).await?;
        let (start, complete) = (next.start_lsn(size), bytes.len() as u64 == size.bytes());
        let fed = tokio::task::spawn_blocking(move || {
            indexer.feed(start, &bytes);
            indexer
        });
        indexer = fed.await.map_err(|_| RepositoryError::Stopping)?;
        if let Some(index) = indexer.take_finished().into_iter().find(|i| i.start_lsn == segment.start_lsn(size)) {
            return Ok(index);
        }
        if !complete {
            return Ok(indexer.current());
        }
        next = next.next();
    }
}

/// The stored ranges of one segment; `ranges` are sorted as listings are.
pub fn of_segment(ranges: &[WalObject], timeline: TimelineId, segment: SegmentNo) -> impl Iterator<Item = &WalObject> {
    let first = ranges.partition_point(|o| (o.range.timeline, o.range.segment) < (timeline, segment));
    let rest = ranges.get(first..).unwrap_or_default();
    rest.iter().take_while(move |o| o.range.timeline == timeline && o.range.segment == segment)
}
