//! One environment's archiver: which server, from where, again and again until stopped.
//!
//! The repository is listed first, the server's position asked afterwards. Every connection is recorded in the lease before
//! it takes the slot; a slot in use is waited for and its holder named; a connection is ended only when it stands in our own
//! record and its process is gone.

use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::housekeeping;
use super::indexing;
use super::observer::{Asking, Observer};
use super::resume::{self, Conflict, Resume, ServerPosition};
use super::settings::Settings;
use super::slot;
use super::status::{ArchiveStatus, State};
use super::stream::{Ended, Stream, StreamContext};
use super::tidy;
use super::uploader::{Destination, Uploader};
use crate::pg::timeline::HistoryFile;
use crate::pg::{Lsn, SegmentSize, TimelineId};
use crate::replication::session::SystemIdentity;
use crate::replication::{ConnectConfig, ReplicationError, Session, Sql, StartReplication};
use crate::repository::catalogue::{self, Gap};
use crate::repository::codec::Kind;
use crate::repository::identity::{self, Identity};
use crate::repository::layout::ContentHash;
use crate::repository::{Generation, Key, Repository};
use crate::util::clock;
use crate::util::retry::Backoff;

/// How long the index of the last segments may take after a stream; what is not stored then is made later.
const INDEXING_PATIENCE: Duration = Duration::from_secs(5);

/// Everything that an archiver needs.
pub struct Archiver {
    pub settings: Settings,
    pub connect: ConnectConfig,
    pub repository: Repository,
    pub generation: Generation,
    pub status: watch::Sender<ArchiveStatus>,
}

/// What one attempt leaves for the next.
#[derive(Default)]
struct Memory {
    connections: u32,
    /// At this position the server had nothing before it that could be compared.
    incomparable: Option<(TimelineId, Lsn)>,
}

impl Memory {
    fn comparable(&self, resume: Resume, size: SegmentSize) -> Resume {
        match self.incomparable == Some((resume.timeline, resume.stored_lsn)) {
            true => resume.without_comparison(size),
            false => resume,
        }
    }
}

/// A server that was chosen, with an idle connection to it.
struct Server {
    session: Session,
    host_index: usize,
    name: String,
    identity: SystemIdentity,
}

/// What one attempt came to.
enum Attempt {
    Stop,
    /// Try again after a pause that grows.
    Again(State),
    /// Try again at once.
    Next,
}

impl Archiver {
    /// Archives until `cancel` fires; every error is waited out, a conflict until the repository or server changes.
    ///
    /// Cancel safety: after `cancel` the tail is stored within `shutdown_grace`; dropping the future loses nothing that
    /// was reported to the server.
    pub async fn run(self, cancel: CancellationToken) {
        let tidying = housekeeping::run(self.repository.clone(), self.status.subscribe(), cancel.clone());
        tokio::join!(self.archive(&cancel), tidying);
        self.set_state(State::Stopped);
    }

