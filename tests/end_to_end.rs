//! From a running server to a restored one: archive, backup, target, plan, restore, compare.

use std::path::PathBuf;

use pgrecall::archive::Budget;
use pgrecall::archive::indexing::catch_up;
use pgrecall::archive::uploader::Destination;
use pgrecall::backup::{BackupSettings, Progress as BackupProgress};
use pgrecall::error::Code;
use pgrecall::lineage::moment::{Request, Target};
use pgrecall::operations::backup::BackupJob;
use pgrecall::operations::locate;
use pgrecall::operations::restore::{Check, Observer, RestoreReport, RestoreRequest, execute};
use pgrecall::pg::{TimelineId, Timestamp};
use pgrecall::repository::generation::{self, Lease};
use pgrecall::repository::{Repository, identity, index};
use pgrecall::restore::recovery::Finish;
use pgrecall::restore::target::TablespacePlaces;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::archive::{Running, keep, repository, write};
use crate::common::guard::Directory;
use crate::common::ledger::Ledger;
use crate::common::places::pg_bin;
use crate::common::postgres::Cluster;
use crate::common::{MAJORS, NEWEST};
use crate::replication::config;

struct Quiet;

impl Observer for Quiet {}

/// A server whose WAL is archived into a directory.
pub struct World {
    pub cluster: Cluster,
    pub dir: Directory,
    pub repository: Repository,
    pub running: Running,
}

impl World {
    pub async fn new(cluster: Cluster) -> World {
        let dir = Directory::new("restore");
        let repository = repository(&dir.join("repo")).await;
        let running = Running::start(&cluster, &repository).await;
        World { cluster, dir, repository, running }
    }

    pub async fn backup(&self) -> String {
        let lease = Lease { host: "h".into(), pid: 1, started_at: Timestamp(0), version: "t".into(), store: None };
        let generation = generation::take(&self.repository, &lease).await.expect("generation");
        let job = BackupJob {
            repository: self.repository.clone(),
            generation,
            connect: config(&self.cluster),
            archive: self.running.status.clone(),
            settings: BackupSettings::default(),
            from_standby: false,
            standby_wait_max: pgrecall::operations::backup::STANDBY_WAIT_MAX,
        };
        let progress = watch::Sender::new(BackupProgress::default());
        job.run(progress, CancellationToken::new()).await.expect("a backup").commit.id.to_string()
    }

    pub async fn plan(
        &self,
        target: &str,
        exclusive: bool,
    ) -> Result<pgrecall::restore::Plan, pgrecall::error::Failure> {
        let known = identity::current(&self.repository).await.expect("identity").expect("one");
        let request = Request { target: target.parse::<Target>().expect("a target"), exclusive, timeline: None };
        locate::plan(&self.repository, &known, "shop", &request).await.map(|(_, plan, _)| plan)
    }

    pub async fn restore(&self, target: &str, exclusive: bool, into: &str) -> (Cluster, RestoreReport) {
        let plan = self.plan(target, exclusive).await.unwrap_or_else(|e| panic!("{target}: {e}"));
        self.restore_plan(plan, into).await
    }

    pub async fn restore_plan(&self, plan: pgrecall::restore::Plan, into: &str) -> (Cluster, RestoreReport) {
        let request = RestoreRequest {
            into: self.dir.join(into),
            finish: Finish::Promote,
            check: Check::Quick,
            with_config: false,
            no_start: false,
            tablespaces: TablespacePlaces::default(),
            wal_get: Vec::new(),
            postgres_bin_dirs: vec![pg_bin(self.cluster.major())],
            user: "postgres".into(),
            socket_directory: None,
        };
        let report = execute(&self.repository, plan, &request, &mut Quiet, CancellationToken::new()).await;
        let report = report.unwrap_or_else(|e| panic!("{e}; {:?}", e.hint));
        stop(report.pid.expect("it runs"));
        let mut copy = Cluster::adopt(self.cluster.major(), &request.into);
        copy.start();
        (copy, report)
    }
}

