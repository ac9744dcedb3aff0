//! Brings planned WAL to disk: objects verified, put together to segments, padded with zeros to the segment's size.
//!
//! The first segments go to `pg_wal` under their names, up to a limit; PostgreSQL is given the rest by [`super::wal_get`].
//! A planned object that is gone is looked for again by its segment: a part may have been replaced by a whole.
//!
//! Memory: objects in flight are admitted against a budget of [`BUDGET_MIB`] by what decoding them costs.

use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::plan::{Plan, PlanError, PlannedObject, PlannedSegment};
use super::run::RestoreError;
use super::target::io_error;
use super::wal_plan::{self, StoredWal};
use super::write::write_sparse;
use crate::pg::{SegmentName, SegmentSize};
use crate::repository::catalogue::{self, WalListing};
use crate::repository::layout::{self, Key, WalName};
use crate::repository::{Incarnation, Repository, RepositoryError, wal_object};
use crate::util::durable_fs;

/// Segments that are put into `pg_wal` before PostgreSQL starts, as far as [`PG_WAL_BYTES_MAX`] allows.
const PG_WAL_SEGMENTS_MAX: u64 = 64;
const PG_WAL_BYTES_MAX: u64 = 2 << 30;
/// Memory for objects being decoded.
const BUDGET_MIB: usize = 128;
const OBJECTS_AT_ONCE: usize = 8;
const SEGMENTS_AT_ONCE: usize = 8;

/// How many planned segments go to `pg_wal` before the start.
pub fn preload_segments(size: SegmentSize) -> usize {
    let count = (PG_WAL_BYTES_MAX / size.bytes()).clamp(2, PG_WAL_SEGMENTS_MAX);
    usize::try_from(count).unwrap_or(2)
}

/// Most disk space that WAL takes at a time: `pg_wal`, and as much waiting beside it.
pub fn disk_bytes_max(size: SegmentSize) -> u64 {
    (preload_segments(size) as u64).saturating_mul(2).saturating_mul(size.bytes())
}

impl PlannedSegment {
    pub fn name(&self, size: SegmentSize) -> SegmentName {
        SegmentName::new(self.timeline, self.segment, size)
    }
}

/// Fetches segments; cheap to clone.
#[derive(Clone)]
pub struct SegmentFetcher {
    repository: Repository,
    incarnation: Incarnation,
    size: SegmentSize,
    budget: Arc<Semaphore>,
    writers: TaskTracker,
}

impl SegmentFetcher {
    pub fn new(repository: &Repository, incarnation: Incarnation, size: SegmentSize) -> Self {
        let budget = Arc::new(Semaphore::new(BUDGET_MIB));
        let writers = TaskTracker::new();
        SegmentFetcher { repository: repository.clone(), incarnation, size, budget, writers }
    }

    /// Writes among these, so that somebody can wait for all of them.
    pub(super) fn among(self, writers: &TaskTracker) -> Self {
        SegmentFetcher { writers: writers.clone(), ..self }
    }

    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Writes a segment to `path`, which has its full length and verified content once it has this name.
    pub async fn fetch(&self, planned: &PlannedSegment, path: &Path) -> Result<(), RestoreError> {
        match self.fetch_objects(&planned.objects, path).await {
            Err(RestoreError::Repository(e)) if e.is_not_found() => {
                tracing::info!(segment = %planned.name(self.size), error = %e, "a planned object is gone, looking again");
                let objects = self.look_again(planned).await?;
                self.fetch_objects(&objects, path).await
            }
            fetched => fetched,
        }
    }

