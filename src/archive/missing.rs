//! WAL that the followed server has no more: brought from another configured host, or a recorded gap.
//!
//! A gap is recorded only after every configured host was asked, followed by a listing that still lacks the byte. It ends
//! where the slot keeps WAL from.

use std::time::Duration;

use anyhow::Context;
use tokio::sync::watch;

use super::assembler::{Assembler, Unit, unit_bytes};
use super::environment::Archiver;
use super::resume::{self, Resume};
use super::servers;
use super::uploader::{Destination, Uploader};
use crate::pg::{Lsn, SegmentSize, SystemId};
use crate::replication::{ReplicationError, StartReplication, WalEvent};
use crate::repository::catalogue::{self, Gap};
use crate::repository::layout::{ContentHash, WalRange};
use crate::util::clock;

/// How long a host may send nothing of what is lacking: it may not have received it yet.
const SILENCE_MAX: Duration = Duration::from_secs(20);

/// `[start, end)` of the followed timeline.
#[derive(Debug, Clone, Copy)]
struct Lacking {
    start_lsn: Lsn,
    end_lsn: Lsn,
}

/// Brings what the followed server lacks from another host, or records that it is gone; returns whether a gap was recorded.
pub(super) async fn make_good(
    archiver: &Archiver,
    destination: &Destination,
    resume: &Resume,
    host_index: usize,
    cause: &str,
) -> anyhow::Result<bool> {
    let slot_start = kept_from(archiver, host_index, resume.stored_lsn).await?;
    let kept = destination.segment_size.start_of(slot_start.lsn);
    let Some(lacking) = still_lacking(destination, resume, kept).await? else { return Ok(false) };
    for other in (0..archiver.connect.hosts.len()).filter(|other| *other != host_index) {
        match fetch(archiver, destination, resume, other, slot_start.system_id, lacking).await {
            Ok(0) => {}
            Ok(bytes) => {
                let host = archiver.connect.hosts.get(other).map(ToString::to_string).unwrap_or_default();
                tracing::warn!(host, bytes, cause, "WAL that the primary has no more came from another host");
                return Ok(false);
            }
            Err(error) => tracing::info!(host = other, error = format!("{error:#}"), "no WAL from another host"),
        }
    }
    let Some(Lacking { start_lsn, end_lsn }) = still_lacking(destination, resume, kept).await? else {
        return Ok(false);
    };
    if end_lsn <= start_lsn {
        anyhow::bail!("{cause}; and the slot keeps no WAL after {start_lsn}");
    }
    let (timeline, found_at) = (resume.timeline, clock::now().into());
    let gap = Gap { timeline, start_lsn, end_lsn, found_at, cause: cause.to_owned() };
    catalogue::write_gap(&destination.repository, destination.incarnation, &gap).await.context("record a gap")?;
    tracing::error!(%timeline, %start_lsn, %end_lsn, cause, "WAL is missing for good: a gap is recorded");
    Ok(true)
}

struct SlotStart {
    lsn: Lsn,
    system_id: SystemId,
}

/// Where the slot keeps WAL from. One that still keeps WAL is not touched: dropping it would let the server remove more.
async fn kept_from(archiver: &Archiver, host_index: usize, lacking_from: Lsn) -> anyhow::Result<SlotStart> {
    let slot = &archiver.settings.slot;
    let (mut session, identity) = servers::connect(&archiver.connect, host_index).await?;
    let mut restart = archiver.slot_restart(&mut session, host_index).await?;
    if restart.is_none_or(|restart| restart <= lacking_from) {
        // It keeps nothing, or says that it keeps what is gone (a report moves it back; an invalidated one of 16 and 17
        // protects nothing even then). A new one begins at the last redo pointer.
        match session.drop_slot(slot).await {
            Ok(()) | Err(ReplicationError::SlotMissing(_)) => {}
            Err(error) => return Err(error).context("drop the slot that lost its WAL"),
        }
        session.create_physical_slot(slot).await?;
        restart = archiver.slot_restart(&mut session, host_index).await?;
    }
    session.close().await;
    Ok(SlotStart { lsn: restart.unwrap_or(identity.flush_lsn), system_id: identity.system_id })
}

