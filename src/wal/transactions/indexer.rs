//! Builds the index of every segment while its WAL passes.

use super::{At, Completeness, RestorePoint, SegmentIndex, TransactionEnd};
use crate::pg::{FullXid, Lsn};
use crate::wal::reader::{Reader, Start, Stop, Stream};
use crate::wal::record::{Fragments, RawRecord};
use crate::wal::rmgr::{Rmgr, tblspc, xact, xlog};

/// Reads the WAL of one timeline and indexes it segment by segment.
///
/// WAL that cannot be read breaks the index of its segment only: reading begins again with the next segment.
#[derive(Debug)]
pub struct Indexer {
    stream: Stream,
    reader: Reader,
    fragments: Fragments,
    current: SegmentIndex,
    finished: Vec<SegmentIndex>,
    near_xid: Option<FullXid>,
    /// Where the bytes after a stop become readable again: the start of the next segment.
    resume_lsn: Option<Lsn>,
}

impl Indexer {
    /// Begins at the page that holds `start_lsn`, usually the start of a segment; records that begin before `start_lsn`
    /// are not indexed, and the index of a segment that is begun in its middle is not whole.
    pub fn new(stream: Stream, start_lsn: Lsn) -> Indexer {
        let segment_lsn = stream.segment_size.start_of(start_lsn);
        let mut current = SegmentIndex::empty(stream.timeline, segment_lsn);
        if segment_lsn != start_lsn {
            let reason = format!("reading began at {start_lsn}");
            current.completeness = Completeness::Broken { lsn: segment_lsn, reason };
        }
        Indexer {
            stream,
            reader: Reader::new(stream, Start::Page(start_lsn)),
            fragments: Fragments::default(),
            current,
            finished: Vec::new(),
            near_xid: None,
            resume_lsn: None,
        }
    }

    /// The first byte that has not been given yet.
    pub fn position(&self) -> Lsn {
        self.resume_lsn.unwrap_or_else(|| self.reader.position())
    }

    /// Gives the bytes from `lsn` on. Bytes that were given already are passed over; a jump ahead breaks the index of the
    /// segment where reading was. Finished segments are taken with [`Indexer::take_finished`].
    pub fn feed(&mut self, lsn: Lsn, bytes: &[u8]) {
        let mut lsn = lsn;
        let mut bytes = bytes;
        loop {
            let known = self.position().saturating_since(lsn);
            let known = usize::try_from(known).unwrap_or(usize::MAX);
            let Some(rest) = bytes.get(known..).filter(|rest| !rest.is_empty()) else { return };
            lsn = lsn.saturating_add(known as u64);
            bytes = rest;
            match self.resume_lsn {
                Some(resume_lsn) if resume_lsn < lsn => {
                    // The bytes jump over the place; only the start of a segment is a place to begin again.
                    self.resume_lsn = Some(self.stream.segment_size.round_up(lsn));
                    continue;
                }
                Some(_) => self.resume(lsn),
                None => {}
            }
            match self.read(lsn, bytes) {
                Ok(()) => return self.finish_passed(),
                Err(stop) => self.stopped(stop),
            }
        }
    }

    /// The indexes of segments whose records are all complete, in LSN order.
    pub fn take_finished(&mut self) -> Vec<SegmentIndex> {
        std::mem::take(&mut self.finished)
    }

    /// The index of the segment that is being read, as far as its WAL is known.
    pub fn current(&self) -> SegmentIndex {
        let mut index = self.current.clone();
        index.near_xid = self.near_xid;
        if index.completeness == Completeness::Tail {
            let segment_end = self.segment_end(index.start_lsn);
            index.end_lsn = self.reader.end_lsn().unwrap_or(index.start_lsn).clamp(index.start_lsn, segment_end);
        }
        index
    }

    fn read(&mut self, lsn: Lsn, bytes: &[u8]) -> Result<(), Stop> {
        let mut noted = Noted {
            stream: &self.stream,
            fragments: &mut self.fragments,
            current: &mut self.current,
            finished: &mut self.finished,
            near_xid: &mut self.near_xid,
        };
        let mut records = self.reader.read(lsn, bytes);
        while let Some(record) = records.next()? {
            noted.record(&record);
        }
        Ok(())
    }

    /// Where reading is past the segment's end and no record that began in it is unfinished, its index is whole.
    fn finish_passed(&mut self) {
        let unfinished = self.reader.unfinished_record_lsn().unwrap_or(Lsn::MAX);
        while self.segment_end(self.current.start_lsn) <= self.reader.position().min(unfinished) {
            finish(&self.stream, &mut self.current, &mut self.finished, self.near_xid);
        }
    }

