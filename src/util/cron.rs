//! When something is due, in cron's five fields and a time zone. Pure.
//!
//! `minute hour day-of-month month day-of-week`, as in crontab(5): Sunday is 0 or 7, and when both days are restricted, either
//! of them counts. The `cron` crate is asked about local times without a zone; which instant such a time is, is decided here: one
//! that a clock skips in spring is due at the first instant after it, one that comes twice in autumn counts once, the first time.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, LocalResult, NaiveDateTime, TimeDelta, TimeZone as _, Utc};
use chrono_tz::Tz;

const FORM: &str = "minute hour day-of-month month day-of-week, such as \"0 1 * * *\" for every night at one";
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
/// No zone ever skipped more than a day.
const SKIPPED_MINUTES_MAX: i64 = 2 * 24 * 60;

/// A schedule as written.
#[derive(Clone)]
pub struct Cron {
    /// Two when both days are restricted; due is what either of them says.
    parts: Vec<cron::Schedule>,
    text: String,
}

impl Cron {
    /// Reads five fields.
    ///
    /// # Errors
    /// A sentence that names the text and the form; also for what is never due.
    pub fn parse(text: &str) -> Result<Cron, String> {
        let wrong = |why: &str| format!("{text:?} is not a schedule ({FORM}): {why}");
        let fields: Vec<&str> = text.split_whitespace().collect();
        let [minute, hour, day, month, weekday] = fields.as_slice() else {
            return Err(wrong(&format!("it has {} fields instead of five", fields.len())));
        };
        if fields.iter().any(|field| field.contains(['?', 'L', 'W', '#', '@'])) {
            return Err(wrong("?, L, W, # and @ are not known"));
        }
        let weekdays = translate_weekdays(weekday).map_err(|why| wrong(&why))?;
        let (any_day, any_weekday) = (day.starts_with('*'), weekday.starts_with('*'));
        let days = match (any_day, any_weekday) {
            (false, false) => vec![(*day, "*"), ("*", weekdays.as_str())],
            _ => vec![(*day, weekdays.as_str())],
        };
        let read = |(day, weekdays): &(&str, &str)| {
            // The crate's message draws a picture of its own six fields.
            cron::Schedule::from_str(&format!("0 {minute} {hour} {day} {month} {weekdays}"))
                .map_err(|_| wrong("a number or name is out of its range"))
        };
        let parts = days.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        let cron = Cron { parts, text: fields.join(" ") };
        match cron.next_after(Tz::UTC, DateTime::UNIX_EPOCH + TimeDelta::days(365 * 54)) {
            Some(_) => Ok(cron),
            None => Err(wrong("no such day ever comes")),
        }
    }

    /// The first instant after `time` at which it is due.
    pub fn next_after(&self, zone: Tz, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let local = time.with_timezone(&zone).naive_local().and_utc();
        let first = |part: &cron::Schedule| {
            let mut instants = part.after(&local).filter_map(|due| instant(due.naive_utc(), zone));
            // While an hour comes for the second time, what lies after the local time may have been due the first time.
            instants.find(|due| *due > time)
        };
        self.parts.iter().filter_map(first).min()
    }
}

/// The instant of a local time; of one that comes twice the first, of one that is skipped the first after it.
fn instant(local: NaiveDateTime, zone: Tz) -> Option<DateTime<Utc>> {
    (0..=SKIPPED_MINUTES_MAX).find_map(|minutes| {
        match zone.from_local_datetime(&local.checked_add_signed(TimeDelta::minutes(minutes))?) {
            LocalResult::Single(time) | LocalResult::Ambiguous(time, _) => Some(time.to_utc()),
            LocalResult::None => None,
        }
    })
}

/// The days of the week in the crate's numbers, where Sunday is 1 and 0 and 7 are something else.
fn translate_weekdays(field: &str) -> Result<String, String> {
    if field == "*" {
        return Ok(field.to_owned());
    }
    let mut days = [false; 7];
    for item in field.split(',') {
        let (range, step) = item.split_once('/').unwrap_or((item, "1"));
        let step: usize =
            step.parse().ok().filter(|step| *step > 0).ok_or_else(|| format!("{item:?} has a wrong step"))?;
        let (first, last) = match range.split_once('-') {
            Some((first, last)) => (weekday(first)?, weekday(last)?),
            None if range == "*" => (0, 6),
            None => (weekday(range)?, weekday(range)?),
        };
        // Friday to Sunday is 5-7 or 5-0.
        let last = if last < first { last + 7 } else { last };
        for day in (first..=last).step_by(step) {
            if let Some(day) = days.get_mut(day % 7) {
                *day = true;
            }
        }
    }
    let named = days.iter().zip(1..).filter(|(is_due, _)| **is_due).map(|(_, number): (_, u32)| number.to_string());
    Ok(named.collect::<Vec<_>>().join(","))
}

