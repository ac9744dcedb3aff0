//! A restore from its plan to a cluster that was looked at.
//!
//! Order: the programs of the right major are found; files and WAL are fetched, and the directory is made to recover to the
//! exact stop before a server could start on it ([`crate::restore::run`]); PostgreSQL is started isolated and followed there;
//! the reached position is checked; then the directory belongs to whoever asked. Nothing here needs a daemon or the source.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use serde::Serialize;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::error::{Code, Failure};
use crate::instance::host;
use crate::instance::locate::locate;
use crate::instance::{Installation, LocateError, Target};
use crate::pg::{Lsn, TimelineId};
use crate::repository::Repository;
use crate::restore::acceptance::{self, Accepted, Amcheck, Full};
use crate::restore::drive::{Drive, DriveError, Driven, drive};
use crate::restore::fetch::Progress;
use crate::restore::follow;
use crate::restore::recovery::{Configuration, Finish, Prepared, Recovery, WalSource, forget_recovery};
use crate::restore::run::{Restored, run};
use crate::restore::spool::Prefetcher;
use crate::restore::target::{TablespacePlaces, hand_over, remove_folder};
use crate::restore::wal::{SegmentFetcher, preload_end};
use crate::restore::{Plan, RestoreError, RestoreOptions};
use crate::retention::read_pin::{Read, ReadPin};
use crate::util::clock;

/// So long replay may stand still before the restore is given up.
const STALL_LIMIT: Duration = Duration::from_secs(300);

/// How much is looked at before a restored cluster is handed over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    None,
    /// The reached position, and a session in every database.
    Quick,
    /// Also every page's checksum, and `pg_amcheck`.
    Full,
}

/// What is wanted of a restore.
#[derive(Debug, Clone)]
pub struct RestoreRequest {
    pub into: PathBuf,
    pub finish: Finish,
    pub check: Check,
    /// Keep the source's configuration files in force instead of the generated one.
    pub with_config: bool,
    /// Leave a directory that recovers by itself when somebody starts it.
    pub no_start: bool,
    pub tablespaces: TablespacePlaces,
    /// The words of the command that serves WAL which does not fit into `pg_wal`; `%f` and `%p` are words of their own.
    pub wal_get: Vec<String>,
    /// Where PostgreSQL's programs are looked for first.
    pub postgres_bin_dirs: Vec<PathBuf>,
    /// A superuser of the restored cluster.
    pub user: String,
    /// Where the server's socket goes, instead of a directory in the data directory.
    pub socket_directory: Option<PathBuf>,
}

/// Who hears of the progress of a restore.
pub trait Observer: Send {
    /// Files and WAL are being fetched; the counters go on.
    fn fetching(&mut self, _plan: &Plan, _progress: Arc<Progress>) {}
    fn replaying(&mut self, _plan: &Plan, _progress: &follow::Progress) {}
    /// The cluster runs and passed the quick check: one may connect.
    fn usable(&mut self, _psql: &str) {}
}

/// What came of a restore.
#[derive(Debug, Clone, Serialize)]
pub struct RestoreReport {
    pub environment: String,
    pub directory: PathBuf,
    pub backup: String,
    pub timeline: TimelineId,
    pub target_lsn: Lsn,
    pub inclusive: bool,
    /// Up to which position the copy has the source's WAL.
    pub reached_lsn: Option<Lsn>,
    pub new_timeline: Option<TimelineId>,
    /// How to connect; `None` when nothing runs.
    pub psql: Option<String>,
    pub pid: Option<i32>,
    pub databases: Vec<String>,
    /// How often replay had to begin again with larger settings.
    pub restarts: u32,
    /// Sentences that a person should read.
    pub remarks: Vec<String>,
}

impl RestoreReport {
    /// For people.
    pub fn show(&self) -> String {
        use std::fmt::Write as _;
        let side = if self.inclusive { "after" } else { "before" };
        let mut text = format!(
            "{} is restored into {} from backup {}, {side} {} on timeline {}",
            self.environment,
            self.directory.display(),
            self.backup,
            self.target_lsn,
            self.timeline
        );
        if let Some(reached) = self.reached_lsn {
            let _ = write!(text, "\nreached: {reached}");
        }
        if let Some(timeline) = self.new_timeline {
            let _ = write!(text, "\ntakes writes on the new timeline {timeline}");
        }
        if let (Some(psql), Some(pid)) = (&self.psql, self.pid) {
            let _ = write!(text, "\nserver process {pid}; connect with:\n  {psql}");
        }
        for remark in &self.remarks {
            let _ = write!(text, "\nnote: {remark}");
        }
        let _ = write!(text, "\nfinished {}", clock::now().format("%Y-%m-%d %H:%M:%S UTC"));
        text
    }
}

