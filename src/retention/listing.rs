//! Reads what the policy looks at: names and times of everything, and the few small objects that must be read.
//!
//! The store's clock is asked first, then WAL is listed, then marks: a backup that the listing does not show began after
//! that, and its WAL does not lie before the end that was seen.

use chrono::{DateTime, Utc};

use super::policy::{Decision, Rules, Window, is_ripe};
use super::seen::{CommitFacts, IntentFacts, Seen, SeenClaim, SeenPin};
use crate::lineage::History;
use crate::pg::{TimelineId, Timestamp};
use crate::repository::catalogue::{self, HistoryObject, WalObject};
use crate::repository::codec::Kind;
use crate::repository::identity::{self, KnownIncarnation};
use crate::repository::layout::{self, WalName, prefix};
use crate::repository::pin::{self, ListedPin};
use crate::repository::store::{Object, Store};
use crate::repository::{BackupId, Generation, Repository, RepositoryError, coverage, wal_object};

/// Every incarnation, oldest first, and the window of the environment.
#[derive(Debug, Clone)]
pub struct Listing {
    pub incarnations: Vec<Seen>,
    pub window: Option<Window>,
    /// Incarnations that have objects and no identity: nothing of theirs is looked at.
    pub lost: Vec<String>,
}

/// How to list.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    /// The store's clock, read before.
    pub now: DateTime<Utc>,
    pub window: chrono::TimeDelta,
}

impl Listing {
    /// Lists everything.
    ///
    /// # Errors
    /// As the store says; also when a commit object that a listing showed is gone: then everything is to be listed again.
    pub async fn load(repository: &Repository, asked: Asked) -> Result<Listing, RepositoryError> {
        let names = identity::names(repository).await?;
        let (mut incarnations, mut window) = (Vec::new(), None);
        let newest_is_lost = names.newest_lost().is_some();
        for (index, incarnation) in names.known.iter().enumerate() {
            let known = identity::load(repository, *incarnation).await?;
            let mut seen = list_incarnation(repository, &known, asked.now).await?;
            if index + 1 == names.known.len() && !newest_is_lost {
                window = find_window(repository, &seen, asked.window).await?;
            }
            list_backups(repository, &mut seen).await?;
            incarnations.push(seen);
        }
        let pins = pin::list(repository).await?;
        for seen in &mut incarnations {
            let own = pins.iter().filter(|pin| pin.name.incarnation == seen.incarnation);
            seen.pins = own.map(seen_pin).collect();
        }
        Ok(Listing { incarnations, window, lost: names.lost.iter().map(ToString::to_string).collect() })
    }

    /// Decides about each incarnation, in the same order.
    pub fn decide(&self, generation: Generation) -> Vec<Decision> {
        let newest = self.incarnations.len().saturating_sub(1);
        let decide = |(index, seen): (usize, &Seen)| {
            Decision::of(seen, &Rules { window: self.window, generation, is_current: index == newest })
        };
        self.incarnations.iter().enumerate().map(decide).collect()
    }
}

fn seen_pin(listed: &ListedPin) -> SeenPin {
    SeenPin { name: listed.name.clone(), pin: listed.pin.clone().ok() }
}

/// Calls `see` for every object below `prefix`.
pub(super) async fn each(store: &Store, prefix: &str, mut see: impl FnMut(Object)) -> Result<(), RepositoryError> {
    let mut pages = store.pages(prefix)?;
    while let Some(page) = pages.next().await? {
        page.into_iter().for_each(&mut see);
    }
    Ok(())
}

/// WAL, histories, claims, packs.
async fn list_incarnation(
    repository: &Repository,
    known: &KnownIncarnation,
    now: DateTime<Utc>,
) -> Result<Seen, RepositoryError> {
    let (incarnation, size) = (known.incarnation, known.identity.segment_size);
    let mut seen = Seen::new(incarnation, size, now);
    let mut histories = Vec::new();
    each(repository.store(), &prefix::wal(incarnation), |object| match layout::parse_wal(&object.key, size) {
        Some(WalName::Range(range)) => {
            let (key, bytes, last_modified) = (object.key, object.bytes, object.last_modified);
            seen.see_wal(&WalObject { range, key, bytes, last_modified });
        }
        Some(WalName::History { timeline, hash }) => {
            histories.push(HistoryObject { timeline, hash, key: object.key });
        }
        None => {}
    })
    .await?;
    each(repository.store(), &prefix::coverage(incarnation), |object| {
        if let Some(name) = layout::parse_coverage(&object.key) {
            seen.see_claim(SeenClaim { name, key: object.key, at: object.last_modified });
        }
    })
    .await?;
    each(repository.store(), &prefix::packs(incarnation), |object| {
        if let Some((id, _)) = layout::parse_pack(&object.key) {
            seen.see_pack(&id, object.bytes);
        }
    })
    .await?;
    seen.removed = catalogue::list_removed(repository, incarnation).await?;
    load_histories(repository, &mut seen, &histories).await?;
    Ok(seen)
}

