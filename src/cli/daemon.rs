//! `pgrecall daemon`: the service, in the foreground, until SIGTERM or SIGINT. SIGHUP reads the configuration again.
//!
//! The control socket and the metrics are served here, because the service itself knows nothing of those who ask.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::places::absolute;
use super::{Context, interrupted};
use crate::config::Config;
use crate::control::listener::Listener;
use crate::control::server::Server;
use crate::daemon::audit::AuditLog;
use crate::daemon::handle::Handle;
use crate::daemon::reload::{self, Service};
use crate::daemon::service;
use crate::daemon::snapshot::{Snapshot, State};
use crate::error::{Code, Failure};
use crate::telemetry;
use crate::util::service_manager::ServiceManager;

/// Beyond the time for the tails: connections are closed and tasks joined.
const JOIN_GRACE: Duration = Duration::from_secs(5);
/// How often the service manager hears how we are; more often where its watchdog wants so.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// A task that makes no progress for so long hangs: the watchdog is not fed any more.
const SILENCE_MAX: Duration = Duration::from_secs(90);

pub async fn run(context: &Context) -> Result<(), Failure> {
    let config = context.load_config()?;
    telemetry::start(&config.log);
    let cancel = CancellationToken::new();
    let server = Server::bind(&config.control_socket)?;
    let listener = config.metrics_listen.map(Listener::bind).transpose()?;
    info!(
        version = env!("CARGO_PKG_VERSION"),
        config = %config.path.display(),
        socket = %config.control_socket.display(),
        environments = config.environments.len(),
        "daemon started"
    );
    let mut service = start(config, &cancel);
    let handle = service.daemon.handle();
    let manager = ServiceManager::from_environment();
    let mut beside = JoinSet::new();
    let audit = AuditLog::new(service.repositories.clone(), cancel.child_token());
    let ways = service::Service {
        handle: handle.clone(),
        jobs: service.jobs.clone(),
        access: service.access.clone(),
        audit: audit.clone(),
        repositories: service.repositories.clone(),
        sandboxes: service.sandboxes.clone(),
        config_path: absolute(&service.config.path)?,
    };
    beside.spawn(service.sandboxes.clone().run(cancel.child_token()));
    beside.spawn(server.run(ways, cancel.clone(), JOIN_GRACE));
    if let Some(listener) = listener {
        beside.spawn(listener.run(handle.clone(), cancel.clone()));
    }
    manager.ready();
    tokio::select! {
        () = interrupted() => {}
        () = serve(&mut service, &handle, &manager) => {}
    }
    stop(service, &manager, cancel, Beside { tasks: beside, audit }).await
}

fn start(config: Config, cancel: &CancellationToken) -> Service {
    for environment in config.environments.values().filter(|environment| environment.postgres.is_none()) {
        info!(environment = %environment.name, "not archived from here: it has no `postgres` in the configuration");
    }
    Service::start(config, cancel)
}

/// Reads the configuration again when told to, and reports to the service manager; never ends.
async fn serve(service: &mut Service, handle: &Handle, manager: &ServiceManager) {
    use tokio::signal::unix::{SignalKind, signal};
    let mut hangup = signal(SignalKind::hangup()).ok();
    // A third of the time, so that one report may come late.
    let interval = manager.watchdog().map_or(REPORT_INTERVAL, |watchdog| REPORT_INTERVAL.min(watchdog / 3));
    let mut report = tokio::time::interval(interval);
    report.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let hung_up = async {
            match &mut hangup {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = hung_up => {
                let _ = reload(service);
            }
            reply = service.daemon.reload_asked() => {
                // Whoever asked may be gone; it was done all the same.
                let _ = reply.send(reload(service));
            }
            _ = report.tick() => {
                manager.status(&summary(&handle.snapshot()));
                let silent = handle.silent(SILENCE_MAX);
                if silent.is_empty() {
                    manager.feed_watchdog();
                } else {
                    error!(environments = ?silent, "tasks make no progress: the watchdog is not fed");
                }
            }
        }
    }
}

fn reload(service: &mut Service) -> Result<reload::ReloadReport, Failure> {
    let result = service.reload();
    if let Err(failure) = &result {
        error!(error = %failure, hint = failure.hint, "read the configuration again: failed, nothing has changed");
    }
    result
}

/// What serves those who ask.
struct Beside {
    tasks: JoinSet<()>,
    audit: AuditLog,
}

async fn stop(
    service: Service,
    manager: &ServiceManager,
    cancel: CancellationToken,
    mut beside: Beside,
) -> Result<(), Failure> {
    let grace = service.config.shutdown_grace;
    info!(grace_ms = grace.as_millis(), "stopping: what was received is being stored");
    manager.stopping(grace + 4 * JOIN_GRACE);
    cancel.cancel();
    let in_time = tokio::select! {
        in_time = service.daemon.stop(grace + JOIN_GRACE) => in_time,
        () = interrupted() => {
            warn!("told to stop twice: not waiting any longer");
            false
        }
    };
    if !service.jobs.stopped(JOIN_GRACE).await {
        warn!("some jobs did not end in time; the next start names them");
    }
    if !beside.audit.stopped(JOIN_GRACE).await {
        warn!("some acts did not come to be on record in the repository; this log has them");
    }
    while let Some(ended) = beside.tasks.join_next().await {
        if let Err(error) = ended {
            warn!(error = %error, "a task beside the environments did not end well");
        }
    }
    if in_time {
        info!("stopped");
        return Ok(());
    }
    let message =
        "store everything received before stopping; PostgreSQL still has it, and the next start goes on from there";
    Err(Failure::new(Code::Cancelled, message))
}

/// One line for `systemctl status`: how many are in which state, and the first of those that are not well.
fn summary(snapshot: &Snapshot) -> String {
    let states =
        [State::Conflict, State::Unprotected, State::Lagging, State::Starting, State::Stopped, State::Protected];
    let of = |state: State| snapshot.environments.iter().filter(move |environment| environment.state == state);
    let counts = states.iter().map(|state| (of(*state).count(), state.as_str())).filter(|(count, _)| *count > 0);
    let counts: Vec<String> = counts.map(|(count, state)| format!("{count} {state}")).collect();
    let worst = states.iter().filter(|state| **state != State::Protected).find_map(|state| of(*state).next());
    let worst = worst.map(|environment| {
        let why = environment.detail.as_deref().unwrap_or(environment.state.as_str());
        format!("; {}: {why}", environment.name)
    });
    format!("{}{}", counts.join(", "), worst.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::snapshot::{EnvironmentSnapshot, Timestamp};

    #[test]
    fn the_summary_counts_and_names_the_worst() {
        let environment = |name: &str, state, detail: Option<&str>| {
            let mut environment = EnvironmentSnapshot::new(name, Timestamp(0));
            environment.enter(state, detail.map(str::to_owned), Timestamp(0));
            environment
        };
        let environments = vec![
            environment("a", State::Protected, None),
            environment("b", State::Unprotected, Some("no connection")),
            environment("c", State::Protected, None),
        ];
        let snapshot = Snapshot { started_at: Timestamp(0), taken_at: Timestamp(0), environments };
        assert_eq!(summary(&snapshot), "1 unprotected, 2 protected; b: no connection");
    }
}
