//! What a person asks for, as text.
//!
//! A time must say where it is meant: an offset, `Z`, or the name of a zone. In a zone, an hour that the clocks show twice
//! is not guessed, and one that they skip does not exist.

use std::fmt;
use std::str::FromStr;

use chrono::offset::MappedLocalTime;
use chrono::{DateTime, FixedOffset, NaiveDateTime, TimeDelta, TimeZone};
use chrono_tz::Tz;

use crate::pg::{Lsn, Timestamp};

/// The forms of a target, as messages and the manual list them.
pub const TARGET_FORMS: &str = "latest, a time with its zone ('2026-11-23 14:05:00+01:00', '2026-11-23T13:05Z', \
     '2026-11-23 14:05 Europe/Berlin'), lsn:X/Y, xid:N, name:RESTORE_POINT, backup:ID";

/// PostgreSQL cuts names of restore points here (`MAXFNAMELEN - 1`).
const RESTORE_POINT_NAME_BYTES_MAX: usize = 63;

/// What to restore to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The end of the timeline that is followed.
    Latest,
    /// The state at this time: every transaction that ended until then.
    Time(Timestamp),
    Lsn(Lsn),
    /// With its epoch (`pg_current_xact_id()`) or as 32 bits, as logs and rows show it.
    Xid(u64),
    /// A restore point.
    Name(String),
    /// The end of a backup: as far as it alone goes.
    Backup(String),
}

/// Why a text is no target.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseTargetError {
    #[error("{text:?} is not a target; say {TARGET_FORMS}")]
    Form { text: String },
    #[error("{text:?} could be a transaction id, an LSN or a time; say {TARGET_FORMS}")]
    BareNumber { text: String },
    #[error("{text:?} does not say in which zone; add an offset (+01:00), Z, or a zone such as Europe/Berlin")]
    NoZone { text: String },
    #[error("{zone:?} is not a time zone; use an offset (+01:00), Z, or a name such as Europe/Berlin")]
    UnknownZone { zone: String },
    #[error("the clocks in {zone} show {local} twice; say {first} or {second}")]
    Twice { local: String, zone: String, first: String, second: String },
    #[error("the clocks in {zone} skip {local}; the hour before ends, and the next one begins, at {change}")]
    Skipped { local: String, zone: String, change: String },
    #[error("{what}: {reason}")]
    Value { what: String, reason: &'static str },
}

impl FromStr for Target {
    type Err = ParseTargetError;

    fn from_str(text: &str) -> Result<Target, ParseTargetError> {
        let text = text.trim();
        let wrong = |reason| ParseTargetError::Value { what: shown(text), reason };
        if text == "latest" {
            return Ok(Target::Latest);
        }
        if let Some(lsn) = text.strip_prefix("lsn:") {
            return lsn.parse().map(Target::Lsn).map_err(|_| wrong("not an LSN such as 0/16B3748"));
        }
        if let Some(xid) = text.strip_prefix("xid:") {
            let digits = !xid.is_empty() && xid.bytes().all(|byte| byte.is_ascii_digit());
            let number = digits.then(|| xid.parse::<u64>().ok()).flatten();
            // 0, 1 and 2 are no ids of transactions.
            return number.filter(|n| *n >= 3).map(Target::Xid).ok_or_else(|| wrong("not a transaction id"));
        }
        if let Some(name) = text.strip_prefix("name:") {
            let fits = (1..=RESTORE_POINT_NAME_BYTES_MAX).contains(&name.len());
            return if fits { Ok(Target::Name(name.to_owned())) } else { Err(wrong("not a name of 1 to 63 bytes")) };
        }
        if let Some(id) = text.strip_prefix("backup:") {
            return if id.is_empty() { Err(wrong("no backup named")) } else { Ok(Target::Backup(id.to_owned())) };
        }
        if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b'/' | b'.')) {
            return Err(ParseTargetError::BareNumber { text: shown(text) });
        }
        parse_time(text).map(Target::Time)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Latest => f.write_str("latest"),
            Target::Time(time) => write!(f, "{time}"),
            Target::Lsn(lsn) => write!(f, "lsn:{lsn}"),
            Target::Xid(xid) => write!(f, "xid:{xid}"),
            Target::Name(name) => write!(f, "name:{name}"),
            Target::Backup(id) => write!(f, "backup:{id}"),
        }
    }
}

