//! What lies outside the data directory, asked by SQL where the role may.

use async_trait::async_trait;

use super::full::ServerFacts;
use crate::pg::collation::is_bytewise;
use crate::pg::{CollationProvider, Timestamp};
use crate::replication::sql::{DatabaseFacts, EffectiveSetting};
use crate::replication::{ConnectConfig, ReplicationError, Sql};
use crate::repository::backup_object::{
    CollationUse, ConfigFile, Database, Extension, ResourceManager, Setting, Surroundings,
};

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
        collations: collations(&facts),
        resource_managers: facts.resource_managers.into_iter().map(|(id, name)| ResourceManager { id, name }).collect(),
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

/// Each version under which text is sorted, once for each database.
fn collations(facts: &crate::replication::ServerFacts) -> Vec<CollationUse> {
    let own = facts.databases.iter().filter_map(|database| {
        let provider = CollationProvider::from_catalog(&database.provider)?;
        if provider == CollationProvider::Libc && is_bytewise(&database.collate) {
            return None;
        }
        // Before 15 no database had a version of its own: what the library says now is the best guess.
        let now = || facts.libc_version.clone().filter(|_| provider == CollationProvider::Libc);
        let version = database.collation_version.clone().or_else(now)?;
        Some(CollationUse { provider, version, database: database.name.clone() })
    });
    let columns = facts.column_collations.iter().filter_map(|found| {
        let provider = CollationProvider::from_catalog(&found.provider)?;
        Some(CollationUse { provider, version: found.version.clone(), database: found.database.clone() })
    });
    let mut all: Vec<CollationUse> = own.chain(columns).collect();
    all.sort();
    all.dedup();
    all
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::sql::ColumnCollation;

    fn database(name: &str, provider: &str, collate: &str, version: Option<&str>) -> DatabaseFacts {
        DatabaseFacts {
            oid: 5,
            name: name.into(),
            encoding: "UTF8".into(),
            collate: collate.into(),
            provider: provider.into(),
            collation_version: version.map(String::from),
            collation_version_now: None,
            allows_connections: true,
        }
    }

    #[test]
    fn each_version_under_which_text_is_sorted_stands_once_for_a_database() {
        let column = |version: &str| {
            let (database, provider) = ("words".to_owned(), "i".to_owned());
            ColumnCollation { database, provider, version: version.to_owned() }
        };
        let facts = crate::replication::ServerFacts {
            databases: vec![
                database("words", "i", "C", Some("153.120")),
                database("bytes", "c", "C.UTF-8", None),
                database("old", "c", "de_DE.UTF-8", None),
                database("plain", "b", "C", Some("1")),
            ],
            libc_version: Some("2.36".into()),
            column_collations: vec![column("153.120"), column("153.120.42")],
            ..Default::default()
        };
        let found = collations(&facts);
        let told: Vec<_> = found.iter().map(|c| (c.provider, c.version.as_str(), c.database.as_str())).collect();
        let expected = [
            (CollationProvider::Libc, "2.36", "old"),
            (CollationProvider::Icu, "153.120", "words"),
            (CollationProvider::Icu, "153.120.42", "words"),
            (CollationProvider::Builtin, "1", "plain"),
        ];
        assert_eq!(told, expected);
    }
}
