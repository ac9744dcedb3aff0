//! Connection strings as libpq reads them: `host=db user=replicator` and `postgresql://replicator@db`.
//!
//! Differences on purpose: an unknown key is an error, no environment variable is read except `PGPASSFILE`, `dbname`
//! defaults to `postgres`. All problems of a string are reported at once, and none of them quotes a password.
//! Source: `src/interfaces/libpq/fe-connect.c` (`conninfo_parse`, `conninfo_uri_parse`), 14–18.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::util::secret::Secret;

use super::{passfile, uri};

const DEFAULT_PORT: u16 = 5432;
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Where the packages of the distributions, then PostgreSQL itself, put the Unix socket.
const SOCKET_DIRECTORIES: [&str; 3] = ["/run/postgresql", "/var/run/postgresql", "/tmp"];

/// Where a server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub address: HostAddress,
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostAddress {
    /// A name or an IP address.
    Tcp(String),
    /// The directory of a Unix socket.
    Socket(PathBuf),
}

/// How much TLS is asked for; the words mean what they mean to libpq.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SslMode {
    Disable,
    Allow,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Whether SCRAM must be bound to the TLS channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelBindingMode {
    Disable,
    Prefer,
    Require,
}

/// Which certificates are trusted to sign the server's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootCertificates {
    /// `~/.postgresql/root.crt` if it is there.
    Default,
    /// `sslrootcert=system`
    System,
    File(PathBuf),
}

/// A connection string, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectConfig {
    /// Never empty.
    pub hosts: Vec<Host>,
    pub user: String,
    pub database: String,
    pub password: Option<Secret>,
    /// Instead of `PGPASSFILE` and `~/.pgpass`.
    pub passfile: Option<PathBuf>,
    pub sslmode: SslMode,
    pub sslrootcert: RootCertificates,
    pub sslcert: Option<PathBuf>,
    pub sslkey: Option<PathBuf>,
    pub application_name: Option<String>,
    /// For dialling, TLS and authentication together, a host.
    pub connect_timeout: Duration,
    pub channel_binding: ChannelBindingMode,
}

/// Why a text is not a connection string: every reason, each naming its key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read the connection string: {}", problems.join("; "))]
pub struct ConninfoError {
    pub problems: Vec<String>,
}

impl ConninfoError {
    pub(super) fn one(problem: impl Into<String>) -> Self {
        ConninfoError { problems: vec![problem.into()] }
    }
}

impl ConnectConfig {
    /// The host at `index`.
    ///
    /// # Errors
    /// When there are fewer.
    pub fn host(&self, index: usize) -> Result<&Host, ConninfoError> {
        let count = self.hosts.len();
        self.hosts.get(index).ok_or_else(|| ConninfoError::one(format!("host {index} of {count} does not exist")))
    }

    /// The password for a host: the one given, or the password file's.
    ///
    /// # Errors
    /// When the password file is readable by others; a missing file is no error.
    pub fn password_for(&self, host: &Host, database: &str) -> Result<Option<Secret>, ConninfoError> {
        if let Some(password) = &self.password {
            return Ok(Some(password.clone()));
        }
        let wanted = passfile::Wanted { host, database, user: &self.user };
        match self.passfile.clone().or_else(passfile::default_path) {
            Some(path) => passfile::look_up(&path, &wanted).map_err(ConninfoError::one),
            None => Ok(None),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.address {
            HostAddress::Tcp(name) if name.contains(':') => write!(f, "[{name}]:{}", self.port),
            HostAddress::Tcp(name) => write!(f, "{name}:{}", self.port),
            HostAddress::Socket(_) => write!(f, "{}", self.socket_path().unwrap_or_default().display()),
        }
    }
}

impl Host {
    /// The path of the Unix socket, when it is one.
    pub fn socket_path(&self) -> Option<PathBuf> {
        match &self.address {
            HostAddress::Socket(directory) => Some(directory.join(format!(".s.PGSQL.{}", self.port))),
            HostAddress::Tcp(_) => None,
        }
    }
}

/// What the string said, key by key; the first value of a key that libpq knows wins over nothing, the last over the rest.
#[derive(Default)]
pub(super) struct Pairs(pub(super) Vec<(String, String)>);

impl Pairs {
    fn get(&self, key: &str) -> Option<&str> {
        let value = self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
        value.filter(|value| !value.is_empty())
    }
}

impl FromStr for ConnectConfig {
    type Err = ConninfoError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let pairs = match text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://")) {
            Some(rest) => uri::pairs(rest)?,
            None => key_values(text)?,
        };
        Builder::default().build(&pairs)
    }
}

