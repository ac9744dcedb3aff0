//! The stored WAL beside what PostgreSQL's own receiver keeps, and what becomes of a segment whose upload was disturbed.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use pgrecall::archive::tidy::{Written, tidy};
use pgrecall::archive::uploader::Destination;
use pgrecall::archive::{Budget, Settings};
use pgrecall::pg::{Lsn, SegmentName, SegmentSize, TimelineId};
use pgrecall::repository::crypto::MasterKey;
use pgrecall::repository::store::{Store, StoreSettings};
use pgrecall::repository::{Location, Repository, catalogue, identity, wal_object};

use crate::archive::{Running, assert_equal_to_server, keep, repository, stored, write};
use crate::common::guard::{Directory, Process};
use crate::common::minio::Minio;
use crate::common::postgres::{Cluster, Stop};
use crate::common::proxy::s3::{Fault, Rule, S3Proxy};
use crate::common::{NEWEST, wait};
use crate::replication::config;
use crate::store_faults;

const SIZE: SegmentSize = SegmentSize::MIB_16;

/// PostgreSQL's own receiver, without a slot.
fn receive(cluster: &Cluster, into: &Path) -> Process {
    std::fs::create_dir_all(into).unwrap();
    let mut command = cluster.tool("pg_receivewal");
    command.arg("-D").arg(into).args(["--no-sync", "-w"]).stdin(Stdio::null()).stdout(Stdio::null());
    let process = Process::spawn(command.stderr(Stdio::null()));
    let streams = "SELECT count(*) FROM pg_stat_replication WHERE application_name = 'pg_receivewal'";
    wait::until("pg_receivewal to stream", 30, || cluster.query(streams) == "1");
    process
}

/// Waits until the receiver has everything below `lsn`.
fn wait_received(cluster: &Cluster, lsn: Lsn) {
    let received = "SELECT coalesce(max(write_lsn), '0/0') FROM pg_stat_replication \
                    WHERE application_name = 'pg_receivewal'";
    wait::until("pg_receivewal to have it", 60, || cluster.query(received).parse::<Lsn>().unwrap() >= lsn);
}

