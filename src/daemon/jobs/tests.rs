use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use tokio::sync::Notify;

use super::*;
use crate::config::Config;
use crate::operations::incident::{By, What};
use crate::repository::{Key, incident, job};

const STEP: Duration = Duration::from_secs(10);

/// Counts how often it runs and how many run at once; ends when told, or when cancelled.
#[derive(Default)]
struct Script {
    began: AtomicUsize,
    running: AtomicUsize,
    most: AtomicUsize,
    go_on: Notify,
}

#[async_trait]
impl Work for Script {
    async fn run(&self, job: &JobContext) -> Result<Value, Failure> {
        self.began.fetch_add(1, Ordering::SeqCst);
        let now = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        job.progress("copying", 5, Some(10));
        job.log("half of it");
        job.put_down(json!({ "directory": "/tmp/x" })).await?;
        let result = tokio::select! {
            () = job.cancel.cancelled() => Err(Failure::new(Code::Cancelled, "copy: cancelled")),
            () = self.go_on.notified() => match job.spec.request["outcome"].as_str() {
                Some("fail") => Err(Failure::new(Code::Host, "copy: the disk is full").hint("Make room.")),
                Some("panic") => panic!("a panic on purpose"),
                _ => Ok(json!({ "copied": 10 })),
            },
        };
        self.running.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

struct Host {
    dir: tempfile::TempDir,
    jobs: Jobs,
    cancel: CancellationToken,
}

fn begin(dir: &Path, daemon: &str) -> (Jobs, CancellationToken) {
    let text = format!(
        "[defaults]\nrepository = \"file://{}/repository\"\n[environment.shop]\n[environment.billing]\n",
        dir.display()
    );
    let config = Config::parse(&text, Path::new("config.toml")).expect("a configuration");
    let cancel = CancellationToken::new();
    (Jobs::start(Repositories::new(&config), daemon.into(), Limits::default(), cancel.clone()), cancel)
}

impl Host {
    fn start() -> Host {
        let dir = tempfile::tempdir().expect("temporary directory");
        let (jobs, cancel) = begin(dir.path(), "here /run/control");
        Host { dir, jobs, cancel }
    }

    /// Ends the daemon in order and starts it again.
    async fn restart(self) -> Host {
        self.cancel.cancel();
        assert!(self.jobs.stopped(STEP).await, "every job ends");
        let (jobs, cancel) = begin(self.dir.path(), "here /run/control");
        jobs.until_known("shop").await;
        Host { dir: self.dir, jobs, cancel }
    }

    async fn until(&self, id: &JobId, wanted: JobState) -> JobRecord {
        let mut record = self.jobs.follow(id).expect("the job");
        let reached = tokio::time::timeout(STEP, record.wait_for(|record| record.state == wanted)).await;
        reached.unwrap_or_else(|_| panic!("{wanted:?}: {:?}", self.jobs.get(id))).expect("a sender").clone()
    }

    /// Of three restores, the one that waits for the two others.
    async fn one_waits(&self, ids: &[JobId; 3]) -> JobId {
        let with = |state| ids.iter().filter(move |id| self.jobs.get(id).is_some_and(|job| job.state == state));
        let wait = async {
            while (with(JobState::Running).count(), with(JobState::Queued).count()) != (2, 1) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(STEP, wait).await.expect("two run, one waits");
        with(JobState::Queued).next().expect("the one").clone()
    }
}

fn spec(environment: &str, kind: JobKind) -> JobSpec {
    JobSpec {
        environment: environment.into(),
        kind,
        asked_by: Asker { uid: Some(1000), user: "ada".into(), via: Via::Socket },
        request: json!({ "outcome": "done" }),
        ticket: None,
        idempotency_key: None,
    }
}

fn ending(outcome: &str) -> JobSpec {
    JobSpec { request: json!({ "outcome": outcome }), ..spec("shop", JobKind::Verify) }
}

#[tokio::test]
async fn a_job_runs_though_nobody_follows_and_its_outcome_is_found_after_a_restart() {
    let host = Host::start();
    let work = Arc::new(Script::default());
    let mut ids = Vec::new();
    for (outcome, state) in [("done", JobState::Done), ("fail", JobState::Failed), ("panic", JobState::Failed)] {
        let id = host.jobs.submit(ending(outcome), work.clone()).expect("accepted");
        work.go_on.notify_one();
        let ended = host.until(&id, state).await;
        assert_eq!((ended.log.len(), ended.log[0].text.as_str()), (1, "half of it"));
        assert!(ended.began_at.is_some() && ended.ended_at.is_some());
        ids.push((id, ended));
    }
    assert_eq!(ids[0].1.result, Some(json!({ "copied": 10 })));
    assert_eq!(ids[1].1.failure.as_ref().and_then(|f| f.hint.as_deref()), Some("Make room."));
    assert_eq!(ids[2].1.failure.as_ref().map(|f| f.code), Some(Code::Internal));
    let host = host.restart().await;
    for (id, ended) in ids {
        let again = host.jobs.get(&id).expect("known after a restart");
        assert_eq!((again.state, &again.result, &again.failure), (ended.state, &ended.result, &ended.failure));
        assert_eq!((again.notes, again.log), (json!({ "directory": "/tmp/x" }), ended.log));
    }
    assert_eq!(work.began.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn what_ran_or_waited_when_the_daemon_ended_is_interrupted_and_says_what_to_do() {
    let host = Host::start();
    let work = Arc::new(Script::default());
    let submit = || host.jobs.submit(spec("shop", JobKind::Restore), work.clone()).expect("accepted");
    let ids = [submit(), submit(), submit()];
    host.one_waits(&ids).await;
    let host = host.restart().await;
    for id in &ids {
        let record = host.jobs.get(id).expect("known after a restart");
        let failure = record.failure.expect("why");
        assert_eq!(record.state, JobState::Interrupted);
        assert!(failure.retryable && failure.hint.is_some_and(|hint| hint.contains("same directory")));
    }
    assert_eq!(work.began.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_daemon_that_was_killed_leaves_jobs_that_the_next_one_calls_interrupted_but_not_those_of_another() {
    let host = Host::start();
    let id = host.jobs.submit(spec("shop", JobKind::Restore), Arc::new(Script::default())).expect("accepted");
    host.until(&id, JobState::Running).await;
    // The next daemon begins while the store still says `running`, as after a kill.
    let (elsewhere, _stop) = begin(host.dir.path(), "elsewhere /run/control");
    elsewhere.until_known("shop").await;
    assert_eq!(elsewhere.get(&id).map(|record| record.state), Some(JobState::Running));
    assert_eq!(elsewhere.cancel(&id).expect_err("not ours").code, Code::Conflict);
    let (next, _stop) = begin(host.dir.path(), "here /run/control");
    next.until_known("shop").await;
    assert_eq!(next.get(&id).map(|record| record.state), Some(JobState::Interrupted));
}

#[tokio::test]
async fn the_same_key_begins_nothing_twice_not_even_after_a_restart() {
    let host = Host::start();
    let work = Arc::new(Script::default());
    let keyed = |outcome: &str| JobSpec { idempotency_key: Some("k1".into()), ..ending(outcome) };
    host.jobs.until_known("shop").await;
    let id = host.jobs.submit(keyed("done"), work.clone()).expect("accepted");
    assert_eq!(host.jobs.submit(keyed("done"), work.clone()), Ok(id.clone()));
    work.go_on.notify_one();
    host.until(&id, JobState::Done).await;
    assert_eq!(host.jobs.submit(keyed("done"), work.clone()), Ok(id.clone()));
    assert_eq!(host.jobs.submit(keyed("fail"), work.clone()).expect_err("another request").code, Code::Conflict);
    let host = host.restart().await;
    assert_eq!(host.jobs.submit(keyed("done"), work.clone()), Ok(id));
    assert_eq!(work.began.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn two_restores_run_at_a_time_others_wait_and_too_many_are_refused() {
    let host = Host::start();
    let work = Arc::new(Script::default());
    let submit = |environment, kind| host.jobs.submit(spec(environment, kind), work.clone());
    let mut ids: Vec<_> = (0..WAITING_MAX).map(|_| submit("shop", JobKind::Restore).expect("accepted")).collect();
    let refused = submit("shop", JobKind::Restore).expect_err("too many");
    assert_eq!((refused.code, refused.retryable), (Code::Conflict, true));
    ids.push(submit("billing", JobKind::Sandbox).expect("another environment has its own"));
    assert_eq!(submit("shp", JobKind::Backup).expect_err("unknown").hint.as_deref(), Some("Did you mean shop?"));
    // A backup does not wait for restores.
    let backup = host.jobs.submit(spec("billing", JobKind::Backup), Arc::new(Script::default())).expect("accepted");
    host.until(&backup, JobState::Running).await;
    host.jobs.cancel(&backup).expect("cancelled");
    host.until(&backup, JobState::Cancelled).await;
    assert_eq!(host.jobs.list(Some("shop")).len(), WAITING_MAX);
    for id in &ids {
        let mut record = host.jobs.follow(id).expect("the job");
        let ended = async {
            while !record.borrow_and_update().state.is_final() {
                work.go_on.notify_waiters();
                tokio::select! { _ = record.changed() => {} () = tokio::time::sleep(Duration::from_millis(5)) => {} }
            }
        };
        tokio::time::timeout(STEP, ended).await.expect("its turn comes");
    }
    assert_eq!(work.most.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_job_that_waits_can_be_cancelled_and_a_damaged_last_state_does_not_hide_it() {
    let host = Host::start();
    let work = Arc::new(Script::default());
    let submit = || host.jobs.submit(spec("shop", JobKind::Restore), work.clone()).expect("accepted");
    let ids = [submit(), submit(), submit()];
    let waits = host.one_waits(&ids).await;
    host.jobs.cancel(&waits).expect("cancelled");
    let cancelled = host.until(&waits, JobState::Cancelled).await;
    assert_eq!((cancelled.began_at, cancelled.facts), (None, 2));
    host.jobs.cancel(&waits).expect("it has ended already");

    let repository = host.jobs.0.repositories.get("shop").await.expect("open");
    repository.store().put(&Key::job(&waits, 1), vec![0u8; 100]).await.expect("damage it");
    let found = job::find(&repository, &waits).await.expect("read").expect("found");
    assert_eq!(found.state, JobState::Queued);
}

#[tokio::test]
async fn restores_and_sandboxes_share_the_rate_of_the_limits_and_nothing_else_is_held_to_it() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let text = format!(
        "[limits]\nrestore_bandwidth_max = \"64KiB\"\n[environment.shop]\nrepository = \"file://{}/repository\"\n",
        dir.path().display()
    );
    let config = Config::parse(&text, Path::new("config.toml")).expect("a configuration");
    let cancel = CancellationToken::new();
    let jobs = Jobs::start(Repositories::new(&config), "here".into(), config.limits, cancel.clone());
    let restore = jobs.throttle(JobKind::Restore).expect("a rate");
    let sandbox = jobs.throttle(JobKind::Sandbox).expect("a rate");
    assert!(Arc::ptr_eq(&restore, &sandbox), "one rate for all of them");
    for kind in [JobKind::Backup, JobKind::Prune, JobKind::Verify, JobKind::Incident] {
        assert!(jobs.throttle(kind).is_none(), "{kind:?}");
    }
    cancel.cancel();
    assert!(jobs.stopped(STEP).await, "every job ends");
}

/// What the log of the incident says, without who opened and closed it.
async fn noted(host: &Host, ticket: &str) -> Vec<(What, String)> {
    let repository = host.jobs.0.repositories.get("shop").await.expect("open");
    let log = incident::load(&repository, &ticket.parse().expect("a ticket")).await.expect("read");
    let noted = log.entries.into_iter().filter(|entry| !matches!(entry.what, What::Opened | What::Closed));
    noted.map(|entry| (entry.what, entry.text)).collect()
}

async fn write(host: &Host, ticket: &str, what: What) {
    let repository = host.jobs.0.repositories.get("shop").await.expect("open");
    let mut log = incident::load(&repository, &ticket.parse().expect("a ticket")).await.expect("read");
    let entry = crate::operations::incident::entry(By("ann"), what, "as it was told".into());
    log.append(&repository, entry).await.expect("written");
}

#[tokio::test]
async fn a_job_is_noted_in_the_open_incident_of_its_ticket_and_in_no_other() {
    let host = Host::start();
    write(&host, "OPS-1", What::Opened).await;
    write(&host, "OPS-2", What::Opened).await;
    write(&host, "OPS-2", What::Closed).await;
    let work = Arc::new(Script::default());
    let of = |ticket: &str, outcome: &str| JobSpec { ticket: Some(ticket.into()), ..ending(outcome) };
    let cases = [
        ("OPS-1", "done", JobState::Done, "noted in incident OPS-1"),
        ("OPS-1", "fail", JobState::Failed, "noted in incident OPS-1"),
        ("OPS-2", "done", JobState::Done, "not noted: OPS-2 has no open incident"),
        ("OPS-3", "done", JobState::Done, "not noted: OPS-3 has no open incident"),
        (
            "a ticket of another system",
            "done",
            JobState::Done,
            "not noted: a ticket of another system has no open incident",
        ),
    ];
    for (ticket, outcome, state, says) in cases {
        let id = host.jobs.submit(of(ticket, outcome), work.clone()).expect("accepted");
        work.go_on.notify_one();
        let ended = host.until(&id, state).await;
        assert_eq!(ended.log.back().map(|line| line.text.as_str()), Some(says));
    }
    // One that is cancelled, and one that runs when the daemon is killed.
    for kill in [false, true] {
        let id = host.jobs.submit(of("OPS-1", "done"), work.clone()).expect("accepted");
        host.until(&id, JobState::Running).await;
        if kill {
            let (next, _stop) = begin(host.dir.path(), "here /run/control");
            next.until_known("shop").await;
            assert_eq!(next.get(&id).map(|record| record.state), Some(JobState::Interrupted));
        } else {
            host.jobs.cancel(&id).expect("cancelled");
            host.until(&id, JobState::Cancelled).await;
        }
    }
    let expected = [
        (What::Command, "verify of shop done"),
        (What::Remark, "verify of shop failed: failed to copy: the disk is full"),
        (What::Remark, "verify of shop cancelled: failed to copy: cancelled"),
        (What::Remark, "verify of shop interrupted: failed to verify shop: the daemon ended before it did"),
    ];
    assert_eq!(noted(&host, "OPS-1").await, expected.map(|(what, text)| (what, text.to_owned())));
    assert!(noted(&host, "OPS-2").await.is_empty() && noted(&host, "OPS-3").await.is_empty());
}
