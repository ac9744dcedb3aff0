//! The archiver behind an evil store: what must be hidden is hidden, what a person must cure is named, nothing is lost.

use std::time::Duration;

use pgrecall::archive::{Settings, State};
use pgrecall::pg::Lsn;
use pgrecall::repository::location::{Credentials, Location, S3Location};
use pgrecall::repository::store::{Store, StoreSettings};
use pgrecall::repository::{Repository, identity};
use pgrecall::util::secret::Secret;
use rand::RngExt;

use crate::archive::{Running, assert_equal_to_server, keep, stored, write};
use crate::common::minio::{Bucket, Minio};
use crate::common::pgrecall::{Environment, Pgrecall, Store as Place};
use crate::common::postgres::{Cluster, Stop};
use crate::common::proxy::s3::{Fault, Rule, S3Proxy};
use crate::common::{NEWEST, chance};
use crate::replication::config;

/// A bucket as the program reaches it.
pub fn location(bucket: &Bucket) -> Location {
    Location::S3(Box::new(S3Location {
        bucket: bucket.name.clone(),
        prefix: "backups".into(),
        endpoint: Some(bucket.endpoint.clone()),
        region: Some(bucket.region.clone()),
        path_style: true,
        allow_http: true,
        ca_file: bucket.ca_file.clone(),
        credentials: Some(Credentials {
            access_key_id: bucket.access_key.clone(),
            secret_access_key: Secret::new(bucket.secret_key.clone()),
            session_token: None,
        }),
        checksum: true,
    }))
}

pub async fn repository(bucket: &Bucket) -> Repository {
    let settings = StoreSettings { attempt_timeout: Duration::from_secs(2), ..StoreSettings::default() };
    let store = Store::open(&location(bucket), "shop", settings).expect("open");
    Repository::open_or_create(store, 1, None).await.expect("open or create")
}

struct Scene {
    cluster: Cluster,
    proxy: S3Proxy,
    repository: Repository,
    running: Running,
}

impl Scene {
    async fn new() -> Scene {
        let proxy = S3Proxy::start(&Minio::shared());
        let (cluster, repository) = (keep(NEWEST), repository(&proxy.bucket()).await);
        let settings = Settings { coverage_interval: Duration::from_secs(1), ..Settings::default() };
        let running = Running::start_with(&repository, config(&cluster), settings).await;
        let end = write(&cluster, 10);
        running.wait_stored(end).await;
        Scene { cluster, proxy, repository, running }
    }

