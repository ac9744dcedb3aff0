//! A position in the WAL of one timeline.
//!
//! Source: `src/include/access/xlogdefs.h`, `src/backend/utils/adt/pg_lsn.c`, 14–18.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A byte position in the write-ahead log (`XLogRecPtr`); printed and parsed as PostgreSQL does, `X/X` in upper-case hex.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

/// The text is not of the form `X/X` with at most eight hex digits on each side.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an LSN (two hexadecimal numbers, such as 0/16B3748)")]
pub struct ParseLsnError(pub String);

impl Lsn {
    /// `InvalidXLogRecPtr`.
    pub const ZERO: Lsn = Lsn(0);
    /// The greatest position that can be written.
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// The position `bytes` later, or `None` past the end of the address space.
    pub fn checked_add(self, bytes: u64) -> Option<Lsn> {
        self.0.checked_add(bytes).map(Lsn)
    }

    /// The position `bytes` later, at most [`Lsn::MAX`].
    #[must_use]
    pub fn saturating_add(self, bytes: u64) -> Lsn {
        Lsn(self.0.saturating_add(bytes))
    }

    /// Bytes from `earlier` to here; 0 when `earlier` is later.
    pub fn saturating_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Bytes from `earlier` to here, or `None` when `earlier` is later.
    pub fn checked_since(self, earlier: Lsn) -> Option<u64> {
        self.0.checked_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseLsnError(text.to_owned());
        let (high, low) = text.split_once('/').ok_or_else(wrong)?;
        let half = |s: &str| {
            let plain = (1..=8).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u64::from_str_radix(s, 16).ok()).flatten()
        };
        match (half(high), half(low)) {
            (Some(high), Some(low)) => Ok(Lsn(high << 32 | low)),
            _ => Err(wrong()),
        }
    }
}

impl Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<u64>) {
        assert_eq!(text.parse::<Lsn>().ok().map(|l| l.0), expected, "{text}");
    }

    #[test]
    fn text_forms() {
        check("0/0", Some(0));
        check("16/B374D848", Some(0x16_B374_D848));
        check("FFFFFFFF/FFFFFFFF", Some(u64::MAX));
        check("a/b", Some(0xA_0000_000B));
        for bad in ["", "/", "0/", "/0", "0", "0/0/0", "G/0", "0/123456789", "+1/0", " 0/0"] {
            check(bad, None);
        }
    }

    #[test]
    fn display_is_postgresql_s() {
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert_eq!(Lsn(0x5).to_string(), "0/5");
    }
}
