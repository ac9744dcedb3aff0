//! How long it takes to decide what leaves, and in how much memory, by the length of the window and the number of environments.
//!
//!     cargo bench --bench prune_plan
//!
//! The listings are made up, object by object, as a store's pages would give them: a segment of WAL, its index and a claim a
//! minute, a backup of eight packs a day, over the window and two days more.
#![expect(clippy::print_stdout, reason = "a benchmark's result")]

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use chrono::{DateTime, TimeDelta, Utc};
use pgrecall::pg::{Lsn, SegmentName, SegmentNo, SegmentSize, SystemId, TimelineId, Timestamp};
use pgrecall::repository::catalogue::{BackupMarks, WalObject};
use pgrecall::repository::layout::{BackupMark, ContentHash, CoverageName, WalRange};
use pgrecall::repository::store::Object;
use pgrecall::repository::{BackupId, Generation, Incarnation, Key};
use pgrecall::retention::policy::{Decision, Rules, Window};
use pgrecall::retention::seen::{CommitFacts, Packs, Seen, SeenClaim};

const SIZE: SegmentSize = SegmentSize::MIB_16;
const LINE: TimelineId = TimelineId(1);
const PACKS: u32 = 8;

fn main() -> Result<()> {
    println!("environments  days    objects  removed  seconds  ns/object  peak MiB");
    for (environments, days) in [(1, 14), (1, 28), (1, 56), (10, 14), (50, 14), (200, 14)] {
        let begin = Instant::now();
        let (mut objects, mut removed) = (0, 0);
        for environment in 0..environments {
            let (listed, gone) = plan(environment, days)?;
            objects += listed;
            removed += gone;
        }
        let seconds = begin.elapsed().as_secs_f64();
        ensure!(removed > 0 && removed < objects, "{removed} of {objects} objects leave");
        let each = seconds * 1e9 / objects as f64;
        let peak = peak_mib()?;
        println!("{environments:12} {days:5} {objects:10} {removed:8} {seconds:8.2} {each:10.0} {peak:9.1}");
    }
    Ok(())
}

/// Goes through one environment as a removal does: lists what is decided on, then judges every object. Objects, and how many leave.
fn plan(environment: u64, days: i64) -> Result<(u64, u64)> {
    let world = World { incarnation: Incarnation { ordinal: 1, system_id: SystemId(environment + 1) }, days };
    let mut seen = Seen::new(world.incarnation, SIZE, world.now()?);
    seen.history.add_root(LINE);
    for minute in 0..world.minutes() {
        seen.see_wal(&world.wal(minute)?);
        let name = world.claim(minute)?;
        seen.see_claim(SeenClaim { key: Key::coverage(world.incarnation, &name), name, at: world.at(minute)? });
    }
    for day in 0..world.backups() {
        let id = world.backup(day)?;
        for _ in 0..PACKS {
            seen.see_pack(&id, 64 << 20);
        }
        let at = world.at(day * 1440 + 5)?;
        let marks = BackupMarks { id, marks: vec![BackupMark::Commit], times: vec![at] };
        let backup = seen.see_marks(&marks);
        let facts = CommitFacts {
            timeline: LINE,
            start_lsn: lsn(day * 1440 + 1),
            stop_lsn: lsn(day * 1440 + 5),
            stopped_at: at.into(),
            own: Packs { count: PACKS.into(), bytes: u64::from(PACKS) << 26 },
            others: Vec::new(),
        };
        backup.commit.as_mut().context("the mark is there")?.facts = Some(facts);
        // What left the window was dropped on its day.
        let dropped_at = at + TimeDelta::days(days + 1);
        backup.dropped_at = (dropped_at < world.now()?).then_some(dropped_at);
    }
    let newest = world.at(world.minutes() - 1)?;
    let window = Some(Window::new(newest.into(), newest, TimeDelta::days(days)));
    let rules = Rules { window, generation: Generation { ordinal: 1, random: 1 }, is_current: true };
    let decision = Decision::of(&seen, &rules);
    let (mut objects, mut removed) = (0, 0);
    let mut judge = |key: Key, last_modified: DateTime<Utc>| {
        let object = Object { key, bytes: 1 << 20, last_modified, e_tag: None };
        objects += 1;
        removed += u64::from(!decision.judge(&object).is_keep());
    };
    for minute in 0..world.minutes() {
        let (at, wal) = (world.at(minute)?, world.wal(minute)?);
        let segment = SegmentName::new(LINE, wal.range.segment, SIZE);
        judge(wal.key, at);
        judge(Key::index(world.incarnation, segment, 2, wal.range.hash), at);
        judge(Key::coverage(world.incarnation, &world.claim(minute)?), at);
    }
    for day in 0..world.backups() {
        let (id, at) = (world.backup(day)?, world.at(day * 1440 + 5)?);
        (0..PACKS).for_each(|number| judge(Key::pack(world.incarnation, &id, number), at));
        judge(Key::backup(world.incarnation, &id, &BackupMark::Commit), at);
    }
    Ok((objects, removed))
}

/// What an environment's repository holds that is two days older than its window.
struct World {
    incarnation: Incarnation,
    days: i64,
}

impl World {
    fn backups(&self) -> i64 {
        self.days + 2
    }

    fn minutes(&self) -> i64 {
        self.backups() * 1440
    }

    fn at(&self, minute: i64) -> Result<DateTime<Utc>> {
        DateTime::from_timestamp(1_700_000_000 + minute * 60, 0).context("a time")
    }

    fn now(&self) -> Result<DateTime<Utc>> {
        self.at(self.minutes())
    }

    fn wal(&self, minute: i64) -> Result<WalObject> {
        let (segment, hash) = (SegmentNo(minute as u64 + 1), ContentHash::default());
        let range = WalRange { timeline: LINE, segment, from: 0, to: SIZE.bytes(), hash, whole: true };
        let key = Key::wal(self.incarnation, &range, SIZE);
        Ok(WalObject { range, key, bytes: 1 << 20, last_modified: self.at(minute)? })
    }

    fn claim(&self, minute: i64) -> Result<CoverageName> {
        Ok(CoverageName { timeline: LINE, server_time: self.at(minute)?.into(), lsn: lsn(minute + 1), run: 1 })
    }

    fn backup(&self, day: i64) -> Result<BackupId> {
        let begin: Timestamp = self.at(day * 1440 + 1)?.into();
        Ok(BackupId::new(begin, day as u32))
    }
}

fn lsn(minute: i64) -> Lsn {
    Lsn((minute as u64 + 1) * SIZE.bytes())
}

/// The most memory that this process had.
fn peak_mib() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
}
