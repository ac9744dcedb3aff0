//! What a person is told about a server that cannot be used.

use super::error::ReplicationError;
use crate::error::{Code, Failure};

impl From<ReplicationError> for Failure {
    fn from(error: ReplicationError) -> Failure {
        let verb = match &error {
            ReplicationError::Conninfo(_)
            | ReplicationError::Unreachable { .. }
            | ReplicationError::ConnectTimeout { .. }
            | ReplicationError::Tls { .. }
            | ReplicationError::Authentication(_)
            | ReplicationError::AuthenticationRefused(_) => "",
            _ => "use PostgreSQL: ",
        };
        let failure = Failure::new(error.code(), format!("{verb}{error}"));
        let failure = if error.is_retryable() { failure.retryable() } else { failure };
        match error.hint() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl ReplicationError {
    /// Which kind of failure it is.
    pub fn code(&self) -> Code {
        match self {
            ReplicationError::Conninfo(_) => Code::Configuration,
            ReplicationError::SlotInUse { .. }
            | ReplicationError::NotInHistory(_)
            | ReplicationError::AheadOfServer(_) => Code::Conflict,
            ReplicationError::SlotMissing(_) => Code::NotFound,
            ReplicationError::ChecksumsFailed(_) => Code::Corrupt,
            _ => Code::Postgres,
        }
    }

    /// What an operator can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            ReplicationError::Unreachable { .. } | ReplicationError::ConnectTimeout { .. } => Some(
                "Does the server run there, and may this host reach it? `postgres` in the configuration says where.".into(),
            ),
            ReplicationError::Authentication(message) if message.sqlstate == "28000" => Some(
                "pg_hba.conf needs a line for this role with the database `replication`, and one for an ordinary database."
                    .into(),
            ),
            ReplicationError::Authentication(_) => {
                Some("`password_file`, `password_env` or libpq's password file gives the password.".into())
            }
            ReplicationError::SlotInUse { holder_pid, .. } => {
                let holder = holder_pid.map(|pid| format!(" (server process {pid})")).unwrap_or_default();
                Some(format!("Stop the program that uses the slot{holder}; a daemon holds the slots of its environments."))
            }
            ReplicationError::MissingGrant { statement, .. } => Some(format!("Run as a superuser: {statement}")),
            _ => self.server_message().and_then(|message| message.hint.clone()),
        }
    }
}
