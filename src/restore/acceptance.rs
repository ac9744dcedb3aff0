//! Is what runs what was asked for?
//!
//! The quick check asks whether recovery stopped where it was planned, on the right timeline of the right cluster, and
//! whether every database takes a session. The full check reads every page and lets `pg_amcheck` read tables and indexes.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use super::checksums::{self, Findings};
use super::drive::{Driven, MAINTENANCE};
use super::recovery::{Finish, Prepared, Recovery, read_control};
use crate::instance::{Address, Installation, Session, command};
use crate::pg::timeline::HistoryFile;
use crate::pg::{Lsn, Major, TimelineId};

/// What the quick check has seen. That it returns says that recovery is right; what a person should know beside is in here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Up to which position the copy has the source's WAL.
    pub reached_lsn: Option<Lsn>,
    pub databases: Vec<String>,
    /// Left behind by a DROP DATABASE that had begun at the target: they are so in the source's past, too.
    pub invalid_databases: Vec<String>,
    /// `database` or `database.collation` whose text was sorted by another version of its library: REINDEX.
    pub other_collations: Vec<String>,
    /// `database.table` that replay holds locked at its pause: whoever reads it waits.
    pub locked: Vec<String>,
    /// Databases that take no session while replay is paused, for it holds one of their catalogues locked.
    pub closed: Vec<String>,
}

/// What the full check has found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Full {
    pub pages: Findings,
    pub has_checksums: bool,
    /// Each database with what `pg_amcheck` said about it.
    pub amcheck: Vec<(String, Amcheck)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Amcheck {
    Clean,
    Corrupt(String),
    NotChecked(String),
}

const STATEMENT_LIMIT: Duration = Duration::from_secs(30);

/// A restored prepared transaction holds its locks until somebody decides about it.
const AMCHECK_LOCK_LIMIT: Duration = Duration::from_secs(2);

/// At a pause nothing is unlocked while one waits, and each locked relation is waited for.
const AMCHECK_PAUSED_LOCK_LIMIT: Duration = Duration::from_millis(100);

/// With more locked relations than this a database is not checked: waiting for them would take minutes.
const AMCHECK_LOCKED_MAX: i64 = 1000;

/// What replay holds locked in the session's own database. At a pause it stays so: the transaction that took the lock
/// ends behind the target.
const LOCKED: &str = "FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_class c ON c.oid = l.relation \
     WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.granted AND pg_catalog.pg_is_in_recovery() \
     AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())";

/// The schema into which `amcheck` is put, and taken away with, where a database does not have it.
const AMCHECK_SCHEMA: &str = "pgrecall_amcheck";

impl Full {
    pub fn is_clean(&self) -> bool {
        self.pages.bad_page_count == 0 && !self.amcheck.iter().any(|(_, result)| matches!(result, Amcheck::Corrupt(_)))
    }
}

/// The quick check of a server that runs.
///
/// # Errors
/// When the server is not the one, or not at the point, that was asked for, or a database takes no session.
pub async fn quick(prepared: &Prepared, recovery: &Recovery, driven: &Driven) -> anyhow::Result<Accepted> {
    let session = Session::open(&driven.address, MAINTENANCE, STATEMENT_LIMIT).await?;
    check_identity(prepared, &session).await?;
    let reached_lsn = match recovery.finish {
        Finish::Promote => check_new_timeline(prepared, recovery, driven)?,
        Finish::Pause | Finish::Shutdown => check_paused(recovery, &session).await?,
    };
    let mut accepted = Accepted { reached_lsn: Some(reached_lsn), ..Accepted::default() };
    let rows = session
        .query("SELECT datname, datconnlimit = -2 FROM pg_catalog.pg_database WHERE datallowconn ORDER BY 1", &[])
        .await?;
    for row in rows {
        let name: String = row.try_get(0)?;
        match row.try_get(1)? {
            true => accepted.invalid_databases.push(name),
            false => accepted.databases.push(name),
        }
    }
    for database in std::mem::take(&mut accepted.databases) {
        match visit(&driven.address, &database, prepared.major).await {
            Ok(visited) => {
                accepted.other_collations.extend(visited.other_collations);
                accepted.locked.extend(visited.locked);
                accepted.databases.push(database);
            }
            Err(error) if catalogue_is_locked(&session, &database).await? => {
                tracing::info!(database, error = %format_args!("{error:#}"), "a catalogue is locked at the pause");
                accepted.closed.push(database);
            }
            Err(error) => return Err(error.context(format!("use database {database}"))),
        }
    }
    Ok(accepted)
}

