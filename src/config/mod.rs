//! The configuration file: as written → validated, with every problem at once → [`Config`].
//!
//! One TOML file names any number of environments. Unknown keys are errors; durations and sizes carry their unit;
//! secrets are referred to by file or environment variable and read only by those who need them. An environment
//! inherits what it does not say from `[defaults]`, sub-tables key by key.
//!
//! Services take small `Settings` of their own; this module builds them, and they never see `config`.
//! `config.example.toml` at the root of the tree holds every key; a test keeps it equal to the defaults here.

mod access;
mod build;
mod document;
mod environment;
mod sandbox;
mod secret_ref;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use access::{Access, Principal};
pub use document::Problem;
pub use environment::{Archive, Backups, Environment, EnvironmentName, Location, Postgres, Restore, S3};
pub use secret_ref::{SecretError, SecretRef};

use crate::archive::Budget;
use crate::error::{Code, Failure};
use crate::operations;
use crate::telemetry;
use crate::util::nearest::nearest;
use crate::util::throttle::Throttle;
use document::{Document, Section};
use environment::{GIB, MIB};

/// Where the configuration lies when neither `--config` nor `PGRECALL_CONFIG` names another file.
pub const DEFAULT_PATH: &str = "/etc/pgrecall/config.toml";
const DEFAULT_CONTROL_SOCKET: &str = "/run/pgrecall/control.sock";

const BANDWIDTH_MIN: u64 = 64 << 10;
const BANDWIDTH_MAX: u64 = 1 << 40;

const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);
const SHUTDOWN_GRACE_MAX: Duration = Duration::from_mins(10);

/// A valid configuration.
#[derive(Debug, Clone)]
pub struct Config {
    pub path: PathBuf,
    pub log: telemetry::Settings,
    pub control_socket: PathBuf,
    /// Time for the tails to be stored when the daemon is stopped.
    pub shutdown_grace: Duration,
    pub limits: Limits,
    pub sandbox: operations::sandbox::Settings,
    /// Where metrics and health are served, on this host only.
    pub metrics_listen: Option<SocketAddr>,
    /// Who may what in every environment, and with the daemon itself.
    pub access: Access,
    pub environments: BTreeMap<EnvironmentName, Environment>,
}

/// What runs at the same time on this host, of all environments together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub backups: u32,
    /// Restores, and sandboxes until their server is usable.
    pub restores: u32,
    /// Bytes a second that all backups together send to their stores; `None` is no limit. WAL is never held back.
    pub backup_bandwidth_max: Option<u64>,
    /// And that all restores together read.
    pub restore_bandwidth_max: Option<u64>,
    /// Bytes of WAL that all environments together hold in memory.
    pub wal_buffer_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            backups: 2,
            restores: 2,
            backup_bandwidth_max: None,
            restore_bandwidth_max: None,
            wal_buffer_max: 128 * MIB,
        }
    }
}

impl Limits {
    /// For all backups of this process.
    pub fn backup_throttle(self) -> Option<Arc<Throttle>> {
        self.backup_bandwidth_max.map(|bytes| Arc::new(Throttle::new(bytes)))
    }

    /// For all streams of this process.
    pub fn wal_budget(self) -> Arc<Budget> {
        Budget::new(self.wal_buffer_max)
    }

