//! Finds the records in a stream of WAL bytes.
//!
//! Takes the bytes of one timeline in LSN order, in pieces of any size, and gives back every record that is complete. A
//! record that lies whole in the given piece is not copied; one that is spread over pages or pieces is put together in a
//! buffer that grows with what has arrived, because a length in a damaged header proves nothing.
//!
//! Invariants: a record is given back only when its CRC is right and it names the record before it as its predecessor;
//! after a [`Stop`] nothing is read any more: searching on for "the next good record" would find stale ones.
//! Source: `src/backend/access/transam/xlogreader.c`, 14–18.

use super::format::Format;
use super::page::{LONG_HEADER_BYTES, PAGE_BYTES, PageError, PageHeader, header_bytes};
use super::record::{RECORD_HEADER_BYTES, RawRecord, RecordHeader};
use super::rmgr::{Rmgr, xlog};
use crate::pg::{Lsn, SegmentSize, SystemId, TimelineId};

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "numbers of the tests themselves")]
mod tests;

/// Of a record larger than this only so much is kept; its CRC is checked over all of it. Commits of a million
/// subtransactions need 4 MiB; larger are logical messages, whose content nobody here reads.
pub const RECORD_BYTES_KEPT_MAX: usize = 64 << 20;

/// A record without any fragment.
const RECORD_BYTES_MIN: u32 = 24;

/// Buffers larger than this are given back after their record.
const BUFFER_BYTES_KEPT_MAX: usize = 1 << 20;

/// Whose WAL is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// The timeline in the segments' names; pages may carry older ones, never newer ones.
    pub timeline: TimelineId,
    pub segment_size: SegmentSize,
    /// Checked against the first page of every segment, where known.
    pub system_id: Option<SystemId>,
}

/// Where reading starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At the start of a page, usually of a segment: the rest of a record that began before is skipped.
    Page(Lsn),
    /// At a record that is known to start here; the bytes are given from the start of its page on.
    Record(Lsn),
}

/// Reading cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("WAL stops at {lsn}: {reason}")]
pub struct Stop {
    /// The record or page that could not be read.
    pub lsn: Lsn,
    pub reason: StopReason,
}

/// Why reading cannot go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    #[error("{0}")]
    Page(#[from] PageError),
    #[error("nothing was written here")]
    ZeroLength,
    #[error("a record cannot have {0} bytes")]
    Length(u32),
    #[error("the record names {found} as its predecessor, not {expected}")]
    Predecessor { found: Lsn, expected: Lsn },
    #[error("the record names {0} as its predecessor, which is no earlier position")]
    PredecessorNotEarlier(Lsn),
    #[error("the record's checksum is wrong")]
    Crc,
    #[error("the record's rest is missing on the page at {page_lsn}")]
    ContinuationMissing { page_lsn: Lsn },
    #[error("the page at {page_lsn} continues a record with {found} bytes where {expected} are missing")]
    ContinuationLength { page_lsn: Lsn, found: u32, expected: u64 },
    #[error("the page continues a record that did not begin before it")]
    ContinuationUnexpected,
    #[error("the page is of timeline {found}, its predecessor of {before}")]
    TimelineBack { found: TimelineId, before: TimelineId },
    #[error("the page is of timeline {found} in a segment of timeline {segment}")]
    TimelineAhead { found: TimelineId, segment: TimelineId },
    #[error("the page is of another PostgreSQL version than the one before")]
    FormatChange,
    #[error("the page is of the cluster with system identifier {found}, not {expected}")]
    SystemId { found: SystemId, expected: SystemId },
    #[error("the unfinished record at {dropped} is not followed by the record that says so")]
    OverwriteMissing { dropped: Lsn },
    #[error("bytes from {given} were given where those from {expected} follow")]
    Position { given: Lsn, expected: Lsn },
}

/// What a stop means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopKind {
    /// How WAL ends that is still being written, or whose server crashed; damage only where more must follow.
    End,
    /// Bytes that no server writes, or not in this place.
    Damage,
    /// A version of PostgreSQL that this program does not know.
    UnknownFormat,
}

