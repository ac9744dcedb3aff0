//! Reads WAL and histories, and checks that the content is the one that the name promises.
//!
//! An object that lies under another object's name opens by itself when nothing is encrypted: only the hash in the name
//! tells that it is not the one that was asked for.

use bytes::Bytes;

use super::codec::{CodecError, Kind};
use super::format::{Repository, RepositoryError, corrupt};
use super::layout::{ContentHash, Key, WalRange};
use crate::pg::timeline::{HistoryFile, ParseHistoryError};
use crate::util::digest::Digest;

/// History files are a line per ancestor.
pub const HISTORY_BYTES_MAX: u64 = 4 << 20;

/// The bytes `[range.from, range.to)` of a segment.
pub async fn read_range(repository: &Repository, key: &Key, range: &WalRange) -> Result<Bytes, RepositoryError> {
    let length = range.to.saturating_sub(range.from);
    let (content, digest) = repository.read_digested(key, Kind::Wal, length).await?;
    if content.len() as u64 != length {
        return Err(corrupt(key, CodecError::Length { found: content.len() as u64, declared: length }));
    }
    check_name(key, content, &digest, range.hash)
}

/// The content of a history file.
pub async fn read_history(repository: &Repository, key: &Key, hash: ContentHash) -> Result<Bytes, RepositoryError> {
    let (content, digest) = repository.read_digested(key, Kind::History, HISTORY_BYTES_MAX).await?;
    check_name(key, content, &digest, hash)
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

/// Reading has compared the content with the digest in the header; this compares that digest with the name.
fn check_name(key: &Key, content: Bytes, digest: &Digest, hash: ContentHash) -> Result<Bytes, RepositoryError> {
    if ContentHash::of(digest) == hash {
        return Ok(content);
    }
    let reason = "it holds other content than its name says: another object lies under this name".to_owned();
    Err(RepositoryError::Malformed { key: key.as_str().to_owned(), reason })
}
