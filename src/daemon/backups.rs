//! The backups of one environment: those that are asked for, the first one, and the one after a gap, by themselves.
//!
//! One at a time. Who asks while one is still being copied hears of that one; when the server has sent everything already, of
//! another that follows it, for that one may lack what was committed just before.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, info, warn};

use super::handle::{ProgressSender, Request};
use super::jobs::backup::BackupWork;
use super::jobs::{Asker, JobKind, JobRecord, JobSpec, Jobs, Via};
use super::snapshot::{BackupProgress, EnvironmentSnapshot};
use crate::backup::{BackupReport, Phase, Progress};
use crate::error::{Code, Failure};
use crate::operations::backup::BackupJob;
use crate::repository::{catalogue, identity};
use crate::util::retry::Backoff;
use crate::util::units::show_bytes;

/// How often it is looked whether a backup is due, and a running one's progress is passed on.
const LOOK: Duration = Duration::from_millis(500);

/// The backups of one environment.
pub struct Backups {
    job: BackupJob,
    snapshot: watch::Sender<EnvironmentSnapshot>,
    cancel: CancellationToken,
    running: Option<Running>,
    /// Who hears of the one that runs.
    waiting: Vec<ProgressSender>,
    /// Who hears of the one after it.
    queued: Vec<ProgressSender>,
    /// Whether a usable backup exists; `None` until the repository was asked.
    has_backup: Option<bool>,
    gaps_seen: u32,
    was_streaming: bool,
    pauses: Backoff,
    not_before: Instant,
    next_look: Instant,
    /// How a backup that is due by itself becomes a job; without it, it begins here at once.
    own: Option<OwnBackups>,
}

/// The way to a job for a backup that nobody asked for.
pub struct OwnBackups {
    pub jobs: Jobs,
    pub environment: String,
    /// To this environment's task.
    pub requests: mpsc::Sender<Request>,
}

struct Running {
    task: JoinHandle<Result<BackupReport, Failure>>,
    cancel: CancellationToken,
    progress: watch::Receiver<Progress>,
}

impl Running {
    /// Whether the server is still sending files.
    fn can_be_joined(&self) -> bool {
        let copies = matches!(self.progress.borrow().phase, Phase::Starting | Phase::Checkpoint | Phase::Copying);
        copies && !self.task.is_finished()
    }
}

impl Backups {
    pub fn new(
        job: BackupJob,
        own: Option<OwnBackups>,
        snapshot: watch::Sender<EnvironmentSnapshot>,
        cancel: CancellationToken,
    ) -> Self {
        let pauses = Backoff::new(Duration::from_secs(5), Duration::from_secs(300));
        let (gaps_seen, not_before) = (0, Instant::now());
        Backups {
            job,
            snapshot,
            cancel,
            running: None,
            waiting: Vec::new(),
            queued: Vec::new(),
            has_backup: None,
            gaps_seen,
            was_streaming: false,
            pauses,
            not_before,
            next_look: Instant::now(),
            own,
        }
    }

    /// Somebody asks for a backup.
    pub fn asked(&mut self, progress: ProgressSender) {
        match &self.running {
            Some(running) if !running.can_be_joined() => {
                let phase = "waiting for another backup to end".to_owned();
                progress.send(BackupProgress::Running { phase, bytes_done: 0, bytes_total: None });
                self.queued.push(progress);
            }
            Some(_) => self.waiting.push(progress),
            None => {
                self.waiting.push(progress);
                self.start();
            }
        }
    }

    /// Waits a moment and does what is due then: passes progress on, takes note of an end, begins a backup by itself.
    ///
    /// Cancel safety: safe; nothing is taken before it is dealt with.
    pub async fn step(&mut self) {
        // A point in time, not a length: whoever drops this future again and again must not put it off for ever.
        tokio::time::sleep_until(self.next_look).await;
        self.next_look = Instant::now() + LOOK;
        match &mut self.running {
            Some(running) if running.task.is_finished() => self.ended().await,
            Some(running) => {
                if !self.waiting.is_empty() && self.waiting.iter().all(ProgressSender::is_unwanted) {
                    running.cancel.cancel();
                }
                let progress = shown(&running.progress.borrow());
                self.tell(&progress);
            }
            None if Instant::now() >= self.not_before => self.begin_if_due().await,
            None => {}
        }
    }

    async fn begin_if_due(&mut self) {
        let status = self.job.archive.borrow().clone();
        let streaming = status.stored.is_some() && status.state == crate::archive::State::Streaming;
        if streaming && !self.was_streaming {
            // Meanwhile another incarnation may have been opened, or a gap found by another writer.
            self.has_backup = None;
        }
        self.was_streaming = streaming;
        if !streaming {
            return;
        }
        if status.gaps_found > self.gaps_seen {
            self.gaps_seen = status.gaps_found;
            self.has_backup = Some(false);
        }
        if self.has_backup.is_none() {
            match self.look_for_backup().await {
                Ok(found) => self.has_backup = Some(found),
                Err(failure) => {
                    warn!(error = %failure, "look for backups: failed, will be tried again");
                    self.not_before = Instant::now() + self.pauses.delay();
                }
            }
        }
        if self.has_backup == Some(false) {
            self.begin_by_itself();
        }
    }

