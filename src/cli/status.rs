//! `pgrecall status [ENV]`: to which moment each environment can be restored now, and what stands in the way.
//!
//! The running daemon answers for all of them at once, so that two hundred are asked as fast as one. The store is read from here
//! for an environment that is named, and for those that no daemon looks after.

mod show;

use std::time::Duration;

use clap::Args;
use futures::StreamExt as _;
use serde::Serialize;

use super::store_state::{self, StoreState};
use super::{Context, interrupted, until_interrupted};
use crate::config::Environment;
use crate::control::client::{Client, ClientError};
use crate::control::protocol::{EnvironmentStatus, JobReport, Status};
use crate::daemon::repositories::not_found;
use crate::error::{Code, Failure};

/// Stores that are read at the same time.
const READS_MAX: usize = 16;
/// How long one store among many may take to be read: it must not hide how the others are.
const READ_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Args)]
pub struct Arguments {
    /// One environment instead of all, with everything that is known of it
    #[arg(value_name = "ENV")]
    environment: Option<String>,
    /// Say it again every so many seconds, until Ctrl-C
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Report {
    daemon: DaemonReport,
    environments: Vec<EnvironmentReport>,
}

#[derive(Debug, Serialize)]
struct DaemonReport {
    running: bool,
    version: Option<String>,
    pid: Option<u32>,
    started_at: Option<String>,
    /// Why a daemon that is there could not be asked.
    error: Option<Failure>,
}

#[derive(Debug, Serialize)]
struct EnvironmentReport {
    name: String,
    state: State,
    /// Why it is not protected, or what somebody should look at.
    detail: Option<String>,
    daemon: Option<EnvironmentStatus>,
    /// The daemon's work on it that waits or runs.
    jobs: Vec<JobReport>,
    store: Option<StoreState>,
    /// Why the store could not be read.
    error: Option<Failure>,
}

/// The worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    Conflict,
    Unprotected,
    Lagging,
    Stopped,
    Starting,
    Protected,
    /// The configuration has no server for it: it is only restored here.
    NotArchived,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let Some(seconds) = arguments.watch else { return until_interrupted(run_once(context, &arguments)).await };
    let again = async {
        loop {
            context.output.clear();
            // What is wrong is in the report.
            if let Err(failure) = run_once(context, &arguments).await
                && failure.code != Code::Unprotected
            {
                context.output.failure(&failure);
            }
            tokio::time::sleep(Duration::from_secs(seconds)).await;
        }
    };
    tokio::select! {
        biased;
        () = interrupted() => Ok(()),
        () = again => Ok(()),
    }
}

/// What the daemon of another user shows: it reads the store, and leaves out what this one may not see.
async fn as_another(context: &Context, client: &Client, arguments: &Arguments) -> Result<(), Failure> {
    let answer = client.status().await;
    let daemon = daemon_report(&answer);
    let Status { environments: mut seen, jobs, .. } = answer?;
    if let Some(name) = &arguments.environment {
        let known: Vec<String> = seen.iter().map(|status| status.name.clone()).collect();
        seen.retain(|status| status.name == *name);
        if seen.is_empty() {
            return Err(not_found(name, known.iter().map(String::as_str)));
        }
    }
    let mut environments: Vec<EnvironmentReport> =
        seen.into_iter().map(|status| EnvironmentReport::of_daemon(status).with(&jobs)).collect();
    environments.sort_by(|a, b| a.urgency().cmp(&b.urgency()));
    let report = Report { daemon, environments };
    context.output.result(&report, |report| match report.environments.len() > 1 {
        true => show::overview(report),
        false => show::details(report, None),
    });
    report.verdict()
}

async fn run_once(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    if let Some(client) = context.daemon_of_another() {
        return as_another(context, &client, arguments).await;
    }
    let config = context.load_config()?;
    let wanted: Vec<&Environment> = match &arguments.environment {
        Some(name) => vec![config.environment(name)?],
        None => config.environments.values().collect(),
    };
    let answer = Client::new(&config.control_socket).status().await;
    let daemon = daemon_report(&answer);
    let (mut known, jobs) = answer.map(|status| (status.environments, status.jobs)).unwrap_or_default();
    // A named one is read as it is now; when it is watched, the daemon's last reading does.
    let read_all = arguments.environment.is_some() && arguments.watch.is_none();
    let reports = wanted.iter().map(|environment| {
        let name = environment.name.as_str();
        let status = known.iter().position(|status| status.name == name).map(|index| known.swap_remove(index));
        EnvironmentReport::new(environment, status, &daemon).with(&jobs)
    });
    let reports: Vec<EnvironmentReport> = reports.collect();
    let patience = (wanted.len() > 1).then_some(READ_PATIENCE);
    let read = reports.into_iter().zip(&wanted).map(|(report, environment)| async move {
        match report.store.is_none() || read_all {
            true => report.read_store(environment, patience).await,
            false => report,
        }
    });
    let mut environments: Vec<EnvironmentReport> = futures::stream::iter(read).buffered(READS_MAX).collect().await;
    environments.sort_by(|a, b| a.urgency().cmp(&b.urgency()));
    let report = Report { daemon, environments };
    let is_overview = arguments.environment.is_none() && report.environments.len() > 1;
    context.output.result(&report, |report| match is_overview {
        true => show::overview(report),
        false => show::details(report, Some(&config)),
    });
    report.verdict()
}