/// Compares what is stored with every file of the receiver; returns how many whole segments were compared.
async fn assert_equal_to_received(repository: &Repository, received: &Path) -> usize {
    let known = identity::current(repository).await.expect("identity").expect("one");
    let histories = catalogue::list_wal(repository, known.incarnation, SIZE).await.expect("list").histories;
    let mut whole = 0;
    let mut names: Vec<String> =
        std::fs::read_dir(received).unwrap().flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    for name in &names {
        let file = std::fs::read(received.join(name)).unwrap();
        if let Some(timeline) = name.strip_suffix(".history") {
            let timeline = TimelineId(u32::from_str_radix(timeline, 16).expect("hexadecimal"));
            let object = histories.iter().find(|h| h.timeline == timeline).expect("the history is stored");
            let content = wal_object::read_history(repository, &object.key, object.hash).await.expect("read");
            assert!(content[..] == file[..], "{name} differs");
            continue;
        }
        let (plain, is_whole) = name.strip_suffix(".partial").map_or((name.as_str(), true), |plain| (plain, false));
        let segment: SegmentName = plain.parse().expect("a segment's name");
        let bytes =
            stored(repository, segment.timeline().0).await.remove(&segment.segment(SIZE).expect("of this size"));
        let bytes = bytes.unwrap_or_else(|| panic!("{name} is not stored"));
        // The receiver pads what it has not yet received with zeros.
        assert!(bytes[..] == file[..bytes.len()], "{name} differs");
        assert!(!is_whole || bytes.len() == file.len(), "{name}: only {} bytes are stored", bytes.len());
        whole += usize::from(is_whole);
    }
    whole
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stored_is_what_pg_receivewal_writes_across_a_promotion() {
    for major in [14, NEWEST] {
        let dir = Directory::new("archive");
        let repository = repository(&dir.join("store")).await;
        let mut primary = keep(major);
        let standby = primary.standby();
        let mut connect = config(&primary);
        connect.hosts.extend(config(&standby).hosts);
        let running = Running::start_with(&repository, connect, Settings::default()).await;
        running.wait_stored(write(&primary, 10)).await;
        let received = dir.join("received");
        let receiver = receive(&standby, &received);
        let end = write(&primary, 100_000);
        running.wait_stored(end).await;
        standby.wait_replayed(end);
        primary.stop(Stop::Fast);
        standby.promote();
        write(&standby, 100_000);
        standby.switch_wal();
        let end = write(&standby, 100);
        wait_received(&standby, end);
        let on_two = |s: &pgrecall::archive::ArchiveStatus| {
            s.stored.is_some_and(|s| s.timeline == TimelineId(2) && s.end_lsn >= end)
        };
        running.wait("timeline 2", on_two).await;
        running.stop().await;
        drop(receiver);
        assert!(received.join("00000002.history").exists());
        let whole = assert_equal_to_received(&repository, &received).await;
        assert!(whole >= 4, "only {whole} whole segments");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_repository_begins_where_the_slot_keeps_wal() {
    let (cluster, dir) = (Cluster::start_new(NEWEST), Directory::new("archive"));
    cluster.query("SELECT pg_create_physical_replication_slot('pgrecall', true)");
    let kept = cluster.lsn("SELECT restart_lsn FROM pg_replication_slots");
    for _ in 0..3 {
        write(&cluster, 1_000);
        cluster.switch_wal();
    }
    let end = write(&cluster, 1_000);
    cluster.query("CHECKPOINT");
    let repository = repository(dir.path()).await;
    let running = Running::start(&cluster, &repository).await;
    let status = running.wait_stored(end).await;
    assert_eq!(status.stored.expect("streaming").start_lsn, SIZE.start_of(kept));
    running.stop().await;
    let segments = stored(&repository, 1).await;
    assert!(segments.len() >= 4, "{:?}", segments.keys());
    assert!(assert_equal_to_server(&cluster, 1, &segments) > 3 << 24);
}

/// Parts get through and the segment as a whole does not, or its answer does not; then a kill, and a server that recycles
/// every file that it need not keep.
#[tokio::test(flavor = "multi_thread")]
async fn killed_between_the_last_part_and_the_segment_itself_it_goes_on_without_a_gap() {
    for fault in [Fault::Hang, Fault::CutReply] {
        let proxy = S3Proxy::start(&Minio::shared());
        let (repository, dir) = (store_faults::repository(&proxy.bucket()).await, Directory::new("archive"));
        let builder = Cluster::builder(NEWEST).setting("min_wal_size", "32MB").setting("max_wal_size", "32MB");
        let cluster = builder.start();
        let settings = || Settings { rpo: Duration::ZERO, ..Settings::default() };
        let running = Running::start_with(&repository, config(&cluster), settings()).await;
        let begin = write(&cluster, 10);
        running.wait_stored(begin).await;
        let received = dir.join("received");
        let receiver = receive(&cluster, &received);

        proxy.add(Rule::new(fault.clone()).on("PUT").key(".wal"));
        let first = SIZE.segment_of(begin);
        let mut end = begin;
        while SIZE.segment_of(end) == first {
            end = write(&cluster, 300);
            let in_first = end.min(first.next().start_lsn(SIZE));
            running.wait("what arrived", |s| s.received_lsn >= in_first).await;
        }
        running.wait("what arrived", |s| s.received_lsn >= end).await;
        running.kill().await;
        if fault == Fault::Hang {
            let slot = cluster.lsn("SELECT restart_lsn FROM pg_replication_slots");
            assert_eq!(SIZE.segment_of(slot), first, "the segment itself is not stored");
        }
        proxy.clear();
        for _ in 0..4 {
            write(&cluster, 1_000);
            cluster.switch_wal();
            cluster.query("CHECKPOINT");
        }
        let end = write(&cluster, 1_000);
        wait_received(&cluster, end);
        let running = Running::start_with(&repository, config(&cluster), settings()).await;
        let status = running.wait_stored(end).await;
        assert_eq!(status.gaps_found, 0, "{fault:?}");
        running.stop().await;
        drop(receiver);
        let whole = assert_equal_to_received(&repository, &received).await;
        assert!(whole >= 4, "{fault:?}: only {whole} whole segments");
        // When all of it is stored the server need not keep it.
        cluster.switch_wal();
        cluster.query("CHECKPOINT");
        let files = cluster.wal_files();
        assert!(!files.contains(&SegmentName::new(TimelineId(1), first, SIZE).to_string()), "{fault:?}: {files:?}");
    }
}

/// A process whose streams may hold next to nothing stores parts, whatever the segment's size; what becomes of them is what would
/// have been stored.
#[tokio::test(flavor = "multi_thread")]
async fn what_no_memory_is_left_for_is_stored_in_parts_and_put_together_later() {
    let (cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let (short, roomy) = (Budget::new(1 << 20), Budget::new(u64::MAX));
    for (budget, other) in [(&short, &roomy), (&roomy, &short), (&short, &roomy)] {
        let settings = |budget| Settings { budget: std::sync::Arc::clone(budget), ..Settings::default() };
        // It begins in the middle of a segment of which the one before stored parts.
        for budget in [other, budget] {
            let running = Running::start_with(&repository, config(&cluster), settings(budget)).await;
            let end = write(&cluster, 100_000);
            assert_eq!(running.wait_stored(end).await.gaps_found, 0);
            running.stop().await;
        }
    }
    let known = identity::current(&repository).await.expect("identity").expect("one");
    let before = stored(&repository, 1).await;
    assert!(assert_equal_to_server(&cluster, 1, &before) > 6 << 24);
    let (incarnation, segment_size) = (known.incarnation, SIZE);
    let whole = async || {
        let listing = catalogue::list_wal(&repository, incarnation, SIZE).await.expect("list");
        listing.ranges.iter().filter(|object| object.range.whole).count()
    };
    let segments = before.len() - 1;
    let (first, destination) =
        (whole().await, Destination { repository: repository.clone(), incarnation, segment_size });
    assert!(first > 2 && first < segments - 2, "{first} of {segments} were put whole");
    let last = *before.keys().last().expect("some");
    let written = Written { timeline: TimelineId(1), before: last };
    let tidied = tidy(&destination, written, chrono::Utc::now(), &Budget::new(0)).await.expect("tidy");
    assert_eq!((tidied.assembled as usize, tidied.failed), (segments - first, 0), "{tidied:?}");
    assert_eq!(whole().await, segments);
    assert!(stored(&repository, 1).await == before);
}

/// The stored files of WAL, of segments behind the first.
fn objects(place: &Path) -> Vec<PathBuf> {
    let listed = crate::common::postgres::run(std::process::Command::new("find").arg(place).args(["-type", "f"]));
    let mut found: Vec<PathBuf> = listed.lines().map(PathBuf::from).collect();
    found.retain(|path| path.extension().is_some_and(|e| e == "wal" || e == "part"));
    found.sort();
    let first = found[0].file_name().unwrap().to_str().unwrap()[..24].to_owned();
    found.retain(|path| !path.file_name().unwrap().to_str().unwrap().starts_with(&first));
    found
}

/// Another level of compression, and another nonce in any case.
#[tokio::test(flavor = "multi_thread")]
async fn a_segment_that_another_version_uploads_again_is_no_conflict() {
    let (cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let open = async |level| {
        let place = Location::File(dir.join("store"));
        let store = Store::open(&place, "shop", StoreSettings::default()).expect("open");
        Repository::open_or_create(store, level, Some(&MasterKey::new([7; 32]))).await.expect("open or create")
    };
    let (one, other) = (open(1).await, open(9).await);
    let running = Running::start(&cluster, &one).await;
    write(&cluster, 100_000);
    cluster.switch_wal();
    let end = write(&cluster, 1_000);
    running.wait_stored(end).await;
    running.stop().await;
    let uploads = objects(&dir.join("store"));
    let aside: Vec<(PathBuf, Vec<u8>)> = uploads.iter().map(|p| (p.clone(), std::fs::read(p).unwrap())).collect();
    uploads.iter().for_each(|path| std::fs::remove_file(path).unwrap());

    // The other version does not see those uploads, which are under way: it makes them again.
    let running = Running::start(&cluster, &other).await;
    assert_eq!(running.wait_stored(end).await.gaps_found, 0);
    running.stop().await;
    let mut repeated = 0;
    for (path, before) in aside.iter().filter(|(path, _)| path.extension().is_some_and(|e| e == "wal")) {
        let now = std::fs::read(path).unwrap_or_else(|e| panic!("the same name: {}: {e}", path.display()));
        assert!(now != *before, "{} was stored with other bytes", path.display());
        // The first one's upload arrives late, over it.
        std::fs::write(path, before).unwrap();
        repeated += 1;
    }
    assert!(repeated >= 2, "{repeated}");
    for repository in [&other, &one] {
        let running = Running::start(&cluster, repository).await;
        let end = write(&cluster, 1_000);
        assert_eq!(running.wait_stored(end).await.gaps_found, 0);
        running.stop().await;
        assert!(assert_equal_to_server(&cluster, 1, &stored(repository, 1).await) > 2 << 24);
    }
}
