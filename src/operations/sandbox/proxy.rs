//! A person's connection to a sandbox.
//!
//! The socket of a sandbox trusts whoever reaches it, and only the daemon's user does. What comes over the control socket is
//! let in here as one role: the packet that names the user is read, checked and written anew ([`super::startup`]); after it
//! bytes pass as they are. Memory: two buffers of [`BUFFER_BYTES`] a connection.

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use super::record::{Record, State};
use super::startup::{self, Packet, PacketError, Startup};
use crate::error::Failure;

const BUFFER_BYTES: usize = 32 << 10;
/// As PostgreSQL's `authentication_timeout`.
const STARTUP_LIMIT: Duration = Duration::from_secs(60);
/// A server that was told that its client is gone says its last within this time.
const END_LIMIT: Duration = Duration::from_secs(5);

/// As whom a person comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// As the role that was made for people.
    Role,
    /// As a superuser of the cluster: for administrators who asked for it.
    Superuser,
}

/// What passed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    pub from_client_bytes: u64,
    pub from_server_bytes: u64,
}

/// Why a connection did not come about. The client was told.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("the client sent {0}")]
    Packet(#[from] PacketError),
    #[error("the client asked twice for encryption")]
    EncryptionAgain,
    #[error("the client asked for user {asked:?}, where it may be {allowed}")]
    OtherUser { asked: String, allowed: String },
    #[error("the sandbox is {0}")]
    NotRunning(String),
    #[error("reach the server of the sandbox: {0}")]
    Server(io::Error),
    #[error("hear from the client: {0}")]
    Client(io::Error),
}

impl Entry {
    /// The name of the user; `None` while it is not known.
    pub fn user(self, record: &Record) -> Option<&str> {
        match self {
            Entry::Role => Some(&record.role),
            Entry::Superuser => record.superuser.as_deref(),
        }
    }
}

impl ProxyError {
    fn response(&self) -> Bytes {
        let message = self.to_string();
        match self {
            ProxyError::Packet(_) | ProxyError::EncryptionAgain => startup::error_response("08P01", &message, ""),
            ProxyError::OtherUser { allowed, .. } => {
                let hint = format!("Connect as {allowed}, or with `pgrecall sandbox connect`, which does.");
                startup::error_response("28000", &message, &hint)
            }
            ProxyError::NotRunning(_) | ProxyError::Server(_) => {
                startup::error_response("57P03", &message, "`pgrecall sandbox list` says how it stands.")
            }
            ProxyError::Client(_) => Bytes::new(),
        }
    }
}

/// A failure as PostgreSQL would say it, for a client that gets no further.
pub fn refusal(failure: &Failure) -> Bytes {
    let hint = failure.hint.as_deref().unwrap_or_default();
    startup::error_response("57P03", &format!("failed to {failure}"), hint)
}

/// Serves one connection of a client, to its end.
///
/// Cancel safety: dropping this future ends both sides.
///
/// # Errors
/// When no session came about; one that breaks later is no error.
pub async fn proxy<S>(mut client: S, record: &Record, entry: Entry) -> Result<Traffic, ProxyError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match open(&mut client, record, entry).await {
        Ok(server) => Ok(pass(client, server).await),
        Err(error) => {
            // A client that is gone does not hear it; nothing is lost by that.
            let _ = client.write_all(&error.response()).await;
            let _ = client.shutdown().await;
            Err(error)
        }
    }
}

async fn open<S>(client: &mut S, record: &Record, entry: Entry) -> Result<UnixStream, ProxyError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let begun = tokio::time::timeout(STARTUP_LIMIT, read_first(client)).await;
    let packet = begun.map_err(|_| ProxyError::Client(io::ErrorKind::TimedOut.into()))??;
    let packet = match packet {
        First::Cancel(packet) => packet,
        First::Startup(startup) => {
            let allowed = match (record.state, entry.user(record)) {
                (State::Running, Some(user)) => user,
                (state, _) => return Err(ProxyError::NotRunning(state.as_str().to_owned())),
            };
            if startup.user != allowed.as_bytes() {
                let asked = String::from_utf8_lossy(&startup.user).chars().take(80).collect();
                return Err(ProxyError::OtherUser { asked, allowed: allowed.to_owned() });
            }
            startup.encode()
        }
    };
    let path = record.socket_directory.join(format!(".s.PGSQL.{}", record.port));
    let mut server = UnixStream::connect(path).await.map_err(ProxyError::Server)?;
    server.write_all(&packet).await.map_err(ProxyError::Server)?;
    Ok(server)
}

enum First {
    Cancel(Bytes),
    Startup(Startup),
}

/// The packet that counts; questions for encryption before it, one for each kind, are answered with no.
async fn read_first<S>(client: &mut S) -> Result<First, ProxyError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    const ENCRYPTIONS_MAX: usize = 2;
    for _ in 0..=ENCRYPTIONS_MAX {
        match startup::parse(&read_packet(client).await?)? {
            Packet::Cancel(packet) => return Ok(First::Cancel(packet)),
            Packet::Startup(startup) => return Ok(First::Startup(startup)),
            Packet::Encryption => client.write_all(b"N").await.map_err(ProxyError::Client)?,
        }
        client.flush().await.map_err(ProxyError::Client)?;
    }
    Err(ProxyError::EncryptionAgain)
}

async fn read_packet<S: AsyncRead + Unpin>(client: &mut S) -> Result<Bytes, ProxyError> {
    let mut head = [0; 4];
    client.read_exact(&mut head).await.map_err(ProxyError::Client)?;
    let length = startup::length(head)?;
    let mut packet = BytesMut::zeroed(length);
    let (first, rest) = packet.split_at_mut(head.len());
    first.copy_from_slice(&head);
    client.read_exact(rest).await.map_err(ProxyError::Client)?;
    Ok(packet.freeze())
}

/// Passes bytes both ways. When the server ends, so does everything; when the client does, the server is given a moment for
/// its last words.
async fn pass<S: AsyncRead + AsyncWrite + Unpin>(client: S, server: UnixStream) -> Traffic {
    let (client_reader, client_writer) = tokio::io::split(client);
    let (server_reader, server_writer) = server.into_split();
    let mut traffic = Traffic::default();
    {
        let mut to_server = std::pin::pin!(pump(client_reader, server_writer, &mut traffic.from_client_bytes));
        let mut to_client = std::pin::pin!(pump(server_reader, client_writer, &mut traffic.from_server_bytes));
        let client_is_gone = tokio::select! {
            () = &mut to_client => false,
            () = &mut to_server => true,
        };
        if client_is_gone {
            let _ = tokio::time::timeout(END_LIMIT, to_client).await;
        }
    }
    traffic
}

/// Until the reader ends or either side breaks; then the writer is told.
async fn pump(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, bytes: &mut u64) {
    let mut buffer = BytesMut::with_capacity(BUFFER_BYTES);
    loop {
        buffer.clear();
        match from.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => break,
            Ok(count) => *bytes = bytes.saturating_add(u64::try_from(count).unwrap_or(u64::MAX)),
        }
        let written = async {
            to.write_all(&buffer).await?;
            to.flush().await
        };
        if written.await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
