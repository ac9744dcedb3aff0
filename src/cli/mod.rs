//! The command line: one thin file per verb, from arguments to a request to what is printed.
//!
//! Results go to standard output, as text or with `--json` as one JSON document; errors and progress go to standard
//! error. The exit status is that of [`crate::error::Code`] (`docs/exit-codes.md`).

mod audit;
mod backup;
mod backups;
mod config_check;
mod daemon;
mod incarnation;
mod incident;
mod jobs;
mod key;
mod output;
mod pin;
mod places;
mod plan;
mod progress;
mod prune;
mod psql;
mod reload;
mod remote;
mod restore;
mod sandbox;
mod server;
mod slot;
mod status;
mod store_state;
mod target;
mod verify;
mod wal_get;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use serde_json::Value;

use crate::config::{self, Config, Environment};
use crate::control::client::Client;
use crate::error::{Code, Failure};
use crate::operations::times;
use crate::telemetry;
use output::Output;

/// Archives PostgreSQL's WAL to an object store within a second, takes backups, and restores any moment.
#[derive(Debug, Parser)]
#[command(name = "pgrecall", version, max_term_width = 100)]
pub struct Arguments {
    /// The configuration file [default: $PGRECALL_CONFIG, else /etc/pgrecall/config.toml]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print one JSON document instead of text; errors too
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Archive every configured environment, in the foreground, until told to stop
    Daemon,
    /// Say to which moment each environment can be restored now, and what stands in the way
    Status(status::Arguments),
    /// Take a backup now, by the running daemon or, without one, from here; one that is still being copied is waited for
    Backup(backup::Arguments),
    /// List the backups of an environment
    Backups(backups::Arguments),
    /// Say what a restore would do, exactly; nothing is written
    Plan(plan::Arguments),
    /// Restore a moment into an empty directory, and start PostgreSQL on it
    Restore(restore::Arguments),
    /// Restored copies for people, each with an end
    #[command(subcommand)]
    Sandbox(sandbox::Verb),
    /// Keep the evidence of an incident, and a log of what is done about it
    #[command(subcommand)]
    Incident(incident::Verb),
    /// Look for missing, cut or damaged objects and holes in the stored WAL
    Verify(verify::Arguments),
    /// Remove what has left the recovery window; a running daemon does so once a day
    Prune(prune::Arguments),
    /// What is kept beyond the recovery window
    #[command(subcommand)]
    Pin(pin::Verb),
    /// The long work of the daemon
    #[command(subcommand)]
    Jobs(jobs::Verb),
    /// Show who did what in an environment, and check that nobody changed the record
    Audit(audit::Arguments),
    /// Have the running daemon apply the changed configuration
    Reload,
    /// Hand a WAL file to a recovering PostgreSQL (its restore_command)
    WalGet(wal_get::Arguments),
    /// The replication slot of an environment
    #[command(subcommand)]
    Slot(slot::Verb),
    /// The pasts of an environment
    #[command(subcommand)]
    Incarnation(incarnation::Verb),
    /// The master key of an encrypted environment
    #[command(subcommand)]
    Key(key::Verb),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigVerb),
}

#[derive(Debug, Subcommand)]
enum ConfigVerb {
    /// Name everything that is wrong with the configuration, and read every secret it refers to
    Check,
}

/// What every verb is given.
struct Context {
    config_path: PathBuf,
    output: Output,
}

// Without a doc comment, which would become the help of every verb that takes it.
#[derive(Debug, Args)]
struct EnvironmentArgument {
    /// The environment, as the configuration names it
    #[arg(value_name = "ENV")]
    name: String,
}

// Without a doc comment, for the same reason.
#[derive(Debug, Args)]
struct TicketArgument {
    /// The ticket that it is for, where the daemon does it
    #[arg(long, value_name = "TICKET")]
    ticket: Option<String>,
}

impl TicketArgument {
    /// What is asked of the daemon, for this ticket.
    fn with(&self, mut body: Value) -> Value {
        if let (Some(fields), Some(ticket)) = (body.as_object_mut(), &self.ticket) {
            fields.insert("ticket".to_owned(), ticket.as_str().into());
        }
        body
    }
}

impl EnvironmentArgument {
    fn find<'c>(&self, config: &'c Config) -> Result<&'c Environment, Failure> {
        config.environment(&self.name)
    }
}

impl Context {
    fn load_config(&self) -> Result<Config, Failure> {
        Ok(Config::load(&self.config_path)?)
    }

    /// The control socket, for somebody who may not read the configuration, too.
    fn socket(&self) -> PathBuf {
        Config::load(&self.config_path).map(|config| config.control_socket).unwrap_or_else(|_| config::default_socket())
    }

