//! Incidents: the evidence is kept, and everything that is done about it is written down.
//!
//! Opening one writes down who opened it and why, pins the present, writes a named restore point and waits until its WAL is
//! stored. What does not work there is an entry, too, and no reason not to open it. Later commands
//! that name its ticket add entries ([`note`]); [`report`] makes of them what a customer or an auditor is given.

pub mod report;

use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};

use super::pin;
use crate::error::{Code, Failure};
use crate::pg::Lsn;
use crate::replication::sql::RESTORE_POINT_NAME_BYTES_MAX;
use crate::replication::{ConnectConfig, ReplicationError, Sql};
pub use crate::repository::incident::{Entry, Log, What};
use crate::repository::{Repository, Ticket, incident};
use crate::util::clock;

/// So long the archive may take to store the restore point.
const STORED_LIMIT: Duration = Duration::from_secs(60);

/// Whoever archives the environment.
#[async_trait]
pub trait Tail: Send + Sync {
    /// Waits until all WAL up to `lsn` is stored.
    async fn stored(&self, lsn: Lsn) -> Result<(), Failure>;
}

/// Where an incident happens.
pub struct Scene<'a> {
    pub environment: &'a str,
    pub repository: &'a Repository,
    /// `None`: the server is not known here.
    pub connect: Option<&'a ConnectConfig>,
    pub tail: &'a dyn Tail,
}

/// Who says something.
#[derive(Debug, Clone, Copy)]
pub struct By<'a>(pub &'a str);

/// Opens an incident and secures what is there now.
///
/// # Errors
/// [`Code::Conflict`] when it is open; as the store says. That something could not be secured is an entry.
pub async fn open(scene: &Scene<'_>, ticket: &Ticket, by: By<'_>, reason: Option<&str>) -> Result<Log, Failure> {
    let mut log = incident::load(scene.repository, ticket).await?;
    if log.is_open() {
        let message = format!("open incident {ticket} of {}: it is open", scene.environment);
        return Err(Failure::new(Code::Conflict, message).hint("`pgrecall incident show` says what was done about it."));
    }
    let name = restore_point_name(ticket, log.opened_count());
    let why = reason.map_or_else(String::new, |reason| format!(": {reason}"));
    let opened = entry(by, What::Opened, format!("incident {ticket} of {} opened{why}", scene.environment));
    log.append(scene.repository, Entry { document: json!({ "reason": reason }), ..opened }).await?;
    let kept = match pin::keep_present(scene.repository, scene.environment, ticket, by.0).await {
        Ok(text) => entry(by, What::Pinned, text),
        Err(failure) => remark(by, "the present is not kept beyond the recovery window", &failure),
    };
    log.append(scene.repository, kept).await?;
    let (noted, lsn) = match write_restore_point(scene.connect, &name).await {
        Ok(lsn) => {
            let text = format!("restore point {name} ends at {lsn}; restore to it with --to name:{name}");
            let document = json!({ "name": name, "lsn": lsn });
            (Entry { document, ..entry(by, What::RestorePoint, text) }, Some(lsn))
        }
        Err(failure) => (remark(by, "no restore point was written", &failure), None),
    };
    log.append(scene.repository, noted).await?;
    if let Some(lsn) = lsn {
        let stored = tokio::time::timeout(STORED_LIMIT, scene.tail.stored(lsn)).await;
        let late = || Failure::new(Code::Store, format!("wait for the WAL up to {lsn}: it is not stored yet"));
        let noted = match stored.unwrap_or_else(|_| Err(late())) {
            Ok(()) => Entry {
                document: json!({ "lsn": lsn }),
                ..entry(by, What::Stored, format!("all WAL up to {lsn} is stored"))
            },
            Err(failure) => remark(by, "the restore point may not be stored yet", &failure),
        };
        log.append(scene.repository, noted).await?;
    }
    Ok(log)
}

