//! A directory of restored files that recovers by itself, exactly so far.
//!
//! [`prepare`] writes into the data directory what makes any start of a server on it, ours or a person's `pg_ctl start`,
//! replay to the target and stop there: `recovery.signal`, the recovery settings in `postgresql.auto.conf`, and a
//! configuration under which the copy keeps to itself. The source's own files are set aside as `*.source`. Clusters whose
//! configuration lies outside the data directory (as Debian lays them out) need nothing else, for the same reason.
//!
//! The signal is the last file that is written. A restored directory without it would recover to the end of whatever WAL it
//! has, so until `prepare` has returned nobody may start it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};

use crate::instance::configuration::{self, HBA, Isolation};
use crate::instance::{Postmaster, Settings, Target, TargetAction};
use crate::pg::control_file::RecoveryParameters;
use crate::pg::{BackupLabel, ControlFile, Major};
use crate::util::digest::{Digest, hex};
use crate::util::durable_fs;

/// What becomes of the server at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// A new timeline; takes writes.
    Promote,
    /// Read-only; can be promoted.
    Pause,
    Shutdown,
}

/// Where replay finds its WAL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalSource {
    /// All of it lies in `pg_wal`.
    Preloaded,
    /// The words of a command that fetches one file; `%f` and `%p` are words of their own.
    Command(Vec<String>),
}

/// Whose settings the directory has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Configuration {
    /// An allow-list; the copy keeps to itself.
    Isolated,
    /// The source's files, which must lie in the data directory, with the recovery settings added.
    Source,
}

/// How to recover.
#[derive(Debug, Clone)]
pub struct Recovery {
    pub target: Target,
    pub finish: Finish,
    pub wal: WalSource,
    pub configuration: Configuration,
    /// The largest settings that the WAL up to the target changes to, when they are known.
    pub later_parameters: Option<RecoveryParameters>,
    /// Libraries that replay needs; nothing else of the source's is preloaded.
    pub preload_libraries: Vec<String>,
    pub jit: bool,
    pub shared_buffers_bytes: u64,
    /// Where the server's socket goes, instead of a directory in the data directory.
    pub socket_directory: Option<PathBuf>,
}

/// A directory that is ready to be started.
#[derive(Debug, Clone)]
pub struct Prepared {
    pub data_directory: PathBuf,
    pub major: Major,
    pub control: ControlFile,
    pub label: BackupLabel,
    /// What replay is configured with; the drive raises them when the WAL asks for more.
    pub parameters: RecoveryParameters,
    pub socket_directory: PathBuf,
    pub port: u16,
    /// For the command line of our own start.
    pub overrides: Settings,
}

/// A socket's path has at most so many bytes (`sun_path`, with its terminator).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Of `/.s.PGSQL.5432`.
pub const SOCKET_NAME_BYTES: usize = 14;

pub const PORT: u16 = 5432;

/// Files that say something about a server that ran elsewhere.
const LEFTOVERS: [&str; 4] = ["postmaster.pid", "postmaster.opts", "standby.signal", "recovery.signal"];

/// Makes the directory recover to the target at its next start.
///
/// # Errors
/// When it is not the directory of a base backup of a supported major that begins before the target, when a server runs
/// on it, or when it cannot be written. Nothing is written before everything is checked.
pub fn prepare(data_directory: &Path, recovery: &Recovery) -> anyhow::Result<Prepared> {
    let prepared = prepare_with(data_directory, read_control(data_directory)?, recovery)?;
    durable_fs::sync_file_system(data_directory).with_context(|| format!("sync {}", data_directory.display()))?;
    Ok(prepared)
}

/// [`prepare`] for a directory whose `pg_control` does not have its name yet: no server can be started on it before it is
/// prepared. The caller syncs before that, once for everything that a restore wrote.
pub fn prepare_with(data_directory: &Path, control: ControlFile, recovery: &Recovery) -> anyhow::Result<Prepared> {
    if let Some(running) = Postmaster::find(data_directory)? {
        bail!("a server runs on {} (pid {})", data_directory.display(), running.pid);
    }
    let major = control.major().with_context(|| {
        format!("the catalogue version {} belongs to no release of PostgreSQL 14 to 18", control.catalog_version)
    })?;
    let label = read_label(data_directory)?;
    let target = &recovery.target;
    ensure!(
        target.lsn >= label.start_lsn && target.timeline >= label.timeline,
        "the target {} on timeline {} lies before the start of the backup, {} on timeline {}",
        target.lsn,
        target.timeline,
        label.start_lsn,
        label.timeline
    );
    let parameters = match &recovery.later_parameters {
        Some(later) => control.parameters.raised_to(later),
        None => control.parameters.clone(),
    };
    close_to_others(data_directory)?;
    for name in LEFTOVERS {
        remove_if_there(&data_directory.join(name))?;
    }
    let socket_directory = make_socket_directory(data_directory, recovery.socket_directory.as_deref())?;
    let mut prepared = Prepared {
        data_directory: data_directory.to_owned(),
        major,
        control,
        label,
        parameters,
        socket_directory,
        port: PORT,
        overrides: Settings::new(),
    };
    set_source_aside(data_directory, recovery.configuration)?;
    write_configuration(&mut prepared, recovery, durable_fs::write_unsynced)?;
    write(durable_fs::write_unsynced, &data_directory.join("recovery.signal"), b"")?;
    Ok(prepared)
}

