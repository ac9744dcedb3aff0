//! Targets against small archives: segments of 1 MiB, a transaction end for every entry of a list.

use super::*;
use crate::pg::{FullXid, Xid};
use crate::wal::transactions::{At, Completeness, EndKind, RestorePoint, Row, SegmentIndex};

const MIB: u64 = 1 << 20;
const ONE: TimelineId = TimelineId(1);
const TWO: TimelineId = TimelineId(2);

fn second(second: f64) -> Timestamp {
    Timestamp((second * 1e6) as i64)
}

/// An archive that begins with segment 1, in which backup `b1` lies: from 1.0 to 1.1 MiB, ended at second 10.
struct Archive {
    history: History,
    followed: TimelineId,
    stored: StoredRanges,
    backups: Vec<BackupPoint>,
    claims: Vec<Claim>,
    gaps: Vec<Gap>,
    indexes: Vec<SegmentIndex>,
}

/// A position in hundredths of MiB, aligned as records are.
fn at(hundredths: u64) -> Lsn {
    Lsn(hundredths * MIB / 100 / 8 * 8)
}

impl Archive {
    /// With these transaction ends (place in hundredths of MiB, time in seconds), stored up to `end`.
    fn new(ends: &[(u64, f64)], end: u64) -> Archive {
        let mut archive = Archive {
            history: History::default(),
            followed: ONE,
            stored: StoredRanges::default(),
            backups: Vec::new(),
            claims: Vec::new(),
            gaps: Vec::new(),
            indexes: Vec::new(),
        };
        archive.history.add_root(ONE);
        archive.stored.add(ONE, at(100), at(end));
        archive.backup("b1", ONE, 100, 110, 10.0);
        archive.index(ONE, 100, end, ends);
        archive
    }

    fn backup(&mut self, id: &str, timeline: TimelineId, start: u64, stop: u64, time: f64) {
        let (start_lsn, stop_lsn) = (at(start), at(stop));
        self.backups.push(BackupPoint { id: id.to_owned(), timeline, start_lsn, stop_lsn, stop_time: second(time) });
    }

    fn claim(&mut self, timeline: TimelineId, clock: &str, time: f64, lsn: u64) {
        let (clock, server_time, margin_micros) = (clock.to_owned(), second(time), 1_000_000);
        self.claims.push(Claim { timeline, clock, server_time, lsn: at(lsn), margin_micros });
    }

    /// Indexes of the segments from `from` to `to`; the last is a tail unless it ends with its segment.
    fn index(&mut self, timeline: TimelineId, from: u64, to: u64, ends: &[(u64, f64)]) {
        for segment in from / 100..to.div_ceil(100) {
            let (start, end) = (segment * 100, (segment * 100 + 100).min(to));
            let mut index = SegmentIndex::empty(timeline, at(start));
            index.end_lsn = at(end);
            index.near_xid = Some(FullXid(7 << 32 | 500));
            let whole = end == start + 100;
            index.completeness = if whole { Completeness::Whole } else { Completeness::Tail };
            let here = ends.iter().filter(|(place, _)| (start..end).contains(place));
            index.ends = here.map(|(place, time)| entry(*place, *time)).collect();
            index.last_record_lsn = Some(Lsn(at(end).0 - 64));
            index.last_record_end_lsn = Some(at(end));
            index.first_record_lsn = Some(Lsn(at(start).0 + 40));
            self.indexes.push(index);
        }
        self.indexes.sort_by_key(|index| (index.start_lsn, index.timeline));
    }

