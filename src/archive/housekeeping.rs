//! What an archiver does from time to time: parts become segments and go, missing indexes are made.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::budget::Budget;
use super::indexing::catch_up;
use super::status::ArchiveStatus;
use super::tidy::{Written, tidy};
use super::uploader::Destination;
use crate::repository::{Repository, RepositoryError, identity};
use crate::util::clock;

/// How often there is a round.
const INTERVAL: Duration = Duration::from_secs(20 * 60);
/// When the first round is, after the start: then what a killed predecessor left is put right.
const FIRST: Duration = Duration::from_secs(30);

/// Does rounds until `cancel` fires.
///
/// Cancel safety: every step can be repeated.
pub async fn run(
    repository: Repository,
    status: watch::Receiver<ArchiveStatus>,
    budget: Arc<Budget>,
    cancel: CancellationToken,
) {
    let mut pause = FIRST;
    loop {
        tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = INTERVAL;
        let done = tokio::select! {
            biased;
            () = cancel.cancelled() => return,
            done = round(&repository, &status, &budget) => done,
        };
        if let Err(error) = done {
            tracing::warn!(%error, "tidy the repository: failed, will be tried again");
        }
    }
}

async fn round(
    repository: &Repository,
    status: &watch::Receiver<ArchiveStatus>,
    budget: &Budget,
) -> Result<(), RepositoryError> {
    let Some(stored) = status.borrow().stored else { return Ok(()) };
    let Some(known) = identity::current(repository).await? else { return Ok(()) };
    let (incarnation, segment_size) = (known.incarnation, known.identity.segment_size);
    let destination = Destination { repository: repository.clone(), incarnation, segment_size };
    let before = segment_size.segment_of(stored.end_lsn);
    let written = Written { timeline: stored.timeline, before };
    let tidied = tidy(&destination, written, clock::now(), budget).await?;
    if let Some(error) = &tidied.trouble {
        tracing::warn!(error, units = tidied.failed, "tidy the repository: not all could be done, will be tried again");
    }
    let indexed = catch_up(&destination, &known, stored.timeline, before, budget).await?;
    tracing::debug!(assembled = tidied.assembled, parts_deleted = tidied.parts_deleted, indexed, "tidied");
    Ok(())
}