async fn load_histories(
    repository: &Repository,
    seen: &mut Seen,
    objects: &[HistoryObject],
) -> Result<(), RepositoryError> {
    let mut history = History::default();
    let timelines: Vec<TimelineId> = seen.stored.timelines().collect();
    for timeline in &timelines {
        history.add_root(*timeline);
    }
    for object in objects {
        match wal_object::load_history(repository, &object.key, object.hash).await {
            Ok(file) => {
                if let Err(conflict) = history.add(object.timeline, file) {
                    seen.unsure.get_or_insert(conflict.to_string());
                }
            }
            Err(error) if error.is_corrupt() => {
                seen.unsure.get_or_insert(format!("the history of timeline {} is damaged", object.timeline));
            }
            Err(error) => return Err(error),
        }
    }
    let described = |timeline: &TimelineId| objects.iter().any(|object| object.timeline == *timeline);
    let mut without = timelines.iter().skip(1).filter(|timeline| timeline.0 != 1 && !described(timeline));
    if let Some(timeline) = without.next() {
        seen.unsure.get_or_insert(format!("the history of timeline {timeline} is missing"));
    }
    seen.history = history;
    Ok(())
}

/// The window ends at the newest claim that can be read and whose WAL is stored.
async fn find_window(
    repository: &Repository,
    seen: &Seen,
    length: chrono::TimeDelta,
) -> Result<Option<Window>, RepositoryError> {
    let path = seen.newest_timeline().and_then(|timeline| seen.history.path_to(timeline));
    let Some(path) = path else { return Ok(None) };
    for claim in seen.proven_claims(&path) {
        match repository.read_fact::<coverage::Claim>(&claim.key, Kind::Coverage).await {
            Ok(read) => {
                let until = Timestamp(read.server_time.0.saturating_sub(read.margin_micros));
                return Ok(Some(Window::new(until, claim.at.min(seen.now), length)));
            }
            Err(error) if error.is_corrupt() || error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Marks, and what the commit objects and intents say that count.
async fn list_backups(repository: &Repository, seen: &mut Seen) -> Result<(), RepositoryError> {
    let incarnation = seen.incarnation;
    for marks in catalogue::list_backup_marks(repository, incarnation).await? {
        seen.see_marks(&marks);
    }
    let ids: Vec<BackupId> = seen.backups.keys().cloned().collect();
    for id in &ids {
        let Some(backup) = seen.backups.get(id) else { continue };
        if is_ripe(backup, seen.now) || !backup.is_known() {
            continue;
        }
        let (has_commit, has_intent) = (backup.commit.is_some(), backup.intent.is_some());
        let mut base = None;
        if has_intent {
            let intent = readable(catalogue::load_intent(repository, incarnation, id).await)?;
            base = intent.as_ref().and_then(|intent| intent.base.clone());
            set_intent(seen, id, intent.as_ref().map(IntentFacts::of));
        }
        if has_commit {
            load_commit(repository, seen, id).await?;
        }
        if let Some(base) = base {
            load_base(repository, seen, &base).await?;
        }
    }
    Ok(())
}

/// What a commit object says, one at a time: it may be large.
async fn load_commit(repository: &Repository, seen: &mut Seen, id: &BackupId) -> Result<(), RepositoryError> {
    let commit = readable(catalogue::load_backup(repository, seen.incarnation, id).await)?;
    let facts = commit.as_ref().map(CommitFacts::of);
    if let Some(known) = seen.backups.get_mut(id).and_then(|backup| backup.commit.as_mut()) {
        known.facts = facts;
    }
    Ok(())
}

/// The base of a backup that is being taken counts although it was dropped.
async fn load_base(repository: &Repository, seen: &mut Seen, base: &BackupId) -> Result<(), RepositoryError> {
    match seen.backups.get(base) {
        Some(backup) if backup.commit.as_ref().is_some_and(|commit| commit.facts.is_none()) => {
            load_commit(repository, seen, base).await
        }
        _ => Ok(()),
    }
}

fn set_intent(seen: &mut Seen, id: &BackupId, facts: Option<IntentFacts>) {
    if let Some(known) = seen.backups.get_mut(id).and_then(|backup| backup.intent.as_mut()) {
        known.facts = facts;
    }
}

/// `None` for damaged content; one that is gone since it was listed ends the run.
fn readable<T>(read: Result<T, RepositoryError>) -> Result<Option<T>, RepositoryError> {
    match read {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_corrupt() => Ok(None),
        Err(error) => Err(error),
    }
}
