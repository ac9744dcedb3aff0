//! `pgrecall config check`: everything that is wrong, before the daemon finds it.

use std::fmt::Write as _;
use std::path::PathBuf;

use serde::Serialize;

use super::Context;
use crate::config::{Config, ConfigError, Environment, Problem, SecretRef};
use crate::error::{Code, Failure};

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
}

pub fn run(context: &Context) -> Result<(), Failure> {
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
    let environments: Vec<EnvironmentReport> = config.environments.values().map(look_at).collect();
    let unreadable: Vec<String> = environments.iter().flat_map(|environment| environment.unreadable.clone()).collect();
    let report = Report { valid: unreadable.is_empty(), path: config.path, problems: Vec::new(), environments };
    context.output.result(&report, show);
    match unreadable.is_empty() {
        true => Ok(()),
        false => Err(Failure::new(Code::Configuration, format!("read secrets:\n  {}", unreadable.join("\n  ")))
            .hint("The daemon's user must be able to read them, and nobody else.")),
    }
}

fn look_at(environment: &Environment) -> EnvironmentReport {
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
    EnvironmentReport {
        name: environment.name.to_string(),
        repository: environment.location.to_string(),
        encrypted: environment.master_key.is_some(),
        slot: environment.postgres.as_ref().map(|postgres| postgres.slot.clone()),
        unreadable: secrets.into_iter().flatten().filter_map(unreadable).collect(),
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
    }
    text
}
