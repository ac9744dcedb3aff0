//! One connection that streams one timeline: bytes in, ranges put, positions reported.
//!
//! Everything happens in one task: reading never waits for the store, and a status goes out from a timer also while
//! nothing is read. When the bytes that are not stored reach `buffer_bytes_max` we stop reading, and PostgreSQL keeps the
//! WAL. When all streams of the process hold more than their budget, each lets go of what is stored as parts (they are put
//! together later) and reads little at a time. What arrives is compared with what is stored of the same range; other content is a [`Conflict`].
//!
//! Invariants: `reported ≤ stored contiguous end`; `received - stored ≤ buffer_bytes_max` + one message.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::assembler::{Assembler, Unit};
use super::budget::SHARE_MIN;
use super::exposure::Exposure;
use super::observer::{Observation, Observer};
use super::pacing::Pacing;
use super::progress::Progress;
use super::resume::{Conflict, Resume};
use super::settings::Settings;
use super::status::{ArchiveStatus, State, StoredStream};
use super::uploader::{StoreTrouble, Stored, Uploader};
use crate::pg::{Lsn, SegmentSize, TimelineId};
use crate::replication::{ReplicationError, StatusSender, StatusUpdate, WalEvent, WalReader};
use crate::repository::coverage::{self, Claim};
use crate::repository::layout::{ContentHash, WalRange};

/// How often a status is sent at least; PostgreSQL's `wal_sender_timeout` is 60 s by default.
const STATUS_INTERVAL: Duration = Duration::from_secs(2);
/// Claims that may wait for their WAL to be stored.
const CLAIMS_WAITING_MAX: usize = 64;
/// How long the rest of a lost stream may take to be stored before the next connection is tried.
const FLUSH_PATIENCE: Duration = Duration::from_secs(20);

/// Why a stream ended.
#[derive(Debug)]
pub enum Ended {
    /// The server left this timeline; everything up to the switch point is stored.
    Timeline {
        next: TimelineId,
        switch_lsn: Lsn,
    },
    Lost(ReplicationError),
    /// The server wants to stop while the store takes nothing: the slot keeps the WAL.
    ServerStopping,
    Conflict(Conflict),
    /// The configured grace is over or everything is stored.
    Cancelled,
}

/// What a stream needs besides its connection.
pub struct StreamContext<'a> {
    pub settings: &'a Settings,
    pub status: &'a watch::Sender<ArchiveStatus>,
    pub observer: &'a mut Observer,
    pub units: &'a mpsc::Sender<(TimelineId, Unit)>,
    pub trouble: watch::Receiver<StoreTrouble>,
}

/// A running stream.
pub struct Stream<'a> {
    context: StreamContext<'a>,
    sender: StatusSender,
    assembler: Assembler,
    progress: Progress,
    pacing: Pacing,
    uploader: Uploader,
    contiguous_from: Lsn,
    server_lsn: Lsn,
    exposure: Exposure,
    /// Stored ranges that the stream has not reached yet.
    known: VecDeque<WalRange>,
    /// Complete units that wait for a free PUT.
    waiting: VecDeque<Unit>,
    /// Everything before this was handed to a PUT or is stored.
    taken_up: Lsn,
    last_reported: Lsn,
    last_status: Instant,
    claims: Vec<Claim>,
    claiming: Option<JoinHandle<()>>,
    switch: Option<(TimelineId, Lsn)>,
}

impl<'a> Stream<'a> {
    pub fn new(context: StreamContext<'a>, resume: Resume, sender: StatusSender, uploader: Uploader) -> Self {
        let size = uploader.destination().segment_size;
        let mut known: VecDeque<WalRange> = resume.known.into();
        known.make_contiguous().sort_by_key(|r| (r.end_lsn(size), r.start_lsn(size)));
        Stream {
            pacing: Pacing::new(context.settings.rpo),
            assembler: Assembler::new(size, resume.start_lsn, &context.settings.budget),
            context,
            sender,
            progress: Progress::new(resume.timeline, resume.reported_lsn),
            uploader,
            contiguous_from: resume.contiguous_from,
            server_lsn: Lsn::ZERO,
            exposure: Exposure::new(resume.stored_lsn),
            known,
            waiting: VecDeque::new(),
            taken_up: resume.start_lsn,
            last_reported: Lsn::ZERO,
            last_status: Instant::now(),
            claims: Vec::new(),
            claiming: None,
            switch: None,
        }
    }

