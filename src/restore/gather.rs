//! Loads what a plan is made from, and believes that something is missing only when a second listing shows it too.

use super::plan::{Plan, PlanError, PlanInput, Stop};
use crate::pg::timeline::HistoryFile;
use crate::repository::backup_object::BackupCommit;
use crate::repository::catalogue::{self, Gap, HistoryObject, WalListing};
use crate::repository::identity::KnownIncarnation;
use crate::repository::wal_object::load_history;
use crate::repository::{BackupId, Repository, RepositoryError};

/// What the repository holds of one incarnation.
#[derive(Debug, Clone)]
pub struct Gathered {
    pub known: KnownIncarnation,
    pub backups: Vec<BackupCommit>,
    pub wal: WalListing,
    pub histories: Vec<(HistoryObject, HistoryFile)>,
    pub gaps: Vec<Gap>,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct PlanRequest<'a> {
    pub environment: &'a str,
    pub stop: Stop,
    pub backup: Option<&'a BackupId>,
    /// What this host lacks, as sentences.
    pub lacks: &'a [String],
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum GatherError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Plan(#[from] PlanError),
}

impl Gathered {
    /// Loads everything that a plan looks at; reads only.
    pub async fn load(repository: &Repository, known: &KnownIncarnation) -> Result<Gathered, RepositoryError> {
        let (incarnation, size) = (known.incarnation, known.identity.segment_size);
        let (backups, wal, gaps) = futures::try_join!(
            catalogue::list_backups(repository, incarnation),
            catalogue::list_wal(repository, incarnation, size),
            catalogue::list_gaps(repository, incarnation),
        )?;
        let mut histories = Vec::with_capacity(wal.histories.len());
        for object in &wal.histories {
            histories.push((object.clone(), load_history(repository, &object.key, object.hash).await?));
        }
        Ok(Gathered { known: known.clone(), backups, wal, histories, gaps })
    }

    /// # Errors
    /// As [`Plan::build`].
    pub fn plan(&self, request: &PlanRequest<'_>) -> Result<Plan, PlanError> {
        Plan::build(&PlanInput {
            environment: request.environment,
            incarnation: self.known.incarnation,
            segment_size: self.known.identity.segment_size,
            backups: &self.backups,
            backup: request.backup,
            wal: &self.wal,
            histories: &self.histories,
            gaps: &self.gaps,
            stop: request.stop,
            lacks: request.lacks,
        })
    }
}

/// A plan; when something seems to be missing, everything is listed again first.
pub async fn plan(
    repository: &Repository,
    known: &KnownIncarnation,
    request: &PlanRequest<'_>,
) -> Result<Plan, GatherError> {
    match Gathered::load(repository, known).await?.plan(request) {
        Err(e) if e.may_be_stale() => Ok(Gathered::load(repository, known).await?.plan(request)?),
        decided => Ok(decided?),
    }
}
