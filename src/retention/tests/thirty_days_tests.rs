//! Thirty days of a schedule, with one thing going wrong on each: a backup or a prune that fails, clocks that jump, a fail-over,
//! a server that is off, and an owner that stands still in the middle of its work and wakes up days after another took over.

use std::pin::Pin;
use std::task::Poll;

use chrono::TimeDelta;

use super::model_tests::{on_one_thread, prune, take};
use super::world_tests::{Good, Instant, Random, SIZE, WINDOW, World, size};
use crate::repository::layout::{self, BackupMark, WalName};
use crate::repository::store::Object;
use crate::repository::testing::sim::Fault;
use crate::repository::{BackupId, Generation, Key, identity};
use crate::restore::gather::{Gathered, PlanRequest};
use crate::restore::plan::Stop;
use crate::retention::policy::GRACE;
use crate::retention::prune::{Observer, Prune, PruneError, Settings};
use crate::retention::reason::{Reason, Verdict};

const DAYS: u64 = 30;
/// Long enough for the clock that jumped farthest, and for what was begun and never finished.
const QUIET_DAYS: u64 = 24;
const JUMP_DAYS_MAX: u64 = 12;
const KINDS: u64 = 8;

type Process = Pin<Box<dyn Future<Output = ()>>>;

/// How much went wrong: a month in which nothing did proves nothing.
#[derive(Debug, Default)]
struct Seen {
    backups: usize,
    failed_backups: usize,
    failed_prunes: usize,
    refused_prunes: usize,
    paused: usize,
    woken: usize,
    dropped: usize,
    removed: u64,
}

struct Month {
    world: World,
    random: Random,
    own: Generation,
    /// Who stands still, and until which day.
    paused: Vec<(u64, Process)>,
    seen: Seen,
}

/// Reasons that nobody could do anything with.
struct Odd(Vec<String>);

impl Observer for Odd {
    fn object(&mut self, object: &Object, verdict: &Verdict) {
        if matches!(verdict.reason(), Reason::New | Reason::UnknownName | Reason::Unclaimed) {
            self.0.push(format!("{}: {}", object.key.as_str(), verdict.reason()));
        }
    }
}

impl Month {
    async fn new(seed: u64) -> Month {
        let world = World::new().await;
        let own = take(world.clone()).await.expect("a generation");
        Month { world, random: Random::new(seed), own, paused: Vec::new(), seen: Seen::default() }
    }

    async fn day(&mut self, day: u64, kind: u64) {
        for _ in 0..8 {
            self.world.tick();
        }
        self.wake(day).await;
        match kind {
            0 => self.server_clock_jumps(),
            1 => self.own_clock_jumps().await,
            2 => {
                let (world, own) = (self.world.clone(), self.own);
                self.pause(day, async move { drop(world.backup(own, 0).await) }).await;
            }
            3 => {
                let (world, own) = (self.world.clone(), self.own);
                self.pause(day, async move { drop(prune(world, own, TimeDelta::zero()).await) }).await;
            }
            4 => self.fault_soon(),
            5 => {
                self.backup().await;
                self.fault_soon();
                let failed = prune(self.world.clone(), self.own, TimeDelta::zero()).await.is_err();
                self.seen.failed_prunes += usize::from(failed);
                self.check(day).await;
            }
            6 => self.world.fail_over(self.random.below(3)),
            _ => {
                let off = TimeDelta::days(self.below(4));
                self.world.store.state().now += off;
            }
        }
        self.backup().await;
        self.prune(day).await;
    }

    fn below(&mut self, limit: u64) -> i64 {
        i64::try_from(self.random.below(limit)).expect("small")
    }

    /// By days, in either direction, or back to what it should be.
    fn server_clock_jumps(&mut self) {
        let days = self.below(2 * JUMP_DAYS_MAX + 1) - i64::try_from(JUMP_DAYS_MAX).expect("small");
        let mut truth = self.world.truth();
        truth.skew = if truth.skew.is_zero() { TimeDelta::days(days) } else { TimeDelta::zero() };
        truth.run += 1;
    }

