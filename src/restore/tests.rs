mod calls_tests;
mod power_tests;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::fetch::Progress;
use super::gather::GatherError;
use super::plan::PlanError;
use super::run::RestoreError;
use super::target::{self, Phase, TargetError};
use super::testing::*;
use super::wal_get::{self, Answer, WalGet};
use super::{run, spool, wal};
use crate::pg::Lsn;
use crate::repository::crypto::MasterKey;
use crate::repository::layout::Key;
use crate::repository::testing::*;
use crate::util::throttle::Throttle;

async fn check_round_trip(master: Option<&MasterKey>) {
    let world = World::with_backup(master).await;
    let plan = world.plan(stop(0x80_5000)).await.expect("plan");
    assert_eq!(plan.wal.iter().map(|s| s.segment.0).collect::<Vec<_>>(), [3, 4, 5, 6, 7, 8]);
    let restored = world.restore(&plan, "data").await.expect("restore");
    world.assert_restored("data", &files());
    for segment in 3..9 {
        let content = std::fs::read(world.path("data/pg_wal").join(name(1, segment)));
        assert!(content.expect("segment") == World::segment_content(segment), "segment {segment}");
    }
    let meta = std::fs::metadata(world.path("data")).expect("there");
    assert_eq!(meta.permissions().mode() & 0o777, 0o700);
    let state = target::load_state(restored.target.root()).expect("readable").expect("there");
    assert_eq!(state.phase, Phase::Replaying);
}

fn name(timeline: u32, segment: u64) -> String {
    format!("{timeline:08X}{:08X}{:08X}", segment >> 12, segment & 0xFFF)
}

#[tokio::test]
async fn a_backup_and_its_wal_come_back() {
    check_round_trip(None).await;
}

#[tokio::test]
async fn an_encrypted_backup_and_its_wal_come_back() {
    check_round_trip(Some(&MasterKey::new([3; 32]))).await;
}

/// That a throttle holds its rate is tested beside it; here, that nothing that is fetched goes past it.
#[tokio::test]
async fn every_byte_that_a_restore_fetches_is_held_to_the_rate() {
    let mut world = World::with_backup(None).await;
    let plan = world.plan(stop(0x80_5000)).await.expect("plan");
    let throttle = Arc::new(Throttle::new(u64::MAX));
    world.repository = world.repository.throttled(Some(throttle.clone()));
    let progress = Arc::new(Progress::default());
    let options = world.options("data");
    run::run(&world.repository, plan.clone(), &world.path("data"), &options, progress.clone()).await.expect("restore");
    world.assert_restored("data", &files());
    let (fetched, held) = (progress.fetched_bytes.load(Ordering::Relaxed), throttle.taken_bytes());
    assert!(fetched > 0 && held >= fetched + plan.wal_fetch_bytes, "{held} of {fetched} and {}", plan.wal_fetch_bytes);
}

#[tokio::test]
async fn a_restored_file_system_tree_has_nothing_else() {
    let world = World::with_backup(None).await;
    let plan = world.plan(stop(0x45_0000)).await.expect("plan");
    world.restore(&plan, "data").await.expect("restore");
    let expected = files().len() - 1 + plan.wal.len() + 3;
    assert_eq!(walk(&world.path("data")).len(), expected, "{:?}", walk(&world.path("data")));
}

/// Damages one stored object, restores, expects an error that names it.
async fn check_damage(world: &World, key: &Key, damage: impl Fn(&std::path::Path)) {
    let path = world.path("repository/shop").join(key.as_str());
    let original = std::fs::read(&path).expect("stored");
    damage(&path);
    let result = match world.plan(stop(0x80_5000)).await {
        Ok(plan) => world.restore(&plan, "data").await.map(drop).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    };
    let error = result.expect_err("damage is found");
    let named = error.contains(key.as_str());
    // A WAL object that is gone is a hole; a commit object that is gone means that there is no backup.
    let missing = error.contains("is not stored") || error.contains("there is no backup") || error.contains("history");
    assert!(named || missing, "{key:?}: {error}");
    assert!(!world.path("data/global/pg_control").exists());
    crate::util::durable_fs::write(&path, &original, 0o600).expect("put back");
}

