//! One life of a writer, and what it leaves for the next to know it by.
//!
//! Each start of a writer takes the next generation by writing it; a writer that lists a higher one stops backups and
//! prune at once. The slot is the mutex for WAL; a connection is ended only when it stands in a lease record of ours.

use serde::{Deserialize, Serialize};

use super::codec::Kind;
use super::format::{Repository, RepositoryError};
use super::layout::{self, Generation, Key, prefix};
use super::probe::Abilities;
use crate::pg::Timestamp;

/// Who a writer is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub host: String,
    pub pid: u32,
    pub started_at: Timestamp,
    pub version: String,
    /// What the store was seen to do when the writer started, if it tried.
    pub store: Option<Abilities>,
}

/// A replication connection that a writer opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Host and port, or socket directory and port, as configured.
    pub server: String,
    pub backend_pid: i32,
    /// When the server says that it began, where it can be asked: it uses process ids again.
    pub backend_started_at: Option<Timestamp>,
    pub opened_at: Timestamp,
}

/// Takes the next generation.
pub async fn take(repository: &Repository, lease: &Lease) -> Result<Generation, RepositoryError> {
    let ordinal = newest(repository).await?.map_or(1, |g| g.ordinal.saturating_add(1));
    let generation = Generation { ordinal, random: rand::random() };
    repository.write_fact(&Key::lease(generation), Kind::Lease, lease).await?;
    Ok(generation)
}

/// The highest generation in the store.
pub async fn newest(repository: &Repository) -> Result<Option<Generation>, RepositoryError> {
    let listed = repository.store().list(prefix::LEASE).await?;
    Ok(listed.iter().filter_map(|o| layout::parse_lease(&o.key)).map(|(generation, _)| generation).max())
}

/// Whether a higher generation than `own` exists: then `own` must stop backups and prune.
pub async fn is_superseded(repository: &Repository, own: Generation) -> Result<bool, RepositoryError> {
    Ok(newest(repository).await?.is_some_and(|newest| newest > own))
}

/// Records a connection before it takes the slot.
pub async fn record_connection(
    repository: &Repository,
    generation: Generation,
    number: u32,
    connection: &Connection,
) -> Result<(), RepositoryError> {
    repository.write_fact(&Key::lease_fact(generation, number), Kind::Lease, connection).await
}

/// The writer whose record names this backend of this server, newest first.
pub async fn owner_of(
    repository: &Repository,
    server: &str,
    backend_pid: i32,
) -> Result<Option<(Generation, Lease, Connection)>, RepositoryError> {
    let listed = repository.store().list(prefix::LEASE).await?;
    for object in listed.iter().rev() {
        let Some((generation, Some(_))) = layout::parse_lease(&object.key) else { continue };
        let connection: Connection = repository.read_fact(&object.key, Kind::Lease).await?;
        if connection.backend_pid == backend_pid && connection.server == server {
            let lease = repository.read_fact(&Key::lease(generation), Kind::Lease).await?;
            return Ok(Some((generation, lease, connection)));
        }
    }
    Ok(None)
}
