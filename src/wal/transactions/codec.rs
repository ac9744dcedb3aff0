//! The bytes of a segment index.
//!
//! One byte of version, then sections: tag, length, content; all numbers are LEB128 varints. A section with an unknown tag
//! is skipped, so that later versions can add what earlier ones do not need. Within a section, positions are counted in
//! eight bytes (records start on such boundaries) from the entry before, ids and times as signed differences.
//!
//! Decoding takes any bytes: no length is believed before that many bytes are there, and no entry is smaller than a byte,
//! so memory stays within a small multiple of the input.

use super::{
    At, Checkpoint, Completeness, EndKind, EndOfRecovery, MadeTablespace, Parameters, RestorePoint, SegmentIndex,
    TransactionEnd, WalLevel,
};
use crate::pg::{FullXid, Lsn, Major, TimelineId, Timestamp, Xid};

/// The first byte of an encoded index; part of its name in storage too. Since 2 an index names the tablespaces that were made:
/// one of version 1 cannot say that there were none, and is made again.
pub const INDEX_VERSION: u8 = 2;

const SECTION_SEGMENT: u64 = 1;
const SECTION_ENDS: u64 = 2;
const SECTION_RESTORE_POINTS: u64 = 3;
const SECTION_PARAMETERS: u64 = 4;
const SECTION_CHECKPOINTS: u64 = 5;
const SECTION_BACKUP_ENDS: u64 = 6;
const SECTION_ENDS_OF_RECOVERY: u64 = 7;
const SECTION_MADE_TABLESPACES: u64 = 8;

const WHOLE: u64 = 0;
const TAIL: u64 = 1;
const BROKEN: u64 = 2;

/// Why bytes are no segment index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("the WAL index has version {found}, this program reads {INDEX_VERSION}")]
    Version { found: u8 },
    #[error("the WAL index ends in the middle of {0}")]
    Short(&'static str),
    #[error("the WAL index has an impossible value in {0}")]
    Value(&'static str),
    #[error("the WAL index lacks its first section")]
    NoSegment,
}

impl SegmentIndex {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![INDEX_VERSION];
        section(&mut out, SECTION_SEGMENT, |out| self.encode_segment(out));
        let mut entries = |tag: u64, count: usize, write: &dyn Fn(&mut Writer)| {
            if count > 0 {
                section(&mut out, tag, |out| {
                    out.number(count as u64);
                    write(out);
                });
            }
        };
        entries(SECTION_ENDS, self.ends.len(), &|out| self.ends.iter().for_each(|end| out.end(end)));
        entries(SECTION_RESTORE_POINTS, self.restore_points.len(), &|out| {
            for point in &self.restore_points {
                out.lsn(point.lsn);
                out.time(point.time);
                out.text(&point.name);
            }
        });
        entries(SECTION_PARAMETERS, self.parameter_changes.len(), &|out| {
            self.parameter_changes.iter().for_each(|change| out.parameters(change));
        });
        entries(SECTION_CHECKPOINTS, self.checkpoints.len(), &|out| {
            self.checkpoints.iter().for_each(|checkpoint| out.checkpoint(checkpoint));
        });
        entries(SECTION_BACKUP_ENDS, self.backup_ends.len(), &|out| {
            for end in &self.backup_ends {
                out.lsn(end.lsn);
                out.number(end.what.0);
            }
        });
        entries(SECTION_ENDS_OF_RECOVERY, self.ends_of_recovery.len(), &|out| {
            for end in &self.ends_of_recovery {
                out.lsn(end.lsn);
                out.time(end.what.time);
                out.number(u64::from(end.what.timeline.0));
                out.number(u64::from(end.what.previous_timeline.0));
                out.level(end.what.wal_level);
            }
        });
        entries(SECTION_MADE_TABLESPACES, self.made_tablespaces.len(), &|out| {
            for made in &self.made_tablespaces {
                out.lsn(made.lsn);
                out.number(u64::from(made.what.oid));
                out.text(&made.what.path);
            }
        });
        out
    }

    fn encode_segment(&self, out: &mut Writer) {
        out.number(u64::from(self.timeline.0));
        out.number(self.start_lsn.0);
        out.number(self.end_lsn.0);
        out.number(self.major.map_or(0, |major| u64::from(major.0)));
        for lsn in [self.first_record_lsn, self.last_record_lsn, self.last_record_end_lsn] {
            out.number(lsn.map_or(0, |lsn| lsn.0));
        }
        out.number(self.near_xid.map_or(0, |xid| xid.0));
        out.number(u64::from(self.has_unknown_rmgr));
        match &self.completeness {
            Completeness::Whole => out.number(WHOLE),
            Completeness::Tail => out.number(TAIL),
            Completeness::Broken { lsn, reason } => {
                out.number(BROKEN);
                out.number(lsn.0);
                out.text(reason);
            }
        }
    }

    /// Decodes what [`SegmentIndex::encode`] made; any other bytes are an error, never a panic.
    ///
    /// # Errors
    /// [`DecodeError::Version`] for an index of a later program: it is rebuilt from WAL.
    pub fn decode(bytes: &[u8]) -> Result<SegmentIndex, DecodeError> {
        let (version, mut rest) = bytes.split_first().ok_or(DecodeError::NoSegment)?;
        if *version != INDEX_VERSION {
            return Err(DecodeError::Version { found: *version });
        }
        let mut index: Option<SegmentIndex> = None;
        while !rest.is_empty() {
            let mut head = SectionReader::new(rest, "a section");
            let (tag, length) = (head.number()?, head.length()?);
            let content = head.take(length)?;
            rest = head.left;
            if tag == SECTION_SEGMENT {
                index = Some(decode_segment(content)?);
                continue;
            }
            let index = index.as_mut().ok_or(DecodeError::NoSegment)?;
            match tag {
                SECTION_ENDS => index.ends = entries(content, "transaction ends", SectionReader::end)?,
                SECTION_RESTORE_POINTS => {
                    index.restore_points = entries(content, "restore points", SectionReader::restore_point)?;
                }
                SECTION_PARAMETERS => {
                    index.parameter_changes = entries(content, "parameter changes", SectionReader::parameters)?;
                }
                SECTION_CHECKPOINTS => {
                    index.checkpoints = entries(content, "checkpoints", SectionReader::checkpoint)?;
                }
                SECTION_BACKUP_ENDS => {
                    index.backup_ends = entries(content, "backup ends", |reader| {
                        Ok(At { lsn: reader.lsn()?, what: Lsn(reader.number()?) })
                    })?;
                }
                SECTION_ENDS_OF_RECOVERY => {
                    index.ends_of_recovery = entries(content, "ends of recovery", SectionReader::end_of_recovery)?;
                }
                SECTION_MADE_TABLESPACES => {
                    index.made_tablespaces = entries(content, "tablespaces", SectionReader::made_tablespace)?;
                }
                _ => {}
            }
        }
        index.ok_or(DecodeError::NoSegment)
    }
}

