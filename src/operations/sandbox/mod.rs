//! Sandboxes: restored clusters for people who look for something, with an end.
//!
//! A sandbox lies in a configured area, `<directory>/<environment>/<id>/`: its `data`, its `tablespaces`, and `sandbox.json`,
//! which says whose it is and until when ([`Record`]). The id is that of the job that made it. Its socket lies in
//! `<directory>/.sockets/<id>/`, because the path of a socket has 107 bytes at most and those of the data need more. All of
//! it is of mode 0700: a person comes in through [`proxy`] alone, as a role that was made for them ([`role`]).
//!
//! Nothing about a sandbox is kept elsewhere, and its server is no child that the daemon needs: one that starts finds what is
//! there ([`Area::keep`]), starts servers that ended, and removes what was never finished or is over.
//!
//! Invariants: a record is written before anything that it speaks of, and removed after it; one process works on an area
//! (it holds its lock), and in it one task on a sandbox (it holds a [`Claim`]).

mod create;
mod keep;
mod manage;
pub mod proxy;
pub mod record;
mod role;
mod server;
mod startup;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use create::{CreateRequest, Created, Source};
pub use keep::Event;
pub use record::{Asked, Record, RecordError, State};

use crate::error::{Code, Failure};
use crate::instance::Postmaster;
use crate::pg::Timestamp;
use crate::repository::JobId;
use crate::restore::recovery::{SOCKET_NAME_BYTES, SOCKET_PATH_BYTES_MAX};
use crate::restore::target::allocated_bytes;
use crate::util::nearest::nearest;

/// The directory of sockets in an area; no environment has a name that begins with a dot.
const SOCKETS: &str = ".sockets";
const LOCK_FILE: &str = ".lock";
/// Of a job's id.
const ID_BYTES: usize = 23;
/// The longest path of an area in which every sandbox has its socket.
pub const DIRECTORY_BYTES_MAX: usize = SOCKET_PATH_BYTES_MAX - SOCKET_NAME_BYTES - ID_BYTES - SOCKETS.len() - 2;

/// What the configuration says of sandboxes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The area; without one there are no sandboxes.
    pub directory: Option<PathBuf>,
    /// All sandboxes together; without one the file system is the limit.
    pub quota_bytes: Option<u64>,
    /// The life of a sandbox for which nobody said how long.
    pub expiry: Duration,
    pub expiry_max: Duration,
    /// So long before its end it is announced.
    pub warn_before: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            directory: None,
            quota_bytes: None,
            expiry: Duration::from_hours(24),
            expiry_max: Duration::from_hours(7 * 24),
            warn_before: Duration::from_hours(1),
        }
    }
}

/// The area of one daemon; a cheap copy of the way to it.
#[derive(Debug, Clone)]
pub struct Area(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    settings: RwLock<Settings>,
    claimed: Mutex<BTreeSet<JobId>>,
    /// Held while a sandbox is measured and put down, so that two of them do not share the same room.
    reserving: tokio::sync::Mutex<()>,
    /// The lock ends with the process, however it ends.
    _lock: File,
}

/// The right to change a sandbox, until it is dropped.
#[derive(Debug)]
pub struct Claim {
    area: Arc<Inner>,
    id: JobId,
}

/// A sandbox, as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    #[serde(flatten)]
    pub record: Record,
    /// The process of its server.
    pub pid: Option<i32>,
    /// `None`: it has no end.
    pub seconds_left: Option<u64>,
    pub directory: PathBuf,
}

/// What lies in an area.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listing {
    /// Oldest first.
    pub sandboxes: Vec<Found>,
    /// Directories that are none, with what is wrong with them.
    pub others: Vec<(PathBuf, String)>,
}