/// Closes an incident. What it keeps stays until its date.
///
/// # Errors
/// When it is not open.
pub async fn close(repository: &Repository, ticket: &Ticket, by: By<'_>, text: Option<&str>) -> Result<Log, Failure> {
    let mut log = load(repository, ticket).await?;
    if !log.is_open() {
        return Err(Failure::new(Code::Conflict, format!("close incident {ticket}: it is closed")));
    }
    let outcome = text.map_or_else(String::new, |text| format!(": {text}"));
    let closed = entry(by, What::Closed, format!("incident {ticket} closed{outcome}"));
    log.append(repository, Entry { document: json!({ "outcome": text }), ..closed }).await?;
    Ok(log)
}

/// The log of an incident.
///
/// # Errors
/// When there is none of that ticket.
pub async fn load(repository: &Repository, ticket: &Ticket) -> Result<Log, Failure> {
    let log = incident::load(repository, ticket).await?;
    if log.entries.is_empty() && log.unreadable == 0 {
        let known = incident::list(repository).await?;
        let failure = Failure::new(Code::NotFound, format!("find incident {ticket}: there is none"));
        let known: Vec<&str> = known.iter().map(Ticket::as_str).collect();
        return Err(match crate::util::nearest::nearest(ticket.as_str(), known.iter().copied()) {
            Some(meant) => failure.hint(format!("Did you mean {meant}?")),
            None if known.is_empty() => failure.hint("`pgrecall incident open` opens one."),
            None => failure.hint(format!("There are: {}.", known.join(", "))),
        });
    }
    Ok(log)
}

/// Adds an entry to the incident of a ticket, if there is one and it is open; says whether it did.
///
/// # Errors
/// As the store says.
pub async fn note(repository: &Repository, ticket: &str, entry: Entry) -> Result<bool, Failure> {
    // A ticket of another form has no incident.
    let Ok(ticket) = ticket.parse::<Ticket>() else { return Ok(false) };
    let mut log = incident::load(repository, &ticket).await?;
    if !log.is_open() {
        return Ok(false);
    }
    log.append(repository, entry).await?;
    Ok(true)
}

/// An entry of now.
pub fn entry(by: By<'_>, what: What, text: String) -> Entry {
    Entry { at: clock::now().into(), by: by.0.to_owned(), what, text, document: Value::Null }
}

fn remark(by: By<'_>, what: &str, failure: &Failure) -> Entry {
    let hint = failure.hint.as_ref().map_or_else(String::new, |hint| format!(" ({hint})"));
    let text = format!("{what}: failed to {failure}{hint}");
    Entry { document: json!({ "error": failure }), ..entry(by, What::Remark, text) }
}

/// A name that was not used when it was opened before: a restore could not tell the two apart.
fn restore_point_name(ticket: &Ticket, opened_before: usize) -> String {
    let name = match opened_before {
        0 => format!("incident-{ticket}"),
        count => format!("incident-{ticket}-{}", count + 1),
    };
    debug_assert!(name.len() <= RESTORE_POINT_NAME_BYTES_MAX, "a ticket is short");
    name
}

async fn write_restore_point(connect: Option<&ConnectConfig>, name: &str) -> Result<Lsn, Failure> {
    let unknown = || Failure::new(Code::Configuration, "reach the server: the configuration has no `postgres` for it");
    let connect = connect.ok_or_else(unknown)?;
    let mut last = Failure::new(Code::Postgres, "reach the primary: every host is a standby");
    for index in 0..connect.hosts.len() {
        match write_on(connect, index, name).await {
            Ok(Some(lsn)) => return Ok(lsn),
            Ok(None) => {}
            Err(error) => last = Failure::from(error),
        }
    }
    Err(last)
}

/// `None` on a standby.
async fn write_on(connect: &ConnectConfig, index: usize, name: &str) -> Result<Option<Lsn>, ReplicationError> {
    let mut sql = Sql::connect(connect, index).await?;
    if sql.is_in_recovery().await? {
        sql.close().await;
        return Ok(None);
    }
    let lsn = sql.create_restore_point(name).await?;
    sql.close().await;
    Ok(Some(lsn))
}

#[cfg(test)]
mod tests;