#[tokio::test]
async fn damage_is_found_and_named_for_each_kind_of_object() {
    for master in [None, Some(MasterKey::new([9; 32]))] {
        let world = World::with_backup(master.as_ref()).await;
        let inc = world.known.incarnation;
        let commit = world.plan(stop(0x80_5000)).await.expect("plan").backup.id;
        let wal = world.plan(stop(0x80_5000)).await.expect("plan").wal[2].objects[0].key.clone();
        let wal = Key::of_incarnation(inc, &wal).expect("key");
        let pack = Key::pack(inc, &commit, 1);
        let commit = Key::backup(inc, &commit, &crate::repository::layout::BackupMark::Commit);
        let gone = |path: &std::path::Path| std::fs::remove_file(path).expect("remove");
        let cut = |path: &std::path::Path| {
            let file = std::fs::OpenOptions::new().write(true).open(path).expect("open");
            file.set_len(file.metadata().expect("meta").len() / 2).expect("cut");
        };
        for key in [&wal, &pack, &commit] {
            check_damage(&world, key, gone).await;
            check_damage(&world, key, cut).await;
            for place in [20, 90, 300] {
                let flip = |path: &std::path::Path| {
                    let mut bytes = std::fs::read(path).expect("read");
                    // In a pack, only what is inside its frames matters to a restore.
                    let at = if *key == pack { 20_000 + place } else { place };
                    bytes[at] ^= 4;
                    crate::util::durable_fs::write(path, &bytes, 0o600).expect("write");
                };
                check_damage(&world, key, flip).await;
            }
        }
        // Swapped with another of its kind.
        let other = world.plan(stop(0x80_5000)).await.expect("plan").wal[3].objects[0].key.clone();
        let other = world.path("repository/shop").join(other);
        check_damage(&world, &wal, |path| _ = std::fs::copy(&other, path).expect("swap")).await;
        let other = world.path("repository/shop").join(pack.as_str()).with_file_name("000000.pack");
        check_damage(&world, &pack, |path| _ = std::fs::copy(&other, path).expect("swap")).await;
        // And with all put back, the same directory is restored.
        let plan = world.plan(stop(0x80_5000)).await.expect("plan");
        world.restore(&plan, "data").await.expect("restore after all those failures");
        world.assert_restored("data", &files());
    }
}

/// Each try has a runtime of its own: what it has begun has ended before the next one, as with processes.
#[test]
fn an_interrupted_restore_can_be_repeated() {
    let runtime = || tokio::runtime::Runtime::new().expect("a runtime");
    let last = runtime();
    let world = last.block_on(World::with_backup(None));
    let plan = last.block_on(world.plan(stop(0x80_5000))).expect("plan");
    for millis in [0, 1, 3, 6, 12, 25] {
        let limit = std::time::Duration::from_millis(millis);
        let _ = runtime().block_on(async { tokio::time::timeout(limit, world.restore(&plan, "data")).await });
    }
    last.block_on(world.restore(&plan, "data")).expect("the last one is left alone");
    world.assert_restored("data", &files());
    target::hand_over(&world.path("data")).expect("hand over");
    let again = last.block_on(world.restore(&plan, "data"));
    assert!(matches!(again, Err(RestoreError::Target(TargetError::HandedOver(_)))), "{again:?}");
}

#[test]
fn one_that_was_killed_before_its_marker_was_there_can_be_repeated() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let world = runtime.block_on(World::with_backup(None));
    let plan = runtime.block_on(world.plan(stop(0x80_5000))).expect("plan");
    let folder = world.path("data").join(target::FOLDER);
    std::fs::create_dir_all(&folder).expect("as it began");
    crate::util::durable_fs::write(&folder.join("state.json.4711.tmp"), b"{", 0o600).expect("as it was killed");
    runtime.block_on(world.restore(&plan, "data")).expect("begun anew");
    world.assert_restored("data", &files());

    // What is not surely ours is left alone.
    std::fs::create_dir_all(world.path("other").join(target::FOLDER)).expect("a folder");
    crate::util::durable_fs::write(&world.path("other").join(target::FOLDER).join("notes"), b"mine", 0o600)
        .expect("a file");
    let refused = runtime.block_on(world.restore(&plan, "other"));
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::NotEmpty(_)))), "{refused:?}");
}

