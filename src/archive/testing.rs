//! A scripted PostgreSQL: what an archiver asks of a primary over its socket, with made-up WAL.
//!
//! It holds the archiver to its word: whatever is reported as flushed must be stored without a hole on this server's
//! history at that moment.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{mpsc, watch};

use crate::pg::{Lsn, SegmentSize};
use crate::replication::wire::{MESSAGE_BYTES_MAX, split_frame};
use crate::repository::layout::WalRange;
use crate::repository::testing::noise;
use crate::repository::testing::sim::SimStore;

pub const SIZE: u64 = 1 << 20;
/// Where the WAL begins.
pub const BASE: u64 = 3 * SIZE;
pub const SYSTEM_ID: u64 = 7;
const MESSAGE_BYTES: usize = 100_000;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

pub fn segment_size() -> SegmentSize {
    SegmentSize::new(SIZE).expect("1 MiB")
}

/// What the cluster is now.
#[derive(Debug, Default)]
pub struct Cluster {
    /// The WAL of the newest timeline's path from [`BASE`] on.
    pub wal: Vec<u8>,
    /// Where each timeline was left, from timeline 1 on.
    pub switches: Vec<u64>,
    /// Timeline and content of what lies past a switch point, that the cluster has lost.
    pub lost: Vec<(u32, u64, Vec<u8>)>,
    /// What the slot was told.
    pub reported: u64,
    /// WAL before the segment of the slot's position is not there any more.
    pub removes: bool,
    pub violations: Vec<String>,
    pub reports: u64,
}

impl Cluster {
    pub fn end(&self) -> u64 {
        BASE + self.wal.len() as u64
    }

    pub fn timeline(&self) -> u32 {
        u32::try_from(self.switches.len()).expect("few") + 1
    }

    /// Where `timeline` ends on the path.
    pub fn end_of(&self, timeline: u32) -> u64 {
        let index = usize::try_from(timeline - 1).expect("few");
        self.switches.get(index).copied().unwrap_or(self.end())
    }

    pub fn append(&mut self, seed: u64, length: usize) {
        self.wal.extend(noise(seed, length));
    }

    /// Another server takes over at `switch`; what was written past it is lost.
    pub fn promote(&mut self, switch: u64) {
        let kept = usize::try_from(switch - BASE).expect("small");
        let (timeline, lost) = (self.timeline(), self.wal.split_off(kept));
        self.lost.push((timeline, switch, lost));
        self.switches.push(switch);
        self.reported = self.reported.min(switch);
    }

    fn history(&self, timeline: u32) -> String {
        let parents = self.switches.iter().take(usize::try_from(timeline - 1).expect("few")).enumerate();
        parents.map(|(index, switch)| format!("{}\t{}\tmade up\n", index + 1, Lsn(*switch))).collect()
    }

    /// The end of what is stored without a hole from `from` on, on this cluster's path: past its switch point a timeline
    /// is another past.
    pub fn stored_end(&self, ranges: &[WalRange], from: u64) -> u64 {
        let (size, mut reached) = (segment_size(), from);
        loop {
            let own = ranges.iter().filter(|range| range.timeline.0 <= self.timeline());
            let next = own.filter(|range| range.start_lsn(size).0 <= reached);
            let ends = next.map(|range| range.end_lsn(size).0.min(self.end_of(range.timeline.0)));
            match ends.max().filter(|end| *end > reached) {
                Some(end) => reached = end,
                None => return reached,
            }
        }
    }
}

/// The server; cheap to clone.
#[derive(Clone)]
pub struct Server {
    pub cluster: Arc<Mutex<Cluster>>,
    pub store: SimStore,
    /// Counts what happened; connections look when it changes.
    pub changed: watch::Sender<u64>,
    /// Counts restarts; connections of an earlier life end.
    pub life: watch::Sender<u64>,
}

type Io = std::io::Result<()>;

impl Server {
    pub fn new(store: SimStore) -> Server {
        let (changed, life) = (watch::channel(0).0, watch::channel(0).0);
        let cluster = Cluster { reported: BASE, ..Cluster::default() };
        Server { cluster: Arc::new(Mutex::new(cluster)), store, changed, life }
    }

