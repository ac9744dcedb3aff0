//! A month of a schedule, told day by day: what the window promises, and what is kept for which reason.

use chrono::TimeDelta;

use super::model_tests::{on_one_thread, prune, take};
use super::world_tests::{WINDOW, World};
use crate::retention::prune::PruneError;

async fn day(world: &World) {
    for _ in 0..8 {
        world.tick();
    }
}

fn visible(world: &World) -> usize {
    let keys = world.keys();
    let dropped = |id: &str| keys.iter().any(|key| key.ends_with(&format!("{id}.dropped")));
    let commits = keys.iter().filter_map(|key| key.rsplit('/').next()?.strip_suffix(".backup"));
    commits.filter(|id| !dropped(id)).count()
}

#[test]
fn an_environment_that_is_off_for_thirty_days_keeps_its_window() {
    on_one_thread(async {
        let world = World::new().await;
        let own = take(world.clone()).await.expect("a generation");
        for _ in 0..6 {
            day(&world).await;
            world.clone().backup(own, 0).await.expect("a backup");
        }
        prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
        let kept = visible(&world);
        for _ in 0..30 {
            world.store.state().now += TimeDelta::days(1);
            let report = prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
            assert_eq!(report.dropped, [], "the window ends at the newest proven moment");
        }
        assert_eq!(visible(&world), kept);
    });
}

#[test]
fn a_clock_that_jumps_by_a_month_drops_nothing() {
    on_one_thread(async {
        for days in [30, -30] {
            let world = World::new().await;
            let own = take(world.clone()).await.expect("a generation");
            for _ in 0..6 {
                day(&world).await;
                world.clone().backup(own, 0).await.expect("a backup");
            }
            prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
            let before = visible(&world);
            // Of this host: it says so.
            let refused = prune(world.clone(), own, TimeDelta::days(days)).await.expect_err("a wrong clock");
            assert!(matches!(refused, PruneError::ClocksDiffer { .. }), "{refused}");
            // Of the database server: its claims and backups speak of another time.
            world.truth().skew = TimeDelta::days(days);
            world.truth().run += 1;
            world.tick();
            world.clone().backup(own, 0).await.expect("a backup");
            prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
            let left = before + 1 - visible(&world);
            assert!(left <= 1, "{left} backups left within three hours of a clock that jumped by {days} days");
        }
    });
}

#[test]
fn without_a_backup_that_works_everything_stays() {
    on_one_thread(async {
        let world = World::new().await;
        let own = take(world.clone()).await.expect("a generation");
        for _ in 0..20 {
            day(&world).await;
            let report = prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
            assert_eq!(report.removed_total().objects, 0);
        }
        world.clone().backup(own, 0).await.expect("a backup");
        for _ in 0..(WINDOW.num_days() + 3) {
            day(&world).await;
        }
        // The only one stays however old it is; what came before it is of no use to anybody.
        let report = prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
        assert_eq!((visible(&world), report.dropped.len()), (1, 0));
        assert!(report.removed.contains_key("wal"));
    });
}

#[test]
fn a_new_incarnation_leaves_the_old_past_its_window() {
    on_one_thread(async {
        let world = World::new().await;
        let own = take(world.clone()).await.expect("a generation");
        for _ in 0..5 {
            day(&world).await;
            world.clone().backup(own, 0).await.expect("a backup");
        }
        world.open_incarnation();
        let old = || world.keys().iter().filter(|key| key.starts_with("0001-7/wal/")).count();
        let before = old();
        prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
        assert_eq!(old(), before, "nothing of the new one is proven yet");
        for past in 1..12 {
            day(&world).await;
            world.clone().backup(own, 0).await.expect("a backup");
            prune(world.clone(), own, TimeDelta::zero()).await.expect("pruned");
            assert!(past > WINDOW.num_days() || old() > 0, "it went after {past} days");
        }
        assert_eq!(old(), 0, "it goes when the window has passed it");
    });
}

#[test]
fn a_superseded_owner_stops_at_once() {
    on_one_thread(async {
        let world = World::new().await;
        let own = take(world.clone()).await.expect("a generation");
        for _ in 0..6 {
            day(&world).await;
            world.clone().backup(own, 0).await.expect("a backup");
        }
        take(world.clone()).await.expect("another");
        let before = world.keys();
        let refused = prune(world.clone(), own, TimeDelta::zero()).await.expect_err("superseded");
        assert!(matches!(refused, PruneError::Superseded { .. }), "{refused}");
        assert_eq!(world.keys(), before);
    });
}
