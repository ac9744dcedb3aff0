//! What the store alone says about an environment; in this form it also goes over the socket.

use std::fmt::Write as _;

use chrono_tz::Tz;
use serde::{Deserialize, Serialize};

use super::times;
use super::window::{self, Survey, Tail};
use crate::error::Failure;
use crate::lineage::moment::window::Interval;
use crate::pg::{Lsn, SegmentSize, TimelineId, Timestamp};
use crate::repository::catalogue::{self, WalObject};
use crate::repository::identity::{self, KnownIncarnation};
use crate::repository::{Repository, RepositoryError};
use crate::util::clock;
use crate::util::units::show_bytes;

/// The newest incarnation, as stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreState {
    pub repository: String,
    pub incarnation: String,
    pub system_id: String,
    pub major: u16,
    pub timeline: Option<u32>,
    /// The unbroken stored stream that ends at the newest stored byte of the newest timeline.
    pub stored_from_lsn: Option<String>,
    pub stored_to_lsn: Option<String>,
    /// The newest moment that can be restored.
    pub covered_until: Option<Timestamp>,
    /// What can be restored, oldest first: every moment of each interval, none between them.
    pub window: Vec<RestorableInterval>,
    /// WAL past where the followed timeline left another: restorable by naming its timeline.
    pub diverged_tails: Vec<StoredTail>,
    pub backup_count: usize,
    /// Oldest first; over the socket only the newest.
    pub backups: Vec<StoredBackup>,
    /// Ids whose commit object cannot be read, with the reason.
    pub damaged_backups: Vec<DamagedBackup>,
    pub gaps: Vec<StoredGap>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorableInterval {
    pub from: Option<Timestamp>,
    pub from_lsn: String,
    /// The newest proven moment.
    pub to: Option<Timestamp>,
    pub to_lsn: String,
    /// Why nothing can be restored between this interval and the one after it.
    pub ended_by: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredTail {
    pub timeline: u32,
    pub fork_lsn: String,
    pub end_lsn: String,
    pub commits: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredBackup {
    pub id: String,
    pub started_at: Timestamp,
    pub stopped_at: Timestamp,
    pub timeline: u32,
    pub start_lsn: String,
    pub stop_lsn: String,
    pub server_version: String,
    pub from_standby: bool,
    pub files: u64,
    pub bytes: u64,
    pub stored_bytes: u64,
    pub damaged_blocks: usize,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedBackup {
    pub id: String,
    pub error: Failure,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredGap {
    pub timeline: u32,
    pub start_lsn: String,
    pub end_lsn: String,
    pub found_at: Timestamp,
    pub cause: String,
}

/// Reads the state of the newest incarnation; `None` when no cluster was ever archived there.
///
/// # Errors
/// As the store says.
pub async fn load(repository: &Repository) -> Result<Option<StoreState>, Failure> {
    let Some(current) = identity::list_sound(repository).await?.pop() else { return Ok(None) };
    load_incarnation(repository, &current).await.map(Some)
}

async fn load_incarnation(repository: &Repository, current: &KnownIncarnation) -> Result<StoreState, Failure> {
    let (incarnation, size) = (current.incarnation, current.identity.segment_size);
    let wal = catalogue::list_wal(repository, incarnation, size).await?;
    let timeline = wal.ranges.iter().map(|object| object.range.timeline).max();
    let stream = timeline.and_then(|timeline| newest_stream(&wal.ranges, timeline, size));
    let (backups, damaged_backups) = load_backups(repository, current).await?;
    let gaps = catalogue::list_gaps(repository, incarnation).await?;
    let survey = match timeline {
        Some(_) => Some(window::survey(repository, current).await?),
        None => None,
    };
    let intervals = survey.as_ref().map(|survey| intervals_of(survey, &gaps)).unwrap_or_default();
    let tails = survey.map(|survey| survey.tails).unwrap_or_default();
    Ok(StoreState {
        repository: repository.store().place().to_owned(),
        incarnation: incarnation.to_string(),
        system_id: current.identity.system_id.to_string(),
        major: current.identity.major.0,
        timeline: timeline.map(|timeline| timeline.0),
        stored_from_lsn: stream.map(|(start, _)| start.to_string()),
        stored_to_lsn: stream.map(|(_, end)| end.to_string()),
        covered_until: intervals.last().and_then(|interval| interval.to),
        window: intervals,
        diverged_tails: tails.iter().map(StoredTail::from).collect(),
        backup_count: backups.len(),
        backups,
        damaged_backups,
        gaps: gaps.iter().map(StoredGap::from).collect(),
    })
}

impl StoreState {
    /// The backups, for people.
    pub fn show_backups(&self, zone: Tz) -> String {
        let now = clock::now();
        let mut text = String::new();
        if self.backups.is_empty() && self.damaged_backups.is_empty() {
            text.push_str("no backup yet");
        }
        for backup in &self.backups {
            let _ = writeln!(text, "{}  {}", backup.id, times::show(backup.stopped_at, zone, now));
            let _ = writeln!(
                text,
                "    PostgreSQL {}, timeline {}, WAL {} to {}, {} in {} files, {} stored{}",
                backup.server_version,
                backup.timeline,
                backup.start_lsn,
                backup.stop_lsn,
                show_bytes(backup.bytes),
                backup.files,
                show_bytes(backup.stored_bytes),
                if backup.from_standby { ", from a standby" } else { "" },
            );
            if backup.damaged_blocks > 0 {
                let _ = writeln!(text, "    the server reported {} damaged blocks", backup.damaged_blocks);
            }
        }
        for damaged in &self.damaged_backups {
            let _ = writeln!(text, "{}  cannot be used: failed to {}", damaged.id, damaged.error);
        }
        text
    }
}

/// Every backup that exists; one that cannot be read does not hide the others.
async fn load_backups(
    repository: &Repository,
    current: &KnownIncarnation,
) -> Result<(Vec<StoredBackup>, Vec<DamagedBackup>), RepositoryError> {
    let (mut backups, mut damaged) = (Vec::new(), Vec::new());
    for marks in catalogue::list_backup_marks(repository, current.incarnation).await? {
        if !marks.exists() {
            continue;
        }
        match catalogue::load_backup(repository, current.incarnation, &marks.id).await {
            Ok(commit) => backups.push(StoredBackup {
                id: commit.id.to_string(),
                started_at: commit.started_at,
                stopped_at: commit.stopped_at,
                timeline: commit.timeline.0,
                start_lsn: commit.start_lsn.to_string(),
                stop_lsn: commit.stop_lsn.to_string(),
                server_version: commit.server_version,
                from_standby: commit.from_standby,
                files: commit.totals.files,
                bytes: commit.totals.bytes,
                stored_bytes: commit.totals.stored_bytes,
                damaged_blocks: commit.damaged_blocks.len(),
            }),
            Err(error) if error.is_retryable() => return Err(error),
            Err(error) => damaged.push(DamagedBackup { id: marks.id.to_string(), error: error.into() }),
        }
    }
    backups.sort_by_key(|backup| backup.stopped_at);
    Ok((backups, damaged))
}

fn intervals_of(survey: &Survey, gaps: &[catalogue::Gap]) -> Vec<RestorableInterval> {
    let next_starts = survey.intervals.iter().skip(1).map(|interval| Some(interval.from.lsn)).chain([None]);
    let shown = |(interval, next): (&Interval, Option<Lsn>)| {
        let cause = |next: Lsn| {
            let noted = gaps.iter().find(|gap| gap.end_lsn > interval.to_lsn && gap.start_lsn < next);
            noted.map_or_else(|| "WAL is missing in the store".to_owned(), |gap| gap.cause.clone())
        };
        RestorableInterval {
            from: interval.from.time,
            from_lsn: interval.from.lsn.to_string(),
            to: interval.to_time,
            to_lsn: interval.to_lsn.to_string(),
            ended_by: next.map(cause),
        }
    };
    survey.intervals.iter().zip(next_starts).map(shown).collect()
}

impl From<&Tail> for StoredTail {
    fn from(tail: &Tail) -> Self {
        StoredTail {
            timeline: tail.at.timeline.0,
            fork_lsn: tail.at.fork_lsn.to_string(),
            end_lsn: tail.at.end_lsn.to_string(),
            commits: tail.commits,
        }
    }
}

/// `[start, end)` of the stored bytes that reach without a hole to the newest one of a timeline.
fn newest_stream(objects: &[WalObject], timeline: TimelineId, size: SegmentSize) -> Option<(Lsn, Lsn)> {
    let own = objects.iter().map(|object| &object.range).filter(|range| range.timeline == timeline);
    let mut spans: Vec<(Lsn, Lsn)> = own.map(|range| (range.start_lsn(size), range.end_lsn(size))).collect();
    spans.sort_unstable();
    let merged = |stream: Option<(Lsn, Lsn)>, (start, end): (Lsn, Lsn)| match stream {
        Some((from, to)) if start <= to => Some((from, to.max(end))),
        _ => Some((start, end)),
    };
    spans.into_iter().fold(None, merged)
}

impl From<&catalogue::Gap> for StoredGap {
    fn from(gap: &catalogue::Gap) -> Self {
        StoredGap {
            timeline: gap.timeline.0,
            start_lsn: gap.start_lsn.to_string(),
            end_lsn: gap.end_lsn.to_string(),
            found_at: gap.found_at,
            cause: gap.cause.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::SegmentNo;
    use crate::repository::Key;
    use crate::repository::layout::{ContentHash, WalRange};
    use crate::util::digest::Digest;

    #[test]
    fn the_stream_ends_at_the_newest_byte_and_begins_after_the_last_hole() {
        let size = SegmentSize::new(16 << 20).expect("a segment size");
        let object = |timeline, segment, from, to| {
            let hash = ContentHash::of(&Digest::sha256(b""));
            let segment = SegmentNo(segment);
            let range = WalRange { timeline: TimelineId(timeline), segment, from, to, hash, whole: false };
            let key = Key::wal(
                crate::repository::Incarnation { ordinal: 1, system_id: crate::pg::SystemId(1) },
                &range,
                size,
            );
            WalObject { range, key, bytes: 1, last_modified: clock::now() }
        };
        let whole = size.bytes();
        let objects = [
            object(1, 1, 0, whole),
            object(1, 3, 0, whole),
            object(1, 4, 100, 300),
            object(1, 4, 0, 200),
            object(2, 9, 0, 1),
        ];
        let stream = newest_stream(&objects, TimelineId(1), size);
        assert_eq!(stream, Some((Lsn(3 * whole), Lsn(4 * whole + 300))));
        assert_eq!(newest_stream(&objects, TimelineId(3), size), None);
    }
}
