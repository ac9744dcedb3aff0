//! The password file: `host:port:database:user:password`, `*` for any, `\` before `:` and `\`.
//!
//! Source: `src/interfaces/libpq/fe-connect.c` (`passwordFromFile`), 14–18. The database of a physical replication
//! connection is called `replication` there.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::util::secret::Secret;

use super::conninfo::{Host, HostAddress};

const DEFAULT_SOCKET_DIRECTORIES: [&str; 3] = ["/run/postgresql", "/var/run/postgresql", "/tmp"];

pub(super) struct Wanted<'a> {
    pub(super) host: &'a Host,
    pub(super) database: &'a str,
    pub(super) user: &'a str,
}

/// `PGPASSFILE`, or `.pgpass` in the home directory.
pub(super) fn default_path() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("PGPASSFILE").filter(|path| !path.is_empty()) {
        return Some(path.into());
    }
    std::env::home_dir().map(|home| home.join(".pgpass"))
}

/// The password for what is wanted; `None` when there is no file or no line for it.
///
/// # Errors
/// When the file cannot be read, or group or others may read it. libpq ignores such a file with a warning; an
/// authentication error would then hide the cause.
pub(super) fn look_up(path: &Path, wanted: &Wanted<'_>) -> Result<Option<Secret>, String> {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::PermissionDenied) => {
            return Ok(None);
        }
        Err(e) => return Err(format!("read the password file {}: {e}", path.display())),
    };
    if !meta.is_file() {
        return Ok(None);
    }
    if meta.permissions().mode() & 0o077 != 0 {
        return Err(format!("the password file {} may be read by others (chmod 0600 it)", path.display()));
    }
    let text = fs::read_to_string(path).map_err(|e| format!("read the password file {}: {e}", path.display()))?;
    let text = Secret::new(text);
    Ok(text.expose().lines().find_map(|line| match_line(line, wanted)).map(Secret::new))
}

fn match_line(line: &str, wanted: &Wanted<'_>) -> Option<String> {
    let line = line.trim_end_matches('\r');
    if line.starts_with('#') {
        return None;
    }
    let (host, rest) = field(line)?;
    let (port, rest) = field(rest)?;
    let (database, rest) = field(rest)?;
    let (user, rest) = field(rest)?;
    let (password, _) = field(rest).unwrap_or_else(|| unescape(rest));
    let is = |pattern: &str, value: &str| pattern == "*" || pattern == value;
    let host_is = match &wanted.host.address {
        HostAddress::Tcp(name) => is(&host, name),
        HostAddress::Socket(directory) => {
            let text = directory.to_string_lossy();
            is(&host, &text) || (host == "localhost" && DEFAULT_SOCKET_DIRECTORIES.contains(&text.as_ref()))
        }
    };
    let same =
        host_is && is(&port, &wanted.host.port.to_string()) && is(&database, wanted.database) && is(&user, wanted.user);
    (same && !password.is_empty()).then_some(password)
}

/// The text up to the next plain `:`, and what follows it.
fn field(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            ':' => return Some((value, chars.as_str())),
            '\\' => value.extend(chars.next()),
            c => value.push(c),
        }
    }
    None
}

fn unescape(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        value.extend(if c == '\\' { chars.next() } else { Some(c) });
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: Option<&str>) {
        let host = Host { address: HostAddress::Tcp("db".to_owned()), port: 5432 };
        let wanted = Wanted { host: &host, database: "replication", user: "a:b" };
        assert_eq!(match_line(line, &wanted).as_deref(), expected, "{line}");
    }

    #[test]
    fn lines_match_as_libpq_s() {
        check(r"db:5432:replication:a\:b:se\:c\\ret", Some(r"se:c\ret"));
        check("*:*:*:*:x", Some("x"));
        check("db:5432:postgres:*:x", None);
        check("db:5433:*:*:x", None);
        check("# *:*:*:*:x", None);
        check("*:*:*:*:", None);
        check("nonsense", None);
    }

    #[test]
    fn a_file_that_others_may_read_is_refused_by_name() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("pass");
        crate::util::durable_fs::write(&path, b"*:*:*:*:x\n", 0o600).expect("write");
        let host = Host { address: HostAddress::Socket("/tmp".into()), port: 1 };
        let wanted = Wanted { host: &host, database: "d", user: "u" };
        assert_eq!(look_up(&path, &wanted).expect("private").expect("a line").expose(), "x");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("chmod");
        assert!(look_up(&path, &wanted).expect_err("readable by the group").contains("chmod"));
        assert_eq!(look_up(&dir.path().join("none"), &wanted), Ok(None));
    }
}