/// In one process, as in a daemon: those who write have ended when the restore returns, so the next one meets none of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_restore_has_no_writers_left_and_can_be_begun_anew_at_once() {
    let world = World::with_backup(None).await;
    let mut files = files();
    files.extend((0..6).map(|n| (format!("base/9/{n}"), (0o600, noise(n + 900, 6_000_000)))));
    world.put_backup(&files).await;
    let plan = world.plan(stop(0x80_5000)).await.expect("plan");
    let mut cancelled_count = 0;
    for part in 0..8 {
        let progress = Arc::new(Progress::default());
        let options = world.options("data");
        let (cancel, seen) = (options.cancel.clone(), progress.clone());
        let enough = plan.backup.bytes * part / 8;
        let watcher = std::thread::spawn(move || {
            while seen.bytes.load(Ordering::Relaxed) < enough && !cancel.is_cancelled() {
                std::hint::spin_loop();
            }
            cancel.cancel();
        });
        let result = run::run(&world.repository, plan.clone(), &world.path("data"), &options, progress.clone()).await;
        options.cancel.cancel();
        watcher.join().expect("the watcher");
        // Each who writes files holds the progress.
        let holders = Arc::strong_count(&progress);
        match result {
            Err(RestoreError::Cancelled) => {
                cancelled_count += 1;
                assert_eq!(holders, 1, "{part}");
                assert!(!world.path("data/global/pg_control").exists());
            }
            other => drop(other.expect("it was faster than the watcher")),
        }
    }
    assert!(cancelled_count > 4, "{cancelled_count}");
    world.restore(&plan, "data").await.expect("the last one is left alone");
    world.assert_restored("data", &files);
}

#[tokio::test]
async fn a_directory_with_something_in_it_is_refused_and_untouched() {
    let world = World::with_backup(None).await;
    let plan = world.plan(stop(0x80_5000)).await.expect("plan");
    std::fs::create_dir(world.path("data")).expect("make");
    crate::util::durable_fs::write(&world.path("data/mine"), b"x", 0o600).expect("write");
    let refused = world.restore(&plan, "data").await;
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::NotEmpty(_)))), "{refused:?}");
    assert_eq!(walk(&world.path("data")).len(), 1);

    std::fs::create_dir_all(world.path("other-spaces/16500/x")).expect("make");
    let refused = world.restore(&plan, "other").await;
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::NotEmpty(_)))), "{refused:?}");
    assert!(!world.path("other").exists());
}

#[tokio::test]
async fn a_disk_too_small_is_known_before_anything_is_written() {
    let world = World::with_backup(None).await;
    let mut plan = world.plan(stop(0x80_5000)).await.expect("plan");
    plan.disk_bytes = 1 << 60;
    let refused = world.restore(&plan, "data").await;
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::Space(_)))), "{refused:?}");
    assert!(!world.path("data").exists());
}