/// Replay stopped inside a transaction that rewrites a catalogue of the database, such as VACUUM FULL.
async fn catalogue_is_locked(session: &Session, database: &str) -> anyhow::Result<bool> {
    const FIRST_NORMAL_OID: u32 = 16384;
    let query = "SELECT EXISTS (SELECT FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_database d ON d.oid = l.database \
                 WHERE d.datname = $1 AND l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.granted \
                 AND l.relation < $2 AND pg_catalog.pg_is_in_recovery())";
    Ok(session.query_one(query, &[&database, &FIRST_NORMAL_OID]).await?.try_get(0)?)
}

/// The check of a directory whose server was to shut down at the target: nothing can be asked, but `pg_control` tells.
pub fn quick_shut_down(prepared: &Prepared) -> anyhow::Result<Accepted> {
    let control = read_control(&prepared.data_directory)?;
    ensure!(
        control.state == crate::pg::control_file::ClusterState::ShutDownInRecovery,
        "the cluster is {:?} where it was to be shut down in recovery",
        control.state
    );
    Ok(Accepted { reached_lsn: Some(control.min_recovery_lsn), ..Accepted::default() })
}

async fn check_identity(prepared: &Prepared, session: &Session) -> anyhow::Result<()> {
    let row = session.query_one("SELECT system_identifier FROM pg_catalog.pg_control_system()", &[]).await?;
    let found = row.try_get::<_, i64>(0)?.cast_unsigned();
    let expected = prepared.control.system_id.0;
    ensure!(found == expected, "the server has the system identifier {found} instead of {expected}");
    Ok(())
}

/// The new timeline's history says where it left the old one: at the end of the last record replayed.
fn check_new_timeline(prepared: &Prepared, recovery: &Recovery, driven: &Driven) -> anyhow::Result<Lsn> {
    let timeline = driven.new_timeline.context("the server did not say which timeline it took")?;
    let switch_lsn = switch_point(&prepared.data_directory, timeline, recovery.target.timeline)?;
    check_end(recovery, driven.stop.record_lsn, switch_lsn)?;
    Ok(switch_lsn)
}

/// Where `timeline` left `parent`, by its history file in `pg_wal`.
pub fn switch_point(data_directory: &Path, timeline: TimelineId, parent: TimelineId) -> anyhow::Result<Lsn> {
    let path = data_directory.join("pg_wal").join(timeline.history_name());
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let history: HistoryFile = text.parse().with_context(|| format!("parse {}", path.display()))?;
    let last = history.entries.last().context("the history of the new timeline is empty")?;
    ensure!(
        last.timeline == parent,
        "timeline {timeline} continues timeline {} where it was to continue {parent}",
        last.timeline
    );
    Ok(last.switch_lsn)
}

async fn check_paused(recovery: &Recovery, session: &Session) -> anyhow::Result<Lsn> {
    let query = "SELECT pg_catalog.pg_is_in_recovery(), pg_catalog.pg_last_wal_replay_lsn()::text";
    let row = session.query_one(query, &[]).await?;
    let in_recovery: bool = row.try_get(0)?;
    ensure!(in_recovery, "the server is not in recovery any more, where it was to pause");
    let text: Option<String> = row.try_get(1)?;
    let replayed: Lsn = text.context("the server has replayed nothing")?.parse()?;
    check_end(recovery, recovery.target.lsn, replayed)?;
    Ok(replayed)
}

/// The end of what was replayed lies behind a record that was to be replayed, and not behind the start of one that was not.
fn check_end(recovery: &Recovery, record_lsn: Lsn, end_lsn: Lsn) -> anyhow::Result<()> {
    let right = match recovery.target.inclusive {
        true => end_lsn > record_lsn,
        false => end_lsn <= record_lsn,
    };
    if !right {
        let side = if recovery.target.inclusive { "after" } else { "before" };
        bail!("the server has replayed up to {end_lsn}, where it was to stop {side} the record at {record_lsn}");
    }
    Ok(())
}

