//! An environment whose server was replaced: archiving goes on below the next incarnation, and both pasts can be restored.

use std::path::Path;

use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::{Cluster, run};
use crate::common::{NEWEST, wait};

/// A moment by the server's clock, proven to be stored: a transaction ends after it.
fn moment(host: &Pgrecall, cluster: &Cluster) -> String {
    let format = r#"YYYY-MM-DD"T"HH24:MI:SS.US"Z""#;
    let time = cluster.query(&format!("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', '{format}')"));
    cluster.query("SELECT txid_current()");
    wait::until("the moment is covered", 60, || host.try_run(&["plan", "shop", "--to", &time]).status == 0);
    time
}

/// Restores, asks the copy for the number of orders, and ends it.
fn orders_in_copy(host: &Pgrecall, cluster: &Cluster, into: &str, target: &[&str]) -> String {
    let into = host.scratch().join(into);
    let user = cluster.query("SELECT current_user");
    let into = into.to_str().expect("UTF-8");
    let report = host.json(&[&["restore", "shop", "--into", into, "--user", &user], target].concat());
    let words: Vec<&str> = report["psql"].as_str().expect("how to connect").split(' ').skip(1).collect();
    let count = run(cluster.tool("psql").args(words).args(["-XAtc", "SELECT count(*) FROM orders"]));
    let pid = report["pid"].to_string();
    run(std::process::Command::new("kill").args(["-INT", &pid]));
    wait::until("the copy ends", 30, || !Path::new("/proc").join(&pid).exists());
    count.trim().to_owned()
}

#[test]
fn both_pasts_of_a_replaced_server_can_be_restored() {
    let first = Cluster::start_new(NEWEST);
    first.query("CREATE TABLE orders AS SELECT generate_series(1, 100) n");
    let store = tempfile::tempdir().expect("temporary directory");
    let shop = Environment::new("shop", Store::Directory(store.path().to_owned()));
    let mut host = Pgrecall::new(&[shop.clone().cluster(&first)]);
    host.announce("");
    host.start(&[&first]);
    host.wait_for_backup("shop");
    first.query("INSERT INTO orders SELECT generate_series(1, 50)");
    let before = moment(&host, &first);
    first.query("DELETE FROM orders WHERE n > 90");
    host.stop();
    let old_backup = host.json(&["backups", "shop"])["backups"][0]["id"].as_str().expect("an id").to_owned();

    let second = Cluster::builder(NEWEST).fresh().start();
    second.query("CREATE TABLE orders AS SELECT generate_series(1, 7) n");
    host.configure(&[shop.cluster(&second)]);
    host.start_without_waiting();
    let of = |host: &Pgrecall, key: &str| host.json(&["status", "shop"])["environments"][0]["daemon"][key].clone();
    wait::until("another cluster is a conflict", 60, || of(&host, "state") == "conflict");
    let opened = host.json(&["incarnation", "open", "shop", "--confirm", "shop"]);
    assert!(opened["incarnation"].as_str().is_some_and(|name| name.starts_with("0002-")), "{opened}");
    assert!(opened["previous"].as_str().is_some_and(|name| name.starts_with("0001-")), "{opened}");
    wait::until("archiving goes on", 60, || of(&host, "wal") == "streaming");
    host.wait_for_backup("shop");
    second.query("INSERT INTO orders VALUES (8)");
    let after = moment(&host, &second);
    second.query("DELETE FROM orders");
    wait::until("the end is stored", 60, || {
        let status = host.json(&["status", "shop"]);
        let stored = status["environments"][0]["store"]["stored_to_lsn"].as_str().and_then(|lsn| lsn.parse().ok());
        stored.is_some_and(|lsn: pgrecall::pg::Lsn| lsn >= second.flush_lsn())
    });

    assert_eq!(orders_in_copy(&host, &second, "after", &["--to", &after]), "8");
    assert_eq!(orders_in_copy(&host, &second, "before", &["--to", &before]), "150");
    assert_eq!(orders_in_copy(&host, &second, "backup", &["--to", &format!("backup:{old_backup}")]), "100");
    assert_eq!(orders_in_copy(&host, &second, "newest", &["--to", "latest"]), "0");
    let shown = host.run(&["plan", "shop", "--to", "latest", "--incarnation", "1"]);
    assert!(shown.contains("incarnation 0001)"), "{shown}");
    let refused = host.refused(&["plan", "shop", "--to", "latest", "--incarnation", "3"]);
    assert!(refused.stderr.contains("there is no incarnation 3; there are 1, 2"), "{}", refused.stderr);
    let elsewhere = host.refused(&["plan", "shop", "--to", "name:nowhere"]);
    assert!(elsewhere.stderr.contains("--incarnation names another (1, 2)"), "{}", elsewhere.stderr);
    host.stop();
}