fn stop(pid: i32) {
    crate::common::guard::signal(u32::try_from(pid).expect("a process id"), "INT");
    crate::common::wait::until("the restored server stops", 60, || !PathBuf::from(format!("/proc/{pid}")).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_deleted_by_accident_are_back_in_a_restore_to_the_moment_before() {
    for major in MAJORS {
        let world = World::new(keep(major)).await;
        write(&world.cluster, 1_000);
        world.backup().await;
        write(&world.cluster, 500);
        let before = world.cluster.query("SELECT clock_timestamp()");
        let target: String = world.cluster.query(&format!(
            "SELECT to_char('{before}'::timestamptz AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || 'Z'"
        ));
        world.cluster.query("DELETE FROM t");
        let end = world.cluster.flush_lsn();
        world.running.wait_stored(end).await;
        let (copy, report) = world.restore(&target, false, "copy").await;
        assert_eq!(copy.query("SELECT count(*) FROM t"), "1500", "{major}: {report:?}");
        assert_eq!(world.cluster.query("SELECT count(*) FROM t"), "0");
        world.running.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_holds_exactly_the_commits_before_its_target() {
    let cluster =
        crate::common::ledger::keep_wal(Cluster::builder(NEWEST).setting("max_prepared_transactions", "20")).start();
    let world = World::new(cluster).await;
    let mut ledger = Ledger::start(&world.cluster, 4);
    ledger.wait_for(50);
    world.backup().await;
    ledger.wait_for(300);
    ledger.stop();
    let end = world.cluster.flush_lsn();
    world.running.wait_stored(end).await;
    let (copy, report) = world.restore("latest", false, "latest").await;
    ledger.check(&copy, &ledger.expected_at(&world.cluster, end));
    ledger.check_none_lost(&copy);
    assert!(report.reached_lsn.is_some());
    drop(copy);
    let entries: Vec<_> = ledger.entries().into_iter().filter_map(|e| e.acknowledged).collect();
    let middle = entries[entries.len() * 3 / 4].lsn;
    let plan = world.plan(&format!("lsn:{middle}"), true).await.expect("reachable");
    let exact = plan.stop.lsn;
    let (copy, _) = world.restore_plan(plan, "middle").await;
    ledger.check(&copy, &ledger.expected_at(&world.cluster, exact));
    world.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unreachable_target_is_refused_before_anything_is_written() {
    let world = World::new(keep(NEWEST)).await;
    write(&world.cluster, 10);
    world.backup().await;
    let end = write(&world.cluster, 10);
    world.running.wait_stored(end).await;
    for target in
        ["2001-01-01 00:00Z", "2199-01-01 00:00Z", "lsn:FF/0", "xid:4000000000", "name:nowhere", "lsn:0/1000028"]
    {
        let failure = world.plan(target, false).await.expect_err(target);
        assert_eq!(failure.code, Code::UnreachableTarget, "{target}: {failure}");
    }
    assert!(!world.dir.join("copy").exists());
    world.running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_target_leads_to_its_moment() {
    let world = World::new(keep(NEWEST)).await;
    write(&world.cluster, 10);
    let backup = world.backup().await;
    let count = |copy: &Cluster| copy.query("SELECT count(*) FROM t");
    let xid = world
        .cluster
        .query("BEGIN; INSERT INTO t VALUES (1, 'x'); SELECT pg_current_xact_id(); COMMIT")
        .trim()
        .to_owned();
    world.cluster.query("SELECT pg_create_restore_point('before lunch')");
    world.cluster.query("INSERT INTO t VALUES (2, 'y')");
    let end = world.cluster.flush_lsn();
    world.running.wait_stored(end).await;
    let cases = [
        ("backup", format!("backup:{backup}"), false, "10"),
        ("xid", format!("xid:{xid}"), false, "11"),
        ("before", format!("xid:{xid}"), true, "10"),
        ("name", "name:before lunch".to_owned(), false, "11"),
        ("latest", "latest".to_owned(), false, "12"),
    ];
    for (into, target, exclusive, expected) in cases {
        let (copy, _) = world.restore(&target, exclusive, into).await;
        assert_eq!(count(&copy), expected, "{target} exclusive {exclusive}");
    }
    world.running.stop().await;
}

/// Real WAL: records cross the borders of segments, and several transactions end in each.
#[tokio::test(flavor = "multi_thread")]
async fn a_moment_is_the_same_whether_indexes_are_rolled_up_or_not() {
    let world = World::new(crate::common::ledger::keep_wal(Cluster::builder(NEWEST)).segment_mib(1).start()).await;
    let cluster = &world.cluster;
    write(cluster, 10);
    world.backup().await;
    let mut targets = vec!["latest".to_owned(), "name:lunch".to_owned()];
    for n in 0..60 {
        let now = "to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || 'Z'";
        targets.push(cluster.query(&format!("SELECT {now}")));
        for _ in 0..6 {
            let xid = cluster.query("BEGIN; INSERT INTO t VALUES (1, 'x'); SELECT pg_current_xact_id(); COMMIT");
            targets.push(format!("xid:{}", xid.trim()));
        }
        cluster.query("SELECT pg_logical_emit_message(false, 'x', repeat(md5(random()::text), 24000))");
        if n == 40 {
            cluster.query("SELECT pg_create_restore_point('lunch')");
        }
    }
    world.running.wait_stored(cluster.flush_lsn()).await;
    let known = identity::current(&world.repository).await.expect("identity").expect("one");
    let (incarnation, segment_size) = (known.incarnation, known.identity.segment_size);
    let archive = locate::Archive::load(&world.repository, &known).await.expect("loaded");
    let find = async |target: &String| {
        let mut found = Vec::new();
        for exclusive in [false, true] {
            let request = Request { target: target.parse::<Target>().expect("a target"), exclusive, timeline: None };
            let before = world.repository.store().reads();
            let moment = archive.moment(&request).await.map_err(|failure| failure.to_string());
            found.push((moment, world.repository.store().reads() - before));
        }
        found
    };
    let mut whole = Vec::new();
    for target in &targets {
        whole.push(find(target).await);
    }
    let destination = Destination { repository: world.repository.clone(), incarnation, segment_size };
    let before = segment_size.segment_of(cluster.flush_lsn());
    catch_up(&destination, &known, TimelineId(1), before, &Budget::new(0)).await.expect("caught up");
    let listed = index::list(&world.repository, incarnation, TimelineId(1), segment_size).await.expect("listed");
    assert!(listed.rollups.len() >= 2, "{:?}", listed.rollups);
    let mut reads = (0, 0);
    for (target, whole) in targets.iter().zip(whole) {
        for ((found, few), (expected, many)) in find(target).await.into_iter().zip(whole) {
            assert_eq!(found, expected, "{target}");
            assert!(found.is_ok(), "{target}: {found:?}");
            reads = (reads.0 + few, reads.1 + many);
        }
    }
    assert!(reads.0 * 2 < reads.1, "{reads:?}");
    world.running.stop().await;
}
