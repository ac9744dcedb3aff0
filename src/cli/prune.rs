//! `pgrecall prune ENV`: removes what has left the recovery window; `--dry-run` says of every object why.

use clap::Args;
use hyper::Method;
use tokio_util::sync::CancellationToken;

use super::output::Output;
use super::{Context, EnvironmentArgument, TicketArgument, interrupted, remote, until_interrupted};
use crate::config::{Config, Environment};
use crate::control::client::{Client, ClientError};
use crate::error::Failure;
use crate::operations::prune::{self, Judged};
use crate::repository::store::Object;
use crate::retention::prune::{Observer, Report};
use crate::retention::reason::Verdict;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// Remove nothing; say of every object whether the next prune removes it, and why
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    ticket: TicketArgument,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let path = format!("/v1/environments/{}/prune", arguments.environment.name);
    if let Some(client) = context.daemon_of_another() {
        return match arguments.dry_run {
            true => {
                let path = format!("{path}/plan");
                until_interrupted(remote::show(context, &client, Method::POST, &path, None)).await
            }
            false => ask(context, &client, &path, &arguments.ticket).await,
        };
    }
    let config = context.load_config()?;
    let environment = arguments.environment.find(&config)?;
    if arguments.dry_run {
        return until_interrupted(explain(context, environment)).await;
    }
    match daemon_of(&config, environment).await? {
        Some(client) => ask(context, &client, &path, &arguments.ticket).await,
        None => alone(context, environment).await,
    }
}

/// The daemon that looks after the environment: a generation of one's own would stop its backups.
async fn daemon_of(config: &Config, environment: &Environment) -> Result<Option<Client>, Failure> {
    let client = Client::new(&config.control_socket);
    match client.status().await {
        Err(ClientError::NoDaemon(_)) => Ok(None),
        Err(ClientError::Failed(failure)) => Err(failure),
        Ok(status) => {
            let is_known = status.environments.iter().any(|known| known.name == environment.name.as_str());
            Ok(is_known.then_some(client))
        }
    }
}

async fn ask(context: &Context, client: &Client, path: &str, ticket: &TicketArgument) -> Result<(), Failure> {
    let report = remote::run_job(context, client, path, &ticket.with(serde_json::json!({}))).await?;
    remote::show_end(context, report)
}

async fn explain(context: &Context, environment: &Environment) -> Result<(), Failure> {
    let repository = environment.open_repository().await?;
    let mut printer = Printer::new(context.output);
    let outcome = prune::explain(&repository, environment.window, &mut printer).await;
    printer.end(outcome.as_ref().ok(), &prune::PLANNED);
    outcome.map(|_| ())
}

async fn alone(context: &Context, environment: &Environment) -> Result<(), Failure> {
    let repository = environment.open_repository().await?;
    let generation = prune::take_generation(&repository).await?;
    let mut printer = Printer::new(context.output);
    let cancel = CancellationToken::new();
    let outcome = {
        let work = prune::run(&repository, generation, environment.window, &mut printer, cancel.clone());
        let mut work = std::pin::pin!(work);
        tokio::select! {
            outcome = &mut work => outcome,
            () = interrupted() => {
                cancel.cancel();
                work.await
            }
        }
    };
    printer.end(outcome.as_ref().ok(), &prune::DONE);
    prune::judge(environment.name.as_str(), &outcome?)
}

/// Prints each object as it is judged: there may be millions. With `--json` they are a list in the one document, before what is in
/// the report; the list ends where the prune failed.
struct Printer {
    output: Output,
    is_begun: bool,
}

impl Printer {
    fn new(output: Output) -> Self {
        Printer { output, is_begun: false }
    }

    fn begin(&mut self) -> &'static str {
        match std::mem::replace(&mut self.is_begun, true) {
            true => ",",
            false => "{\"objects\": [\n",
        }
    }

    fn end(mut self, report: Option<&Report>, words: &prune::Words) {
        match report {
            Some(report) if self.output.is_json() => {
                let begin = if self.is_begun { "" } else { self.begin() };
                let report = serde_json::to_string(report).expect("our own types are representable in JSON");
                self.output.line(format_args!("{begin}],{}", report.trim_start_matches('{')));
            }
            Some(report) => self.output.line(prune::show(report, words).trim_end()),
            None if self.output.is_json() && self.is_begun => self.output.line("]}"),
            None => {}
        }
    }
}

impl Observer for Printer {
    fn object(&mut self, object: &Object, verdict: &Verdict) {
        let judged = Judged::new(object, verdict);
        if self.output.is_json() {
            let text = serde_json::to_string(&judged).expect("our own types are representable in JSON");
            let begin = self.begin();
            self.output.line(format_args!("{begin}{text}"));
        } else {
            self.output.line(judged.show());
        }
    }
}
