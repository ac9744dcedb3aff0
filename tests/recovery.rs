//! A restored directory recovers exactly to its target, whoever starts it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use pgrecall::instance::{Installation, Postmaster, Target};
use pgrecall::pg::{Lsn, TimelineId};
use pgrecall::restore::acceptance::{self, Accepted, Amcheck};
use pgrecall::restore::drive::{self, Drive, DriveError, Driven};
use pgrecall::restore::recovery::{self, Configuration, Finish, Prepared, Recovery, WalSource};
use tokio_util::sync::CancellationToken;

use crate::common::guard::{self, Directory};
use crate::common::postgres::{self, Cluster};
use crate::common::{MAJORS, NEWEST, wait};
use crate::instance::installation;

/// A server with a base backup of it.
struct Source {
    cluster: Cluster,
    backup: Directory,
}

impl Source {
    fn new(cluster: Cluster) -> Source {
        let backup = Directory::new("backup");
        let target = backup.path().display().to_string();
        cluster.query("ALTER SYSTEM SET wal_keep_size = '1GB'");
        cluster.reload();
        cluster.run("pg_basebackup", &["-D", &target, "-X", "none", "-c", "fast", "--no-sync", "--no-manifest"]);
        Source { cluster, backup }
    }

    /// Runs a statement in a transaction of its own, and gives the start of its commit record.
    fn commit(&self, sql: &str) -> Lsn {
        let before = self.cluster.insert_lsn();
        let xid = self.cluster.query(&format!("BEGIN; SELECT pg_current_xact_id(); {sql}; COMMIT"));
        let xid = xid.lines().next().expect("a transaction id");
        self.record(before, |line| line.contains("COMMIT") && line.contains(&format!("tx: {xid:>10},")))
    }

    /// The start of the first record from `from` on whose line of `pg_waldump` is the one that is looked for.
    fn record(&self, from: Lsn, wanted: impl Fn(&str) -> bool) -> Lsn {
        let end = self.cluster.flush_lsn().to_string();
        let wal = self.cluster.data().join("pg_wal").display().to_string();
        let (from, timeline) = (from.to_string(), self.cluster.timeline().to_string());
        let text = self.cluster.run("pg_waldump", &["-p", &wal, "-t", &timeline, "-s", &from, "-e", &end]);
        let line = text.lines().find(|line| wanted(line)).unwrap_or_else(|| panic!("no such record in {text}"));
        let lsn = line.split_once("lsn: ").unwrap().1.split_once(',').unwrap().0;
        lsn.parse().expect("an LSN")
    }

    /// The backup in a directory of its own, with all WAL of the source in `pg_wal`.
    fn restore(&self) -> Restored {
        let dir = Directory::new("restored");
        let data = dir.join("data");
        postgres::copy(self.backup.path(), &data);
        self.cluster.switch_wal();
        take_wal(&self.cluster, &data.join("pg_wal"));
        Restored { installation: installation(self.cluster.major()), dir, data, user: "postgres" }
    }
}

fn take_wal(cluster: &Cluster, to: &Path) {
    for name in cluster.wal_files() {
        std::fs::copy(cluster.data().join("pg_wal").join(&name), to.join(&name)).unwrap();
    }
}

/// A restored directory; whatever runs on it ends with the test.
struct Restored {
    installation: Installation,
    dir: Directory,
    data: PathBuf,
    /// As whom it is to be reached.
    user: &'static str,
}