    fn view(&self) -> ArchiveView<'_> {
        ArchiveView {
            segment_size: SegmentSize::new(MIB).expect("valid"),
            history: &self.history,
            followed: self.followed,
            stored: &self.stored,
            backups: &self.backups,
            claims: &self.claims,
            gaps: &self.gaps,
        }
    }

    fn find(&self, target: &str) -> Result<Moment, Unreachable> {
        let (target, exclusive) = target.strip_suffix(" exclusive").map_or((target, false), |target| (target, true));
        let (target, timeline) = match target.split_once(" on ") {
            Some((target, timeline)) => (target, Some(TimelineId(timeline.parse().expect("a number")))),
            None => (target, None),
        };
        let target = match target.strip_prefix("t:") {
            Some(time) => Target::Time(second(time.parse().expect("a number"))),
            None => match target.strip_prefix("at:") {
                Some(place) => Target::Lsn(at(place.parse().expect("a number"))),
                None => target.parse().expect("a target"),
            },
        };
        let request = Request { target, exclusive, timeline };
        let whole = resolve(&request, &self.view(), &self.indexes);
        // Nothing changes when the search is ended as soon as it says so.
        if let Ok(mut search) = Search::new(&request, &self.view()) {
            for index in &self.indexes {
                let end_lsn = index.start_lsn.saturating_add(MIB);
                if search.is_done() || end_lsn <= search.scan_from() {
                    continue;
                }
                search.push(index);
            }
            let early = search.finish();
            assert_eq!(early.as_ref().map(|m| &m.stop), whole.as_ref().map(|m| &m.stop), "ended early");
        }
        // Nor when only those segments are looked into that the search wants.
        assert_eq!(self.find_narrowed(&request), whole, "narrowed");
        whole
    }

    fn find_narrowed(&self, request: &Request) -> Result<Moment, Unreachable> {
        let mut search = Search::new(request, &self.view())?;
        for index in &self.indexes {
            let row = Row::of(index);
            let is_wanted = search.wants(&row);
            search.push(if is_wanted { index } else { &row.index });
        }
        search.finish()
    }

    #[track_caller]
    fn check(&self, target: &str, expected: &str) {
        let shown = match self.find(target) {
            Ok(Moment { stop, backup, .. }) => {
                let how = if stop.inclusive { "after" } else { "before" };
                format!("{how} {} on {} from {backup}", place(stop.lsn), stop.timeline)
            }
            Err(error) => {
                let name = format!("{error:?}");
                let name: String = name.chars().take_while(|c| c.is_alphanumeric()).collect();
                let places: Vec<String> = error.alternatives().iter().map(|p| place(p.lsn)).collect();
                if places.is_empty() { name } else { format!("{name}: {}", places.join(", ")) }
            }
        };
        assert_eq!(shown, expected, "{target}");
    }
}

fn entry(place: u64, time: f64) -> crate::wal::transactions::TransactionEnd {
    let (lsn, end_lsn) = (at(place), Lsn(at(place).0 + 64));
    let xid = Xid(u32::try_from(place).expect("small"));
    crate::wal::transactions::TransactionEnd { lsn, end_lsn, kind: EndKind::Commit, xid, time: second(time) }
}

/// In hundredths of MiB again; the last record of an index lies 64 bytes before its end.
fn place(lsn: Lsn) -> String {
    match (0..5000).find(|hundredths| at(*hundredths) == lsn) {
        Some(found) => found.to_string(),
        None => format!("last of {}", (0..5000).find(|h| at(*h).0 == lsn.0 + 64).unwrap_or(0)),
    }
}

