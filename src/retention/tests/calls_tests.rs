//! A prune meets an error, an error after the effect, a refusal, or its death at each of its requests: nothing that is needed
//! is gone, and a clean prune afterwards comes to the same end as if nothing had happened.

use std::collections::BTreeMap;
use std::task::Poll;

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use object_store::path::Path as ObjectPath;

use super::model_tests::{on_one_thread, prune, take};
use super::world_tests::{Good, World, size};
use crate::lineage::StoredRanges;
use crate::pg::Timestamp;
use crate::repository::layout::{self, BackupMark, PinName, WalName};
use crate::repository::pin::{self, Pin};
use crate::repository::testing::sim::Fault;
use crate::repository::{Generation, Key};

type Objects = BTreeMap<ObjectPath, (Bytes, DateTime<Utc>)>;

/// Two weeks: backups that leave and that left a day ago, WAL to remove, a tail, an abandoned intent, an expired pin.
async fn two_weeks() -> (World, Generation) {
    let world = World::new().await;
    let first = take(world.clone()).await.expect("a generation");
    for day in 0..14_u64 {
        for _ in 0..8 {
            world.tick();
        }
        let own = take(world.clone()).await.expect("a generation");
        let good = world.clone().backup(own, 0).await.expect("a backup");
        if day == 3 {
            world.fail_over(2);
        }
        if day == 5 {
            let name = PinName { incarnation: good.incarnation, backup: good.id.clone(), random: 1 };
            let until = Timestamp::from(world.now() + TimeDelta::days(1));
            let pin = Pin {
                name: "test".into(),
                target: "latest".into(),
                timeline: good.timeline,
                end_lsn: good.stop_lsn,
                until,
                made_at: Timestamp(0),
                owner: "test".into(),
                temporary: false,
            };
            pin::add(&world.repository, &name, &pin).await.expect("pinned");
        }
    }
    let own = take(world.clone()).await.expect("a generation");
    // Of a writer that is gone, and never finished.
    let died = world.store.clone();
    let mut unfinished = Box::pin(world.clone().backup(own, 0));
    let call = died.state().calls + 6;
    died.state().faults.insert(call, Fault::Error);
    assert!((&mut unfinished).await.is_none());
    let own = take(world.clone()).await.expect("a generation");
    prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
    for _ in 0..16 {
        world.tick();
    }
    assert!(own > first);
    let own = take(world.clone()).await.expect("a generation");
    (world, own)
}

/// Runs to its end, or to its death.
async fn run(world: &World, own: Generation) -> Option<bool> {
    let mut work = Box::pin(prune(world.clone(), own, TimeDelta::zero()));
    let store = world.store.clone();
    std::future::poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Ready(result) => Poll::Ready(Some(result.is_ok())),
        Poll::Pending if store.state().crashed => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    })
    .await
}

/// What is there, without what differs from run to run.
fn lasting(world: &World) -> Vec<String> {
    let all = world.keys().into_iter();
    all.filter(|key| !key.starts_with("lease/") && !key.starts_with("probe/") && !key.contains(".leaving-")).collect()
}

fn set(world: &World, objects: &Objects, now: DateTime<Utc>) {
    let mut state = world.store.state();
    state.objects.clone_from(objects);
    (state.now, state.calls, state.crashed) = (now, 0, false);
    state.faults.clear();
}

