//! From a target, as a person says it, to a plan: which record on which timeline, from which backup, with which WAL.
//!
//! Reads what the repository holds, then follows the segments' indexes on the path in LSN order, most of them in short by
//! their roll-ups; one that is missing is made from its WAL on the way, and the open segment's always is. Writes nothing.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt};

use super::indexes::{Chunk, Indexes, Place, Seen};
use crate::error::{Code, Failure};
use crate::lineage::coverage::Claim;
use crate::lineage::moment::{ArchiveView, BackupPoint, Gap, Moment, Request, Search, Target, Unreachable};
use crate::lineage::{History, Path, StoredRanges};
use crate::pg::control_file::RecoveryParameters;
use crate::pg::{Lsn, SegmentNo, TimelineId};
use crate::repository::backup_object::BackupCommit;
use crate::repository::identity::{self, KnownIncarnation};
use crate::repository::index;
use crate::repository::{Key, Repository, RepositoryError, catalogue, coverage};
use crate::restore::gather::{Gathered, PlanRequest};
use crate::restore::{Plan, Stop};
use crate::wal::transactions::{Row, SegmentIndex};

/// Indexes that are read at the same time.
const READS_MAX: usize = 16;

/// What the repository holds, in the form in which moments are looked for.
pub struct Archive {
    repository: Repository,
    gathered: Gathered,
    history: History,
    stored: StoredRanges,
    followed: TimelineId,
    backups: Vec<BackupPoint>,
    claims: Vec<Claim>,
    gaps: Vec<Gap>,
}

impl Archive {
    /// Loads everything but the indexes.
    ///
    /// # Errors
    /// `NotFound` when no WAL was ever stored.
    pub async fn load(repository: &Repository, known: &KnownIncarnation) -> Result<Archive, Failure> {
        let gathered = Gathered::load(repository, known).await?;
        let size = known.identity.segment_size;
        let mut stored = StoredRanges::default();
        for object in &gathered.wal.ranges {
            let range = &object.range;
            stored.add(range.timeline, range.start_lsn(size), range.end_lsn(size));
        }
        let followed = gathered.wal.ranges.iter().map(|o| o.range.timeline).max();
        let followed = followed.ok_or_else(|| Failure::new(Code::NotFound, "find stored WAL: there is none"))?;
        let mut history = History::default();
        for timeline in stored.timelines() {
            history.add_root(timeline);
        }
        for (object, file) in &gathered.histories {
            let conflict = |e: crate::lineage::history::HistoryConflict| Failure::new(Code::Conflict, e.to_string());
            history.add(object.timeline, file.clone()).map_err(conflict)?;
        }
        let claims = load_claims(repository, known, &history).await?;
        let backups = gathered.backups.iter().map(backup_point).collect();
        let gaps = gathered.gaps.iter().map(noted_gap).collect();
        Ok(Archive { repository: repository.clone(), gathered, history, stored, followed, backups, claims, gaps })
    }

    pub fn view(&self) -> ArchiveView<'_> {
        ArchiveView {
            segment_size: self.gathered.known.identity.segment_size,
            history: &self.history,
            followed: self.followed,
            stored: &self.stored,
            backups: &self.backups,
            claims: &self.claims,
            gaps: &self.gaps,
        }
    }
}

async fn load_claims(
    repository: &Repository,
    known: &KnownIncarnation,
    history: &History,
) -> Result<Vec<Claim>, RepositoryError> {
    let mut claims = Vec::new();
    for timeline in history.timelines() {
        for claim in coverage::newest(repository, known.incarnation, timeline).await? {
            let coverage::Claim { timeline, server_time, lsn, margin_micros, run, .. } = claim;
            claims.push(Claim { timeline, clock: format!("{run:08x}"), server_time, lsn, margin_micros });
        }
    }
    Ok(claims)
}

fn noted_gap(found: &catalogue::Gap) -> Gap {
    let catalogue::Gap { timeline, start_lsn, end_lsn, .. } = *found;
    Gap { timeline, start_lsn, end_lsn }
}

fn backup_point(commit: &BackupCommit) -> BackupPoint {
    BackupPoint {
        id: commit.id.to_string(),
        timeline: commit.timeline,
        start_lsn: commit.start_lsn,
        stop_lsn: commit.stop_lsn,
        stop_time: commit.stopped_at,
    }
}

impl Archive {
    /// Finds the moment: follows the indexes on the path of the request.
    ///
    /// # Errors
    /// `UnreachableTarget` with the nearest moments that work.
    pub async fn moment(&self, request: &Request) -> Result<Moment, Failure> {
        Ok(self.find(request).await?)
    }

