//! One environment: what its table may say, within which limits, and what holds when it says nothing.

use std::fmt;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use chrono_tz::Tz;

use super::access::Access;
use super::document::Section;
use super::secret_ref::SecretRef;
use crate::replication::ConnectConfig;
use crate::util::cron::Cron;

const NAME_CHARACTERS_MAX: usize = 48;
const SLOT_CHARACTERS_MAX: usize = 63;
const DEFAULT_APPLICATION_NAME: &str = "pgrecall";
pub(super) const MIB: u64 = 1 << 20;
pub(super) const GIB: u64 = 1 << 30;
const HOUR: Duration = Duration::from_hours(1);
const DAY: Duration = Duration::from_hours(24);
/// Every night at one.
const DEFAULT_SCHEDULE: &str = "0 1 * * *";

/// A name that can stand in an object key and, with `_` for `-`, in the name of a replication slot.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct EnvironmentName(String);

/// Everything that one table `[environment.NAME]` says, with the defaults filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Environment {
    pub name: EnvironmentName,
    /// `None`: this host only lists, verifies and restores the environment.
    pub postgres: Option<Postgres>,
    /// The place that holds the environment's prefix.
    pub location: Location,
    pub s3: S3,
    pub master_key: Option<SecretRef>,
    pub archive: Archive,
    pub restore: Restore,
    pub backups: Backups,
    /// Who may what in this environment, besides what `[access]` says of all.
    pub access: Access,
    /// Backups are read from a standby where one of the hosts is one.
    pub backup_from_standby: bool,
    /// How far back every moment stays restorable.
    pub window: Duration,
    /// For echoing times; targets carry their own zone.
    pub time_zone: Tz,
}

/// How the cluster is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Postgres {
    /// The connection string, read; the password is not in it yet.
    pub connect: ConnectConfig,
    pub password: Option<SecretRef>,
    pub slot: String,
}

/// `s3://bucket/prefix` or `file:///directory`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    S3 { bucket: String, prefix: String },
    File(PathBuf),
}

/// How an S3-compatible store is reached. Without keys here, the usual variables of the process environment and then
/// the instance's own profile are asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3 {
    pub endpoint: Option<String>,
    pub region: Option<String>,
    /// Path style (`https://host/bucket/key`) or virtual-host style (`https://bucket.host/key`).
    pub path_style: bool,
    pub access_key_id: Option<SecretRef>,
    pub secret_access_key: Option<SecretRef>,
    pub session_token: Option<SecretRef>,
    pub allow_http: bool,
    pub ca_file: Option<PathBuf>,
    /// Send a SHA-256 with each PUT for the store to check.
    pub checksum: bool,
    /// Of one attempt, without the time for its bytes.
    pub request_timeout: Duration,
    pub attempts_max: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// How long committed WAL may lie outside the store; zero puts whatever has arrived at once.
    pub rpo: Duration,
    pub puts_in_flight: u32,
    pub compression_level: i32,
    pub buffer_bytes_max: u64,
}

/// When backups begin by themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backups {
    pub schedule: Cron,
    /// What the environments are spread over, each by its name.
    pub spread: Duration,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Restore {
    /// Where to look for PostgreSQL's programs before the usual places.
    pub postgres_bin_dirs: Vec<PathBuf>,
}

impl Default for Archive {
    fn default() -> Self {
        Archive { rpo: Duration::from_secs(1), puts_in_flight: 4, compression_level: 3, buffer_bytes_max: 128 * MIB }
    }
}

impl Default for Backups {
    fn default() -> Self {
        let schedule = Cron::parse(DEFAULT_SCHEDULE).expect("the default is a schedule: a test parses it");
        Backups { schedule, spread: Duration::from_hours(1) }
    }
}

impl Default for S3 {
    fn default() -> Self {
        S3 {
            endpoint: None,
            region: None,
            path_style: false,
            access_key_id: None,
            secret_access_key: None,
            session_token: None,
            allow_http: false,
            ca_file: None,
            checksum: false,
            request_timeout: Duration::from_secs(10),
            attempts_max: 5,
        }
    }
}

impl Environment {
    /// Reads a table. What is missing or wrong is reported; the value is then never seen by anybody.
    pub(super) fn read(name: EnvironmentName, section: Section<'_>) -> Environment {
        let postgres = read_postgres(&name, &section);
        let location = section.parsed("repository", str::parse);
        if location.is_none() && section.text("repository").is_none() {
            section.report("repository is missing: write for example repository = \"s3://bucket/prefix\"");
        }
        let s3_section = section.table("s3");
        if s3_section.is_written() && matches!(location, Some(Location::File(_))) && s3_section.path() != "defaults.s3"
        {
            s3_section.report("is of no use: the repository is a directory");
        }
        let environment = Environment {
            name,
            postgres,
            location: location.unwrap_or_else(|| Location::File(PathBuf::new())),
            s3: read_s3(s3_section),
            master_key: read_encryption(section.table("encryption")),
            archive: read_archive(&section),
            restore: read_restore(section.table("restore")),
            backups: read_backups(&section),
            access: Access::read(section.table("access")),
            backup_from_standby: section.boolean("backup_from_standby").unwrap_or(false),
            window: section.duration("window", 14 * DAY, Duration::from_hours(1)..=3650 * DAY),
            time_zone: section.parsed("time_zone", parse_zone).unwrap_or(Tz::UTC),
        };
        section.finish();
        environment
    }

