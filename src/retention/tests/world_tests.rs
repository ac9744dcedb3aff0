//! A cluster whose WAL is archived segment by segment, and what is known to be true of it: which moments there were, which
//! backups were reported as good.

use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use object_store::path::Path as ObjectPath;

use crate::lineage::{History, Path, StoredRanges};
use crate::pg::{Lsn, Major, SegmentName, SegmentNo, SegmentSize, SystemId, TimelineId, Timestamp};
use crate::repository::backup_object::{BackupCommit, BackupIntent, PackEntry, Surroundings, TablePacks, Totals};
use crate::repository::codec::Kind;
use crate::repository::coverage::{Claim, ClaimSource};
use crate::repository::identity::Identity;
use crate::repository::layout::{BackupMark, ContentHash, CoverageName, WalRange};
use crate::repository::pack::PackRef;
use crate::repository::store::{Store, StoreSettings};
use crate::repository::testing::sim::{PAGE, SimStore};
use crate::repository::{BackupId, Generation, Incarnation, Key, Repository, catalogue, generation};
use crate::util::digest::Digest;

pub const SIZE: u64 = 1 << 20;
/// One segment is filled in this time.
pub const TICK: TimeDelta = TimeDelta::hours(3);
pub const WINDOW: TimeDelta = TimeDelta::days(3);
const PACKS: u32 = 2;

pub fn size() -> SegmentSize {
    SegmentSize::new(SIZE).expect("1 MiB")
}

/// Numbers that look random and are the same for the same seed.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03)
    }

    /// Below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % limit.max(1)
    }

    pub fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }
}

/// A moment that was: the end of a segment.
#[derive(Debug, Clone, Copy)]
pub struct Instant {
    pub incarnation: Incarnation,
    pub timeline: TimelineId,
    pub lsn: Lsn,
    pub at: DateTime<Utc>,
}

/// A backup that was told to be good.
#[derive(Debug, Clone)]
pub struct Good {
    pub incarnation: Incarnation,
    pub id: BackupId,
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub stop_lsn: Lsn,
}

/// What is true.
#[derive(Debug, Clone)]
pub struct Truth {
    pub incarnation: Incarnation,
    pub timeline: TimelineId,
    pub history: String,
    /// The next segment to be filled.
    pub segment: u64,
    pub run: u32,
    /// The server's clock minus the true time.
    pub skew: TimeDelta,
    pub instants: Vec<Instant>,
    /// Everything that was ever stored, and of which incarnation.
    pub stored: Vec<(Incarnation, StoredRanges, History)>,
    pub good: Vec<Good>,
    /// Commit objects that were written, good or not.
    pub committed: Vec<Good>,
    pub newest_claim: Option<DateTime<Utc>>,
    pub backups: u32,
}

/// The store with the truth beside it.
#[derive(Clone)]
pub struct World {
    pub store: SimStore,
    pub repository: Repository,
    truth: Arc<Mutex<Truth>>,
}

fn incarnation(ordinal: u32) -> Incarnation {
    Incarnation { ordinal, system_id: SystemId(7) }
}

impl World {
    pub async fn new() -> World {
        let store = SimStore::default();
        store.state().now = "2026-01-01T00:00:00Z".parse().expect("a time");
        let settings = StoreSettings { attempts_max: 1, ..StoreSettings::default() };
        let opened = Store::over(Arc::new(store.clone()), settings, PAGE);
        let repository = Repository::open_or_create(opened, 1, None).await.expect("open");
        let truth = Truth {
            incarnation: incarnation(0),
            timeline: TimelineId(1),
            history: String::new(),
            segment: 1,
            run: 1,
            skew: TimeDelta::zero(),
            instants: Vec::new(),
            stored: Vec::new(),
            good: Vec::new(),
            committed: Vec::new(),
            newest_claim: None,
            backups: 0,
        };
        let world = World { store, repository, truth: Arc::new(Mutex::new(truth)) };
        world.open_incarnation();
        world
    }

