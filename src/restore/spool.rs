//! WAL that waits for replay: what `wal-get` must know without the repository, and the prefetcher that fills the spool.
//!
//! Below `pgrecall_restore`: `wal.json` (which segment of which timeline belongs to the plan), `segments.jsonl` (the
//! planned objects, a line a segment) and `spool-<boot>/`, verified segments on the file system of `pg_wal`. A spool of an
//! earlier boot is ignored: its files were not synced. `asked` in it says what PostgreSQL asked for last, so that the
//! prefetcher skips what is not needed any more.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::plan::{PathStep, Plan, PlannedSegment};
use super::target::{TargetError, io_error};
use super::wal::{self, SegmentFetcher};
use crate::pg::{SegmentNo, SegmentSize};
use crate::util::durable_fs;

const STATE_FILE: &str = "wal.json";
const SEGMENTS_FILE: &str = "segments.jsonl";
const ASKED_FILE: &str = "asked";
const LOCK_FILE: &str = "lock";
/// Segments fetched at a time by the prefetcher.
const FETCHES_AT_ONCE: usize = 4;
/// How often the prefetcher looks at what was consumed.
const LOOK_INTERVAL: Duration = Duration::from_millis(20);
/// After a failure, the prefetcher waits so long: `wal-get` fetches by itself meanwhile and reports what is wrong.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);

/// What `wal-get` knows of the plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WalState {
    pub environment: String,
    pub incarnation: String,
    pub segment_size: SegmentSize,
    pub path: Vec<PathStep>,
    pub first_segment: u64,
    pub last_segment: u64,
    /// Planned segments before this one lie in `pg_wal` from the beginning.
    pub preloaded_before: u64,
    /// Segments on timelines that were left, which lie in `pg_wal`, too.
    pub left: Vec<String>,
}

/// Writes what `wal-get` needs into the folder `pgrecall_restore`; the caller syncs.
pub fn write_state(folder: &Path, plan: &Plan) -> Result<(), TargetError> {
    let own = || plan.wal.iter().filter(|s| !s.left);
    let first = own().next().map_or(0, |s| s.segment.0);
    let last = own().next_back().map_or(0, |s| s.segment.0);
    let preloaded_before =
        plan.wal.iter().skip(wal::preload_end(plan)).find(|s| !s.left).map_or(last.saturating_add(1), |s| s.segment.0);
    let state = WalState {
        environment: plan.environment.clone(),
        incarnation: plan.incarnation.clone(),
        segment_size: plan.segment_size,
        path: plan.path.clone(),
        first_segment: first,
        last_segment: last,
        preloaded_before,
        left: plan.wal.iter().filter(|s| s.left).map(|s| s.name(plan.segment_size).to_string()).collect(),
    };
    let path = folder.join(STATE_FILE);
    let bytes = serde_json::to_vec_pretty(&state).expect("a state has only text keys");
    durable_fs::write_unsynced(&path, &bytes, 0o600).map_err(io_error("write", &path))?;
    let path = folder.join(SEGMENTS_FILE);
    let lines = own().flat_map(crate::repository::backup_object::line).collect::<Vec<u8>>();
    durable_fs::write_unsynced(&path, &lines, 0o600).map_err(io_error("write", &path))
}

impl WalState {
    /// `None` when this is not a directory of ours.
    pub fn load(folder: &Path) -> io::Result<Option<WalState>> {
        match fs::read(folder.join(STATE_FILE)) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The plan's lines for `segment` and up to `more` that follow it.
    pub fn planned(&self, folder: &Path, segment: SegmentNo, more: usize) -> io::Result<Vec<PlannedSegment>> {
        let skip = usize::try_from(segment.0.saturating_sub(self.first_segment)).unwrap_or(usize::MAX);
        let lines =
            BufReader::new(File::open(folder.join(SEGMENTS_FILE))?).lines().skip(skip).take(more.saturating_add(1));
        lines.map(|line| serde_json::from_str(&line?).map_err(io::Error::other)).collect()
    }
}

/// The spool of this boot.
#[derive(Debug, Clone)]
pub struct Spool {
    directory: PathBuf,
}

impl Spool {
    pub fn of(folder: &Path) -> Spool {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let boot: String = boot.chars().filter(char::is_ascii_hexdigit).take(12).collect();
        Spool { directory: folder.join(format!("spool-{boot}")) }
    }

