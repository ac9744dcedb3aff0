//! What a restore would do, decided before a byte is fetched: pure, printable, JSON.
//!
//! Input: what the repository holds and the exact stop. Output: the newest backup from which the stop can be reached, the
//! WAL objects for every segment on the path of timelines, all history files, sizes. What cannot work is an error that
//! names the obstacle and the nearest points that do.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::space::FileSystem;
use super::wal_plan::{self, StoredWal};
use crate::pg::control_file::RecoveryParameters;
use crate::pg::timeline::HistoryFile;
use crate::pg::{Lsn, Major, SegmentNo, SegmentSize, SystemId, TimelineId, Timestamp};
use crate::repository::backup_object::{BackupCommit, Surroundings, Tablespace};
use crate::repository::catalogue::{Gap, HistoryObject, WalListing};
use crate::repository::{BackupId, Incarnation};
use crate::util::units::show_bytes;

/// Settings that replay needs at least as large as they were.
const REPLAY_SETTINGS: [&str; 6] = [
    "wal_level",
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];

/// Where replay ends, as PostgreSQL is told it: before (exclusive) or after the record that starts at `lsn`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stop {
    pub timeline: TimelineId,
    pub lsn: Lsn,
    pub inclusive: bool,
    /// WAL is needed up to here: the end of the record at `lsn`, for it must be read whole in either case.
    pub end_lsn: Lsn,
}

/// Everything that planning looks at.
#[derive(Debug, Clone)]
pub struct PlanInput<'a> {
    pub environment: &'a str,
    pub incarnation: Incarnation,
    pub segment_size: SegmentSize,
    pub backups: &'a [BackupCommit],
    /// Take this backup instead of the newest that fits.
    pub backup: Option<&'a BackupId>,
    pub wal: &'a WalListing,
    pub histories: &'a [(HistoryObject, HistoryFile)],
    pub gaps: &'a [Gap],
    pub stop: Stop,
    /// What this host lacks, as sentences.
    pub lacks: &'a [String],
}

/// What a restore will do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    pub environment: String,
    pub incarnation: String,
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
    pub backup: PlannedBackup,
    pub stop: Stop,
    /// From the backup's timeline to the stop's, oldest first.
    pub path: Vec<PathStep>,
    pub wal: Vec<PlannedSegment>,
    pub histories: Vec<PlannedHistory>,
    pub backup_fetch_bytes: u64,
    pub wal_fetch_bytes: u64,
    /// Space that the data directory and tablespaces take before replay begins, WAL included.
    pub disk_bytes: u64,
    /// Where that space is taken, once the places are chosen.
    #[serde(default)]
    pub file_systems: Vec<FileSystem>,
    /// Settings that the restored server must have at least as large, as far as the backup knows them.
    #[serde(default)]
    pub settings: Vec<PlannedSetting>,
    /// Libraries of resource managers, which replay needs; nothing else of the source's is preloaded.
    #[serde(default)]
    pub preload_libraries: Vec<String>,
    /// The largest settings that the WAL up to the stop changes to, as far as it is indexed.
    #[serde(default)]
    pub later_parameters: Option<RecoveryParameters>,
    /// Where replay makes tablespaces that the backup does not have: nothing leads it elsewhere.
    #[serde(default)]
    pub made_tablespaces: Vec<String>,
    /// What this host lacks to run the cluster.
    pub lacks: Vec<String>,
    /// What the operator should know.
    pub notes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedSetting {
    pub name: String,
    pub value: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedBackup {
    pub id: BackupId,
    pub major: Major,
    pub server_version: String,
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub stop_lsn: Lsn,
    pub stopped_at: Timestamp,
    pub files: u64,
    pub bytes: u64,
    pub tablespaces: Vec<Tablespace>,
}

/// A timeline on the way: WAL `[start_lsn, end_lsn)` is taken from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathStep {
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub end_lsn: Lsn,
}

/// A segment file that PostgreSQL will ask for, or find in `pg_wal`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedSegment {
    pub timeline: TimelineId,
    #[serde(with = "segment_no")]
    pub segment: SegmentNo,
    pub objects: Vec<PlannedObject>,
    /// Bytes from the segment's start that are needed; what follows them may be zeros.
    pub needed_bytes: u64,
    /// The last segment of a timeline that was left within it: a transaction prepared before the switch is read from it.
    pub left: bool,
}

