//! PostgreSQL as programs on this host: locate, configure, start, wait, stop.
//!
//! A server that this module starts listens on a Unix socket in a private directory and nowhere else, archives nothing,
//! runs no subscription and takes none of its source's settings but those that replay needs ([`configuration`]). It is
//! started directly, not through `pg_ctl`: its exit and its log say more than `pg_ctl`'s patience does. It is left running
//! when the [`Server`] is dropped; who started it decides about its end.

pub mod command;
pub mod configuration;
pub mod host;
pub mod locate;
pub mod log;
pub mod postmaster;
pub mod server;
pub mod session;

pub use configuration::{Settings, Target, TargetAction};
pub use locate::{Installation, LocateError};
pub use postmaster::Postmaster;
pub use server::{Server, Start};
pub use session::{Address, Session};
