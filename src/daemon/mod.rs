//! The service: one supervised task an environment, until it is told to stop.
//!
//! [`Daemon::start`] spawns, [`Daemon::stop`] waits: after the token fires every task stores what it holds and ends
//! within the grace period; what has not ended then is aborted, in a state that the next start repairs.

pub mod access;
pub mod audit;
mod backups;
pub mod environment;
pub mod guardian;
pub mod handle;
pub mod incidents;
pub mod jobs;
mod pruning;
pub mod pulse;
pub mod reload;
pub mod repositories;
pub mod sandboxes;
pub mod schedule;
pub mod service;
pub mod slots;
pub mod snapshot;
pub mod supervisor;
mod survey;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, info_span, warn};

use crate::util::clock;
use crate::util::digest::Digest;
use handle::{EnvironmentHandle, Handle, REQUESTS_MAX, ReloadRequest};
use pulse::Pulse;
use snapshot::EnvironmentSnapshot;
use supervisor::{Body, Pauses, Supervisor};

/// The running service.
pub struct Daemon {
    handle: Handle,
    /// Who wants the configuration to be read again.
    reloads: mpsc::Receiver<ReloadRequest>,
    running: BTreeMap<String, Task>,
    /// Tasks that were told to end, by what says that they have.
    leaving: BTreeMap<String, CancellationToken>,
    tasks: JoinSet<()>,
    pauses: Pauses,
    cancel: CancellationToken,
}

/// What is to run for an environment.
pub struct Planned {
    pub body: Arc<dyn Body>,
    /// Another one means another body.
    pub fingerprint: Digest,
}

/// For a service that is never told of another configuration.
impl From<Arc<dyn Body>> for Planned {
    fn from(body: Arc<dyn Body>) -> Self {
        Planned { body, fingerprint: Digest::sha256(b"") }
    }
}

/// The task of an environment.
struct Task {
    handle: EnvironmentHandle,
    fingerprint: Digest,
    cancel: CancellationToken,
    /// Fires when the task has ended.
    ended: CancellationToken,
}

/// What another plan changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub added: Vec<String>,
    pub changed: Vec<String>,
    pub removed: Vec<String>,
    pub unchanged: usize,
}

impl Daemon {
    /// Starts a task for every environment. All of them end after `cancel` fires.
    pub fn start<P: Into<Planned>>(planned: BTreeMap<String, P>, pauses: Pauses, cancel: CancellationToken) -> Daemon {
        let (handle, reloads) = Handle::new(clock::now().into());
        let (running, leaving, tasks) = (BTreeMap::new(), BTreeMap::new(), JoinSet::new());
        let mut daemon = Daemon { handle, reloads, running, leaving, tasks, pauses, cancel };
        daemon.apply(planned.into_iter().map(|(name, planned)| (name, planned.into())).collect());
        daemon
    }

    /// Runs what is planned from now on: what is the same goes on untouched, what is another is started anew once the present
    /// one has ended.
    pub fn apply(&mut self, planned: BTreeMap<String, Planned>) -> Changes {
        while self.tasks.try_join_next().is_some() {}
        self.leaving.retain(|_, ended| !ended.is_cancelled());
        let mut changes = Changes::default();
        for (name, task) in self.running.extract_if(.., |name, _| !planned.contains_key(name)) {
            task.cancel.cancel();
            self.leaving.insert(name.clone(), task.ended);
            changes.removed.push(name);
        }
        for (name, planned) in planned {
            match self.running.remove(&name) {
                Some(task) if task.fingerprint == planned.fingerprint => {
                    self.running.insert(name, task);
                    changes.unchanged += 1;
                }
                Some(task) => {
                    task.cancel.cancel();
                    self.spawn(&name, planned, Some(task.ended));
                    changes.changed.push(name);
                }
                None => {
                    let before = self.leaving.remove(&name);
                    self.spawn(&name, planned, before);
                    changes.added.push(name);
                }
            }
        }
        let handles = self.running.iter().map(|(name, task)| (name.clone(), task.handle.clone()));
        self.handle.replace(handles.collect());
        changes
    }

    /// Starts a task, after the one before it has ended: they would wait for each other's slot.
    fn spawn(&mut self, name: &str, planned: Planned, before: Option<CancellationToken>) {
        let (to_task, requests) = mpsc::channel(REQUESTS_MAX);
        let (snapshot, watched) = watch::channel(EnvironmentSnapshot::new(name, clock::now().into()));
        let (cancel, ended, pulse) = (self.cancel.child_token(), CancellationToken::new(), Pulse::default());
        let supervisor = Supervisor {
            name: name.to_owned(),
            body: planned.body,
            requests,
            snapshot,
            pulse: pulse.clone(),
            cancel: cancel.clone(),
            pauses: self.pauses,
        };
        let guard = ended.clone().drop_guard();
        let work = async move {
            let _guard = guard;
            if let Some(before) = before {
                before.cancelled().await;
            }
            supervisor.run().await;
        };
        self.tasks.spawn(work.instrument(info_span!("environment", environment = %name)));
        let handle = EnvironmentHandle { snapshot: watched, requests: to_task, pulse };
        let task = Task { handle, fingerprint: planned.fingerprint, cancel, ended };
        self.running.insert(name.to_owned(), task);
    }

    /// The next one who wants the configuration to be read again.
    ///
    /// Cancel safety: safe.
    pub async fn reload_asked(&mut self) -> ReloadRequest {
        match self.reloads.recv().await {
            Some(request) => request,
            None => std::future::pending().await,
        }
    }

    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Tells every task to end and waits for them, at most `grace`; returns whether all ended in time.
    pub async fn stop(mut self, grace: Duration) -> bool {
        self.cancel.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(grace, all).await.is_ok() {
            return true;
        }
        warn!(grace_ms = grace.as_millis(), "some environments did not stop in time and are cut off");
        self.tasks.shutdown().await;
        false
    }
}