impl Drop for Restored {
    fn drop(&mut self) {
        while let Ok(Some(found)) = Postmaster::find(&self.data) {
            guard::signal(found.pid.try_into().unwrap(), "QUIT");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Restored {
    fn log(&self) -> PathBuf {
        self.dir.join("server.log")
    }

    fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap()
    }

    async fn drive(&self, recovery: &Recovery) -> (Prepared, Result<Driven, DriveError>) {
        let mut prepared = recovery::prepare(&self.data, recovery).expect("prepare");
        let how = Drive {
            installation: &self.installation,
            recovery,
            log_file: self.log(),
            user: self.user,
            stall_limit: Duration::from_secs(60),
            cancel: CancellationToken::new(),
        };
        let driven = drive::drive(&mut prepared, &how, |_| {}).await;
        (prepared, driven)
    }

    /// Recovers as asked, and checks it as a restore does.
    async fn reach(&self, recovery: &Recovery) -> (Prepared, Driven, Accepted) {
        let (prepared, driven) = self.drive(recovery).await;
        let driven = driven.unwrap_or_else(|e| panic!("{e}\n{}", self.log_text()));
        let accepted = match driven.server {
            Some(_) => acceptance::quick(&prepared, recovery, &driven).await.expect("accepted"),
            None => acceptance::quick_shut_down(&prepared).expect("accepted"),
        };
        (prepared, driven, accepted)
    }

    fn query(&self, sql: &str) -> String {
        let mut command = std::process::Command::new(self.installation.program("psql"));
        command.args(["-XAtq", "-h"]).arg(self.data.join(".pgrecall"));
        postgres::run(command.args(["-U", "postgres", "-d", "postgres", "-c", sql])).trim_end().to_owned()
    }

    fn pg_ctl(&self, args: &[&str]) -> bool {
        let mut command = std::process::Command::new(self.installation.program("pg_ctl"));
        let log = self.log();
        command.args(args).args(["-w", "-t", "60", "-l"]).arg(log).arg("-D").arg(&self.data);
        let null = std::process::Stdio::null;
        command.stdin(null()).stdout(null()).stderr(null()).status().expect("run pg_ctl").success()
    }
}

fn recovery(timeline: u32, lsn: Lsn, inclusive: bool, finish: Finish) -> Recovery {
    Recovery {
        target: Target { timeline: TimelineId(timeline), lsn, inclusive },
        finish,
        wal: WalSource::Preloaded,
        configuration: Configuration::Isolated,
        later_parameters: None,
        preload_libraries: Vec::new(),
        jit: false,
        shared_buffers_bytes: 16 << 20,
        socket_directory: None,
    }
}

const ROWS: &str = "SELECT coalesce(string_agg(n::text, ',' ORDER BY n), '') FROM t";

/// A source with the rows 1 to 5, each committed by itself after the backup, and where each commit's record starts.
fn five_commits(major: u16) -> (Source, Vec<Lsn>) {
    let cluster = Cluster::start_new(major);
    cluster.query("CREATE TABLE t (n int PRIMARY KEY)");
    let source = Source::new(cluster);
    let commits = (1..=5).map(|n| source.commit(&format!("INSERT INTO t VALUES ({n})"))).collect();
    (source, commits)
}

#[tokio::test(flavor = "multi_thread")]
async fn recovery_stops_before_or_after_the_very_record() {
    for major in MAJORS {
        let (source, commits) = five_commits(major);
        let restored = source.restore();
        let (_, driven, accepted) = restored.reach(&recovery(1, commits[2], true, Finish::Promote)).await;
        assert_eq!(restored.query(ROWS), "1,2,3", "{major}");
        assert_eq!((driven.stop.record_lsn, driven.new_timeline), (commits[2], Some(TimelineId(2))));
        assert!(accepted.reached_lsn > Some(commits[2]) && accepted.reached_lsn <= Some(commits[3]));
        assert_eq!(accepted.databases, ["postgres", "template1"]);
        assert_eq!(restored.query("SHOW archive_mode"), "off");
        restored.query("INSERT INTO t VALUES (9)");

        let restored = source.restore();
        let (_, driven, accepted) = restored.reach(&recovery(1, commits[2], false, Finish::Pause)).await;
        assert_eq!(restored.query(ROWS), "1,2", "{major}");
        assert_eq!(restored.query("SELECT pg_get_wal_replay_pause_state()"), "paused");
        assert_eq!((driven.new_timeline, driven.restarts), (None, 0));
        assert!(accepted.reached_lsn <= Some(commits[2]) && accepted.reached_lsn > Some(commits[1]));

        let restored = source.restore();
        let (_, driven, _) = restored.reach(&recovery(1, commits[3], true, Finish::Shutdown)).await;
        assert!(driven.server.is_none());
        assert!(restored.data.join("recovery.signal").exists());
        assert_eq!(Postmaster::find(&restored.data).expect("readable"), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_that_the_source_raised_later_are_raised_on_the_way() {
    for major in [14, 15, NEWEST] {
        let cluster = Cluster::builder(major).setting("max_connections", "30").start();
        cluster.query("CREATE TABLE t (n int)");
        let mut source = Source::new(cluster);
        for (name, value) in
            [("max_connections", "150"), ("max_worker_processes", "20"), ("max_locks_per_transaction", "200")]
        {
            source.commit("INSERT INTO t VALUES (1)");
            source.cluster.set(name, value);
            source.cluster.restart();
        }
        let last = source.commit("INSERT INTO t VALUES (2)");
        let unknown = recovery(1, last, true, Finish::Promote);
        let restored = source.restore();
        let (prepared, driven, _) = restored.reach(&unknown).await;
        assert_eq!(restored.query(ROWS), "1,1,1,2");
        assert!((1..=3).contains(&driven.restarts), "{} restarts", driven.restarts);
        assert_eq!(restored.query("SHOW max_connections"), "150");

        let known = Recovery { later_parameters: Some(prepared.parameters), ..unknown };
        let restored = source.restore();
        let (_, driven, _) = restored.reach(&known).await;
        assert_eq!(driven.restarts, 0);
        assert_eq!(restored.query(ROWS), "1,1,1,2");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_or_a_missing_segment_in_the_wal_is_an_error() {
    let (source, _) = five_commits(NEWEST);
    let damaged = source.cluster.switch_wal();
    source.cluster.query("INSERT INTO t VALUES (6)");
    source.cluster.switch_wal();
    let last = source.commit("INSERT INTO t VALUES (7)");
    for missing in [true, false] {
        let restored = source.restore();
        let path = restored.data.join("pg_wal").join(&damaged);
        match missing {
            true => std::fs::remove_file(path).unwrap(),
            false => {
                let mut bytes = std::fs::read(&path).unwrap();
                bytes.iter_mut().skip(300).take(100_000).for_each(|byte| *byte ^= 0x55);
                std::fs::write(path, bytes).unwrap();
            }
        }
        let (_, driven) = restored.drive(&recovery(1, last, true, Finish::Promote)).await;
        let error = driven.expect_err("the target cannot be reached");
        assert!(matches!(error, DriveError::Ended { .. }), "{error}");
        assert!(error.to_string().contains("before configured recovery target was reached"), "{error}");
        assert_eq!(Postmaster::find(&restored.data).expect("readable"), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prepared_transaction_across_the_target_stays_prepared() {
    for major in MAJORS {
        let (source, _) = five_commits(major);
        source.cluster.query("BEGIN; INSERT INTO t VALUES (50); LOCK TABLE t; PREPARE TRANSACTION 'p'");
        let target = source.commit("SELECT pg_logical_emit_message(true, 'm', 'target')");
        source.cluster.query("COMMIT PREPARED 'p'");
        let restored = source.restore();
        let promote = recovery(1, target, true, Finish::Promote);
        let (prepared, driven, accepted) = restored.reach(&promote).await;
        assert_eq!(restored.query("SELECT gid FROM pg_prepared_xacts"), "p");
        // Its lock does not hold up the checks, and is not taken for corruption.
        let read_bytes = Arc::new(AtomicU64::new(0));
        let databases = &accepted.databases;
        let full = acceptance::full(&prepared, &restored.installation, &driven.address, databases, read_bytes);
        let full = full.await.expect("checked");
        assert!(full.is_clean() && full.has_checksums && full.pages.page_count > 500, "{full:?}");
        assert!(full.amcheck.iter().any(|(name, result)| name == "template1" && *result == Amcheck::Clean), "{full:?}");
        restored.query("COMMIT PREPARED 'p'");
        assert_eq!(restored.query(ROWS), "1,2,3,4,5,50");
        assert_eq!(restored.query("SELECT count(*) FROM pg_extension"), "1", "amcheck was taken away again");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_full_check_finds_damage() {
    let (source, commits) = five_commits(NEWEST);
    let restored = source.restore();
    let promote = recovery(1, commits[4], true, Finish::Promote);
    let (prepared, driven, accepted) = restored.reach(&promote).await;
    restored.query("CHECKPOINT");
    let path = restored.data.join(restored.query("SELECT pg_relation_filepath('t')"));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[8000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let read_bytes = Arc::new(AtomicU64::new(0));
    let full = acceptance::full(&prepared, &restored.installation, &driven.address, &accepted.databases, read_bytes);
    let full = full.await.expect("checked");
    assert!(!full.is_clean());
    assert_eq!(full.pages.bad_page_count, 1);
    assert!(restored.data.join(&full.pages.bad_pages[0].file) == path, "{full:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_only_prepared_recovers_by_itself_to_the_target() {
    for major in MAJORS {
        let (source, commits) = five_commits(major);
        let restored = source.restore();
        // As Debian lays a cluster out: no configuration in the data directory.
        for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
            std::fs::remove_file(restored.data.join(name)).unwrap();
        }
        recovery::prepare(&restored.data, &recovery(1, commits[1], true, Finish::Promote)).expect("prepare");
        assert!(restored.pg_ctl(&["start"]), "{}", restored.log_text());
        wait::until("the end of recovery", 60, || restored.query("SELECT pg_is_in_recovery()") == "f");
        assert_eq!(restored.query(ROWS), "1,2", "{major}");
        let switch = acceptance::switch_point(&restored.data, TimelineId(2), TimelineId(1)).expect("a history");
        assert!(switch > commits[1] && switch <= commits[2]);
        // Nothing about it changes when it is started again.
        assert!(restored.pg_ctl(&["restart"]), "{}", restored.log_text());
        assert_eq!(restored.query(ROWS), "1,2", "{major}");
        assert_eq!(restored.query("SHOW listen_addresses"), "");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_source_s_configuration_the_copy_is_isolated_only_while_we_run_it() {
    let mut cluster = Cluster::start_new(NEWEST);
    cluster.query("CREATE TABLE t (n int)");
    cluster.query("ALTER SYSTEM SET work_mem = '7MB'");
    cluster.set("recovery_target_name", "left over");
    let source = Source::new(cluster);
    let first = source.commit("INSERT INTO t VALUES (1)");
    source.commit("INSERT INTO t VALUES (2)");
    let restored = source.restore();
    let theirs = Recovery { configuration: Configuration::Source, ..recovery(1, first, true, Finish::Promote) };
    let (prepared, mut driven, _) = restored.reach(&theirs).await;
    assert_eq!(restored.query(ROWS), "1");
    assert_eq!(restored.query("SHOW work_mem"), "7MB");
    assert_eq!(restored.query("SHOW max_logical_replication_workers"), "0");
    driven.server.take().expect("it runs").stop(Duration::from_secs(30)).await.expect("stop");
    recovery::forget_recovery(&prepared, &theirs).expect("forget");
    let mut adopted = Cluster::adopt(NEWEST, &restored.data);
    adopted.start();
    assert_eq!(adopted.query(ROWS), "1");
    assert_eq!(adopted.query("SHOW work_mem"), "7MB");
    assert_eq!(adopted.query("SHOW max_logical_replication_workers"), "4");
    assert_eq!(adopted.query("SHOW recovery_target_lsn"), "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_whose_superuser_has_another_name_is_reached() {
    for major in MAJORS {
        let (source, commits) = five_commits(major);
        let mut restored = source.restore();
        restored.user = "somebody";
        let (_, driven, _) = restored.reach(&recovery(1, commits[4], true, Finish::Pause)).await;
        assert_eq!(driven.address.user, "postgres", "{major}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_comes_from_a_command_where_it_is_not_in_pg_wal() {
    let (source, commits) = five_commits(NEWEST);
    let restored = source.restore();
    let spool = restored.dir.join("a spool's folder");
    std::fs::rename(restored.data.join("pg_wal"), &spool).unwrap();
    std::fs::create_dir_all(restored.data.join("pg_wal/archive_status")).unwrap();
    let script = "cp \"$1/$2\" \"$3\"";
    let words = ["sh", "-c", script, "sh", spool.to_str().unwrap(), "%f", "%p"].map(str::to_owned);
    let command =
        Recovery { wal: WalSource::Command(words.to_vec()), ..recovery(1, commits[3], true, Finish::Promote) };
    restored.reach(&command).await;
    assert_eq!(restored.query(ROWS), "1,2,3,4");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_subscription_does_not_connect_to_its_publisher() {
    let publisher = Cluster::builder(NEWEST).setting("wal_level", "logical").fresh().start();
    publisher.query("CREATE TABLE t (n int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE t; INSERT INTO t VALUES (1)");
    let cluster = Cluster::start_new(NEWEST);
    cluster.query("CREATE TABLE t (n int PRIMARY KEY)");
    cluster.query(&format!("CREATE SUBSCRIPTION s CONNECTION '{}' PUBLICATION p", publisher.conninfo()));
    wait::until("the rows of the publisher", 60, || cluster.query(ROWS) == "1");
    let source = Source::new(cluster);
    let last = source.commit("CREATE TABLE later (n int)");
    let restored = source.restore();
    let mut source = source;
    source.cluster.stop(postgres::Stop::Fast);
    wait::until("the source to leave", 30, || publisher.query("SELECT count(*) FROM pg_stat_replication") == "0");
    restored.reach(&recovery(1, last, true, Finish::Promote)).await;
    publisher.query("INSERT INTO t VALUES (2)");
    let alone = || publisher.query("SELECT count(*) FROM pg_stat_replication") == "0";
    assert!(wait::stays(3000, alone), "the copy has connected to the publisher");
    assert_eq!(restored.query("SELECT subenabled FROM pg_subscription"), "t");
    assert_eq!(restored.query(ROWS), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_on_a_later_timeline_is_reached_across_the_switch() {
    let (mut source, _) = five_commits(NEWEST);
    let standby = source.cluster.standby();
    source.cluster.stop(postgres::Stop::Fast);
    take_wal(&source.cluster, &source.backup.join("pg_wal"));
    standby.promote();
    source.cluster = standby;
    assert_eq!(source.cluster.timeline(), 2);
    let first = source.commit("INSERT INTO t VALUES (6)");
    source.commit("INSERT INTO t VALUES (7)");
    let restored = source.restore();
    let (_, driven, _) = restored.reach(&recovery(2, first, true, Finish::Promote)).await;
    assert_eq!(restored.query(ROWS), "1,2,3,4,5,6");
    assert_eq!(driven.new_timeline, Some(TimelineId(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_recovery_stops_its_server() {
    let (source, commits) = five_commits(NEWEST);
    let restored = source.restore();
    let words = ["sh", "-c", "sleep 600", "%f", "%p"].map(str::to_owned).to_vec();
    let waiting = Recovery { wal: WalSource::Command(words), ..recovery(1, commits[3], true, Finish::Promote) };
    let mut prepared = recovery::prepare(&restored.data, &waiting).expect("prepare");
    let cancel = CancellationToken::new();
    let how = Drive {
        installation: &restored.installation,
        recovery: &waiting,
        log_file: restored.log(),
        user: "postgres",
        stall_limit: Duration::from_secs(600),
        cancel: cancel.clone(),
    };
    let runs = |data: &Path| Postmaster::find(data).expect("readable").is_some();
    let cancel_when_it_runs = async {
        wait::until_async("the server to run", 30, || async { runs(&restored.data) }).await;
        cancel.cancel();
    };
    let (driven, ()) = tokio::join!(drive::drive(&mut prepared, &how, |_| {}), cancel_when_it_runs);
    assert!(matches!(driven, Err(DriveError::Cancelled)), "{driven:?}");
    assert!(!runs(&restored.data));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_that_makes_no_progress_is_given_up() {
    let (source, commits) = five_commits(NEWEST);
    let restored = source.restore();
    let words = ["sh", "-c", "sleep 600", "%f", "%p"].map(str::to_owned).to_vec();
    let waiting = Recovery { wal: WalSource::Command(words), ..recovery(1, commits[3], true, Finish::Promote) };
    let mut prepared = recovery::prepare(&restored.data, &waiting).expect("prepare");
    let how = Drive {
        installation: &restored.installation,
        recovery: &waiting,
        log_file: restored.log(),
        user: "postgres",
        stall_limit: Duration::from_secs(3),
        cancel: CancellationToken::new(),
    };
    let driven = drive::drive(&mut prepared, &how, |_| {}).await;
    assert!(matches!(driven, Err(DriveError::Stalled { .. })), "{driven:?}");
}
