//! A running PostgreSQL over the replication protocol, and by ordinary queries.