    /// For all restores of this process.
    pub fn restore_throttle(self) -> Option<Arc<Throttle>> {
        self.restore_bandwidth_max.map(|bytes| Arc::new(Throttle::new(bytes)))
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("read the configuration {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("use the configuration {path}: {}", listed(problems))]
    Invalid { path: PathBuf, problems: Vec<Problem> },
}

/// The file to read: what `--config` says, else `PGRECALL_CONFIG`, else [`DEFAULT_PATH`].
pub fn locate(flag: Option<&Path>) -> PathBuf {
    let named = flag.map(Path::to_path_buf);
    let variable = || std::env::var_os("PGRECALL_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
    named.or_else(variable).unwrap_or_else(|| PathBuf::from(DEFAULT_PATH))
}

/// Where the daemon listens, for those who cannot read its configuration: what `PGRECALL_CONTROL_SOCKET` says, else the default.
pub fn default_socket() -> PathBuf {
    let variable = std::env::var_os("PGRECALL_CONTROL_SOCKET").filter(|path| !path.is_empty());
    variable.map_or_else(|| PathBuf::from(DEFAULT_CONTROL_SOCKET), PathBuf::from)
}

impl Config {
    /// Reads and validates a file.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] lists every problem, in the order of the lines.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path);
        let text = text.map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        Config::parse(&text, path).map_err(|problems| ConfigError::Invalid { path: path.to_path_buf(), problems })
    }

    /// Validates a text; `path` is only remembered.
    pub fn parse(text: &str, path: &Path) -> Result<Config, Vec<Problem>> {
        let document = Document::new(text);
        let table = document.parse();
        // After an error of the syntax the rest of the text may have landed in the wrong table.
        if document.has_problems() {
            return Err(document.into_problems());
        }
        let root = document.root(&table);
        let log = read_log(root.table("log"));
        let limits = read_limits(root.table("limits"));
        let sandbox = sandbox::read(root.table("sandbox"));
        let access = Access::read(root.table("access"));
        let control_socket = root.parsed("control_socket", environment::absolute_path);
        let shutdown_grace =
            root.duration("shutdown_grace", SHUTDOWN_GRACE, Duration::from_secs(1)..=SHUTDOWN_GRACE_MAX);
        let metrics_listen = root.parsed("metrics_listen", loopback);
        let mut environments = BTreeMap::new();
        for (name, section) in root.named_tables("environment", "defaults") {
            match EnvironmentName::new(&name.value) {
                Ok(parsed) => {
                    let place = section.place();
                    let environment = Environment::read(parsed.clone(), section);
                    for other in environments.values().filter(|other| environment.shares_slot_with(other)) {
                        document.report(place.0, &place.1, shared_slot(other));
                    }
                    environments.insert(parsed, environment);
                }
                Err(message) => section.report_at(&name, message),
            }
        }
        if !root.table("environment").is_written() {
            root.report("no environment is configured: add a table [environment.NAME]");
        }
        root.finish();
        match document.into_problems() {
            problems if problems.is_empty() => Ok(Config {
                path: path.to_path_buf(),
                log,
                control_socket: control_socket.unwrap_or_else(|| PathBuf::from(DEFAULT_CONTROL_SOCKET)),
                shutdown_grace,
                limits,
                sandbox,
                metrics_listen,
                access,
                environments,
            }),
            problems => Err(problems),
        }
    }

    /// The environment of that name.
    ///
    /// # Errors
    /// Names the nearest one, or all of them.
    pub fn environment(&self, name: &str) -> Result<&Environment, Failure> {
        if let Some((_, environment)) = self.environments.iter().find(|(known, _)| known.as_str() == name) {
            return Ok(environment);
        }
        let known: Vec<&str> = self.environments.keys().map(EnvironmentName::as_str).collect();
        let failure = Failure::new(Code::NotFound, format!("find environment {name} in {}", self.path.display()));
        Err(match nearest(name, known.iter().copied()) {
            Some(meant) => failure.hint(format!("Did you mean {meant}?")),
            None => failure.hint(format!("The configured environments are: {}.", known.join(", "))),
        })
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        let failure = Failure::new(Code::Configuration, error.to_string());
        match error {
            ConfigError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                failure.hint(format!("Name the file with --config or PGRECALL_CONFIG, or put it at {DEFAULT_PATH}."))
            }
            ConfigError::Read { .. } => failure,
            ConfigError::Invalid { .. } => failure.hint("config.example.toml explains every key."),
        }
    }
}

fn read_log(section: Section<'_>) -> telemetry::Settings {
    let default = telemetry::Settings::default();
    let settings = telemetry::Settings {
        format: section.parsed("format", str::parse).unwrap_or(default.format),
        level: section.parsed("level", telemetry::parse_level).unwrap_or(default.level),
    };
    section.finish();
    settings
}

fn read_limits(section: Section<'_>) -> Limits {
    let default = Limits::default();
    let limits = Limits {
        backups: section.integer("backups", default.backups, 1..=64),
        restores: section.integer("restores", default.restores, 1..=64),
        backup_bandwidth_max: read_bandwidth(&section, "backup_bandwidth_max"),
        restore_bandwidth_max: read_bandwidth(&section, "restore_bandwidth_max"),
        wal_buffer_max: section.bytes("wal_buffer_max", default.wal_buffer_max, MIB..=1024 * GIB),
    };
    section.finish();
    limits
}

fn read_bandwidth(section: &Section<'_>, key: &'static str) -> Option<u64> {
    Some(section.bytes(key, 0, BANDWIDTH_MIN..=BANDWIDTH_MAX)).filter(|bytes| *bytes > 0)
}

/// Only this host: what is served there is for a collector beside it, and anybody may read it.
fn loopback(text: &str) -> Result<SocketAddr, String> {
    let example = "(write for example \"127.0.0.1:9187\")";
    let address: SocketAddr = text.parse().map_err(|_| format!("{text:?} is not an address with a port {example}"))?;
    match address.ip().is_loopback() {
        true => Ok(address),
        false => Err(format!("{text:?} can be reached from other hosts; only a loopback address is allowed {example}")),
    }
}

fn shared_slot(other: &Environment) -> String {
    let slot = other.postgres.as_ref().map_or("", |postgres| &postgres.slot);
    format!("uses the same server and replication slot {slot} as environment.{}", other.name)
}

fn listed(problems: &[Problem]) -> String {
    let count = match problems.len() {
        1 => "one problem".to_owned(),
        count => format!("{count} problems"),
    };
    problems.iter().fold(count, |text, problem| format!("{text}\n  {problem}"))
}
