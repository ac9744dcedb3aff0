//! The whole archiver against a scripted server and a store that fails, in one thread, with a clock that jumps.
//!
//! The seed makes the server's script and the store's faults. `PGRECALL_SEED=7 PGRECALL_ROUNDS=1` shows round 7 again.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::testing::{BASE, SIZE, SYSTEM_ID, Server, segment_size};
use super::{ArchiveStatus, Archiver, Settings, State};
use crate::pg::{SystemId, Timestamp};
use crate::replication::{ConnectConfig, testing};
use crate::repository::layout::{Incarnation, WalRange};
use crate::repository::testing::sim::{Fault, SimStore, jumping_clock};
use crate::repository::{Repository, catalogue, generation, segment};

const INCARNATION: Incarnation = Incarnation { ordinal: 1, system_id: SystemId(SYSTEM_ID) };
/// Rounds of a normal run.
const ROUNDS: u64 = 200;
/// How long everything may take to be stored after the last fault, by the simulated clock.
const RECOVERY_MAX: Duration = Duration::from_secs(600);

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Everything of one round.
struct Round {
    random: SmallRng,
    server: Server,
    store: SimStore,
    connect: ConnectConfig,
    running: Option<Running>,
}

/// An archiver, as a process would run it.
struct Running {
    task: JoinHandle<()>,
    cancel: CancellationToken,
    status: watch::Receiver<ArchiveStatus>,
}

impl Round {
    fn new(seed: u64) -> Round {
        let store = SimStore::default();
        let server = Server::new(store.clone());
        tokio::spawn(server.clone().serve(testing::listen("/simulated/.s.PGSQL.5432".into())));
        let connect = "host=/simulated port=5432 user=u dbname=d".parse().expect("a connection string");
        Round { random: SmallRng::seed_from_u64(seed), server, store, connect, running: None }
    }

    async fn repository(&self) -> anyhow::Result<Repository> {
        Ok(Repository::open_or_create(self.store.open(), 1, None).await?)
    }

    async fn start(&mut self) -> anyhow::Result<()> {
        let repository = self.repository().await?;
        let lease =
            generation::Lease { host: "h".into(), pid: 1, started_at: Timestamp(0), version: "1".into(), store: None };
        let generation = generation::take(&repository, &lease).await?;
        let rpo = [0, 200, 1000][self.random.random_range(0..3usize)];
        let buffer_bytes_max = [SIZE, 4 * SIZE][self.random.random_range(0..2usize)];
        let settings = Settings { rpo: Duration::from_millis(rpo), buffer_bytes_max, ..Settings::default() };
        let (status, seen) = watch::channel(ArchiveStatus::default());
        let connect = self.connect.clone();
        let archiver = Archiver { settings, connect, repository, generation, status };
        let cancel = CancellationToken::new();
        let task = tokio::spawn(archiver.run(cancel.clone()));
        self.running = Some(Running { task, cancel, status: seen });
        Ok(())
    }

    /// As with kill -9, but that what it had handed to other tasks may still end.
    async fn kill(&mut self) {
        if let Some(running) = self.running.take() {
            running.task.abort();
            let _ = running.task.await;
        }
        self.store.state().crashed = false;
    }

    fn bring_faults(&mut self) {
        let mut state = self.store.state();
        let next = state.calls + 1;
        for call in next..next + 40 {
            match self.random.random_range(0..100) {
                0..8 => drop(state.faults.insert(call, Fault::Error)),
                8..16 => drop(state.faults.insert(call, Fault::ErrorAfter)),
                16..19 => drop(state.faults.insert(call, Fault::Cut)),
                19..22 => drop(state.faults.insert(call, Fault::Hang)),
                22..25 => drop(state.faults.insert(call, Fault::Twice)),
                25..27 => drop(state.faults.insert(call, Fault::Refused)),
                27 => drop(state.faults.insert(call, Fault::Crash)),
                28..45 => {
                    let delay = Duration::from_millis(self.random.random_range(1..3000));
                    state.delays.insert(call, delay);
                }
                45 => drop(state.delays.insert(call, Duration::from_secs(60))),
                _ => {}
            }
        }
    }

