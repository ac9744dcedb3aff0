//! `kill -9` of everything, again and again, under write load; then restores, compared with the ledger.
//!
//! Each round ends the daemon, PostgreSQL, the store or all of them at a random moment and starts them again. Every tenth
//! round, and the last, restores to the time of a random commit and to the newest one: the restored clusters must hold
//! exactly the commits that the rule names. `PGRECALL_ROUNDS` and `PGRECALL_SEED` choose how long and which;
//! what was run is noted in `tests/totals.tsv`.

use std::path::Path;
use std::time::Duration;

use pgrecall::pg::Lsn;
use rand::{RngExt, rngs::StdRng};

use crate::common::ledger::{self, Ledger, TransactionEnd};
use crate::common::minio::Minio;
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::Cluster;
use crate::common::{NEWEST, chance, wait};

const OUTAGE_MAX_S: f64 = 60.0;

struct World {
    primary: Cluster,
    minio: Minio,
    host: Pgrecall,
    ledger: Ledger,
    random: StdRng,
}

#[test]
fn no_commit_is_lost_or_added_whatever_is_killed() {
    let (rounds, random) = chance::rounds(25);
    let mut world = World::new(random);
    for round in 1..=rounds {
        let millis = world.random.random_range(20..3000);
        std::thread::sleep(Duration::from_millis(millis));
        let victim = world.kill_one();
        println!("round {round}: {victim} killed after {millis} ms");
        if round % 10 == 0 || round == rounds {
            world.restore_and_compare();
        }
    }
    assert!(!world.host.log().contains("panicked at"), "the daemon panicked");
}

impl World {
    fn new(random: StdRng) -> World {
        let primary = ledger::keep_wal(Cluster::builder(NEWEST)).start();
        let minio = Minio::own();
        let store = Store::Bucket(minio.bucket(), "kill".to_owned());
        let mut host = Pgrecall::new(&[Environment::new("shop", store).cluster(&primary)]);
        // The world falls apart in every round: what the daemon says of it is not the question here.
        host.announce("");
        host.start(&[&primary]);
        host.wait_for_backup("shop");
        // Rested a little, so that a comparison after an hour of rounds still takes seconds.
        let ledger = Ledger::start_with_pause(&primary, 4, Duration::from_millis(4));
        ledger.wait_for(20);
        World { primary, minio, host, ledger, random }
    }

    fn kill_one(&mut self) -> &'static str {
        let victim = ["the daemon", "PostgreSQL", "the store", "everything"][self.random.random_range(0..4)];
        let all = victim == "everything";
        if all || victim == "the daemon" {
            self.host.kill9();
        }
        if all || victim == "PostgreSQL" {
            self.primary.kill9();
        }
        if all || victim == "the store" {
            self.minio.stop();
            if !all {
                // Mostly a moment, now and then most of a minute: the stimulus, under which the writers go on.
                let outage = self.random.random::<f64>().powi(8) * OUTAGE_MAX_S;
                std::thread::sleep(Duration::from_secs_f64(outage));
            }
            self.minio.start();
        }
        if !self.primary.is_running() {
            self.primary.start();
        }
        if !self.host.is_running() {
            self.host.start_without_waiting();
        }
        self.ledger.wait_for(5);
        victim
    }

    fn transaction_ends(&self) -> Vec<TransactionEnd> {
        ledger::transaction_ends(&self.primary, &self.primary.data().join("pg_wal"))
    }

    fn restore_and_compare(&mut self) {
        self.ledger.wait_for(20);
        let acknowledged = self.ledger.acknowledged();
        let ends = self.transaction_ends();
        let found = self.ledger.expected(&ends, Lsn::MAX);
        let unseen: Vec<_> = acknowledged.difference(&found).collect();
        assert!(unseen.is_empty(), "the source's WAL was not read whole: {unseen:?}");

        let backup: Lsn =
            self.host.json(&["backups", "shop"])["backups"][0]["stop_lsn"].as_str().unwrap().parse().unwrap();
        // A transaction of a later time follows, so that the WAL read above says where the restore ends.
        let newest = ends.iter().map(|e| &e.time).max().unwrap();
        let reachable: Vec<&TransactionEnd> =
            ends.iter().filter(|e| e.committed && e.lsn > backup && e.time < *newest).collect();
        let chosen = reachable[self.random.random_range(0..reachable.len())];
        let time = format!("{}+00:00", chosen.time);
        let stop = ends.iter().find(|e| e.lsn > backup && e.time > chosen.time).unwrap().lsn;
        let restored = restore(&self.host, &time, &self.primary.scratch().join("at-time"));
        self.ledger.check(&restored, &self.ledger.expected(&ends, stop));

        let entries = self.ledger.entries().into_iter().filter(|e| acknowledged.contains(&e.number));
        let last = entries.filter_map(|e| e.acknowledged).map(|a| a.lsn).filter(|l| *l < Lsn::MAX).max();
        self.host.wait_stored(&self.primary, last.expect("an acknowledged commit"));
        let restored = restore(&self.host, "latest", &self.primary.scratch().join("latest"));
        self.ledger.check_holds(&restored, &acknowledged);
        let present = ledger::numbers(&restored);
        let committed = self.ledger.expected(&self.transaction_ends(), Lsn::MAX);
        let extra: Vec<_> = present.difference(&committed).collect();
        assert!(extra.is_empty(), "{} restored commits are not in the source's WAL: {extra:?}", extra.len());
        println!("restored to {time} and to the latest of {} commits", present.len());
    }
}

/// Restores to a fresh directory and starts what was restored.
pub fn restore(host: &Pgrecall, to: &str, into: &Path) -> Cluster {
    let _ = std::fs::remove_dir_all(into);
    wait::until(&format!("{to} to be restorable"), 60, || host.try_run(&["plan", "shop", "--to", to]).status == 0);
    let path = into.display().to_string();
    host.run(&["restore", "shop", "--to", to, "--into", &path, "--no-start", "--finish", "promote"]);
    let mut cluster = Cluster::adopt(NEWEST, into);
    cluster.start();
    cluster.wait_writable();
    cluster
}