    async fn find(&self, request: &Request) -> Result<Moment, NoPlan> {
        let view = self.view();
        let mut search = Search::new(request, &view)?;
        let places = self.segments(search.path(), search.scan_from());
        let timelines = search.path().legs().iter().map(|leg| leg.timeline).collect();
        let indexes = self.list_indexes(timelines).await?;
        let reads = futures::stream::iter(indexes.chunks(&places)).map(|chunk| self.read_chunk(chunk, &indexes));
        let mut chunks = std::pin::pin!(reads.buffered(READS_MAX));
        while let Some(chunk) = chunks.try_next().await? {
            for (place, seen) in chunk {
                match seen {
                    Seen::Row(row) if search.wants(&row) => {
                        search.push(&self.index(indexes.key(place), place).await?);
                    }
                    seen => search.push(seen.index()),
                }
                if search.is_done() {
                    return Ok(search.finish()?);
                }
            }
        }
        Ok(search.finish()?)
    }

    async fn list_indexes(&self, timelines: Vec<TimelineId>) -> Result<Indexes, RepositoryError> {
        let known = &self.gathered.known;
        let mut all = Vec::new();
        for timeline in timelines {
            let size = known.identity.segment_size;
            all.push((timeline, index::list(&self.repository, known.incarnation, timeline, size).await?));
        }
        Ok(Indexes(all))
    }

    /// What a roll-up does not hold is read by itself.
    async fn read_chunk(&self, chunk: Chunk, indexes: &Indexes) -> Result<Vec<(Place, Seen)>, RepositoryError> {
        let size = self.gathered.known.identity.segment_size;
        let rows = match &chunk.rollup {
            Some(key) => index::read_rollup(&self.repository, key).await?.unwrap_or_default(),
            None => Vec::new(),
        };
        let mut rows: BTreeMap<SegmentNo, Row> =
            rows.into_iter().map(|row| (size.segment_of(row.index.start_lsn), row)).collect();
        let mut seen = Vec::with_capacity(chunk.places.len());
        for place in chunk.places {
            let found = match rows.remove(&place.0).filter(|row| row.index.timeline == place.1) {
                Some(row) => Seen::Row(row),
                None => Seen::Whole(self.index(indexes.key(place), place).await?),
            };
            seen.push((place, found));
        }
        Ok(seen)
    }

    /// Plans the way to a moment.
    ///
    /// # Errors
    /// As [`Plan::build`].
    pub fn plan(&self, environment: &str, moment: &Moment, lacks: &[String]) -> Result<Plan, Failure> {
        let exact = moment.stop;
        let stop =
            Stop { timeline: exact.timeline, lsn: exact.lsn, inclusive: exact.inclusive, end_lsn: moment.wal_end_lsn };
        let backup = moment.backup.parse().ok();
        let request = PlanRequest { environment, stop, backup: backup.as_ref(), lacks };
        self.gathered
            .plan(&request)
            .map_err(|e| Failure::new(Code::UnreachableTarget, format!("plan the restore: {e}")))
    }

    /// Adds to a plan what the WAL between its backup and its stop does beside changing blocks: the largest settings that it
    /// changes to, and the tablespaces that it makes. Indexes that are missing are made.
    async fn note_what_wal_does(&self, plan: &mut Plan) -> Result<(), RepositoryError> {
        let size = self.gathered.known.identity.segment_size;
        let Some(path) = self.history.path_to(plan.stop.timeline) else { return Ok(()) };
        let mut places = self.segments(&path, plan.backup.start_lsn);
        places.retain(|(segment, _)| segment.start_lsn(size) < plan.stop.end_lsn);
        let indexes = self.list_indexes(path.legs().iter().map(|leg| leg.timeline).collect()).await?;
        let reads = futures::stream::iter(indexes.chunks(&places)).map(|chunk| self.read_chunk(chunk, &indexes));
        let mut chunks = std::pin::pin!(reads.buffered(READS_MAX));
        let mut largest: Option<RecoveryParameters> = None;
        let replayed = plan.backup.start_lsn..plan.stop.end_lsn;
        while let Some(chunk) = chunks.try_next().await? {
            for index in chunk.iter().map(|(_, seen)| seen.index()) {
                for change in index.parameter_changes.iter().filter(|change| change.lsn < plan.stop.end_lsn) {
                    let needed = change.what.needed();
                    largest = Some(largest.map_or(needed.clone(), |largest| largest.raised_to(&needed)));
                }
                let made = index.made_tablespaces.iter().filter(|made| replayed.contains(&made.lsn));
                plan.made_tablespaces.extend(made.map(|made| made.what.path.clone()));
            }
        }
        plan.made_tablespaces.sort();
        plan.made_tablespaces.dedup();
        if let Some(largest) = largest {
            plan.raise(largest);
        }
        Ok(())
    }