/// Executes `plan`. A failure leaves a marked directory that the same call may begin anew.
///
/// Cancel safety: fire `cancel`; when this returns, nobody writes into the directory and no server runs there. Do not drop
/// the future: a server may stay, and writers end what they have begun.
pub async fn execute(
    repository: &Repository,
    plan: Plan,
    request: &RestoreRequest,
    observer: &mut dyn Observer,
    cancel: CancellationToken,
) -> Result<RestoreReport, Failure> {
    if !request.no_start {
        refuse_root(is_root())?;
    }
    let installation = if request.no_start { None } else { Some(find_programs(&plan, request)?) };
    let pin = pin_what_is_read(repository, &plan, request).await;
    let restored = execute_pinned(repository, (plan, installation), request, observer, cancel).await;
    match pin {
        Ok(pin) => {
            pin.release().await;
            restored
        }
        Err(remark) => restored.map(|mut report| {
            report.remarks.push(remark);
            report
        }),
    }
}

/// Keeps a prune from what is being read; where nothing may be written, the sentence that says so.
async fn pin_what_is_read(repository: &Repository, plan: &Plan, request: &RestoreRequest) -> Result<ReadPin, String> {
    let incarnation = plan.incarnation().map_err(|error| error.to_string())?;
    let read = Read {
        incarnation,
        backup: plan.backup.id.clone(),
        timeline: plan.stop.timeline,
        end_lsn: plan.stop.end_lsn,
        what: format!("restore into {}", request.into.display()),
    };
    ReadPin::take(repository, read)
        .await
        .map_err(|error| format!("what was read was not pinned: a prune could have removed it after a day ({error})"))
}

async fn execute_pinned(
    repository: &Repository,
    (plan, installation): (Plan, Option<Installation>),
    request: &RestoreRequest,
    observer: &mut dyn Observer,
    cancel: CancellationToken,
) -> Result<RestoreReport, Failure> {
    let recovery = recovery_of(&plan, request);
    let options = RestoreOptions {
        tablespaces: request.tablespaces.clone(),
        no_start: request.no_start,
        recovery: Some(recovery.clone()),
        cancel: cancel.clone(),
    };
    let progress = Arc::new(Progress::default());
    observer.fetching(&plan, progress.clone());
    let restored = run(repository, plan, &request.into, &options, progress).await?;
    let directory = restored.target.root().to_path_buf();
    let not_prepared = || Failure::new(Code::Internal, "the restored directory was not prepared for recovery");
    let mut prepared = restored.prepared.clone().ok_or_else(not_prepared)?;
    match installation {
        None => Ok(report_unstarted(&restored.plan, &directory, &prepared)),
        Some(installation) => {
            let started = Started { repository, restored: &restored, installation: &installation, recovery: &recovery };
            started.run(request, &mut prepared, observer, cancel).await
        }
    }
}

/// Whether this process runs as root, as which PostgreSQL does not start.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The restore_command of the restored server: this very program with this very configuration.
pub fn wal_get_words(config: &Path) -> Result<Vec<String>, Failure> {
    let program = std::env::current_exe();
    let program = program.map_err(|error| Failure::new(Code::Host, format!("find this program: {error}")))?;
    let text = |path: &Path| {
        let wrong = || Failure::new(Code::Host, format!("use {}: its name is not UTF-8", path.display()));
        path.to_str().map(str::to_owned).ok_or_else(wrong)
    };
    let mut words = vec![text(&program)?, "--config".to_owned(), text(config)?];
    words.extend(["wal-get", "%f", "%p"].map(str::to_owned));
    Ok(words)
}

/// PostgreSQL would say no after everything was fetched.
fn refuse_root(is_root: bool) -> Result<(), Failure> {
    if !is_root {
        return Ok(());
    }
    let failure = Failure::new(Code::Host, "start the restored cluster: PostgreSQL does not run as root");
    Err(failure.hint(
        "Run the restore as the user who is to own the cluster (`sudo -u postgres pgrecall restore …`), or leave a \
         directory with `--no-start` and give it to that user.",
    ))
}

