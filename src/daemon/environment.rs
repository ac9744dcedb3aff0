//! What the service does for one environment: archive its WAL, and take the backups that are asked for or due.

use std::collections::BTreeSet;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tracing::{Instrument, Span, debug, info, warn};

use super::backups::{Backups, OwnBackups};
use super::handle::Request;
use super::jobs::Jobs;
use super::slots::{self, UnlimitedWal};
use super::snapshot::{ArchiveSnapshot, EnvironmentSnapshot, State};
use super::supervisor::{Body, BodyContext};
use crate::archive::{self, ArchiveStatus, Archiver};
use crate::backup::BackupSettings;
use crate::config::Environment;
use crate::error::{Code, Failure};
use crate::operations::backup::{BackupJob, STANDBY_WAIT_MAX};
use crate::repository::generation::{self, Lease};
use crate::repository::probe::{self, Abilities};
use crate::repository::{Generation, Repository, RepositoryError};
use crate::util::clock;

/// One environment with a cluster.
pub struct EnvironmentBody {
    pub environment: Environment,
    pub shutdown_grace: Duration,
    /// Every slot that the configuration names.
    pub owned_slots: BTreeSet<String>,
    /// Where backups that begin by themselves become jobs; without it they are none.
    pub jobs: Option<Jobs>,
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
            let detail = format!("opening the repository {}", self.environment.location);
            snapshot.enter(State::Starting, Some(detail), clock::now().into());
        });
        let repository = self.environment.open_or_create_repository().await?;
        let abilities = try_out(&repository).await?;
        let generation = take_generation(&repository, abilities).await?;
        info!(repository = repository.store().place(), %generation, "repository open");
        let mut archiving = self.start_archiving(&repository, generation, &context)?;
        let job = BackupJob {
            repository: repository.clone(),
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
        let mut backups = Backups::new(job, own, context.snapshot.clone(), context.cancel.clone());
        let mut dangers = std::pin::pin!(self.name_dangers());
        let mut dangers_named = false;
        loop {
            tokio::select! {
                () = &mut dangers, if !dangers_named => dangers_named = true,
                // Ends by itself after `cancel`, when the tail is stored.
                ended = &mut archiving.task => return match ended {
                    Ok(()) if context.cancel.is_cancelled() => Ok(()),
                    Ok(()) => Err(Failure::new(Code::Internal, "archive WAL: the archiver ended by itself")),
                    Err(error) => Err(Failure::new(Code::Internal, format!("archive WAL: {error}"))),
                },
                Ok(()) = archiving.status.changed() => {
                    let status = archiving.status.borrow_and_update().clone();
                    context.snapshot.send_modify(|snapshot| describe(snapshot, &status));
                }
                Some(Request::Backup { progress }) = context.requests.recv() => {
                    backups.asked(progress);
                }
                Some(Request::Backup { progress }) = own_requests.recv() => {
                    backups.asked(progress);
                }
                () = backups.step() => {}
            }
        }
    }
}

impl EnvironmentBody {
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
            settings: self.environment.archive_settings(self.shutdown_grace),
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

/// What the archiver says of itself, in the words of the service.
fn describe(snapshot: &mut EnvironmentSnapshot, status: &ArchiveStatus) {
    use archive::State as Archive;
    let (state, detail) = match &status.state {
        Archive::Starting => (State::Starting, None),
        Archive::Streaming => {
            let alarm = status.alarm.as_ref();
            (State::Streaming, alarm.map(|primaries| format!("more than one primary answers: {primaries}")))
        }
        Archive::StoreFailing(why) => (State::Waiting, Some(format!("the store takes nothing: {why}"))),
        Archive::Disconnected(why) => (State::Waiting, Some(format!("no connection to the server: {why}"))),
        Archive::Waiting(why) => (State::Waiting, Some(why.clone())),
        Archive::Conflict(why) => {
            let way_out = format!("`pgrecall incarnation open {0} --confirm {0}` goes on", snapshot.name);
            (State::Conflict, Some(format!("{why}; {way_out} with the server as it is, and keeps the old past")))
        }
        Archive::Stopped => (State::Stopped, None),
    };
    if state == State::Streaming {
        snapshot.failure = None;
    }
    snapshot.enter(state, detail, clock::now().into());
    snapshot.archive = status.timeline.map(|timeline| ArchiveSnapshot {
        timeline,
        server_lsn: status.server_lsn,
        received_lsn: status.received_lsn,
        stored_lsn: status.stored.map_or(crate::pg::Lsn::ZERO, |stream| stream.end_lsn),
        covered_until: status.covered_until,
        exposure: status.exposure,
        gaps: u64::from(status.gaps_found),
    });
}
