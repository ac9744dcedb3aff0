//! Disk space that a restore needs, added up for each file system that it writes to.
//!
//! Places that do not exist yet belong to the file system of their nearest existing parent. Two subvolumes of one pool are
//! two file systems here, each with the pool's free space.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::target::{TargetError, io_error};
use crate::util::durable_fs;
use crate::util::units::show_bytes;

/// What one directory will hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    pub place: PathBuf,
    pub bytes: u64,
    /// Of an interrupted restore, which makes room before the next one begins.
    pub held_bytes: u64,
}

/// A file system, and what goes to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSystem {
    /// Its highest directory above the places.
    pub mount: PathBuf,
    pub places: Vec<PathBuf>,
    pub needed_bytes: u64,
    pub free_bytes: u64,
}

/// What the operating system says of a place.
#[derive(Debug, Clone)]
struct Device {
    number: u64,
    mount: PathBuf,
    free_bytes: u64,
}

impl FileSystem {
    pub fn is_too_small(&self) -> bool {
        self.needed_bytes > self.free_bytes
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let places: Vec<String> = self.places.iter().map(|place| place.display().to_string()).collect();
        let (needed, free) = (show_bytes(self.needed_bytes), show_bytes(self.free_bytes));
        write!(f, "{needed} needed, {free} free on {} (for {})", self.mount.display(), places.join(", "))
    }
}

/// One file system after the other, in the order of their first place.
pub fn show(file_systems: &[FileSystem]) -> String {
    file_systems.iter().map(FileSystem::to_string).collect::<Vec<_>>().join("; ")
}

/// Adds the needs up; a file system's free space counts once.
pub fn add_up(needs: &[Need]) -> Result<Vec<FileSystem>, TargetError> {
    add_up_by(needs, device)
}

fn add_up_by<E>(needs: &[Need], device: impl Fn(&Path) -> Result<Device, E>) -> Result<Vec<FileSystem>, E> {
    let mut found: Vec<(u64, FileSystem)> = Vec::new();
    for need in needs {
        let Device { number, mount, free_bytes } = device(&need.place)?;
        let index = found.iter().position(|(other, _)| *other == number).unwrap_or_else(|| {
            found.push((number, FileSystem { mount, places: Vec::new(), needed_bytes: 0, free_bytes }));
            found.len() - 1
        });
        if let Some((_, file_system)) = found.get_mut(index) {
            file_system.places.push(need.place.clone());
            file_system.needed_bytes = file_system.needed_bytes.saturating_add(need.bytes);
            file_system.free_bytes = file_system.free_bytes.saturating_add(need.held_bytes);
        }
    }
    Ok(found.into_iter().map(|(_, file_system)| file_system).collect())
}

fn device(place: &Path) -> Result<Device, TargetError> {
    let existing = place.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let look = || {
        let existing = fs::canonicalize(existing)?;
        let number = fs::metadata(&existing)?.dev();
        let same = |path: &&Path| fs::metadata(path).is_ok_and(|found| found.dev() == number);
        let mount = existing.ancestors().take_while(same).last().unwrap_or(&existing).to_path_buf();
        Ok(Device { number, mount, free_bytes: durable_fs::free_bytes(&existing)? })
    };
    look().map_err(io_error("look at", existing))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(place: &str, bytes: u64, held_bytes: u64) -> Need {
        Need { place: place.into(), bytes, held_bytes }
    }

    #[test]
    fn what_goes_to_one_file_system_is_added_up_and_its_room_counts_once() {
        let devices = |place: &Path| {
            let number = if place.starts_with("/fast") { 2 } else { 1 };
            let mount = if number == 2 { "/fast" } else { "/" };
            Ok::<_, TargetError>(Device { number, mount: mount.into(), free_bytes: number * 1000 })
        };
        let needs =
            [need("/srv/data", 700, 0), need("/fast/a", 900, 0), need("/srv/b", 400, 50), need("/fast/b", 800, 0)];
        let found = add_up_by(&needs, devices).expect("found");
        let told: Vec<_> = found.iter().map(|f| (f.mount.to_str(), f.needed_bytes, f.free_bytes)).collect();
        assert_eq!(told, [(Some("/"), 1100, 1050), (Some("/fast"), 1700, 2000)]);
        assert!(found[0].is_too_small() && !found[1].is_too_small());
        assert_eq!(found[0].places, [Path::new("/srv/data"), Path::new("/srv/b")]);
    }

    #[test]
    fn a_place_that_is_not_there_yet_belongs_to_its_nearest_parent() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let known = device(dir.path()).expect("there");
        let later = device(&dir.path().join("a/b/c")).expect("not there yet");
        assert_eq!((later.number, &later.mount), (known.number, &known.mount));
        assert!(dir.path().canonicalize().expect("there").starts_with(&known.mount));
    }
}
