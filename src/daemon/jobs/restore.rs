//! A restore as a job.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use futures::FutureExt as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio_util::task::AbortOnDropHandle;

use super::context::apart;
use super::evidence::{Aim, Restored};
use super::{JobContext, Work};
use crate::config::Environment;
use crate::daemon::service::Shown;
use crate::error::{Code, Failure};
use crate::operations::planned::{Here, Planned, TargetAsked};
use crate::operations::restore::{Check, Observer, RestoreRequest, execute};
use crate::restore::recovery::Finish;
use crate::restore::target::TablespacePlaces;
use crate::restore::{Plan, fetch, follow};

/// How often what is fetched is passed on.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// A restore as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreAsked {
    #[serde(default = "latest")]
    pub to: String,
    #[serde(default)]
    pub exclusive: bool,
    #[serde(default)]
    pub timeline: Option<u32>,
    #[serde(default)]
    pub incarnation: Option<u32>,
    /// An absolute path; the daemon's user makes the directory, and owns it.
    pub into: PathBuf,
    #[serde(default)]
    pub finish: FinishAsked,
    #[serde(default)]
    pub check: CheckAsked,
    #[serde(default)]
    pub with_config: bool,
    #[serde(default)]
    pub no_start: bool,
    /// Pairs of old and new places.
    #[serde(default)]
    pub tablespaces: Vec<(PathBuf, PathBuf)>,
    #[serde(default)]
    pub tablespaces_under: Option<PathBuf>,
    /// A superuser of the restored cluster, for the checks.
    #[serde(default = "superuser")]
    pub user: String,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FinishAsked {
    #[default]
    Promote,
    Pause,
    Shutdown,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CheckAsked {
    None,
    #[default]
    Quick,
    Full,
}

fn latest() -> String {
    "latest".to_owned()
}

fn superuser() -> String {
    "postgres".to_owned()
}

impl RestoreAsked {
    /// What can be said without looking into the repository.
    ///
    /// # Errors
    /// When the target is none, or a path is not absolute.
    pub fn check(&self) -> Result<(), Failure> {
        self.target().target()?;
        let places = self.tablespaces.iter().map(|(_, new)| new).chain(&self.tablespaces_under);
        match [&self.into].into_iter().chain(places).find(|path| !path.is_absolute()) {
            Some(path) => {
                Err(Failure::new(Code::Usage, format!("restore into {}: not an absolute path", path.display())))
            }
            None => Ok(()),
        }
    }

    fn target(&self) -> TargetAsked {
        let RestoreAsked { to, exclusive, timeline, incarnation, .. } = self.clone();
        TargetAsked { to, exclusive, timeline, incarnation }
    }

    fn request(&self, environment: &Environment, wal_get: Vec<String>) -> RestoreRequest {
        RestoreRequest {
            into: self.into.clone(),
            finish: match self.finish {
                FinishAsked::Promote => Finish::Promote,
                FinishAsked::Pause => Finish::Pause,
                FinishAsked::Shutdown => Finish::Shutdown,
            },
            check: match self.check {
                CheckAsked::None => Check::None,
                CheckAsked::Quick => Check::Quick,
                CheckAsked::Full => Check::Full,
            },
            with_config: self.with_config,
            no_start: self.no_start,
            tablespaces: TablespacePlaces { moved: self.tablespaces.clone(), under: self.tablespaces_under.clone() },
            socket_directory: None,
            wal_get,
            postgres_bin_dirs: environment.restore.postgres_bin_dirs.clone(),
            user: self.user.clone(),
        }
    }
}

/// Plans what a job restores, and puts down what that is.
///
/// # Errors
/// As the plan says, and when the job is cancelled meanwhile.
pub async fn plan(job: &JobContext, environment: &Environment, target: &TargetAsked) -> Result<Planned, Failure> {
    job.progress("planning", 0, None);
    let here = Here {
        environment: environment.name.as_str(),
        zone: environment.time_zone,
        postgres_bin_dirs: &environment.restore.postgres_bin_dirs,
    };
    let cancelled = || Failure::new(Code::Cancelled, format!("plan the {}: it was cancelled", job.spec.kind.as_str()));
    let planned = tokio::select! {
        biased;
        () = job.cancel.cancelled() => return Err(cancelled()),
        planned = target.plan(here, &job.repository).boxed() => planned?,
    };
    job.log(&format!("target: {}", planned.target_shown));
    job.log(&format!("from backup {}", planned.plan.backup.id));
    Ok(planned)
}

/// Plans a restore and executes it.
pub struct RestoreWork {
    pub environment: Environment,
    pub asked: RestoreAsked,
    /// The words of the command that serves WAL to the restored server.
    pub wal_get: Vec<String>,
}

#[async_trait]
impl Work for RestoreWork {
    async fn run(&self, job: &JobContext) -> Result<Value, Failure> {
        let planned = plan(job, &self.environment, &self.asked.target()).await?;
        let aim = Aim::from(&planned);
        let request = self.asked.request(&self.environment, self.wal_get.clone());
        let mut watcher = JobObserver::new(job.clone());
        let (repository, cancel) = (job.repository.clone(), job.cancel.clone());
        let executed =
            apart(move || async move { execute(&repository, planned.plan, &request, &mut watcher, cancel).await });
        let report = executed.await?;
        let into = format!("{} into {}", report.environment, report.directory.display());
        job.restored(Restored::new(&into, &aim, &report, &report.remarks));
        Ok(Shown::new(&report, report.show()).into_result())
    }
}

/// Passes the progress of a restore on to its job.
pub struct JobObserver {
    job: JobContext,
    fetching: Option<AbortOnDropHandle<()>>,
}

impl JobObserver {
    pub fn new(job: JobContext) -> JobObserver {
        JobObserver { job, fetching: None }
    }
}

impl Observer for JobObserver {
    fn fetching(&mut self, plan: &Plan, counters: Arc<fetch::Progress>) {
        let (job, total) = (self.job.clone(), plan.backup.bytes);
        self.fetching = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            loop {
                job.progress("restoring files", counters.bytes.load(Ordering::Relaxed), Some(total));
                tokio::time::sleep(LOOK_EVERY).await;
            }
        })));
    }

    fn replaying(&mut self, plan: &Plan, seen: &follow::Progress) {
        self.fetching = None;
        let (start, stop) = (plan.backup.start_lsn, plan.stop.end_lsn);
        let total = stop.saturating_since(start);
        let done = seen.replayed_lsn.map_or(0, |lsn| lsn.saturating_since(start)).min(total);
        self.job.progress("replaying WAL", done, Some(total));
    }

    fn usable(&mut self, psql: &str) {
        self.fetching = None;
        self.job.log(&format!("usable: {psql}"));
    }
}