fn find_programs(plan: &Plan, request: &RestoreRequest) -> Result<Installation, Failure> {
    locate(plan.backup.major, &request.postgres_bin_dirs).map_err(|error: LocateError| {
        let hint = "Install that major, or name its directory in `restore.postgres_bin_dirs`; \
                    `--no-start` leaves a directory for another host.";
        Failure::new(Code::Host, format!("start the restored cluster: {error}")).hint(hint)
    })
}

fn recovery_of(plan: &Plan, request: &RestoreRequest) -> Recovery {
    let stop = plan.stop;
    let complete = preload_end(plan) >= plan.wal.len();
    Recovery {
        target: Target { timeline: stop.timeline, lsn: stop.lsn, inclusive: stop.inclusive },
        finish: request.finish,
        wal: if complete { WalSource::Preloaded } else { WalSource::Command(request.wal_get.clone()) },
        configuration: if request.with_config { Configuration::Source } else { Configuration::Isolated },
        later_parameters: plan.later_parameters.clone(),
        preload_libraries: plan.preload_libraries.clone(),
        jit: false,
        shared_buffers_bytes: host::cache_bytes(),
        socket_directory: request.socket_directory.clone(),
    }
}

/// A restored directory whose server is to be started.
struct Started<'a> {
    repository: &'a Repository,
    restored: &'a Restored,
    installation: &'a Installation,
    recovery: &'a Recovery,
}

impl Started<'_> {
    async fn run(
        &self,
        request: &RestoreRequest,
        prepared: &mut Prepared,
        observer: &mut dyn Observer,
        cancel: CancellationToken,
    ) -> Result<RestoreReport, Failure> {
        let plan = &self.restored.plan;
        let prefetch_cancel = cancel.child_token();
        let prefetch = self.prefetch(prefetch_cancel.clone())?;
        let how = Drive {
            installation: self.installation,
            recovery: self.recovery,
            log_file: prepared.data_directory.join("pgrecall.log"),
            user: &request.user,
            stall_limit: STALL_LIMIT,
            cancel,
        };
        let driven = drive(prepared, &how, |progress| observer.replaying(plan, progress)).await;
        prefetch_cancel.cancel();
        let _ = prefetch.await;
        let mut driven = driven.map_err(drive_failure)?;
        match self.accept(request, prepared, observer, &driven).await {
            Ok(report) => {
                self.hand_over(prepared)?;
                Ok(report)
            }
            Err(error) => {
                if let Some(server) = &mut driven.server {
                    let _ = server.stop(Duration::from_secs(60)).await;
                }
                Err(error)
            }
        }
    }

    fn prefetch(&self, cancel: CancellationToken) -> Result<tokio::task::JoinHandle<()>, Failure> {
        let plan = &self.restored.plan;
        let incarnation = plan.incarnation().map_err(|e| Failure::new(Code::Internal, e.to_string()))?;
        let fetcher = SegmentFetcher::new(self.repository, incarnation, plan.segment_size);
        let prefetcher = Prefetcher::new(fetcher, plan, &self.restored.target.folder());
        let fetch = async move {
            if let Err(error) = prefetcher.run(cancel).await {
                tracing::warn!(%error, "fetch WAL ahead: failed; it is fetched when asked for");
            }
        };
        Ok(tokio::spawn(fetch.in_current_span()))
    }

    async fn accept(
        &self,
        request: &RestoreRequest,
        prepared: &Prepared,
        observer: &mut dyn Observer,
        driven: &Driven,
    ) -> Result<RestoreReport, Failure> {
        let mut report = report_of(&self.restored.plan, &prepared.data_directory);
        report.new_timeline = driven.new_timeline;
        report.restarts = driven.restarts;
        if driven.server.is_none() {
            if request.check != Check::None {
                let seen =
                    acceptance::quick_shut_down(prepared).map_err(|e| failure("check the restored cluster", &e))?;
                report.reached_lsn = seen.reached_lsn;
            }
            return Ok(report);
        }
        let address = &driven.address;
        let psql =
            format!("psql -h {} -p {} -U {} postgres", address.socket_directory.display(), address.port, address.user);
        report.pid = driven.server.as_ref().map(|server| server.pid());
        report.psql = Some(psql.clone());
        if request.check == Check::None {
            observer.usable(&psql);
            return Ok(report);
        }
        let seen = acceptance::quick(prepared, self.recovery, driven).await;
        note_quick(&mut report, seen.map_err(|e| failure("check the restored cluster", &e))?);
        observer.usable(&psql);
        if request.check == Check::Full {
            let read = Arc::new(AtomicU64::new(0));
            let full = acceptance::full(prepared, self.installation, address, &report.databases, read).await;
            note_full(&mut report, &full.map_err(|e| failure("check the restored cluster fully", &e))?);
        }
        Ok(report)
    }

    /// From here on the directory is whoever's who asked for it. What served its WAL goes, unless it waits at the target.
    fn hand_over(&self, prepared: &Prepared) -> Result<(), Failure> {
        let root = self.restored.target.root();
        if self.recovery.finish == Finish::Promote {
            forget_recovery(prepared, self.recovery).map_err(|e| failure("take the recovery settings out", &e))?;
            return remove_folder(root).map_err(|e| Failure::from(RestoreError::from(e)));
        }
        hand_over(root).map_err(|e| Failure::from(RestoreError::from(e)))
    }
}

