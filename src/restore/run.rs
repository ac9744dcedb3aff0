//! Executes a plan into a directory, up to the point where PostgreSQL can be started on it.
//!
//! Order: check everything → marker → files and WAL → tablespaces → recovery settings → sync → `global/pg_control` gets its
//! name → marker says `replaying` or `handed-over`. A kill at any point leaves a directory on which no server starts, and which the same
//! command may begin anew.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio_util::sync::CancellationToken;

use super::fetch::{Fetch, Progress};
use super::plan::{Plan, PlanError};
use super::recovery::{self, Configuration, Prepared, Recovery};
use super::spool;
use super::surroundings;
use super::target::{Phase, TablespacePlaces, TargetDirectory, TargetError};
use super::wal::{self, SegmentFetcher};
use super::write;
use crate::error::{Code, Failure};
use crate::repository::backup_object::ConfigFile;
use crate::repository::{Repository, RepositoryError, catalogue};

/// How a plan is executed.
#[derive(Debug, Clone, Default)]
pub struct RestoreOptions {
    pub tablespaces: TablespacePlaces,
    /// Nobody will start PostgreSQL now: the directory belongs to the caller afterwards and is never wiped again.
    pub no_start: bool,
    /// How the directory will recover; without it the directory is not prepared for that.
    pub recovery: Option<Recovery>,
    /// Ends the restore while it fetches.
    pub cancel: CancellationToken,
}

/// Why a restore did not work.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("restore {}: {source}", path.display())]
    File { path: PathBuf, source: RepositoryError },
    #[error("the extent table of {} leads outside its frame", .0.display())]
    Extent(PathBuf),
    #[error("the plan names {0:?}, which is no object of its incarnation")]
    Planned(String),
    #[error("backup {backup} does not exist any more")]
    BackupGone { backup: String },
    #[error("prepare the restored directory for recovery: {0:#}")]
    Prepare(anyhow::Error),
    #[error("restore: it was cancelled; the same command begins it anew")]
    Cancelled,
}

impl RestoreError {
    pub(super) fn of_file(path: PathBuf, source: RepositoryError) -> Self {
        RestoreError::File { path, source }
    }
}

impl From<RestoreError> for Failure {
    fn from(error: RestoreError) -> Failure {
        let message = error.to_string();
        match &error {
            RestoreError::Target(e) => {
                let failure = Failure::new(Code::Host, message);
                e.hint().map_or(failure.clone(), |hint| failure.hint(hint))
            }
            RestoreError::Repository(e) | RestoreError::File { source: e, .. } => repository_failure(e, message),
            RestoreError::Plan(_) => Failure::new(Code::UnreachableTarget, message),
            RestoreError::Extent(_) => Failure::new(Code::Corrupt, format!("restore: {message}")),
            RestoreError::Planned(_) => {
                Failure::new(Code::Usage, format!("restore: {message}")).hint("Make the plan anew.")
            }
            RestoreError::Prepare(_) => Failure::new(Code::Host, message),
            RestoreError::Cancelled => Failure::new(Code::Cancelled, message),
            RestoreError::BackupGone { .. } => {
                Failure::new(Code::NotFound, format!("restore: {message}")).hint("Make the plan anew.")
            }
        }
    }
}

fn repository_failure(error: &RepositoryError, message: String) -> Failure {
    if error.is_corrupt() || error.is_not_found() {
        let hint = "Run `pgrecall verify` on the environment, and restore from another backup or to another point.";
        return Failure::new(Code::Corrupt, message).hint(hint);
    }
    let failure = Failure::new(Code::Store, message);
    let failure = if error.is_retryable() { failure.retryable() } else { failure };
    match error {
        RepositoryError::Store(e) => e.hint().map_or(failure.clone(), |hint| failure.clone().hint(hint)),
        _ => failure,
    }
}