fn daemon_report(answer: &Result<Status, ClientError>) -> DaemonReport {
    let nothing = DaemonReport { running: false, version: None, pid: None, started_at: None, error: None };
    match answer {
        Ok(status) => DaemonReport {
            running: true,
            version: Some(status.version.clone()),
            pid: Some(status.pid),
            started_at: Some(status.started_at.clone()),
            error: None,
        },
        Err(ClientError::NoDaemon(_)) => nothing,
        Err(ClientError::Failed(failure)) => DaemonReport { running: true, error: Some(failure.clone()), ..nothing },
    }
}

impl EnvironmentReport {
    fn of_daemon(status: EnvironmentStatus) -> Self {
        EnvironmentReport {
            name: status.name.clone(),
            state: State::of(&status.state),
            detail: status.detail.clone(),
            store: status.store.clone(),
            error: status.store_failure.clone(),
            jobs: Vec::new(),
            // Once is enough in a document.
            daemon: Some(EnvironmentStatus { store: None, ..status }),
        }
    }

    fn new(environment: &Environment, status: Option<EnvironmentStatus>, daemon: &DaemonReport) -> Self {
        let unwatched = |why: &str| (State::Unprotected, Some(why.to_owned()));
        let (state, detail) = match status {
            Some(status) => return EnvironmentReport::of_daemon(status),
            None if environment.postgres.is_none() => (State::NotArchived, None),
            None if daemon.error.is_some() => unwatched("the daemon cannot be asked"),
            None if daemon.running => unwatched("the running daemon does not know it: `pgrecall reload`"),
            None => unwatched("no daemon is running"),
        };
        let name = environment.name.to_string();
        EnvironmentReport { name, state, detail, daemon: None, jobs: Vec::new(), store: None, error: None }
    }

    /// With those of all these jobs that are its own.
    fn with(self, jobs: &[JobReport]) -> Self {
        let jobs = jobs.iter().filter(|job| job.environment == self.name).cloned().collect();
        EnvironmentReport { jobs, ..self }
    }

    /// Waits for the store as long as it takes, or so long.
    async fn read_store(self, environment: &Environment, patience: Option<Duration>) -> Self {
        let read = store_state::load(environment);
        let read = match patience {
            None => read.await,
            Some(patience) => tokio::time::timeout(patience, read).await.unwrap_or_else(|_| {
                let message = format!("read the store of {}: no answer within {} s", self.name, patience.as_secs());
                Err(Failure::new(Code::Store, message).hint(format!("`pgrecall status {}` waits for it.", self.name)))
            }),
        };
        let (store, error) = match read {
            Ok(store) => (store, None),
            Err(failure) => (None, Some(failure)),
        };
        EnvironmentReport { store, error, ..self }
    }

    /// In which order they are shown: by state, then what somebody should look at, then what waits longest to be stored.
    fn urgency(&self) -> (State, bool, std::cmp::Reverse<u64>, &str) {
        let archive = self.daemon.as_ref().and_then(|daemon| daemon.archive.as_ref());
        let exposure = archive.map_or(0, |archive| archive.exposure.oldest_ms);
        (self.state, self.detail.is_none(), std::cmp::Reverse(exposure), &self.name)
    }
}

impl State {
    fn of(text: &str) -> State {
        match text {
            "protected" => State::Protected,
            "lagging" => State::Lagging,
            "starting" => State::Starting,
            "stopped" => State::Stopped,
            "conflict" => State::Conflict,
            _ => State::Unprotected,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            State::Conflict => "conflict",
            State::Unprotected => "unprotected",
            State::Lagging => "lagging",
            State::Stopped => "stopped",
            State::Starting => "starting",
            State::Protected => "protected",
            State::NotArchived => "not archived here",
        }
    }

    fn is_well(self) -> bool {
        matches!(self, State::Protected | State::NotArchived)
    }
}

impl Report {
    /// What scripts go by: whether every environment is protected, and every store that was read answered.
    fn verdict(&self) -> Result<(), Failure> {
        let unwell: Vec<&EnvironmentReport> = self.environments.iter().filter(|e| !e.state.is_well()).collect();
        let unread = self.environments.iter().find_map(|environment| environment.error.clone());
        let Some(worst) = unwell.first() else { return unread.map_or(Ok(()), Err) };
        let why = worst.detail.as_ref().map(|detail| format!(": {detail}")).unwrap_or_default();
        let more = match unwell.len() {
            1 => String::new(),
            count => format!("; {} more are not protected", count - 1),
        };
        let message =
            format!("find every environment protected: {} is {}{why}{more}", worst.name, worst.state.as_str());
        Err(Failure::new(Code::Unprotected, message))
    }
}