/// Reads records; see the module.
#[derive(Debug)]
pub struct Reader {
    stream: Stream,
    check_crc: bool,
    /// The next byte wanted.
    position: Lsn,
    state: State,
    page_header: PartialHeader,
    format: Option<Format>,
    page_timeline: Option<TimelineId>,
    last_record: Option<Lsn>,
    end_lsn: Option<Lsn>,
    partial: PartialRecord,
    /// An unfinished record that the page just begun says is void.
    dropped: Option<Lsn>,
    stop: Option<Stop>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Before the first page.
    Begin,
    /// Skips the rest of a record that began before the start, this many bytes without padding.
    Rest(u64),
    /// Skips, without a look at the bytes, up to here: within the first page, or to the end of a switched segment.
    Skip(Lsn),
    /// The next record starts here or after padding.
    Between,
    /// In the middle of the record in `partial`.
    Record,
}

#[derive(Debug, Default)]
struct PartialHeader {
    bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct PartialRecord {
    lsn: Lsn,
    bytes: Vec<u8>,
    /// Bytes that have arrived; more than `bytes` holds when the record is too large to keep.
    arrived: u64,
    header: Option<RecordHeader>,
    /// Over all of the body that has arrived.
    body_crc: u32,
}

/// The records that a piece of WAL completes.
#[derive(Debug)]
pub struct Records<'r> {
    reader: &'r mut Reader,
    input: &'r [u8],
}

struct Complete {
    lsn: Lsn,
    header: RecordHeader,
    format: Format,
    /// Where in the given piece the record lies; `None`: in the buffer.
    place: Option<std::ops::Range<usize>>,
}

impl Stop {
    pub fn kind(&self) -> StopKind {
        match self.reason {
            StopReason::Page(PageError::UnknownFormat { .. }) => StopKind::UnknownFormat,
            StopReason::Page(PageError::Zero | PageError::Stale { .. }) | StopReason::ZeroLength => StopKind::End,
            _ => StopKind::Damage,
        }
    }
}

impl Reader {
    pub fn new(stream: Stream, start: Start) -> Reader {
        let page_of = |lsn: Lsn| Lsn(lsn.0 - lsn.0 % PAGE_BYTES);
        let (position, state) = match start {
            Start::Page(lsn) => (page_of(lsn), State::Begin),
            Start::Record(lsn) if lsn == page_of(lsn) => (lsn, State::Begin),
            Start::Record(lsn) => (page_of(lsn), State::Skip(lsn)),
        };
        Reader {
            stream,
            check_crc: true,
            position,
            state,
            page_header: PartialHeader::default(),
            format: None,
            page_timeline: None,
            last_record: None,
            end_lsn: None,
            partial: PartialRecord::default(),
            dropped: None,
            stop: None,
        }
    }

    /// Takes records with wrong checksums for good: lets tests reach what a checksum protects.
    #[must_use]
    pub fn without_crc_check(mut self) -> Reader {
        self.check_crc = false;
        self
    }

    /// The first byte that has not been given yet.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// Start of the last complete record.
    pub fn last_record_lsn(&self) -> Option<Lsn> {
        self.last_record
    }

    /// End of the last complete record: up to here everything was read.
    pub fn end_lsn(&self) -> Option<Lsn> {
        self.end_lsn
    }

    /// Where a record has begun whose rest has not arrived.
    pub fn unfinished_record_lsn(&self) -> Option<Lsn> {
        (self.state == State::Record).then_some(self.partial.lsn)
    }

    /// The PostgreSQL version, once a page was read.
    pub fn format(&self) -> Option<Format> {
        self.format
    }

    /// Gives the bytes from `lsn` on, which must be [`Reader::position`]. All records must be taken from the result:
    /// what is left in it is lost, and the next call will say so.
    pub fn read<'r>(&'r mut self, lsn: Lsn, bytes: &'r [u8]) -> Records<'r> {
        if lsn != self.position && self.stop.is_none() {
            let reason = StopReason::Position { given: lsn, expected: self.position };
            self.stop = Some(Stop { lsn: self.position, reason });
        }
        Records { reader: self, input: bytes }
    }

    fn advance(&mut self, input: &mut &[u8]) -> Result<Option<Complete>, Stop> {
        if let Some(stop) = self.stop {
            return Err(stop);
        }
        let given = input.len();
        while !input.is_empty() {
            match self.step(input, given) {
                Ok(None) => {}
                Ok(complete) => return Ok(complete),
                Err(stop) => {
                    self.stop = Some(stop);
                    return Err(stop);
                }
            }
        }
        Ok(None)
    }

