//! PostgreSQL's files and programs on this host, against PostgreSQL's own tools of every major.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use pgrecall::instance::host::SortedText;
use pgrecall::instance::{self, Address, Installation, Postmaster, Server, Session, Settings, Start, locate, server};
use pgrecall::pg::control_file::ClusterState;
use pgrecall::pg::{ControlFile, Major};
use pgrecall::restore::checksums::{self, Problem};

use crate::common::guard::Directory;
use crate::common::postgres::{Cluster, Stop};
use crate::common::{MAJORS, NEWEST, places};

pub fn installation(major: u16) -> Installation {
    locate::locate(Major(major), &[places::cache().join("postgresql")]).expect("the major is installed")
}

fn control(cluster: &Cluster) -> ControlFile {
    let bytes = std::fs::read(cluster.data().join("global/pg_control")).unwrap();
    ControlFile::decode(&bytes).expect("a control file")
}

#[test]
fn pg_control_says_what_pg_controldata_prints() {
    for major in MAJORS {
        let mut cluster = Cluster::builder(major)
            .setting("max_connections", "123")
            .setting("max_worker_processes", "11")
            .setting("max_locks_per_transaction", "77")
            .setting("track_commit_timestamp", "on")
            .setting("wal_level", "logical")
            .start();
        cluster.query("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n");
        cluster.stop(Stop::Fast);
        let text = cluster.run("pg_controldata", &["-D", cluster.data().to_str().unwrap()]);
        let printed: HashMap<&str, &str> =
            text.lines().filter_map(|line| line.split_once(':')).map(|(name, value)| (name, value.trim())).collect();
        let control = control(&cluster);
        assert_eq!(control.major(), Some(Major(major)));
        assert_eq!(control.state, ClusterState::ShutDown);
        assert!(control.has_data_checksums());
        let on = |flag: bool| if flag { "on" } else { "off" }.to_owned();
        for (name, value) in [
            ("Database system identifier", control.system_id.to_string()),
            ("pg_control version number", control.control_version.to_string()),
            ("Catalog version number", control.catalog_version.to_string()),
            ("Latest checkpoint location", control.checkpoint_lsn.to_string()),
            ("Latest checkpoint's REDO location", control.checkpoint.redo_lsn.to_string()),
            ("Latest checkpoint's TimeLineID", control.checkpoint.timeline.to_string()),
            ("Latest checkpoint's PrevTimeLineID", control.checkpoint.previous_timeline.to_string()),
            ("Latest checkpoint's NextXID", format!("0:{}", control.checkpoint.next_xid)),
            ("Minimum recovery ending location", control.min_recovery_lsn.to_string()),
            ("Min recovery ending loc's timeline", control.min_recovery_timeline.to_string()),
            ("Backup start location", control.backup_start_lsn.to_string()),
            ("Backup end location", control.backup_end_lsn.to_string()),
            ("wal_level setting", control.parameters.wal_level.name().to_owned()),
            ("wal_log_hints setting", on(control.parameters.wal_log_hints)),
            ("max_connections setting", control.parameters.max_connections.to_string()),
            ("max_worker_processes setting", control.parameters.max_worker_processes.to_string()),
            ("max_wal_senders setting", control.parameters.max_wal_senders.to_string()),
            ("max_prepared_xacts setting", control.parameters.max_prepared_transactions.to_string()),
            ("max_locks_per_xact setting", control.parameters.max_locks_per_transaction.to_string()),
            ("track_commit_timestamp setting", on(control.parameters.track_commit_timestamp)),
            ("Database block size", control.block_size.to_string()),
            ("Blocks per segment of large relation", control.relation_segment_blocks.to_string()),
            ("WAL block size", control.wal_block_size.to_string()),
            ("Bytes per WAL segment", control.segment_size.bytes().to_string()),
            ("Data page checksum version", control.data_checksum_version.to_string()),
        ] {
            assert_eq!(printed.get(name), Some(&value.as_str()), "{name} of {major}");
        }
    }
}

#[test]
fn every_page_that_pg_checksums_calls_good_is_good_and_a_flipped_bit_is_found() {
    for major in MAJORS {
        let mut cluster = Cluster::start_new(major);
        cluster.query("CREATE TABLE t AS SELECT n, repeat('x', 100) AS x FROM generate_series(1, 20000) AS n");
        cluster.query("CREATE INDEX ON t (n); CREATE UNLOGGED TABLE u AS SELECT 1 AS n; VACUUM t");
        let table = cluster.query("SELECT pg_relation_filepath('t')");
        cluster.stop(Stop::Fast);
        let data = cluster.data();
        let printed = cluster.run("pg_checksums", &["--check", "-D", data.to_str().unwrap()]);
        let blocks = printed.lines().find_map(|line| line.strip_prefix("Blocks scanned:")).expect("a count").trim();
        let read_bytes = AtomicU64::new(0);
        let check = || checksums::check_all(data, &control(&cluster), 2, &read_bytes).expect("readable");
        let findings = check();
        assert_eq!(findings.page_count.to_string(), blocks);
        assert_eq!((findings.bad_page_count, read_bytes.load(Ordering::Relaxed)), (0, findings.page_count * 8192));

        let path = data.join(&table);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[3 * 8192 + 4000] ^= 0x10;
        std::fs::write(&path, &bytes).unwrap();
        let findings = check();
        assert_eq!(findings.bad_page_count, 1);
        assert_eq!((findings.bad_pages[0].file.as_str(), findings.bad_pages[0].block), (table.as_str(), 3));
        assert!(matches!(findings.bad_pages[0].problem, Problem::Checksum { .. }));

        bytes.truncate(5 * 8192 + 100);
        std::fs::write(&path, &bytes).unwrap();
        let problems: Vec<Problem> = check().bad_pages.iter().map(|page| page.problem).collect();
        assert_eq!(problems.last(), Some(&Problem::Torn { bytes: 100 }));
    }
}

