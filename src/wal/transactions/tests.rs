//! Indexes of WAL made for the purpose, and their bytes.

use proptest::prelude::*;

use super::*;
use crate::pg::SystemId;
use crate::wal::reader::Stream;
use crate::wal::testing::{MIB, SYSTEM_ID, Wal};

fn stream(wal: &Wal) -> Stream {
    Stream { timeline: wal.timeline, segment_size: wal.segment_size, system_id: Some(SystemId(SYSTEM_ID)) }
}

/// The finished indexes, then the one of the tail.
fn index(wal: &Wal, piece: usize) -> Vec<SegmentIndex> {
    let mut indexer = Indexer::new(stream(wal), wal.start_lsn);
    let mut lsn = wal.start_lsn;
    for piece in wal.bytes.chunks(piece) {
        indexer.feed(lsn, piece);
        lsn = lsn.saturating_add(piece.len() as u64);
    }
    let mut all = indexer.take_finished();
    all.push(indexer.current());
    all
}

fn xids(index: &SegmentIndex) -> Vec<u32> {
    index.ends.iter().map(|end| end.xid.0).collect()
}

#[test]
fn a_record_belongs_to_the_segment_in_which_it_starts() {
    let mut wal = Wal::new(5);
    wal.commit(100, 1_000_000);
    while wal.lsn() < Lsn(6 * MIB - 4000) {
        wal.record(10, 0, 1, &[1; 2000]);
    }
    // The transaction's end crosses the border.
    let mut main = 2_000_000_i64.to_le_bytes().to_vec();
    main.extend_from_slice(&2_u32.to_le_bytes());
    main.extend_from_slice(&2000_i32.to_le_bytes());
    main.resize(main.len() + 8000, 0);
    let crossing = wal.record(1, 0x80, 101, &main);
    let after = wal.commit(102, 3_000_000);
    for piece in [1000, 8192, usize::MAX] {
        let all = index(&wal, piece);
        assert_eq!(all.len(), 2);
        assert_eq!((xids(&all[0]), xids(&all[1])), (vec![100, 101], vec![102]));
        assert!(all[0].is_whole());
        assert_eq!((all[0].end_lsn, all[0].last_record_lsn), (Lsn(6 * MIB), Some(crossing)));
        assert_eq!(all[0].last_record_end_lsn, Some(after));
        assert_eq!(all[0].ends[0].time, Timestamp::from_pg_micros(1_000_000));
        assert_eq!((all[1].completeness.clone(), all[1].end_lsn), (Completeness::Tail, wal.lsn()));
    }
}

#[test]
fn a_segment_is_finished_only_with_the_record_that_starts_in_it() {
    let mut wal = Wal::new(5);
    wal.record(10, 0, 1, &vec![1; 2 * MIB as usize + 500_000]);
    let rest = wal.lsn();
    let mut indexer = Indexer::new(stream(&wal), wal.start_lsn);
    indexer.feed(wal.start_lsn, &wal.bytes[..2 * MIB as usize]);
    assert!(indexer.take_finished().is_empty());
    indexer.feed(indexer.position(), &wal.bytes[2 * MIB as usize..]);
    let finished = indexer.take_finished();
    assert_eq!(finished.len(), 2);
    assert!(finished.iter().all(SegmentIndex::is_whole));
    assert_eq!(finished[1].first_record_lsn, None);
    assert_eq!(indexer.current().end_lsn, rest);
}

#[test]
fn damage_breaks_the_index_of_its_segment_only() {
    let mut wal = Wal::new(5);
    let mut commits = Vec::new();
    for segment in 0..4 {
        commits.push(wal.commit(100 + segment, i64::from(segment)));
        wal.fill_segment();
    }
    let at = (commits[1].0 - wal.start_lsn.0) as usize + 20_000;
    wal.bytes[at] ^= 1;
    for piece in [5000, 131_072, usize::MAX] {
        let all = index(&wal, piece);
        let whole: Vec<bool> = all.iter().take(4).map(SegmentIndex::is_whole).collect();
        assert_eq!(whole, [true, false, true, true], "{:?}", all[1].completeness);
        assert_eq!(all.iter().flat_map(xids).collect::<Vec<_>>(), [100, 101, 102, 103]);
        assert!(all[1].end_lsn.0 <= wal.start_lsn.0 + at as u64);
    }
}

