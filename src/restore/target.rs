//! The directory that a restore writes into: empty or refused, marked while it is unfinished, its tablespaces moved.
//!
//! A folder `pgrecall_restore` in the data directory holds the marker (`state.json`) and, later, WAL that waits for
//! replay. The marker is written before anything else. As long as it says `fetching` or `replaying`, repeating the restore
//! may wipe what is there and begin anew; a directory that was handed over is never wiped.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio_util::task::TaskTracker;

use super::plan::Plan;
use super::space::{self, FileSystem, Need};
use crate::pg::TablespaceMap;
use crate::util::durable_fs;

/// Ours in the data directory while a restore is not finished.
pub const FOLDER: &str = "pgrecall_restore";
const STATE_FILE: &str = "state.json";
/// Kept free beside what is written, for replay and for the server's own files.
const RESERVE_BYTES: u64 = 64 << 20;

/// How far a restore has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Files are missing.
    Fetching,
    /// Complete; PostgreSQL replays under our eyes.
    Replaying,
    /// Somebody else's now: never wiped again.
    HandedOver,
}

/// The marker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub phase: Phase,
    pub environment: String,
    pub incarnation: String,
    pub backup: String,
    /// Tablespace directories that were written, absolute.
    pub tablespaces: Vec<PathBuf>,
}

/// Where tablespaces go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TablespacePlaces {
    /// `OLD=NEW`.
    pub moved: Vec<(PathBuf, PathBuf)>,
    /// All others go below here, named by their oid.
    pub under: Option<PathBuf>,
}

/// Why a directory cannot be restored into.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    #[error("restore into {}: the directory is not empty", .0.display())]
    NotEmpty(PathBuf),
    #[error("restore into {}: it holds a restored cluster that was handed over already", .0.display())]
    HandedOver(PathBuf),
    #[error("restore into {}: it holds an unfinished restore of {other}, not of {wanted}", directory.display())]
    OtherRestore { directory: PathBuf, other: String, wanted: String },
    #[error("restore into {}: a server is running there (process {pid})", directory.display())]
    Running { directory: PathBuf, pid: i32 },
    #[error("restore: there is too little disk space: {}", space::show(.0))]
    Space(Vec<FileSystem>),
    #[error("place tablespaces: the backup has none at {}; it has: {has}", wanted.display())]
    NoSuchTablespace { wanted: PathBuf, has: String },
    #[error("place a tablespace at {}: its path must be absolute, outside the data directory and used once", .0.display())]
    TablespacePath(PathBuf),
    #[error("use {0:?} of the backup: it is not a path inside the data directory")]
    UnsafePath(String),
    #[error("restore: a tablespace was made at {} after the backup, replay makes it there again, and something is there", .0.display())]
    MadeTablespace(PathBuf),
    #[error("use tablespace_map of the backup: {0}")]
    TablespaceMap(String),
    #[error("{action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
}

impl TargetError {
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            TargetError::NotEmpty(_) | TargetError::HandedOver(_) => {
                "Name a directory that is empty or does not exist yet."
            }
            TargetError::OtherRestore { .. } => "Remove the unfinished restore, or name another directory.",
            TargetError::Running { .. } => "Stop that server first, or name another directory.",
            TargetError::Space(_) => "Make room, or name a directory on a larger file system.",
            TargetError::NoSuchTablespace { .. } => "Write --tablespace OLD=NEW with OLD as the source had it.",
            TargetError::TablespacePath(_) => "Choose other directories with --tablespace or --tablespaces-under.",
            TargetError::MadeTablespace(_) => {
                "Restore on a host where that directory is free, from a backup that was taken later, or to a moment before."
            }
            _ => return None,
        })
    }
}

/// A directory prepared for a restore.
#[derive(Debug, Clone)]
pub struct TargetDirectory {
    root: PathBuf,
    /// oid → directory, for tablespaces outside the data directory.
    tablespaces: BTreeMap<u32, PathBuf>,
    /// Where replay will make tablespaces.
    made_tablespaces: Vec<PathBuf>,
    writers: TaskTracker,
}

