//! `pgrecall sandbox …`: copies for people, made and looked after by the daemon.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::{Value, json};

use super::psql::{self, Psql};
use super::target::TargetArguments;
use super::{Context, TicketArgument, remote, until_interrupted};
use crate::control::client::Client;
use crate::error::{Code, Failure};
use crate::instance::locate::locate;
use crate::operations::sandbox::Found;
use crate::operations::sandbox::proxy::Entry;
use crate::util::nearest::nearest;

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Restore a moment into a copy for a while, with a role of its own that reads everything
    Create(CreateArguments),
    /// List the sandboxes
    List,
    /// Open psql in a sandbox
    Connect(ConnectArguments),
    /// Stop the server of a sandbox; its files stay until it ends
    Stop(SandboxArgument),
    /// Start the server of a sandbox that was stopped
    Start(SandboxArgument),
    /// Let a sandbox live longer, counted from now
    Extend(ExtendArguments),
    /// Hand a sandbox over to whoever operates the host: it has no end any more
    Release(SandboxArgument),
    /// Remove a sandbox with all its files
    Destroy(SandboxArgument),
}

#[derive(Debug, Args)]
pub struct CreateArguments {
    #[command(flatten)]
    pub target: TargetArguments,
    #[command(flatten)]
    pub ticket: TicketArgument,
    /// Let its role write, too
    #[arg(long)]
    pub writable: bool,
    /// How long it lives, such as 8h [default: as the configuration says]
    #[arg(long, value_name = "TIME")]
    pub expires: Option<String>,
}

#[derive(Debug, Args)]
pub struct SandboxArgument {
    /// The sandbox, by its job, or the end of that
    #[arg(value_name = "JOB")]
    job: String,
}

#[derive(Debug, Args)]
pub struct ExtendArguments {
    #[command(flatten)]
    sandbox: SandboxArgument,
    /// How long it lives from now on, such as 8h [default: as the configuration says]
    #[arg(long, value_name = "TIME")]
    expires: Option<String>,
}

#[derive(Debug, Args)]
pub struct ConnectArguments {
    #[command(flatten)]
    sandbox: SandboxArgument,
    /// The database [default: postgres, or the first that there is]
    #[arg(long, short, value_name = "NAME")]
    database: Option<String>,
    /// As a superuser of the copy, for admins; it is put on record
    #[arg(long)]
    superuser: bool,
    /// Arguments for psql
    #[arg(last = true, value_name = "PSQL ARGUMENT")]
    psql: Vec<String>,
}

pub async fn run(context: &Context, verb: Verb) -> Result<(), Failure> {
    let client = Client::new(&context.socket());
    let post = async |job: &SandboxArgument, verb: &str, body: Option<Value>| {
        let found = find(&list(&client).await?, &job.job)?;
        let path = format!("/v1/sandboxes/{}/{verb}", found.record.id);
        remote::show(context, &client, Method::POST, &path, body.as_ref()).await
    };
    match verb {
        Verb::Create(arguments) => create(context, arguments).await,
        Verb::Connect(arguments) => connect(&client, arguments).await,
        Verb::List => until_interrupted(remote::show(context, &client, Method::GET, "/v1/sandboxes", None)).await,
        Verb::Stop(job) => until_interrupted(post(&job, "stop", None)).await,
        Verb::Start(job) => until_interrupted(post(&job, "start", None)).await,
        Verb::Release(job) => until_interrupted(post(&job, "release", None)).await,
        Verb::Destroy(job) => until_interrupted(post(&job, "destroy", None)).await,
        Verb::Extend(arguments) => {
            let body = arguments.expires.map(|expires| json!({ "expires": expires }));
            until_interrupted(post(&arguments.sandbox, "extend", body)).await
        }
    }
}