    fn stopped(&mut self, stop: Stop) {
        let lsn = self.reader.unfinished_record_lsn().map_or(stop.lsn, |begun| begun.min(stop.lsn));
        while self.segment_end(self.current.start_lsn) <= lsn {
            finish(&self.stream, &mut self.current, &mut self.finished, self.near_xid);
        }
        if self.current.completeness == Completeness::Tail {
            self.current.end_lsn = lsn;
            self.current.completeness = Completeness::Broken { lsn, reason: stop.to_string() };
        }
        let reached = self.reader.position().max(stop.lsn);
        self.resume_lsn =
            Some(self.stream.segment_size.round_up(reached).max(self.segment_end(self.current.start_lsn)));
    }

    /// Begins again at the start of a segment; those in between hold nothing that could be read.
    fn resume(&mut self, lsn: Lsn) {
        let broken = self.current.completeness.clone();
        while self.current.start_lsn < lsn {
            finish(&self.stream, &mut self.current, &mut self.finished, self.near_xid);
            if self.current.start_lsn < lsn {
                self.current.completeness = broken.clone();
            }
        }
        self.reader = Reader::new(self.stream, Start::Page(lsn));
        self.resume_lsn = None;
    }

    fn segment_end(&self, lsn: Lsn) -> Lsn {
        self.stream.segment_size.segment_of(lsn).end_lsn(self.stream.segment_size)
    }
}

/// Moves the current index to the finished ones and begins the next segment's.
fn finish(stream: &Stream, current: &mut SegmentIndex, finished: &mut Vec<SegmentIndex>, near_xid: Option<FullXid>) {
    let end_lsn = stream.segment_size.segment_of(current.start_lsn).end_lsn(stream.segment_size);
    let mut done = std::mem::replace(current, SegmentIndex::empty(stream.timeline, end_lsn));
    current.major = done.major;
    done.near_xid = near_xid;
    if done.completeness == Completeness::Tail {
        done.completeness = Completeness::Whole;
        done.end_lsn = end_lsn;
    }
    finished.push(done);
}

/// The parts of an indexer that a record changes.
struct Noted<'i> {
    stream: &'i Stream,
    fragments: &'i mut Fragments,
    current: &'i mut SegmentIndex,
    finished: &'i mut Vec<SegmentIndex>,
    near_xid: &'i mut Option<FullXid>,
}

impl Noted<'_> {
    fn record(&mut self, record: &RawRecord<'_>) {
        let segment_lsn = self.stream.segment_size.start_of(record.lsn);
        while self.current.start_lsn < segment_lsn {
            finish(self.stream, self.current, self.finished, *self.near_xid);
        }
        self.current.major = Some(record.format.major());
        self.current.first_record_lsn.get_or_insert(record.lsn);
        self.current.last_record_lsn = Some(record.lsn);
        self.current.last_record_end_lsn = Some(record.end_lsn);
        self.current.has_unknown_rmgr |= record.header.rmgr.is_unknown();
        if let Err(reason) = self.understand(record) {
            let lsn = record.lsn;
            if self.current.completeness == Completeness::Tail {
                self.current.end_lsn = lsn;
                self.current.completeness = Completeness::Broken { lsn, reason };
            }
        }
    }

    fn understand(&mut self, record: &RawRecord<'_>) -> Result<(), String> {
        let rmgr = record.header.rmgr;
        if ![Rmgr::XACT, Rmgr::XLOG, Rmgr::TBLSPC].contains(&rmgr) {
            return Ok(());
        }
        self.fragments.decode(record).map_err(|error| error.to_string())?;
        let main = self.fragments.main(record);
        if rmgr == Rmgr::XACT {
            let end = xact::decode_end(record.format, record.header.info, record.header.xid, main);
            if let Some(end) = end.map_err(|error| error.to_string())? {
                let (lsn, end_lsn) = (record.lsn, record.end_lsn);
                self.current.ends.push(TransactionEnd { lsn, end_lsn, kind: end.kind, xid: end.xid, time: end.time });
            }
            return Ok(());
        }
        if rmgr == Rmgr::TBLSPC {
            let made = tblspc::decode(record.op(), main).map_err(|error| error.to_string())?;
            self.current.made_tablespaces.extend(made.map(|what| At { lsn: record.lsn, what }));
            return Ok(());
        }
        let decoded = xlog::decode(record.format, record.op(), main).map_err(|error| error.to_string())?;
        let (lsn, current) = (record.lsn, &mut *self.current);
        match decoded {
            Some(xlog::XlogRecord::Checkpoint(what)) => {
                *self.near_xid = Some(what.next_xid);
                current.checkpoints.push(At { lsn, what });
            }
            Some(xlog::XlogRecord::BackupEnd { start_lsn: what }) => current.backup_ends.push(At { lsn, what }),
            Some(xlog::XlogRecord::ParameterChange(what)) => current.parameter_changes.push(At { lsn, what }),
            Some(xlog::XlogRecord::RestorePoint { name, time }) => {
                current.restore_points.push(RestorePoint { lsn, name, time });
            }
            Some(xlog::XlogRecord::EndOfRecovery(what)) => current.ends_of_recovery.push(At { lsn, what }),
            Some(xlog::XlogRecord::OverwriteContrecord { .. }) | None => {}
        }
        Ok(())
    }
}
