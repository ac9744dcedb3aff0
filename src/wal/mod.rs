//! WAL parser: bytes in, records out; pure.
//!
//! [`reader`] takes the bytes of one timeline in LSN order, in pieces of any size, and gives back complete records whose
//! CRC is right, or says where and why it stopped. [`record`] takes a record apart, [`rmgr`] understands what a few
//! resource managers write, [`transactions`] keeps of a segment what exact restore targets need.
//!
//! Invariants: no input makes this panic; memory grows with the bytes that arrived, not with lengths they claim, and a
//! record keeps at most [`reader::RECORD_BYTES_KEPT_MAX`]; a record that is given back passed its CRC.
//! Little-endian WAL with 8 KiB pages of PostgreSQL 14–18, any segment size.

#![deny(clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod bytes;
pub mod format;
pub mod page;
pub mod reader;
pub mod record;
pub mod rmgr;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "numbers of the tests themselves")]
mod testing;
pub mod transactions;

pub use format::Format;
pub use reader::{Reader, Start, Stop, StopKind, StopReason};
pub use record::{BlockRef, Fragments, RawRecord};
pub use transactions::{Indexer, SegmentIndex};