    async fn own_clock_jumps(&mut self) {
        for days in [30, -30] {
            let before = self.world.keys();
            let refused = prune(self.world.clone(), self.own, TimeDelta::days(days)).await;
            assert!(matches!(refused, Err(PruneError::ClocksDiffer { .. })), "{refused:?}");
            assert_eq!(self.world.keys(), before, "a clock that is a month off removes nothing");
            self.seen.refused_prunes += 1;
        }
    }

    fn fault_soon(&mut self) {
        let soon = 1 + self.random.below(12);
        let fault = [Fault::Error, Fault::ErrorAfter][usize::from(self.random.one_in(2))];
        let mut state = self.world.store.state();
        let call = state.calls + soon;
        state.faults.insert(call, fault);
    }

    /// The owner does a part of its work and stands still for days; another takes over.
    async fn pause(&mut self, day: u64, work: impl Future<Output = ()> + 'static) {
        let mut process: Process = Box::pin(work);
        let store = self.world.store.clone();
        store.state().gated = true;
        let mut done = false;
        for _ in 0..=self.random.below(60) {
            store.state().at_gate = false;
            done = std::future::poll_fn(|context| match process.as_mut().poll(context) {
                Poll::Ready(()) => Poll::Ready(true),
                Poll::Pending if store.state().at_gate => Poll::Ready(false),
                Poll::Pending => Poll::Pending,
            })
            .await;
            if done {
                break;
            }
        }
        store.state().gated = false;
        if !done {
            self.paused.push((day + 1 + self.random.below(6), process));
            self.seen.paused += 1;
            self.own = take(self.world.clone()).await.expect("another owner");
        }
    }

    /// Who stood still until today does what it was about to do, whatever has become of the world.
    async fn wake(&mut self, day: u64) {
        while let Some(index) = self.paused.iter().position(|(until, _)| *until <= day) {
            self.paused.swap_remove(index).1.await;
            self.seen.woken += 1;
            self.check(day).await;
        }
    }

    async fn backup(&mut self) {
        match self.world.clone().backup(self.own, 0).await {
            Some(_) => self.seen.backups += 1,
            None => self.seen.failed_backups += 1,
        }
        self.world.store.state().faults.clear();
    }

    async fn prune(&mut self, day: u64) {
        let report = prune(self.world.clone(), self.own, TimeDelta::zero()).await.expect("a prune");
        self.seen.dropped += report.dropped.len();
        self.seen.removed += report.removed_total().objects;
        self.check(day).await;
        let store = self.world.store.clone();
        let clock = move || store.state().now;
        let settings = Settings { window: WINDOW, deletes_at_once: 1 };
        let prune = Prune { repository: &self.world.repository, generation: self.own, settings, clock: &clock };
        let mut odd = Odd(Vec::new());
        prune.explain(&mut odd).await.expect("explained");
        assert!(odd.0.is_empty(), "day {day}: kept without a reason: {:?}", odd.0);
    }

    fn visible(&self) -> Vec<Good> {
        let holds = |good: &Good, mark| self.world.holds(&Key::backup(good.incarnation, &good.id, &mark));
        let committed = self.world.truth().committed.clone();
        committed.into_iter().filter(|g| holds(g, BackupMark::Commit) && !holds(g, BackupMark::Dropped)).collect()
    }

    /// Whatever can be seen is whole, and a restore can be planned to every moment of the window that ever could be reached.
    async fn check(&self, day: u64) {
        for good in &self.visible() {
            let whole = (0..2).all(|number| self.world.holds(&Key::pack(good.incarnation, &good.id, number)));
            assert!(whole, "day {day}: {} lacks a pack", good.id);
        }
        let archive = self.undisturbed(self.archive()).await;
        let truth = self.world.truth();
        let ever: Vec<&Good> = truth.good.iter().collect();
        let start = truth.newest_claim.expect("claims") - WINDOW;
        for instant in truth.instants.iter().filter(|instant| instant.at >= start) {
            let Instant { incarnation, timeline, lsn, .. } = *instant;
            let (all, _) = truth.path(incarnation, timeline).expect("known");
            if truth.reaches(instant, all, &ever) {
                let stop = Stop { timeline, lsn, inclusive: false, end_lsn: lsn };
                let request = PlanRequest { environment: "shop", stop, backup: None, lacks: &[] };
                let planned = archive.plan(&request);
                assert!(
                    planned.is_ok(),
                    "day {day}: {} is lost; the window begins at {start}: {planned:?}",
                    instant.at
                );
            }
        }
    }

