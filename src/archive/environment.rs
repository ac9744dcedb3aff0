//! One environment's archiver: which server, from where, again and again until stopped.
//!
//! The repository is listed first, the server's position asked afterwards. Every connection is recorded in the lease before
//! it takes the slot; a slot in use is waited for and its holder named; a connection is ended only when it stands in our own
//! record and its process is gone.

use std::time::Duration;

use anyhow::Context;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::housekeeping;
use super::indexing;
use super::missing;
use super::observer::{Asking, Observer};
use super::others::Others;
use super::resume::{self, Conflict, Resume, ServerPosition};
use super::servers::{self, Primary, Server};
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
use crate::repository::catalogue;
use crate::repository::codec::Kind;
use crate::repository::identity::{self, Identity, KnownIncarnation};
use crate::repository::layout::ContentHash;
use crate::repository::{Generation, Key, Repository};
use crate::util::clock;
use crate::util::retry::Backoff;

/// How long the index of the last segments may take after a stream; what is not stored then is made later.
const INDEXING_PATIENCE: Duration = Duration::from_secs(5);

/// How long a conflict is left alone while no incarnation is opened.
const CONFLICT_PAUSE: Duration = Duration::from_secs(20);

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
    /// Somebody else held the slot at the last attempt.
    slot_in_use: bool,
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
        let (repository, budget) = (self.repository.clone(), self.settings.budget.clone());
        let tidying = housekeeping::run(repository, self.status.subscribe(), budget, cancel.clone());
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
            () = self.until_worth_an_attempt(&state, backoff) => {}
        }
    }

    /// An attempt lists all WAL. A conflict ends when somebody mends the configuration or opens an incarnation, and only the
    /// latter must be noticed soon.
    async fn until_worth_an_attempt(&self, state: &State, backoff: &mut Backoff) {
        tokio::time::sleep(backoff.delay()).await;
        if !matches!(state, State::Conflict(_)) {
            return;
        }
        let before = identity::current(&self.repository).await.ok().flatten();
        let begun = tokio::time::Instant::now();
        while begun.elapsed() < CONFLICT_PAUSE {
            tokio::time::sleep(Duration::from_secs(3)).await;
            if identity::current(&self.repository).await.is_ok_and(|now| now != before) {
                return;
            }
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
        let stored = known.as_ref().map(|known| known.identity.system_id);
        let candidates = match servers::in_order(servers::primaries(&self.connect).await?, stored) {
            Ok(candidates) => candidates,
            Err(conflict) => return Ok(Attempt::Again(State::Conflict(conflict.to_string()))),
        };
        servers::raise_alarm(&self.status, candidates.alarm);
        let considered: Vec<Primary> = candidates.servers.iter().map(Server::primary).collect();
        let mut first_conflict = None;
        for mut server in candidates.servers {
            match self.prepare(&mut server, known.as_ref()).await? {
                Ok((destination, resume)) => {
                    let resume = memory.comparable(resume, destination.segment_size);
                    let others = self.others(&server, resume.timeline, considered);
                    return self.stream(server, (destination, resume), others, memory, cancel).await;
                }
                // One that does not descend from what is stored does not hinder one that does.
                Err(conflict) => {
                    first_conflict.get_or_insert(conflict);
                }
            }
        }
        let conflict = first_conflict.context("no host is configured")?;
        Ok(Attempt::Again(State::Conflict(conflict.to_string())))
    }

    /// Where the WAL of a server goes, and from where it is asked for.
    async fn prepare(
        &self,
        server: &mut Server,
        known: Option<&KnownIncarnation>,
    ) -> anyhow::Result<Result<(Destination, Resume), Conflict>> {
        let segment_size = server.session.segment_size().await?;
        let system_id = server.identity.system_id;
        let known = match known {
            Some(known) => known.clone(),
            None => match identity::names(&self.repository).await?.newest_lost() {
                Some(lost) if lost.system_id == system_id => {
                    tracing::warn!(incarnation = %lost, "the identity object was gone: it is written again");
                    identity::write(&self.repository, lost, first_identity(server, segment_size)?).await?
                }
                Some(lost) => {
                    return Ok(Err(Conflict::OtherSystem { server: system_id, stored: lost.system_id }));
                }
                None => identity::open_next(&self.repository, first_identity(server, segment_size)?).await?,
            },
        };
        if known.identity.system_id != system_id {
            return Ok(Err(Conflict::OtherSystem { server: system_id, stored: known.identity.system_id }));
        }
        if known.identity.segment_size != segment_size {
            let (server, stored) = (segment_size.bytes(), known.identity.segment_size.bytes());
            return Ok(Err(Conflict::OtherSegmentSize { server, stored }));
        }
        let (repository, incarnation) = (self.repository.clone(), known.incarnation);
        let destination = Destination { repository, incarnation, segment_size };
        let position = self.server_position(server, &destination).await?;
        let resume = self.where_to_go_on(server, &destination, &position).await?;
        Ok(resume.map(|resume| (destination, resume)))
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
        let mut gaps = catalogue::list_gaps(&to.repository, to.incarnation).await.context("list gaps")?;
        gaps.extend(catalogue::list_removed_as_gaps(&to.repository, to.incarnation).await.context("list removed WAL")?);
        // The repository was listed first; a server asked before it could seem to be behind.
        server.identity = server.session.identify_system().await?;
        let position = ServerPosition { flush_lsn: server.identity.flush_lsn, ..position.clone() };
        if let Err(conflict @ (Conflict::NoCommonHistory { .. } | Conflict::OlderTimeline { .. })) =
            resume::plan(&position, &listing, &gaps, size)
        {
            // No slot on a server that is not followed: nobody would ever move it on.
            return Ok(Err(conflict));
        }
        server.session.create_physical_slot(&self.settings.slot).await.context("create the replication slot")?;
        let slot_restart_lsn = self.slot_restart(&mut server.session, server.host_index).await?;
        let position = ServerPosition { slot_restart_lsn, ..position };
        Ok(resume::plan(&position, &listing, &gaps, size))
    }

    /// Where our slot keeps WAL from; `None` when it keeps nothing, or cannot be asked (14 without SQL).
    pub(super) async fn slot_restart(&self, session: &mut Session, host_index: usize) -> anyhow::Result<Option<Lsn>> {
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

    /// The process that holds our slot, where it can be asked without taking the slot.
    async fn slot_holder(&self, host_index: usize) -> Option<i32> {
        let mut sql = Sql::connect(&self.connect, host_index).await.ok()?;
        let slots = sql.slots().await.unwrap_or_default();
        sql.close().await;
        slots.into_iter().find(|slot| slot.name == self.settings.slot)?.active_pid
    }

    async fn wait_for_slot(&self, holder_pid: Option<i32>, message: &str, host_index: usize) -> Attempt {
        let holder = match holder_pid {
            Some(pid) => slot::ask_holder(self, pid, host_index).await,
            None => None,
        };
        Attempt::Again(State::Waiting(holder.unwrap_or_else(|| message.to_owned())))
    }

    fn others(&self, server: &Server, timeline: TimelineId, considered: Vec<Primary>) -> Others {
        let (connect, status, interval) = (self.connect.clone(), self.status.clone(), self.settings.hosts_interval);
        Others { connect, followed: server.primary(), timeline, considered, interval, status }
    }

    /// Streams timeline after timeline until something ends it.
    async fn stream(
        &self,
        server: Server,
        (destination, resume): (Destination, Resume),
        others: Others,
        memory: &mut Memory,
        cancel: &CancellationToken,
    ) -> anyhow::Result<Attempt> {
        let Server { session, host_index, name, .. } = server;
        if memory.slot_in_use
            && let Some(pid) = self.slot_holder(host_index).await
        {
            session.close().await;
            return Ok(self.wait_for_slot(Some(pid), "the slot is in use", host_index).await);
        }
        memory.slot_in_use = false;
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
        let indexing = tokio::spawn(indexing::run(destination.clone(), passing).in_current_span());
        let context = StreamContext {
            settings: &self.settings,
            status: &self.status,
            observer: &mut observer,
            units: &units,
            trouble: troubles,
        };
        let (reader, sender) = stream.split();
        let uploader = Uploader::new(destination.clone(), &self.settings, trouble);
        let leave = cancel.child_token();
        let watching = AbortOnDropHandle::new(tokio::spawn(others.run(leave.clone()).in_current_span()));
        let (ended, _reader) = Stream::new(context, resume.clone(), sender, uploader).run(reader, &leave).await;
        leave.cancel();
        let _ = watching.await;
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
            // A primary on a higher timeline appeared: it is followed now, if it descends from what is stored.
            Ended::Cancelled if !cancel.is_cancelled() => Ok(Attempt::Next),
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
                memory.slot_in_use = true;
                Ok(self.wait_for_slot(holder_pid, &message.to_string(), host_index).await)
            }
            ReplicationError::SegmentRemoved(_) if resume.asks_for_comparison(destination.segment_size) => {
                let (timeline, lsn) = (resume.timeline, resume.stored_lsn);
                tracing::info!(%timeline, %lsn, "the server has the WAL before this no more: it is not compared");
                memory.incomparable = Some((timeline, lsn));
                Ok(Attempt::Next)
            }
            ReplicationError::SegmentRemoved(_) | ReplicationError::SlotInvalidated(_) => {
                if missing::make_good(self, destination, resume, host_index, &error.to_string()).await? {
                    self.status.send_modify(|s| s.gaps_found += 1);
                }
                Ok(Attempt::Next)
            }
            ReplicationError::NotInHistory(_) | ReplicationError::AheadOfServer(_) => {
                Ok(Attempt::Again(State::Conflict(error.to_string())))
            }
            other => Err(other.into()),
        }
    }
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
