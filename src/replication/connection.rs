//! A connection: dialled, secured, authenticated, and between commands.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf, ReadHalf, WriteHalf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tracing::debug;

use super::auth::{self, Identity, Welcome};
use super::conninfo::{ConnectConfig, Host, HostAddress, SslMode};
use super::error::Doing;
use super::wire::{Cursor, FrameReader, FrameWriter, decode_row};
use super::{ReplicationError, ServerMessage, tls, x509};
use crate::pg::Major;

/// A peer that is gone without a word is noticed after about 30 s + 3 × 10 s of silence.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_COUNT: u32 = 3;
/// Sent bytes that nobody acknowledges for so long end the connection.
const TCP_USER_TIMEOUT_MS: u32 = 60_000;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose<'a> {
    Replication,
    /// Ordinary queries in this database.
    Sql(&'a str),
}

/// The bytes below the messages.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
    #[cfg(test)]
    Memory(tokio::io::DuplexStream),
}

#[derive(Debug)]
pub(super) struct Halves {
    pub(super) reader: FrameReader<ReadHalf<Socket>>,
    pub(super) writer: FrameWriter<WriteHalf<Socket>>,
}

/// What the server reports about itself, kept up to date by its ParameterStatus messages.
#[derive(Debug, Clone, Default)]
pub(super) struct Parameters(HashMap<String, String>);

/// The rows of one statement, as text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rows {
    pub columns: Vec<String>,
    /// `None` is NULL.
    pub rows: Vec<Vec<Option<Bytes>>>,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) io: Halves,
    pub(super) parameters: Parameters,
    pub(super) backend_pid: i32,
    /// A command has been sent whose answer nobody has read to its end.
    pub(super) busy: bool,
}

impl Connection {
    /// Dials one host, in the order of attempts that its `sslmode` asks for.
    pub(super) async fn open(
        config: &ConnectConfig,
        host_index: usize,
        purpose: Purpose<'_>,
    ) -> Result<Connection, ReplicationError> {
        let host = config.host(host_index)?;
        let tcp = matches!(host.address, HostAddress::Tcp(_));
        let (first, second) = match config.sslmode {
            _ if !tcp => (Secure::No, None),
            SslMode::Disable => (Secure::No, None),
            SslMode::Allow => (Secure::No, Some(Secure::Must)),
            SslMode::Prefer => (Secure::IfOffered, Some(Secure::No)),
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => (Secure::Must, None),
        };
        let attempt = |secure| attempt(config, host, purpose, secure);
        let found = match (attempt(first).await, second) {
            (Err(e), Some(second)) if worth_second_attempt(&e) => match attempt(second).await {
                Ok(connection) => Ok(connection),
                // The first refusal is the one that the operator's settings are about.
                Err(_) => Err(e),
            },
            (result, _) => result,
        }?;
        debug!(host = %host, pid = found.backend_pid, "connected");
        Ok(found)
    }

    /// Sends a command; whoever reads its ReadyForQuery clears `busy`.
    pub(super) async fn send_query(&mut self, sql: &str) -> Result<(), ReplicationError> {
        if self.busy {
            // A dropped future or a time-out left an answer behind; it would be taken for this command's.
            return Err(ReplicationError::protocol("an earlier command on this connection was given up"));
        }
        self.busy = true;
        frontend::query(sql, &mut self.io.writer.queue)?;
        self.io.writer.flush().await
    }

    /// As [`Connection::query`], with an end.
    pub(super) async fn query_within(&mut self, sql: &str, limit: Duration) -> Result<Vec<Rows>, ReplicationError> {
        match tokio::time::timeout(limit, self.query(sql)).await {
            Ok(result) => result,
            Err(_) => {
                let text = format!("no answer within {} s", limit.as_secs());
                Err(io::Error::new(io::ErrorKind::TimedOut, text).into())
            }
        }
    }