/// Parses a date and a time of day with their zone.
///
/// # Errors
/// See [`ParseTargetError`]; among them the hours in which a zone's clocks are changed.
pub fn parse_time(text: &str) -> Result<Timestamp, ParseTargetError> {
    let text = text.trim();
    let form = || ParseTargetError::Form { text: shown(text) };
    let (date, rest) = text.split_once([' ', 'T', 't']).ok_or_else(form)?;
    let rest = rest.trim_start();
    let clock_bytes = rest.find(|c: char| !(c.is_ascii_digit() || matches!(c, ':' | '.'))).unwrap_or(rest.len());
    let (clock, zone) = rest.split_at_checked(clock_bytes).ok_or_else(form)?;
    let local = parse_local(date, clock).ok_or_else(form)?;
    let zone = zone.trim_start();
    if zone.is_empty() {
        return Err(ParseTargetError::NoZone { text: shown(text) });
    }
    if matches!(zone, "Z" | "z" | "UTC" | "GMT") {
        return Ok(local.and_utc().into());
    }
    if zone.starts_with(['+', '-']) {
        let offset = parse_offset(zone).ok_or_else(|| ParseTargetError::UnknownZone { zone: shown(zone) })?;
        let time = offset.from_local_datetime(&local).single().ok_or_else(form)?;
        return Ok(Timestamp(time.timestamp_micros()));
    }
    // Abbreviations such as CET or EST stand for different offsets in different heads: only full names are taken.
    let named = zone.contains('/').then(|| zone.parse::<Tz>().ok()).flatten();
    let named = named.ok_or_else(|| ParseTargetError::UnknownZone { zone: shown(zone) })?;
    in_zone(named, local)
}

fn parse_local(date: &str, clock: &str) -> Option<NaiveDateTime> {
    let whole_date = date.len() == 10 && date.bytes().filter(|byte| *byte == b'-').count() == 2;
    let text = format!("{date} {clock}");
    let parse = |form: &str| NaiveDateTime::parse_from_str(&text, form).ok();
    let colons = clock.bytes().filter(|byte| *byte == b':').count();
    let local = match (whole_date, colons) {
        (true, 1) => parse("%Y-%m-%d %H:%M"),
        (true, 2) => parse("%Y-%m-%d %H:%M:%S%.f"),
        _ => None,
    }?;
    // chrono takes second 60; PostgreSQL's clock has none.
    (chrono::Timelike::nanosecond(&local) < 1_000_000_000).then_some(local)
}

/// `+01`, `+0100`, `+01:00`.
fn parse_offset(text: &str) -> Option<FixedOffset> {
    let (sign, digits) = match text.split_at_checked(1)? {
        ("+", digits) => (1, digits),
        ("-", digits) => (-1, digits),
        _ => return None,
    };
    let (hours, minutes) = match digits.len() {
        2 => (digits, "00"),
        4 => digits.split_at_checked(2)?,
        5 => digits.split_once(':').filter(|(hours, _)| hours.len() == 2)?,
        _ => return None,
    };
    let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<i32>().ok()).flatten();
    let (hours, minutes) = (number(hours)?, number(minutes)?);
    let valid = hours <= 15 && minutes < 60;
    valid.then(|| FixedOffset::east_opt(sign * (hours * 3600 + minutes * 60))).flatten()
}

fn in_zone(zone: Tz, local: NaiveDateTime) -> Result<Timestamp, ParseTargetError> {
    let shown_local = local.format("%Y-%m-%d %H:%M:%S").to_string();
    let with_offset = |time: &DateTime<Tz>| time.format("%Y-%m-%d %H:%M:%S%:z").to_string();
    match zone.from_local_datetime(&local) {
        MappedLocalTime::Single(time) => Ok(Timestamp(time.timestamp_micros())),
        MappedLocalTime::Ambiguous(first, second) => Err(ParseTargetError::Twice {
            local: shown_local,
            zone: zone.name().to_owned(),
            first: with_offset(&first),
            second: with_offset(&second),
        }),
        MappedLocalTime::None => {
            // The first minute that exists again; no zone has ever skipped more than a day.
            let later = (1..=1440).map(|minutes| local + TimeDelta::minutes(minutes));
            let begins = later.filter_map(|time| zone.from_local_datetime(&time).earliest()).next();
            let change = begins.map_or_else(|| zone.name().to_owned(), |time| with_offset(&time));
            Err(ParseTargetError::Skipped { local: shown_local, zone: zone.name().to_owned(), change })
        }
    }
}

