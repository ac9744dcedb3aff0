//! One environment's repository, opened: the store, the codec with its key, the format version.
//!
//! `format.json` and `keys/` are plain JSON, for they are read before anything can be opened; everything else is an
//! object of [`super::codec`]. Each of two first writers makes a data key of its own under its own name; `format.json`,
//! written once, says whose counts, before anything is sealed with either.

use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::codec::{Codec, CodecError, Kind};
use super::crypto::{DataKey, MasterKey};
use super::layout::{self, Incarnation, Key, prefix};
use super::store::{Store, StoreError};
use crate::util::digest::{Digest, hex, unhex};
use crate::util::throttle::Throttle;

/// The format that this program writes and reads.
pub const FORMAT_VERSION: u32 = 1;
/// Facts (marks, leases, identities, claims) are small.
const FACT_BYTES_MAX: u64 = 1 << 20;
/// How a data key is wrapped.
const WRAP: &str = "aes-256-gcm";

/// The content of `format.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Format {
    format: String,
    version: u32,
    /// The id of the data key; `None` in a repository that is not encrypted.
    data_key: Option<u32>,
}

/// The content of an object below `keys/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct WrappedKey {
    key_id: u32,
    /// How the data key is wrapped; `aes-256-gcm` by a master key is the only way so far.
    wrap: String,
    master: String,
    wrapped: String,
}

/// Why a repository cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("read {key}: {source}")]
    Corrupt { key: String, source: CodecError },
    #[error("read {key}: {reason}")]
    Malformed { key: String, reason: String },
    #[error("read identity/{0}: the object is gone, and all that belongs to it is not found without it")]
    IdentityGone(Incarnation),
    #[error("there is no repository at {0}")]
    Missing(String),
    #[error("the repository at {place} has format version {found}, this program reads version {FORMAT_VERSION}")]
    Version { place: String, found: u32 },
    #[error("the repository at {0} is encrypted, and no master key is configured")]
    KeyMissing(String),
    #[error("the repository at {0} is not encrypted, and a master key is configured")]
    NotEncrypted(String),
    #[error("the data key of {place} is wrapped by the master keys {found}, not by the configured one ({configured})")]
    OtherMasterKey { place: String, found: String, configured: String },
    #[error("work on the blocking pool was cancelled")]
    Stopping,
}

impl RepositoryError {
    pub fn is_not_found(&self) -> bool {
        matches!(self, RepositoryError::Store(e) if e.is_not_found())
    }

    pub fn is_retryable(&self) -> bool {
        matches!(self, RepositoryError::Store(e) if e.is_retryable())
    }

    /// What a person can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            RepositoryError::Store(e) => e.hint(),
            RepositoryError::IdentityGone(_) => Some(
                "The daemon writes it again when it reaches the cluster; else put it back from an older version of the object.",
            ),
            _ => None,
        }
    }

    /// Bytes in the store are not what they should be.
    pub fn is_corrupt(&self) -> bool {
        match self {
            RepositoryError::Corrupt { .. } | RepositoryError::Malformed { .. } => true,
            RepositoryError::Store(e) => e.is_wrong_length(),
            _ => false,
        }
    }
}

/// An open repository; cheap to clone.
#[derive(Clone)]
pub struct Repository {
    store: Store,
    codec: Codec,
}

impl Repository {
    /// Opens for reading; writes nothing.
    ///
    /// # Errors
    /// [`RepositoryError::Missing`] when nothing was ever written there, and the other cases as named.
    pub async fn open(store: Store, level: i32, master: Option<&MasterKey>) -> Result<Repository, RepositoryError> {
        match Self::load(&store, level, master).await? {
            Some(repository) => Ok(repository),
            None => Err(RepositoryError::Missing(store.place().to_owned())),
        }
    }

    /// Opens for writing; makes `format.json`, and the data key of an encrypted environment, when there is none.
    pub async fn open_or_create(
        store: Store,
        level: i32,
        master: Option<&MasterKey>,
    ) -> Result<Repository, RepositoryError> {
        if let Some(repository) = Self::load(&store, level, master).await? {
            return Ok(repository);
        }
        let data_key = match master {
            Some(master) => Some(create_data_key(&store, master).await?),
            None => None,
        };
        let format = Format { format: "pgrecall".into(), version: FORMAT_VERSION, data_key };
        match store.create(&Key::format(), to_json(&format)).await {
            Ok(_) => {}
            // A store that knows no create-only write: the later of two first writers counts.
            Err(e) if !e.is_retryable() => drop(store.put(&Key::format(), to_json(&format)).await?),
            Err(e) => return Err(e.into()),
        }
        let repository = Self::open(store, level, master).await?;
        if let (Some(own), Some(master)) = (data_key.filter(|own| repository.codec.key_id() != Some(*own)), master) {
            repository.store.delete(&Key::data_key(own, &master.fingerprint())).await?;
        }
        Ok(repository)
    }