    /// Runs until the stream ends for one of the reasons of [`Ended`].
    ///
    /// Cancel safety: dropping this future loses nothing that was reported; what is in flight is streamed again.
    pub async fn run(mut self, mut reader: WalReader, cancel: &CancellationToken) -> (Ended, Option<WalReader>) {
        let ended = match self.report(true).await {
            Ok(()) => self.turn(&mut reader, cancel).await,
            Err(error) => Ended::Lost(error),
        };
        let ended = self.wind_up(ended, cancel).await;
        self.publish();
        self.uploader.stop().await;
        (ended, Some(reader))
    }

    async fn turn(&mut self, reader: &mut WalReader, cancel: &CancellationToken) -> Ended {
        let mut timer = tokio::time::interval(STATUS_INTERVAL);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.heed_budget();
            self.start_uploads(false);
            if let Some((next, switch_lsn)) = self.switch.filter(|(_, lsn)| self.progress.reported() >= *lsn) {
                return Ended::Timeline { next, switch_lsn };
            }
            let due = self.pacing.due().filter(|_| self.may_put_part());
            let wake = due.unwrap_or_else(|| Instant::now() + STATUS_INTERVAL);
            if self.uploader.has_failed() {
                return Ended::Lost(ReplicationError::Protocol("an upload of ours ended unexpectedly".to_owned()));
            }
            let reading = self.may_read() && self.switch.is_none();
            let step = tokio::select! {
                biased;
                () = cancel.cancelled() => return Ended::Cancelled,
                Some(stored) = self.uploader.next() => self.stored(stored).await,
                observation = self.context.observer.next() => self.observed(observation).await,
                () = tokio::time::sleep_until(wake), if due.is_some() => Ok(()),
                _ = timer.tick() => self.report(true).await.map_err(Ended::Lost),
                event = reader.next(), if reading => match event {
                    Ok(event) => self.event(event).await,
                    Err(error) => return Ended::Lost(error),
                },
            };
            match step {
                Ok(()) => {}
                Err(ended) => return ended,
            }
        }
    }

    async fn event(&mut self, event: WalEvent) -> Result<(), Ended> {
        match event {
            WalEvent::Data { start_lsn, wal_end, server_time, bytes } => {
                self.server_lsn = self.server_lsn.max(wal_end);
                let out_of_order = |e: super::assembler::OutOfOrder| ReplicationError::Protocol(e.to_string());
                let units = self.assembler.push(start_lsn, &bytes).map_err(|e| Ended::Lost(out_of_order(e)))?;
                self.context.observer.server_time(server_time);
                self.exposure.arrived(self.assembler.received(), Instant::now());
                self.compare_known(&units).await?;
                self.waiting.extend(units);
                if self.assembler.received() > self.taken_up {
                    self.pacing.arrived(Instant::now());
                }
                Ok(())
            }
            WalEvent::Keepalive { server_time, reply_requested, .. } => {
                self.context.observer.server_time(server_time);
                if reply_requested {
                    self.pacing.hurry(Instant::now());
                    self.report(true).await?;
                }
                Ok(())
            }
            WalEvent::EndOfTimeline { next_timeline, switch_lsn } => {
                self.switch = Some((next_timeline, switch_lsn));
                self.pacing.hurry(Instant::now());
                Ok(())
            }
        }
    }

    /// Compares what is stored already with what has arrived now; equal bytes count as stored.
    async fn compare_known(&mut self, complete: &[Unit]) -> Result<(), Ended> {
        let size = self.uploader.destination().segment_size;
        let codec = self.uploader.destination().repository.codec().clone();
        while let Some(range) = self.known.front().cloned() {
            let (start, end) = (range.start_lsn(size), range.end_lsn(size));
            if end > self.assembler.received() {
                break;
            }
            let held =
                complete.iter().find_map(|unit| slice(unit, start, end)).or_else(|| self.assembler.copy(start, end));
            if let Some(bytes) = held {
                let codec = codec.clone();
                let digest = tokio::task::spawn_blocking(move || codec.digest(&bytes)).await;
                let failed =
                    |_| Ended::Lost(ReplicationError::Protocol("a comparison of ours ended unexpectedly".into()));
                if ContentHash::of(&digest.map_err(failed)?) != range.hash {
                    return Err(Ended::Conflict(Conflict::OtherContent { timeline: range.timeline, start, end }));
                }
                self.progress.mark_stored(start, end);
                self.exposure.stored(self.progress.reported(), Instant::now());
                self.taken_up = self.taken_up.max(self.progress.reported());
            }
            self.known.pop_front();
        }
        Ok(())
    }

    /// Starts the PUTs that are due: complete units first, then the rest of the unit being filled.
    fn start_uploads(&mut self, everything: bool) {
        let timeline = self.progress.timeline();
        while self.uploader.has_room() {
            let Some(unit) = self.waiting.pop_front() else { break };
            let end = unit.start_lsn.saturating_add(unit.bytes.len() as u64);
            if self.assembler.is_whole(&unit) {
                let _ = self.context.units.try_send((timeline, unit.clone()));
                if self.progress.reported() < end {
                    self.uploader.start(timeline, unit.start_lsn, unit.bytes, true);
                }
            } else {
                let from = self.taken_up.max(unit.start_lsn);
                if let Some(rest) = slice(&unit, from, end) {
                    self.uploader.start(timeline, from, rest, false);
                }
            }
            self.taken_up = self.taken_up.max(end);
        }
        let received = self.assembler.received();
        let due = everything || self.pacing.due().is_some_and(|due| due <= Instant::now());
        if self.waiting.is_empty() && due && self.may_put_part() && received > self.taken_up {
            let from = self.taken_up.max(self.assembler.held_from());
            if let Some(bytes) = self.assembler.copy(from, received) {
                self.uploader.start(timeline, from, bytes, false);
                self.taken_up = received;
            }
        }
        if self.waiting.is_empty() && received <= self.taken_up {
            self.pacing.taken_up();
        }
    }

    fn may_read(&self) -> bool {
        // A unit must be able to fill, or nothing would ever be read again.
        let own_max = self.context.settings.buffer_bytes_max.max(self.assembler.unit_bytes());
        self.held_bytes() < if self.is_short() { SHARE_MIN } else { own_max }
    }

    /// Whether the streams of the process hold too much. One that compares what it receives with stored ranges needs them whole.
    fn is_short(&self) -> bool {
        self.known.is_empty() && self.context.settings.budget.is_short()
    }

    /// Nothing is kept that is stored while memory is short, and what keeps this stream from reading is stored at once.
    fn heed_budget(&mut self) {
        if !self.is_short() {
            return;
        }
        if self.progress.reported() >= self.assembler.received() {
            self.assembler.let_go_of_parts();
        } else if !self.may_read() && self.assembler.received() > self.taken_up {
            self.pacing.hurry(Instant::now());
        }
    }

    /// Bytes that lie in a stored range are put only when the whole range was compared: a server with another past must not
    /// leave anything beside what is stored.
    fn may_put_part(&self) -> bool {
        let (size, received) = (self.uploader.destination().segment_size, self.assembler.received());
        self.uploader.has_room() && !self.known.iter().any(|range| range.start_lsn(size) < received)
    }

    async fn stored(&mut self, stored: Stored) -> Result<(), Ended> {
        tracing::debug!(object = stored.key.as_str(), bytes = stored.content_bytes, "WAL stored");
        if !stored.unit {
            self.pacing.put_took(stored.latency);
        }
        if self.progress.mark_stored(stored.start_lsn, stored.end_lsn) {
            self.exposure.stored(self.progress.reported(), Instant::now());
            self.report(false).await?;
            self.write_claims();
        }
        Ok(())
    }

    async fn observed(&mut self, observation: Observation) -> Result<(), Ended> {
        match observation {
            Observation::Claim { timeline, server_time, lsn, source, margin_micros, run } => {
                // The newest is dropped when many wait: it would be reached last.
                if timeline == self.progress.timeline() && self.claims.len() < CLAIMS_WAITING_MAX {
                    let lsn = before_page_header(lsn, self.uploader.destination().segment_size);
                    self.claims.push(Claim { timeline, server_time, lsn, source, margin_micros, run });
                    self.write_claims();
                }
            }
            Observation::Synchronous(synchronous) => {
                let rpo = if synchronous { Duration::ZERO } else { self.context.settings.rpo };
                self.pacing.set_rpo(rpo);
                self.context.status.send_modify(|s| s.synchronous = synchronous);
            }
            Observation::Stopping => {
                if self.context.trouble.borrow().is_some() && self.held_bytes() > 0 {
                    return Err(Ended::ServerStopping);
                }
            }
        }
        Ok(())
    }

    /// Stores the newest claim whose WAL is stored; it makes the earlier ones of its run superfluous. One at a time and
    /// beside the stream: a store that hangs must not keep a status from the server. One that fails is made up for by the
    /// next claim.
    fn write_claims(&mut self) {
        if self.claiming.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        let stored = self.progress.reported();
        let Some(last) = self.claims.iter().rposition(|c| stored >= c.lsn) else { return };
        let Some(claim) = self.claims.drain(..=last).next_back() else { return };
        let (destination, status) = (self.uploader.destination().clone(), self.context.status.clone());
        let write = async move {
            match coverage::write(&destination.repository, destination.incarnation, &claim).await {
                Ok(()) => {
                    let until = claim.server_time.saturating_add_micros(-claim.margin_micros);
                    status.send_modify(|s| s.covered_until = Some(until));
                }
                Err(error) => tracing::debug!(%error, "store a claim of coverage: failed, the next one follows"),
            }
        };
        self.claiming = Some(tokio::spawn(write.in_current_span()));
    }

    /// Tells the server how far WAL is stored: when that rose, or on demand.
    async fn report(&mut self, always: bool) -> Result<(), ReplicationError> {
        let position = self.progress.reported();
        if always || position > self.last_reported {
            self.sender.send(StatusUpdate::all_at(position)).await?;
            self.last_reported = position;
            self.last_status = Instant::now();
        }
        self.publish();
        Ok(())
    }

    fn publish(&self) {
        let trouble = self.context.trouble.borrow().clone();
        let state = trouble.map_or(State::Streaming, State::StoreFailing);
        let exposure = self.exposure.figures(Instant::now());
        let timeline = self.progress.timeline();
        let stored = StoredStream { timeline, start_lsn: self.contiguous_from, end_lsn: self.progress.reported() };
        self.context.status.send_modify(|s| {
            if s.state != state {
                s.since = std::time::Instant::now();
                s.state = state;
            }
            s.timeline = Some(timeline);
            s.server_lsn = self.server_lsn.max(self.assembler.received());
            s.received_lsn = self.assembler.received();
            s.exposure = exposure;
            s.stored = Some(stored);
        });
    }

    /// Stores what has arrived before the stream is given up, as far as the store takes it.
    async fn wind_up(&mut self, ended: Ended, cancel: &CancellationToken) -> Ended {
        if matches!(ended, Ended::Conflict(_) | Ended::ServerStopping | Ended::Timeline { .. }) {
            return ended;
        }
        let grace = if cancel.is_cancelled() { self.context.settings.shutdown_grace } else { FLUSH_PATIENCE };
        let listening = !matches!(ended, Ended::Lost(_));
        let mut timer = tokio::time::interval(STATUS_INTERVAL);
        let flushed = tokio::time::timeout(grace, async {
            loop {
                self.start_uploads(true);
                let stored = tokio::select! {
                    biased;
                    stored = self.uploader.next() => stored,
                    _ = timer.tick(), if listening => {
                        let _ = self.report(true).await;
                        continue;
                    }
                };
                let Some(stored) = stored else { break };
                self.progress.mark_stored(stored.start_lsn, stored.end_lsn);
                let _ = self.report(false).await;
            }
        });
        if flushed.await.is_err() {
            let (stored, received) = (self.progress.reported(), self.assembler.received());
            tracing::warn!(%stored, %received, "the stream ended before everything was stored; the slot keeps the rest");
        }
        ended
    }

    /// Bytes received and not stored.
    fn held_bytes(&self) -> u64 {
        let waiting: u64 = self.waiting.iter().map(|u| u.bytes.len() as u64).sum();
        waiting + self.uploader.in_flight_bytes() + self.assembler.buffered_bytes()
    }
}

