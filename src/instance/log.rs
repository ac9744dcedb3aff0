//! What a server says in its log while it starts and replays.
//!
//! The log is the only place that tells why a start failed and at which record recovery stopped. Messages are English,
//! because the generated configuration sets `lc_messages`.
//!
//! Source: `xlogrecovery.c` (14: `xlog.c`), `startup.c`, `postmaster.c`, `elog.c`, 14–18.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::pg::{Lsn, TimelineId};

/// A line that begins a message or belongs to the one before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    pub severity: Severity,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Log,
    Warning,
    Error,
    Fatal,
    Panic,
    Detail,
    Hint,
    /// Context, statement, notices, and lines without a severity.
    Other,
}

/// The messages that recovery is followed by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    RedoStarted(Lsn),
    RedoAt(Lsn),
    ConsistentAt(Lsn),
    /// The target: the record that starts here was not replayed.
    StoppedBefore(Lsn),
    /// The target: the record that starts here was the last one replayed.
    StoppedAfter(Lsn),
    /// Start of the last record replayed.
    RedoDone(Lsn),
    PausedAtTarget,
    /// A setting is too small for a change that the source made later.
    InsufficientSettings,
    NewTimeline(TimelineId),
    RecoveryComplete,
    ReadyReadOnly,
    Ready,
    ShutDownAtTarget,
    ShutDown,
}

/// Reads a growing log from where it stood.
#[derive(Debug)]
pub struct LogFollower {
    path: PathBuf,
    offset: u64,
    partial: Vec<u8>,
}

/// At most so much is read at once, and at most so long is a line.
const READ_BYTES_MAX: u64 = 1 << 20;

impl LogFollower {
    /// Follows what is appended from now on.
    pub fn from_end(path: &Path) -> io::Result<LogFollower> {
        let offset = match std::fs::metadata(path) {
            Ok(metadata) => metadata.len(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
            Err(e) => return Err(e),
        };
        Ok(LogFollower { path: path.to_owned(), offset, partial: Vec::new() })
    }

    /// The complete lines since the last call.
    pub fn poll(&mut self) -> io::Result<Vec<LogLine>> {
        let mut file = match File::open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        file.seek(SeekFrom::Start(self.offset))?;
        let mut fresh = Vec::new();
        file.take(READ_BYTES_MAX).read_to_end(&mut fresh)?;
        self.offset = self.offset.saturating_add(fresh.len() as u64);
        self.partial.append(&mut fresh);
        let Some(end) = self.partial.iter().rposition(|byte| *byte == b'\n') else {
            if self.partial.len() as u64 > READ_BYTES_MAX {
                self.partial.clear();
            }
            return Ok(Vec::new());
        };
        let rest = self.partial.split_off(end + 1);
        let complete = std::mem::replace(&mut self.partial, rest);
        Ok(String::from_utf8_lossy(&complete).lines().map(LogLine::parse).collect())
    }
}

impl LogLine {
    fn parse(line: &str) -> LogLine {
        const MARKS: [(&str, Severity); 12] = [
            ("LOG:  ", Severity::Log),
            ("FATAL:  ", Severity::Fatal),
            ("PANIC:  ", Severity::Panic),
            ("WARNING:  ", Severity::Warning),
            ("ERROR:  ", Severity::Error),
            ("DETAIL:  ", Severity::Detail),
            ("HINT:  ", Severity::Hint),
            ("CONTEXT:  ", Severity::Other),
            ("STATEMENT:  ", Severity::Other),
            ("NOTICE:  ", Severity::Other),
            ("INFO:  ", Severity::Other),
            ("LOCATION:  ", Severity::Other),
        ];
        let first = MARKS.iter().filter_map(|(mark, severity)| Some((line.find(mark)?, mark, severity)));
        match first.min_by_key(|(at, ..)| *at) {
            Some((at, mark, severity)) => {
                let message = line.get(at + mark.len()..).unwrap_or_default().trim().to_owned();
                LogLine { severity: *severity, message }
            }
            None => LogLine { severity: Severity::Other, message: line.trim().to_owned() },
        }
    }

