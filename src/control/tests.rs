use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::client::{Client, ClientError};
use super::protocol::BackupEvent;
use super::server::{Server, is_allowed};
use crate::daemon::Daemon;
use crate::daemon::handle::Request;
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
    server: tokio::task::JoinHandle<()>,
    cancel: CancellationToken,
}

impl Service {
    fn start() -> Service {
        let dir = tempfile::tempdir().expect("temporary directory");
        let cancel = CancellationToken::new();
        let bodies = BTreeMap::from([("shop".to_owned(), Arc::new(Worker) as Arc<dyn Body>)]);
        let daemon = Daemon::start(bodies, Pauses::default(), cancel.clone());
        let server = Server::bind(&dir.path().join("s")).expect("bind");
        let server = tokio::spawn(server.run(daemon.handle(), cancel.clone(), Duration::from_secs(1)));
        Service { dir, daemon, server, cancel }
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
async fn status_and_backup_go_over_the_socket() {
    let service = Service::start();
    let client = Client::new(&service.path());
    let status = client.status().await.expect("status");
    assert_eq!(status.environments.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(), ["shop"]);
    let mut seen = Vec::new();
    let last = client.backup("shop", |event| seen.push(event.clone())).await.expect("backup");
    assert_eq!(last, BackupEvent::Done { backup: "b7".into(), bytes_stored: 2, summary: "ok".into() });
    assert_eq!(seen.last(), Some(&last));
    let unknown: Failure = client.backup("shp", |_| ()).await.expect_err("unknown").into();
    assert_eq!((unknown.code, unknown.hint.as_deref()), (Code::NotFound, Some("Did you mean shop?")));
    let answer = service.raw(b"GET /v1/status HTTP/1.1\r\nhost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("\"name\":\"shop\""), "{answer}");
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
async fn only_the_owner_reaches_the_socket() {
    use std::os::unix::fs::PermissionsExt as _;
    let service = Service::start();
    let mode = std::fs::metadata(service.path()).expect("the socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(is_allowed(70, 70) && is_allowed(0, 70));
    assert!(!is_allowed(1000, 70) && !is_allowed(70, 0));
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
