//! `pgrecall config check`: everything that is wrong, before the daemon finds it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::Context;
use crate::config::{Config, ConfigError, Environment, Problem, SecretRef};
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
    server: Option<String>,
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
    match unreadable.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Code::Configuration, format!("read secrets:\n  {}", unreadable.join("\n  ")))
            .hint("The daemon's user must be able to read them, and nobody else.")),
    }
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
    let (found, server) = ask_for_slots(environment, owned).await;
    let unowned = found.unowned.into_iter();
    EnvironmentReport {
        unowned_slots: unowned
            .map(|found| UnownedSlot { host: found.host, slot: found.slot, active: found.active })
            .collect(),
        unlimited_wal: found.unlimited,
        server,
        name: environment.name.to_string(),
        repository: environment.location.to_string(),
        encrypted: environment.master_key.is_some(),
        slot: environment.postgres.as_ref().map(|postgres| postgres.slot.clone()),
        unreadable: secrets.into_iter().flatten().filter_map(unreadable).collect(),
    }
}

async fn ask_for_slots(environment: &Environment, owned: &BTreeSet<String>) -> (slots::Found, Option<String>) {
    // A password that cannot be read is reported among the secrets.
    let Ok(connect) = environment.connect() else { return (slots::Found::default(), None) };
    let connect = ConnectConfig { connect_timeout: connect.connect_timeout.min(CONNECT_TIMEOUT), ..connect };
    match slots::look(&connect, owned).await {
        Ok(found) => (found, None),
        Err(error) => (slots::Found::default(), Some(error.to_string())),
    }
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
        if let Some(server) = &environment.server {
            let _ = write!(text, "\n    the server was not asked: {server}");
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
