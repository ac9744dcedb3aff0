//! The only place that asks for the wall clock.

use chrono::{DateTime, Utc};

#[allow(clippy::disallowed_methods, reason = "the one place that may")]
/// The wall clock of this host. Pure code gets `now` as an argument instead of calling this.
pub fn now() -> DateTime<Utc> {
    Utc::now()
}
