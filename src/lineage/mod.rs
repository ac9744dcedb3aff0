//! What can be reached: timelines, stored ranges and gaps, coverage, and the way from a target to an exact LSN; pure.
//!
//! [`history`] knows how timelines descend from each other, [`stored`] which bytes of them are in storage, [`coverage`]
//! which moments of wall-clock time those bytes contain, and [`moment`] turns what a person asks for into a position that
//! PostgreSQL will reach, or says why there is none and what is near.
//!
//! Positions are compared only on a [`history::Path`]: the same LSN on two timelines is two places.

#![deny(clippy::indexing_slicing, clippy::cast_possible_truncation)]

pub mod coverage;
pub mod history;
pub mod moment;
pub mod stored;

pub use coverage::{Claim, Covered};
pub use history::{History, Leg, Path};
pub use moment::{ArchiveView, BackupPoint, Moment, Request, Search, Target, Unreachable};
pub use stored::{Span, StoredRanges};
