//! A proxy before the object store that does what stores do on bad days.
//!
//! Requests are forwarded as they are (their signature covers the host that the client named, so it stays valid). A
//! [`Rule`] says which requests meet which [`Fault`]; the first rule that fits and is not used up decides.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};

use super::super::minio::Bucket;

type Body = BoxBody<Bytes, std::io::Error>;

/// What goes wrong.
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// It takes this much longer.
    Delay(Duration),
    /// No answer ever.
    Hang,
    /// An answer in pieces of this many bytes, with a pause before each.
    SlowDrip(usize, Duration),
    /// Refused with this status and S3 error code; nothing is done.
    Refuse(u16, &'static str),
    /// Done, and then answered with this status and S3 error code.
    RefuseAfterDone(u16, &'static str),
    /// The connection breaks before the request is read to its end; nothing is done.
    CutRequest,
    /// Done, and the connection breaks before the answer.
    CutReply,
    /// The connection breaks in the middle of the answer's body.
    CutBody,
    /// 200 with an `<Error>` as its body; nothing is done.
    ErrorInOk,
    /// The body ends at its half, and the length says so too.
    Truncate,
    /// One bit in the middle of the body is another.
    FlipBit,
    /// The ETag is not the object's.
    WrongEtag,
    /// 200 and an ETag, and nothing is stored.
    Lose,
    /// A listing without what was put through this proxy during this time.
    StaleList(Duration),
    /// Refused with 400 when the request has a checksum header; else nothing.
    RefuseChecksum,
}

impl Fault {
    pub const SLOW_DOWN: Fault = Fault::Refuse(503, "SlowDown");
    pub const TOO_MANY: Fault = Fault::Refuse(429, "TooManyRequests");
    pub const INTERNAL: Fault = Fault::Refuse(500, "InternalError");
    pub const NOT_FOUND: Fault = Fault::Refuse(404, "NoSuchKey");
    pub const NO_BUCKET: Fault = Fault::Refuse(404, "NoSuchBucket");
    pub const SKEWED_CLOCK: Fault = Fault::Refuse(403, "RequestTimeTooSkewed");
    pub const EXPIRED_TOKEN: Fault = Fault::Refuse(403, "ExpiredToken");
    pub const DENIED: Fault = Fault::Refuse(403, "AccessDenied");
    pub const CONDITION_FAILED: Fault = Fault::Refuse(412, "PreconditionFailed");
}

/// Which requests meet a fault.
#[derive(Clone, Debug)]
pub struct Rule {
    operation: Option<&'static str>,
    key: Option<String>,
    skip: u64,
    times: u64,
    fault: Fault,
    /// How many requests fitted so far.
    seen: u64,
}

impl Rule {
    /// Every request.
    pub fn new(fault: Fault) -> Rule {
        Rule { operation: None, key: None, skip: 0, times: u64::MAX, fault, seen: 0 }
    }

    /// Only `GET`, `HEAD`, `PUT`, `DELETE` (one object or many) or `LIST`.
    pub fn on(mut self, operation: &'static str) -> Rule {
        self.operation = Some(operation);
        self
    }

    /// Only keys that contain this text; for a listing, its prefix.
    pub fn key(mut self, part: &str) -> Rule {
        self.key = Some(part.to_owned());
        self
    }

    /// Not the first `count` that fit.
    pub fn skip(mut self, count: u64) -> Rule {
        self.skip = count;
        self
    }

    /// At most this often.
    pub fn times(mut self, count: u64) -> Rule {
        self.times = count;
        self
    }

    fn fits(&self, operation: &str, key: &str) -> bool {
        self.operation.is_none_or(|o| o == operation) && self.key.as_ref().is_none_or(|k| key.contains(k))
    }
}

/// A request that came by.
#[derive(Clone, Debug)]
pub struct Seen {
    pub operation: &'static str,
    pub key: String,
    /// The status that the client got; 0 when the connection was broken.
    pub status: u16,
    pub fault: Option<Fault>,
}

struct State {
    bucket: Bucket,
    rules: Mutex<Vec<Rule>>,
    seen: Mutex<Vec<Seen>>,
    put_at: Mutex<HashMap<String, Instant>>,
    put_latency_ms: AtomicU64,
    down: AtomicBool,
}

/// The proxy; it ends with this value.
pub struct S3Proxy {
    port: u16,
    state: Arc<State>,
    task: tokio::task::JoinHandle<()>,
}

impl S3Proxy {
    /// A proxy before a store that speaks plain HTTP.
    pub fn start(bucket: &Bucket) -> S3Proxy {
        assert!(bucket.endpoint.starts_with("http://"), "the proxy does not speak TLS");
        let state = Arc::new(State {
            bucket: bucket.clone(),
            rules: Mutex::default(),
            seen: Mutex::default(),
            put_at: Mutex::default(),
            put_latency_ms: AtomicU64::new(0),
            down: AtomicBool::new(false),
        });
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bind a loopback port");
        let port = listener.local_addr().unwrap().port();
        listener.set_nonblocking(true).unwrap();
        let task = super::runtime().spawn(listen(listener, Arc::clone(&state)));
        S3Proxy { port, state, task }
    }

    /// The bucket, reached through the proxy.
    pub fn bucket(&self) -> Bucket {
        self.state.bucket.through(&format!("http://127.0.0.1:{}", self.port))
    }

    pub fn add(&self, rule: Rule) {
        lock(&self.state.rules).push(rule);
    }

    /// Fair weather from now on.
    pub fn clear(&self) {
        lock(&self.state.rules).clear();
    }

    /// Adds this to the time of every PUT.
    pub fn put_latency(&self, latency: Duration) {
        self.state.put_latency_ms.store(latency.as_millis().try_into().unwrap(), Ordering::SeqCst);
    }

    /// Whether the store is away: every connection is broken at its next request.
    pub fn down(&self, down: bool) {
        self.state.down.store(down, Ordering::SeqCst);
    }

    /// What came by so far, in the order of the answers.
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.state.seen).clone()
    }

    /// How often a fault was met.
    pub fn faults(&self) -> usize {
        lock(&self.state.seen).iter().filter(|s| s.fault.is_some()).count()
    }
}

