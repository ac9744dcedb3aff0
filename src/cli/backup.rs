//! `pgrecall backup ENV`: asks the running daemon; without one, archives and backs up in this process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use hyper::Method;
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::progress::Progress;
use super::{Context, EnvironmentArgument, TicketArgument, interrupted, remote};
use crate::config::{Config, Environment};
use crate::control::client::{Client, ClientError};
use crate::control::protocol::{Accepted, BackupEvent, JobReport};
use crate::daemon::environment::EnvironmentBody;
use crate::daemon::snapshot::{EnvironmentSnapshot, State, Wal};
use crate::daemon::supervisor::{Body, Pauses};
use crate::daemon::{Daemon, slots};
use crate::error::{Code, Failure};

/// How long WAL may need to flow where no daemon runs.
const STREAMING_WAIT: Duration = Duration::from_secs(60);

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    environment: EnvironmentArgument,
    #[command(flatten)]
    ticket: TicketArgument,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let body = arguments.ticket.with(serde_json::json!({}));
    if let Some(client) = context.daemon_of_another() {
        let path = format!("/v1/environments/{}/backup", arguments.environment.name);
        let report = remote::run_job(context, &client, &path, &body).await?;
        return show_end(context, event_of(&report));
    }
    let config = context.load_config()?;
    let environment = arguments.environment.find(&config)?;
    let mut progress = Progress::new(context.output);
    let asked = tokio::select! {
        biased;
        () = interrupted() => {
            let failure = Failure::new(Code::Cancelled, "wait for the backup: interrupted");
            return Err(failure.hint("The daemon goes on with the backup; `pgrecall status` shows it."));
        }
        asked = ask_daemon(&config, environment, &body, &mut progress) => asked,
    };
    let event = match asked {
        Ok(event) => event,
        Err(ClientError::NoDaemon(_)) => {
            if !context.output.is_json() {
                context.output.note("no daemon is running: archiving and backing up from here");
            }
            alone(&config, environment, &mut progress).await?
        }
        Err(ClientError::Failed(failure)) => return Err(failure),
    };
    drop(progress);
    show_end(context, event)
}

fn show_end(context: &Context, event: BackupEvent) -> Result<(), Failure> {
    match event {
        BackupEvent::Failed { error } => Err(error),
        done => {
            context.output.result(&done, |done| match done {
                BackupEvent::Done { backup, summary, .. } => format!("backup {backup}: {summary}"),
                BackupEvent::Running { .. } | BackupEvent::Failed { .. } => String::new(),
            });
            Ok(())
        }
    }
}

async fn ask_daemon(
    config: &Config,
    environment: &Environment,
    body: &Value,
    progress: &mut Progress,
) -> Result<BackupEvent, ClientError> {
    let client = Client::new(&config.control_socket);
    let path = format!("/v1/environments/{}/backup", environment.name);
    let accepted: Accepted = client.ask(Method::POST, &path, Some(body)).await?;
    let report = client.follow(&accepted.job, |report| show(progress, &event_of(report))).await?;
    Ok(event_of(&report))
}

/// A job that takes a backup, in the words of a backup.
fn event_of(report: &JobReport) -> BackupEvent {
    let text = |key: &str| {
        let found = report.result.as_ref().and_then(|result| result[key].as_str());
        found.unwrap_or_default().to_owned()
    };
    match (&report.error, &report.result) {
        (Some(error), _) => BackupEvent::Failed { error: error.clone() },
        (None, Some(result)) => BackupEvent::Done {
            backup: text("backup"),
            bytes_stored: result["bytes_stored"].as_u64().unwrap_or(0),
            summary: text("summary"),
        },
        (None, None) => BackupEvent::Running {
            phase: report.phase.clone().unwrap_or_else(|| report.state.clone()),
            bytes_done: report.bytes_done,
            bytes_total: report.bytes_total,
        },
    }
}

/// A service for this one environment, for as long as the backup takes.
async fn alone(config: &Config, environment: &Environment, progress: &mut Progress) -> Result<BackupEvent, Failure> {
    environment.connect()?;
    let name = environment.name.to_string();
    let body = EnvironmentBody {
        environment: environment.clone(),
        shutdown_grace: config.shutdown_grace,
        owned_slots: slots::owned(config),
        jobs: None,
        backup_throttle: config.limits.backup_throttle(),
        wal_budget: config.limits.wal_budget(),
        store_errors: Arc::default(),
    };
    let bodies = BTreeMap::from([(name.clone(), Arc::new(body) as Arc<dyn Body>)]);
    let daemon = Daemon::start(bodies, Pauses::default(), CancellationToken::new());
    let work = async {
        let handle = daemon.handle();
        wait_streaming(&name, handle.watch(&name)?, progress).await?;
        let mut asked = handle.start_backup(&name, CancellationToken::new())?;
        loop {
            let now = asked.borrow_and_update().clone();
            let event = BackupEvent::from(&now);
            if now.is_final() {
                return Ok(event);
            }
            show(progress, &event);
            if asked.changed().await.is_err() && !asked.borrow().is_final() {
                return Err(Failure::new(Code::Internal, format!("take a backup of {name}: its task has ended")));
            }
        }
    };
    let result = tokio::select! {
        biased;
        () = interrupted() => Err(Failure::new(Code::Cancelled, format!("take a backup of {name}: interrupted"))),
        result = work => result,
    };
    daemon.stop(config.shutdown_grace).await;
    result
}

/// Waits until WAL flows: a backup without the WAL from its start on would be worth nothing.
async fn wait_streaming(
    name: &str,
    mut snapshot: watch::Receiver<EnvironmentSnapshot>,
    progress: &mut Progress,
) -> Result<(), Failure> {
    progress.show("waiting for WAL to flow", 0, None);
    let decided = |snapshot: &EnvironmentSnapshot| {
        snapshot.wal == Wal::Streaming
            || snapshot.failure.is_some()
            || matches!(snapshot.state, State::Conflict | State::Stopped)
    };
    let _ = tokio::time::timeout(STREAMING_WAIT, snapshot.wait_for(decided)).await;
    let reached = snapshot.borrow().clone();
    if reached.wal == Wal::Streaming {
        return Ok(());
    }
    if let Some(failure) = reached.failure {
        return Err(failure);
    }
    let code = if reached.state == State::Conflict { Code::Conflict } else { Code::Postgres };
    let why = reached.detail.unwrap_or_else(|| "the server does not send WAL".to_owned());
    Err(Failure::new(code, format!("take a backup of {name}: {why}")))
}

fn show(progress: &mut Progress, event: &BackupEvent) {
    if let BackupEvent::Running { phase, bytes_done, bytes_total } = event {
        progress.show(phase, *bytes_done, *bytes_total);
    }
}
