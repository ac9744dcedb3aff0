//! Reads the indexes of many segments with few requests: roll-ups first, and an index itself only where one is wanted.

use crate::pg::{SegmentNo, TimelineId};
use crate::repository::Key;
use crate::repository::index::StoredIndexes;
use crate::wal::transactions::{Row, SegmentIndex};

/// A roll-up is larger than an index: it is read when it stands for at least so many.
const ROLLUP_WORTH: usize = 3;

/// A segment of a timeline.
pub type Place = (SegmentNo, TimelineId);

/// The index objects of several timelines.
#[derive(Debug, Default)]
pub struct Indexes(pub Vec<(TimelineId, StoredIndexes)>);

/// Neighbouring segments that are read by one request, or one by one when there is no roll-up of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub rollup: Option<Key>,
    pub places: Vec<Place>,
}

/// What is known of a segment.
pub enum Seen {
    /// In short.
    Row(Row),
    Whole(SegmentIndex),
}

impl Indexes {
    /// The object of a segment's own index.
    pub fn key(&self, (segment, timeline): Place) -> Option<&Key> {
        self.of(timeline)?.segments.get(&segment)
    }

    fn of(&self, timeline: TimelineId) -> Option<&StoredIndexes> {
        self.0.iter().find(|(other, _)| *other == timeline).map(|(_, stored)| stored)
    }

    /// How to read the segments, in their order.
    pub fn chunks(&self, places: &[Place]) -> Vec<Chunk> {
        let mut chunks = Vec::new();
        let mut rest = places;
        while let Some((first, others)) = rest.split_first() {
            let chunk = self.rollup_for(rest).unwrap_or_else(|| Chunk { rollup: None, places: vec![*first] });
            rest = rest.get(chunk.places.len()..).unwrap_or(others);
            chunks.push(chunk);
        }
        chunks
    }

    /// The largest roll-up that begins `places`, if it is worth its while.
    fn rollup_for(&self, places: &[Place]) -> Option<Chunk> {
        let (segment, timeline) = *places.first()?;
        let mut rollups = self.of(timeline)?.rollups_of(segment);
        rollups.find_map(|(size, first, key)| {
            let within = |place: &&Place| place.1 == timeline && (first.0..first.0 + size).contains(&place.0.0);
            let covered: Vec<Place> = places.iter().take_while(within).copied().collect();
            (covered.len() >= ROLLUP_WORTH).then(|| Chunk { rollup: Some(key.clone()), places: covered })
        })
    }
}

impl Seen {
    /// The index, whole or in short.
    pub fn index(&self) -> &SegmentIndex {
        match self {
            Seen::Row(row) => &row.index,
            Seen::Whole(index) => index,
        }
    }
}
