//! `pgrecall incident …`: keep the evidence, and a log of what is done about it.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::{Value, json};

use super::{Context, EnvironmentArgument, remote, until_interrupted};
use crate::control::client::Client;
use crate::error::{Code, Failure};
use crate::util::durable_fs;

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Keep what is there now, write a restore point, wait until it is stored, and begin a log
    Open(OpenArguments),
    /// List the incidents of an environment, or show the report of one
    Show(ShowArguments),
    /// End the log, and show the report
    Close(CloseArguments),
}

#[derive(Debug, Args)]
pub struct OpenArguments {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// The ticket: 1 to 48 letters, digits, '.', '_', '-'
    #[arg(long, value_name = "TICKET")]
    ticket: String,
    /// Why, for the report
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
}

#[derive(Debug, Args)]
pub struct ShowArguments {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// The ticket
    #[arg(long, value_name = "TICKET")]
    ticket: Option<String>,
    /// Write the report into a file as well, as Markdown
    #[arg(long, value_name = "FILE", requires = "ticket")]
    report: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct CloseArguments {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// The ticket
    #[arg(long, value_name = "TICKET")]
    ticket: String,
    /// What came of it, for the report
    #[arg(long, value_name = "TEXT")]
    outcome: Option<String>,
    /// Write the report into a file as well, as Markdown
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

pub async fn run(context: &Context, verb: Verb) -> Result<(), Failure> {
    let client = Client::new(&context.socket());
    match verb {
        Verb::Open(arguments) => {
            let path = place(&arguments.environment);
            let body = json!({ "ticket": arguments.ticket, "reason": arguments.reason });
            let report = remote::run_job(context, &client, &path, &body).await?;
            remote::show_end(context, report)
        }
        Verb::Show(ShowArguments { environment, ticket: None, .. }) => {
            until_interrupted(remote::show(context, &client, Method::GET, &place(&environment), None)).await
        }
        Verb::Show(ShowArguments { environment, ticket: Some(ticket), report }) => {
            let path = format!("{}/{ticket}", place(&environment));
            until_interrupted(async {
                let document: Value = client.ask(Method::GET, &path, None).await?;
                show(context, document, report)
            })
            .await
        }
        Verb::Close(arguments) => {
            let path = format!("{}/{}/close", place(&arguments.environment), arguments.ticket);
            let body = json!({ "outcome": arguments.outcome });
            until_interrupted(async {
                let document: Value = client.ask(Method::POST, &path, Some(&body)).await?;
                show(context, document, arguments.report)
            })
            .await
        }
    }
}

fn place(environment: &EnvironmentArgument) -> String {
    format!("/v1/environments/{}/incidents", environment.name)
}

fn show(context: &Context, document: Value, file: Option<PathBuf>) -> Result<(), Failure> {
    if let Some(file) = file {
        let text = document.get("text").and_then(Value::as_str).unwrap_or_default();
        let written = durable_fs::write(&file, text.as_bytes(), 0o600);
        written
            .map_err(|error| Failure::new(Code::Host, format!("write the report to {}: {error}", file.display())))?;
    }
    remote::print(context, document);
    Ok(())
}
