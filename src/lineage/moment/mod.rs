//! From what a person asks for to a position that PostgreSQL will reach.

pub mod target;
