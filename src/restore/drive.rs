//! Starting a prepared directory and following it to its target.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::Context;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::follow::{Progress, Stop};
use super::recovery::{self, Finish, Prepared, Recovery};
use super::roles::known_role;
use crate::instance::{Address, Installation, Server, Session, Start, Target};
use crate::pg::{Lsn, TimelineId};

/// How to drive.
#[derive(Debug, Clone)]
pub struct Drive<'a> {
    pub installation: &'a Installation,
    pub recovery: &'a Recovery,
    /// The server's own log.
    pub log_file: PathBuf,
    /// A superuser of the cluster; when it has no such role, another one is found.
    pub user: &'a str,
    /// So long replay may make no progress at all.
    pub stall_limit: Duration,
    pub cancel: CancellationToken,
}

/// A recovery that came to its target.
#[derive(Debug)]
pub struct Driven {
    /// `None` when the server has shut down, as it was to.
    pub server: Option<Server>,
    pub address: Address,
    pub stop: Stop,
    /// After a promotion.
    pub new_timeline: Option<TimelineId>,
    /// How often settings had to be raised on the way.
    pub restarts: u32,
    pub elapsed: Duration,
}

/// Why the target was not reached. The server is stopped in every case.
#[derive(Debug, thiserror::Error)]
pub enum DriveError {
    #[error("the restore was cancelled")]
    Cancelled,
    #[error("PostgreSQL ended during recovery ({status}): {reason}")]
    Ended { status: ExitStatus, reason: String },
    #[error("recovery made no progress for {} at {}: {reason}", crate::util::units::show_duration(*.limit), at(.replayed))]
    Stalled { limit: Duration, replayed: Option<Lsn>, reason: String },
    /// WAL that is garbage or missing ends recovery early; what it left is not what was asked for.
    #[error("recovery was to stop {} and stopped {}", show_target(.target), show_stop(.stop))]
    WrongStop { target: Target, stop: Option<Stop> },
    #[error("PostgreSQL took a new timeline where it was to pause: sessions were not possible at the target")]
    CannotPause,
    #[error("PostgreSQL's settings stay too small for the WAL: {0}")]
    Settings(String),
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

/// Between two looks at the log; between two questions to the server.
const LOOK: Duration = Duration::from_millis(50);
const ASK: Duration = Duration::from_millis(500);

/// The database that nobody drops.
pub(super) const MAINTENANCE: &str = "template1";

/// Each parameter change in the WAL can ask for one.
const RESTARTS_MAX: u32 = 16;

const STOP_LIMIT: Duration = Duration::from_secs(60);

/// Starts the server and returns when it has finished as asked; `report` hears of progress.
///
/// Cancel safety: when the future is dropped the server goes on recovering; fire the token instead, which stops it.
pub async fn drive(
    prepared: &mut Prepared,
    drive: &Drive<'_>,
    mut report: impl FnMut(&Progress),
) -> Result<Driven, DriveError> {
    let begin = Instant::now();
    let mut progress = Progress::default();
    for restarts in 0..=RESTARTS_MAX {
        let mut attempt = Attempt::start(prepared, drive, progress.restarted())?;
        let result = attempt.follow(&mut report).await;
        let Attempt { mut server, progress: reached, address, .. } = attempt;
        progress = reached;
        match result {
            Ok(End::Reached(stop)) => {
                let running = server.exit_status()?.is_none();
                let address = match running {
                    true => known_role(&address, MAINTENANCE, &prepared.data_directory).await.unwrap_or(address),
                    false => address,
                };
                return Ok(Driven {
                    server: running.then_some(server),
                    address,
                    stop,
                    new_timeline: progress.new_timeline,
                    restarts,
                    elapsed: begin.elapsed(),
                });
            }
            Ok(End::NeedsSettings) => {
                server.stop(STOP_LIMIT).await?;
                if !recovery::raise_parameters(prepared, drive.recovery)? {
                    return Err(DriveError::Settings(server.failure()));
                }
                tracing::info!(parameters = ?prepared.parameters, "raise settings that the source raised");
            }
            Err(error) => {
                server.stop(STOP_LIMIT).await?;
                return Err(error);
            }
        }
    }
    Err(DriveError::Settings(format!("they were raised {RESTARTS_MAX} times")))
}

enum End {
    Reached(Stop),
    NeedsSettings,
}

/// One run of the server.
struct Attempt<'a> {
    drive: &'a Drive<'a>,
    server: Server,
    address: Address,
    progress: Progress,
    data_directory: PathBuf,
    session: Option<Session>,
    last_ask: Option<Instant>,
}

