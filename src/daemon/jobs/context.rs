//! What the work of a job is given.

use serde_json::Value;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::evidence::Restored;
use super::record::Progress;
use super::{JobId, JobRecord, JobSpec};
use crate::error::{Code, Failure};
use crate::repository::{Repository, job};

/// A job, from the inside.
#[derive(Clone)]
pub struct JobContext {
    pub id: JobId,
    pub spec: JobSpec,
    /// Fires when somebody cancels the job, and when the daemon stops.
    pub cancel: CancellationToken,
    /// The environment's, open for writing.
    pub repository: Repository,
    pub(super) record: watch::Sender<JobRecord>,
}

impl JobContext {
    /// Says how far it is; as often as one likes.
    pub fn progress(&self, phase: &str, bytes_done: u64, bytes_total: Option<u64>) {
        self.record.send_if_modified(|record| {
            let progress = Progress { phase: phase.to_owned(), bytes_done, bytes_total };
            let changed = record.progress != progress;
            record.progress = progress;
            changed
        });
    }

    /// Adds a sentence to the job's log.
    pub fn log(&self, line: &str) {
        tracing::info!(line, "job");
        self.record.send_modify(|record| record.log(line));
    }

    /// Says what was restored, for the incident of the job's ticket.
    pub fn restored(&self, restored: Restored) {
        self.record.send_modify(|record| record.restored = Some(restored));
    }

    /// Puts down for good what the work must find again after a restart; replaces what it put down before.
    ///
    /// # Errors
    /// When the store does not take it.
    pub async fn put_down(&self, notes: Value) -> Result<(), Failure> {
        let mut fact = None;
        self.record.send_modify(|record| {
            record.notes = notes;
            fact = Some((record.facts, record.fact()));
            record.facts = record.facts.saturating_add(1);
        });
        match fact {
            Some((number, fact)) => Ok(job::write(&self.repository, number, &fact).await?),
            None => Ok(()),
        }
    }
}

/// Runs a future on a thread of its own, of which there are as many as such jobs at a time: for those of which the compiler does
/// not prove that threads may pass them on. Dropping this future does not end it.
pub async fn apart<T, F>(begin: impl FnOnce() -> F + Send + 'static) -> Result<T, Failure>
where
    T: Send + 'static,
    F: Future<Output = Result<T, Failure>>,
{
    let runtime = tokio::runtime::Handle::current();
    let span = tracing::Span::current();
    let ended = tokio::task::spawn_blocking(move || span.in_scope(|| runtime.block_on(begin()))).await;
    ended.unwrap_or_else(|error| Err(Failure::new(Code::Internal, format!("work: {error}"))))
}
