//! A full backup of an environment whose WAL is being archived.
//!
//! The archiver says what is stored, the server sends its files and facts: the primary, or a standby where that is wished and
//! one answers. A standby's backup starts at its last restartpoint; while that lies before the stored WAL, as it does when
//! archiving has just begun, the next one is waited for, and after [`BackupJob::standby_wait_max`] the primary is read.

use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::archive::{ArchiveStatus, State};
use crate::backup::{
    BackupError, BackupReport, BackupSettings, Collaborators, FullBackup, Progress, ServerSource, SqlFacts, StoredWal,
};
use crate::error::{Code, Failure};
use crate::pg::{Lsn, TimelineId};
use crate::replication::{BaseBackupOptions, ConnectConfig, Session};
use crate::repository::{Generation, Repository, identity};
use crate::util::retry::Backoff;

/// How far past the stored end a backup may start: what is between is on its way.
const ON_ITS_WAY_MAX: u64 = 1 << 30;

/// What a backup is taken of, and by whom.
#[derive(Clone)]
pub struct BackupJob {
    pub repository: Repository,
    pub generation: Generation,
    pub connect: ConnectConfig,
    pub archive: watch::Receiver<ArchiveStatus>,
    pub settings: BackupSettings,
    /// Spare the primary: read from a standby when one of the hosts is one.
    pub from_standby: bool,
    /// How long a standby may need for a restartpoint in the stored WAL.
    pub standby_wait_max: Duration,
}

/// A restartpoint follows a checkpoint of the primary, of which there is one every five minutes by default.
pub const STANDBY_WAIT_MAX: Duration = Duration::from_secs(600);

/// Each attempt makes a checkpoint and an intent.
const STANDBY_PAUSE_MIN: Duration = Duration::from_secs(5);
const STANDBY_PAUSE_MAX: Duration = Duration::from_secs(60);

impl BackupJob {
    /// Takes the backup.
    ///
    /// Cancel safety: as [`FullBackup::run`].
    pub async fn run(
        &self,
        progress: watch::Sender<Progress>,
        cancel: CancellationToken,
    ) -> Result<BackupReport, Failure> {
        let begun = Instant::now();
        let mut pauses = Backoff::new(STANDBY_PAUSE_MIN, STANDBY_PAUSE_MAX);
        let mut from_standby = self.from_standby;
        loop {
            let Attempt { of_standby, result } = self.attempt(from_standby, progress.clone(), cancel.clone()).await?;
            let early = match result {
                Err(error @ BackupError::StartNotStored { .. }) if of_standby => error,
                result => return result.map_err(|error| error.to_failure()),
            };
            let left = self.standby_wait_max.saturating_sub(begun.elapsed());
            if left.is_zero() {
                tracing::info!(reason = %early, "the standby has no restartpoint in the stored WAL: the primary is read");
                from_standby = false;
                continue;
            }
            tracing::info!(reason = %early, left_s = left.as_secs(), "wait for a restartpoint of the standby");
            tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(BackupError::Cancelled.to_failure()),
                () = tokio::time::sleep(pauses.delay().min(left)) => {}
            }
        }
    }

    /// One backup, of a standby or of the primary.
    async fn attempt(
        &self,
        from_standby: bool,
        progress: watch::Sender<Progress>,
        cancel: CancellationToken,
    ) -> Result<Attempt, Failure> {
        let known = identity::current(&self.repository).await?;
        let known = known.ok_or_else(|| not_archived("no WAL was archived yet"))?;
        let (session, host_index) = self.server(from_standby).await?;
        let of_standby = session.in_hot_standby();
        let backup = FullBackup {
            repository: self.repository.clone(),
            incarnation: known.incarnation,
            generation: self.generation,
            major: known.identity.major,
            server_version: session.server_version().split(' ').next().unwrap_or_default().to_owned(),
            segment_size: known.identity.segment_size,
            settings: self.settings.clone(),
        };
        let mut source = ServerSource::on(session, self.connect.clone(), BaseBackupOptions::default());
        let wal = Stored(self.archive.clone());
        let facts = SqlFacts { config: self.connect.clone(), host_index };
        let with = Collaborators { source: &mut source, wal: &wal, facts: Some(&facts), progress, cancel };
        Ok(Attempt { of_standby, result: backup.run(with).await })
    }

    /// A connection to the host that is read: the first of the wished kind, else, of standbys, the primary.
    async fn server(&self, from_standby: bool) -> Result<(Session, usize), Failure> {
        let (mut last, mut primary) = (None, None);
        for index in 0..self.connect.hosts.len() {
            match Session::connect(&self.connect, index).await {
                Ok(session) if session.in_hot_standby() == from_standby => {
                    if let Some((primary, _)) = primary {
                        Session::close(primary).await;
                    }
                    return Ok((session, index));
                }
                Ok(session) if from_standby && primary.is_none() => primary = Some((session, index)),
                Ok(session) => session.close().await,
                Err(error) => last = Some(error),
            }
        }
        if let Some(found) = primary {
            tracing::info!("no standby answers: the backup is taken from the primary");
            return Ok(found);
        }
        Err(match last {
            Some(error) => Failure::from(error),
            None => Failure::new(Code::Postgres, "take a backup: none of the hosts is a primary"),
        })
    }
}

