//! `pgrecall prune ENV`: removes what has left the recovery window; `--dry-run` says of every object why.

use std::fmt::Write as _;

use clap::Args;
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::output::Output;
use super::{Context, EnvironmentArgument, interrupted};
use crate::config::{Config, Environment};
use crate::control::client::{Client, ClientError};
use crate::error::{Code, Failure};
use crate::operations::prune;
use crate::repository::store::Object;
use crate::retention::prune::{Observer, Report};
use crate::retention::reason::Verdict;
use crate::util::units::show_bytes;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// Remove nothing; say of every object whether the next prune removes it, and why
    #[arg(long)]
    dry_run: bool,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let config = context.load_config()?;
    let environment = arguments.environment.find(&config)?;
    let repository = environment.open_repository().await?;
    let mut printer = Printer { output: context.output };
    if arguments.dry_run {
        let report = prune::explain(&repository, environment.window, &mut printer).await?;
        context.output.result(&report, |report| show(report, "would be removed", "would be dropped"));
        return Ok(());
    }
    refuse_beside_daemon(&config, environment).await?;
    let generation = prune::take_generation(&repository).await?;
    let cancel = CancellationToken::new();
    let work = prune::run(&repository, generation, environment.window, &mut printer, cancel.clone());
    let mut work = std::pin::pin!(work);
    let report = tokio::select! {
        report = &mut work => report?,
        () = interrupted() => {
            cancel.cancel();
            work.await?
        }
    };
    context.output.result(&report, |report| show(report, "removed", "dropped"));
    if report.refused > 0 {
        let message = format!("prune {}: the store refused {} deletes", environment.name, report.refused);
        return Err(Failure::new(Code::Store, message)
            .hint("Grant the right to delete, or wait for the objects' lock to end; the next prune tries again."));
    }
    Ok(())
}

/// A generation of one's own would stop the backups of a running daemon.
async fn refuse_beside_daemon(config: &Config, environment: &Environment) -> Result<(), Failure> {
    match Client::new(&config.control_socket).status().await {
        Err(ClientError::NoDaemon(_)) => Ok(()),
        Err(ClientError::Failed(failure)) => Err(failure),
        Ok(status) if status.environments.iter().any(|known| known.name == environment.name.as_str()) => {
            let message = format!("prune {}: a daemon is running, and prunes it once a day itself", environment.name);
            Err(Failure::new(Code::Conflict, message).hint("`pgrecall prune --dry-run` says what is kept and why."))
        }
        Ok(_) => Ok(()),
    }
}

/// Prints each object as it is judged: there may be millions.
struct Printer {
    output: Output,
}

#[derive(Serialize)]
struct Line<'a> {
    object: &'a str,
    bytes: u64,
    keep: bool,
    reason: String,
}

impl Observer for Printer {
    fn object(&mut self, object: &Object, verdict: &Verdict) {
        let (key, bytes, reason) = (object.key.as_str(), object.bytes, verdict.reason().to_string());
        let keep = verdict.is_keep();
        if self.output.is_json() {
            if let Ok(line) = serde_json::to_string(&Line { object: key, bytes, keep, reason }) {
                self.output.line(line);
            }
            return;
        }
        self.output.line(format_args!("{} {key}: {reason}", if keep { "keep  " } else { "remove" }));
    }
}

fn show(report: &Report, removed: &str, dropped: &str) -> String {
    let mut text = String::new();
    if let (Some(start), Some(end)) = (&report.window_start, &report.window_end) {
        let _ = writeln!(text, "window: {start} to {end}");
    }
    for outcome in &report.dropped {
        let _ = writeln!(text, "backup {} {dropped}: {}", outcome.backup, outcome.reason);
    }
    for outcome in &report.taken_back {
        let _ = writeln!(text, "backup {} stays: {}", outcome.backup, outcome.reason);
    }
    for (sums, what) in [(&report.removed, removed), (&report.kept, "kept")] {
        for (kind, sum) in sums {
            let _ = writeln!(text, "{what}: {} {kind}, {}", sum.objects, show_bytes(sum.bytes));
        }
    }
    let total = report.removed_total();
    let _ = writeln!(text, "{removed} in all: {} objects, {}", total.objects, show_bytes(total.bytes));
    for refusal in &report.refusals {
        let _ = writeln!(text, "refused: {refusal}");
    }
    for remark in &report.remarks {
        let _ = writeln!(text, "note: {remark}");
    }
    text
}
