//! The whole way by commands alone: a daemon archives, the store is all that is left, a restore gives the moment back.

use std::path::Path;

use serde_json::Value;

use crate::common::guard::{Directory, signal};
use crate::common::minio::Minio;
use crate::common::pgrecall::{Environment, Pgrecall, Store, secret_file};
use crate::common::postgres::{Cluster, Stop};
use crate::common::{MAJORS, NEWEST, compare, wait};

/// Waits until all that was written is acknowledged by the archive.
pub fn wait_stored(cluster: &Cluster) {
    let end = cluster.flush_lsn();
    wait::until("everything to be stored", 60, || {
        let flushed = "SELECT min(flush_lsn) FROM pg_stat_replication WHERE application_name LIKE 'pgrecall%'";
        cluster.query(flushed).parse::<pgrecall::pg::Lsn>().is_ok_and(|stored| stored >= end)
    });
}

/// The server's clock, in a form that a target takes; a commit after it makes it a moment of the past.
pub fn moment(cluster: &Cluster) -> String {
    let now = cluster.query("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || 'Z'");
    cluster.query("SELECT pg_sleep(0.01)");
    now
}

/// Restores by the command; gives its report.
pub fn restore(host: &Pgrecall, to: &str, into: &Path, more: &[&str]) -> Value {
    wait::until(&format!("{to} to be restorable"), 60, || host.try_run(&["plan", "shop", "--to", to]).status == 0);
    let into = into.display().to_string();
    host.json(&[&["restore", "shop", "--to", to, "--into", &into], more].concat())
}

/// The server that a restore left.
pub struct Left {
    pid: u32,
    psql: Vec<String>,
}

impl Left {
    pub fn of(report: &Value) -> Left {
        let pid = report["pid"].as_u64().unwrap_or_else(|| panic!("a server runs: {report}"));
        let psql = report["psql"].as_str().expect("how to connect").split(' ').skip(1).map(str::to_owned).collect();
        Left { pid: u32::try_from(pid).expect("a process id"), psql }
    }

    pub fn query(&self, cluster: &Cluster, sql: &str) -> String {
        crate::common::postgres::run(cluster.tool("psql").args(&self.psql).args(["-XAtc", sql])).trim().to_owned()
    }
}

impl Drop for Left {
    fn drop(&mut self) {
        signal(self.pid, "INT");
        let place = Path::new("/proc").join(self.pid.to_string());
        wait::until("the restored server ends", 60, || !place.exists());
    }
}

/// Each major with another way to end.
#[test]
fn what_was_dropped_is_back_in_a_restore_of_every_major() {
    for major in MAJORS {
        let cluster = Cluster::start_new(major);
        let dir = Directory::new("way");
        let place = Store::Directory(dir.join("repository"));
        let mut host = Pgrecall::new(&[Environment::new("shop", place).cluster(&cluster)]);
        cluster.query("CREATE DATABASE books");
        cluster.query_in("books", "CREATE TABLE pages AS SELECT generate_series(1, 3000) n");
        host.start(&[&cluster]);
        host.wait_for_backup("shop");
        cluster.query("CREATE TABLE orders AS SELECT generate_series(1, 1000) n");
        cluster.query_in("books", "INSERT INTO pages SELECT generate_series(3001, 4000)");
        let good = moment(&cluster);
        cluster.query("DROP TABLE orders");
        cluster.query("DROP DATABASE books");
        wait_stored(&cluster);
        let finish = match major {
            14 => "shutdown",
            15 | 16 => "pause",
            _ => "promote",
        };
        let check = if major >= 17 { "full" } else { "quick" };
        let into = dir.join("before");
        let report = restore(&host, &good, &into, &["--finish", finish, "--check", check]);
        let count = "SELECT count(*) FROM orders";
        if finish == "shutdown" {
            assert!(report["pid"].is_null() && !into.join("postmaster.pid").exists(), "{report}");
            assert!(report["reached_lsn"].is_string(), "{report}");
        } else {
            let left = Left::of(&report);
            assert_eq!(left.query(&cluster, "SELECT pg_is_in_recovery()"), if finish == "pause" { "t" } else { "f" });
            // Paused just before the DROP commits, PostgreSQL still holds the lock that its transaction took.
            let locked = "SELECT count(*) FROM pg_locks WHERE relation = 'orders'::regclass";
            match finish {
                "pause" => assert_eq!(left.query(&cluster, locked), "1"),
                _ => assert_eq!(left.query(&cluster, count), "1000"),
            }
        }
        let mut copy = Cluster::adopt(major, &into);
        // A directory that was shut down at its target goes there again whenever it is started, until told otherwise.
        copy.set_override("recovery_target_action", "promote");
        copy.start();
        assert_eq!(copy.query(count), "1000", "{major}");
        assert_eq!(copy.query_in("books", "SELECT count(*) FROM pages"), "4000", "{major}");
        host.stop();
    }
}