impl<'a> Attempt<'a> {
    fn start(prepared: &Prepared, drive: &'a Drive<'a>, progress: Progress) -> anyhow::Result<Attempt<'a>> {
        let server = Server::start(&Start {
            installation: drive.installation,
            data_directory: &prepared.data_directory,
            log_file: &drive.log_file,
            overrides: &prepared.overrides,
        })?;
        let address = Address {
            socket_directory: prepared.socket_directory.clone(),
            port: prepared.port,
            user: drive.user.to_owned(),
        };
        let data_directory = prepared.data_directory.clone();
        Ok(Attempt { drive, server, address, progress, data_directory, session: None, last_ask: None })
    }

    async fn follow(&mut self, report: &mut impl FnMut(&Progress)) -> Result<End, DriveError> {
        let mut seen = (self.progress.clone(), None);
        let mut moved = Instant::now();
        loop {
            if self.drive.cancel.is_cancelled() {
                return Err(DriveError::Cancelled);
            }
            // The exit first: lines written before it are then read below.
            let exited = self.server.exit_status()?;
            let lines = self.server.poll_log()?;
            lines.iter().for_each(|line| self.progress.note(line));
            if let Some(end) = self.end(exited)? {
                report(&self.progress);
                return Ok(end);
            }
            self.ask().await;
            let now = (self.progress.clone(), self.server.startup_activity());
            if now != seen || !lines.is_empty() {
                report(&self.progress);
                seen = now;
                moved = Instant::now();
            }
            if moved.elapsed() > self.drive.stall_limit {
                let limit = self.drive.stall_limit;
                let reason = self.server.failure();
                return Err(DriveError::Stalled { limit, replayed: self.progress.replayed_lsn, reason });
            }
            tokio::select! {
                biased;
                () = self.drive.cancel.cancelled() => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    /// Whether this run is over, and how.
    fn end(&self, exited: Option<ExitStatus>) -> Result<Option<End>, DriveError> {
        let progress = &self.progress;
        if progress.needs_settings {
            return Ok(Some(End::NeedsSettings));
        }
        let finished = match self.drive.recovery.finish {
            Finish::Promote => progress.is_ready,
            Finish::Pause if progress.is_ready => return Err(DriveError::CannotPause),
            Finish::Pause => progress.is_paused_at_target,
            Finish::Shutdown => progress.shut_down_at_target && exited.is_some(),
        };
        if finished {
            return self.check_stop().map(|stop| Some(End::Reached(stop)));
        }
        match exited {
            Some(status) => Err(DriveError::Ended { status, reason: self.server.failure() }),
            None => Ok(None),
        }
    }

    /// The server says at which record it stopped; that must be the planned one.
    fn check_stop(&self) -> Result<Stop, DriveError> {
        let target = self.drive.recovery.target;
        let stop = self.progress.stop;
        // A target that is no record's start stops at the first record behind it.
        let right = stop.filter(|stop| stop.record_lsn >= target.lsn && stop.is_replayed == target.inclusive);
        right.ok_or(DriveError::WrongStop { target, stop })
    }

    /// Asks the server how far it is. A question that fails is asked again: while it starts, and when it ends, the log
    /// says why.
    async fn ask(&mut self) {
        let due = self.last_ask.is_none_or(|last| last.elapsed() >= ASK);
        if !due || !self.progress.is_readable || self.progress.is_ready {
            return;
        }
        self.last_ask = Some(Instant::now());
        match self.replayed().await {
            Ok(lsn) => lsn.into_iter().for_each(|lsn| self.progress.replayed_to(lsn)),
            Err(error) => {
                tracing::debug!(error = %format_args!("{error:#}"), "replay position not known now");
                self.session = None;
            }
        }
    }

    async fn replayed(&mut self) -> anyhow::Result<Option<Lsn>> {
        if self.session.is_none() {
            let known = known_role(&self.address, MAINTENANCE, &self.data_directory).await;
            self.address = known.context("no role of the cluster gets a session")?;
            self.session = Some(Session::open(&self.address, MAINTENANCE, ASK * 10).await?);
        }
        let session = self.session.as_ref().context("opened above")?;
        let row = session.query_one("SELECT pg_catalog.pg_last_wal_replay_lsn()::text", &[]).await?;
        let text: Option<String> = row.try_get(0)?;
        Ok(text.and_then(|text| text.parse().ok()))
    }
}

fn at(replayed: &Option<Lsn>) -> String {
    replayed.map_or_else(|| "its beginning".to_owned(), |lsn| lsn.to_string())
}

fn show_target(target: &Target) -> String {
    let side = if target.inclusive { "after" } else { "before" };
    format!("{side} the record at {} on timeline {}", target.lsn, target.timeline)
}

fn show_stop(stop: &Option<Stop>) -> String {
    match stop {
        Some(Stop { record_lsn, is_replayed: true }) => format!("after the record at {record_lsn}"),
        Some(Stop { record_lsn, is_replayed: false }) => format!("before the record at {record_lsn}"),
        None => "where its WAL ended".to_owned(),
    }
}
