//! SHA-256 and its keyed form.

use std::fmt;
use std::fmt::Write as _;
use std::str::FromStr;

use aws_lc_rs::{digest, hmac};
use serde::{Deserialize, Serialize};

/// 32 bytes of SHA-256, or of HMAC-SHA-256 where content must not be recognisable; text is lower-case hex.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub [u8; 32]);

/// Hashes bytes as they pass, plainly or under a key.
#[derive(Clone)]
pub enum Hasher {
    Plain(digest::Context),
    Keyed(Box<hmac::Context>),
}

impl Hasher {
    pub fn sha256() -> Self {
        Hasher::Plain(digest::Context::new(&digest::SHA256))
    }

    pub fn keyed(key: &hmac::Key) -> Self {
        Hasher::Keyed(Box::new(hmac::Context::with_key(key)))
    }

    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Hasher::Plain(context) => context.update(bytes),
            Hasher::Keyed(context) => context.update(bytes),
        }
    }

    pub fn finish(self) -> Digest {
        let mut out = [0; 32];
        match self {
            Hasher::Plain(context) => out.copy_from_slice(context.finish().as_ref()),
            Hasher::Keyed(context) => out.copy_from_slice(context.sign().as_ref()),
        }
        Digest(out)
    }
}

impl Digest {
    pub fn sha256(bytes: &[u8]) -> Digest {
        let mut hasher = Hasher::sha256();
        hasher.update(bytes);
        hasher.finish()
    }
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// The bytes of lower- or upper-case hex; `None` for anything else.
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    digits.chunks_exact(2).map(|pair| Some(digit(*pair.first()?)? << 4 | digit(*pair.get(1)?)?)).collect()
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Digest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = unhex(text).and_then(|b| <[u8; 32]>::try_from(b).ok());
        bytes.map(Digest).ok_or_else(|| format!("{text:?} is not a digest of 64 hex digits"))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answer_and_text_form() {
        let empty = Digest::sha256(b"");
        let text = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(empty.to_string(), text);
        assert_eq!(text.parse(), Ok(empty));
        assert!("e3".parse::<Digest>().is_err());
        assert_eq!(unhex("0g"), None);
    }
}