/// A directory on which PostgreSQL can be started.
#[derive(Debug, Clone)]
pub struct Restored {
    pub target: TargetDirectory,
    pub plan: Plan,
    /// When the directory was prepared for recovery.
    pub prepared: Option<Prepared>,
}

/// Checks what can be checked without fetching: directories, disk space, tablespaces.
pub fn check(plan: &Plan, directory: &Path, options: &RestoreOptions) -> Result<TargetDirectory, RestoreError> {
    Ok(TargetDirectory::check(directory, plan, &options.tablespaces)?)
}

/// Executes `plan` into `directory`. Whatever the outcome, nobody writes there any more when this returns.
///
/// Cancel safety: fire [`RestoreOptions::cancel`]; that leaves an unfinished, marked directory, and the same call begins it
/// anew. Where this future is dropped, a few writers still end what they have begun, and must not meet another restore.
pub async fn run(
    repository: &Repository,
    plan: Plan,
    directory: &Path,
    options: &RestoreOptions,
    progress: Arc<Progress>,
) -> Result<Restored, RestoreError> {
    let target = check(&plan, directory, options)?;
    let fetched = tokio::select! {
        biased;
        () = options.cancel.cancelled() => Err(RestoreError::Cancelled),
        fetched = fetch(repository, &plan, &target, &progress) => fetched,
    };
    target.wait_written().await;
    let config_files = fetched?;
    let (finished, no_start, recovery) = (target.clone(), options.no_start, options.recovery.clone());
    let (plan, prepared) = blocking(move || {
        finished.rewrite_tablespace_map()?;
        spool::write_state(&finished.folder(), &plan)?;
        let prepared = recovery.map(|recovery| prepare(&finished, &recovery, &config_files)).transpose()?;
        finished.sync()?;
        write::name_control_file(&finished)?;
        finished.write_state(&plan, if no_start { Phase::HandedOver } else { Phase::Replaying })?;
        Ok((plan, prepared))
    })
    .await?;
    Ok(Restored { target, plan, prepared })
}

/// Files and WAL, without `pg_control`'s name. Gives the source's configuration files.
async fn fetch(
    repository: &Repository,
    plan: &Plan,
    target: &TargetDirectory,
    progress: &Arc<Progress>,
) -> Result<Vec<ConfigFile>, RestoreError> {
    let incarnation = plan.incarnation().map_err(|e| RestoreError::Planned(e.0))?;
    let commit = match catalogue::load_backup(repository, incarnation, &plan.backup.id).await {
        Err(e) if e.is_not_found() => return Err(RestoreError::BackupGone { backup: plan.backup.id.to_string() }),
        loaded => loaded?,
    };
    target.prepare(plan)?;
    let fetch =
        Fetch { repository: repository.clone(), incarnation, target: target.clone(), progress: progress.clone() };
    let fetcher = SegmentFetcher::new(repository, incarnation, plan.segment_size).among(target.writers());
    let done = || {
        progress.segments.fetch_add(1, Ordering::Relaxed);
    };
    // At the same time: neither waits for the other's last bytes.
    let pg_wal = target.pg_wal();
    tokio::try_join!(fetch.run(commit.tables), wal::preload(&fetcher, plan, &pg_wal, done))?;
    Ok(commit.surroundings.config_files)
}

/// Before `pg_control` has its name, so that no server is ever started here that would recover to another point.
fn prepare(
    target: &TargetDirectory,
    recovery: &Recovery,
    config_files: &[ConfigFile],
) -> Result<Prepared, RestoreError> {
    let path = write::unnamed_control_file(target)?;
    let prepare = || {
        if recovery.configuration == Configuration::Source {
            surroundings::place(config_files, target.root())?;
        }
        recovery::prepare_with(target.root(), recovery::read_control_at(&path)?, recovery)
    };
    prepare().map_err(RestoreError::Prepare)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RestoreError> + Send + 'static,
) -> Result<T, RestoreError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| RepositoryError::Stopping)?
}