/// A stored object and the bytes of the segment that are taken from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedObject {
    pub key: String,
    /// Offset in the segment of the object's first byte.
    pub from: u64,
    pub to: u64,
    /// Bytes before this offset in the segment are not taken.
    pub use_from: u64,
    pub use_to: u64,
    pub stored_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedHistory {
    pub timeline: TimelineId,
    pub key: String,
}

/// Points that can be reached instead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Nearest {
    pub before: Option<(TimelineId, Lsn)>,
    pub after: Option<(TimelineId, Lsn)>,
}

/// Why a stop cannot be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error("there is no backup that ended at or before {lsn} on the way to timeline {timeline}{nearest}")]
    NoBackup { timeline: TimelineId, lsn: Lsn, nearest: Nearest },
    #[error("backup {id} cannot be the start: {reason}")]
    BackupUnfit { id: BackupId, reason: String },
    #[error("WAL [{start}, {end}) of timeline {timeline} is not stored{cause}{nearest}")]
    Hole { timeline: TimelineId, start: Lsn, end: Lsn, cause: String, nearest: Nearest },
    #[error("the history file of timeline {0} is not stored: nobody can tell how it came about")]
    NoHistory(TimelineId),
    #[error("two history files with different content are stored for timeline {0}")]
    HistoryConflict(TimelineId),
    #[error("different content is stored for the same WAL: {first} and {second}")]
    WalConflict { first: String, second: String },
    #[error("no timeline {0} is known in this repository")]
    NoTimeline(TimelineId),
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let point = |(timeline, lsn): &(TimelineId, Lsn)| format!("{lsn} on timeline {timeline}");
        match (&self.before, &self.after) {
            (None, None) => Ok(()),
            (Some(before), None) => write!(f, "; the nearest point before it is {}", point(before)),
            (None, Some(after)) => write!(f, "; the nearest point after it is {}", point(after)),
            (Some(before), Some(after)) => {
                write!(f, "; the nearest points are {} and {}", point(before), point(after))
            }
        }
    }
}

impl PlanError {
    /// A listing may have been stale: worth a second look before it is believed.
    pub fn may_be_stale(&self) -> bool {
        matches!(
            self,
            PlanError::NoBackup { .. } | PlanError::Hole { .. } | PlanError::NoHistory(_) | PlanError::NoTimeline(_)
        )
    }
}

impl Plan {
    /// Decides how to reach `input.stop`.
    ///
    /// # Errors
    /// [`PlanError`] names what is missing, and what can be reached instead.
    pub fn build(input: &PlanInput<'_>) -> Result<Plan, PlanError> {
        let path = path_to(input)?;
        let backup = choose_backup(input, &path)?;
        let path = cut_path(&path, backup, input.stop.end_lsn);
        let stored = StoredWal::new(input.wal, input.segment_size);
        let wal = wal_plan::segments(&stored, &path, backup.start_lsn).map_err(|hole| explain(input, backup, hole))?;
        let wal_fetch_bytes = wal.iter().flat_map(|s| &s.objects).map(|o| o.stored_bytes).sum();
        let wal_bytes = (wal.len() as u64).saturating_mul(input.segment_size.bytes());
        Ok(Plan {
            environment: input.environment.to_owned(),
            incarnation: input.incarnation.to_string(),
            system_id: input.incarnation.system_id,
            segment_size: input.segment_size,
            backup: PlannedBackup::new(backup),
            stop: input.stop,
            path,
            wal,
            histories: histories(input)?,
            backup_fetch_bytes: backup.packs.iter().map(|p| p.bytes).sum(),
            wal_fetch_bytes,
            disk_bytes: backup
                .totals
                .bytes
                .saturating_add(wal_bytes.min(super::wal::disk_bytes_max(input.segment_size))),
            file_systems: Vec::new(),
            settings: settings(backup),
            preload_libraries: replay_libraries(&backup.surroundings).0,
            later_parameters: None,
            made_tablespaces: Vec::new(),
            lacks: input.lacks.iter().cloned().chain(replay_libraries(&backup.surroundings).1).collect(),
            notes: notes(backup),
        })
    }

