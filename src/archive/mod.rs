//! WAL in, parts and segments out.
//!
//! `environment` chooses the server (`servers`) and where to go on (`resume` decides), `missing` sees to what a server has
//! no more. `stream` runs one connection: `assembler` puts the bytes together within the process's `budget`, `pacing` says when a part is due, `uploader` stores, `progress` says what may be reported,
//! `observer` asks the server beside the stream. `indexing` follows what passes; `housekeeping` lets `tidy` turn parts into segments.

pub mod assembler;
pub mod budget;
pub mod environment;
pub mod exposure;
pub mod housekeeping;
pub mod indexing;
mod missing;
pub mod observer;
mod others;
pub mod pacing;
pub mod progress;
pub mod resume;
mod rollup;
mod servers;
pub mod settings;
mod slot;
pub mod status;
mod stream;
pub mod tidy;
pub mod uploader;

pub use budget::Budget;
pub use environment::Archiver;
pub use exposure::ExposureFigures;
pub use settings::Settings;
pub use status::{ArchiveStatus, State, StoredStream};

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
