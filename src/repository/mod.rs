//! What is stored and how.

pub mod backup_object;
pub mod catalogue;
pub mod codec;
pub mod coverage;
pub mod crypto;
mod failure;
pub mod format;
pub mod generation;
pub mod identity;
pub mod index;
pub mod inspect;
pub mod layout;
pub mod location;
pub mod pack;
pub mod segment;
pub mod store;
pub mod tables;
pub mod wal_object;

#[cfg(test)]
pub mod testing;

pub use format::{Repository, RepositoryError};
pub use layout::{BackupId, Generation, Incarnation, Key};
pub use location::Location;
pub use store::{Store, StoreError};
