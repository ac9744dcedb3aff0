//! Messages on the wire: a tag, a length, a body.
//!
//! Reading and writing are cancel safe: bytes that have arrived, or are still to be sent, stay in the buffer when a
//! future is dropped.

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::error::ReplicationError;

/// No message may be larger: a row with a configuration file is the largest that we ask for.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Before the server has proved who it is.
pub const MESSAGE_BYTES_BEFORE_AUTHENTICATION: usize = 64 << 10;
/// Room made for reads from the socket, the memory cost of a connection; a walsender sends at most 128 KiB a message.
const READ_BYTES: usize = 256 << 10;
const READ_BYTES_MIN: usize = 16 << 10;
const HEADER_BYTES: usize = 5;

/// One message of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub tag: u8,
    pub body: Bytes,
}

/// Cuts messages out of what has arrived.
///
/// # Errors
/// A length below 4 or above `bytes_max`.
pub fn split_frame(buffer: &mut BytesMut, bytes_max: usize) -> Result<Option<Frame>, ReplicationError> {
    let Some((tag, length)) = header(buffer) else { return Ok(None) };
    let total = usize::try_from(length).unwrap_or(usize::MAX).saturating_add(1);
    if length < 4 || total > bytes_max {
        let tag = char::from(tag).escape_default();
        return Err(ReplicationError::protocol(format!("message '{tag}' of {length} bytes (at most {bytes_max})")));
    }
    if buffer.len() < total {
        buffer.reserve(total - buffer.len());
        return Ok(None);
    }
    let mut body = buffer.split_to(total).freeze();
    body.advance(HEADER_BYTES);
    Ok(Some(Frame { tag, body }))
}

fn header(buffer: &[u8]) -> Option<(u8, u32)> {
    let (head, _) = buffer.split_first_chunk::<HEADER_BYTES>()?;
    let [tag, length @ ..] = *head;
    Some((tag, u32::from_be_bytes(length)))
}

/// The reading half.
#[derive(Debug)]
pub(super) struct FrameReader<R> {
    io: R,
    buffer: BytesMut,
    bytes_max: usize,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    pub(super) fn new(io: R) -> Self {
        FrameReader { io, buffer: BytesMut::new(), bytes_max: MESSAGE_BYTES_BEFORE_AUTHENTICATION }
    }

    /// The server is known now: larger messages are fine.
    pub(super) fn trust(&mut self) {
        self.bytes_max = MESSAGE_BYTES_MAX;
    }

    /// The next message.
    ///
    /// Cancel safety: nothing is lost when the future is dropped.
    pub(super) async fn next(&mut self) -> Result<Frame, ReplicationError> {
        loop {
            if let Some(frame) = split_frame(&mut self.buffer, self.bytes_max)? {
                return Ok(frame);
            }
            if self.buffer.capacity() - self.buffer.len() < READ_BYTES_MIN {
                self.buffer.reserve(READ_BYTES);
            }
            if self.io.read_buf(&mut self.buffer).await? == 0 {
                let kind = std::io::ErrorKind::UnexpectedEof;
                return Err(std::io::Error::new(kind, "the server closed the connection").into());
            }
        }
    }
}

/// The writing half: messages are queued, then flushed.
#[derive(Debug)]
pub(super) struct FrameWriter<W> {
    io: W,
    pub(super) queue: BytesMut,
}

impl<W: AsyncWrite + Unpin> FrameWriter<W> {
    pub(super) fn new(io: W) -> Self {
        FrameWriter { io, queue: BytesMut::new() }
    }

    /// Sends what is queued.
    ///
    /// Cancel safety: what has not been sent stays queued, and goes out with the next flush.
    pub(super) async fn flush(&mut self) -> Result<(), ReplicationError> {
        while !self.queue.is_empty() {
            if self.io.write_buf(&mut self.queue).await? == 0 {
                return Err(std::io::Error::from(std::io::ErrorKind::WriteZero).into());
            }
        }
        self.io.flush().await?;
        Ok(())
    }
}

/// Reads fields out of a message body; never past its end.
#[derive(Debug, Clone)]
pub(super) struct Cursor(Bytes);

