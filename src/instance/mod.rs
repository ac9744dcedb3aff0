//! PostgreSQL as programs on this host: locate, configure, start, wait, stop.
