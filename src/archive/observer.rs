//! What is asked of the server beside the stream: its clock and the end of its WAL, and whether it wants to stop.
//!
//! A pair (clock, position) proves coverage only when the clock was taken *first*. Over SQL the clock and then the insert
//! position are asked in one statement; without SQL the clock is the newest one that the stream carried, and the flush position
//! comes from `IDENTIFY_SYSTEM` on another connection, asked afterwards. A keepalive's end is what was sent: never used.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::uploader::StoreTrouble;
use crate::pg::{Lsn, Timestamp};
use crate::replication::{ConnectConfig, ReplicationError, Session};
use crate::repository::coverage::ClaimSource;

/// Time that may pass between a commit's time stamp and its place in the WAL.
const INSERT_MARGIN: Duration = Duration::from_secs(1);
/// How often the server's state is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// How often we ask whether the server stops while the store takes nothing.
const STALL_INTERVAL: Duration = Duration::from_secs(3);

/// Something learned beside the stream.
#[derive(Debug, Clone, PartialEq)]
pub enum Observation {
    Claim {
        server_time: Timestamp,
        lsn: Lsn,
        source: ClaimSource,
        margin_micros: i64,
        run: u32,
    },
    /// Whether commits wait for us.
    Synchronous(bool),
    /// The server refuses new connections because it shuts down.
    Stopping,
}

/// The receiving end, and the clock that the stream carries.
pub struct Observer {
    observations: mpsc::Receiver<Observation>,
    server_time: Arc<AtomicI64>,
    task: JoinHandle<()>,
    cancel: CancellationToken,
}

/// Whom to ask, and how often a claim is wanted.
#[derive(Clone)]
pub struct Asking {
    pub connect: ConnectConfig,
    pub host_index: usize,
    pub coverage_interval: Duration,
    /// The process that serves our stream.
    pub walsender_pid: i32,
}

impl Observer {
    pub fn start(asking: Asking, trouble: watch::Receiver<StoreTrouble>) -> Self {
        let (sender, observations) = mpsc::channel(8);
        let server_time = Arc::new(AtomicI64::new(i64::MIN));
        let cancel = CancellationToken::new();
        let asker = Asker { asking, sender, server_time: server_time.clone(), run: rand::random(), last: None };
        let task = tokio::spawn(asker.run(trouble, cancel.clone()));
        Observer { observations, server_time, task, cancel }
    }

    /// The server's clock as the stream carried it.
    pub fn server_time(&self, time: Timestamp) {
        self.server_time.fetch_max(time.0, Ordering::Relaxed);
    }

    /// The next observation; pends for ever when the asking task ended.
    ///
    /// Cancel safety: safe.
    pub async fn next(&mut self) -> Observation {
        match self.observations.recv().await {
            Some(observation) => observation,
            None => std::future::pending().await,
        }
    }

    pub async fn stop(self) {
        self.cancel.cancel();
        let _ = self.task.await;
    }
}

struct Asker {
    asking: Asking,
    sender: mpsc::Sender<Observation>,
    server_time: Arc<AtomicI64>,
    run: u32,
    last: Option<Timestamp>,
}

impl Asker {
    async fn run(mut self, mut trouble: watch::Receiver<StoreTrouble>, cancel: CancellationToken) {
        let mut next_claim = tokio::time::Instant::now();
        loop {
            let stalled = trouble.borrow_and_update().is_some();
            let work = async {
                if tokio::time::Instant::now() >= next_claim && !stalled {
                    next_claim = tokio::time::Instant::now() + self.asking.coverage_interval;
                    self.claim().await;
                }
                if stalled {
                    self.ask_whether_it_stops().await;
                }
            };
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = work => {}
            }
            let pause = if stalled { STALL_INTERVAL } else { LOOK_INTERVAL.min(self.asking.coverage_interval) };
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                _ = trouble.changed() => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn claim(&mut self) {
        let Some((server_time, lsn, source, margin)) = self.ask_over_replication().await else { return };
        if self.last.is_some_and(|last| server_time < last) {
            tracing::warn!(%server_time, "the server's clock stepped back: coverage begins anew");
            self.run = rand::random();
        }
        self.last = Some(server_time);
        let margin_micros = i64::try_from(margin.as_micros()).unwrap_or(i64::MAX);
        let _ = self.sender.send(Observation::Claim { server_time, lsn, source, margin_micros, run: self.run }).await;
    }

    async fn ask_over_replication(&mut self) -> Option<(Timestamp, Lsn, ClaimSource, Duration)> {
        let micros = self.server_time.load(Ordering::Relaxed);
        if micros == i64::MIN {
            return None;
        }
        let mut session = Session::connect(&self.asking.connect, self.asking.host_index).await.ok()?;
        let lsn = session.identify_system().await.ok()?.flush_lsn;
        let delay =
            session.show("wal_writer_delay").await.ok().and_then(|t| crate::util::units::parse_duration(&t).ok());
        session.close().await;
        let margin = INSERT_MARGIN + 3 * delay.unwrap_or(Duration::from_millis(200));
        Some((Timestamp(micros), lsn, ClaimSource::Flush, margin))
    }

    async fn ask_whether_it_stops(&mut self) {
        match Session::connect(&self.asking.connect, self.asking.host_index).await {
            Ok(session) => session.close().await,
            Err(ReplicationError::NotAccepting(_)) => {
                let _ = self.sender.send(Observation::Stopping).await;
            }
            Err(_) => {}
        }
    }
}
