//! The harness itself: what the other tests believe of it.

use object_store::{ObjectStoreExt, path::Path};

use crate::common::ledger::{self, Ledger};
use crate::common::minio::Minio;
use crate::common::postgres::{Cluster, Stop};
use crate::common::{MAJORS, NEWEST, compare, logs};

#[test]
fn a_cluster_of_each_major_starts_crashes_and_comes_back() {
    for major in MAJORS {
        let mut cluster = Cluster::start_new(major);
        assert!(cluster.query("SHOW server_version").starts_with(&major.to_string()));
        cluster.query("CREATE TABLE t AS SELECT generate_series(1, 10) n");
        cluster.kill9();
        cluster.start();
        assert_eq!(cluster.query("SELECT count(*) FROM t"), "10");
        cluster.stop(Stop::Fast);
        assert!(!cluster.is_running());
    }
}

#[test]
fn a_standby_streams_and_is_promoted() {
    for major in [14, NEWEST] {
        let primary = Cluster::start_new(major);
        let standby = primary.standby();
        primary.query("CREATE TABLE t AS SELECT generate_series(1, 10) n");
        standby.wait_replayed(primary.flush_lsn());
        standby.promote();
        assert_eq!(standby.query("SELECT count(*) FROM t"), "10");
        assert_eq!(standby.timeline(), 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_keeps_objects_and_can_be_stopped() {
    let shared = Minio::shared().client();
    shared.put(&Path::from("a/b"), "x".into()).await.unwrap();
    assert_eq!(shared.get(&Path::from("a/b")).await.unwrap().bytes().await.unwrap(), "x");

    let mut own = Minio::own_tls();
    let client = own.bucket().client();
    client.put(&Path::from("a"), "x".into()).await.unwrap();
    own.stop();
    assert!(client.get(&Path::from("a")).await.is_err());
    own.start();
    assert_eq!(client.get(&Path::from("a")).await.unwrap().bytes().await.unwrap(), "x");
}

#[test]
fn the_ledger_knows_which_commits_lie_before_a_point() {
    for major in MAJORS {
        let mut primary = ledger::keep_wal(Cluster::builder(major)).start();
        let standby = primary.standby();
        let mut ledger = Ledger::start(&primary, 4);
        ledger.wait_for(60);
        primary.kill9();
        primary.start();
        ledger.wait_for(30);
        ledger.stop();
        let end = primary.flush_lsn();
        standby.wait_replayed(end);
        let expected = ledger.expected_at(&primary, end);
        assert!(ledger.acknowledged().is_subset(&expected));
        ledger.check(&standby, &expected);
        ledger.check_none_lost(&standby);
        compare::assert_same(&compare::fingerprint(&primary), &compare::fingerprint(&standby));

        let middle = ledger.entries()[30].acknowledged.clone().unwrap().lsn;
        let earlier = ledger.expected_at(&primary, middle);
        assert!(!earlier.is_empty() && earlier.len() < expected.len());
        let check = std::panic::AssertUnwindSafe(|| ledger.check(&standby, &earlier));
        assert!(std::panic::catch_unwind(check).is_err(), "extra commits are seen");
        if major == NEWEST {
            compare::check_sound(&mut primary);
        }
    }
}

#[test]
fn warnings_are_found_in_both_forms_of_the_log() {
    let log = "2026-11-23T08:00:00Z  WARN x: slow\n<4>WARN pgrecall: y\n{\"level\":\"ERROR\"}\n INFO no WARN here\n";
    assert_eq!(logs::unannounced(log, &["slow".to_owned()]).len(), 1);
    assert_eq!(logs::unannounced(log, &[]).len(), 2);
}
