//! Long work as jobs: with an id, progress, a log, a result, and a way to cancel it.
//!
//! A job is on record in its environment's repository before anything is done for it, and its outcome before anybody is told
//! (as long as the store answers). Whoever asked may go away. A daemon that starts finds its jobs again; those that had not
//! ended are `interrupted` and say what to do.
//!
//! Bounds: [`WAITING_MAX`] jobs of one environment that have not ended, [`KEPT_MAX`] in memory, and for each a log of
//! [`record::LOG_LINES_MAX`] lines. Backups and restores have places of their own on this host ([`Limits`]); who finds none
//! free waits, in the order in which jobs came to be on record.

pub mod backup;
pub mod context;
pub mod counts;
pub mod evidence;
pub mod incident;
mod load;
pub mod prune;
pub mod record;
pub mod restore;
mod run;
pub mod sandbox;
#[cfg(test)]
mod tests;
pub mod verify;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, info_span};

pub use context::JobContext;
pub use record::{JobRecord, Progress};

use super::repositories::Repositories;
use crate::config::Limits;
use crate::error::{Code, Failure};
pub use crate::repository::JobId;
pub use crate::repository::job::{Asker, JobKind, JobSpec, JobState, LogLine, Via};
use crate::util::clock;
use crate::util::throttle::Throttle;

/// Jobs of one environment that wait or run.
pub const WAITING_MAX: usize = 8;
/// Jobs in memory; of those that have ended, the oldest are forgotten first. Each is a few KiB, with a full log 64 KiB.
pub const KEPT_MAX: usize = 2000;
/// How long a request with an idempotency key waits until the earlier jobs are known.
const KNOWN_WAIT: Duration = Duration::from_secs(10);

/// Pruning, verifying and the like, of all environments together.
const OTHERS_MAX: usize = 2;

/// What a job does.
#[async_trait]
pub trait Work: Send + Sync + 'static {
    /// Works until it is done or `job.cancel` fires; ends soon after that. The value is the job's result.
    async fn run(&self, job: &JobContext) -> Result<serde_json::Value, Failure>;
}

/// The jobs of this daemon; a cheap copy of the way to them.
#[derive(Clone)]
pub struct Jobs(Arc<Inner>);

struct Inner {
    registry: Mutex<Registry>,
    repositories: Repositories,
    /// Host and control socket.
    daemon: String,
    backups: Arc<Semaphore>,
    restores: Arc<Semaphore>,
    others: Arc<Semaphore>,
    /// What all restores together read.
    restore_throttle: Option<Arc<Throttle>>,
    /// How many jobs have ended how, of each environment.
    ended: Mutex<BTreeMap<(String, JobKind, JobState), u64>>,
    tasks: TaskTracker,
    cancel: CancellationToken,
    /// The environments whose earlier jobs are known.
    known: watch::Sender<BTreeSet<String>>,
}

#[derive(Default)]
struct Registry {
    jobs: BTreeMap<JobId, Entry>,
}

#[derive(Clone)]
struct Entry {
    record: watch::Sender<JobRecord>,
    cancel: CancellationToken,
    /// Somebody asked for the end, rather than the daemon for its own.
    is_own: bool,
}

impl Jobs {
    /// Begins to look for earlier jobs, and takes new ones until `cancel` fires. `daemon` names this daemon the same way
    /// after every start.
    pub fn start(repositories: Repositories, daemon: String, limits: Limits, cancel: CancellationToken) -> Jobs {
        let places = |count: u32| Arc::new(Semaphore::new(usize::try_from(count).unwrap_or(1)));
        let jobs = Jobs(Arc::new(Inner {
            registry: Mutex::default(),
            repositories,
            daemon,
            backups: places(limits.backups),
            restores: places(limits.restores),
            others: Arc::new(Semaphore::new(OTHERS_MAX)),
            restore_throttle: limits.restore_throttle(),
            ended: Mutex::default(),
            tasks: TaskTracker::new(),
            cancel,
            known: watch::Sender::default(),
        }));
        for name in jobs.0.repositories.names() {
            jobs.look_for_earlier(name);
        }
        jobs
    }