#[tokio::test]
async fn what_goes_to_a_tablespace_must_fit_where_it_goes() {
    let world = World::with_backup(None).await;
    let mut plan = world.plan(stop(0x80_5000)).await.expect("plan");
    assert_eq!(plan.disk_bytes - plan.directory_bytes(), 100_000);
    let mut options = run::RestoreOptions::default();
    // On most hosts another file system than that of temporary directories.
    let elsewhere = std::path::Path::new("/dev/shm/pgrecall-not-made");
    options.tablespaces.under = Some(elsewhere.to_owned());
    let target = run::check(&plan, &world.path("data"), &options).expect("fits");
    let found = target.space(&plan).expect("measured");
    let needed: u64 = found.iter().map(|f| f.needed_bytes).sum();
    assert_eq!(needed, plan.disk_bytes + (64 << 20));
    plan.backup.tablespaces[0].bytes = 1 << 60;
    plan.disk_bytes += (1 << 60) - 100_000;
    let refused = run::check(&plan, &world.path("data"), &options).expect_err("too much").to_string();
    let free = crate::util::durable_fs::free_bytes(elsewhere).expect("measured");
    assert!(refused.contains("1024 PiB needed") && refused.contains("/dev/shm/pgrecall-not-made/16500"), "{refused}");
    assert!(free < 1 << 60 && refused.contains(" free on "), "{refused}");
    assert!(!world.path("data").exists());
}

#[tokio::test]
async fn paths_of_tablespaces_are_checked() {
    let world = World::with_backup(None).await;
    let plan = world.plan(stop(0x80_5000)).await.expect("plan");
    let mut options = run::RestoreOptions::default();
    options.tablespaces.moved = vec![("/srv/none".into(), world.path("a"))];
    let refused = run::check(&plan, &world.path("data"), &options);
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::NoSuchTablespace { .. }))));
    options.tablespaces.moved = vec![("/srv/old space".into(), world.path("data/inside"))];
    let refused = run::check(&plan, &world.path("data"), &options);
    assert!(matches!(refused, Err(RestoreError::Target(TargetError::TablespacePath(_)))));
    options.tablespaces.moved = vec![("/srv/old space".into(), world.path("a"))];
    let checked = run::check(&plan, &world.path("data"), &options).expect("fine");
    assert_eq!(checked.resolve("pg_tblspc/16500/x").expect("inside"), world.path("a/x"));
    for bad in ["../x", "/etc/passwd", "a/../../b", "", "pgrecall_restore/state.json"] {
        assert!(checked.resolve(bad).is_err(), "{bad}");
    }
}

#[tokio::test]
async fn parts_are_put_together_and_padded() {
    let world = World::with_backup(None).await;
    for (from, to) in [(0, 1000), (500, 200_000), (200_000, 300_000)] {
        world.put_range(T1, 10, from, to).await;
    }
    let plan = world.plan(stop(0xA0_0000 + 250_000)).await.expect("plan");
    world.restore(&plan, "data").await.expect("restore");
    let found = std::fs::read(world.path("data/pg_wal").join(name(1, 10))).expect("there");
    assert_eq!(found.len() as u64, SIZE);
    assert!(found[..300_000] == World::segment_content(10)[..300_000]);
    assert!(found[300_000..].iter().all(|b| *b == 0));

    let beyond = world.plan(stop(0xA0_0000 + 300_000)).await;
    let Err(GatherError::Plan(PlanError::Hole { start, nearest, .. })) = beyond else { panic!("{beyond:?}") };
    assert_eq!(start, Lsn(0xA0_0000 + 300_000));
    assert_eq!(nearest.before, Some((T1, start)));
}

#[tokio::test]
async fn a_part_that_was_replaced_by_a_whole_is_found_again() {
    let world = World::with_backup(None).await;
    let mut parts = Vec::new();
    for (from, to) in [(0, 1000), (1000, 200_000)] {
        parts.push(world.put_range(T1, 10, from, to).await);
    }
    let plan = world.plan(stop(0xA0_0000 + 150_000)).await.expect("plan");
    world.put_segment(T1, 10).await;
    for part in parts {
        world.repository.store().delete(&part).await.expect("delete");
    }
    world.restore(&plan, "data").await.expect("restore");
    let found = std::fs::read(world.path("data/pg_wal").join(name(1, 10))).expect("there");
    assert!(found[..150_000] == World::segment_content(10)[..150_000]);
}

