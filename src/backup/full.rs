//! A full backup, from its intent to the moment at which it is visible.
//!
//! Order: the intent, with the WAL position before it; a listing; the database backup, refused at its first row when the
//! WAL from there on is not stored; packs and tables; the comparison with the server's manifest; `[start, stop]` stored
//! without a hole; the generation and another listing; the commit object; a last listing, before success is reported.
//! Whatever fails or is cancelled before the commit object leaves an intent and packs that nothing names: a prune removes
//! them.

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::error::BackupError;
use super::packer::{PackSettings, Packed, pack};
use super::packs::Destination;
use super::source::{Source, SourcePosition, SourceStart};
use crate::pg::{Lsn, Major, SegmentSize, TimelineId, Timestamp};
use crate::repository::backup_object::{BackupCommit, BackupIntent, Surroundings, Totals};
use crate::repository::format::FORMAT_VERSION;
use crate::repository::layout::{BackupMark, prefix};
use crate::repository::{BackupId, Generation, Incarnation, Repository, catalogue, generation};
use crate::util::clock;

/// How often a running backup asks whether another writer has taken over.
const GENERATION_PERIOD: Duration = Duration::from_secs(10);

/// What a backup asks the archive.
#[async_trait]
pub trait StoredWal: Send + Sync {
    /// Whether `lsn` is not before the contiguous stored WAL that archiving now extends on `timeline`. It may lie a little
    /// past its end: what is between will be stored before what comes after.
    async fn covers(&self, timeline: TimelineId, lsn: Lsn) -> anyhow::Result<bool>;

    /// Returns when `[start_lsn, stop_lsn)` is stored without a hole; an error when it never will be.
    async fn wait_stored(&self, timeline: TimelineId, start_lsn: Lsn, stop_lsn: Lsn) -> anyhow::Result<()>;
}

/// What a backup asks the server by SQL; without it those facts are missing from the backup.
#[async_trait]
pub trait ServerFacts: Send + Sync {
    /// Never fails: what cannot be read stands in `not_readable`.
    async fn surroundings(&self) -> Surroundings;

    /// The server's clock.
    async fn now(&self) -> Option<Timestamp>;
}

/// Everything but the collaborators.
pub struct FullBackup {
    pub repository: Repository,
    pub incarnation: Incarnation,
    pub generation: Generation,
    pub major: Major,
    /// As the server says it, such as `18.4`.
    pub server_version: String,
    pub segment_size: SegmentSize,
    pub settings: BackupSettings,
}

/// Limits.
#[derive(Debug, Clone)]
pub struct BackupSettings {
    /// Compressing threads; each holds up to 10 MiB.
    pub threads: usize,
    /// Packs being stored at once; each holds 17 MiB.
    pub uploads_max: usize,
    /// Where the list of files is sorted when it is long; about 250 bytes a file.
    pub scratch: PathBuf,
    /// How long the WAL of a finished copy may need to be stored.
    pub wal_wait_max: Duration,
}

/// Who a backup works with.
pub struct Collaborators<'a> {
    pub source: &'a mut dyn Source,
    pub wal: &'a dyn StoredWal,
    pub facts: Option<&'a dyn ServerFacts>,
    pub progress: ProgressSender,
    pub cancel: CancellationToken,
}

/// Takes progress; [`watch::Sender::default`] when nobody looks.
pub type ProgressSender = watch::Sender<Progress>;

/// How far a backup is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    pub phase: Phase,
    pub backup: Option<BackupId>,
    /// Bytes of files read.
    pub bytes_done: u64,
    /// The server's estimate.
    pub bytes_total: Option<u64>,
    pub files_done: u64,
    /// Bytes in the store.
    pub stored_bytes: u64,
}

/// What a backup is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Phase {
    #[default]
    Starting,
    /// The server makes a checkpoint.
    Checkpoint,
    Copying,
    WaitingForWal,
    Committing,
    Done,
}

/// A visible backup.
#[derive(Debug, Clone, PartialEq)]
pub struct BackupReport {
    pub commit: BackupCommit,
    pub elapsed: Duration,
}

impl Default for BackupSettings {
    fn default() -> Self {
        BackupSettings {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            uploads_max: 3,
            scratch: std::env::temp_dir(),
            wal_wait_max: Duration::from_secs(1800),
        }
    }
}

/// Files copied, nothing visible.
struct Copied {
    intent: BackupIntent,
    from_standby: bool,
    start: SourceStart,
    packed: Packed,
    surroundings: Surroundings,
    stopped_at: Timestamp,
}

