//! The integration tests: real PostgreSQL, real object store. `scripts/test` prepares the machine and runs them.
//!
//! One binary, so that it links once. A capability is a file of `tests/`, declared below; what it needs to stand on is in
//! `common`. Run a part with `scripts/test --test suite NAME`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test may stop with a message, and its files need not survive a power cut"
)]

mod common;

mod archive;
mod authentication;
mod backup;
mod base_backup;
mod bounds;
mod cli;
mod control;
mod crash;
mod daemon;
mod damage;
mod diverged;
mod during_backup;
mod end_to_end;
mod fuzz;
mod gap;
mod harness;
mod incarnation;
mod incident;
mod instance;
mod keys;
mod killed;
mod loss;
mod owners;
mod reader;
mod recovery;
mod replication;
mod restore;
mod resuming;
mod retention;
mod retention_store;
mod sandbox;
mod sandbox_commands;
mod server_questions;
mod service;
mod store_faults;
mod wal_oracle;
mod wal_stream;
mod whole_way;
