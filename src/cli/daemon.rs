//! `pgrecall daemon`: the service, in the foreground, until SIGTERM or SIGINT.
//!
//! The control socket is served here, because the service itself knows nothing of those who ask.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Context, interrupted};
use crate::config::Config;
use crate::control::server::Server;
use crate::daemon::environment::EnvironmentBody;
use crate::daemon::jobs::{self, Jobs};
use crate::daemon::repositories::Repositories;
use crate::daemon::supervisor::{Body, Pauses};
use crate::daemon::{Daemon, slots};
use crate::error::{Code, Failure};
use crate::telemetry;

/// Beyond the time for the tails: connections are closed and tasks joined.
const JOIN_GRACE: Duration = Duration::from_secs(5);

pub async fn run(context: &Context) -> Result<(), Failure> {
    let config = context.load_config()?;
    telemetry::start(&config.log);
    let cancel = CancellationToken::new();
    let server = Server::bind(&config.control_socket)?;
    info!(
        version = env!("CARGO_PKG_VERSION"),
        config = %config.path.display(),
        socket = %config.control_socket.display(),
        environments = config.environments.len(),
        "daemon started"
    );
    let repositories = Repositories::new(&config);
    let jobs =
        Jobs::start(repositories, jobs::daemon_name(&config.control_socket), config.limits, cancel.child_token());
    let daemon = Daemon::start(bodies(&config, &jobs), Pauses::default(), cancel.clone());
    let serving = tokio::spawn(server.run(daemon.handle(), cancel.clone(), JOIN_GRACE));
    interrupted().await;
    info!(grace_ms = config.shutdown_grace.as_millis(), "stopping: what was received is being stored");
    cancel.cancel();
    let in_time = tokio::select! {
        in_time = daemon.stop(config.shutdown_grace + JOIN_GRACE) => in_time,
        () = interrupted() => {
            warn!("told to stop twice: not waiting any longer");
            false
        }
    };
    if !jobs.stopped(JOIN_GRACE).await {
        warn!("some jobs did not end in time; the next start names them");
    }
    if let Err(error) = serving.await {
        warn!(error = %error, "the control socket's task did not end well");
    }
    if in_time {
        info!("stopped");
        return Ok(());
    }
    let message =
        "store everything received before stopping; PostgreSQL still has it, and the next start goes on from there";
    Err(Failure::new(Code::Cancelled, message))
}

fn bodies(config: &Config, jobs: &Jobs) -> BTreeMap<String, Arc<dyn Body>> {
    let mut bodies: BTreeMap<String, Arc<dyn Body>> = BTreeMap::new();
    for environment in config.environments.values() {
        let name = environment.name.to_string();
        if environment.postgres.is_none() {
            info!(environment = name, "not archived from here: it has no `postgres` in the configuration");
            continue;
        }
        let body = EnvironmentBody {
            environment: environment.clone(),
            shutdown_grace: config.shutdown_grace,
            owned_slots: slots::owned(config),
            jobs: Some(jobs.clone()),
        };
        bodies.insert(name, Arc::new(body));
    }
    bodies
}
