//! The two days for which all of this exists: an outage under load, and the loss of the whole host.

use std::collections::BTreeSet;
use std::time::Duration;

use chrono::NaiveDateTime;
use pgrecall::pg::Lsn;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::common::ledger::{self, Ledger, TransactionEnd};
use crate::common::minio::Minio;
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::Cluster;
use crate::common::{NEWEST, wait};
use crate::crash::restore;

const TIME: &str = "%Y-%m-%d %H:%M:%S%.6f";

fn seed() -> u64 {
    let seed = std::env::var("PGRECALL_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(std::process::id().into());
    println!("PGRECALL_SEED={seed}");
    seed
}

/// Any moment between two, as pg_waldump and `--to` write it, without the zone.
fn moment_between(random: &mut StdRng, from: &str, to: &str) -> String {
    let micros = |t: &str| NaiveDateTime::parse_from_str(t, TIME).expect(t).and_utc().timestamp_micros();
    let chosen = chrono::DateTime::from_timestamp_micros(random.random_range(micros(from)..micros(to))).unwrap();
    chosen.format(TIME).to_string()
}

/// The rule: replay stops before the first commit or abort record of a later time, behind the backup.
fn stop_of(ends: &[TransactionEnd], backup: Lsn, time: &str) -> Lsn {
    ends.iter().find(|e| e.lsn > backup && e.time.as_str() > time).map_or(Lsn::MAX, |e| e.lsn)
}

fn stop_of_first_backup(host: &Pgrecall) -> Lsn {
    let backups = host.json(&["backups", "shop"]);
    backups["backups"][0]["stop_lsn"].as_str().expect("a backup").parse().unwrap()
}

#[test]
fn a_killed_daemon_and_a_minute_without_the_store_leave_no_gap_and_every_time_restores_exactly() {
    let mut random = StdRng::seed_from_u64(seed());
    let primary = ledger::keep_wal(Cluster::builder(NEWEST)).start();
    let mut minio = Minio::own();
    let store = Store::Bucket(minio.bucket(), "outage".to_owned());
    let mut host = Pgrecall::new(&[Environment::new("shop", store).cluster(&primary)]);
    // The store is away for a minute: that is said, and is not the question here.
    host.announce("");
    host.start(&[&primary]);
    host.wait_for_backup("shop");
    let mut ledger = Ledger::start_with_pause(&primary, 4, Duration::from_millis(5));
    ledger.wait_for(200);

    host.kill9();
    minio.stop();
    ledger.wait_for(100);
    host.start_without_waiting();
    std::thread::sleep(Duration::from_secs(60));
    minio.start();
    ledger.wait_for(200);
    ledger.stop();
    let end = primary.flush_lsn();
    // A commit of a later time shows where the restores to the last times end.
    primary.query("CREATE TABLE later ()");
    host.wait_stored(&primary, end);

    let status = host.json(&["status", "shop"]);
    let store = &status["environments"][0]["store"];
    assert_eq!(store["window"].as_array().map(Vec::len), Some(1), "one interval, no gap: {status}");
    assert_eq!(store["gaps"].as_array().map(Vec::len), Some(0), "{status}");
    let shown = host.run(&["status", "shop"]);
    assert!(shown.contains("without a gap"), "{shown}");
    host.run(&["verify", "shop"]);

    let backup = stop_of_first_backup(&host);
    let ends = ledger::transaction_ends(&primary, &primary.data().join("pg_wal"));
    let mut times = ends.iter().filter(|e| e.lsn > backup).map(|e| e.time.as_str());
    let (first, last) = (times.next().expect("a commit"), times.next_back().expect("another"));
    for number in 1..=5 {
        let time = moment_between(&mut random, first, last);
        let restored = restore(&host, &format!("{time}+00:00"), &primary.scratch().join(format!("restored-{number}")));
        let expected = ledger.expected(&ends, stop_of(&ends, backup, &time));
        ledger.check(&restored, &expected);
        println!("{time}: exactly {} of {} commits", expected.len(), ledger.acknowledged().len());
    }
}

#[test]
fn no_synchronous_commit_is_lost_with_the_host_and_archiving_goes_on_from_the_restored_server() {
    let mut random = StdRng::seed_from_u64(seed());
    let mut primary = ledger::keep_wal(Cluster::builder(NEWEST)).start();
    let minio = Minio::own();
    let store = Store::Bucket(minio.bucket(), "loss".to_owned());
    let shop = Environment::new("shop", store).key("rpo", "\"0s\"");
    let mut host = Pgrecall::new(&[shop.clone().cluster(&primary)]);
    host.announce("");
    host.start(&[&primary]);
    host.wait_for_backup("shop");
    primary.set("synchronous_standby_names", "pgrecall");
    primary.reload();
    wait::until("commits to wait for the store", 30, || {
        primary.query("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == "1"
    });
    let mut ledger = Ledger::start(&primary, 8);
    ledger.wait_for(random.random_range(200..1000));

    // The host is gone in one instant: what its clients were told, the bucket must hold.
    primary.kill9();
    host.kill9();
    let acknowledged = ledger.acknowledged();
    let lost = primary.scratch().join("lost");
    std::fs::rename(primary.data(), &lost).expect("take the data directory away");

    let mut fresh = Pgrecall::new(&[shop.clone().store_only()]);
    fresh.announce("");
    let backup = stop_of_first_backup(&fresh);
    let into = fresh.scratch().join("restored");
    let restored = restore(&fresh, "latest", &into);
    ledger.check_holds(&restored, &acknowledged);
    let before = ledger::numbers(&restored);
    let old_ends = ledger::transaction_ends(&restored, &lost.join("pg_wal"));
    let restored_ends =
        old_ends.iter().filter(|e| !ledger.expected(std::slice::from_ref(e), Lsn::MAX).is_disjoint(&before));
    let fork = Lsn(restored_ends.map(|e| e.lsn).max().expect("a commit").0 + 1);
    assert_eq!(ledger.expected(&old_ends, fork), before, "a restore holds the commits up to one point of the WAL");
    println!("{} acknowledged, {} restored", acknowledged.len(), before.len());

    // The restored server is the new primary, and the same repository goes on.
    assert_eq!(restored.timeline(), 2);
    fresh.configure(&[shop.cluster(&restored)]);
    fresh.start(&[&restored]);
    for (name, value) in [("wal_keep_size", "8GB"), ("wal_recycle", "off")] {
        restored.query(&format!("ALTER SYSTEM SET {name} = '{value}'"));
    }
    restored.reload();
    ledger.retarget(&restored);
    ledger.wait_for(300);
    ledger.stop();
    let end = restored.flush_lsn();
    restored.query("CREATE TABLE later ()");
    fresh.wait_stored(&restored, end);
    let new_ends: Vec<TransactionEnd> = ledger::transaction_ends(&restored, &restored.data().join("pg_wal"))
        .into_iter()
        .filter(|e| e.lsn >= fork)
        .collect();

    let time = moment_between(&mut random, &time_behind(&old_ends, backup), &old_ends.last().unwrap().time);
    let expected = ledger.expected(&old_ends, stop_of(&old_ends, backup, &time).min(fork));
    ledger.check(&restore(&fresh, &format!("{time}+00:00"), &fresh.scratch().join("before")), &expected);
    println!("before the loss, {time}: exactly {} commits", expected.len());

    let time = moment_between(&mut random, &new_ends[0].time, &new_ends.last().unwrap().time);
    let mut expected: BTreeSet<u64> = ledger.expected(&new_ends, stop_of(&new_ends, backup, &time));
    expected.extend(&before);
    ledger.check(&restore(&fresh, &format!("{time}+00:00"), &fresh.scratch().join("after")), &expected);
    println!("after the loss, {time}: exactly {} commits", expected.len());
}

fn time_behind(ends: &[TransactionEnd], backup: Lsn) -> String {
    ends.iter().find(|e| e.lsn > backup).expect("a commit behind the backup").time.clone()
}
