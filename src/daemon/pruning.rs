//! Prunes an environment once a day, for as long as its task runs.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, info, warn};

use crate::error::Code;
use crate::operations::prune;
use crate::repository::{Generation, Repository};
use crate::retention::prune::Report;

/// The first prune, after the start: not at once, for a daemon that is restarted again and again has other worries.
const FIRST: Duration = Duration::from_mins(15);
const EVERY: Duration = Duration::from_hours(24);
/// After one that failed.
const AGAIN: Duration = Duration::from_hours(1);

/// The task; dropping this ends it where it is.
pub struct Pruning(JoinHandle<()>);

impl Drop for Pruning {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Pruning {
    /// Begins to prune, first within a quarter of an hour and another hour at random: many environments share one store.
    pub fn start(repository: Repository, generation: Generation, window: Duration, cancel: CancellationToken) -> Self {
        let spread = Duration::from_hours(1).mul_f64(rand::random());
        let work = async move {
            let mut pause = FIRST + spread;
            loop {
                tokio::select! {
                    biased;
                    () = cancel.cancelled() => return,
                    () = tokio::time::sleep(pause) => {}
                }
                pause = match prune::run(&repository, generation, window, &mut (), cancel.clone()).await {
                    Ok(report) => {
                        tell(&report);
                        EVERY
                    }
                    Err(failure) if failure.code == Code::Cancelled => return,
                    Err(failure) => {
                        warn!(error = %failure, "prune: failed, will be tried again");
                        AGAIN
                    }
                };
            }
        };
        Pruning(tokio::spawn(work.instrument(Span::current())))
    }
}

fn tell(report: &Report) {
    let (dropped, removed) = (report.dropped.len(), report.removed_total());
    info!(dropped, objects = removed.objects, bytes = removed.bytes, "pruned");
    if let Some(first) = report.refusals.first() {
        warn!(refused = report.refused, error = first, "the store does not delete what has left the window");
    }
}
