//! Sessions on a server of this host, over its Unix socket.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use tokio_postgres::{Client, Config, NoTls};

/// Where a server of this host is reached, and as whom.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub socket_directory: PathBuf,
    pub port: u16,
    pub user: String,
}

/// An open session; it ends when this is dropped.
pub struct Session {
    client: Client,
    connection: tokio::task::JoinHandle<()>,
}

/// How long to wait for a server of this host to answer a new session.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

impl Session {
    /// Opens a session in `database`. A statement ends after `statement_limit`, and sooner when it waits for a lock.
    pub async fn open(address: &Address, database: &str, statement_limit: Duration) -> anyhow::Result<Session> {
        let limit_ms = statement_limit.as_millis();
        let mut config = Config::new();
        config
            .host_path(&address.socket_directory)
            .port(address.port)
            .user(&address.user)
            .dbname(database)
            .application_name("pgrecall")
            .connect_timeout(CONNECT_LIMIT)
            .options(format!("-c statement_timeout={limit_ms} -c lock_timeout={}", limit_ms.div_ceil(2)));
        let open = tokio::time::timeout(CONNECT_LIMIT, config.connect(NoTls));
        let (client, connection) = open
            .await
            .map_err(anyhow::Error::from)
            .and_then(|result| result.map_err(anyhow::Error::from))
            .with_context(|| {
                let place = address.socket_directory.display();
                format!("connect to database {database} as {} through {place}, port {}", address.user, address.port)
            })?;
        let connection = tokio::spawn(async move {
            // Its error is what the next query of the client reports.
            let _ = connection.await;
        });
        Ok(Session { client, connection })
    }
}

impl std::ops::Deref for Session {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}