    async fn step(&mut self) {
        match self.random.random_range(0..100) {
            0..60 => {
                let length = [100, 8192, 300_000, 1_500_000][self.random.random_range(0..4usize)];
                let (seed, length) = (self.random.random(), self.random.random_range(1..=length));
                self.server.cluster().append(seed, length);
            }
            60..75 => self.bring_faults(),
            75..82 => self.server.life.send_modify(|life| *life += 1),
            82..87 => self.kill().await,
            87..92 => self.promote(),
            // Long enough for parts to become segments.
            92..94 => tokio::time::sleep(Duration::from_secs(40)).await,
            _ => {}
        }
        self.server.changed.send_modify(|count| *count += 1);
        tokio::time::sleep(Duration::from_millis(self.random.random_range(1..1500))).await;
        self.revive().await;
    }

    /// What is dead is started again. Without a repository there is no archiver: it is tried again with the next step.
    async fn revive(&mut self) {
        if self.store.state().crashed {
            self.kill().await;
        }
        if self.running.is_none() {
            let _ = tokio::time::timeout(Duration::from_secs(100), self.start()).await;
        }
    }

    /// The old server is gone, with what it had not sent to the new one.
    fn promote(&mut self) {
        let mut cluster = self.server.cluster();
        let begin = cluster.switches.last().copied().unwrap_or(BASE);
        let end = cluster.end();
        if end > begin + 1000 {
            let most = [1, 500, 300_000][self.random.random_range(0..3usize)];
            let lost = self.random.random_range(0..most).min(end - begin - 500);
            cluster.promote(end - lost);
            // A new timeline begins with a record of its own.
            cluster.append(self.random.random(), 600);
        }
        drop(cluster);
        self.server.life.send_modify(|life| *life += 1);
    }

    fn check(&self, what: &str) {
        let violations = &self.server.cluster().violations;
        assert!(violations.is_empty(), "{what}: {violations:?}");
        if let Some(running) = &self.running {
            let state = running.status.borrow().state.clone();
            assert!(!matches!(state, State::Conflict(_)), "{what}: {state:?}");
        }
    }

    async fn run(&mut self, what: &str) {
        self.server.cluster().removes = self.random.random();
        self.server.cluster().append(1, 5000);
        self.start().await.expect("nothing fails yet");
        for step in 0..self.random.random_range(5..30) {
            self.step().await;
            self.check(&format!("{what}, step {step}"));
        }
        self.settle(what).await;
    }

    /// More than a segment, with a fail-over. Returns the number of requests before nothing fails any more.
    async fn run_simple(&mut self, fault: Option<(u64, Fault)>, what: &str) -> u64 {
        self.store.state().faults = fault.into_iter().collect();
        self.server.cluster().append(1, 5000);
        for step in 0..3 {
            self.revive().await;
            self.server.cluster().append(step, 400_000);
            if step == 1 {
                self.promote();
            }
            self.server.changed.send_modify(|count| *count += 1);
            tokio::time::sleep(Duration::from_secs(15)).await;
            self.check(what);
        }
        let calls = self.store.state().calls;
        self.settle(what).await;
        calls
    }

    /// Nothing fails any more: everything is stored in the end, and nothing else.
    async fn settle(&mut self, what: &str) {
        self.store.state().faults.clear();
        self.store.state().delays.clear();
        let begin = tokio::time::Instant::now();
        while self.unstored() > 0 || self.running.is_none() {
            self.revive().await;
            let state = self.running.as_ref().map(|running| running.status.borrow().clone());
            assert!(begin.elapsed() < RECOVERY_MAX, "{what}: {} bytes are not stored: {state:?}", self.unstored());
            tokio::time::sleep(Duration::from_millis(200)).await;
            self.check(what);
        }
        tokio::time::sleep(Duration::from_secs(40)).await;
        if let Some(running) = self.running.take() {
            running.cancel.cancel();
            running.task.await.expect("it ends");
        }
        self.check(what);
        assert_eq!(self.unstored(), 0, "{what}: what was stored is gone");
        self.compare(what).await;
    }

