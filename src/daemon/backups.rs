//! The backups of one environment: those that are asked for, those that the schedule wants, the first one, and the one after a gap.
//!
//! [`super::schedule`] decides when one begins by itself. One at a time. Who asks while one is still being copied hears of that
//! one; when the server has sent everything already, of another that follows it, for that one may lack what was committed just
//! before.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, error, info, warn};

use super::handle::ProgressSender;
use super::jobs::backup::BackupWork;
use super::jobs::{Asker, JobKind, JobRecord, JobSpec, Jobs, Via};
use super::schedule::{Now, Schedule, Timetable};
use super::snapshot::{BackupProgress, EnvironmentSnapshot, NewestBackup};
use crate::archive::{ArchiveStatus, State};
use crate::backup::{BackupReport, Phase, Progress};
use crate::error::{Code, Failure};
use crate::operations::backup::BackupJob;
use crate::pg::Timestamp;
use crate::repository::backup_object::BackupCommit;
use crate::repository::{catalogue, identity};
use crate::util::clock;
use crate::util::units::{show_bytes, show_duration};

/// How often it is looked whether a backup is due.
const LOOK: Duration = Duration::from_secs(5);
/// And how often what happens is passed on, while something happens.
const LOOK_BUSY: Duration = Duration::from_millis(500);

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
    timetable: Timetable,
    /// Whether a usable backup exists; `None` until the repository was asked.
    has_backup: Option<bool>,
    /// The question to the repository.
    looking: Option<JoinHandle<Result<Looked, Failure>>>,
    begin: Instant,
    gaps_seen: u32,
    was_streaming: bool,
    said_overdue: bool,
    next_look: Instant,
    /// How a backup that is due by itself becomes a job; without it, it begins here at once.
    own: Option<OwnBackups>,
}