    async fn load(store: &Store, level: i32, master: Option<&MasterKey>) -> Result<Option<Self>, RepositoryError> {
        let place = || store.place().to_owned();
        let Some(format) = read_json::<Format>(store, &Key::format()).await? else { return Ok(None) };
        if format.format != "pgrecall" || format.version != FORMAT_VERSION {
            return Err(RepositoryError::Version { place: place(), found: format.version });
        }
        let key = match (format.data_key, master) {
            (None, None) => None,
            (None, Some(_)) => return Err(RepositoryError::NotEncrypted(place())),
            (Some(_), None) => return Err(RepositoryError::KeyMissing(place())),
            (Some(id), Some(master)) => Some(Arc::new(load_data_key(store, id, master).await?)),
        };
        Ok(Some(Repository { store: store.clone(), codec: Codec::new(level, key) }))
    }

    /// The same repository, for work whose bytes are held to a rate.
    pub fn throttled(&self, throttle: Option<Arc<Throttle>>) -> Repository {
        Repository { store: self.store.throttled(throttle), codec: self.codec.clone() }
    }

    pub fn store(&self) -> &Store {
        &self.store
    }

    pub fn codec(&self) -> &Codec {
        &self.codec
    }

    /// Encodes on the blocking pool and stores.
    pub async fn write(&self, key: &Key, kind: Kind, content: Bytes) -> Result<Written, RepositoryError> {
        let (codec, name) = (self.codec.clone(), key.clone());
        let encoded = tokio::task::spawn_blocking(move || codec.encode(&name, kind, &content)).await;
        let encoded = encoded.map_err(|_| RepositoryError::Stopping)?.map_err(|e| corrupt(key, e))?;
        let bytes = encoded.bytes.len() as u64;
        let e_tag = self.store.put(key, Bytes::from(encoded.bytes)).await?;
        Ok(Written { bytes, e_tag })
    }

    /// Reads, verifies and decodes content of at most `limit` bytes; damaged bytes are read once more before they count.
    pub async fn read(&self, key: &Key, kind: Kind, limit: u64) -> Result<Bytes, RepositoryError> {
        self.read_digested(key, kind, limit).await.map(|(content, _)| content)
    }

    /// As [`Repository::read`], with the digest of the content.
    pub(super) async fn read_digested(
        &self,
        key: &Key,
        kind: Kind,
        limit: u64,
    ) -> Result<(Bytes, Digest), RepositoryError> {
        // Compressed and sealed bytes can be slightly longer than the content.
        let stored_limit = limit.saturating_add(limit / 64).saturating_add(4096);
        let mut again = true;
        loop {
            let bytes = self.store.get(key, stored_limit).await?;
            let (codec, name) = (self.codec.clone(), key.clone());
            let decoded = tokio::task::spawn_blocking(move || codec.decode_digested(&name, kind, &bytes, limit)).await;
            match decoded.map_err(|_| RepositoryError::Stopping)? {
                Ok((content, digest)) => return Ok((content.into(), digest)),
                Err(_) if again => again = false,
                Err(source) => return Err(corrupt(key, source)),
            }
        }
    }

    /// Stores a small fact as JSON.
    pub async fn write_fact(&self, key: &Key, kind: Kind, fact: &impl Serialize) -> Result<(), RepositoryError> {
        self.write(key, kind, to_json(fact).into()).await.map(drop)
    }

    /// Reads a small fact.
    pub async fn read_fact<T: DeserializeOwned>(&self, key: &Key, kind: Kind) -> Result<T, RepositoryError> {
        let content = self.read(key, kind, FACT_BYTES_MAX).await?;
        parse_json(key, &content)
    }