#[test]
fn all_majors_of_a_configured_directory_are_found() {
    let configured = [places::cache().join("postgresql")];
    let found: Vec<u16> = locate::installed(&configured).iter().map(|found| found.major.0).collect();
    assert_eq!(found, MAJORS);
    let newest = installation(NEWEST);
    assert!(newest.version.starts_with("18."), "{}", newest.version);
    assert!(newest.library_directory().join("amcheck.so").exists());
    assert!(newest.extension_directory().join("amcheck.control").exists());
    let needs = instance::host::Needs {
        preload_libraries: vec!["auto_explain".to_owned(), "no_such".to_owned()],
        extensions: vec!["amcheck".to_owned()],
        ..Default::default()
    };
    let (_, lacks) = instance::host::check(Major(NEWEST), &configured, &needs);
    assert_eq!(lacks, [instance::host::Lack::Library("no_such".to_owned())]);
    // The programs of the tests are built without ICU.
    let provider = pgrecall::pg::CollationProvider::Icu;
    let sorted = SortedText { provider, version: "153.112".to_owned(), databases: vec!["words".to_owned()] };
    let needs = instance::host::Needs { sorted: vec![sorted.clone()], ..Default::default() };
    let (_, lacks) = instance::host::check(Major(NEWEST), &configured, &needs);
    assert_eq!(lacks, [instance::host::Lack::NoIcu(sorted)]);
}

/// A started server, which does not outlive the test.
struct Started {
    server: Server,
    data: PathBuf,
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Ok(Some(found)) = Postmaster::find(&self.data) {
            crate::common::guard::signal(found.pid.try_into().unwrap(), "QUIT");
        }
    }
}

fn overrides(socket: &Directory) -> Settings {
    let mut settings = Settings::new();
    settings.set("listen_addresses", "").set("unix_socket_directories", socket.path().to_string_lossy());
    settings
}

#[tokio::test]
async fn a_started_server_is_found_reached_and_stopped() {
    let cluster = Cluster::builder(NEWEST).make();
    let socket = Directory::new("socket");
    let log_file = cluster.scratch().join("own.log");
    let overrides = overrides(&socket);
    let installation = installation(NEWEST);
    let start = Start {
        installation: &installation,
        data_directory: cluster.data(),
        log_file: &log_file,
        overrides: &overrides,
    };
    let server = Server::start(&start).expect("start");
    let mut started = Started { server, data: cluster.data().to_owned() };
    let ready =
        |lines: Vec<instance::log::LogLine>| lines.iter().any(|line| line.event() == Some(instance::log::Event::Ready));
    crate::common::wait::until("the server to be ready", 60, || ready(started.server.poll_log().expect("a log")));
    let error = Server::start(&start).expect_err("it runs already").to_string();
    assert!(error.contains("runs on"), "{error}");

    let found = Postmaster::find(cluster.data()).expect("readable").expect("it runs");
    assert_eq!(found.pid, started.server.pid());
    assert_eq!(found.socket_directory.as_deref(), Some(socket.path()));
    let address = Address { socket_directory: socket.path().to_owned(), port: found.port, user: "postgres".to_owned() };
    let session = Session::open(&address, "postgres", Duration::from_secs(5)).await.expect("connect");
    let one: i32 = session.query_one("SELECT 1", &[]).await.expect("query").get(0);
    assert_eq!(one, 1);
    let stopped = session.query_one("SELECT pg_sleep(60)", &[]).await.expect_err("the limit of a statement");
    assert!(stopped.as_db_error().is_some_and(|e| e.message().contains("statement timeout")), "{stopped:?}");

    server::stop_found(&found, cluster.data(), Duration::from_secs(30)).await.expect("stop");
    assert_eq!(Postmaster::find(cluster.data()).expect("readable"), None);
    crate::common::wait::until("its exit status", 10, || started.server.exit_status().expect("a child").is_some());
}

#[tokio::test]
async fn why_a_server_does_not_start_is_said() {
    let cluster = Cluster::builder(NEWEST).make();
    let socket = Directory::new("socket");
    let log_file = cluster.scratch().join("own.log");
    let mut overrides = overrides(&socket);
    overrides.set("shared_preload_libraries", "no_such_library");
    let installation = installation(NEWEST);
    let start = Start {
        installation: &installation,
        data_directory: cluster.data(),
        log_file: &log_file,
        overrides: &overrides,
    };
    let mut server = Server::start(&start).expect("start");
    crate::common::wait::until("its end", 60, || server.exit_status().expect("a child").is_some());
    server.poll_log().expect("a log");
    assert!(server.failure().contains("could not access file \"no_such_library\""), "{}", server.failure());
    server.stop(Duration::from_secs(1)).await.expect("nothing to stop");
}
