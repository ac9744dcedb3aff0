//! A server that runs on a data directory, known by its `postmaster.pid`.
//!
//! Source: `src/include/utils/pidfile.h`, 14–18: pid, data directory, start time, port, socket directory, listen address,
//! shared memory key, status.

use std::io;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal};

/// A running postmaster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Postmaster {
    pub pid: i32,
    pub port: u16,
    /// `None` while the server is starting, or when it has no socket.
    pub socket_directory: Option<PathBuf>,
    pub status: Option<Status>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Starting,
    Stopping,
    Ready,
    /// Replaying, read-only sessions welcome.
    Standby,
}

impl Postmaster {
    /// The server that runs on `data_directory`, if one does. A pid file that was left behind by a crash or came with a
    /// copied directory counts only when a process of that number works in that directory.
    pub fn find(data_directory: &Path) -> io::Result<Option<Postmaster>> {
        let text = match std::fs::read_to_string(data_directory.join("postmaster.pid")) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        let Some(mut found) = Postmaster::parse(&text) else { return Ok(None) };
        // The server works in its data directory: a relative path is one from there.
        found.socket_directory = found.socket_directory.map(|directory| data_directory.join(directory));
        let runs = runs_in(found.pid, data_directory);
        Ok(runs.then_some(found))
    }

    fn parse(text: &str) -> Option<Postmaster> {
        let mut lines = text.lines();
        // The pid is negative for a single-user backend.
        let pid = lines.next()?.trim().parse::<i32>().ok()?.checked_abs()?;
        let mut line = |skip: usize| lines.nth(skip).map(str::trim).filter(|text| !text.is_empty());
        let port = line(2).and_then(|text| text.parse().ok()).unwrap_or(0);
        let socket_directory = line(0).map(PathBuf::from);
        let status = line(2).and_then(|text| match text {
            "starting" => Some(Status::Starting),
            "stopping" => Some(Status::Stopping),
            "ready" => Some(Status::Ready),
            "standby" => Some(Status::Standby),
            _ => None,
        });
        Some(Postmaster { pid, port, socket_directory, status })
    }

    pub(super) fn signal(pid: i32, signal: Signal) -> io::Result<()> {
        let pid = Pid::from_raw(pid).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        rustix::process::kill_process(pid, signal).map_err(io::Error::from)
    }
}

/// Whether process `pid` works in `data_directory`, as a postmaster does.
pub(super) fn runs_in(pid: i32, data_directory: &Path) -> bool {
    let place = std::fs::read_link(format!("/proc/{pid}/cwd"));
    match (place, std::fs::canonicalize(data_directory)) {
        (Ok(place), Ok(data_directory)) => place == data_directory,
        _ => false,
    }
}

/// The rest of the title of the first child whose title goes on with `kind` after `postgres: ` and the cluster's name.
pub(super) fn child_title(pid: i32, kind: &str) -> Option<String> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().find_map(|child| {
        let title = std::fs::read(format!("/proc/{child}/cmdline")).ok()?;
        let title = String::from_utf8_lossy(&title);
        let rest = title.strip_prefix("postgres: ")?;
        let (_, activity) = rest.split_once(kind)?;
        Some(activity.trim_matches(['\0', ' ']).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_pid_file() {
        let text = "4711\n/srv/data\n1795467600\n5433\n/run/pg\n\n  123456   65538\nready   \n";
        let expected = Postmaster {
            pid: 4711,
            port: 5433,
            socket_directory: Some(PathBuf::from("/run/pg")),
            status: Some(Status::Ready),
        };
        assert_eq!(Postmaster::parse(text), Some(expected));
        let early = Postmaster::parse("4711\n/srv/data\n1795467600\n5433\n").expect("a pid");
        assert_eq!((early.socket_directory, early.status), (None, None));
        assert_eq!(Postmaster::parse(""), None);
        assert_eq!(Postmaster::parse("-x\n"), None);
    }

    #[test]
    fn a_pid_file_of_another_process_does_not_count() {
        let dir = tempfile::tempdir().expect("temporary directory");
        assert_eq!(Postmaster::find(dir.path()).expect("no file"), None);
        let text = format!("{}\n{}\n1\n5432\n", std::process::id(), dir.path().display());
        crate::util::durable_fs::write(&dir.path().join("postmaster.pid"), text.as_bytes(), 0o600).expect("write");
        assert_eq!(Postmaster::find(dir.path()).expect("readable"), None);
    }
}
