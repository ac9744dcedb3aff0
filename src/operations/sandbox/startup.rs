//! The first packet of a connection to PostgreSQL, read strictly and written anew.
//!
//! What the server gets is never what the client sent, but what was understood of it: the two cannot read it differently.
//!
//! Source: `pqcomm.h` (`ProtocolVersion`, `CancelRequestPacket`), `backend_startup.c` and `postmaster.c`
//! (`ProcessStartupPacket`), 14–18.

use bytes::{BufMut, Bytes, BytesMut};

/// As PostgreSQL's own limit (`MAX_STARTUP_PACKET_LENGTH`).
pub const PACKET_BYTES_MAX: usize = 10_000;
/// Length and code.
const HEADER_BYTES: usize = 8;

const CANCEL_CODE: u32 = 80_877_102;
const SSL_CODE: u32 = 80_877_103;
const GSS_CODE: u32 = 80_877_104;

/// What a client begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// Asks for TLS or for GSSAPI; both are answered with `N`.
    Encryption,
    /// To be passed on as it is.
    Cancel(Bytes),
    Startup(Startup),
}

/// A session that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Startup {
    /// Major in the upper half, minor in the lower.
    pub version: u32,
    pub user: Vec<u8>,
    /// Names and values, without the user.
    parameters: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Why a packet is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PacketError {
    #[error("a first packet of {0} bytes (8 to {PACKET_BYTES_MAX})")]
    Length(u32),
    #[error("protocol version {}.{}, where 3.0 to 3.2 are known", .0 >> 16, .0 & 0xFFFF)]
    Version(u32),
    #[error("a first packet that does not end after its parameters")]
    Layout,
    #[error("no user in the first packet")]
    NoUser,
    #[error("two users in the first packet")]
    TwoUsers,
}

/// The length of the whole packet, from its first four bytes.
pub fn length(head: [u8; 4]) -> Result<usize, PacketError> {
    let length = u32::from_be_bytes(head);
    let bytes = usize::try_from(length).unwrap_or(usize::MAX);
    if (HEADER_BYTES..=PACKET_BYTES_MAX).contains(&bytes) { Ok(bytes) } else { Err(PacketError::Length(length)) }
}

/// Reads a whole packet, its length included.
pub fn parse(packet: &Bytes) -> Result<Packet, PacketError> {
    let (_, rest) = packet.split_first_chunk::<4>().ok_or(PacketError::Layout)?;
    let (code, body) = rest.split_first_chunk::<4>().ok_or(PacketError::Layout)?;
    match u32::from_be_bytes(*code) {
        SSL_CODE | GSS_CODE if body.is_empty() => Ok(Packet::Encryption),
        SSL_CODE | GSS_CODE => Err(PacketError::Layout),
        CANCEL_CODE => Ok(Packet::Cancel(packet.clone())),
        version if version >> 16 == 3 => Ok(Packet::Startup(parse_parameters(version, body)?)),
        version => Err(PacketError::Version(version)),
    }
}

fn parse_parameters(version: u32, mut body: &[u8]) -> Result<Startup, PacketError> {
    let mut startup = Startup { version, user: Vec::new(), parameters: Vec::new() };
    loop {
        let name = take_text(&mut body)?;
        if name.is_empty() {
            break;
        }
        let value = take_text(&mut body)?;
        if name != b"user" {
            startup.parameters.push((name.to_vec(), value.to_vec()));
        } else if startup.user.is_empty() {
            startup.user = value.to_vec();
        } else {
            return Err(PacketError::TwoUsers);
        }
    }
    if !body.is_empty() {
        return Err(PacketError::Layout);
    }
    if startup.user.is_empty() { Err(PacketError::NoUser) } else { Ok(startup) }
}

/// A text that ends with a zero.
fn take_text<'a>(body: &mut &'a [u8]) -> Result<&'a [u8], PacketError> {
    let end = body.iter().position(|byte| *byte == 0).ok_or(PacketError::Layout)?;
    let (text, rest) = body.split_at_checked(end).ok_or(PacketError::Layout)?;
    *body = rest.get(1..).ok_or(PacketError::Layout)?;
    Ok(text)
}

