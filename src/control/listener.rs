//! `/metrics` and `/health` over HTTP on a loopback address.
//!
//! Nothing there changes anything, and nothing there is secret to who has an account on this host. Bounds as those of the
//! control socket: [`CONNECTIONS_MAX`] at a time, one request each, [`REQUEST_TIME_MAX`].

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::metrics;
use crate::daemon::handle::Handle;
use crate::daemon::jobs::Jobs;
use crate::daemon::snapshot::State;
use crate::error::{Code, Failure};

const CONNECTIONS_MAX: usize = 8;
const HEAD_BYTES_MAX: usize = 16 * 1024;
const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);
/// A task that makes no progress for so long is not healthy.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Pause after an accept that failed (no file descriptor left, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// A bound address, not served yet.
#[derive(Debug)]
pub struct Listener {
    listener: TcpListener,
}

impl Listener {
    /// # Errors
    /// When the address cannot be bound.
    pub fn bind(address: SocketAddr) -> Result<Listener, Failure> {
        let bound = std::net::TcpListener::bind(address).and_then(|listener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        });
        let listener = bound.map_err(|error| {
            Failure::new(Code::Host, format!("serve metrics at {address}: {error}"))
                .hint("`metrics_listen` names another port, or none.")
        })?;
        info!(%address, "metrics are served");
        Ok(Listener { listener })
    }

    /// Answers until `cancel` fires.
    ///
    /// Cancel safety: dropping this future closes every connection.
    pub async fn run(self, handle: Handle, jobs: Jobs, cancel: CancellationToken) {
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
                    let (handle, jobs) = (handle.clone(), jobs.clone());
                    connections.spawn(async move {
                        let _place = place;
                        serve(stream, handle, jobs).await;
                    });
                }
                Err(error) => {
                    debug!(%error, "accept a connection for metrics: failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        connections.shutdown().await;
    }
}

async fn serve(stream: TcpStream, handle: Handle, jobs: Jobs) {
    let service = service_fn(move |request: Request<Incoming>| {
        let reply = answer(&request, &handle, &jobs);
        async move { Ok::<_, Infallible>(reply) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(HEAD_BYTES_MAX)
        .timer(TokioTimer::new())
        .header_read_timeout(REQUEST_TIME_MAX)
        .serve_connection(TokioIo::new(stream), service);
    // Whoever does not read in time is cut off.
    if let Ok(Err(error)) = tokio::time::timeout(REQUEST_TIME_MAX, connection).await {
        debug!(%error, "a connection for metrics ended");
    }
}

fn answer(request: &Request<Incoming>, handle: &Handle, jobs: &Jobs) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return reply(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned());
    }
    match request.uri().path() {
        "/metrics" => reply(StatusCode::OK, metrics::render(&handle.snapshot(), &jobs.counts())),
        "/health" => health(handle),
        _ => reply(StatusCode::NOT_FOUND, "there are /metrics and /health\n".to_owned()),
    }
}

/// Whether the daemon works; whether environments are protected is what metrics and `status` say.
fn health(handle: &Handle) -> Response<Full<Bytes>> {
    let silent = handle.silent(SILENCE_MAX);
    if !silent.is_empty() {
        let text = format!("tasks that make no progress: {}\n", silent.join(", "));
        return reply(StatusCode::SERVICE_UNAVAILABLE, text);
    }
    let environments = handle.snapshot().environments;
    let protected = environments.iter().filter(|environment| environment.state == State::Protected).count();
    reply(StatusCode::OK, format!("ok: {protected} of {} environments are protected\n", environments.len()))
}

fn reply(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = status;
    let plain = header::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}
