//! Keeps one environment's task running.
//!
//! The task's body runs as a task of its own, so that even a panic in it ends nothing else. When it ends with an error it
//! is started again after a pause that grows up to [`Pauses::max`]; errors that only a person can clear are tried again
//! too, because nobody should have to restart the service after repairing something. Environments share nothing here: a
//! broken one delays no other.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span, error, info, warn};

use super::handle::{REQUESTS_MAX, Request};
use super::pulse::Pulse;
use super::snapshot::{EnvironmentSnapshot, State, Wal};
use crate::error::{Code, Failure};
use crate::util::clock;
use crate::util::retry::Backoff;

/// Between the end of a task with an error and its next start.
#[derive(Debug, Clone, Copy)]
pub struct Pauses {
    pub first: Duration,
    pub max: Duration,
}

impl Default for Pauses {
    fn default() -> Self {
        Pauses { first: Duration::from_secs(1), max: Duration::from_secs(10) }
    }
}

/// A task that ran this long is taken for healthy: its next pause is the first one again.
const HEALTHY_AFTER: Duration = Duration::from_secs(120);

/// What is done for an environment, from its start to its end.
#[async_trait]
pub trait Body: Send + Sync + 'static {
    /// Works until `context.cancel` fires; then stores what it holds and returns `Ok`.
    async fn run(&self, context: BodyContext) -> Result<(), Failure>;
}

/// What one run of a body is given.
pub struct BodyContext {
    pub cancel: CancellationToken,
    pub requests: mpsc::Receiver<Request>,
    /// For `send_modify`: the body describes itself here.
    pub snapshot: watch::Sender<EnvironmentSnapshot>,
    /// Beaten by the body in its loop.
    pub pulse: Pulse,
}

/// One environment under supervision.
pub struct Supervisor {
    pub name: String,
    pub body: Arc<dyn Body>,
    pub requests: mpsc::Receiver<Request>,
    pub snapshot: watch::Sender<EnvironmentSnapshot>,
    pub pulse: Pulse,
    pub cancel: CancellationToken,
    pub pauses: Pauses,
}

impl Supervisor {
    /// Runs the body, again and again, until `cancel` fires and the body has ended.
    ///
    /// Cancel safety: dropping this future aborts the body at its next await.
    pub async fn run(mut self) {
        let mut pauses = Backoff::new(self.pauses.first, self.pauses.max);
        while !self.cancel.is_cancelled() {
            let began = Instant::now();
            let result = self.run_once().await;
            self.pulse.rest();
            if self.cancel.is_cancelled() {
                if let Err(failure) = result
                    && failure.code != Code::Cancelled
                {
                    warn!(error = %failure, "environment stopped with an error");
                }
                break;
            }
            let failure =
                result.err().unwrap_or_else(|| Failure::new(Code::Internal, "go on: the task ended by itself"));
            if began.elapsed() >= HEALTHY_AFTER {
                pauses.reset();
            }
            let pause = pauses.delay();
            match &failure.hint {
                Some(hint) => {
                    error!(error = %failure, hint, pause_ms = pause.as_millis(), "environment failed, will start again")
                }
                None => error!(error = %failure, pause_ms = pause.as_millis(), "environment failed, will start again"),
            }
            self.note_failure(&failure);
            if self.wait(pause, &failure).await.is_break() {
                break;
            }
        }
        self.snapshot.send_modify(|snapshot| {
            snapshot.wal = Wal::Stopped;
            snapshot.judge(clock::now().into());
        });
        info!("environment stopped");
    }

    fn note_failure(&self, failure: &Failure) {
        let state = if failure.code == Code::Conflict { State::Conflict } else { State::Unprotected };
        self.snapshot.send_modify(|snapshot| {
            snapshot.enter(state, Some(format!("failed to {failure}")), clock::now().into());
            snapshot.failure = Some(failure.clone());
            snapshot.wal = Wal::Starting;
            snapshot.restarts = snapshot.restarts.saturating_add(1);
        });
    }

    /// One run of the body; requests are passed on to it. A panic is a failure like another.
    async fn run_once(&mut self) -> Result<(), Failure> {
        let (to_body, requests) = mpsc::channel(REQUESTS_MAX);
        let context = BodyContext {
            cancel: self.cancel.clone(),
            requests,
            snapshot: self.snapshot.clone(),
            pulse: self.pulse.clone(),
        };
        let body = Arc::clone(&self.body);
        let mut task = AbortOnDrop(tokio::spawn(async move { body.run(context).await }.instrument(Span::current())));
        loop {
            tokio::select! {
                biased;
                ended = &mut task.0 => {
                    return ended.unwrap_or_else(|error| Err(Failure::new(Code::Internal, format!("go on: {error}"))));
                }
                Some(request) = self.requests.recv() => {
                    if let Err(error) = to_body.try_send(request) {
                        let busy = Failure::new(Code::Conflict, format!("ask {}: it is busy", self.name)).retryable();
                        error.into_inner().refuse(busy);
                    }
                }
            }
        }
    }

    /// Waits for the next start; requests are refused with the reason.
    async fn wait(&mut self, pause: Duration, failure: &Failure) -> std::ops::ControlFlow<()> {
        let until = Instant::now() + pause;
        loop {
            tokio::select! {
                biased;
                () = self.cancel.cancelled() => return std::ops::ControlFlow::Break(()),
                () = tokio::time::sleep_until(until) => return std::ops::ControlFlow::Continue(()),
                Some(request) = self.requests.recv() => {
                    let message = format!("ask {}, which is not running: failed to {failure}", self.name);
                    request.refuse(Failure { message, ..failure.clone() });
                }
            }
        }
    }
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
