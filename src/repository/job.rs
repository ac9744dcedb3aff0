//! Long work on record: one immutable fact for each change of a job's state, the highest number says how it stands.
//!
//! A fact is the whole job as it was then, so that one object says everything; the first is stored before anything is done.
//! A daemon that starts knows by `daemon` which of them were its own.

use std::collections::BTreeMap;

use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};

use super::codec::Kind;
use super::format::{Repository, RepositoryError};
use super::layout::{self, JobId, Key, prefix};
use crate::error::Failure;
use crate::pg::Timestamp;

/// Facts that are read at the same time.
const READS_MAX: usize = 8;

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobKind {
    Backup,
    Restore,
    Sandbox,
    Prune,
    Verify,
    Incident,
}

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// Not on record yet: nothing is done before it is.
    Accepted,
    /// Waits for others of its kind to end.
    Queued,
    Running,
    Done,
    Failed,
    Cancelled,
    /// The daemon ended while it waited or ran.
    Interrupted,
}

/// How somebody asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Via {
    /// Over the control socket.
    Socket,
    Schedule,
    /// The daemon by itself, because something happened.
    Daemon,
}

/// Who asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asker {
    /// As the kernel said; `None` when nobody did.
    pub uid: Option<u32>,
    pub user: String,
    pub via: Via,
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    pub environment: String,
    pub kind: JobKind,
    pub asked_by: Asker,
    /// What was asked for, in the words of whoever did.
    pub request: serde_json::Value,
    pub ticket: Option<String>,
    /// The same key again means the same job, not another.
    pub idempotency_key: Option<String>,
}

/// A line of a job's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// From 1 on, without a hole; the oldest lines may have been dropped.
    pub number: u64,
    pub at: Timestamp,
    pub text: String,
}

/// A job, as it stood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFact {
    pub id: JobId,
    pub spec: JobSpec,
    pub state: JobState,
    /// Host and control socket of the daemon whose job it is.
    pub daemon: String,
    pub accepted_at: Timestamp,
    pub began_at: Option<Timestamp>,
    pub ended_at: Option<Timestamp>,
    /// What the work put down for itself, to be found after a restart.
    #[serde(default)]
    pub notes: serde_json::Value,
    #[serde(default)]
    pub log: Vec<LogLine>,
    pub result: Option<serde_json::Value>,
    pub failure: Option<Failure>,
}

impl JobKind {
    pub const ALL: [JobKind; 6] =
        [JobKind::Backup, JobKind::Restore, JobKind::Sandbox, JobKind::Prune, JobKind::Verify, JobKind::Incident];

    pub fn as_str(self) -> &'static str {
        match self {
            JobKind::Backup => "backup",
            JobKind::Restore => "restore",
            JobKind::Sandbox => "sandbox",
            JobKind::Prune => "prune",
            JobKind::Verify => "verify",
            JobKind::Incident => "incident",
        }
    }
}

impl JobState {
    pub const FINAL: [JobState; 4] = [JobState::Done, JobState::Failed, JobState::Cancelled, JobState::Interrupted];

    pub fn is_final(self) -> bool {
        match self {
            JobState::Accepted | JobState::Queued | JobState::Running => false,
            JobState::Done | JobState::Failed | JobState::Cancelled | JobState::Interrupted => true,
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            JobState::Accepted => "accepted",
            JobState::Queued => "queued",
            JobState::Running => "running",
            JobState::Done => "done",
            JobState::Failed => "failed",
            JobState::Cancelled => "cancelled",
            JobState::Interrupted => "interrupted",
        }
    }
}

/// Stores one state; `number` is one more than that of the state before.
pub async fn write(repository: &Repository, number: u32, fact: &JobFact) -> Result<(), RepositoryError> {
    repository.write_fact(&Key::job(&fact.id, number), Kind::Job, fact).await
}

/// The newest `count` jobs with the number of their last state, oldest first. One whose last state is damaged stands as it
/// was before; one without any that can be read is passed over, and counted.
pub async fn load_newest(repository: &Repository, count: usize) -> Result<Loaded, RepositoryError> {
    let mut numbers: BTreeMap<JobId, u32> = BTreeMap::new();
    for object in repository.store().list(prefix::JOBS).await? {
        if let Some((id, number)) = layout::parse_job(&object.key) {
            let last = numbers.entry(id).or_default();
            *last = number.max(*last);
        }
    }
    let newest = numbers.into_iter().rev().take(count);
    let reads = futures::stream::iter(newest).map(|(id, last)| async move {
        Ok::<_, RepositoryError>(load(repository, &id, last).await?.map(|fact| (fact, last)))
    });
    let read: Vec<_> = reads.buffered(READS_MAX).try_collect().await?;
    let unreadable = read.iter().filter(|found| found.is_none()).count();
    Ok(Loaded { jobs: read.into_iter().rev().flatten().collect(), unreadable })
}

/// What [`load_newest`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    pub jobs: Vec<(JobFact, u32)>,
    pub unreadable: usize,
}

/// The job of that id, as it stands in the store; `None` when there is none.
pub async fn find(repository: &Repository, id: &JobId) -> Result<Option<JobFact>, RepositoryError> {
    let listed = repository.store().list(&format!("{}/{id}", prefix::JOBS)).await?;
    match listed.iter().filter_map(|object| layout::parse_job(&object.key)).map(|(_, number)| number).max() {
        Some(last) => load(repository, id, last).await,
        None => Ok(None),
    }
}

async fn load(repository: &Repository, id: &JobId, last: u32) -> Result<Option<JobFact>, RepositoryError> {
    for number in (0..=last).rev() {
        match repository.read_fact::<JobFact>(&Key::job(id, number), Kind::Job).await {
            Ok(fact) if fact.id == *id => return Ok(Some(fact)),
            Ok(_) => {}
            Err(error) if error.is_corrupt() || error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
