//! What becomes of one object, by its name alone and the decision about its incarnation; pure.

use chrono::{DateTime, Utc};

use super::policy::Decision;
use super::reason::{Reason, Verdict};
use crate::pg::{Lsn, SegmentNo, TimelineId};
use crate::repository::layout::{self, BackupMark, WalName};
use crate::repository::store::Object;
use crate::repository::{BackupId, Key};

use Reason as R;
use Verdict::{Keep, Remove};

impl Decision {
    /// Whether an object of this incarnation is deleted now.
    pub fn judge(&self, object: &Object) -> Verdict {
        let (key, at) = (&object.key, object.last_modified);
        let folder = key.as_str().split('/').nth(1).unwrap_or_default();
        let judged = match folder {
            "wal" => self.judge_wal(object),
            "packs" => layout::parse_pack(key).map(|(id, number)| self.judge_pack(id, number)),
            "backups" => layout::parse_backup(key).map(|(id, mark)| self.judge_mark(id, &mark)),
            "index" => self.judge_index(key, at),
            "coverage" => {
                layout::parse_coverage(key).map(|name| self.judge_place(name.timeline, (name.lsn, name.lsn), at))
            }
            "gaps" => layout::parse_gap(key).map(|(timeline, start, end)| self.judge_place(timeline, (start, end), at)),
            "removed" => layout::parse_removed(key).map(|(timeline, lsn)| {
                let newest = self.removed.get(&timeline).is_none_or(|newest| lsn >= *newest);
                if newest { Keep(R::Record) } else { Remove(R::Superseded) }
            }),
            _ => None,
        };
        judged.unwrap_or(Keep(R::UnknownName))
    }

    /// Whether a pin of this incarnation has had its time.
    pub fn judge_pin(&self, key: &Key) -> Verdict {
        let name = layout::parse_pin(key).map(|name| name.to_string());
        let fate = name.and_then(|name| self.pins.get(&name));
        fate.cloned().unwrap_or(Keep(R::New))
    }

    /// From which position on each timeline's WAL stays, where some before it is stored and goes.
    pub fn removals(&self, first_stored: impl Fn(TimelineId) -> Option<Lsn>) -> Vec<(TimelineId, Lsn)> {
        if self.hold.is_some() {
            return Vec::new();
        }
        let mut removals = Vec::new();
        for (timeline, kept) in &self.wal {
            let Some(first) = kept.iter().map(|wal| wal.first).min() else { continue };
            let lsn = first.start_lsn(self.segment_size);
            let known = self.removed.get(timeline).copied().unwrap_or(Lsn::ZERO);
            if lsn > known && first_stored(*timeline).is_some_and(|stored| stored < lsn) {
                removals.push((*timeline, lsn));
            }
        }
        removals
    }

    fn judge_pack(&self, id: BackupId, number: u32) -> Verdict {
        if !self.ripe.contains(&id) {
            return self.judge_by_id(id);
        }
        if let Some(hold) = &self.hold {
            return Keep(hold.clone());
        }
        match self.reached.get(&(id.clone(), number)) {
            Some(by) => Keep(R::ReachedBy(by.clone())),
            None => Remove(R::Ripe(id)),
        }
    }

    fn judge_mark(&self, id: BackupId, mark: &BackupMark) -> Verdict {
        if *mark == BackupMark::Dropped {
            return Keep(R::DroppedMark);
        }
        if !self.ripe.contains(&id) {
            return self.judge_by_id(id);
        }
        if let Some(hold) = &self.hold {
            return Keep(hold.clone());
        }
        match self.bases.get(&id) {
            Some(by) if *mark == BackupMark::Commit => Keep(R::BaseOf(by.clone())),
            _ => Remove(R::Ripe(id)),
        }
    }

    fn judge_by_id(&self, id: BackupId) -> Verdict {
        Keep(match self.fates.get(&id) {
            Some(Keep(fate)) => R::OfBackup { id, fate: Box::new(fate.clone()) },
            Some(Remove(why)) => R::WillBeDropped { id, why: Box::new(why.clone()) },
            None => R::New,
        })
    }

    fn judge_wal(&self, object: &Object) -> Option<Verdict> {
        match layout::parse_wal(&object.key, self.segment_size)? {
            WalName::History { .. } => Some(Keep(R::Descent)),
            WalName::Range(range) => Some(self.judge_segment(range.timeline, range.segment, object.last_modified)),
        }
    }

    fn judge_segment(&self, timeline: TimelineId, segment: SegmentNo, at: DateTime<Utc>) -> Verdict {
        self.judge_span(timeline, (segment, segment), at)
    }

    fn judge_index(&self, key: &Key, at: DateTime<Utc>) -> Option<Verdict> {
        let (name, count) = match layout::parse_rollup(key) {
            Some((name, count, ..)) => (name, count),
            None => (layout::parse_index(key)?.0, 1),
        };
        let first = name.segment(self.segment_size)?;
        let last = SegmentNo(first.0.saturating_add(count.saturating_sub(1)));
        Some(self.judge_span(name.timeline(), (first, last), at))
    }

    /// What speaks of WAL from `start` to `end` stays as long as that does.
    fn judge_place(&self, timeline: TimelineId, (start, end): (Lsn, Lsn), at: DateTime<Utc>) -> Verdict {
        let size = self.segment_size;
        // A position between two segments speaks of the one before it.
        let first = size.segment_of(Lsn(start.0.saturating_sub(1)));
        self.judge_span(timeline, (first, size.segment_of(end).max(first)), at)
    }

    fn judge_span(&self, timeline: TimelineId, (first, last): (SegmentNo, SegmentNo), at: DateTime<Utc>) -> Verdict {
        if let Some(hold) = &self.hold {
            return Keep(hold.clone());
        }
        let Some(kept) = self.wal.get(&timeline) else { return Keep(R::New) };
        if let Some(wal) = kept.iter().find(|wal| first <= wal.last && wal.first <= last) {
            return Keep(wal.why.clone());
        }
        if kept.iter().any(|wal| last < wal.first) {
            return Remove(R::BeforeOldest);
        }
        // Past a fork, on a tail of which nothing is needed any more.
        match self.window.is_some_and(|window| window.is_long_past(at.into())) {
            true => Remove(R::OldTail),
            false => Keep(R::TailInWindow),
        }
    }
}