impl Drop for S3Proxy {
    fn drop(&mut self) {
        self.task.abort();
        self.down(true);
    }
}

async fn listen(listener: std::net::TcpListener, state: Arc<State>) {
    let listener = TcpListener::from_std(listener).expect("a listener of the runtime");
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        let _ = client.set_nodelay(true);
        let state = Arc::clone(&state);
        tokio::spawn(async move {
            let service = hyper::service::service_fn(|request| answer(Arc::clone(&state), request));
            // An error of the service is a broken connection, which is what it stands for.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(client), service).await;
        });
    }
}

async fn answer(state: Arc<State>, request: Request<Incoming>) -> std::io::Result<Response<Body>> {
    let (operation, key) = classify(&request, &state.bucket.name);
    let fault =
        if state.down.load(Ordering::SeqCst) { Some(Fault::CutRequest) } else { choose(&state, operation, &key) };
    if operation == "PUT" {
        let latency = state.put_latency_ms.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(latency)).await;
    }
    let result = perform(&state, request, fault.clone()).await;
    let status = result.as_ref().map_or(0, |r| r.status().as_u16());
    if operation == "PUT" && (200..300).contains(&status) {
        lock(&state.put_at).insert(key.clone(), Instant::now());
    }
    lock(&state.seen).push(Seen { operation, key, status, fault });
    result
}

/// The operation, and the key in the bucket (of a listing: its prefix).
fn classify(request: &Request<Incoming>, bucket: &str) -> (&'static str, String) {
    let query = request.uri().query().unwrap_or_default();
    let prefix = query.split('&').find_map(|p| p.strip_prefix("prefix=")).unwrap_or_default();
    let path = request.uri().path().trim_start_matches('/');
    let key = decode(path.strip_prefix(bucket).unwrap_or(path).trim_start_matches('/'));
    match *request.method() {
        Method::GET if query.contains("list-type=") => ("LIST", decode(prefix)),
        Method::GET => ("GET", key),
        Method::HEAD => ("HEAD", key),
        Method::PUT => ("PUT", key),
        Method::DELETE => ("DELETE", key),
        Method::POST if query.starts_with("delete") => ("DELETE", key),
        _ => ("OTHER", key),
    }
}

fn choose(state: &State, operation: &str, key: &str) -> Option<Fault> {
    for rule in lock(&state.rules).iter_mut().filter(|rule| rule.fits(operation, key)) {
        let number = rule.seen;
        rule.seen += 1;
        if number >= rule.skip && number - rule.skip < rule.times {
            return Some(rule.fault.clone());
        }
    }
    None
}

