//! Keys of an environment: the data key, what is derived from it, and how it is wrapped by a master key.
//!
//! One random 32-byte data key per environment. From it come, by HKDF-SHA256, one key per object (salt: 16 random bytes
//! kept in the object's header) and one key for names and digests. Rotating the master key wraps the data key anew and
//! rewrites nothing. Bulk data is cut into chunks of 64 KiB, each sealed with AES-256-GCM under the object's key with a
//! nonce that counts the chunks and marks the last one, so that truncation, reordering and mixing are noticed.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::{hkdf, hmac};
use zeroize::Zeroizing;

use crate::util::digest::{Digest, hex};

/// Plain bytes in one sealed chunk; the last one may be shorter, and an empty content is one empty chunk.
pub const CHUNK_BYTES: usize = 64 << 10;
/// Bytes that sealing adds to each chunk or frame.
pub const TAG_BYTES: usize = 16;
/// Length of the salt in an object's header.
pub const SALT_BYTES: usize = 16;

/// Sealed bytes did not open: another key, another name, or damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the sealed bytes do not open: they were damaged, moved to another name, or belong to another key")]
pub struct OpenError;

/// The key that wraps data keys; given by a file or the process environment.
pub struct MasterKey(Zeroizing<[u8; 32]>);

/// The data key of an environment and the keys derived from it.
pub struct DataKey {
    id: u32,
    secret: Zeroizing<[u8; 32]>,
    names: hmac::Key,
}

/// The key of one object.
pub struct ObjectKey(LessSafeKey);

impl MasterKey {
    pub fn new(bytes: [u8; 32]) -> Self {
        MasterKey(Zeroizing::new(bytes))
    }

    /// 16 hex digits that tell master keys apart without revealing them.
    pub fn fingerprint(&self) -> String {
        let mut text = b"pgrecall master key ".to_vec();
        text.extend_from_slice(self.0.as_slice());
        let digest = Digest::sha256(&Zeroizing::new(text));
        hex(digest.0.get(..8).unwrap_or_default())
    }

    /// Seals the data key: 12 bytes of nonce, then the sealed key. `context` is the name of the object that will hold it.
    pub fn wrap(&self, key: &DataKey, context: &str) -> Vec<u8> {
        let nonce: [u8; 12] = rand::random();
        let mut sealed = key.secret.to_vec();
        seal_with(&gcm(&self.0), nonce, context, &mut sealed);
        [nonce.as_slice(), &sealed].concat()
    }

    /// # Errors
    /// [`OpenError`] when the bytes were not wrapped by this key under this name.
    pub fn unwrap(&self, id: u32, wrapped: &[u8], context: &str) -> Result<DataKey, OpenError> {
        let (nonce, sealed) = wrapped.split_first_chunk::<12>().ok_or(OpenError)?;
        let mut plain = Zeroizing::new(sealed.to_vec());
        let opened = open_with(&gcm(&self.0), *nonce, context, &mut plain)?;
        let secret = <[u8; 32]>::try_from(opened).map_err(|_| OpenError)?;
        Ok(DataKey::new(id, secret))
    }
}

impl DataKey {
    pub fn new(id: u32, secret: [u8; 32]) -> Self {
        let secret = Zeroizing::new(secret);
        let mut name_key = Zeroizing::new([0u8; 32]);
        derive(&secret, &[], b"pgrecall names", &mut name_key);
        let names = hmac::Key::new(hmac::HMAC_SHA256, name_key.as_slice());
        DataKey { id, secret, names }
    }

    pub fn generate(id: u32) -> Self {
        DataKey::new(id, rand::random())
    }

    pub fn id(&self) -> u32 {
        self.id
    }

    /// The key for digests that appear in names and headers.
    pub fn names(&self) -> &hmac::Key {
        &self.names
    }

    pub fn object_key(&self, salt: &[u8; SALT_BYTES]) -> ObjectKey {
        let mut key = Zeroizing::new([0u8; 32]);
        derive(&self.secret, salt, b"pgrecall object", &mut key);
        ObjectKey(gcm(&key))
    }
}

impl ObjectKey {
    /// Seals `plain` in chunks, bound to the object's name.
    pub fn seal_chunks(&self, name: &str, plain: &[u8]) -> Vec<u8> {
        let count = plain.len().div_ceil(CHUNK_BYTES).max(1);
        let mut out = Vec::with_capacity(plain.len() + count * TAG_BYTES);
        let mut rest = plain;
        for index in 0..count {
            let (chunk, tail) = rest.split_at(rest.len().min(CHUNK_BYTES));
            rest = tail;
            let mut sealed = chunk.to_vec();
            seal_with(&self.0, chunk_nonce(index, rest.is_empty()), name, &mut sealed);
            out.extend_from_slice(&sealed);
        }
        out
    }

    /// # Errors
    /// [`OpenError`] when a chunk is damaged, missing, out of order or of another object.
    pub fn open_chunks(&self, name: &str, sealed: &[u8]) -> Result<Vec<u8>, OpenError> {
        let mut out = Vec::with_capacity(sealed.len());
        let mut rest = sealed;
        let mut index = 0;
        loop {
            let (chunk, tail) = rest.split_at(rest.len().min(CHUNK_BYTES + TAG_BYTES));
            rest = tail;
            let mut chunk = chunk.to_vec();
            out.extend_from_slice(open_with(&self.0, chunk_nonce(index, rest.is_empty()), name, &mut chunk)?);
            if rest.is_empty() {
                return Ok(out);
            }
            index += 1;
        }
    }

