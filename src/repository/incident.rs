//! What happened in an incident: one immutable entry for each thing that was done, in the order in which it was.
//!
//! Nothing is ever changed: an incident is open when its last entry that opens or closes it opens it. Entries that two
//! daemons write at the same time stand beside each other.

use futures::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::codec::Kind;
use super::format::{Repository, RepositoryError};
use super::layout::{self, Key, Ticket, prefix};
use crate::pg::Timestamp;

/// Entries that are read at the same time.
const READS_MAX: usize = 8;

/// What kind of thing was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    Opened,
    Pinned,
    RestorePoint,
    /// All WAL up to a position is in the store.
    Stored,
    Restored,
    /// Another command for the ticket.
    Command,
    /// Something that did not work, or that a person should know.
    Remark,
    Closed,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub at: Timestamp,
    pub by: String,
    pub what: What,
    /// A sentence.
    pub text: String,
    /// The same for programs.
    #[serde(default)]
    pub document: Value,
}

/// The log of one incident.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    pub ticket: Ticket,
    /// In their order.
    pub entries: Vec<Entry>,
    /// Entries that are damaged.
    pub unreadable: usize,
    next_number: u32,
}

impl What {
    pub fn as_str(self) -> &'static str {
        match self {
            What::Opened => "opened",
            What::Pinned => "pinned",
            What::RestorePoint => "restore-point",
            What::Stored => "stored",
            What::Restored => "restored",
            What::Command => "command",
            What::Remark => "remark",
            What::Closed => "closed",
        }
    }
}

impl Log {
    pub fn is_open(&self) -> bool {
        let last = self.entries.iter().rev().find(|entry| matches!(entry.what, What::Opened | What::Closed));
        last.is_some_and(|entry| entry.what == What::Opened)
    }

    /// How often it was opened.
    pub fn opened_count(&self) -> usize {
        self.entries.iter().filter(|entry| entry.what == What::Opened).count()
    }

    /// Adds an entry, in the store and here.
    pub async fn append(&mut self, repository: &Repository, entry: Entry) -> Result<(), RepositoryError> {
        let key = Key::incident(&self.ticket, self.next_number, rand::random());
        repository.write_fact(&key, Kind::Incident, &entry).await?;
        self.next_number = self.next_number.saturating_add(1);
        self.entries.push(entry);
        Ok(())
    }
}

/// Reads the log of an incident; it is empty when there is none.
pub async fn load(repository: &Repository, ticket: &Ticket) -> Result<Log, RepositoryError> {
    let mut names: Vec<(u32, u32)> = Vec::new();
    for object in repository.store().list(&format!("{}/{ticket}", prefix::INCIDENTS)).await? {
        if let Some((found, number, random)) = layout::parse_incident(&object.key)
            && found == *ticket
        {
            names.push((number, random));
        }
    }
    names.sort_unstable();
    let next_number = names.last().map_or(0, |(number, _)| number.saturating_add(1));
    let reads = futures::stream::iter(names).map(|(number, random)| async move {
        match repository.read_fact::<Entry>(&Key::incident(ticket, number, random), Kind::Incident).await {
            Ok(entry) => Ok(Some((number, entry))),
            Err(error) if error.is_corrupt() || error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    });
    let read: Vec<Option<(u32, Entry)>> = reads.buffered(READS_MAX).try_collect().await?;
    let unreadable = read.iter().filter(|entry| entry.is_none()).count();
    let mut entries: Vec<(u32, Entry)> = read.into_iter().flatten().collect();
    entries.sort_by_key(|(number, entry)| (*number, entry.at));
    let entries = entries.into_iter().map(|(_, entry)| entry).collect();
    Ok(Log { ticket: ticket.clone(), entries, unreadable, next_number })
}

/// The tickets that have a log, by name.
pub async fn list(repository: &Repository) -> Result<Vec<Ticket>, RepositoryError> {
    let folders = repository.store().list_folders(prefix::INCIDENTS).await?;
    let mut tickets: Vec<Ticket> = folders.iter().filter_map(|name| name.parse().ok()).collect();
    tickets.sort_unstable();
    Ok(tickets)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::testing::World;

    fn entry(what: What, at: i64) -> Entry {
        Entry { at: Timestamp(at), by: "ann".into(), what, text: "it was done".into(), document: Value::Null }
    }

    #[tokio::test]
    async fn entries_come_back_in_their_order_whoever_wrote_them() {
        let world = World::new(None).await;
        let repository = &world.repository;
        let ticket: Ticket = "OPS-1".parse().expect("a ticket");
        let mut ours = load(repository, &ticket).await.expect("read");
        assert!(!ours.is_open() && ours.entries.is_empty());
        ours.append(repository, entry(What::Opened, 1)).await.expect("written");
        // Another writer, which did not see what we write now.
        let mut theirs = load(repository, &ticket).await.expect("read");
        theirs.append(repository, entry(What::Remark, 3)).await.expect("written");
        ours.append(repository, entry(What::Command, 2)).await.expect("written");
        let mut longer = load(repository, &"OPS-10".parse().expect("a ticket")).await.expect("read");
        longer.append(repository, entry(What::Opened, 1)).await.expect("written");

        let log = load(repository, &ticket).await.expect("read");
        let order: Vec<What> = log.entries.iter().map(|entry| entry.what).collect();
        assert_eq!(order, [What::Opened, What::Command, What::Remark]);
        assert!(log.is_open() && log.opened_count() == 1);
        let mut log = log;
        log.append(repository, entry(What::Closed, 4)).await.expect("written");
        assert!(!load(repository, &ticket).await.expect("read").is_open());
        let tickets: Vec<String> = list(repository).await.expect("listed").iter().map(Ticket::to_string).collect();
        assert_eq!(tickets, ["OPS-1", "OPS-10"]);
    }
}
