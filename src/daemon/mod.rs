//! The service: one task tree an environment.
