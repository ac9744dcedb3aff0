//! What may leave, what is kept, and why: pure.
//!
//! The window ends at the newest proven coverage and is as long as configured. On every path of timelines on which a moment
//! of the window lies, the newest whole backup that ended before the window leads to its oldest moment; what ended before
//! that one is needed by nobody. "Before the window" means so by the server's clock and by the store's, and by an hour: one
//! clock that jumped makes more be kept, never less. What cannot be read is kept, and nothing is built on it.
//!
//! Nothing is deleted because it may leave: an id is dropped first, and a day later, by the store's clock, what only dropped
//! ids reach may go. WAL stays from the oldest start of all backups and intents that were not dropped a day ago.
//!
//! Invariant: for every moment of the window for which a plan succeeds, one succeeds without all that may leave.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, TimeDelta, Utc};

use super::reason::{Reason, Verdict};
use super::seen::{CommitFacts, Seen, SeenBackup, SeenPin};
use crate::lineage::Path;
use crate::pg::{Lsn, SegmentNo, TimelineId, Timestamp};
use crate::repository::{BackupId, Generation, Incarnation};

/// How long what was dropped stays, because a restore may have listed it before.
pub const GRACE: TimeDelta = TimeDelta::hours(24);
/// An intent this old was abandoned.
pub const ABANDONED_AFTER: TimeDelta = TimeDelta::days(7);
/// What ended so long before the window surely ended before it.
const SETTLED: TimeDelta = TimeDelta::hours(1);
/// How far two clocks may differ.
pub const CLOCKS_DIFFER_MAX: TimeDelta = TimeDelta::minutes(5);

/// The recovery window of an environment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    pub start: Timestamp,
    /// The newest moment that is proven, by whichever of the two clocks is behind.
    pub end: Timestamp,
}

/// How to decide.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// `None` when no coverage is proven: then nothing leaves.
    pub window: Option<Window>,
    /// Who asks.
    pub generation: Generation,
    /// Whether this is the incarnation that is written now.
    pub is_current: bool,
}

/// WAL `[first, last]` of a timeline that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeptWal {
    pub first: SegmentNo,
    pub last: SegmentNo,
    pub why: Reason,
}

/// What becomes of everything of one incarnation.
#[derive(Debug, Clone)]
pub struct Decision {
    pub incarnation: Incarnation,
    pub(super) segment_size: crate::pg::SegmentSize,
    pub(super) window: Option<Window>,
    /// Of every id that is known. A `Remove` is to be marked and dropped; deleted is only what is ripe.
    pub fates: BTreeMap<BackupId, Verdict>,
    /// Dropped a grace ago: what nobody else reaches of them may be deleted.
    pub ripe: BTreeSet<BackupId>,
    /// Packs of ripe ids that others reach, and who.
    pub(super) reached: BTreeMap<(BackupId, u32), BackupId>,
    /// Commit objects of ripe ids that an intent builds on, and which.
    pub(super) bases: BTreeMap<BackupId, BackupId>,
    /// Why nothing is deleted at all.
    pub(super) hold: Option<Reason>,
    /// By timeline; a timeline that the listing did not show is not in it.
    pub wal: BTreeMap<TimelineId, Vec<KeptWal>>,
    pub(super) removed: BTreeMap<TimelineId, Lsn>,
    pub(super) pins: BTreeMap<String, Verdict>,
}

impl Window {
    /// The window that ends at the newest proven coverage, of which the store got proof at `proven_at`.
    pub fn new(covered_until: Timestamp, proven_at: DateTime<Utc>, length: TimeDelta) -> Window {
        let end = covered_until.min(proven_at.into());
        let micros = length.num_microseconds().unwrap_or(i64::MAX);
        Window { start: end.saturating_add_micros(micros.saturating_neg()), end }
    }

    /// Whether a time lies surely before the window.
    pub(super) fn is_past(&self, time: Timestamp) -> bool {
        self.is_past_by(time, SETTLED)
    }

    /// Whether nobody reads any more what has no mark of its own and whose newest moment this is.
    pub(super) fn is_long_past(&self, time: Timestamp) -> bool {
        self.is_past_by(time, GRACE)
    }

    fn is_past_by(&self, time: Timestamp, length: TimeDelta) -> bool {
        let micros = length.num_microseconds().unwrap_or(i64::MAX);
        time.saturating_add_micros(micros) <= self.start
    }
}