#[test]
fn bytes_given_twice_are_passed_over_and_a_jump_breaks_what_it_jumps() {
    let mut wal = Wal::new(5);
    for segment in 0..4 {
        wal.commit(100 + segment, i64::from(segment));
        wal.fill_segment();
    }
    let mut indexer = Indexer::new(stream(&wal), wal.start_lsn);
    indexer.feed(wal.start_lsn, &wal.bytes[..500_000]);
    indexer.feed(wal.start_lsn, &wal.bytes[..MIB as usize]);
    let jump = (2 * MIB + MIB / 2) as usize;
    indexer.feed(wal.start_lsn.saturating_add(jump as u64), &wal.bytes[jump..]);
    let all = indexer.take_finished();
    assert_eq!(all.iter().map(SegmentIndex::is_whole).collect::<Vec<_>>(), [true, false, false, true]);
    assert_eq!(all.iter().flat_map(xids).collect::<Vec<_>>(), [100, 103]);
}

#[test]
fn what_the_wal_says_of_itself_is_kept() {
    let mut wal = Wal::new(5);
    let mut checkpoint = Vec::new();
    for number in [wal.start_lsn.0, 1 | 1 << 32, 1 | 2 << 32, 3 << 32 | 800, 0, 0, 0, 0, 1_700_000_000, 0, 0] {
        checkpoint.extend_from_slice(&number.to_le_bytes());
    }
    let online = wal.record(0, 0x10, 0, &checkpoint);
    let mut point = 77_i64.to_le_bytes().to_vec();
    point.extend_from_slice(b"before the migration");
    point.resize(8 + 64, 0);
    let named = wal.record(0, 0x70, 0, &point);
    let ended = wal.record(0, 0x50, 0, &0x1234_u64.to_le_bytes());
    let made = wal.record(5, 0x00, 0, b"\x74\x40\0\0/srv/fast\0");
    wal.commit(u32::MAX, 5);
    wal.record(22, 0, 0, &[1]);
    let index = index(&wal, usize::MAX).remove(0);
    let at = &index.checkpoints[0];
    assert_eq!((at.lsn, at.what.shutdown, at.what.redo_lsn), (online, false, wal.start_lsn));
    assert_eq!((at.what.timeline, at.what.previous_timeline), (TimelineId(1), TimelineId(1)));
    assert_eq!((at.what.next_xid, at.what.wal_level), (FullXid(3 << 32 | 800), Some(WalLevel(2))));
    assert_eq!(at.what.time, Timestamp::from_unix_seconds(1_700_000_000));
    assert_eq!((index.restore_points[0].lsn, index.restore_points[0].name.as_str()), (named, "before the migration"));
    assert_eq!(index.backup_ends, [At { lsn: ended, what: Lsn(0x1234) }]);
    let place = MadeTablespace { oid: 0x4074, path: "/srv/fast".to_owned() };
    assert_eq!(index.made_tablespaces, [At { lsn: made, what: place }]);
    assert_eq!(index.full_xid(&index.ends[0]), Some(FullXid(2 << 32 | u64::from(u32::MAX))));
    assert!(index.has_unknown_rmgr);
    assert_eq!(index.completeness, Completeness::Tail);
    assert_eq!(SegmentIndex::decode(&index.encode()), Ok(index));
}

#[test]
fn a_transaction_end_of_another_form_breaks_the_index() {
    let mut wal = Wal::new(5);
    wal.commit(100, 1);
    let bad = wal.record(1, 0x00, 101, &[1; 9]);
    wal.commit(102, 1);
    let index = index(&wal, usize::MAX).remove(0);
    assert!(matches!(index.completeness, Completeness::Broken { lsn, .. } if lsn == bad));
    assert_eq!(index.end_lsn, bad);
}

