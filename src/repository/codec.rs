//! The envelope around every stored object: what it is, how long, which content.
//!
//! 80 bytes of header (integers little-endian), then the body:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `PGRECALL` |
//! | 8 | 1 | version of the envelope, 1 |
//! | 9 | 1 | kind, an ASCII letter ([`Kind`]) |
//! | 10 | 1 | encryption: 0 none, 1 AES-256-GCM |
//! | 11 | 1 | 0 |
//! | 12 | 4 | id of the data key, 0 when not encrypted |
//! | 16 | 8 | length of the content |
//! | 24 | 32 | digest of the content: SHA-256, or HMAC-SHA256 under the names key when encrypted |
//! | 56 | 8 | length of the body |
//! | 64 | 16 | salt of the object's key; zeros when not encrypted |
//!
//! The body is the content as one zstd frame, then sealed in chunks when encrypted. A pack (kind `P`) is the exception:
//! its content is its body, frame after frame, each compressed and sealed by itself.
//!
//! Invariants: decoded length = declared length; digest checked before anybody sees the bytes.
//! Errors: [`CodecError`] names what was wrong, never panics, never allocates more than `limit` bytes.

use std::sync::Arc;

use super::crypto::{DataKey, ObjectKey, SALT_BYTES};
use super::layout::Key;
use crate::util::digest::{Digest, Hasher};

/// Length of the header.
pub const HEADER_BYTES: usize = 80;
const MAGIC: &[u8; 8] = b"PGRECALL";
const VERSION: u8 = 1;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Wal = b'W',
    History = b'H',
    Index = b'I',
    Coverage = b'C',
    Pack = b'P',
    Backup = b'B',
    Intent = b'N',
    Mark = b'M',
    Lease = b'L',
    Identity = b'Y',
    Gap = b'G',
    Job = b'J',
    Incident = b'T',
    Act = b'A',
    Pin = b'X',
    /// Up to where WAL was removed.
    Removed = b'R',
}

/// Why stored bytes cannot be taken for what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("it is not an object of pgrecall (no header)")]
    NoHeader,
    #[error("its envelope has version {0}, this program reads version {VERSION}")]
    Version(u8),
    #[error("it is of kind {found:?} where {wanted:?} was expected")]
    OtherKind { found: char, wanted: char },
    #[error("it has {found} bytes where its header says {declared}")]
    Length { found: u64, declared: u64 },
    #[error("its content would be {declared} bytes, the limit is {limit}")]
    TooLong { declared: u64, limit: u64 },
    #[error("its content does not decompress: {0}")]
    Compression(String),
    #[error("its content has another digest than its header says")]
    Digest,
    #[error("it is encrypted, and no master key is configured")]
    KeyMissing,
    #[error("it is encrypted under data key {found}, the environment's key is {wanted}")]
    OtherKey { found: u32, wanted: u32 },
    #[error("it is not encrypted, although the environment is")]
    NotEncrypted,
    #[error(transparent)]
    Sealed(#[from] super::crypto::OpenError),
}

/// Compresses, hashes and, for an encrypted environment, seals.
#[derive(Clone)]
pub struct Codec {
    level: i32,
    key: Option<Arc<DataKey>>,
}

/// An object ready to be stored.
pub struct Encoded {
    pub bytes: Vec<u8>,
    pub digest: Digest,
}

/// The decoded header of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    pub kind: u8,
    pub encrypted: bool,
    pub key_id: u32,
    pub content_bytes: u64,
    pub digest: Digest,
    pub body_bytes: u64,
    pub salt: [u8; SALT_BYTES],
}

impl Codec {
    /// `level` is zstd's, 1 to 19.
    pub fn new(level: i32, key: Option<Arc<DataKey>>) -> Self {
        Codec { level, key }
    }

    pub fn level(&self) -> i32 {
        self.level
    }

    pub fn is_encrypted(&self) -> bool {
        self.key.is_some()
    }

    /// The id of the data key; `None` when the environment is not encrypted.
    pub fn key_id(&self) -> Option<u32> {
        self.key.as_ref().map(|key| key.id())
    }

    /// A hasher whose result goes into names and headers.
    pub fn hasher(&self) -> Hasher {
        match &self.key {
            Some(key) => Hasher::keyed(key.names()),
            None => Hasher::sha256(),
        }
    }

    pub fn digest(&self, content: &[u8]) -> Digest {
        let mut hasher = self.hasher();
        hasher.update(content);
        hasher.finish()
    }

