//! The archiver against real servers: what is stored is what the server wrote, and nothing else was ever reported.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use pgrecall::archive::{ArchiveStatus, Archiver, Settings, State};
use pgrecall::pg::{Lsn, SegmentNo, SegmentSize, TimelineId, Timestamp};
use pgrecall::repository::catalogue::{self, WalObject};
use pgrecall::repository::generation::{self, Lease};
use pgrecall::repository::segment::read_segment;
use pgrecall::repository::store::{Store, StoreSettings};
use pgrecall::repository::{Location, Repository, identity, index};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::common::guard::Directory;
use crate::common::postgres::{Cluster, Stop, copy};
use crate::common::proxy::tcp::TcpProxy;
use crate::common::{MAJORS, NEWEST, wait};
use crate::replication::config;

const SIZE: SegmentSize = SegmentSize::MIB_16;

pub async fn repository(dir: &Path) -> Repository {
    let store = Store::open(&Location::File(dir.to_path_buf()), "shop", StoreSettings::default()).expect("open");
    Repository::open_or_create(store, 1, None).await.expect("open or create")
}

/// A running archiver; [`Running::stop`] ends it orderly, [`Running::kill`] drops it where it stands.
pub struct Running {
    pub status: watch::Receiver<ArchiveStatus>,
    cancel: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    pub async fn start(cluster: &Cluster, repository: &Repository) -> Running {
        Running::start_with(repository, config(cluster), Settings::default()).await
    }

    pub async fn start_with(
        repository: &Repository,
        connect: pgrecall::replication::ConnectConfig,
        settings: Settings,
    ) -> Running {
        let lease = Lease {
            host: "h".into(),
            pid: std::process::id(),
            started_at: Timestamp(0),
            version: "t".into(),
            store: None,
        };
        let generation = generation::take(repository, &lease).await.expect("take a generation");
        let (status, receiver) = watch::channel(ArchiveStatus::default());
        let repository = repository.clone();
        let archiver = Archiver { settings, connect, repository, generation, status };
        let cancel = CancellationToken::new();
        let token = cancel.clone();
        let task = tokio::spawn(archiver.run(token));
        Running { status: receiver, cancel, task }
    }

    pub async fn wait(&self, what: &str, condition: impl Fn(&ArchiveStatus) -> bool) -> ArchiveStatus {
        let mut watched = self.status.clone();
        let found = tokio::time::timeout(Duration::from_secs(60), watched.wait_for(|s| condition(s))).await;
        match found {
            Ok(status) => status.expect("the archiver runs").clone(),
            Err(_) => panic!("waited in vain for: {what}; it is {:?}", self.status.borrow()),
        }
    }

    pub async fn wait_stored(&self, lsn: Lsn) -> ArchiveStatus {
        self.wait(&format!("{lsn} stored"), |s| s.stored.is_some_and(|s| s.end_lsn >= lsn)).await
    }

