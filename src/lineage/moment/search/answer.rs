//! What follows from everything that was seen.

use super::{Found, FoundPlace, Record, Search};
use crate::lineage::moment::clock::{Edge, Last};
use crate::lineage::moment::reach::Needs;
use crate::lineage::moment::unreachable::{Nearest, Place, Unreachable};
use crate::lineage::moment::{ExactStop, Moment, Target};
use crate::lineage::stored::Span;
use crate::pg::{Lsn, Timestamp};

/// Everything has been given: the answer.
impl Search<'_> {
    /// The moment, or why there is none.
    ///
    /// # Errors
    /// See [`Unreachable`].
    pub fn finish(mut self) -> Result<Moment, Unreachable> {
        let end_lsn = self.reach.end_lsn();
        self.finish_scan(end_lsn);
        match self.target.clone() {
            Target::Latest => {
                self.check_indexed_to_end()?;
                let found = self.after_last_record()?;
                self.check_not_behind_gap()?;
                self.moment(&found)
            }
            Target::Time(time) => self.finish_time(time, end_lsn),
            Target::Lsn(lsn) => self.finish_lsn(lsn),
            Target::Xid(xid) => self.finish_one(&format!("transaction {xid}")),
            Target::Name(name) => self.finish_one(&format!("restore point {name:?}")),
            Target::Backup(id) => self.finish_backup(&id),
        }
    }

    fn finish_scan(&mut self, end_lsn: Lsn) {
        if self.is_done() {
            return;
        }
        self.look_at_claims(end_lsn);
        self.settle_open(None);
        let reached = self.reach.span_at(self.position).map_or(self.position, |span| span.start_lsn);
        if self.position < end_lsn && !(self.is_tail && reached < self.position) {
            self.jump(end_lsn);
        }
    }

    fn finish_time(mut self, time: Timestamp, end_lsn: Lsn) -> Result<Moment, Unreachable> {
        let last = self.passage.as_ref().map_or(Last::After, |passage| passage.last(end_lsn));
        let mut open_end = None;
        match last {
            Last::After => {}
            Last::Before => {
                let covered = self.reach.covered().filter(|covered| covered.until >= time);
                open_end = Some(covered.is_some());
                if covered.is_some() {
                    self.check_indexed_to_end()?;
                    let found = self.after_last_record()?;
                    self.found.push(found);
                }
            }
            Last::Unknown(edge) => self.behind = Some(edge),
        }
        self.found.dedup_by_key(|found| found.excluded.map(|end| end.lsn));
        let ways = self.found.len() + usize::from(self.behind.is_some()) + usize::from(open_end == Some(false));
        if ways > 1 && !self.found.is_empty() {
            return Err(Unreachable::Ambiguous { candidates: self.found.iter().map(|f| self.place_of(f)).collect() });
        }
        if let Some(found) = self.found.first().cloned() {
            self.check_indexed_before(&found)?;
            return self.moment(&found);
        }
        match self.behind {
            Some(Edge::Gap(gap)) => Err(self.reach.in_gap(gap.start_lsn)),
            Some(Edge::Start) => Err(self.before_first_backup(time)),
            None => {
                self.check_indexed_to_end()?;
                Err(Unreachable::NotCovered { nearest: self.newest() })
            }
        }
    }

    fn finish_lsn(self, lsn: Lsn) -> Result<Moment, Unreachable> {
        let record = self.last_record.filter(|record| record.lsn >= lsn);
        let Some(record) = record else {
            let in_hole = self.reach.holes().iter().any(|hole| hole.start_lsn <= lsn && lsn < hole.end_lsn);
            if in_hole {
                return Err(self.reach.in_gap(lsn));
            }
            if !self.elsewhere.is_empty() {
                return Err(Unreachable::OnAnotherTimeline { timelines: self.elsewhere });
            }
            self.check_indexed_to_end()?;
            return Err(Unreachable::NotCovered { nearest: self.newest() });
        };
        if self.reach.span_at(lsn).is_none() {
            let first = self.reach.spans.first().map_or(Lsn::ZERO, |span| span.start_lsn);
            let before = lsn < first;
            return Err(if before { self.reach.before_backups(lsn) } else { self.reach.in_gap(lsn) });
        }
        let found = self.found.first();
        let (included, excluded) = match found {
            Some(found) => (found.included, found.excluded),
            None => (self.last_end, None),
        };
        let end_lsn = excluded.map_or(record.end_lsn, |end| end.end_lsn.min(record.end_lsn));
        let place = FoundPlace::At { lsn, end_lsn, inclusive: !self.exclusive, consistent_by: lsn };
        self.moment(&Found { place, included, excluded })
    }

    /// A target that stands in the WAL by name, once.
    fn finish_one(self, what: &str) -> Result<Moment, Unreachable> {
        match self.found.as_slice() {
            [found] => self.moment(found),
            [] => {
                self.check_indexed_to_end()?;
                if let Some(span) = self.unindexed.first() {
                    return Err(Unreachable::NotIndexed { span: *span, nearest: self.reach.nearest(span.start_lsn) });
                }
                Err(Unreachable::Unknown { what: what.to_owned(), timeline: self.reach.path.timeline() })
            }
            several => Err(Unreachable::Ambiguous { candidates: several.iter().map(|f| self.place_of(f)).collect() }),
        }
    }

    fn finish_backup(self, id: &str) -> Result<Moment, Unreachable> {
        let backup = self.reach.backups.iter().find(|(backup, _)| backup.id == id);
        let Some((backup, wal_end)) = backup.copied() else {
            let stop = self.named_backup.map_or(Lsn::ZERO, |backup| backup.stop_lsn);
            return Err(self.reach.in_gap(stop));
        };
        let next = self.last_record.filter(|record| record.lsn >= backup.stop_lsn && record.end_lsn <= wal_end);
        let (lsn, inclusive, wal_end_lsn) = match (self.found.first().map(|found| found.place), next, self.last_record)
        {
            (Some(FoundPlace::At { lsn, .. }), ..) => (lsn, true, backup.stop_lsn),
            // A backup of a standby has no record of its own for its end.
            (_, Some(next), _) => (backup.stop_lsn, false, next.end_lsn),
            (_, None, Some(last)) if (backup.stop_lsn..=wal_end).contains(&last.end_lsn) => {
                (last.lsn, true, last.end_lsn)
            }
            _ => {
                self.check_indexed_to_end()?;
                return Err(Unreachable::NotCovered { nearest: self.newest() });
            }
        };
        let (last_included, first_excluded) =
            self.found.first().map_or((None, None), |found| (found.included, found.excluded));
        let timeline = self.reach.stop_timeline(backup, lsn, wal_end_lsn);
        let (stop, wal_start_lsn) = (ExactStop { timeline, lsn, inclusive }, backup.start_lsn);
        Ok(Moment { stop, backup: backup.id.clone(), wal_start_lsn, wal_end_lsn, last_included, first_excluded })
    }

    fn after_last_record(&self) -> Result<Found, Unreachable> {
        let record = self.last_record.ok_or_else(|| {
            let span = Span { start_lsn: self.scan_from, end_lsn: self.reach.end_lsn() };
            Unreachable::NotIndexed { span, nearest: self.reach.nearest(span.start_lsn) }
        })?;
        let Record { lsn, end_lsn } = record;
        let place = FoundPlace::At { lsn, end_lsn, inclusive: true, consistent_by: end_lsn };
        Ok(Found { place, included: self.last_end, excluded: None })
    }

    fn moment(&self, found: &Found) -> Result<Moment, Unreachable> {
        let FoundPlace::At { lsn, end_lsn, inclusive, consistent_by } = found.place else {
            return Err(Unreachable::NotCovered { nearest: self.newest() });
        };
        let backup = self.reach.backup_for(Needs { consistent_by, wal_end: end_lsn })?;
        Ok(Moment {
            stop: ExactStop { timeline: self.reach.stop_timeline(backup, lsn, end_lsn), lsn, inclusive },
            backup: backup.id.clone(),
            wal_start_lsn: backup.start_lsn,
            wal_end_lsn: end_lsn.max(backup.stop_lsn),
            last_included: found.included,
            first_excluded: found.excluded,
        })
    }

    fn place_of(&self, found: &Found) -> Place {
        let lsn = match found.place {
            FoundPlace::At { lsn, .. } => lsn,
            FoundPlace::BeforeNextEnd => self.position,
        };
        self.reach.place(lsn, found.excluded.or(found.included).map(|end| end.time))
    }

    /// The newest moment that can be reached.
    fn newest(&self) -> Nearest {
        let by_claim = self.reach.covered().map(|covered| self.reach.place(covered.lsn, Some(covered.until)));
        let by_record = self.last_record.map(|record| self.reach.place(record.lsn, self.last_end.map(|end| end.time)));
        Nearest { earlier: by_claim.or(by_record), later: None }
    }

    fn before_first_backup(&self, time: Timestamp) -> Unreachable {
        let first = self.reach.backups.first().map_or(Lsn::ZERO, |(backup, _)| backup.stop_lsn);
        let inside = self.reach.claims.iter().rfind(|claim| claim.lsn < first && claim.server_time <= time);
        let lsn = inside.map_or(Lsn::ZERO, |claim| claim.lsn);
        self.reach.before_backups(lsn)
    }

    /// The last stored WAL is behind a hole, and no backup lies behind it yet.
    fn check_not_behind_gap(&self) -> Result<(), Unreachable> {
        let reached = self.reach.backups.iter().map(|(_, end)| *end).max().unwrap_or(Lsn::ZERO);
        if reached < self.reach.end_lsn() { Err(self.reach.in_gap(reached)) } else { Ok(()) }
    }

    fn check_indexed_before(&self, found: &Found) -> Result<(), Unreachable> {
        // Where no end follows, that must be known of all WAL that follows.
        let to = match (found.place, found.excluded) {
            (FoundPlace::BeforeNextEnd, _) => Lsn::MAX,
            (FoundPlace::At { .. }, Some(end)) => end.lsn,
            (FoundPlace::At { lsn, .. }, None) => self.reach.span_at(lsn).map_or(lsn, |span| span.end_lsn),
        };
        match self.unindexed.iter().find(|span| span.start_lsn < to) {
            Some(span) => Err(Unreachable::NotIndexed { span: *span, nearest: self.reach.nearest(span.start_lsn) }),
            None => Ok(()),
        }
    }

    fn check_indexed_to_end(&self) -> Result<(), Unreachable> {
        match self.unindexed.iter().find(|span| span.end_lsn >= self.reach.end_lsn()) {
            Some(span) => Err(Unreachable::NotIndexed { span: *span, nearest: self.reach.nearest(span.start_lsn) }),
            None => Ok(()),
        }
    }
}
