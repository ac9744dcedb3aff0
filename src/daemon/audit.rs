//! The record of acts, as the daemon keeps it: to the log at once, to the repository in order.
//!
//! Each environment has a writer and a queue of [`QUEUE_MAX`] acts. Whoever acts waits for the store at most [`STORE_WAIT`]; when
//! it does not answer in time the act stays in the queue and is marked as late, and what is irreversible is not done.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{Instrument, info, info_span, warn};

use super::repositories::Repositories;
use crate::error::{Code, Failure};
use crate::repository::audit::Chain;
pub use crate::repository::audit::{Act, Outcome};
use crate::util::clock;
use crate::util::retry::Backoff;

/// Acts of one environment that wait for the store; each is at most 64 KiB, mostly less than one.
pub const QUEUE_MAX: usize = 256;
pub const STORE_WAIT: Duration = Duration::from_secs(5);
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Whether an act can be taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    Reversible,
    /// It is done only when it is on record.
    Irreversible,
}

/// The way to the record; a cheap copy.
#[derive(Clone)]
pub struct AuditLog(Arc<Inner>);

struct Inner {
    repositories: Repositories,
    writers: Mutex<BTreeMap<String, mpsc::Sender<Entry>>>,
    tasks: TaskTracker,
    cancel: CancellationToken,
    store_wait: Duration,
}

struct Entry {
    act: Act,
    came_at: Instant,
    stored: oneshot::Sender<()>,
}

impl AuditLog {
    /// After `cancel` what waits is still stored, if the store answers at once.
    pub fn new(repositories: Repositories, cancel: CancellationToken) -> AuditLog {
        AuditLog::waiting(repositories, cancel, STORE_WAIT)
    }

    fn waiting(repositories: Repositories, cancel: CancellationToken, store_wait: Duration) -> AuditLog {
        let (writers, tasks) = (Mutex::default(), TaskTracker::new());
        AuditLog(Arc::new(Inner { repositories, writers, tasks, cancel, store_wait }))
    }

    /// Records an act in an environment, before it is done.
    ///
    /// # Errors
    /// When too many wait for the store already, or when the act is irreversible and the store does not take it.
    pub async fn record(&self, environment: &str, act: Act, weight: Weight) -> Result<(), Failure> {
        journal(Some(environment), &act);
        let (request, user) = (act.request.clone(), act.user.clone());
        let queue = self.writer(environment);
        let (stored, is_stored) = oneshot::channel();
        let wrong = |why: &str| {
            let failure =
                Failure::new(Code::Store, format!("put {request} of {environment} by {user} on record: {why}"));
            failure.retryable().hint("`pgrecall status` says how the store is; the daemon's log has the act.")
        };
        let not_done =
            Act { outcome: Outcome::Failed, why: Some("the store did not take the record".into()), ..act.clone() };
        let entry = Entry { act, came_at: Instant::now(), stored };
        queue.try_send(entry).map_err(|_| wrong("too many acts wait for the store already"))?;
        match (tokio::time::timeout(self.0.store_wait, is_stored).await, weight) {
            (Ok(Ok(())), _) | (_, Weight::Reversible) => Ok(()),
            (_, Weight::Irreversible) => {
                journal(Some(environment), &not_done);
                let _ = queue.try_send(Entry { act: not_done, came_at: Instant::now(), stored: oneshot::channel().0 });
                Err(wrong("the store does not take it, and what was asked for cannot be taken back"))
            }
        }
    }

    /// Waits until nothing waits for the store any more, at most `grace`; the token must have fired.
    pub async fn stopped(&self, grace: Duration) -> bool {
        self.0.writers.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.0.tasks.close();
        tokio::time::timeout(grace, self.0.tasks.wait()).await.is_ok()
    }

    fn writer(&self, environment: &str) -> mpsc::Sender<Entry> {
        let mut writers = self.0.writers.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = || {
            let (queue, entries) = mpsc::channel(QUEUE_MAX);
            let span = info_span!("environment", environment);
            let writer = write(Arc::clone(&self.0), environment.to_owned(), entries);
            self.0.tasks.spawn(writer.instrument(span));
            queue
        };
        writers.entry(environment.to_owned()).or_insert_with(begin).clone()
    }
}

/// An act, or a read, in the log alone.
pub fn journal(environment: Option<&str>, act: &Act) {
    let Act { uid, user, role, request, job, ticket, outcome, why, unlisted, detail, .. } = act;
    info!(
        target: "pgrecall::audit",
        environment,
        uid,
        user,
        role,
        request,
        job,
        ticket,
        outcome = ?outcome,
        why,
        unlisted,
        detail = %detail,
        "act"
    );
}

