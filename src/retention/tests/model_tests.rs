//! Any order of requests, a death between any two, copies that land late, clocks that jump: no moment of the window is lost,
//! no backup that is visible lacks anything, no confirmed pin is broken, and in the end nothing is left that nobody needs.

use std::collections::BTreeMap;
use std::pin::Pin as Pinned;
use std::task::Poll;

use chrono::{DateTime, TimeDelta, Utc};
use object_store::path::Path as ObjectPath;

use super::world_tests::{Good, Instant, Random, SIZE, TICK, WINDOW, World, size};
use crate::lineage::StoredRanges;
use crate::pg::{Lsn, Timestamp};
use crate::repository::generation::{self, Lease};
use crate::repository::layout::{self, BackupMark, PinName, WalName};
use crate::repository::pin::{self, Pin};
use crate::repository::testing::sim::{Change, Fault};
use crate::repository::{BackupId, Generation, Incarnation, Key};
use crate::retention::prune::{Prune, PruneError, Report, Settings};
use crate::retention::reason::{Reason, Verdict};

/// Requests to the store in a short run, and in a world.
const OPERATIONS: u64 = 60_000;
const OPERATIONS_SLOW: u64 = 1_000_000;
const OPERATIONS_OF_WORLD: u64 = 4_000;

/// What a reader may rely on, whatever the code thinks.
const GRACE: TimeDelta = TimeDelta::hours(24);

type Process = Pinned<Box<dyn Future<Output = Done>>>;

/// What a process came to.
enum Done {
    Backup,
    Prune { result: Result<Report, PruneError>, clock_off: bool },
    Took(Option<Generation>),
    Pinned(Option<(PinName, Pin)>),
    Reads(Option<Reader>),
    Other,
}

/// Somebody who listed a backup and restores it.
#[derive(Debug, Clone)]
struct Reader {
    good: Good,
    end_lsn: Lsn,
    since: DateTime<Utc>,
}

struct Running {
    process: Process,
    waiting: Option<Change>,
}

struct Model {
    world: World,
    random: Random,
    running: Vec<Running>,
    late: Vec<Change>,
    generation: Generation,
    pins: Vec<(PinName, Pin)>,
    readers: Vec<Reader>,
    calm: bool,
    damaged: bool,
    seen: Counts,
}

/// How much happened: a run in which nothing did proves nothing.
#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    prunes: usize,
    dropped: usize,
    taken_back: usize,
    removed: u64,
    pins: usize,
    readers: usize,
    crashes: usize,
    late: usize,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.prunes += other.prunes;
        self.dropped += other.dropped;
        self.taken_back += other.taken_back;
        self.removed += other.removed;
        self.pins += other.pins;
        self.readers += other.readers;
        self.crashes += other.crashes;
        self.late += other.late;
    }
}

pub async fn take(world: World) -> Option<Generation> {
    let lease = Lease { host: "h".into(), pid: 1, started_at: Timestamp(0), version: "0".into(), store: None };
    generation::take(&world.repository, &lease).await.ok()
}

pub async fn prune(world: World, own: Generation, skew: TimeDelta) -> Result<Report, PruneError> {
    let store = world.store.clone();
    let clock = move || store.state().now + skew;
    let settings = Settings { window: WINDOW, deletes_at_once: 1 };
    Prune { repository: &world.repository, generation: own, settings, clock: &clock }.run(&mut ()).await
}

async fn add_pin(world: World, good: Good, (random, days): (u64, i64)) -> Option<(PinName, Pin)> {
    let name = PinName { incarnation: good.incarnation, backup: good.id.clone(), random };
    let end_lsn = good.stop_lsn;
    let now = world.now();
    let pin = Pin {
        name: "test".into(),
        target: "latest".into(),
        timeline: good.timeline,
        end_lsn,
        until: Timestamp::from(now + TimeDelta::days(days)),
        made_at: now.into(),
        owner: "test".into(),
        temporary: false,
    };
    pin::add(&world.repository, &name, &pin).await.ok().map(|()| (name, pin))
}

