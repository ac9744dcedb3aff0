//! What the reader finds in WAL made for the purpose, given in pieces of many sizes.

use proptest::prelude::*;

use super::*;
use crate::wal::testing::{MIB, SYSTEM_ID, Wal};

fn stream(wal: &Wal) -> Stream {
    Stream { timeline: wal.timeline, segment_size: wal.segment_size, system_id: Some(SystemId(SYSTEM_ID)) }
}

/// Reads everything in pieces of `piece` bytes: starts of the records, and how it ended.
fn read_from(wal: &Wal, start: Start, piece: usize) -> (Vec<u64>, Option<Stop>) {
    let mut reader = Reader::new(stream(wal), start);
    let mut found = Vec::new();
    let skip = (reader.position().0 - wal.start_lsn.0) as usize;
    for piece in wal.bytes[skip..].chunks(piece) {
        let mut records = reader.read(reader.position(), piece);
        loop {
            match records.next() {
                Ok(Some(record)) => {
                    assert_eq!(record.bytes.len(), record.header.total_bytes as usize);
                    found.push(record.lsn.0);
                }
                Ok(None) => break,
                Err(stop) => return (found, Some(stop)),
            }
        }
    }
    (found, None)
}

/// The same in pieces of all sizes that matter; fails where they differ.
#[track_caller]
fn read(wal: &Wal) -> (Vec<u64>, Option<Stop>) {
    let whole = read_from(wal, Start::Page(wal.start_lsn), usize::MAX);
    for piece in [1, 7, 24, 4096, 8192, 131_072] {
        assert_eq!(read_from(wal, Start::Page(wal.start_lsn), piece), whole, "pieces of {piece}");
    }
    whole
}

#[track_caller]
fn check(wal: &Wal, expected: &[Lsn], stop: Option<(Lsn, StopReason, StopKind)>) {
    let (found, stopped) = read(wal);
    assert_eq!(found.iter().map(|lsn| Lsn(*lsn)).collect::<Vec<_>>(), expected);
    assert_eq!(stopped.map(|stop| (stop.lsn, stop.reason, stop.kind())), stop);
}

#[test]
fn records_of_all_sizes_are_found_over_pages_and_segments() {
    let mut wal = Wal::new(5);
    let mut expected: Vec<Lsn> =
        (0..600).map(|n| wal.record(10, 0, 700 + n, &vec![1; (n as usize * 37) % 9000])).collect();
    expected.push(wal.record(10, 0, 9, &vec![2; 3 * MIB as usize]));
    expected.push(wal.record(10, 0, 9, &[3]));
    check(&wal, &expected, None);
}

#[test]
fn the_rest_of_a_record_from_before_is_skipped() {
    for rest in [1, 8, 100, 8152, 8153, 20_000] {
        let mut wal = Wal::new(5);
        wal.begin_with_rest(rest);
        let expected = [wal.record(10, 0, 1, &[1; 100]), wal.record(10, 0, 1, &[1; 100])];
        check(&wal, &expected, None);
    }
}

#[test]
fn reading_can_start_at_a_record() {
    let mut wal = Wal::new(5);
    let all: Vec<Lsn> = (0..300).map(|_| wal.record(10, 0, 1, &[1; 200])).collect();
    for (index, lsn) in all.iter().enumerate() {
        let (found, stop) = read_from(&wal, Start::Record(*lsn), 1000);
        assert_eq!((found.len(), found[0], stop), (300 - index, lsn.0, None));
    }
}

#[test]
fn a_switch_ends_the_segment_without_a_look_at_its_zeros() {
    let mut wal = Wal::new(5);
    let first = wal.record(10, 0, 1, &[1]);
    let switch = wal.switch();
    let next = wal.record(10, 0, 1, &[1]);
    assert_eq!(next, Lsn(6 * MIB + 40));
    check(&wal, &[first, switch, next], None);
}

#[test]
fn a_switch_that_fills_its_segment_skips_nothing() {
    let mut wal = Wal::new(5);
    let mut expected = Vec::new();
    while wal.lsn() < Lsn(6 * MIB - 8192) {
        expected.push(wal.record(10, 0, 1, &[1; 5000]));
    }
    // A record that leaves exactly the 24 bytes of the switch.
    let left = 6 * MIB - wal.lsn().0 - 24;
    let page_header = if wal.lsn().0.is_multiple_of(8192) { 24 } else { 0 };
    expected.push(wal.record(10, 0, 1, &vec![1; (left - page_header - 24 - 5) as usize]));
    assert_eq!(wal.lsn(), Lsn(6 * MIB - 24));
    expected.push(wal.switch());
    expected.push(wal.record(10, 0, 1, &[1]));
    check(&wal, &expected, None);
}