    /// Encodes content under the name that it will be stored by. CPU work: call it on the blocking pool.
    ///
    /// # Errors
    /// Only when zstd fails to allocate.
    pub fn encode(&self, key: &Key, kind: Kind, content: &[u8]) -> Result<Encoded, CodecError> {
        let digest = self.digest(content);
        self.encode_digested(key, kind, content, digest)
    }

    /// As [`Codec::encode`], for content whose digest is known already (it is part of the name).
    pub fn encode_digested(
        &self,
        key: &Key,
        kind: Kind,
        content: &[u8],
        digest: Digest,
    ) -> Result<Encoded, CodecError> {
        let mut body = self.compress(content)?;
        let mut header = self.header(kind, content.len(), digest);
        if let Some(object_key) = self.object_key(&header.salt) {
            body = object_key.seal_chunks(key.as_str(), &body);
        }
        header.body_bytes = body.len() as u64;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        bytes.extend_from_slice(&header.encode());
        bytes.extend_from_slice(&body);
        Ok(Encoded { bytes, digest })
    }

    /// Decodes an object read under `key` whose content may have at most `limit` bytes.
    ///
    /// # Errors
    /// [`CodecError`] for anything that is not exactly what was encoded under this name.
    pub fn decode(&self, key: &Key, kind: Kind, bytes: &[u8], limit: u64) -> Result<Vec<u8>, CodecError> {
        self.decode_digested(key, kind, bytes, limit).map(|(content, _)| content)
    }

    /// As [`Codec::decode`], with the digest that the content was found to have: what compares it with a name need not
    /// compute it again.
    ///
    /// # Errors
    /// As [`Codec::decode`].
    pub fn decode_digested(
        &self,
        key: &Key,
        kind: Kind,
        bytes: &[u8],
        limit: u64,
    ) -> Result<(Vec<u8>, Digest), CodecError> {
        let (header, body) = self.open_header(kind, bytes)?;
        if header.content_bytes > limit {
            return Err(CodecError::TooLong { declared: header.content_bytes, limit });
        }
        let content = match self.object_key(&header.salt) {
            Some(object_key) => decompress(&object_key.open_chunks(key.as_str(), body)?, header.content_bytes)?,
            None => decompress(body, header.content_bytes)?,
        };
        if self.digest(&content) != header.digest {
            return Err(CodecError::Digest);
        }
        Ok((content, header.digest))
    }

    /// Checks the header of a whole object against this environment and splits the body off.
    pub fn open_header<'a>(&self, kind: Kind, bytes: &'a [u8]) -> Result<(Header, &'a [u8]), CodecError> {
        let header = Header::decode(bytes)?;
        if header.kind != kind as u8 {
            return Err(CodecError::OtherKind { found: char::from(header.kind), wanted: char::from(kind as u8) });
        }
        self.check_key(&header)?;
        let body = bytes.get(HEADER_BYTES..).unwrap_or_default();
        if body.len() as u64 != header.body_bytes {
            return Err(CodecError::Length { found: body.len() as u64, declared: header.body_bytes });
        }
        Ok((header, body))
    }

    fn check_key(&self, header: &Header) -> Result<(), CodecError> {
        match (&self.key, header.encrypted) {
            (None, false) => Ok(()),
            (None, true) => Err(CodecError::KeyMissing),
            (Some(_), false) => Err(CodecError::NotEncrypted),
            (Some(key), true) if key.id() == header.key_id => Ok(()),
            (Some(key), true) => Err(CodecError::OtherKey { found: header.key_id, wanted: key.id() }),
        }
    }

    /// The key of the object with this salt; `None` when the environment is not encrypted.
    pub fn object_key(&self, salt: &[u8; SALT_BYTES]) -> Option<ObjectKey> {
        self.key.as_ref().map(|key| key.object_key(salt))
    }

    /// A header for content of this length and digest, with a fresh salt; the length of the body is to be filled in.
    pub fn header(&self, kind: Kind, content_bytes: usize, digest: Digest) -> Header {
        Header {
            kind: kind as u8,
            encrypted: self.key.is_some(),
            key_id: self.key_id().unwrap_or(0),
            content_bytes: content_bytes as u64,
            digest,
            body_bytes: 0,
            salt: if self.key.is_some() { rand::random() } else { [0; SALT_BYTES] },
        }
    }

    /// One zstd frame.
    pub fn compress(&self, content: &[u8]) -> Result<Vec<u8>, CodecError> {
        zstd::bulk::compress(content, self.level).map_err(|e| CodecError::Compression(e.to_string()))
    }
}

