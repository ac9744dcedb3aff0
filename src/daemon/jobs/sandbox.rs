//! A sandbox as a job: planned, restored, promoted, and its role made.

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::context::apart;
use super::evidence::{Aim, Restored};
use super::restore::{JobObserver, plan};
use super::{JobContext, Work};
use crate::config::Environment;
use crate::daemon::service::Shown;
use crate::error::{Code, Failure};
use crate::operations::planned::TargetAsked;
use crate::operations::sandbox::{Area, Asked, CreateRequest, Created, Source};
use crate::util::units::parse_duration;

/// A sandbox as it is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxAsked {
    #[serde(default = "latest")]
    pub to: String,
    #[serde(default)]
    pub exclusive: bool,
    #[serde(default)]
    pub timeline: Option<u32>,
    #[serde(default)]
    pub incarnation: Option<u32>,
    /// The role may write.
    #[serde(default)]
    pub writable: bool,
    /// Such as `8h`; else as the configuration says.
    #[serde(default)]
    pub expires: Option<String>,
}

fn latest() -> String {
    "latest".to_owned()
}

impl SandboxAsked {
    /// What can be said without looking into the repository.
    ///
    /// # Errors
    /// When the target or the duration is none.
    pub fn check(&self) -> Result<(), Failure> {
        self.target().target()?;
        life(self.expires.as_deref()).map(|_| ())
    }

    fn target(&self) -> TargetAsked {
        let SandboxAsked { to, exclusive, timeline, incarnation, .. } = self.clone();
        TargetAsked { to, exclusive, timeline, incarnation }
    }
}

/// Reads how long a sandbox is to live.
///
/// # Errors
/// When that is no duration.
pub fn life(text: Option<&str>) -> Result<Option<Duration>, Failure> {
    let wrong =
        |error: String| Failure::new(Code::Usage, format!("understand how long the sandbox is to live: {error}"));
    text.map(parse_duration).transpose().map_err(wrong)
}

/// Makes a sandbox.
pub struct SandboxWork {
    pub environment: Environment,
    pub area: Area,
    pub asked: SandboxAsked,
    /// The words of the command that serves WAL to the restored server.
    pub wal_get: Vec<String>,
}

#[async_trait]
impl Work for SandboxWork {
    async fn run(&self, job: &JobContext) -> Result<Value, Failure> {
        let (environment, area, asked) = (self.environment.clone(), self.area.clone(), self.asked.clone());
        let (wal_get, job) = (self.wal_get.clone(), job.clone());
        apart(move || async move { SandboxWork { environment, area, asked, wal_get }.make(&job).await }).await
    }
}

impl SandboxWork {
    async fn make(&self, job: &JobContext) -> Result<Value, Failure> {
        let planned = plan(job, &self.environment, &self.asked.target()).await?;
        let request = CreateRequest {
            id: job.id.clone(),
            asked_by: Asked { uid: job.spec.asked_by.uid, user: job.spec.asked_by.user.clone() },
            ticket: job.spec.ticket.clone(),
            target: planned.target.clone(),
            writable: self.asked.writable,
            expires_in: life(self.asked.expires.as_deref())?,
            wal_get: self.wal_get.clone(),
            postgres_bin_dirs: self.environment.restore.postgres_bin_dirs.clone(),
        };
        let aim = Aim::from(&planned);
        let source = Source { repository: &job.repository, plan: planned.plan };
        let mut watcher = JobObserver::new(job.clone());
        let created = self.area.create(source, &request, &mut watcher, job.cancel.clone()).await?;
        let (sandbox, restore) = (&created.sandbox, &created.restore);
        job.restored(Restored::new(&format!("sandbox {}", sandbox.id), &aim, restore, &sandbox.remarks));
        Ok(Shown::new(&created, show(&created)).into_result())
    }
}

fn show(created: &Created) -> String {
    use std::fmt::Write as _;
    let sandbox = &created.sandbox;
    let side = if sandbox.inclusive { "after" } else { "before" };
    let mut text = format!(
        "sandbox {} of {}: {side} {} on timeline {}, from backup {}",
        sandbox.id, sandbox.environment, sandbox.target_lsn, sandbox.timeline, sandbox.backup
    );
    let how = if sandbox.writable { "reads and writes" } else { "reads" };
    let _ = write!(text, "\nconnect with: pgrecall sandbox connect {} (as {}, which {how})", sandbox.id, sandbox.role);
    if let Some(end) = sandbox.expires_at {
        let _ = write!(text, "\nends {end}");
    }
    for remark in &sandbox.remarks {
        let _ = write!(text, "\nnote: {remark}");
    }
    text
}
