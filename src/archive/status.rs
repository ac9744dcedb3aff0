//! What an archiver tells the rest of the program about itself.

use std::time::Instant;

use serde::Serialize;

use super::exposure::ExposureFigures;
use crate::pg::{Lsn, TimelineId, Timestamp};

/// In which state the protection of an environment is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state", content = "reason")]
pub enum State {
    Starting,
    /// WAL arrives and is stored.
    Streaming,
    /// Streaming, but the store takes nothing.
    StoreFailing(String),
    /// No connection to the server.
    Disconnected(String),
    /// The slot is held by somebody else.
    Waiting(String),
    /// Two pasts would be mixed: a person must decide.
    Conflict(String),
    Stopped,
}

/// The unbroken stored stream that ends at the newest stored byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StoredStream {
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub end_lsn: Lsn,
}

/// A snapshot.
#[derive(Debug, Clone, Serialize)]
pub struct ArchiveStatus {
    pub state: State,
    pub timeline: Option<TimelineId>,
    /// End of the server's WAL, as the stream said last.
    pub server_lsn: Lsn,
    pub received_lsn: Lsn,
    pub stored: Option<StoredStream>,
    /// The newest moment that the stored stream provably contains, by the server's clock.
    pub covered_until: Option<Timestamp>,
    pub exposure: ExposureFigures,
    /// Something that somebody should look at, though WAL is archived.
    pub alarm: Option<String>,
    /// Our walsender is one that commits wait for.
    pub synchronous: bool,
    /// A gap was found in this run: a new backup is due.
    pub gaps_found: u32,
    /// Since when this state lasts.
    #[serde(skip)]
    pub since: Instant,
}

impl Default for ArchiveStatus {
    fn default() -> Self {
        ArchiveStatus {
            state: State::Starting,
            timeline: None,
            server_lsn: Lsn::ZERO,
            received_lsn: Lsn::ZERO,
            stored: None,
            covered_until: None,
            exposure: ExposureFigures::default(),
            alarm: None,
            synchronous: false,
            gaps_found: 0,
            since: Instant::now(),
        }
    }
}
