//! The command line: one thin file per verb, from arguments to a request to what is printed.
//!
//! Results go to standard output, as text or with `--json` as one JSON document; errors and progress go to standard
//! error. The exit status is that of [`crate::error::Code`] (`docs/exit-codes.md`).

mod config_check;
mod output;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config;
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

/// Runs a command line; the status is that of the process.
pub fn run(arguments: Arguments) -> ExitCode {
    let context =
        Context { config_path: config::locate(arguments.config.as_deref()), output: Output::new(arguments.json) };
    // A command run by hand speaks through its output; its log is for what nobody asked for.
    telemetry::start(&telemetry::Settings { level: "warn".to_owned(), ..telemetry::Settings::default() });
    let result = match arguments.verb {
        Verb::Config(ConfigVerb::Check) => config_check::run(&context),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            context.output.failure(&failure);
            ExitCode::from(failure.code.exit_status())
        }
    }
}