    pub(super) fn shares_slot_with(&self, other: &Environment) -> bool {
        match (&self.postgres, &other.postgres) {
            (Some(a), Some(b)) => a.slot == b.slot && a.connect.hosts.iter().any(|host| b.connect.hosts.contains(host)),
            _ => false,
        }
    }
}

fn read_postgres(name: &EnvironmentName, section: &Section<'_>) -> Option<Postgres> {
    let password = secret(section, ["password_file", "password_env"]);
    let slot = section.own_text("slot");
    let slot = slot.and_then(|slot| match check_slot_name(&slot.value) {
        Ok(()) => Some(slot.value),
        Err(message) => {
            section.report_at(&slot, message);
            None
        }
    });
    let application_name = section.parsed("application_name", |text| match text.len() {
        1..=SLOT_CHARACTERS_MAX if text.bytes().all(|b| b.is_ascii_graphic()) => Ok(text.to_owned()),
        _ => Err(format!("{text:?} is not 1 to {SLOT_CHARACTERS_MAX} printable ASCII characters without spaces")),
    });
    let text = section.own_text("postgres")?;
    let mut connect = match text.value.parse::<ConnectConfig>() {
        Ok(connect) => connect,
        Err(error) => {
            error.problems.iter().for_each(|problem| section.report_at(&text, problem.as_str()));
            return None;
        }
    };
    if connect.password.is_some() {
        section.report_at(&text, "a password does not stand in the configuration: use password_file or password_env");
    }
    let fallback = || Some(DEFAULT_APPLICATION_NAME.to_owned());
    connect.application_name = application_name.or(connect.application_name).or_else(fallback);
    Some(Postgres { connect, password, slot: slot.unwrap_or_else(|| name.default_slot()) })
}

fn read_archive(section: &Section<'_>) -> Archive {
    let default = Archive::default();
    let level = section.integer("compression_level", default.compression_level.unsigned_abs(), 1..=19);
    Archive {
        rpo: section.duration("rpo", default.rpo, Duration::ZERO..=Duration::from_hours(1)),
        puts_in_flight: section.integer("puts_in_flight", default.puts_in_flight, 1..=64),
        compression_level: i32::try_from(level).unwrap_or(default.compression_level),
        buffer_bytes_max: section.bytes("buffer_bytes_max", default.buffer_bytes_max, 32 * MIB..=16 * GIB),
    }
}

fn read_backups(section: &Section<'_>) -> Backups {
    let default = Backups::default();
    Backups {
        schedule: section.parsed("backup_schedule", Cron::parse).unwrap_or(default.schedule),
        spread: section.duration("backup_spread", default.spread, Duration::ZERO..=12 * HOUR),
    }
}

fn read_restore(section: Section<'_>) -> Restore {
    let dirs = section.text_list("postgres_bin_dirs").map(|dirs| {
        let absolute = |dir: &super::document::Located<String>| match absolute_path(&dir.value) {
            Ok(path) => Some(path),
            Err(message) => {
                section.report_at(dir, message);
                None
            }
        };
        dirs.iter().filter_map(absolute).collect()
    });
    section.finish();
    Restore { postgres_bin_dirs: dirs.unwrap_or_default() }
}

fn read_encryption(section: Section<'_>) -> Option<SecretRef> {
    let key = secret(&section, ["master_key_file", "master_key_env"]);
    if section.is_written() && key.is_none() {
        section.report("needs master_key_file or master_key_env");
    }
    section.finish();
    key
}

fn read_s3(section: Section<'_>) -> S3 {
    let default = S3::default();
    let seconds = |s: RangeInclusive<u64>| Duration::from_secs(*s.start())..=Duration::from_secs(*s.end());
    let allow_http = section.boolean("allow_http").unwrap_or(default.allow_http);
    let endpoint = section.parsed("endpoint", |text| check_endpoint(text, allow_http));
    let settings = S3 {
        path_style: section.boolean("path_style").unwrap_or(endpoint.is_some()),
        endpoint,
        region: section.text("region").map(|text| text.value),
        access_key_id: secret(&section, ["access_key_id_file", "access_key_id_env"]),
        secret_access_key: secret(&section, ["secret_access_key_file", "secret_access_key_env"]),
        session_token: secret(&section, ["session_token_file", "session_token_env"]),
        allow_http,
        ca_file: section.parsed("ca_file", absolute_path),
        checksum: section.boolean("checksum").unwrap_or(default.checksum),
        request_timeout: section.duration("request_timeout", default.request_timeout, seconds(1..=600)),
        attempts_max: section.integer("attempts_max", default.attempts_max, 1..=20),
    };
    if settings.access_key_id.is_some() != settings.secret_access_key.is_some() {
        section.report("an access key needs both its id and its secret: access_key_id_… and secret_access_key_…");
    }
    section.finish();
    settings
}

