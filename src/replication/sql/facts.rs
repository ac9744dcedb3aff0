//! What a restore needs to know about a server and no base backup contains.
//!
//! Effective settings, configuration files (they may lie outside the data directory), libraries, extensions, collation
//! versions. Each part may be denied to our role: the facts then say what is missing and which GRANT would give it.
//! Source: PostgreSQL documentation "System Catalogs", "Predefined Roles", 14–18.

use super::watch::{optional, required};
use super::{Sql, literal};
use crate::pg::Major;
use crate::replication::{ConnectConfig, ReplicationError};

/// Longer configuration files are left out, and said to be.
const CONFIG_FILE_BYTES_MAX: u32 = 1 << 20;
/// Further files than these are not asked for: an include directory may hold anything.
const CONFIG_FILES_MAX: usize = 100;
/// One connection is made to each.
const DATABASES_MAX: usize = 1000;

/// What was found out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ServerFacts {
    /// The whole of `version()`, with compiler and platform.
    pub version: String,
    /// Every setting that is not at its default.
    pub settings: Vec<EffectiveSetting>,
    pub config_files: Vec<ConfigFileText>,
    pub preload_libraries: Vec<String>,
    pub extensions: Vec<InstalledExtension>,
    pub databases: Vec<DatabaseFacts>,
    /// glibc's, as collations record it.
    pub libc_version: Option<String>,
    pub icu_version: Option<String>,
    /// Collations of columns; those of whole databases stand with these.
    pub column_collations: Vec<ColumnCollation>,
    /// Number and name of each resource manager that is not PostgreSQL's own; from 15 on.
    pub resource_managers: Vec<(u8, String)>,
    /// What is missing above and why, a sentence each, with the GRANT where one helps.
    pub not_readable: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EffectiveSetting {
    pub name: String,
    /// In the base unit of the setting, as `pg_settings.setting`.
    pub value: String,
    pub unit: Option<String>,
    pub file: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFileText {
    /// Absolute, on the server's host.
    pub path: String,
    pub content: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstalledExtension {
    pub database: String,
    pub name: String,
    pub version: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseFacts {
    pub oid: u32,
    pub name: String,
    pub encoding: String,
    pub collate: String,
    /// As in the catalogue: `c`, `i` or `b`; `c` before 15.
    pub provider: String,
    /// As recorded when the database was made or refreshed; from 15 on.
    pub collation_version: Option<String>,
    /// What the operating system or ICU has now; from 15 on.
    pub collation_version_now: Option<String>,
    pub allows_connections: bool,
}

/// A version under which columns of a database are sorted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ColumnCollation {
    pub database: String,
    pub provider: String,
    pub version: String,
}

impl ServerFacts {
    /// Asks one host for everything; what is denied or fails is named in `not_readable`.
    ///
    /// # Errors
    /// Only when the first connection cannot be made or breaks.
    pub async fn collect(config: &ConnectConfig, host_index: usize) -> Result<ServerFacts, ReplicationError> {
        let mut sql = Sql::connect(config, host_index).await?;
        let version = required(&sql.query("SELECT version() AS v").await?, 0, "v")?;
        let mut facts = ServerFacts { version, ..ServerFacts::default() };
        let settings = facts.read_settings(&mut sql).await;
        facts.note("settings", settings)?;
        let files = facts.read_config_files(&mut sql).await;
        facts.note("configuration files", files)?;
        let databases = facts.read_databases(&mut sql).await;
        facts.note("databases", databases)?;
        let managers = facts.read_resource_managers(&mut sql).await;
        facts.note("resource managers", managers)?;
        sql.close().await;
        let names: Vec<String> =
            facts.databases.iter().filter(|d| d.allows_connections).map(|d| d.name.clone()).collect();
        if names.len() > DATABASES_MAX {
            facts.not_readable.push(format!("extensions: only of {DATABASES_MAX} of {} databases", names.len()));
        }
        for name in names.iter().take(DATABASES_MAX) {
            let read = facts.read_database(config, host_index, name).await;
            // A database that does not let us in does not keep the rest from being read.
            if let Err(e) = read {
                facts.not_readable.push(format!("extensions of database {name}: {e}"));
            }
        }
        Ok(facts)
    }

    /// Keeps the reason when a part could not be read; a broken connection ends everything.
    fn note(&mut self, what: &str, result: Result<(), ReplicationError>) -> Result<(), ReplicationError> {
        match result {
            Err(e @ (ReplicationError::ConnectionLost(_) | ReplicationError::ServerStopping(_))) => Err(e),
            Err(e) => {
                self.not_readable.push(format!("{what}: {e}"));
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    async fn read_settings(&mut self, sql: &mut Sql) -> Result<(), ReplicationError> {
        // What this connection itself has set ("client") says nothing about the server.
        let text = "SELECT name, setting, unit, sourcefile FROM pg_settings \
                    WHERE source NOT IN ('default', 'client', 'session') ORDER BY name";
        let rows = sql.query(text).await?;
        for row in 0..rows.rows.len() {
            self.settings.push(EffectiveSetting {
                name: required(&rows, row, "name")?,
                value: rows.text(row, "setting").unwrap_or_default(),
                unit: rows.text(row, "unit"),
                file: rows.text(row, "sourcefile"),
            });
        }
        let libraries = |setting: &&EffectiveSetting| setting.name.ends_with("_preload_libraries");
        let names = self.settings.iter().filter(libraries).flat_map(|setting| setting.value.split(','));
        self.preload_libraries =
            names.map(|n| n.trim().trim_matches('"').to_owned()).filter(|n| !n.is_empty()).collect();
        // Without this right the list above is silently shorter.
        sql.require_role("pg_read_all_settings").await
    }

    async fn read_config_files(&mut self, sql: &mut Sql) -> Result<(), ReplicationError> {
        let mut paths: Vec<String> = Vec::new();
        for name in ["config_file", "hba_file", "ident_file"] {
            let asked = sql.query(&format!("SELECT current_setting('{name}') AS path")).await;
            let rows = asked.map_err(|e| sql.missing_grant(e, "pg_read_all_settings"))?;
            paths.extend(rows.text(0, "path"));
        }
        paths.extend(self.settings.iter().filter_map(|setting| setting.file.clone()));
        paths.extend(included_by_access_rules(sql).await);
        let mut seen = std::collections::HashSet::new();
        paths.retain(|path| seen.insert(path.clone()));
        if paths.len() > CONFIG_FILES_MAX {
            self.not_readable.push(format!("configuration files: only {CONFIG_FILES_MAX} of {}", paths.len()));
            paths.truncate(CONFIG_FILES_MAX);
        }
        for path in paths {
            match read_file(sql, &path).await {
                Ok(Some(content)) => self.config_files.push(ConfigFileText { path, content }),
                Ok(None) => self.not_readable.push(format!("{path}: missing, or larger than 1 MiB")),
                // The same right is missing for all of them: one sentence is enough.
                Err(e @ ReplicationError::MissingGrant { .. }) => return Err(e),
                Err(e) => self.note(&path, Err(e))?,
            }
        }
        Ok(())
    }

    async fn read_databases(&mut self, sql: &mut Sql) -> Result<(), ReplicationError> {
        let versions = if sql.major()? < Major(15) {
            "NULL AS recorded, NULL AS actual, 'c' AS provider"
        } else {
            "datcollversion AS recorded, pg_database_collation_actual_version(oid) AS actual, \
             datlocprovider AS provider"
        };
        // An invalid database (its DROP was cut short) has the limit -2.
        let text = format!(
            "SELECT oid, datname, pg_encoding_to_char(encoding) AS encoding, datcollate, \
             datallowconn AND datconnlimit <> -2 AS allowed, {versions} FROM pg_database ORDER BY oid"
        );
        let rows = sql.query(&text).await?;
        for row in 0..rows.rows.len() {
            self.databases.push(DatabaseFacts {
                oid: required(&rows, row, "oid")?,
                name: required(&rows, row, "datname")?,
                encoding: required(&rows, row, "encoding")?,
                collate: required(&rows, row, "datcollate")?,
                provider: required(&rows, row, "provider")?,
                collation_version: optional(&rows, row, "recorded")?,
                collation_version_now: optional(&rows, row, "actual")?,
                allows_connections: rows.text(row, "allowed").as_deref() == Some("t"),
            });
        }
        Ok(())
    }

    /// Those that a library of `shared_preload_libraries` has registered.
    async fn read_resource_managers(&mut self, sql: &mut Sql) -> Result<(), ReplicationError> {
        if sql.major()? < Major(15) {
            return Ok(());
        }
        let text = "SELECT rm_id, rm_name FROM pg_get_wal_resource_managers() WHERE NOT rm_builtin ORDER BY 1";
        let rows = sql.query(text).await?;
        for row in 0..rows.rows.len() {
            self.resource_managers.push((required(&rows, row, "rm_id")?, required(&rows, row, "rm_name")?));
        }
        Ok(())
    }

    /// What only a connection to the database itself shows.
    async fn read_database(
        &mut self,
        config: &ConnectConfig,
        host_index: usize,
        name: &str,
    ) -> Result<(), ReplicationError> {
        let mut sql = Sql::connect_to(config, host_index, name).await?;
        let rows = sql.query("SELECT extname, extversion FROM pg_catalog.pg_extension ORDER BY 1").await?;
        for row in 0..rows.rows.len() {
            self.extensions.push(InstalledExtension {
                database: name.to_owned(),
                name: required(&rows, row, "extname")?,
                version: required(&rows, row, "extversion")?,
            });
        }
        // An index has its columns, with their collations, beside those of its table.
        let text = "SELECT DISTINCT collprovider AS p, collversion AS v FROM pg_catalog.pg_collation WHERE collversion IS \
                    NOT NULL AND oid IN (SELECT attcollation FROM pg_catalog.pg_attribute WHERE attrelid >= 16384)";
        let rows = sql.query(text).await?;
        for row in 0..rows.rows.len() {
            self.column_collations.push(ColumnCollation {
                database: name.to_owned(),
                provider: required(&rows, row, "p")?,
                version: required(&rows, row, "v")?,
            });
        }
        if self.libc_version.is_none() || self.icu_version.is_none() {
            let text = "SELECT max(v) FILTER (WHERE p = 'c') AS libc, max(v) FILTER (WHERE p = 'i') AS icu FROM \
                        (SELECT collprovider AS p, pg_collation_actual_version(oid) AS v FROM \
                         (SELECT DISTINCT ON (collprovider) collprovider, oid FROM pg_catalog.pg_collation \
                          WHERE collversion IS NOT NULL AND collencoding IN (-1, (SELECT encoding FROM pg_database \
                          WHERE datname = current_database())) ORDER BY collprovider, oid) AS one) AS versions";
            let rows = sql.query(text).await?;
            self.libc_version = self.libc_version.take().or(rows.text(0, "libc"));
            self.icu_version = self.icu_version.take().or(rows.text(0, "icu"));
        }
        sql.close().await;
        Ok(())
    }
}

/// Files that `pg_hba.conf` and `pg_ident.conf` include; from 16 on, and only for whom the views are readable.
async fn included_by_access_rules(sql: &mut Sql) -> Vec<String> {
    let text = "SELECT DISTINCT file_name FROM pg_hba_file_rules UNION SELECT DISTINCT file_name FROM \
                pg_ident_file_mappings ORDER BY 1";
    match sql.major() {
        Ok(major) if major >= Major(16) => match sql.query(text).await {
            Ok(rows) => (0..rows.rows.len()).filter_map(|row| rows.text(row, "file_name")).collect(),
            Err(_) => Vec::new(),
        },
        _ => Vec::new(),
    }
}

/// A text file of the server's host; `None` when it is missing or too large.
async fn read_file(sql: &mut Sql, path: &str) -> Result<Option<String>, ReplicationError> {
    let path = literal(path);
    let one_more = CONFIG_FILE_BYTES_MAX + 1;
    let asked = sql.query(&format!("SELECT pg_read_file({path}, 0, {one_more}, true) AS content")).await;
    let rows = asked.map_err(|e| {
        let function = "EXECUTE ON FUNCTION pg_read_file(text, bigint, bigint, boolean)";
        // Two rights are needed: to call the function, and to name a file outside the data directory.
        let missing = if e.server_message().is_some_and(|m| m.message.contains("function")) {
            function
        } else {
            "pg_read_server_files"
        };
        sql.missing_grant(e, missing)
    })?;
    let limit = usize::try_from(CONFIG_FILE_BYTES_MAX).unwrap_or(usize::MAX);
    Ok(rows.text(0, "content").filter(|content| content.len() <= limit))
}