#[tokio::test]
async fn wal_get_says_absent_only_when_it_is_proven() {
    let world = World::with_backup(None).await;
    for segment in 10..90 {
        world.put_segment(T1, segment).await;
    }
    world.put_history(T2, "1\t0/6100000\twhy\n").await;
    let plan = world.plan(stop(89 * SIZE + 77)).await.expect("plan");
    let restored = world.restore(&plan, "data").await.expect("restore");
    let preloaded = wal::preload_end(&plan) as u64;
    assert!(preloaded < plan.wal.len() as u64);
    assert!(world.path("data/pg_wal/00000002.history").exists());

    let destination = world.path("data/pg_wal/RECOVERYXLOG");
    let ask = |file: String, reachable: bool| {
        let data_directory = world.path("data");
        let request = WalGet { data_directory, file, destination: destination.clone() };
        let repository = world.repository.clone();
        async move {
            let open = || async { if reachable { Ok(repository) } else { Err(anyhow::anyhow!("store down")) } };
            wal_get::answer(&request, open).await.exit_status()
        }
    };
    // In pg_wal already; past the end; another timeline; other files.
    for file in [name(1, 5), name(1, 90), name(2, 20), "00000001.history".into(), "x.backup".into()] {
        assert_eq!(ask(file.clone(), false).await, 1, "{file}");
    }
    assert_eq!(ask("00000002.history".into(), false).await, 0);
    assert_eq!(ask("00000003.history".into(), true).await, 1);
    // Not proven.
    let later = name(1, 3 + preloaded + 4);
    for file in [later.clone(), name(1, 2), "00000003.history".into()] {
        assert_eq!(ask(file.clone(), false).await, 200, "{file}");
    }
    // Fetched, again and again, the following ones beside it.
    for _ in 0..2 {
        assert_eq!(ask(later.clone(), true).await, 0);
        assert!(std::fs::read(&destination).expect("there") == World::segment_content(3 + preloaded + 4));
    }
    assert_eq!(ask(name(1, 3 + preloaded + 5), false).await, 0, "was read ahead");
    // A damaged object is not served.
    let damaged = &plan.wal[plan.wal.len() - 1].objects[0].key;
    let damaged = world.path("repository/shop").join(damaged);
    let mut bytes = std::fs::read(&damaged).expect("stored");
    bytes[5000] ^= 1;
    crate::util::durable_fs::write(&damaged, &bytes, 0o600).expect("write");
    assert_eq!(ask(name(1, 89), true).await, 200);
    drop(restored);
}

#[tokio::test]
async fn the_prefetcher_brings_what_wal_get_takes() {
    let world = World::with_backup(None).await;
    for segment in 10..100 {
        world.put_segment(T1, segment).await;
    }
    let plan = world.plan(stop(99 * SIZE + 77)).await.expect("plan");
    let restored = world.restore(&plan, "data").await.expect("restore");
    let fetcher = wal::SegmentFetcher::new(&world.repository, world.known.incarnation, segment_size());
    let prefetcher = spool::Prefetcher::new(fetcher, &plan, &restored.target.folder());
    // Until this is dropped somebody else reads ahead.
    let spool = spool::Spool::of(&restored.target.folder());
    spool.create().expect("create");
    let mut other = Some(spool.lock().expect("lock").expect("free"));
    let cancel = tokio_util::sync::CancellationToken::new();
    let running = tokio::spawn(prefetcher.run(cancel.clone()));
    let destination = world.path("data/pg_wal/RECOVERYXLOG");
    for segment in 3 + wal::preload_end(&plan) as u64..100 {
        let request =
            WalGet { data_directory: world.path("data"), file: name(1, segment), destination: destination.clone() };
        let repository = world.repository.clone();
        let answer = wal_get::answer(&request, || async { Ok(repository) }).await;
        assert!(matches!(answer, Answer::Served), "{answer:?}");
        assert!(std::fs::read(&destination).expect("there") == World::segment_content(segment), "{segment}");
        if segment > 75 {
            other = None;
        }
    }
    drop(other);
    tokio::time::timeout(std::time::Duration::from_secs(20), running)
        .await
        .expect("ends")
        .expect("joined")
        .expect("ok");
}
