//! What the service does for one environment: archive its WAL, and take the backups that are asked for or due.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{Instrument, Span, debug, info, warn};

use super::backups::{Backups, OwnBackups};
use super::guardian::Guardian;
use super::handle::Request;
use super::jobs::Jobs;
use super::pruning::Pruning;
use super::schedule::Schedule;
use super::slots::{self, UnlimitedWal};
use super::snapshot::{EnvironmentSnapshot, State, Wal};
use super::supervisor::{Body, BodyContext};
use super::survey::Surveyor;
use crate::archive::{ArchiveStatus, Archiver, Budget};
use crate::backup::BackupSettings;
use crate::config::Environment;
use crate::error::{Code, Failure};
use crate::operations::backup::{BackupJob, STANDBY_WAIT_MAX};
use crate::repository::generation::{self, Lease};
use crate::repository::probe::{self, Abilities};
use crate::repository::{Generation, Repository, RepositoryError};
use crate::util::clock;
use crate::util::throttle::Throttle;

/// An archiver that streams and says nothing for so long hangs.
const ARCHIVER_SILENCE_MAX: Duration = Duration::from_secs(60);

/// One environment with a cluster.
pub struct EnvironmentBody {
    pub environment: Environment,
    pub shutdown_grace: Duration,
    /// Every slot that the configuration names.
    pub owned_slots: BTreeSet<String>,
    /// Where backups that begin by themselves become jobs; without it they are none.
    pub jobs: Option<Jobs>,
    /// What all backups together may send.
    pub backup_throttle: Option<Arc<Throttle>>,
    pub wal_budget: Arc<Budget>,
    /// Counts what the store fails to do.
    pub store_errors: Arc<AtomicU64>,
}

/// The archiver's task; dropping this ends it.
struct Archiving {
    task: JoinHandle<()>,
    status: watch::Receiver<ArchiveStatus>,
}

impl Drop for Archiving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[async_trait]
impl Body for EnvironmentBody {
    async fn run(&self, mut context: BodyContext) -> Result<(), Failure> {
        context.snapshot.send_modify(|snapshot| {
            snapshot.rpo = self.environment.archive.rpo;
            snapshot.wal = Wal::Starting;
            snapshot.judge(clock::now().into());
            if snapshot.state == State::Starting {
                snapshot.detail = Some(format!("opening the repository {}", self.environment.location));
            }
        });
        let repository = self.environment.open_or_create_counting(Arc::clone(&self.store_errors)).await?;
        let abilities = try_out(&repository).await?;
        let generation = take_generation(&repository, abilities).await?;
        info!(repository = repository.store().place(), %generation, "repository open");
        let mut archiving = self.start_archiving(&repository, generation, &context)?;
        let pruning = Pruning::start(repository.clone(), generation, self.environment.window, context.cancel.clone());
        let job = BackupJob {
            repository: repository.throttled(self.backup_throttle.clone()),
            generation,
            connect: self.environment.connect()?,
            archive: archiving.status.clone(),
            settings: BackupSettings::default(),
            from_standby: self.environment.backup_from_standby,
            standby_wait_max: STANDBY_WAIT_MAX,
        };
        let (to_self, mut own_requests) = mpsc::channel(1);
        let own = self.jobs.clone().map(|jobs| OwnBackups {
            jobs,
            environment: self.environment.name.to_string(),
            requests: to_self,
        });
        let schedule = self.schedule();
        let mut backups = Backups::new(job, schedule, own, context.snapshot.clone(), context.cancel.clone());
        let mut beside =
            std::pin::pin!(self.watch_beside(repository.clone(), archiving.status.clone(), context.snapshot.clone()));
        let mut last_word = Instant::now();
        loop {
            // An archiver that streams says so every few seconds.
            let is_streaming = archiving.status.borrow().state == Wal::Streaming;
            if !is_streaming || last_word.elapsed() < ARCHIVER_SILENCE_MAX {
                context.pulse.beat();
            }
            tokio::select! {
                () = &mut beside => {}
                // Ends by itself after `cancel`, when the tail is stored.
                ended = &mut archiving.task => return match ended {
                    Ok(()) if context.cancel.is_cancelled() => Ok(()),
                    Ok(()) => Err(Failure::new(Code::Internal, "archive WAL: the archiver ended by itself")),
                    Err(error) => Err(Failure::new(Code::Internal, format!("archive WAL: {error}"))),
                },
                Ok(()) = archiving.status.changed() => {
                    let status = archiving.status.borrow_and_update().clone();
                    last_word = Instant::now();
                    context.snapshot.send_modify(|snapshot| snapshot.note_archive(&status, clock::now().into()));
                    backups.archive_changed();
                }
                Some(request) = context.requests.recv() => match request {
                    Request::Backup { progress } => backups.asked(progress),
                    Request::Prune(asked) => pruning.asked(asked),
                },
                Some(progress) = own_requests.recv() => backups.asked(progress),
                () = backups.step() => {}
            }
        }
    }
}