    /// Looks for the earlier jobs of an environment, until its store answers.
    pub fn look_for_earlier(&self, environment: String) {
        let span = info_span!("environment", environment);
        self.0.tasks.spawn(load::load(self.clone(), environment).instrument(span));
    }

    /// Takes a job; it waits for its turn and runs even if nobody follows it.
    ///
    /// # Errors
    /// When there is no such environment, too much waits already, the daemon is stopping, or the idempotency key stands for
    /// another request. With a key, also before the environment's earlier jobs are known: see [`Jobs::until_known`].
    pub fn submit(&self, spec: JobSpec, work: Arc<dyn Work>) -> Result<JobId, Failure> {
        let id = self.id_for(&spec.environment, spec.idempotency_key.as_deref());
        self.submit_as(id, spec, work)
    }

    /// The id that a job will have: a new one, or that of the job for which the key stands already.
    pub fn id_for(&self, environment: &str, idempotency_key: Option<&str>) -> JobId {
        let registry = self.registry();
        let known = idempotency_key.and_then(|key| registry.by_key(environment, key));
        known.map_or_else(|| registry.new_id(), |record| record.id)
    }

    /// As [`Jobs::submit`], with an id from [`Jobs::id_for`].
    ///
    /// # Errors
    /// As [`Jobs::submit`].
    pub fn submit_as(&self, id: JobId, spec: JobSpec, work: Arc<dyn Work>) -> Result<JobId, Failure> {
        let environment = spec.environment.clone();
        self.0.repositories.environment(&environment)?;
        if self.0.cancel.is_cancelled() {
            return Err(failure_for(&spec, Code::Cancelled, "the daemon is stopping").retryable());
        }
        let mut registry = self.registry();
        if let Some(key) = &spec.idempotency_key {
            if !self.0.known.borrow().contains(&environment) {
                let why = "the jobs before the daemon's start are not known yet";
                return Err(failure_for(&spec, Code::Store, why).retryable());
            }
            if let Some(found) = registry.by_key(&environment, key) {
                return found.same_as(&spec);
            }
        }
        let waiting = registry.unfinished(&environment);
        if waiting >= WAITING_MAX {
            let why = format!("{waiting} jobs of {environment} wait or run already");
            return Err(failure_for(&spec, Code::Conflict, &why).retryable());
        }
        let record = JobRecord::new(id.clone(), spec, self.0.daemon.clone());
        let entry = Entry { record: watch::Sender::new(record), cancel: self.0.cancel.child_token(), is_own: true };
        registry.insert(entry.clone());
        drop(registry);
        let span = info_span!("job", environment, job = %id);
        self.0.tasks.spawn(run::run(self.clone(), entry, work).instrument(span));
        Ok(id)
    }

    /// Waits until the earlier jobs of an environment are known; not for ever.
    pub async fn until_known(&self, environment: &str) {
        let mut known = self.0.known.subscribe();
        let _ = tokio::time::timeout(KNOWN_WAIT, known.wait_for(|names| names.contains(environment))).await;
    }

    /// Oldest first. Ids alone do not say so: those of one second have no order.
    pub fn list(&self, environment: Option<&str>) -> Vec<JobRecord> {
        let registry = self.registry();
        let records = registry.jobs.values().map(|entry| entry.record.borrow().clone());
        let wanted = |record: &JobRecord| environment.is_none_or(|name| record.spec.environment == name);
        let mut records: Vec<JobRecord> = records.filter(wanted).collect();
        records.sort_by_key(|record| record.accepted_at);
        records
    }

    pub fn get(&self, id: &JobId) -> Option<JobRecord> {
        self.registry().jobs.get(id).map(|entry| entry.record.borrow().clone())
    }

    /// The job as it changes; the last value is final.
    pub fn follow(&self, id: &JobId) -> Option<watch::Receiver<JobRecord>> {
        self.registry().jobs.get(id).map(|entry| entry.record.subscribe())
    }

