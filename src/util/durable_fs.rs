//! Files that are there after a power cut.
//!
//! Order: write a temporary file in the same directory, fsync it, rename it, fsync the directory. A crash leaves the old
//! file or the new one, never a half.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Writes `bytes` to `path` durably, replacing what was there; `mode` is the permission of a new file.
pub fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = temporary_name(path);
    let result = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        rename(&temporary, path)
    })();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Writes one of many files, whole or not at all for whoever looks; durable only after [`sync_file_system`].
pub fn write_unsynced(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let temporary = temporary_name(path);
    let result = (|| {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.write_all(bytes)?;
        rename_unsynced(&temporary, path)
    })();
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    result
}

/// Renames durably: the directory of the new name is synced afterwards.
#[allow(clippy::disallowed_methods, reason = "the one place that may rename")]
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_directory(parent(to))
}

/// Renames one of many files; durable only after [`sync_file_system`].
#[allow(clippy::disallowed_methods, reason = "the caller syncs the whole file system once, when all files are there")]
pub fn rename_unsynced(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)
}

/// Makes a directory and those above it that are missing, each with `mode`, and their names durable.
pub fn create_directories(path: &Path, mode: u32) -> io::Result<()> {
    let missing = path.ancestors().take_while(|p| !p.as_os_str().is_empty() && !p.exists()).count();
    fs::DirBuilder::new().recursive(true).mode(mode).create(path)?;
    path.ancestors().take(missing).try_for_each(|made| sync_directory(parent(made)))
}

/// Makes the entries of a directory durable.
pub fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Makes everything below `path` durable with one call for its file system.
pub fn sync_file_system(path: &Path) -> io::Result<()> {
    rustix::fs::syncfs(File::open(path)?).map_err(io::Error::from)
}

/// Bytes that an unprivileged user can still write to the file system that holds `path` (or its nearest existing parent).
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    let mut place = path;
    while !place.exists() {
        place = parent(place);
    }
    let stat = rustix::fs::statvfs(place)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) => Path::new("."),
        None => Path::new("/"),
    }
}

fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

/// Whether this was left by a process that was killed while it wrote `path`.
pub fn is_temporary(left: &Path, path: &Path) -> bool {
    let (left, path) = (left.to_string_lossy(), path.to_string_lossy());
    let number = left.strip_prefix(&*path).and_then(|rest| rest.strip_prefix('.')?.strip_suffix(".tmp"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("a");
        write(&path, b"one", 0o600).expect("first write");
        write(&path, b"two", 0o600).expect("second write");
        assert_eq!(fs::read(&path).expect("read back"), b"two");
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 1);
        assert!(free_bytes(&dir.path().join("x/y/z")).expect("statvfs") > 0);
    }
}
