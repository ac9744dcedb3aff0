//! From the startup message to the first ReadyForQuery.
//!
//! Source: PostgreSQL documentation "Message Flow: Start-up"; `src/interfaces/libpq/fe-auth.c`, 14–18.

use bytes::Bytes;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use postgres_protocol::message::frontend;

use crate::util::secret::Secret;

use super::ReplicationError;
use super::ServerMessage;
use super::connection::{Halves, Parameters};
use super::conninfo::ChannelBindingMode;
use super::error::Doing;
use super::wire::Cursor;

const SCRAM: &str = "SCRAM-SHA-256";
const SCRAM_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// Who we are, and how we may prove it.
pub(super) struct Identity<'a> {
    pub(super) user: &'a str,
    pub(super) password: Option<Secret>,
    pub(super) channel_binding: ChannelBindingMode,
    /// The hash of the server's certificate; `None` without TLS.
    pub(super) end_point: Option<Vec<u8>>,
}

/// What the server told about itself on the way.
#[derive(Default)]
pub(super) struct Welcome {
    pub(super) parameters: Parameters,
    pub(super) backend_pid: i32,
}

/// Answers what the server asks until it is ready for a command.
pub(super) async fn authenticate(io: &mut Halves, identity: &Identity<'_>) -> Result<Welcome, ReplicationError> {
    let mut welcome = Welcome::default();
    let mut bound = false;
    loop {
        let frame = io.reader.next().await?;
        match frame.tag {
            b'R' => match Request::decode(frame.body)? {
                Request::Ok if identity.channel_binding == ChannelBindingMode::Require && !bound => {
                    return Err(refused("channel_binding=require, but the server did not ask for a bound SCRAM"));
                }
                Request::Ok => io.reader.trust(),
                Request::Cleartext => send_password(io, identity, |password| password.to_owned()).await?,
                Request::Md5(salt) => {
                    let user = identity.user.as_bytes();
                    send_password(io, identity, |password| md5_hash(user, password.as_bytes(), salt)).await?;
                }
                Request::Sasl(mechanisms) => bound = scram(io, identity, &mechanisms).await?,
                Request::Other(kind) => {
                    return Err(refused(format!("the server asks for method {kind}, which is not supported")));
                }
            },
            b'S' => welcome.parameters.update(frame.body)?,
            b'K' => welcome.backend_pid = Cursor::new(frame.body).i32()?,
            b'Z' => return Ok(welcome),
            b'E' => {
                let message = ServerMessage::decode(frame.body);
                return Err(ReplicationError::from_server(Doing::Starting, message));
            }
            // A notice, or the server offers an older protocol than 3.0: neither matters.
            b'N' | b'v' => {}
            tag => return Err(unexpected(tag)),
        }
    }
}

/// What an authentication message asks for.
enum Request {
    Ok,
    Cleartext,
    Md5([u8; 4]),
    Sasl(Vec<String>),
    Other(i32),
}

impl Request {
    fn decode(body: Bytes) -> Result<Request, ReplicationError> {
        let mut cursor = Cursor::new(body);
        Ok(match cursor.i32()? {
            0 => Request::Ok,
            3 => Request::Cleartext,
            5 => Request::Md5([cursor.u8()?, cursor.u8()?, cursor.u8()?, cursor.u8()?]),
            10 => {
                let mut mechanisms = Vec::new();
                loop {
                    match cursor.cstr()? {
                        end if end.is_empty() => break,
                        mechanism => mechanisms.push(mechanism),
                    }
                }
                Request::Sasl(mechanisms)
            }
            other => Request::Other(other),
        })
    }
}

async fn send_password(
    io: &mut Halves,
    identity: &Identity<'_>,
    form: impl FnOnce(&str) -> String,
) -> Result<(), ReplicationError> {
    if identity.channel_binding == ChannelBindingMode::Require {
        return Err(refused("channel_binding=require, but the server asks for a password without SCRAM"));
    }
    let answer = Secret::new(form(password(identity)?));
    frontend::password_message(answer.expose().as_bytes(), &mut io.writer.queue)?;
    io.writer.flush().await
}

fn password<'a>(identity: &'a Identity<'_>) -> Result<&'a str, ReplicationError> {
    let missing = || refused(format!("the server asks for the password of {}, and none is configured", identity.user));
    identity.password.as_ref().map(Secret::expose).ok_or_else(missing)
}

/// SCRAM-SHA-256; says whether it was bound to the TLS channel.
async fn scram(io: &mut Halves, identity: &Identity<'_>, offered: &[String]) -> Result<bool, ReplicationError> {
    let has = |name: &str| offered.iter().any(|offer| offer == name);
    let wanted = identity.channel_binding != ChannelBindingMode::Disable;
    let (mechanism, binding) = match &identity.end_point {
        Some(hash) if wanted && has(SCRAM_PLUS) => (SCRAM_PLUS, ChannelBinding::tls_server_end_point(hash.clone())),
        // "We could, you did not offer": the server notices when somebody between us removed the offer.
        Some(_) if wanted && has(SCRAM) => (SCRAM, ChannelBinding::unrequested()),
        _ if has(SCRAM) => (SCRAM, ChannelBinding::unsupported()),
        _ => return Err(refused(format!("the server offers only {}", offered.join(", ")))),
    };
    let bound = mechanism == SCRAM_PLUS;
    if identity.channel_binding == ChannelBindingMode::Require && !bound {
        return Err(refused("channel_binding=require, but the connection has no TLS or the server cannot bind"));
    }
    let mut exchange = ScramSha256::new(password(identity)?.as_bytes(), binding);
    frontend::sasl_initial_response(mechanism, exchange.message(), &mut io.writer.queue)?;
    io.writer.flush().await?;
    let challenge = sasl_reply(io, 11).await?;
    exchange.update(&challenge).map_err(scram_failed)?;
    frontend::sasl_response(exchange.message(), &mut io.writer.queue)?;
    io.writer.flush().await?;
    let proof = sasl_reply(io, 12).await?;
    // The server proves here that it knows the password too.
    exchange.finish(&proof).map_err(scram_failed)?;
    Ok(bound)
}

async fn sasl_reply(io: &mut Halves, kind: i32) -> Result<Bytes, ReplicationError> {
    loop {
        let frame = io.reader.next().await?;
        match frame.tag {
            b'R' => {
                let mut cursor = Cursor::new(frame.body);
                let found = cursor.i32()?;
                if found != kind {
                    return Err(ReplicationError::protocol(format!("SASL step {found} instead of {kind}")));
                }
                return Ok(cursor.rest());
            }
            b'E' => {
                let message = ServerMessage::decode(frame.body);
                return Err(ReplicationError::from_server(Doing::Starting, message));
            }
            b'N' => {}
            tag => return Err(unexpected(tag)),
        }
    }
}

fn scram_failed(e: std::io::Error) -> ReplicationError {
    refused(format!("SCRAM: {e}"))
}

fn refused(text: impl Into<String>) -> ReplicationError {
    ReplicationError::AuthenticationRefused(text.into())
}

fn unexpected(tag: u8) -> ReplicationError {
    ReplicationError::protocol(format!("message '{}' during authentication", char::from(tag).escape_default()))
}
