//! One restored file: written in pieces under a temporary name, named when complete.
//!
//! Runs of zeros are left out (the file is sparse there). Nothing is synced here: the whole file system is, once, at the
//! end. `global/pg_control` keeps its temporary name until [`name_control_file`]: without it no server starts.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::target::{TargetDirectory, TargetError, io_error};
use crate::repository::backup_object::FileEntry;
use crate::util::durable_fs;

/// Zeros are looked for in blocks of this size.
const BLOCK_BYTES: usize = 4096;
/// Most bytes of one call. The page cache takes a larger piece in one run of pages, which the kernel must find in memory that
/// was long unused; on a virtual machine whose host has taken such memory back, that costs several times the copy.
const WRITE_BYTES_MAX: usize = 32 << 10;
/// Smaller pieces are left to the sync at the end.
const WRITEBACK_BYTES_MIN: u64 = 256 << 10;
const SUFFIX: &str = ".pgrecall-new";
const CONTROL_FILE: &str = "global/pg_control";

/// A file that is not complete yet.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    temporary: PathBuf,
    bytes: u64,
    mode: u32,
    keeps_temporary_name: bool,
    /// The kernel lets one thread at a time write to a file, and the others spin: they sleep here instead.
    writing: Mutex<()>,
}

impl NewFile {
    pub fn new(path: PathBuf, entry: &FileEntry) -> Self {
        NewFile {
            temporary: temporary(&path),
            path,
            bytes: entry.bytes,
            // Owner may write; others never, whatever the backup says.
            mode: (entry.mode & 0o750) | 0o600,
            keeps_temporary_name: entry.path == CONTROL_FILE,
            writing: Mutex::new(()),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes bytes at an offset; blocks of zeros are not written. The file is opened each time: descriptors are few, and
    /// opening costs little beside a frame's decompression.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), TargetError> {
        let file = self.create()?;
        let _alone = self.writing.lock();
        write_sparse(&file, offset, bytes).map_err(io_error("write", &self.path))?;
        begin_writeback(&file, offset, bytes.len());
        Ok(())
    }

    /// All pieces are written: sets length and mode, and gives the file its name.
    pub fn complete(self) -> Result<(), TargetError> {
        let file = self.create()?;
        file.set_len(self.bytes).map_err(io_error("set the length of", &self.path))?;
        // The process's umask may have taken bits away.
        file.set_permissions(fs::Permissions::from_mode(self.mode)).map_err(io_error("set the mode of", &self.path))?;
        drop(file);
        if self.keeps_temporary_name {
            return Ok(());
        }
        durable_fs::rename_unsynced(&self.temporary, &self.path).map_err(io_error("name", &self.path))
    }

    fn create(&self) -> Result<File, TargetError> {
        let open = || OpenOptions::new().write(true).create(true).truncate(false).mode(self.mode).open(&self.temporary);
        let opened = open().or_else(|e| match (e.kind(), self.temporary.parent()) {
            // A directory that holds nothing but files need not have an entry of its own.
            (io::ErrorKind::NotFound, Some(parent)) => {
                fs::create_dir_all(parent)?;
                fs::set_permissions(parent, fs::Permissions::from_mode(0o700))?;
                open()
            }
            _ => Err(e),
        });
        opened.map_err(io_error("create", &self.path))
    }
}

/// Where `global/pg_control` is until it gets its name.
pub fn unnamed_control_file(target: &TargetDirectory) -> Result<PathBuf, TargetError> {
    Ok(temporary(&target.resolve(CONTROL_FILE)?))
}

/// Gives `global/pg_control` its name: the last step before a server may be started.
pub fn name_control_file(target: &TargetDirectory) -> Result<(), TargetError> {
    let path = target.resolve(CONTROL_FILE)?;
    durable_fs::rename(&temporary(&path), &path).map_err(io_error("name", &path))
}

/// The disk begins now what the sync at the end waits for. Linux starts to write out the dirty pages of a range that one
/// says one does not need; those just written stay in memory. Advice: that it fails changes nothing.
fn begin_writeback(file: &File, offset: u64, bytes: usize) {
    if let Some(bytes) = std::num::NonZeroU64::new(bytes as u64).filter(|b| b.get() >= WRITEBACK_BYTES_MIN) {
        let _ = rustix::fs::fadvise(file, offset, Some(bytes), rustix::fs::Advice::DontNeed);
    }
}

/// Writes what is not zero; the caller sets the file's length.
pub fn write_sparse(file: &File, offset: u64, bytes: &[u8]) -> io::Result<()> {
    let mut run_start = 0;
    let mut at = 0;
    for block in bytes.chunks(BLOCK_BYTES) {
        if is_zero(block) {
            write_run(file, offset, bytes, run_start..at)?;
            run_start = at + block.len();
        }
        at += block.len();
    }
    write_run(file, offset, bytes, run_start..at)
}

fn write_run(file: &File, offset: u64, bytes: &[u8], run: std::ops::Range<usize>) -> io::Result<()> {
    let mut at = offset.saturating_add(run.start as u64);
    for piece in bytes.get(run).unwrap_or_default().chunks(WRITE_BYTES_MAX) {
        file.write_all_at(piece, at)?;
        at = at.saturating_add(piece.len() as u64);
    }
    Ok(())
}

/// Mostly decided by the first bytes.
fn is_zero(block: &[u8]) -> bool {
    let (head, words, tail) = (block.first(), block.chunks_exact(16), block.chunks_exact(16).remainder());
    head.is_none_or(|b| *b == 0) && words.into_iter().all(|w| w == [0; 16]) && tail.iter().all(|b| *b == 0)
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(SUFFIX);
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_left_out_and_read_back_as_zeros() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let entry = FileEntry {
            path: "a".into(),
            kind: crate::repository::backup_object::FileKind::File,
            mode: 0o600,
            bytes: 40_000,
            modified: 0,
            target: None,
            extents: Vec::new(),
            extent_tables: Vec::new(),
        };
        let mut content = vec![0u8; 40_000];
        content[5000] = 1;
        content[20_480..20_500].fill(7);
        content[39_999] = 9;
        let path = dir.path().join("folder/a");
        let file = NewFile::new(path.clone(), &entry);
        file.write(20_480, &content[20_480..]).expect("second half");
        assert!(!path.exists());
        file.write(0, &content[..20_480]).expect("first half");
        file.complete().expect("complete");
        assert_eq!(std::fs::read(&path).expect("read"), content);
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
    }
}
