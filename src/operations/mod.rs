//! What is made of several rooms: the only place that composes archive, backup, restore.

pub mod restore;
