//! How many objects are read to find a moment among ten thousand segments.

use std::io::Write;

use super::*;
use crate::archive::Budget;
use crate::archive::indexing::catch_up;
use crate::archive::uploader::Destination;
use crate::pg::{FullXid, SegmentName, Timestamp, Xid};
use crate::repository::codec::Kind;
use crate::repository::coverage::{Claim as StoredClaim, ClaimSource};
use crate::repository::layout::{ContentHash, WalRange};
use crate::repository::testing::{SIZE, T1, World, files, segment_size};
use crate::wal::transactions::{
    At, Completeness, EndKind, INDEX_VERSION, Parameters, RestorePoint, TransactionEnd, WalLevel,
};

const FIRST: u64 = 3;
const SEGMENTS: u64 = 10_000;
const ENDS: u64 = 10;

/// Half a second for each end, from the hour zero on.
fn time(segment: u64, end: u64) -> Timestamp {
    Timestamp::from_unix_seconds(i64::try_from((segment * ENDS + end) / 2).expect("small"))
}

fn xid(segment: u64, end: u64) -> u64 {
    1000 + segment * ENDS + end
}

fn index_of(segment: u64) -> SegmentIndex {
    let start = segment * SIZE;
    let mut index = SegmentIndex::empty(T1, Lsn(start));
    index.end_lsn = Lsn(start + SIZE);
    index.completeness = Completeness::Whole;
    index.first_record_lsn = Some(Lsn(start + 40));
    index.last_record_lsn = Some(Lsn(start + SIZE - 64));
    index.last_record_end_lsn = Some(Lsn(start + SIZE));
    index.near_xid = Some(FullXid(xid(segment, 0)));
    let end = |n: u64| {
        let (lsn, end_lsn) = (Lsn(start + 1000 * n + 40), Lsn(start + 1000 * n + 96));
        let low = FullXid(xid(segment, n)).low();
        TransactionEnd { lsn, end_lsn, kind: EndKind::Commit, xid: Xid(low.0), time: time(segment, n) }
    };
    index.ends = (0..ENDS).map(end).collect();
    if segment == 2000 {
        let what = Parameters {
            max_connections: 300,
            max_worker_processes: 8,
            max_wal_senders: 10,
            max_prepared_transactions: 0,
            max_locks_per_transaction: 64,
            wal_level: WalLevel(1),
            wal_log_hints: false,
            track_commit_timestamp: false,
        };
        index.parameter_changes.push(At { lsn: Lsn(start + 400_000), what });
    }
    if segment == 7000 {
        let name = "before the migration".to_owned();
        index.restore_points.push(RestorePoint { lsn: Lsn(start + 500_000), name, time: time(segment, ENDS) });
    }
    index
}

/// Written without what makes files durable: there are twenty thousand.
fn put(world: &World, key: &Key, bytes: &[u8]) {
    let path = world.path("repository/shop").join(key.as_str());
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("make");
    std::fs::File::create(path).expect("create").write_all(bytes).expect("write");
}

async fn world() -> World {
    let world = World::new(None).await;
    let codec = world.repository.codec();
    let incarnation = world.known.incarnation;
    for segment in FIRST..FIRST + SEGMENTS {
        let hash = ContentHash::of(&codec.digest(&segment.to_le_bytes()));
        let range = WalRange { timeline: T1, segment: SegmentNo(segment), from: 0, to: SIZE, hash, whole: true };
        put(&world, &Key::wal(incarnation, &range, segment_size()), b"");
        let content = index_of(segment).encode();
        let name = SegmentName::new(T1, SegmentNo(segment), segment_size());
        let key = Key::index(incarnation, name, INDEX_VERSION, ContentHash::of(&codec.digest(&content)));
        put(&world, &key, &codec.encode(&key, Kind::Index, &content).expect("encoded").bytes);
    }
    world.put_backup(&files()).await;
    let claim = StoredClaim {
        timeline: T1,
        server_time: time(FIRST + SEGMENTS, 0),
        lsn: Lsn((FIRST + SEGMENTS) * SIZE - 8),
        source: ClaimSource::Insert,
        margin_micros: 0,
        run: 1,
    };
    coverage::write(&world.repository, incarnation, &claim).await.expect("written");
    world
}

/// The moment, and how many objects were read for it, those read for any target left out.
async fn find(archive: &Archive, target: &str) -> (Moment, u64) {
    let target = target.parse().expect("a target");
    let before = archive.repository.store().reads();
    let moment = archive.moment(&Request { target, exclusive: false, timeline: None }).await.expect("a moment");
    (moment, archive.repository.store().reads() - before)
}

#[tokio::test(flavor = "multi_thread")]
async fn few_objects_are_read_to_find_a_moment_among_ten_thousand_segments() {
    let world = world().await;
    let archive = Archive::load(&world.repository, &world.known).await.expect("loaded");
    let targets = [
        "latest".to_owned(),
        time(5000, 3).to_string(),
        format!("xid:{}", xid(4321, 7)),
        "name:before the migration".to_owned(),
    ];
    let mut moments = Vec::new();
    for target in &targets {
        let (moment, reads) = find(&archive, target).await;
        println!("{target}: {reads} reads without roll-ups");
        moments.push(moment);
    }

    // Where nothing more can be found the search ends, but for the reads that are under way.
    let position = format!("lsn:{}", Lsn(5000 * SIZE + 3040));
    let (moment, reads) = find(&archive, &position).await;
    println!("{position}: {reads} reads without roll-ups");
    assert!(moment.stop.lsn == Lsn(5000 * SIZE + 3040) && reads <= 3 + READS_MAX as u64, "{moment:?}: {reads} reads");

    let (incarnation, size) = (world.known.incarnation, segment_size());
    let destination = Destination { repository: world.repository.clone(), incarnation, segment_size: size };
    for _ in 0..2 {
        let before = SegmentNo(FIRST + SEGMENTS);
        catch_up(&destination, &world.known, T1, before, &Budget::new(0)).await.expect("rolled up");
        let stored = index::list(&world.repository, incarnation, T1, size).await.expect("listed");
        assert_eq!(stored.rollups.len(), 625 + 39 + 2);
    }
    for (target, (moment, most)) in targets.iter().zip(moments.iter().zip([2, 40, 40, 40])) {
        let (found, reads) = find(&archive, target).await;
        println!("{target}: {reads} reads");
        assert_eq!(found, *moment, "{target}");
        assert!(reads <= most, "{target}: {reads} reads");
        // A whole plan, with the settings that the WAL on the way changes to.
        let before = world.repository.store().reads();
        let request = Request { target: target.parse().expect("a target"), exclusive: false, timeline: None };
        let (_, planned, _) = plan(&world.repository, &world.known, "shop", &request).await.expect("a plan");
        let reads = world.repository.store().reads() - before;
        println!("plan to {target}: {reads} reads");
        assert!(reads <= 60, "{target}: {reads} reads");
        assert_eq!(planned.later_parameters.expect("one changed").max_connections, 300);
    }
    let first_out = moments[1].first_excluded.expect("one is out");
    assert_eq!((first_out.xid.0, first_out.time), (1000 + 50_004, time(5000, 4)));

    // Damaged roll-ups cost reads, and nothing else.
    let stored = index::list(&world.repository, incarnation, T1, size).await.expect("listed");
    for key in stored.rollups.values().step_by(2) {
        put(&world, key, b"damaged");
    }
    let (found, _) = find(&archive, &targets[2]).await;
    assert_eq!(found, moments[2]);
}
