//! A prune of an environment, for the daemon and for commands alike.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::error::{Code, Failure};
use crate::repository::generation::{self, Lease};
use crate::repository::{Generation, Repository, RepositoryError};
use crate::retention::prune::{Observer, Prune, PruneError, Report, Settings};
use crate::util::clock;

/// Removes what has left the window.
///
/// Cancel safety: after `cancel`, or when the future is dropped, another prune goes on where this one was.
///
/// # Errors
/// `Conflict` when another writer has taken over, `Host` when a clock is wrong, and as the store says.
pub async fn run(
    repository: &Repository,
    generation: Generation,
    window: Duration,
    observer: &mut dyn Observer,
    cancel: CancellationToken,
) -> Result<Report, Failure> {
    let prune = Prune { repository, generation, settings: Settings::new(window), clock: &clock::now };
    tokio::select! {
        biased;
        () = cancel.cancelled() => {
            let failure = Failure::new(Code::Cancelled, "prune: it was cancelled");
            Err(failure.hint("The next prune goes on where this one ended."))
        }
        report = prune.run(observer) => report.map_err(Failure::from),
    }
}

/// Says of every object what the next prune does with it, and why.
///
/// # Errors
/// As [`run`].
pub async fn explain(
    repository: &Repository,
    window: Duration,
    observer: &mut dyn Observer,
) -> Result<Report, Failure> {
    // As whoever would come next: what every writer before it left unfinished is abandoned, what the newest is doing is not.
    let newest = generation::newest(repository).await?;
    let generation = newest.unwrap_or(Generation { ordinal: 1, random: 0 });
    let prune = Prune { repository, generation, settings: Settings::new(window), clock: &clock::now };
    Ok(prune.explain(observer).await?)
}

/// Takes a generation for a prune of one's own, which ends what an earlier writer is doing: only where no daemon runs.
///
/// # Errors
/// As the store says.
pub async fn take_generation(repository: &Repository) -> Result<Generation, RepositoryError> {
    let lease = Lease {
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        pid: std::process::id(),
        started_at: clock::now().into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        store: None,
    };
    generation::take(repository, &lease).await
}

impl From<PruneError> for Failure {
    fn from(error: PruneError) -> Self {
        let text = format!("prune: {error}");
        match error {
            PruneError::Repository(error) => {
                let failure = Failure::from(error);
                Failure { message: format!("prune: {}", failure.message), ..failure }
            }
            PruneError::Superseded { .. } => Failure::new(Code::Conflict, text).hint(
                "Another daemon works with this repository. Stop one of the two; `pgrecall status` names the other.",
            ),
            PruneError::ClocksDiffer { .. } => Failure::new(Code::Host, text).hint(
                "Set this host's clock (NTP), or the store's: with a wrong clock nobody knows what is old enough.",
            ),
            PruneError::Moved => Failure::new(Code::Conflict, text).retryable().hint("Prune again."),
        }
    }
}