/// Lists, and takes one of the backups that are visible.
async fn read(world: World, choice: u64) -> Option<Reader> {
    let (since, incarnation) = (world.now(), world.truth().incarnation);
    let marks = crate::repository::catalogue::list_backup_marks(&world.repository, incarnation).await.ok()?;
    let visible: Vec<_> = marks.iter().filter(|marks| marks.exists()).collect();
    let chosen = visible.get(usize::try_from(choice).ok()? % visible.len().max(1))?;
    let good = world.truth().committed.iter().find(|good| good.id == chosen.id).cloned()?;
    let end_lsn = good.stop_lsn;
    Some(Reader { good, end_lsn, since })
}

impl Model {
    async fn new(seed: u64) -> Model {
        let world = World::new().await;
        let generation = take(world.clone()).await.expect("a generation");
        let random = Random::new(seed);
        let (running, late, pins, readers) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Model {
            world,
            random,
            running,
            late,
            generation,
            pins,
            readers,
            calm: false,
            damaged: false,
            seen: Counts::default(),
        }
    }

    fn start(&mut self, process: impl Future<Output = Done> + 'static) {
        self.running.push(Running { process: Box::pin(process), waiting: None });
    }

    /// Something happens.
    async fn step(&mut self) {
        match self.random.below(1000) {
            0..16 => self.world.tick(),
            16..22 => self.start_backup(),
            22..31 => self.start_prune(),
            31..40 => self.start_pin(),
            40..44 => self.start_reader(),
            44..47 => self.crash(),
            47..50 => self.land_late(),
            50 if self.random.one_in(3) => self.world_event(),
            51 if self.running.len() < 4 => self.start_taking(),
            52..54 => {
                self.world.store.state().now += TimeDelta::minutes(i64::try_from(self.random.below(90)).expect("small"))
            }
            _ => self.go_on().await,
        }
    }

    fn start_backup(&mut self) {
        let (world, own) = (self.world.clone(), self.generation);
        let lag = if self.random.one_in(4) { self.random.below(6) } else { 0 };
        self.start(async move {
            let _ = world.backup(own, lag).await;
            Done::Backup
        });
    }

    fn start_prune(&mut self) {
        let (world, own) = (self.world.clone(), self.generation);
        let clock_off = self.random.one_in(12);
        let days = if self.random.one_in(2) { 30 } else { -30 };
        let skew = if clock_off { TimeDelta::days(days) } else { TimeDelta::zero() };
        self.start(async move { Done::Prune { result: prune(world, own, skew).await, clock_off } });
    }

    fn start_taking(&mut self) {
        let world = self.world.clone();
        self.start(async move { Done::Took(take(world).await) });
    }

    fn start_pin(&mut self) {
        let (world, choice) = (self.world.clone(), self.random.below(1 << 20));
        if let Some(held) = self.pins.pop_if(|_| choice.is_multiple_of(4)) {
            self.start(async move {
                let _ = pin::remove(&world.repository, &held.0).await;
                Done::Other
            });
            return;
        }
        let all = self.world.truth().good.clone();
        let Some(good) = all.get(usize::try_from(choice).expect("small") % all.len().max(1)).cloned() else { return };
        let days = 1 + i64::try_from(choice % 9).expect("small");
        // Two pins never have one name: a late copy of the removal of the first must not meet the second.
        let random = self.random.below(u64::MAX);
        self.start(async move { Done::Pinned(add_pin(world, good, (random, days)).await) });
    }

    fn start_reader(&mut self) {
        let (world, choice) = (self.world.clone(), self.random.below(1 << 20));
        self.start(async move { Done::Reads(read(world, choice).await) });
    }

    /// What happens to clusters and stores.
    fn world_event(&mut self) {
        match self.random.below(7) {
            0 | 1 => self.world.fail_over(self.random.below(3)),
            2 => self.world.gap(),
            3 => {
                let days = i64::try_from(self.random.below(61)).expect("small") - 30;
                let mut truth = self.world.truth();
                truth.skew = if truth.skew.is_zero() { TimeDelta::days(days) } else { TimeDelta::zero() };
                truth.run += 1;
            }
            4 => self.world.store.state().now += TimeDelta::days(i64::try_from(self.random.below(30)).expect("small")),
            5 if self.random.one_in(2) => self.world.open_incarnation(),
            6 if self.random.one_in(3) => self.damage(),
            _ => {}
        }
    }