    /// Runs one command, or several, by the simple protocol; the rows of each that has some.
    pub(super) async fn query(&mut self, sql: &str) -> Result<Vec<Rows>, ReplicationError> {
        self.send_query(sql).await?;
        let mut results = Vec::new();
        let mut current: Option<Rows> = None;
        let mut failure = None;
        loop {
            let frame = self.io.reader.next().await?;
            match frame.tag {
                b'T' => current = Some(Rows::with_columns(frame.body)?),
                b'D' => {
                    let rows =
                        current.as_mut().ok_or_else(|| ReplicationError::protocol("a row before its columns"))?;
                    rows.rows.push(decode_row(frame.body)?);
                }
                b'C' => results.extend(current.take()),
                b'I' => {}
                b'Z' => {
                    self.busy = false;
                    return failure.map_or(Ok(results), Err);
                }
                b'E' => failure = Some(self.failure(frame.body, Doing::Command)?),
                tag => self.passing(tag, frame.body)?,
            }
        }
    }

    /// An ErrorResponse: returned as an error at once when the connection ends with it.
    pub(super) fn failure(&self, body: Bytes, doing: Doing) -> Result<ReplicationError, ReplicationError> {
        let message = ServerMessage::decode(body);
        let last = matches!(message.severity.as_str(), "FATAL" | "PANIC");
        let error = ReplicationError::from_server(doing, message);
        if last { Err(error) } else { Ok(error) }
    }

    /// Messages that may come at any time.
    pub(super) fn passing(&mut self, tag: u8, body: Bytes) -> Result<(), ReplicationError> {
        match tag {
            b'S' => self.parameters.update(body),
            b'N' => {
                debug!(notice = %ServerMessage::decode(body), "server notice");
                Ok(())
            }
            b'A' => Ok(()),
            tag => {
                Err(ReplicationError::protocol(format!("unexpected message '{}'", char::from(tag).escape_default())))
            }
        }
    }

    /// A parameter that the server reports by itself.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name)
    }

    /// Says good-bye; a server that is gone already is none the worse for it.
    pub(super) async fn terminate(mut self) {
        frontend::terminate(&mut self.io.writer.queue);
        let _ = self.io.writer.flush().await;
    }
}

