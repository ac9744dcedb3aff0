//! A replication connection that streams WAL.
//!
//! The reading half and the sending half work at the same time: status must go out from a timer even while nobody reads,
//! because a walsender without replies ends the connection after `wal_sender_timeout`.
//! The server may also end a stream by CommandComplete without CopyDone: it shuts down, and has sent everything.
//! Source: PostgreSQL documentation "Streaming Replication Protocol", `START_REPLICATION`;
//! `src/backend/replication/walsender.c` (`StartReplication`, `WalSndDone`), 14–18.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{ReadHalf, WriteHalf};
use tokio::sync::Mutex;

use super::ServerMessage;
use super::connection::{Connection, Halves, Parameters, Socket};
use super::error::{Doing, ReplicationError};
use super::session::{COMMAND_TIMEOUT, Session, quoted_identifier};
use super::wire::{Cursor, Frame, FrameReader, FrameWriter, decode_row};
use crate::pg::{Lsn, TimelineId, Timestamp};
use crate::util::clock;

/// From where to stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartReplication {
    pub slot: Option<String>,
    /// Any position, not only the start of a segment.
    pub start_lsn: Lsn,
    pub timeline: TimelineId,
}

/// What the server sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalEvent {
    /// WAL that the server has flushed, from `start_lsn`.
    Data { start_lsn: Lsn, wal_end: Lsn, server_time: Timestamp, bytes: Bytes },
    /// `wal_end` is what has been sent, not what is flushed.
    Keepalive { wal_end: Lsn, server_time: Timestamp, reply_requested: bool },
    /// The timeline ends here; [`WalReader::into_session`] gives the connection back.
    EndOfTimeline { next_timeline: TimelineId, switch_lsn: Lsn },
}

/// What we tell the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusUpdate {
    pub write_lsn: Lsn,
    pub flush_lsn: Lsn,
    pub apply_lsn: Lsn,
    /// The server answers with a keepalive at once.
    pub reply_requested: bool,
}

/// Taken out when the stream has ended: nobody may send a status then.
///
/// An async lock held across a write: only whole messages may reach the socket, from either half.
type SharedWriter = Arc<Mutex<Option<FrameWriter<WriteHalf<Socket>>>>>;

/// A running stream.
#[derive(Debug)]
pub struct WalStream {
    reader: WalReader,
    sender: StatusSender,
}

/// The reading half.
#[derive(Debug)]
pub struct WalReader {
    io: FrameReader<ReadHalf<Socket>>,
    writer: SharedWriter,
    parameters: Parameters,
    backend_pid: i32,
    phase: Phase,
    next: Option<(TimelineId, Lsn)>,
}

/// The sending half; clones may be used from several tasks.
#[derive(Debug, Clone)]
pub struct StatusSender {
    writer: SharedWriter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Copying,
    /// The server said CopyDone; ours is still to be queued.
    ServerDone,
    /// Ours is queued, perhaps not sent.
    Replying,
    /// Rows and the rest of the answer follow.
    Finishing,
    Ready,
}

impl WalStream {
    pub(super) async fn start(mut connection: Connection, from: &StartReplication) -> Result<Self, ReplicationError> {
        let slot = from.slot.as_deref().map(|name| format!("SLOT {} ", quoted_identifier(name))).unwrap_or_default();
        let command = format!("START_REPLICATION {slot}PHYSICAL {} TIMELINE {}", from.start_lsn, from.timeline);
        // A standby of 14 refuses to stream on a connection that has not asked.
        connection.query_within("IDENTIFY_SYSTEM", COMMAND_TIMEOUT).await?;
        connection.send_query(&command).await?;
        let phase = loop {
            let Frame { tag, body } = connection.io.reader.next().await?;
            match tag {
                b'W' => break Phase::Copying,
                // The timeline ended exactly where we start: no stream, the row at once.
                b'T' => break Phase::Finishing,
                b'E' => return Err(connection.failure(body, Doing::Streaming)?),
                tag => connection.passing(tag, body)?,
            }
        };
        let Connection { io: Halves { reader, writer }, parameters, backend_pid, .. } = connection;
        let writer = Arc::new(Mutex::new(Some(writer)));
        let sender = StatusSender { writer: writer.clone() };
        Ok(WalStream { reader: WalReader { io: reader, writer, parameters, backend_pid, phase, next: None }, sender })
    }

    /// See [`WalReader::next`].
    pub async fn next(&mut self) -> Result<WalEvent, ReplicationError> {
        self.reader.next().await
    }