    /// An object that must be read turns to noise.
    fn damage(&mut self) {
        let wanted = [".intent", ".backup", "/coverage/", "/history-", "pins/"]
            [usize::try_from(self.random.below(5)).expect("small")];
        let found: Vec<String> = self.world.keys().into_iter().filter(|key| key.contains(wanted)).collect();
        let index = usize::try_from(self.random.below(found.len().max(1) as u64)).expect("small");
        let Some(key) = found.get(index) else { return };
        self.damaged = true;
        if let Some(object) = self.world.store.state().objects.get_mut(&ObjectPath::from(format!("shop/{key}"))) {
            object.0 = "noise".into();
        }
        let lost = |good: &Good| key.contains(&format!("{}.backup", good.id));
        let mut truth = self.world.truth();
        truth.good.retain(|good| !lost(good));
    }

    fn crash(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let index = usize::try_from(self.random.below(self.running.len() as u64)).expect("small");
        self.seen.crashes += 1;
        let dead = self.running.swap_remove(index);
        self.late.extend(dead.waiting.filter(|_| self.random.one_in(2)));
    }

    fn land_late(&mut self) {
        if !self.late.is_empty() {
            let index = usize::try_from(self.random.below(self.late.len() as u64)).expect("small");
            let change = self.late.swap_remove(index);
            self.seen.late += 1;
            self.world.store.state().apply(change);
        }
    }

    /// One process has its next request done.
    async fn go_on(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let index = usize::try_from(self.random.below(self.running.len() as u64)).expect("small");
        if !self.calm && self.random.one_in(700) {
            let fault = [Fault::Error, Fault::ErrorAfter, Fault::Refused]
                [usize::try_from(self.random.below(3)).expect("small")];
            let mut state = self.world.store.state();
            let call = state.calls + 1;
            state.faults.insert(call, fault);
        }
        let store = self.world.store.clone();
        store.state().at_gate = false;
        let running = &mut self.running[index];
        let done = std::future::poll_fn(|context| match running.process.as_mut().poll(context) {
            Poll::Ready(done) => Poll::Ready(Some(done)),
            Poll::Pending if store.state().at_gate => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        })
        .await;
        let change = std::mem::replace(&mut self.running[index].waiting, store.state().waiting.clone());
        if let Some(change) = change {
            if !self.calm && self.random.one_in(50) {
                self.late.push(change.clone());
            }
            self.check(&change);
        }
        if let Some(done) = done {
            drop(self.running.swap_remove(index));
            self.note(done);
        }
    }

    fn note(&mut self, done: Done) {
        match done {
            Done::Took(Some(generation)) => self.generation = self.generation.max(generation),
            Done::Pinned(Some(pinned)) => {
                self.seen.pins += 1;
                self.pins.push(pinned);
            }
            Done::Reads(Some(reader)) => {
                self.seen.readers += 1;
                self.readers.push(reader);
            }
            Done::Prune { result: Ok(report), clock_off: false } => {
                self.seen.prunes += 1;
                self.seen.dropped += report.dropped.len();
                self.seen.taken_back += report.taken_back.len();
                self.seen.removed += report.removed_total().objects;
            }
            Done::Prune { result: Ok(_), clock_off: true } => panic!("a prune with a clock that is off by a month"),
            Done::Prune { result: Err(error), .. } if self.calm => panic!("a prune on a quiet day: {error}"),
            _ => {}
        }
    }

