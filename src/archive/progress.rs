//! What may be told to the server as flushed.
//!
//! Invariants: a position is (timeline, LSN); `reported ≤ contiguous stored end on that server's history`; it rises only
//! through [`Progress::mark_stored`]; a keepalive has no way to raise it. Ranges that are stored out of order wait until the
//! hole before them is filled.

use std::collections::BTreeMap;

use crate::pg::{Lsn, TimelineId};

/// The contiguous stored end on the timeline that is streamed now.
#[derive(Debug)]
pub struct Progress {
    timeline: TimelineId,
    end_lsn: Lsn,
    /// Stored ranges beyond `end_lsn`, start → end; they neither touch nor overlap it.
    ahead: BTreeMap<Lsn, Lsn>,
}

impl Progress {
    /// Begins where everything before `stored_end` is known to be stored on this server's history.
    pub(super) fn new(timeline: TimelineId, stored_end: Lsn) -> Self {
        Progress { timeline, end_lsn: stored_end, ahead: BTreeMap::new() }
    }

    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    /// The position to report: write, flush and apply alike.
    pub fn reported(&self) -> Lsn {
        self.end_lsn
    }

    /// `[start, end)` is in the store, confirmed by the store's answer. Returns whether the reported position rose.
    pub(super) fn mark_stored(&mut self, start_lsn: Lsn, end_lsn: Lsn) -> bool {
        let before = self.end_lsn;
        if end_lsn > start_lsn && end_lsn > self.end_lsn {
            let entry = self.ahead.entry(start_lsn).or_insert(end_lsn);
            *entry = (*entry).max(end_lsn);
        }
        while let Some(first) = self.ahead.first_entry() {
            if *first.key() > self.end_lsn {
                break;
            }
            self.end_lsn = self.end_lsn.max(first.remove());
        }
        self.end_lsn > before
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_report_is_the_first_byte_not_stored(ranges in proptest::collection::vec((0u64..60, 1u64..12), 0..40)) {
            let mut progress = Progress::new(TimelineId(1), Lsn(5));
            let mut stored = [false; 100];
            stored[..5].fill(true);
            for (start, length) in ranges {
                let before = progress.reported();
                let rose = progress.mark_stored(Lsn(start), Lsn(start + length));
                stored[start as usize..(start + length) as usize].fill(true);
                let first_hole = stored.iter().position(|s| !s).expect("never full") as u64;
                prop_assert_eq!(progress.reported(), Lsn(first_hole));
                prop_assert_eq!(rose, progress.reported() > before);
            }
        }
    }

    #[test]
    fn an_empty_or_old_range_changes_nothing() {
        let mut progress = Progress::new(TimelineId(1), Lsn(100));
        assert!(!progress.mark_stored(Lsn(200), Lsn(200)));
        assert!(!progress.mark_stored(Lsn(0), Lsn(100)));
        assert_eq!(progress.reported(), Lsn(100));
    }
}
