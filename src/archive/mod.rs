//! WAL in, parts and segments out.
//!
//! `environment` chooses the server and where to go on (`resume` decides), `stream` runs one connection: `assembler` puts
//! the bytes together, `pacing` says when a part is due, `uploader` stores, `progress` says what may be reported,
//! `observer` asks the server beside the stream. `indexing` follows what passes; `housekeeping` lets `tidy` turn parts into segments.

pub mod assembler;
pub mod environment;
pub mod housekeeping;
pub mod indexing;
pub mod observer;
pub mod pacing;
pub mod progress;
pub mod resume;
mod rollup;
pub mod settings;
mod slot;
pub mod status;
mod stream;
pub mod tidy;
pub mod uploader;

pub use environment::Archiver;
pub use settings::Settings;
pub use status::{ArchiveStatus, State, StoredStream};
