use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;

use super::snapshot::{BackupProgress, State};
use super::supervisor::BodyContext;
use super::*;
use crate::daemon::handle::Request;
use crate::error::{Code, Failure};

/// Fails or panics as often as told, then works: streams and takes backups.
struct Script {
    failures: AtomicU32,
    panics: AtomicU32,
    hangs_at_the_end: bool,
}

fn script(failures: u32, panics: u32) -> Script {
    Script { failures: failures.into(), panics: panics.into(), hangs_at_the_end: false }
}

fn took_one(counter: &AtomicU32) -> bool {
    counter.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
}

#[async_trait]
impl Body for Script {
    async fn run(&self, mut context: BodyContext) -> Result<(), Failure> {
        assert!(!took_one(&self.panics), "a panic on purpose");
        if took_one(&self.failures) {
            return Err(Failure::new(Code::Conflict, "store the first byte: somebody else writes here"));
        }
        context.snapshot.send_modify(|s| s.enter(State::Protected, None, clock::now().into()));
        loop {
            tokio::select! {
                () = context.cancel.cancelled(), if !self.hangs_at_the_end => return Ok(()),
                Some(Request::Backup { progress }) = context.requests.recv() => {
                    let done = BackupProgress::Done { backup: "b1".into(), bytes_stored: 5, summary: String::new() };
                    progress.send(done);
                }
            }
        }
    }
}

fn start(bodies: Vec<(&str, Script)>) -> Daemon {
    let bodies = bodies.into_iter().map(|(name, body)| (name.to_owned(), Arc::new(body) as Arc<dyn Body>));
    let pauses = Pauses { first: Duration::from_millis(10), max: Duration::from_millis(200) };
    Daemon::start(bodies.collect::<BTreeMap<_, _>>(), pauses, CancellationToken::new())
}

async fn until(daemon: &Daemon, name: &str, wanted: State) -> EnvironmentSnapshot {
    let handle = daemon.handle();
    let find = || handle.snapshot().environments.into_iter().find(|e| e.name == name).expect("the environment");
    let wait = async {
        while find().state != wanted {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), wait).await.expect("the state is reached in time");
    find()
}

#[tokio::test]
async fn a_broken_environment_is_started_again_and_delays_no_other() {
    let daemon = start(vec![("broken", script(u32::MAX, 0)), ("flaky", script(1, 1)), ("good", script(0, 0))]);
    assert_eq!(until(&daemon, "good", State::Protected).await.restarts, 0);
    let flaky = until(&daemon, "flaky", State::Protected).await;
    assert_eq!(flaky.restarts, 2);
    let broken = until(&daemon, "broken", State::Conflict).await;
    assert_eq!(broken.failure.expect("a failure").code, Code::Conflict);

    let mut refused = daemon.handle().start_backup("broken", CancellationToken::new()).expect("accepted");
    let refused = refused.wait_for(BackupProgress::is_final).await.expect("answered").clone();
    assert!(matches!(refused, BackupProgress::Failed(_)));
    let mut done = daemon.handle().start_backup("good", CancellationToken::new()).expect("accepted");
    let done = done.wait_for(BackupProgress::is_final).await.expect("answered").clone();
    assert!(matches!(done, BackupProgress::Done { backup, .. } if backup == "b1"));
    let unknown = daemon.handle().start_backup("god", CancellationToken::new()).expect_err("unknown");
    assert_eq!(unknown.to_string(), "this daemon looks after no server of god");

    let handle = daemon.handle();
    assert!(daemon.stop(Duration::from_secs(5)).await);
    assert!(handle.snapshot().environments.iter().all(|e| e.state == State::Stopped));
    assert_eq!(handle.start_backup("good", CancellationToken::new()).expect_err("stopped").code, Code::Cancelled);
}

#[tokio::test]
async fn a_task_that_does_not_end_is_cut_off_after_the_grace_period() {
    let daemon = start(vec![("hangs", Script { hangs_at_the_end: true, ..script(0, 0) })]);
    until(&daemon, "hangs", State::Protected).await;
    assert!(!daemon.stop(Duration::from_millis(100)).await);
}

#[tokio::test]
async fn another_plan_touches_only_what_it_changes() {
    let planned = |of: &[(&str, &str)]| -> BTreeMap<String, Planned> {
        let one = |(name, print): &(&str, &str)| {
            let fingerprint = Digest::sha256(print.as_bytes());
            (name.to_string(), Planned { body: Arc::new(script(0, 0)), fingerprint })
        };
        of.iter().map(one).collect()
    };
    let pauses = Pauses { first: Duration::from_millis(10), max: Duration::from_millis(200) };
    let first = planned(&[("kept", "1"), ("changed", "1"), ("gone", "1")]);
    let mut daemon = Daemon::start(first, pauses, CancellationToken::new());
    for name in ["kept", "changed", "gone"] {
        until(&daemon, name, State::Protected).await;
    }
    let mut kept = daemon.handle().watch("kept").expect("there");
    kept.mark_unchanged();
    let (gone, changed) =
        (daemon.handle().watch("gone").expect("there"), daemon.handle().watch("changed").expect("there"));

    let changes = daemon.apply(planned(&[("kept", "1"), ("changed", "2"), ("new", "1")]));
    let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    let expected =
        Changes { added: names(&["new"]), changed: names(&["changed"]), removed: names(&["gone"]), unchanged: 1 };
    assert_eq!(changes, expected);
    for name in ["kept", "changed", "new"] {
        until(&daemon, name, State::Protected).await;
    }
    // The ones that ended said so before anybody took their place.
    assert_eq!((gone.borrow().state, changed.borrow().state), (State::Stopped, State::Stopped));
    assert!(!kept.has_changed().expect("its task runs"), "the unchanged one was not touched");
    assert_eq!(daemon.handle().watch("gone").expect_err("gone").code, Code::NotFound);
    assert!(daemon.stop(Duration::from_secs(5)).await);
}
