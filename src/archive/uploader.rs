//! Puts ranges of WAL into the store: several at a time, each repeated until it is there.
//!
//! A range is encoded on the blocking pool, put under the name that its content gives it, and, when it is a whole unit,
//! confirmed by a HEAD: size and tag as the PUT said, else it is put again. Nothing is reported stored before that.
//!
//! Invariants: at most `puts_in_flight` requests at once; a job ends only stored or cancelled.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::budget::Budget;
use super::settings::Settings;
use crate::pg::{Lsn, SegmentSize, TimelineId};
use crate::repository::codec::Kind;
use crate::repository::layout::{ContentHash, Incarnation, WalRange};
use crate::repository::{Key, Repository, RepositoryError};
use crate::util::retry::Backoff;

/// Where the uploads of one stream go.
#[derive(Clone)]
pub struct Destination {
    pub repository: Repository,
    pub incarnation: Incarnation,
    pub segment_size: SegmentSize,
}

/// A range that is in the store.
#[derive(Debug, Clone)]
pub struct Stored {
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub end_lsn: Lsn,
    pub key: Key,
    /// A whole unit, confirmed.
    pub unit: bool,
    /// From the first attempt to the store's answer.
    pub latency: Duration,
    /// When the PUT began to wait: the moment its last byte had arrived.
    pub content_bytes: u64,
}

/// How long a PUT may take before the store counts as troubled, without the time for its bytes.
const SILENCE_MAX: Duration = Duration::from_secs(10);
const SLOW_BYTES_PER_SECOND: u64 = 1 << 20;

/// What keeps the store from taking WAL, as seen by the uploads; `None` while all goes well.
pub type StoreTrouble = Option<String>;

/// The uploads of one stream.
pub struct Uploader {
    destination: Destination,
    budget: Arc<Budget>,
    jobs: JoinSet<Option<Stored>>,
    puts_in_flight: usize,
    in_flight_bytes: u64,
    trouble: watch::Sender<StoreTrouble>,
    cancel: CancellationToken,
    failed: bool,
}

impl Uploader {
    pub fn new(destination: Destination, settings: &Settings, trouble: watch::Sender<StoreTrouble>) -> Self {
        let (jobs, cancel) = (JoinSet::new(), CancellationToken::new());
        let (budget, puts_in_flight) = (Arc::clone(&settings.budget), settings.puts_in_flight);
        Uploader { destination, budget, jobs, puts_in_flight, in_flight_bytes: 0, trouble, cancel, failed: false }
    }

    pub fn destination(&self) -> &Destination {
        &self.destination
    }

    /// Whether another PUT may start.
    pub fn has_room(&self) -> bool {
        self.jobs.len() < self.puts_in_flight
    }

    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Whether an upload ended without having stored its bytes: the stream must begin again before them.
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }

    /// Starts to put `bytes`, which begin at `start_lsn` and lie within one segment.
    pub fn start(&mut self, timeline: TimelineId, start_lsn: Lsn, bytes: Bytes, unit: bool) {
        self.in_flight_bytes += bytes.len() as u64;
        let (destination, budget) = (self.destination.clone(), Arc::clone(&self.budget));
        let job = Job { destination, budget, timeline, start_lsn, bytes, unit };
        let (trouble, cancel) = (self.trouble.clone(), self.cancel.clone());
        let work = async move {
            tokio::select! {
                biased;
                () = cancel.cancelled() => None,
                stored = job.run(&trouble) => Some(stored),
            }
        };
        self.jobs.spawn(work.in_current_span());
    }

    /// The next range that was stored; `None` when nothing is in flight.
    ///
    /// Cancel safety: safe; an upload that ended is kept until it is taken.
    pub async fn next(&mut self) -> Option<Stored> {
        loop {
            match self.jobs.join_next().await? {
                Ok(Some(stored)) => {
                    self.in_flight_bytes -= stored.content_bytes;
                    return Some(stored);
                }
                // A cancelled or panicked upload stored nothing that we know of: its bytes stay unreported.
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(%error, "an upload of WAL ended unexpectedly");
                    self.failed = true;
                }
            }
        }
    }

    /// Ends all uploads; what was not stored is streamed again after the next start.
    pub async fn stop(mut self) {
        self.cancel.cancel();
        while self.jobs.join_next().await.is_some() {}
    }
}

struct Job {
    destination: Destination,
    budget: Arc<Budget>,
    timeline: TimelineId,
    start_lsn: Lsn,
    bytes: Bytes,
    unit: bool,
}