    /// Nothing that was promised is broken.
    fn check(&mut self, change: &Change) {
        let now = self.world.now();
        self.readers.retain(|reader| reader.since + GRACE > now);
        self.pins.retain(|(_, pin)| pin.until.to_chrono().is_some_and(|until| until > now));
        let stored = self.stored();
        let visible = self.visible();
        for good in &visible {
            self.check_whole(good, good.stop_lsn, &stored, "visible");
        }
        for Reader { good, end_lsn, .. } in &self.readers {
            self.check_whole(good, *end_lsn, &stored, "being restored");
        }
        for (name, pin) in &self.pins {
            let dropped = self.world.holds(&Key::backup(name.incarnation, &name.backup, &BackupMark::Dropped));
            assert!(!dropped, "{} is pinned until {} and was dropped", name.backup, pin.until);
        }
        let deletes = matches!(change, Change::Delete(_));
        if deletes || matches!(change, Change::Put(path, _) if path.as_ref().ends_with(".dropped")) {
            self.check_window(&stored, &visible);
        }
    }

    fn check_whole(&self, good: &Good, end_lsn: Lsn, stored: &BTreeMap<Incarnation, StoredRanges>, what: &str) {
        for number in 0..2 {
            let key = Key::pack(good.incarnation, &good.id, number);
            assert!(self.world.holds(&key), "{} is {what} and {} is gone", good.id, key.as_str());
        }
        let truth = self.world.truth();
        let (_, path) = truth.path(good.incarnation, good.timeline).expect("known");
        let end = stored.get(&good.incarnation).map(|s| s.contiguous_end_on(&path, size().start_of(good.start_lsn)));
        assert!(
            end.is_some_and(|end| end >= end_lsn),
            "{} is {what} and its WAL ends at {end:?} before {end_lsn}",
            good.id
        );
    }

    fn stored(&self) -> BTreeMap<Incarnation, StoredRanges> {
        let mut all: BTreeMap<Incarnation, StoredRanges> = BTreeMap::new();
        for key in self.world.keys() {
            let Some(incarnation) = key.split('/').next().and_then(|first| first.parse().ok()) else { continue };
            let stored = all.entry(incarnation).or_default();
            if let Some(WalName::Range(range)) = layout::parse_wal(&Key::for_tests(&key), size()) {
                stored.add(range.timeline, range.start_lsn(size()), range.end_lsn(size()));
            }
        }
        all
    }

    /// The backups that a reader would see, and can read.
    fn visible(&self) -> Vec<Good> {
        let exists = |good: &Good| {
            let holds = |mark| self.world.holds(&Key::backup(good.incarnation, &good.id, &mark));
            holds(BackupMark::Commit) && !holds(BackupMark::Dropped)
        };
        self.world.truth().committed.iter().filter(|good| exists(good)).cloned().collect()
    }

    /// Every moment of the window that could ever be reached can be.
    fn check_window(&self, stored: &BTreeMap<Incarnation, StoredRanges>, visible: &[Good]) {
        let truth = self.world.truth();
        let Some(start) = truth.newest_claim.map(|claim| claim - WINDOW) else { return };
        let good: Vec<&Good> = truth.good.iter().collect();
        let usable: Vec<&Good> = visible.iter().filter(|v| truth.good.iter().any(|good| good.id == v.id)).collect();
        let within = truth.instants.iter().filter(|instant| instant.at >= start);
        for instant @ Instant { incarnation, at, lsn, timeline } in within {
            let (ever, _) = truth.path(*incarnation, *timeline).expect("known");
            if truth.reaches(instant, ever, &good) {
                let now = stored.get(incarnation).is_some_and(|stored| truth.reaches(instant, stored, &usable));
                assert!(now, "{at} ({lsn} on {timeline} of {incarnation}) is lost; the window begins at {start}");
            }
        }
    }

    /// Weeks of quiet days: backups and prunes, and nothing goes wrong.
    async fn quiet_days(&mut self) {
        self.calm = true;
        self.running.clear();
        self.world.store.state().faults.clear();
        while !self.late.is_empty() {
            self.land_late();
        }
        let skew = self.world.truth().skew;
        if !skew.is_zero() {
            let mut truth = self.world.truth();
            (truth.skew, truth.run) = (TimeDelta::zero(), truth.run + 1);
        }
        self.generation = take(self.world.clone()).await.expect("a generation");
        for _ in 0..(50 + 24 / TICK.num_hours()) {
            for _ in 0..8 {
                self.world.tick();
            }
            let made = self.world.clone().backup(self.generation, 0).await;
            assert!(made.is_some(), "a backup on a quiet day");
            let report =
                prune(self.world.clone(), self.generation, TimeDelta::zero()).await.expect("a prune on a quiet day");
            assert_eq!(report.refused, 0);
        }
    }