impl Cursor {
    pub(super) fn new(body: Bytes) -> Self {
        Cursor(body)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ReplicationError> {
        let found = self.0.first_chunk::<N>().copied();
        let array = found.ok_or_else(|| ReplicationError::protocol("a message ends too early"))?;
        self.0.advance(N);
        Ok(array)
    }

    pub(super) fn u8(&mut self) -> Result<u8, ReplicationError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, ReplicationError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn i32(&mut self) -> Result<i32, ReplicationError> {
        self.array().map(i32::from_be_bytes)
    }

    pub(super) fn i64(&mut self) -> Result<i64, ReplicationError> {
        self.array().map(i64::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, ReplicationError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<Bytes, ReplicationError> {
        if length > self.0.len() {
            return Err(ReplicationError::protocol("a message ends too early"));
        }
        Ok(self.0.split_to(length))
    }

    /// A text that ends with a zero byte. Bytes that are no UTF-8 are replaced: the server's encoding may be another.
    pub(super) fn cstr(&mut self) -> Result<String, ReplicationError> {
        let end = self.0.iter().position(|byte| *byte == 0);
        let end = end.ok_or_else(|| ReplicationError::protocol("a text has no end"))?;
        let text = self.0.split_to(end);
        self.0.advance(1);
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    pub(super) fn rest(self) -> Bytes {
        self.0
    }
}

/// The columns of a DataRow; `None` is NULL.
pub(super) fn decode_row(body: Bytes) -> Result<Vec<Option<Bytes>>, ReplicationError> {
    let mut cursor = Cursor::new(body);
    let count = cursor.u16()?;
    let mut columns = Vec::new();
    for _ in 0..count {
        let length = cursor.i32()?;
        columns.push(match usize::try_from(length) {
            Ok(length) => Some(cursor.bytes(length)?),
            Err(_) if length == -1 => None,
            Err(_) => return Err(ReplicationError::protocol("a column has a negative length")),
        });
    }
    Ok(columns)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::replication::ServerMessage;

    #[test]
    fn messages_are_cut_at_their_length() {
        let mut buffer = BytesMut::from(&b"Z\0\0\0\x05Id\0\0\0\x06ab"[..]);
        let frame = split_frame(&mut buffer, 100).expect("well formed").expect("complete");
        assert_eq!((frame.tag, frame.body.as_ref()), (b'Z', &b"I"[..]));
        let frame = split_frame(&mut buffer, 100).expect("well formed").expect("complete");
        assert_eq!((frame.tag, frame.body.as_ref()), (b'd', &b"ab"[..]));
        assert_eq!(split_frame(&mut buffer, 100).expect("empty"), None);
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused_before_it_is_waited_for() {
        let mut buffer = BytesMut::from(&b"d\x7f\xff\xff\xff"[..]);
        assert!(split_frame(&mut buffer, MESSAGE_BYTES_MAX).is_err());
        let mut buffer = BytesMut::from(&b"d\0\0\0\x03"[..]);
        assert!(split_frame(&mut buffer, MESSAGE_BYTES_MAX).is_err());
    }

    #[test]
    fn null_and_empty_columns_differ() {
        let body = Bytes::from_static(b"\0\x02\xff\xff\xff\xff\0\0\0\0");
        assert_eq!(decode_row(body).expect("well formed"), vec![None, Some(Bytes::new())]);
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_message_an_error_or_too_few(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            while let Ok(Some(frame)) = split_frame(&mut buffer, 4096) {
                let _ = decode_row(frame.body.clone());
                let _ = ServerMessage::decode(frame.body);
            }
            prop_assert!(buffer.len() <= bytes.len());
        }

        #[test]
        fn how_bytes_arrive_does_not_matter(
            bodies in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..8),
            piece in 1usize..20,
        ) {
            let mut all = Vec::new();
            for body in &bodies {
                all.push(b'd');
                all.extend_from_slice(&u32::try_from(body.len() + 4).expect("small").to_be_bytes());
                all.extend_from_slice(body);
            }
            let mut buffer = BytesMut::new();
            let mut seen = Vec::new();
            for chunk in all.chunks(piece) {
                buffer.extend_from_slice(chunk);
                while let Some(frame) = split_frame(&mut buffer, 4096).expect("well formed") {
                    seen.push(frame.body.to_vec());
                }
            }
            prop_assert_eq!(seen, bodies);
        }
    }
}
