//! The stored index of each segment: derived, rebuilt from WAL when it is missing, old or damaged.
//!
//! Any number of index objects may exist for a segment; a reader takes the newest version that verifies. A roll-up holds the
//! indexes of many neighbouring segments in short: enough to know which of them a search must read, so that finding a
//! moment costs a few dozen reads however many segments there are. Sizes rise by 16, and each is made from the one below it.

use std::collections::BTreeMap;

use super::catalogue::WalObject;
use super::codec::Kind;
use super::format::{Repository, RepositoryError};
use super::identity::KnownIncarnation;
use super::layout::{self, ContentHash, Incarnation, Key, prefix};
use super::segment::read_segment;
use crate::pg::{SegmentName, SegmentNo, SegmentSize, TimelineId};
use crate::wal::reader::Stream;
use crate::wal::transactions::{INDEX_VERSION, Indexer, Row, SegmentIndex, decode_rows, encode_rows};

/// Far above the index of the busiest segment of 64 MiB.
const INDEX_BYTES_MAX: u64 = 256 << 20;

/// Segments of the roll-ups; each begins at a multiple of its size.
pub const ROLLUP_SIZES: [u64; 3] = [16, 256, 4096];
/// Far above the largest roll-up: a row has some hundred bytes.
const ROLLUP_BYTES_MAX: u64 = 64 << 20;

/// The index objects of a timeline.
#[derive(Debug, Clone, Default)]
pub struct StoredIndexes {
    pub segments: BTreeMap<SegmentNo, Key>,
    /// By size and first segment.
    pub rollups: BTreeMap<(u64, SegmentNo), Key>,
}

impl StoredIndexes {
    /// The roll-ups that cover a segment, the largest first.
    pub fn rollups_of(&self, segment: SegmentNo) -> impl Iterator<Item = (u64, SegmentNo, &Key)> {
        ROLLUP_SIZES.iter().rev().filter_map(move |size| {
            let first = SegmentNo(segment.0 / size * size);
            self.rollups.get(&(*size, first)).map(|key| (*size, first, key))
        })
    }
}

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
    let mut found = StoredIndexes::default();
    for object in listed {
        if let Some((name, INDEX_VERSION, _)) = layout::parse_index(&object.key) {
            found.segments.extend(name.segment(size).map(|segment| (segment, object.key)));
        } else if let Some((name, count, INDEX_VERSION, _)) = layout::parse_rollup(&object.key) {
            found.rollups.extend(name.segment(size).map(|first| ((count, first), object.key)));
        }
    }
    Ok(found)
}

/// Stores the rows of `count` segments from `first` on, as far as there are indexes of them.
pub async fn write_rollup(
    repository: &Repository,
    incarnation: Incarnation,
    first: SegmentName,
    count: u64,
    rows: &[Row],
) -> Result<Key, RepositoryError> {
    let content = encode_rows(rows);
    let hash = ContentHash::of(&repository.codec().digest(&content));
    let key = Key::rollup(incarnation, first, count, INDEX_VERSION, hash);
    repository.write(&key, Kind::Index, content.into()).await?;
    Ok(key)
}

/// Reads a roll-up; `None` when it does not verify: then the indexes themselves are to be read.
pub async fn read_rollup(repository: &Repository, key: &Key) -> Result<Option<Vec<Row>>, RepositoryError> {
    match repository.read(key, Kind::Index, ROLLUP_BYTES_MAX).await {
        Ok(content) => Ok(decode_rows(&content).ok()),
        Err(error) if error.is_corrupt() || error.is_not_found() => Ok(None),
        Err(error) => Err(error),
    }
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
