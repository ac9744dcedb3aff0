//! Keeps the backup that a restore reads from being removed while it reads.

use std::time::Duration;

use tokio::task::JoinHandle;
use tracing::Instrument;

use crate::pg::{Lsn, TimelineId, Timestamp};
use crate::repository::layout::PinName;
use crate::repository::pin::{self, Pin, PinError};
use crate::repository::{BackupId, Incarnation, Repository};
use crate::util::clock;

/// How long a pin holds when nobody renews it: the reader has died.
const HOLDS: Duration = Duration::from_hours(4);
const RENEWED_EVERY: Duration = Duration::from_hours(1);

/// What is read.
#[derive(Debug, Clone)]
pub struct Read {
    pub incarnation: Incarnation,
    pub backup: BackupId,
    pub timeline: TimelineId,
    pub end_lsn: Lsn,
    /// By whom and what for, such as "restore into /srv/x on db1".
    pub what: String,
}

/// A pin that is renewed for as long as this lives. Dropped without [`ReadPin::release`] it holds for some hours more.
pub struct ReadPin {
    repository: Repository,
    renewing: JoinHandle<()>,
    current: tokio::sync::watch::Receiver<PinName>,
}

impl Drop for ReadPin {
    fn drop(&mut self) {
        self.renewing.abort();
    }
}

impl ReadPin {
    /// Pins what is read.
    ///
    /// # Errors
    /// [`PinError`]: the backup is going, or nothing may be written.
    pub async fn take(repository: &Repository, read: Read) -> Result<ReadPin, PinError> {
        let name = read.pin(repository).await?;
        let (sender, current) = tokio::sync::watch::channel(name);
        let renewed = repository.clone();
        let renew = async move {
            loop {
                tokio::time::sleep(RENEWED_EVERY).await;
                match read.pin(&renewed).await {
                    Ok(name) => {
                        let old = sender.send_replace(name);
                        let _ = pin::remove(&renewed, &old).await;
                    }
                    Err(error) => tracing::warn!(%error, "the pin of what is being restored could not be renewed"),
                }
            }
        };
        let renewing = tokio::spawn(renew.in_current_span());
        Ok(ReadPin { repository: repository.clone(), renewing, current })
    }

    /// Lets the backup go. A pin that cannot be removed ends by itself.
    pub async fn release(self) {
        self.renewing.abort();
        let name = self.current.borrow().clone();
        if let Err(error) = pin::remove(&self.repository, &name).await {
            tracing::debug!(%error, "the pin of what was restored stays until it ends by itself");
        }
    }
}

impl Read {
    async fn pin(&self, repository: &Repository) -> Result<PinName, PinError> {
        let now = clock::now();
        let name = PinName { incarnation: self.incarnation, backup: self.backup.clone(), random: rand::random() };
        let pin = Pin {
            name: self.what.clone(),
            target: format!("lsn:{}", self.end_lsn),
            timeline: self.timeline,
            end_lsn: self.end_lsn,
            until: Timestamp::from(now + HOLDS),
            made_at: now.into(),
            owner: format!("process {}", std::process::id()),
            temporary: true,
        };
        pin::add(repository, &name, &pin).await.map(|()| name)
    }
}
