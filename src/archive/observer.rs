//! What is asked of the server beside the stream: its clock and the end of its WAL, and whether it wants to stop.
//!
//! A pair (clock, position) proves coverage only when the clock was taken *first*. Over SQL the clock and then the insert
//! position are asked in one statement; without SQL the clock is the newest one that the stream carried, and the flush position
//! comes from `IDENTIFY_SYSTEM` on another connection, asked afterwards. A keepalive's end is what was sent: never used.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::uploader::StoreTrouble;
use crate::pg::{Lsn, TimelineId, Timestamp};
use crate::replication::session::SystemIdentity;
use crate::replication::sql::{ClockReading, Sql, SyncWait};
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
        /// Of the server that was asked: behind one name there may be another by now.
        timeline: TimelineId,
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

/// The receiving end, and the clock that the stream carries. Who asks ends with it, however that goes.
pub struct Observer {
    observations: mpsc::Receiver<Observation>,
    server_time: Arc<AtomicI64>,
    task: AbortOnDropHandle<()>,
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
        let task = AbortOnDropHandle::new(tokio::spawn(asker.run(trouble, cancel.clone()).in_current_span()));
        Observer { observations, server_time, task, cancel }
    }

    /// The server's clock as the stream carried it.
    pub fn server_time(&self, time: Timestamp) {
        // The newest, not the highest: a clock that was set back must be seen to be.
        self.server_time.store(time.0, Ordering::Relaxed);
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

/// What was learned for a claim.
struct Claimed {
    timeline: TimelineId,
    server_time: Timestamp,
    lsn: Lsn,
    source: ClaimSource,
    margin: Duration,
}

/// Whether the server's clock advanced less than ours between two readings; what two clocks differ by within a second is
/// the time that asking takes.
fn stepped_back(last: (Timestamp, Instant), now: (Timestamp, Instant)) -> bool {
    const SLACK_MICROS: i64 = 1_000_000;
    let ours = i64::try_from(now.1.saturating_duration_since(last.1).as_micros()).unwrap_or(i64::MAX);
    now.0.0.saturating_sub(last.0.0) < ours.saturating_sub(SLACK_MICROS)
}

struct Asker {
    asking: Asking,
    sender: mpsc::Sender<Observation>,
    server_time: Arc<AtomicI64>,
    run: u32,
    /// The last reading of the server's clock, and ours that does not jump.
    last: Option<(Timestamp, Instant)>,
    sql: Option<Sql>,
}

impl Asker {
    async fn run(mut self, mut trouble: watch::Receiver<StoreTrouble>, cancel: CancellationToken) {
        let mut next_claim = Instant::now();
        let mut synchronous = false;
        loop {
            let stalled = trouble.borrow_and_update().is_some();
            let work = async {
                if Instant::now() >= next_claim && !stalled {
                    next_claim = Instant::now() + self.asking.coverage_interval;
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
                // Without an uploader there is no stream either: nobody wants to know any more.
                changed = trouble.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn claim(&mut self) {
        let claimed = match self.ask_over_sql().await {
            Some(claim) => Some(claim),
            None => self.ask_over_replication().await,
        };
        let Some(Claimed { timeline, server_time, lsn, source, margin }) = claimed else { return };
        let now = Instant::now();
        if self.last.is_some_and(|last| stepped_back(last, (server_time, now))) {
            tracing::warn!(%server_time, "the server's clock stepped back: coverage begins anew");
            self.run = rand::random();
        }
        self.last = Some((server_time, now));
        let margin_micros = i64::try_from(margin.as_micros()).unwrap_or(i64::MAX);
        let run = self.run;
        let _ = self.sender.send(Observation::Claim { timeline, server_time, lsn, source, margin_micros, run }).await;
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
    async fn ask_over_sql(&mut self) -> Option<Claimed> {
        let mut sql = self.take_sql().await?;
        let reading = sql.clock_reading().await.ok()?;
        self.sql = Some(sql);
        let reading = reading?;
        let ClockReading { server_time, insert_lsn, timeline } = reading;
        let (lsn, source, margin) = (insert_lsn, ClaimSource::Insert, INSERT_MARGIN);
        Some(Claimed { timeline, server_time, lsn, source, margin })
    }

    async fn ask_over_replication(&mut self) -> Option<Claimed> {
        let micros = self.server_time.load(Ordering::Relaxed);
        if micros == i64::MIN {
            return None;
        }
        let mut session = Session::connect(&self.asking.connect, self.asking.host_index).await.ok()?;
        let SystemIdentity { timeline, flush_lsn, .. } = session.identify_system().await.ok()?;
        let delay = crate::util::units::parse_duration(&session.show("wal_writer_delay").await.ok()?).ok()?;
        let standby = session.in_hot_standby();
        session.close().await;
        // A standby's position says nothing about the primary's clock.
        let (server_time, lsn, source) = (Timestamp(micros), flush_lsn, ClaimSource::Flush);
        (!standby).then_some(Claimed { timeline, server_time, lsn, source, margin: INSERT_MARGIN + 3 * delay })
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

#[cfg(test)]
mod tests {
    use super::*;

    fn asking() -> Asking {
        let connect = "host=/nowhere user=u dbname=d".parse().expect("a connection string");
        Asking { connect, host_index: 0, coverage_interval: Duration::from_secs(60), walsender_pid: 1 }
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_ends_with_the_stream_that_it_serves() {
        let (uploader, trouble) = watch::channel(None);
        let observer = Observer::start(asking(), trouble);
        tokio::time::sleep(Duration::from_secs(100)).await;
        assert!(!observer.task.is_finished());
        drop(uploader);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(observer.task.is_finished());

        let (_uploader, trouble) = watch::channel(None);
        let observer = Observer::start(asking(), trouble);
        let held = Arc::downgrade(&observer.server_time);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(held.upgrade().is_some());
        drop(observer);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(held.upgrade().is_none());
    }

    #[test]
    fn a_clock_set_back_is_noticed_although_it_is_later_than_at_the_last_reading() {
        let (begin, minute) = (Instant::now(), Duration::from_secs(60));
        let after =
            |seconds: i64| stepped_back((Timestamp(0), begin), (Timestamp(seconds * 1_000_000), begin + minute));
        assert!(after(-1) && after(30) && after(58));
        assert!(!after(60) && !after(61) && !after(4000));
    }
}
