//! Packs: storage objects of up to about 16 MiB that hold frames, and the frames' addresses.
//!
//! A frame is a run of at most 1 MiB of data, compressed by itself (one zstd frame), sealed when the environment is
//! encrypted, and addressed by pack, offset and lengths together with the digest of its plain bytes. Frames are made on
//! several threads; a pack is put together in order.
//!
//! Invariants: frame plain length ≤ [`FRAME_BYTES_MAX`]; a frame's plain bytes are seen only after their digest matched.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::codec::{Codec, CodecError, HEADER_BYTES, Kind};
use super::crypto::{ObjectKey, SALT_BYTES};
use super::format::{Repository, RepositoryError, corrupt};
use super::layout::{BackupId, ContentHash, Incarnation, Key};
use crate::util::digest::{Digest, hex, unhex};

/// Most plain bytes in one frame.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// A pack is closed when it has this many bytes. Few in this crate's tests, so that a small backup has several packs.
pub const PACK_BYTES: usize = if cfg!(test) { 256 << 10 } else { 16 << 20 };

/// Which pack, and the salt of its key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackRef {
    pub backup: BackupId,
    pub number: u32,
    pub salt: [u8; SALT_BYTES],
}

/// Where a frame is; `pack` is an index into the list of packs of the table that holds this address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameRef {
    pub pack: u32,
    pub offset: u64,
    pub stored_bytes: u32,
    pub plain_bytes: u32,
    pub hash: ContentHash,
}

/// A pack being filled.
pub struct PackBuilder {
    reference: PackRef,
    key: Key,
    object_key: Option<ObjectKey>,
    bytes: Vec<u8>,
}

/// A pack ready to be stored.
pub struct FinishedPack {
    pub reference: PackRef,
    pub key: Key,
    pub bytes: Bytes,
    pub digest: Digest,
}

/// A frame compressed, not yet placed in a pack.
pub struct CompressedFrame {
    pub compressed: Vec<u8>,
    pub plain_bytes: u32,
    pub hash: ContentHash,
}

/// Makes one frame after the other without asking for memory each time; one for each thread.
pub struct FrameCompressor {
    codec: Codec,
    zstd: zstd::bulk::Compressor<'static>,
    buffer: Vec<u8>,
}

/// Opens one frame after the other in the same memory; one for each thread.
pub struct FrameOpener {
    codec: Codec,
    incarnation: Incarnation,
    zstd: zstd::bulk::Decompressor<'static>,
    plain: Vec<u8>,
}

impl FrameCompressor {
    /// # Errors
    /// Only when zstd fails to allocate.
    pub fn new(codec: &Codec) -> Result<FrameCompressor, CodecError> {
        let zstd = zstd::bulk::Compressor::new(codec.level()).map_err(|e| CodecError::Compression(e.to_string()))?;
        let buffer = Vec::with_capacity(zstd::zstd_safe::compress_bound(FRAME_BYTES_MAX));
        Ok(FrameCompressor { codec: codec.clone(), zstd, buffer })
    }

    /// CPU work: call it on the blocking pool.
    pub fn make(&mut self, plain: &[u8]) -> Result<CompressedFrame, CodecError> {
        let plain_bytes = u32::try_from(plain.len()).unwrap_or(u32::MAX);
        if plain.len() > FRAME_BYTES_MAX {
            return Err(CodecError::TooLong { declared: plain.len() as u64, limit: FRAME_BYTES_MAX as u64 });
        }
        let hash = ContentHash::of(&self.codec.digest(plain));
        self.buffer.clear();
        let compressed = self.zstd.compress_to_buffer(plain, &mut self.buffer);
        compressed.map_err(|e| CodecError::Compression(e.to_string()))?;
        Ok(CompressedFrame { compressed: self.buffer.clone(), plain_bytes, hash })
    }
}

impl CompressedFrame {
    /// A single frame. CPU work: call it on the blocking pool.
    pub fn make(codec: &Codec, plain: &[u8]) -> Result<CompressedFrame, CodecError> {
        FrameCompressor::new(codec)?.make(plain)
    }
}

impl PackBuilder {
    pub fn new(codec: &Codec, incarnation: Incarnation, backup: &BackupId, number: u32) -> Self {
        let salt = codec.header(Kind::Pack, 0, Digest([0; 32])).salt;
        let mut bytes = Vec::with_capacity(PACK_BYTES + FRAME_BYTES_MAX + HEADER_BYTES);
        bytes.resize(HEADER_BYTES, 0);
        PackBuilder {
            reference: PackRef { backup: backup.clone(), number, salt },
            key: Key::pack(incarnation, backup, number),
            object_key: codec.object_key(&salt),
            bytes,
        }
    }

    pub fn reference(&self) -> &PackRef {
        &self.reference
    }

    /// Adds a frame; `pack` is what the address will say of the pack.
    pub fn add(&mut self, frame: CompressedFrame, pack: u32) -> FrameRef {
        let offset = self.bytes.len() as u64;
        let mut stored = frame.compressed;
        if let Some(key) = &self.object_key {
            key.seal_frame(self.key.as_str(), offset, &mut stored);
        }
        self.bytes.extend_from_slice(&stored);
        let stored_bytes = u32::try_from(stored.len()).unwrap_or(u32::MAX);
        FrameRef { pack, offset, stored_bytes, plain_bytes: frame.plain_bytes, hash: frame.hash }
    }