/// What a session in a database has seen.
struct Visited {
    other_collations: Vec<String>,
    locked: Vec<String>,
}

/// Opens a session in a database, reads its catalogue, and names the collations that are of another version here, and the
/// tables that replay holds locked.
async fn visit(address: &Address, database: &str, major: Major) -> anyhow::Result<Visited> {
    let session = Session::open(address, database, STATEMENT_LIMIT).await?;
    session.query_one("SELECT count(*) FROM pg_catalog.pg_class", &[]).await?;
    let mut query = "SELECT current_database() || '.' || collname FROM pg_catalog.pg_collation \
                     WHERE collversion <> pg_catalog.pg_collation_actual_version(oid)"
        .to_owned();
    if major >= Major(15) {
        query.push_str(
            " UNION ALL SELECT datname::text FROM pg_catalog.pg_database WHERE datname = current_database() \
             AND datcollversion <> pg_catalog.pg_database_collation_actual_version(oid)",
        );
    }
    let names =
        |rows: Vec<tokio_postgres::Row>| rows.iter().map(|row| Ok(row.try_get(0)?)).collect::<anyhow::Result<_>>();
    let other_collations = names(session.query(&query, &[]).await?)?;
    let tables = format!(
        "SELECT current_database() || '.' || c.oid::pg_catalog.regclass {LOCKED} AND c.relkind IN ('r', 'p', 'm') ORDER BY 1"
    );
    let locked = names(session.query(&tables, &[]).await?)?;
    Ok(Visited { other_collations, locked })
}

/// The full check: pages on `workers` threads, and then each database by `pg_amcheck`. `read_bytes` grows on the way.
pub async fn full(
    prepared: &Prepared,
    installation: &Installation,
    address: &Address,
    databases: &[String],
    read_bytes: Arc<AtomicU64>,
) -> anyhow::Result<Full> {
    let (data_directory, control) = (prepared.data_directory.clone(), prepared.control.clone());
    let has_checksums = control.has_data_checksums();
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let read = move || checksums::check_all(&data_directory, &control, workers, &read_bytes);
    let pages = tokio::task::spawn_blocking(read).await.context("read all pages")??;
    let mut amcheck = Vec::new();
    for database in databases {
        let result = check_database(installation, address, database).await;
        amcheck.push((database.clone(), result.with_context(|| format!("check database {database}"))?));
    }
    Ok(Full { pages, has_checksums, amcheck })
}

async fn check_database(installation: &Installation, address: &Address, database: &str) -> anyhow::Result<Amcheck> {
    let session = Session::open(address, database, STATEMENT_LIMIT).await?;
    let query = "SELECT EXISTS (SELECT FROM pg_catalog.pg_extension WHERE extname = 'amcheck'), \
                 EXISTS (SELECT FROM pg_catalog.pg_available_extensions WHERE name = 'amcheck'), \
                 pg_catalog.pg_is_in_recovery()";
    let row = session.query_one(query, &[]).await?;
    let (has, could_have, is_read_only): (bool, bool, bool) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    let is_ours = match (has, could_have, is_read_only) {
        (true, ..) => false,
        (_, false, _) => return Ok(Amcheck::NotChecked("the extension amcheck is not on this host".to_owned())),
        (_, _, true) => {
            let why = "the database has no extension amcheck, and none can be made while the server is read-only";
            return Ok(Amcheck::NotChecked(why.to_owned()));
        }
        _ => true,
    };
    let locked: i64 = session.query_one(&format!("SELECT count(*) {LOCKED}"), &[]).await?.try_get(0)?;
    if locked > AMCHECK_LOCKED_MAX {
        return Ok(Amcheck::NotChecked(format!("replay holds {locked} of its relations locked at the pause")));
    }
    if is_ours {
        let make = format!("CREATE SCHEMA {AMCHECK_SCHEMA}; CREATE EXTENSION amcheck SCHEMA {AMCHECK_SCHEMA}");
        session.batch_execute(&make).await.context("make the extension amcheck")?;
    }
    let lock_limit = if is_read_only { AMCHECK_PAUSED_LOCK_LIMIT } else { AMCHECK_LOCK_LIMIT };
    let result = run_amcheck(installation, address, database, lock_limit).await;
    if is_ours {
        let drop = format!("DROP EXTENSION amcheck; DROP SCHEMA {AMCHECK_SCHEMA}");
        session.batch_execute(&drop).await.context("drop the extension amcheck")?;
    }
    result
}

