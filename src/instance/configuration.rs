//! Configuration that we write ourselves.
//!
//! A restored directory carries its source's settings: its archive command, its preloaded libraries, its memory, absolute
//! paths, subscriptions. None of them may act in a copy, so what we start gets a configuration made of an allow-list: what
//! replay needs (from `pg_control` and from later changes), and what keeps the copy to itself.
//!
//! Source: `guc-file.l` (quoting), `CheckRequiredParameterValues`, `StartupReplicationOrigin` (panics when the source had
//! more origins than slots here), `xlogrecovery.c` (`assign_recovery_target*`), 14–18.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::pg::control_file::{RecoveryParameters, WalLevel};
use crate::pg::{Lsn, Major, TimelineId};

/// Settings in the order in which they are written; a later one of the same name replaces the earlier.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings(Vec<(String, String)>);

/// Where recovery stops: before or after the first record that starts at or after `lsn` on `timeline`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub timeline: TimelineId,
    pub lsn: Lsn,
    /// The record at `lsn` is replayed, too.
    pub inclusive: bool,
}

/// `recovery_target_action`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TargetAction {
    Promote,
    Pause,
    Shutdown,
}

/// What an isolated server is given.
#[derive(Debug, Clone)]
pub struct Isolation<'a> {
    pub major: Major,
    /// At least those of `pg_control` and of every later change in the WAL to be replayed.
    pub parameters: &'a RecoveryParameters,
    pub socket_directory: &'a Path,
    /// Only names the socket file: nothing listens on a network.
    pub port: u16,
    /// Libraries without which replay or the data's index methods do not work.
    pub preload_libraries: &'a [String],
    pub jit: bool,
    pub shared_buffers_bytes: u64,
}

impl Settings {
    pub fn new() -> Self {
        Settings::default()
    }

    pub fn set(&mut self, name: &str, value: impl Into<String>) -> &mut Self {
        self.0.retain(|(old, _)| old != name);
        self.0.push((name.to_owned(), value.into()));
        self
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(old, _)| old == name).map(|(_, value)| value.as_str())
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// These settings and then the others, which win.
    #[must_use]
    pub fn and(mut self, others: &Settings) -> Settings {
        for (name, value) in others.iter() {
            self.set(name, value);
        }
        self
    }
}

impl fmt::Display for Settings {
    /// Lines of a configuration file.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.iter().try_for_each(|(name, value)| writeln!(f, "{name} = {}", quote(value)))
    }
}

impl TargetAction {
    pub fn name(self) -> &'static str {
        match self {
            TargetAction::Promote => "promote",
            TargetAction::Pause => "pause",
            TargetAction::Shutdown => "shutdown",
        }
    }
}

/// A server that keeps to itself and can replay what its source wrote.
pub fn isolated(isolation: &Isolation<'_>) -> Settings {
    let mut settings = replay_parameters(isolation.parameters);
    settings
        .set("listen_addresses", "")
        .set("unix_socket_directories", list_item(&isolation.socket_directory.to_string_lossy()))
        .set("unix_socket_permissions", "0700")
        .set("port", isolation.port.to_string())
        .set("ssl", "off")
        .set("archive_mode", "off")
        .set("archive_command", "")
        .set("primary_conninfo", "")
        .set("primary_slot_name", "")
        .set("synchronous_standby_names", "")
        .set("max_logical_replication_workers", "0")
        .set("hot_standby", "on")
        .set("max_standby_archive_delay", "-1")
        .set("shared_preload_libraries", isolation.preload_libraries.join(","))
        .set("session_preload_libraries", "")
        .set("local_preload_libraries", "")
        .set("shared_buffers", format!("{}kB", isolation.shared_buffers_bytes.div_ceil(1024)))
        .set("huge_pages", "off")
        .set("jit", if isolation.jit { "on" } else { "off" })
        .set("recovery_init_sync_method", "syncfs")
        .set("max_wal_size", "4GB")
        .set("logging_collector", "off")
        .set("log_destination", "stderr")
        .set("log_line_prefix", "%m [%p] ")
        .set("lc_messages", "C");
    if isolation.major >= Major(15) {
        settings.set("log_startup_progress_interval", "1s");
    }
    if isolation.major >= Major(18) {
        settings.set("max_active_replication_origins", ORIGINS);
    }
    settings
}