/// Encrypted, in a bucket, with tablespaces; then the host is gone.
#[test]
fn a_fresh_host_restores_everything_from_the_bucket_and_the_key() {
    let (mut cluster, dir) = (Cluster::builder(NEWEST).fresh().start(), Directory::new("way"));
    let key = dir.join("master.key");
    secret_file(&key, &"5a".repeat(32));
    let shop = Environment::new("shop", Store::Bucket(Minio::shared(), "fresh".into())).encrypted(&key);
    let mut host = Pgrecall::new(&[shop.clone().cluster(&cluster)]);
    let (fast, slow) = (dir.join("fast"), dir.join("slow"));
    for (name, place) in [("fast", &fast), ("slow", &slow)] {
        std::fs::create_dir(place).unwrap();
        cluster.query(&format!("CREATE TABLESPACE {name} LOCATION '{}'", place.display()));
        cluster.query(&format!("CREATE TABLE in_{name} TABLESPACE {name} AS SELECT generate_series(1, 5000) n"));
    }
    host.start(&[&cluster]);
    host.wait_for_backup("shop");
    cluster
        .query("INSERT INTO in_fast SELECT generate_series(5001, 6000); CREATE INDEX ON in_slow (n) TABLESPACE slow");
    let expected = compare::fingerprint(&cluster);
    wait_stored(&cluster);
    host.kill9();
    cluster.stop(Stop::Immediate);
    for gone in [cluster.data(), &fast, &slow] {
        std::fs::remove_dir_all(gone).unwrap();
    }

    let fresh = Pgrecall::new(&[shop.clone().store_only()]);
    let (moved, under) = (dir.join("moved"), dir.join("under"));
    let more = format!("{}={}", fast.display(), moved.display());
    let under_shown = under.display().to_string();
    let tablespaces = ["--tablespace", &more, "--tablespaces-under", &under_shown];
    let into = dir.join("restored");
    check_space(&fresh, &into, &tablespaces);
    let report = restore(&fresh, "latest", &into, &[&tablespaces[..], &["--check", "full"]].concat());
    drop(Left::of(&report));
    let mut copy = Cluster::adopt(NEWEST, &into);
    copy.start();
    compare::assert_same(&expected, &compare::fingerprint(&copy));
    let places =
        "SELECT string_agg(pg_tablespace_location(oid), ' ' ORDER BY spcname) FROM pg_tablespace WHERE oid > 16000";
    let oid = copy.query("SELECT oid FROM pg_tablespace WHERE spcname = 'slow'");
    assert_eq!(copy.query(places), format!("{} {}", moved.display(), under.join(oid).display()));
    compare::check_sound(&mut copy);
    fresh.run(&["verify", "shop", "--read-data"]);

    // Without the key, or with another one, nothing is restored.
    secret_file(&key, &"a5".repeat(32));
    let into = dir.join("not").display().to_string();
    let refused = fresh.refused(&["restore", "shop", "--into", &into]);
    assert!(refused.stderr.contains("key") && refused.status == 3, "{refused:?}");
    assert!(!Path::new(&into).exists());
}

/// The plan says how much goes to which file system, and nothing is made for it.
fn check_space(host: &Pgrecall, into: &Path, tablespaces: &[&str]) {
    let shown = into.display().to_string();
    let planned = host.json(&[&["plan", "shop", "--into", &shown], tablespaces].concat());
    let plan = &planned["plan"];
    let [one] = plan["file_systems"].as_array().expect("a list").as_slice() else { panic!("{plan}") };
    assert_eq!(one["places"].as_array().map(Vec::len), Some(3), "{one}");
    assert_eq!(one["needed_bytes"].as_u64(), plan["disk_bytes"].as_u64().map(|bytes| bytes + (64 << 20)));
    let bytes = plan["backup"]["tablespaces"].as_array().expect("a list").iter().map(|t| t["bytes"].as_u64());
    assert!(bytes.clone().count() == 2 && bytes.clone().all(|b| b.is_some_and(|b| b > 100_000)), "{plan}");
    assert!(!into.exists());
    let refused = host.refused(&["plan", "shop", "--tablespaces-under", &shown]);
    assert!(refused.stderr.contains("--into"), "{refused:?}");
}

/// As Debian lays a cluster out: the configuration is elsewhere.
#[test]
fn a_cluster_with_its_configuration_elsewhere_is_restored_and_starts() {
    let dir = Directory::new("way");
    let mut cluster = Cluster::builder(NEWEST).make();
    let etc = dir.join("etc");
    std::fs::create_dir(&etc).unwrap();
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf", "test.conf"] {
        std::fs::rename(cluster.data().join(name), etc.join(name)).unwrap();
    }
    let files = format!(
        "data_directory = '{}'\nhba_file = '{etc}/pg_hba.conf'\nident_file = '{etc}/pg_ident.conf'\n",
        cluster.data().display(),
        etc = etc.display()
    );
    let main = std::fs::read_to_string(etc.join("postgresql.conf")).unwrap() + &files;
    std::fs::write(etc.join("postgresql.conf"), main).unwrap();
    cluster.set_override("config_file", &etc.join("postgresql.conf").display().to_string());
    cluster.start();
    let place = Store::Directory(dir.join("repository"));
    let mut host = Pgrecall::new(&[Environment::new("shop", place).cluster(&cluster)]);
    host.start(&[&cluster]);
    host.wait_for_backup("shop");
    cluster.query("CREATE TABLE orders AS SELECT generate_series(1, 1000) n");
    wait_stored(&cluster);
    host.stop();
    cluster.stop(Stop::Fast);
    for more in [&[][..], &["--with-config"]] {
        let into = dir.join(format!("restored{}", more.len()));
        let left = Left::of(&restore(&host, "latest", &into, more));
        assert_eq!(left.query(&cluster, "SELECT count(*) FROM orders"), "1000", "{more:?}");
    }
}

