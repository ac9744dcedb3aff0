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
use crate::replication::sql::{Sql, SyncWait};
use crate::replication::{ConnectConfig, ReplicationError, Session};
use crate::repository::coverage::ClaimSource;

/// Time that may pass between a commit's time stamp and its place in the WAL.
const INSERT_MARGIN: Duration = Duration::from_secs(1);
/// How often the server's state is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Commits that wait longer than this are reported.
const SYNC_WAIT_MAX: Duration = Duration::from_secs(5);
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
        let asker =
            Asker { asking, sender, server_time: server_time.clone(), run: rand::random(), last: None, sql: None };
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
    sql: Option<Sql>,
}

impl Asker {
    async fn run(mut self, mut trouble: watch::Receiver<StoreTrouble>, cancel: CancellationToken) {
        let mut next_claim = tokio::time::Instant::now();
        let mut synchronous = false;
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
                self.look_at_waiting_commits(&mut synchronous).await;
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
        let claimed = match self.ask_over_sql().await {
            Some(claim) => Some(claim),
            None => self.ask_over_replication().await,
        };
        let Some((server_time, lsn, source, margin)) = claimed else { return };
        if self.last.is_some_and(|last| server_time < last) {
            tracing::warn!(%server_time, "the server's clock stepped back: coverage begins anew");
            self.run = rand::random();
        }
        self.last = Some(server_time);
        let margin_micros = i64::try_from(margin.as_micros()).unwrap_or(i64::MAX);
        let _ = self.sender.send(Observation::Claim { server_time, lsn, source, margin_micros, run: self.run }).await;
    }

    /// The connection for ordinary queries, made when there is none; the role may not be allowed to have one.
    async fn take_sql(&mut self) -> Option<Sql> {
        if let Some(sql) = self.sql.take() {
            return Some(sql);
        }
        match Sql::connect(&self.asking.connect, self.asking.host_index).await {
            Ok(sql) => Some(sql),
            Err(error) => {
                tracing::debug!(%error, "no connection for queries");
                None
            }
        }
    }

    /// A connection that failed is not kept.
    async fn ask_over_sql(&mut self) -> Option<(Timestamp, Lsn, ClaimSource, Duration)> {
        let mut sql = self.take_sql().await?;
        let reading = sql.clock_reading().await.ok()?;
        self.sql = Some(sql);
        let reading = reading?;
        Some((reading.server_time, reading.insert_lsn, ClaimSource::Insert, INSERT_MARGIN))
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

    async fn look_at_waiting_commits(&mut self, synchronous: &mut bool) {
        let Some(mut sql) = self.take_sql().await else { return };
        let Ok(state) = sql.sync_state(self.asking.walsender_pid).await else { return };
        let now = state.commits_wait_for_us();
        if now != *synchronous {
            *synchronous = now;
            if now {
                tracing::warn!("commits wait for this archiver: WAL is stored at once, as with rpo = \"0s\"");
            }
            let _ = self.sender.send(Observation::Synchronous(now)).await;
        }
        if now && let Ok(waits) = sql.sync_waits(SYNC_WAIT_MAX).await {
            warn_of_waits(&waits);
        }
        self.sql = Some(sql);
    }
}

/// Commits that hang say so, with the way out.
fn warn_of_waits(waits: &[SyncWait]) {
    let Some(longest) = waits.iter().map(|w| w.waiting).max() else { return };
    let (backends, seconds) = (waits.len(), longest.as_secs());
    tracing::error!(
        backends,
        seconds,
        "commits wait for the store; to let them go on without it: \
         ALTER SYSTEM RESET synchronous_standby_names; SELECT pg_reload_conf();"
    );
}