const KEYS: [&str; 14] = [
    "host",
    "port",
    "user",
    "dbname",
    "password",
    "passfile",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "application_name",
    "connect_timeout",
    "channel_binding",
    "sslnegotiation",
];

/// Collects problems while it reads.
#[derive(Default)]
struct Builder {
    problems: Vec<String>,
}

impl Builder {
    fn build(mut self, pairs: &Pairs) -> Result<ConnectConfig, ConninfoError> {
        for (key, _) in &pairs.0 {
            if !KEYS.contains(&key.as_str()) {
                self.problems.push(format!("{key} is not a key that is understood (these are: {})", KEYS.join(", ")));
            }
        }
        if pairs.get("sslnegotiation").is_some_and(|v| v != "postgres") {
            self.problems.push("sslnegotiation: only postgres is supported".to_owned());
        }
        let sslrootcert = match pairs.get("sslrootcert") {
            None => RootCertificates::Default,
            Some("system") => RootCertificates::System,
            Some(path) => RootCertificates::File(path.into()),
        };
        let sslmode = self.sslmode(pairs.get("sslmode"), &sslrootcert);
        let config = ConnectConfig {
            hosts: self.hosts(pairs),
            user: pairs.get("user").map(str::to_owned).unwrap_or_else(|| self.system_user()),
            database: pairs.get("dbname").unwrap_or("postgres").to_owned(),
            password: pairs.get("password").map(|p| Secret::new(p.to_owned())),
            passfile: pairs.get("passfile").map(PathBuf::from),
            sslmode,
            sslrootcert,
            sslcert: pairs.get("sslcert").map(PathBuf::from),
            sslkey: pairs.get("sslkey").map(PathBuf::from),
            application_name: pairs.get("application_name").map(str::to_owned),
            connect_timeout: self.connect_timeout(pairs.get("connect_timeout")),
            channel_binding: self.channel_binding(pairs.get("channel_binding")),
        };
        if self.problems.is_empty() { Ok(config) } else { Err(ConninfoError { problems: self.problems }) }
    }

    /// `host=a,b port=1,2`: as many ports as hosts, or one for all.
    fn hosts(&mut self, pairs: &Pairs) -> Vec<Host> {
        let addresses: Vec<HostAddress> =
            pairs.get("host").unwrap_or("").split(',').map(|text| host_address(text.trim())).collect();
        let ports: Vec<u16> = pairs.get("port").unwrap_or("").split(',').map(|text| self.port(text.trim())).collect();
        if ports.len() != 1 && ports.len() != addresses.len() {
            self.problems.push(format!("port: {} ports for {} hosts", ports.len(), addresses.len()));
        }
        let port = |index: usize| ports.get(index).or(ports.first()).copied().unwrap_or(DEFAULT_PORT);
        addresses.into_iter().enumerate().map(|(index, address)| Host { address, port: port(index) }).collect()
    }

    fn port(&mut self, text: &str) -> u16 {
        if text.is_empty() {
            return DEFAULT_PORT;
        }
        match text.parse() {
            Ok(port) if port != 0 => port,
            _ => {
                self.problems.push(format!("port: {text:?} is not a port (1 to 65535)"));
                DEFAULT_PORT
            }
        }
    }

