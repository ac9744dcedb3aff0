//! Bytes out: plan, fetch, recovery, acceptance.
//!
//! What is restored is a directory that recovers by itself to one record on one timeline and nowhere else ([`recovery`]);
//! [`drive`] starts it, follows it there, and [`acceptance`] asks whether what runs is what was asked for, because a server
//! that finds garbage or a missing segment may stop elsewhere.

pub mod acceptance;
pub mod checksums;
pub mod drive;
pub mod follow;
pub mod recovery;