impl TargetDirectory {
    /// Checks everything that can be checked before a byte is fetched; changes nothing.
    pub fn check(root: &Path, plan: &Plan, places: &TablespacePlaces) -> Result<TargetDirectory, TargetError> {
        let target = Self::choose(root, plan, places)?;
        let file_systems = target.space(plan)?;
        if file_systems.iter().any(FileSystem::is_too_small) {
            return Err(TargetError::Space(file_systems));
        }
        match target.occupied(plan)?.into_iter().next() {
            Some(place) => Err(TargetError::MadeTablespace(place)),
            None => Ok(target),
        }
    }

    /// Places where replay will make tablespaces, and where something is already: it may be the source's own.
    pub fn occupied(&self, plan: &Plan) -> Result<Vec<PathBuf>, TargetError> {
        let state = self.usable_state(plan)?;
        let written_before: &[PathBuf] = state.as_ref().map_or(&[], |s| s.tablespaces.as_slice());
        let mut found = Vec::new();
        for place in self.made_tablespaces.iter().filter(|place| !written_before.contains(place)) {
            if !is_empty(place)? {
                found.push(place.clone());
            }
        }
        Ok(found)
    }

    /// [`TargetDirectory::check`], whether the files fit or not.
    pub fn choose(root: &Path, plan: &Plan, places: &TablespacePlaces) -> Result<TargetDirectory, TargetError> {
        let root = std::path::absolute(root).map_err(io_error("resolve", root))?;
        let tablespaces = place_tablespaces(&root, plan, places)?;
        let made_tablespaces = plan.made_tablespaces.iter().map(PathBuf::from).collect();
        let target = TargetDirectory { root, tablespaces, made_tablespaces, writers: TaskTracker::new() };
        let state = target.usable_state(plan)?;
        let written_before: &[PathBuf] = state.as_ref().map_or(&[], |s| s.tablespaces.as_slice());
        for directory in target.tablespaces.values() {
            if !is_empty(directory)? && !written_before.contains(directory) {
                return Err(TargetError::NotEmpty(directory.clone()));
            }
        }
        Ok(target)
    }

    /// Makes the directories and the marker; what an interrupted restore left is removed.
    pub fn prepare(&self, plan: &Plan) -> Result<(), TargetError> {
        let state = self.usable_state(plan)?;
        make_directory(&self.root, 0o700)?;
        set_mode(&self.root, 0o700)?;
        make_directory(&self.folder(), 0o700)?;
        // The old marker stays until what it names is gone.
        if let Some(state) = state {
            tracing::info!(directory = %self.root.display(), "an interrupted restore is begun anew");
            wipe(&self.root, Some(&self.folder()))?;
            wipe(&self.folder(), Some(&self.folder().join(STATE_FILE)))?;
            for directory in state.tablespaces.iter().filter(|d| d.exists()) {
                wipe(directory, None)?;
            }
        }
        self.write_state(plan, Phase::Fetching)?;
        for directory in self.tablespaces.values().chain(&self.made_tablespaces) {
            make_directory(directory, 0o700)?;
            set_mode(directory, 0o700)?;
        }
        Ok(())
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where those run who write here. They end when they are done, even if nobody waits for them any more.
    pub(super) fn writers(&self) -> &TaskTracker {
        &self.writers
    }

    /// Until nobody writes here any more. Whoever could begin another writer has been dropped.
    pub(super) async fn wait_written(&self) {
        self.writers.close();
        self.writers.wait().await;
    }

    /// `pgrecall_restore` in the data directory.
    pub fn folder(&self) -> PathBuf {
        self.root.join(FOLDER)
    }

    pub fn pg_wal(&self) -> PathBuf {
        self.root.join("pg_wal")
    }

    /// Where a path of the backup goes.
    pub fn resolve(&self, path: &str) -> Result<PathBuf, TargetError> {
        let relative = Path::new(path);
        let plain = relative.components().all(|c| matches!(c, Component::Normal(_)));
        if path.is_empty() || !plain || path.contains('\0') || path == FOLDER || relative.starts_with(FOLDER) {
            return Err(TargetError::UnsafePath(path.chars().take(200).collect()));
        }
        let moved = relative.strip_prefix("pg_tblspc").ok().and_then(|rest| {
            let oid = rest.components().next()?.as_os_str().to_str()?.parse::<u32>().ok()?;
            let directory = self.tablespaces.get(&oid)?;
            Some(directory.join(rest.strip_prefix(oid.to_string()).ok()?))
        });
        Ok(moved.unwrap_or_else(|| self.root.join(relative)))
    }

    /// Writes the new places into the restored `tablespace_map`; the caller syncs.
    pub fn rewrite_tablespace_map(&self) -> Result<(), TargetError> {
        let path = self.root.join("tablespace_map");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound && self.tablespaces.is_empty() => return Ok(()),
            Err(e) => return Err(io_error("read", &path)(e)),
        };
        let mut map = TablespaceMap::parse(&bytes).map_err(|e| TargetError::TablespaceMap(e.to_string()))?;
        for entry in &mut map.entries {
            if let Some(directory) = self.tablespaces.get(&entry.oid) {
                entry.path = std::os::unix::ffi::OsStrExt::as_bytes(directory.as_os_str()).to_vec();
            }
        }
        let missing = self.tablespaces.keys().find(|oid| !map.entries.iter().any(|e| e.oid == **oid));
        if let Some(oid) = missing {
            return Err(TargetError::TablespaceMap(format!("tablespace {oid} is not in it")));
        }
        durable_fs::write_unsynced(&path, &map.encode(), 0o600).map_err(io_error("write", &path))
    }