/// At most the beginning of a text that somebody typed.
fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &str) {
        assert_eq!(text.parse::<Target>().map(|target| target.to_string()), Ok(expected.to_owned()), "{text}");
    }

    #[track_caller]
    fn refused(text: &str, part: &str) {
        let message = text.parse::<Target>().expect_err(text).to_string();
        assert!(message.contains(part), "{text}: {message}");
    }

    #[test]
    fn forms() {
        check("latest", "latest");
        check("lsn:16/B374D848", "lsn:16/B374D848");
        check("xid:739", "xid:739");
        check("xid:21474836480", "xid:21474836480");
        check("name:before the migration", "name:before the migration");
        check("backup:20261123T120000Z-5", "backup:20261123T120000Z-5");
        check("2026-11-23 14:05:00+01:00", "2026-11-23T13:05:00.000000Z");
        check("2026-11-23T14:05:00.25Z", "2026-11-23T14:05:00.250000Z");
        check("2026-11-23 14:05 UTC", "2026-11-23T14:05:00.000000Z");
        check("2026-11-23 14:05:01.123456 +0530", "2026-11-23T08:35:01.123456Z");
        check("2026-11-23 14:05-08", "2026-11-23T22:05:00.000000Z");
        check("2026-11-23 14:05 Europe/Berlin", "2026-11-23T13:05:00.000000Z");
        check("2026-07-23 14:05 Europe/Berlin", "2026-07-23T12:05:00.000000Z");
        check("  2026-07-23   14:05   America/New_York ", "2026-07-23T18:05:00.000000Z");
    }

    #[test]
    fn what_is_not_clear_is_refused_with_what_to_say() {
        for number in ["739", "0/16B3748", "20261123", "14.05"] {
            refused(number, "xid:N");
        }
        refused("2026-11-23 14:05:00", "zone");
        refused("2026-11-23 14:05 CET", "Europe/Berlin");
        refused("2026-11-23 14:05 Europe/Bermuda", "not a time zone");
        refused("2026-11-23 14:05+25", "not a time zone");
        refused("2026-02-30 14:05Z", "not a target");
        refused("2026-11-23 24:05Z", "not a target");
        refused("2026-11-23 23:59:60Z", "not a target");
        refused("2026-11-23Z", "not a target");
        refused("yesterday", "not a target");
        refused("lsn:5", "not an LSN");
        refused("xid:2", "not a transaction id");
        refused("xid:+5", "not a transaction id");
        refused("name:", "not a name");
        refused("backup:", "no backup");
        refused("", "not a target");
    }

    #[test]
    fn hours_in_which_clocks_are_changed() {
        let twice = "2026-10-25 02:30 Europe/Berlin";
        refused(twice, "2026-10-25 02:30:00+02:00");
        refused(twice, "2026-10-25 02:30:00+01:00");
        refused("2026-03-29 02:30 Europe/Berlin", "2026-03-29 03:00:00+02:00");
        check("2026-10-25 02:30:00+02:00", "2026-10-25T00:30:00.000000Z");
    }

    proptest! {
        #[test]
        fn any_text_is_a_target_or_refused(text in ".{0,60}") {
            drop(text.parse::<Target>());
        }

        #[test]
        fn near_times_never_panic(text in "[0-9]{4}-[0-9]{2}-[0-9]{2}[ T][0-9:.]{1,15}[ +-]{0,2}[0-9A-Za-z/:]{0,12}") {
            drop(text.parse::<Target>());
        }

        #[test]
        fn what_is_shown_is_parsed(seconds in -60_000_000_000_i64..200_000_000_000, xid in 3_u64.., lsn: u64) {
            for target in [Target::Time(Timestamp(seconds * 1_000 + 7)), Target::Xid(xid), Target::Lsn(Lsn(lsn))] {
                prop_assert_eq!(target.to_string().parse(), Ok(target));
            }
        }
    }
}
