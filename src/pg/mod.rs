//! PostgreSQL's nouns and file formats.
//!
//! Pure: no IO, no async, no logging. Every type here is a number or a text of PostgreSQL with the rule that
//! belongs to it; every decoder takes bytes and returns a value or an error that names the field.

pub mod backup_label;
pub mod collation;
pub mod control_file;
pub mod identity;
pub mod lsn;
pub mod page;
pub mod relation;
pub mod roles;
pub mod segment;
pub mod tablespace_map;
pub mod time;
pub mod timeline;
pub mod xid;

pub use backup_label::BackupLabel;
pub use collation::CollationProvider;
pub use control_file::ControlFile;
pub use identity::{Major, SystemId};
pub use lsn::Lsn;
pub use relation::{ForkNumber, RelFileLocator, RelationFile};
pub use segment::{SegmentName, SegmentNo, SegmentSize};
pub use tablespace_map::TablespaceMap;
pub use time::Timestamp;
pub use timeline::TimelineId;
pub use xid::{FullXid, Xid};
