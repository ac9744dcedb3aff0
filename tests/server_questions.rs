//! What is asked over SQL, with few rights and with all of them.

use std::time::Duration;

use pgrecall::pg::{SegmentSize, Timestamp};
use pgrecall::replication::sql::{ColumnCollation, EffectiveSetting, InstalledExtension};
use pgrecall::replication::{ConnectConfig, ReplicationError, ServerFacts, Sql, StartReplication, StatusUpdate};
use pgrecall::util::clock;

use crate::common::postgres::Cluster;
use crate::common::{MAJORS, NEWEST, wait};
use crate::replication::{config, session};

async fn sql(cluster: &Cluster, user: &str) -> Sql {
    Sql::connect(&as_user(cluster, user), 0).await.expect("connect")
}

fn as_user(cluster: &Cluster, user: &str) -> ConnectConfig {
    ConnectConfig { user: user.to_owned(), ..config(cluster) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_with_replication_alone_can_ask_what_the_archive_needs() {
    for major in MAJORS {
        let cluster = Cluster::builder(major).setting("max_slot_wal_keep_size", "3GB").start();
        cluster.query("CREATE ROLE r LOGIN REPLICATION; SELECT pg_create_physical_replication_slot('s', true)");
        let mut sql = sql(&cluster, "r").await;

        let (before, low) = (Timestamp::from(clock::now()), cluster.insert_lsn());
        let reading = sql.clock_reading().await.expect("an answer").expect("a primary");
        let (after, high) = (Timestamp::from(clock::now()), cluster.insert_lsn());
        assert!(before <= reading.server_time && reading.server_time <= after, "{reading:?}");
        assert!(low <= reading.insert_lsn && reading.insert_lsn <= high, "{reading:?}");
        assert_eq!(reading.timeline.0, 1);

        assert!(!sql.is_in_recovery().await.expect("an answer"));
        let slots = sql.slots().await.expect("slots");
        assert_eq!((slots[0].name.as_str(), slots[0].physical, slots[0].active_pid), ("s", true, None));
        assert!(slots[0].restart_lsn.is_some() && slots[0].wal_status.as_deref() == Some("reserved"), "{slots:?}");
        assert!(slots[0].safe_wal_bytes.is_some_and(|bytes| bytes > 2 << 30), "{slots:?}");
        let settings = sql.wal_settings().await.expect("settings");
        assert_eq!((settings.segment_size, settings.idle_slot_timeout), (SegmentSize::MIB_16, None));
        assert_eq!(settings.max_slot_wal_keep_bytes, Some(3 << 30));
        assert_eq!(settings.wal_writer_delay, Duration::from_millis(200));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_denied_is_said_with_the_grant_that_gives_it() {
    for major in MAJORS {
        let cluster = Cluster::start_new(major);
        cluster.query("CREATE ROLE \"r\"\"x\" LOGIN REPLICATION");
        let user = "r\"x";
        let mut sql = sql(&cluster, user).await;
        let waits = sql.sync_waits(Duration::ZERO).await.map(|_| ());
        let directory = sql.data_directory().await.map(|_| ());
        let mut statements = Vec::new();
        for result in [waits, directory] {
            match result {
                Err(ReplicationError::MissingGrant { statement, .. }) => statements.push(statement),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(statements[0], "GRANT pg_read_all_stats TO \"r\"\"x\"");

        let facts = ServerFacts::collect(&as_user(&cluster, user), 0).await.expect("what is allowed");
        assert!(facts.config_files.is_empty() && !facts.databases.is_empty());
        assert!(facts.not_readable.iter().any(|text| text.contains("pg_read_all_settings")), "{facts:?}");
        statements.push("GRANT pg_read_all_settings TO \"r\"\"x\"".to_owned());
        for statement in &statements {
            cluster.query(statement);
        }
        // Each run names the next right that is missing; what it says can be typed as it stands.
        let facts = loop {
            let facts = ServerFacts::collect(&as_user(&cluster, user), 0).await.expect("what is allowed");
            let Some(reason) = facts.not_readable.first() else { break facts };
            let (_, statement) = reason.split_once("run: ").unwrap_or_else(|| panic!("{reason}"));
            assert!(!statements.contains(&statement.to_owned()), "{statement} did not help");
            cluster.query(statement);
            statements.push(statement.to_owned());
        };
        assert_eq!(sql.data_directory().await.expect("granted"), cluster.data().display().to_string());
        assert!(sql.sync_waits(Duration::ZERO).await.expect("granted").is_empty());
        assert!(facts.config_files.iter().any(|file| file.path.ends_with("pg_hba.conf")), "{facts:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_facts_of_a_server_hold_what_a_base_backup_lacks() {
    for major in MAJORS {
        let cluster = Cluster::builder(major).setting("work_mem", "7MB").start();
        cluster.query("CREATE DATABASE \"o'dd\"");
        cluster.query_in("o'dd", "CREATE EXTENSION pgcrypto");
        if major >= 17 {
            cluster.query("CREATE DATABASE plain LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8' TEMPLATE template0");
            cluster.query_in("o'dd", "CREATE TABLE t (word text COLLATE pg_c_utf8)");
        }
        let facts = ServerFacts::collect(&config(&cluster), 0).await.expect("facts");
        assert!(facts.version.starts_with(&format!("PostgreSQL {major}.")), "{}", facts.version);
        let file = Some(cluster.data().join("test.conf").display().to_string());
        let expected = EffectiveSetting {
            name: "work_mem".to_owned(),
            value: "7168".to_owned(),
            unit: Some("kB".to_owned()),
            file,
        };
        assert!(facts.settings.contains(&expected), "{:?}", facts.settings);
        for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf", "test.conf"] {
            let path = cluster.data().join(name);
            let content = std::fs::read_to_string(&path).expect("read");
            let found = facts.config_files.iter().find(|file| file.path == path.display().to_string());
            assert_eq!(found.unwrap_or_else(|| panic!("{name}")).content, content);
        }
        let version = cluster.query_in("o'dd", "SELECT extversion FROM pg_extension WHERE extname = 'pgcrypto'");
        let expected = InstalledExtension { database: "o'dd".to_owned(), name: "pgcrypto".to_owned(), version };
        assert!(facts.extensions.contains(&expected), "{:?}", facts.extensions);
        let names: Vec<&str> = facts.databases.iter().map(|database| database.name.as_str()).collect();
        assert!(["postgres", "template0", "template1", "o'dd"].iter().all(|name| names.contains(name)), "{names:?}");
        let libc = "SELECT max(pg_collation_actual_version(oid)) FROM pg_collation WHERE collprovider = 'c'";
        assert_eq!(facts.libc_version.unwrap_or_default(), cluster.query(libc), "empty where only C locales are there");
        let provider = |name: &str| {
            facts
                .databases
                .iter()
                .find(|d| d.name == name)
                .map(|d| (d.provider.as_str(), d.collation_version.as_deref()))
        };
        assert_eq!(provider("postgres").map(|(provider, _)| provider), Some("c"));
        assert!(facts.resource_managers.is_empty(), "{:?}", facts.resource_managers);
        if major >= 17 {
            assert_eq!(provider("plain"), Some(("b", Some("1"))));
            let (database, provider, version) = ("o'dd".to_owned(), "b".to_owned(), "1".to_owned());
            assert_eq!(facts.column_collations, [ColumnCollation { database, provider, version }]);
        }
        // The builds of the tests have no ICU.
        assert_eq!(facts.icu_version, None);
        assert_eq!(facts.not_readable, Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn commits_that_wait_for_us_are_seen_and_end_with_our_report() {
    for major in [14, NEWEST] {
        let cluster = Cluster::start_new(major);
        let mut replication = session(&cluster).await;
        let pid = replication.backend_pid();
        let identity = replication.identify_system().await.expect("IDENTIFY_SYSTEM");
        let from = StartReplication { slot: None, start_lsn: identity.flush_lsn, timeline: identity.timeline };
        let stream = replication.start_replication(&from).await.expect("a stream");
        let flushed = StatusUpdate::all_at(identity.flush_lsn);
        stream.send_status(flushed).await.expect("send");
        let mut sql = sql(&cluster, "postgres").await;
        cluster.query("ALTER SYSTEM SET synchronous_standby_names = 'archiver'");
        cluster.reload();
        wait::until_async("our walsender to be synchronous", 30, || {
            let state = cluster.query(&format!("SELECT sync_state FROM pg_stat_replication WHERE pid = {pid}"));
            async move { state == "sync" }
        })
        .await;
        let state = sql.sync_state(pid).await.expect("an answer");
        assert!(state.commits_wait_for_us() && state.synchronous_standby_names == "archiver", "{state:?}");

        let client = cluster.connect().await;
        let commit = tokio::spawn(async move { client.batch_execute("CREATE TABLE t (n int)").await });
        let found = loop {
            let waits = sql.sync_waits(Duration::from_millis(300)).await.expect("an answer");
            if let Some(found) = waits.into_iter().next() {
                break found;
            }
            tokio::task::yield_now().await;
        };
        assert!(found.waiting >= Duration::from_millis(300) && found.database == "postgres", "{found:?}");
        assert!(!commit.is_finished());
        stream.send_status(StatusUpdate::all_at(cluster.flush_lsn())).await.expect("send");
        commit.await.expect("the task").expect("the commit returns");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_ended_only_when_it_is_the_one_that_was_meant() {
    let cluster = Cluster::start_new(NEWEST);
    let standby = cluster.standby();
    assert_eq!(sql(&standby, "postgres").await.clock_reading().await.expect("an answer"), None);
    assert!(sql(&standby, "postgres").await.is_in_recovery().await.expect("an answer"));

    let mut holder = sql(&cluster, "postgres").await;
    let pid = holder.backend_pid();
    let mut sql = sql(&cluster, "postgres").await;
    let began = sql.backend_start(pid).await.expect("an answer").expect("it runs");
    let another = Some(began.saturating_add_micros(-5_000_000));
    assert!(!sql.terminate_backend(pid, another).await.expect("nothing to end"));
    holder.query("SELECT 1").await.expect("still there");
    assert!(sql.terminate_backend(pid, Some(began)).await.expect("ended"));
    let error = loop {
        match holder.query("SELECT 1").await {
            Ok(_) => tokio::task::yield_now().await,
            Err(e) => break e,
        }
    };
    assert!(error.is_retryable(), "{error:?}");
}
