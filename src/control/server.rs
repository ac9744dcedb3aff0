//! Serves the socket.
//!
//! Who asks is the kernel's word, taken before a byte is read; nothing is done before [`Permit::check`] has said yes. Every act
//! is on record before it is done, every refusal too, at most [`REFUSALS_LISTED`] a minute and person.
//!
//! Bounds: [`CONNECTIONS_MAX`] at a time, of which others than the daemon's user and root have at most [`OTHERS_MAX`], each of them
//! [`PEER_MAX`]; one request a connection, a head of at most [`HEAD_BYTES_MAX`] within [`HEAD_TIMEOUT`], a body of at most
//! [`BODY_BYTES_MAX`] within the same time. A stream shows the newest state, so a client that reads slowly costs nothing but
//! its connection.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, Span, debug, warn};

use super::answer::{Answer, answer};
use super::auth::{Permit, Refusal};
use super::peer;
use super::protocol::{ErrorReply, JobReport};
use super::record;
use super::request::{self, ControlRequest, ParseError};
use crate::daemon::access::{Caller, Role};
use crate::daemon::jobs::JobRecord;
use crate::daemon::sandboxes::Passage;
use crate::daemon::service::Service;
use crate::error::{Code, Failure};

const CONNECTIONS_MAX: usize = 64;
const OTHERS_MAX: usize = 48;
pub(super) const PEER_MAX: usize = 8;
pub use super::record::REFUSALS_LISTED;
const HEAD_BYTES_MAX: usize = 16 * 1024;
const BODY_BYTES_MAX: usize = 64 * 1024;
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// A stream repeats its last line after this long, so that a client can tell a quiet daemon from a dead one.
pub const REPEAT_EVERY: Duration = Duration::from_secs(5);
/// Pause after an accept that failed (no file descriptor left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);
const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n\
{\"error\":{\"code\":\"conflict\",\"message\":\"use the control socket: too many connections are open\",\
\"hint\":\"Try again when others have ended.\",\"retryable\":true}}\n";

type Reply = Response<BoxBody<Bytes, Infallible>>;

/// A bound socket, not served yet.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Server {
    /// Binds the socket, for the daemon's user alone at first. One that nobody listens to any more is replaced.
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
        let server = Server { listener, path: path.to_path_buf() };
        set_mode(path, CLOSED_MODE).map_err(failed)?;
        Ok(server)
    }

    /// Answers requests until `cancel` fires; streams that are open then are given `grace` to end.
    ///
    /// Cancel safety: dropping this future closes every connection; what was asked for goes on.
    pub async fn run(self, service: Service, cancel: CancellationToken, grace: Duration) {
        let service = Arc::new(Desk { service, refusals: record::Refusals::default() });
        let places = Places::default();
        let mut connections = JoinSet::new();
        let mut rules = service.service.access.changes();
        self.open_to(&service.service);
        loop {
            while connections.try_join_next().is_some() {}
            let accept = async {
                let place = Arc::clone(&places.all).acquire_owned().await;
                (place, self.listener.accept().await)
            };
            let (place, accepted) = tokio::select! {
                biased;
                () = cancel.cancelled() => break,
                Ok(()) = rules.changed() => {
                    self.open_to(&service.service);
                    continue;
                }
                accepted = accept => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (service, places, cancel) = (Arc::clone(&service), places.clone(), cancel.clone());
                    connections.spawn(async move {
                        serve(stream, &service, &places, &cancel).await;
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

    /// Lets everybody connect when somebody else than the daemon's user has a role; who may do what is decided for each request.
    fn open_to(&self, service: &Service) {
        let mode = if service.access.is_shared() { OPEN_MODE } else { CLOSED_MODE };
        if let Err(error) = set_mode(&self.path, mode) {
            warn!(error = %error, socket = %self.path.display(), "set the mode of the control socket: failed");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

const CLOSED_MODE: u32 = 0o600;
const OPEN_MODE: u32 = 0o666;

fn set_mode(path: &Path, mode: u32) -> io::Result<()> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}

/// What every connection is served from.
struct Desk {
    service: Service,
    refusals: record::Refusals,
}

/// Who has how many connections.
#[derive(Clone)]
struct Places {
    all: Arc<Semaphore>,
    others: Arc<Semaphore>,
    by_uid: Arc<Mutex<BTreeMap<u32, usize>>>,
}

impl Default for Places {
    fn default() -> Self {
        Places {
            all: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            others: Arc::new(Semaphore::new(OTHERS_MAX)),
            by_uid: Arc::default(),
        }
    }
}

/// A place among those of others than the daemon's user.
struct OtherPlace {
    _permit: OwnedSemaphorePermit,
    uid: u32,
    by_uid: Arc<Mutex<BTreeMap<u32, usize>>>,
}

impl Places {
    fn take(&self, uid: u32) -> Option<OtherPlace> {
        let mut by_uid = self.by_uid.lock().unwrap_or_else(PoisonError::into_inner);
        if by_uid.get(&uid).is_some_and(|taken| *taken >= PEER_MAX) {
            return None;
        }
        let permit = Arc::clone(&self.others).try_acquire_owned().ok()?;
        *by_uid.entry(uid).or_default() += 1;
        Some(OtherPlace { _permit: permit, uid, by_uid: Arc::clone(&self.by_uid) })
    }
}

impl Drop for OtherPlace {
    fn drop(&mut self) {
        let mut by_uid = self.by_uid.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(taken) = by_uid.get_mut(&self.uid) {
            *taken = taken.saturating_sub(1);
            if *taken == 0 {
                by_uid.remove(&self.uid);
            }
        }
    }
}

async fn serve(stream: UnixStream, desk: &Arc<Desk>, places: &Places, cancel: &CancellationToken) {
    let peer = match peer::peer(&stream) {
        Ok(peer) => peer,
        Err(error) => return warn!(error = %error, "control connection refused: the kernel does not say who it is"),
    };
    let access = &desk.service.access;
    let place = if access.is_owner(peer.uid) { None } else { Some(places.take(peer.uid)) };
    if matches!(place, Some(None)) {
        // Best effort: a client that does not read it sees the end of the connection.
        let _ = stream.try_write(BUSY);
        return warn!(uid = peer.uid, "control connection refused: too many of them");
    }
    let caller = access.caller(peer).await;
    let passing: Passing = Arc::default();
    let service = service_fn(|request| {
        let (desk, caller, passing) = (Arc::clone(desk), caller.clone(), Arc::clone(&passing));
        async move {
            let reply = desk.handle(request, caller, passing).await;
            Ok::<_, Infallible>(reply.unwrap_or_else(|(status, failure)| {
                debug!(error = %failure, status = status.as_u16(), "control request failed");
                json(status, &ErrorReply { error: failure })
            }))
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES_MAX).keep_alive(false);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await {
        debug!(error = %error, "control connection ended early");
    }
    let passage = passing.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((upgrade, passage)) = passage {
        // What stays open does not hold up the end of the daemon: the other side notices.
        tokio::select! {
            biased;
            () = cancel.cancelled() => {}
            () = pass(upgrade, passage) => {}
        }
    }
}

/// The connection is no longer HTTP.
async fn pass(upgrade: OnUpgrade, passage: Passage) {
    match upgrade.await {
        Ok(upgraded) => passage.serve(TokioIo::new(upgraded)).await,
        Err(error) => debug!(error = %error, "control connection does not become one to a sandbox"),
    }
}

/// What becomes of the connection when its only request has been answered.
type Passing = Arc<Mutex<Option<(OnUpgrade, Passage)>>>;

type Refused = (StatusCode, Failure);

/// What came of a request.
enum Done {
    Reply(Box<Reply>),
    Passage(Box<Passage>),
}

impl Done {
    fn reply(reply: Reply) -> Done {
        Done::Reply(Box::new(reply))
    }
}

impl Desk {
    /// Reads a request and does what it asks for. Once it was read it is done to its end, even if the client goes away: nothing
    /// is put on record and then left undone.
    async fn handle(
        self: Arc<Self>,
        mut request: Request<Incoming>,
        caller: Caller,
        passing: Passing,
    ) -> Result<Reply, Refused> {
        let upgrade = hyper::upgrade::on(&mut request);
        let (head, body) = request.into_parts();
        let body = read(body).await?;
        let request = request::parse(&head.method, head.uri.path(), head.uri.query(), &body).map_err(parse_refused)?;
        if matches!(request, ControlRequest::SandboxConnect { .. }) {
            check_upgrade(&head.headers)?;
        }
        let done = tokio::spawn(async move { self.act(request, caller).await }.instrument(Span::current()));
        let done = done.await.unwrap_or_else(|error| {
            let failure = Failure::new(Code::Internal, format!("answer the request: {error}"));
            Err((StatusCode::INTERNAL_SERVER_ERROR, failure))
        });
        match done? {
            Done::Reply(reply) => Ok(*reply),
            Done::Passage(passage) => {
                *passing.lock().unwrap_or_else(PoisonError::into_inner) = Some((upgrade, *passage));
                Ok(switching())
            }
        }
    }

    async fn act(&self, request: ControlRequest, caller: Caller) -> Result<Done, Refused> {
        let name = request.name();
        let permit = match Permit::check(request, caller.clone(), &self.service.jobs) {
            Ok(permit) => permit,
            Err(refusal) => {
                self.refusals.put_down(&self.service, &caller, name, &refusal).await;
                let Refusal { failure, .. } = *refusal;
                return Err((status_of(failure.code), failure));
            }
        };
        let is_act = permit.request().required_role() > Role::Viewer;
        let job = self.next_job(&permit).await;
        let act = record::allowed(&permit, job.as_ref());
        if is_act {
            record::put_down(&self.service, &permit, &act)
                .await
                .map_err(|failure| (status_of(failure.code), failure))?;
        } else {
            record::read(&self.service, &permit, &act);
        }
        match answer(&permit, &self.service, job).await {
            Ok(Answer::Document(document)) => Ok(Done::reply(json(StatusCode::OK, &document))),
            Ok(Answer::Accepted(document)) => Ok(Done::reply(json(StatusCode::ACCEPTED, &document))),
            Ok(Answer::Follow(job)) => Ok(Done::reply(events(job))),
            Ok(Answer::Passage(passage)) => Ok(Done::Passage(passage)),
            Err(failure) => {
                if is_act {
                    record::failed(&self.service, &permit, act, &failure).await;
                }
                Err((status_of(failure.code), failure))
            }
        }
    }

    async fn next_job(&self, permit: &Permit) -> Option<crate::daemon::jobs::JobId> {
        let (request, environment) = (permit.request(), permit.environment()?);
        if !request.begins_job() {
            return None;
        }
        if request.idempotency_key().is_some() {
            self.service.jobs.until_known(environment).await;
        }
        Some(self.service.jobs.id_for(environment, request.idempotency_key()))
    }
}

/// Reads a body, so that too large or too slow a one is refused before anything is done.
async fn read(body: Incoming) -> Result<Bytes, Refused> {
    let read = Limited::new(body, BODY_BYTES_MAX).collect();
    match tokio::time::timeout(HEAD_TIMEOUT, read).await {
        Ok(Ok(read)) => Ok(read.to_bytes()),
        Ok(Err(error)) => {
            let message = format!("read the request (at most {BODY_BYTES_MAX} bytes): {error}");
            Err((StatusCode::PAYLOAD_TOO_LARGE, Failure::new(Code::Usage, message)))
        }
        Err(_) => Err((StatusCode::REQUEST_TIMEOUT, Failure::new(Code::Usage, "read the request in time"))),
    }
}

/// The protocol that a connection to a sandbox becomes.
pub const POSTGRESQL: &str = "postgresql";

fn check_upgrade(headers: &header::HeaderMap) -> Result<(), Refused> {
    if headers.get(header::UPGRADE).is_some_and(|wanted| wanted == POSTGRESQL) {
        return Ok(());
    }
    let failure =
        Failure::new(Code::Usage, format!("connect to a sandbox: the request has no `Upgrade: {POSTGRESQL}`"));
    Err((StatusCode::UPGRADE_REQUIRED, failure.hint("`pgrecall sandbox connect` opens psql.")))
}

fn switching() -> Reply {
    let mut reply = Response::new(Full::new(Bytes::new()).boxed());
    *reply.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    reply.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("upgrade"));
    reply.headers_mut().insert(header::UPGRADE, header::HeaderValue::from_static(POSTGRESQL));
    reply
}

fn parse_refused(error: ParseError) -> Refused {
    match error {
        ParseError::NoSuchPath(failure) => (StatusCode::NOT_FOUND, failure),
        ParseError::OtherMethod(failure) => (StatusCode::METHOD_NOT_ALLOWED, failure),
        ParseError::Malformed(failure) => (StatusCode::BAD_REQUEST, failure),
    }
}

fn status_of(code: Code) -> StatusCode {
    match code {
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::Usage => StatusCode::BAD_REQUEST,
        Code::Denied => StatusCode::FORBIDDEN,
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

/// A job as lines of JSON: each change with the lines of the log that are new, and the last one again when nothing changes for
/// a while.
fn events(job: watch::Receiver<JobRecord>) -> Reply {
    let lines = stream::unfold((job, None), |(mut job, last): (_, Option<(bool, u64)>)| async move {
        if let Some((was_final, _)) = last {
            if was_final {
                return None;
            }
            // A timeout repeats the last state; a sender that is gone has sent its final one.
            let _ = tokio::time::timeout(REPEAT_EVERY, job.changed()).await;
        }
        let mut report = JobReport::from(&*job.borrow_and_update());
        let seen = last.map_or(0, |(_, seen)| seen);
        let newest = report.log.last().map_or(seen, |line| line.number);
        report.log.retain(|line| line.number > seen);
        let frame = Frame::data(line_of(&report));
        Some((Ok::<_, Infallible>(frame), (job, Some((report.is_final, newest)))))
    });
    reply(StatusCode::OK, "application/x-ndjson", StreamBody::new(lines).boxed())
}