    async fn archive(&self, cancel: &CancellationToken) {
        let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
        let mut memory = Memory::default();
        while !cancel.is_cancelled() {
            match self.attempt(&mut memory, cancel).await {
                Ok(Attempt::Stop) => break,
                Ok(Attempt::Next) => {
                    backoff.reset();
                    // Whatever makes us go on at once, again and again, must not become a busy loop.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Ok(Attempt::Again(state)) => self.pause(state, &mut backoff, cancel).await,
                Err(error) => {
                    let state = State::Disconnected(format!("{error:#}"));
                    self.pause(state, &mut backoff, cancel).await;
                }
            }
        }
    }

    async fn pause(&self, state: State, backoff: &mut Backoff, cancel: &CancellationToken) {
        if self.set_state(state.clone()) {
            tracing::warn!(state = ?state, "WAL is not archived");
        }
        tokio::select! {
            () = cancel.cancelled() => {}
            () = tokio::time::sleep(backoff.delay()) => {}
        }
    }

    /// Returns whether the state is another one than before.
    fn set_state(&self, state: State) -> bool {
        self.status.send_if_modified(|s| {
            let changed = s.state != state;
            if changed {
                s.since = std::time::Instant::now();
                s.state = state;
            }
            changed
        })
    }

    async fn attempt(&self, memory: &mut Memory, cancel: &CancellationToken) -> anyhow::Result<Attempt> {
        let known = identity::current(&self.repository).await.context("read the repository's identity")?;
        let mut server = match self.choose_server().await? {
            Ok(server) => server,
            Err(conflict) => return Ok(Attempt::Again(State::Conflict(conflict.to_string()))),
        };
        let segment_size = server.session.segment_size().await?;
        let system_id = server.identity.system_id;
        let known = match known {
            Some(known) => known,
            None => identity::open_next(&self.repository, first_identity(&server, segment_size)?).await?,
        };
        if known.identity.system_id != system_id {
            let conflict = Conflict::OtherSystem { server: system_id, stored: known.identity.system_id };
            return Ok(Attempt::Again(State::Conflict(conflict.to_string())));
        }
        if known.identity.segment_size != segment_size {
            let (server, stored) = (segment_size.bytes(), known.identity.segment_size.bytes());
            let conflict = Conflict::OtherSegmentSize { server, stored };
            return Ok(Attempt::Again(State::Conflict(conflict.to_string())));
        }
        let (repository, incarnation) = (self.repository.clone(), known.incarnation);
        let destination = Destination { repository, incarnation, segment_size };
        let position = self.server_position(&mut server, &destination).await?;
        let resume = match self.where_to_go_on(&mut server, &destination, &position).await? {
            Ok(resume) => memory.comparable(resume, segment_size),
            Err(conflict) => return Ok(Attempt::Again(State::Conflict(conflict.to_string()))),
        };
        self.stream(server, destination, resume, memory, cancel).await
    }

    /// The primary on the highest timeline; two primaries are a conflict, and a standby is never followed.
    async fn choose_server(&self) -> anyhow::Result<Result<Server, Conflict>> {
        let mut primaries: Vec<Server> = Vec::new();
        let mut last_error = None;
        for (host_index, host) in self.connect.hosts.iter().enumerate() {
            let name = host.to_string();
            match connect(&self.connect, host_index).await {
                Ok((session, identity)) if !session.in_hot_standby() => {
                    primaries.push(Server { session, host_index, name, identity });
                }
                Ok((session, _)) => {
                    last_error.get_or_insert(anyhow::anyhow!("{name} is a standby"));
                    session.close().await;
                }
                Err(error) => last_error = Some(anyhow::Error::new(error)),
            }
        }
        if let [first, second, ..] = primaries.as_slice() {
            let text = format!("{} on timeline {}, ", first.name, first.identity.timeline);
            let text = format!("{text}{} on timeline {}", second.name, second.identity.timeline);
            return Ok(Err(Conflict::TwoPrimaries(text)));
        }
        match primaries.pop() {
            Some(server) => Ok(Ok(server)),
            None => Err(last_error.unwrap_or_else(|| anyhow::anyhow!("no host is configured"))),
        }
    }

    /// The server's history; every history file of its path is stored before anything of its timeline.
    async fn server_position(&self, server: &mut Server, to: &Destination) -> anyhow::Result<ServerPosition> {
        let SystemIdentity { timeline, flush_lsn, .. } = server.identity;
        let mut history = HistoryFile::default();
        if timeline.0 > 1 {
            history = self.store_history(server, to, timeline).await?;
            for entry in history.entries.iter().filter(|e| e.timeline.0 > 1) {
                // An ancestor's own file is a convenience for readers: its content is in the child's too.
                if let Err(error) = self.store_history(server, to, entry.timeline).await {
                    tracing::debug!(timeline = %entry.timeline, %error, "no history file of an ancestor");
                }
            }
        }
        Ok(ServerPosition { timeline, flush_lsn, slot_restart_lsn: None, history })
    }

    async fn store_history(
        &self,
        server: &mut Server,
        to: &Destination,
        timeline: TimelineId,
    ) -> anyhow::Result<HistoryFile> {
        let content = server.session.timeline_history(timeline).await?.content;
        let text = std::str::from_utf8(&content).context("read the history file as text")?;
        let history = text.parse()?;
        let hash = ContentHash::of(&self.repository.codec().digest(&content));
        let key = Key::history(to.incarnation, timeline, hash);
        if self.repository.store().head(&key).await?.is_none() {
            self.repository.write(&key, Kind::History, content.clone()).await.context("store the history file")?;
        }
        Ok(history)
    }

    async fn where_to_go_on(
        &self,
        server: &mut Server,
        to: &Destination,
        position: &ServerPosition,
    ) -> anyhow::Result<Result<Resume, Conflict>> {
        let size = to.segment_size;
        let listing = catalogue::list_wal(&to.repository, to.incarnation, size).await.context("list WAL")?;
        let gaps = catalogue::list_gaps(&to.repository, to.incarnation).await.context("list gaps")?;
        // The repository was listed first; a server asked before it could seem to be behind.
        server.identity = server.session.identify_system().await?;
        server.session.create_physical_slot(&self.settings.slot).await.context("create the replication slot")?;
        let slot_restart_lsn = self.slot_restart(&mut server.session, server.host_index).await?;
        let flush_lsn = server.identity.flush_lsn;
        let position = ServerPosition { flush_lsn, slot_restart_lsn, ..position.clone() };
        match resume::plan(&position, &listing, &gaps, size) {
            Ok(Some(resume)) => Ok(Ok(resume)),
            Ok(None) => Ok(Ok(begin_at_slot(server.identity, slot_restart_lsn, size))),
            Err(conflict) => Ok(Err(conflict)),
        }
    }

    /// Where our slot keeps WAL from; `None` when it keeps nothing, or cannot be asked (14 without SQL).
    async fn slot_restart(&self, session: &mut Session, host_index: usize) -> anyhow::Result<Option<Lsn>> {
        match session.read_slot(&self.settings.slot).await {
            Ok(slot) => Ok(slot.and_then(|s| s.restart_lsn)),
            Err(ReplicationError::Unsupported(_)) => {
                let Ok(mut sql) = Sql::connect(&self.connect, host_index).await else { return Ok(None) };
                let slots = sql.slots().await.unwrap_or_default();
                sql.close().await;
                Ok(slots.into_iter().find(|s| s.name == self.settings.slot).and_then(|s| s.restart_lsn))
            }
            Err(error) => Err(error).context("read the replication slot"),
        }
    }

    /// Streams timeline after timeline until something ends it.
    async fn stream(
        &self,
        server: Server,
        destination: Destination,
        resume: Resume,
        memory: &mut Memory,
        cancel: &CancellationToken,
    ) -> anyhow::Result<Attempt> {
        let Server { session, host_index, name, .. } = server;
        memory.connections += 1;
        let backend_pid = session.backend_pid();
        slot::record(self, memory.connections, host_index, backend_pid).await.context("record the connection")?;
        let (timeline, start_lsn) = (resume.timeline, resume.start_lsn);
        let from = StartReplication { slot: Some(self.settings.slot.clone()), start_lsn, timeline };
        let stream = match session.start_replication(&from).await {
            Ok(stream) => stream,
            Err(error) => return self.refused(error, memory, &destination, &resume, host_index).await,
        };
        tracing::info!(server = name, %timeline, lsn = %start_lsn, "streaming");
        let (trouble, troubles) = watch::channel(None);
        let asking = Asking {
            connect: self.connect.clone(),
            host_index,
            coverage_interval: self.settings.coverage_interval,
            walsender_pid: backend_pid,
        };
        let mut observer = Observer::start(asking, troubles.clone());
        let (units, passing) = mpsc::channel(indexing::UNITS_WAITING_MAX);
        let indexing = tokio::spawn(indexing::run(destination.clone(), passing));
        let context = StreamContext {
            settings: &self.settings,
            status: &self.status,
            observer: &mut observer,
            units: &units,
            trouble: troubles,
        };
        let (reader, sender) = stream.split();
        let uploader = Uploader::new(destination.clone(), self.settings.puts_in_flight, trouble);
        let (ended, _reader) = Stream::new(context, resume.clone(), sender, uploader).run(reader, cancel).await;
        observer.stop().await;
        drop(units);
        let stop_indexing = indexing.abort_handle();
        if tokio::time::timeout(INDEXING_PATIENCE, indexing).await.is_err() {
            stop_indexing.abort();
        }
        match ended {
            // Before 18 the server takes the request, and says only then that it has the WAL no more.
            Ended::Lost(error @ (ReplicationError::SegmentRemoved(_) | ReplicationError::SlotInvalidated(_))) => {
                self.refused(error, memory, &destination, &resume, host_index).await
            }
            ended => self.after(ended, &destination, timeline).await,
        }
    }

    async fn after(&self, ended: Ended, destination: &Destination, timeline: TimelineId) -> anyhow::Result<Attempt> {
        match ended {
            Ended::Cancelled => Ok(Attempt::Stop),
            Ended::Conflict(conflict) => Ok(Attempt::Again(State::Conflict(conflict.to_string()))),
            Ended::ServerStopping => Ok(Attempt::Again(State::Disconnected("the server shuts down".into()))),
            Ended::Timeline { next, switch_lsn } => {
                tracing::info!(%timeline, %next, %switch_lsn, "the server went to another timeline");
                tidy::seal(destination, timeline, destination.segment_size.segment_of(switch_lsn)).await?;
                Ok(Attempt::Next)
            }
            Ended::Lost(error) => Ok(Attempt::Again(State::Disconnected(error.to_string()))),
        }
    }

    /// What to do when the server does not give what was asked for.
    async fn refused(
        &self,
        error: ReplicationError,
        memory: &mut Memory,
        destination: &Destination,
        resume: &Resume,
        host_index: usize,
    ) -> anyhow::Result<Attempt> {
        match error {
            ReplicationError::SlotInUse { holder_pid, message } => {
                let holder = match holder_pid {
                    Some(pid) => slot::ask_holder(self, pid, host_index).await,
                    None => None,
                };
                Ok(Attempt::Again(State::Waiting(holder.unwrap_or_else(|| message.to_string()))))
            }
            ReplicationError::SegmentRemoved(_) if resume.asks_for_comparison(destination.segment_size) => {
                let (timeline, lsn) = (resume.timeline, resume.stored_lsn);
                tracing::warn!(%timeline, %lsn, "the server has the WAL before this no more: it is not compared");
                memory.incomparable = Some((timeline, lsn));
                Ok(Attempt::Next)
            }
            ReplicationError::SegmentRemoved(_) | ReplicationError::SlotInvalidated(_) => {
                self.record_gap(destination, resume, host_index, &error.to_string()).await
            }
            ReplicationError::NotInHistory(_) | ReplicationError::AheadOfServer(_) => {
                Ok(Attempt::Again(State::Conflict(error.to_string())))
            }
            other => Err(other.into()),
        }
    }

    /// The byte that we lack is gone from this server: believed after a fresh listing that still lacks it.
    ///
    /// The gap ends where the slot keeps WAL from. A slot that still keeps WAL is not touched: dropping it would let the
    /// server remove more.
    async fn record_gap(
        &self,
        destination: &Destination,
        resume: &Resume,
        host_index: usize,
        cause: &str,
    ) -> anyhow::Result<Attempt> {
        let Destination { repository, incarnation, segment_size } = destination;
        let listing = catalogue::list_wal(repository, *incarnation, *segment_size).await?;
        let gaps = catalogue::list_gaps(repository, *incarnation).await?;
        let begin = Some(resume.start_lsn);
        let (_, stored) = resume::prefix(&listing, &gaps, resume.timeline, begin, *segment_size);
        if stored > resume.stored_lsn {
            return Ok(Attempt::Next);
        }
        let (mut session, identity) = connect(&self.connect, host_index).await?;
        let start_lsn = resume.stored_lsn;
        let mut restart = self.slot_restart(&mut session, host_index).await?;
        if restart.is_none_or(|restart| restart <= start_lsn) {
            // It keeps nothing, or says that it keeps what is gone (a report moves it back; an invalidated one of 16 and 17
            // protects nothing even then). A new one begins at the last redo pointer.
            match session.drop_slot(&self.settings.slot).await {
                Ok(()) | Err(ReplicationError::SlotMissing(_)) => {}
                Err(error) => return Err(error).context("drop the slot that lost its WAL"),
            }
            session.create_physical_slot(&self.settings.slot).await?;
            restart = self.slot_restart(&mut session, host_index).await?;
        }
        session.close().await;
        let starts = listing.ranges.iter().map(|o| &o.range).filter(|r| r.timeline == resume.timeline);
        let next_stored = starts.map(|r| r.start_lsn(*segment_size)).filter(|s| *s > start_lsn).min();
        let kept = segment_size.start_of(restart.unwrap_or(identity.flush_lsn));
        let end_lsn = kept.min(next_stored.unwrap_or(Lsn::MAX));
        if end_lsn <= start_lsn {
            anyhow::bail!("{cause}; and the slot keeps no WAL after {start_lsn}");
        }
        let (timeline, found_at) = (resume.timeline, clock::now().into());
        let gap = Gap { timeline, start_lsn, end_lsn, found_at, cause: cause.to_owned() };
        catalogue::write_gap(repository, *incarnation, &gap).await.context("record a gap")?;
        tracing::error!(%timeline, %start_lsn, %end_lsn, cause, "WAL is missing for good: a gap is recorded");
        self.status.send_modify(|s| s.gaps_found += 1);
        Ok(Attempt::Next)
    }
}

/// The first stream of an empty repository begins where the slot keeps WAL from.
fn begin_at_slot(identity: SystemIdentity, slot_restart_lsn: Option<Lsn>, size: SegmentSize) -> Resume {
    let start_lsn = size.start_of(slot_restart_lsn.unwrap_or(identity.flush_lsn));
    let (reported_lsn, stored_lsn, contiguous_from) = (start_lsn, start_lsn, start_lsn);
    Resume { timeline: identity.timeline, start_lsn, reported_lsn, stored_lsn, contiguous_from, known: Vec::new() }
}

async fn connect(config: &ConnectConfig, host_index: usize) -> Result<(Session, SystemIdentity), ReplicationError> {
    let mut session = Session::connect(config, host_index).await?;
    let identity = session.identify_system().await?;
    Ok((session, identity))
}

fn first_identity(server: &Server, segment_size: SegmentSize) -> anyhow::Result<Identity> {
    Ok(Identity {
        system_id: server.identity.system_id,
        major: server.session.major()?,
        segment_size,
        block_size: 8192,
        opened_at: clock::now().into(),
        reason: "first".to_owned(),
    })
}
