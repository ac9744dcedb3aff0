//! The service: one supervised task an environment, until it is told to stop.
//!
//! [`Daemon::start`] spawns, [`Daemon::stop`] waits: after the token fires every task stores what it holds and ends
//! within the grace period; what has not ended then is aborted, in a state that the next start repairs.

mod backups;
pub mod environment;
pub mod handle;
pub mod jobs;
pub mod repositories;
pub mod sandboxes;
pub mod schedule;
pub mod slots;
pub mod snapshot;
pub mod supervisor;
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
use handle::{EnvironmentHandle, Handle, REQUESTS_MAX};
use snapshot::EnvironmentSnapshot;
use supervisor::{Body, Pauses, Supervisor};

/// The running service.
pub struct Daemon {
    handle: Handle,
    tasks: JoinSet<()>,
    cancel: CancellationToken,
}

impl Daemon {
    /// Starts a task for every environment. All of them end after `cancel` fires.
    pub fn start(bodies: BTreeMap<String, Arc<dyn Body>>, pauses: Pauses, cancel: CancellationToken) -> Daemon {
        let now = clock::now().into();
        let mut tasks = JoinSet::new();
        let mut environments = BTreeMap::new();
        for (name, body) in bodies {
            let (to_task, requests) = mpsc::channel(REQUESTS_MAX);
            let (snapshot, watched) = watch::channel(EnvironmentSnapshot::new(&name, now));
            let span = info_span!("environment", environment = %name);
            let supervisor =
                Supervisor { name: name.clone(), body, requests, snapshot, cancel: cancel.clone(), pauses };
            tasks.spawn(supervisor.run().instrument(span));
            environments.insert(name, EnvironmentHandle { snapshot: watched, requests: to_task });
        }
        Daemon { handle: Handle::new(now, environments), tasks, cancel }
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
