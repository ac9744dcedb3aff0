//! Times as they are echoed: UTC, the environment's zone, and how long ago.

use chrono::{DateTime, Utc};
use chrono_tz::Tz;

use crate::pg::Timestamp;
use crate::util::units::show_duration;

/// `2026-11-23 13:05:00 UTC (14:05:00 CET, 47 min 3 s ago)`.
pub fn show(time: Timestamp, zone: Tz, now: DateTime<Utc>) -> String {
    let Some(utc) = time.to_chrono() else { return time.to_string() };
    let ago = relative(utc, now);
    let plain = utc.format("%Y-%m-%d %H:%M:%S UTC");
    if zone == Tz::UTC {
        return format!("{plain} ({ago})");
    }
    let local = utc.with_timezone(&zone);
    let other_day = local.date_naive() != utc.date_naive();
    let local = local.format(if other_day { "%Y-%m-%d %H:%M:%S %Z" } else { "%H:%M:%S %Z" });
    format!("{plain} ({local}, {ago})")
}

/// `47 min 3 s ago`, `in 5.0 s`.
pub fn relative(time: DateTime<Utc>, now: DateTime<Utc>) -> String {
    match (now - time).to_std() {
        Ok(past) => format!("{} ago", show_duration(past)),
        Err(_) => format!("in {}", show_duration((time - now).to_std().unwrap_or_default())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_told_in_utc_in_the_environments_zone_and_relative_to_now() {
        let time = |text: &str| Timestamp::from(text.parse::<DateTime<Utc>>().expect("RFC 3339"));
        let now = "2026-11-23T13:52:03Z".parse().expect("RFC 3339");
        let check = |text, zone, expected: &str| assert_eq!(show(time(text), zone, now), expected);
        check("2026-11-23T13:05:00Z", Tz::UTC, "2026-11-23 13:05:00 UTC (47 min 3 s ago)");
        check("2026-11-23T13:05:00Z", Tz::Europe__Berlin, "2026-11-23 13:05:00 UTC (14:05:00 CET, 47 min 3 s ago)");
        check(
            "2026-11-22T23:30:00Z",
            Tz::Europe__Berlin,
            "2026-11-22 23:30:00 UTC (2026-11-23 00:30:00 CET, 14 h 22 min ago)",
        );
        check("2026-11-23T13:52:08Z", Tz::UTC, "2026-11-23 13:52:08 UTC (in 5.0 s)");
    }
}