    /// See [`StatusSender::send`].
    pub async fn send_status(&self, status: StatusUpdate) -> Result<bool, ReplicationError> {
        self.sender.send(status).await
    }

    /// Both halves, to be used at the same time.
    pub fn split(self) -> (WalReader, StatusSender) {
        (self.reader, self.sender)
    }
}

impl WalReader {
    /// The process of the server that sends.
    pub fn backend_pid(&self) -> i32 {
        self.backend_pid
    }

    /// Whether the server was in recovery when it last said so.
    pub fn in_hot_standby(&self) -> bool {
        self.parameters.get("in_hot_standby") == Some("on")
    }

    /// What the server sends next. After `EndOfTimeline` or an error there is nothing more.
    ///
    /// Cancel safety: nothing is lost when the future is dropped.
    ///
    /// # Errors
    /// `ServerStopping`, `SegmentRemoved`, `ConnectionLost`, `Protocol`, `Server`.
    pub async fn next(&mut self) -> Result<WalEvent, ReplicationError> {
        loop {
            self.answer_copy_done().await?;
            if self.phase == Phase::Ready {
                return Err(ReplicationError::protocol("the stream has ended"));
            }
            let frame = self.io.next().await?;
            if let Some(event) = self.take(frame)? {
                return Ok(event);
            }
        }
    }

    /// Ends the stream orderly and gives the connection back; WAL that is on its way is thrown away.
    ///
    /// The server may take long to notice while it waits for its socket: put a time limit around it.
    pub async fn close(mut self) -> Result<Session, ReplicationError> {
        if self.phase == Phase::Copying {
            if let Some(writer) = self.writer.lock().await.as_mut() {
                frontend::copy_done(&mut writer.queue);
                writer.flush().await?;
            }
            loop {
                let frame = self.io.next().await?;
                match frame.tag {
                    b'd' => {}
                    b'c' => break,
                    _ => {
                        self.take(frame)?;
                    }
                }
            }
            self.phase = Phase::Finishing;
        }
        while self.phase != Phase::Ready {
            self.answer_copy_done().await?;
            let frame = self.io.next().await?;
            self.take(frame)?;
        }
        self.into_session().await
    }

    /// The connection, after `EndOfTimeline`.
    ///
    /// # Errors
    /// `Protocol` before.
    pub async fn into_session(self) -> Result<Session, ReplicationError> {
        let writer = self.writer.lock().await.take();
        match writer {
            Some(writer) if self.phase == Phase::Ready => {
                let io = Halves { reader: self.io, writer };
                let (parameters, backend_pid) = (self.parameters, self.backend_pid);
                Ok(Session { connection: Connection { io, parameters, backend_pid, busy: false } })
            }
            _ => Err(ReplicationError::protocol("the stream has not ended")),
        }
    }

    async fn answer_copy_done(&mut self) -> Result<(), ReplicationError> {
        if !matches!(self.phase, Phase::ServerDone | Phase::Replying) {
            return Ok(());
        }
        let mut guard = self.writer.lock().await;
        let Some(writer) = guard.as_mut() else { return Err(ReplicationError::protocol("the stream has no writer")) };
        if self.phase == Phase::ServerDone {
            frontend::copy_done(&mut writer.queue);
            self.phase = Phase::Replying;
        }
        writer.flush().await?;
        self.phase = Phase::Finishing;
        Ok(())
    }

    fn take(&mut self, frame: Frame) -> Result<Option<WalEvent>, ReplicationError> {
        match (frame.tag, self.phase) {
            (b'd', Phase::Copying) => decode_event(frame.body),
            (b'c', Phase::Copying) => {
                self.phase = Phase::ServerDone;
                Ok(None)
            }
            (b'C', Phase::Copying) => Err(ReplicationError::ServerStopping(Box::new(shutting_down()))),
            (b'T' | b'C', Phase::Finishing) => Ok(None),
            (b'D', Phase::Finishing) => {
                self.next = Some(decode_next_timeline(frame.body)?);
                Ok(None)
            }
            (b'Z', Phase::Finishing) => {
                self.phase = Phase::Ready;
                let event = |(next_timeline, switch_lsn)| WalEvent::EndOfTimeline { next_timeline, switch_lsn };
                Ok(self.next.map(event))
            }
            (b'E', _) => Err(ReplicationError::from_server(Doing::Streaming, ServerMessage::decode(frame.body))),
            (b'S', _) => self.parameters.update(frame.body).map(|()| None),
            (b'N' | b'A', _) => Ok(None),
            (tag, phase) => {
                let tag = char::from(tag).escape_default();
                Err(ReplicationError::protocol(format!("unexpected message '{tag}' in a stream ({phase:?})")))
            }
        }
    }
}