fn decode_segment(content: &[u8]) -> Result<SegmentIndex, DecodeError> {
    let mut reader = SectionReader::new(content, "the segment");
    let timeline = reader.timeline()?;
    let start_lsn = Lsn(reader.number()?);
    let end_lsn = Lsn(reader.number()?);
    let mut index = SegmentIndex { end_lsn, ..SegmentIndex::empty(timeline, start_lsn) };
    let major = reader.number()?;
    let major = u16::try_from(major).map_err(|_| DecodeError::Value("the segment"))?;
    index.major = (major != 0).then_some(Major(major));
    let mut lsn = || reader.number().map(|lsn| (lsn != 0).then_some(Lsn(lsn)));
    index.first_record_lsn = lsn()?;
    index.last_record_lsn = lsn()?;
    index.last_record_end_lsn = lsn()?;
    let near_xid = reader.number()?;
    index.near_xid = (near_xid != 0).then_some(FullXid(near_xid));
    index.has_unknown_rmgr = reader.number()? != 0;
    index.completeness = match reader.number()? {
        WHOLE => Completeness::Whole,
        TAIL => Completeness::Tail,
        BROKEN => Completeness::Broken { lsn: Lsn(reader.number()?), reason: reader.text()? },
        _ => return Err(DecodeError::Value("the segment")),
    };
    Ok(index)
}

/// Writes a section's numbers; remembers the entry before for the differences.
#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
    before: Before,
}

#[derive(Default)]
struct Before {
    lsn: u64,
    time: i64,
    xid: u32,
}

fn section(out: &mut Vec<u8>, tag: u64, write: impl FnOnce(&mut Writer)) {
    let mut content = Writer::default();
    write(&mut content);
    let mut head = Writer::default();
    head.number(tag);
    head.number(content.bytes.len() as u64);
    out.extend_from_slice(&head.bytes);
    out.extend_from_slice(&content.bytes);
}

