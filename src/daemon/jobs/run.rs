//! The life of one job: on record, its turn, the work, its outcome on record.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use tracing::{Instrument as _, Span, info, warn};

use super::{Entry, JobContext, JobKind, JobRecord, JobSpec, JobState, Jobs, Work, evidence};
use crate::error::{Code, Failure};
use crate::repository::{Repository, job};
use crate::util::retry::Backoff;

/// An outcome that the store does not take is told after this long all the same.
const UNTOLD_MAX: Duration = Duration::from_secs(10);
/// An incident may take so long to take note of a job that ends because the daemon does.
const NOTE_MAX_STOPPING: Duration = Duration::from_secs(2);
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// Runs a job to its end.
///
/// Cancel safety: dropping this future aborts the work; the next start finds the job as interrupted.
pub(super) async fn run(jobs: Jobs, entry: Entry, work: Arc<dyn Work>) {
    let spec = entry.record.borrow().spec.clone();
    let repository = match jobs.0.repositories.get(&spec.environment).await {
        Ok(repository) => repository,
        Err(failure) => {
            warn!(error = %failure, kind = spec.kind.as_str(), "the job cannot be put on record and is not begun");
            jobs.count(&spec, JobState::Failed);
            entry.record.send_modify(|record| record.end(JobState::Failed, Err(failure)));
            return;
        }
    };
    let outcome = match turn(&jobs, &entry, &repository, &spec).await {
        Ok(_place) => {
            info!(kind = spec.kind.as_str(), user = spec.asked_by.user, "job began");
            do_work(&entry, &repository.throttled(jobs.throttle(spec.kind)), work).await
        }
        Err(failure) => Err(failure),
    };
    let state = final_state(&jobs, &entry, &outcome);
    let outcome = match (state, outcome) {
        (JobState::Interrupted, _) => Err(interrupted(&entry.record.borrow().spec)),
        (_, outcome) => outcome,
    };
    match &outcome {
        Ok(_) => info!("job done"),
        Err(failure) if state == JobState::Failed => warn!(error = %failure, hint = failure.hint, "job failed"),
        Err(failure) => info!(reason = %failure, state = state.as_str(), "job ended"),
    }
    let limit = if jobs.0.cancel.is_cancelled() { NOTE_MAX_STOPPING } else { UNTOLD_MAX };
    let record = entry.record.borrow().clone();
    if let Some(line) = evidence::put_down(&repository, &record, (state, &outcome), limit).await {
        entry.record.send_modify(|record| record.log(&line));
    }
    jobs.count(&spec, state);
    conclude(&jobs, &entry, &repository, state, outcome).await;
}

/// Puts the job on record, waits for a place among those of its kind, and puts down that it runs.
async fn turn(
    jobs: &Jobs,
    entry: &Entry,
    repository: &Repository,
    spec: &JobSpec,
) -> Result<tokio::sync::OwnedSemaphorePermit, Failure> {
    enter(entry, repository, JobState::Queued).await?;
    let place = tokio::select! {
        biased;
        () = entry.cancel.cancelled() => return Err(cancelled(spec)),
        place = jobs.places(spec.kind).acquire_owned() => place,
    };
    let place = place.map_err(|_| cancelled(spec))?;
    enter(entry, repository, JobState::Running).await?;
    Ok(place)
}

/// Stores a state, then shows it.
async fn enter(entry: &Entry, repository: &Repository, state: JobState) -> Result<(), Failure> {
    let mut next = entry.record.borrow().clone();
    next.enter(state);
    job::write(repository, next.facts, &next.fact()).await?;
    entry.record.send_modify(|record| {
        record.enter(state);
        record.facts = record.facts.saturating_add(1);
    });
    Ok(())
}

/// A panic in the work is a failure like another.
async fn do_work(entry: &Entry, repository: &Repository, work: Arc<dyn Work>) -> Result<Value, Failure> {
    let record = entry.record.borrow().clone();
    let context = JobContext {
        id: record.id,
        spec: record.spec,
        cancel: entry.cancel.clone(),
        repository: repository.clone(),
        record: entry.record.clone(),
    };
    let work = async move { work.run(&context).await }.instrument(Span::current());
    let task = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(work));
    task.await.unwrap_or_else(|error| Err(Failure::new(Code::Internal, format!("work: {error}"))))
}

fn final_state(jobs: &Jobs, entry: &Entry, outcome: &Result<Value, Failure>) -> JobState {
    let cancelled = matches!(outcome, Err(failure) if failure.code == Code::Cancelled);
    match outcome {
        Ok(_) => JobState::Done,
        Err(_) if cancelled && entry.record.borrow().cancel_asked => JobState::Cancelled,
        Err(_) if cancelled && jobs.0.cancel.is_cancelled() => JobState::Interrupted,
        Err(_) => JobState::Failed,
    }
}

/// Stores the outcome, then shows it. When the store does not answer it is shown first, and stored as soon as that goes.
async fn conclude(
    jobs: &Jobs,
    entry: &Entry,
    repository: &Repository,
    state: JobState,
    outcome: Result<Value, Failure>,
) {
    let mut last: JobRecord = entry.record.borrow().clone();
    last.end(state, outcome.clone());
    let (number, fact) = (last.facts, last.fact());
    let mut show = Some(outcome);
    let mut shown = |note: Option<&str>| {
        if let Some(outcome) = show.take() {
            entry.record.send_modify(|record| {
                record.facts = record.facts.saturating_add(1);
                note.iter().for_each(|note| record.log(note));
                record.end(state, outcome);
            });
        }
    };
    let tell_at = Instant::now() + UNTOLD_MAX;
    let mut pauses = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    loop {
        let store = job::write(repository, number, &fact);
        let stored = tokio::select! {
            stored = store => stored.map_err(Failure::from),
            () = tokio::time::sleep_until(tell_at), if Instant::now() < tell_at => {
                shown(Some("the store does not answer: the outcome is not on record yet"));
                continue;
            }
        };
        match stored {
            Ok(()) => return shown(None),
            Err(failure) => {
                warn!(error = %failure, "store a job's outcome: failed, will be tried again");
                shown(Some("the store refuses: the outcome is not on record yet"));
            }
        }
        if jobs.0.cancel.is_cancelled() {
            return;
        }
        tokio::select! {
            () = jobs.0.cancel.cancelled() => {}
            () = tokio::time::sleep(pauses.delay()) => {}
        }
    }
}

fn cancelled(spec: &JobSpec) -> Failure {
    Failure::new(Code::Cancelled, format!("{} {}: it was cancelled", spec.kind.as_str(), spec.environment))
}

/// What is said of a job whose daemon ended before it did, and what to do.
pub(super) fn interrupted(spec: &JobSpec) -> Failure {
    let hint = match spec.kind {
        JobKind::Backup => "Ask for another backup; what was stored of this one is removed by a later prune.",
        JobKind::Restore => {
            "Ask again with the same directory: a restore that did not end begins it anew. Whoever gives up deletes it."
        }
        JobKind::Sandbox => "`pgrecall sandbox list` says whether it runs; if not, ask for another.",
        JobKind::Prune => "The next prune goes on where this one ended; nothing needs to be done.",
        JobKind::Verify => "Ask again; verifying changes nothing.",
        JobKind::Incident => "Ask again: what was pinned already stays pinned.",
    };
    let message = format!("{} {}: the daemon ended before it did", spec.kind.as_str(), spec.environment);
    Failure::new(Code::Cancelled, message).hint(hint).retryable()
}
