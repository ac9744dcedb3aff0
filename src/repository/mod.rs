//! What is stored and how: the format, and the code that is its only reader and writer here.
//!
//! [`layout`] makes and reads every name, [`store`] is the narrow interface to the object store, [`codec`] and [`crypto`]
//! put each object into its envelope, [`mod@format`] opens an environment's repository. On them stand what the objects mean:
//! [`identity`] and [`generation`] (whose past, which writer), [`job`] and [`audit`] (long work and acts, on record), [`segment`]
//! and [`wal_object`] (WAL), [`index`] and [`coverage`] (which moments), [`pack`], [`tables`] and [`backup_object`] (backups),
//! [`catalogue`] (what is there), [`pin`] (what is kept beyond the window).
//! [`inspect`] holds a repository against itself, [`probe`] tries out what the store can do.
//!
//! Three kinds of objects. *Primary*: written once, named by content or by id and generation. *Derived* (the index): any
//! number may exist, the reader takes one that verifies, a missing one is made again. *Facts that grow* (identity, keys,
//! leases, coverage, gaps): one immutable object for each fact, never one that is rewritten. Nothing needs more of a store than
//! PUT, GET of a range, HEAD, LIST and DELETE.
//!
//! The rest of this page is `docs/repository-format.md`.
//!
#![doc = include_str!("../../docs/repository-format.md")]

pub mod audit;
pub mod backup_object;
pub mod catalogue;
pub mod codec;
pub mod coverage;
pub mod crypto;
mod failure;
pub mod format;
pub mod generation;
pub mod identity;
pub mod incident;
pub mod index;
pub mod inspect;
pub mod job;
pub mod layout;
pub mod location;
pub mod pack;
pub mod pin;
pub mod probe;
pub mod segment;
pub mod store;
pub mod tables;
mod tls;
pub mod wal_object;

#[cfg(test)]
pub mod testing;

pub use format::{Repository, RepositoryError};
pub use layout::{BackupId, Generation, Incarnation, JobId, Key, Ticket};
pub use location::Location;
pub use store::{Store, StoreError};
