//! What is there: WAL ranges, histories, gaps, backups, by listing.
//!
//! Invariants: a backup exists iff its commit object does and its `.dropped` does not; a missing object or a hole is
//! believed only when a second listing, begun after the first ended, shows it too (the caller lists again).

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::backup_object::{BackupCommit, BackupIntent, COMMIT_BYTES_MAX};
use super::codec::Kind;
use super::format::{Repository, RepositoryError, parse_json, to_json};
use super::layout::{self, BackupId, BackupMark, ContentHash, Incarnation, Key, WalName, WalRange, prefix};
use crate::pg::{Lsn, SegmentSize, TimelineId, Timestamp};

/// One stored range of WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalObject {
    pub range: WalRange,
    pub key: Key,
    pub bytes: u64,
    pub last_modified: DateTime<Utc>,
}

/// A stored history file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryObject {
    pub timeline: TimelineId,
    pub hash: ContentHash,
    pub key: Key,
}

/// Everything below `wal/`, sorted by timeline and position.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WalListing {
    pub ranges: Vec<WalObject>,
    pub histories: Vec<HistoryObject>,
}

/// The marks of one backup id, each with the store's time of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupMarks {
    pub id: BackupId,
    pub marks: Vec<BackupMark>,
    /// Beside `marks`.
    pub times: Vec<DateTime<Utc>>,
}

/// WAL `[start_lsn, end_lsn)` of a timeline that is missing for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub end_lsn: Lsn,
    pub found_at: Timestamp,
    pub cause: String,
}

impl BackupMarks {
    /// Visible to readers.
    pub fn exists(&self) -> bool {
        self.marks.contains(&BackupMark::Commit) && !self.marks.contains(&BackupMark::Dropped)
    }

    /// When the store got this mark.
    pub fn time_of(&self, mark: &BackupMark) -> Option<DateTime<Utc>> {
        self.marks.iter().zip(&self.times).find(|(own, _)| *own == mark).map(|(_, time)| *time)
    }

    /// A remover has announced that it looks whether this may go.
    pub fn is_leaving(&self) -> bool {
        self.marks.iter().any(|mark| matches!(mark, BackupMark::Leaving(_)))
    }
}

/// Lists the WAL of all timelines of an incarnation.
pub async fn list_wal(
    repository: &Repository,
    incarnation: Incarnation,
    size: SegmentSize,
) -> Result<WalListing, RepositoryError> {
    list_wal_below(repository, &prefix::wal(incarnation), size).await
}

/// Lists the WAL of one timeline.
pub async fn list_wal_timeline(
    repository: &Repository,
    incarnation: Incarnation,
    timeline: TimelineId,
    size: SegmentSize,
) -> Result<WalListing, RepositoryError> {
    list_wal_below(repository, &prefix::wal_timeline(incarnation, timeline), size).await
}

async fn list_wal_below(
    repository: &Repository,
    prefix: &str,
    size: SegmentSize,
) -> Result<WalListing, RepositoryError> {
    let mut listing = WalListing::default();
    for object in repository.store().list(prefix).await? {
        match layout::parse_wal(&object.key, size) {
            Some(WalName::Range(range)) => {
                let (key, bytes, last_modified) = (object.key, object.bytes, object.last_modified);
                listing.ranges.push(WalObject { range, key, bytes, last_modified });
            }
            Some(WalName::History { timeline, hash }) => {
                listing.histories.push(HistoryObject { timeline, hash, key: object.key });
            }
            None => {}
        }
    }
    listing.ranges.sort_by_key(|o| (o.range.timeline, o.range.segment, o.range.from, o.range.to, o.range.hash));
    Ok(listing)
}

/// Every id below `backups/` with its marks, in the order of ids (which is not an order in time).
pub async fn list_backup_marks(
    repository: &Repository,
    incarnation: Incarnation,
) -> Result<Vec<BackupMarks>, RepositoryError> {
    let mut found: BTreeMap<BackupId, BackupMarks> = BTreeMap::new();
    for object in repository.store().list(&prefix::backups(incarnation)).await? {
        let Some((id, mark)) = layout::parse_backup(&object.key) else { continue };
        let entry = found.entry(id.clone()).or_insert(BackupMarks { id, marks: Vec::new(), times: Vec::new() });
        entry.marks.push(mark);
        entry.times.push(object.last_modified);
    }
    Ok(found.into_values().collect())
}

/// The backups that exist and can be read, by their stop position. One that is damaged is named in the log; it does not
/// keep anybody from using the others.
pub async fn list_backups(
    repository: &Repository,
    incarnation: Incarnation,
) -> Result<Vec<BackupCommit>, RepositoryError> {
    let mut backups = Vec::new();
    for marks in list_backup_marks(repository, incarnation).await? {
        if !marks.exists() {
            continue;
        }
        match load_backup(repository, incarnation, &marks.id).await {
            Ok(commit) => backups.push(commit),
            Err(error) if error.is_corrupt() => {
                tracing::warn!(backup = %marks.id, %error, "a backup is damaged: it is passed over")
            }
            Err(error) => return Err(error),
        }
    }
    backups.sort_by_key(|b| (b.timeline, b.stop_lsn));
    Ok(backups)
}