    fn step(&mut self, input: &mut &[u8], given: usize) -> Result<Option<Complete>, Stop> {
        // A reader that starts at a record first reads the header of its page; a skip to a segment's end reads none.
        if let State::Skip(to) = self.state
            && self.format.is_some()
        {
            self.take(input, to.saturating_since(self.position));
            if self.position >= to {
                self.state = State::Between;
            }
            return Ok(None);
        }
        let offset = self.position.0 % PAGE_BYTES;
        if offset < LONG_HEADER_BYTES as u64 && self.needs_page_header(offset) {
            self.page_header(input)?;
            return Ok(None);
        }
        match self.state {
            State::Rest(left) => {
                let taken = self.take(input, left.min(PAGE_BYTES - offset));
                self.state = if taken == left { State::Between } else { State::Rest(left - taken) };
                Ok(None)
            }
            State::Record => self.continue_record(input),
            State::Begin | State::Skip(_) | State::Between => {
                let padding = (8 - offset % 8) % 8;
                if padding > 0 {
                    self.take(input, padding);
                    return Ok(None);
                }
                self.begin_record(input, given)
            }
        }
    }

    fn needs_page_header(&self, offset: u64) -> bool {
        let page_lsn = Lsn(self.position.0 - offset);
        offset < header_bytes(page_lsn, self.stream.segment_size) as u64
    }

    /// Takes at most `count` bytes, or what is there.
    fn take(&mut self, input: &mut &[u8], count: u64) -> u64 {
        let count = usize::try_from(count).unwrap_or(usize::MAX).min(input.len());
        let (_, rest) = input.split_at_checked(count).unwrap_or((input, &[]));
        *input = rest;
        self.position = self.position.saturating_add(count as u64);
        count as u64
    }

    fn page_header(&mut self, input: &mut &[u8]) -> Result<(), Stop> {
        let page_lsn = Lsn(self.position.0 - self.position.0 % PAGE_BYTES);
        let wanted = header_bytes(page_lsn, self.stream.segment_size);
        let missing = wanted.saturating_sub(self.page_header.bytes.len()).min(input.len());
        self.page_header.bytes.extend_from_slice(input.get(..missing).unwrap_or_default());
        self.take(input, missing as u64);
        if self.page_header.bytes.len() < wanted {
            return Ok(());
        }
        let header = PageHeader::decode(&self.page_header.bytes, page_lsn, self.stream.segment_size);
        self.page_header.bytes.clear();
        let header = header.map_err(|error| Stop { lsn: page_lsn, reason: error.into() })?;
        self.check_page(&header).map_err(|reason| Stop { lsn: page_lsn, reason })?;
        self.format = Some(header.format);
        self.page_timeline = Some(header.timeline);
        self.enter_page(&header, page_lsn)
    }

    fn check_page(&self, header: &PageHeader) -> Result<(), StopReason> {
        if self.format.is_some_and(|before| before != header.format) {
            return Err(StopReason::FormatChange);
        }
        let (found, segment) = (header.timeline, self.stream.timeline);
        if found > segment {
            return Err(StopReason::TimelineAhead { found, segment });
        }
        if let Some(before) = self.page_timeline.filter(|before| found < *before) {
            return Err(StopReason::TimelineBack { found, before });
        }
        match (header.system_id, self.stream.system_id) {
            (Some(found), Some(expected)) if found != expected => Err(StopReason::SystemId { found, expected }),
            _ => Ok(()),
        }
    }

    /// Compares what the page says about a continued record with what is expected.
    fn enter_page(&mut self, header: &PageHeader, page_lsn: Lsn) -> Result<(), Stop> {
        let remaining = u64::from(header.remaining_bytes);
        let missing = match self.state {
            // The record that is asked for was named by its start: what precedes it on the page does not matter.
            State::Skip(_) => return Ok(()),
            State::Begin => {
                self.state = if header.continues_record() { State::Rest(remaining) } else { State::Between };
                return Ok(());
            }
            State::Between if header.continues_record() => {
                return Err(Stop { lsn: page_lsn, reason: StopReason::ContinuationUnexpected });
            }
            State::Between => return Ok(()),
            State::Rest(left) => left,
            State::Record => self.partial.missing_of_record(),
        };
        let begun = self.unfinished_record_lsn();
        let lsn = begun.unwrap_or(page_lsn);
        if header.continues_record() {
            if remaining == missing {
                return Ok(());
            }
            let (found, expected) = (header.remaining_bytes, missing);
            return Err(Stop { lsn, reason: StopReason::ContinuationLength { page_lsn, found, expected } });
        }
        if header.overwrites_record() {
            self.dropped = begun;
            self.state = State::Between;
            return Ok(());
        }
        Err(Stop { lsn, reason: StopReason::ContinuationMissing { page_lsn } })
    }