#[test]
fn a_time_is_the_state_before_the_first_end_past_it() {
    let mut archive = Archive::new(&[(120, 20.0), (130, 30.0), (240, 40.0), (250, 50.0)], 300);
    for (target, expected) in [
        ("t:10", "before 120 on 1 from b1"),
        ("t:19.9", "before 120 on 1 from b1"),
        ("t:20", "before 130 on 1 from b1"),
        ("t:20 exclusive", "before 120 on 1 from b1"),
        ("t:35", "before 240 on 1 from b1"),
        ("t:49.999", "before 250 on 1 from b1"),
        ("t:50 exclusive", "before 250 on 1 from b1"),
        ("t:50", "NotCovered: last of 300"),
        ("t:9.9", "BeforeWindow: 110"),
    ] {
        archive.check(target, expected);
    }
    let moment = archive.find("t:35").expect("reachable");
    assert_eq!(moment.last_included, Some(entry(130, 30.0)));
    assert_eq!(moment.first_excluded, Some(entry(240, 40.0)));
    assert_eq!((moment.wal_start_lsn, moment.wal_end_lsn), (at(100), Lsn(at(240).0 + 64)));
    archive.claim(ONE, "a", 90.0, 300);
    archive.check("t:50", "after last of 300 on 1 from b1");
    archive.check("t:89", "after last of 300 on 1 from b1");
    archive.check("t:89.1", "NotCovered: 300");
}

#[test]
fn a_time_on_an_idle_server_needs_coverage_alone() {
    let mut archive = Archive::new(&[], 150);
    archive.check("t:15", "NotCovered: last of 150");
    archive.claim(ONE, "a", 100.0, 150);
    archive.check("t:15", "after last of 150 on 1 from b1");
    archive.check("t:5", "BeforeWindow: 110");
    // What is claimed and not stored proves nothing.
    archive.claim(ONE, "a", 200.0, 151);
    archive.check("t:150", "NotCovered: 150");
}

#[test]
fn small_inversions_are_usual_and_ignored() {
    let archive = Archive::new(&[(120, 20.0), (130, 20.009), (140, 20.001), (150, 21.0), (160, 20.1)], 200);
    archive.check("t:20.005", "before 130 on 1 from b1");
    archive.check("t:20.05", "before 150 on 1 from b1");
}

#[test]
fn a_clock_that_was_set_back_makes_times_ambiguous() {
    let mut archive = Archive::new(&[(120, 20.0), (130, 60.0), (140, 40.0), (150, 70.0)], 200);
    archive.check("t:50", "Ambiguous: 130, 150");
    archive.check("t:30", "before 130 on 1 from b1");
    archive.check("t:65", "before 150 on 1 from b1");
    archive.check("t:80", "NotCovered: last of 200");
    archive.claim(ONE, "a", 95.0, 200);
    archive.check("t:80", "after last of 200 on 1 from b1");
}

#[test]
fn two_clocks_that_claim_a_time_make_it_ambiguous() {
    let mut archive = Archive::new(&[(120, 20.0)], 200);
    archive.history.add(TWO, format!("1\t{}\tx\n", at(150)).parse().expect("well formed")).expect("no conflict");
    archive.followed = TWO;
    archive.stored.add(TWO, at(100), at(300));
    archive.index(TWO, 100, 300, &[(120, 20.0), (158, 65.0), (160, 80.0), (170, 90.0)]);
    archive.claim(ONE, "a", 100.0, 150);
    archive.claim(TWO, "b", 60.0, 155);
    archive.check("t:70", "Ambiguous: 158, 160");
    // By either clock nothing ended between: one state.
    archive.check("t:62", "before 158 on 2 from b1");
}

#[test]
fn a_time_between_two_clocks_is_the_state_at_the_fork() {
    let mut archive = Archive::new(&[(120, 20.0), (155, 25.0)], 200);
    archive.history.add(TWO, format!("1\t{}\tx\n", at(150)).parse().expect("well formed")).expect("no conflict");
    archive.stored.add(TWO, at(100), at(300));
    archive.index(TWO, 100, 300, &[(120, 20.0), (160, 80.0)]);
    archive.followed = TWO;
    archive.claim(ONE, "a", 30.0, 150);
    archive.claim(TWO, "b", 70.0, 152);
    archive.check("t:50", "before 160 on 2 from b1");
    archive.check("t:15", "before 120 on 1 from b1");
    // The diverged tail is there when it is asked for.
    archive.check("t:22 on 1", "before 155 on 1 from b1");
    archive.check("xid:155", "Unknown");
    archive.check("xid:155 on 1", "after 155 on 1 from b1");
    archive.check("latest", "after last of 300 on 2 from b1");
    archive.check("latest on 1", "after last of 200 on 1 from b1");
    archive.check("latest on 5", "UnknownTimeline");
}

