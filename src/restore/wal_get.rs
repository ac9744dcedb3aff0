//! Answers PostgreSQL's `restore_command`.
//!
//! To PostgreSQL, exit status 1 means that the file does not exist, and then it ends recovery and promotes: so 1 is said
//! only when that is proven (the plan ends before it, it is not on the path, nobody ever stored such a history) or when the
//! server finds the file in `pg_wal`, where the restore put it. 0 is said only when the file is there, verified and of full
//! length. Everything else is 200, at which the server stops and says so.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::plan::PlannedSegment;
use super::spool::{Spool, WalState};
use super::target::FOLDER;
use super::wal::{self, SegmentFetcher};
use crate::pg::{SegmentName, TimelineId};
use crate::repository::layout::{self, Incarnation, WalName, prefix};
use crate::repository::{Repository, wal_object};
use crate::util::durable_fs;

/// Segments that are fetched beside the one asked for when no prefetcher runs.
const READ_AHEAD: usize = 3;
/// How long a segment that the prefetcher is fetching is waited for.
const PREFETCH_WAIT: Duration = Duration::from_secs(60);
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// What PostgreSQL asks for: `%f` and `%p`, in its data directory.
#[derive(Debug, Clone)]
pub struct WalGet {
    pub data_directory: PathBuf,
    pub file: String,
    pub destination: PathBuf,
}

/// The answer.
#[derive(Debug)]
pub enum Answer {
    /// The file is at the destination.
    Served,
    /// It cannot exist, or lies in `pg_wal` already; why.
    Absent(&'static str),
    Failed(anyhow::Error),
}

impl Answer {
    pub fn exit_status(&self) -> u8 {
        match self {
            Answer::Served => 0,
            Answer::Absent(_) => 1,
            Answer::Failed(_) => 200,
        }
    }
}

/// Which environment a restored directory belongs to, for whoever opens its repository.
pub fn environment_of(data_directory: &Path) -> io::Result<Option<String>> {
    Ok(WalState::load(&data_directory.join(FOLDER))?.map(|state| state.environment))
}

/// Answers one request. `open` opens the environment's repository; it is called only when the file does not lie ready.
pub async fn answer<F, R>(request: &WalGet, open: F) -> Answer
where
    F: FnOnce() -> R,
    R: Future<Output = anyhow::Result<Repository>>,
{
    match find(request, open).await {
        Ok(answer) => answer,
        Err(e) => Answer::Failed(e.context(format!("get {} for recovery", request.file))),
    }
}

async fn find<F, R>(request: &WalGet, open: F) -> anyhow::Result<Answer>
where
    F: FnOnce() -> R,
    R: Future<Output = anyhow::Result<Repository>>,
{
    let folder = request.data_directory.join(FOLDER);
    let state = WalState::load(&folder)?;
    let state = state.ok_or_else(|| {
        anyhow::anyhow!("{} is missing: this directory was not restored by pgrecall", folder.display())
    })?;
    if let Some(timeline) = request.file.strip_suffix(".history").and_then(TimelineId::from_hex) {
        return history(request, &state, timeline, open).await;
    }
    let Ok(name) = request.file.parse::<SegmentName>() else {
        return Ok(Answer::Absent("files of this kind are never stored"));
    };
    let Some(segment) = name.segment(state.segment_size) else {
        return Ok(Answer::Absent("the cluster has segments of another size"));
    };
    if let Some(reason) = state.absent(name, request)? {
        return Ok(Answer::Absent(reason));
    }
    let spool = Spool::of(&folder);
    spool.create()?;
    spool.write_asked(segment)?;
    if take(&spool, name, &state, request).await? {
        return Ok(Answer::Served);
    }
    let mut planned = state.planned(&folder, segment, READ_AHEAD)?.into_iter();
    let wanted = planned.next().filter(|p| p.segment == segment && p.timeline == name.timeline());
    let wanted = wanted.ok_or_else(|| anyhow::anyhow!("the plan has no line for this segment"))?;
    let repository = open().await?;
    let incarnation: Incarnation = state.incarnation.parse()?;
    let fetcher = SegmentFetcher::new(&repository, incarnation, state.segment_size);
    // Held while reading ahead: two that write one file of the spool would give it its name half written.
    let free = spool.lock()?;
    let ahead = if free.is_some() { planned.collect() } else { Vec::new() };
    // A request that PostgreSQL gave up may still run: each has a file of its own.
    let own = spool.segment(&format!("{name}.{}", std::process::id()));
    let (fetched, ()) = tokio::join!(fetcher.fetch(&wanted, &own), read_ahead(&fetcher, &spool, &state, ahead));
    fetched?;
    durable_fs::rename_unsynced(&own, &request.destination)?;
    Ok(Answer::Served)
}

impl WalState {
    /// Why a segment cannot be served: it does not exist for this recovery, or the server has it already.
    fn absent(&self, name: SegmentName, request: &WalGet) -> anyhow::Result<Option<&'static str>> {
        let Some(segment) = name.segment(self.segment_size) else { return Ok(Some("segments have another size")) };
        let in_pg_wal = request.data_directory.join("pg_wal").join(&request.file);
        let there = fs::metadata(&in_pg_wal).is_ok_and(|m| m.len() == self.segment_size.bytes());
        if self.left.contains(&request.file) && there {
            return Ok(Some("it lies in pg_wal"));
        }
        if segment.0 > self.last_segment {
            return Ok(Some("it is past the end of the plan"));
        }
        let own = self.path.iter().rev().find(|s| self.segment_size.segment_of(s.start_lsn) <= segment);
        if own.is_some_and(|s| s.timeline != name.timeline()) {
            return Ok(Some("the way to the target takes this segment from another timeline"));
        }
        anyhow::ensure!(segment.0 >= self.first_segment, "it lies before the start of the backup");
        // A name below this was never given to a recycled file: the server takes free names only.
        Ok((segment.0 < self.preloaded_before && there).then_some("it lies in pg_wal"))
    }
}

