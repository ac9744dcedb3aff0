//! Which cluster an environment's objects belong to: its incarnations, one after the other.
//!
//! Invariant: WAL and backups are written only below the newest incarnation, and only when the server's system
//! identifier is the one in its name.

use serde::{Deserialize, Serialize};

use super::codec::Kind;
use super::format::{Repository, RepositoryError};
use super::layout::{Incarnation, Key, prefix};
use crate::pg::{Major, SegmentSize, SystemId, Timestamp};

/// What is known of one life of a cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub system_id: SystemId,
    pub major: Major,
    pub segment_size: SegmentSize,
    /// Block size of the data files in bytes.
    pub block_size: u32,
    pub opened_at: Timestamp,
    /// Why this incarnation was opened: `first`, or what an operator confirmed.
    pub reason: String,
}

/// An incarnation with its facts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownIncarnation {
    pub incarnation: Incarnation,
    pub identity: Identity,
}

/// All incarnations of the environment, oldest first.
pub async fn list(repository: &Repository) -> Result<Vec<KnownIncarnation>, RepositoryError> {
    let mut known = Vec::new();
    for object in repository.store().list(prefix::IDENTITY).await? {
        let Ok(incarnation) = object.key.name().parse::<Incarnation>() else { continue };
        let identity = repository.read_fact(&object.key, Kind::Identity).await?;
        known.push(KnownIncarnation { incarnation, identity });
    }
    known.sort_by_key(|k| k.incarnation);
    Ok(known)
}

/// The incarnation that is written now, if there is one.
pub async fn current(repository: &Repository) -> Result<Option<KnownIncarnation>, RepositoryError> {
    Ok(list(repository).await?.pop())
}

/// Opens the next incarnation.
pub async fn open_next(repository: &Repository, identity: Identity) -> Result<KnownIncarnation, RepositoryError> {
    let ordinal = current(repository).await?.map_or(1, |k| k.incarnation.ordinal.saturating_add(1));
    let incarnation = Incarnation { ordinal, system_id: identity.system_id };
    repository.write_fact(&Key::identity(incarnation), Kind::Identity, &identity).await?;
    Ok(KnownIncarnation { incarnation, identity })
}