impl Startup {
    /// The packet for the server.
    pub fn encode(&self) -> Bytes {
        let mut packet = BytesMut::new();
        packet.put_u32(0);
        packet.put_u32(self.version);
        let user = (b"user".to_vec(), self.user.clone());
        for (name, value) in std::iter::once(&user).chain(&self.parameters) {
            packet.put_slice(name);
            packet.put_u8(0);
            packet.put_slice(value);
            packet.put_u8(0);
        }
        packet.put_u8(0);
        let length = u32::try_from(packet.len()).expect("not longer than the packet that it was read from");
        if let Some(head) = packet.first_chunk_mut::<4>() {
            *head = length.to_be_bytes();
        }
        packet.freeze()
    }
}

/// An error as PostgreSQL says it before it ends a connection.
pub fn error_response(sqlstate: &str, message: &str, hint: &str) -> Bytes {
    let mut body = BytesMut::new();
    for (field, text) in [(b'S', "FATAL"), (b'V', "FATAL"), (b'C', sqlstate), (b'M', message), (b'H', hint)] {
        if !text.is_empty() {
            body.put_u8(field);
            body.put_slice(text.replace('\0', " ").as_bytes());
            body.put_u8(0);
        }
    }
    body.put_u8(0);
    let mut packet = BytesMut::with_capacity(body.len() + 5);
    packet.put_u8(b'E');
    packet.put_u32(u32::try_from(body.len() + 4).expect("a message of a few lines"));
    packet.put_slice(&body);
    packet.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(code: u32, body: &[u8]) -> Bytes {
        let mut packet = BytesMut::new();
        packet.put_u32(u32::try_from(body.len() + 8).expect("short"));
        packet.put_u32(code);
        packet.put_slice(body);
        packet.freeze()
    }

    const V3: u32 = 3 << 16;

    #[test]
    fn what_clients_begin_with() {
        let check = |code, body: &[u8], expected| assert_eq!(parse(&packet(code, body)), expected);
        check(SSL_CODE, b"", Ok(Packet::Encryption));
        check(GSS_CODE, b"", Ok(Packet::Encryption));
        check(SSL_CODE, b"x", Err(PacketError::Layout));
        let cancel = packet(CANCEL_CODE, &[7; 8]);
        assert_eq!(parse(&cancel), Ok(Packet::Cancel(cancel)));
        let parameters = vec![(b"database".to_vec(), b"shop".to_vec())];
        let startup = Startup { version: V3, user: b"ann".to_vec(), parameters };
        check(V3, b"database\0shop\0user\0ann\0\0", Ok(Packet::Startup(startup.clone())));
        assert_eq!(parse(&startup.encode()), Ok(Packet::Startup(startup)));
    }

    #[test]
    fn what_the_server_might_read_otherwise_is_refused() {
        let check = |code, body: &[u8], expected| assert_eq!(parse(&packet(code, body)), Err(expected));
        check(V3, b"user\0ann\0user\0postgres\0\0", PacketError::TwoUsers);
        check(V3, b"database\0shop\0\0", PacketError::NoUser);
        check(V3, b"user\0\0\0", PacketError::NoUser);
        check(V3, b"user\0ann\0\0user\0postgres\0\0", PacketError::Layout);
        check(V3, b"user\0ann\0", PacketError::Layout);
        check(V3, b"user\0ann", PacketError::Layout);
        check(V3, b"user", PacketError::Layout);
        check(2 << 16, b"", PacketError::Version(2 << 16));
        for bytes in [0u32, 7, 10_001, u32::MAX] {
            assert_eq!(length(bytes.to_be_bytes()), Err(PacketError::Length(bytes)));
        }
        assert_eq!(length(10_000u32.to_be_bytes()), Ok(10_000));
    }

    #[test]
    fn an_error_has_the_fields_that_clients_look_for() {
        let packet = error_response("28000", "no\0", "");
        assert_eq!(&packet[..], b"E\0\0\0\x1fSFATAL\0VFATAL\0C28000\0Mno \0\0".as_slice());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), v3: bool) {
            let body = Bytes::from(bytes);
            let parsed = if v3 { parse(&packet(V3, &body)) } else { parse(&body) };
            if let Ok(Packet::Startup(startup)) = parsed {
                let again = parse(&startup.encode());
                prop_assert_eq!(again, Ok(Packet::Startup(startup)));
            }
        }
    }
}