    pub fn truth(&self) -> MutexGuard<'_, Truth> {
        self.truth.lock().expect("no test panics while it holds this")
    }

    pub fn now(&self) -> DateTime<Utc> {
        self.store.state().now
    }

    fn put_raw(&self, key: &Key, bytes: Bytes) {
        let mut state = self.store.state();
        let now = state.now;
        state.objects.insert(ObjectPath::from(format!("shop/{}", key.as_str())), (bytes, now));
    }

    fn put_fact(&self, key: &Key, kind: Kind, content: &[u8]) {
        let encoded = self.repository.codec().encode(key, kind, content).expect("encode");
        self.put_raw(key, encoded.bytes.into());
    }

    pub fn holds(&self, key: &Key) -> bool {
        self.store.state().objects.contains_key(&ObjectPath::from(format!("shop/{}", key.as_str())))
    }

    /// Every key of the environment.
    pub fn keys(&self) -> Vec<String> {
        let state = self.store.state();
        state.objects.keys().map(|path| path.as_ref().trim_start_matches("shop/").to_owned()).collect()
    }

    /// A new past: another cluster takes the place.
    pub fn open_incarnation(&self) {
        let mut truth = self.truth();
        truth.incarnation = incarnation(truth.incarnation.ordinal + 1);
        (truth.timeline, truth.history, truth.segment) = (TimelineId(1), String::new(), 1);
        truth.run += 1;
        let mut history = History::default();
        history.add_root(TimelineId(1));
        let incarnation = truth.incarnation;
        truth.stored.push((incarnation, StoredRanges::default(), history));
        let identity = Identity {
            system_id: SystemId(7),
            major: Major(18),
            segment_size: size(),
            block_size: 8192,
            opened_at: Timestamp::from(self.now()),
            reason: "test".into(),
        };
        let content = serde_json::to_vec(&identity).expect("JSON");
        self.put_fact(&Key::identity(truth.incarnation), Kind::Identity, &content);
    }

    fn put_segment(&self, truth: &mut Truth, number: u64) {
        let (incarnation, timeline, segment) = (truth.incarnation, truth.timeline, SegmentNo(number));
        let hash = ContentHash::of(&Digest::sha256(&number.to_le_bytes()));
        let range = WalRange { timeline, segment, from: 0, to: SIZE, hash, whole: true };
        self.put_raw(&Key::wal(incarnation, &range, size()), Bytes::new());
        let name = SegmentName::new(timeline, segment, size());
        self.put_raw(&Key::index(incarnation, name, 1, hash), Bytes::new());
        if let Some((_, stored, _)) = truth.stored.last_mut() {
            stored.add(timeline, Lsn(number * SIZE), Lsn((number + 1) * SIZE));
        }
        let lsn = Lsn((number + 1) * SIZE);
        truth.instants.push(Instant { incarnation, timeline, lsn, at: self.now() });
    }

    /// Time passes; a segment is filled and stored, and the clock is asked.
    pub fn tick(&self) {
        self.store.state().now += TICK;
        self.segment();
    }

    pub fn segment(&self) {
        let mut truth = self.truth();
        let number = truth.segment;
        self.put_segment(&mut truth, number);
        truth.segment += 1;
        let server_time = Timestamp::from(self.now() + truth.skew);
        let (timeline, lsn, run) = (truth.timeline, Lsn(truth.segment * SIZE), truth.run);
        let claim = Claim { timeline, server_time, lsn, source: ClaimSource::Insert, margin_micros: 1_000_000, run };
        let name = CoverageName { timeline, server_time, lsn, run };
        let content = serde_json::to_vec(&claim).expect("JSON");
        self.put_fact(&Key::coverage(truth.incarnation, &name), Kind::Coverage, &content);
        truth.newest_claim = Some(self.now());
    }

    /// A segment that nobody will ever have, recorded as a gap.
    pub fn gap(&self) {
        let mut truth = self.truth();
        let (start, end) = (Lsn(truth.segment * SIZE), Lsn((truth.segment + 1) * SIZE));
        truth.segment += 1;
        self.put_raw(&Key::gap(truth.incarnation, truth.timeline, start, end), Bytes::new());
    }

    /// Another timeline begins in the middle of the last segment; what the old one had from there on is a tail, some
    /// segments longer.
    pub fn fail_over(&self, tail: u64) {
        let mut truth = self.truth();
        let fork = Lsn(truth.segment * SIZE - SIZE / 2);
        for number in truth.segment..truth.segment + tail {
            self.put_segment(&mut truth, number);
        }
        let (parent, incarnation) = (truth.timeline, truth.incarnation);
        truth.history = format!("{}{}\t{}\ttest\n", truth.history, parent.0, fork);
        truth.timeline = TimelineId(parent.0 + 1);
        truth.run += 1;
        let (timeline, text) = (truth.timeline, truth.history.clone());
        if let Some((_, _, history)) = truth.stored.last_mut() {
            history.add(timeline, text.parse().expect("a history")).expect("no conflict");
        }
        let hash = ContentHash::of(&Digest::sha256(text.as_bytes()));
        self.put_fact(&Key::history(incarnation, timeline, hash), Kind::History, text.as_bytes());
        let number = fork.0 / SIZE;
        self.put_segment(&mut truth, number);
        truth.segment = number + 1;
    }

    /// A backup by the order that a real one has; `None` when it gave up.
    pub async fn backup(self, own: Generation, lag: u64) -> Option<Good> {
        let (incarnation, timeline, wal_lsn, id) = {
            let mut truth = self.truth();
            truth.backups += 1;
            let id = BackupId::new(self.now().into(), truth.backups);
            // A standby does not know beforehand where its backup will start.
            let lsn = if lag > 0 { Lsn::ZERO } else { Lsn(truth.segment * SIZE) };
            (truth.incarnation, truth.timeline, lsn, id)
        };
        let repository = &self.repository;
        if generation::is_superseded(repository, own).await.ok()? {
            return None;
        }
        let started_at = Timestamp::from(self.now());
        let generation = own.to_string();
        let intent = BackupIntent { id: id.clone(), generation, base: None, timeline, wal_lsn, started_at };
        catalogue::write_intent(repository, incarnation, &intent).await.ok()?;
        self.check(incarnation, &id).await?;
        let start_lsn = Lsn(self.truth().segment.saturating_sub(lag).max(1) * SIZE + 40);
        if lag > 0 {
            // As a real one: not before the start of every other backup.
            let others = catalogue::list_backups(repository, incarnation).await.ok()?;
            let own = others.iter().filter(|other| other.timeline == timeline);
            if others.iter().any(|other| other.timeline == timeline) && !own.clone().any(|o| o.start_lsn <= start_lsn) {
                return None;
            }
            if own.count() == 0 {
                return None;
            }
        }
        let mut packs = Vec::new();
        for number in 0..PACKS {
            let key = Key::pack(incarnation, &id, number);
            repository.store().put(&key, Bytes::from_static(b"a pack")).await.ok()?;
            let pack = PackRef { backup: id.clone(), number, salt: [0; 16] };
            packs.push(PackEntry { pack, bytes: 6, digest: Digest([0; 32]) });
        }
        if lag == 0 {
            // WAL is written while a backup runs.
            self.segment();
        }
        let stop_lsn = Lsn(self.truth().segment * SIZE);
        let good = Good { incarnation, id: id.clone(), timeline, start_lsn, stop_lsn };
        if !self.is_stored(&good) || generation::is_superseded(repository, own).await.ok()? {
            return None;
        }
        self.check(incarnation, &id).await?;
        let commit = self.commit(&good, (&intent, packs));
        self.truth().committed.push(good.clone());
        catalogue::commit_backup(repository, incarnation, &commit).await.ok()?;
        self.check(incarnation, &id).await?;
        self.truth().good.push(good.clone());
        Some(good)
    }

    fn commit(&self, good: &Good, (intent, packs): (&BackupIntent, Vec<PackEntry>)) -> BackupCommit {
        let stopped_at = Timestamp::from(self.now() + self.truth().skew);
        BackupCommit {
            format: 1,
            id: good.id.clone(),
            generation: intent.generation.clone(),
            system_id: SystemId(7),
            major: Major(18),
            server_version: "18.4".into(),
            segment_size: size(),
            timeline: good.timeline,
            start_lsn: good.start_lsn,
            stop_lsn: good.stop_lsn,
            started_at: intent.started_at,
            stopped_at,
            from_standby: false,
            tablespaces: Vec::new(),
            totals: Totals::default(),
            damaged_blocks: Vec::new(),
            surroundings: Surroundings::default(),
            packs,
            tables: TablePacks { packs: Vec::new(), tables: Vec::new() },
        }
    }

    /// The timeline is still the one that is archived, and its WAL is there.
    fn is_stored(&self, good: &Good) -> bool {
        let truth = self.truth();
        let same = (truth.incarnation, truth.timeline) == (good.incarnation, good.timeline);
        let (stored, path) = truth.path(good.incarnation, good.timeline).expect("known");
        same && stored.contiguous_end_on(&path, good.start_lsn) >= good.stop_lsn
    }

    async fn check(&self, incarnation: Incarnation, id: &BackupId) -> Option<()> {
        let listed = catalogue::list_backup_marks(&self.repository, incarnation).await.ok()?;
        let marks = listed.into_iter().find(|marks| marks.id == *id)?;
        (!marks.marks.contains(&BackupMark::Dropped)).then_some(())
    }
}

impl Truth {
    pub fn path(&self, incarnation: Incarnation, timeline: TimelineId) -> Option<(&StoredRanges, Path)> {
        let (_, stored, history) = self.stored.iter().find(|(other, ..)| *other == incarnation)?;
        Some((stored, history.path_to(timeline)?))
    }

    /// Whether the moment can be reached from any of `backups` with the WAL in `stored`.
    pub fn reaches(&self, instant: &Instant, stored: &StoredRanges, backups: &[&Good]) -> bool {
        let Some((_, path)) = self.path(instant.incarnation, instant.timeline) else { return false };
        backups.iter().any(|good| {
            good.incarnation == instant.incarnation
                && path.holds(good.timeline, good.stop_lsn)
                && good.stop_lsn <= instant.lsn
                && stored.contiguous_end_on(&path, size().start_of(good.start_lsn)) >= instant.lsn
        })
    }
}