/// Reads the settings that `pg_control` asks for now, and writes the configuration anew with them where they are larger.
/// Says whether anything was raised. For a server that gave up because a setting was too small: it has put the change
/// into `pg_control` before it looked at its own settings.
pub fn raise_parameters(prepared: &mut Prepared, recovery: &Recovery) -> anyhow::Result<bool> {
    prepared.control = read_control(&prepared.data_directory)?;
    let raised = prepared.parameters.raised_to(&prepared.control.parameters);
    if raised == prepared.parameters {
        return Ok(false);
    }
    prepared.parameters = raised;
    write_configuration(prepared, recovery, durable_fs::write)?;
    Ok(true)
}

/// Takes the recovery settings out again after a recovery that has ended. They would do no harm, but would surprise whoever
/// reads them, or makes a standby of the directory.
pub fn forget_recovery(prepared: &Prepared, recovery: &Recovery) -> anyhow::Result<()> {
    let text = automatic(prepared, recovery, None)?;
    write(durable_fs::write, &prepared.data_directory.join("postgresql.auto.conf"), text.as_bytes())
}

/// The server refuses a directory that others may read or the group may write, as an empty one that was given to restore
/// into often is.
fn close_to_others(data_directory: &Path) -> anyhow::Result<()> {
    const TOO_MUCH: u32 = 0o027;
    let mode = fs::metadata(data_directory)?.mode();
    if mode & TOO_MUCH == 0 {
        return Ok(());
    }
    let permissions = fs::Permissions::from_mode(0o700);
    fs::set_permissions(data_directory, permissions).with_context(|| format!("close {}", data_directory.display()))
}

/// Reads and checks `global/pg_control`.
pub fn read_control(data_directory: &Path) -> anyhow::Result<ControlFile> {
    read_control_at(&data_directory.join("global/pg_control"))
}

/// Reads and checks a control file under another name.
pub fn read_control_at(path: &Path) -> anyhow::Result<ControlFile> {
    let bytes = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    ControlFile::decode(&bytes).with_context(|| format!("decode {}", path.display()))
}

fn read_label(data_directory: &Path) -> anyhow::Result<BackupLabel> {
    let path = data_directory.join("backup_label");
    let bytes = fs::read(&path).with_context(|| {
        format!("read {}, without which recovery would begin at the wrong checkpoint", path.display())
    })?;
    // The label's text may be in any encoding; the lines that count are ASCII.
    String::from_utf8_lossy(&bytes).parse().with_context(|| format!("parse {}", path.display()))
}

/// Renames the source's files away, once: a second preparation finds them aside already.
fn set_source_aside(data_directory: &Path, configuration: Configuration) -> anyhow::Result<()> {
    let names: &[&str] = match configuration {
        Configuration::Isolated => &["postgresql.auto.conf", "postgresql.conf", "pg_hba.conf", "pg_ident.conf"],
        Configuration::Source => {
            let main = data_directory.join("postgresql.conf");
            ensure!(main.exists(), "there is no {}: the source keeps its configuration elsewhere", main.display());
            &["postgresql.auto.conf"]
        }
    };
    for name in names {
        let (file, aside) = (data_directory.join(name), aside(data_directory, name));
        if file.exists() && !aside.exists() {
            durable_fs::rename_unsynced(&file, &aside).with_context(|| format!("set {} aside", file.display()))?;
        }
    }
    Ok(())
}

fn aside(data_directory: &Path, name: &str) -> PathBuf {
    data_directory.join(format!("{name}.source"))
}

