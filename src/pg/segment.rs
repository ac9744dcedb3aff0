//! WAL segments: sizes, numbers, file names.
//!
//! Source: `src/include/access/xlog_internal.h` (`XLogFileName`, `XLogSegmentsPerXLogId`), 14–18.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Lsn, TimelineId};

/// `wal_segment_size` in bytes: a power of two from 1 MiB to 1 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct SegmentSize(u32);

/// The number is no segment size that `initdb --wal-segsize` can make.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a WAL segment size (a power of two from 1 MiB to 1 GiB)")]
pub struct InvalidSegmentSize(pub u64);

/// The number of a segment: `lsn / segment size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNo(pub u64);

/// The 24 hex digits that name a segment file: timeline and segment number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    timeline: TimelineId,
    high: u32,
    low: u32,
}

/// The text is not the name of a segment file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the name of a WAL segment (24 upper-case hexadecimal digits)")]
pub struct ParseSegmentNameError(pub String);

impl SegmentSize {
    /// PostgreSQL's default, 16 MiB; for tests and defaults of tools, never assumed of a server.
    pub const MIB_16: SegmentSize = SegmentSize(16 << 20);

    /// # Errors
    /// When `bytes` is no power of two between 1 MiB and 1 GiB.
    pub fn new(bytes: u64) -> Result<Self, InvalidSegmentSize> {
        match u32::try_from(bytes) {
            Ok(small) if small.is_power_of_two() && (1 << 20..=1 << 30).contains(&small) => Ok(SegmentSize(small)),
            _ => Err(InvalidSegmentSize(bytes)),
        }
    }

    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// The segment that holds the byte at `lsn`.
    pub fn segment_of(self, lsn: Lsn) -> SegmentNo {
        SegmentNo(lsn.0 / self.bytes())
    }

    /// The offset of `lsn` within its segment.
    pub fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.0 % self.bytes()
    }

    /// The first position of the segment that holds `lsn`.
    pub fn start_of(self, lsn: Lsn) -> Lsn {
        Lsn(lsn.0 - self.offset_of(lsn))
    }

    /// The first position at or after `lsn` that starts a segment.
    pub fn round_up(self, lsn: Lsn) -> Lsn {
        match self.offset_of(lsn) {
            0 => lsn,
            offset => lsn.saturating_add(self.bytes() - offset),
        }
    }

    fn segments_per_id(self) -> u64 {
        (1 << 32) / self.bytes()
    }
}

impl TryFrom<u32> for SegmentSize {
    type Error = InvalidSegmentSize;

    fn try_from(bytes: u32) -> Result<Self, Self::Error> {
        SegmentSize::new(u64::from(bytes))
    }
}

impl From<SegmentSize> for u32 {
    fn from(size: SegmentSize) -> u32 {
        size.0
    }
}

impl SegmentNo {
    pub fn start_lsn(self, size: SegmentSize) -> Lsn {
        Lsn(self.0.saturating_mul(size.bytes()))
    }

    /// The first position after this segment.
    pub fn end_lsn(self, size: SegmentSize) -> Lsn {
        Lsn(self.0.saturating_add(1).saturating_mul(size.bytes()))
    }

    #[must_use]
    pub fn next(self) -> SegmentNo {
        SegmentNo(self.0.saturating_add(1))
    }
}

impl SegmentName {
    pub fn new(timeline: TimelineId, segment: SegmentNo, size: SegmentSize) -> Self {
        let per_id = size.segments_per_id();
        // A 64-bit LSN has at most 2^32 ids of at most 2^12 segments: both quotients fit.
        let high = u32::try_from(segment.0 / per_id).unwrap_or(u32::MAX);
        let low = u32::try_from(segment.0 % per_id).unwrap_or(u32::MAX);
        SegmentName { timeline, high, low }
    }

    pub fn timeline(self) -> TimelineId {
        self.timeline
    }

    /// The segment number, given the size; `None` when the name cannot belong to segments of that size.
    pub fn segment(self, size: SegmentSize) -> Option<SegmentNo> {
        let per_id = size.segments_per_id();
        (u64::from(self.low) < per_id).then(|| SegmentNo(u64::from(self.high) * per_id + u64::from(self.low)))
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.0, self.high, self.low)
    }
}

impl fmt::Debug for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for SegmentName {
    type Err = ParseSegmentNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseSegmentNameError(text.chars().take(100).collect());
        if text.len() != 24 || !text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F')) {
            return Err(wrong());
        }
        let number = |range: std::ops::Range<usize>| text.get(range).and_then(|t| u32::from_str_radix(t, 16).ok());
        match (text.get(0..8).and_then(TimelineId::from_hex), number(8..16), number(16..24)) {
            (Some(timeline), Some(high), Some(low)) => Ok(SegmentName { timeline, high, low }),
            _ => Err(wrong()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(timeline: u32, lsn: u64, size: u64, expected: &str) {
        let size = SegmentSize::new(size).expect("valid size");
        let segment = size.segment_of(Lsn(lsn));
        let name = SegmentName::new(TimelineId(timeline), segment, size);
        assert_eq!(name.to_string(), expected);
        let back: SegmentName = expected.parse().expect("own name");
        assert_eq!((back.timeline(), back.segment(size)), (TimelineId(timeline), Some(segment)));
    }

    #[test]
    fn names_of_any_segment_size() {
        check(1, 0x100_0000, 16 << 20, "000000010000000000000001");
        check(10, 0x1_FFFF_FFFF, 16 << 20, "0000000A00000001000000FF");
        check(1, 0x1_0000_0000, 1 << 20, "000000010000000100000000");
        check(3, 0x1_C000_0000, 1 << 30, "000000030000000100000003");
        check(1, u64::MAX, 16 << 20, "00000001FFFFFFFF000000FF");
    }

    #[test]
    fn a_name_of_smaller_segments_is_noticed() {
        let name: SegmentName = "000000010000000000000100".parse().expect("24 digits");
        assert_eq!(name.segment(SegmentSize::MIB_16), None);
    }

    #[test]
    fn sizes_are_powers_of_two_in_range() {
        for bad in [0, 1, 1 << 19, (16 << 20) + 1, 3 << 20, 1 << 31, u64::MAX] {
            assert!(SegmentSize::new(bad).is_err(), "{bad}");
        }
        assert_eq!(SegmentSize::MIB_16.round_up(Lsn(1)), Lsn(16 << 20));
        assert_eq!(SegmentSize::MIB_16.round_up(Lsn(16 << 20)), Lsn(16 << 20));
    }

    #[test]
    fn other_names_are_refused() {
        for bad in
            ["", "00000001", "000000010000000000000001.partial", "00000000000000000000000A", "00000001000000000000000a"]
        {
            assert!(bad.parse::<SegmentName>().is_err(), "{bad}");
        }
    }
}