    pub fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().expect("no test panics while it holds this")
    }

    /// Accepts connections until it is dropped.
    pub async fn serve(self, mut dialled: mpsc::Receiver<DuplexStream>) {
        let mut connections = tokio::task::JoinSet::new();
        while let Some(socket) = dialled.recv().await {
            let (server, mut life) = (self.clone(), self.life.subscribe());
            connections.spawn(async move {
                tokio::select! {
                    biased;
                    _ = life.changed() => {}
                    _ = Connection { server, socket, received: BytesMut::new() }.run() => {}
                }
            });
        }
    }
}

struct Connection {
    server: Server,
    socket: DuplexStream,
    /// What has arrived and is not read: a read that is given up loses nothing.
    received: BytesMut,
}

fn message(out: &mut Vec<u8>, tag: u8, body: &[u8]) {
    out.push(tag);
    out.put_i32(i32::try_from(body.len()).expect("small") + 4);
    out.extend_from_slice(body);
}

fn rows(out: &mut Vec<u8>, columns: &[(&str, String)]) {
    let count = i16::try_from(columns.len()).expect("few");
    let (mut names, mut values) = (count.to_be_bytes().to_vec(), count.to_be_bytes().to_vec());
    for (name, value) in columns {
        names.extend_from_slice(name.as_bytes());
        names.extend_from_slice(&[0; 19]);
        values.put_i32(i32::try_from(value.len()).expect("small"));
        values.extend_from_slice(value.as_bytes());
    }
    message(out, b'T', &names);
    message(out, b'D', &values);
}

fn error(out: &mut Vec<u8>, severity: &str, code: &str, text: &str) {
    message(out, b'E', format!("S{severity}\0V{severity}\0C{code}\0M{text}\0\0").as_bytes());
}

impl Connection {
    async fn run(mut self) -> Io {
        let length = self.socket.read_i32().await?;
        let mut body = vec![0; usize::try_from(length - 4).expect("positive")];
        self.socket.read_exact(&mut body).await?;
        let mut out = Vec::new();
        if !String::from_utf8_lossy(&body).contains("replication") {
            error(&mut out, "FATAL", "28000", "no queries here");
            return self.socket.write_all(&out).await;
        }
        message(&mut out, b'R', &[0; 4]);
        message(&mut out, b'S', b"server_version\x0018.0\0");
        message(&mut out, b'S', b"in_hot_standby\0off\0");
        message(&mut out, b'K', &[0, 0, 0, 77, 0, 0, 0, 1]);
        message(&mut out, b'Z', b"I");
        self.socket.write_all(&out).await?;
        loop {
            let (tag, body) = self.read().await?;
            if tag != b'Q' {
                return Ok(());
            }
            let command = String::from_utf8_lossy(&body).trim_end_matches('\0').to_owned();
            if command.starts_with("START_REPLICATION") {
                self.start_replication(&command).await?;
            } else {
                let answer = self.answer(&command);
                self.socket.write_all(&answer).await?;
            }
        }
    }

