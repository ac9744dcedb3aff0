//! What of the indexes of many segments tells whether a search must look into one of them.
//!
//! A row is a segment's index with a few of its transaction ends: where it matters to a search only on which side of
//! something all of them lie, these say as much as all do. A roll-up is the rows of neighbouring segments.
//!
//! Bytes: a version, then for each row the length of its index (u32), that index as it is encoded elsewhere, the number of
//! all ends, and the lowest and highest id (u64 each; zeros when unknown). Integers are little-endian.

use super::codec::{DecodeError, INDEX_VERSION};
use super::{SegmentIndex, TransactionEnd};
use crate::pg::FullXid;

/// One segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Of its ends the first and the last, the earliest and the latest.
    pub index: SegmentIndex,
    /// How many ends there are.
    pub end_count: u64,
    /// The lowest and the highest id among all ends; `None` when there are none, or their epoch is unknown.
    pub xids: Option<(FullXid, FullXid)>,
}

impl Row {
    pub fn of(index: &SegmentIndex) -> Row {
        let time = |end: &&TransactionEnd| end.time;
        let ends = &index.ends;
        let chosen = [ends.first(), ends.last(), ends.iter().min_by_key(time), ends.iter().max_by_key(time)];
        let mut few: Vec<TransactionEnd> = chosen.into_iter().flatten().copied().collect();
        few.sort_by_key(|end| end.lsn);
        few.dedup();
        let full = || ends.iter().map(|end| index.full_xid(end));
        let known = full().all(|xid| xid.is_some());
        let xids = full().flatten().min().zip(full().flatten().max()).filter(|_| known);
        Row { index: SegmentIndex { ends: few, ..index.clone() }, end_count: ends.len() as u64, xids }
    }

    /// Nothing was left out.
    pub fn is_complete(&self) -> bool {
        self.index.ends.len() as u64 == self.end_count
    }

    /// Whether an id may be among the ends. One below 2^32 may be of any epoch.
    pub fn may_have(&self, wanted: u64) -> bool {
        let Some((FullXid(least), FullXid(greatest))) = self.xids else { return self.end_count > 0 };
        if wanted > u64::from(u32::MAX) {
            return (least..=greatest).contains(&wanted);
        }
        let epoch = least & !u64::from(u32::MAX);
        let candidates = [epoch | wanted, (epoch | wanted).saturating_add(1 << 32)];
        greatest.saturating_sub(least) > u64::from(u32::MAX)
            || candidates.iter().any(|c| (least..=greatest).contains(c))
    }
}

/// The bytes of a roll-up.
pub fn encode_rows(rows: &[Row]) -> Vec<u8> {
    let mut out = vec![INDEX_VERSION];
    for row in rows {
        let index = row.index.encode();
        // An index with four ends has a few hundred bytes.
        out.extend_from_slice(&u32::try_from(index.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&index);
        let (least, greatest) = row.xids.unwrap_or_default();
        for number in [row.end_count, least.0, greatest.0] {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }
    out
}

/// Decodes what [`encode_rows`] made; any other bytes are an error, never a panic.
///
/// # Errors
/// [`DecodeError`]; then the indexes themselves are to be read.
pub fn decode_rows(bytes: &[u8]) -> Result<Vec<Row>, DecodeError> {
    const SHORT: DecodeError = DecodeError::Short("a roll-up");
    let (version, mut rest) = bytes.split_first().ok_or(DecodeError::NoSegment)?;
    if *version != INDEX_VERSION {
        return Err(DecodeError::Version { found: *version });
    }
    let mut rows = Vec::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_first_chunk::<4>().ok_or(SHORT)?;
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| SHORT)?;
        let (index, after) = after.split_at_checked(length).ok_or(SHORT)?;
        let mut numbers = [0u64; 3];
        rest = after;
        for number in &mut numbers {
            let (bytes, after) = rest.split_first_chunk::<8>().ok_or(SHORT)?;
            (*number, rest) = (u64::from_le_bytes(*bytes), after);
        }
        let [end_count, least, greatest] = numbers;
        let xids = (greatest > 0).then_some((FullXid(least), FullXid(greatest)));
        rows.push(Row { index: SegmentIndex::decode(index)?, end_count, xids });
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::EndKind;
    use super::*;
    use crate::pg::{Lsn, TimelineId, Timestamp, Xid};

    fn index(ends: &[(u32, i64)]) -> SegmentIndex {
        let mut index = SegmentIndex::empty(TimelineId(1), Lsn(1 << 20));
        index.near_xid = Some(FullXid(1 << 32 | 100));
        let ends = ends.iter().enumerate().map(|(n, (xid, time))| {
            let lsn = Lsn((1 << 20) + 64 * n as u64);
            let (end_lsn, kind) = (Lsn(lsn.0 + 56), EndKind::Commit);
            TransactionEnd { lsn, end_lsn, kind, xid: Xid(*xid), time: Timestamp(*time) }
        });
        index.ends = ends.collect();
        index
    }

    #[test]
    fn a_row_keeps_the_ends_that_bound_all_others() {
        let row = Row::of(&index(&[(100, 50), (101, 60), (99, 40), (105, 90), (103, 70), (104, 80)]));
        let kept: Vec<u32> = row.index.ends.iter().map(|end| end.xid.0).collect();
        assert_eq!((kept, row.end_count, row.is_complete()), (vec![100, 99, 105, 104], 6, false));
        assert!([99, 103, 105].iter().all(|xid| row.may_have(*xid)));
        assert!(![98, 106, 1 << 40].iter().any(|xid| row.may_have(*xid)));
        assert!(row.may_have(1 << 32 | 100) && !row.may_have(2 << 32 | 100));
        assert!(Row::of(&index(&[(1, 1), (2, 2)])).is_complete());
        assert!(!Row::of(&index(&[])).may_have(5));
    }

    #[test]
    fn ids_around_the_end_of_an_epoch_are_found() {
        let row = Row::of(&SegmentIndex { near_xid: Some(FullXid(2 << 32)), ..index(&[(u32::MAX, 1), (3, 2)]) });
        assert!(row.may_have(u64::from(u32::MAX)) && row.may_have(1) && !row.may_have(500));
    }

    proptest! {
        #[test]
        fn rows_survive_storage(segments in prop::collection::vec(prop::collection::vec((any::<u32>(), any::<i64>()), 0..9), 0..5)) {
            let rows: Vec<Row> = segments.iter().map(|ends| Row::of(&index(ends))).collect();
            let bytes = encode_rows(&rows);
            prop_assert_eq!(decode_rows(&bytes), Ok(rows));
            for cut in 1..bytes.len().min(40) {
                let _ = decode_rows(&bytes[..bytes.len() - cut]);
            }
        }

        #[test]
        fn any_bytes_are_rows_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_rows(&bytes);
        }
    }
}