    pub fn fetch_bytes(&self) -> u64 {
        self.backup_fetch_bytes.saturating_add(self.wal_fetch_bytes)
    }

    /// Adds the settings that the WAL on the way changes to, so that replay need not stop for them.
    pub fn raise(&mut self, later: RecoveryParameters) {
        let numbers = [
            ("max_connections", later.max_connections),
            ("max_worker_processes", later.max_worker_processes),
            ("max_wal_senders", later.max_wal_senders),
            ("max_prepared_transactions", later.max_prepared_transactions),
            ("max_locks_per_transaction", later.max_locks_per_transaction),
        ];
        for (name, number) in numbers {
            // Those of the backup that stand at their default are not recorded.
            let known = self.settings.iter_mut().find(|setting| setting.name == name);
            match known {
                Some(known) if known.value.parse::<u32>().is_ok_and(|value| value < number) => {
                    known.value = number.to_string();
                }
                Some(_) => {}
                None => self.settings.push(PlannedSetting { name: name.to_owned(), value: number.to_string() }),
            }
        }
        self.later_parameters = Some(later);
    }

    /// Of [`Plan::disk_bytes`], what the data directory itself takes.
    pub fn directory_bytes(&self) -> u64 {
        self.outside().fold(self.disk_bytes, |bytes, tablespace| bytes.saturating_sub(tablespace.bytes))
    }

    /// The tablespaces outside the data directory.
    pub fn outside(&self) -> impl Iterator<Item = &Tablespace> {
        self.backup.tablespaces.iter().filter(|tablespace| tablespace.path.starts_with('/'))
    }

    /// The incarnation whose objects are read.
    ///
    /// # Errors
    /// When the text, as read from JSON, is none.
    pub fn incarnation(&self) -> Result<Incarnation, crate::repository::layout::NameError> {
        self.incarnation.parse()
    }
}

impl PlannedBackup {
    fn new(commit: &BackupCommit) -> Self {
        PlannedBackup {
            id: commit.id.clone(),
            major: commit.major,
            server_version: commit.server_version.clone(),
            timeline: commit.timeline,
            start_lsn: commit.start_lsn,
            stop_lsn: commit.stop_lsn,
            stopped_at: commit.stopped_at,
            files: commit.totals.files,
            bytes: commit.totals.bytes,
            tablespaces: commit.tablespaces.clone(),
        }
    }
}

/// For people: what will be fetched, from where to where.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (backup, stop) = (&self.backup, &self.stop);
        let ordinal = self.incarnation.split('-').next().unwrap_or_default();
        writeln!(f, "restore of {} (system {}, incarnation {ordinal})", self.environment, self.system_id)?;
        writeln!(
            f,
            "  backup    {} of PostgreSQL {}, ended at {}",
            backup.id, backup.server_version, backup.stopped_at
        )?;
        writeln!(
            f,
            "            {} files, {}, start {}, consistent at {}",
            backup.files,
            show_bytes(backup.bytes),
            backup.start_lsn,
            backup.stop_lsn
        )?;
        let side = if stop.inclusive { "after" } else { "before" };
        writeln!(f, "  stop      {side} the record at {} on timeline {}", stop.lsn, stop.timeline)?;
        let timelines: Vec<String> = self.path.iter().map(|s| s.timeline.to_string()).collect();
        writeln!(f, "  timelines {}", timelines.join(" → "))?;
        writeln!(f, "  WAL       {} segments, {} to fetch", self.wal.len(), show_bytes(self.wal_fetch_bytes))?;
        writeln!(f, "  fetch     {} in all", show_bytes(self.fetch_bytes()))?;
        writeln!(f, "  disk      {} before replay", show_bytes(self.disk_bytes))?;
        for tablespace in self.outside() {
            writeln!(f, "            {} of it in the tablespace {}", show_bytes(tablespace.bytes), tablespace.path)?;
        }
        for place in &self.made_tablespaces {
            writeln!(f, "            the tablespace {place} is made by the replay, there and nowhere else")?;
        }
        for file_system in &self.file_systems {
            writeln!(f, "            {file_system}")?;
        }
        for setting in &self.settings {
            writeln!(f, "  setting   {} at least {}", setting.name, setting.value)?;
        }
        for library in &self.preload_libraries {
            writeln!(f, "  preload   {library}, which replay needs for its resource manager")?;
        }
        for lack in &self.lacks {
            writeln!(f, "  missing   {lack}")?;
        }
        for note in &self.notes {
            writeln!(f, "  note      {note}")?;
        }
        Ok(())
    }
}

