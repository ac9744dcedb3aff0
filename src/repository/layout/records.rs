//! The names of what is kept on record: jobs, the acts of people, and incidents.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Generation, Key, NameError};
use crate::pg::Timestamp;

/// The id of a job: the time at which it was accepted, then six random hex digits; safe in names of files and of roles.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

/// What people call an incident: 1 to 48 letters, digits, `.`, `_`, `-`, and not a dot first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ticket(String);

impl Key {
    /// One change of a job's state.
    pub fn job(job: &JobId, number: u32) -> Key {
        Key(format!("jobs/{job}/{number:06}"))
    }

    /// One act.
    pub fn audit(generation: Generation, number: u32) -> Key {
        Key(format!("audit/{generation}/{number:08}"))
    }

    /// An entry of an incident. Two writers may choose the same number, never the same name.
    pub fn incident(ticket: &Ticket, number: u32, random: u32) -> Key {
        Key(format!("incidents/{ticket}/{number:06}-{random:08x}"))
    }
}

/// Reads the name of an entry of an incident.
pub fn parse_incident(key: &Key) -> Option<(Ticket, u32, u32)> {
    let (ticket, rest) = key.as_str().strip_prefix("incidents/")?.split_once('/')?;
    let (number, random) = rest.split_once('-')?;
    let (ticket, number, random) = (ticket.parse().ok()?, number.parse().ok()?, u32::from_str_radix(random, 16).ok()?);
    (Key::incident(&ticket, number, random) == *key).then_some((ticket, number, random))
}

/// Reads the name of a fact about a job.
pub fn parse_job(key: &Key) -> Option<(JobId, u32)> {
    let (job, number) = key.as_str().strip_prefix("jobs/")?.split_once('/')?;
    let (job, number) = (job.parse().ok()?, number.parse().ok()?);
    (Key::job(&job, number) == *key).then_some((job, number))
}

/// Reads the name of an act.
pub fn parse_audit(key: &Key) -> Option<(Generation, u32)> {
    let (generation, number) = key.as_str().strip_prefix("audit/")?.split_once('/')?;
    let (generation, number) = (generation.parse().ok()?, number.parse().ok()?);
    (Key::audit(generation, number) == *key).then_some((generation, number))
}

impl JobId {
    /// A new id; `random` must come from a random generator.
    pub fn new(accepted: Timestamp, random: u32) -> Self {
        let time = accepted.to_chrono().unwrap_or_default().format("%Y%m%dt%H%M%Sz");
        JobId(format!("{time}_{:06x}", random & 0xFF_FFFF))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Ticket {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for Ticket {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let fits = (1..=48).contains(&text.len()) && text.bytes().all(plain) && !text.starts_with('.');
        if fits { Ok(Ticket(text)) } else { Err(NameError(text)) }
    }
}

impl FromStr for Ticket {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        text.to_owned().try_into()
    }
}

impl From<Ticket> for String {
    fn from(ticket: Ticket) -> String {
        ticket.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for JobId {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let fits = |(at, byte): (usize, u8)| match at {
            8 => byte == b't',
            15 => byte == b'z',
            16 => byte == b'_',
            0..=14 => byte.is_ascii_digit(),
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        };
        if text.len() == 23 && text.bytes().enumerate().all(fits) { Ok(JobId(text)) } else { Err(NameError(text)) }
    }
}

impl FromStr for JobId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        text.to_owned().try_into()
    }
}

impl From<JobId> for String {
    fn from(id: JobId) -> String {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_others_are_passed_over() {
        let id = JobId::new(Timestamp::from_unix_seconds(1_795_000_000), 0xABCD_EF01);
        assert_eq!(id.as_str(), "20261118t110640z_cdef01");
        assert_eq!(parse_job(&Key::job(&id, 7)), Some((id, 7)));
        let generation = Generation { ordinal: 3, random: 0xBEEF };
        assert_eq!(parse_audit(&Key::audit(generation, 4)), Some((generation, 4)));
        let ticket: Ticket = "OPS-12.a_b".parse().expect("a ticket");
        assert_eq!(parse_incident(&Key::incident(&ticket, 7, 0xBEEF)), Some((ticket, 7, 0xBEEF)));
        for name in ["incidents/OPS-1/1-0000beef", "incidents/OPS-1/000001", "incidents/a b/000001-0000beef"] {
            assert_eq!(parse_incident(&Key::for_tests(name)), None, "{name}");
        }
        for text in ["", ".", "..", "a/b", "#12", "OPS 1", &"a".repeat(49)] {
            assert!(text.parse::<Ticket>().is_err(), "{text}");
        }
        for name in ["jobs/x/000001", "jobs/20261118t110640z_cdef01/1", "jobs/20261118T110640z_cdef01/000001", "jobs"] {
            assert_eq!(parse_job(&Key::for_tests(name)), None, "{name}");
        }
        for name in ["audit/1-2/00000001", "audit/00000003-0000beef/1", "audit/00000003-0000beef"] {
            assert_eq!(parse_audit(&Key::for_tests(name)), None, "{name}");
        }
        for text in ["", "../../../../etc/passwd/x", "20261118t110640z-cdef01", "20261118t110640z_cdef0é"] {
            assert!(text.parse::<JobId>().is_err(), "{text}");
        }
    }
}
