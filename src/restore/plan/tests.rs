use super::*;
use crate::pg::timeline::HistoryEntry;
use crate::repository::backup_object::{ResourceManager, Setting, Surroundings, TablePacks, Totals};
use crate::repository::catalogue::WalObject;
use crate::repository::layout::{ContentHash, Key, WalRange};
use crate::util::digest::Digest;

const MIB: u64 = 1 << 20;

fn size() -> SegmentSize {
    SegmentSize::new(MIB).expect("1 MiB")
}

fn incarnation() -> Incarnation {
    Incarnation { ordinal: 1, system_id: SystemId(7) }
}

fn backup(id: u32, timeline: u32, start: u64, stop: u64) -> BackupCommit {
    BackupCommit {
        format: 1,
        id: format!("20261123T210000Z-{id:06x}").parse().expect("id"),
        generation: String::new(),
        system_id: SystemId(7),
        major: Major(18),
        server_version: "18.4".into(),
        segment_size: size(),
        timeline: TimelineId(timeline),
        start_lsn: Lsn(start),
        stop_lsn: Lsn(stop),
        started_at: Timestamp(0),
        stopped_at: Timestamp(1),
        from_standby: false,
        tablespaces: Vec::new(),
        totals: Totals { files: 3, bytes: 1000, stored_bytes: 500 },
        damaged_blocks: Vec::new(),
        surroundings: Surroundings::default(),
        packs: Vec::new(),
        tables: TablePacks { packs: Vec::new(), tables: Vec::new() },
    }
}

fn range(timeline: u32, segment: u64, from: u64, to: u64, hash: &[u8]) -> WalObject {
    let hash = ContentHash::of(&Digest::sha256(hash));
    let whole = (from, to) == (0, MIB);
    let range = WalRange { timeline: TimelineId(timeline), segment: SegmentNo(segment), from, to, hash, whole };
    let key = Key::wal(incarnation(), &range, size());
    WalObject { range, key, bytes: to - from, last_modified: chrono::DateTime::UNIX_EPOCH }
}

fn whole(timeline: u32, segments: std::ops::Range<u64>) -> Vec<WalObject> {
    segments.map(|s| range(timeline, s, 0, MIB, &s.to_le_bytes())).collect()
}

fn history(timeline: u32, ancestors: &[(u32, u64)]) -> (HistoryObject, HistoryFile) {
    let hash = ContentHash::of(&Digest::sha256(&timeline.to_le_bytes()));
    let timeline = TimelineId(timeline);
    let entries = ancestors.iter().map(|(timeline, lsn)| HistoryEntry {
        timeline: TimelineId(*timeline),
        switch_lsn: Lsn(*lsn),
        reason: String::new(),
    });
    let key = Key::history(incarnation(), timeline, hash);
    (HistoryObject { timeline, hash, key }, HistoryFile { entries: entries.collect() })
}

#[derive(Default)]
struct Stored {
    backups: Vec<BackupCommit>,
    wal: Vec<WalObject>,
    histories: Vec<(HistoryObject, HistoryFile)>,
    gaps: Vec<Gap>,
}

fn plan(stored: &Stored, timeline: u32, lsn: u64) -> Result<Plan, PlanError> {
    let listing = WalListing { ranges: stored.wal.clone(), histories: Vec::new() };
    Plan::build(&PlanInput {
        environment: "shop",
        incarnation: incarnation(),
        segment_size: size(),
        backups: &stored.backups,
        backup: None,
        wal: &listing,
        histories: &stored.histories,
        gaps: &stored.gaps,
        stop: Stop { timeline: TimelineId(timeline), lsn: Lsn(lsn), inclusive: false, end_lsn: Lsn(lsn + 50) },
        lacks: &[],
    })
}

fn chosen(plan: &Plan) -> Vec<(u32, u64, bool)> {
    plan.wal.iter().map(|s| (s.timeline.0, s.segment.0, s.left)).collect()
}

