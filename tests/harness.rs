//! The harness itself: what the other tests believe of it.

use futures::StreamExt;
use object_store::{ObjectStore, ObjectStoreExt, path::Path};

use crate::common::ledger::{self, Ledger};
use crate::common::minio::Minio;
use crate::common::postgres::{Cluster, Stop};
use crate::common::proxy::s3::{Fault, Rule, S3Proxy};
use crate::common::proxy::tcp::TcpProxy;
use crate::common::{MAJORS, NEWEST, compare, logs, wait};

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

#[tokio::test(flavor = "multi_thread")]
async fn each_fault_of_the_store_shows_at_the_client() {
    let bucket = Minio::shared();
    let proxy = S3Proxy::start(&bucket);
    let direct = bucket.client();
    let client = proxy.bucket().client();
    let body = vec![7u8; 100_000];
    let put = async |key: &str| client.put(&Path::from(key), body.clone().into()).await;
    let get = async |key: &str| match client.get(&Path::from(key)).await {
        Ok(answer) => answer.bytes().await.map(|b| b.to_vec()),
        Err(e) => Err(e),
    };
    put("plain").await.unwrap();
    assert_eq!(get("plain").await.unwrap(), body);

    proxy.add(Rule::new(Fault::Lose).on("PUT").key("lost"));
    put("lost").await.unwrap();
    assert!(direct.head(&Path::from("lost")).await.is_err());
    proxy.add(Rule::new(Fault::SLOW_DOWN).on("PUT").key("slow").times(1));
    put("slow").await.unwrap();
    proxy.add(Rule::new(Fault::CutReply).on("PUT").key("reply").times(1));
    let _ = put("reply").await;
    assert_eq!(direct.head(&Path::from("reply")).await.unwrap().size, 100_000);
    proxy.add(Rule::new(Fault::FlipBit).on("GET").key("slow"));
    assert_ne!(get("slow").await.unwrap(), body);
    proxy.add(Rule::new(Fault::Truncate).on("GET").key("reply"));
    assert!(get("reply").await.map_or(true, |b| b.len() == 50_000));
    proxy.add(Rule::new(Fault::SlowDrip(30_000, std::time::Duration::from_millis(5))).on("GET").key("plain").times(1));
    assert_eq!(get("plain").await.unwrap(), body);
    proxy.add(Rule::new(Fault::CutBody).on("GET").key("plain"));
    let _ = get("plain").await;

    let list = async || -> usize { client.list(None).map(|o| o.unwrap()).count().await };
    assert_eq!(list().await, 3);
    proxy.add(Rule::new(Fault::StaleList(std::time::Duration::from_secs(60))).on("LIST").times(1));
    assert_eq!(list().await, 0);
    assert_eq!(list().await, 3);
    proxy.add(Rule::new(Fault::DENIED).on("DELETE"));
    assert!(client.delete(&Path::from("plain")).await.is_err());
    assert!(direct.head(&Path::from("plain")).await.is_ok());
    proxy.down(true);
    assert!(get("plain").await.is_err());
    assert!(proxy.faults() >= 9, "{:?}", proxy.seen());
}

#[test]
fn a_connection_to_postgresql_is_cut_and_held() {
    let cluster = Cluster::start_new(NEWEST);
    let proxy = TcpProxy::start(&cluster);
    let psql = |sql: &str| {
        let mut command = cluster.tool("psql");
        let done =
            command.args(["-XAtq", "-c", sql]).env("PGHOST", "127.0.0.1").env("PGPORT", proxy.port().to_string());
        done.output().unwrap().status.success()
    };
    assert!(psql("SELECT 1"));
    proxy.cut_after(10_000);
    assert!(!psql("SELECT repeat('x', 100000)"));
    assert!(psql("SELECT 1"));
    proxy.pause(true);
    std::thread::scope(|scope| {
        let held = scope.spawn(|| psql("SELECT 1"));
        assert!(wait::stays(200, || !held.is_finished()));
        proxy.pause(false);
        assert!(held.join().unwrap());
    });
    proxy.refuse(true);
    assert!(!psql("SELECT 1"));
}