impl Decision {
    /// Decides about what a listing showed.
    pub fn of(seen: &Seen, rules: &Rules) -> Decision {
        let deciding = Deciding { seen, rules, living: living(seen, rules) };
        let ripe = seen.backups.iter().filter(|(_, backup)| is_ripe(backup, seen.now)).map(|(id, _)| id.clone());
        let mut decision = Decision {
            incarnation: seen.incarnation,
            segment_size: seen.segment_size,
            window: rules.window,
            fates: BTreeMap::new(),
            ripe: ripe.collect(),
            reached: BTreeMap::new(),
            bases: BTreeMap::new(),
            hold: deciding.hold(),
            wal: deciding.wal(),
            removed: seen.removed.clone(),
            pins: seen.pins.iter().map(|pin| (pin.name.to_string(), pin_fate(pin, seen))).collect(),
        };
        for (id, backup) in &seen.backups {
            decision.fates.insert(id.clone(), deciding.fate(id, backup));
            decision.note_reach(seen, id, backup);
        }
        decision
    }

    /// The ids that may be marked as leaving and, if another listing says the same, dropped.
    pub fn leaving(&self) -> impl Iterator<Item = (&BackupId, &Reason)> {
        self.fates.iter().filter_map(|(id, fate)| match fate {
            Verdict::Remove(why) => Some((id, why)),
            Verdict::Keep(_) => None,
        })
    }

    /// What an id that is not ripe reaches of those that are.
    fn note_reach(&mut self, seen: &Seen, id: &BackupId, backup: &SeenBackup) {
        if self.ripe.contains(id) {
            return;
        }
        let base = backup.intent.as_ref().and_then(|intent| intent.facts.as_ref()?.base.as_ref());
        let base_facts = base.and_then(|base| seen.backups.get(base)?.committed().map(|facts| (base, facts)));
        let mut note = |facts: &CommitFacts| {
            for (other, number) in facts.others.iter().filter(|(other, _)| self.ripe.contains(other)) {
                self.reached.insert((other.clone(), *number), id.clone());
            }
        };
        if let Some(facts) = backup.committed() {
            note(facts);
        }
        if let Some((_, facts)) = base_facts {
            note(facts);
        }
        if let Some(base) = base {
            self.bases.insert(base.clone(), id.clone());
        }
    }
}

/// Dropped a grace ago.
pub fn is_ripe(backup: &SeenBackup, now: DateTime<Utc>) -> bool {
    backup.dropped_at.is_some_and(|at| at.checked_add_signed(GRACE).is_some_and(|ripe_at| ripe_at <= now))
}

fn pin_fate(pin: &SeenPin, seen: &Seen) -> Verdict {
    match &pin.pin {
        None => Verdict::Keep(Reason::DamagedPin),
        Some(pin) => {
            let until = pin.until.to_chrono().and_then(|until| until.checked_add_signed(CLOCKS_DIFFER_MAX));
            match until.is_some_and(|until| until < seen.now) {
                true => Verdict::Remove(Reason::PinExpired(pin.until)),
                false => Verdict::Keep(Reason::PinHolds(pin.until)),
            }
        }
    }
}

/// A path of timelines on which moments of the window lie.
struct Living {
    path: Path,
    /// The backup that leads to the oldest moment.
    anchor: Option<(BackupId, Lsn)>,
}

fn living(seen: &Seen, rules: &Rules) -> Vec<Living> {
    let followed = seen.newest_timeline().filter(|_| rules.is_current);
    let lives = |timeline: &TimelineId| {
        let newest = seen.newest_moment(*timeline);
        let past = rules.window.zip(newest).is_some_and(|(window, newest)| window.is_long_past(newest));
        Some(*timeline) == followed || !past
    };
    let timelines = seen.stored.timelines().filter(lives);
    let paths = timelines.filter_map(|timeline| seen.history.path_to(timeline));
    paths.map(|path| Living { anchor: anchor(seen, rules, &path), path }).collect()
}

/// The newest whole backup on the path that surely ended before the window and that nobody is removing.
fn anchor(seen: &Seen, rules: &Rules, path: &Path) -> Option<(BackupId, Lsn)> {
    let window = rules.window?;
    let fits = |backup: &&SeenBackup| {
        let solid = backup.exists() && backup.leaving.is_empty();
        let Some((commit, facts)) = backup.commit.as_ref().zip(backup.committed()).filter(|_| solid) else {
            return false;
        };
        let past = window.is_past(facts.stopped_at) && window.is_past(commit.at.into());
        let packed = backup.packs == facts.own;
        past && packed
            && path.holds(facts.timeline, facts.stop_lsn)
            && seen.stored.contiguous_end_on(path, facts.start_lsn) >= facts.stop_lsn
    };
    let fitting = seen.backups.iter().filter(|(_, backup)| fits(backup));
    let placed = fitting.filter_map(|(id, backup)| Some((id, backup.committed()?)));
    let newest = placed.max_by_key(|(_, facts)| (facts.stop_lsn, facts.start_lsn));
    newest.map(|(id, facts)| (id.clone(), facts.stop_lsn))
}