impl From<ReplicationError> for Ended {
    fn from(error: ReplicationError) -> Self {
        Ended::Lost(error)
    }
}

/// The insert position may lie right behind a page header that is not written yet: nothing of the log is between, and a
/// claim about the page's start is one that the stored stream reaches also when nothing more is written.
fn before_page_header(lsn: Lsn, size: SegmentSize) -> Lsn {
    const PAGE: u64 = 8192;
    const SHORT_HEADER: u64 = 24;
    const LONG_HEADER: u64 = 40;
    let page = Lsn(lsn.0 - lsn.0 % PAGE);
    let header = if size.start_of(page) == page { LONG_HEADER } else { SHORT_HEADER };
    if lsn.0 - page.0 == header { page } else { lsn }
}

fn slice(unit: &Unit, start: Lsn, end: Lsn) -> Option<bytes::Bytes> {
    let from = usize::try_from(start.checked_since(unit.start_lsn)?).ok()?;
    let to = usize::try_from(end.checked_since(unit.start_lsn)?).ok()?;
    (from <= to && to <= unit.bytes.len()).then(|| unit.bytes.slice(from..to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_position_right_behind_a_page_header_is_that_page_s_start() {
        let segment = 3 << 24;
        let check = |lsn: u64, expected: u64| {
            assert_eq!(before_page_header(Lsn(lsn), SegmentSize::MIB_16), Lsn(expected), "{lsn:X}");
        };
        check(segment + 40, segment);
        check(segment + 8192 + 24, segment + 8192);
        // The last bytes of a record that crosses the border of two pages.
        check(segment + 8192 + 40, segment + 8192 + 40);
        check(segment + 8192 + 32, segment + 8192 + 32);
        check(segment + 24, segment + 24);
        check(segment + 8192, segment + 8192);
    }
}
