//! `pgrecall slot drop ENV`: for an environment that is not looked after any more.
//!
//! A slot that nobody reads keeps WAL until the server's disk is full. While a daemon streams, the server refuses.

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{Context, EnvironmentArgument};
use crate::error::{Code, Failure};
use crate::replication::{ReplicationError, Session};

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Drop the environment's replication slot on every configured host: PostgreSQL keeps no WAL for it any more
    Drop(Drop),
}

#[derive(Debug, Args)]
pub struct Drop {
    #[command(flatten)]
    environment: EnvironmentArgument,
}

#[derive(Debug, Serialize)]
struct Report {
    slot: String,
    dropped_on: Vec<String>,
    missing_on: Vec<String>,
}

pub async fn run(context: &Context, Verb::Drop(arguments): Verb) -> Result<(), Failure> {
    let config = context.load_config()?;
    let environment = arguments.environment.find(&config)?;
    let connect = environment.connect()?;
    let slot = environment.postgres.as_ref().map(|postgres| postgres.slot.clone()).unwrap_or_default();
    let mut report = Report { slot, dropped_on: Vec::new(), missing_on: Vec::new() };
    let mut failed = None;
    for (index, host) in connect.hosts.iter().enumerate() {
        let attempt = async {
            let mut session = Session::connect(&connect, index).await?;
            let result = session.drop_slot(&report.slot).await;
            session.close().await;
            result
        };
        match attempt.await {
            Ok(()) => report.dropped_on.push(host.to_string()),
            Err(ReplicationError::SlotMissing(_)) => report.missing_on.push(host.to_string()),
            Err(error) => {
                let failure = Failure::from(error);
                let message = format!("drop slot {} on {host}: {}", report.slot, failure.message);
                failed = Some(Failure { message, ..failure });
            }
        }
    }
    context.output.result(&report, |report| {
        let dropped = report.dropped_on.iter().map(|host| format!("slot {} dropped on {host}\n", report.slot));
        let missing = report.missing_on.iter().map(|host| format!("no slot {} on {host}\n", report.slot));
        dropped.chain(missing).collect()
    });
    match failed {
        Some(failure) => Err(failure),
        None if report.dropped_on.is_empty() => {
            Err(Failure::new(Code::NotFound, format!("drop slot {}: no host has it", report.slot)))
        }
        None => Ok(()),
    }
}
