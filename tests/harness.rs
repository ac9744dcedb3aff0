//! The harness itself: what the other tests believe of it.

use object_store::{ObjectStoreExt, path::Path};

use crate::common::minio::Minio;
use crate::common::postgres::{Cluster, Stop};
use crate::common::{MAJORS, NEWEST};

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