#[test]
fn a_record_that_a_crash_cut_off_is_dropped_when_the_server_says_so() {
    let mut wal = Wal::new(5);
    let first = wal.record(10, 0, 1, &[1; 100]);
    let torn = wal.torn_record(10, 0, 1, &[1; 20_000]);
    let says_so = wal.overwritten(torn);
    let next = wal.record(10, 0, 1, &[1]);
    check(&wal, &[first, says_so, next], None);

    let mut other = Wal::new(5);
    other.record(10, 0, 1, &[1; 100]);
    let torn = other.torn_record(10, 0, 1, &[1; 20_000]);
    let wrong = other.overwritten(Lsn(torn.0 + 8));
    check(&other, &[first], Some((wrong, StopReason::OverwriteMissing { dropped: torn }, StopKind::Damage)));
}

#[test]
fn a_record_without_its_rest_is_damage() {
    let mut wal = Wal::new(5);
    let first = wal.record(10, 0, 1, &[1; 100]);
    let torn = wal.torn_record(10, 0, 1, &[1; 20_000]);
    let page_lsn = wal.lsn();
    wal.record(10, 0, 1, &[1]);
    check(&wal, &[first], Some((torn, StopReason::ContinuationMissing { page_lsn }, StopKind::Damage)));
}

#[test]
fn zeros_and_recycled_pages_are_the_end() {
    let mut wal = Wal::new(5);
    let first = wal.record(10, 0, 1, &[1; 100]);
    let end = wal.lsn();
    wal.bytes.resize(MIB as usize, 0);
    check(&wal, &[first], Some((end, StopReason::ZeroLength, StopKind::End)));

    let mut wal = Wal::new(5);
    let mut old = Wal::new(3);
    let mut expected = Vec::new();
    while wal.lsn() < Lsn(5 * MIB + 3 * 8192) {
        expected.push(wal.record(10, 0, 1, &[1; 200]));
        old.record(10, 0, 1, &[1; 200]);
    }
    // The page after the third is still the one of the segment that was recycled.
    let cut = 2 * 8192;
    wal.bytes.truncate(cut);
    wal.bytes.extend_from_slice(&old.bytes[cut..]);
    expected.retain(|lsn| lsn.0 < 5 * MIB + cut as u64);
    let (found, stop) = read(&wal);
    assert_eq!(found.len() + 1, expected.len(), "the record over the border is not given");
    let stale = PageError::Stale { found: Lsn(3 * MIB + cut as u64) };
    assert_eq!(stop.map(|stop| (stop.reason, stop.kind())), Some((stale.into(), StopKind::End)));
}

#[test]
fn every_flipped_bit_of_a_record_is_noticed() {
    let mut wal = Wal::new(5);
    let first = wal.record(10, 0, 1, &[1; 50]);
    let second = wal.record(10, 0, 1, &[1; 50]);
    let third = wal.lsn();
    wal.record(10, 0, 1, &[1; 50]);
    let range = (second.0 - wal.start_lsn.0) as usize..(third.0 - wal.start_lsn.0) as usize - 4;
    for index in range {
        for bit in 0..8 {
            let mut bad = wal.clone();
            bad.bytes[index] ^= 1 << bit;
            let (found, stop) = read_from(&bad, Start::Page(bad.start_lsn), usize::MAX);
            // A length that reaches past what was given waits for the rest; nothing wrong is given back in any case.
            assert_eq!(found, [first.0], "byte {index} bit {bit}");
            assert!(stop.is_some_and(|stop| stop.lsn == second) || stop.is_none());
        }
    }
}

