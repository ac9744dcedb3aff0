//! A server that we started: its process, its log, its end.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::Signal;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::log::{LogFollower, LogLine, Severity};
use super::postmaster::{self, Postmaster};
use super::{Installation, Settings, command};

/// What to start.
#[derive(Debug, Clone)]
pub struct Start<'a> {
    pub installation: &'a Installation,
    pub data_directory: &'a Path,
    /// Appended to; made with mode 0600 when it is not there.
    pub log_file: &'a Path,
    /// Stronger than any configuration file. Visible in the list of processes.
    pub overrides: &'a Settings,
}

/// A started server. Dropping it leaves the process running.
#[derive(Debug)]
pub struct Server {
    pid: i32,
    data_directory: PathBuf,
    log_file: PathBuf,
    child: Child,
    exited: Option<ExitStatus>,
    log: LogFollower,
    /// The failures seen in the log, each with its detail and hint.
    failures: Vec<String>,
    last_was_failure: bool,
}

/// Between two looks at a process or a log.
pub(crate) const POLL: Duration = Duration::from_millis(50);

/// After this the postmaster has killed what did not heed an immediate shutdown.
const IMMEDIATE_LIMIT: Duration = Duration::from_secs(30);

/// More of them say nothing new.
const FAILURES_MAX: usize = 20;

impl Server {
    /// Starts the server in a process group of its own, so that a Ctrl-C at our terminal does not reach it.
    pub fn start(start: &Start<'_>) -> anyhow::Result<Server> {
        let data_directory = start.data_directory;
        if let Some(running) = Postmaster::find(data_directory)? {
            bail!("a server runs on {} already (pid {})", data_directory.display(), running.pid);
        }
        let log = LogFollower::from_end(start.log_file)?;
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(start.log_file)
            .with_context(|| format!("open the server's log {}", start.log_file.display()))?;
        let mut command = Command::from(command::command(start.installation, "postgres"));
        command.arg("-D").arg(data_directory).process_group(0).stdout(file.try_clone()?).stderr(file);
        for (name, value) in start.overrides.iter() {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let program = start.installation.program("postgres");
        let child = command.spawn().with_context(|| format!("start {}", program.display()))?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).context("the server ended at once")?;
        Ok(Server {
            pid,
            data_directory: data_directory.to_owned(),
            log_file: start.log_file.to_owned(),
            child,
            exited: None,
            log,
            failures: Vec::new(),
            last_was_failure: false,
        })
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn log_file(&self) -> &Path {
        &self.log_file
    }

    /// New lines of the log. Failures among them are kept for [`Server::failure`].
    pub fn poll_log(&mut self) -> anyhow::Result<Vec<LogLine>> {
        let lines = self.log.poll().with_context(|| format!("read the server's log {}", self.log_file.display()))?;
        for line in &lines {
            if line.is_failure() {
                self.failures.push(line.message.clone());
                self.failures.truncate(FAILURES_MAX);
                self.last_was_failure = true;
            } else if matches!(line.severity, Severity::Detail | Severity::Hint) && self.last_was_failure {
                if let Some(last) = self.failures.last_mut() {
                    last.push_str("; ");
                    last.push_str(&line.message);
                }
            } else {
                self.last_was_failure = false;
            }
        }
        Ok(lines)
    }

    /// The status with which the server has ended, if it has.
    pub fn exit_status(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        if self.exited.is_none() {
            self.exited = self.child.try_wait().context("ask for the server's exit status")?;
        }
        Ok(self.exited)
    }

    /// Why the server ended or did not start, from its log.
    pub fn failure(&self) -> String {
        match self.failures.is_empty() {
            true => format!("nothing was said about it; the log is {}", self.log_file.display()),
            false => format!("{} (the log is {})", self.failures.join("; then "), self.log_file.display()),
        }
    }

    /// The failures read from the log so far.
    pub fn failures(&self) -> &[String] {
        &self.failures
    }

    /// What the process that replays says it is at, such as `recovering 000000010000000000000007`; it changes as long as
    /// there is progress, also while no session is possible.
    pub fn startup_activity(&self) -> Option<String> {
        postmaster::child_title(self.pid, "startup ")
    }

    /// Stops the server: a fast shutdown, and after `fast_limit` an immediate one (the next start then replays WAL).
    pub async fn stop(&mut self, fast_limit: Duration) -> anyhow::Result<()> {
        for (signal, limit) in [(Signal::INT, fast_limit), (Signal::QUIT, IMMEDIATE_LIMIT)] {
            if self.exit_status()?.is_some() {
                return Ok(());
            }
            Postmaster::signal(self.pid, signal).with_context(|| format!("signal the server (pid {})", self.pid))?;
            let deadline = Instant::now() + limit;
            while Instant::now() < deadline {
                if self.exit_status()?.is_some() {
                    return Ok(());
                }
                tokio::time::sleep(POLL).await;
            }
        }
        bail!("the server (pid {}) on {} does not stop", self.pid, self.data_directory.display())
    }
}

/// Stops a server that another process started, as [`Server::stop`] does.
pub async fn stop_found(found: &Postmaster, data_directory: &Path, fast_limit: Duration) -> anyhow::Result<()> {
    for (signal, limit) in [(Signal::INT, fast_limit), (Signal::QUIT, IMMEDIATE_LIMIT)] {
        if !postmaster::runs_in(found.pid, data_directory) {
            return Ok(());
        }
        Postmaster::signal(found.pid, signal).with_context(|| format!("signal the server (pid {})", found.pid))?;
        let deadline = Instant::now() + limit;
        while Instant::now() < deadline {
            if !postmaster::runs_in(found.pid, data_directory) {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }
    bail!("the server (pid {}) on {} does not stop", found.pid, data_directory.display())
}