    fn unstored(&self) -> u64 {
        let ranges = self.store.wal(segment_size());
        let cluster = self.server.cluster();
        cluster.end() - cluster.stored_end(&ranges, BASE)
    }

    /// Every stored object has what its server had at that place.
    async fn compare(&self, what: &str) {
        let repository = self.repository().await.expect("opens");
        let listing = catalogue::list_wal(&repository, INCARNATION, segment_size()).await.expect("listing");
        for object in &listing.ranges {
            let bytes = segment::read_range(&repository, object).await.unwrap_or_else(|e| panic!("{what}: {e}"));
            let expected = self.expected(&object.range);
            assert!(bytes[..] == expected[..], "{what}: {:?} has other content", object.range);
        }
        let gaps = catalogue::list_gaps(&repository, INCARNATION).await.expect("listing");
        assert!(gaps.is_empty(), "{what}: nothing is missing, but {gaps:?} is noted");
    }

    /// What lies past the switch point was the old server's.
    fn expected(&self, range: &WalRange) -> Vec<u8> {
        let cluster = self.server.cluster();
        let (start, end) = (range.start_lsn(segment_size()).0, range.end_lsn(segment_size()).0);
        let lost = cluster.lost.iter().find(|(timeline, ..)| *timeline == range.timeline.0);
        let (switch, tail) = lost.map_or((cluster.end(), &[][..]), |(_, switch, tail)| (*switch, &tail[..]));
        let cut = |bytes: &[u8], first: u64| {
            let at = |lsn: u64| usize::try_from(lsn.saturating_sub(first)).expect("small").min(bytes.len());
            bytes[at(start)..at(end)].to_vec()
        };
        let kept = usize::try_from(switch - BASE).expect("small");
        [cut(&cluster.wal[..kept], BASE), cut(tail, switch)].concat()
    }
}

fn round(seed: u64) {
    jumping_clock(1).block_on(async {
        let mut round = Round::new(seed);
        round.run(&format!("round {seed} (PGRECALL_SEED={seed} PGRECALL_ROUNDS=1)")).await;
    });
}

#[test]
fn whichever_request_of_an_archiver_fails_all_is_stored_in_the_end() {
    let run = |fault: Option<(u64, Fault)>| {
        jumping_clock(1).block_on(async { Round::new(1).run_simple(fault, &format!("{fault:?}")).await })
    };
    let calls = run(None);
    assert!((30..150).contains(&calls), "{calls}");
    for call in 1..=calls {
        for fault in [Fault::ErrorAfter, Fault::Refused, Fault::Cut, Fault::Hang, Fault::Crash] {
            run(Some((call, fault)));
        }
    }
}

/// `PGRECALL_SLOW=1` runs 20 000; `PGRECALL_SEED` says where to begin, `PGRECALL_ROUNDS` how many.
#[test]
fn whatever_fails_no_more_is_reported_than_is_stored_and_all_is_stored_in_the_end() {
    let slow = std::env::var_os("PGRECALL_SLOW").is_some();
    let first = number("PGRECALL_SEED").unwrap_or(1);
    let count = number("PGRECALL_ROUNDS").unwrap_or(if slow { 20_000 } else { ROUNDS });
    let begin = std::time::Instant::now();
    for seed in first..first.saturating_add(count) {
        round(seed);
        if slow && seed % 500 == 0 {
            println!("L1: {} rounds from {first}, {} s", seed + 1 - first, begin.elapsed().as_secs());
        }
    }
}
