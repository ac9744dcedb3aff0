//! `pgrecall config check`: everything that is wrong, before the daemon finds it: in the file, in the secrets, and when the
//! store and the server are asked.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::Context;
use crate::config::{Config, ConfigError, Environment, Location, Problem, SecretRef};
use crate::daemon::slots::{self, UnlimitedWal};
use crate::error::{Code, Failure};
use crate::replication::ConnectConfig;

#[derive(Debug, Serialize)]
struct Report {
    valid: bool,
    path: PathBuf,
    problems: Vec<Problem>,
    environments: Vec<EnvironmentReport>,
}

#[derive(Debug, Serialize)]
struct EnvironmentReport {
    name: String,
    repository: String,
    encrypted: bool,
    /// `None` where this host only lists and restores.
    slot: Option<String>,
    /// Secrets that could not be read.
    unreadable: Vec<String>,
    /// Slots of ours on the environment's hosts that no environment of the configuration owns.
    unowned_slots: Vec<UnownedSlot>,
    /// Servers that keep WAL for slots until the disk is full.
    unlimited_wal: Vec<UnlimitedWal>,
    /// Why the server could not be asked.
    server: Option<Failure>,
    /// Why the store could not be read. That nothing is stored yet is no problem.
    store: Option<Failure>,
}

#[derive(Debug, Serialize)]
struct UnownedSlot {
    host: String,
    slot: String,
    active: bool,
}

/// A server that does not answer at once is not waited for: this looks at the configuration first of all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

pub async fn run(context: &Context) -> Result<(), Failure> {
    let config = match Config::load(&context.config_path) {
        Ok(config) => config,
        Err(error) => {
            if let (true, ConfigError::Invalid { path, problems }) = (context.output.is_json(), &error) {
                let (path, problems) = (path.clone(), problems.clone());
                let report = Report { valid: false, path, problems, environments: Vec::new() };
                context.output.result(&report, |_| String::new());
            }
            return Err(error.into());
        }
    };
    let owned = slots::owned(&config);
    let looks = config.environments.values().map(|environment| look_at(environment, &owned));
    let environments: Vec<EnvironmentReport> = futures::future::join_all(looks).await;
    let unreadable: Vec<String> = environments.iter().flat_map(|environment| environment.unreadable.clone()).collect();
    let report = Report { valid: unreadable.is_empty(), path: config.path, problems: Vec::new(), environments };
    context.output.result(&report, show);
    if !unreadable.is_empty() {
        return Err(Failure::new(Code::Configuration, format!("read secrets:\n  {}", unreadable.join("\n  ")))
            .hint("The daemon's user must be able to read them, and nobody else."));
    }
    let asked = |environment: &EnvironmentReport| {
        let failure = environment.store.as_ref().or(environment.server.as_ref())?;
        Some(Failure { message: format!("check {}: {failure}", environment.name), ..failure.clone() })
    };
    report.environments.iter().find_map(asked).map_or(Ok(()), Err)
}

async fn look_at(environment: &Environment, owned: &BTreeSet<String>) -> EnvironmentReport {
    let s3 = &environment.s3;
    let password = environment.postgres.as_ref().and_then(|postgres| postgres.password.as_ref());
    let secrets = [
        password,
        environment.master_key.as_ref(),
        s3.access_key_id.as_ref(),
        s3.secret_access_key.as_ref(),
        s3.session_token.as_ref(),
    ];
    let unreadable = |secret: &SecretRef| secret.load().err().map(|error| format!("{}: {error}", environment.name));
    let unreadable: Vec<String> = secrets.into_iter().flatten().filter_map(unreadable).collect();
    // Without its secrets neither can be asked; they are reported themselves.
    let ((found, server), store) = match unreadable.is_empty() {
        true => tokio::join!(ask_for_slots(environment, owned), ask_store(environment)),
        false => ((slots::Found::default(), None), None),
    };
    let unowned = found.unowned.into_iter();
    EnvironmentReport {
        unowned_slots: unowned
            .map(|found| UnownedSlot { host: found.host, slot: found.slot, active: found.active })
            .collect(),
        unlimited_wal: found.unlimited,
        server,
        store,
        name: environment.name.to_string(),
        repository: environment.location.to_string(),
        encrypted: environment.master_key.is_some(),
        slot: environment.postgres.as_ref().map(|postgres| postgres.slot.clone()),
        unreadable,
    }
}

async fn ask_for_slots(environment: &Environment, owned: &BTreeSet<String>) -> (slots::Found, Option<Failure>) {
    let Ok(connect) = environment.connect() else { return (slots::Found::default(), None) };
    let connect = ConnectConfig { connect_timeout: connect.connect_timeout.min(CONNECT_TIMEOUT), ..connect };
    match slots::look(&connect, owned).await {
        Ok(found) => (found, None),
        Err(error) => (slots::Found::default(), Some(error.into())),
    }
}

async fn ask_store(environment: &Environment) -> Option<Failure> {
    if matches!(&environment.location, Location::File(directory) if !directory.exists()) {
        return None; // the daemon makes it
    }
    environment.open_repository().await.err().filter(|failure| failure.code != Code::NotFound)
}

fn show(report: &Report) -> String {
    let mut text = format!("{} is well formed", report.path.display());
    for environment in &report.environments {
        let encrypted = if environment.encrypted { ", encrypted" } else { "" };
        let _ = write!(text, "\n  {}: {}{encrypted}", environment.name, environment.repository);
        let _ = match &environment.slot {
            Some(slot) => write!(text, ", slot {slot}"),
            None => write!(text, ", only to be listed, verified and restored here (no `postgres`)"),
        };
        if let Some(store) = &environment.store {
            let _ = write!(text, "\n    the store cannot be used: {store}");
        }
        if let Some(server) = &environment.server {
            let _ = write!(text, "\n    the server cannot be asked: {server}");
        }
        for UnlimitedWal { host, statement } in &environment.unlimited_wal {
            let _ = write!(text, "\n    {host} keeps WAL for slots until its disk is full; to limit it: {statement}");
        }
        for UnownedSlot { host, slot, active } in &environment.unowned_slots {
            let used = if *active { "somebody uses it" } else { "it keeps WAL until the disk is full" };
            let way_out = format!("SELECT pg_drop_replication_slot('{slot}')");
            let _ = write!(
                text,
                "\n    slot {slot} on {host} belongs to no environment here, and {used}; to drop it: {way_out}"
            );
        }
    }
    text
}