/// Reads a backup's commit object.
pub async fn load_backup(
    repository: &Repository,
    incarnation: Incarnation,
    id: &BackupId,
) -> Result<BackupCommit, RepositoryError> {
    let key = Key::backup(incarnation, id, &BackupMark::Commit);
    let content = repository.read(&key, Kind::Backup, COMMIT_BYTES_MAX).await?;
    let commit: BackupCommit = parse_json(&key, &content)?;
    if commit.id != *id || commit.system_id != incarnation.system_id {
        let reason = format!("it is the commit object of {} of system {}", commit.id, commit.system_id);
        return Err(RepositoryError::Malformed { key: key.as_str().to_owned(), reason });
    }
    Ok(commit)
}

/// Stores the intent to take a backup: the first thing that a backup writes.
pub async fn write_intent(
    repository: &Repository,
    incarnation: Incarnation,
    intent: &BackupIntent,
) -> Result<(), RepositoryError> {
    let key = Key::backup(incarnation, &intent.id, &BackupMark::Intent);
    repository.write_fact(&key, Kind::Intent, intent).await
}

/// Stores the commit object: the last thing that a backup writes, after everything that it names.
pub async fn commit_backup(
    repository: &Repository,
    incarnation: Incarnation,
    commit: &BackupCommit,
) -> Result<(), RepositoryError> {
    let key = Key::backup(incarnation, &commit.id, &BackupMark::Commit);
    repository.write(&key, Kind::Backup, to_json(commit).into()).await.map(drop)
}

/// Reads an intent.
pub async fn load_intent(
    repository: &Repository,
    incarnation: Incarnation,
    id: &BackupId,
) -> Result<BackupIntent, RepositoryError> {
    repository.read_fact(&Key::backup(incarnation, id, &BackupMark::Intent), Kind::Intent).await
}

/// What a mark of removal says beside its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemovalMark {
    /// Who wrote it.
    pub generation: String,
    pub written_at: Timestamp,
    pub reason: String,
}

/// Stores `.leaving-…` or `.dropped`.
pub async fn write_mark(
    repository: &Repository,
    incarnation: Incarnation,
    id: &BackupId,
    (mark, content): (&BackupMark, &RemovalMark),
) -> Result<(), RepositoryError> {
    repository.write_fact(&Key::backup(incarnation, id, mark), Kind::Mark, content).await
}

/// Records that WAL of a timeline before `lsn` is being removed: from here on its absence is no loss.
pub async fn write_removed(
    repository: &Repository,
    incarnation: Incarnation,
    (timeline, lsn): (TimelineId, Lsn),
    content: &RemovalMark,
) -> Result<(), RepositoryError> {
    repository.write_fact(&Key::removed(incarnation, timeline, lsn), Kind::Removed, content).await
}

/// Up to where each timeline's WAL was removed; the names tell all.
pub async fn list_removed(
    repository: &Repository,
    incarnation: Incarnation,
) -> Result<BTreeMap<TimelineId, Lsn>, RepositoryError> {
    let mut removed: BTreeMap<TimelineId, Lsn> = BTreeMap::new();
    for object in repository.store().list(&prefix::removed(incarnation)).await? {
        let Some((timeline, lsn)) = layout::parse_removed(&object.key) else { continue };
        let known = removed.entry(timeline).or_default();
        *known = lsn.max(*known);
    }
    Ok(removed)
}

/// The WAL that was removed, for those to whom it is the same as lost: nobody is to ask a server for it.
pub async fn list_removed_as_gaps(
    repository: &Repository,
    incarnation: Incarnation,
) -> Result<Vec<Gap>, RepositoryError> {
    let removed = list_removed(repository, incarnation).await?;
    let gap = |(timeline, end_lsn)| {
        let cause = "it left the recovery window".to_owned();
        Gap { timeline, start_lsn: Lsn::ZERO, end_lsn, found_at: Timestamp(0), cause }
    };
    Ok(removed.into_iter().map(gap).collect())
}

/// Records WAL that is missing for good.
pub async fn write_gap(repository: &Repository, incarnation: Incarnation, gap: &Gap) -> Result<(), RepositoryError> {
    let key = Key::gap(incarnation, gap.timeline, gap.start_lsn, gap.end_lsn);
    repository.write_fact(&key, Kind::Gap, gap).await
}

/// All recorded gaps. The name of a record tells its place; a damaged one has lost the cause only.
pub async fn list_gaps(repository: &Repository, incarnation: Incarnation) -> Result<Vec<Gap>, RepositoryError> {
    let mut gaps = Vec::new();
    for object in repository.store().list(&prefix::gaps(incarnation)).await? {
        let Some((timeline, start_lsn, end_lsn)) = layout::parse_gap(&object.key) else { continue };
        gaps.push(match repository.read_fact(&object.key, Kind::Gap).await {
            Err(error) if error.is_corrupt() => {
                let found_at = object.last_modified.into();
                Gap { timeline, start_lsn, end_lsn, found_at, cause: format!("its record is damaged ({error})") }
            }
            gap => gap?,
        });
    }
    Ok(gaps)
}
