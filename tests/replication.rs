//! The replication client against real servers of every major.

use std::time::Duration;

use pgrecall::pg::{Lsn, Major, SegmentName, SegmentSize, TimelineId};
use pgrecall::replication::{
    ConnectConfig, ReplicationError, Session, StartReplication, StatusUpdate, WalEvent, WalReader,
};

use crate::common::postgres::{Cluster, Stop};
use crate::common::{MAJORS, NEWEST, wait};

pub fn config(cluster: &Cluster) -> ConnectConfig {
    let socket = cluster.socket_dir().display().to_string();
    let text = format!("host={socket} port={} user=postgres application_name=archiver", cluster.port());
    text.parse().expect("a connection string")
}

pub async fn session(cluster: &Cluster) -> Session {
    Session::connect(&config(cluster), 0).await.expect("connect")
}

fn from(lsn: Lsn, timeline: u32) -> StartReplication {
    StartReplication { slot: Some("s".to_owned()), start_lsn: lsn, timeline: TimelineId(timeline) }
}

async fn next(reader: &mut WalReader) -> Result<WalEvent, ReplicationError> {
    tokio::time::timeout(Duration::from_secs(30), reader.next()).await.expect("the server says something in time")
}

/// Reads until everything below `end` has come; the bytes from `start`.
async fn read_up_to(reader: &mut WalReader, start: Lsn, end: Lsn) -> Vec<u8> {
    let mut bytes = Vec::new();
    while start.saturating_add(bytes.len() as u64) < end {
        if let WalEvent::Data { start_lsn, bytes: new, .. } = next(reader).await.expect("a stream") {
            assert_eq!(start_lsn, start.saturating_add(bytes.len() as u64), "no byte twice, none left out");
            bytes.extend_from_slice(&new);
        }
    }
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_knows_its_server_and_keeps_its_slot() {
    for major in MAJORS {
        let cluster = Cluster::start_new(major);
        let mut session = session(&cluster).await;
        assert_eq!(session.major().expect("a version"), Major(major));
        assert!(!session.in_hot_standby());
        let identity = session.identify_system().await.expect("IDENTIFY_SYSTEM");
        assert_eq!(identity.system_id.to_string(), cluster.system_identifier());
        assert_eq!(identity.timeline, TimelineId(1));
        assert!(identity.flush_lsn <= cluster.flush_lsn());
        assert_eq!(session.segment_size().await.expect("SHOW"), SegmentSize::MIB_16);
        assert!(matches!(session.show("no_such_setting").await, Err(ReplicationError::Server(_))));

        assert!(session.create_physical_slot("s").await.expect("a new slot"));
        assert!(!session.create_physical_slot("s").await.expect("an old slot"));
        assert!(session.create_physical_slot("S-1").await.is_err());
        let restart = cluster.lsn("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 's'");
        match session.read_slot("s").await {
            Ok(position) => assert_eq!(position.expect("it is there").restart_lsn, Some(restart)),
            Err(e) => assert!(major == 14 && matches!(e, ReplicationError::Unsupported(_)), "{e}"),
        }
        let pid = session.backend_pid().to_string();
        assert_eq!(cluster.query(&format!("SELECT backend_type FROM pg_stat_activity WHERE pid = {pid}")), "walsender");
        session.drop_slot("s").await.expect("drop");
        assert!(matches!(session.drop_slot("s").await, Err(ReplicationError::SlotMissing(_))));
        session.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn streamed_bytes_are_those_of_pg_wal_and_status_moves_the_slot() {
    for major in MAJORS {
        let cluster = Cluster::builder(major).segment_mib(1).start();
        let size = SegmentSize::new(1 << 20).expect("a size");
        let mut session = session(&cluster).await;
        session.create_physical_slot("s").await.expect("a slot");
        let start = size.start_of(cluster.flush_lsn());
        cluster.query("CREATE TABLE t AS SELECT n, repeat(md5(n::text), 10) FROM generate_series(1, 10000) n");
        cluster.switch_wal();
        let end = size.start_of(cluster.flush_lsn());

        let (mut reader, sender) = session.start_replication(&from(start, 1)).await.expect("a stream").split();
        let bytes = read_up_to(&mut reader, start, end).await;
        for (index, segment) in bytes.chunks_exact(1 << 20).enumerate() {
            let lsn = start.saturating_add((index as u64) << 20);
            let name = SegmentName::new(TimelineId(1), size.segment_of(lsn), size).to_string();
            assert!(std::fs::read(cluster.data().join("pg_wal").join(&name)).expect("read") == segment, "{name}");
        }
        assert!(sender.send(StatusUpdate::all_at(end)).await.expect("send"));
        let restart = "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 's'";
        wait::until("the slot's position", 10, || cluster.lsn(restart) == end);

        let asked = StatusUpdate { reply_requested: true, ..StatusUpdate::all_at(end) };
        sender.send(asked).await.expect("send");
        while !matches!(next(&mut reader).await.expect("an answer"), WalEvent::Keepalive { .. }) {}

        let mut session = reader.close().await.expect("an orderly end");
        assert!(!sender.send(StatusUpdate::all_at(end)).await.expect("no error after the end"));
        session.identify_system().await.expect("the session can be used again");
        session.drop_slot("s").await.expect("the slot is free");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_ends_the_timeline_and_the_next_follows_without_a_gap() {
    for major in MAJORS {
        let primary = Cluster::start_new(major);
        let standby = primary.standby();
        let mut session = session(&standby).await;
        assert!(session.in_hot_standby());
        session.create_physical_slot("s").await.expect("a slot on a standby");
        let start = SegmentSize::MIB_16.start_of(primary.flush_lsn());
        let (mut reader, sender) = session.start_replication(&from(start, 1)).await.expect("a stream").split();
        primary.query("CREATE TABLE t AS SELECT generate_series(1, 1000) n");
        standby.wait_replayed(primary.flush_lsn());
        standby.promote();

        let mut received = start;
        let (next_timeline, switch_lsn) = loop {
            match next(&mut reader).await.expect("a stream") {
                WalEvent::Data { start_lsn, bytes, .. } => received = start_lsn.saturating_add(bytes.len() as u64),
                WalEvent::Keepalive { .. } => {}
                WalEvent::EndOfTimeline { next_timeline, switch_lsn } => break (next_timeline, switch_lsn),
            }
        };
        assert_eq!((next_timeline, switch_lsn), (TimelineId(2), received));
        assert!(next(&mut reader).await.is_err());
        let mut session = reader.into_session().await.expect("the connection is free");
        assert!(!sender.send(StatusUpdate::all_at(received)).await.expect("no error after the end"));
        let history = session.timeline_history(next_timeline).await.expect("TIMELINE_HISTORY");
        let file = std::fs::read(standby.data().join("pg_wal/00000002.history")).expect("read");
        assert_eq!(history.content, file);

        let start = SegmentSize::MIB_16.start_of(switch_lsn);
        let (mut reader, _) = session.start_replication(&from(start, 2)).await.expect("the next timeline").split();
        standby.query("CREATE TABLE u AS SELECT generate_series(1, 1000) n");
        let end = standby.flush_lsn();
        let bytes = read_up_to(&mut reader, start, end).await;
        let name = format!("00000002{:08X}{:08X}", 0, start.0 >> 24);
        let file = std::fs::read(standby.data().join("pg_wal").join(name)).expect("read");
        assert!(file.starts_with(&bytes));

        // A stream that starts exactly at the end of a timeline brings that end alone.
        let session = reader.close().await.expect("an orderly end");
        let mut stream = session.start_replication(&from(switch_lsn, 1)).await.expect("the old timeline");
        assert_eq!(stream.next().await.expect("its end"), WalEvent::EndOfTimeline { next_timeline, switch_lsn });
    }
}

/// The error of a START_REPLICATION.
async fn refusal(cluster: &Cluster, from: &StartReplication) -> ReplicationError {
    match session(cluster).await.start_replication(from).await {
        // A missing segment is noticed when it is read.
        Ok(mut stream) => loop {
            match stream.next().await {
                Ok(WalEvent::Keepalive { .. }) => {}
                Ok(other) => panic!("{other:?}"),
                Err(e) => break e,
            }
        },
        Err(e) => e,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_are_told_apart() {
    for major in MAJORS {
        let cluster = Cluster::builder(major).setting("max_wal_size", "32MB").segment_mib(1).start();
        let start = cluster.flush_lsn();
        let e = refusal(&cluster, &from(start, 1)).await;
        assert!(matches!(e, ReplicationError::SlotMissing(_)), "{major}: {e:?}");

        let mut holder = session(&cluster).await;
        holder.create_physical_slot("s").await.expect("a slot");
        let pid = holder.backend_pid();
        let mut holder = holder.start_replication(&from(start, 1)).await.expect("a stream");
        let e = refusal(&cluster, &from(start, 1)).await;
        let held = matches!(e, ReplicationError::SlotInUse { holder_pid: Some(found), .. } if found == pid);
        assert!(held && e.is_retryable(), "{major}: {e:?}");
        cluster.query(&format!("SELECT pg_terminate_backend({pid})"));
        let e = loop {
            if let Err(e) = holder.next().await {
                break e;
            }
        };
        assert!(matches!(e, ReplicationError::ServerStopping(_)) && e.is_retryable(), "{major}: {e:?}");

        let no_slot = |lsn, timeline| StartReplication { slot: None, ..from(lsn, timeline) };
        let e = refusal(&cluster, &no_slot(start.saturating_add(1 << 30), 1)).await;
        assert!(matches!(e, ReplicationError::AheadOfServer(_)), "{major}: {e:?}");
        let e = refusal(&cluster, &no_slot(start, 7)).await;
        assert!(matches!(e, ReplicationError::NotInHistory(_)), "{major}: {e:?}");

        // The process that held it is told to end, and lets go of it a moment later.
        let drop_slot = || cluster.try_query("SELECT pg_drop_replication_slot('s')").is_ok();
        wait::until("the slot to be free", 30, drop_slot);
        for _ in 0..4 {
            cluster.switch_wal();
        }
        cluster.query("CHECKPOINT");
        cluster.query("CHECKPOINT");
        let e = refusal(&cluster, &no_slot(SegmentSize::new(1 << 20).expect("a size").start_of(start), 1)).await;
        assert!(matches!(e, ReplicationError::SegmentRemoved(_)) && !e.is_retryable(), "{major}: {e:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_position_past_a_fork_is_not_in_the_history() {
    for major in MAJORS {
        let primary = Cluster::start_new(major);
        let standby = primary.standby();
        standby.promote();
        standby.query("CREATE TABLE t AS SELECT generate_series(1, 100000) n");
        let past = standby.flush_lsn();
        let e = refusal(&standby, &StartReplication { slot: None, ..from(past, 1) }).await;
        assert!(matches!(e, ReplicationError::NotInHistory(_)), "{major}: {e:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_shuts_down_sends_everything_and_says_so() {
    for major in [14, NEWEST] {
        let mut cluster = Cluster::start_new(major);
        let mut session = session(&cluster).await;
        session.create_physical_slot("s").await.expect("a slot");
        let start = SegmentSize::MIB_16.start_of(cluster.flush_lsn());
        let (mut reader, sender) = session.start_replication(&from(start, 1)).await.expect("a stream").split();
        // A walsender that is told to stop before it has begun to stream sends nothing.
        let mut end = start;
        while end == start {
            if let WalEvent::Data { start_lsn, bytes, .. } = next(&mut reader).await.expect("a stream") {
                end = start_lsn.saturating_add(bytes.len() as u64);
            }
        }
        cluster.begin_stop(Stop::Fast);
        let e = loop {
            match next(&mut reader).await {
                Ok(WalEvent::Data { start_lsn, bytes, .. }) => end = start_lsn.saturating_add(bytes.len() as u64),
                Ok(_) => {}
                Err(e) => break e,
            }
            // The server waits for this before it ends.
            let _ = sender.send(StatusUpdate::all_at(end)).await;
        };
        assert!(matches!(e, ReplicationError::ServerStopping(_)), "{e:?}");
        cluster.wait_ended(30);
        let control = cluster.run("pg_controldata", &["-D", &cluster.data().display().to_string()]);
        let line = control.lines().find(|line| line.starts_with("Latest checkpoint location:")).expect("a checkpoint");
        let checkpoint: Lsn = line.rsplit(' ').next().expect("a value").parse().expect("an LSN");
        assert!(end > checkpoint, "the shutdown checkpoint at {checkpoint} has come before {end}");
        let e = Session::connect(&config(&cluster), 0).await.expect_err("nobody is there");
        assert!(matches!(e, ReplicationError::Unreachable { .. }) && e.is_retryable(), "{e:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_lost_its_wal_is_no_reason_to_wait() {
    for major in MAJORS {
        let builder = Cluster::builder(major).segment_mib(1).setting("max_slot_wal_keep_size", "1MB");
        let cluster = builder.setting("max_wal_size", "2MB").setting("min_wal_size", "2MB").start();
        let mut session = session(&cluster).await;
        session.create_physical_slot("s").await.expect("a slot");
        let start = SegmentSize::new(1 << 20).expect("a size").start_of(cluster.flush_lsn());
        session.close().await;
        for _ in 0..6 {
            cluster.switch_wal();
        }
        cluster.query("CHECKPOINT");
        let status = cluster.query("SELECT wal_status FROM pg_replication_slots");
        assert_eq!(status, "lost", "{major}");
        let e = refusal(&cluster, &from(start, 1)).await;
        let lost = matches!(e, ReplicationError::SlotInvalidated(_) | ReplicationError::SegmentRemoved(_));
        assert!(lost && !e.is_retryable(), "{major}: {e:?}");
    }
}