impl Job {
    async fn run(self, trouble: &watch::Sender<StoreTrouble>) -> Stored {
        let begin = Instant::now();
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(5));
        let mut failed = false;
        loop {
            match self.put_noticing_silence(trouble).await {
                Ok(key) => {
                    if failed {
                        tracing::info!(object = key.as_str(), "the store takes WAL again");
                    }
                    trouble.send_if_modified(|t| t.take().is_some());
                    return self.stored(key, begin.elapsed());
                }
                Err(error) => {
                    let text = error.hint().map_or(error.to_string(), |hint| format!("{error}; {hint}"));
                    if !failed {
                        tracing::warn!(lsn = %self.start_lsn, error = %text, "store WAL: failed, will go on trying");
                    }
                    failed = true;
                    trouble.send_if_modified(|t| t.replace(text.clone()).as_ref() != Some(&text));
                    tokio::time::sleep(backoff.delay()).await;
                }
            }
        }
    }

    /// A store that does not answer is in trouble long before every attempt has run into its limit.
    async fn put_noticing_silence(&self, trouble: &watch::Sender<StoreTrouble>) -> Result<Key, RepositoryError> {
        let limit = SILENCE_MAX + Duration::from_secs(self.bytes.len() as u64 / SLOW_BYTES_PER_SECOND);
        let mut put = std::pin::pin!(self.put());
        if let Ok(done) = tokio::time::timeout(limit, &mut put).await {
            return done;
        }
        let text = format!("the store has not answered for {} s", limit.as_secs());
        tracing::warn!(lsn = %self.start_lsn, error = %text, "store WAL: still waiting");
        trouble.send_if_modified(|t| t.is_none() && t.replace(text).is_none());
        put.await
    }

    async fn put(&self) -> Result<Key, RepositoryError> {
        let Destination { repository, incarnation, segment_size } = &self.destination;
        let (codec, bytes) = (repository.codec().clone(), self.bytes.clone());
        let (incarnation, size, job) = (*incarnation, *segment_size, self.place(*segment_size));
        let turn = if self.unit { self.budget.encoder().await } else { None };
        let encoded = tokio::task::spawn_blocking(move || {
            let digest = codec.digest(&bytes);
            let key = Key::wal(incarnation, &WalRange { hash: ContentHash::of(&digest), ..job }, size);
            codec.encode_digested(&key, Kind::Wal, &bytes, digest).map(|encoded| (key, encoded.bytes))
        });
        let encoded = encoded.await.map_err(|_| RepositoryError::Stopping)?;
        drop(turn);
        let (key, stored) = encoded.map_err(|source| RepositoryError::Corrupt { key: "WAL".into(), source })?;
        let size = stored.len() as u64;
        let tag = repository.store().put(&key, Bytes::from(stored)).await?;
        if self.unit {
            confirm(repository, &key, size, tag).await?;
        }
        Ok(key)
    }

    /// Where the bytes belong; the hash is filled in by the caller.
    fn place(&self, size: SegmentSize) -> WalRange {
        let from = size.offset_of(self.start_lsn);
        let to = from + self.bytes.len() as u64;
        let whole = from == 0 && to == size.bytes();
        let (timeline, segment) = (self.timeline, size.segment_of(self.start_lsn));
        WalRange { timeline, segment, from, to, hash: ContentHash::default(), whole }
    }

    fn stored(&self, key: Key, latency: Duration) -> Stored {
        let (timeline, start_lsn, unit) = (self.timeline, self.start_lsn, self.unit);
        let content_bytes = self.bytes.len() as u64;
        let end_lsn = start_lsn.saturating_add(content_bytes);
        Stored { timeline, start_lsn, end_lsn, key, unit, latency, content_bytes }
    }
}

/// A store that lost a write after it had said yes is noticed here.
async fn confirm(repository: &Repository, key: &Key, bytes: u64, tag: Option<String>) -> Result<(), RepositoryError> {
    let found = repository.store().head(key).await?;
    let same =
        found.as_ref().is_some_and(|o| o.bytes == bytes && (tag.is_none() || o.e_tag.is_none() || o.e_tag == tag));
    if same {
        return Ok(());
    }
    let what = found
        .map_or("it is not there".to_owned(), |o| format!("it has {} bytes, not {bytes}, or another tag", o.bytes));
    let reason = format!("the store said that it was written, but {what}");
    tracing::error!(object = key.as_str(), reason, "a write was lost");
    Err(RepositoryError::Malformed { key: key.as_str().to_owned(), reason })
}