/// What came of reading one server.
struct Attempt {
    of_standby: bool,
    result: Result<BackupReport, BackupError>,
}

fn not_archived(why: &str) -> Failure {
    Failure::new(Code::Conflict, format!("take a backup: {why}"))
        .hint("Start the daemon, and look at `pgrecall status`.")
}

/// What the archiver has stored, as a backup asks for it.
struct Stored(watch::Receiver<ArchiveStatus>);

fn near(end_lsn: Lsn, lsn: Lsn) -> bool {
    lsn <= end_lsn.saturating_add(ON_ITS_WAY_MAX)
}

#[async_trait]
impl StoredWal for Stored {
    async fn covers(&self, timeline: TimelineId, lsn: Lsn) -> anyhow::Result<bool> {
        let mut archive = self.0.clone();
        // An archiver that has much to catch up with, for example on its first day, may need a while.
        let decided = |s: &ArchiveStatus| {
            matches!(s.state, State::Conflict(_) | State::Stopped)
                || s.stored.is_some_and(|w| w.timeline != timeline || w.start_lsn > lsn || near(w.end_lsn, lsn))
        };
        let status = archive.wait_for(decided).await?.clone();
        Ok(status.stored.is_some_and(|w| w.timeline == timeline && w.start_lsn <= lsn && near(w.end_lsn, lsn)))
    }

    async fn wait_stored(&self, timeline: TimelineId, start_lsn: Lsn, stop_lsn: Lsn) -> anyhow::Result<()> {
        let mut archive = self.0.clone();
        let decided = |s: &ArchiveStatus| {
            let conflict = matches!(s.state, State::Conflict(_) | State::Stopped);
            conflict
                || s.stored.is_some_and(|w| w.timeline != timeline || w.end_lsn >= stop_lsn || w.start_lsn > start_lsn)
        };
        let status = archive.wait_for(decided).await?.clone();
        let stored =
            status.stored.filter(|w| w.timeline == timeline && w.start_lsn <= start_lsn && w.end_lsn >= stop_lsn);
        anyhow::ensure!(
            stored.is_some(),
            "WAL from {start_lsn} to {stop_lsn} of timeline {timeline} is not stored without a gap ({:?})",
            status.state
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::status::StoredStream;

    fn stored_to(status: &mut ArchiveStatus, end_lsn: Lsn) {
        status.state = State::Streaming;
        status.stored = Some(StoredStream { timeline: TimelineId(1), start_lsn: Lsn(1 << 24), end_lsn });
    }

    #[tokio::test]
    async fn a_backup_waits_while_the_archive_catches_up_and_is_refused_before_its_start() {
        let start = Lsn(3 << 30);
        let (status, receiver) = watch::channel(ArchiveStatus::default());
        let wal = Stored(receiver);
        let asked = wal.covers(TimelineId(1), start);
        tokio::pin!(asked);
        for end_lsn in [Lsn(1 << 24), Lsn(1 << 30)] {
            status.send_modify(|s| stored_to(s, end_lsn));
            assert!(futures::poll!(&mut asked).is_pending(), "{end_lsn}");
        }
        status.send_modify(|s| stored_to(s, Lsn(2 << 30)));
        assert!(asked.await.expect("an archive"));
        assert!(!wal.covers(TimelineId(1), Lsn(1 << 20)).await.expect("an archive"), "before the stored WAL");
        status.send_modify(|s| s.state = State::Stopped);
        assert!(!wal.covers(TimelineId(1), Lsn(9 << 30)).await.expect("an archive"), "nobody stores it");
    }
}
