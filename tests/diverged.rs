//! What an old primary had stored past the fork of a fail-over: named, and still there to be restored.

use std::path::Path;
use std::time::Duration;

use pgrecall::pg::Lsn;

use crate::common::guard::Directory;
use crate::common::ledger::{self, Ledger};
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::{Cluster, Stop};
use crate::common::{NEWEST, wait};

fn restore(host: &Pgrecall, into: &Path, more: &[&str]) -> Cluster {
    let shown = into.display().to_string();
    host.run(&[&["restore", "shop", "--to", "latest", "--into", &shown, "--no-start"], more].concat());
    let mut copy = Cluster::adopt(NEWEST, into);
    copy.start();
    copy.wait_writable();
    copy
}

#[test]
fn what_a_fail_over_left_behind_is_named_and_restored_by_its_timeline() {
    let dir = Directory::new("diverged");
    let mut primary = ledger::keep_wal(Cluster::builder(NEWEST)).start();
    let mut standby = primary.standby();
    let sockets = [&primary, &standby].map(|c| c.socket_dir().display().to_string()).join(",");
    let both = format!("host={sockets} port={0},{0} user=postgres dbname=postgres", primary.port());
    let store = Store::Directory(dir.join("repository"));
    let mut host = Pgrecall::new(&[Environment::new("shop", store).postgres(&both)]);
    // The primary goes away: that is said.
    host.announce("WAL is not archived");
    host.start(&[&primary]);
    host.wait_for_backup("shop");
    let mut ledger = Ledger::start_with_pause(&primary, 3, Duration::from_millis(2));
    ledger.wait_for(100);
    standby.stop(Stop::Fast);
    ledger.wait_for(200);
    ledger.stop();
    host.wait_stored(&primary, primary.flush_lsn());
    primary.kill9();
    let old_ends = ledger::transaction_ends(&primary, &primary.data().join("pg_wal"));
    let all_of_old = ledger.expected(&old_ends, Lsn::MAX);
    assert_eq!(all_of_old, ledger.acknowledged());

    standby.set("primary_conninfo", "");
    standby.start();
    standby.promote();
    let kept = ledger::numbers(&standby);
    assert!(kept.len() + 100 < all_of_old.len(), "{} of {}", kept.len(), all_of_old.len());
    standby.query("CREATE TABLE after_the_fork AS SELECT generate_series(1, 100) n");
    let end = standby.flush_lsn();
    let status = || host.json(&["status", "shop"])["environments"][0]["store"].clone();
    wait::until("the new timeline to be stored", 60, || {
        let store = status();
        let stored = store["stored_to_lsn"].as_str().and_then(|lsn| lsn.parse::<Lsn>().ok());
        store["timeline"] == 2 && stored.is_some_and(|stored| stored >= end)
    });

    let store = status();
    let [tail] = store["diverged_tails"].as_array().expect("a list").as_slice() else { panic!("{store}") };
    let fork: Lsn = tail["fork_lsn"].as_str().expect("text").parse().unwrap();
    let commits = old_ends.iter().filter(|end| end.committed && end.lsn >= fork).count();
    assert_eq!((&tail["timeline"], &tail["commits"]), (&1.into(), &commits.into()), "{tail}");
    let shown = host.run(&["status", "shop"]);
    let line = format!("{commits} commits on timeline 1 from {fork}");
    assert!(shown.contains(&line) && shown.contains("--timeline 1"), "{shown}");

    let latest = restore(&host, &dir.join("latest"), &[]);
    ledger.check(&latest, &kept);
    assert_eq!(latest.query("SELECT count(*) FROM after_the_fork"), "100");
    let tail = restore(&host, &dir.join("tail"), &["--timeline", "1"]);
    ledger.check(&tail, &all_of_old);
    assert!(tail.try_query("SELECT FROM after_the_fork").is_err());
    // Its own timeline must be one that nobody has used.
    assert_eq!((latest.timeline(), tail.timeline()), (3, 3));
    host.run(&["verify", "shop"]);
}
