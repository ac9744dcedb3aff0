//! Puts compressed frames into packs, and packs into the store.
//!
//! Invariant: packs being uploaded ≤ `uploads_max`, so at most `uploads_max` + 1 packs are in memory.

use std::time::Duration;

use tokio::task::JoinSet;
use tracing::Instrument;

use super::error::BackupError;
use crate::repository::backup_object::PackEntry;
use crate::repository::pack::{CompressedFrame, FrameRef, PackBuilder, PackRef};
use crate::repository::{BackupId, Incarnation, Repository, RepositoryError};
use crate::util::retry::Backoff;

/// How long a store that does not answer is waited for before the backup is given up.
const STORE_PATIENCE: Duration = Duration::from_secs(300);

/// Where packs go.
#[derive(Clone)]
pub struct Destination {
    pub repository: Repository,
    pub incarnation: Incarnation,
    pub id: BackupId,
}

/// Fills packs in order.
pub struct PackWriter {
    to: Destination,
    uploads_max: usize,
    builder: Option<PackBuilder>,
    /// Every pack so far; its place is its number.
    references: Vec<PackRef>,
    uploads: JoinSet<Result<PackEntry, BackupError>>,
    stored: Vec<PackEntry>,
}

impl PackWriter {
    pub fn new(to: Destination, uploads_max: usize) -> Self {
        let (uploads, uploads_max) = (JoinSet::new(), uploads_max.max(1));
        PackWriter { to, uploads_max, builder: None, references: Vec::new(), uploads, stored: Vec::new() }
    }

    /// Adds a frame; `pack` of its address is the number of the pack.
    pub async fn add(&mut self, frame: CompressedFrame) -> Result<FrameRef, BackupError> {
        let mut builder = self.builder.take().unwrap_or_else(|| self.next_pack());
        let number = builder.reference().number;
        let address = builder.add(frame, number);
        if builder.is_full() {
            self.upload(builder).await?;
        } else {
            self.builder = Some(builder);
        }
        Ok(address)
    }

    /// Every pack so far; its place is its number.
    pub fn references(&self) -> &[PackRef] {
        &self.references
    }

    /// Bytes of the packs that are in the store.
    pub fn stored_bytes(&self) -> u64 {
        self.stored.iter().map(|p| p.bytes).sum()
    }

    /// Waits until every pack is in the store.
    pub async fn finish(mut self) -> Result<Vec<PackEntry>, BackupError> {
        if let Some(builder) = self.builder.take() {
            self.upload(builder).await?;
        }
        while !self.uploads.is_empty() {
            self.join_one().await?;
        }
        self.stored.sort_by_key(|p| p.pack.number);
        Ok(self.stored)
    }

    fn next_pack(&mut self) -> PackBuilder {
        let number = u32::try_from(self.references.len()).unwrap_or(u32::MAX);
        let builder = PackBuilder::new(self.to.repository.codec(), self.to.incarnation, &self.to.id, number);
        self.references.push(builder.reference().clone());
        builder
    }

    async fn upload(&mut self, builder: PackBuilder) -> Result<(), BackupError> {
        while self.uploads.len() >= self.uploads_max {
            self.join_one().await?;
        }
        self.uploads.spawn(upload(self.to.repository.clone(), builder).in_current_span());
        Ok(())
    }

    async fn join_one(&mut self) -> Result<(), BackupError> {
        if let Some(done) = self.uploads.join_next().await {
            self.stored.push(done.map_err(|_| BackupError::Cancelled)??);
        }
        Ok(())
    }
}

/// Cancel safety: an upload that is dropped leaves at most a pack that nothing names.
async fn upload(repository: Repository, builder: PackBuilder) -> Result<PackEntry, BackupError> {
    let codec = repository.codec().clone();
    let pack = tokio::task::spawn_blocking(move || builder.finish(&codec)).await;
    let pack = pack.map_err(|_| BackupError::Cancelled)?;
    let bytes = pack.bytes.len() as u64;
    let begun = tokio::time::Instant::now();
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(15));
    loop {
        match repository.store().put(&pack.key, pack.bytes.clone()).await {
            Ok(_) => break,
            Err(error) if error.is_retryable() && begun.elapsed() < STORE_PATIENCE => {
                tracing::warn!(object = pack.key.as_str(), %error, "pack is not stored yet, will retry");
                tokio::time::sleep(backoff.delay()).await;
            }
            Err(error) => return Err(RepositoryError::from(error).into()),
        }
    }
    let elapsed_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::debug!(object = pack.key.as_str(), bytes, elapsed_ms, "pack stored");
    Ok(PackEntry { pack: pack.reference, bytes, digest: pack.digest })
}
