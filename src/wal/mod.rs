//! WAL parser: bytes in, records out; pure.