/// Reads `…_file` or `…_env`.
fn secret(section: &Section<'_>, keys: [&'static str; 2]) -> Option<SecretRef> {
    let (key, text) = section.one_of(&keys)?;
    let read = match key.ends_with("_file") {
        true => absolute_path(&text.value).map(SecretRef::File),
        false if text.value.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') => {
            Ok(SecretRef::Variable(text.value.clone()))
        }
        // The value is not repeated: somebody may have written the secret itself.
        false => Err("is not the name of an environment variable (letters, digits, _)".to_owned()),
    };
    read.map_err(|message| section.report_at(&text, message)).ok()
}

/// An absolute path: the daemon and the commands are started in different directories.
pub(super) fn absolute_path(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err(format!("{text:?} is not an absolute path")) }
}

fn parse_zone(text: &str) -> Result<Tz, String> {
    text.parse().map_err(|_| format!("{text:?} is not a time zone (write for example \"UTC\" or \"Europe/Berlin\")"))
}

fn check_endpoint(text: &str, allow_http: bool) -> Result<String, String> {
    match text.split_once("://") {
        Some(("https", host)) if !host.is_empty() => Ok(text.to_owned()),
        Some(("http", host)) if !host.is_empty() && allow_http => Ok(text.to_owned()),
        Some(("http", _)) => {
            Err("plain http sends everything readably: use https, or set allow_http = true".to_owned())
        }
        _ => Err(format!("{text:?} is not an address such as \"https://s3.example.com\"")),
    }
}

fn check_slot_name(text: &str) -> Result<(), String> {
    let fits = text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_'));
    if fits && (1..=SLOT_CHARACTERS_MAX).contains(&text.len()) {
        return Ok(());
    }
    let form = "lower-case letters, digits and _";
    Err(format!("{text:?} is not the name of a replication slot ({form}, at most {SLOT_CHARACTERS_MAX} characters)"))
}

impl EnvironmentName {
    /// Checks a name: lower-case letters, digits and single hyphens between them, at most 48 characters.
    ///
    /// # Errors
    /// A sentence that names the rule.
    pub fn new(text: &str) -> Result<EnvironmentName, String> {
        let letters = text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        let ends = !text.starts_with('-') && !text.ends_with('-') && !text.contains("--");
        if letters && ends && (1..=NAME_CHARACTERS_MAX).contains(&text.len()) {
            return Ok(EnvironmentName(text.to_owned()));
        }
        let form = "lower-case letters, digits and single hyphens between them";
        Err(format!("{text:?} cannot name an environment ({form}, at most {NAME_CHARACTERS_MAX} characters)"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The replication slot when none is configured. No two names give the same slot.
    pub fn default_slot(&self) -> String {
        format!("pgrecall_{}", self.0.replace('-', "_"))
    }
}

impl fmt::Display for EnvironmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::str::FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(rest) = text.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let prefix = prefix.trim_end_matches('/');
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
            let parts = prefix.is_empty() || prefix.split('/').all(|part| !matches!(part, "" | "." | ".."));
            if (3..=63).contains(&bucket.len())
                && bucket.bytes().all(plain)
                && parts
                && prefix.bytes().all(|b| plain(b) || b == b'/')
            {
                return Ok(Location::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() });
            }
            let form = "s3://BUCKET/PREFIX, with letters, digits, -, _ and . in both";
            return Err(format!("{text:?} is not a bucket and a prefix ({form})"));
        }
        if let Some(path) = text.strip_prefix("file://") {
            let path = PathBuf::from(path);
            let plain = path.components().all(|part| !matches!(part, std::path::Component::ParentDir));
            if path.is_absolute() && plain {
                return Ok(Location::File(path));
            }
            return Err(format!("{text:?} is not an absolute directory such as \"file:///var/lib/pgrecall\""));
        }
        Err(format!("{text:?} is not a repository: write s3://BUCKET/PREFIX or file:///DIRECTORY"))
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::S3 { bucket, prefix } if prefix.is_empty() => write!(f, "s3://{bucket}"),
            Location::S3 { bucket, prefix } => write!(f, "s3://{bucket}/{prefix}"),
            Location::File(path) => write!(f, "file://{}", path.display()),
        }
    }
}
