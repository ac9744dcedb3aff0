//! Asks the running service.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use super::protocol::{ErrorReply, JobReport, Status};
use super::server::{POSTGRESQL, REPEAT_EVERY};
use crate::error::{Code, Failure};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Planning may read much; the daemon answers at once or says why not.
const REPLY_TIMEOUT: Duration = Duration::from_secs(120);
const REPLY_BYTES_MAX: usize = 16 << 20;
const LINE_BYTES_MAX: usize = 4 << 20;

/// A daemon, by its socket.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum ClientError {
    /// Nobody listens: there is no daemon.
    NoDaemon(Failure),
    /// The daemon answered so, or did not answer properly.
    Failed(Failure),
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Failure {
        match error {
            ClientError::NoDaemon(failure) | ClientError::Failed(failure) => failure,
        }
    }
}

impl Client {
    pub fn new(path: &Path) -> Self {
        Client { path: path.to_path_buf() }
    }

    pub async fn status(&self) -> Result<Status, ClientError> {
        self.ask(Method::GET, "/v1/status", None).await
    }

    /// Sends a request and reads its document.
    pub async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<T, ClientError> {
        let response = self.send(method, path, body).await?;
        self.document(response).await
    }

    /// Follows a job and hands every change to `show`; returns the final state. Dropping this future does not end the job.
    pub async fn follow(&self, job: &str, mut show: impl FnMut(&JobReport)) -> Result<JobReport, ClientError> {
        let response = self.send(Method::GET, &format!("/v1/jobs/{job}/follow"), None).await?;
        let mut body = response.into_body();
        let mut pending: Vec<u8> = Vec::new();
        loop {
            let frame = tokio::time::timeout(REPEAT_EVERY * 4, body.frame()).await;
            let frame = frame.map_err(|_| self.failed("the daemon went silent"))?;
            let Some(frame) = frame else { return Err(self.failed("the daemon ended before the job did")) };
            let frame = frame.map_err(|error| self.failed(error))?;
            pending.extend_from_slice(frame.data_ref().map_or(&[], |data| data.as_ref()));
            while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let report: JobReport = serde_json::from_slice(&line).map_err(|error| self.failed(error))?;
                show(&report);
                if report.is_final {
                    return Ok(report);
                }
            }
            if pending.len() > LINE_BYTES_MAX {
                return Err(self.failed("a line of the answer is too long"));
            }
        }
    }

    /// A connection to PostgreSQL through the daemon.
    pub async fn connect(&self, path: &str) -> Result<TokioIo<Upgraded>, ClientError> {
        let request = Request::builder().method(Method::POST).uri(path).header("host", "pgrecall");
        let request = request.header(header::CONNECTION, "upgrade").header(header::UPGRADE, POSTGRESQL);
        let response = self.exchange(request.body(Full::default())).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.failed("it does not pass the connection on"));
        }
        let upgraded = tokio::time::timeout(REPLY_TIMEOUT, hyper::upgrade::on(response)).await;
        let upgraded = upgraded.map_err(|_| self.failed("it does not pass the connection on"))?;
        upgraded.map(TokioIo::new).map_err(|error| self.failed(error))
    }

    async fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Response<Incoming>, ClientError> {
        let content = body.map(ToString::to_string).unwrap_or_default();
        let request = Request::builder().method(method).uri(path).header("host", "pgrecall");
        self.exchange(request.body(Full::new(Bytes::from(content)))).await
    }

    async fn exchange(
        &self,
        request: Result<Request<Full<Bytes>>, hyper::http::Error>,
    ) -> Result<Response<Incoming>, ClientError> {
        let request = request.map_err(|error| self.failed(error))?;
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(&self.path)).await;
        let stream = stream.map_err(|_| self.failed("the daemon does not accept the connection"))?;
        let stream = stream.map_err(|error| self.no_daemon(&error))?;
        let exchange = async {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            // Ends when the response has been read or dropped.
            tokio::spawn(connection.with_upgrades());
            sender.send_request(request).await
        };
        let response = tokio::time::timeout(REPLY_TIMEOUT, exchange).await;
        let response = response.map_err(|_| self.failed("the daemon does not answer"))?;
        let response = response.map_err(|error| self.failed(error))?;
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let reply: ErrorReply = self.document(response).await?;
        Err(ClientError::Failed(reply.error))
    }

    async fn document<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, ClientError> {
        let body = http_body_util::Limited::new(response.into_body(), REPLY_BYTES_MAX).collect();
        let body = tokio::time::timeout(REPLY_TIMEOUT, body).await;
        let body = body.map_err(|_| self.failed("the answer does not end"))?.map_err(|error| self.failed(error))?;
        serde_json::from_slice(&body.to_bytes()).map_err(|error| self.failed(error))
    }

    fn failed(&self, why: impl std::fmt::Display) -> ClientError {
        let message = format!("ask the daemon at {}: {why}", self.path.display());
        ClientError::Failed(Failure::new(Code::Internal, message).retryable())
    }

    fn no_daemon(&self, error: &std::io::Error) -> ClientError {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        let failure = Failure::new(Code::Host, format!("reach the daemon at {}: {error}", self.path.display()));
        if matches!(error.kind(), NotFound | ConnectionRefused) {
            return ClientError::NoDaemon(failure.retryable().hint("No daemon runs here: start `pgrecall daemon`."));
        }
        ClientError::Failed(failure.hint("Run the command as the daemon's user, for example with sudo -u postgres."))
    }
}
