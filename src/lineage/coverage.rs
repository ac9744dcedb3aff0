//! Which moments of wall-clock time the stored WAL provably contains.
//!
//! A claim says: on this timeline, when the server's clock read S, WAL reached L, so that every transaction with a time up
//! to S minus a margin ends before L. Once all WAL up to L is stored, those times are covered, also when nothing happened.
//! A claim speaks for its own server's clock only: where another clock takes over, or a clock is set back, coverage begins
//! anew.

use super::history::Path;
use super::stored::Span;
use crate::pg::{Lsn, TimelineId, Timestamp};

/// What a primary said about its clock and its WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    pub timeline: TimelineId,
    /// Which run of which server's clock; claims with different runs are not compared.
    pub clock: String,
    /// The server's clock, read before `lsn` was asked for.
    pub server_time: Timestamp,
    pub lsn: Lsn,
    pub margin_micros: i64,
}

/// The newest moment that is proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Covered {
    pub until: Timestamp,
    /// The WAL that contains it.
    pub lsn: Lsn,
    pub clock: String,
}

impl Claim {
    /// Up to when all transactions are before `lsn`.
    pub fn until(&self) -> Timestamp {
        self.server_time.saturating_add_micros(self.margin_micros.saturating_neg())
    }
}

/// The claims that belong to the path and whose WAL is stored, in order of their positions. `claims` are in the order in
/// which they were made: it decides where several were made at one position.
pub fn proven<'c>(claims: &'c [Claim], path: &Path, stored: &[Span]) -> Vec<&'c Claim> {
    let is_proven =
        |claim: &&Claim| path.holds(claim.timeline, claim.lsn) && stored.iter().any(|span| span.reaches(claim.lsn));
    let mut proven: Vec<&Claim> = claims.iter().filter(is_proven).collect();
    proven.sort_by_key(|claim| (claim.timeline, claim.lsn));
    proven
}

/// The newest covered moment by the clock that ran last; `proven` as [`proven`] gives it.
pub fn covered_until(proven: &[&Claim]) -> Option<Covered> {
    let last = proven.last()?;
    let mut covered = Covered { until: last.until(), lsn: last.lsn, clock: last.clock.clone() };
    let mut after = *last;
    for claim in proven.iter().rev().skip(1) {
        // Another clock, or the same one before it was set back: its claims are about other times.
        if claim.clock != after.clock || claim.server_time > after.server_time {
            break;
        }
        if claim.until() > covered.until {
            covered.until = claim.until();
            covered.lsn = claim.lsn;
        }
        after = claim;
    }
    Some(covered)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(timeline: u32, clock: &str, second: i64, lsn: u64) -> Claim {
        Claim {
            timeline: TimelineId(timeline),
            clock: clock.to_owned(),
            server_time: Timestamp::from_unix_seconds(second),
            lsn: Lsn(lsn),
            margin_micros: 1_000_000,
        }
    }

    #[track_caller]
    fn check(claims: &[Claim], stored_end: u64, expected: Option<(i64, u64)>) {
        let path = Path::new(&"1\t0/100\tx\n".parse().expect("well formed"), TimelineId(2));
        let stored = [Span { start_lsn: Lsn(0x10), end_lsn: Lsn(stored_end) }];
        let covered = covered_until(&proven(claims, &path, &stored));
        let covered = covered.map(|covered| (covered.until.0 / 1_000_000, covered.lsn.0));
        assert_eq!(covered, expected);
    }

    #[test]
    fn what_is_stored_proves_a_claim() {
        let claims = [claim(1, "a", 10, 0x20), claim(1, "a", 70, 0x20), claim(1, "a", 130, 0x40)];
        check(&claims, 0x1F, None);
        check(&claims, 0x20, Some((69, 0x20)));
        check(&claims, 0x3F, Some((69, 0x20)));
        check(&claims, 0x40, Some((129, 0x40)));
    }

    #[test]
    fn claims_past_a_fork_belong_to_the_diverged_tail() {
        check(&[claim(1, "a", 10, 0x100), claim(1, "a", 70, 0x101)], 0x200, Some((9, 0x100)));
    }

    #[test]
    fn another_clock_begins_anew() {
        let claims = [claim(1, "a", 100, 0x100), claim(2, "b", 50, 0x110), claim(2, "b", 60, 0x120)];
        check(&claims, 0x200, Some((59, 0x120)));
    }

    #[test]
    fn a_clock_that_is_set_back_begins_anew() {
        let claims = [claim(1, "a", 100, 0x20), claim(1, "a", 50, 0x30), claim(1, "a", 60, 0x40)];
        check(&claims, 0x200, Some((59, 0x40)));
        check(&claims, 0x2F, Some((99, 0x20)));
        check(&[claim(1, "a", 100, 0x20), claim(1, "a", 50, 0x20)], 0x2F, Some((49, 0x20)));
    }
}
