//! Reads the archives of `BASE_BACKUP` while they arrive: POSIX ustar, files, directories and symbolic links.
//!
//! Push bytes, pull entries; at most one header (512 bytes) is buffered, data are slices of what was pushed. Names that
//! would lead out of the directory are an error, as is every other kind of entry: the server sends none.
//! The server leaves out the two blocks of zeroes at the end; they are accepted.
//! Source: `src/port/tar.c` (`tarCreateHeader`), `src/backend/backup/basebackup.c`, 14–18.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use bytes::{Bytes, BytesMut};

const BLOCK: usize = 512;

/// What the header of an entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    pub path: PathBuf,
    pub kind: TarKind,
    /// Permission bits only.
    pub mode: u32,
    /// Seconds since 1970.
    pub mtime: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarKind {
    File { size: u64 },
    Directory,
    Symlink { target: PathBuf },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarEvent {
    Entry(TarEntry),
    /// A piece of the current file; never empty.
    Data(Bytes),
    /// The current file is complete; directories and links have none.
    EndOfFile,
}

/// Why bytes are not such an archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read the tar stream at byte {offset}: {reason}")]
pub struct TarError {
    pub offset: u64,
    pub reason: String,
}

/// The reader; feed it with [`TarReader::push`] whenever [`TarReader::next`] has nothing more.
#[derive(Debug, Default)]
pub struct TarReader {
    input: Bytes,
    header: BytesMut,
    state: State,
    /// Bytes taken from the input.
    offset: u64,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Header,
    Data {
        remaining: u64,
        padding: u64,
    },
    Padding(u64),
    /// Only zeroes may follow.
    Trailer,
}

impl TarReader {
    /// More bytes of the archive.
    pub fn push(&mut self, bytes: Bytes) {
        if self.input.is_empty() {
            self.input = bytes;
        } else {
            let mut joined = BytesMut::from(self.input.as_ref());
            joined.extend_from_slice(&bytes);
            self.input = joined.freeze();
        }
    }

    /// What the bytes so far say next; `None` when more are needed.
    #[allow(clippy::should_implement_trait, reason = "not an iterator: it goes on after None when bytes were pushed")]
    pub fn next(&mut self) -> Result<Option<TarEvent>, TarError> {
        loop {
            match self.state {
                State::Header => {
                    let missing = BLOCK - self.header.len();
                    let piece = self.take(missing);
                    self.header.extend_from_slice(&piece);
                    if self.header.len() < BLOCK {
                        return Ok(None);
                    }
                    let block = std::mem::take(&mut self.header);
                    if block.iter().all(|byte| *byte == 0) {
                        self.state = State::Trailer;
                        continue;
                    }
                    let entry = decode_header(&block).map_err(|reason| self.error(reason))?;
                    self.state = match entry.kind {
                        TarKind::File { size } => State::Data { remaining: size, padding: padding(size) },
                        _ => State::Header,
                    };
                    return Ok(Some(TarEvent::Entry(entry)));
                }
                State::Data { remaining: 0, padding } => {
                    self.state = State::Padding(padding);
                    return Ok(Some(TarEvent::EndOfFile));
                }
                State::Data { remaining, padding } => {
                    let piece = self.take(usize::try_from(remaining).unwrap_or(usize::MAX));
                    if piece.is_empty() {
                        return Ok(None);
                    }
                    let remaining = remaining.saturating_sub(length(&piece));
                    self.state = State::Data { remaining, padding };
                    return Ok(Some(TarEvent::Data(piece)));
                }
                State::Padding(0) => self.state = State::Header,
                State::Padding(count) => {
                    let piece = self.take(usize::try_from(count).unwrap_or(usize::MAX));
                    if piece.is_empty() {
                        return Ok(None);
                    }
                    self.state = State::Padding(count.saturating_sub(length(&piece)));
                }
                State::Trailer => {
                    let piece = self.take(usize::MAX);
                    if piece.iter().any(|byte| *byte != 0) {
                        return Err(self.error("something follows the end".to_owned()));
                    }
                    return Ok(None);
                }
            }
        }
    }

    /// Called when the archive has ended: it must end between two entries.
    pub fn finish(&self) -> Result<(), TarError> {
        let between = matches!(self.state, State::Header | State::Padding(0) | State::Trailer);
        if between && self.header.is_empty() && self.input.is_empty() {
            return Ok(());
        }
        Err(self.error("the archive ends within an entry".to_owned()))
    }

    fn take(&mut self, count: usize) -> Bytes {
        let piece = self.input.split_to(count.min(self.input.len()));
        self.offset = self.offset.saturating_add(length(&piece));
        piece
    }

    fn error(&self, reason: String) -> TarError {
        TarError { offset: self.offset, reason }
    }
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % 512
}

/// The fields of a header block: offset and length.
const NAME: (usize, usize) = (0, 100);
const MODE: (usize, usize) = (100, 8);
const SIZE: (usize, usize) = (124, 12);
const MTIME: (usize, usize) = (136, 12);
const CHECKSUM: (usize, usize) = (148, 8);
const TYPE: (usize, usize) = (156, 1);
const LINK: (usize, usize) = (157, 100);
const MAGIC: (usize, usize) = (257, 5);
const PREFIX: (usize, usize) = (345, 155);

fn decode_header(block: &[u8]) -> Result<TarEntry, String> {
    if field(block, MAGIC) != b"ustar" {
        return Err("no ustar header".to_owned());
    }
    let sum: u64 = block
        .iter()
        .enumerate()
        .map(|(at, byte)| if (148..156).contains(&at) { u64::from(b' ') } else { u64::from(*byte) })
        .sum();
    if number(field(block, CHECKSUM)) != Some(sum) {
        return Err("the header's checksum is wrong".to_owned());
    }
    let mut name = text(field(block, PREFIX)).to_vec();
    if !name.is_empty() {
        name.push(b'/');
    }
    name.extend_from_slice(text(field(block, NAME)));
    let path = checked_path(&name)?;
    let number =
        |at, what| number(field(block, at)).ok_or_else(|| format!("{what} of {} is no number", path.display()));
    let size = number(SIZE, "the size")?;
    let kind = match field(block, TYPE) {
        b"0" | b"\0" => TarKind::File { size },
        b"5" if size == 0 => TarKind::Directory,
        b"2" if size == 0 => TarKind::Symlink { target: OsStr::from_bytes(text(field(block, LINK))).into() },
        other => return Err(format!("{} is of type {:?} with {size} bytes", path.display(), other.escape_ascii())),
    };
    let mode = u32::try_from(number(MODE, "the mode")? & 0o7777).unwrap_or(0);
    Ok(TarEntry { mode, mtime: number(MTIME, "the time")?, kind, path })
}

fn field(block: &[u8], (offset, length): (usize, usize)) -> &[u8] {
    block.get(offset..offset + length).unwrap_or_default()
}

/// Up to the first zero byte, or the whole field.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Octal digits, ended by a blank or a zero byte; or, with the highest bit set, a big-endian number.
fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        // 0xFF would be a negative number.
        let start = Some(u64::from(first & 0x7F)).filter(|_| *first != 0xFF)?;
        return rest.iter().try_fold(start, |sum, byte| sum.checked_mul(256)?.checked_add(u64::from(*byte)));
    }
    let digits = field.split(|byte| matches!(byte, 0 | b' ')).find(|part| !part.is_empty())?;
    digits.iter().try_fold(0u64, |sum, byte| match byte {
        b'0'..=b'7' => sum.checked_mul(8)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

/// A relative path of plain names; the slash at the end of directories and links goes.
fn checked_path(name: &[u8]) -> Result<PathBuf, String> {
    let path = Path::new(OsStr::from_bytes(name));
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => clean.push(part),
            Component::CurDir => {}
            _ => return Err(format!("{:?} leads out of the directory", name.escape_ascii().to_string())),
        }
    }
    if clean.as_os_str().is_empty() {
        return Err("an entry has no name".to_owned());
    }
    Ok(clean)
}

#[cfg(test)]
mod tests;