async fn perform(state: &State, request: Request<Incoming>, fault: Option<Fault>) -> std::io::Result<Response<Body>> {
    let Some(fault) = fault else { return forward(state, request).await };
    match fault {
        Fault::Delay(time) => {
            tokio::time::sleep(time).await;
            forward(state, request).await
        }
        Fault::Hang => std::future::pending().await,
        Fault::Refuse(status, code) => {
            let _ = request.into_body().collect().await;
            Ok(error(status, code))
        }
        Fault::RefuseAfterDone(status, code) => {
            forward(state, request).await?;
            Ok(error(status, code))
        }
        Fault::CutRequest => Err(cut()),
        Fault::CutReply => {
            forward(state, request).await?;
            Err(cut())
        }
        Fault::ErrorInOk => {
            let _ = request.into_body().collect().await;
            let mut answer = error(500, "InternalError");
            *answer.status_mut() = hyper::StatusCode::OK;
            Ok(answer)
        }
        Fault::Lose => {
            let _ = request.into_body().collect().await;
            let etag = "\"9e107d9d372bb6826bd81d3542a419d6\"";
            Ok(Response::builder().header("etag", etag).body(whole(Bytes::new())).unwrap())
        }
        Fault::RefuseChecksum => {
            let name = |n: &hyper::header::HeaderName| n.as_str().contains("checksum");
            if request.headers().keys().any(name) {
                Ok(error(400, "InvalidArgument"))
            } else {
                forward(state, request).await
            }
        }
        Fault::WrongEtag => {
            let mut answer = forward(state, request).await?;
            answer.headers_mut().insert("etag", "\"00000000000000000000000000000000\"".parse().unwrap());
            Ok(answer)
        }
        Fault::SlowDrip(..) | Fault::CutBody | Fault::Truncate | Fault::FlipBit | Fault::StaleList(_) => {
            let (head, body) = forward(state, request).await?.into_parts();
            let body = body.collect().await?.to_bytes();
            spoil(state, head, body, fault)
        }
    }
}

/// Faults of an answer's body.
fn spoil(
    state: &State,
    mut head: hyper::http::response::Parts,
    body: Bytes,
    fault: Fault,
) -> std::io::Result<Response<Body>> {
    let half = body.len() / 2;
    let body = match fault {
        Fault::SlowDrip(size, pause) => {
            let pieces: Vec<Bytes> = body.chunks(size.max(1)).map(Bytes::copy_from_slice).collect();
            let drip = futures::stream::unfold(pieces.into_iter(), move |mut pieces| async move {
                tokio::time::sleep(pause).await;
                pieces.next().map(|piece| (Ok(Frame::data(piece)), pieces))
            });
            BodyExt::boxed(StreamBody::new(SyncStream(Mutex::new(Box::pin(drip)))))
        }
        Fault::CutBody => {
            let pieces = [Ok(Frame::data(body.slice(..half))), Err(cut())];
            StreamBody::new(futures::stream::iter(pieces)).boxed()
        }
        Fault::Truncate => {
            head.headers.insert("content-length", half.into());
            whole(body.slice(..half))
        }
        Fault::FlipBit => {
            let mut bytes = body.to_vec();
            if let Some(byte) = bytes.get_mut(half) {
                *byte ^= 0x10;
            }
            whole(bytes.into())
        }
        Fault::StaleList(age) => {
            let text = String::from_utf8_lossy(&body).into_owned();
            head.headers.remove("content-length");
            whole(without_recent(&text, &lock(&state.put_at), age).into())
        }
        _ => whole(body),
    };
    Ok(Response::from_parts(head, body))
}

/// A listing without the keys that were put during the last `age`.
fn without_recent(listing: &str, put_at: &HashMap<String, Instant>, age: Duration) -> String {
    let mut kept = String::new();
    for (index, piece) in listing.split("<Contents>").enumerate() {
        let key = piece.split_once("<Key>").and_then(|(_, rest)| rest.split_once("</Key>")).map(|(key, _)| decode(key));
        let recent = key.and_then(|key| put_at.get(&key).map(|at| at.elapsed() < age)).unwrap_or(false);
        if index == 0 {
            kept.push_str(piece);
        } else if recent {
            kept.push_str(piece.split_once("</Contents>").map_or("", |(_, rest)| rest));
        } else {
            kept.push_str("<Contents>");
            kept.push_str(piece);
        }
    }
    kept
}

async fn forward(state: &State, request: Request<Incoming>) -> std::io::Result<Response<Body>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    let address = state.bucket.endpoint.trim_start_matches("http://");
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(std::io::Error::other)?;
    tokio::spawn(connection);
    let answer =
        sender.send_request(Request::from_parts(head, Full::new(body))).await.map_err(std::io::Error::other)?;
    let (head, body) = answer.into_parts();
    let body = body.collect().await.map_err(std::io::Error::other)?.to_bytes();
    Ok(Response::from_parts(head, whole(body)))
}

fn error(status: u16, code: &str) -> Response<Body> {
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>made by a test</Message></Error>"
    );
    Response::builder().status(status).header("content-type", "application/xml").body(whole(text.into())).unwrap()
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed()
}

fn cut() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::ConnectionReset, "cut by a test")
}

/// Percent-decoding.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let hex = after.get(..2).and_then(|h| std::str::from_utf8(h).ok()).and_then(|h| u8::from_str_radix(h, 16).ok());
        match hex {
            Some(byte) if *first == b'%' => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A stream that may be shared, as a boxed body must be; it is polled through `&mut` alone.
struct SyncStream<S>(Mutex<std::pin::Pin<Box<S>>>);

impl<S: futures::Stream> futures::Stream for SyncStream<S> {
    type Item = S::Item;

    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        let stream = self.get_mut().0.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        stream.as_mut().poll_next(context)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