    /// Asks a job to end. One that has ended stays as it is.
    ///
    /// # Errors
    /// When there is none, or another daemon runs it.
    pub fn cancel(&self, id: &JobId) -> Result<(), Failure> {
        let registry = self.registry();
        let Some(entry) = registry.jobs.get(id) else {
            let failure = Failure::new(Code::NotFound, format!("find job {id}"));
            return Err(failure.hint("`pgrecall jobs list` names those that there are."));
        };
        let (state, daemon) = (entry.record.borrow().state, entry.record.borrow().daemon.clone());
        if !entry.is_own && !state.is_final() {
            let message = format!("cancel job {id}: the daemon {daemon} runs it");
            return Err(Failure::new(Code::Conflict, message).hint("Cancel it there."));
        }
        if !state.is_final() {
            entry.record.send_modify(|record| record.cancel_asked = true);
            entry.cancel.cancel();
        }
        Ok(())
    }

    /// Waits until every job has ended and is on record, at most `grace`; the token must have fired.
    pub async fn stopped(&self, grace: Duration) -> bool {
        self.0.tasks.close();
        tokio::time::timeout(grace, self.0.tasks.wait()).await.is_ok()
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        // A panic elsewhere leaves the map whole: every change of it is one call.
        self.0.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn throttle(&self, kind: JobKind) -> Option<Arc<Throttle>> {
        self.0.restore_throttle.clone().filter(|_| matches!(kind, JobKind::Restore | JobKind::Sandbox))
    }

    fn places(&self, kind: JobKind) -> Arc<Semaphore> {
        let places = match kind {
            JobKind::Backup => &self.0.backups,
            JobKind::Restore | JobKind::Sandbox => &self.0.restores,
            JobKind::Prune | JobKind::Verify | JobKind::Incident => &self.0.others,
        };
        Arc::clone(places)
    }
}

impl Registry {
    fn insert(&mut self, entry: Entry) {
        let id = entry.record.borrow().id.clone();
        self.jobs.entry(id).or_insert(entry);
        if self.jobs.len() > KEPT_MAX {
            // That of a sandbox last: while the sandbox is there, its job says whose it is.
            let ended = |entry: &Entry| entry.record.borrow().state.is_final();
            let is_sandbox = |entry: &Entry| entry.record.borrow().spec.kind == JobKind::Sandbox;
            let plain = self.jobs.iter().find(|(_, entry)| ended(entry) && !is_sandbox(entry));
            let oldest = plain.or_else(|| self.jobs.iter().find(|(_, entry)| ended(entry)));
            if let Some(id) = oldest.map(|(id, _)| id.clone()) {
                self.jobs.remove(&id);
            }
        }
    }

    fn new_id(&self) -> JobId {
        loop {
            let id = JobId::new(clock::now().into(), rand::random());
            if !self.jobs.contains_key(&id) {
                return id;
            }
        }
    }

    fn by_key(&self, environment: &str, key: &str) -> Option<JobRecord> {
        self.jobs.values().rev().map(|entry| entry.record.borrow()).find_map(|record| {
            let same = record.spec.environment == environment && record.spec.idempotency_key.as_deref() == Some(key);
            same.then(|| record.clone())
        })
    }

    fn unfinished(&self, environment: &str) -> usize {
        let own = self.jobs.values().filter(|entry| entry.is_own).map(|entry| entry.record.borrow());
        own.filter(|record| record.spec.environment == environment && !record.state.is_final()).count()
    }
}

/// How this daemon is named in the records of its jobs: the same after each of its starts.
pub fn daemon_name(control_socket: &Path) -> String {
    format!("{} {}", rustix::system::uname().nodename().to_string_lossy(), control_socket.display())
}

fn failure_for(spec: &JobSpec, code: Code, why: &str) -> Failure {
    Failure::new(code, format!("begin a {} of {}: {why}", spec.kind.as_str(), spec.environment))
}