impl EnvironmentBody {
    fn schedule(&self) -> Schedule {
        let Environment { name, backups, time_zone, .. } = &self.environment;
        Schedule::new(name.as_str(), backups.schedule.clone(), *time_zone, backups.spread)
    }

    /// Looks after the slot and reads what the store holds, for ever.
    async fn watch_beside(
        &self,
        repository: Repository,
        archive: watch::Receiver<ArchiveStatus>,
        snapshot: watch::Sender<EnvironmentSnapshot>,
    ) {
        let survey = Surveyor { repository, archive, snapshot: snapshot.clone() };
        let guard = async {
            self.name_dangers().await;
            // The archive says itself when there is nobody to connect to.
            let (Ok(connect), Some(postgres)) = (self.environment.connect(), &self.environment.postgres) else {
                return;
            };
            let slot = postgres.slot.clone();
            Guardian { connect, slot, snapshot }.run().await;
        };
        tokio::join!(survey.run(), guard);
    }

    /// Says which servers would fill their disks for us, and which slots of ours nobody looks after. Best effort: the archive
    /// says itself when it cannot connect.
    async fn name_dangers(&self) {
        let Ok(connect) = self.environment.connect() else { return };
        match slots::look(&connect, &self.owned_slots).await {
            Ok(found) => {
                for UnlimitedWal { host, statement } in &found.unlimited {
                    warn!(
                        host,
                        statement,
                        "max_slot_wal_keep_size is -1: while the store is away the server keeps WAL until its disk is full"
                    );
                }
                for slot in found.unowned.iter().filter(|slot| !slot.active) {
                    warn!(
                        host = slot.host,
                        slot = slot.slot,
                        "a slot of ours that no configured environment owns keeps WAL"
                    );
                }
            }
            Err(error) => debug!(error = %error, "replication slots cannot be listed"),
        }
    }

    fn start_archiving(
        &self,
        repository: &Repository,
        generation: Generation,
        context: &BodyContext,
    ) -> Result<Archiving, Failure> {
        let (status, watched) = watch::channel(ArchiveStatus::default());
        let archiver = Archiver {
            settings: self.environment.archive_settings(self.shutdown_grace, &self.wal_budget),
            connect: self.environment.connect()?,
            repository: repository.clone(),
            generation,
            status,
        };
        let task = tokio::spawn(archiver.run(context.cancel.clone()).instrument(Span::current()));
        Ok(Archiving { task, status: watched })
    }
}

/// What the store can do; without what is needed nothing is begun.
async fn try_out(repository: &Repository) -> Result<Abilities, Failure> {
    let place = repository.store().place();
    let abilities = probe::probe(repository.store()).await.map_err(RepositoryError::from)?;
    debug!(store = place, ?abilities, "the store was tried out");
    if !abilities.delete {
        warn!(store = place, "the store does not delete: parts of WAL and backups past their time stay");
    }
    let lacks = [(abilities.range, "reads no ranges of objects"), (abilities.list, "does not list what was written")];
    match lacks.iter().find(|(can, _)| !can) {
        Some((_, lacks)) => Err(Failure::new(Code::Store, format!("use the store {place}: it {lacks}"))
            .hint("The store must be S3-compatible in this; another one, or its newer version, may be.")
            .retryable()),
        None => Ok(abilities),
    }
}

async fn take_generation(repository: &Repository, abilities: Abilities) -> Result<Generation, Failure> {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let lease = Lease {
        host,
        pid: std::process::id(),
        started_at: clock::now().into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        store: Some(abilities),
    };
    Ok(generation::take(repository, &lease).await?)
}