    /// The indexes of a timeline's stored segments from the one that holds `from` on.
    pub(super) async fn indexes(&self, timeline: TimelineId, from: Lsn) -> Result<Vec<SegmentIndex>, Failure> {
        let size = self.gathered.known.identity.segment_size;
        let stored = index::list(&self.repository, self.gathered.known.incarnation, timeline, size).await?;
        let Some(path) = self.history.path_to(timeline) else { return Ok(Vec::new()) };
        let places = self.segments(&path, from).into_iter().filter(|(_, holder)| *holder == timeline);
        let reads = futures::stream::iter(places).map(|place| self.index(stored.segments.get(&place.0), place));
        Ok(reads.buffered(READS_MAX).try_collect().await?)
    }

    /// What the chosen backup says of its server's surroundings.
    pub fn backup(&self, id: &str) -> Option<&BackupCommit> {
        self.gathered.backups.iter().find(|b| b.id.as_str() == id)
    }

    /// The stored segments on `path` from the one that holds `from` on, in LSN order. The segment that holds a switch point
    /// comes twice, once for either timeline.
    fn segments(&self, path: &Path, from: Lsn) -> Vec<(SegmentNo, TimelineId)> {
        let size = self.gathered.known.identity.segment_size;
        let mut places = Vec::new();
        for leg in path.legs().iter().filter(|leg| leg.end_lsn > from) {
            for span in self.stored.spans(leg.timeline) {
                let start = span.start_lsn.max(leg.start_lsn).max(from);
                let end = span.end_lsn.min(leg.end_lsn);
                let mut segment = size.segment_of(start);
                while segment.start_lsn(size) < end {
                    places.push((segment, leg.timeline));
                    segment = segment.next();
                }
            }
        }
        places.dedup();
        places
    }

    /// Reads the index of a segment, or makes it.
    async fn index(&self, key: Option<&Key>, place: (SegmentNo, TimelineId)) -> Result<SegmentIndex, RepositoryError> {
        if let Some(key) = key
            && let Some(index) = index::read(&self.repository, key).await?
        {
            return Ok(index);
        }
        let (segment, timeline) = place;
        index::build(&self.repository, &self.gathered.known, timeline, segment, &self.gathered.wal.ranges).await
    }
}

/// A moment, the plan for it, and what it was found in.
pub type Located = (Moment, Plan, Archive);

/// Why there is no plan.
enum NoPlan {
    Unreachable(Unreachable),
    Failed(Failure),
}

/// The moment and the plan for it, in one incarnation. When something seems to be missing, everything is listed once more
/// before that is believed.
///
/// # Errors
/// `UnreachableTarget` with the nearest moments that work.
pub async fn plan(
    repository: &Repository,
    known: &KnownIncarnation,
    environment: &str,
    request: &Request,
) -> Result<Located, Failure> {
    Ok(plan_in(repository, known, environment, request).await?)
}

