//! Records of transactions: how each one ended.
//!
//! Source: `src/include/access/xact.h`, `ParseCommitRecord` and `ParseAbortRecord` in
//! `src/backend/access/rmgrdesc/xactdesc.c`, 14–18.

use super::PayloadError;
use crate::pg::{Timestamp, Xid};
use crate::wal::bytes::Bytes;
use crate::wal::format::Format;

const OP_MASK: u8 = 0x70;
const HAS_INFO: u8 = 0x80;

const HAS_DATABASE: u32 = 1 << 0;
const HAS_SUBTRANSACTIONS: u32 = 1 << 1;
const HAS_RELATIONS: u32 = 1 << 2;
const HAS_INVALIDATIONS: u32 = 1 << 3;
const HAS_TWO_PHASE: u32 = 1 << 4;
const HAS_ORIGIN: u32 = 1 << 5;
const HAS_GID: u32 = 1 << 7;
const HAS_DROPPED_STATS: u32 = 1 << 8;

/// How a transaction ended; these four kinds of records are the only ones that a recovery target of time or xid sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndKind {
    Commit,
    Abort,
    CommitPrepared,
    AbortPrepared,
}

/// The end of a transaction, or the rollback of a subtransaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct XactEnd {
    pub kind: EndKind,
    /// The transaction that ended; for a prepared one not the one that wrote the record.
    pub xid: Xid,
    pub time: Timestamp,
    pub subtransactions_count: usize,
    pub dropped_relations_count: usize,
}

impl EndKind {
    pub fn is_commit(self) -> bool {
        matches!(self, EndKind::Commit | EndKind::CommitPrepared)
    }
}

/// What a transaction record says about an end; `None` for its other operations.
///
/// # Errors
/// When the data is not exactly of the form that this major writes.
pub fn decode_end(format: Format, info: u8, xid: Xid, main: &[u8]) -> Result<Option<XactEnd>, PayloadError> {
    let (kind, name) = match info & OP_MASK {
        0x00 => (EndKind::Commit, "COMMIT"),
        0x20 => (EndKind::Abort, "ABORT"),
        0x30 => (EndKind::CommitPrepared, "COMMIT_PREPARED"),
        0x40 => (EndKind::AbortPrepared, "ABORT_PREPARED"),
        _ => return Ok(None),
    };
    let mut fields = Bytes::new(main);
    let end = decode(format, kind, info, xid, &mut fields).filter(|_| fields.len() == 0);
    end.map(Some).ok_or(PayloadError(name))
}

fn decode(format: Format, kind: EndKind, info: u8, xid: Xid, fields: &mut Bytes<'_>) -> Option<XactEnd> {
    let time = Timestamp::from_pg_micros(fields.i64()?);
    let flags = if info & HAS_INFO != 0 { fields.u32()? } else { 0 };
    let has = |bit: u32| flags & bit != 0;
    let mut end = XactEnd { kind, xid, time, subtransactions_count: 0, dropped_relations_count: 0 };
    if has(HAS_DATABASE) {
        fields.take(8)?;
    }
    if has(HAS_SUBTRANSACTIONS) {
        end.subtransactions_count = fields.count()?;
        fields.take_items(end.subtransactions_count, 4)?;
    }
    if has(HAS_RELATIONS) {
        end.dropped_relations_count = fields.count()?;
        fields.take_items(end.dropped_relations_count, 12)?;
    }
    if has(HAS_DROPPED_STATS) {
        let count = fields.count()?;
        fields.take_items(count, format.stats_item_bytes()?)?;
    }
    if has(HAS_INVALIDATIONS) {
        let count = fields.count()?;
        fields.take_items(count, 16)?;
    }
    if has(HAS_TWO_PHASE) {
        end.xid = Xid(fields.u32()?);
        if has(HAS_GID) {
            fields.take_c_string()?;
        }
    } else if matches!(kind, EndKind::CommitPrepared | EndKind::AbortPrepared) {
        // Without it nobody could say which transaction ended.
        return None;
    }
    if has(HAS_ORIGIN) {
        fields.take(16)?;
    }
    Some(end)
}