    /// What is left is needed by somebody.
    fn check_nothing_is_left(&self) {
        if self.damaged {
            return;
        }
        let visible = self.visible();
        assert!(visible.len() <= 6, "{} backups of one a day are kept for three days", visible.len());
        let current = self.world.truth().incarnation;
        let all = self.world.truth().committed.clone();
        let counted = all.iter().filter(|good| visible.iter().any(|v| v.id == good.id) || self.is_fresh(&good.id));
        let oldest = counted.map(|good| good.start_lsn).min().expect("one is left");
        for key in self.world.keys() {
            let key = Key::for_tests(&key);
            if let Some((id, _)) = layout::parse_pack(&key) {
                assert!(visible.iter().any(|good| good.id == id) || self.is_fresh(&id), "{} is left", key.as_str());
            }
            if let Some(WalName::Range(range)) = layout::parse_wal(&key, size()) {
                let own = key.as_str().starts_with(&current.to_string());
                assert!(own, "{} is of a past that has left the window", key.as_str());
                assert!(range.segment.0 >= oldest.0 / SIZE, "{} is older than any backup", key.as_str());
            }
        }
    }

    /// Dropped less than a day ago.
    fn is_fresh(&self, id: &BackupId) -> bool {
        let state = self.world.store.state();
        let dropped = state.objects.iter().find(|(path, _)| path.as_ref().ends_with(&format!("{id}.dropped")));
        dropped.is_some_and(|(_, (_, at))| *at + GRACE > state.now)
    }
}

async fn explore(seed: u64) -> (u64, Counts) {
    let mut model = Model::new(seed).await;
    model.world.store.state().gated = true;
    while model.world.store.state().calls < OPERATIONS_OF_WORLD {
        model.step().await;
    }
    model.world.store.state().gated = false;
    let operations = model.world.store.state().calls;
    let seen = model.seen;
    model.quiet_days().await;
    model.check_nothing_is_left();
    check_reasons(&model).await;
    (operations, seen)
}

/// Whatever is kept on a quiet day is kept for a reason that somebody can do something with.
async fn check_reasons(model: &Model) {
    struct Odd(Vec<String>);
    impl crate::retention::prune::Observer for Odd {
        fn object(&mut self, object: &crate::repository::store::Object, verdict: &Verdict) {
            if matches!(verdict.reason(), Reason::New | Reason::UnknownName | Reason::Unclaimed) {
                self.0.push(format!("{}: {}", object.key.as_str(), verdict.reason()));
            }
        }
    }
    let store = model.world.store.clone();
    let clock = move || store.state().now;
    let settings = Settings { window: WINDOW, deletes_at_once: 1 };
    let prune = Prune { repository: &model.world.repository, generation: model.generation, settings, clock: &clock };
    let mut odd = Odd(Vec::new());
    let report = prune.explain(&mut odd).await.expect("explained");
    assert!(report.kept_total().objects > 0);
    assert!(odd.0.is_empty(), "{:?}", odd.0);
}

pub fn on_one_thread<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(work)
}

#[test]
fn no_order_of_requests_loses_a_moment_or_leaves_garbage() {
    let slow = std::env::var_os("PGRECALL_SLOW").is_some();
    let wanted = if slow { OPERATIONS_SLOW } else { OPERATIONS };
    let first: u64 = std::env::var("PGRECALL_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let (mut seed, mut operations, mut seen) = (first, 0, Counts::default());
    while operations < wanted {
        println!("PGRECALL_SEED={seed}");
        let (done, happened) = on_one_thread(explore(seed));
        operations += done;
        seen += happened;
        seed += 1;
    }
    println!("seeds {first} to {}: {operations} requests, {seen:?}", seed - 1);
    assert!(
        seen.dropped > 10 && seen.removed > 100 && seen.pins > 5 && seen.readers > 5 && seen.crashes > 50,
        "{seen:?}"
    );
}