    fn sslmode(&mut self, text: Option<&str>, roots: &RootCertificates) -> SslMode {
        let system = *roots == RootCertificates::System;
        let mode = match text {
            Some("disable") => SslMode::Disable,
            Some("allow") => SslMode::Allow,
            Some("prefer") => SslMode::Prefer,
            Some("require") => SslMode::Require,
            Some("verify-ca") => SslMode::VerifyCa,
            None if system => SslMode::VerifyFull,
            Some("verify-full") => SslMode::VerifyFull,
            None => SslMode::Prefer,
            Some(other) => {
                self.problems.push(format!(
                    "sslmode: {other:?} is none of disable, allow, prefer, require, verify-ca, verify-full"
                ));
                SslMode::VerifyFull
            }
        };
        if system && mode != SslMode::VerifyFull {
            // Anybody can get a certificate from a public authority: only the name then says anything.
            self.problems.push("sslmode: sslrootcert=system needs verify-full".to_owned());
        }
        mode
    }

    fn channel_binding(&mut self, text: Option<&str>) -> ChannelBindingMode {
        match text {
            None | Some("prefer") => ChannelBindingMode::Prefer,
            Some("disable") => ChannelBindingMode::Disable,
            Some("require") => ChannelBindingMode::Require,
            Some(other) => {
                self.problems.push(format!("channel_binding: {other:?} is none of disable, prefer, require"));
                ChannelBindingMode::Prefer
            }
        }
    }

    /// Seconds, at least two as in libpq; 0, libpq's "for ever", is our default: no call here waits without a limit.
    fn connect_timeout(&mut self, text: Option<&str>) -> Duration {
        match text.map(str::parse::<u32>) {
            None | Some(Ok(0)) => DEFAULT_CONNECT_TIMEOUT,
            Some(Ok(seconds)) => Duration::from_secs(u64::from(seconds.max(2))),
            Some(Err(_)) => {
                self.problems.push("connect_timeout: not a number of seconds".to_owned());
                DEFAULT_CONNECT_TIMEOUT
            }
        }
    }

    fn system_user(&mut self) -> String {
        let id = rustix::process::geteuid().as_raw();
        let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let name = users.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == id.to_string()).then(|| name.to_owned())
        });
        name.unwrap_or_else(|| {
            self.problems.push(format!("user: not given, and user {id} has no name on this host"));
            String::new()
        })
    }
}

fn host_address(text: &str) -> HostAddress {
    if text.starts_with('/') {
        return HostAddress::Socket(PathBuf::from(text));
    }
    if !text.is_empty() {
        return HostAddress::Tcp(text.to_owned());
    }
    let there = SOCKET_DIRECTORIES.iter().find(|directory| Path::new(directory).is_dir());
    HostAddress::Socket(PathBuf::from(there.copied().unwrap_or("/tmp")))
}

/// `key = value key='va\'lue'`.
fn key_values(text: &str) -> Result<Pairs, ConninfoError> {
    let mut pairs = Pairs::default();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let end = rest.find(|c: char| c == '=' || c.is_whitespace()).unwrap_or(rest.len());
        let (key, after) = rest.split_at_checked(end).unwrap_or((rest, ""));
        let Some(after) = after.trim_start().strip_prefix('=') else {
            return Err(ConninfoError::one(format!("no \"=\" after {}", shown_key(key))));
        };
        let (value, after) = value(after.trim_start())
            .ok_or_else(|| ConninfoError::one(format!("{}: the quoted value has no end", shown_key(key))))?;
        pairs.0.push((key.to_owned(), value));
        rest = after.trim_start();
    }
    Ok(pairs)
}

/// A key that is none may be a piece of a password with a blank in it.
fn shown_key(key: &str) -> &str {
    if KEYS.contains(&key) { key } else { "a key that is not understood" }
}

/// One value, quoted or not, with `\` before any character; `None` when a quote stays open.
fn value(text: &str) -> Option<(String, &str)> {
    let quoted = text.strip_prefix('\'');
    let mut value = String::new();
    let mut chars = quoted.unwrap_or(text).chars();
    loop {
        let before = chars.as_str();
        match chars.next() {
            Some('\\') => value.extend(chars.next()),
            Some('\'') if quoted.is_some() => return Some((value, chars.as_str())),
            Some(c) if quoted.is_none() && c.is_whitespace() => return Some((value, before)),
            Some(c) => value.push(c),
            None => return quoted.is_none().then_some((value, "")),
        }
    }
}

#[cfg(test)]
mod tests;
