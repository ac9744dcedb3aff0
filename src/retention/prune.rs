//! Carries out what the policy decides: mark, list again, drop; and what was dropped a grace ago, delete.
//!
//! Order of deletes: packs, claims, WAL, indexes, gaps, then commit objects, intents and marks of what is gone. Before WAL of
//! a timeline goes, up to where is recorded, so that its absence is nobody's loss.
//!
//! Cancel safety: the future may be dropped anywhere; another run goes on where this one was. A mark that is left behind
//! makes others count its backup as leaving, and is no longer needed once that is dropped.
//!
//! Errors: a store that is away ends the run. A delete that it refuses (no right, object lock) is counted and named, and
//! hinders nothing else.

use std::collections::BTreeMap;

use chrono::{DateTime, TimeDelta, Utc};
use futures::StreamExt;
use serde::Serialize;

use super::listing::{Asked, Listing};
use super::policy::{CLOCKS_DIFFER_MAX, Decision};
use super::reason::{Reason, Verdict};
use crate::pg::{Lsn, TimelineId};
use crate::repository::catalogue::{self, RemovalMark};
use crate::repository::layout::{self, BackupMark, prefix};
use crate::repository::store::{Object, StoreError};
use crate::repository::{BackupId, Generation, Incarnation, Key, Repository, RepositoryError, generation, probe};

/// After so many refusals one after the other, the rest of a folder is left for the next run.
const REFUSALS_MAX: u64 = 20;
/// Refusals that are told one by one.
const REFUSALS_SHOWN: usize = 5;

/// One prune of an environment.
pub struct Prune<'a> {
    pub repository: &'a Repository,
    pub generation: Generation,
    pub settings: Settings,
    /// This host's clock.
    pub clock: &'a (dyn Fn() -> DateTime<Utc> + Send + Sync),
}

#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How long every moment stays restorable.
    pub window: TimeDelta,
    pub deletes_at_once: usize,
}

impl Settings {
    pub fn new(window: std::time::Duration) -> Settings {
        Settings { window: TimeDelta::from_std(window).unwrap_or(TimeDelta::MAX), deletes_at_once: 16 }
    }
}

/// Who hears of a prune.
pub trait Observer: Send {
    /// What becomes of an object; a real prune tells only what it deletes.
    fn object(&mut self, _object: &Object, _verdict: &Verdict) {}
}

/// Nobody.
impl Observer for () {}

/// Some objects, in sum.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    pub objects: u64,
    pub bytes: u64,
}

/// A backup, or one that was begun, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    pub incarnation: String,
    pub backup: String,
    pub reason: String,
}

/// What a prune did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub window_start: Option<String>,
    pub window_end: Option<String>,
    pub dropped: Vec<Outcome>,
    /// Marked, and needed after all.
    pub taken_back: Vec<Outcome>,
    /// By the kind of object.
    pub removed: BTreeMap<String, Totals>,
    /// Only when everything was looked at.
    pub kept: BTreeMap<String, Totals>,
    pub refused: u64,
    pub refusals: Vec<String>,
    pub remarks: Vec<String>,
}

/// Why a prune did not go on.
#[derive(Debug, thiserror::Error)]
pub enum PruneError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("generation {newer} has taken over from generation {own}")]
    Superseded { own: Generation, newer: Generation },
    #[error("this host's clock says {local}, the store's says {store}")]
    ClocksDiffer { local: DateTime<Utc>, store: DateTime<Utc> },
    #[error("a backup that was listed is gone: somebody else is removing, and another run sees what is left")]
    Moved,
}

impl From<StoreError> for PruneError {
    fn from(error: StoreError) -> Self {
        PruneError::Repository(error.into())
    }
}

impl Report {
    /// The sum of what was removed.
    pub fn removed_total(&self) -> Totals {
        total(&self.removed)
    }

    pub fn kept_total(&self) -> Totals {
        total(&self.kept)
    }

