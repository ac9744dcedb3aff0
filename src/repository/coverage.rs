//! Claims about which wall-clock moments the stored stream contains.
//!
//! A claim says: when the server's clock showed `server_time`, its WAL ended at or before `lsn`; so once all WAL up to
//! `lsn` is stored, every moment up to `server_time` less `margin_micros` is. A claim speaks only for its own timeline and
//! run of that server's clock. Coverage cannot be rebuilt from WAL.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::codec::Kind;
use super::format::{Repository, RepositoryError};
use super::layout::{self, CoverageName, Incarnation, Key, prefix};
use crate::pg::{Lsn, TimelineId, Timestamp};

/// How the position of a claim was learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClaimSource {
    /// `pg_current_wal_insert_lsn()` asked after the clock.
    Insert,
    /// The flush position asked after the clock, or the end of WAL in a later data message.
    Flush,
}

/// One stored claim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    pub timeline: TimelineId,
    pub server_time: Timestamp,
    pub lsn: Lsn,
    pub source: ClaimSource,
    pub margin_micros: i64,
    /// Which unbroken run of which server's clock.
    pub run: u32,
}

impl Claim {
    fn name(&self) -> CoverageName {
        CoverageName { timeline: self.timeline, server_time: self.server_time, lsn: self.lsn, run: self.run }
    }
}

/// Stores a claim; call it only when all WAL up to its `lsn` is stored.
pub async fn write(repository: &Repository, incarnation: Incarnation, claim: &Claim) -> Result<(), RepositoryError> {
    repository.write_fact(&Key::coverage(incarnation, &claim.name()), Kind::Coverage, claim).await
}

/// The newest claims of a timeline: the last one of each run of a clock, in the order of their positions.
pub async fn newest(
    repository: &Repository,
    incarnation: Incarnation,
    timeline: TimelineId,
) -> Result<Vec<Claim>, RepositoryError> {
    let listed = repository.store().list(&prefix::coverage_timeline(incarnation, timeline)).await?;
    let mut runs: BTreeMap<u32, Vec<(CoverageName, Key)>> = BTreeMap::new();
    for object in listed {
        if let Some(name) = layout::parse_coverage(&object.key) {
            runs.entry(name.run).or_default().push((name, object.key));
        }
    }
    let mut claims = Vec::new();
    for mut run in runs.into_values() {
        run.sort_by_key(|(name, _)| (name.lsn, name.server_time));
        claims.extend(last_readable(repository, run.iter().rev().map(|(_, key)| key)).await?);
    }
    claims.sort_by_key(|c| (c.lsn, c.server_time));
    Ok(claims)
}

/// The first claim that can be read: what a damaged one says more than the one before it is not covered.
async fn last_readable<'a>(
    repository: &Repository,
    newest_first: impl Iterator<Item = &'a Key>,
) -> Result<Option<Claim>, RepositoryError> {
    for key in newest_first {
        match repository.read_fact(key, Kind::Coverage).await {
            Ok(claim) => return Ok(Some(claim)),
            Err(error) if error.is_corrupt() => {
                tracing::warn!(%error, "a coverage claim is damaged: the one before it counts")
            }
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}