    async fn read(&mut self) -> std::io::Result<(u8, Bytes)> {
        loop {
            if let Some(frame) = split_frame(&mut self.received, MESSAGE_BYTES_MAX).expect("a message") {
                return Ok((frame.tag, frame.body));
            }
            if self.socket.read_buf(&mut self.received).await? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn answer(&self, command: &str) -> Vec<u8> {
        let (mut out, cluster) = (Vec::new(), self.server.cluster());
        let text = |value: &dyn ToString| value.to_string();
        match command.split_whitespace().next().unwrap_or_default() {
            "IDENTIFY_SYSTEM" => {
                let position = ("xlogpos", text(&Lsn(cluster.end())));
                let identity = [("systemid", text(&SYSTEM_ID)), ("timeline", text(&cluster.timeline())), position];
                rows(&mut out, &identity);
            }
            "SHOW" if command.contains("wal_segment_size") => rows(&mut out, &[("wal_segment_size", "1MB".into())]),
            "SHOW" => rows(&mut out, &[("wal_writer_delay", "200ms".into())]),
            "CREATE_REPLICATION_SLOT" => error(&mut out, "ERROR", "42710", "the slot exists"),
            "READ_REPLICATION_SLOT" => {
                let restart = ("restart_lsn", text(&Lsn(cluster.reported)));
                let timeline = ("restart_tli", text(&cluster.timeline()));
                rows(&mut out, &[("slot_type", "physical".into()), restart, timeline]);
            }
            "TIMELINE_HISTORY" => {
                let timeline: u32 = command.split(' ').nth(1).and_then(|t| t.parse().ok()).expect("a timeline");
                let name = format!("{timeline:08X}.history");
                rows(&mut out, &[("filename", name), ("content", cluster.history(timeline))]);
            }
            _ => error(&mut out, "ERROR", "42601", command),
        }
        message(&mut out, b'C', b"OK\0");
        message(&mut out, b'Z', b"I");
        out
    }

    /// `START_REPLICATION SLOT "x" PHYSICAL 0/300000 TIMELINE 1`
    async fn start_replication(&mut self, command: &str) -> Io {
        let words: Vec<&str> = command.split_whitespace().collect();
        let start: Lsn = words[4].parse().expect("a position");
        let timeline: u32 = words[6].parse().expect("a timeline");
        let mut out = Vec::new();
        let removed = {
            let cluster = self.server.cluster();
            cluster.removes && start.0 < cluster.reported / SIZE * SIZE
        };
        if removed || start.0 < BASE {
            error(&mut out, "ERROR", "58P01", "requested WAL segment has already been removed");
            message(&mut out, b'Z', b"I");
            return self.socket.write_all(&out).await;
        }
        message(&mut out, b'W', &[0, 0, 0]);
        self.socket.write_all(&out).await?;
        self.stream(start.0, timeline).await
    }

    async fn stream(&mut self, mut at: u64, timeline: u32) -> Io {
        let mut changed = self.server.changed.subscribe();
        let mut idle = false;
        loop {
            let mut out = Vec::new();
            let ended = {
                let cluster = self.server.cluster();
                let end = cluster.end_of(timeline);
                while at < end {
                    let from = usize::try_from(at - BASE).expect("small");
                    let to = usize::try_from(end - BASE).expect("small").min(from + MESSAGE_BYTES);
                    let mut body = vec![b'w'];
                    body.put_u64(at);
                    body.put_u64(cluster.end());
                    body.put_i64(0);
                    body.extend_from_slice(&cluster.wal[from..to]);
                    message(&mut out, b'd', &body);
                    at = BASE + to as u64;
                }
                timeline < cluster.timeline()
            };
            if ended {
                return self.end_timeline(out, timeline).await;
            }
            if idle || !out.is_empty() {
                // A keepalive's end is what was sent.
                let mut body = vec![b'k'];
                body.put_u64(at);
                body.put_i64(0);
                body.put_u8(u8::from(idle && at.is_multiple_of(3)));
                message(&mut out, b'd', &body);
            }
            self.socket.write_all(&out).await?;
            idle = false;
            tokio::select! {
                biased;
                frame = self.read() => {
                    let (tag, body) = frame?;
                    self.take(tag, &body, timeline);
                }
                _ = changed.changed() => {}
                () = tokio::time::sleep(KEEPALIVE_INTERVAL) => idle = true,
            }
        }
    }

    fn take(&self, tag: u8, body: &[u8], timeline: u32) {
        if tag != b'd' || body.first() != Some(&b'r') {
            return;
        }
        let flush = u64::from_be_bytes(*body[9..].first_chunk().expect("a status"));
        let ranges = self.server.store.wal(segment_size());
        let mut cluster = self.server.cluster();
        let stored = cluster.stored_end(&ranges, BASE);
        if flush > stored {
            let what = format!("{} is reported on timeline {timeline}, {} is stored", Lsn(flush), Lsn(stored));
            cluster.violations.push(what);
        }
        cluster.reports += 1;
        cluster.reported = cluster.reported.max(flush);
    }

    async fn end_timeline(&mut self, mut out: Vec<u8>, timeline: u32) -> Io {
        message(&mut out, b'c', &[]);
        self.socket.write_all(&out).await?;
        loop {
            match self.read().await? {
                (b'c', _) => break,
                (tag, body) => self.take(tag, &body, timeline),
            }
        }
        let mut out = Vec::new();
        let switch = Lsn(self.server.cluster().end_of(timeline)).to_string();
        rows(&mut out, &[("next_tli", (timeline + 1).to_string()), ("next_tli_startpos", switch)]);
        message(&mut out, b'C', b"OK\0");
        message(&mut out, b'C', b"START_REPLICATION\0");
        message(&mut out, b'Z', b"I");
        self.socket.write_all(&out).await
    }
}