/// Also for `restore` without a directory of one's own.
pub async fn create(context: &Context, arguments: CreateArguments) -> Result<(), Failure> {
    let client = Client::new(&context.socket());
    let asked = arguments.target.asked();
    let mut body = arguments.ticket.with(remote::body(&asked));
    if let Value::Object(fields) = &mut body {
        fields.insert("writable".to_owned(), json!(arguments.writable));
        fields.insert("expires".to_owned(), json!(arguments.expires));
    }
    let path = format!("/v1/environments/{}/sandboxes", arguments.target.environment.name);
    let report = remote::run_job(context, &client, &path, &body).await?;
    remote::show_end(context, report)
}

async fn list(client: &Client) -> Result<Vec<Found>, Failure> {
    #[derive(serde::Deserialize)]
    struct Listing {
        sandboxes: Vec<Found>,
    }
    let listing: Listing = client.ask(Method::GET, "/v1/sandboxes", None).await?;
    Ok(listing.sandboxes)
}

/// The sandbox of that id; the end of an id is enough when no other has it.
fn find(listing: &[Found], wanted: &str) -> Result<Found, Failure> {
    const END_CHARACTERS_MIN: usize = 4;
    let id = |found: &Found| found.record.id.to_string();
    let fits =
        |found: &&Found| id(found) == wanted || (wanted.len() >= END_CHARACTERS_MIN && id(found).ends_with(wanted));
    let mut fitting = listing.iter().filter(fits);
    let failure = match (fitting.next(), fitting.next()) {
        (Some(found), None) => return Ok(found.clone()),
        (Some(_), Some(_)) => Failure::new(Code::Usage, format!("find sandbox {wanted}: several have that end")),
        (None, _) => Failure::new(Code::NotFound, format!("find sandbox {wanted}: there is none, or it has expired")),
    };
    let ids: Vec<String> = listing.iter().map(id).collect();
    Err(match nearest(wanted, ids.iter().map(String::as_str)) {
        Some(meant) => failure.hint(format!("Did you mean {meant}?")),
        None => failure.hint("`pgrecall sandbox list` shows those that there are."),
    })
}

async fn connect(client: &Client, arguments: ConnectArguments) -> Result<(), Failure> {
    let found = find(&list(client).await?, &arguments.sandbox.job)?;
    let record = &found.record;
    let entry = if arguments.superuser { Entry::Superuser } else { Entry::Role };
    let unknown = || Failure::new(Code::Conflict, format!("connect to sandbox {}: it is still being made", record.id));
    let user = entry.user(record).ok_or_else(unknown)?.to_owned();
    let programs = locate(record.major, &record.postgres_bin_dirs);
    let psql = Psql {
        program: programs.map_or_else(|_| PathBuf::from("psql"), |programs| programs.program("psql")),
        user,
        database: arguments.database.unwrap_or_else(|| first_database(&record.databases)),
        arguments: arguments.psql,
    };
    let query = if arguments.superuser { "?superuser=true" } else { "" };
    let path = format!("/v1/sandboxes/{}/connect{query}", record.id);
    let status = psql::run(&psql, || {
        let (client, path) = (client.clone(), path.clone());
        async move { Ok(client.connect(&path).await?) }
    })
    .await?;
    match status.success() {
        true => Ok(()),
        false => Err(Failure::new(Code::Postgres, format!("use sandbox {}: psql ended with {status}", record.id))),
    }
}

/// The one that everybody has, or one that is no template.
fn first_database(databases: &[String]) -> String {
    let is = |name: &str| databases.iter().any(|database| database == name);
    let plain = databases.iter().find(|name| !name.starts_with("template"));
    if is("postgres") { "postgres".to_owned() } else { plain.cloned().unwrap_or_else(|| "template1".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_is_chosen_when_nobody_names_one() {
        let check = |databases: &[&str], expected| {
            let databases: Vec<String> = databases.iter().map(ToString::to_string).collect();
            assert_eq!(first_database(&databases), expected);
        };
        check(&["app", "postgres", "template1"], "postgres");
        check(&["template1", "shop"], "shop");
        check(&["template1"], "template1");
        check(&[], "template1");
    }
}