#[test]
fn pages_that_do_not_belong_are_refused() {
    fn check(change: impl Fn(&mut Vec<u8>), expected: StopReason, kind: StopKind) {
        let mut wal = Wal::new(5);
        while wal.lsn() < Lsn(6 * MIB + 100) {
            wal.record(10, 0, 1, &[1; 5000]);
        }
        change(&mut wal.bytes);
        let stop = read(&wal).1.map(|stop| (stop.reason, stop.kind()));
        assert_eq!(stop, Some((expected, kind)));
    }
    let set = |at: usize, new: &'static [u8]| move |bytes: &mut Vec<u8>| bytes[at..at + new.len()].copy_from_slice(new);
    let page = |error: PageError| StopReason::Page(error);
    let damage = StopKind::Damage;
    check(set(0, &[0x1A, 0xD1]), page(PageError::UnknownFormat { magic: 0xD11A }), StopKind::UnknownFormat);
    check(set(8192, &[1, 1]), page(PageError::Magic { magic: 0x0101 }), damage);
    check(set(8192, &[0x16, 0xD1]), StopReason::FormatChange, damage);
    check(set(8194, &[0x11]), page(PageError::Flags { flags: 0x11 }), damage);
    check(set(8194, &[0x03]), page(PageError::Flags { flags: 0x03 }), damage);
    check(set(2, &[0x00]), page(PageError::Flags { flags: 0 }), damage);
    check(set(8196, &[0]), page(PageError::Timeline), damage);
    let (found, segment) = (TimelineId(2), TimelineId(1));
    check(set(8196, &[2]), StopReason::TimelineAhead { found, segment }, damage);
    check(set(8204, &[1]), page(PageError::Address { found: Lsn(0x1_0050_2000) }), damage);
    check(set(33, &[0, 0, 1]), page(PageError::SegmentSize { found: 1 << 24 }), damage);
    check(set(37, &[0x40]), page(PageError::PageSize { found: 16384 }), damage);
    let expected = SystemId(SYSTEM_ID);
    check(set(24, &[0; 8]), StopReason::SystemId { found: SystemId(0), expected }, damage);
}

#[test]
fn a_page_of_an_older_timeline_cannot_follow() {
    let mut wal = Wal::new(5);
    let first = wal.record(10, 0, 1, &[1; 5000]);
    wal.timeline = TimelineId(3);
    let second = wal.record(10, 0, 1, &[1; 5000]);
    wal.timeline = TimelineId(2);
    let third = wal.record(10, 0, 1, &[1; 8000]);
    wal.timeline = TimelineId(3);
    let (found, before) = (TimelineId(2), TimelineId(3));
    check(
        &wal,
        &[first, second],
        Some((third, StopReason::TimelineBack { found, before }, StopKind::Damage))
            .map(|(_, reason, kind)| (Lsn(5 * MIB + 2 * 8192), reason, kind)),
    );
}

#[test]
fn a_jump_is_refused() {
    let mut wal = Wal::new(5);
    wal.record(10, 0, 1, &[1; 5000]);
    let mut reader = Reader::new(stream(&wal), Start::Page(wal.start_lsn));
    let given = Lsn(wal.start_lsn.0 + 8);
    let stop = reader.read(given, &wal.bytes).next().expect_err("a jump");
    assert_eq!(stop.reason, StopReason::Position { given, expected: wal.start_lsn });
}

#[test]
fn a_record_too_large_to_keep_is_checked_and_passed() {
    let mut wal = Wal::new(5);
    let large = wal.record(21, 0, 1, &vec![1; RECORD_BYTES_KEPT_MAX + 1000]);
    let next = wal.record(10, 0, 1, &[1]);
    let mut reader = Reader::new(stream(&wal), Start::Page(wal.start_lsn));
    let mut records = reader.read(wal.start_lsn, &wal.bytes);
    let first = records.next().expect("readable").expect("complete");
    assert!((first.lsn, first.is_cut()) == (large, true));
    assert_eq!(records.next().expect("readable").map(|record| record.lsn), Some(next));
}

proptest! {
    /// Whatever is changed, nothing panics, and without a CRC check the reader also gets past what it protects.
    #[test]
    fn damaged_wal_never_panics(
        changes in proptest::collection::vec((0_usize..60_000, any::<u8>()), 1..40),
        piece in 1_usize..20_000,
        check_crc: bool,
    ) {
        let mut wal = Wal::new(5);
        while wal.bytes.len() < 60_000 {
            let size = wal.bytes.len() % 7000;
            wal.record(10, 0, 1, &vec![1; size]);
            wal.commit(7, 5);
        }
        for (at, value) in changes {
            wal.bytes[at] = value;
        }
        let mut reader = Reader::new(stream(&wal), Start::Page(wal.start_lsn));
        if !check_crc {
            reader = reader.without_crc_check();
        }
        let mut fragments = crate::wal::Fragments::default();
        'pieces: for piece in wal.bytes.chunks(piece) {
            let mut records = reader.read(reader.position(), piece);
            loop {
                match records.next() {
                    Ok(Some(record)) => drop(fragments.decode(&record)),
                    Ok(None) => break,
                    Err(_) => break 'pieces,
                }
            }
        }
    }
}