/// Decompresses one zstd frame that must give exactly `length` bytes.
pub fn decompress(body: &[u8], length: u64) -> Result<Vec<u8>, CodecError> {
    let capacity =
        usize::try_from(length).map_err(|_| CodecError::TooLong { declared: length, limit: usize::MAX as u64 })?;
    let content = zstd::bulk::decompress(body, capacity).map_err(|e| CodecError::Compression(e.to_string()))?;
    if content.len() != capacity {
        return Err(CodecError::Length { found: content.len() as u64, declared: length });
    }
    Ok(content)
}

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let fields: [&[u8]; 8] = [
            MAGIC,
            &[VERSION, self.kind, u8::from(self.encrypted), 0],
            &self.key_id.to_le_bytes(),
            &self.content_bytes.to_le_bytes(),
            &self.digest.0,
            &self.body_bytes.to_le_bytes(),
            &self.salt,
            &[],
        ];
        for (place, byte) in out.iter_mut().zip(fields.concat()) {
            *place = byte;
        }
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Header, CodecError> {
        let rest =
            bytes.get(..HEADER_BYTES).and_then(|h| h.strip_prefix(MAGIC.as_slice())).ok_or(CodecError::NoHeader)?;
        let (&[version, kind, encryption, _], rest) = rest.split_first_chunk().ok_or(CodecError::NoHeader)?;
        if version != VERSION || encryption > 1 {
            return Err(CodecError::Version(version));
        }
        let (key_id, rest) = rest.split_first_chunk().ok_or(CodecError::NoHeader)?;
        let (content_bytes, rest) = rest.split_first_chunk().ok_or(CodecError::NoHeader)?;
        let (digest, rest) = rest.split_first_chunk().ok_or(CodecError::NoHeader)?;
        let (body_bytes, rest) = rest.split_first_chunk().ok_or(CodecError::NoHeader)?;
        let (salt, _) = rest.split_first_chunk().ok_or(CodecError::NoHeader)?;
        Ok(Header {
            kind,
            encrypted: encryption == 1,
            key_id: u32::from_le_bytes(*key_id),
            content_bytes: u64::from_le_bytes(*content_bytes),
            digest: Digest(*digest),
            body_bytes: u64::from_le_bytes(*body_bytes),
            salt: *salt,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn codecs() -> [Codec; 2] {
        [Codec::new(3, None), Codec::new(1, Some(Arc::new(DataKey::new(1, [5; 32]))))]
    }

    fn key(name: &str) -> Key {
        Key::for_tests(name)
    }

    proptest! {
        #[test]
        fn content_comes_back_whole(content in proptest::collection::vec(any::<u8>(), 0..200_000)) {
            for codec in codecs() {
                let encoded = codec.encode(&key("a"), Kind::Wal, &content).expect("encode");
                let back = codec.decode(&key("a"), Kind::Wal, &encoded.bytes, 1 << 20);
                prop_assert_eq!(back.as_ref(), Ok(&content));
                prop_assert!(codec.decode(&key("a"), Kind::Index, &encoded.bytes, 1 << 20).is_err());
            }
        }

        #[test]
        fn any_changed_byte_is_noticed(content in proptest::collection::vec(any::<u8>(), 1..5_000), at in any::<prop::sample::Index>(), bit in 0u8..8) {
            for codec in codecs() {
                let mut bytes = codec.encode(&key("a"), Kind::Wal, &content).expect("encode").bytes;
                let place = at.index(bytes.len());
                bytes[place] ^= 1 << bit;
                let back = codec.decode(&key("a"), Kind::Wal, &bytes, 1 << 20);
                // A few bits carry no meaning (reserved ones, a salt without encryption): then the content is the same.
                if let Ok(back) = back {
                    prop_assert_eq!(&back, &content);
                }
            }
        }

        #[test]
        fn foreign_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for codec in codecs() {
                prop_assert!(codec.decode(&key("a"), Kind::Wal, &bytes, 1 << 20).is_err());
            }
        }
    }

    #[test]
    fn a_declared_length_beyond_the_limit_allocates_nothing() {
        let codec = Codec::new(3, None);
        let mut bytes = codec.encode(&key("a"), Kind::Wal, b"x").expect("encode").bytes;
        bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(codec.decode(&key("a"), Kind::Wal, &bytes, 100), Err(CodecError::TooLong { .. })));
    }

    #[test]
    fn an_encrypted_object_under_another_name_does_not_open() {
        let [_, codec] = codecs();
        let bytes = codec.encode(&key("a"), Kind::Wal, b"content").expect("encode").bytes;
        assert!(matches!(codec.decode(&key("b"), Kind::Wal, &bytes, 100), Err(CodecError::Sealed(_))));
    }
}
