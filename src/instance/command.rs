//! Commands for PostgreSQL's programs.
//!
//! Arguments are visible to every user of the host: a secret never goes into one. None of our commands needs a secret, since
//! our servers are reached over a private socket.

use std::process::{Command, Stdio};

use super::Installation;

/// A command for `program` of this installation without anything that the caller's environment would change about it:
/// `PGDATA`, `PGOPTIONS`, `PGHOST`, `PGSERVICE` and their like are removed, and what the C library is told for us alone
/// (`MALLOC_…`); messages are in English.
pub fn command(installation: &Installation, program: &str) -> Command {
    let mut command = Command::new(installation.program(program));
    for (name, _) in std::env::vars_os() {
        if ["PG", "MALLOC_"].iter().any(|ours| name.to_string_lossy().starts_with(ours)) {
            command.env_remove(&name);
        }
    }
    command.env("LC_MESSAGES", "C").env_remove("LC_ALL").env_remove("LANGUAGE").stdin(Stdio::null());
    command
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::pg::Major;

    #[test]
    fn messages_are_english_and_the_program_is_the_installation_s() {
        let installation = Installation { major: Major(18), version: "18.4".to_owned(), bin: PathBuf::from("/opt/pg") };
        let command = command(&installation, "pg_amcheck");
        assert_eq!(command.get_program(), "/opt/pg/pg_amcheck");
        assert!(command.get_envs().any(|(name, value)| name == "LC_MESSAGES" && value.is_some_and(|v| v == "C")));
        assert!(command.get_envs().any(|(name, value)| name == "LC_ALL" && value.is_none()));
    }
}
