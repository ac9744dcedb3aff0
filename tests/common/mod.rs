//! What the integration tests stand on.
//!
//! * [`postgres::Cluster`]: a real PostgreSQL 14–18 in a temporary directory.
//! * [`minio::Minio`]: a real object store, one for the whole run, a bucket for each test.
//! * [`pgrecall::Pgrecall`]: the program under test, with its configuration and its daemon.
//! * [`ledger::Ledger`]: numbered commits, and whether a restored cluster holds exactly those before a point.
//! * [`compare`]: whether two clusters hold the same, and whether one is sound.
//! * [`proxy`]: bad weather before the store and before PostgreSQL.
//! * [`wait`]: conditions with a deadline; nothing else waits.
//!
//! Everything that is started is known to the [`guard`], which ends it when the test process is gone, however it went.
#![allow(dead_code, reason = "each test uses a part of the harness")]

pub mod chance;
pub mod clock;
pub mod compare;
pub mod guard;
pub mod ledger;
pub mod logs;
pub mod minio;
pub mod pgrecall;
pub mod places;
pub mod postgres;
pub mod proxy;
pub mod small_disk;
pub mod wait;

/// The majors of PostgreSQL that pgrecall supports.
pub const MAJORS: [u16; 5] = [14, 15, 16, 17, 18];
/// The major that tests use when any will do.
pub const NEWEST: u16 = 18;

/// Whether the tests that take minutes were asked for.
pub fn slow() -> bool {
    std::env::var_os("PGRECALL_SLOW").is_some_and(|v| v != "0")
}