/// Timeline 1 left at 5.5 MiB for 2, which was left at 7.25 MiB for 3; 4 is a sibling of 2.
fn family() -> Stored {
    let mut wal = whole(1, 0..9);
    wal.extend(whole(2, 5..9));
    wal.extend(whole(3, 7..12));
    wal.extend(whole(4, 5..7));
    let (first, second) = (5 * MIB + MIB / 2, 7 * MIB + MIB / 4);
    Stored {
        backups: vec![backup(1, 1, MIB + 40, 2 * MIB), backup(2, 1, 6 * MIB, 7 * MIB), backup(3, 3, 8 * MIB, 9 * MIB)],
        wal,
        histories: vec![history(2, &[(1, first)]), history(3, &[(1, first), (2, second)]), history(4, &[(1, first)])],
        gaps: Vec::new(),
    }
}

#[test]
fn the_newest_backup_before_the_stop_is_taken() {
    let stored = Stored {
        backups: vec![backup(1, 1, 10, MIB), backup(2, 1, 2 * MIB, 3 * MIB), backup(3, 1, 4 * MIB, 5 * MIB)],
        wal: whole(1, 0..9),
        ..Stored::default()
    };
    assert_eq!(plan(&stored, 1, 3 * MIB).expect("plan").backup.id, stored.backups[1].id);
    assert_eq!(plan(&stored, 1, 3 * MIB - 1).expect("plan").backup.id, stored.backups[0].id);
    assert_eq!(plan(&stored, 1, 8 * MIB).expect("plan").backup.id, stored.backups[2].id);
    let early = plan(&stored, 1, MIB - 1);
    let nearest = Nearest { before: None, after: Some((TimelineId(1), Lsn(MIB))) };
    assert_eq!(early, Err(PlanError::NoBackup { timeline: TimelineId(1), lsn: Lsn(MIB - 1), nearest }));
}

#[test]
fn each_segment_is_taken_from_the_newest_timeline_that_has_begun() {
    let stored = family();
    let planned = plan(&stored, 3, 8 * MIB).expect("plan");
    assert_eq!(planned.backup.id, stored.backups[0].id, "the second is not on the way, the third too new");
    let expected = [
        (1, 1, false),
        (1, 2, false),
        (1, 3, false),
        (1, 4, false),
        (1, 5, true),
        (2, 5, false),
        (2, 6, false),
        (2, 7, true),
        (3, 7, false),
        (3, 8, false),
    ];
    assert_eq!(chosen(&planned), expected);
    let left = planned.wal.iter().find(|s| s.left).expect("there");
    assert_eq!((left.needed_bytes, left.objects[0].use_to), (MIB / 2, MIB / 2));
    assert_eq!(planned.histories.len(), 3, "those of siblings too");

    // A target on the old timeline, past the point where it was left.
    let diverged = plan(&stored, 1, 8 * MIB - 100).expect("plan");
    assert_eq!(diverged.backup.id, stored.backups[1].id);
    assert_eq!(chosen(&diverged), [(1, 6, false), (1, 7, false)]);
    // Before the fork, asked for on the new timeline: the new timeline's segment is the one that PostgreSQL reads.
    let before = plan(&stored, 2, 5 * MIB + 100).expect("plan");
    assert_eq!(chosen(&before).last(), Some(&(2, 5, false)));
}

#[test]
fn bytes_below_a_switch_are_taken_from_either_timeline() {
    let mut stored = family();
    stored.wal.retain(|o| (o.range.timeline.0, o.range.segment.0) != (2, 5));
    stored.wal.push(range(2, 5, MIB / 2, MIB, b"new"));
    let planned = plan(&stored, 2, 6 * MIB).expect("plan");
    let segment = planned.wal.iter().find(|s| (s.timeline.0, s.segment.0) == (2, 5)).expect("there");
    let used: Vec<_> = segment.objects.iter().map(|o| (o.use_from, o.use_to)).collect();
    assert_eq!(used, [(0, MIB / 2), (MIB / 2, MIB)]);
    assert!(segment.objects[0].key.contains("/00000001/") && segment.objects[1].key.contains("/00000002/"));

    // Above the switch point nothing else will do.
    stored.wal.retain(|o| (o.range.timeline.0, o.range.segment.0) != (2, 5));
    let hole = plan(&stored, 2, 6 * MIB);
    assert!(matches!(hole, Err(PlanError::Hole { start, .. }) if start == Lsn(5 * MIB + MIB / 2)), "{hole:?}");
}

