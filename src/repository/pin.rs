//! Pins: facts that keep a backup, and the WAL from its start on, beyond the recovery window.
//!
//! The name says which backup, so that a pin whose content is damaged still keeps it. A pin is confirmed only when a listing
//! after it shows that the backup neither leaves nor has been dropped: a remover that did not see the pin has written its
//! mark before.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use super::catalogue;
use super::codec::Kind;
use super::format::{Repository, RepositoryError};
use super::layout::{self, Key, PinName, prefix};
use crate::pg::{Lsn, TimelineId, Timestamp};

/// What is kept, for how long, and for whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// What a person calls it; of a restore that pins what it reads, what it does.
    pub name: String,
    /// The moment, as it was asked for.
    pub target: String,
    /// The moment's timeline, and up to where WAL is needed for it.
    pub timeline: TimelineId,
    pub end_lsn: Lsn,
    pub until: Timestamp,
    pub made_at: Timestamp,
    /// Who made it: a user, or the process of a restore.
    pub owner: String,
    /// Made by a restore or clone for as long as it reads.
    pub temporary: bool,
}

/// A pin as a listing showed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedPin {
    pub name: PinName,
    /// When the store got it.
    pub last_modified: DateTime<Utc>,
    /// Why it cannot be read, when it cannot.
    pub pin: Result<Pin, String>,
}

/// Why a backup cannot be pinned.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("pin backup {0}: it is leaving the recovery window just now")]
    Leaving(String),
    #[error("pin backup {0}: it was dropped, or never finished")]
    Gone(String),
}

/// Stores a pin and looks whether it came in time; one that did not is taken back.
///
/// # Errors
/// [`PinError::Leaving`] and [`PinError::Gone`] when the backup cannot be relied on.
pub async fn add(repository: &Repository, name: &PinName, pin: &Pin) -> Result<(), PinError> {
    repository.write_fact(&Key::pin(name), Kind::Pin, pin).await?;
    let listed = catalogue::list_backup_marks(repository, name.incarnation).await;
    let refused = match listed {
        Ok(listed) => match listed.iter().find(|marks| marks.id == name.backup) {
            Some(marks) if marks.exists() && !marks.is_leaving() => return Ok(()),
            Some(marks) if marks.exists() => PinError::Leaving(name.backup.to_string()),
            _ => PinError::Gone(name.backup.to_string()),
        },
        Err(error) => error.into(),
    };
    remove(repository, name).await?;
    Err(refused)
}

/// Every pin of the environment.
pub async fn list(repository: &Repository) -> Result<Vec<ListedPin>, RepositoryError> {
    let mut pins = Vec::new();
    for object in repository.store().list(prefix::PINS).await? {
        let Some(name) = layout::parse_pin(&object.key) else { continue };
        let pin = match repository.read_fact(&object.key, Kind::Pin).await {
            Ok(pin) => Ok(pin),
            // It was removed while this was listed.
            Err(error) if error.is_not_found() => continue,
            Err(error) if error.is_corrupt() => Err(error.to_string()),
            Err(error) => return Err(error),
        };
        pins.push(ListedPin { name, last_modified: object.last_modified, pin });
    }
    Ok(pins)
}

/// Removes a pin; one that is not there counts as removed.
pub async fn remove(repository: &Repository, name: &PinName) -> Result<(), RepositoryError> {
    Ok(repository.store().delete(&Key::pin(name)).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::layout::BackupMark;
    use crate::repository::testing::{T1, World, files};

    fn pin() -> Pin {
        Pin {
            name: "before the migration".into(),
            target: "latest".into(),
            timeline: T1,
            end_lsn: Lsn(5),
            until: Timestamp(9),
            made_at: Timestamp(1),
            owner: "ann".into(),
            temporary: false,
        }
    }

    #[tokio::test]
    async fn a_pin_holds_only_what_nobody_is_removing() {
        let world = World::new(None).await;
        let commit = world.put_backup(&files()).await;
        let (repository, incarnation) = (&world.repository, world.known.incarnation);
        let name = PinName { incarnation, backup: commit.id.clone(), random: 1 };
        add(repository, &name, &pin()).await.expect("pinned");
        let listed = list(repository).await.expect("listed");
        assert_eq!(listed.iter().map(|l| (&l.name, &l.pin)).collect::<Vec<_>>(), [(&name, &Ok(pin()))]);
        remove(repository, &name).await.expect("removed");

        let content =
            catalogue::RemovalMark { generation: "1".into(), written_at: Timestamp(1), reason: String::new() };
        let leaving = BackupMark::Leaving("00000001-00000001-00000001".into());
        for (mark, refusal) in [(leaving, "leaving"), (BackupMark::Dropped, "dropped")] {
            catalogue::write_mark(repository, incarnation, &commit.id, (&mark, &content)).await.expect("marked");
            let refused = add(repository, &name, &pin()).await.expect_err("not in time");
            assert!(refused.to_string().contains(refusal), "{refused}");
            assert_eq!(list(repository).await.expect("listed"), [], "a refused pin is taken back");
        }
    }
}
