//! What a copy must be before it may become a backup of this cluster.

use super::error::BackupError;
use super::full::FullBackup;
use super::packer::Packed;
use super::source::SourceStart;
use crate::pg::{BackupLabel, ControlFile, TablespaceMap};

/// Looks at what the copied `backup_label`, `pg_control` and `tablespace_map` say.
pub(super) fn check_copy(job: &FullBackup, start: &SourceStart, packed: &Packed) -> Result<(), BackupError> {
    if packed.end.timeline != start.timeline {
        return Err(BackupError::TimelineChanged { from: start.timeline, to: packed.end.timeline });
    }
    if packed.end.stop_lsn < start.start_lsn {
        let (stop, start) = (packed.end.stop_lsn, start.start_lsn);
        return Err(BackupError::Unfit(format!("the backup stops at {stop}, before its start at {start}")));
    }
    check_label(start, packed)?;
    check_control_file(job, packed)?;
    check_tablespaces(start, packed)
}

/// Without its label PostgreSQL would start from the wrong checkpoint, without saying so.
fn check_label(start: &SourceStart, packed: &Packed) -> Result<(), BackupError> {
    let bytes = known(packed, "backup_label")?;
    let label: BackupLabel = String::from_utf8_lossy(bytes)
        .parse()
        .map_err(|e| BackupError::Unfit(format!("the copied backup_label is not understood: {e}")))?;
    if (label.timeline, label.start_lsn) != (start.timeline, start.start_lsn) {
        return Err(BackupError::Unfit(format!(
            "the copied backup_label says {} on timeline {}, the server said {} on timeline {}",
            label.start_lsn, label.timeline, start.start_lsn, start.timeline
        )));
    }
    Ok(())
}

fn check_control_file(job: &FullBackup, packed: &Packed) -> Result<(), BackupError> {
    let bytes = known(packed, "global/pg_control")?;
    let control = ControlFile::decode(bytes)
        .map_err(|e| BackupError::Unfit(format!("the copied pg_control is not understood: {e}")))?;
    let (copied, wanted) = (control.system_id, job.incarnation.system_id);
    if copied != wanted {
        let what = format!("the copied cluster is {copied}, this repository belongs to cluster {wanted}");
        return Err(BackupError::Unfit(what));
    }
    if control.segment_size != job.segment_size || control.major() != Some(job.major) {
        return Err(BackupError::Unfit("the copied pg_control has another version or WAL segment size".into()));
    }
    Ok(())
}

fn check_tablespaces(start: &SourceStart, packed: &Packed) -> Result<(), BackupError> {
    if start.tablespaces.is_empty() {
        return Ok(());
    }
    let map = TablespaceMap::parse(known(packed, "tablespace_map")?)
        .map_err(|e| BackupError::Unfit(format!("the copied tablespace_map is not understood: {e}")))?;
    match start.tablespaces.iter().find(|t| !map.entries.iter().any(|e| e.oid == t.oid)) {
        Some(missing) => {
            Err(BackupError::Unfit(format!("tablespace {} is missing from the copied tablespace_map", missing.oid)))
        }
        None => Ok(()),
    }
}

fn known<'a>(packed: &'a Packed, path: &str) -> Result<&'a [u8], BackupError> {
    let missing = || BackupError::Unfit(format!("{path} did not come"));
    packed.known.get(path).map(Vec::as_slice).ok_or_else(missing)
}