#[test]
fn a_hole_is_named_with_its_cause_and_what_can_be_reached() {
    let mut stored = Stored {
        backups: vec![backup(1, 1, 10, MIB), backup(2, 1, 6 * MIB, 7 * MIB)],
        wal: whole(1, 0..3),
        ..Stored::default()
    };
    stored.wal.extend(whole(1, 5..9));
    stored.gaps.push(Gap {
        timeline: TimelineId(1),
        start_lsn: Lsn(3 * MIB),
        end_lsn: Lsn(5 * MIB),
        found_at: Timestamp(0),
        cause: "the slot was dropped".into(),
    });
    let Err(error) = plan(&stored, 1, 5 * MIB) else { panic!("reached") };
    let text = error.to_string();
    assert!(
        text.starts_with("WAL [0/300000, 0/400000) of timeline 1 is not stored (lost: the slot was dropped"),
        "{text}"
    );
    assert!(text.ends_with("the nearest points are 0/300000 on timeline 1 and 0/700000 on timeline 1"), "{text}");
    assert!(plan(&stored, 1, 8 * MIB).is_ok(), "the second backup lies behind the hole");
}

#[test]
fn conflicts_and_unknown_timelines_are_refused() {
    let mut stored = family();
    assert!(matches!(plan(&stored, 9, MIB), Err(PlanError::NoTimeline(TimelineId(9)))));
    stored.wal.push(range(3, 8, 0, MIB, b"other"));
    assert!(matches!(plan(&stored, 3, 8 * MIB), Err(PlanError::WalConflict { .. })));
    stored.histories.push(history(3, &[]));
    assert!(matches!(plan(&stored, 3, 8 * MIB), Err(PlanError::HistoryConflict(TimelineId(3)))));
    stored.histories.clear();
    stored.histories.push(history(2, &[]));
    assert!(matches!(plan(&stored, 3, 8 * MIB), Err(PlanError::NoHistory(TimelineId(3)))));
}

#[test]
fn libraries_that_replay_needs_are_named() {
    let mut stored = family();
    let surroundings = &mut stored.backups[0].surroundings;
    surroundings.preload_libraries = vec!["pg_cron".into(), "$libdir/own_storage".into()];
    let manager = |id, name: &str| ResourceManager { id, name: name.to_owned() };
    surroundings.resource_managers = vec![manager(130, "Own_Storage"), manager(131, "other")];
    let planned = plan(&stored, 3, 8 * MIB).expect("plan");
    assert_eq!(planned.preload_libraries, ["$libdir/own_storage"]);
    let text = planned.to_string();
    assert!(text.contains("\n  preload   $libdir/own_storage, which replay needs"), "{text}");
    assert!(text.contains("\n  missing   the library of the resource manager other (131)"), "{text}");
    assert!(text.contains("the source preloads pg_cron, $libdir/own_storage\n"), "{text}");
}

#[test]
fn a_plan_survives_json() {
    let mut stored = family();
    for (name, value) in [("max_connections", "300"), ("work_mem", "4MB")] {
        let setting = Setting { name: name.into(), value: value.into(), file: None };
        stored.backups[0].surroundings.settings.push(setting);
    }
    stored.backups[0].tablespaces.push(Tablespace { oid: 7, path: "/srv/fast".into(), bytes: 400 });
    let plan = plan(&stored, 3, 8 * MIB).expect("plan");
    assert!(plan.to_string().contains("\n            400 B of it in the tablespace /srv/fast\n"), "{plan}");
    assert!(plan.to_string().contains("max_connections at least 300") && !plan.to_string().contains("work_mem"));
    let text = serde_json::to_string(&plan).expect("JSON");
    assert_eq!(serde_json::from_str::<Plan>(&text).expect("back"), plan);
    assert!(plan.to_string().contains("timelines 1 → 2 → 3"), "{plan}");
}
