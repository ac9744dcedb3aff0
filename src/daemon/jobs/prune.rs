//! A prune as a job: the environment's own task does it, under its generation; the job waits.

use async_trait::async_trait;
use serde_json::Value;

use super::{JobContext, Work};
use crate::daemon::handle::Handle;
use crate::daemon::service::Shown;
use crate::error::Failure;
use crate::operations::prune;

/// Removes what has left the window.
pub struct PruneWork(pub Handle);

#[async_trait]
impl Work for PruneWork {
    async fn run(&self, job: &JobContext) -> Result<Value, Failure> {
        let name = &job.spec.environment;
        job.progress("pruning", 0, None);
        let report = tokio::select! {
            biased;
            // Another prune may be before it.
            () = job.cancel.cancelled() => return Err(prune::cancelled()),
            report = self.0.prune(name, job.cancel.clone()) => report?,
        };
        let text = prune::show(&report, &prune::DONE);
        text.lines().for_each(|line| job.log(line));
        prune::judge(name, &report)?;
        Ok(Shown::new(&report, text).into_result())
    }
}
