//! `backup_label`: where a base backup began. A server that starts on a backup without it recovers from the wrong
//! checkpoint and is silently corrupt.
//!
//! Source: `build_backup_content` (15–18) and `do_pg_start_backup` (14); read by `read_backup_label`.

use super::{Lsn, SegmentName, TimelineId};

/// The lines of the file that recovery acts on, and the label that a person gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// Redo position of the checkpoint that began the backup.
    pub start_lsn: Lsn,
    pub start_segment: SegmentName,
    pub checkpoint_lsn: Lsn,
    /// The timeline of the start; the file has said so since PostgreSQL 11.
    pub timeline: TimelineId,
    pub from_standby: bool,
    pub label: String,
    /// As the server wrote it, in its `log_timezone`.
    pub start_time: String,
    /// Set for an incremental backup: where the backup that it needs began.
    pub incremental_from: Option<(TimelineId, Lsn)>,
}

/// The text is not a backup label.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("backup_label has no usable line {0:?}")]
pub struct ParseBackupLabelError(pub &'static str);

impl std::str::FromStr for BackupLabel {
    type Err = ParseBackupLabelError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let field = |name: &'static str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            value.ok_or(ParseBackupLabelError(name))
        };
        const START: &str = "START WAL LOCATION";
        let wrong_start = || ParseBackupLabelError(START);
        let (start, file) = field(START)?.split_once(" (file ").ok_or_else(wrong_start)?;
        let segment = file.strip_suffix(')').ok_or_else(wrong_start)?;
        const TIMELINE: &str = "START TIMELINE";
        let timeline = field(TIMELINE)?.parse().ok().filter(|id| *id != 0).map(TimelineId);
        Ok(BackupLabel {
            start_lsn: start.parse().map_err(|_| wrong_start())?,
            start_segment: segment.parse().map_err(|_| wrong_start())?,
            checkpoint_lsn: lsn(field("CHECKPOINT LOCATION")?, "CHECKPOINT LOCATION")?,
            timeline: timeline.ok_or(ParseBackupLabelError(TIMELINE))?,
            from_standby: field("BACKUP FROM")? == "standby",
            label: field("LABEL")?.to_owned(),
            start_time: field("START TIME")?.to_owned(),
            incremental_from: incremental(field("INCREMENTAL FROM LSN").ok(), field("INCREMENTAL FROM TLI").ok())?,
        })
    }
}

fn lsn(text: &str, name: &'static str) -> Result<Lsn, ParseBackupLabelError> {
    text.trim().parse().map_err(|_| ParseBackupLabelError(name))
}

fn incremental(from: Option<&str>, timeline: Option<&str>) -> Result<Option<(TimelineId, Lsn)>, ParseBackupLabelError> {
    let Some(from) = from else { return Ok(None) };
    let timeline =
        timeline.and_then(|id| id.trim().parse().ok()).ok_or(ParseBackupLabelError("INCREMENTAL FROM TLI"))?;
    Ok(Some((TimelineId(timeline), lsn(from, "INCREMENTAL FROM LSN")?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LABEL: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
        CHECKPOINT LOCATION: 0/2000080\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n\
        START TIME: 2026-11-23 21:00:00 UTC\nLABEL: pg_basebackup base backup\nSTART TIMELINE: 1\n";

    #[test]
    fn label_of_a_streamed_backup() {
        let label: BackupLabel = LABEL.parse().expect("well formed");
        assert_eq!(label.start_lsn, Lsn(0x200_0028));
        assert_eq!(label.checkpoint_lsn, Lsn(0x200_0080));
        assert_eq!(label.start_segment.to_string(), "000000010000000000000002");
        assert_eq!(label.timeline, TimelineId(1));
        assert!(!label.from_standby && label.incremental_from.is_none());
        assert_eq!(label.label, "pg_basebackup base backup");
    }

    #[test]
    fn label_of_an_incremental_backup_of_a_standby() {
        let text = LABEL.replace("primary", "standby") + "INCREMENTAL FROM LSN: 0/1000000\nINCREMENTAL FROM TLI: 1\n";
        let label: BackupLabel = text.parse().expect("well formed");
        assert!(label.from_standby);
        assert_eq!(label.incremental_from, Some((TimelineId(1), Lsn(0x100_0000))));
    }

    #[test]
    fn the_missing_line_is_named() {
        let check = |without: &'static str| {
            let text: String = LABEL.lines().filter(|l| !l.starts_with(without)).map(|l| format!("{l}\n")).collect();
            assert_eq!(text.parse::<BackupLabel>(), Err(ParseBackupLabelError(without)));
        };
        ["START WAL LOCATION", "CHECKPOINT LOCATION", "START TIMELINE", "LABEL"].into_iter().for_each(check);
        assert!("".parse::<BackupLabel>().is_err());
    }
}