async fn run_amcheck(
    installation: &Installation,
    address: &Address,
    database: &str,
    lock_limit: Duration,
) -> anyhow::Result<Amcheck> {
    let mut command: Command = command::command(installation, "pg_amcheck");
    command
        .arg("--host")
        .arg(&address.socket_directory)
        .args(["--port", &address.port.to_string(), "--username", &address.user, "--jobs", "2", "--database", database])
        .env("PGOPTIONS", format!("-c lock_timeout={}", lock_limit.as_millis()));
    let output = tokio::process::Command::from(command).kill_on_drop(true).output().await.context("run pg_amcheck")?;
    let all = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    let text = String::from_utf8_lossy(&all);
    Ok(match output.status.code() {
        Some(0) => Amcheck::Clean,
        Some(2) => judge_findings(&text),
        _ => Amcheck::NotChecked(shortened(&text)),
    })
}

/// More of `pg_amcheck`'s output says nothing new.
const TEXT_CHARS_MAX: usize = 20_000;

fn shortened(text: &str) -> String {
    text.trim().chars().take(TEXT_CHARS_MAX).collect()
}

/// `pg_amcheck` reports a lock that it did not get like corruption; a relation that is locked was not checked. Each finding
/// is a line that names the relation, and indented lines that say what is wrong; only an error is called one there.
fn judge_findings(text: &str) -> Amcheck {
    let mut findings: Vec<Vec<&str>> = Vec::new();
    let is_remark = |line: &str| line.trim().is_empty() || line.starts_with("pg_amcheck: warning:");
    for line in text.lines().filter(|line| !is_remark(line)) {
        match findings.last_mut().filter(|_| line.starts_with(char::is_whitespace)) {
            Some(finding) => finding.push(line),
            None => findings.push(vec![line]),
        }
    }
    let is_locked = |finding: &Vec<&str>| {
        let says = finding.get(1).copied().unwrap_or_default();
        says.contains("ERROR:  ") && says.contains("due to lock timeout")
    };
    let (locked, other): (Vec<_>, Vec<_>) = findings.into_iter().partition(is_locked);
    if other.is_empty() && !locked.is_empty() {
        return Amcheck::NotChecked(format!(
            "{} of its relations, which are locked; the others are clean",
            locked.len()
        ));
    }
    Amcheck::Corrupt(shortened(&other.concat().join("\n")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_was_not_got_is_no_corruption() {
        let locked = "btree index \"p.public.t_pkey\":\n    ERROR:  canceling statement due to lock timeout\n\
                      heap table \"p.public.t\":\n    ERROR:  canceling statement due to lock timeout\n";
        let said = Amcheck::NotChecked("2 of its relations, which are locked; the others are clean".to_owned());
        assert_eq!(judge_findings(locked), said);
        assert_eq!(judge_findings(&format!("{locked}pg_amcheck: warning: something else\n")), said);
        let error = "heap table \"p.public.u\":\n    ERROR:  invalid page in block 0\n";
        let tuple =
            "heap table \"p.public.u\", block 0, offset 1:\n    xmin 4 precedes relation freeze threshold 0:730\n";
        for damage in [error, tuple] {
            assert!(matches!(judge_findings(&format!("{locked}{damage}")), Amcheck::Corrupt(_)), "{damage}");
            // However much comes before it.
            let many = locked.repeat(1000) + damage;
            assert_eq!(judge_findings(&many), Amcheck::Corrupt(damage.trim().to_owned()));
        }
        assert!(matches!(judge_findings(tuple), Amcheck::Corrupt(_)));
    }
}
