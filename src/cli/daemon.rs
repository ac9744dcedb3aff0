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
        beside.spawn(listener.run(handle.clone(), service.jobs.clone(), cancel.clone()));
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
                tell(manager, handle, SILENCE_MAX);
            }
        }
    }
}

/// Says how we are, and feeds the watchdog unless a task has made no progress for `silence_max`.
fn tell(manager: &ServiceManager, handle: &Handle, silence_max: Duration) {
    manager.status(&summary(&handle.snapshot()));
    let silent = handle.silent(silence_max);
    if silent.is_empty() {
        manager.feed_watchdog();
    } else {
        error!(environments = ?silent, "tasks make no progress: the watchdog is not fed");
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
    use std::collections::BTreeMap;
    use std::os::unix::net::UnixDatagram;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use async_trait::async_trait;

    use super::*;
    use crate::daemon::Daemon;
    use crate::daemon::snapshot::{EnvironmentSnapshot, Timestamp};
    use crate::daemon::supervisor::{Body, BodyContext, Pauses};

    /// A task that turns in its loop unless it is told to stand still.
    #[derive(Default)]
    struct Turns {
        stands_still: AtomicBool,
        has_turned: AtomicBool,
    }

    #[async_trait]
    impl Body for Turns {
        async fn run(&self, context: BodyContext) -> Result<(), Failure> {
            while !context.cancel.is_cancelled() {
                if !self.stands_still.load(Ordering::SeqCst) {
                    context.pulse.beat();
                    self.has_turned.store(true, Ordering::SeqCst);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_task_without_progress_keeps_the_watchdog_from_being_fed_and_one_that_goes_on_does_not() {
        const SILENCE: Duration = Duration::from_millis(300);
        let tasks = [Arc::new(Turns::default()), Arc::new(Turns::default())];
        let bodies =
            ["shop", "cafe"].map(str::to_owned).into_iter().zip(tasks.clone().map(|task| task as Arc<dyn Body>));
        let daemon = Daemon::start(bodies.collect::<BTreeMap<_, _>>(), Pauses::default(), CancellationToken::new());
        let handle = daemon.handle();
        let dir = tempfile::tempdir().expect("temporary directory");
        let socket = UnixDatagram::bind(dir.path().join("notify")).expect("bind");
        socket.set_nonblocking(true).expect("set");
        let manager = ServiceManager::at(&dir.path().join("notify"));
        let hears = || {
            tell(&manager, &handle, SILENCE);
            let mut buffer = [0; 4096];
            let heard = std::iter::from_fn(|| socket.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec()));
            heard.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect::<Vec<_>>()
        };
        let until = async |what: &str, wanted: &dyn Fn() -> bool| {
            let wait = async {
                while !wanted() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(30), wait).await.expect(what);
        };
        let is_fed = || hears().iter().any(|line| line == "WATCHDOG=1");
        until("both turn", &|| tasks.iter().all(|task| task.has_turned.load(Ordering::SeqCst))).await;
        until("the watchdog is fed", &is_fed).await;
        tasks[0].stands_still.store(true, Ordering::SeqCst);
        until("the silence is noticed", &|| handle.silent(SILENCE).contains(&"shop".to_owned())).await;
        let heard = hears();
        assert!(heard.len() == 1 && heard[0].starts_with("STATUS="), "{heard:?}");
        tasks[0].stands_still.store(false, Ordering::SeqCst);
        until("it is fed again", &is_fed).await;
        assert!(daemon.stop(Duration::from_secs(5)).await);
    }

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