    pub fn create(&self) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.directory)
    }

    pub fn segment(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Says what PostgreSQL asks for.
    pub fn write_asked(&self, segment: SegmentNo) -> io::Result<()> {
        let temporary = self.directory.join(format!("{ASKED_FILE}.new"));
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
        file.write_all(segment.0.to_string().as_bytes())?;
        durable_fs::rename_unsynced(&temporary, &self.directory.join(ASKED_FILE))
    }

    fn asked(&self) -> SegmentNo {
        let text = fs::read_to_string(self.directory.join(ASKED_FILE)).unwrap_or_default();
        SegmentNo(text.trim().parse().unwrap_or(0))
    }

    /// Held by whoever fetches into the spool, while it does; `None` when somebody else holds it.
    pub fn lock(&self) -> io::Result<Option<File>> {
        let path = self.directory.join(LOCK_FILE);
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(file)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// Keeps the spool filled ahead of replay.
pub struct Prefetcher {
    fetcher: SegmentFetcher,
    spool: Spool,
    size: SegmentSize,
    /// Planned segments that are not in `pg_wal` from the beginning.
    waiting: Vec<PlannedSegment>,
}

impl Prefetcher {
    pub fn new(fetcher: SegmentFetcher, plan: &Plan, folder: &Path) -> Self {
        let waiting = plan.wal.iter().skip(wal::preload_end(plan)).filter(|s| !s.left).cloned().collect();
        Prefetcher { fetcher, spool: Spool::of(folder), size: plan.segment_size, waiting }
    }

    /// Runs until all is fetched or `cancel` fires. A failure is logged and tried again: `wal-get` does not depend on this.
    ///
    /// Cancel safety: dropping this future loses nothing but the fetches in flight.
    pub async fn run(self, cancel: CancellationToken) -> io::Result<()> {
        self.spool.create()?;
        let Some(_lock) = self.lock(&cancel).await? else { return Ok(()) };
        let ahead_max = wal::preload_segments(self.size);
        let mut next = 0;
        let mut running = FuturesUnordered::new();
        loop {
            let asked = self.spool.asked();
            let done = self.waiting.partition_point(|s| s.segment <= asked);
            next = next.max(done);
            // What lies ready and is behind what was asked for will not be asked for again.
            let ready = self.forget_before(asked)?;
            while running.len() < FETCHES_AT_ONCE && ready + running.len() < ahead_max {
                let Some(planned) = self.waiting.get(next) else { break };
                running.push(self.fetch(planned));
                next += 1;
            }
            if running.is_empty() && next >= self.waiting.len() {
                return Ok(());
            }
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Ok(()),
                Some(fetched) = running.next(), if !running.is_empty() => {
                    if let Err((segment, e)) = fetched {
                        tracing::warn!(error = %e, "prefetch of WAL failed, will retry");
                        next = self.waiting.partition_point(|s| s.segment < segment).min(next);
                        tokio::time::sleep(FAILURE_PAUSE).await;
                    }
                }
                () = tokio::time::sleep(LOOK_INTERVAL) => {}
            }
        }
    }

    /// `wal-get` tries the lock for an instant to see whether somebody prefetches, and holds it while it reads ahead.
    async fn lock(&self, cancel: &CancellationToken) -> io::Result<Option<File>> {
        while !cancel.is_cancelled() {
            if let Some(lock) = self.spool.lock()? {
                return Ok(Some(lock));
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
        Ok(None)
    }

    async fn fetch(&self, planned: &PlannedSegment) -> Result<(), (SegmentNo, super::run::RestoreError)> {
        let path = self.spool.segment(&planned.name(self.size).to_string());
        if path.exists() {
            return Ok(());
        }
        self.fetcher.fetch(planned, &path).await.map_err(|e| (planned.segment, e))
    }

    /// Removes segments before `asked`; returns how many are left.
    fn forget_before(&self, asked: SegmentNo) -> io::Result<usize> {
        let mut ready = 0;
        for entry in fs::read_dir(&self.spool.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let Ok(name) = name.to_string_lossy().parse::<crate::pg::SegmentName>() else { continue };
            match name.segment(self.size) {
                Some(segment) if segment < asked => {
                    let _ = fs::remove_file(entry.path());
                }
                _ => ready += 1,
            }
        }
        Ok(ready)
    }
}
