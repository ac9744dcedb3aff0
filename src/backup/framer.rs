//! Cuts a stream of files into frames.
//!
//! Small files share a frame; a file that does not fit into what is left of one begins the next, so that the blocks of a
//! relation never straddle frames. A frame carries the steps that its bytes stand for, to be replayed in order when it is
//! known where the frame lies.
//!
//! Invariants: plain bytes of a frame ≤ [`FRAME_BYTES_MAX`], steps of a frame ≤ [`STEPS_MAX`] + 3; a file that ends has as
//! many bytes as it declared.

use bytes::{Buf, Bytes};

use super::source::{ChecksumKind, Meta, SourceError};
use crate::repository::backup_object::{FileEntry, FileKind};
use crate::repository::pack::FRAME_BYTES_MAX;
use crate::util::digest::Hasher;

/// Most steps of one frame, for empty files fill none: about 1 MiB of names.
const STEPS_MAX: usize = 4096;

/// A frame not yet compressed, and what its bytes are.
#[derive(Debug)]
pub struct RawFrame {
    /// Empty when the steps need no bytes.
    pub plain: Vec<u8>,
    pub steps: Vec<Step>,
}

/// What happens to the list of files.
#[derive(Debug)]
pub enum Step {
    /// A file begins; the next runs are its.
    Begin(Box<FileEntry>),
    /// The next `length` bytes of the file lie at `frame_offset` of this frame.
    Run {
        offset: u64,
        length: u32,
        frame_offset: u32,
    },
    End(Option<Checksum>),
    /// A directory or a symbolic link.
    Whole(Box<FileEntry>),
}

/// A file's checksum as the server's manifest has it, in hex.
pub type Checksum = String;

enum Running {
    None,
    Crc32c(u32),
    Sha256(Box<Hasher>),
}

struct OpenFile {
    path: String,
    declared: u64,
    taken: u64,
    checksum: Running,
}

/// Takes files, gives frames.
pub struct Framer {
    checksums: Option<ChecksumKind>,
    plain: Vec<u8>,
    steps: Vec<Step>,
    file: Option<OpenFile>,
}

impl Framer {
    pub fn new(checksums: Option<ChecksumKind>) -> Self {
        Framer { checksums, plain: Vec::new(), steps: Vec::new(), file: None }
    }

    /// A file begins. Gives the frame before it when the file does not fit there.
    pub fn begin(&mut self, meta: Meta, spare: impl FnOnce() -> Vec<u8>) -> Result<Option<RawFrame>, SourceError> {
        self.expect_no_file(&meta.path)?;
        let room = (FRAME_BYTES_MAX - self.plain.len().min(FRAME_BYTES_MAX)) as u64;
        let full = (meta.bytes > room && !self.plain.is_empty()) || self.steps.len() >= STEPS_MAX;
        let before = full.then(|| self.close(spare));
        let checksum = match self.checksums {
            None => Running::None,
            Some(ChecksumKind::Crc32c) => Running::Crc32c(0),
            Some(ChecksumKind::Sha256) => Running::Sha256(Box::new(Hasher::sha256())),
        };
        self.file = Some(OpenFile { path: meta.path.clone(), declared: meta.bytes, taken: 0, checksum });
        self.steps.push(Step::Begin(Box::new(entry(meta, FileKind::File, None))));
        Ok(before)
    }

    /// Takes as many bytes of the file as the frame has room for, and gives the frame when it is full. To be repeated until
    /// `bytes` is empty.
    pub fn data(
        &mut self,
        bytes: &mut Bytes,
        spare: impl FnOnce() -> Vec<u8>,
    ) -> Result<Option<RawFrame>, SourceError> {
        let Some(file) = &mut self.file else {
            return Err(SourceError::Malformed("bytes came that belong to no file".into()));
        };
        let room = FRAME_BYTES_MAX.saturating_sub(self.plain.len());
        let part = bytes.split_to(bytes.len().min(room));
        let (offset, length) = (file.taken, part.len());
        file.taken += length as u64;
        if file.taken > file.declared {
            return Err(file.other_length());
        }
        match &mut file.checksum {
            Running::None => {}
            Running::Crc32c(crc) => *crc = crc32c::crc32c_append(*crc, &part),
            Running::Sha256(hasher) => hasher.update(&part),
        }
        self.push_run(offset, length);
        self.plain.extend_from_slice(part.chunk());
        Ok((self.plain.len() >= FRAME_BYTES_MAX).then(|| self.close(spare)))
    }

    /// The file ends.
    pub fn end(&mut self) -> Result<(), SourceError> {
        let Some(file) = self.file.take() else {
            return Err(SourceError::Malformed("a file ended that had not begun".into()));
        };
        if file.taken != file.declared {
            return Err(file.other_length());
        }
        let checksum = match file.checksum {
            Running::None => None,
            // The server prints the four bytes as they lie in memory.
            Running::Crc32c(crc) => Some(crate::util::digest::hex(&crc.to_le_bytes())),
            Running::Sha256(hasher) => Some(hasher.finish().to_string()),
        };
        self.steps.push(Step::End(checksum));
        Ok(())
    }

    /// A directory, or a symbolic link with its target.
    pub fn whole(
        &mut self,
        meta: Meta,
        target: Option<String>,
        spare: impl FnOnce() -> Vec<u8>,
    ) -> Result<Option<RawFrame>, SourceError> {
        self.expect_no_file(&meta.path)?;
        let kind = if target.is_some() { FileKind::Symlink } else { FileKind::Directory };
        self.steps.push(Step::Whole(Box::new(entry(meta, kind, target))));
        Ok((self.steps.len() >= STEPS_MAX).then(|| self.close(spare)))
    }

    /// The last frame.
    pub fn finish(mut self) -> Result<RawFrame, SourceError> {
        self.expect_no_file("the end")?;
        Ok(self.close(Vec::new))
    }

    fn close(&mut self, spare: impl FnOnce() -> Vec<u8>) -> RawFrame {
        RawFrame { plain: std::mem::replace(&mut self.plain, spare()), steps: std::mem::take(&mut self.steps) }
    }

    /// Bytes that follow the file's bytes in the same frame lengthen its run.
    fn push_run(&mut self, offset: u64, length: usize) {
        let at = u32::try_from(self.plain.len()).unwrap_or(u32::MAX);
        let more = u32::try_from(length).unwrap_or(u32::MAX);
        match self.steps.last_mut() {
            Some(Step::Run { length, .. }) => *length = length.saturating_add(more),
            _ if length > 0 => self.steps.push(Step::Run { offset, length: more, frame_offset: at }),
            _ => {}
        }
    }

    fn expect_no_file(&self, next: &str) -> Result<(), SourceError> {
        match &self.file {
            Some(file) => Err(SourceError::Malformed(format!("{next} came before the end of {}", file.path))),
            None => Ok(()),
        }
    }
}

impl OpenFile {
    fn other_length(&self) -> SourceError {
        let OpenFile { path, declared, taken, .. } = self;
        SourceError::Malformed(format!("{path} was announced with {declared} bytes, {taken} came"))
    }
}

fn entry(meta: Meta, kind: FileKind, target: Option<String>) -> FileEntry {
    let Meta { path, mode, modified, bytes } = meta;
    let bytes = if kind == FileKind::File { bytes } else { 0 };
    FileEntry { path, kind, mode, bytes, modified, target, extents: Vec::new(), extent_tables: Vec::new() }
}