/// Stores the acts of one environment in the order in which they came.
///
/// Cancel safety: what is in the queue is lost for the repository; the log has it.
async fn write(inner: Arc<Inner>, environment: String, mut entries: mpsc::Receiver<Entry>) {
    let Inner { repositories, cancel, .. } = &*inner;
    let mut chain = None;
    let mut late: u64 = 0;
    while let Some(Entry { act, came_at, stored }) = entries.recv().await {
        if !store(repositories, &environment, &mut chain, &act, cancel).await {
            return;
        }
        let _ = stored.send(());
        late = late.saturating_add(u64::from(came_at.elapsed() > inner.store_wait));
        if late > 0 && entries.is_empty() {
            let why = format!("the {late} acts before this were stored late: the store did not answer");
            let mark = Act {
                at: clock::now().into(),
                uid: None,
                user: "pgrecall".to_owned(),
                role: None,
                request: "late".to_owned(),
                job: None,
                ticket: None,
                detail: serde_json::Value::Null,
                outcome: Outcome::Late,
                why: Some(why),
                unlisted: 0,
            };
            journal(Some(&environment), &mark);
            if !store(repositories, &environment, &mut chain, &mark, cancel).await {
                return;
            }
            late = 0;
        }
    }
}

/// Stores one act, again and again until it is; `false` when the daemon stops before that.
async fn store(
    repositories: &Repositories,
    environment: &str,
    chain: &mut Option<Chain>,
    act: &Act,
    cancel: &CancellationToken,
) -> bool {
    let mut pauses = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    let mut warned = false;
    loop {
        match try_store(repositories, environment, chain, act).await {
            Ok(()) => return true,
            Err(failure) if !warned => {
                warned = true;
                warn!(error = %failure, "put acts on record: failed, will be tried again");
            }
            Err(_) => {}
        }
        if cancel.is_cancelled() {
            warn!(
                "acts are not on record in the repository, only in this log: the daemon stops and the store does not answer"
            );
            return false;
        }
        tokio::select! {
            () = cancel.cancelled() => {}
            () = tokio::time::sleep(pauses.delay()) => {}
        }
    }
}

async fn try_store(
    repositories: &Repositories,
    environment: &str,
    chain: &mut Option<Chain>,
    act: &Act,
) -> Result<(), Failure> {
    let repository = repositories.get(environment).await?;
    let open = match chain {
        Some(open) => open,
        None => chain.insert(Chain::open(&repository).await?),
    };
    Ok(open.append(&repository, act).await?)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::Config;
    use crate::repository::audit;

    fn act(request: &str) -> Act {
        Act {
            at: clock::now().into(),
            uid: Some(7),
            user: "ada".into(),
            role: None,
            request: request.into(),
            job: None,
            ticket: None,
            detail: serde_json::Value::Null,
            outcome: Outcome::Allowed,
            why: None,
            unlisted: 0,
        }
    }

    #[tokio::test]
    async fn with_the_store_away_acts_wait_and_are_marked_and_what_is_irreversible_is_not_done() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let place = dir.path().join("store");
        let text = format!("[environment.shop]\nrepository = \"file://{}\"\n", place.display());
        let config = Config::parse(&text, Path::new("c")).expect("a configuration");
        let cancel = CancellationToken::new();
        let repositories = Repositories::new(&config);
        let log = AuditLog::waiting(repositories.clone(), cancel.clone(), Duration::from_millis(200));
        // A file where the repository's directory should be.
        std::fs::File::create(&place).expect("a file in the way");
        log.record("shop", act("backup"), Weight::Reversible).await.expect("queued");
        let refused = log.record("shop", act("prune"), Weight::Irreversible).await.expect_err("not done");
        assert!(refused.retryable && refused.message.contains("cannot be taken back"), "{refused}");
        std::fs::remove_file(&place).expect("the store is back");
        log.record("shop", act("pin-add"), Weight::Reversible).await.expect("accepted");
        let recorded = async {
            loop {
                let repository = repositories.get("shop").await.expect("open");
                let record = audit::check(&repository, 10).await.expect("check");
                if record.count == 5 {
                    return record;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let record = tokio::time::timeout(Duration::from_secs(30), recorded).await.expect("stored in the end");
        assert!(record.problems.is_empty(), "{:?}", record.problems);
        let found: Vec<_> = record.acts.iter().map(|r| (r.act.request.as_str(), r.act.outcome)).collect();
        let (allowed, failed) = (Outcome::Allowed, Outcome::Failed);
        assert_eq!(found[..3], [("backup", allowed), ("prune", allowed), ("prune", failed)]);
        assert!(found.contains(&("pin-add", allowed)) && found.contains(&("late", Outcome::Late)), "{found:?}");
        cancel.cancel();
        assert!(log.stopped(Duration::from_secs(5)).await);
    }
}
