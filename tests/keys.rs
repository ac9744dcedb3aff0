//! The master key of an encrypted environment, as an operator changes it.

use crate::common::pgrecall::{Environment, Pgrecall, Store, secret_file};
use crate::common::postgres::{Cluster, run};
use crate::common::{NEWEST, wait};

#[test]
fn a_rotated_master_key_restores_and_the_old_one_is_refused() {
    let cluster = Cluster::start_new(NEWEST);
    cluster.query("CREATE TABLE orders AS SELECT generate_series(1, 100) n");
    let dir = tempfile::tempdir().expect("temporary directory");
    let (old, new) = (dir.path().join("old.key"), dir.path().join("new.key"));
    secret_file(&old, &format!("{}\n", "0a".repeat(32)));
    secret_file(&new, &format!("{}\n", "1b".repeat(32)));
    let shop = Environment::new("shop", Store::Directory(dir.path().join("repository"))).cluster(&cluster);
    let mut host = Pgrecall::new(&[shop.clone().encrypted(&old)]);
    host.start(&[&cluster]);
    host.wait_for_backup("shop");
    let new_file = new.to_str().expect("UTF-8");
    let rotate = ["key", "rotate", "shop", "--new-key-file", new_file];
    let rotated = host.json(&rotate);
    assert_ne!(rotated["old_fingerprint"], rotated["new_fingerprint"]);
    // The daemon holds the data key and goes on.
    cluster.query("INSERT INTO orders VALUES (101)");
    host.stop();

    for verb in ["plan", "backups"] {
        let refused = host.refused(&[verb, "shop"]);
        assert!(refused.stderr.contains("master key"), "{}", refused.stderr);
    }
    // A second run finds the work done.
    assert_eq!(host.json(&rotate)["new_fingerprint"], rotated["new_fingerprint"]);
    host.configure(&[shop.encrypted(&new)]);
    assert_eq!(host.refused(&rotate).status, 2);
    let into = host.scratch().join("copy");
    let user = cluster.query("SELECT current_user");
    let report = host.json(&["restore", "shop", "--into", into.to_str().expect("UTF-8"), "--user", &user]);
    let words: Vec<&str> = report["psql"].as_str().expect("how to connect").split(' ').skip(1).collect();
    let count = run(cluster.tool("psql").args(words).args(["-XAtc", "SELECT count(*) FROM orders"]));
    let pid = report["pid"].to_string();
    run(std::process::Command::new("kill").args(["-INT", &pid]));
    wait::until("the copy ends", 30, || !std::path::Path::new("/proc").join(&pid).exists());
    assert_eq!(count.trim(), "101");
}
