//! The calls that others may make to the running service.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::pulse::Pulse;
use super::reload::ReloadReport;
use super::snapshot::{BackupProgress, EnvironmentSnapshot, Snapshot};
use crate::error::{Code, Failure};
use crate::pg::Timestamp;
use crate::retention::prune::Report;
use crate::util::clock;

/// Requests that wait for one environment; each is some bytes.
pub const REQUESTS_MAX: usize = 8;

/// Something an environment's task is asked to do.
#[derive(Debug)]
pub enum Request {
    /// Take a backup and say how it goes; the last value sent is final.
    Backup { progress: ProgressSender },
    /// Remove what has left the window.
    Prune(PruneAsked),
}

/// Somebody wants an environment to be pruned now. Dropped without an answer, it says that the task has ended.
#[derive(Debug)]
pub struct PruneAsked {
    pub outcome: oneshot::Sender<Result<Report, Failure>>,
    /// Fires when whoever asked does not want it any more.
    pub unwanted: CancellationToken,
}

/// Tells whoever asked for a backup how it goes. Dropped before a final value, it says that the task has ended.
#[derive(Debug)]
pub struct ProgressSender {
    sender: watch::Sender<BackupProgress>,
    /// Fires when whoever asked does not want it any more.
    unwanted: CancellationToken,
}

impl ProgressSender {
    /// A sender, and where the progress is seen.
    pub fn new(unwanted: CancellationToken) -> (ProgressSender, watch::Receiver<BackupProgress>) {
        let (sender, receiver) = watch::channel(BackupProgress::accepted());
        (ProgressSender { sender, unwanted }, receiver)
    }

    pub fn send(&self, progress: BackupProgress) {
        self.sender.send_replace(progress);
    }

    pub fn is_unwanted(&self) -> bool {
        self.unwanted.is_cancelled()
    }
}

impl Drop for ProgressSender {
    fn drop(&mut self) {
        if !self.sender.borrow().is_final() {
            let failure = Failure::new(Code::Cancelled, "finish the backup: the environment's task has ended");
            self.send(BackupProgress::Failed(failure.retryable().hint("The daemon's log says why; ask again.")));
        }
    }
}

impl Request {
    /// Answers with a failure.
    pub fn refuse(self, failure: Failure) {
        match self {
            Request::Backup { progress } => progress.send(BackupProgress::Failed(failure)),
            Request::Prune(asked) => asked.refuse(failure),
        }
    }
}

impl PruneAsked {
    pub fn refuse(self, failure: Failure) {
        // Whoever asked may be gone.
        let _ = self.outcome.send(Err(failure));
    }
}

/// A cheap copy of the way to the service.
#[derive(Debug, Clone)]
pub struct Handle {
    started_at: Timestamp,
    environments: Arc<RwLock<BTreeMap<String, EnvironmentHandle>>>,
    reloads: mpsc::Sender<ReloadRequest>,
}

/// The way to one environment's task.
#[derive(Debug, Clone)]
pub struct EnvironmentHandle {
    pub snapshot: watch::Receiver<EnvironmentSnapshot>,
    pub requests: mpsc::Sender<Request>,
    pub pulse: Pulse,
}

/// Somebody wants the configuration to be read again, and to hear what came of it.
pub type ReloadRequest = oneshot::Sender<Result<ReloadReport, Failure>>;

/// Requests to reload that may wait.
const RELOADS_MAX: usize = 4;

impl Handle {
    /// The handle of a service without environments, and where it hears of reloads.
    pub fn new(started_at: Timestamp) -> (Handle, mpsc::Receiver<ReloadRequest>) {
        let (reloads, requests) = mpsc::channel(RELOADS_MAX);
        (Handle { started_at, environments: Arc::default(), reloads }, requests)
    }

    /// The environments are these from now on.
    pub(super) fn replace(&self, environments: BTreeMap<String, EnvironmentHandle>) {
        *self.environments.write().unwrap_or_else(PoisonError::into_inner) = environments;
    }

    pub fn snapshot(&self) -> Snapshot {
        let environments = self.environments.read().unwrap_or_else(PoisonError::into_inner);
        let environments = environments.values().map(|environment| environment.snapshot.borrow().clone());
        Snapshot { started_at: self.started_at, taken_at: clock::now().into(), environments: environments.collect() }
    }

    /// The environments whose tasks have made no progress for `limit`.
    pub fn silent(&self, limit: Duration) -> Vec<String> {
        let environments = self.environments.read().unwrap_or_else(PoisonError::into_inner);
        let silent = environments.iter().filter(|(_, e)| e.pulse.silence().is_some_and(|silence| silence > limit));
        silent.map(|(name, _)| name.clone()).collect()
    }

    /// Reads the configuration again and says what that changed.
    ///
    /// # Errors
    /// When something is wrong in it; nothing has changed then.
    pub async fn reload(&self) -> Result<ReloadReport, Failure> {
        let (reply, answer) = oneshot::channel();
        let stopping = || Failure::new(Code::Cancelled, "reload the configuration: the daemon is stopping").retryable();
        self.reloads.send(reply).await.map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// Asks for a backup. It goes on when the receiver is dropped, and ends early when `unwanted` fires and nobody else
    /// waits for it.
    ///
    /// # Errors
    /// When there is no such environment, or it has too many requests waiting.
    pub fn start_backup(
        &self,
        environment: &str,
        unwanted: CancellationToken,
    ) -> Result<watch::Receiver<BackupProgress>, Failure> {
        let (progress, receiver) = ProgressSender::new(unwanted);
        self.send(environment, Request::Backup { progress })?;
        Ok(receiver)
    }

    /// Has an environment's task prune it, under its own generation; ends early when `unwanted` fires.
    ///
    /// Cancel safety: dropping this future does not end the prune.
    ///
    /// # Errors
    /// When there is no such environment, or it has too many requests waiting; and as the prune says.
    pub async fn prune(&self, environment: &str, unwanted: CancellationToken) -> Result<Report, Failure> {
        let (outcome, answer) = oneshot::channel();
        self.send(environment, Request::Prune(PruneAsked { outcome, unwanted }))?;
        let ended = || Failure::new(Code::Cancelled, format!("prune {environment}: its task has ended")).retryable();
        answer.await.unwrap_or_else(|_| Err(ended().hint("The daemon's log says why; ask again.")))
    }

    /// What an environment's task says of itself, as it changes.
    ///
    /// # Errors
    /// When there is no such environment.
    pub fn watch(&self, environment: &str) -> Result<watch::Receiver<EnvironmentSnapshot>, Failure> {
        self.find(environment).map(|handle| handle.snapshot)
    }

    fn find(&self, environment: &str) -> Result<EnvironmentHandle, Failure> {
        let environments = self.environments.read().unwrap_or_else(PoisonError::into_inner);
        environments.get(environment).cloned().ok_or_else(|| {
            Failure::new(Code::NotFound, format!("this daemon looks after no server of {environment}"))
                .hint("`postgres` in its part of the configuration names one; after a change, `pgrecall reload`.")
        })
    }

    fn send(&self, environment: &str, request: Request) -> Result<(), Failure> {
        self.find(environment)?.requests.try_send(request).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                Failure::new(Code::Conflict, format!("ask {environment}: {REQUESTS_MAX} requests wait already"))
                    .retryable()
            }
            mpsc::error::TrySendError::Closed(_) => {
                Failure::new(Code::Cancelled, format!("ask {environment}: the daemon is stopping")).retryable()
            }
        })
    }
}
