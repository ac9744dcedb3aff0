//! `pgrecall key rotate ENV`: another master key for an encrypted environment.
//!
//! The old key is the configured one; the new one is read from where the arguments say, never from the command line itself.
//! Only the wrapped data key is written anew, so that a running daemon goes on undisturbed.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{Context, EnvironmentArgument};
use crate::config::SecretRef;
use crate::error::{Code, Failure};
use crate::repository::Repository;

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Wrap the environment's data key by another master key; the configured one opens nothing afterwards
    Rotate(Rotate),
}

#[derive(Debug, Args)]
pub struct Rotate {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// The file that holds the new key, as `openssl rand -hex 32` prints it
    #[arg(long, value_name = "FILE", required_unless_present = "new_key_env", conflicts_with = "new_key_env")]
    new_key_file: Option<PathBuf>,
    /// The environment variable that holds the new key
    #[arg(long, value_name = "NAME")]
    new_key_env: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    environment: String,
    /// Digits that tell master keys apart without revealing them; they stand in the names of `keys/` in the store.
    old_fingerprint: String,
    new_fingerprint: String,
    new_key: String,
}

pub async fn run(context: &Context, Verb::Rotate(arguments): Verb) -> Result<(), Failure> {
    let config = context.load_config()?;
    let environment = arguments.environment.find(&config)?;
    let not_encrypted = || {
        let message =
            format!("rotate the master key of {}: it has none, the environment is not encrypted", environment.name);
        Failure::new(Code::Configuration, message)
    };
    let old = environment.load_master_key()?.ok_or_else(not_encrypted)?;
    let reference = match (arguments.new_key_file, arguments.new_key_env) {
        (Some(path), _) => SecretRef::File(path),
        (None, Some(name)) => SecretRef::Variable(name),
        (None, None) => return Err(Failure::new(Code::Usage, "rotate the master key: no new key is named")),
    };
    let new = environment.read_master_key(&reference)?;
    if new.fingerprint() == old.fingerprint() {
        let message = format!("rotate the master key of {}: the new key is the configured one", environment.name);
        return Err(Failure::new(Code::Usage, message).hint("`openssl rand -hex 32` makes another."));
    }
    let report = Report {
        environment: environment.name.to_string(),
        old_fingerprint: old.fingerprint(),
        new_fingerprint: new.fingerprint(),
        new_key: reference.to_string(),
    };
    let level = environment.archive.compression_level;
    match environment.open_repository().await {
        Ok(repository) => repository.rotate_master(&old, &new).await?,
        // Begun before and interrupted, or run twice: the new key opens it already.
        Err(failure) => {
            Repository::open(environment.store()?, level, Some(&new)).await.map(drop).map_err(|_| failure)?
        }
    }
    context.output.result(&report, |report| {
        format!(
            "the data key of {} is wrapped by the master key {} now; {} opens nothing any more\n\
             name {} in the configuration before the daemon is next started",
            report.environment, report.new_fingerprint, report.old_fingerprint, report.new_key
        )
    });
    Ok(())
}