/// libpq tries the other way only when TLS or the server's access rules refused the first.
fn worth_second_attempt(e: &ReplicationError) -> bool {
    match e {
        ReplicationError::Tls { .. } => true,
        ReplicationError::Authentication(message) => message.sqlstate == "28000",
        _ => false,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Secure {
    No,
    IfOffered,
    Must,
}

async fn attempt(
    config: &ConnectConfig,
    host: &Host,
    purpose: Purpose<'_>,
    secure: Secure,
) -> Result<Connection, ReplicationError> {
    let seconds = config.connect_timeout.as_secs();
    match tokio::time::timeout(config.connect_timeout, establish(config, host, purpose, secure)).await {
        Ok(result) => result,
        Err(_) => Err(ReplicationError::ConnectTimeout { host: host.to_string(), seconds }),
    }
}

async fn establish(
    config: &ConnectConfig,
    host: &Host,
    purpose: Purpose<'_>,
    secure: Secure,
) -> Result<Connection, ReplicationError> {
    let unreachable = |source| ReplicationError::Unreachable { host: host.to_string(), source };
    let (socket, end_point) = match (&host.address, host.socket_path()) {
        (_, Some(path)) => (dial_local(&path).await.map_err(unreachable)?, None),
        (HostAddress::Tcp(name), _) => {
            let stream = TcpStream::connect((name.as_str(), host.port)).await.map_err(unreachable)?;
            tune(&stream).map_err(unreachable)?;
            match secure {
                Secure::No => (Socket::Tcp(stream), None),
                _ => start_tls(config, name, stream, secure == Secure::Must).await?,
            }
        }
        (HostAddress::Socket(_), None) => return Err(ReplicationError::protocol("a socket without a path")),
    };
    // For the password file, a replication connection's database is "replication".
    let database = if let Purpose::Sql(database) = purpose { database } else { "replication" };
    let identity = Identity {
        user: &config.user,
        password: config.password_for(host, database)?,
        channel_binding: config.channel_binding,
        end_point,
    };
    let (reader, writer) = tokio::io::split(socket);
    let mut io = Halves { reader: FrameReader::new(reader), writer: FrameWriter::new(writer) };
    send_startup(&mut io, config, purpose).await?;
    let Welcome { parameters, backend_pid } = auth::authenticate(&mut io, &identity).await?;
    Ok(Connection { io, parameters, backend_pid, busy: false })
}

async fn dial_local(path: &Path) -> io::Result<Socket> {
    #[cfg(test)]
    if let Some(dialled) = super::testing::dial(path) {
        return dialled.map(Socket::Memory);
    }
    UnixStream::connect(path).await.map(Socket::Unix)
}

async fn send_startup(io: &mut Halves, config: &ConnectConfig, purpose: Purpose<'_>) -> Result<(), ReplicationError> {
    let mut settings = vec![("user", config.user.as_str()), ("client_encoding", "UTF8")];
    match purpose {
        Purpose::Replication => settings.push(("replication", "true")),
        Purpose::Sql(database) => settings.push(("database", database)),
    }
    settings.extend(config.application_name.as_deref().map(|name| ("application_name", name)));
    // Texts that we read back must not depend on what the role or the database has set.
    settings.extend([("datestyle", "ISO, MDY"), ("TimeZone", "UTC"), ("extra_float_digits", "2")]);
    frontend::startup_message(settings, &mut io.writer.queue)?;
    io.writer.flush().await
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT)?;
    sockopt::set_tcp_user_timeout(stream, TCP_USER_TIMEOUT_MS)?;
    Ok(())
}

/// Asks for TLS; a server that has none is fine unless it `must` be.
async fn start_tls(
    config: &ConnectConfig,
    host: &str,
    mut stream: TcpStream,
    must: bool,
) -> Result<(Socket, Option<Vec<u8>>), ReplicationError> {
    let failed = |reason: String| ReplicationError::Tls { host: host.to_owned(), reason };
    let tls = tls::client_config(config, host).map_err(failed)?;
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await?;
    // Exactly one byte: what a man in the middle put behind it would be taken for the server's first encrypted words.
    match stream.read_u8().await? {
        b'S' => {}
        b'N' if must => return Err(failed("the server has no TLS".to_owned())),
        b'N' => return Ok((Socket::Tcp(stream), None)),
        // An error from before the server knew TLS, or from a server that cannot start a process.
        b'E' if must => return Err(failed("the server refused the request for TLS".to_owned())),
        other => return Err(failed(format!("the server answered {other:#04x} to the request for TLS"))),
    }
    let name = tls::server_name(host);
    let stream = TlsConnector::from(tls).connect(name, stream).await.map_err(|e| failed(e.to_string()))?;
    let (_, session) = stream.get_ref();
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let end_point = certificate.and_then(|certificate| x509::end_point_hash(certificate));
    Ok((Socket::Tls(Box::new(stream)), end_point))
}

impl Parameters {
    /// Takes a ParameterStatus.
    pub(super) fn update(&mut self, body: Bytes) -> Result<(), ReplicationError> {
        let mut cursor = Cursor::new(body);
        let name = cursor.cstr()?;
        self.0.insert(name, cursor.cstr()?);
        Ok(())
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// From `server_version`, such as `18.4 (Debian 18.4-1)` or `19devel`.
    pub(super) fn major(&self) -> Result<Major, ReplicationError> {
        let version = self.get("server_version").unwrap_or_default();
        let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
        let wrong = |_| ReplicationError::protocol(format!("server_version is {version:?}"));
        digits.parse().map(Major).map_err(wrong)
    }
}

impl Rows {
    /// From a RowDescription.
    pub(super) fn with_columns(body: Bytes) -> Result<Rows, ReplicationError> {
        let mut cursor = Cursor::new(body);
        let mut rows = Rows::default();
        for _ in 0..cursor.u16()? {
            rows.columns.push(cursor.cstr()?);
            // Table, column number, type, its length and modifier, format.
            cursor.bytes(18)?;
        }
        Ok(rows)
    }

    /// The value of a column of a row; `None` when it is NULL or not there.
    pub fn text(&self, row: usize, column: &str) -> Option<String> {
        let index = self.columns.iter().position(|name| name == column)?;
        let value = self.rows.get(row)?.get(index)?.as_ref()?;
        Some(String::from_utf8_lossy(value).into_owned())
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Socket::Tls(stream) => Pin::new(stream.as_mut()).poll_read(cx, buf),
            #[cfg(test)]
            Socket::Memory(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Socket::Tls(stream) => Pin::new(stream.as_mut()).poll_write(cx, bytes),
            #[cfg(test)]
            Socket::Memory(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Socket::Tls(stream) => Pin::new(stream.as_mut()).poll_flush(cx),
            #[cfg(test)]
            Socket::Memory(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Tls(stream) => Pin::new(stream.as_mut()).poll_shutdown(cx),
            #[cfg(test)]
            Socket::Memory(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
