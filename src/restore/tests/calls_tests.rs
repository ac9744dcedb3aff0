//! Every request that a restore makes fails, is cut, is never answered or is refused, once or from then on, or is the
//! last one of its process.

use std::collections::BTreeMap;

use super::*;
use crate::repository::testing::sim::{Fault, SimStore};

const STOP: u64 = 0x50_5000;

struct Site {
    store: SimStore,
    world: World,
    files: Files,
    segments: BTreeMap<u64, Vec<u8>>,
}

fn site() -> Site {
    let store = SimStore::default();
    let world = store.process(async {
        // In memory where that can be had: what is synced here is restored hundreds of times.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("temporary directory");
        let world = World::over(store.open(), dir, None).await;
        world.fill().await;
        world
    });
    let segments = (3..6).map(|segment| (segment, World::segment_content(segment))).collect();
    Site { world: world.expect("alive"), store, files: files(), segments }
}

/// What a process does that plans and restores.
async fn restore(world: &World) -> Result<(), String> {
    let plan = world.plan(stop(STOP)).await.map_err(|e| e.to_string())?;
    world.restore(&plan, "data").await.map(drop).map_err(|e| e.to_string())
}

fn assert_whole(site: &Site, what: &str) {
    let world = &site.world;
    world.assert_restored("data", &site.files);
    for (segment, expected) in &site.segments {
        let content = std::fs::read(world.path("data/pg_wal").join(name(1, *segment))).expect("a segment");
        assert!(content == *expected, "{what}: segment {segment}");
    }
    let state = target::load_state(&world.path("data")).expect("readable").expect("there");
    assert_eq!(state.phase, Phase::Replaying, "{what}");
}

fn check(site: &Site, (call, kind, for_good): (u64, Fault, bool)) -> bool {
    let Site { store, world, .. } = site;
    let what = format!("call {call}, {kind:?}, for good: {for_good}");
    for left in ["data", "data-spaces"] {
        let _ = std::fs::remove_dir_all(world.path(left));
    }
    let stored = store.contents();
    store.fail(call, kind, for_good);
    let ended = store.process(restore(world));
    match &ended {
        Some(Ok(())) => {
            assert!(!for_good, "{what}: it must not succeed");
            assert_whole(site, &what);
        }
        Some(Err(error)) => {
            let named = ["backups", "packs", "wal", "identity", "gaps", "coverage", "/"].iter();
            assert!(named.into_iter().any(|name| error.contains(name)), "{what}: the error names no object: {error}");
        }
        None => assert_eq!(kind, Fault::Crash, "{what}"),
    }
    if !matches!(ended, Some(Ok(()))) {
        // No server starts on it, and it says what it is.
        assert!(!world.path("data/global/pg_control").exists(), "{what}");
        if world.path("data").exists() {
            let state = target::load_state(&world.path("data")).expect("readable");
            let empty = walk(&world.path("data")).is_empty();
            assert!(empty || state.is_some_and(|s| s.phase == Phase::Fetching), "{what}: it is marked unfinished");
        }
    }
    store.process(restore(world)).expect("alive").unwrap_or_else(|e| panic!("{what}: then {e}"));
    assert_whole(site, &what);
    assert!(store.contents() == stored, "{what}: a restore writes nothing into the repository");
    !matches!(ended, Some(Ok(())))
}

#[test]
fn whichever_request_of_a_restore_fails_it_is_whole_or_marked_unfinished() {
    let site = site();
    let Site { store, world, .. } = &site;
    let before = store.state().calls;
    store.process(restore(world)).expect("alive").expect("a restore");
    let calls = store.state().calls - before;
    assert!((15..300).contains(&calls), "{calls}");
    for call in 1..=calls {
        assert!(check(&site, (call, Fault::Crash, false)), "call {call}");
        assert!(check(&site, (call, Fault::Error, true)), "call {call}");
        // Not tried again, and everything else works.
        assert!(check(&site, (call, Fault::Refused, false)), "call {call}");
        // Once: the second attempt works.
        for fault in [Fault::Error, Fault::Cut, Fault::Hang] {
            assert!(!check(&site, (call, fault, false)), "call {call}: {fault:?}");
        }
    }
}