impl Writer {
    fn number(&mut self, mut value: u64) {
        loop {
            let [low, ..] = (value & 0x7F).to_le_bytes();
            value >>= 7;
            if value == 0 {
                return self.bytes.push(low);
            }
            self.bytes.push(low | 0x80);
        }
    }

    fn signed(&mut self, value: i64) {
        self.number((value.cast_unsigned() << 1) ^ (value >> 63).cast_unsigned());
    }

    fn lsn(&mut self, lsn: Lsn) {
        // Differences wrap, so that any two positions can follow each other.
        let difference = lsn.0.wrapping_sub(self.before.lsn);
        self.before.lsn = lsn.0;
        self.number(difference.rotate_right(3));
    }

    fn time(&mut self, time: Timestamp) {
        self.signed(time.0.wrapping_sub(self.before.time));
        self.before.time = time.0;
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.bytes.extend_from_slice(text.as_bytes());
    }

    fn level(&mut self, level: Option<WalLevel>) {
        self.number(u64::from(level.is_some()));
        self.signed(i64::from(level.map_or(0, |level| level.0)));
    }

    fn end(&mut self, end: &TransactionEnd) {
        self.lsn(end.lsn);
        self.number(end.end_lsn.0.wrapping_sub(end.lsn.0).rotate_right(3));
        let kind = match end.kind {
            EndKind::Commit => 0,
            EndKind::Abort => 1,
            EndKind::CommitPrepared => 2,
            EndKind::AbortPrepared => 3,
        };
        let difference = i64::from(end.xid.0) - i64::from(self.before.xid);
        self.before.xid = end.xid.0;
        // The kind rides on the xid: most ends are commits of an id near the one before.
        let zigzag = (difference.cast_unsigned() << 1) ^ (difference >> 63).cast_unsigned();
        self.number(zigzag << 2 | kind);
        self.time(end.time);
    }

    fn parameters(&mut self, change: &At<Parameters>) {
        self.lsn(change.lsn);
        let what = &change.what;
        for number in [
            what.max_connections,
            what.max_worker_processes,
            what.max_wal_senders,
            what.max_prepared_transactions,
            what.max_locks_per_transaction,
            what.wal_level.0,
        ] {
            self.signed(i64::from(number));
        }
        self.number(u64::from(what.wal_log_hints) | u64::from(what.track_commit_timestamp) << 1);
    }

    fn checkpoint(&mut self, checkpoint: &At<Checkpoint>) {
        self.lsn(checkpoint.lsn);
        let what = &checkpoint.what;
        self.number(u64::from(what.shutdown));
        self.number(what.redo_lsn.0);
        self.number(u64::from(what.timeline.0));
        self.number(u64::from(what.previous_timeline.0));
        self.number(what.next_xid.0);
        self.time(what.time);
        self.level(what.wal_level);
    }
}

/// Reads a section's numbers back.
struct SectionReader<'a> {
    left: &'a [u8],
    what: &'static str,
    before: Before,
}

/// A count, then as many entries, then nothing.
fn entries<'a, T>(
    content: &'a [u8],
    what: &'static str,
    mut read: impl FnMut(&mut SectionReader<'a>) -> Result<T, DecodeError>,
) -> Result<Vec<T>, DecodeError> {
    let mut reader = SectionReader::new(content, what);
    let count = reader.length()?;
    // No entry is smaller than two bytes; a greater count is refused before memory is taken for it.
    if count > reader.left.len() / 2 {
        return Err(DecodeError::Short(what));
    }
    let entries = (0..count).map(|_| read(&mut reader)).collect::<Result<Vec<T>, _>>()?;
    if reader.left.is_empty() { Ok(entries) } else { Err(DecodeError::Value(what)) }
}

impl<'a> SectionReader<'a> {
    fn new(left: &'a [u8], what: &'static str) -> Self {
        SectionReader { left, what, before: Before::default() }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (head, tail) = self.left.split_at_checked(count).ok_or(DecodeError::Short(self.what))?;
        self.left = tail;
        Ok(head)
    }

    fn number(&mut self) -> Result<u64, DecodeError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let (byte, tail) = self.left.split_first().ok_or(DecodeError::Short(self.what))?;
            self.left = tail;
            let bits = u64::from(byte & 0x7F);
            if bits << shift >> shift != bits {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(DecodeError::Value(self.what))
    }