    /// What the line says about recovery, if anything.
    pub fn event(&self) -> Option<Event> {
        let text = self.message.as_str();
        let lsn_after = |mark: &str| text.strip_prefix(mark).and_then(leading_lsn);
        if let Some(lsn) = lsn_after("redo starts at ") {
            return Some(Event::RedoStarted(lsn));
        }
        if let Some(lsn) = text.starts_with("redo in progress").then(|| text.rsplit(' ').next()).flatten() {
            return leading_lsn(lsn).map(Event::RedoAt);
        }
        if let Some(lsn) = lsn_after("consistent recovery state reached at ") {
            return Some(Event::ConsistentAt(lsn));
        }
        if let Some(lsn) = lsn_after("recovery stopping before WAL location (LSN) \"") {
            return Some(Event::StoppedBefore(lsn));
        }
        if let Some(lsn) = lsn_after("recovery stopping after WAL location (LSN) \"") {
            return Some(Event::StoppedAfter(lsn));
        }
        if let Some(lsn) = lsn_after("redo done at ") {
            return Some(Event::RedoDone(lsn));
        }
        if let Some(id) = text.strip_prefix("selected new timeline ID: ") {
            return id.trim().parse().ok().map(|id| Event::NewTimeline(TimelineId(id)));
        }
        match text {
            "pausing at the end of recovery" => Some(Event::PausedAtTarget),
            "hot standby is not possible because of insufficient parameter settings"
            | "recovery aborted because of insufficient parameter settings" => Some(Event::InsufficientSettings),
            "archive recovery complete" => Some(Event::RecoveryComplete),
            "database system is ready to accept read-only connections"
            | "database system is ready to accept read only connections" => Some(Event::ReadyReadOnly),
            "database system is ready to accept connections" => Some(Event::Ready),
            "shutdown at recovery target" => Some(Event::ShutDownAtTarget),
            "database system is shut down" => Some(Event::ShutDown),
            _ => None,
        }
    }

    /// Whether this ends the server, and is not merely the answer to a client that came too early or asked for what is not
    /// there.
    pub fn is_failure(&self) -> bool {
        let answer = ["the database system is", "role \"", "database \"", "terminating ", "sorry, too many clients"];
        match self.severity {
            Severity::Panic => true,
            Severity::Fatal => !answer.iter().any(|start| self.message.starts_with(start)),
            _ => false,
        }
    }
}

fn leading_lsn(text: &str) -> Option<Lsn> {
    let end = text.find(|c: char| !(c.is_ascii_hexdigit() || c == '/')).unwrap_or(text.len());
    text.get(..end)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, expected: Option<Event>) {
        assert_eq!(LogLine::parse(line).event(), expected, "{line}");
    }

    #[test]
    fn messages_of_recovery() {
        check(
            "2026-11-23 21:00:00.123 UTC [77] LOG:  redo starts at 0/2000028",
            Some(Event::RedoStarted(Lsn(0x200_0028))),
        );
        check(
            "x [1] LOG:  redo in progress, elapsed time: 1.00 s, current LSN: 0/5000060",
            Some(Event::RedoAt(Lsn(0x500_0060))),
        );
        check(
            "x [1] LOG:  recovery stopping before WAL location (LSN) \"A/3000110\"",
            Some(Event::StoppedBefore(Lsn(0xA_0300_0110))),
        );
        check(
            "x [1] LOG:  redo done at 0/30000D8 system usage: CPU: user: 0.00 s",
            Some(Event::RedoDone(Lsn(0x300_00D8))),
        );
        check("x [1] LOG:  selected new timeline ID: 4", Some(Event::NewTimeline(TimelineId(4))));
        check("x [1] LOG:  database system is ready to accept connections", Some(Event::Ready));
        check("x [1] LOG:  something about FATAL:  errors", None);
    }

    #[test]
    fn a_client_that_came_too_early_is_no_failure() {
        let is_failure = |line| LogLine::parse(line).is_failure();
        assert!(!is_failure("x [1] FATAL:  the database system is starting up"));
        assert!(is_failure("x [1] FATAL:  recovery ended before configured recovery target was reached"));
        assert!(is_failure("x [1] PANIC:  could not locate a valid checkpoint record"));
        assert!(!is_failure("x [1] LOG:  database system is shut down"));
    }

    #[test]
    fn only_complete_lines_after_the_start_are_returned() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("log");
        crate::util::durable_fs::write(&path, b"a [1] LOG:  old\n", 0o600).expect("write");
        let mut follower = LogFollower::from_end(&path).expect("open");
        let append = |text: &str| {
            let mut file = std::fs::OpenOptions::new().append(true).open(&path).expect("open");
            io::Write::write_all(&mut file, text.as_bytes()).expect("append");
        };
        append("a [1] LOG:  one\nb [1] WARN");
        let read: Vec<String> = follower.poll().expect("read").into_iter().map(|line| line.message).collect();
        assert_eq!(read, ["one"]);
        append("ING:  two\n");
        let read = follower.poll().expect("read");
        assert_eq!(read, [LogLine { severity: Severity::Warning, message: "two".to_owned() }]);
    }
}