    pub fn is_full(&self) -> bool {
        self.bytes.len() >= PACK_BYTES
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.len() == HEADER_BYTES
    }

    /// Writes the header: the digest is that of the body as stored.
    pub fn finish(mut self, codec: &Codec) -> FinishedPack {
        let body = self.bytes.get(HEADER_BYTES..).unwrap_or_default();
        let digest = codec.digest(body);
        let mut header = codec.header(Kind::Pack, body.len(), digest);
        header.body_bytes = body.len() as u64;
        header.salt = self.reference.salt;
        if let Some(place) = self.bytes.first_chunk_mut::<HEADER_BYTES>() {
            *place = header.encode();
        }
        FinishedPack { reference: self.reference, key: self.key, bytes: self.bytes.into(), digest }
    }
}

impl FrameOpener {
    /// # Errors
    /// Only when zstd fails to allocate.
    pub fn new(codec: &Codec, incarnation: Incarnation) -> Result<FrameOpener, CodecError> {
        let zstd = zstd::bulk::Decompressor::new().map_err(|e| CodecError::Compression(e.to_string()))?;
        Ok(FrameOpener { codec: codec.clone(), incarnation, zstd, plain: Vec::new() })
    }

    /// Opens a frame given its stored bytes. CPU work: call it on the blocking pool.
    ///
    /// # Errors
    /// [`CodecError`] when the bytes are not the frame that was addressed.
    pub fn open(&mut self, pack: &PackRef, frame: &FrameRef, stored: &[u8]) -> Result<&[u8], CodecError> {
        if frame.plain_bytes as usize > FRAME_BYTES_MAX {
            return Err(CodecError::TooLong { declared: frame.plain_bytes.into(), limit: FRAME_BYTES_MAX as u64 });
        }
        match self.codec.object_key(&pack.salt) {
            Some(key) => {
                let name = Key::pack(self.incarnation, &pack.backup, pack.number);
                self.decompress(&key.open_frame(name.as_str(), frame.offset, stored)?, frame)?;
            }
            None => self.decompress(stored, frame)?,
        }
        if ContentHash::of(&self.codec.digest(&self.plain)) != frame.hash {
            return Err(CodecError::Digest);
        }
        Ok(&self.plain)
    }

    fn decompress(&mut self, body: &[u8], frame: &FrameRef) -> Result<(), CodecError> {
        self.plain.clear();
        self.plain.reserve(frame.plain_bytes as usize);
        let found = self.zstd.decompress_to_buffer(body, &mut self.plain);
        let found = found.map_err(|e| CodecError::Compression(e.to_string()))? as u64;
        if found == u64::from(frame.plain_bytes) {
            return Ok(());
        }
        Err(CodecError::Length { found, declared: frame.plain_bytes.into() })
    }
}

/// Reads and opens one frame; damaged bytes are read once more before they count.
pub async fn read_frame(
    repository: &Repository,
    incarnation: Incarnation,
    pack: &PackRef,
    frame: &FrameRef,
) -> Result<Bytes, RepositoryError> {
    let key = Key::pack(incarnation, &pack.backup, pack.number);
    let end = frame.offset.saturating_add(frame.stored_bytes.into());
    let mut again = true;
    loop {
        let stored = repository.store().get_range(&key, frame.offset..end).await?;
        let (codec, pack, frame) = (repository.codec().clone(), pack.clone(), *frame);
        let open = move || {
            let mut opener = FrameOpener::new(&codec, incarnation)?;
            opener.open(&pack, &frame, &stored)?;
            Ok::<_, CodecError>(opener.plain)
        };
        let opened = tokio::task::spawn_blocking(open).await;
        match opened.map_err(|_| RepositoryError::Stopping)? {
            Ok(plain) => return Ok(plain.into()),
            Err(_) if again => again = false,
            Err(source) => return Err(corrupt(&key, source)),
        }
    }
}

/// `[backup, number, salt in hex]`.
impl Serialize for PackRef {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        (self.backup.as_str(), self.number, hex(&self.salt)).serialize(s)
    }
}

impl<'de> Deserialize<'de> for PackRef {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let (backup, number, salt) = <(BackupId, u32, String)>::deserialize(d)?;
        let salt = unhex(&salt).and_then(|s| s.try_into().ok());
        let salt = salt.ok_or_else(|| serde::de::Error::custom("a salt has 32 hex digits"))?;
        Ok(PackRef { backup, number, salt })
    }
}

/// `[pack, offset, stored bytes, plain bytes, hash]`.
impl Serialize for FrameRef {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        (self.pack, self.offset, self.stored_bytes, self.plain_bytes, self.hash.to_string()).serialize(s)
    }
}

impl<'de> Deserialize<'de> for FrameRef {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let (pack, offset, stored_bytes, plain_bytes, hash) = <(u32, u64, u32, u32, String)>::deserialize(d)?;
        let hash = hash.parse().map_err(serde::de::Error::custom)?;
        Ok(FrameRef { pack, offset, stored_bytes, plain_bytes, hash })
    }
}
