//! Prunes an environment once a day, for as long as its task runs, and whenever somebody asks; one prune at a time.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, info, warn};

use super::handle::{PruneAsked, REQUESTS_MAX};
use crate::error::{Code, Failure};
use crate::operations::prune;
use crate::repository::{Generation, Repository};
use crate::retention::prune::Report;

/// The first prune, after the start: not at once, for a daemon that is restarted again and again has other worries.
const FIRST: Duration = Duration::from_mins(15);
const EVERY: Duration = Duration::from_hours(24);
/// After one that failed.
const AGAIN: Duration = Duration::from_hours(1);

/// The task; dropping this ends it where it is.
pub struct Pruning {
    task: JoinHandle<()>,
    requests: mpsc::Sender<PruneAsked>,
}

impl Drop for Pruning {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Pruning {
    /// Begins to prune, first within a quarter of an hour and another hour at random: many environments share one store.
    pub fn start(repository: Repository, generation: Generation, window: Duration, cancel: CancellationToken) -> Self {
        let (requests, asked) = mpsc::channel(REQUESTS_MAX);
        let pruner = Pruner { repository, generation, window, cancel };
        Pruning { task: tokio::spawn(pruner.run(asked).instrument(Span::current())), requests }
    }

    /// Somebody asks for a prune: it follows the one that runs.
    pub fn asked(&self, asked: PruneAsked) {
        if let Err(error) = self.requests.try_send(asked) {
            let failure = Failure::new(Code::Conflict, "prune: too many prunes wait already, or none can begin");
            error.into_inner().refuse(failure.retryable());
        }
    }
}

struct Pruner {
    repository: Repository,
    generation: Generation,
    window: Duration,
    cancel: CancellationToken,
}

impl Pruner {
    async fn run(self, mut requests: mpsc::Receiver<PruneAsked>) {
        let spread = Duration::from_hours(1).mul_f64(rand::random());
        let mut next = Instant::now() + FIRST + spread;
        loop {
            let asked = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return,
                Some(asked) = requests.recv() => Some(asked),
                () = tokio::time::sleep_until(next) => None,
            };
            match asked {
                Some(asked) => {
                    let outcome = self.prune(&asked.unwanted).await;
                    if outcome.is_ok() {
                        next = Instant::now() + EVERY;
                    }
                    // Whoever asked may be gone.
                    let _ = asked.outcome.send(outcome);
                }
                None => {
                    next = Instant::now()
                        + match self.prune(&self.cancel).await {
                            Ok(_) => EVERY,
                            Err(failure) => {
                                if failure.code != Code::Cancelled {
                                    warn!(error = %failure, "prune: failed, will be tried again");
                                }
                                AGAIN
                            }
                        };
                }
            }
        }
    }

    async fn prune(&self, unwanted: &CancellationToken) -> Result<Report, Failure> {
        let mut nobody = ();
        let work = prune::run(&self.repository, self.generation, self.window, &mut nobody, self.cancel.clone());
        // It may end anywhere, so after a panic, too, the next one goes on.
        let work = AssertUnwindSafe(work).catch_unwind();
        let report = tokio::select! {
            biased;
            () = unwanted.cancelled() => return Err(prune::cancelled()),
            report = work => report.unwrap_or_else(|_| Err(panicked()))?,
        };
        tell(&report);
        Ok(report)
    }
}

fn panicked() -> Failure {
    Failure::new(Code::Internal, "prune: it panicked").hint("The daemon's log says where; please report it.")
}

fn tell(report: &Report) {
    let (dropped, removed) = (report.dropped.len(), report.removed_total());
    info!(dropped, objects = removed.objects, bytes = removed.bytes, "pruned");
    if let Some(first) = report.refusals.first() {
        warn!(refused = report.refused, error = first, "the store does not delete what has left the window");
    }
}
