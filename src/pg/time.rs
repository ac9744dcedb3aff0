//! Instants as PostgreSQL counts them.
//!
//! Source: `src/include/datatype/timestamp.h`, 14–18: microseconds since 2000-01-01 00:00 UTC.

use std::fmt;

use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};

/// Seconds from the Unix epoch to PostgreSQL's (`POSTGRES_EPOCH_JDATE`).
const EPOCH_OFFSET_SECONDS: i64 = 946_684_800;

/// An instant in microseconds since the Unix epoch; JSON carries it as RFC 3339 text in UTC with six decimals.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// From a `timestamptz` of the server: microseconds since 2000-01-01 UTC.
    pub fn from_pg_micros(micros: i64) -> Timestamp {
        Timestamp(micros.saturating_add(EPOCH_OFFSET_SECONDS * 1_000_000))
    }

    /// As a `timestamptz` of the server.
    pub fn to_pg_micros(self) -> i64 {
        self.0.saturating_sub(EPOCH_OFFSET_SECONDS * 1_000_000)
    }

    pub fn from_unix_seconds(seconds: i64) -> Timestamp {
        Timestamp(seconds.saturating_mul(1_000_000))
    }

    /// `None` outside the years that chrono can show.
    pub fn to_chrono(self) -> Option<DateTime<Utc>> {
        DateTime::from_timestamp_micros(self.0)
    }

    #[must_use]
    pub fn saturating_add_micros(self, micros: i64) -> Timestamp {
        Timestamp(self.0.saturating_add(micros))
    }
}

impl From<DateTime<Utc>> for Timestamp {
    fn from(time: DateTime<Utc>) -> Self {
        Timestamp(time.timestamp_micros())
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to_chrono() {
            Some(time) => f.write_str(&time.to_rfc3339_opts(SecondsFormat::Micros, true)),
            None => write!(f, "{} µs since 1970", self.0),
        }
    }
}

impl fmt::Debug for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(d)?;
        let time = DateTime::parse_from_rfc3339(&text).map_err(serde::de::Error::custom)?;
        Ok(time.with_timezone(&Utc).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgresql_epoch() {
        assert_eq!(Timestamp::from_pg_micros(0).to_string(), "2000-01-01T00:00:00.000000Z");
        assert_eq!(Timestamp::from_pg_micros(0).to_pg_micros(), 0);
        assert_eq!(Timestamp::from_unix_seconds(0).to_string(), "1970-01-01T00:00:00.000000Z");
    }
}