    /// Makes everything that was written durable.
    pub fn sync(&self) -> Result<(), TargetError> {
        let places = std::iter::once(&self.root).chain(self.tablespaces.values());
        let mut devices = Vec::new();
        for place in places {
            let device = fs::metadata(place).map_err(io_error("look at", place))?.dev();
            if !devices.contains(&device) {
                durable_fs::sync_file_system(place).map_err(io_error("sync", place))?;
                devices.push(device);
            }
        }
        Ok(())
    }

    pub fn write_state(&self, plan: &Plan, phase: Phase) -> Result<(), TargetError> {
        let state = State {
            phase,
            environment: plan.environment.clone(),
            incarnation: plan.incarnation.clone(),
            backup: plan.backup.id.to_string(),
            tablespaces: self.tablespaces.values().chain(&self.made_tablespaces).cloned().collect(),
        };
        save_state(&self.root, &state)
    }

    /// The marker of an unfinished restore of the same environment; `None` for an empty or missing directory.
    fn usable_state(&self, plan: &Plan) -> Result<Option<State>, TargetError> {
        if is_unused(&self.root)? {
            return Ok(None);
        }
        let state = load_state(&self.root)?.ok_or_else(|| TargetError::NotEmpty(self.root.clone()))?;
        if state.phase == Phase::HandedOver {
            return Err(TargetError::HandedOver(self.root.clone()));
        }
        if (&state.environment, &state.incarnation) != (&plan.environment, &plan.incarnation) {
            let (other, wanted) = (state.environment, plan.environment.clone());
            return Err(TargetError::OtherRestore { directory: self.root.clone(), other, wanted });
        }
        let running = crate::instance::postmaster::Postmaster::find(&self.root);
        if let Some(found) = running.map_err(io_error("read postmaster.pid in", &self.root))? {
            return Err(TargetError::Running { directory: self.root.clone(), pid: found.pid });
        }
        Ok(Some(state))
    }

    /// What goes to which file system, and how much is free there; what an interrupted restore holds counts as free.
    pub fn space(&self, plan: &Plan) -> Result<Vec<FileSystem>, TargetError> {
        let need = |place: &Path, bytes| Need { place: place.to_owned(), bytes, held_bytes: allocated_bytes(place) };
        let mut needs = vec![need(&self.root, plan.directory_bytes().saturating_add(RESERVE_BYTES))];
        for tablespace in plan.outside() {
            if let Some(directory) = self.tablespaces.get(&tablespace.oid) {
                needs.push(need(directory, tablespace.bytes));
            }
        }
        space::add_up(&needs)
    }
}

/// Reads the marker of a data directory, if there is one.
pub fn load_state(root: &Path) -> Result<Option<State>, TargetError> {
    let path = root.join(FOLDER).join(STATE_FILE);
    match fs::read(&path) {
        Ok(bytes) => {
            let wrong = |e: serde_json::Error| io_error("read", &path)(io::Error::other(e));
            serde_json::from_slice(&bytes).map(Some).map_err(wrong)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io_error("read", &path)(e)),
    }
}

fn save_state(root: &Path, state: &State) -> Result<(), TargetError> {
    let path = root.join(FOLDER).join(STATE_FILE);
    let bytes = serde_json::to_vec_pretty(state).expect("a state has only text keys");
    durable_fs::write(&path, &bytes, 0o600).map_err(io_error("write", &path))
}