/// Nothing has been proven since the backup ended: its end is a moment all the same.
#[test]
fn without_a_claim_the_moment_before_lost_wal_is_the_end_of_a_backup() {
    let mut archive = Archive::new(&[(120, 20.0)], 150);
    archive.stored.add(ONE, at(300), at(500));
    archive.index(ONE, 300, 500, &[(350, 60.0)]);
    archive.check("at:200", "InGap: 110");
    archive.backup("b2", ONE, 320, 340, 55.0);
    archive.check("at:200", "InGap: 110, 340");
    archive.claim(ONE, "a", 25.0, 130);
    archive.check("at:200", "InGap: 130, 340");
}

#[test]
fn lost_wal_is_not_jumped() {
    let mut archive = Archive::new(&[(120, 20.0)], 150);
    archive.stored.add(ONE, at(300), at(500));
    archive.index(ONE, 300, 500, &[(310, 50.0), (350, 60.0), (450, 70.0)]);
    archive.claim(ONE, "a", 25.0, 130);
    archive.check("t:15", "before 120 on 1 from b1");
    archive.check("t:22", "after last of 150 on 1 from b1");
    archive.check("t:40", "InGap: 130");
    archive.check("t:55", "InGap: 130");
    archive.check("latest", "InGap: 130");
    archive.check("at:200", "InGap: 130");
    archive.backup("b2", ONE, 320, 340, 55.0);
    archive.check("t:40", "InGap: 130, 340");
    archive.check("t:52", "before 350 on 1 from b2");
    archive.check("t:57", "before 350 on 1 from b2");
    archive.check("t:65", "before 450 on 1 from b2");
    archive.check("latest", "after last of 500 on 1 from b2");
    archive.check("at:330", "InGap: 130, 340");
    archive.gaps.push(Gap { timeline: ONE, start_lsn: at(150), end_lsn: at(300) });
    assert!(matches!(archive.find("t:40"), Err(Unreachable::InGap { noted: true, .. })));
}

#[test]
fn positions_are_taken_as_they_are_when_a_record_follows() {
    let archive = Archive::new(&[(120, 20.0), (130, 30.0)], 200);
    archive.check("at:120", "after 120 on 1 from b1");
    archive.check("at:120 exclusive", "before 120 on 1 from b1");
    archive.check("at:125", "after 125 on 1 from b1");
    archive.check("at:200", "NotCovered: last of 200");
    archive.check("at:105", "InsideBackup: 110");
    archive.check("at:50", "BeforeWindow: 110");
    let moment = archive.find("at:125 exclusive").expect("reachable");
    assert_eq!((moment.last_included, moment.first_excluded), (Some(entry(120, 20.0)), Some(entry(130, 30.0))));
    let moment = archive.find("at:120").expect("reachable");
    assert_eq!((moment.last_included, moment.first_excluded), (Some(entry(120, 20.0)), Some(entry(130, 30.0))));
}

#[test]
fn a_position_on_a_diverged_tail_names_its_timeline() {
    let mut archive = Archive::new(&[(120, 20.0)], 400);
    archive.history.add(TWO, format!("1\t{}\tx\n", at(150)).parse().expect("well formed")).expect("no conflict");
    archive.stored.add(TWO, at(100), at(200));
    archive.index(TWO, 100, 200, &[(120, 20.0)]);
    archive.followed = TWO;
    archive.check("at:350", "OnAnotherTimeline");
    archive.check("at:350 on 1", "after 350 on 1 from b1");
}

