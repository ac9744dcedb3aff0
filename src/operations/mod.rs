//! What is made of several rooms: the only place that composes archive, backup, restore.

pub mod backup;
pub mod incident;
mod indexes;
pub mod locate;
pub mod pin;
pub mod planned;
pub mod prune;
pub mod restore;
pub mod sandbox;
pub mod state;
pub mod times;
pub mod verify;
pub mod window;
