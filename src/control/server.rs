//! Serves the socket.
//!
//! Bounds: [`CONNECTIONS_MAX`] at a time (one more waits in the kernel's queue), one request a connection, a head of at
//! most [`HEAD_BYTES_MAX`] within [`HEAD_TIMEOUT`], a body of at most [`BODY_BYTES_MAX`] within the same time. A stream of
//! events shows the newest state, so a client that reads slowly costs nothing but its connection.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::protocol::{BackupEvent, ErrorReply, STATUS_PATH, Status};
use crate::daemon::handle::Handle;
use crate::daemon::snapshot::BackupProgress;
use crate::error::{Code, Failure};

const CONNECTIONS_MAX: usize = 32;
const HEAD_BYTES_MAX: usize = 16 * 1024;
const BODY_BYTES_MAX: usize = 64 * 1024;
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// A stream repeats its last event after this long, so that a client can tell a quiet daemon from a dead one.
pub const REPEAT_EVERY: Duration = Duration::from_secs(5);
/// Pause after an accept that failed (no file descriptor left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

type Reply = Response<BoxBody<Bytes, Infallible>>;

/// A bound socket, not served yet.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    owner_uid: u32,
}

impl Server {
    /// Binds the socket with mode 0600. One that nobody listens to any more is replaced.
    ///
    /// # Errors
    /// [`Code::Conflict`] when a daemon listens there, [`Code::Host`] when it cannot be bound.
    pub fn bind(path: &Path) -> Result<Server, Failure> {
        let failed = |error: io::Error| {
            let hint =
                "Its directory must exist and belong to the daemon's user; `control_socket` names another place.";
            Failure::new(Code::Host, format!("open the control socket {}: {error}", path.display())).hint(hint)
        };
        match std::os::unix::net::UnixStream::connect(path) {
            Ok(_) => {
                let message = format!("open the control socket {}: a daemon listens there already", path.display());
                return Err(Failure::new(Code::Conflict, message)
                    .hint("Stop the other daemon, or give this one another `control_socket`."));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Err(_) => {}
        }
        let listener = UnixListener::bind(path).map_err(failed)?;
        let server = Server { listener, path: path.to_path_buf(), owner_uid: rustix::process::geteuid().as_raw() };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(server)
    }

    /// Answers requests until `cancel` fires; streams that are open then are given `grace` to end.
    ///
    /// Cancel safety: dropping this future closes every connection; what was asked for goes on.
    pub async fn run(self, handle: Handle, cancel: CancellationToken, grace: Duration) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            let accept = async {
                let place = Arc::clone(&places).acquire_owned().await;
                (place, self.listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                accepted = accept => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (handle, owner_uid) = (handle.clone(), self.owner_uid);
                    connections.spawn(async move {
                        serve(stream, handle, owner_uid).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    warn!(error = %error, "control connection cannot be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        let all = async { while connections.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(grace, all).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether the kernel's word about the peer suffices: the daemon's own user, or root.
pub(super) fn is_allowed(peer_uid: u32, owner_uid: u32) -> bool {
    peer_uid == owner_uid || peer_uid == 0
}

async fn serve(stream: UnixStream, handle: Handle, owner_uid: u32) {
    let peer_uid = stream.peer_cred().ok().map(|peer| peer.uid());
    let allowed = peer_uid.is_some_and(|uid| is_allowed(uid, owner_uid));
    if !allowed {
        warn!(peer_uid, "control connection refused: another user");
    }
    let service = service_fn(move |request| {
        let handle = handle.clone();
        async move {
            let reply = if allowed { answer(request, &handle).await } else { Err(refused()) };
            Ok::<_, Infallible>(reply.unwrap_or_else(|(status, failure)| {
                debug!(error = %failure, status = status.as_u16(), "control request failed");
                json(status, &ErrorReply { error: failure })
            }))
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX).keep_alive(false);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        debug!(error = %error, "control connection ended early");
    }
}

type Refusal = (StatusCode, Failure);

fn refused() -> Refusal {
    let failure = Failure::new(Code::Conflict, "use the control socket: only the daemon's own user and root may");
    (StatusCode::FORBIDDEN, failure.hint("Run the command as the daemon's user, for example with sudo -u postgres."))
}

async fn answer(request: Request<Incoming>, handle: &Handle) -> Result<Reply, Refusal> {
    let (head, body) = request.into_parts();
    drain(body).await?;
    let path = head.uri.path();
    let backup_of = path.strip_prefix("/v1/environments/").and_then(|rest| rest.strip_suffix("/backup"));
    match (&head.method, path, backup_of) {
        (&Method::GET, STATUS_PATH, _) => Ok(json(StatusCode::OK, &Status::from(&handle.snapshot()))),
        (&Method::POST, _, Some(environment)) => {
            let progress = handle
                .start_backup(environment, CancellationToken::new())
                .map_err(|failure| (status_of(failure.code), failure))?;
            Ok(events(progress))
        }
        (_, STATUS_PATH, _) | (_, _, Some(_)) => {
            let failure = Failure::new(Code::Usage, format!("answer {} {path}: another method is needed", head.method));
            Err((StatusCode::METHOD_NOT_ALLOWED, failure))
        }
        _ => {
            let failure =
                Failure::new(Code::NotFound, format!("answer {} {path}: there is no such request", head.method));
            Err((StatusCode::NOT_FOUND, failure.hint("The command may be newer than the daemon: restart the daemon.")))
        }
    }
}

/// Reads a body that no request needs, so that too large or too slow a one is refused before anything is done.
async fn drain(body: Incoming) -> Result<(), Refusal> {
    let read = Limited::new(body, BODY_BYTES_MAX).collect();
    match tokio::time::timeout(HEAD_TIMEOUT, read).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => {
            let failure =
                Failure::new(Code::Usage, format!("read the request (at most {BODY_BYTES_MAX} bytes): {error}"));
            Err((StatusCode::PAYLOAD_TOO_LARGE, failure))
        }
        Err(_) => Err((StatusCode::REQUEST_TIMEOUT, Failure::new(Code::Usage, "read the request in time"))),
    }
}

fn status_of(code: Code) -> StatusCode {
    match code {
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Usage => StatusCode::BAD_REQUEST,
        Code::Conflict | Code::UnreachableTarget => StatusCode::CONFLICT,
        Code::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn json<T: Serialize>(status: StatusCode, document: &T) -> Reply {
    let body = Full::new(line_of(document)).boxed();
    reply(status, "application/json", body)
}

fn reply(status: StatusCode, kind: &'static str, body: BoxBody<Bytes, Infallible>) -> Reply {
    let mut reply = Response::new(body);
    *reply.status_mut() = status;
    reply.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    reply
}

fn line_of<T: Serialize>(document: &T) -> Bytes {
    let mut line = serde_json::to_vec(document).expect("our own types are representable in JSON");
    line.push(b'\n');
    line.into()
}

/// The progress as lines of JSON: each change, and the last one again when nothing changes for a while.
fn events(progress: watch::Receiver<BackupProgress>) -> Reply {
    let lines = stream::unfold((progress, 0u32), |(mut progress, sent)| async move {
        if sent > 0 {
            if progress.borrow().is_final() && !progress.has_changed().unwrap_or(false) {
                return None;
            }
            // A timeout repeats the last event; a sender that is gone has sent its final one.
            let _ = tokio::time::timeout(REPEAT_EVERY, progress.changed()).await;
        }
        let line = line_of(&BackupEvent::from(&*progress.borrow_and_update()));
        Some((Ok::<_, Infallible>(Frame::data(line)), (progress, sent.saturating_add(1))))
    });
    reply(StatusCode::OK, "application/x-ndjson", StreamBody::new(lines).boxed())
}