#[test]
fn transactions_and_restore_points_by_name() {
    let mut archive = Archive::new(&[(120, 20.0), (130, 30.0), (240, 40.0)], 300);
    let point = |place: u64, name: &str| RestorePoint { lsn: at(place), name: name.to_owned(), time: second(1.0) };
    archive.indexes[0].restore_points = vec![point(125, "once"), point(126, "twice")];
    archive.indexes[1].restore_points = vec![point(226, "twice")];
    archive.check("xid:130", "after 130 on 1 from b1");
    archive.check("xid:130 exclusive", "before 130 on 1 from b1");
    archive.check("xid:30064771202", "after 130 on 1 from b1");
    archive.check("xid:34359738498", "Unknown");
    archive.check("xid:131", "Unknown");
    archive.check("name:once", "after 125 on 1 from b1");
    archive.check("name:twice", "Ambiguous: 126, 226");
    archive.check("name:never", "Unknown");
    let moment = archive.find("name:once").expect("reachable");
    assert_eq!((moment.last_included, moment.first_excluded), (Some(entry(120, 20.0)), Some(entry(130, 30.0))));
    let moment = archive.find("xid:130").expect("reachable");
    assert_eq!((moment.last_included, moment.first_excluded), (Some(entry(130, 30.0)), Some(entry(240, 40.0))));
}

#[test]
fn a_backup_by_its_end() {
    let mut archive = Archive::new(&[(120, 20.0), (240, 40.0)], 300);
    archive.backup("b2", ONE, 210, 220, 30.0);
    archive.check("backup:b2", "before 220 on 1 from b2");
    archive.indexes[1].backup_ends = vec![At { lsn: Lsn(at(220).0 - 64), what: at(210) }];
    archive.check("backup:b2", "after last of 220 on 1 from b2");
    assert_eq!(archive.find("backup:b2").map(|moment| moment.wal_end_lsn), Ok(at(220)));
    archive.check("backup:b1", "before 110 on 1 from b1");
    archive.check("backup:b3", "UnknownBackup");
    archive.check("t:15", "before 120 on 1 from b1");
    archive.check("t:35", "before 240 on 1 from b2");
}

#[test]
fn wal_without_an_index_is_named() {
    let mut archive = Archive::new(&[(120, 20.0), (240, 40.0), (350, 50.0)], 400);
    archive.claim(ONE, "a", 100.0, 400);
    let lost = archive.indexes.remove(1);
    archive.check("t:15", "before 120 on 1 from b1");
    archive.check("t:45", "NotIndexed: 110");
    archive.check("latest", "after last of 400 on 1 from b1");
    archive.check("xid:240", "NotIndexed: 110");
    archive.check("xid:350", "after 350 on 1 from b1");
    archive.indexes.insert(1, lost);
    archive.indexes.pop();
    archive.check("t:60", "NotIndexed: 110");
    archive.check("latest", "NotIndexed: 110");
    archive.indexes.clear();
    archive.check("latest", "NotIndexed: 110");
    archive.check("t:15", "NotIndexed: 110");
}

#[test]
fn nothing_is_reachable_without_a_backup() {
    let mut archive = Archive::new(&[(120, 20.0)], 200);
    archive.backups.clear();
    archive.check("latest", "NoBackup");
    // One whose own WAL is not stored to its end is none.
    archive.backup("b1", ONE, 150, 210, 10.0);
    archive.check("latest", "NoBackup");
}

#[test]
fn a_transaction_whose_end_is_not_stored_whole_is_not_there() {
    let mut archive = Archive::new(&[(120, 20.0), (199, 30.0)], 200);
    archive.stored = StoredRanges::default();
    archive.stored.add(ONE, at(100), at(199));
    archive.check("t:25", "NotCovered: 120");
    archive.check("latest", "after 120 on 1 from b1");
}

