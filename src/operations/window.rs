//! What can be restored now, as `status` tells it: the intervals of the window and the tails that were left behind.

use super::locate::Archive;
use crate::error::Failure;
use crate::lineage::moment::window::{self, DivergedTail, Interval};
use crate::repository::Repository;
use crate::repository::identity::KnownIncarnation;
use crate::wal::transactions::EndKind;

/// All that can be restored of one incarnation.
#[derive(Debug, Clone)]
pub struct Survey {
    /// Oldest first.
    pub intervals: Vec<Interval>,
    pub tails: Vec<Tail>,
}

/// A diverged tail and how many transactions were committed in it.
#[derive(Debug, Clone, Copy)]
pub struct Tail {
    pub at: DivergedTail,
    pub commits: u64,
}

/// Reads what is stored; of the tails also the indexes.
///
/// # Errors
/// `NotFound` when no WAL was ever stored, and as the store says.
pub async fn survey(repository: &Repository, known: &KnownIncarnation) -> Result<Survey, Failure> {
    let archive = Archive::load(repository, known).await?;
    let view = archive.view();
    let mut tails = Vec::new();
    for at in window::diverged_tails(&view) {
        let indexes = archive.indexes(at.timeline, at.fork_lsn).await?;
        let ends = indexes.iter().flat_map(|index| &index.ends);
        let commits = ends.filter(|end| end.lsn >= at.fork_lsn && end.end_lsn <= at.end_lsn);
        let commits = commits.filter(|end| matches!(end.kind, EndKind::Commit | EndKind::CommitPrepared)).count();
        tails.push(Tail { at, commits: commits.try_into().unwrap_or(u64::MAX) });
    }
    Ok(Survey { intervals: window::intervals(&view), tails })
}