    /// At the start of a record: takes it from the given piece when it lies there whole, else begins to collect it.
    fn begin_record(&mut self, input: &mut &[u8], given: usize) -> Result<Option<Complete>, Stop> {
        let lsn = self.position;
        let page_left = PAGE_BYTES - lsn.0 % PAGE_BYTES;
        let whole = *input;
        let here = whole.get(..usize::try_from(page_left).unwrap_or(0).min(whole.len())).unwrap_or_default();
        if let Some(header) = here.get(..RECORD_HEADER_BYTES).and_then(RecordHeader::decode) {
            self.check_header(lsn, &header)?;
            let total = usize::try_from(header.total_bytes).unwrap_or(usize::MAX);
            if let Some(bytes) = here.get(..total) {
                let body_crc = crc32c::crc32c(bytes.get(RECORD_HEADER_BYTES..).unwrap_or_default());
                self.check_crc(lsn, &header, body_crc, bytes)?;
                let start = given - input.len();
                self.take(input, u64::from(header.total_bytes));
                return self.complete(lsn, header, bytes, Some(start..start + total));
            }
        }
        self.partial.begin(lsn);
        self.state = State::Record;
        self.continue_record(input)
    }

    fn continue_record(&mut self, input: &mut &[u8]) -> Result<Option<Complete>, Stop> {
        let page_left = PAGE_BYTES - self.position.0 % PAGE_BYTES;
        let wanted = self.partial.missing().min(page_left);
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(input.len());
        self.partial.push(input.get(..wanted).unwrap_or_default());
        self.take(input, wanted as u64);
        let lsn = self.partial.lsn;
        let Some(header) = self.partial.header else {
            let Some(header) = RecordHeader::decode(&self.partial.bytes) else {
                // The length stands in the first four bytes: where nothing was written it is known at once.
                return match self.partial.bytes.first_chunk() {
                    Some(length) => self.check_length(lsn, u32::from_le_bytes(*length)).map(|()| None),
                    None => Ok(None),
                };
            };
            self.check_header(lsn, &header)?;
            self.partial.header = Some(header);
            return self.complete_if_all_there(lsn, header);
        };
        self.complete_if_all_there(lsn, header)
    }

    fn complete_if_all_there(&mut self, lsn: Lsn, header: RecordHeader) -> Result<Option<Complete>, Stop> {
        if self.partial.missing() > 0 {
            return Ok(None);
        }
        let partial = std::mem::take(&mut self.partial);
        let done = self
            .check_crc(lsn, &header, partial.body_crc, &partial.bytes)
            .and_then(|()| self.complete(lsn, header, &partial.bytes, None));
        self.partial = partial;
        done
    }

    fn check_length(&self, lsn: Lsn, total_bytes: u32) -> Result<(), Stop> {
        let max = self.format.map_or(0, Format::record_bytes_max);
        match total_bytes {
            0 => Err(Stop { lsn, reason: StopReason::ZeroLength }),
            length if length < RECORD_BYTES_MIN || length > max => {
                Err(Stop { lsn, reason: StopReason::Length(length) })
            }
            _ => Ok(()),
        }
    }

    fn check_header(&self, lsn: Lsn, header: &RecordHeader) -> Result<(), Stop> {
        self.check_length(lsn, header.total_bytes)?;
        let reason = match self.last_record {
            Some(expected) if header.prev != expected => StopReason::Predecessor { found: header.prev, expected },
            None if header.prev >= lsn => StopReason::PredecessorNotEarlier(header.prev),
            _ => return Ok(()),
        };
        Err(Stop { lsn, reason })
    }

