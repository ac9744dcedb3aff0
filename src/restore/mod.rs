//! Bytes out: plan, fetch, WAL, recovery, acceptance.
//!
//! [`plan`] decides, purely, from what [`gather`] loaded: which backup, which WAL object for which bytes, how much of
//! everything. [`run`] executes a plan into an empty directory, up to the point where PostgreSQL can be started on it:
//! [`target`] prepares the directory and its marker ([`space`] says whether it fits), [`fetch`] brings the backup's files, [`wal`] its WAL. [`wal_get`]
//! answers PostgreSQL's restore_command from what lies ready or from the repository.
//!
//! What is restored is a directory that recovers by itself to one record on one timeline and nowhere else ([`recovery`]);
//! [`drive`] starts it, follows it there, and [`acceptance`] asks whether what runs is what was asked for, because a server
//! that finds garbage or a missing segment may stop elsewhere.
//!
//! Invariants: bytes are verified before a file gets its final name; `global/pg_control` gets its name last, so that a
//! server cannot be started on an unfinished directory; a hole is believed only when a second listing shows it too.

pub mod acceptance;
pub mod checksums;
pub mod drive;
pub mod fetch;
pub mod follow;
pub mod gather;
pub mod plan;
pub mod recovery;
pub mod roles;
pub mod run;
pub mod space;
pub mod spool;
pub mod surroundings;
pub mod target;
pub mod wal;
pub mod wal_get;
mod wal_plan;
mod write;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use plan::{Plan, PlanError, Stop};
pub use run::{RestoreError, RestoreOptions};