fn weekday(text: &str) -> Result<usize, String> {
    let lower = text.to_ascii_lowercase();
    if let Some(day) = DAYS.iter().position(|name| *name == lower) {
        return Ok(day);
    }
    text.parse().ok().filter(|day| *day <= 7).ok_or_else(|| format!("{text:?} is no day of the week (0-7, sun-sat)"))
}

impl PartialEq for Cron {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for Cron {}

impl fmt::Debug for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl fmt::Display for Cron {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> DateTime<Utc> {
        text.parse().expect("RFC 3339")
    }

    /// The next instants after `from` at which `text` is due.
    fn check(text: &str, zone: Tz, from: &str, expected: &[&str]) {
        let cron = Cron::parse(text).expect("a schedule");
        let mut last = time(from);
        for expected in expected {
            last = cron.next_after(zone, last).expect("due once more");
            assert_eq!(last, time(expected), "{text} in {zone}");
        }
    }

    #[test]
    fn weekdays_have_their_usual_numbers() {
        // 28 November 2026 is a Saturday.
        let from = "2026-11-28T12:00:00Z";
        check("30 2 * * 0", Tz::UTC, from, &["2026-11-29T02:30:00Z"]);
        check("30 2 * * 7", Tz::UTC, from, &["2026-11-29T02:30:00Z"]);
        check("30 2 * * 1-5", Tz::UTC, from, &["2026-11-30T02:30:00Z", "2026-12-01T02:30:00Z"]);
        check("30 2 * * Mon", Tz::UTC, from, &["2026-11-30T02:30:00Z"]);
        check("0 0 * * 5-7", Tz::UTC, from, &["2026-11-29T00:00:00Z", "2026-12-04T00:00:00Z", "2026-12-05T00:00:00Z"]);
        check("0 0 * * fri-sun/2", Tz::UTC, from, &["2026-11-29T00:00:00Z", "2026-12-04T00:00:00Z"]);
        check("0 0 * * */3", Tz::UTC, from, &["2026-11-29T00:00:00Z", "2026-12-02T00:00:00Z", "2026-12-05T00:00:00Z"]);
    }

    #[test]
    fn either_of_two_restricted_days_counts() {
        let expected = ["2026-11-30T00:00:00Z", "2026-12-01T00:00:00Z", "2026-12-07T00:00:00Z"];
        check("0 0 1 * 1", Tz::UTC, "2026-11-28T12:00:00Z", &expected);
        check("0 0 31 Jan,mar *", Tz::UTC, "2026-11-28T12:00:00Z", &["2027-01-31T00:00:00Z", "2027-03-31T00:00:00Z"]);
    }

    #[test]
    fn a_time_that_spring_skips_is_due_right_after_it() {
        let berlin = Tz::Europe__Berlin;
        let days = ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"];
        check("30 2 * * *", berlin, "2026-03-27T12:00:00Z", &days);
        let quarters = ["2026-03-29T00:45:00Z", "2026-03-29T01:00:00Z", "2026-03-29T01:15:00Z"];
        check("*/15 * * * *", berlin, "2026-03-29T00:30:00Z", &quarters);
        // Samoa went without 30 December 2011.
        check(
            "0 12 * * *",
            Tz::Pacific__Apia,
            "2011-12-29T23:00:00Z",
            &["2011-12-30T10:00:00Z", "2011-12-30T22:00:00Z"],
        );
    }

    #[test]
    fn a_time_that_comes_twice_in_autumn_is_due_once() {
        let berlin = Tz::Europe__Berlin;
        let days = ["2026-10-24T00:30:00Z", "2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"];
        check("30 2 * * *", berlin, "2026-10-23T12:00:00Z", &days);
        // Asked while the hour is there for the second time.
        check("30 2 * * *", berlin, "2026-10-25T01:15:00Z", &["2026-10-26T01:30:00Z"]);
    }

    #[test]
    fn what_is_no_schedule_is_refused_in_words() {
        let check = |text: &str, why: &str| {
            let message = Cron::parse(text).expect_err(text);
            assert!(message.contains(why) && message.contains("minute hour"), "{message}");
        };
        check("0 0 1 * * *", "6 fields");
        check("daily", "1 fields");
        check("60 0 * * *", "out of its range");
        check("0 0 * * 8", "no day of the week");
        check("0 0 * * 1/0", "wrong step");
        check("0 0 31 2 *", "no such day");
        check("0 0 L * *", "not known");
    }
}
