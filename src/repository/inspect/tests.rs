use super::*;
use crate::pg::{Lsn, Timestamp};
use crate::repository::crypto::MasterKey;
use crate::repository::layout::BackupMark;
use crate::repository::testing::*;

fn everything() -> InspectSettings {
    InspectSettings { read_percent: 100, ..InspectSettings::default() }
}

async fn findings(world: &World, settings: &InspectSettings) -> Vec<String> {
    let report = inspect(&world.repository, settings, |_| {}).await.expect("the store works");
    report.findings.iter().map(|f| format!("{:?} {}: {}", f.severity, f.object, f.what)).collect()
}

/// Without the damage nothing is found; with it exactly one thing, which names `named`.
async fn check(world: &World, key: &Key, settings: &InspectSettings, damage: impl Fn(&std::path::Path), named: &str) {
    let path = world.path("repository/shop").join(key.as_str());
    let original = std::fs::read(&path).expect("stored");
    damage(&path);
    let found = findings(world, settings).await;
    assert!(!found.is_empty() && found.iter().all(|f| f.starts_with("Problem")), "{key:?}: {found:?}");
    assert!(found.iter().any(|f| f.contains(named)), "{key:?}: {found:?}");
    crate::util::durable_fs::write(&path, &original, 0o600).expect("put back");
}

fn flip(at: usize) -> impl Fn(&std::path::Path) {
    move |path| {
        let mut bytes = std::fs::read(path).expect("read");
        bytes[at] ^= 16;
        crate::util::durable_fs::write(path, &bytes, 0o600).expect("write");
    }
}

#[tokio::test]
async fn a_sound_repository_has_no_findings() {
    for master in [None, Some(MasterKey::new([4; 32]))] {
        let world = World::with_backup(master.as_ref()).await;
        world.put_history(T2, "1\t0/980000\twhy\n").await;
        world.put_segment(T2, 9).await;
        let report = inspect(&world.repository, &everything(), |_| {}).await.expect("inspect");
        assert!(report.is_sound() && report.findings.is_empty(), "{:?}", report.findings);
        assert_eq!((report.backups, report.wal_objects), (1, 8));
        assert_eq!(report.read.objects, report.read.objects_total);
        assert!(report.packs > 2 && report.stored_bytes > 1 << 20);
    }
}

#[tokio::test]
async fn each_kind_of_damage_is_found_and_named() {
    for master in [None, Some(MasterKey::new([4; 32]))] {
        let world = World::with_backup(master.as_ref()).await;
        let wal = world.put_range(T1, 6, 0, SIZE).await;
        let other = world.path("repository/shop").join(world.put_range(T1, 7, 0, SIZE).await.as_str());
        let history = world.put_history(T2, "1\t0/980000\twhy\n").await;
        world.put_segment(T2, 9).await;
        let id = catalogue::list_backups(&world.repository, world.known.incarnation).await.expect("list").remove(0).id;
        let pack = Key::pack(world.known.incarnation, &id, 1);
        let commit = Key::backup(world.known.incarnation, &id, &BackupMark::Commit);
        let gone = |path: &std::path::Path| std::fs::remove_file(path).expect("remove");
        let cut = |path: &std::path::Path| {
            std::fs::OpenOptions::new().write(true).open(path).expect("open").set_len(100).expect("cut");
        };
        let swap = |path: &std::path::Path| _ = std::fs::copy(&other, path).expect("swap");
        let names = InspectSettings::default();
        check(&world, &wal, &names, gone, "WAL [0/600000, 0/700000) of timeline 1").await;
        check(&world, &wal, &names, cut, wal.as_str()).await;
        check(&world, &wal, &names, swap, wal.as_str()).await;
        check(&world, &wal, &everything(), flip(5000), wal.as_str()).await;
        check(&world, &pack, &names, gone, pack.as_str()).await;
        check(&world, &pack, &names, cut, pack.as_str()).await;
        check(&world, &pack, &everything(), flip(5000), pack.as_str()).await;
        check(&world, &commit, &names, cut, commit.as_str()).await;
        check(&world, &commit, &names, flip(120), commit.as_str()).await;
        check(&world, &history, &names, flip(85), history.as_str()).await;
        check(&world, &history, &names, gone, "history of timeline 2").await;
    }
}

#[tokio::test]
async fn a_hole_that_was_recorded_is_a_note() {
    let world = World::with_backup(None).await;
    world.put_segment(T1, 12).await;
    assert!(findings(&world, &InspectSettings::default()).await[0].starts_with("Problem WAL [0/A00000, 0/C00000)"));
    let gap = catalogue::Gap {
        timeline: T1,
        start_lsn: Lsn(10 * SIZE),
        end_lsn: Lsn(12 * SIZE),
        found_at: Timestamp(0),
        cause: "the slot was dropped".into(),
    };
    catalogue::write_gap(&world.repository, world.known.incarnation, &gap).await.expect("write");
    let found = findings(&world, &InspectSettings::default()).await;
    assert_eq!(found, ["Note WAL [0/A00000, 0/C00000) of timeline 1: it was lost: the slot was dropped"]);
}

#[tokio::test]
async fn reading_goes_on_where_it_was_broken_off() {
    let world = World::with_backup(None).await;
    let mut seen = Vec::new();
    let whole = inspect(&world.repository, &everything(), |p| seen.push(p.after.clone())).await.expect("inspect");
    let middle = seen[seen.len() / 2].clone();
    let rest = InspectSettings { after: middle, ..everything() };
    let rest = inspect(&world.repository, &rest, |_| {}).await.expect("inspect");
    assert_eq!(rest.read.objects, whole.read.objects - seen.len() as u64 / 2 - 1);
    let part = InspectSettings { read_percent: 40, sample: 7, after: None };
    let part = inspect(&world.repository, &part, |_| {}).await.expect("inspect");
    assert!(part.read.objects > 0 && part.read.objects < whole.read.objects);
}