    async fn fetch_objects(&self, objects: &[PlannedObject], path: &Path) -> Result<(), RestoreError> {
        let temporary = fetching_name(path);
        let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary);
        let file = Arc::new(open.map_err(io_error("create", &temporary))?);
        file.set_len(self.size.bytes()).map_err(io_error("set the length of", &temporary))?;
        let written = futures::stream::iter(objects.iter().map(Ok::<_, RestoreError>));
        let written = written.try_for_each_concurrent(OBJECTS_AT_ONCE, |object| {
            let (file, temporary) = (file.clone(), &temporary);
            async move {
                // Stored bytes, opened bytes when sealed, content.
                let cost =
                    object.stored_bytes.saturating_mul(2).saturating_add(object.to.saturating_sub(object.from)) >> 20;
                let cost = u32::try_from(cost.clamp(1, BUDGET_MIB as u64)).unwrap_or(1);
                let permit =
                    self.budget.clone().acquire_many_owned(cost).await.map_err(|_| RepositoryError::Stopping)?;
                let content = self.read(object).await?;
                let (from, to) = (object.use_from, object.use_to);
                let start = usize::try_from(from.saturating_sub(object.from)).unwrap_or(usize::MAX);
                let length = usize::try_from(to.saturating_sub(from)).unwrap_or(usize::MAX);
                let wrote = self.writers.spawn_blocking(move || {
                    let _permit = permit;
                    let bytes = content.get(start..start.saturating_add(length)).unwrap_or_default();
                    write_sparse(&file, from, bytes)
                });
                let wrote = wrote.await.map_err(|_| RepositoryError::Stopping)?;
                wrote.map_err(io_error("write", temporary))?;
                Ok(())
            }
        });
        let renamed = match written.await {
            Ok(()) => durable_fs::rename_unsynced(&temporary, path).map_err(|e| io_error("name", path)(e).into()),
            Err(e) => Err(e),
        };
        if renamed.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        renamed
    }

    async fn read(&self, object: &PlannedObject) -> Result<bytes::Bytes, RestoreError> {
        let key = Key::of_incarnation(self.incarnation, &object.key);
        let key = key.ok_or_else(|| RestoreError::Planned(object.key.clone()))?;
        let Some(WalName::Range(range)) = layout::parse_wal(&key, self.size) else {
            return Err(RestoreError::Planned(object.key.clone()));
        };
        let sound = range.from <= object.use_from && object.use_from <= object.use_to && object.use_to <= range.to;
        if !sound {
            return Err(RestoreError::Planned(object.key.clone()));
        }
        Ok(wal_object::read_range(&self.repository, &key, &range).await?)
    }

    /// Lists anew and covers the segment again; missing bytes are believed after a second listing.
    async fn look_again(&self, planned: &PlannedSegment) -> Result<Vec<PlannedObject>, RestoreError> {
        let covered = |listing: &WalListing| wal_plan::cover_again(&StoredWal::new(listing, self.size), planned);
        match covered(&self.list(planned).await?) {
            Err(PlanError::Hole { .. }) => Ok(covered(&self.list(planned).await?)?),
            decided => Ok(decided?),
        }
    }

    async fn list(&self, planned: &PlannedSegment) -> Result<WalListing, RepositoryError> {
        let mut listing = WalListing::default();
        for timeline in wal_plan::timelines_of(planned) {
            let one = catalogue::list_wal_timeline(&self.repository, self.incarnation, timeline, self.size).await?;
            listing.ranges.extend(one.ranges);
        }
        Ok(listing)
    }
}

/// While it is being fetched, a segment has this name.
pub fn fetching_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".fetching");
    path.with_file_name(name)
}

/// The planned segments that go to `pg_wal` before the start: the first ones, and every timeline's last.
pub fn preloaded(plan: &Plan) -> impl Iterator<Item = &PlannedSegment> {
    let end = preload_end(plan);
    plan.wal.iter().enumerate().filter(move |(index, s)| *index < end || s.left).map(|(_, s)| s)
}

/// Index of the first planned segment that is not in `pg_wal` from the beginning.
pub fn preload_end(plan: &Plan) -> usize {
    preload_segments(plan.segment_size).min(plan.wal.len())
}

/// Puts the first segments and all histories into `pg_wal`; the caller syncs.
pub async fn preload(
    fetcher: &SegmentFetcher,
    plan: &Plan,
    pg_wal: &Path,
    done: impl Fn(),
) -> Result<(), RestoreError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(pg_wal.join("archive_status"));
    made.map_err(io_error("make", pg_wal))?;
    let segments = futures::stream::iter(preloaded(plan));
    let fetched = segments.map(Ok).try_for_each_concurrent(SEGMENTS_AT_ONCE, |planned| async {
        let path = pg_wal.join(planned.name(plan.segment_size).to_string());
        fetcher.fetch(planned, &path).await?;
        done();
        Ok::<_, RestoreError>(())
    });
    fetched.await?;
    for history in &plan.histories {
        let key = Key::of_incarnation(fetcher.incarnation, &history.key);
        let key = key.ok_or_else(|| RestoreError::Planned(history.key.clone()))?;
        let Some(WalName::History { timeline, hash }) = layout::parse_wal(&key, plan.segment_size) else {
            return Err(RestoreError::Planned(history.key.clone()));
        };
        let content = wal_object::read_history(&fetcher.repository, &key, hash).await?;
        let path = pg_wal.join(timeline.history_name());
        durable_fs::write_unsynced(&path, &content, 0o600).map_err(io_error("write", &path))?;
    }
    Ok(())
}
