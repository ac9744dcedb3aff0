use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hyper::Method;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::client::{Client, ClientError};
use super::protocol::{Accepted, JobReport, Jobs as JobList};
use super::server::{PEER_MAX, Server};
use crate::config::{Config, Limits};
use crate::daemon::Daemon;
use crate::daemon::access::AccessRules;
use crate::daemon::audit::AuditLog;
use crate::daemon::handle::Request;
use crate::daemon::jobs::{Asker, JobContext, JobKind, JobSpec, JobState, Jobs, Via, Work};
use crate::daemon::repositories::Repositories;
use crate::daemon::sandboxes::Sandboxes;
use crate::daemon::service::Service as Ways;
use crate::daemon::snapshot::BackupProgress;
use crate::daemon::supervisor::{Body, BodyContext, Pauses};
use crate::error::{Code, Failure};

/// Answers each request for a backup with two steps and an end.
struct Worker;

#[async_trait]
impl Body for Worker {
    async fn run(&self, mut context: BodyContext) -> Result<(), Failure> {
        loop {
            tokio::select! {
                () = context.cancel.cancelled() => return Ok(()),
                Some(Request::Backup { progress }) = context.requests.recv() => {
                    let step = BackupProgress::Running { phase: "files".into(), bytes_done: 1, bytes_total: Some(2) };
                    progress.send(step);
                    tokio::task::yield_now().await;
                    progress.send(BackupProgress::Done { backup: "b7".into(), bytes_stored: 2, summary: "ok".into() });
                }
            }
        }
    }
}

struct Service {
    dir: tempfile::TempDir,
    daemon: Daemon,
    jobs: Jobs,
    repositories: Repositories,
    server: tokio::task::JoinHandle<()>,
    cancel: CancellationToken,
}

impl Service {
    fn start() -> Service {
        Service::with("", rustix::process::geteuid().as_raw())
    }

    /// A service with more in its configuration, of a daemon that belongs to `owner_uid`.
    fn with(more: &str, owner_uid: u32) -> Service {
        let dir = tempfile::tempdir().expect("temporary directory");
        let cancel = CancellationToken::new();
        let place = dir.path().display();
        let text = format!("{more}\n[defaults]\nrepository = \"file://{place}/repository\"\n[environment.shop]\n");
        let config = Config::parse(&text, std::path::Path::new("config.toml")).expect("a configuration");
        let names = config.environments.keys().map(ToString::to_string);
        let bodies = names.map(|name| (name, Arc::new(Worker) as Arc<dyn Body>)).collect::<BTreeMap<_, _>>();
        let daemon = Daemon::start(bodies, Pauses::default(), cancel.clone());
        let repositories = Repositories::new(&config);
        let jobs = Jobs::start(repositories.clone(), "here".into(), Limits::default(), cancel.clone());
        let ways = Ways {
            handle: daemon.handle(),
            jobs: jobs.clone(),
            access: AccessRules::new(&config, owner_uid),
            audit: AuditLog::new(repositories.clone(), cancel.clone()),
            repositories: repositories.clone(),
            sandboxes: Sandboxes::new(&config.sandbox),
            config_path: "/etc/pgrecall/config.toml".into(),
        };
        let server = Server::bind(&dir.path().join("s")).expect("bind");
        let server = tokio::spawn(server.run(ways, cancel.clone(), Duration::from_secs(1)));
        Service { dir, daemon, jobs, repositories, server, cancel }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    async fn stop(self) {
        let path = self.path();
        self.cancel.cancel();
        self.server.await.expect("the server ends");
        assert!(self.daemon.stop(Duration::from_secs(5)).await);
        assert!(!path.exists(), "the socket is removed");
    }

    /// Sends bytes as they are and returns what comes back.
    async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = UnixStream::connect(self.path()).await.expect("connect");
        // The server may answer and close before everything is written.
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await;
        let _ = read.expect("the server closes the connection");
        String::from_utf8_lossy(&answer).into_owned()
    }
}

