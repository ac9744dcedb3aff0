//! An ordinary connection: what the replication protocol cannot be asked.
//!
//! On the same transport as replication (one place for TLS and authentication), by the simple protocol: every value comes
//! as text. The daemon's role needs only REPLICATION, so every question here may be refused, and callers go on without.

mod facts;
mod restore_point;
mod watch;

use std::time::Duration;

use super::connection::{Connection, Purpose, Rows};
use super::conninfo::ConnectConfig;
use super::error::ReplicationError;
use super::session::quoted_identifier;
use crate::pg::Major;

pub use facts::{ColumnCollation, ConfigFileText, DatabaseFacts, EffectiveSetting, InstalledExtension, ServerFacts};
pub use restore_point::RESTORE_POINT_NAME_BYTES_MAX;
pub use watch::{ClockReading, SlotState, SyncState, SyncWait, WalSettings};

/// No question here takes long; a lock held by somebody else must not hold us.
const QUERY_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection that takes SQL.
#[derive(Debug)]
pub struct Sql {
    connection: Connection,
    user: String,
}

impl Sql {
    /// Connects to the database of the configuration.
    ///
    /// # Errors
    /// As [`super::Session::connect`].
    pub async fn connect(config: &ConnectConfig, host_index: usize) -> Result<Sql, ReplicationError> {
        Self::connect_to(config, host_index, &config.database).await
    }

    /// Connects to another database of the same server.
    pub async fn connect_to(
        config: &ConnectConfig,
        host_index: usize,
        database: &str,
    ) -> Result<Sql, ReplicationError> {
        let connection = Connection::open(config, host_index, Purpose::Sql(database)).await?;
        Ok(Sql { connection, user: config.user.clone() })
    }

    pub fn backend_pid(&self) -> i32 {
        self.connection.backend_pid
    }

    /// # Errors
    /// `Protocol` when the server did not say.
    pub fn major(&self) -> Result<Major, ReplicationError> {
        self.connection.parameters.major()
    }

    /// The rows of the last statement. Values within the text are the caller's to quote, with [`literal`].
    ///
    /// # Errors
    /// `Server` with the SQLSTATE; `ConnectionLost`, also after 30 s without an answer.
    pub async fn query(&mut self, sql: &str) -> Result<Rows, ReplicationError> {
        Ok(self.query_all(sql).await?.pop().unwrap_or_default())
    }

    /// The rows of each statement that has some.
    ///
    /// # Errors
    /// As [`Sql::query`].
    pub async fn query_all(&mut self, sql: &str) -> Result<Vec<Rows>, ReplicationError> {
        self.connection.query_within(sql, QUERY_TIMEOUT).await
    }

    /// Turns "insufficient privilege" into the GRANT that gives it: a role, or `EXECUTE ON FUNCTION …`.
    fn missing_grant(&self, error: ReplicationError, right: &str) -> ReplicationError {
        match error {
            ReplicationError::Server(message) if message.sqlstate == "42501" => {
                ReplicationError::MissingGrant { statement: self.grant(right), message: message.message }
            }
            other => other,
        }
    }

    fn grant(&self, right: &str) -> String {
        format!("GRANT {right} TO {}", quoted_identifier(&self.user))
    }

    /// Ends the connection.
    pub async fn close(self) {
        self.connection.terminate().await;
    }
}

/// A text as an SQL literal, whatever `standard_conforming_strings` says.
pub fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if text.contains('\\') { format!(" E'{}'", quoted.replace('\\', "\\\\")) } else { format!("'{quoted}'") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_end_where_they_should() {
        assert_eq!(literal("o'neil"), "'o''neil'");
        assert_eq!(literal(r"a\'b"), r" E'a\\''b'");
    }
}
