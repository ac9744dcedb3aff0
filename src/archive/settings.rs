//! What an archiver is told by its caller.

use std::sync::Arc;
use std::time::Duration;

use super::budget::Budget;

/// Settings of one environment's archiver.
#[derive(Debug, Clone)]
pub struct Settings {
    pub slot: String,
    /// How old a received byte may become before it is stored; zero stores at once.
    pub rpo: Duration,
    /// PUTs at the same time.
    pub puts_in_flight: usize,
    /// Received bytes that are not stored; beyond this we stop reading.
    pub buffer_bytes_max: u64,
    /// The WAL that all streams of the process may hold.
    pub budget: Arc<Budget>,
    /// How long the tail may take to be stored when the program is stopped.
    pub shutdown_grace: Duration,
    /// How often a claim of coverage is stored at most.
    pub coverage_interval: Duration,
    /// How often the other hosts are asked whether one of them is a primary, too.
    pub hosts_interval: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            slot: "pgrecall".into(),
            rpo: Duration::from_secs(1),
            puts_in_flight: 4,
            buffer_bytes_max: 128 << 20,
            budget: Budget::new(u64::MAX),
            shutdown_grace: Duration::from_secs(30),
            coverage_interval: Duration::from_secs(60),
            hosts_interval: Duration::from_secs(60),
        }
    }
}
