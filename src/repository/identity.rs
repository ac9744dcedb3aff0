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

/// All incarnations that have an identity, oldest first.
pub async fn list(repository: &Repository) -> Result<Vec<KnownIncarnation>, RepositoryError> {
    load_all(repository, &names(repository).await?.known).await
}

/// As [`list`], for those who would rather know of a loss than go on with an older incarnation, or with nothing.
///
/// # Errors
/// [`RepositoryError::IdentityGone`] when the newest incarnation that has objects has no identity.
pub async fn list_sound(repository: &Repository) -> Result<Vec<KnownIncarnation>, RepositoryError> {
    let names = names(repository).await?;
    match names.newest_lost() {
        Some(lost) => Err(RepositoryError::IdentityGone(lost)),
        None => load_all(repository, &names.known).await,
    }
}

/// The incarnation that is written now, if there is one and its identity is there.
pub async fn current(repository: &Repository) -> Result<Option<KnownIncarnation>, RepositoryError> {
    let names = names(repository).await?;
    match names.known.last() {
        Some(newest) if names.newest_lost().is_none() => load(repository, *newest).await.map(Some),
        _ => Ok(None),
    }
}

async fn load_all(repository: &Repository, names: &[Incarnation]) -> Result<Vec<KnownIncarnation>, RepositoryError> {
    let mut known = Vec::with_capacity(names.len());
    for incarnation in names {
        known.push(load(repository, *incarnation).await?);
    }
    Ok(known)
}

/// The names of the incarnations, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Names {
    /// Those that have an identity.
    pub known: Vec<Incarnation>,
    /// Those that have objects and no identity: it was written before all of them, and is gone.
    pub lost: Vec<Incarnation>,
}

/// Lists the incarnations; an identity that a listing lacks is asked for by name.
pub async fn names(repository: &Repository) -> Result<Names, RepositoryError> {
    let folders = repository.store().list_folders("").await?;
    let listed = repository.store().list(prefix::IDENTITY).await?;
    let known = listed.iter().filter_map(|object| object.key.name().parse().ok()).collect();
    let mut names = Names { known, lost: Vec::new() };
    for incarnation in folders.iter().filter_map(|name| name.parse::<Incarnation>().ok()) {
        if names.known.contains(&incarnation) {
            continue;
        }
        match repository.store().head(&Key::identity(incarnation)).await? {
            Some(_) => names.known.push(incarnation),
            None => names.lost.push(incarnation),
        }
    }
    names.known.sort_unstable();
    names.lost.sort_unstable();
    Ok(names)
}

impl Names {
    /// The newest incarnation, when its identity is gone.
    pub fn newest_lost(&self) -> Option<Incarnation> {
        let lost = self.lost.last()?;
        self.known.last().is_none_or(|known| known.ordinal < lost.ordinal).then_some(*lost)
    }
}

/// Reads one identity.
pub async fn load(repository: &Repository, incarnation: Incarnation) -> Result<KnownIncarnation, RepositoryError> {
    let identity = repository.read_fact(&Key::identity(incarnation), Kind::Identity).await?;
    Ok(KnownIncarnation { incarnation, identity })
}

/// Opens the next incarnation; never one of which objects are there.
pub async fn open_next(repository: &Repository, identity: Identity) -> Result<KnownIncarnation, RepositoryError> {
    let names = names(repository).await?;
    let newest = names.known.iter().chain(&names.lost).map(|incarnation| incarnation.ordinal).max();
    let ordinal = newest.map_or(1, |newest| newest.saturating_add(1));
    write(repository, Incarnation { ordinal, system_id: identity.system_id }, identity).await
}

/// Writes the identity of an incarnation; again, when it was lost.
pub async fn write(
    repository: &Repository,
    incarnation: Incarnation,
    identity: Identity,
) -> Result<KnownIncarnation, RepositoryError> {
    repository.write_fact(&Key::identity(incarnation), Kind::Identity, &identity).await?;
    Ok(KnownIncarnation { incarnation, identity })
}