#[tokio::test]
async fn status_and_a_backup_as_a_job_go_over_the_socket() {
    let service = Service::start();
    let client = Client::new(&service.path());
    let status = client.status().await.expect("status");
    assert_eq!(status.environments.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["shop"]);
    let body = serde_json::json!({ "idempotency_key": "k1", "ticket": "T-1" });
    let path = "/v1/environments/shop/backup";
    let accepted: Accepted = client.ask(Method::POST, path, Some(&body)).await.expect("accepted");
    let mut seen = Vec::new();
    let last = client.follow(&accepted.job, |report| seen.push(report.clone())).await.expect("followed");
    assert_eq!((last.state.as_str(), last.ticket.as_deref()), ("done", Some("T-1")));
    assert_eq!(last.result.as_ref().map(|result| result["backup"].clone()), Some("b7".into()));
    let lines: Vec<u64> = seen.iter().flat_map(|report| &report.log).map(|line| line.number).collect();
    assert!(lines.is_sorted_by(|a, b| a < b), "each line comes once: {lines:?}");
    let again: Accepted = client.ask(Method::POST, path, Some(&body)).await.expect("the same");
    assert_eq!(again.job, accepted.job);
    let jobs: JobList = client.ask(Method::GET, "/v1/jobs?environment=shop", None).await.expect("jobs");
    assert_eq!(jobs.jobs.iter().map(|job| job.job.as_str()).collect::<Vec<_>>(), [accepted.job.as_str()]);
    let wrong = client.ask::<Accepted>(Method::POST, "/v1/environments/shp/backup", None).await;
    let unknown: Failure = wrong.expect_err("unknown").into();
    assert_eq!((unknown.code, unknown.hint.as_deref()), (Code::NotFound, Some("Did you mean shop?")));
    let answer = service.raw(b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("\"name\":\"shop\""), "{answer}");
    service.stop().await;
}