    /// Wraps the data key by another master key; what the old one wrapped is removed afterwards. The same key again changes
    /// nothing.
    pub async fn rotate_master(&self, old: &MasterKey, new: &MasterKey) -> Result<(), RepositoryError> {
        let Some(id) = self.codec.key_id() else {
            return Err(RepositoryError::NotEncrypted(self.store.place().to_owned()));
        };
        let data_key = load_data_key(&self.store, id, old).await?;
        if old.fingerprint() == new.fingerprint() {
            return Ok(());
        }
        put_wrapped(&self.store, &data_key, new).await?;
        load_data_key(&self.store, id, new).await?;
        self.store.delete(&Key::data_key(data_key.id(), &old.fingerprint())).await?;
        Ok(())
    }
}

/// What [`Repository::write`] stored.
#[derive(Debug, Clone)]
pub struct Written {
    pub bytes: u64,
    pub e_tag: Option<String>,
}

pub(super) fn corrupt(key: &Key, source: CodecError) -> RepositoryError {
    RepositoryError::Corrupt { key: key.as_str().to_owned(), source }
}

pub(super) fn parse_json<T: DeserializeOwned>(key: &Key, content: &[u8]) -> Result<T, RepositoryError> {
    let wrong = |e: serde_json::Error| RepositoryError::Malformed { key: key.as_str().into(), reason: e.to_string() };
    serde_json::from_slice(content).map_err(wrong)
}

pub(super) fn to_json(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("facts have only text keys");
    bytes.push(b'\n');
    bytes
}

/// Reads plain JSON; damaged text is read once more before it counts.
async fn read_json<T: DeserializeOwned>(store: &Store, key: &Key) -> Result<Option<T>, RepositoryError> {
    let read = || async {
        let bytes = store.get(key, FACT_BYTES_MAX).await?;
        parse_json(key, &bytes)
    };
    let read = match read().await {
        Err(e) if e.is_corrupt() => read().await,
        read => read,
    };
    match read {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(e),
    }
}

/// Makes a data key under a name that nobody else has; it counts once `format.json` names it.
async fn create_data_key(store: &Store, master: &MasterKey) -> Result<u32, RepositoryError> {
    let id = rand::random_range(1..=u32::MAX);
    put_wrapped(store, &DataKey::generate(id), master).await?;
    Ok(id)
}

async fn put_wrapped(store: &Store, data_key: &DataKey, master: &MasterKey) -> Result<(), RepositoryError> {
    let key = Key::data_key(data_key.id(), &master.fingerprint());
    let fact = wrapped_key(data_key.id(), master, &master.wrap(data_key, key.as_str()));
    store.put(&key, to_json(&fact)).await?;
    Ok(())
}

fn wrapped_key(key_id: u32, master: &MasterKey, wrapped: &[u8]) -> WrappedKey {
    WrappedKey { key_id, wrap: WRAP.into(), master: master.fingerprint(), wrapped: hex(wrapped) }
}

async fn load_data_key(store: &Store, id: u32, master: &MasterKey) -> Result<DataKey, RepositoryError> {
    let listed = store.list(prefix::KEYS).await?;
    let wraps = listed.iter().filter_map(|o| Some((&o.key, layout::parse_data_key(&o.key)?)));
    let wraps: Vec<_> = wraps.filter(|(_, (of, _))| *of == id).collect();
    let Some((key, _)) = wraps.iter().find(|(_, (_, by))| *by == master.fingerprint()) else {
        let found = wraps.iter().map(|(_, (_, by))| by.as_str()).collect::<Vec<_>>().join(", ");
        let (place, configured) = (store.place().to_owned(), master.fingerprint());
        return Err(RepositoryError::OtherMasterKey { place, found, configured });
    };
    let read = || async {
        let gone = || StoreError::NotFound { action: "read", key: key.as_str().to_owned() };
        let fact = read_json::<WrappedKey>(store, key).await?.ok_or_else(gone)?;
        let wrapped = unhex(&fact.wrapped).unwrap_or_default();
        let written = wrapped_key(id, master, &wrapped);
        if fact != written {
            let reason = "it is not as it was written".to_owned();
            return Err(RepositoryError::Malformed { key: key.as_str().to_owned(), reason });
        }
        master.unwrap(fact.key_id, &wrapped, key.as_str()).map_err(|e| corrupt(key, e.into()))
    };
    match read().await {
        Err(e) if e.is_corrupt() => read().await,
        read => read,
    }
}

#[cfg(test)]
mod tests;