impl StatusSender {
    /// Tells the server how far we are; false when the stream has ended.
    ///
    /// Cancel safety: a status whose future was dropped may go out with the next one.
    pub async fn send(&self, status: StatusUpdate) -> Result<bool, ReplicationError> {
        let mut guard = self.writer.lock().await;
        let Some(writer) = guard.as_mut() else { return Ok(false) };
        let message = frontend::CopyData::new(status.encode(Timestamp::from(clock::now())))?;
        message.write(&mut writer.queue);
        writer.flush().await?;
        Ok(true)
    }
}

impl StatusUpdate {
    /// The same position written, flushed and applied: `remote_apply` waits for the last.
    pub fn all_at(lsn: Lsn) -> StatusUpdate {
        StatusUpdate { write_lsn: lsn, flush_lsn: lsn, apply_lsn: lsn, reply_requested: false }
    }

    fn encode(self, now: Timestamp) -> Bytes {
        let mut body = BytesMut::with_capacity(34);
        body.put_u8(b'r');
        body.put_u64(self.write_lsn.0);
        body.put_u64(self.flush_lsn.0);
        body.put_u64(self.apply_lsn.0);
        body.put_i64(now.to_pg_micros());
        body.put_u8(u8::from(self.reply_requested));
        body.freeze()
    }
}

fn decode_event(body: Bytes) -> Result<Option<WalEvent>, ReplicationError> {
    let mut cursor = Cursor::new(body);
    match cursor.u8()? {
        b'w' => {
            let (start_lsn, wal_end) = (Lsn(cursor.u64()?), Lsn(cursor.u64()?));
            let server_time = Timestamp::from_pg_micros(cursor.i64()?);
            Ok(Some(WalEvent::Data { start_lsn, wal_end, server_time, bytes: cursor.rest() }))
        }
        b'k' => {
            let wal_end = Lsn(cursor.u64()?);
            let server_time = Timestamp::from_pg_micros(cursor.i64()?);
            Ok(Some(WalEvent::Keepalive { wal_end, server_time, reply_requested: cursor.u8()? != 0 }))
        }
        other => {
            let other = char::from(other).escape_default();
            Err(ReplicationError::protocol(format!("unknown replication message '{other}'")))
        }
    }
}

fn decode_next_timeline(row: Bytes) -> Result<(TimelineId, Lsn), ReplicationError> {
    let columns = decode_row(row)?;
    let text = |index: usize| {
        columns.get(index).and_then(Option::as_ref).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    };
    let timeline = text(0).and_then(|text| text.parse().ok()).map(TimelineId);
    let lsn = text(1).and_then(|text| text.parse().ok());
    timeline.zip(lsn).ok_or_else(|| ReplicationError::protocol("the next timeline is not understood"))
}

fn shutting_down() -> ServerMessage {
    ServerMessage {
        severity: "FATAL".to_owned(),
        sqlstate: "57P01".to_owned(),
        message: "the server shuts down and has sent all of its WAL".to_owned(),
        ..ServerMessage::default()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn data_and_keepalive_are_read() {
        let mut body = vec![b'w'];
        body.extend_from_slice(&0x0100_0000u64.to_be_bytes());
        body.extend_from_slice(&0x0100_0002u64.to_be_bytes());
        body.extend_from_slice(&0i64.to_be_bytes());
        body.extend_from_slice(b"ab");
        let expected = WalEvent::Data {
            start_lsn: Lsn(0x0100_0000),
            wal_end: Lsn(0x0100_0002),
            server_time: Timestamp::from_unix_seconds(946_684_800),
            bytes: Bytes::from_static(b"ab"),
        };
        assert_eq!(decode_event(body.into()).expect("well formed"), Some(expected));
        assert!(decode_event(Bytes::from_static(b"k123")).is_err());
    }

    #[test]
    fn a_status_is_34_bytes() {
        let status = StatusUpdate { reply_requested: true, ..StatusUpdate::all_at(Lsn(7)) };
        let bytes = status.encode(Timestamp::from_pg_micros(9));
        assert_eq!((bytes.len(), bytes[0], bytes[16], bytes[32], bytes[33]), (34, b'r', 7, 9, 1));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_event_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = decode_event(Bytes::from(bytes.clone()));
            let _ = decode_next_timeline(Bytes::from(bytes));
        }
    }
}