/// The timelines that lead to the stop, from the first of its ancestry.
fn path_to(input: &PlanInput<'_>) -> Result<Vec<PathStep>, PlanError> {
    let timeline = input.stop.timeline;
    let mut files = input.histories.iter().filter(|(object, _)| object.timeline == timeline);
    let known = files.next();
    if files.next().is_some() {
        return Err(PlanError::HistoryConflict(timeline));
    }
    let mut path = Vec::new();
    let mut start_lsn = Lsn::ZERO;
    match known {
        Some((_, file)) => {
            for entry in &file.entries {
                let end_lsn = entry.switch_lsn.max(start_lsn);
                path.push(PathStep { timeline: entry.timeline, start_lsn, end_lsn });
                start_lsn = end_lsn;
            }
        }
        // A cluster's first timeline has no history, whatever its number; every later one has.
        None if timeline == TimelineId(1) || input.histories.is_empty() => {
            if !input.wal.ranges.iter().any(|o| o.range.timeline == timeline) {
                return Err(PlanError::NoTimeline(timeline));
            }
        }
        None if input.wal.ranges.iter().any(|o| o.range.timeline == timeline) => {
            return Err(PlanError::NoHistory(timeline));
        }
        None => return Err(PlanError::NoTimeline(timeline)),
    }
    path.push(PathStep { timeline, start_lsn, end_lsn: Lsn::MAX });
    Ok(path)
}

/// The newest backup that is consistent before the stop, on the path.
fn choose_backup<'a>(input: &PlanInput<'a>, path: &[PathStep]) -> Result<&'a BackupCommit, PlanError> {
    let stop = &input.stop;
    // Consistent before the first record that is not replayed: replay may not stop earlier.
    let limit = if stop.inclusive { stop.end_lsn } else { stop.lsn };
    let on_path = |b: &BackupCommit| {
        let step = path.iter().find(|s| s.timeline == b.timeline);
        step.is_some_and(|s| b.start_lsn >= s.start_lsn && b.stop_lsn <= s.end_lsn)
    };
    if let Some(id) = input.backup {
        let named = input.backups.iter().find(|b| b.id == *id);
        let unfit = |reason: String| PlanError::BackupUnfit { id: id.clone(), reason };
        let backup = named.ok_or_else(|| unfit("it does not exist".into()))?;
        if !on_path(backup) {
            return Err(unfit(format!("it is not on the way to timeline {}", stop.timeline)));
        }
        if backup.stop_lsn > limit {
            return Err(unfit(format!("it is consistent only at {}, after the stop at {}", backup.stop_lsn, stop.lsn)));
        }
        return Ok(backup);
    }
    let fitting = input.backups.iter().filter(|b| on_path(b));
    let chosen = fitting.clone().filter(|b| b.stop_lsn <= limit).max_by_key(|b| (b.stop_lsn, b.start_lsn));
    chosen.ok_or_else(|| {
        let after = fitting.map(|b| (b.timeline, b.stop_lsn)).min_by_key(|(_, lsn)| *lsn);
        PlanError::NoBackup { timeline: stop.timeline, lsn: stop.lsn, nearest: Nearest { before: None, after } }
    })
}

/// The part of the path that is replayed.
fn cut_path(path: &[PathStep], backup: &BackupCommit, end_lsn: Lsn) -> Vec<PathStep> {
    let from = path.iter().position(|s| s.timeline == backup.timeline).unwrap_or(0);
    let mut cut: Vec<PathStep> = path.iter().skip(from).copied().collect();
    if let Some(first) = cut.first_mut() {
        first.start_lsn = backup.start_lsn;
    }
    if let Some(last) = cut.last_mut() {
        last.end_lsn = end_lsn.max(last.start_lsn);
    }
    cut
}

