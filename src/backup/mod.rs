//! Files in, packs and a commit object out.
//!
//! A [`source`] (so far [`ServerSource`]) tells the cluster's files one after the other. The [`framer`] cuts their bytes into frames, several
//! threads compress them, the [`placer`] puts them into packs in order and uploads those; what it learns about each file
//! goes through an external [`sorter`], so that memory does not depend on the number of files. [`tables`] then merges
//! the sorted entries with the server's [`manifest`] and writes the file tables. [`full`] is the order of a backup: intent,
//! files, WAL, commit object.
//!
//! Invariants: nothing is visible before the commit object, and that is written after everything that it names; a file
//! whose checksum is not the server's is not backed up; `[start, stop]` is stored without a hole before the commit.
//! Memory: frames in flight × 2 MiB + packs in flight × 17 MiB + two sorters of 16 MiB, whatever the cluster's size.

#![warn(clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod check;
mod compressors;
mod error;
mod facts;
mod framer;
pub mod full;
mod listed_wal;
mod manifest;
mod packer;
mod packs;
mod placer;
mod server;
mod sorter;
pub mod source;
mod tables;

pub use error::BackupError;
pub use facts::SqlFacts;
pub use full::{BackupReport, BackupSettings, Collaborators, FullBackup, Phase, Progress, ServerFacts, StoredWal};
pub use listed_wal::ListedWal;
pub use server::ServerSource;
pub use source::{Event, Source, SourceEnd, SourceError, SourcePosition, SourceStart};

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