    pub async fn stop(self) {
        self.cancel.cancel();
        self.task.await.expect("the archiver ends");
    }

    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// What is stored of a timeline, by segment.
pub async fn stored(repository: &Repository, timeline: u32) -> BTreeMap<SegmentNo, Vec<u8>> {
    let known = identity::current(repository).await.expect("identity").expect("one");
    let timeline = TimelineId(timeline);
    let listing = catalogue::list_wal_timeline(repository, known.incarnation, timeline, SIZE).await.expect("list");
    let mut segments: BTreeMap<SegmentNo, Vec<WalObject>> = BTreeMap::new();
    for object in listing.ranges {
        segments.entry(object.range.segment).or_default().push(object);
    }
    let mut bytes = BTreeMap::new();
    for (segment, objects) in segments {
        let content = read_segment(repository, known.incarnation, SIZE, &objects).await.expect("read");
        bytes.insert(segment, content.to_vec());
    }
    bytes
}

/// Compares with the server's own files; returns how many bytes were compared.
pub fn assert_equal_to_server(cluster: &Cluster, timeline: u32, stored: &BTreeMap<SegmentNo, Vec<u8>>) -> usize {
    let mut compared = 0;
    for (segment, bytes) in stored {
        let name = pgrecall::pg::SegmentName::new(TimelineId(timeline), *segment, SIZE);
        let path = cluster.data().join("pg_wal").join(name.to_string());
        let Ok(file) = std::fs::read(path) else { continue };
        assert!(file[..bytes.len()] == bytes[..], "segment {name} differs");
        compared += bytes.len();
    }
    compared
}

async fn assert_whole_segments_are_indexed(repository: &Repository, segments: &BTreeMap<SegmentNo, Vec<u8>>) {
    let known = identity::current(repository).await.expect("identity").expect("one");
    let stored = index::list(repository, known.incarnation, TimelineId(1), SIZE).await.expect("list");
    // The last whole segment's record may go on in the open one: its index is made when that is known.
    let whole: Vec<_> = segments.iter().filter(|(_, b)| b.len() as u64 == SIZE.bytes()).map(|(s, _)| *s).collect();
    for segment in whole.iter().rev().skip(1) {
        let key = stored.segments.get(segment).unwrap_or_else(|| panic!("segment {segment:?} has no index"));
        let read = index::read(repository, key).await.expect("read").expect("verifies");
        assert!(read.is_whole(), "{read:?}");
    }
}

pub fn keep(major: u16) -> Cluster {
    Cluster::builder(major).setting("wal_keep_size", "1GB").start()
}

pub fn write(cluster: &Cluster, rows: u32) -> Lsn {
    cluster.query(&format!(
        "CREATE TABLE IF NOT EXISTS t (i int, x text); \
         INSERT INTO t SELECT i, repeat(md5(i::text), 10) FROM generate_series(1, {rows}) i"
    ));
    cluster.flush_lsn()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_is_what_the_server_wrote() {
    for major in MAJORS {
        let (cluster, dir) = (keep(major), Directory::new("archive"));
        let repository = repository(dir.path()).await;
        let running = Running::start(&cluster, &repository).await;
        running.wait("streaming", |s| s.state == State::Streaming).await;
        let end = write(&cluster, 100_000);
        cluster.switch_wal();
        let last = write(&cluster, 1_000);
        running.wait_stored(last).await;
        running.stop().await;
        let segments = stored(&repository, 1).await;
        assert_whole_segments_are_indexed(&repository, &segments).await;
        let compared = assert_equal_to_server(&cluster, 1, &segments);
        assert!(compared as u64 > end.0 - (1 << 24), "{major}: only {compared} bytes compared");
        let slot = cluster.lsn("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'pgrecall'");
        assert!(slot <= last.saturating_add(1 << 20) && slot > Lsn(1 << 24), "the slot follows: {slot}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_moment_it_goes_on_without_a_gap() {
    let (cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let mut last = Lsn::ZERO;
    for round in 0..6u32 {
        let running = Running::start(&cluster, &repository).await;
        let end = write(&cluster, 5_000 + round * 7_000);
        if round % 2 == 0 {
            running.wait_stored(end).await;
        }
        running.kill().await;
        last = end;
    }
    let running = Running::start(&cluster, &repository).await;
    running.wait_stored(last).await;
    running.stop().await;
    let segments = stored(&repository, 1).await;
    let numbers: Vec<u64> = segments.keys().map(|s| s.0).collect();
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "no segment is missing: {numbers:?}");
    let open = *segments.keys().last().expect("some");
    assert!(segments.iter().all(|(s, b)| *s == open || b.len() as u64 == SIZE.bytes()), "no hole in a segment");
    assert_equal_to_server(&cluster, 1, &segments);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_s_covered_time_moves_on() {
    let (cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let settings = Settings { coverage_interval: Duration::from_millis(500), ..Settings::default() };
    let running = Running::start_with(&repository, config(&cluster), settings).await;
    let first = running.wait("a first claim", |s| s.covered_until.is_some()).await.covered_until;
    let later = running.wait("a later claim", |s| s.covered_until > first).await;
    assert!(later.covered_until > first);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_is_followed_without_a_gap() {
    let dir = Directory::new("archive");
    let repository = repository(dir.path()).await;
    let mut primary = keep(NEWEST);
    let standby = primary.standby();
    let mut connect = config(&primary);
    connect.hosts.extend(config(&standby).hosts);
    let running = Running::start_with(&repository, connect, Settings::default()).await;
    let end = write(&primary, 20_000);
    running.wait_stored(end).await;
    standby.wait_replayed(end);
    primary.stop(Stop::Fast);
    standby.promote();
    standby.wait_writable();
    let end = write(&standby, 20_000);
    let status =
        running.wait("timeline 2", |s| s.stored.is_some_and(|s| s.timeline == TimelineId(2) && s.end_lsn >= end)).await;
    assert_eq!(status.gaps_found, 0);
    running.stop().await;
    assert_equal_to_server(&standby, 2, &stored(&repository, 2).await);
    let known = identity::current(&repository).await.expect("identity").expect("one");
    let listing = catalogue::list_wal(&repository, known.incarnation, SIZE).await.expect("list");
    assert_eq!(listing.histories.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_stops_although_its_archiver_is_connected() {
    let (mut cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let running = Running::start(&cluster, &repository).await;
    let end = write(&cluster, 1_000);
    running.wait_stored(end).await;
    cluster.stop(Stop::Fast);
    cluster.start();
    let end = write(&cluster, 10);
    running.wait_stored(end).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn removed_wal_becomes_a_recorded_gap_and_archiving_goes_on() {
    for major in [14, 16, 17, NEWEST] {
        removed_wal_becomes_a_recorded_gap(major).await;
    }
}

async fn removed_wal_becomes_a_recorded_gap(major: u16) {
    let cluster = Cluster::builder(major)
        .setting("max_slot_wal_keep_size", "1MB")
        .setting("min_wal_size", "32MB")
        .setting("max_wal_size", "32MB")
        .start();
    let dir = Directory::new("archive");
    let repository = repository(dir.path()).await;
    let running = Running::start(&cluster, &repository).await;
    let end = write(&cluster, 1_000);
    running.wait_stored(end).await;
    running.stop().await;
    wait::until("the slot is invalidated", 60, || {
        cluster.switch_wal();
        write(&cluster, 20_000);
        cluster.query("CHECKPOINT");
        cluster.query("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'pgrecall'") == "lost"
    });
    let running = Running::start(&cluster, &repository).await;
    running.wait("the gap", |s| s.gaps_found == 1).await;
    let end = write(&cluster, 100);
    running.wait_stored(end).await;
    running.stop().await;
    let known = identity::current(&repository).await.expect("identity").expect("one");
    let gaps = catalogue::list_gaps(&repository, known.incarnation).await.expect("list");
    assert_eq!(gaps.len(), 1);
    assert!(gaps[0].start_lsn < gaps[0].end_lsn);
}

/// The primary removed what was not stored; its standby has it still.
#[tokio::test(flavor = "multi_thread")]
async fn wal_that_the_primary_removed_comes_from_a_standby() {
    let mut primary = Cluster::builder(NEWEST).start();
    let mut standby = primary.standby();
    standby.set("wal_keep_size", "4GB");
    standby.restart();
    for (name, value) in [("max_slot_wal_keep_size", "1MB"), ("min_wal_size", "32MB"), ("max_wal_size", "32MB")] {
        primary.set(name, value);
    }
    primary.reload();
    let dir = Directory::new("archive");
    let repository = repository(dir.path()).await;
    let mut connect = config(&primary);
    connect.hosts.extend(config(&standby).hosts);
    let running = Running::start_with(&repository, connect.clone(), Settings::default()).await;
    let end = write(&primary, 1_000);
    running.wait_stored(end).await;
    running.stop().await;
    wait::until("the slot is invalidated", 60, || {
        primary.switch_wal();
        standby.wait_replayed(write(&primary, 20_000));
        primary.query("CHECKPOINT");
        primary.query("SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'pgrecall'") == "lost"
    });
    let running = Running::start_with(&repository, connect, Settings::default()).await;
    let end = write(&primary, 100);
    let status = running.wait_stored(end).await;
    assert_eq!(status.gaps_found, 0);
    running.stop().await;
    let known = identity::current(&repository).await.expect("identity").expect("one");
    assert!(catalogue::list_gaps(&repository, known.incarnation).await.expect("list").is_empty());
    let segments = stored(&repository, 1).await;
    let numbers: Vec<u64> = segments.keys().map(|s| s.0).collect();
    assert!(numbers.windows(2).all(|w| w[1] == w[0] + 1), "no segment is missing: {numbers:?}");
    let compared = assert_equal_to_server(&standby, 1, &segments);
    assert!(compared > 1 << 24, "only {compared} bytes compared");
}

/// An old primary that came back after a fail-over must neither be followed nor keep the new one from being archived.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_primaries_the_one_on_the_higher_timeline_is_followed_with_an_alarm() {
    let dir = Directory::new("archive");
    let repository = repository(dir.path()).await;
    let old = keep(NEWEST);
    let new = old.standby();
    let mut connect = config(&old);
    connect.hosts.extend(config(&new).hosts);
    let running = Running::start_with(&repository, connect.clone(), Settings::default()).await;
    let end = write(&old, 1_000);
    let status = running.wait_stored(end).await;
    assert_eq!(status.alarm, None);
    assert!(status.server_lsn >= end && status.exposure.p99_ms.is_some(), "{status:?}");
    running.stop().await;
    new.wait_replayed(end);
    new.promote();
    write(&old, 1_000);
    let before = stored(&repository, 1).await;
    let running = Running::start_with(&repository, connect, Settings::default()).await;
    let end = write(&new, 1_000);
    let on_two = |s: &ArchiveStatus| s.stored.is_some_and(|s| s.timeline == TimelineId(2) && s.end_lsn >= end);
    let status = running.wait("the new primary stored", on_two).await;
    let alarm = status.alarm.expect("an alarm");
    assert!(alarm.contains("on timeline 1") && alarm.contains("on timeline 2"), "{alarm}");
    running.stop().await;
    assert_equal_to_server(&new, 2, &stored(&repository, 2).await);
    let after = stored(&repository, 1).await;
    let reached = |s: &BTreeMap<SegmentNo, Vec<u8>>| s.values().map(Vec::len).sum::<usize>();
    assert!(reached(&after) >= reached(&before));
    assert!(assert_equal_to_server(&new, 1, &after) > 0, "nothing of the old primary's later WAL");
}

/// What a provider's snapshot of the server's disk does.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_set_back_by_a_snapshot_is_a_conflict_and_stores_nothing() {
    let (mut cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let settings = || Settings { rpo: Duration::ZERO, ..Settings::default() };
    let running = Running::start_with(&repository, config(&cluster), settings()).await;
    let end = write(&cluster, 20_000);
    running.wait_stored(end).await;
    running.stop().await;
    cluster.stop(Stop::Fast);
    let snapshot = cluster.scratch().join("snapshot");
    copy(cluster.data(), &snapshot);
    cluster.start();
    let running = Running::start_with(&repository, config(&cluster), settings()).await;
    cluster.switch_wal();
    let end = write(&cluster, 15_000);
    running.wait_stored(end).await;
    running.stop().await;
    cluster.kill9();
    std::fs::remove_dir_all(cluster.data()).unwrap();
    std::fs::rename(&snapshot, cluster.data()).unwrap();
    cluster.start();
    let before = stored(&repository, 1).await;
    let running = Running::start_with(&repository, config(&cluster), settings()).await;
    running.wait("conflict", |s| matches!(&s.state, State::Conflict(text) if text.contains("set back"))).await;
    // It overtakes what is stored: the same positions hold other bytes now.
    cluster.switch_wal();
    cluster.query("CREATE TABLE another_past AS SELECT i, repeat('y', 300) FROM generate_series(1, 40000) i");
    assert!(cluster.flush_lsn() > end);
    running.wait("conflict", |s| matches!(&s.state, State::Conflict(text) if text.contains("other content"))).await;
    running.stop().await;
    assert!(before == stored(&repository, 1).await, "the stored past is untouched");
}

/// 64 MiB does not fit into the buffer, and is stored all the same; larger ones are stored in ranges.
#[tokio::test(flavor = "multi_thread")]
async fn small_and_large_segments_are_stored_as_the_server_wrote_them() {
    for (mib, rows) in [(1, 20_000), (64, 260_000), (256, 260_000)] {
        let builder = Cluster::builder(NEWEST).segment_mib(mib).setting("wal_keep_size", "1GB");
        let (cluster, dir) = (builder.setting("min_wal_size", "512MB").start(), Directory::new("archive"));
        let repository = repository(dir.path()).await;
        let settings = Settings { buffer_bytes_max: 32 << 20, ..Settings::default() };
        let running = Running::start_with(&repository, config(&cluster), settings.clone()).await;
        let end = write(&cluster, rows);
        running.wait_stored(end).await;
        running.stop().await;
        let running = Running::start_with(&repository, config(&cluster), settings).await;
        let end = write(&cluster, 1_000);
        running.wait_stored(end).await;
        running.stop().await;
        let known = identity::current(&repository).await.expect("identity").expect("one");
        let size = known.identity.segment_size;
        assert_eq!(size.bytes(), u64::from(mib) << 20);
        let timeline = TimelineId(1);
        let listing = catalogue::list_wal_timeline(&repository, known.incarnation, timeline, size).await.expect("list");
        let mut reached = listing.ranges[0].range.start_lsn(size);
        for object in &listing.ranges {
            let name = pgrecall::pg::SegmentName::new(timeline, object.range.segment, size).to_string();
            let file = std::fs::read(cluster.data().join("pg_wal").join(&name)).expect("the server keeps it");
            let bytes = pgrecall::repository::segment::read_range(&repository, object).await.expect("read");
            let (from, to) = (object.range.from as usize, object.range.to as usize);
            assert!(bytes[..] == file[from..to], "{name} differs at {from}");
            assert!(object.range.start_lsn(size) <= reached, "no hole before {name} {from}");
            reached = reached.max(object.range.end_lsn(size));
        }
        assert!(reached >= end);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminated_walsender_is_replaced_without_loss() {
    let (cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let running = Running::start(&cluster, &repository).await;
    for _ in 0..3 {
        let end = write(&cluster, 20_000);
        cluster.query("SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots");
        running.wait_stored(end).await;
    }
    running.stop().await;
    let segments = stored(&repository, 1).await;
    assert!(assert_equal_to_server(&cluster, 1, &segments) > 0);
}

/// Promotion of a standby that had not everything, while commits wait for the archiver.
#[tokio::test(flavor = "multi_thread")]
async fn a_promoted_standby_behind_the_archive_is_told_the_fork_first() {
    let dir = Directory::new("archive");
    let repository = repository(dir.path()).await;
    let mut primary = keep(NEWEST);
    let mut standby = primary.standby();
    let mut connect = config(&primary);
    connect.hosts.extend(config(&standby).hosts);
    let running = Running::start_with(&repository, connect, Settings::default()).await;
    let end = write(&primary, 100);
    standby.wait_replayed(end);
    standby.stop(Stop::Fast);
    let old_end = write(&primary, 30_000);
    running.wait_stored(old_end).await;
    primary.stop(Stop::Immediate);
    standby.set("primary_conninfo", "");
    standby.set("synchronous_standby_names", "archiver");
    standby.start();
    standby.promote();
    let acknowledged = standby.lsn("CREATE TABLE after_fork AS SELECT 1 AS i; SELECT pg_current_wal_insert_lsn()");
    assert!(acknowledged < old_end, "the new timeline goes over positions that the old one has used");
    let stored_lsn = standby.lsn("SELECT flush_lsn FROM pg_stat_replication WHERE application_name = 'archiver'");
    assert!(stored_lsn >= acknowledged, "the commit that returned is stored");
    running.stop().await;
    let (old, new) = (stored(&repository, 1).await, stored(&repository, 2).await);
    assert!(assert_equal_to_server(&standby, 2, &new) > 0);
    assert!(assert_equal_to_server(&primary, 1, &old) > 0, "the old tail stays");
    let reached = |s: &BTreeMap<SegmentNo, Vec<u8>>| {
        s.last_key_value().map(|(n, b)| Lsn(n.0 * SIZE.bytes() + b.len() as u64)).expect("some")
    };
    assert!(reached(&new) >= acknowledged && reached(&old) >= old_end);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_cluster_cannot_write_into_the_repository() {
    let (cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let running = Running::start(&cluster, &repository).await;
    running.wait("streaming", |s| s.state == State::Streaming).await;
    running.stop().await;
    let other = Cluster::builder(NEWEST).fresh().start();
    let running = Running::start(&other, &repository).await;
    let status = running.wait("conflict", |s| matches!(s.state, State::Conflict(_))).await;
    assert!(format!("{:?}", status.state).contains("system identifier"), "{:?}", status.state);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_archiver_waits_names_the_holder_and_takes_over_when_it_is_gone() {
    let (cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let first = Running::start(&cluster, &repository).await;
    let end = write(&cluster, 100);
    first.wait_stored(end).await;
    let second = Running::start(&cluster, &repository).await;
    let waiting = second.wait("it waits", |s| matches!(s.state, State::Waiting(_))).await;
    let holder = format!("process {}", std::process::id());
    assert!(format!("{:?}", waiting.state).contains(&holder), "{:?}", waiting.state);
    let end = write(&cluster, 100);
    first.wait_stored(end).await;
    first.stop().await;
    let end = write(&cluster, 100);
    second.wait_stored(end).await;
    second.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_is_made_again_without_loss() {
    let (cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let proxy = TcpProxy::start(&cluster);
    let mut connect = config(&cluster);
    let text = format!("{} application_name=archiver", proxy.conninfo());
    connect.hosts = text.parse::<pgrecall::replication::ConnectConfig>().expect("a connection string").hosts;
    let running = Running::start_with(&repository, connect, Settings::default()).await;
    let end = write(&cluster, 100);
    running.wait_stored(end).await;
    let before = cluster.query("SELECT active_pid FROM pg_replication_slots");
    proxy.cut();
    let end = write(&cluster, 100);
    running.wait_stored(end).await;
    assert_ne!(before, cluster.query("SELECT active_pid FROM pg_replication_slots"));
    running.stop().await;
}

/// Other history files that lie about make a server skip ids.
#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_that_skips_a_timeline_id_is_followed() {
    let dir = Directory::new("archive");
    let repository = repository(dir.path()).await;
    let mut primary = keep(NEWEST);
    let mut standby = primary.standby();
    standby.stop(Stop::Fast);
    standby.set("recovery_target_timeline", "current");
    let taken = standby.data().join("pg_wal/00000002.history");
    std::fs::write(taken, "1\t0/1000028\tno recovery target specified\n").unwrap();
    standby.start();
    let mut connect = config(&primary);
    connect.hosts.extend(config(&standby).hosts);
    let running = Running::start_with(&repository, connect, Settings::default()).await;
    let end = write(&primary, 20_000);
    running.wait_stored(end).await;
    standby.wait_replayed(end);
    primary.stop(Stop::Fast);
    standby.promote();
    standby.wait_writable();
    assert_eq!(standby.timeline(), 3);
    let end = write(&standby, 20_000);
    let on_three = |s: &ArchiveStatus| s.stored.is_some_and(|s| s.timeline == TimelineId(3) && s.end_lsn >= end);
    let status = running.wait("timeline 3", on_three).await;
    assert_eq!(status.gaps_found, 0);
    running.stop().await;
    assert!(assert_equal_to_server(&standby, 3, &stored(&repository, 3).await) > 0);
    let known = identity::current(&repository).await.expect("identity").expect("one");
    let listing = catalogue::list_wal(&repository, known.incarnation, SIZE).await.expect("list");
    let histories: Vec<TimelineId> = listing.histories.iter().map(|h| h.timeline).collect();
    assert_eq!(histories, [TimelineId(3)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_gives_up_a_silent_network_is_followed_again_without_loss() {
    let cluster = Cluster::builder(NEWEST).setting("wal_keep_size", "1GB").setting("wal_sender_timeout", "2s").start();
    let dir = Directory::new("archive");
    let repository = repository(dir.path()).await;
    let proxy = TcpProxy::start(&cluster);
    let mut connect = config(&cluster);
    let text = format!("{} application_name=archiver", proxy.conninfo());
    connect.hosts = text.parse::<pgrecall::replication::ConnectConfig>().expect("a connection string").hosts;
    let running = Running::start_with(&repository, connect, Settings::default()).await;
    let end = write(&cluster, 100);
    running.wait_stored(end).await;
    proxy.pause(true);
    let end = write(&cluster, 50_000);
    wait::until_async("the server gives up", 30, || async {
        cluster.log().contains("terminating walsender process due to replication timeout")
    })
    .await;
    assert!(running.status.borrow().stored.is_some_and(|s| s.end_lsn < end));
    proxy.pause(false);
    running.wait_stored(end).await;
    assert_eq!(running.status.borrow().gaps_found, 0);
    running.stop().await;
    assert!(assert_equal_to_server(&cluster, 1, &stored(&repository, 1).await) > 0);
}
