//! The table `[sandbox]`: where restored copies for people lie, how much they may take, how long they live.

use std::path::PathBuf;
use std::time::Duration;

use super::document::Section;
use super::environment::absolute_path;
use crate::operations::sandbox::{DIRECTORY_BYTES_MAX, Settings};

const MINUTE: Duration = Duration::from_mins(1);
const YEAR: Duration = Duration::from_hours(24 * 365);

/// Reads the table; what it does not say is as [`Settings::default`].
pub(super) fn read(section: Section<'_>) -> Settings {
    let default = Settings::default();
    let quota = section.bytes("quota", u64::MAX, 1 << 20..=u64::MAX);
    let settings = Settings {
        directory: section.parsed("directory", directory),
        quota_bytes: Some(quota).filter(|quota| *quota < u64::MAX),
        expiry: section.duration("expiry", default.expiry, MINUTE..=YEAR),
        expiry_max: section.duration("expiry_max", default.expiry_max, MINUTE..=YEAR),
        warn_before: section.duration("warn_before", default.warn_before, Duration::ZERO..=YEAR),
    };
    if settings.expiry > settings.expiry_max {
        section.report("expiry is longer than expiry_max");
    }
    section.finish();
    settings
}

fn directory(text: &str) -> Result<PathBuf, String> {
    let path = absolute_path(text)?;
    match path.as_os_str().len() {
        0..=DIRECTORY_BYTES_MAX => Ok(path),
        bytes => Err(format!(
            "has {bytes} bytes, {DIRECTORY_BYTES_MAX} are possible: the sockets in it would have too long a path"
        )),
    }
}
