//! What a store can do, tried out by the daemon when it starts and recorded with its generation. Nothing that keeps data
//! safe rests on create-only writes; ranges and listings are needed, and without them nothing is begun.

use chrono::TimeDelta;
use serde::{Deserialize, Serialize};

use super::layout::{Key, prefix};
use super::store::{Store, StoreClock, StoreError};

const CONTENT: &[u8] = b"pgrecall tries out what this store can do\n";
/// A probe older than this was left by a daemon that was killed.
const LEFT_AFTER: TimeDelta = TimeDelta::hours(1);

/// What a store was seen to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abilities {
    /// A create-only write of a name that exists is refused.
    pub create_only: bool,
    /// A part of an object can be read.
    pub range: bool,
    /// What was written is in the next listing.
    pub list: bool,
    /// Writes carry a checksum, and the store takes it.
    pub checksum: bool,
    pub delete: bool,
}

/// Writes an object, reads and lists it, and deletes it again.
///
/// # Errors
/// When nothing can be written at all.
pub async fn probe(store: &Store) -> Result<Abilities, StoreError> {
    let key = Key::probe(rand::random());
    let created = store.create(&key, CONTENT).await;
    if created.is_err() {
        store.put(&key, CONTENT).await?;
    }
    let create_only = created.is_ok() && matches!(store.create(&key, CONTENT).await, Ok(false));
    let range = store.get_range(&key, 3..9).await.is_ok_and(|bytes| CONTENT.get(3..9) == Some(&bytes[..]));
    let listed = store.list(prefix::PROBE).await.unwrap_or_default();
    let own = listed.iter().find(|object| object.key == key);
    if let Some(own) = own {
        let left = listed.iter().filter(|o| own.last_modified.signed_duration_since(o.last_modified) > LEFT_AFTER);
        for object in left {
            let _ = store.delete(&object.key).await;
        }
    }
    let delete = store.delete(&key).await.is_ok() && matches!(store.head(&key).await, Ok(None));
    Ok(Abilities { create_only, range, list: own.is_some(), checksum: store.sends_checksums(), delete })
}

/// What time it is by the store's clock.
///
/// # Errors
/// When nothing can be written or read.
pub async fn clock(store: &Store) -> Result<StoreClock, StoreError> {
    let key = Key::probe(rand::random());
    let clock = store.clock(&key, CONTENT).await?;
    let _ = store.delete(&key).await;
    Ok(clock)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::location::Location;
    use crate::repository::store::StoreSettings;

    #[tokio::test]
    async fn a_directory_can_do_everything_and_keeps_nothing_of_the_trial() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let location = Location::File(dir.path().to_path_buf());
        let store = Store::open(&location, "shop", StoreSettings::default()).expect("open");
        let found = probe(&store).await.expect("probe");
        let all = Abilities { create_only: true, range: true, list: true, checksum: false, delete: true };
        assert_eq!(found, all, "a directory has no checksums to take");
        assert_eq!(store.list("probe").await.expect("list"), []);
    }
}
