//! A running PostgreSQL over the replication protocol, and by ordinary queries.
//!
//! A thin client of our own: no crate speaks physical streaming and `BASE_BACKUP`. `conninfo` says where and as whom,
//! `connection` dials, negotiates TLS and authenticates, `session` is a replication connection between commands,
//! `stream` is one that streams WAL, `base_backup` one that sends the cluster's files, `sql` an ordinary connection on
//! the same transport.
//!
//! Limits: a message is at most [`wire::MESSAGE_BYTES_MAX`]; nothing that the server says can make us allocate more at
//! once. Every error says whether the same call may work later ([`ReplicationError::is_retryable`]).
//! Source: PostgreSQL documentation "Frontend/Backend Protocol"; `src/backend/replication/{walsender,basebackup}.c`,
//! 14–18.

#![warn(clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod auth;
pub mod base_backup;
mod connection;
pub mod conninfo;
mod error;
mod failure;
mod passfile;
pub mod session;
pub mod sql;
pub mod stream;
pub mod tar;
#[cfg(test)]
pub mod testing;
mod tls;
mod uri;
pub mod wire;
mod x509;

pub use base_backup::{
    BackupEnd, BackupEntry, BackupEvent, BackupStart, BaseBackup, BaseBackupOptions, ManifestChecksums, Tablespace,
};
pub use connection::Rows;
pub use conninfo::{ConnectConfig, ConninfoError, Host, HostAddress};
pub use error::{ChecksumFailure, ReplicationError, ServerMessage};
pub use session::{Session, SlotPosition, SystemIdentity, TimelineHistory};
pub use sql::{ServerFacts, Sql};
pub use stream::{StartReplication, StatusSender, StatusUpdate, WalEvent, WalReader, WalStream};
