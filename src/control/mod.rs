//! The Unix socket of the running service: HTTP/1.1 and JSON, so that `curl --unix-socket` works.
//!
//! `docs/control-socket.md` lists the requests. An error is `{"error": {code, message, hint, retryable}}`. [`peer`] says who asks,
//! [`request`] what, [`auth`] whether they may, [`record`] puts it down, and only then [`answer`] does it. Requests, replies
//! and times are bounded ([`server`]).

mod answer;
pub mod auth;
pub mod client;
pub mod listener;
pub mod metrics;
pub mod peer;
pub mod protocol;
mod record;
pub mod request;
pub mod server;
#[cfg(test)]
mod tests;