#[tokio::test]
async fn a_client_that_goes_away_does_not_end_its_job() {
    let service = Service::start();
    let client = Client::new(&service.path());
    let request = b"POST /v1/environments/shop/verify HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n";
    let mut stream = UnixStream::connect(service.path()).await.expect("connect");
    stream.write_all(request).await.expect("send");
    let mut stream = Some(stream);
    let finished = async {
        loop {
            let jobs: JobList = client.ask(Method::GET, "/v1/jobs", None).await.expect("jobs");
            if !jobs.jobs.is_empty() {
                // Its answer was not even read.
                drop(stream.take());
            }
            if let Some(job) = jobs.jobs.iter().find(|job| job.is_final) {
                return job.clone();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let job: JobReport = tokio::time::timeout(Duration::from_secs(10), finished).await.expect("the job ends");
    assert_eq!(job.kind, "verify");
    service.stop().await;
}

/// The test's own user, as somebody else than the daemon's: with a role in one environment by its name.
#[tokio::test]
async fn acts_and_refusals_are_on_record_and_reads_are_not() {
    if rustix::process::geteuid().is_root() {
        return;
    }
    let own = nix::unistd::User::from_uid(nix::unistd::Uid::effective()).expect("looked up").expect("a name").name;
    let service = Service::with(&format!("[access]\noperator = [\"user:{own}\"]"), u32::MAX - 1);
    let client = Client::new(&service.path());
    client.status().await.expect("an operator sees it");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(service.path()).expect("a socket").permissions());
    let accepted: Accepted = client.ask(Method::POST, "/v1/environments/shop/backup", None).await.expect("accepted");
    let body = serde_json::json!({ "into": "/tmp/x", "ticket": "T-9" });
    let refused = client.ask::<Accepted>(Method::POST, "/v1/environments/shop/restore", Some(&body)).await;
    assert_eq!(Failure::from(refused.expect_err("an admin's")).code, Code::Denied);
    let repository = service.repositories.get("shop").await.expect("open");
    let record = crate::repository::audit::check(&repository, 10).await.expect("check");
    let found: Vec<_> =
        record.acts.iter().map(|r| (r.act.request.as_str(), r.act.outcome, r.act.job.clone())).collect();
    use crate::daemon::audit::Outcome::{Allowed, Refused};
    assert_eq!(found, [("backup", Allowed, Some(accepted.job)), ("restore", Refused, None)]);
    assert!(record.acts.iter().all(|recorded| recorded.act.user == own) && record.problems.is_empty());
    assert_eq!(mode & 0o777, 0o666, "everybody may connect");

    // One person cannot take every place.
    let mut open = Vec::new();
    for _ in 0..PEER_MAX {
        let mut stream = UnixStream::connect(service.path()).await.expect("connect");
        stream.write_all(b"GET /v1/status").await.expect("send a part");
        open.push(stream);
    }
    let answer = service.raw(b"").await;
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    drop(open);
    service.stop().await;
}

/// Runs until it is cancelled.
struct Waits;

#[async_trait]
impl Work for Waits {
    async fn run(&self, job: &JobContext) -> Result<serde_json::Value, Failure> {
        job.progress("waiting", 1, Some(2));
        job.cancel.cancelled().await;
        Err(Failure::new(Code::Cancelled, "wait: it was cancelled"))
    }
}

#[tokio::test]
async fn a_viewer_sees_the_state_and_the_jobs_of_their_environment_and_nothing_of_another() {
    if rustix::process::geteuid().is_root() {
        return;
    }
    let own = nix::unistd::User::from_uid(nix::unistd::Uid::effective()).expect("looked up").expect("a name").name;
    let access = format!("[environment.billing]\n[environment.shop.access]\nviewer = [\"user:{own}\"]");
    let service = Service::with(&access, u32::MAX - 1);
    let mut ids = Vec::new();
    for name in ["shop", "billing"] {
        let spec = JobSpec {
            environment: name.into(),
            kind: JobKind::Verify,
            asked_by: Asker { uid: Some(1), user: "ada".into(), via: Via::Socket },
            request: serde_json::json!({}),
            ticket: Some("T-1".into()),
            idempotency_key: None,
        };
        let id = service.jobs.submit(spec, Arc::new(Waits)).expect("accepted");
        let mut record = service.jobs.follow(&id).expect("the job");
        let runs = record.wait_for(|record| record.progress.phase == "waiting");
        tokio::time::timeout(Duration::from_secs(10), runs).await.expect("in time").expect("it runs");
        ids.push(id.to_string());
    }
    let client = Client::new(&service.path());
    let status = client.status().await.expect("a viewer sees it");
    assert_eq!(status.environments.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["shop"]);
    let jobs: Vec<_> = status.jobs.iter().map(|job| (job.job.as_str(), job.phase.as_deref(), job.bytes_done)).collect();
    assert_eq!(jobs, [(ids[0].as_str(), Some("waiting"), 1)]);
    let text = service.raw(b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(text.contains("shop") && !text.contains("billing"), "{text}");
    let counts = service.jobs.counts();
    assert!(counts.iter().all(|counts| counts.jobs.iter().all(|(_, _, count)| *count == 0)), "none has ended");
    for id in &ids {
        service.jobs.cancel(&id.parse().expect("an id")).expect("cancelled");
        let mut record = service.jobs.follow(&id.parse().expect("an id")).expect("the job");
        record.wait_for(|record| record.state.is_final()).await.expect("it ends");
    }
    let counts = service.jobs.counts();
    let cancelled = (JobKind::Verify, JobState::Cancelled, 1);
    assert!(counts.len() == 2 && counts.iter().all(|counts| counts.jobs.contains(&cancelled)), "{counts:?}");
    assert_eq!(client.status().await.expect("seen").jobs, []);
    service.stop().await;
}

#[tokio::test]
async fn malformed_and_oversized_requests_are_refused_and_harm_nobody() {
    let service = Service::start();
    assert!(service.raw(b"\x16\x03\x01 hello\r\n\r\n").await.starts_with("HTTP/1.1 400"));
    assert!(service.raw(b"GET /v2/status HTTP/1.1\r\nhost: x\r\n\r\n").await.starts_with("HTTP/1.1 404"));
    assert!(service.raw(b"DELETE /v1/status HTTP/1.1\r\nhost: x\r\n\r\n").await.starts_with("HTTP/1.1 405"));
    let mut long = b"GET /v1/status HTTP/1.1\r\nhost: x\r\nx: ".to_vec();
    long.resize(100_000, b'a');
    assert!(service.raw(&long).await.starts_with("HTTP/1.1 431"));
    let mut large =
        b"POST /v1/environments/shop/backup HTTP/1.1\r\nhost: x\r\ncontent-length: 9999999\r\n\r\n".to_vec();
    large.resize(200_000, b'a');
    assert!(service.raw(&large).await.starts_with("HTTP/1.1 413"));
    Client::new(&service.path()).status().await.expect("still there");
    service.stop().await;
}

#[tokio::test]
async fn without_access_only_the_owner_reaches_the_socket() {
    use std::os::unix::fs::PermissionsExt as _;
    let service = Service::start();
    Client::new(&service.path()).status().await.expect("served");
    let mode = std::fs::metadata(service.path()).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    service.stop().await;
}

#[tokio::test]
async fn who_has_no_role_is_refused_whatever_is_asked() {
    if rustix::process::geteuid().is_root() {
        return;
    }
    let service = Service::with("", u32::MAX - 1);
    for path in ["/v1/status", "/v1/jobs", "/v1/environments/shop/backups", "/v1/environments/nothing/backups"] {
        let answer = service.raw(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("no role"), "{path}: {answer}");
    }
    service.stop().await;
}

#[tokio::test]
async fn a_second_daemon_is_refused_and_a_dead_one_is_replaced() {
    let service = Service::start();
    assert_eq!(Server::bind(&service.path()).expect_err("in use").code, Code::Conflict);
    let dead = service.dir.path().join("dead");
    drop(std::os::unix::net::UnixListener::bind(&dead).expect("bind"));
    assert!(matches!(Client::new(&dead).status().await, Err(ClientError::NoDaemon(_))));
    drop(Server::bind(&dead).expect("replaced"));
    assert!(matches!(Client::new(&dead).status().await, Err(ClientError::NoDaemon(_))));
    service.stop().await;
}