/// The moment and the plan for it, in whichever incarnation holds it, or in the one of this ordinal. Backups have names of
/// their own, and a time belongs to the incarnation that lived then; every other target is looked for in the newest one.
///
/// # Errors
/// As [`plan`]; also when several incarnations claim the time.
pub async fn plan_any(
    repository: &Repository,
    environment: &str,
    request: &Request,
    ordinal: Option<u32>,
) -> Result<Located, Failure> {
    let all = match ordinal {
        Some(_) => identity::list(repository).await?,
        None => identity::list_sound(repository).await?,
    };
    let ordinals = all.iter().map(|known| known.incarnation.ordinal.to_string()).collect::<Vec<_>>().join(", ");
    let Some(newest) = all.last() else {
        return Err(Failure::new(Code::NotFound, format!("plan a restore of {environment}: nothing is stored yet")));
    };
    if let Some(ordinal) = ordinal {
        let chosen = all.iter().find(|known| known.incarnation.ordinal == ordinal);
        let unknown = || format!("reach the target: there is no incarnation {ordinal}; there are {ordinals}");
        let chosen = chosen.ok_or_else(|| Failure::new(Code::UnreachableTarget, unknown()))?;
        return plan(repository, chosen, environment, request).await;
    }
    if !matches!(request.target, Target::Time(_) | Target::Backup(_)) {
        return plan(repository, newest, environment, request)
            .await
            .map_err(|failure| hint_at(failure, &ordinals, &all));
    }
    let mut found: Vec<(u32, Located)> = Vec::new();
    let mut refused: Vec<(&KnownIncarnation, Unreachable)> = Vec::new();
    for known in all.iter().rev() {
        match plan_in(repository, known, environment, request).await {
            Ok(located) => found.push((known.incarnation.ordinal, located)),
            Err(NoPlan::Unreachable(why)) => refused.push((known, why)),
            // An incarnation that was opened and never archived hides no other.
            Err(NoPlan::Failed(failure)) if failure.code == Code::NotFound && all.len() > 1 => {}
            Err(NoPlan::Failed(failure)) => return Err(failure),
        }
    }
    let torn = |(known, why): &(&KnownIncarnation, Unreachable)| {
        matches!(why, Unreachable::Ambiguous { .. }).then_some(known.incarnation.ordinal)
    };
    let claimed = found.iter().map(|(ordinal, _)| *ordinal).chain(refused.iter().filter_map(torn)).collect::<Vec<_>>();
    if claimed.len() > 1 {
        let claimed = claimed.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let message = format!("reach the target: several incarnations claim it: {claimed}");
        return Err(Failure::new(Code::UnreachableTarget, message).hint("Choose one with --incarnation ORDINAL."));
    }
    if let Some((_, located)) = found.pop() {
        return Ok(located);
    }
    match nearest_refusal(&request.target, refused) {
        Some(why) => Err(unreachable(why)),
        None => Err(Failure::new(Code::NotFound, "find stored WAL: there is none")),
    }
}

/// The refusal to show: that of the incarnation that lived at the time, else the newest's.
fn nearest_refusal(target: &Target, refused: Vec<(&KnownIncarnation, Unreachable)>) -> Option<Unreachable> {
    let lived = |known: &KnownIncarnation| match target {
        Target::Time(time) => known.identity.opened_at <= *time,
        _ => true,
    };
    let index = refused.iter().position(|(known, _)| lived(known)).unwrap_or(refused.len().saturating_sub(1));
    refused.into_iter().nth(index).map(|(_, why)| why)
}

/// Earlier pasts may hold what the newest one does not.
fn hint_at(failure: Failure, ordinals: &str, all: &[KnownIncarnation]) -> Failure {
    if failure.code != Code::UnreachableTarget || all.len() < 2 {
        return failure;
    }
    failure.hint(format!("Looked for in the newest incarnation; --incarnation names another ({ordinals})."))
}

async fn plan_in(
    repository: &Repository,
    known: &KnownIncarnation,
    environment: &str,
    request: &Request,
) -> Result<Located, NoPlan> {
    let mut again = true;
    loop {
        let archive = Archive::load(repository, known).await.map_err(NoPlan::Failed)?;
        let planned = match archive.find(request).await {
            Ok(moment) => archive.plan(environment, &moment, &[]).map(|plan| (moment, plan)).map_err(NoPlan::Failed),
            Err(error) => Err(error),
        };
        match planned {
            Ok((moment, mut plan)) => {
                archive.note_what_wal_does(&mut plan).await?;
                return Ok((moment, plan, archive));
            }
            Err(error) if error.may_be_stale() && again => again = false,
            Err(error) => return Err(error),
        }
    }
}

impl NoPlan {
    /// A listing may have been stale.
    fn may_be_stale(&self) -> bool {
        match self {
            NoPlan::Unreachable(_) => true,
            NoPlan::Failed(failure) => failure.code == Code::UnreachableTarget,
        }
    }
}

impl From<NoPlan> for Failure {
    fn from(error: NoPlan) -> Self {
        match error {
            NoPlan::Unreachable(why) => unreachable(why),
            NoPlan::Failed(failure) => failure,
        }
    }
}

impl From<Unreachable> for NoPlan {
    fn from(why: Unreachable) -> Self {
        NoPlan::Unreachable(why)
    }
}

impl From<RepositoryError> for NoPlan {
    fn from(error: RepositoryError) -> Self {
        NoPlan::Failed(error.into())
    }
}

fn unreachable(error: Unreachable) -> Failure {
    Failure::new(Code::UnreachableTarget, format!("reach the target: {error}"))
}

#[cfg(test)]
mod tests;