/// All histories of the incarnation: PostgreSQL takes the first timeline id that has none.
fn histories(input: &PlanInput<'_>) -> Result<Vec<PlannedHistory>, PlanError> {
    let mut planned: Vec<PlannedHistory> = Vec::new();
    let mut sorted: Vec<&HistoryObject> = input.histories.iter().map(|(object, _)| object).collect();
    sorted.sort_by_key(|h| (h.timeline, h.hash));
    for history in sorted {
        if planned.last().is_some_and(|last| last.timeline == history.timeline) {
            return Err(PlanError::HistoryConflict(history.timeline));
        }
        planned.push(PlannedHistory { timeline: history.timeline, key: history.key.as_str().to_owned() });
    }
    Ok(planned)
}

/// Adds to a hole why it is there and what can be reached around it.
fn explain(input: &PlanInput<'_>, backup: &BackupCommit, error: PlanError) -> PlanError {
    let PlanError::Hole { timeline, start, end, .. } = error else { return error };
    let gap = input.gaps.iter().find(|g| g.timeline == timeline && g.start_lsn < end && g.end_lsn > start);
    let cause = gap.map_or(String::new(), |g| format!(" (lost: {}, found at {})", g.cause, g.found_at));
    let before = (start >= backup.stop_lsn).then_some((timeline, start));
    let later = input.backups.iter().filter(|b| b.timeline == timeline && b.start_lsn >= end);
    let after = later.map(|b| (b.timeline, b.stop_lsn)).min_by_key(|(_, lsn)| *lsn);
    PlanError::Hole { timeline, start, end, cause, nearest: Nearest { before, after } }
}

/// What replay needs at least as large (`CheckRequiredParameterValues`); the restored `pg_control` has the last word.
fn settings(backup: &BackupCommit) -> Vec<PlannedSetting> {
    let needed = |name: &str| REPLAY_SETTINGS.contains(&name);
    let all = backup.surroundings.settings.iter().filter(|s| needed(&s.name));
    all.map(|s| PlannedSetting { name: s.name.clone(), value: s.value.clone() }).collect()
}

/// The libraries that registered the source's resource managers, and those managers for which none could be found. Only
/// the name tells which library it is; a library that stands alone needs no name.
fn replay_libraries(surroundings: &Surroundings) -> (Vec<String>, Vec<String>) {
    let (mut libraries, mut unknown) = (Vec::new(), Vec::new());
    let all = &surroundings.preload_libraries;
    for manager in &surroundings.resource_managers {
        let named = |library: &&String| {
            let plain = library.rsplit('/').next().unwrap_or(library).trim_end_matches(".so");
            plain.eq_ignore_ascii_case(&manager.name)
        };
        let alone = || all.first().filter(|_| all.len() == 1);
        match all.iter().find(named).or_else(alone) {
            Some(library) if libraries.contains(library) => {}
            Some(library) => libraries.push(library.clone()),
            None => unknown.push(format!(
                "the library of the resource manager {} ({}), without which its WAL cannot be replayed; the source preloads {}",
                manager.name,
                manager.id,
                all.join(", ")
            )),
        }
    }
    (libraries, unknown)
}

fn notes(backup: &BackupCommit) -> Vec<String> {
    let mut notes = vec!["unlogged tables come back empty".to_owned()];
    for damaged in &backup.damaged_blocks {
        let block = damaged.block.map_or(String::new(), |b| format!(", block {b}"));
        notes.push(format!("the source already had a damaged page in {}{block}: {}", damaged.file, damaged.message));
    }
    notes
}

/// A segment number as a plain number.
mod segment_no {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::pg::SegmentNo;

    pub fn serialize<S: Serializer>(segment: &SegmentNo, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(segment.0)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<SegmentNo, D::Error> {
        u64::deserialize(d).map(SegmentNo)
    }
}

#[cfg(test)]
mod tests;