struct Deciding<'a> {
    seen: &'a Seen,
    rules: &'a Rules,
    living: Vec<Living>,
}

impl Deciding<'_> {
    /// Something that is not understood, so that nobody knows what it needs.
    fn hold(&self) -> Option<Reason> {
        if let Some(why) = &self.seen.unsure {
            return Some(Reason::TimelinesUnknown(why.clone()));
        }
        if self.rules.window.is_none() {
            return Some(Reason::NoCoverage);
        }
        let unripe = self.seen.backups.iter().filter(|(_, backup)| !is_ripe(backup, self.seen.now));
        let reaches_unknown = |backup: &SeenBackup| {
            let intent = backup.intent.as_ref().map(|intent| intent.facts.as_ref());
            let base = intent.flatten().and_then(|facts| facts.base.as_ref());
            let base_unknown =
                base.is_some_and(|base| self.seen.backups.get(base).is_none_or(|b| b.committed().is_none()));
            match &backup.commit {
                Some(commit) => commit.facts.is_none() || base_unknown,
                None => intent == Some(None) || base_unknown,
            }
        };
        let mut unknown = unripe.filter(|(_, backup)| reaches_unknown(backup));
        unknown.next().map(|(id, _)| Reason::NeedsUnknown(id.clone()))
    }

    fn fate(&self, id: &BackupId, backup: &SeenBackup) -> Verdict {
        if let Some(dropped_at) = backup.dropped_at {
            return Verdict::Keep(Reason::Dropped(dropped_at));
        }
        let kept = match (&backup.commit, &backup.intent) {
            (Some(_), _) => self.backup_fate(id, backup),
            (None, Some(intent)) => {
                let old = intent.at.checked_add_signed(ABANDONED_AFTER).is_some_and(|then| then <= self.seen.now);
                let generation = intent.facts.as_ref().and_then(|facts| facts.generation);
                let earlier = generation.is_some_and(|generation| generation < self.rules.generation);
                if old || earlier { Verdict::Remove(Reason::Abandoned) } else { Verdict::Keep(Reason::BeingTaken) }
            }
            (None, None) => Verdict::Keep(Reason::Unclaimed),
        };
        match (self.pinned(id), kept) {
            (Some(pinned), Verdict::Remove(_)) => Verdict::Keep(pinned),
            (_, kept) => kept,
        }
    }

    fn pinned(&self, id: &BackupId) -> Option<Reason> {
        let of_it = self.seen.pins.iter().filter(|pin| pin.name.backup == *id);
        let mut holding = of_it.filter(|pin| matches!(pin_fate(pin, self.seen), Verdict::Keep(_)));
        holding.next().map(|held| match &held.pin {
            Some(pin) => Reason::Pinned { name: pin.name.clone(), until: pin.until },
            None => Reason::DamagedPin,
        })
    }

    fn backup_fate(&self, id: &BackupId, backup: &SeenBackup) -> Verdict {
        if let Some(why) = &self.seen.unsure {
            return Verdict::Keep(Reason::TimelinesUnknown(why.clone()));
        }
        let Some(window) = self.rules.window else { return Verdict::Keep(Reason::NoCoverage) };
        let Some(facts) = backup.committed() else {
            let old = backup.commit.as_ref().is_some_and(|commit| window.is_past(commit.at.into()));
            let without = self.living.iter().all(|living| living.anchor.is_some());
            let why = Reason::DamagedBackup;
            return if old && without { Verdict::Remove(why) } else { Verdict::Keep(why) };
        };
        let holds = |living: &&Living| living.path.holds(facts.timeline, facts.stop_lsn);
        let mut newer = None;
        for living in self.living.iter().filter(holds) {
            match &living.anchor {
                None => return Verdict::Keep(Reason::NoneBefore),
                Some((anchor, _)) if anchor == id => return Verdict::Keep(Reason::Oldest),
                Some((_, stop_lsn)) if facts.stop_lsn >= *stop_lsn => return Verdict::Keep(Reason::WithinWindow),
                Some((anchor, _)) => newer = Some(anchor.clone()),
            }
        }
        match newer {
            Some(anchor) => Verdict::Remove(Reason::BeforeWindow { instead: anchor }),
            // On a tail that nobody follows, and all of it older than the window.
            None if window.is_past(facts.stopped_at) => Verdict::Remove(Reason::OldTail),
            None => Verdict::Keep(Reason::WithinWindow),
        }
    }

    /// The WAL that is kept of each timeline.
    fn wal(&self) -> BTreeMap<TimelineId, Vec<KeptWal>> {
        let known = self.seen.stored.timelines().chain(self.seen.removed.keys().copied());
        let mut kept: BTreeMap<TimelineId, Vec<KeptWal>> = known.map(|timeline| (timeline, Vec::new())).collect();
        for need in self.needs() {
            for (timeline, wal) in need.of_each(self.seen.segment_size) {
                kept.entry(timeline).or_default().push(wal);
            }
        }
        kept
    }

    fn needs(&self) -> Vec<Need> {
        let starts: Vec<Start> = self.starts();
        let mut needs = Vec::new();
        for living in &self.living {
            needs.push(self.need_from_oldest(&living.path, &starts));
        }
        for start in &starts {
            let on_living = self.living.iter().any(|living| start.is_on(&living.path));
            if let Some(path) = self.seen.history.path_to(start.timeline).filter(|_| !on_living) {
                needs.push(self.need_from_oldest(&path, &starts));
            }
        }
        for pin in self.seen.pins.iter().filter(|pin| matches!(pin_fate(pin, self.seen), Verdict::Keep(_))) {
            let pinned = pin.pin.as_ref();
            let start = starts.iter().find(|start| start.id == pin.name.backup);
            let timeline = pinned.map(|pin| pin.timeline).or(start.map(|start| start.timeline));
            let path = timeline.and_then(|timeline| self.seen.history.path_to(timeline));
            if let Some((path, start)) = path.zip(start) {
                let to = pinned.map_or(Lsn::MAX, |pin| pin.end_lsn);
                needs.push(Need { path, from: start.lsn, to, why: Reason::ReplayOf(start.id.clone()) });
            }
        }
        needs
    }

    /// Where replay begins of all that was not dropped a grace ago.
    fn starts(&self) -> Vec<Start> {
        let unripe = self.seen.backups.iter().filter(|(_, backup)| !is_ripe(backup, self.seen.now));
        let start = |(id, backup): (&BackupId, &SeenBackup)| {
            let intent = || backup.intent.as_ref()?.facts.as_ref();
            match (&backup.commit, intent()) {
                (Some(commit), _) => {
                    commit.facts.as_ref().map(|facts| (facts.timeline, facts.start_lsn, facts.stop_lsn))
                }
                (None, Some(facts)) => Some((facts.timeline, facts.wal_lsn, facts.wal_lsn)),
                (None, None) => None,
            }
            .map(|(timeline, lsn, stop_lsn)| Start { id: id.clone(), timeline, lsn, stop_lsn })
        };
        unripe.filter_map(start).collect()
    }

    /// From the oldest start on the path on, never from behind the WAL that the listing showed: a backup that it did not show
    /// begins there or later. Everything when there is none.
    fn need_from_oldest(&self, path: &Path, starts: &[Start]) -> Need {
        let oldest = starts.iter().filter(|start| start.is_on(path)).min_by_key(|start| start.lsn);
        let seen_end = self.seen.stored.spans(path.timeline()).map(|span| span.end_lsn).max().unwrap_or(Lsn::ZERO);
        let (from, why) = match oldest {
            Some(start) => (start.lsn.min(seen_end), Reason::ReplayOf(start.id.clone())),
            None => (Lsn::ZERO, Reason::NoBackup),
        };
        Need { path: path.clone(), from, to: Lsn::MAX, why }
    }
}

/// Where the replay of a backup, or of one that is being taken, begins.
struct Start {
    id: BackupId,
    timeline: TimelineId,
    lsn: Lsn,
    stop_lsn: Lsn,
}

impl Start {
    /// A standby's intent names no position: it is on every path with its timeline.
    fn is_on(&self, path: &Path) -> bool {
        path.leg(self.timeline).is_some_and(|leg| self.stop_lsn <= leg.end_lsn)
    }
}

/// WAL `[from, to)` of a path.
struct Need {
    path: Path,
    from: Lsn,
    to: Lsn,
    why: Reason,
}

impl Need {
    /// In whole segments, with those on either side of a switch.
    fn of_each(&self, size: crate::pg::SegmentSize) -> Vec<(TimelineId, KeptWal)> {
        let mut all = Vec::new();
        for leg in self.path.legs() {
            let first = size.segment_of(self.from.max(leg.start_lsn));
            let last = size.segment_of(self.to.min(leg.end_lsn));
            if first <= last {
                all.push((leg.timeline, KeptWal { first, last, why: self.why.clone() }));
            }
        }
        all
    }
}
