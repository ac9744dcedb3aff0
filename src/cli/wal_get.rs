//! `pgrecall wal-get %f %p`: PostgreSQL's restore_command in a restored directory.
//!
//! The statuses are PostgreSQL's, not ours: 1 means that the file cannot exist, and then the server ends recovery and
//! promotes. So nothing else may end with anything between 1 and 125, not even a panic or a wrong argument. A signal is not
//! handled: the server sends one when it shuts down, and knows by it that the command did not answer.

use std::path::PathBuf;

use clap::Args;

use super::Context;
use crate::config::Config;
use crate::repository::Repository;
use crate::restore::wal_get::{Answer, WalGet, answer, environment_of};

/// The status at which PostgreSQL stops instead of promoting.
pub const FAILED_STATUS: u8 = 200;

#[derive(Debug, Args)]
pub struct Arguments {
    /// The file's name (%f)
    #[arg(value_name = "FILE")]
    file: String,
    /// Where to put it (%p), from the data directory
    #[arg(value_name = "PATH")]
    path: PathBuf,
}

/// Runs in the data directory, where PostgreSQL starts its commands; returns the exit status.
pub fn run(context: &Context, arguments: Arguments) -> u8 {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            context.output.note(format_args!("error: failed to start: {error}"));
            return FAILED_STATUS;
        }
    };
    let config_path = context.config_path.clone();
    // On a task of its own, where a panic is an answer like another.
    let task = runtime.spawn(async move { get(arguments, config_path).await });
    match runtime.block_on(task) {
        Ok(Answer::Failed(error)) => {
            context.output.note(format_args!("error: failed to {error:#}"));
            FAILED_STATUS
        }
        Ok(answer) => answer.exit_status(),
        Err(error) => {
            context.output.note(format_args!("error: failed to get WAL: {error}"));
            FAILED_STATUS
        }
    }
}

async fn get(arguments: Arguments, config_path: PathBuf) -> Answer {
    let data_directory = match std::env::current_dir() {
        Ok(directory) => directory,
        Err(error) => return Answer::Failed(anyhow::Error::new(error).context("find the data directory")),
    };
    let request = WalGet {
        destination: data_directory.join(arguments.path),
        file: arguments.file,
        data_directory: data_directory.clone(),
    };
    answer(&request, || open(data_directory, config_path)).await
}

async fn open(data_directory: PathBuf, config_path: PathBuf) -> anyhow::Result<Repository> {
    let name = environment_of(&data_directory)?;
    let name = name.ok_or_else(|| anyhow::anyhow!("tell the environment of {}", data_directory.display()))?;
    let config = Config::load(&config_path)?;
    Ok(config.environment(&name)?.open_repository().await?)
}