/// Moves a segment that lies ready to its place; waits for one that the prefetcher is about to bring.
async fn take(spool: &Spool, name: SegmentName, state: &WalState, request: &WalGet) -> anyhow::Result<bool> {
    let ready = spool.segment(&name.to_string());
    let fetching = wal::fetching_name(&ready);
    let begun = std::time::Instant::now();
    loop {
        match fs::metadata(&ready) {
            Ok(meta) if meta.len() == state.segment_size.bytes() => {
                // Moved, not linked: the server will recycle the file, and nobody else may hold it then.
                durable_fs::rename_unsynced(&ready, &request.destination)?;
                return Ok(true);
            }
            Ok(_) => fs::remove_file(&ready)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
        let coming = fetching.exists() && begun.elapsed() < PREFETCH_WAIT && spool.lock()?.is_none();
        if !coming {
            // It may have been finished between the two looks.
            if ready.exists() {
                continue;
            }
            return Ok(false);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Fetches the following segments into the spool; a failure matters to whoever asks for them later.
async fn read_ahead(fetcher: &SegmentFetcher, spool: &Spool, state: &WalState, ahead: Vec<PlannedSegment>) {
    let fetches = ahead.iter().filter(|p| p.segment.0 >= state.preloaded_before).map(|planned| async move {
        let path = spool.segment(&planned.name(state.segment_size).to_string());
        if !path.exists()
            && let Err(e) = fetcher.fetch(planned, &path).await
        {
            tracing::debug!(error = %e, "reading ahead failed");
        }
    });
    futures::future::join_all(fetches).await;
}

/// A history file: from `pg_wal`, where the restore put all that existed, or stored since.
async fn history<F, R>(request: &WalGet, state: &WalState, timeline: TimelineId, open: F) -> anyhow::Result<Answer>
where
    F: FnOnce() -> R,
    R: Future<Output = anyhow::Result<Repository>>,
{
    let known = request.data_directory.join("pg_wal").join(&request.file);
    match fs::read(&known) {
        Ok(content) => {
            durable_fs::write(&request.destination, &content, 0o600)?;
            return Ok(Answer::Served);
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e.into()),
    }
    if timeline == TimelineId(1) {
        return Ok(Answer::Absent("the first timeline has no history"));
    }
    let repository = open().await?;
    let incarnation: Incarnation = state.incarnation.parse()?;
    // Absence is believed when a second listing shows it too.
    for _ in 0..2 {
        for object in repository.store().list(&prefix::wal_timeline(incarnation, timeline)).await? {
            if let Some(WalName::History { timeline: found, hash }) = layout::parse_wal(&object.key, state.segment_size)
                && found == timeline
            {
                let content = wal_object::read_history(&repository, &object.key, hash).await?;
                durable_fs::write(&request.destination, &content, 0o600)?;
                return Ok(Answer::Served);
            }
        }
    }
    Ok(Answer::Absent("no history of this timeline was ever stored"))
}