/// What a fresh listing lacks before `kept`; `None` when the byte that was lacking is stored by now.
async fn still_lacking(destination: &Destination, resume: &Resume, kept: Lsn) -> anyhow::Result<Option<Lacking>> {
    let Destination { repository, incarnation, segment_size } = destination;
    let listing = catalogue::list_wal(repository, *incarnation, *segment_size).await?;
    let gaps = catalogue::list_gaps(repository, *incarnation).await?;
    let begin = Some(resume.start_lsn);
    let (_, stored) = resume::prefix(&listing, &gaps, resume.timeline, begin, *segment_size);
    if stored > resume.stored_lsn {
        return Ok(None);
    }
    let start_lsn = resume.stored_lsn;
    let starts = listing.ranges.iter().map(|o| &o.range).filter(|r| r.timeline == resume.timeline);
    let next_stored = starts.map(|r| r.start_lsn(*segment_size)).filter(|s| *s > start_lsn).min();
    Ok(Some(Lacking { start_lsn, end_lsn: kept.min(next_stored.unwrap_or(Lsn::MAX)) }))
}

/// Stores what a host still has of what is lacking, in whole units; returns how many bytes it had.
async fn fetch(
    archiver: &Archiver,
    destination: &Destination,
    resume: &Resume,
    host_index: usize,
    system_id: SystemId,
    lacking: Lacking,
) -> anyhow::Result<u64> {
    let size = destination.segment_size;
    let (session, identity) = servers::connect(&archiver.connect, host_index).await?;
    anyhow::ensure!(identity.system_id == system_id, "the host belongs to another cluster");
    let unit = unit_bytes(size);
    let start_lsn = Lsn(lacking.start_lsn.0 / unit * unit);
    let from = StartReplication { slot: None, start_lsn, timeline: resume.timeline };
    let (mut reader, _sender) = session.start_replication(&from).await?.split();
    let mut assembler = Assembler::new(size, start_lsn, &archiver.settings.budget);
    let (trouble, _) = watch::channel(None);
    let mut uploader = Uploader::new(destination.clone(), &archiver.settings, trouble);
    let mut bytes_stored = 0;
    while assembler.held_from() < lacking.end_lsn {
        let Ok(Ok(event)) = tokio::time::timeout(SILENCE_MAX, next_data(&mut reader)).await else { break };
        let Some((start, bytes)) = event else { break };
        for unit in assembler.push(start, &bytes)? {
            compare(destination, &resume.known, &unit, size)?;
            while !uploader.has_room() {
                bytes_stored += uploader.next().await.map_or(0, |stored| stored.content_bytes);
            }
            uploader.start(resume.timeline, unit.start_lsn, unit.bytes, true);
        }
    }
    while let Some(stored) = uploader.next().await {
        bytes_stored += stored.content_bytes;
    }
    Ok(bytes_stored)
}

/// The next bytes; `None` at the end of the timeline.
async fn next_data(
    reader: &mut crate::replication::WalReader,
) -> Result<Option<(Lsn, bytes::Bytes)>, ReplicationError> {
    loop {
        match reader.next().await? {
            WalEvent::Data { start_lsn, bytes, .. } => return Ok(Some((start_lsn, bytes))),
            WalEvent::Keepalive { .. } => {}
            WalEvent::EndOfTimeline { .. } => return Ok(None),
        }
    }
}

/// Two pasts are never mixed: what is stored of the unit must be what the host sends.
fn compare(destination: &Destination, known: &[WalRange], unit: &Unit, size: SegmentSize) -> anyhow::Result<()> {
    let codec = destination.repository.codec();
    for range in known {
        let within = |lsn: Lsn| lsn.checked_since(unit.start_lsn).and_then(|offset| usize::try_from(offset).ok());
        let (Some(from), Some(to)) = (within(range.start_lsn(size)), within(range.end_lsn(size))) else { continue };
        let Some(sent) = unit.bytes.get(from..to) else { continue };
        anyhow::ensure!(
            ContentHash::of(&codec.digest(sent)) == range.hash,
            "the host has other content for {} than is stored",
            range.start_lsn(size)
        );
    }
    Ok(())
}