fn report_of(plan: &Plan, directory: &Path) -> RestoreReport {
    let mut remarks = plan.notes.clone();
    remarks.extend(plan.lacks.iter().cloned());
    RestoreReport {
        environment: plan.environment.clone(),
        directory: directory.to_path_buf(),
        backup: plan.backup.id.to_string(),
        timeline: plan.stop.timeline,
        target_lsn: plan.stop.lsn,
        inclusive: plan.stop.inclusive,
        reached_lsn: None,
        new_timeline: None,
        psql: None,
        pid: None,
        databases: Vec::new(),
        restarts: 0,
        remarks,
    }
}

fn report_unstarted(plan: &Plan, directory: &Path, prepared: &Prepared) -> RestoreReport {
    let mut report = report_of(plan, directory);
    let start = format!("start it with: pg_ctl start -D {} (PostgreSQL {})", directory.display(), prepared.major);
    report.remarks.push(format!("nothing was started: the directory recovers by itself to the target; {start}"));
    report
}

fn note_quick(report: &mut RestoreReport, seen: Accepted) {
    report.reached_lsn = seen.reached_lsn;
    report.databases = seen.databases;
    report.remarks.extend(seen.invalid_databases.iter().map(|name| {
        format!("database {name} is invalid: a DROP DATABASE had begun at the target; it was so in the source, too")
    }));
    if !seen.locked.is_empty() {
        const NAMED_MAX: usize = 5;
        let named = seen.locked.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
        let more = seen.locked.len().saturating_sub(NAMED_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        report.remarks.push(format!(
            "replay stopped inside a transaction that had locked {named}{more}: whoever reads there waits until the server \
             is promoted (SELECT pg_promote())"
        ));
    }
    report.remarks.extend(seen.closed.iter().map(|name| {
        format!(
            "database {name} takes no session while replay is paused, inside a transaction that had locked one of its \
             catalogues; it was not checked: promote the server to use it"
        )
    }));
    report.remarks.extend(seen.other_collations.iter().map(|name| {
        format!("text in {name} was sorted by another version of its collation library: REINDEX it before use")
    }));
}

fn note_full(report: &mut RestoreReport, full: &Full) {
    if !full.has_checksums {
        report.remarks.push("the cluster has no data checksums: only the form of its pages was checked".to_owned());
    }
    if full.pages.bad_page_count > 0 {
        report.remarks.push(format!("{} pages are damaged", full.pages.bad_page_count));
    }
    let named = full.pages.bad_pages.iter().map(|page| format!("{} block {}: {}", page.file, page.block, page.problem));
    report.remarks.extend(named);
    for (database, result) in &full.amcheck {
        match result {
            Amcheck::Clean => {}
            Amcheck::Corrupt(what) => report.remarks.push(format!("pg_amcheck found damage in {database}: {what}")),
            Amcheck::NotChecked(why) => report.remarks.push(format!("pg_amcheck did not check {database}: {why}")),
        }
    }
}

fn failure(what: &str, error: &anyhow::Error) -> Failure {
    Failure::new(Code::Host, format!("{what}: {error:#}"))
}

fn drive_failure(error: DriveError) -> Failure {
    let code = match &error {
        DriveError::Cancelled => return RestoreError::Cancelled.into(),
        DriveError::WrongStop { .. } => Code::Corrupt,
        _ => Code::Host,
    };
    Failure::new(code, format!("recover to the target: {error:#}"))
        .hint("The server's own log is pgrecall.log in the directory; the same command begins the restore anew.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_told_whom_to_restore_as() {
        assert!(refuse_root(false).is_ok());
        let failure = refuse_root(true).expect_err("PostgreSQL refuses root");
        assert_eq!(failure.code, Code::Host);
        assert!(failure.hint.is_some_and(|hint| hint.contains("sudo -u postgres")));
    }
}
