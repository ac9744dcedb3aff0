//! Helpers without domain words.

pub mod clock;
pub mod cron;
pub mod digest;
pub mod durable_fs;
pub mod nearest;
pub mod percent;
pub mod retry;
pub mod secret;
pub mod service_manager;
pub mod throttle;
pub mod units;