    /// The daemon, when it runs as another user: what this one may do is then its to say, and the store its to read. Root reads
    /// everything by itself.
    fn daemon_of_another(&self) -> Option<Client> {
        let own = rustix::process::geteuid();
        self.daemon_unless(|owner| own.is_root() || owner == own.as_raw())
    }

    /// The daemon, when there is a socket whose owner is not one of `own`.
    fn daemon_unless(&self, own: impl Fn(u32) -> bool) -> Option<Client> {
        use std::os::unix::fs::MetadataExt as _;
        let socket = self.socket();
        let owner = std::fs::metadata(&socket).ok()?.uid();
        (!own(owner)).then(|| Client::new(&socket))
    }
}

/// Runs a command line; the status is that of the process.
pub fn run(arguments: Arguments) -> ExitCode {
    let context =
        Context { config_path: config::locate(arguments.config.as_deref()), output: Output::new(arguments.json) };
    let verb = match arguments.verb {
        Verb::WalGet(arguments) => {
            start_quiet_log();
            return ExitCode::from(wal_get::run(&context, arguments));
        }
        verb => verb,
    };
    match run_verb(&context, verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            context.output.failure(&failure);
            ExitCode::from(failure.code.exit_status())
        }
    }
}

fn run_verb(context: &Context, verb: Verb) -> Result<(), Failure> {
    if !matches!(verb, Verb::Daemon) {
        start_quiet_log();
    }
    match verb {
        Verb::Daemon => block_on(daemon::run(context)),
        Verb::Config(ConfigVerb::Check) => block_on(until_interrupted(config_check::run(context))),
        Verb::Status(arguments) => block_on(status::run(context, arguments)),
        Verb::Slot(verb) => block_on(until_interrupted(slot::run(context, verb))),
        Verb::Incarnation(verb) => block_on(until_interrupted(incarnation::run(context, verb))),
        Verb::Key(verb) => block_on(key::run(context, verb)),
        Verb::Backup(arguments) => block_on(backup::run(context, arguments)),
        Verb::Plan(arguments) => block_on(until_interrupted(plan::run(context, arguments))),
        Verb::Restore(arguments) => block_on(restore::run(context, arguments)),
        Verb::Prune(arguments) => block_on(prune::run(context, arguments)),
        Verb::Pin(verb) => block_on(until_interrupted(pin::run(context, verb))),
        Verb::Sandbox(verb) => block_on(sandbox::run(context, verb)),
        Verb::Incident(verb) => block_on(incident::run(context, verb)),
        Verb::Verify(arguments) => block_on(verify::run(context, arguments)),
        Verb::Jobs(verb) => block_on(until_interrupted(jobs::run(context, verb))),
        Verb::Audit(arguments) => block_on(until_interrupted(audit::run(context, arguments))),
        Verb::Reload => block_on(until_interrupted(reload::run(context))),
        Verb::WalGet(_) => Err(Failure::new(Code::Usage, "answer wal-get here: it has statuses of its own")),
        Verb::Backups(arguments) => block_on(until_interrupted(backups::run(context, arguments))),
    }
}

/// A command run by hand speaks through its output; its log is for what nobody asked for.
fn start_quiet_log() {
    telemetry::start(&telemetry::Settings { level: "warn".to_owned(), ..telemetry::Settings::default() });
}

/// Reads the command line of this process; says what is wrong with it, or what was asked about it, and how to end.
///
/// # Errors
/// The exit status. A wrong `wal-get` must not look to PostgreSQL like a file that does not exist.
pub fn parse() -> Result<Arguments, ExitCode> {
    Arguments::try_parse().map_err(|error| {
        let _ = error.print();
        match error.exit_code() {
            0 => ExitCode::SUCCESS,
            _ if std::env::args().any(|argument| argument == "wal-get") => ExitCode::from(wal_get::FAILED_STATUS),
            _ => ExitCode::from(Code::Usage.exit_status()),
        }
    })
}

fn block_on(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::new(Code::Host, format!("start threads: {error}")))?;
    let result = runtime.block_on(work);
    // Work on the blocking pool that nobody waits for any more does not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

/// For verbs that only read: SIGINT and SIGTERM end them where they are.
async fn until_interrupted(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    tokio::select! {
        biased;
        () = interrupted() => Err(Failure::new(Code::Cancelled, "finish: interrupted")),
        result = work => result,
    }
}

/// Waits for SIGINT or SIGTERM.
async fn interrupted() {
    use tokio::signal::unix::{SignalKind, signal};
    // Without a handler the signal ends the process by itself.
    let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn every_verb_can_be_parsed() {
        Arguments::command().debug_assert();
        let line = ["pgrecall", "pin", "add", "shop", "--at", "latest", "--name", "audit of May", "--until", "90d"];
        let arguments = Arguments::try_parse_from(line).expect("a command");
        assert!(format!("{arguments:?}").contains("\"audit of May\""), "{arguments:?}");
    }
}