    fn note(&mut self, listing: &Listing) {
        self.window_start = listing.window.map(|window| window.start.to_string());
        self.window_end = listing.window.map(|window| window.end.to_string());
        if listing.window.is_none() {
            self.remarks.push("no covered moment is proven, so nothing leaves".to_owned());
        }
        for lost in &listing.lost {
            self.remarks.push(format!("incarnation {lost} has lost its identity object: nothing of it is touched"));
        }
    }
}

fn total(by_kind: &BTreeMap<String, Totals>) -> Totals {
    by_kind.values().fold(Totals::default(), |sum, one| Totals {
        objects: sum.objects.saturating_add(one.objects),
        bytes: sum.bytes.saturating_add(one.bytes),
    })
}

fn count(into: &mut BTreeMap<String, Totals>, object: &Object) {
    let kind = kind_of(&object.key);
    let sum = into.entry(kind.to_owned()).or_default();
    sum.objects += 1;
    sum.bytes = sum.bytes.saturating_add(object.bytes);
}

/// The folder that says what an object is.
fn kind_of(key: &Key) -> &str {
    let mut parts = key.as_str().split('/');
    let first = parts.next().unwrap_or_default();
    match first.parse::<Incarnation>() {
        Ok(_) => parts.next().unwrap_or(first),
        Err(_) => first,
    }
}

