//! Makes WAL for tests, byte by byte as a server would.

use super::page::PAGE_BYTES;
use super::record::RECORD_HEADER_BYTES;
use crate::pg::{Lsn, SegmentSize, TimelineId};

pub const SYSTEM_ID: u64 = 7_000_000_000_000_000_001;
pub const MIB: u64 = 1 << 20;

/// WAL of one timeline from the start of a segment on.
#[derive(Clone)]
pub struct Wal {
    pub magic: u16,
    pub timeline: TimelineId,
    pub segment_size: SegmentSize,
    pub start_lsn: Lsn,
    pub bytes: Vec<u8>,
    pub prev: Lsn,
    /// Flags of the next page header.
    overwrite: bool,
}

impl Wal {
    /// Segments of 1 MiB in the format of 18, from the segment with this number on.
    pub fn new(segment: u64) -> Wal {
        let segment_size = SegmentSize::new(MIB).expect("valid");
        let start_lsn = Lsn(segment * MIB);
        let (magic, timeline) = (0xD118, TimelineId(1));
        let prev = Lsn(start_lsn.0 - 40);
        Wal { magic, timeline, segment_size, start_lsn, bytes: Vec::new(), prev, overwrite: false }
    }

    /// The next byte's place.
    pub fn lsn(&self) -> Lsn {
        self.start_lsn.saturating_add(self.bytes.len() as u64)
    }

    fn begin_page(&mut self, remaining: u32) {
        let is_first = self.segment_size.offset_of(self.lsn()) == 0;
        let flags = u16::from(remaining > 0) | u16::from(is_first) << 1 | u16::from(self.overwrite) << 3;
        self.overwrite = false;
        let address = self.lsn().0;
        let mut push = |bytes: &[u8]| self.bytes.extend_from_slice(bytes);
        push(&self.magic.to_le_bytes());
        push(&flags.to_le_bytes());
        push(&self.timeline.0.to_le_bytes());
        push(&address.to_le_bytes());
        push(&remaining.to_le_bytes());
        push(&[0; 4]);
        if is_first {
            push(&SYSTEM_ID.to_le_bytes());
            push(&u32::from(self.segment_size).to_le_bytes());
            push(&u32::try_from(PAGE_BYTES).expect("small").to_le_bytes());
        }
    }

    /// Begins the first page with the rest of a record of `rest` bytes, as if it had begun in the segment before.
    pub fn begin_with_rest(&mut self, rest: u32) {
        self.begin_page(rest);
        let filler = vec![0xAA; rest as usize];
        self.push_over_pages(&filler);
        self.pad();
    }

    /// Appends a record; gives its start.
    pub fn record(&mut self, rmgr: u8, info: u8, xid: u32, main: &[u8]) -> Lsn {
        let whole = self.make(rmgr, info, xid, main);
        let lsn = self.place();
        self.push_over_pages(&whole);
        self.pad();
        self.prev = lsn;
        lsn
    }

    /// Appends the part of a record that fits on this page, as a crash leaves it; gives its start.
    pub fn torn_record(&mut self, rmgr: u8, info: u8, xid: u32, main: &[u8]) -> Lsn {
        let whole = self.make(rmgr, info, xid, main);
        let lsn = self.place();
        let left = PAGE_BYTES as usize - self.bytes.len() % PAGE_BYTES as usize;
        assert!(left < whole.len(), "the record must not fit");
        self.bytes.extend_from_slice(&whole[..left]);
        lsn
    }

    /// What the server writes after a crash: the page that says so, and the record.
    pub fn overwritten(&mut self, dropped: Lsn) -> Lsn {
        assert_eq!(self.bytes.len() as u64 % PAGE_BYTES, 0);
        self.overwrite = true;
        let mut main = dropped.0.to_le_bytes().to_vec();
        main.extend_from_slice(&[0; 8]);
        self.record(0, 0xD0, 0, &main)
    }

    /// A switch, and zeros to the end of the segment.
    pub fn switch(&mut self) -> Lsn {
        let lsn = self.record(0, 0x40, 0, &[]);
        let end = self.segment_size.round_up(self.lsn());
        self.bytes.resize((end.0 - self.start_lsn.0) as usize, 0);
        lsn
    }

    /// A commit record.
    pub fn commit(&mut self, xid: u32, pg_micros: i64) -> Lsn {
        self.record(1, 0x00, xid, &pg_micros.to_le_bytes())
    }

    /// Records of no interest up to the end of the segment, which a switch ends.
    pub fn fill_segment(&mut self) {
        let end = self.segment_size.round_up(self.lsn().saturating_add(1));
        while end.saturating_since(self.lsn()) > 2 * PAGE_BYTES {
            self.record(10, 0, 1, &[7; 5000]);
        }
        self.switch();
    }

    fn place(&mut self) -> Lsn {
        if (self.bytes.len() as u64).is_multiple_of(PAGE_BYTES) {
            self.begin_page(0);
        }
        self.lsn()
    }

    fn make(&self, rmgr: u8, info: u8, xid: u32, main: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        match u8::try_from(main.len()) {
            Ok(0) => {}
            Ok(short) => body.extend_from_slice(&[255, short]),
            Err(_) => {
                body.push(254);
                body.extend_from_slice(&u32::try_from(main.len()).expect("small").to_le_bytes());
            }
        }
        body.extend_from_slice(main);
        let total = u32::try_from(body.len() + RECORD_HEADER_BYTES).expect("small");
        let mut head = total.to_le_bytes().to_vec();
        head.extend_from_slice(&xid.to_le_bytes());
        head.extend_from_slice(&self.prev.0.to_le_bytes());
        head.extend_from_slice(&[info, rmgr, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(&body), &head);
        head.extend_from_slice(&crc.to_le_bytes());
        head.extend_from_slice(&body);
        head
    }

    fn push_over_pages(&mut self, mut whole: &[u8]) {
        while !whole.is_empty() {
            if (self.bytes.len() as u64).is_multiple_of(PAGE_BYTES) {
                self.begin_page(u32::try_from(whole.len()).expect("small"));
            }
            let left = PAGE_BYTES as usize - self.bytes.len() % PAGE_BYTES as usize;
            let (now, later) = whole.split_at(left.min(whole.len()));
            self.bytes.extend_from_slice(now);
            whole = later;
        }
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }
}