/// Every visible backup is whole, and every moment of the window can be reached.
fn check(world: &World, what: &str) {
    let truth = world.truth();
    let mut stored = StoredRanges::default();
    for key in world.keys() {
        if let Some(WalName::Range(range)) = layout::parse_wal(&Key::for_tests(&key), size()) {
            stored.add(range.timeline, range.start_lsn(size()), range.end_lsn(size()));
        }
    }
    let holds = |good: &Good, mark| world.holds(&Key::backup(good.incarnation, &good.id, &mark));
    let visible: Vec<&Good> =
        truth.good.iter().filter(|g| holds(g, BackupMark::Commit) && !holds(g, BackupMark::Dropped)).collect();
    for good in &visible {
        let packs = (0..2).all(|number| world.holds(&Key::pack(good.incarnation, &good.id, number)));
        assert!(packs, "{what}: {} lacks a pack", good.id);
    }
    let start = truth.newest_claim.expect("claims") - super::world_tests::WINDOW;
    for instant in truth.instants.iter().filter(|instant| instant.at >= start) {
        assert!(truth.reaches(instant, &stored, &visible), "{what}: {} is lost", instant.at);
    }
}

/// The end to which prunes come: one now, one more when what was dropped is ripe.
async fn settle(world: &World, own: Generation) -> Vec<String> {
    for _ in 0..2 {
        assert_eq!(run(world, own).await, Some(true), "a clean prune");
        world.store.state().now += TimeDelta::hours(25);
    }
    // What a late mark kept from leaving at first leaves now.
    assert_eq!(run(world, own).await, Some(true), "a clean prune");
    lasting(world)
}

#[test]
fn a_prune_that_fails_or_dies_at_any_request_can_simply_be_repeated() {
    on_one_thread(async {
        let (world, own) = two_weeks().await;
        let (objects, now) = {
            let state = world.store.state();
            (state.objects.clone(), state.now)
        };
        set(&world, &objects, now);
        assert_eq!(run(&world, own).await, Some(true));
        let calls = world.store.state().calls;
        let removed = objects.len() - lasting(&world).len();
        assert!(removed > 20, "{removed} objects are removed");
        set(&world, &objects, now);
        let expected = settle(&world, own).await;
        // Each request in a slow run; else every eleventh, beginning with another one for each kind of fault.
        let step = if std::env::var_os("PGRECALL_SLOW").is_some() { 1 } else { 11 };
        let mut first = 0;
        for fault in [Fault::Error, Fault::ErrorAfter, Fault::Refused, Fault::Crash] {
            first += 1;
            for call in (first..=calls).step_by(step) {
                set(&world, &objects, now);
                world.store.state().faults.insert(call, fault);
                let ended = run(&world, own).await;
                assert_eq!(ended.is_none(), fault == Fault::Crash, "{fault:?} at {call}");
                world.store.state().crashed = false;
                check(&world, &format!("{fault:?} at request {call}"));
                let left = settle(&world, own).await;
                let more: Vec<&String> = left.iter().filter(|key| !expected.contains(key)).collect();
                let fewer: Vec<&String> = expected.iter().filter(|key| !left.contains(key)).collect();
                assert!(more.is_empty() && fewer.is_empty(), "{fault:?} at {call}: more {more:?}, fewer {fewer:?}");
                check(&world, &format!("after {fault:?} at request {call}"));
            }
        }
        println!("{calls} requests, each {step}th with each of four faults");
    });
}

#[test]
fn deletes_that_the_store_refuses_are_told_and_hinder_nothing_else() {
    on_one_thread(async {
        let (world, own) = two_weeks().await;
        let before = world.keys().len();
        world.store.state().locked = Some(|key| key.contains("/packs/") || key.contains("/wal/"));
        let report = prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
        assert!(report.refused > 0 && report.refusals.iter().all(|why| why.contains("AccessDenied")), "{report:?}");
        assert!(report.removed.contains_key("index") && !report.removed.contains_key("wal"), "{:?}", report.removed);
        assert!(world.keys().len() < before);
        check(&world, "with locked objects");
        let locked = |key: &&String| key.contains("/packs/") || key.contains("/wal/");
        let stays = world.keys().iter().filter(locked).count();
        world.store.state().locked = None;
        let report = prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
        assert_eq!(report.refused, 0);
        assert!(world.keys().iter().filter(locked).count() < stays, "what was refused goes when it may");
        check(&world, "unlocked");
    });
}
