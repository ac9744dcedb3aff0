//! The Unix socket of the running service: HTTP/1.1 and JSON, so that `curl --unix-socket` works.
//!
//! | request | reply |
//! |---|---|
//! | `GET /v1/status` | [`protocol::Status`] |
//! | `POST /v1/environments/NAME/backup` | lines of JSON, each a [`protocol::BackupEvent`], until one that is final |
//!
//! An error is `{"error": {code, message, hint, retryable}}`. Who may ask is decided before anything is read: the
//! kernel's word about the peer must say the daemon's own user or root. Requests, replies and times are bounded.

pub mod client;
pub mod listener;
pub mod metrics;
pub mod protocol;
pub mod server;
#[cfg(test)]
mod tests;