#[test]
fn a_search_needs_only_what_lies_around_its_target() {
    let day = 86_400.0;
    let ends: Vec<(u64, f64)> = (0..200).map(|n| (150 + n * 10, 20.0 + n as f64 * 600.0)).collect();
    let mut archive = Archive::new(&ends, 2200);
    archive.backup("b2", ONE, 900, 910, 45_000.0);
    for n in 0..200 {
        archive.claim(ONE, "a", 25.0 + n as f64 * 600.0, 151 + n * 10);
    }
    let request = Request { target: Target::Time(second(0.6 * day)), exclusive: false, timeline: None };
    let view = archive.view();
    let mut search = Search::new(&request, &view).expect("possible");
    assert_eq!(search.scan_from(), at(910));
    let mut given = 0;
    for index in archive.indexes.iter().filter(|index| index.start_lsn.saturating_add(MIB) > at(910)) {
        if search.is_done() {
            break;
        }
        given += 1;
        search.push(index);
    }
    assert!(given < 5, "{given} indexes");
    archive.check("t:51840", "before 1020 on 1 from b2");
}

proptest::proptest! {
    /// With a clock that never goes back: exactly the transactions that ended until then, whatever was archived how.
    #[test]
    fn a_steady_clock_gives_exactly_what_had_ended(
        steps in proptest::collection::vec(0_u64..50, 1..40),
        wanted in 0_u64..1_200,
        exclusive: bool,
        later in 0_u64..300,
    ) {
        let mut time = 10;
        let ends: Vec<(u64, f64)> = steps.iter().enumerate().map(|(n, step)| {
            time += step;
            (120 + n as u64 * 7, time as f64)
        }).collect();
        let covered = time + later;
        let mut archive = Archive::new(&ends, 420);
        archive.claim(ONE, "a", covered as f64, 420);
        let target = format!("t:{wanted}{}", if exclusive { " exclusive" } else { "" });
        let past = |time: f64| time > wanted as f64 || (exclusive && time >= wanted as f64);
        let expected = ends.iter().find(|(_, time)| past(*time));
        match archive.find(&target) {
            Ok(moment) => {
                let first = moment.first_excluded.map(|end| end.lsn);
                proptest::prop_assert_eq!(first, expected.map(|(place, _)| at(*place)));
                proptest::prop_assert!(wanted >= 10 && (expected.is_some() || wanted < covered));
            }
            Err(Unreachable::NotCovered { .. }) => proptest::prop_assert!(expected.is_none() && wanted + 1 > covered),
            Err(Unreachable::BeforeWindow { .. }) => proptest::prop_assert!(wanted < 10),
            Err(other) => proptest::prop_assert!(false, "{other:?}"),
        }
    }

    /// Whatever is stored, lost, claimed and not indexed: nothing panics, and a moment can be reached from its backup.
    #[test]
    fn every_moment_can_be_reached(
        ends in proptest::collection::btree_map(101_u64..800, 0_u64..200, 0..90),
        stored in proptest::collection::vec((100_u64..800, 1_u64..300), 1..5),
        backups in proptest::collection::vec((100_u64..700, 1_u64..90, 0_u64..200), 0..4),
        claims in proptest::collection::vec((1_u32..3, 0_u64..250, 100_u64..800), 0..6),
        fork in 150_u64..700,
        missing in proptest::collection::vec(0_usize..16, 0..3),
        wanted in 0_u64..250,
        kind in 0_u8..6,
        timeline in 0_u32..4,
    ) {
        let ends: Vec<(u64, f64)> = ends.into_iter().map(|(place, time)| (place, time as f64)).collect();
        let mut archive = Archive::new(&ends, 150);
        archive.history.add(TWO, format!("1\t{}\tx\n", at(fork)).parse().expect("well formed")).expect("no conflict");
        archive.followed = if fork % 2 == 0 { ONE } else { TWO };
        for (n, (start, length)) in stored.iter().enumerate() {
            archive.stored.add(if n % 2 == 0 { ONE } else { TWO }, at(*start), at(start + length));
        }
        archive.indexes.clear();
        archive.index(ONE, 100, 790, &ends);
        archive.index(TWO, fork / 100 * 100, 795, &ends);
        for at in missing {
            if at < archive.indexes.len() {
                archive.indexes.remove(at);
            }
        }
        for (n, (start, length, time)) in backups.into_iter().enumerate() {
            archive.backup(&format!("b{}", n + 2), if start < fork { ONE } else { TWO }, start, start + length, time as f64);
        }
        for (timeline, time, place) in claims {
            archive.claim(TimelineId(timeline), &timeline.to_string(), time as f64, place);
        }
        let target = match kind {
            0 => Target::Latest,
            1 => Target::Lsn(at(100 + wanted * 3)),
            2 => Target::Xid(wanted * 3 + 100),
            3 => Target::Backup("b2".to_owned()),
            _ => Target::Time(second(wanted as f64)),
        };
        let timeline = (1..3).contains(&timeline).then_some(TimelineId(timeline));
        let request = Request { target, exclusive: kind == 5, timeline };
        let whole = resolve(&request, &archive.view(), &archive.indexes);
        proptest::prop_assert_eq!(archive.find_narrowed(&request), whole.clone());
        match whole {
            Ok(moment) => {
                let backup = archive.backups.iter().find(|backup| backup.id == moment.backup).expect("one of them");
                let path = archive.history.path_to(moment.stop.timeline).expect("known");
                let reached = archive.stored.contiguous_end_on(&path, backup.start_lsn);
                proptest::prop_assert!(path.holds(backup.timeline, backup.stop_lsn), "{moment:?}");
                proptest::prop_assert!(moment.wal_end_lsn <= reached, "{moment:?} {reached}");
                proptest::prop_assert!(moment.stop.lsn < moment.wal_end_lsn, "{moment:?}");
                proptest::prop_assert!(moment.stop.inclusive || backup.stop_lsn <= moment.stop.lsn, "{moment:?}");
            }
            Err(error) => drop(error.to_string()),
        }
    }
}