    /// Everything that was written so far is stored, and stored right.
    async fn all_is_stored(&self, end: Lsn) {
        self.running.wait_stored(end).await;
        let compared = assert_equal_to_server(&self.cluster, 1, &stored(&self.repository, 1).await);
        assert!(compared > 0);
        assert_eq!(self.running.status.borrow().gaps_found, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_store_does_on_bad_days_is_hidden() {
    let scene = Scene::new().await;
    let faults = [
        Fault::Delay(Duration::from_millis(500)),
        Fault::SlowDrip(40, Duration::from_millis(5)),
        Fault::TOO_MANY,
        Fault::SLOW_DOWN,
        Fault::INTERNAL,
        Fault::CutRequest,
        Fault::CutReply,
        Fault::CutBody,
        Fault::Hang,
        Fault::RefuseAfterDone(500, "InternalError"),
        Fault::ErrorInOk,
        Fault::CONDITION_FAILED,
    ];
    for fault in faults {
        let name = format!("{fault:?}");
        scene.proxy.add(Rule::new(fault).on("PUT").times(3));
        write(&scene.cluster, 30_000);
        scene.cluster.switch_wal();
        let end = write(&scene.cluster, 100);
        println!("{name}");
        scene.all_is_stored(end).await;
        scene.proxy.clear();
    }
    assert!(scene.proxy.faults() >= 12, "the faults happened");
    scene.running.stop().await;
}

/// Any fault, on any kind of request, once or several times, beside restarts. `PGRECALL_SEED` and `PGRECALL_ROUNDS` choose which and
/// how many.
#[tokio::test(flavor = "multi_thread")]
async fn no_mix_of_bad_days_loses_anything() {
    let (rounds, mut random) = chance::rounds(12);
    let faults = [
        Fault::Delay(Duration::from_millis(300)),
        Fault::SlowDrip(40, Duration::from_millis(5)),
        Fault::TOO_MANY,
        Fault::SLOW_DOWN,
        Fault::INTERNAL,
        Fault::NOT_FOUND,
        Fault::SKEWED_CLOCK,
        Fault::EXPIRED_TOKEN,
        Fault::DENIED,
        Fault::CONDITION_FAILED,
        Fault::CutRequest,
        Fault::CutReply,
        Fault::CutBody,
        Fault::RefuseAfterDone(500, "InternalError"),
        Fault::ErrorInOk,
        Fault::Truncate,
        Fault::FlipBit,
        Fault::WrongEtag,
    ];
    let mut scene = Scene::new().await;
    for round in 1..=rounds {
        if random.random_range(0..3) == 0 {
            let next = Running::start_with(&scene.repository, config(&scene.cluster), Settings::default()).await;
            std::mem::replace(&mut scene.running, next).kill().await;
        }
        for _ in 0..random.random_range(1..4) {
            let fault = faults[random.random_range(0..faults.len())].clone();
            let operation = ["PUT", "GET", "HEAD", "LIST"][random.random_range(0..4)];
            let rule = Rule::new(fault).on(operation).skip(random.random_range(0..4)).times(random.random_range(1..6));
            println!("round {round}: {rule:?}");
            scene.proxy.add(rule);
        }
        write(&scene.cluster, random.random_range(100..40_000));
        if random.random_range(0..2) == 0 {
            scene.cluster.switch_wal();
        }
        let end = write(&scene.cluster, 100);
        scene.running.wait("what arrived", |s| s.received_lsn >= end || !matches!(s.state, State::Streaming)).await;
        scene.proxy.clear();
        scene.all_is_stored(end).await;
    }
    scene.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_person_must_cure_is_named_and_then_archiving_goes_on() {
    let scene = Scene::new().await;
    let faults = [
        (Fault::SKEWED_CLOCK, "RequestTimeTooSkewed"),
        (Fault::EXPIRED_TOKEN, "ExpiredToken"),
        (Fault::RefuseChecksum, "set `checksum = false`"),
        (Fault::DENIED, "AccessDenied"),
        (Fault::NO_BUCKET, "NoSuchBucket"),
    ];
    for (fault, named) in faults {
        scene.proxy.add(Rule::new(fault).on("PUT"));
        let end = write(&scene.cluster, 1_000);
        let what = format!("the state names {named}");
        scene.running.wait(&what, |s| matches!(&s.state, State::StoreFailing(text) if text.contains(named))).await;
        let reported = scene.running.status.borrow().stored.expect("streaming").end_lsn;
        assert!(reported < end, "what is not stored is not reported");
        scene.proxy.clear();
        scene.all_is_stored(end).await;
    }
    scene.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_the_store_lost_is_noticed_and_made_again() {
    let scene = Scene::new().await;
    scene.proxy.add(Rule::new(Fault::Lose).on("PUT").key(".wal").times(1));
    write(&scene.cluster, 1_000);
    scene.cluster.switch_wal();
    let end = write(&scene.cluster, 100);
    scene.all_is_stored(end).await;
    assert_eq!(scene.proxy.faults(), 1);
    let segments = stored(&scene.repository, 1).await;
    assert!(segments.values().any(|b| b.len() == 16 << 20), "the segment is there");
    scene.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_stops_fast_although_the_store_is_down_and_nothing_is_lost() {
    let mut scene = Scene::new().await;
    scene.proxy.down(true);
    let end = write(&scene.cluster, 1_000);
    scene.running.wait("the store fails", |s| matches!(s.state, State::StoreFailing(_))).await;
    let mut cluster = scene.cluster;
    cluster = tokio::task::spawn_blocking(move || {
        cluster.stop(Stop::Fast);
        cluster
    })
    .await
    .expect("it stops");
    let reported = scene.running.status.borrow().stored.expect("streamed").end_lsn;
    assert!(reported < end);
    cluster.start();
    scene.proxy.down(false);
    scene.cluster = cluster;
    let end = write(&scene.cluster, 100);
    scene.all_is_stored(end).await;
    scene.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_never_answers_is_noticed_before_its_time_limits() {
    let proxy = S3Proxy::start(&Minio::shared());
    let store = Store::open(&location(&proxy.bucket()), "shop", StoreSettings::default()).expect("open");
    let repository = Repository::open_or_create(store, 1, None).await.expect("open or create");
    let cluster = keep(NEWEST);
    let running = Running::start_with(&repository, config(&cluster), Settings::default()).await;
    let end = write(&cluster, 10);
    running.wait_stored(end).await;
    proxy.add(Rule::new(Fault::Hang).on("PUT"));
    let begin = std::time::Instant::now();
    let end = write(&cluster, 1_000);
    running.wait("the store fails", |s| matches!(s.state, State::StoreFailing(_))).await;
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    proxy.clear();
    running.wait_stored(end).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_for_a_while_leaves_the_wal_with_the_server() {
    let scene = Scene::new().await;
    scene.proxy.down(true);
    let mut last = Lsn::ZERO;
    for _ in 0..4 {
        last = write(&scene.cluster, 40_000);
        let reported = scene.running.status.borrow().stored.expect("streaming").end_lsn;
        let slot = scene.cluster.lsn("SELECT restart_lsn FROM pg_replication_slots");
        assert!(slot <= reported.saturating_add(1), "the slot {slot} is never ahead of what is stored, {reported}");
    }
    scene.proxy.down(false);
    scene.all_is_stored(last).await;
    scene.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_returned_in_synchronous_mode_is_in_the_store() {
    let scene = Scene::new().await;
    scene.cluster.query("ALTER SYSTEM SET synchronous_standby_names = 'archiver'");
    scene.cluster.query("SELECT pg_reload_conf()");
    scene.running.wait("it is synchronous", |s| s.synchronous).await;
    for round in 0..20 {
        let end =
            scene.cluster.lsn(&format!("INSERT INTO t VALUES ({round}, 'x'); SELECT pg_current_wal_insert_lsn()"));
        let stored = scene.cluster.lsn("SELECT flush_lsn FROM pg_stat_replication WHERE application_name = 'archiver'");
        assert!(stored >= end, "{stored} is acknowledged, the commit ends at {end}");
    }
    let known = identity::current(&scene.repository).await.expect("identity").expect("one");
    assert_eq!(known.identity.system_id.to_string(), scene.cluster.system_identifier());
    scene.running.stop().await;
}

/// What is read: what passes is hidden, what stays is named, and nothing wrong is ever given out.
#[test]
fn what_a_store_does_to_reads_is_hidden_once_and_named_when_it_stays() {
    let (cluster, proxy) = (Cluster::start_new(NEWEST), S3Proxy::start(&Minio::shared()));
    let environment = Environment::new("shop", Place::Bucket(proxy.bucket(), "reads".into())).cluster(&cluster);
    let mut host = Pgrecall::new(&[environment]);
    host.start(&[&cluster]);
    host.wait_for_backup("shop");
    cluster.query("CREATE TABLE t AS SELECT 1 AS n");
    cluster.switch_wal();
    host.wait_stored(&cluster, cluster.flush_lsn());
    host.stop();
    let verify = ["verify", "shop", "--read-data"];
    host.run(&verify);
    let passing = [
        Fault::Truncate,
        Fault::FlipBit,
        Fault::WrongEtag,
        Fault::NOT_FOUND,
        Fault::CutBody,
        Fault::CutReply,
        Fault::SLOW_DOWN,
        Fault::TOO_MANY,
        Fault::Delay(Duration::from_millis(300)),
    ];
    let kinds = ["format.json", "identity/", ".intent", ".backup", ".pack", ".wal", "coverage/"];
    for fault in passing {
        for kind in kinds {
            let before = proxy.faults();
            proxy.add(Rule::new(fault.clone()).on("GET").key(kind).times(1));
            let answer = host.try_run(&verify);
            assert_eq!(answer.status, 0, "{fault:?} of {kind}: {answer:?}");
            assert!(answer.stdout.ends_with("sound\n"), "{fault:?} of {kind}: {answer:?}");
            assert_eq!(proxy.faults(), before + 1, "{fault:?} of {kind} happened");
            proxy.clear();
        }
    }
    for fault in [Fault::Truncate, Fault::FlipBit] {
        for kind in kinds {
            proxy.add(Rule::new(fault.clone()).on("GET").key(kind));
            let answer = host.try_run(&verify);
            let said = format!("{}{}", answer.stdout, answer.stderr);
            assert!(answer.status != 0 && said.contains(kind), "{fault:?} of {kind}: {said}");
            proxy.clear();
        }
    }
    for (fault, named) in [(Fault::DENIED, "AccessDenied"), (Fault::NO_BUCKET, "NoSuchBucket")] {
        for operation in ["GET", "LIST"] {
            proxy.add(Rule::new(fault.clone()).on(operation));
            let answer = host.refused(&["plan", "shop", "--to", "latest"]);
            assert!(answer.stderr.contains(named), "{operation}: {answer:?}");
            proxy.clear();
        }
    }
}

/// A listing that lacks what was just stored leads to nothing: neither to a gap nor to a server that is not followed.
#[tokio::test(flavor = "multi_thread")]
async fn a_stale_listing_is_not_believed() {
    let mut scene = Scene::new().await;
    scene.proxy.add(Rule::new(Fault::StaleList(Duration::from_secs(5))).on("LIST"));
    for _ in 0..3 {
        write(&scene.cluster, 5_000);
        let end = write(&scene.cluster, 100);
        scene.running.wait_stored(end).await;
        scene.running.stop().await;
        let settings = Settings { coverage_interval: Duration::from_secs(1), ..Settings::default() };
        scene.running = Running::start_with(&scene.repository, config(&scene.cluster), settings).await;
    }
    assert!(scene.proxy.faults() > 3);
    scene.proxy.clear();
    let end = write(&scene.cluster, 100);
    scene.all_is_stored(end).await;
    scene.running.stop().await;
}

/// The daemon tries out what the store can do: what it does not need is said, without what it needs nothing is begun.
#[test]
fn what_a_store_cannot_do_is_said_at_the_start() {
    let cluster = Cluster::builder(NEWEST).setting("max_slot_wal_keep_size", "-1").start();
    let proxy = S3Proxy::start(&Minio::shared());
    let environment = Environment::new("shop", Place::Bucket(proxy.bucket(), "abilities".into())).cluster(&cluster);
    let mut host = Pgrecall::new(&[environment]);
    for text in ["does not delete", "max_slot_wal_keep_size is -1", "reads no ranges"] {
        host.announce(text);
    }
    proxy.add(Rule::new(Fault::DENIED).on("DELETE"));
    host.start(&[&cluster]);
    host.wait_logged("the store does not delete", 30);
    host.wait_logged("ALTER SYSTEM SET max_slot_wal_keep_size = '", 30);
    host.wait_for_backup("shop");
    host.stop();
    proxy.clear();
    proxy.add(Rule::new(Fault::DENIED).on("GET").key("/probe/"));
    host.start_without_waiting();
    host.wait_logged("reads no ranges of objects", 30);
    proxy.clear();
    // It begins by itself when the store can do it after all.
    host.wait_logged("delete: true", 60);
    host.stop();
}
