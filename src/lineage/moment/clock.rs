//! Where the clock passes a time, seen along the WAL.
//!
//! Every transaction end and every claim is a look at a clock, in LSN order. Before the first look, and after lost WAL, it
//! is unknown on which side of the time one is. Usually the clock passes the time once; where it was set back, it passes
//! again.

use crate::lineage::coverage::Claim;
use crate::lineage::stored::Span;
use crate::pg::{Lsn, Timestamp};

/// Commit times are taken before their records get their place in WAL, which swaps neighbours by milliseconds. More than
/// this is a clock that was set back.
const INVERSION_MICROS_MAX: i64 = 1_000_000;

/// A backup's end tells the time there, where nothing else does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Anchor {
    pub lsn: Lsn,
    pub time: Timestamp,
}

/// Follows the clock along the WAL.
#[derive(Debug)]
pub(super) struct Passage {
    time: Timestamp,
    /// The very time is past already.
    exclusive: bool,
    phase: Phase,
    newest: Timestamp,
    anchors: Vec<Anchor>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Unknown(Edge),
    Before,
    After,
}

/// Behind what the side is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edge {
    Start,
    Gap(Span),
}

/// The clock was past the time here for the first time since it was before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Passed {
    Here,
    /// Somewhere before the start, or in lost WAL.
    Behind(Edge),
}

/// On which side of the time everything ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    Before,
    After,
    Unknown(Edge),
}

impl Passage {
    pub fn new(time: Timestamp, exclusive: bool, anchors: Vec<Anchor>) -> Passage {
        let newest = Timestamp(i64::MIN);
        Passage { time, exclusive, phase: Phase::Unknown(Edge::Start), newest, anchors }
    }

    /// A transaction ended at `lsn`.
    pub fn end(&mut self, lsn: Lsn, time: Timestamp) -> Option<Passed> {
        self.look(lsn, time, !self.is_past(time), self.is_past(time))
    }

    /// A server said what its clock showed when WAL reached the claim's position.
    pub fn claim(&mut self, claim: &Claim) -> Option<Passed> {
        let until = claim.until();
        self.look(claim.lsn, until, claim.server_time <= self.time, self.is_past(until))
    }

    /// WAL is missing.
    pub fn gap(&mut self, gap: Span) {
        if self.phase != Phase::After {
            self.phase = Phase::Unknown(Edge::Gap(gap));
        }
    }

    /// After the last look, `lsn` being the end of everything.
    pub fn last(&self, lsn: Lsn) -> Last {
        match self.phase {
            Phase::Before => Last::Before,
            Phase::After => Last::After,
            Phase::Unknown(edge) if self.is_anchored(edge, lsn) => Last::Before,
            Phase::Unknown(edge) => Last::Unknown(edge),
        }
    }

    fn is_past(&self, time: Timestamp) -> bool {
        time > self.time || (self.exclusive && time == self.time)
    }

    fn look(&mut self, lsn: Lsn, shown: Timestamp, before: bool, past: bool) -> Option<Passed> {
        match self.phase {
            Phase::Unknown(_) if before => self.phase = Phase::Before,
            Phase::Unknown(edge) if past => {
                let anchored = self.is_anchored(edge, lsn);
                self.phase = Phase::After;
                self.newest = shown;
                return Some(if anchored { Passed::Here } else { Passed::Behind(edge) });
            }
            Phase::Before if past => {
                self.phase = Phase::After;
                self.newest = shown;
                return Some(Passed::Here);
            }
            Phase::After if before && self.newest.0.saturating_sub(shown.0) > INVERSION_MICROS_MAX => {
                self.phase = Phase::Before;
            }
            Phase::After => self.newest = self.newest.max(shown),
            Phase::Unknown(_) | Phase::Before => {}
        }
        None
    }

    /// Whether a backup that ended between the edge and `lsn` shows that the time was still to come.
    fn is_anchored(&self, edge: Edge, lsn: Lsn) -> bool {
        let from = match edge {
            Edge::Start => Lsn::ZERO,
            Edge::Gap(gap) => gap.end_lsn,
        };
        let mut between = self.anchors.iter().filter(|anchor| from <= anchor.lsn && anchor.lsn <= lsn);
        between.any(|anchor| anchor.time <= self.time)
    }
}