    fn begin_by_itself(&mut self) {
        let why = "no backup leads to the WAL that is archived now: one begins by itself";
        let Some(own) = &self.own else {
            info!("{why}");
            return self.start();
        };
        match own.submit(why) {
            Ok(true) => info!("{why}"),
            // The last one waits for its turn, or for its outcome to be on record.
            Ok(false) => {}
            Err(failure) => {
                warn!(error = %failure, "{why}: failed, will be tried again");
                self.not_before = Instant::now() + self.pauses.delay();
            }
        }
    }

    /// A backup counts when the unbroken stored stream begins before it.
    async fn look_for_backup(&self) -> Result<bool, Failure> {
        let Some(known) = identity::current(&self.job.repository).await? else { return Ok(false) };
        let backups = catalogue::list_backups(&self.job.repository, known.incarnation).await?;
        let Some(stored) = self.job.archive.borrow().stored else { return Ok(false) };
        Ok(backups.iter().any(|b| b.timeline != stored.timeline || b.start_lsn >= stored.start_lsn))
    }

    fn start(&mut self) {
        let (sender, progress) = watch::channel(Progress::default());
        let (job, cancel) = (self.job.clone(), self.cancel.child_token());
        let stop = cancel.clone();
        let task = tokio::spawn(async move { job.run(sender, cancel).await }.instrument(Span::current()));
        self.running = Some(Running { task, cancel: stop, progress });
    }

    async fn ended(&mut self) {
        let Some(running) = self.running.take() else { return };
        let result = running
            .task
            .await
            .unwrap_or_else(|error| Err(Failure::new(Code::Internal, format!("take a backup: {error}"))));
        let outcome = match result {
            Ok(report) => {
                self.has_backup = Some(true);
                self.pauses.reset();
                done(&report)
            }
            Err(failure) => {
                if failure.code != Code::Cancelled {
                    warn!(error = %failure, hint = failure.hint, "the backup failed");
                }
                self.not_before = Instant::now() + self.pauses.delay();
                BackupProgress::Failed(failure)
            }
        };
        self.tell(&outcome);
        self.waiting.clear();
        if !self.queued.is_empty() {
            self.waiting = std::mem::take(&mut self.queued);
            self.start();
        }
    }

    fn tell(&self, progress: &BackupProgress) {
        for asked in &self.waiting {
            asked.send(progress.clone());
        }
        self.snapshot.send_if_modified(|snapshot| {
            let changed = snapshot.backup.as_ref() != Some(progress);
            snapshot.backup = Some(progress.clone());
            changed
        });
    }
}

impl OwnBackups {
    /// Returns whether a job was made: there is at most one at a time.
    fn submit(&self, why: &str) -> Result<bool, Failure> {
        let unfinished = |record: &JobRecord| record.spec.kind == JobKind::Backup && !record.state.is_final();
        if self.jobs.list(Some(&self.environment)).iter().any(unfinished) {
            return Ok(false);
        }
        let (environment, requests) = (self.environment.clone(), self.requests.clone());
        let ask = move |unwanted| {
            let (progress, receiver) = ProgressSender::new(unwanted);
            let sent = requests.try_send(Request::Backup { progress });
            sent.map(|()| receiver).map_err(|_| {
                Failure::new(Code::Cancelled, format!("ask {environment}: its task has ended or is busy")).retryable()
            })
        };
        let spec = JobSpec {
            environment: self.environment.clone(),
            kind: JobKind::Backup,
            asked_by: Asker { uid: None, user: "pgrecall".to_owned(), via: Via::Daemon },
            request: serde_json::json!({ "reason": why }),
            ticket: None,
            idempotency_key: None,
        };
        self.jobs.submit(spec, Arc::new(BackupWork { ask: Box::new(ask) })).map(|_| true)
    }
}

fn done(report: &BackupReport) -> BackupProgress {
    let totals = &report.commit.totals;
    let seconds = report.elapsed.as_secs_f64();
    let (bytes, stored) = (show_bytes(totals.bytes), show_bytes(totals.stored_bytes));
    BackupProgress::Done {
        backup: report.commit.id.to_string(),
        bytes_stored: totals.stored_bytes,
        summary: format!("{} files, {bytes}, stored as {stored} in {seconds:.1} s", totals.files),
    }
}

fn shown(progress: &Progress) -> BackupProgress {
    let phase = match progress.phase {
        Phase::Starting => "starting",
        Phase::Checkpoint => "waiting for a checkpoint",
        Phase::Copying => "copying",
        Phase::WaitingForWal => "waiting for WAL",
        Phase::Committing | Phase::Done => "committing",
    };
    BackupProgress::Running {
        phase: phase.to_owned(),
        bytes_done: progress.bytes_done,
        bytes_total: progress.bytes_total,
    }
}