impl FullBackup {
    /// Takes the backup.
    ///
    /// Cancel safety: dropping this, or firing `cancel`, leaves nothing visible; once the commit object is being written,
    /// `cancel` is too late.
    ///
    /// # Errors
    /// [`BackupError`]; then no backup is visible, unless the error speaks of the commit object itself.
    pub async fn run(self, mut with: Collaborators<'_>) -> Result<BackupReport, BackupError> {
        let begun = tokio::time::Instant::now();
        let id = BackupId::new(clock::now().into(), rand::random());
        let cancel = with.cancel.clone();
        let copied = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(BackupError::Cancelled),
            error = self.watch_generation() => Err(error),
            copied = self.copy(&id, &mut with) => copied,
        };
        let committed = match copied {
            Ok(copied) => self.commit(copied, &with.progress).await,
            Err(error) => Err(error),
        };
        if committed.is_err() {
            let packs = format!("{}/{id}", prefix::packs(self.incarnation));
            tracing::debug!(backup = %id, object = packs, "what was stored of the backup stays until a prune");
        }
        let commit = committed?;
        let (elapsed, totals) = (begun.elapsed(), &commit.totals);
        let elapsed_ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
        let (bytes, stored_bytes) = (totals.bytes, totals.stored_bytes);
        tracing::info!(backup = %commit.id, lsn = %commit.stop_lsn, bytes, stored_bytes, elapsed_ms, "backup committed");
        Ok(BackupReport { commit, elapsed })
    }

    /// Ends when another writer has taken over.
    async fn watch_generation(&self) -> BackupError {
        loop {
            tokio::time::sleep(GENERATION_PERIOD).await;
            match self.check_generation().await {
                Err(error @ BackupError::Superseded { .. }) => return error,
                Err(error) => tracing::debug!(%error, "the writer's generation could not be checked"),
                Ok(()) => {}
            }
        }
    }

    /// From the intent to the WAL.
    async fn copy(&self, id: &BackupId, with: &mut Collaborators<'_>) -> Result<Copied, BackupError> {
        with.progress.send_modify(|p| p.backup = Some(id.clone()));
        self.check_generation().await?;
        let (intent, position) = self.announce(id, with).await?;
        with.progress.send_modify(|p| p.phase = Phase::Checkpoint);
        let start = with.source.begin().await?;
        check_start(&intent, &start, with.wal).await?;
        self.check_kept(position.from_standby, &start).await?;
        tracing::debug!(backup = %id, timeline = %start.timeline, lsn = %start.start_lsn, "backup started");
        with.progress.send_modify(|p| {
            p.phase = Phase::Copying;
            p.bytes_total = start.bytes_estimate;
        });
        let to = Destination { repository: self.repository.clone(), incarnation: self.incarnation, id: id.clone() };
        let BackupSettings { threads, uploads_max, ref scratch, .. } = self.settings;
        let settings = PackSettings { threads, uploads_max, scratch: scratch.clone() };
        let packed = pack(with.source, &start, to, &settings, &with.progress).await?;
        let stopped_at = server_time(with.facts).await;
        super::check::check_copy(self, &start, &packed)?;
        let surroundings = match with.facts {
            Some(facts) => facts.surroundings().await,
            None => {
                Surroundings { not_readable: vec!["no SQL connection was configured".into()], ..Default::default() }
            }
        };
        with.progress.send_modify(|p| p.phase = Phase::WaitingForWal);
        self.wait_for_wal(&start, &packed, with.wal).await?;
        Ok(Copied { intent, from_standby: position.from_standby, start, packed, surroundings, stopped_at })
    }

    /// Writes the intent, then looks whether the id is ours alone.
    async fn announce(
        &self,
        id: &BackupId,
        with: &mut Collaborators<'_>,
    ) -> Result<(BackupIntent, SourcePosition), BackupError> {
        let position = with.source.position().await?;
        let intent = BackupIntent {
            id: id.clone(),
            generation: self.generation.to_string(),
            base: None,
            timeline: position.timeline,
            // A standby's backup starts at a restartpoint that nobody tells beforehand: all WAL stays until it is known.
            wal_lsn: if position.from_standby { Lsn::ZERO } else { position.lsn },
            started_at: server_time(with.facts).await,
        };
        catalogue::write_intent(&self.repository, self.incarnation, &intent).await?;
        self.check_marks(id, &[BackupMark::Intent]).await?;
        Ok((intent, position))
    }

    /// A standby's backup starts at a restartpoint that its intent could not name. WAL stays from the oldest start of the other
    /// backups on: from there on, and only there, a prune that has not seen the intent removes nothing.
    async fn check_kept(&self, from_standby: bool, start: &SourceStart) -> Result<(), BackupError> {
        if !from_standby {
            return Ok(());
        }
        let (timeline, start_lsn) = (start.timeline, start.start_lsn);
        let backups = catalogue::list_backups(&self.repository, self.incarnation).await?;
        let own: Vec<Lsn> = backups.iter().filter(|b| b.timeline == timeline).map(|b| b.start_lsn).collect();
        match own.is_empty() || own.iter().any(|other| *other <= start_lsn) {
            true => Ok(()),
            false => Err(BackupError::StartNotStored { timeline, start_lsn }),
        }
    }

    async fn wait_for_wal(&self, start: &SourceStart, packed: &Packed, wal: &dyn StoredWal) -> Result<(), BackupError> {
        let (timeline, stop_lsn, waited) = (start.timeline, packed.end.stop_lsn, self.settings.wal_wait_max);
        let stored = tokio::time::timeout(waited, wal.wait_stored(timeline, start.start_lsn, stop_lsn)).await;
        stored.map_err(|_| BackupError::StopNotStored { timeline, stop_lsn, waited })?.map_err(BackupError::Wal)
    }

    /// Makes it visible.
    async fn commit(&self, copied: Copied, progress: &ProgressSender) -> Result<BackupCommit, BackupError> {
        progress.send_modify(|p| p.phase = Phase::Committing);
        self.check_generation().await?;
        self.check_marks(&copied.intent.id, &[BackupMark::Intent]).await?;
        let commit = self.commit_object(copied);
        catalogue::commit_backup(&self.repository, self.incarnation, &commit).await?;
        self.check_marks(&commit.id, &[BackupMark::Intent, BackupMark::Commit]).await?;
        progress.send_modify(|p| {
            p.phase = Phase::Done;
            p.stored_bytes = commit.totals.stored_bytes;
        });
        Ok(commit)
    }

    fn commit_object(&self, copied: Copied) -> BackupCommit {
        let Copied { intent, from_standby, start, packed, surroundings, stopped_at } = copied;
        let stored_bytes = packed.packs.iter().map(|p| p.bytes).sum();
        let mut tablespaces = start.tablespaces;
        for tablespace in &mut tablespaces {
            tablespace.bytes = packed.counts.tablespaces.get(&tablespace.oid).copied().unwrap_or(0);
        }
        BackupCommit {
            format: FORMAT_VERSION,
            id: intent.id,
            generation: intent.generation,
            system_id: self.incarnation.system_id,
            major: self.major,
            server_version: self.server_version.clone(),
            segment_size: self.segment_size,
            timeline: start.timeline,
            start_lsn: start.start_lsn,
            stop_lsn: packed.end.stop_lsn,
            started_at: intent.started_at,
            stopped_at,
            from_standby,
            tablespaces,
            totals: Totals { files: packed.counts.files, bytes: packed.counts.bytes, stored_bytes },
            damaged_blocks: packed.damaged,
            surroundings,
            packs: packed.packs,
            tables: packed.tables,
        }
    }

    async fn check_generation(&self) -> Result<(), BackupError> {
        if generation::is_superseded(&self.repository, self.generation).await? {
            return Err(BackupError::Superseded { own: self.generation.to_string() });
        }
        Ok(())
    }

    /// The marks of the id are exactly `expected`, but for a remover's that may still be taken back.
    async fn check_marks(&self, id: &BackupId, expected: &[BackupMark]) -> Result<(), BackupError> {
        let listed = catalogue::list_backup_marks(&self.repository, self.incarnation).await?;
        let marks = listed.into_iter().find(|m| m.id == *id).map(|m| m.marks).unwrap_or_default();
        if marks.contains(&BackupMark::Dropped) {
            return Err(BackupError::Dropped { id: id.clone() });
        }
        let settled = |mark: &&BackupMark| !matches!(mark, BackupMark::Leaving(_));
        let found = marks.iter().filter(settled).count();
        if found != expected.len() || !expected.iter().all(|mark| marks.contains(mark)) {
            return Err(BackupError::Unfit(format!("the marks of backup {id} are {marks:?}, expected {expected:?}")));
        }
        Ok(())
    }
}

/// The first row decides: without the WAL from the start on the backup would be worthless.
async fn check_start(intent: &BackupIntent, start: &SourceStart, wal: &dyn StoredWal) -> Result<(), BackupError> {
    let (timeline, start_lsn) = (start.timeline, start.start_lsn);
    if timeline != intent.timeline {
        return Err(BackupError::TimelineChanged { from: intent.timeline, to: timeline });
    }
    let kept = start_lsn >= intent.wal_lsn;
    if !kept || !wal.covers(timeline, start_lsn).await.map_err(BackupError::Wal)? {
        return Err(BackupError::StartNotStored { timeline, start_lsn });
    }
    Ok(())
}

/// The server's clock where it can be asked, else ours.
async fn server_time(facts: Option<&dyn ServerFacts>) -> Timestamp {
    let asked = match facts {
        Some(facts) => facts.now().await,
        None => None,
    };
    asked.unwrap_or_else(|| clock::now().into())
}