#[test]
fn the_window_ends_at_a_gap_and_begins_anew_with_the_next_backup() {
    let mut archive = Archive::new(&[], 150);
    archive.stored.add(ONE, at(300), at(500));
    archive.claim(ONE, "a", 41.0, 130);
    archive.backup("b2", ONE, 310, 320, 60.0);
    archive.backup("b3", ONE, 410, 420, 70.0);
    archive.claim(ONE, "a", 5.0, 500);
    let shown = |archive: &Archive| -> Vec<(Lsn, Option<Timestamp>, Lsn, Option<Timestamp>)> {
        let all = window::intervals(&archive.view());
        all.iter().map(|i| (i.from.lsn, i.from.time, i.to_lsn, i.to_time)).collect()
    };
    let time = |s| Some(second(s));
    // A clock that was set back does not end the window before it begins.
    let expected = [(at(110), time(10.0), at(150), time(40.0)), (at(320), time(60.0), at(500), time(70.0))];
    assert_eq!(shown(&archive), expected);
    archive.claim(ONE, "a", 91.0, 480);
    assert_eq!(shown(&archive).last().and_then(|last| last.3), time(90.0));
    assert_eq!(window::diverged_tails(&archive.view()), []);
}

#[test]
fn what_lies_past_a_fork_is_a_diverged_tail() {
    let mut archive = Archive::new(&[], 200);
    archive.history.add(TWO, format!("1\t{}\tx\n", at(150)).parse().expect("well formed")).expect("no conflict");
    archive.stored.add(TWO, at(100), at(300));
    archive.followed = TWO;
    let tail = |timeline, end| window::DivergedTail { timeline, fork_lsn: at(150), end_lsn: at(end) };
    assert_eq!(window::diverged_tails(&archive.view()), [tail(ONE, 200)]);
    archive.followed = ONE;
    assert_eq!(window::diverged_tails(&archive.view()), [tail(TWO, 300)]);
}