/// The way to a job for a backup that nobody asked for.
pub struct OwnBackups {
    pub jobs: Jobs,
    pub environment: String,
    /// To this environment's task.
    pub requests: mpsc::Sender<ProgressSender>,
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

/// What the repository holds.
struct Looked {
    is_usable: bool,
    newest: Option<NewestBackup>,
}

impl Backups {
    pub fn new(
        job: BackupJob,
        schedule: Schedule,
        own: Option<OwnBackups>,
        snapshot: watch::Sender<EnvironmentSnapshot>,
        cancel: CancellationToken,
    ) -> Self {
        Backups {
            job,
            snapshot,
            cancel,
            running: None,
            waiting: Vec::new(),
            queued: Vec::new(),
            timetable: Timetable::new(schedule),
            has_backup: None,
            looking: None,
            begin: Instant::now(),
            gaps_seen: 0,
            was_streaming: false,
            said_overdue: false,
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

    /// The archive's status is another one: what follows from it need not wait for the next look.
    pub fn archive_changed(&mut self) {
        let status = self.job.archive.borrow();
        if is_streaming(&status) != self.was_streaming || status.gaps_found > self.gaps_seen {
            self.next_look = Instant::now();
        }
    }

    /// Waits a moment and does what is due then: passes progress on, takes note of an end, begins a backup by itself.
    ///
    /// Cancel safety: safe; nothing is taken before it is dealt with.
    pub async fn step(&mut self) {
        // A point in time, not a length: whoever drops this future again and again must not put it off for ever.
        tokio::time::sleep_until(self.next_look).await;
        match &mut self.running {
            // Has ended: nothing is waited for.
            Some(running) if running.task.is_finished() => self.ended().await,
            Some(running) => {
                if !self.waiting.is_empty() && self.waiting.iter().all(ProgressSender::is_unwanted) {
                    running.cancel.cancel();
                }
                let progress = shown(&running.progress.borrow());
                self.tell(&progress);
            }
            None => {}
        }
        if self.looking.as_ref().is_some_and(JoinHandle::is_finished) {
            self.looked().await;
        }
        if self.running.is_none() {
            self.begin_if_due();
        }
        self.note_times();
        let busy = self.running.is_some() || self.looking.is_some();
        self.next_look = Instant::now() + if busy { LOOK_BUSY } else { LOOK };
    }

    fn now(&self) -> Now {
        Now { wall: clock::now(), steady: self.begin.elapsed() }
    }

    fn begin_if_due(&mut self) {
        let status = self.job.archive.borrow().clone();
        let streaming = is_streaming(&status);
        if streaming && !self.was_streaming {
            // Meanwhile another incarnation may have been opened, or a gap found by another writer.
            self.has_backup = None;
        }
        self.was_streaming = streaming;
        let now = self.now();
        if !streaming {
            return;
        }
        if status.gaps_found > self.gaps_seen {
            self.gaps_seen = status.gaps_found;
            self.has_backup = Some(false);
            self.note_usable();
        }
        if self.has_backup.is_none() && self.looking.is_none() && self.timetable.may_try(now) {
            let looking = look_for_backups(self.job.clone());
            self.looking = Some(tokio::spawn(looking.instrument(Span::current())));
        }
        if self.has_backup == Some(false) {
            self.timetable.demand(now);
        }
        if self.has_backup.is_some() && self.timetable.is_due(now) {
            let why = match self.has_backup {
                Some(true) => "a backup is due: one begins by itself",
                _ => "no backup leads to the WAL that is archived now: one begins by itself",
            };
            self.begin_by_itself(why);
        }
    }

    fn begin_by_itself(&mut self, why: &str) {
        let Some(own) = &self.own else {
            info!("{why}");
            return self.start();
        };
        match own.submit(why) {
            Ok(true) => info!("{why}"),
            // The last one waits for its turn, or for its outcome to be on record.
            Ok(false) => {}
            // The daemon is stopping.
            Err(failure) if failure.code == Code::Cancelled => {}
            Err(failure) => {
                warn!(error = %failure, "{why}: failed, will be tried again");
                self.timetable.put_off(self.now());
            }
        }
    }

    /// The repository has said which backups there are.
    async fn looked(&mut self) {
        let Some(looking) = self.looking.take() else { return };
        let result = looking.await;
        let result = result.unwrap_or_else(|error| Err(Failure::new(Code::Internal, format!("list backups: {error}"))));
        let now = self.now();
        match result {
            Ok(Looked { is_usable, newest }) => {
                let end = newest.as_ref().filter(|_| is_usable).and_then(|newest| newest.ended_at.to_chrono());
                self.timetable.learn(end, now);
                self.has_backup = Some(is_usable);
                self.snapshot.send_modify(|snapshot| snapshot.backups.newest = newest);
                self.note_usable();
            }
            Err(failure) => {
                warn!(error = %failure, "look for backups: failed, will be tried again");
                self.timetable.put_off(now);
            }
        }
    }

    fn start(&mut self) {
        let (sender, progress) = watch::channel(Progress::default());
        let (job, cancel) = (self.job.clone(), self.cancel.child_token());
        let stop = cancel.clone();
        let task = tokio::spawn(async move { job.run(sender, cancel).await }.instrument(Span::current()));
        self.timetable.began();
        self.running = Some(Running { task, cancel: stop, progress });
        self.next_look = Instant::now();
    }

    async fn ended(&mut self) {
        let Some(running) = self.running.take() else { return };
        let result = running
            .task
            .await
            .unwrap_or_else(|error| Err(Failure::new(Code::Internal, format!("take a backup: {error}"))));
        let now = self.now();
        let outcome = match result {
            Ok(report) => {
                self.has_backup = Some(true);
                self.timetable.succeeded(now);
                let newest = NewestBackup::from(&report.commit);
                self.snapshot.send_modify(|snapshot| {
                    snapshot.backups.newest = Some(newest);
                    snapshot.backups.failure = None;
                });
                self.note_usable();
                done(&report)
            }
            Err(failure) => {
                if failure.code != Code::Cancelled {
                    warn!(error = %failure, hint = failure.hint, "the backup failed");
                    let failed = failure.clone();
                    self.snapshot.send_modify(|snapshot| snapshot.backups.failure = Some(failed));
                }
                self.timetable.failed(now);
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

    fn note_usable(&self) {
        self.snapshot.send_modify(|snapshot| {
            snapshot.backups.is_usable = self.has_backup;
            snapshot.judge(clock::now().into());
        });
    }

    /// When the next backup is due goes into the snapshot; that it is overdue also into the log, once.
    fn note_times(&mut self) {
        let now = self.now();
        let overdue = self.timetable.overdue(now);
        if let Some(waited) = overdue.filter(|_| !self.said_overdue) {
            error!(waited = show_duration(waited), "a backup has been due for long and none has ended well");
        }
        self.said_overdue = overdue.is_some();
        let next = self.timetable.next(now).map(Timestamp::from);
        self.snapshot.send_if_modified(|snapshot| {
            let backups = &mut snapshot.backups;
            // What is wanted already is due now; the time of that moves with the clock.
            let is_same = backups.next_at == next || (self.timetable.is_wanted() && backups.is_wanted);
            let changed = !is_same || backups.is_overdue != overdue.is_some();
            if changed {
                backups.next_at = next;
                backups.is_wanted = self.timetable.is_wanted();
                backups.is_overdue = overdue.is_some();
                snapshot.judge(now.wall.into());
            }
            changed
        });
    }
}

fn is_streaming(status: &ArchiveStatus) -> bool {
    status.stored.is_some() && status.state == State::Streaming
}

/// Asks the repository. A backup is usable when the unbroken stored stream begins before it.
async fn look_for_backups(job: BackupJob) -> Result<Looked, Failure> {
    let Some(known) = identity::current(&job.repository).await? else {
        return Ok(Looked { is_usable: false, newest: None });
    };
    let backups = catalogue::list_backups(&job.repository, known.incarnation).await?;
    let stored = job.archive.borrow().stored;
    let reaches = |b: &BackupCommit| {
        stored.is_some_and(|stored| b.timeline != stored.timeline || b.start_lsn >= stored.start_lsn)
    };
    let newest = backups.iter().max_by_key(|backup| backup.stopped_at).map(NewestBackup::from);
    Ok(Looked { is_usable: backups.iter().any(reaches), newest })
}

impl From<&BackupCommit> for NewestBackup {
    fn from(commit: &BackupCommit) -> Self {
        NewestBackup {
            id: commit.id.to_string(),
            ended_at: commit.stopped_at,
            bytes: commit.totals.bytes,
            stored_bytes: commit.totals.stored_bytes,
        }
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
            let sent = requests.try_send(progress);
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
