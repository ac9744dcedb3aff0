//! The calls that others may make to the running service.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::repositories;
use super::snapshot::{BackupProgress, EnvironmentSnapshot, Snapshot};
use crate::error::{Code, Failure};
use crate::pg::Timestamp;
use crate::util::clock;

/// Requests that wait for one environment; each is some bytes.
pub const REQUESTS_MAX: usize = 8;

/// Something an environment's task is asked to do.
#[derive(Debug)]
pub enum Request {
    /// Take a backup and say how it goes; the last value sent is final.
    Backup { progress: ProgressSender },
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
        }
    }
}

/// A cheap copy of the way to the service.
#[derive(Debug, Clone)]
pub struct Handle {
    started_at: Timestamp,
    environments: Arc<BTreeMap<String, EnvironmentHandle>>,
}

/// The way to one environment's task.
#[derive(Debug)]
pub struct EnvironmentHandle {
    pub snapshot: watch::Receiver<EnvironmentSnapshot>,
    pub requests: mpsc::Sender<Request>,
}

impl Handle {
    pub fn new(started_at: Timestamp, environments: BTreeMap<String, EnvironmentHandle>) -> Self {
        Handle { started_at, environments: Arc::new(environments) }
    }

    pub fn snapshot(&self) -> Snapshot {
        let environments = self.environments.values().map(|environment| environment.snapshot.borrow().clone());
        Snapshot { started_at: self.started_at, taken_at: clock::now().into(), environments: environments.collect() }
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

    /// What an environment's task says of itself, as it changes.
    ///
    /// # Errors
    /// When there is no such environment.
    pub fn watch(&self, environment: &str) -> Result<watch::Receiver<EnvironmentSnapshot>, Failure> {
        self.find(environment).map(|handle| handle.snapshot.clone())
    }

    fn find(&self, environment: &str) -> Result<&EnvironmentHandle, Failure> {
        let known = self.environments.keys().map(String::as_str);
        self.environments.get(environment).ok_or_else(|| repositories::not_found(environment, known))
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