fn write_configuration(prepared: &mut Prepared, recovery: &Recovery, how: Write) -> anyhow::Result<()> {
    let data_directory = &prepared.data_directory;
    // Relative to the data directory where it lies inside, so that the directory can be moved.
    let socket_directory = prepared.socket_directory.strip_prefix(data_directory).unwrap_or(&prepared.socket_directory);
    let isolated = configuration::isolated(&Isolation {
        major: prepared.major,
        parameters: &prepared.parameters,
        socket_directory,
        port: prepared.port,
        preload_libraries: &recovery.preload_libraries,
        jit: recovery.jit,
        shared_buffers_bytes: recovery.shared_buffers_bytes,
    });
    match recovery.configuration {
        Configuration::Isolated => {
            let main = format!(
                "# Written by pgrecall: this copy keeps to itself. The source's file is postgresql.conf.source.\n{isolated}"
            );
            write(how, &data_directory.join("postgresql.conf"), main.as_bytes())?;
            write(how, &data_directory.join("pg_hba.conf"), HBA.as_bytes())?;
            write(how, &data_directory.join("pg_ident.conf"), b"")?;
        }
        Configuration::Source => {
            let hba = data_directory.join("pgrecall_hba.conf");
            write(how, &hba, HBA.as_bytes())?;
            for (name, text) in [("pg_hba.conf", HBA), ("pg_ident.conf", "")] {
                let path = data_directory.join(name);
                if !path.exists() {
                    write(how, &path, text.as_bytes())?;
                }
            }
            prepared.overrides = isolated;
            prepared.overrides.set("hba_file", hba.to_string_lossy());
            own_places(data_directory, how)?;
        }
    }
    let command = match &recovery.wal {
        // Asked first for every file, even for those in `pg_wal`: it must be cheap, and must say "not here" (exit 1).
        WalSource::Preloaded => "/bin/false".to_owned(),
        WalSource::Command(words) => {
            configuration::restore_command(words).context("the command that fetches WAL has a line end in it")?
        }
    };
    let action = match recovery.finish {
        Finish::Promote => TargetAction::Promote,
        Finish::Pause => TargetAction::Pause,
        Finish::Shutdown => TargetAction::Shutdown,
    };
    let settings = configuration::recovery(&recovery.target, action, &command);
    let text = automatic(prepared, recovery, Some(&settings))?;
    write(how, &prepared.data_directory.join("postgresql.auto.conf"), text.as_bytes())
}

/// `postgresql.auto.conf`: with the source's configuration its own lines come first, and the larger settings stay.
fn automatic(prepared: &Prepared, recovery: &Recovery, settings: Option<&Settings>) -> anyhow::Result<String> {
    let mut text =
        String::from("# Do not edit this file manually!\n# It will be overwritten by the ALTER SYSTEM command.\n");
    if recovery.configuration == Configuration::Source {
        let source = aside(&prepared.data_directory, "postgresql.auto.conf");
        match fs::read_to_string(&source) {
            Ok(old) => text.push_str(&old),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("read {}", source.display())),
        }
        text.push_str(&configuration::replay_parameters(&prepared.parameters).to_string());
    }
    if let Some(settings) = settings {
        text.push_str(&settings.to_string());
    }
    Ok(text)
}

/// A source's `postgresql.conf` that names its places (as Debian's does) would start the server on the *source's* data
/// directory: the copy's own places are written behind.
fn own_places(data_directory: &Path, how: Write) -> anyhow::Result<()> {
    const PLACES: [&str; 5] = ["data_directory", "hba_file", "ident_file", "external_pid_file", "include"];
    const MARK: &str = "# The places of this copy, written by pgrecall.\n";
    let main = data_directory.join("postgresql.conf");
    let text = fs::read_to_string(&main).with_context(|| format!("read {}", main.display()))?;
    let own = text.split_once(MARK).map_or(text.as_str(), |(source, _)| source);
    if !own.lines().any(|line| PLACES.iter().any(|name| line.trim_start().starts_with(name))) {
        return Ok(());
    }
    let mut places = Settings::new();
    let path = |name: &str| data_directory.join(name).to_string_lossy().into_owned();
    places
        .set("data_directory", data_directory.to_string_lossy())
        .set("hba_file", path("pg_hba.conf"))
        .set("ident_file", path("pg_ident.conf"))
        .set("external_pid_file", "");
    write(how, &main, format!("{own}\n{MARK}{places}").as_bytes())
}

/// A directory that only we can enter: the chosen one, else inside the data directory unless its path is too long for a
/// socket.
fn make_socket_directory(data_directory: &Path, chosen: Option<&Path>) -> anyhow::Result<PathBuf> {
    let inside = data_directory.join(".pgrecall");
    let fits = |directory: &Path| directory.as_os_str().len() + SOCKET_NAME_BYTES <= SOCKET_PATH_BYTES_MAX;
    let directory = match chosen {
        Some(chosen) => {
            ensure!(fits(chosen), "{} is too long for the path of a socket", chosen.display());
            chosen.to_owned()
        }
        None if fits(&inside) => inside,
        None => {
            let digest = Digest::sha256(data_directory.as_os_str().as_encoded_bytes());
            let short = hex(digest.0.get(..8).unwrap_or_default());
            std::env::temp_dir().join(format!("pgrecall-{short}"))
        }
    };
    match fs::DirBuilder::new().mode(0o700).create(&directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(e).with_context(|| format!("make the socket directory {}", directory.display()));
        }
        _ => {}
    }
    // Somebody else may have made it first, or a link in its place.
    let metadata = fs::symlink_metadata(&directory)?;
    let ours = metadata.is_dir() && metadata.uid() == rustix::process::geteuid().as_raw();
    ensure!(ours, "the socket directory {} is not ours", directory.display());
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
    Ok(directory)
}

/// Of [`durable_fs`]: at once durable, or with everything else that a restore wrote.
type Write = fn(&Path, &[u8], u32) -> io::Result<()>;

fn write(how: Write, path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    how(path, bytes, 0o600).with_context(|| format!("write {}", path.display()))
}

fn remove_if_there(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).with_context(|| format!("remove {}", path.display())),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
