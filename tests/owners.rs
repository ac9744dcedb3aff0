//! Two daemons that both take themselves for the owner of an environment: one sleeps for longer than its server waits for it,
//! the other takes over, and the first wakes up.
//!
//! `PGRECALL_ROUNDS` chooses how often; what was run is noted in `tests/totals.tsv`.

use std::process::Stdio;
use std::time::Duration;

use rand::RngExt;

use crate::common::guard::Process;
use crate::common::ledger::{self, Ledger};
use crate::common::minio::Minio;
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::Cluster;
use crate::common::{NEWEST, chance, wait};
use crate::crash::restore;
use crate::retention::backups;

#[test]
fn an_owner_that_sleeps_too_long_and_wakes_up_makes_nothing_visible_and_loses_nothing() {
    let (rounds, mut random) = chance::rounds(1);
    let primary = ledger::keep_wal(Cluster::builder(NEWEST).setting("wal_sender_timeout", "2s")).start();
    let shop = Environment::new("shop", Store::Bucket(Minio::shared(), "owners".into())).cluster(&primary);
    let mut hosts = [Pgrecall::new(std::slice::from_ref(&shop)), Pgrecall::new(std::slice::from_ref(&shop))];
    for host in &mut hosts {
        // That the other one is there is said again and again.
        host.announce("");
    }
    hosts[0].start(&[&primary]);
    hosts[0].wait_for_backup("shop");
    let mut ledger = Ledger::start_with_pause(&primary, 4, Duration::from_millis(4));
    let holder = || primary.query("SELECT active_pid FROM pg_replication_slots WHERE active");
    for round in 1..=rounds {
        let [owner, other] = &mut hosts;
        // It falls asleep before, within or behind a backup of its own.
        let mut command = owner.command(&["backup", "shop"]);
        let mut asked = Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()));
        std::thread::sleep(Duration::from_millis(random.random_range(0..700)));
        let asleep = holder();
        owner.daemon().signal("STOP");
        other.start_without_waiting();
        wait::until("the other to hold the slot", 60, || !["", asleep.as_str()].contains(&holder().as_str()));
        other.run(&["backup", "shop"]);
        ledger.wait_for(20);
        let taken = backups(other);
        owner.daemon().signal("CONT");
        other.wait_stored(&primary, primary.flush_lsn());
        // Awake, it comes to an end with what it was asked for.
        asked.wait(90);
        owner.stop();
        let appeared: Vec<String> = backups(other).into_iter().filter(|id| !taken.contains(id)).collect();
        assert!(appeared.is_empty(), "round {round}: {appeared:?} appeared when the sleeper woke up");
        hosts.swap(0, 1);
    }
    ledger.stop();
    let host = &hosts[0];
    host.wait_stored(&primary, primary.flush_lsn());
    host.run(&["verify", "shop", "--read-data"]);
    let restored = restore(host, "latest", &primary.scratch().join("latest"));
    ledger.check_holds(&restored, &ledger.acknowledged());
}