/// Says that the directory belongs to somebody else from now on.
pub fn hand_over(root: &Path) -> Result<(), TargetError> {
    match load_state(root)? {
        Some(state) => save_state(root, &State { phase: Phase::HandedOver, ..state }),
        None => Ok(()),
    }
}

/// Removes our folder: nothing of the restore is needed any more.
pub fn remove_folder(root: &Path) -> Result<(), TargetError> {
    let folder = root.join(FOLDER);
    match fs::remove_dir_all(&folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &folder)(e)),
        _ => Ok(()),
    }
}

fn place_tablespaces(
    root: &Path,
    plan: &Plan,
    places: &TablespacePlaces,
) -> Result<BTreeMap<u32, PathBuf>, TargetError> {
    let outside: Vec<_> = plan.outside().collect();
    for (old, _) in &places.moved {
        if !outside.iter().any(|t| Path::new(&t.path) == old) {
            let has = outside.iter().map(|t| t.path.as_str()).collect::<Vec<_>>().join(", ");
            return Err(TargetError::NoSuchTablespace { wanted: old.clone(), has });
        }
    }
    let mut placed: BTreeMap<u32, PathBuf> = BTreeMap::new();
    for tablespace in outside {
        let moved = places.moved.iter().find(|(old, _)| Path::new(&tablespace.path) == old);
        let directory = match (moved, &places.under) {
            (Some((_, new)), _) => new.clone(),
            (None, Some(under)) => under.join(tablespace.oid.to_string()),
            (None, None) => PathBuf::from(&tablespace.path),
        };
        let directory = std::path::absolute(&directory).map_err(io_error("resolve", &directory))?;
        let nested = |other: &Path| directory.starts_with(other) || other.starts_with(&directory);
        if nested(root) || placed.values().any(|other| nested(other)) {
            return Err(TargetError::TablespacePath(directory));
        }
        placed.insert(tablespace.oid, directory);
    }
    Ok(placed)
}

/// Empty, or left by a restore that was killed before its marker had its name.
fn is_unused(root: &Path) -> Result<bool, TargetError> {
    let only_ours = |entries: Vec<PathBuf>| entries.iter().all(|entry| *entry == root.join(FOLDER));
    let marker = root.join(FOLDER).join(STATE_FILE);
    Ok(only_ours(entries(root)?)
        && entries(&root.join(FOLDER))?.iter().all(|entry| durable_fs::is_temporary(entry, &marker)))
}

fn is_empty(directory: &Path) -> Result<bool, TargetError> {
    Ok(entries(directory)?.is_empty())
}

/// What lies in a directory; one that is missing has nothing.
fn entries(directory: &Path) -> Result<Vec<PathBuf>, TargetError> {
    let listed = match fs::read_dir(directory) {
        Ok(listed) => listed.map(|entry| entry.map(|entry| entry.path())).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(e),
    };
    listed.map_err(io_error("list", directory))
}

fn make_directory(path: &Path, mode: u32) -> Result<(), TargetError> {
    durable_fs::create_directories(path, mode).map_err(io_error("make", path))
}

fn set_mode(path: &Path, mode: u32) -> Result<(), TargetError> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io_error("set the mode of", path))
}

/// Removes everything in a directory but `keep`.
fn wipe(directory: &Path, keep: Option<&Path>) -> Result<(), TargetError> {
    for entry in fs::read_dir(directory).map_err(io_error("list", directory))? {
        let entry = entry.map_err(io_error("list", directory))?;
        let path = entry.path();
        if keep == Some(path.as_path()) {
            continue;
        }
        let folder = entry.file_type().map_err(io_error("look at", &path))?.is_dir();
        let removed = if folder { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(io_error("remove", &path))?;
    }
    Ok(())
}

/// Disk space that the files below a directory take; 0 where it cannot be read.
pub fn allocated_bytes(directory: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => allocated_bytes(&entry.path()),
        Ok(meta) => meta.blocks().saturating_mul(512),
        Err(_) => 0,
    });
    sizes.fold(0, u64::saturating_add)
}

pub(super) fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> TargetError + use<'a> {
    move |source| TargetError::Io { action, path: path.to_owned(), source }
}
