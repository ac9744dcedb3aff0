//! The jobs from before the daemon's start.

use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use super::run::interrupted;
use super::{Entry, JobRecord, JobState, Jobs, evidence};
use crate::error::Failure;
use crate::repository::job;
use crate::util::retry::Backoff;

/// So many of an environment are looked at: idempotency keys are known for as long.
pub const EARLIER_MAX: usize = 100;
/// So long an incident may take to take note of a job that was interrupted.
const NOTE_MAX: Duration = Duration::from_secs(10);
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Reads the earlier jobs of an environment as soon as its store answers.
///
/// Cancel safety: safe; what was read is read again by the next start.
pub(super) async fn load(jobs: Jobs, environment: String) {
    let mut pauses = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    let mut warned = false;
    loop {
        let attempt = tokio::select! {
            biased;
            () = jobs.0.cancel.cancelled() => return,
            attempt = load_once(&jobs, &environment) => attempt,
        };
        match attempt {
            Ok(()) => break,
            // The environment's own task says it, too.
            Err(failure) if !warned => {
                warned = true;
                warn!(error = %failure, "read earlier jobs: failed, will be tried again");
            }
            Err(_) => {}
        }
        tokio::select! {
            biased;
            () = jobs.0.cancel.cancelled() => return,
            () = tokio::time::sleep(pauses.delay()) => {}
        }
    }
    jobs.0.known.send_modify(|known| {
        known.insert(environment);
    });
}

async fn load_once(jobs: &Jobs, environment: &str) -> Result<(), Failure> {
    let repository = jobs.0.repositories.get(environment).await?;
    let loaded = job::load_newest(&repository, EARLIER_MAX).await?;
    if loaded.unreadable > 0 {
        warn!(jobs = loaded.unreadable, "some earlier jobs cannot be read and are passed over");
    }
    for (fact, last) in loaded.jobs {
        let mut record = JobRecord::stored(fact, last);
        let is_known = jobs.get(&record.id).is_some();
        if is_known || record.spec.environment != environment {
            continue;
        }
        let is_own = record.daemon == jobs.0.daemon;
        if is_own && !record.state.is_final() {
            let outcome = Err(interrupted(&record.spec));
            let noted = evidence::put_down(&repository, &record, (JobState::Interrupted, &outcome), NOTE_MAX).await;
            noted.iter().for_each(|line| record.log(line));
            record.end(JobState::Interrupted, outcome);
            job::write(&repository, record.facts, &record.fact()).await?;
            record.facts = record.facts.saturating_add(1);
            jobs.count(&record.spec, JobState::Interrupted);
            info!(job = %record.id, kind = record.spec.kind.as_str(), "a job was interrupted by the end of the daemon");
        }
        let cancel = jobs.0.cancel.child_token();
        jobs.registry().insert(Entry { record: watch::Sender::new(record), cancel, is_own });
    }
    Ok(())
}
