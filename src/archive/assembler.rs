//! Puts the replication stream together into storage units: a segment, or 64 MiB of a larger one.
//!
//! Invariants: `held from ≤ received`; at most one unit is buffered here.
//! Input: byte ranges in LSN order without overlap. Output: units, whole but for one whose beginning was let go, and copies of
//! ranges of the unit being filled.
//! Errors: [`OutOfOrder`] when a range does not start where the last one ended; the caller reconnects.

use std::sync::Arc;

use bytes::Bytes;

use super::budget::{Budget, Held};
use crate::pg::{Lsn, SegmentSize};
use crate::repository::layout::WAL_OBJECT_BYTES_MAX;

/// The stream went on elsewhere than it had ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the stream goes on at {got} where {expected} was next")]
pub struct OutOfOrder {
    pub expected: Lsn,
    pub got: Lsn,
}

/// A unit that was received to its end; without its beginning when that was let go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    pub start_lsn: Lsn,
    pub bytes: Bytes,
}

/// The unit being filled.
pub struct Assembler {
    unit_bytes: u64,
    start_lsn: Lsn,
    held: Held,
}

impl Assembler {
    /// `start_lsn` must begin a unit: streams are resumed at the start of a segment.
    pub fn new(segment_size: SegmentSize, start_lsn: Lsn, budget: &Arc<Budget>) -> Self {
        let unit_bytes = unit_bytes(segment_size);
        debug_assert_eq!(start_lsn.0 % unit_bytes, 0);
        Assembler { unit_bytes, start_lsn, held: Held::new(budget) }
    }

    pub fn unit_bytes(&self) -> u64 {
        self.unit_bytes
    }

    /// Start of what is held of the unit being filled.
    pub fn held_from(&self) -> Lsn {
        self.start_lsn
    }

    /// End of what was received.
    pub fn received(&self) -> Lsn {
        self.start_lsn.saturating_add(self.buffered_bytes())
    }

    pub fn is_whole(&self, unit: &Unit) -> bool {
        unit.bytes.len() as u64 == self.unit_bytes
    }

    /// Bytes held here.
    pub fn buffered_bytes(&self) -> u64 {
        self.held.as_ref().len() as u64
    }

    /// Takes the next bytes; returns the units that they completed.
    ///
    /// # Errors
    /// [`OutOfOrder`]; nothing was taken then.
    pub fn push(&mut self, start_lsn: Lsn, bytes: &[u8]) -> Result<Vec<Unit>, OutOfOrder> {
        if start_lsn != self.received() {
            return Err(OutOfOrder { expected: self.received(), got: start_lsn });
        }
        let mut complete = Vec::new();
        let mut rest = bytes;
        while !rest.is_empty() {
            let room = self.unit_bytes - self.received().0 % self.unit_bytes;
            let take = usize::try_from(room).map_or(rest.len(), |room| room.min(rest.len()));
            let (now, later) = rest.split_at(take);
            self.held.extend(now);
            rest = later;
            if take as u64 == room {
                let (start_lsn, end) = (self.start_lsn, self.received());
                complete.push(Unit { start_lsn, bytes: self.let_go(end).freeze() });
            }
        }
        Ok(complete)
    }

    /// Lets go of all that is held: the unit goes on without its beginning, which must be stored as parts.
    pub fn let_go_of_parts(&mut self) {
        self.let_go(self.received());
    }

    fn let_go(&mut self, until: Lsn) -> Held {
        self.start_lsn = until;
        self.held.take()
    }

    /// A copy of `[from, to)`, when all of it is held.
    pub fn copy(&self, from: Lsn, to: Lsn) -> Option<Bytes> {
        let start = usize::try_from(from.checked_since(self.start_lsn)?).ok()?;
        let end = usize::try_from(to.checked_since(self.start_lsn)?).ok()?;
        let bytes = self.held.as_ref().get(start..end)?;
        Some(self.held.copy(bytes).freeze())
    }
}

/// How much WAL is stored as one object: the segment, at most 64 MiB.
pub fn unit_bytes(segment_size: SegmentSize) -> u64 {
    segment_size.bytes().min(WAL_OBJECT_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 20;

    fn size() -> SegmentSize {
        SegmentSize::new(SIZE).expect("1 MiB")
    }

    proptest! {
        #[test]
        fn any_cutting_of_the_stream_gives_the_same_units(cuts in proptest::collection::vec(1usize..700_000, 1..8)) {
            let mut assembler = Assembler::new(size(), Lsn(SIZE), &Budget::new(u64::MAX));
            let total: usize = cuts.iter().sum();
            let stream: Vec<u8> = (0..total).map(|i| (i % 251) as u8).collect();
            let (mut at, mut units) = (0, Vec::new());
            for cut in cuts {
                units.extend(assembler.push(Lsn(SIZE + at as u64), &stream[at..at + cut]).expect("in order"));
                at += cut;
            }
            prop_assert_eq!(units.len(), total >> 20);
            for (index, unit) in units.iter().enumerate() {
                prop_assert_eq!(unit.start_lsn, Lsn(SIZE * (index as u64 + 1)));
                prop_assert_eq!(&unit.bytes[..], &stream[index << 20..(index + 1) << 20]);
            }
            let tail = assembler.copy(assembler.held_from(), assembler.received()).expect("buffered");
            prop_assert_eq!(&tail[..], &stream[units.len() << 20..]);
        }
    }

    #[test]
    fn a_unit_whose_beginning_was_let_go_ends_where_it_would_have() {
        let budget = Budget::new(1000);
        let mut assembler = Assembler::new(size(), Lsn(SIZE), &budget);
        assembler.push(Lsn(SIZE), &[1; 5000]).expect("in order");
        assert!(budget.is_short());
        assembler.let_go_of_parts();
        assert!(!budget.is_short());
        assert_eq!((assembler.held_from(), assembler.received()), (Lsn(SIZE + 5000), Lsn(SIZE + 5000)));
        assert_eq!(assembler.copy(Lsn(SIZE), Lsn(SIZE + 5000)), None);
        let units = assembler.push(Lsn(SIZE + 5000), &vec![2; SIZE as usize]).expect("in order");
        let bounds = |unit: &Unit| (unit.start_lsn, unit.bytes.len() as u64);
        assert_eq!(units.iter().map(bounds).collect::<Vec<_>>(), [(Lsn(SIZE + 5000), SIZE - 5000)]);
        let units = assembler.push(Lsn(2 * SIZE + 5000), &vec![3; SIZE as usize]).expect("in order");
        assert_eq!(units.iter().map(bounds).collect::<Vec<_>>(), [(Lsn(2 * SIZE), SIZE)]);
    }

    #[test]
    fn a_jump_or_a_repetition_is_refused() {
        let mut assembler = Assembler::new(size(), Lsn(SIZE), &Budget::new(u64::MAX));
        assembler.push(Lsn(SIZE), b"abc").expect("in order");
        for got in [Lsn(SIZE), Lsn(SIZE + 4)] {
            let expected = Lsn(SIZE + 3);
            assert_eq!(assembler.push(got, b"x"), Err(OutOfOrder { expected, got }));
        }
        assert_eq!(assembler.received(), Lsn(SIZE + 3));
        assert_eq!(assembler.copy(Lsn(SIZE + 1), Lsn(SIZE + 4)), None);
    }

    #[test]
    fn large_segments_are_stored_as_ranges_of_64_mib() {
        assert_eq!(unit_bytes(SegmentSize::new(1 << 30).expect("1 GiB")), 64 << 20);
        assert_eq!(unit_bytes(SegmentSize::MIB_16), 16 << 20);
    }
}
