//! WAL in, parts and segments out.