impl Area {
    /// Opens the area, and makes it when it is not there.
    ///
    /// # Errors
    /// When none is configured, when others may write to it, and [`Code::Conflict`] when another daemon works on it.
    pub fn open(settings: &Settings) -> Result<Area, Failure> {
        let Some(directory) = settings.directory.clone() else {
            let failure = Failure::new(Code::Configuration, "use sandboxes: the configuration names no place for them");
            return Err(failure.hint(
                "Set `directory` in [sandbox] to a directory with room for restored clusters, and reload the daemon.",
            ));
        };
        let failed = |error: io::Error| {
            let message = format!("open the sandbox area {}: {error}", directory.display());
            Failure::new(Code::Host, message).hint("It must belong to the daemon's user; `sandbox.directory` names it.")
        };
        make_private(&directory).map_err(failed)?;
        let found = fs::metadata(&directory).map_err(failed)?;
        const OTHERS_WRITE: u32 = 0o022;
        if found.uid() != rustix::process::geteuid().as_raw() || found.mode() & OTHERS_WRITE != 0 {
            let message = format!("open the sandbox area {}: others may write to it", directory.display());
            return Err(Failure::new(Code::Host, message).hint("Give it to the daemon's user, with mode 0700."));
        }
        make_private(&directory.join(SOCKETS)).map_err(failed)?;
        let lock = File::options().write(true).create(true).truncate(false).mode(0o600).open(directory.join(LOCK_FILE));
        let lock = lock.map_err(failed)?;
        if let Err(error) = rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            if error != rustix::io::Errno::WOULDBLOCK {
                return Err(failed(error.into()));
            }
            let message = format!("open the sandbox area {}: another daemon works on it", directory.display());
            return Err(
                Failure::new(Code::Conflict, message).hint("Give each daemon a `sandbox.directory` of its own.")
            );
        }
        let claimed = Mutex::default();
        let settings = RwLock::new(settings.clone());
        Ok(Area(Arc::new(Inner {
            directory,
            settings,
            claimed,
            reserving: tokio::sync::Mutex::default(),
            _lock: lock,
        })))
    }

    pub fn directory(&self) -> &Path {
        &self.0.directory
    }

    pub fn settings(&self) -> Settings {
        self.0.settings.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes over other settings for the same directory; says whether it did.
    pub fn replace(&self, settings: &Settings) -> bool {
        let same = settings.directory.as_deref() == Some(self.directory());
        if same {
            *self.0.settings.write().unwrap_or_else(PoisonError::into_inner) = settings.clone();
        }
        same
    }

    /// Everything that lies in the area.
    ///
    /// # Errors
    /// When it cannot be listed.
    pub fn list(&self) -> Result<Listing, Failure> {
        let mut listing = Listing::default();
        for environment in self.folders(self.directory())? {
            for place in self.folders(&environment)? {
                match Record::load(&place) {
                    Ok(record) => listing.sandboxes.push(self.found(record)),
                    Err(error) => listing.others.push((place, error.to_string())),
                }
            }
        }
        listing.sandboxes.sort_by(|a, b| a.record.id.cmp(&b.record.id));
        Ok(listing)
    }

    /// The sandbox of that id.
    ///
    /// # Errors
    /// Names the nearest one, or how to list all.
    pub fn find(&self, id: &str) -> Result<Found, Failure> {
        let listing = self.list()?;
        if let Some(found) = listing.sandboxes.iter().find(|found| found.record.id.as_str() == id) {
            return Ok(found.clone());
        }
        let short: String = id.chars().take(80).collect();
        let failure = Failure::new(Code::NotFound, format!("find sandbox {short}: there is none, or it has expired"));
        Err(match nearest(&short, listing.sandboxes.iter().map(|found| found.record.id.as_str())) {
            Some(meant) => failure.hint(format!("Did you mean {meant}?")),
            None => failure.hint("`pgrecall sandbox list` shows those that are there."),
        })
    }

    /// What all sandboxes take, or will when they are made.
    ///
    /// # Errors
    /// When the area cannot be listed.
    pub fn used_bytes(&self) -> Result<u64, Failure> {
        let mut bytes: u64 = 0;
        for environment in self.folders(self.directory())? {
            for place in self.folders(&environment)? {
                let planned = Record::load(&place).map_or(0, |record| record.planned_bytes);
                bytes = bytes.saturating_add(allocated_bytes(&place).max(planned));
            }
        }
        Ok(bytes)
    }

    /// Takes the right to change a sandbox.
    ///
    /// # Errors
    /// [`Code::Conflict`] while somebody else has it.
    pub fn claim(&self, id: &JobId) -> Result<Claim, Failure> {
        self.try_claim(id).ok_or_else(|| {
            Failure::new(Code::Conflict, format!("change sandbox {id}: it is being changed already")).retryable()
        })
    }

    fn try_claim(&self, id: &JobId) -> Option<Claim> {
        let mut claimed = self.0.claimed.lock().unwrap_or_else(PoisonError::into_inner);
        claimed.insert(id.clone()).then(|| Claim { area: Arc::clone(&self.0), id: id.clone() })
    }

    fn found(&self, record: Record) -> Found {
        let directory = self.place(&record.environment, &record.id);
        let postmaster = Postmaster::find(&directory.join("data")).ok().flatten();
        let left = record.time_left(crate::util::clock::now().into());
        Found {
            pid: postmaster.map(|found| found.pid),
            seconds_left: left.map(|left| left.as_secs()),
            directory,
            record,
        }
    }

    fn place(&self, environment: &str, id: &JobId) -> PathBuf {
        self.directory().join(environment).join(id.as_str())
    }

    fn place_of(&self, record: &Record) -> PathBuf {
        self.place(&record.environment, &record.id)
    }

    fn data(&self, record: &Record) -> PathBuf {
        self.place_of(record).join("data")
    }

    fn socket_directory(&self, id: &JobId) -> PathBuf {
        self.directory().join(SOCKETS).join(id.as_str())
    }

    fn folders(&self, directory: &Path) -> Result<Vec<PathBuf>, Failure> {
        let failed = |error: io::Error| Failure::new(Code::Host, format!("list {}: {error}", directory.display()));
        let entries = match fs::read_dir(directory) {
            // It was removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut folders = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            if !hidden && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            }
        }
        folders.sort();
        Ok(folders)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.area.claimed.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

impl From<RecordError> for Failure {
    fn from(error: RecordError) -> Failure {
        Failure::new(Code::Host, error.to_string())
    }
}

/// The time that is `life` from `now`.
fn end_of(now: Timestamp, life: Duration) -> Timestamp {
    now.saturating_add_micros(i64::try_from(life.as_micros()).unwrap_or(i64::MAX))
}

/// Makes a directory of mode 0700; one that is there stays as it is.
fn make_private(directory: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        // Whatever the umask took away.
        Ok(()) => fs::set_permissions(directory, fs::Permissions::from_mode(0o700)),
    }
}

#[cfg(test)]
mod tests;
