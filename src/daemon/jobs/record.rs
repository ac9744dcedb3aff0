//! A job as this daemon knows it.

use std::collections::VecDeque;

use serde_json::Value;

use super::evidence::Restored;
use super::{JobId, JobSpec, JobState, LogLine};
use crate::error::{Code, Failure};
use crate::pg::Timestamp;
use crate::repository::job::JobFact;
use crate::util::clock;

/// Lines that are kept of a log; the oldest go first.
pub const LOG_LINES_MAX: usize = 200;
/// A longer line is cut.
const LOG_LINE_CHARACTERS_MAX: usize = 300;

/// How far a job is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    pub phase: String,
    pub bytes_done: u64,
    pub bytes_total: Option<u64>,
}

/// A job with its progress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobRecord {
    pub id: JobId,
    pub spec: JobSpec,
    pub state: JobState,
    pub daemon: String,
    pub accepted_at: Timestamp,
    pub began_at: Option<Timestamp>,
    pub ended_at: Option<Timestamp>,
    pub progress: Progress,
    /// Somebody wants it to end.
    pub cancel_asked: bool,
    /// What the work put down for itself.
    pub notes: Value,
    /// What it restored; for the incident of its ticket.
    pub(super) restored: Option<Restored>,
    pub log: VecDeque<LogLine>,
    pub result: Option<Value>,
    pub failure: Option<Failure>,
    /// States on record so far; the number of the next.
    pub(super) facts: u32,
}

impl JobRecord {
    pub(super) fn new(id: JobId, spec: JobSpec, daemon: String) -> JobRecord {
        JobRecord {
            id,
            spec,
            state: JobState::Accepted,
            daemon,
            accepted_at: clock::now().into(),
            began_at: None,
            ended_at: None,
            progress: Progress::default(),
            cancel_asked: false,
            notes: Value::Null,
            restored: None,
            log: VecDeque::new(),
            result: None,
            failure: None,
            facts: 0,
        }
    }

    /// As the store has it; `last` is the number of the state that was read.
    pub fn stored(fact: JobFact, last: u32) -> JobRecord {
        JobRecord {
            id: fact.id,
            spec: fact.spec,
            state: fact.state,
            daemon: fact.daemon,
            accepted_at: fact.accepted_at,
            began_at: fact.began_at,
            ended_at: fact.ended_at,
            progress: Progress::default(),
            cancel_asked: false,
            notes: fact.notes,
            restored: None,
            log: fact.log.into(),
            result: fact.result,
            failure: fact.failure,
            facts: last.saturating_add(1),
        }
    }

    pub(super) fn fact(&self) -> JobFact {
        JobFact {
            id: self.id.clone(),
            spec: self.spec.clone(),
            state: self.state,
            daemon: self.daemon.clone(),
            accepted_at: self.accepted_at,
            began_at: self.began_at,
            ended_at: self.ended_at,
            notes: self.notes.clone(),
            log: self.log.iter().cloned().collect(),
            result: self.result.clone(),
            failure: self.failure.clone(),
        }
    }

    pub(super) fn log(&mut self, text: &str) {
        let number = self.log.back().map_or(1, |line| line.number.saturating_add(1));
        let text = text.chars().take(LOG_LINE_CHARACTERS_MAX).collect();
        self.log.push_back(LogLine { number, at: clock::now().into(), text });
        if self.log.len() > LOG_LINES_MAX {
            self.log.pop_front();
        }
    }

    pub(super) fn enter(&mut self, state: JobState) {
        self.state = state;
        let now = clock::now().into();
        match state {
            JobState::Running => self.began_at = Some(now),
            state if state.is_final() => self.ended_at = Some(now),
            _ => {}
        }
    }

    pub(super) fn end(&mut self, state: JobState, outcome: Result<Value, Failure>) {
        match outcome {
            Ok(result) => self.result = Some(result),
            Err(failure) => self.failure = Some(failure),
        }
        self.enter(state);
    }

    /// The answer to the same idempotency key: this job, if it is the same request.
    pub(super) fn same_as(&self, spec: &JobSpec) -> Result<JobId, Failure> {
        let same = self.spec.kind == spec.kind
            && self.spec.request == spec.request
            && self.spec.asked_by.uid == spec.asked_by.uid
            && self.spec.asked_by.user == spec.asked_by.user;
        if same {
            return Ok(self.id.clone());
        }
        let key = spec.idempotency_key.as_deref().unwrap_or_default();
        let message = format!("begin a {} of {}", spec.kind.as_str(), spec.environment);
        let message = format!("{message}: the idempotency key {key} stands for another request, job {}", self.id);
        Err(Failure::new(Code::Conflict, message).hint("Use a new key for each new request."))
    }
}
