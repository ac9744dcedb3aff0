//! Why a target cannot be reached, and what near it can.

use std::fmt;

use crate::lineage::stored::Span;
use crate::pg::{Lsn, TimelineId, Timestamp};

/// A position that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub timeline: TimelineId,
    pub lsn: Lsn,
    /// The server's clock there, where known.
    pub time: Option<Timestamp>,
}

/// The nearest moments that work, on either side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Nearest {
    pub earlier: Option<Place>,
    pub later: Option<Place>,
}

/// Why there is no way to a target. Every message ends with what would work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    #[error("there is no backup that is usable on timeline {timeline}")]
    NoBackup { timeline: TimelineId },
    #[error("timeline {timeline} is not known; known are {}", list(known))]
    UnknownTimeline { timeline: TimelineId, known: Vec<TimelineId> },
    #[error("there is no backup {id}")]
    UnknownBackup { id: String },
    #[error("the target lies before the recovery window{nearest}")]
    BeforeWindow { nearest: Nearest },
    #[error("the target lies inside backup {backup}, before its end{nearest}")]
    InsideBackup { backup: String, nearest: Nearest },
    #[error("the target lies where WAL is missing, from {} to {}{nearest}", gap.start_lsn, gap.end_lsn)]
    InGap { gap: Span, noted: bool, nearest: Nearest },
    #[error("the target is not covered by stored WAL yet{nearest}")]
    NotCovered { nearest: Nearest },
    #[error("the target is on another timeline: {}; name it to get there", list(timelines))]
    OnAnotherTimeline { timelines: Vec<TimelineId> },
    #[error("{what} is not in the stored WAL of timeline {timeline}")]
    Unknown { what: String, timeline: TimelineId },
    #[error("the clock was set back or another took over: the target names several positions: {}", places(candidates))]
    Ambiguous { candidates: Vec<Place> },
    #[error("WAL from {} to {} is stored, but what happened in it is not indexed{nearest}", span.start_lsn, span.end_lsn)]
    NotIndexed { span: Span, nearest: Nearest },
}

impl Place {
    /// As a target of the command line.
    pub fn as_target(&self) -> String {
        format!("lsn:{}", self.lsn)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lsn:{}", self.lsn)?;
        match self.time {
            Some(time) => write!(f, " ({time})"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.earlier, &self.later) {
            (Some(earlier), Some(later)) => write!(f, "; nearest are {earlier} and {later}"),
            (Some(place), None) => write!(f, "; the last moment before it is {place}"),
            (None, Some(place)) => write!(f, "; the first moment after it is {place}"),
            (None, None) => Ok(()),
        }
    }
}

impl Unreachable {
    /// The moments that would work instead.
    pub fn alternatives(&self) -> Vec<Place> {
        match self {
            Unreachable::BeforeWindow { nearest }
            | Unreachable::InsideBackup { nearest, .. }
            | Unreachable::InGap { nearest, .. }
            | Unreachable::NotCovered { nearest }
            | Unreachable::NotIndexed { nearest, .. } => nearest.earlier.into_iter().chain(nearest.later).collect(),
            Unreachable::Ambiguous { candidates } => candidates.clone(),
            _ => Vec::new(),
        }
    }
}

fn list(timelines: &[TimelineId]) -> String {
    timelines.iter().map(TimelineId::to_string).collect::<Vec<_>>().join(", ")
}

fn places(places: &[Place]) -> String {
    places.iter().map(Place::to_string).collect::<Vec<_>>().join(", ")
}
