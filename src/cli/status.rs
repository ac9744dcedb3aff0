//! `pgrecall status [ENV]`: to which moment each environment can be restored now, and what stands in the way.
//!
//! The store says what is safe, the daemon what is being done; each is shown without the other.

use std::fmt::Write as _;

use clap::Args;
use serde::Serialize;

use super::store_state::{self, StoreState};
use super::{Context, times};
use crate::config::{Config, Environment};
use crate::control::client::{Client, ClientError};
use crate::control::protocol::{BackupEvent, EnvironmentStatus, Status};
use crate::error::Failure;
use crate::util::{clock, units};

#[derive(Debug, Args)]
pub struct Arguments {
    /// One environment instead of all
    #[arg(value_name = "ENV")]
    environment: Option<String>,
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
    daemon: Option<EnvironmentStatus>,
    store: Option<StoreState>,
    /// Why the store could not be read.
    error: Option<Failure>,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let config = context.load_config()?;
    let wanted: Vec<&Environment> = match &arguments.environment {
        Some(name) => vec![config.environment(name)?],
        None => config.environments.values().collect(),
    };
    let answer = Client::new(&config.control_socket).status().await;
    let mut known = answer.as_ref().map(|status| status.environments.clone()).unwrap_or_default();
    let stores = futures::future::join_all(wanted.iter().map(|environment| store_state::load(environment))).await;
    let environments = wanted.iter().zip(stores).map(|(environment, store)| {
        let name = environment.name.to_string();
        let daemon = known.iter().position(|status| status.name == name).map(|index| known.swap_remove(index));
        let (store, error) = match store {
            Ok(store) => (store, None),
            Err(error) => (None, Some(error)),
        };
        EnvironmentReport { name, daemon, store, error }
    });
    let report = Report { environments: environments.collect(), daemon: daemon_report(answer) };
    context.output.result(&report, |report| show(report, &config));
    match report.environments.into_iter().find_map(|environment| environment.error) {
        Some(failure) => Err(failure),
        None => Ok(()),
    }
}

fn daemon_report(answer: Result<Status, ClientError>) -> DaemonReport {
    let nothing = DaemonReport { running: false, version: None, pid: None, started_at: None, error: None };
    match answer {
        Ok(status) => DaemonReport {
            running: true,
            version: Some(status.version),
            pid: Some(status.pid),
            started_at: Some(status.started_at),
            error: None,
        },
        Err(ClientError::NoDaemon(_)) => nothing,
        Err(ClientError::Failed(failure)) => DaemonReport { running: true, error: Some(failure), ..nothing },
    }
}

fn show(report: &Report, config: &Config) -> String {
    let daemon = &report.daemon;
    let mut text = match (&daemon.error, daemon.pid) {
        (Some(failure), _) => format!("daemon: failed to {failure}\n"),
        (None, Some(pid)) => format!("daemon: running, process {pid}\n"),
        (None, None) => "daemon: not running\n".to_owned(),
    };
    for report in &report.environments {
        let zone = config.environment(&report.name).map(|environment| environment.time_zone).unwrap_or_default();
        let state = report.daemon.as_ref().map_or("not watched by a daemon", |daemon| &daemon.state);
        let _ = writeln!(text, "\n{}: {state}", report.name);
        if let Some(daemon) = &report.daemon {
            show_daemon(&mut text, daemon);
        }
        match (&report.store, &report.error) {
            (Some(store), _) => show_store(&mut text, store, zone),
            (None, Some(failure)) => {
                let _ = writeln!(text, "  store         failed to {failure}");
            }
            (None, None) => text.push_str("  store         nothing is stored yet\n"),
        }
    }
    text
}

fn show_daemon(text: &mut String, daemon: &EnvironmentStatus) {
    if let Some(detail) = &daemon.detail {
        let _ = writeln!(text, "  detail        {detail}");
    }
    if let Some(hint) = daemon.failure.as_ref().and_then(|failure| failure.hint.as_ref()) {
        let _ = writeln!(text, "  hint          {hint}");
    }
    if let Some(archive) = &daemon.archive {
        let _ = writeln!(
            text,
            "  archive       timeline {}, stored up to {}, the server is at {}, {} behind",
            archive.timeline,
            archive.stored_lsn,
            archive.server_lsn,
            units::show_bytes(archive.bytes_behind)
        );
        if let (Some(p50), Some(p99)) = (archive.exposure.p50_ms, archive.exposure.p99_ms) {
            let oldest = archive.exposure.oldest_ms;
            let _ = writeln!(
                text,
                "  exposure      {oldest} ms now, {p50} ms in the median, {p99} ms at most in 99 of 100"
            );
        }
    }
    match &daemon.backup {
        Some(BackupEvent::Running { phase, .. }) => {
            let _ = writeln!(text, "  backup        running: {phase}");
        }
        Some(BackupEvent::Failed { error }) => {
            let _ = writeln!(text, "  backup        failed to {error}");
        }
        Some(BackupEvent::Done { .. }) | None => {}
    }
}

fn show_store(text: &mut String, store: &StoreState, zone: chrono_tz::Tz) {
    let now = clock::now();
    let time =
        |time: Option<crate::pg::Timestamp>| time.map_or("unknown".to_owned(), |time| times::show(time, zone, now));
    if store.window.is_empty() {
        let why = match (store.damaged_backups.is_empty(), store.backups.is_empty()) {
            (false, _) => "unknown while a backup cannot be read",
            (true, true) => "nothing yet: there is no backup",
            (true, false) => "nothing yet: no backup has all of its WAL",
        };
        let _ = writeln!(text, "  restorable    {why}");
    }
    for interval in &store.window {
        let _ =
            writeln!(text, "  restorable    from {}\n                to   {}", time(interval.from), time(interval.to));
        if let Some(cause) = &interval.ended_by {
            let _ = writeln!(text, "                then nothing until the next backup: {cause}");
        }
    }
    for tail in &store.diverged_tails {
        let _ = writeln!(
            text,
            "  diverged      {} commits on timeline {} from {} to {}, not on the one that is followed: --timeline {1}",
            tail.commits, tail.timeline, tail.fork_lsn, tail.end_lsn
        );
    }
    if let (Some(timeline), Some(from), Some(to)) = (store.timeline, &store.stored_from_lsn, &store.stored_to_lsn) {
        let _ = writeln!(text, "  stored WAL    timeline {timeline}, {from} to {to} without a gap");
    }
    for gap in &store.gaps {
        let _ = writeln!(
            text,
            "  gap           timeline {}, {} to {}: {}",
            gap.timeline, gap.start_lsn, gap.end_lsn, gap.cause
        );
    }
    if let Some(newest) = store.backups.last() {
        let _ = writeln!(
            text,
            "  backups       {}, newest {}",
            store.backups.len(),
            times::show(newest.stopped_at, zone, now)
        );
    }
    for damaged in &store.damaged_backups {
        let _ = writeln!(text, "  damaged       backup {}: failed to {}", damaged.id, damaged.error);
    }
}
