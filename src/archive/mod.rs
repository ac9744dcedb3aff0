//! WAL in, parts and segments out.

pub mod assembler;
pub mod pacing;
pub mod resume;
pub mod status;
pub mod tidy;
pub mod uploader;
