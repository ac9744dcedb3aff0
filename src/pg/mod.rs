//! PostgreSQL's nouns and file formats.
//!
//! Pure: no IO, no async, no logging. Every type here is a number or a text of PostgreSQL with the rule that
//! belongs to it; every decoder takes bytes and returns a value or an error that names the field.

pub mod identity;
pub mod lsn;
pub mod segment;
pub mod time;
pub mod timeline;

pub use identity::{Major, SystemId};
pub use lsn::Lsn;
pub use segment::{SegmentName, SegmentNo, SegmentSize};
pub use time::Timestamp;
pub use timeline::TimelineId;