    fn length(&mut self) -> Result<usize, DecodeError> {
        usize::try_from(self.number()?).map_err(|_| DecodeError::Short(self.what))
    }

    fn signed(&mut self) -> Result<i64, DecodeError> {
        let value = self.number()?;
        Ok(unzigzag(value))
    }

    fn int(&mut self) -> Result<i32, DecodeError> {
        i32::try_from(self.signed()?).map_err(|_| DecodeError::Value(self.what))
    }

    fn lsn(&mut self) -> Result<Lsn, DecodeError> {
        self.before.lsn = self.before.lsn.wrapping_add(self.number()?.rotate_left(3));
        Ok(Lsn(self.before.lsn))
    }

    fn time(&mut self) -> Result<Timestamp, DecodeError> {
        self.before.time = self.before.time.wrapping_add(self.signed()?);
        Ok(Timestamp(self.before.time))
    }

    fn timeline(&mut self) -> Result<TimelineId, DecodeError> {
        u32::try_from(self.number()?).map(TimelineId).map_err(|_| DecodeError::Value(self.what))
    }

    fn text(&mut self) -> Result<String, DecodeError> {
        let length = self.length()?;
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| DecodeError::Value(self.what))
    }

    fn level(&mut self) -> Result<Option<WalLevel>, DecodeError> {
        let known = self.number()? != 0;
        let level = self.int()?;
        Ok(known.then_some(WalLevel(level)))
    }

    fn end(&mut self) -> Result<TransactionEnd, DecodeError> {
        let lsn = self.lsn()?;
        let end_lsn = Lsn(lsn.0.wrapping_add(self.number()?.rotate_left(3)));
        let packed = self.number()?;
        let kind = match packed & 3 {
            0 => EndKind::Commit,
            1 => EndKind::Abort,
            2 => EndKind::CommitPrepared,
            _ => EndKind::AbortPrepared,
        };
        let xid = i64::from(self.before.xid).checked_add(unzigzag(packed >> 2));
        let xid = xid.and_then(|xid| u32::try_from(xid).ok()).ok_or(DecodeError::Value(self.what))?;
        self.before.xid = xid;
        Ok(TransactionEnd { lsn, end_lsn, kind, xid: Xid(xid), time: self.time()? })
    }

    fn restore_point(&mut self) -> Result<RestorePoint, DecodeError> {
        Ok(RestorePoint { lsn: self.lsn()?, time: self.time()?, name: self.text()? })
    }

    fn made_tablespace(&mut self) -> Result<At<MadeTablespace>, DecodeError> {
        let lsn = self.lsn()?;
        let oid = u32::try_from(self.number()?).map_err(|_| DecodeError::Value(self.what))?;
        Ok(At { lsn, what: MadeTablespace { oid, path: self.text()? } })
    }

    fn parameters(&mut self) -> Result<At<Parameters>, DecodeError> {
        let lsn = self.lsn()?;
        let (max_connections, max_worker_processes) = (self.int()?, self.int()?);
        let (max_wal_senders, max_prepared_transactions) = (self.int()?, self.int()?);
        let (max_locks_per_transaction, wal_level) = (self.int()?, WalLevel(self.int()?));
        let flags = self.number()?;
        let what = Parameters {
            max_connections,
            max_worker_processes,
            max_wal_senders,
            max_prepared_transactions,
            max_locks_per_transaction,
            wal_level,
            wal_log_hints: flags & 1 != 0,
            track_commit_timestamp: flags & 2 != 0,
        };
        Ok(At { lsn, what })
    }

    fn checkpoint(&mut self) -> Result<At<Checkpoint>, DecodeError> {
        let lsn = self.lsn()?;
        let shutdown = self.number()? != 0;
        let redo_lsn = Lsn(self.number()?);
        let (timeline, previous_timeline) = (self.timeline()?, self.timeline()?);
        let next_xid = FullXid(self.number()?);
        let (time, wal_level) = (self.time()?, self.level()?);
        Ok(At { lsn, what: Checkpoint { shutdown, redo_lsn, timeline, previous_timeline, next_xid, time, wal_level } })
    }

    fn end_of_recovery(&mut self) -> Result<At<EndOfRecovery>, DecodeError> {
        let (lsn, time) = (self.lsn()?, self.time()?);
        let (timeline, previous_timeline) = (self.timeline()?, self.timeline()?);
        Ok(At { lsn, what: EndOfRecovery { time, timeline, previous_timeline, wal_level: self.level()? } })
    }
}

fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}
