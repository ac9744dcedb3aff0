//! pgrecall looks after the PostgreSQL clusters of a hosting platform.

pub mod archive;
pub mod backup;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod error;
pub mod instance;
pub mod lineage;
pub mod operations;
pub mod pg;
pub mod replication;
pub mod repository;
pub mod restore;
pub mod telemetry;
pub mod util;
pub mod wal;