impl Prune<'_> {
    /// Prunes.
    ///
    /// # Errors
    /// [`PruneError`]; what was done until then stays done, and another run goes on.
    pub async fn run(&self, observer: &mut dyn Observer) -> Result<Report, PruneError> {
        let mut report = Report::default();
        let (mut listing, mut decisions) = self.list(&mut report).await?;
        report.note(&listing);
        let mark = BackupMark::Leaving(format!("{}-{:08x}", self.generation, rand::random::<u32>()));
        let marked = self.mark(&decisions, &mark).await?;
        if !marked.is_empty() {
            (listing, decisions) = self.list(&mut Report::default()).await?;
            self.settle(&marked, &mark, &decisions, &mut report).await?;
        }
        for (seen, decision) in listing.incarnations.iter().zip(&decisions) {
            let first_stored = |timeline| seen.stored.spans(timeline).next().map(|span| span.start_lsn);
            self.purge(decision, first_stored, observer, &mut report).await?;
        }
        self.purge_pins(&decisions, observer, &mut report).await?;
        Ok(report)
    }

    /// Says of every object what the next prune would do with it, in the order of keys; changes nothing but a probe that asks
    /// the store for its time.
    ///
    /// # Errors
    /// As [`Prune::run`].
    pub async fn explain(&self, observer: &mut dyn Observer) -> Result<Report, PruneError> {
        let mut report = Report::default();
        let now = match probe::clock(self.repository.store()).await {
            Ok(clock) => clock.now,
            Err(error) => {
                report.remarks.push(format!("the store's clock cannot be asked, this host's is taken: {error}"));
                (self.clock)()
            }
        };
        self.check_clock(now)?;
        let listing = self.load(now).await?;
        report.note(&listing);
        let decisions = listing.decide(self.generation);
        for decision in &decisions {
            report.dropped.extend(decision.leaving().map(|(id, why)| outcome(decision.incarnation, id, why)));
        }
        let mut pages = self.repository.store().pages("")?;
        while let Some(page) = pages.next().await? {
            for object in page {
                let verdict = judge(&decisions, &object);
                count(if verdict.is_keep() { &mut report.kept } else { &mut report.removed }, &object);
                observer.object(&object, &verdict);
            }
        }
        Ok(report)
    }

    /// A listing, with the store's clock read before, and what it decides.
    async fn list(&self, report: &mut Report) -> Result<(Listing, Vec<Decision>), PruneError> {
        self.check_generation().await?;
        let clock = probe::clock(self.repository.store()).await?;
        self.check_clock(clock.now)?;
        if clock.keeps_versions {
            let remark = "the bucket keeps versions: what is deleted takes space until a rule of the bucket expires \
                          noncurrent versions";
            report.remarks.push(remark.to_owned());
        }
        let listing = self.load(clock.now).await?;
        let decisions = listing.decide(self.generation);
        Ok((listing, decisions))
    }

    async fn load(&self, now: DateTime<Utc>) -> Result<Listing, PruneError> {
        let asked = Asked { now, window: self.settings.window };
        match Listing::load(self.repository, asked).await {
            Err(error) if error.is_not_found() => Err(PruneError::Moved),
            listing => Ok(listing?),
        }
    }

    fn check_clock(&self, store: DateTime<Utc>) -> Result<(), PruneError> {
        let local = (self.clock)();
        match local.signed_duration_since(store).abs() > CLOCKS_DIFFER_MAX {
            true => Err(PruneError::ClocksDiffer { local, store }),
            false => Ok(()),
        }
    }

    async fn check_generation(&self) -> Result<(), PruneError> {
        match generation::newest(self.repository).await? {
            Some(newer) if newer > self.generation => Err(PruneError::Superseded { own: self.generation, newer }),
            _ => Ok(()),
        }
    }

    /// Announces what may leave.
    async fn mark(
        &self,
        decisions: &[Decision],
        mark: &BackupMark,
    ) -> Result<Vec<(Incarnation, BackupId)>, PruneError> {
        let mut marked = Vec::new();
        for decision in decisions {
            for (id, why) in decision.leaving() {
                self.check_generation().await?;
                self.write_mark(decision.incarnation, id, mark, why).await?;
                marked.push((decision.incarnation, id.clone()));
            }
        }
        Ok(marked)
    }

    /// Drops what may still leave now that everybody could see the announcement; takes the mark off what is needed.
    async fn settle(
        &self,
        marked: &[(Incarnation, BackupId)],
        mark: &BackupMark,
        decisions: &[Decision],
        report: &mut Report,
    ) -> Result<(), PruneError> {
        for (incarnation, id) in marked {
            let decision = decisions.iter().find(|decision| decision.incarnation == *incarnation);
            let fate = decision.and_then(|decision| decision.fates.get(id));
            match fate {
                Some(Verdict::Remove(why)) => {
                    self.check_generation().await?;
                    self.write_mark(*incarnation, id, &BackupMark::Dropped, why).await?;
                    report.dropped.push(outcome(*incarnation, id, why));
                }
                fate => {
                    let why = fate.map_or(Reason::New, |fate| fate.reason().clone());
                    report.taken_back.push(outcome(*incarnation, id, &why));
                }
            }
            self.delete_mark(*incarnation, id, mark, report).await?;
        }
        Ok(())
    }

    async fn write_mark(
        &self,
        incarnation: Incarnation,
        id: &BackupId,
        mark: &BackupMark,
        why: &Reason,
    ) -> Result<(), PruneError> {
        let content = self.content(why);
        Ok(catalogue::write_mark(self.repository, incarnation, id, (mark, &content)).await?)
    }

    fn content(&self, why: &Reason) -> RemovalMark {
        let written_at = (self.clock)().into();
        RemovalMark { generation: self.generation.to_string(), written_at, reason: why.to_string() }
    }

    /// A mark that the store does not let go makes its backup count as leaving: more is kept.
    async fn delete_mark(
        &self,
        incarnation: Incarnation,
        id: &BackupId,
        mark: &BackupMark,
        report: &mut Report,
    ) -> Result<(), PruneError> {
        let key = Key::backup(incarnation, id, mark);
        match self.repository.store().delete(&key).await {
            Err(error @ StoreError::Refused { .. }) => {
                note_refusal(report, &error);
                Ok(())
            }
            deleted => Ok(deleted?),
        }
    }

    async fn purge(
        &self,
        decision: &Decision,
        first_stored: impl Fn(TimelineId) -> Option<Lsn>,
        observer: &mut dyn Observer,
        report: &mut Report,
    ) -> Result<(), PruneError> {
        let incarnation = decision.incarnation;
        for removal in decision.removals(first_stored) {
            self.check_generation().await?;
            let content = self.content(&Reason::BeforeOldest);
            catalogue::write_removed(self.repository, incarnation, removal, &content).await?;
        }
        let folders = [
            prefix::packs(incarnation),
            prefix::coverage(incarnation),
            prefix::wal(incarnation),
            prefix::index(incarnation),
            prefix::gaps(incarnation),
            prefix::removed(incarnation),
            prefix::backups(incarnation),
        ];
        for folder in folders {
            self.purge_folder(&folder, |object| decision.judge(object), observer, report).await?;
        }
        Ok(())
    }

    async fn purge_pins(
        &self,
        decisions: &[Decision],
        observer: &mut dyn Observer,
        report: &mut Report,
    ) -> Result<(), PruneError> {
        self.purge_folder(prefix::PINS, |object| judge(decisions, object), observer, report).await
    }

    async fn purge_folder(
        &self,
        folder: &str,
        judge: impl Fn(&Object) -> Verdict,
        observer: &mut dyn Observer,
        report: &mut Report,
    ) -> Result<(), PruneError> {
        let store = self.repository.store();
        let mut pages = store.pages(folder)?;
        let mut refused_in_a_row = 0;
        while let Some(page) = pages.next().await? {
            let judged = page.into_iter().map(|object| (judge(&object), object));
            let doomed: Vec<(Verdict, Object)> = judged.filter(|(verdict, _)| !verdict.is_keep()).collect();
            if doomed.is_empty() {
                continue;
            }
            self.check_generation().await?;
            let deletes = futures::stream::iter(doomed).map(|(verdict, object)| async move {
                let deleted = store.delete(&object.key).await;
                (verdict, object, deleted)
            });
            let mut deletes = deletes.buffer_unordered(self.settings.deletes_at_once);
            while let Some((verdict, object, deleted)) = deletes.next().await {
                match deleted {
                    Ok(()) => {
                        refused_in_a_row = 0;
                        count(&mut report.removed, &object);
                        observer.object(&object, &verdict);
                    }
                    Err(error @ StoreError::Refused { .. }) => {
                        refused_in_a_row += 1;
                        note_refusal(report, &error);
                    }
                    Err(error) => return Err(error.into()),
                }
            }
            if refused_in_a_row >= REFUSALS_MAX {
                report
                    .remarks
                    .push(format!("the store refuses to delete in {folder}: the rest is left for the next prune"));
                return Ok(());
            }
        }
        Ok(())
    }
}

/// What the decisions say of any object of the environment.
fn judge(decisions: &[Decision], object: &Object) -> Verdict {
    if let Some(pin) = layout::parse_pin(&object.key) {
        let own = decisions.iter().find(|decision| decision.incarnation == pin.incarnation);
        return own.map_or(Verdict::Keep(Reason::New), |decision| decision.judge_pin(&object.key));
    }
    let first = object.key.as_str().split('/').next().unwrap_or_default();
    let own = decisions.iter().find(|decision| decision.incarnation.to_string() == first);
    match own {
        Some(decision) => decision.judge(object),
        None if ["format.json", "identity", "keys", "lease", "jobs", "audit", "incidents", "probe"]
            .contains(&first) =>
        {
            Verdict::Keep(Reason::Record)
        }
        None => Verdict::Keep(Reason::UnknownName),
    }
}

fn outcome(incarnation: Incarnation, id: &BackupId, why: &Reason) -> Outcome {
    Outcome { incarnation: incarnation.to_string(), backup: id.to_string(), reason: why.to_string() }
}

fn note_refusal(report: &mut Report, error: &StoreError) {
    report.refused += 1;
    if report.refusals.len() < REFUSALS_SHOWN {
        report.refusals.push(error.to_string());
    }
}