/// The source may have used more than the default of 10; their state is in the backup and must fit.
const ORIGINS: &str = "200";

/// The settings that must be at least as large as at the source.
pub fn replay_parameters(parameters: &RecoveryParameters) -> Settings {
    let mut settings = Settings::new();
    let on = |flag: bool| if flag { "on" } else { "off" };
    settings
        .set("wal_level", parameters.wal_level.max(WalLevel::Replica).name())
        .set("wal_log_hints", on(parameters.wal_log_hints))
        .set("max_connections", parameters.max_connections.to_string())
        .set("max_worker_processes", parameters.max_worker_processes.to_string())
        .set("max_wal_senders", parameters.max_wal_senders.to_string())
        .set("max_prepared_transactions", parameters.max_prepared_transactions.to_string())
        .set("max_locks_per_transaction", parameters.max_locks_per_transaction.to_string())
        .set("track_commit_timestamp", on(parameters.track_commit_timestamp))
        .set("max_replication_slots", ORIGINS);
    settings
}

/// Recovery up to the target. Every other kind of target is emptied *before* the LSN is set: emptying one afterwards would
/// forget that there is a target.
pub fn recovery(target: &Target, action: TargetAction, restore_command: &str) -> Settings {
    let mut settings = Settings::new();
    for other in ["", "_name", "_time", "_xid"] {
        settings.set(&format!("recovery_target{other}"), "");
    }
    settings
        .set("restore_command", restore_command)
        .set("archive_cleanup_command", "")
        .set("recovery_end_command", "")
        .set("recovery_min_apply_delay", "0")
        .set("primary_conninfo", "")
        .set("primary_slot_name", "")
        .set("recovery_target_lsn", target.lsn.to_string())
        .set("recovery_target_inclusive", if target.inclusive { "on" } else { "off" })
        .set("recovery_target_timeline", target.timeline.to_string())
        .set("recovery_target_action", action.name());
    settings
}

/// A value of a configuration file: backslashes and quotes doubled, line ends as escapes.
pub fn quote(value: &str) -> String {
    let mut out = String::with_capacity(value.len() + 2);
    out.push('\'');
    for c in value.chars() {
        match c {
            '\'' => out.push_str("''"),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            c => out.push(c),
        }
    }
    out.push('\'');
    out
}

/// One directory of a setting that takes several, parted by commas.
fn list_item(path: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    if path.chars().all(plain) { path.to_owned() } else { format!("\"{}\"", path.replace('"', "\"\"")) }
}

/// `restore_command` that runs these words; the server replaces `%f` and `%p`, which are given as words of their own.
/// `None` when a word is no UTF-8 or holds a line end: a configuration file cannot carry it.
pub fn restore_command<S: AsRef<OsStr>>(words: &[S]) -> Option<String> {
    let mut line = String::new();
    for word in words {
        let text = std::str::from_utf8(word.as_ref().as_bytes()).ok().filter(|text| !text.contains(['\n', '\r']))?;
        if !line.is_empty() {
            line.push(' ');
        }
        match text {
            "%f" | "%p" => line.push_str(&format!("\"{text}\"")),
            _ => line.push_str(&shell_word(text).replace('%', "%%")),
        }
    }
    Some(line)
}

/// One word for `sh`.
fn shell_word(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-=:,+@".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// Who may connect: everybody who can reach the socket, which lies in a directory of mode 0700.
pub const HBA: &str = "# Only the owner of the socket's directory gets here.\n\
    local all all trust\nlocal replication all trust\n";

#[cfg(test)]
mod tests;
