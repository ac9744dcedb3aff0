//! Where archiving goes on after an interruption, with servers that are not what they were.

use std::time::Duration;

use pgrecall::archive::{ArchiveStatus, Settings, State};
use pgrecall::pg::{SegmentSize, TimelineId};

use crate::archive::{Running, assert_equal_to_server, keep, repository, stored, write};
use crate::common::NEWEST;
use crate::common::guard::Directory;
use crate::common::postgres::{Stop, copy};
use crate::replication::config;

/// The stored end is the border of two segments, and the server that was set back stands there again.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_set_back_that_stands_at_the_stored_border_again_is_a_conflict() {
    let (mut cluster, dir) = (keep(NEWEST), Directory::new("archive"));
    let repository = repository(dir.path()).await;
    let settings = || Settings { rpo: Duration::ZERO, ..Settings::default() };
    let running = Running::start_with(&repository, config(&cluster), settings()).await;
    let end = write(&cluster, 1_000);
    running.wait_stored(end).await;
    running.stop().await;
    cluster.stop(Stop::Fast);
    let snapshot = cluster.scratch().join("snapshot");
    copy(cluster.data(), &snapshot);
    cluster.start();
    let running = Running::start_with(&repository, config(&cluster), settings()).await;
    write(&cluster, 500);
    cluster.switch_wal();
    let border = cluster.flush_lsn();
    running.wait_stored(border).await;
    running.stop().await;
    cluster.kill9();
    std::fs::remove_dir_all(cluster.data()).unwrap();
    std::fs::rename(&snapshot, cluster.data()).unwrap();
    cluster.start();
    cluster.query("CREATE TABLE another_past AS SELECT i, repeat('y', 300) FROM generate_series(1, 400) i");
    cluster.switch_wal();
    assert!(cluster.flush_lsn() >= border, "it is where the archive ends");
    let before = stored(&repository, 1).await;
    let running = Running::start_with(&repository, config(&cluster), settings()).await;
    running.wait("conflict", |s| matches!(&s.state, State::Conflict(text) if text.contains("other content"))).await;
    running.stop().await;
    assert!(before == stored(&repository, 1).await, "the stored past is untouched");
}

/// Nobody stops the old primary: for a while there are two, and the stream from the old one does not end by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_standby_promoted_while_the_old_primary_streams_is_followed_with_an_alarm() {
    let dir = Directory::new("archive");
    let repository = repository(dir.path()).await;
    let mut old = keep(NEWEST);
    let new = old.standby();
    let mut connect = config(&old);
    connect.hosts.extend(config(&new).hosts);
    let settings = Settings { hosts_interval: Duration::from_millis(300), ..Settings::default() };
    let running = Running::start_with(&repository, connect, settings).await;
    let end = write(&old, 1_000);
    assert_eq!(running.wait_stored(end).await.alarm, None);
    new.wait_replayed(end);
    new.promote();
    write(&old, 100);
    let on_two = async |end| {
        let stored = |s: &ArchiveStatus| s.stored.is_some_and(|s| s.timeline == TimelineId(2) && s.end_lsn >= end);
        running.wait("the new primary stored", stored).await
    };
    let alarm = on_two(write(&new, 1_000)).await.alarm.expect("two primaries");
    assert!(alarm.contains("on timeline 1") && alarm.contains("on timeline 2"), "{alarm}");
    assert_eq!(old.query("SELECT active FROM pg_replication_slots"), "f");

    // It stays so, without another beginning, until the old one is gone.
    let walsender = new.query("SELECT active_pid FROM pg_replication_slots");
    write(&old, 100);
    on_two(write(&new, 1_000)).await;
    assert!(running.status.borrow().alarm.is_some());
    old.stop(Stop::Fast);
    running.wait("the alarm is over", |s| s.alarm.is_none()).await;
    on_two(write(&new, 1_000)).await;
    assert_eq!(new.query("SELECT active_pid FROM pg_replication_slots"), walsender);
    running.stop().await;
    assert!(assert_equal_to_server(&new, 2, &stored(&repository, 2).await) > 0);
    assert_eq!(new.query("SELECT count(*) FROM t"), "4000");
}

/// Its slot keeps WAL of the timeline before: that is stored first.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_first_seen_after_its_promotion_gives_the_wal_before_the_fork_too() {
    let dir = Directory::new("archive");
    let repository = repository(dir.path()).await;
    let mut primary = keep(NEWEST);
    let standby = primary.standby();
    let settings = Settings::default();
    standby.query(&format!("SELECT pg_create_physical_replication_slot('{}', true)", settings.slot));
    let kept = standby.lsn("SELECT restart_lsn FROM pg_replication_slots");
    let end = write(&primary, 20_000);
    standby.wait_replayed(end);
    primary.stop(Stop::Fast);
    standby.promote();
    standby.wait_writable();
    let running = Running::start_with(&repository, config(&standby), settings).await;
    let status = running.wait_stored(write(&standby, 10)).await;
    assert_eq!((status.gaps_found, status.stored.map(|s| s.timeline)), (0, Some(TimelineId(2))));
    running.stop().await;
    let (old, new) = (stored(&repository, 1).await, stored(&repository, 2).await);
    assert_eq!(old.keys().next(), Some(&SegmentSize::MIB_16.segment_of(kept)));
    assert!(assert_equal_to_server(&standby, 1, &old) > 0 && assert_equal_to_server(&standby, 2, &new) > 0);
}
