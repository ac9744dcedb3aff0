//! Bytes out: plan, fetch, recovery, acceptance.