    /// Seals one frame of a pack; `offset` is where the frame begins in the pack and never repeats there.
    pub fn seal_frame(&self, name: &str, offset: u64, frame: &mut Vec<u8>) {
        seal_with(&self.0, frame_nonce(offset), name, frame);
    }

    /// # Errors
    /// [`OpenError`] as for chunks.
    pub fn open_frame(&self, name: &str, offset: u64, sealed: &[u8]) -> Result<Vec<u8>, OpenError> {
        let mut frame = sealed.to_vec();
        let length = open_with(&self.0, frame_nonce(offset), name, &mut frame)?.len();
        frame.truncate(length);
        Ok(frame)
    }
}

fn gcm(key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("AES-256-GCM takes keys of 32 bytes"))
}

fn seal_with(key: &LessSafeKey, nonce: [u8; 12], name: &str, plain: &mut Vec<u8>) {
    let nonce = Nonce::assume_unique_for_key(nonce);
    key.seal_in_place_append_tag(nonce, Aad::from(name.as_bytes()), plain).expect("a chunk is far below GCM's limit");
}

fn open_with<'a>(key: &LessSafeKey, nonce: [u8; 12], name: &str, sealed: &'a mut [u8]) -> Result<&'a [u8], OpenError> {
    let nonce = Nonce::assume_unique_for_key(nonce);
    let plain = key.open_in_place(nonce, Aad::from(name.as_bytes()), sealed).map_err(|_| OpenError)?;
    Ok(plain)
}

/// Seven zero bytes, the chunk's number as a big-endian u32, then 1 for the last chunk and 0 for others.
fn chunk_nonce(index: usize, last: bool) -> [u8; 12] {
    let mut nonce = [0; 12];
    let counter = u32::try_from(index).expect("objects are far below 2^32 chunks").to_be_bytes();
    if let Some(place) = nonce.get_mut(7..11) {
        place.copy_from_slice(&counter);
    }
    if let Some(place) = nonce.last_mut() {
        *place = u8::from(last);
    }
    nonce
}

/// Four bytes `FRAM`, then the frame's offset in its pack as a big-endian u64.
fn frame_nonce(offset: u64) -> [u8; 12] {
    let mut nonce = *b"FRAM\0\0\0\0\0\0\0\0";
    if let Some(place) = nonce.last_chunk_mut::<8>() {
        *place = offset.to_be_bytes();
    }
    nonce
}

fn derive(secret: &[u8; 32], salt: &[u8], info: &[u8], out: &mut [u8; 32]) {
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, salt).extract(secret);
    let info = [info];
    let okm = prk.expand(&info, hkdf::HKDF_SHA256).expect("32 bytes are within HKDF's limit");
    okm.fill(out).expect("the length is the one asked for");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_round_trip(length: usize) {
        let key = DataKey::new(1, [7; 32]).object_key(&[9; SALT_BYTES]);
        let plain: Vec<u8> = (0..length).map(|i| u8::try_from(i % 251).expect("below 251")).collect();
        let sealed = key.seal_chunks("wal/a", &plain);
        assert_eq!(key.open_chunks("wal/a", &sealed).as_ref(), Ok(&plain), "{length}");
        assert!(key.open_chunks("wal/b", &sealed).is_err(), "another name");
        let cut = sealed.len().saturating_sub(CHUNK_BYTES + TAG_BYTES);
        assert!(key.open_chunks("wal/a", &sealed[..cut]).is_err(), "truncated by a chunk");
        let mut flipped = sealed.clone();
        flipped[length / 2] ^= 1;
        assert!(key.open_chunks("wal/a", &flipped).is_err(), "one bit");
    }

    #[test]
    fn chunks_open_only_whole_in_order_and_under_their_name() {
        for length in [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES + 17] {
            check_round_trip(length);
        }
    }

    #[test]
    fn swapped_chunks_are_noticed() {
        let key = DataKey::new(1, [7; 32]).object_key(&[9; SALT_BYTES]);
        let mut sealed = key.seal_chunks("n", &vec![1; 3 * CHUNK_BYTES]);
        let size = CHUNK_BYTES + TAG_BYTES;
        sealed.copy_within(size..2 * size, 0);
        assert!(key.open_chunks("n", &sealed).is_err());
    }

    #[test]
    fn a_data_key_opens_only_with_its_master_key_and_name() {
        let master = MasterKey::new([3; 32]);
        let key = DataKey::generate(1);
        let wrapped = master.wrap(&key, "keys/1");
        let again = master.unwrap(1, &wrapped, "keys/1").expect("own wrap");
        assert_eq!(*again.secret, *key.secret);
        assert!(MasterKey::new([4; 32]).unwrap(1, &wrapped, "keys/1").is_err());
        assert!(master.unwrap(1, &wrapped, "keys/2").is_err());
        assert_ne!(master.fingerprint(), MasterKey::new([4; 32]).fingerprint());
    }

    #[test]
    fn frames_are_bound_to_their_place() {
        let key = DataKey::new(1, [7; 32]).object_key(&[9; SALT_BYTES]);
        let mut frame = b"frame".to_vec();
        key.seal_frame("p", 80, &mut frame);
        assert_eq!(key.open_frame("p", 80, &frame), Ok(b"frame".to_vec()));
        assert!(key.open_frame("p", 81, &frame).is_err());
    }
}
