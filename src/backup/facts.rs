//! What lies outside the data directory, asked by SQL where the role may.

use async_trait::async_trait;

use super::full::ServerFacts;
use crate::pg::Timestamp;
use crate::replication::sql::{DatabaseFacts, EffectiveSetting};
use crate::replication::{ConnectConfig, ReplicationError, Sql};
use crate::repository::backup_object::{ConfigFile, Database, Extension, Setting, Surroundings};

/// Asks one host.
pub struct SqlFacts {
    pub config: ConnectConfig,
    pub host_index: usize,
}

#[async_trait]
impl ServerFacts for SqlFacts {
    async fn surroundings(&self) -> Surroundings {
        match crate::replication::ServerFacts::collect(&self.config, self.host_index).await {
            Ok(facts) => from_facts(facts),
            Err(error) => Surroundings { not_readable: vec![format!("everything: {error}")], ..Default::default() },
        }
    }

    async fn now(&self) -> Option<Timestamp> {
        self.clock().await.inspect_err(|error| tracing::debug!(%error, "the server's clock could not be asked")).ok()
    }
}

impl SqlFacts {
    async fn clock(&self) -> Result<Timestamp, ReplicationError> {
        let mut sql = Sql::connect(&self.config, self.host_index).await?;
        let rows = sql.query("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS micros").await?;
        sql.close().await;
        let micros = rows.text(0, "micros").and_then(|m| m.parse().ok());
        micros.map(Timestamp).ok_or_else(|| ReplicationError::Protocol("the server's clock is no number".into()))
    }
}

fn from_facts(facts: crate::replication::ServerFacts) -> Surroundings {
    Surroundings {
        not_readable: facts.not_readable,
        settings: facts.settings.into_iter().map(setting).collect(),
        config_files: facts
            .config_files
            .into_iter()
            .map(|file| ConfigFile { path: file.path, content: file.content })
            .collect(),
        preload_libraries: facts.preload_libraries,
        extensions: facts
            .extensions
            .into_iter()
            .map(|e| Extension { database: e.database, name: e.name, version: e.version })
            .collect(),
        databases: facts.databases.into_iter().map(database).collect(),
        libc_version: facts.libc_version,
        icu_version: facts.icu_version,
    }
}

/// A value goes with its unit, as a configuration file takes it.
fn setting(setting: EffectiveSetting) -> Setting {
    let EffectiveSetting { name, value, unit, file } = setting;
    // "8kB" is a unit that a configuration file does not know, and -1 often means something else than a size.
    let plain = |u: &String| !u.starts_with(|c: char| c.is_ascii_digit());
    let value = match unit.filter(plain).filter(|_| !value.starts_with('-') && value != "0") {
        Some(unit) => format!("{value}{unit}"),
        None => value,
    };
    Setting { name, value, file }
}

fn database(facts: DatabaseFacts) -> Database {
    let DatabaseFacts { oid, name, collate, collation_version, .. } = facts;
    Database { oid, name, collate, collation_version }
}