#[test]
fn sections_of_later_programs_are_skipped() {
    let index = SegmentIndex::empty(TimelineId(3), Lsn(MIB));
    let mut bytes = index.encode();
    bytes.extend_from_slice(&[99, 3, 1, 2, 3]);
    assert_eq!(SegmentIndex::decode(&bytes), Ok(index));
    bytes[0] = 99;
    assert_eq!(SegmentIndex::decode(&bytes), Err(DecodeError::Version { found: 99 }));
}

fn arbitrary_index() -> impl Strategy<Value = SegmentIndex> {
    let end =
        (any::<u64>(), any::<u64>(), 0..4, any::<u32>(), any::<i64>()).prop_map(|(lsn, end_lsn, kind, xid, time)| {
            let kinds = [EndKind::Commit, EndKind::Abort, EndKind::CommitPrepared, EndKind::AbortPrepared];
            let kind = kinds[kind as usize];
            TransactionEnd { lsn: Lsn(lsn), end_lsn: Lsn(end_lsn), kind, xid: Xid(xid), time: Timestamp(time) }
        });
    let point = (any::<u64>(), ".{0,20}", any::<i64>()).prop_map(|(lsn, name, time)| RestorePoint {
        lsn: Lsn(lsn),
        name,
        time: Timestamp(time),
    });
    let recovery = (any::<u64>(), any::<i64>(), any::<(u32, u32)>(), any::<Option<i32>>()).prop_map(
        |(lsn, time, (timeline, previous), level)| At {
            lsn: Lsn(lsn),
            what: EndOfRecovery {
                time: Timestamp(time),
                timeline: TimelineId(timeline),
                previous_timeline: TimelineId(previous),
                wal_level: level.map(WalLevel),
            },
        },
    );
    let broken = (any::<u64>(), ".{0,30}").prop_map(|(lsn, reason)| Completeness::Broken { lsn: Lsn(lsn), reason });
    let completeness = prop_oneof![Just(Completeness::Whole), Just(Completeness::Tail), broken];
    let lists = (
        proptest::collection::vec(end, 0..50),
        proptest::collection::vec(point, 0..5),
        proptest::collection::vec(recovery, 0..3),
        proptest::collection::vec(any::<(u64, u64)>(), 0..3),
        proptest::collection::vec((any::<u64>(), any::<u32>(), ".{0,20}"), 0..3),
    );
    (any::<(u32, u64, u64, bool)>(), completeness, lists).prop_map(
        |((timeline, start, end, flag), completeness, (ends, points, recoveries, backups, places))| SegmentIndex {
            end_lsn: Lsn(end),
            completeness,
            major: flag.then_some(Major(17)),
            near_xid: (start > 0).then_some(FullXid(start)),
            has_unknown_rmgr: flag,
            ends,
            restore_points: points,
            ends_of_recovery: recoveries,
            made_tablespaces: places
                .into_iter()
                .map(|(lsn, oid, path)| At { lsn: Lsn(lsn), what: MadeTablespace { oid, path } })
                .collect(),
            backup_ends: backups.into_iter().map(|(a, b)| At { lsn: Lsn(a), what: Lsn(b) }).collect(),
            ..SegmentIndex::empty(TimelineId(timeline), Lsn(start))
        },
    )
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(index in arbitrary_index()) {
        prop_assert_eq!(SegmentIndex::decode(&index.encode()), Ok(index));
    }

    #[test]
    fn any_bytes_decode_or_are_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        drop(SegmentIndex::decode(&bytes));
        if let Some(version) = bytes.first_mut() {
            *version = INDEX_VERSION;
        }
        drop(SegmentIndex::decode(&bytes));
    }

    #[test]
    fn damaged_indexes_decode_or_are_refused(
        index in arbitrary_index(),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..5),
    ) {
        let mut bytes = index.encode();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        drop(SegmentIndex::decode(&bytes));
    }
}
