//! Which segments a search must look into, and for which their row says as much.

use super::Search;
use crate::lineage::moment::Target;
use crate::wal::transactions::{Row, TransactionEnd};

impl Search<'_> {
    /// Whether the whole index of the segment is wanted next; else pushing the row's own index changes nothing.
    pub fn wants(&self, row: &Row) -> bool {
        if row.is_complete() {
            return false;
        }
        let index = &row.index;
        let (Some(first), Some(last)) = (index.ends.first(), index.ends.last()) else { return true };
        // Ends outside what is on the path, stored and still to be looked at do not count: which they are, only all tell.
        let end = index.last_record_end_lsn.unwrap_or(index.end_lsn).max(index.end_lsn);
        let on_path = self.reach.path.leg(index.timeline).is_some_and(|leg| leg.end_lsn >= end);
        let is_stored = self.reach.span_at(index.start_lsn).is_some_and(|span| span.end_lsn >= end);
        if index.start_lsn < self.position || !on_path || !is_stored {
            return true;
        }
        match &self.target {
            Target::Latest => false,
            Target::Lsn(lsn) => index.start_lsn <= *lsn && *lsn < end,
            Target::Xid(xid) => row.may_have(*xid),
            Target::Name(name) => index.restore_points.iter().any(|point| point.name == *name),
            Target::Backup(_) => {
                let start = self.named_backup.map(|backup| backup.start_lsn);
                index.backup_ends.iter().any(|end| Some(end.what) == start)
            }
            Target::Time(time) => {
                let is_past = |end: &TransactionEnd| end.time > *time || (self.exclusive && end.time == *time);
                let past = index.ends.iter().filter(|end| is_past(end)).count();
                // A clock that is looked at between them must be looked at in its place.
                let between = |lsn| first.lsn <= lsn && lsn <= last.lsn;
                (past > 0 && past < index.ends.len()) || self.reach.claims.iter().any(|claim| between(claim.lsn))
            }
        }
    }
}