    /// What a restore sees.
    async fn archive(&self) -> Gathered {
        let repository = &self.world.repository;
        let known = identity::current(repository).await.expect("readable").expect("an incarnation");
        Gathered::load(repository, &known).await.expect("listed")
    }

    /// Looks at the store; what is to go wrong there goes wrong afterwards, as if nobody had looked.
    async fn undisturbed<T>(&self, look: impl Future<Output = T>) -> T {
        let (faults, calls) = {
            let mut state = self.world.store.state();
            (std::mem::take(&mut state.faults), state.calls)
        };
        let seen = look.await;
        let mut state = self.world.store.state();
        (state.faults, state.calls) = (faults, calls);
        seen
    }

    /// Nothing goes wrong any more: in the end there is nothing that nobody needs.
    async fn quiet_days(&mut self) {
        self.wake(u64::MAX).await;
        {
            let mut truth = self.world.truth();
            (truth.skew, truth.run) = (TimeDelta::zero(), truth.run + 1);
        }
        self.own = take(self.world.clone()).await.expect("a generation");
        for day in DAYS..DAYS + QUIET_DAYS {
            for _ in 0..8 {
                self.world.tick();
            }
            self.world.clone().backup(self.own, 0).await.expect("a backup on a quiet day");
            self.prune(day).await;
        }
        let visible = self.visible();
        assert!(visible.len() <= 6, "{} backups of one a day are kept for three days", visible.len());
        let needed = |id: &BackupId| visible.iter().any(|good| good.id == *id) || self.is_freshly_dropped(id);
        let committed = self.world.truth().committed.clone();
        let oldest = committed.iter().filter(|good| needed(&good.id)).map(|good| good.start_lsn).min().expect("one");
        for key in self.world.keys() {
            let key = Key::for_tests(&key);
            if let Some((id, _)) = layout::parse_pack(&key) {
                assert!(needed(&id), "{} is left", key.as_str());
            }
            if let Some(WalName::Range(range)) = layout::parse_wal(&key, size()) {
                assert!(range.segment.0 >= oldest.0 / SIZE, "{} is older than any backup", key.as_str());
            }
        }
    }

    fn is_freshly_dropped(&self, id: &BackupId) -> bool {
        let state = self.world.store.state();
        let dropped = state.objects.iter().find(|(path, _)| path.as_ref().ends_with(&format!("{id}.dropped")));
        dropped.is_some_and(|(_, (_, at))| *at + GRACE > state.now)
    }
}

#[test]
fn thirty_days_of_failures_jumping_clocks_and_a_paused_owner_lose_no_instant_and_keep_nothing_without_a_reason() {
    let slow = std::env::var_os("PGRECALL_SLOW").is_some();
    let first = std::env::var("PGRECALL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    for seed in first..first + if slow { 300 } else { 8 } {
        println!("PGRECALL_SEED={seed}");
        let seen = on_one_thread(async {
            let mut month = Month::new(seed).await;
            // Each kind of day three times and more, in an order of the seed's own.
            let step = 2 * (seed % 4) + 1;
            for day in 0..DAYS {
                month.day(day, (day * step + seed) % KINDS).await;
            }
            month.quiet_days().await;
            month.seen
        });
        println!("{seen:?}");
        assert!(seen.failed_backups > 0 && seen.failed_prunes > 0 && seen.refused_prunes > 4, "{seen:?}");
        assert!(seen.paused > 2 && seen.woken == seen.paused && seen.dropped > 15 && seen.removed > 200, "{seen:?}");
    }
}
