//! Reads WAL and histories, and checks that the content is the one that the name promises.
//!
//! An object that lies under another object's name opens by itself when nothing is encrypted: only the hash in the name
//! tells that it is not the one that was asked for.

use bytes::Bytes;

use super::codec::{CodecError, Kind};
use super::format::{Repository, RepositoryError, corrupt};
use super::layout::{ContentHash, Key, WalRange};
use crate::pg::timeline::{HistoryFile, ParseHistoryError};

/// History files are a line per ancestor.
pub const HISTORY_BYTES_MAX: u64 = 4 << 20;

/// The bytes `[range.from, range.to)` of a segment.
pub async fn read_range(repository: &Repository, key: &Key, range: &WalRange) -> Result<Bytes, RepositoryError> {
    let length = range.to.saturating_sub(range.from);
    let content = repository.read(key, Kind::Wal, length).await?;
    if content.len() as u64 != length {
        return Err(corrupt(key, CodecError::Length { found: content.len() as u64, declared: length }));
    }
    check_name(repository, key, content, range.hash).await
}

/// The content of a history file.
pub async fn read_history(repository: &Repository, key: &Key, hash: ContentHash) -> Result<Bytes, RepositoryError> {
    let content = repository.read(key, Kind::History, HISTORY_BYTES_MAX).await?;
    check_name(repository, key, content, hash).await
}

/// A history file, understood.
pub async fn load_history(
    repository: &Repository,
    key: &Key,
    hash: ContentHash,
) -> Result<HistoryFile, RepositoryError> {
    let malformed = |reason: String| RepositoryError::Malformed { key: key.as_str().to_owned(), reason };
    let content = read_history(repository, key, hash).await?;
    let text = std::str::from_utf8(&content).map_err(|e| malformed(e.to_string()))?;
    text.parse().map_err(|e: ParseHistoryError| malformed(e.to_string()))
}

/// Reading has compared the content with the digest in the header; this compares it with the name.
async fn check_name(
    repository: &Repository,
    key: &Key,
    content: Bytes,
    hash: ContentHash,
) -> Result<Bytes, RepositoryError> {
    let (codec, hashed) = (repository.codec().clone(), content.clone());
    let found = tokio::task::spawn_blocking(move || ContentHash::of(&codec.digest(&hashed))).await;
    if found.map_err(|_| RepositoryError::Stopping)? == hash {
        return Ok(content);
    }
    let reason = "it holds other content than its name says: another object lies under this name".to_owned();
    Err(RepositoryError::Malformed { key: key.as_str().to_owned(), reason })
}
