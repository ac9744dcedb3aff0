//! A backup as a job: the environment's own task takes it, the job follows.

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{JobContext, Work};
use crate::daemon::snapshot::BackupProgress;
use crate::error::{Code, Failure};

/// Asks for a backup; it ends early when everybody who asked has fired their token.
pub type Ask = dyn Fn(CancellationToken) -> Result<watch::Receiver<BackupProgress>, Failure> + Send + Sync;

/// Takes a backup. One that is still being copied is joined: two jobs may name the same backup.
pub struct BackupWork {
    pub ask: Box<Ask>,
}

#[async_trait]
impl Work for BackupWork {
    async fn run(&self, job: &JobContext) -> Result<Value, Failure> {
        let mut progress = (self.ask)(job.cancel.clone())?;
        let mut phase_seen = String::new();
        loop {
            let now = progress.borrow_and_update().clone();
            match now {
                BackupProgress::Running { phase, bytes_done, bytes_total } => {
                    job.progress(&phase, bytes_done, bytes_total);
                    if phase != phase_seen {
                        job.log(&phase);
                        phase_seen = phase;
                    }
                }
                BackupProgress::Done { backup, bytes_stored, summary } => {
                    return Ok(json!({ "backup": backup, "bytes_stored": bytes_stored, "summary": summary }));
                }
                BackupProgress::Failed(failure) => return Err(failure),
            }
            if progress.changed().await.is_err() && !progress.borrow().is_final() {
                return Err(Failure::new(Code::Internal, "finish the backup: the environment's task has ended"));
            }
        }
    }
}