/// The WAL says that settings were raised after the backup: replay begins with them, and need not begin again.
#[test]
fn settings_that_were_raised_after_the_backup_cost_no_restart() {
    for major in [14, NEWEST] {
        let mut cluster = Cluster::builder(major).setting("max_connections", "30").start();
        let dir = Directory::new("way");
        let place = Store::Directory(dir.join("repository"));
        let mut host = Pgrecall::new(&[Environment::new("shop", place).cluster(&cluster)]);
        cluster.query("CREATE TABLE t (n int)");
        host.start(&[&cluster]);
        host.wait_for_backup("shop");
        host.announce("WAL is not archived");
        for connections in ["90", "150", "60"] {
            cluster.query(&format!("INSERT INTO t VALUES ({connections})"));
            cluster.set("max_connections", connections);
            cluster.restart();
        }
        cluster.query("INSERT INTO t VALUES (0)");
        wait_stored(&cluster);
        host.stop();
        let planned = host.json(&["plan", "shop"]);
        let settings = planned["plan"]["settings"].as_array().expect("a list").clone();
        let planned = settings.iter().find(|s| s["name"] == "max_connections").map(|s| &s["value"]);
        assert_eq!(planned, Some(&"150".into()), "{settings:?}");
        let report = restore(&host, "latest", &dir.join("restored"), &[]);
        assert_eq!(report["restarts"], 0, "{report}");
        let left = Left::of(&report);
        assert_eq!(left.query(&cluster, "SELECT string_agg(n::text, ' ') FROM t"), "90 150 60 0");
        assert_eq!(left.query(&cluster, "SHOW max_connections"), "150");
    }
}

/// Paused before the end of transactions that had locked much, a server is checked as far as it can be, without waiting.
#[test]
fn what_replay_holds_locked_at_a_pause_is_named_and_not_waited_for() {
    let cluster = Cluster::start_new(NEWEST);
    let dir = Directory::new("way");
    let mut host =
        Pgrecall::new(&[Environment::new("shop", Store::Directory(dir.join("repository"))).cluster(&cluster)]);
    cluster.query("CREATE EXTENSION amcheck");
    cluster.query("CREATE DATABASE books");
    cluster.query("CREATE SCHEMA sales");
    for n in 0..60 {
        cluster.query(&format!("CREATE TABLE sales.t{n} (n int PRIMARY KEY)"));
    }
    host.start(&[&cluster]);
    host.wait_for_backup("shop");
    let before_drop = moment(&cluster);
    cluster.query("DROP SCHEMA sales CASCADE");
    let before_lock = moment(&cluster);
    cluster.query_in(
        "books",
        "BEGIN; LOCK TABLE pg_catalog.pg_class IN ACCESS EXCLUSIVE MODE; SELECT pg_current_xact_id(); COMMIT",
    );
    wait_stored(&cluster);
    host.stop();

    let begun = std::time::Instant::now();
    let more = ["--finish", "pause", "--check", "full"];
    let report = restore(&host, &before_drop, &dir.join("drop"), &more);
    drop(Left::of(&report));
    assert!(begun.elapsed().as_secs() < 60, "{:?}", begun.elapsed());
    let remarks = |report: &Value| report["remarks"].as_array().expect("a list").iter().map(Value::to_string).collect();
    let said: Vec<String> = remarks(&report);
    let has =
        |said: &[String], text: &str| assert!(said.iter().any(|remark| remark.contains(text)), "{text}: {said:?}");
    has(&said, "locked postgres.sales.t0, postgres.sales.t1, postgres.sales.t10, postgres.sales.t11, ");
    has(&said, " and 55 more: whoever reads there waits until the server is promoted");
    has(&said, "pg_amcheck did not check postgres: 120 of its relations, which are locked; the others are clean");

    // A database whose catalogue is locked takes no session; the rest of the cluster is right all the same.
    let report = restore(&host, &before_lock, &dir.join("lock"), &more);
    let left = Left::of(&report);
    let said: Vec<String> = remarks(&report);
    has(&said, "database books takes no session while replay is paused");
    assert_eq!(report["databases"], serde_json::json!(["postgres", "template1"]));
    left.query(&cluster, "SELECT pg_promote()");
}