    fn check_crc(&self, lsn: Lsn, header: &RecordHeader, body_crc: u32, bytes: &[u8]) -> Result<(), Stop> {
        let crc = crc32c::crc32c_append(body_crc, bytes.get(..RECORD_HEADER_BYTES - 4).unwrap_or_default());
        if crc != header.crc && self.check_crc {
            return Err(Stop { lsn, reason: StopReason::Crc });
        }
        Ok(())
    }

    /// All bytes of a record were taken and are right.
    fn complete(
        &mut self,
        lsn: Lsn,
        header: RecordHeader,
        bytes: &[u8],
        place: Option<std::ops::Range<usize>>,
    ) -> Result<Option<Complete>, Stop> {
        if let Some(dropped) = self.dropped.take()
            && !says_overwritten(&header, bytes, dropped)
        {
            return Err(Stop { lsn, reason: StopReason::OverwriteMissing { dropped } });
        }
        let Some(format) = self.format else {
            return Err(Stop { lsn, reason: StopReason::Page(PageError::Zero) });
        };
        self.state = State::Between;
        let mut end_lsn = self.position.saturating_add((8 - self.position.0 % 8) % 8);
        if header.rmgr == Rmgr::XLOG && header.info & 0xF0 == xlog::SWITCH {
            // The pages after it may be all zero, headers included: they are not looked at.
            end_lsn = self.stream.segment_size.round_up(self.position);
            self.state = State::Skip(end_lsn);
        }
        self.last_record = Some(lsn);
        self.end_lsn = Some(end_lsn);
        Ok(Some(Complete { lsn, header, format, place }))
    }
}

impl Records<'_> {
    /// The next complete record; `None` when more bytes are needed.
    ///
    /// # Errors
    /// A [`Stop`]; the same one from then on.
    #[expect(clippy::should_implement_trait, reason = "the record borrows from the reader, an Iterator's item cannot")]
    pub fn next(&mut self) -> Result<Option<RawRecord<'_>>, Stop> {
        let mut rest = self.input;
        let complete = self.reader.advance(&mut rest);
        let given = std::mem::replace(&mut self.input, rest);
        let Some(Complete { lsn, header, format, place }) = complete? else { return Ok(None) };
        let bytes = match place {
            Some(place) => given.get(place).unwrap_or_default(),
            None => &self.reader.partial.bytes,
        };
        Ok(Some(RawRecord { format, lsn, end_lsn: self.reader.end_lsn.unwrap_or(lsn), header, bytes }))
    }
}

impl PartialRecord {
    fn begin(&mut self, lsn: Lsn) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        bytes.shrink_to(BUFFER_BYTES_KEPT_MAX);
        *self = PartialRecord { lsn, bytes, ..PartialRecord::default() };
    }

    /// Bytes that have not arrived; of the header alone while it is not complete.
    fn missing(&self) -> u64 {
        match &self.header {
            Some(_) => self.missing_of_record(),
            None => (RECORD_HEADER_BYTES as u64).saturating_sub(self.arrived),
        }
    }

    /// The length is there before the rest of the header: a record starts at least eight bytes before a page's end.
    fn missing_of_record(&self) -> u64 {
        let total = self.bytes.first_chunk().map_or(0, |length| u32::from_le_bytes(*length));
        u64::from(total).saturating_sub(self.arrived)
    }

    fn push(&mut self, piece: &[u8]) {
        if self.header.is_some() {
            self.body_crc = crc32c::crc32c_append(self.body_crc, piece);
        }
        let room = RECORD_BYTES_KEPT_MAX.saturating_sub(self.bytes.len()).min(piece.len());
        self.bytes.extend_from_slice(piece.get(..room).unwrap_or_default());
        self.arrived = self.arrived.saturating_add(piece.len() as u64);
    }
}

/// Whether the record is `XLOG_OVERWRITE_CONTRECORD` for the record at `dropped`.
fn says_overwritten(header: &RecordHeader, bytes: &[u8], dropped: Lsn) -> bool {
    // Two bytes of header for short main data, then the overwritten LSN.
    let start = RECORD_HEADER_BYTES + 2;
    let lsn = bytes.get(start..).and_then(|main| main.first_chunk()).map(|lsn| Lsn(u64::from_le_bytes(*lsn)));
    header.rmgr == Rmgr::XLOG && header.info & 0xF0 == xlog::OVERWRITE_CONTRECORD && lsn == Some(dropped)
}
