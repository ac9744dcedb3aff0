//! Configuration files of the source that were kept outside its data directory, put into the restored one.
//!
//! Debian keeps `postgresql.conf` and its kin in `/etc/postgresql/…`. A restore with the source's configuration gets them
//! from the commit object: what lay beside or below the source's `postgresql.conf` lies so again, in the data directory,
//! where relative includes find it. A file that the backup itself brought is never replaced.

use std::fs;
use std::io;
use std::path::{Component, Path};

use anyhow::Context;

use crate::repository::backup_object::ConfigFile;
use crate::util::durable_fs;

const MAIN: &str = "postgresql.conf";

/// Writes the files that the data directory lacks; the caller syncs.
pub fn place(files: &[ConfigFile], data_directory: &Path) -> anyhow::Result<()> {
    let main = files.iter().map(|file| Path::new(&file.path)).find(|path| path.ends_with(MAIN));
    let Some(home) = main.and_then(Path::parent) else { return Ok(()) };
    // What came with the backup is the source's whole configuration already.
    if data_directory.join(MAIN).exists() {
        return Ok(());
    }
    for file in files {
        let path = Path::new(&file.path);
        let name = || path.file_name().map(Path::new).filter(|name| is_access_file(name));
        let Some(relative) = path.strip_prefix(home).ok().or_else(name) else { continue };
        if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
            continue;
        }
        let place = data_directory.join(relative);
        if place.exists() {
            continue;
        }
        if let Some(parent) = place.parent() {
            make(parent)?;
        }
        durable_fs::write_unsynced(&place, file.content.as_bytes(), 0o600)
            .with_context(|| format!("write {}", place.display()))?;
        for folder in included_folders(&file.content) {
            make(&place.with_file_name(folder))?;
        }
    }
    Ok(())
}

fn is_access_file(name: &Path) -> bool {
    name == Path::new("pg_hba.conf") || name == Path::new("pg_ident.conf")
}

/// Folders that must exist, if only empty, or the server does not start.
fn included_folders(text: &str) -> Vec<&str> {
    let included = text.lines().filter_map(|line| {
        let rest = line.trim_start().strip_prefix("include_dir")?.trim_start();
        let value = rest.strip_prefix('=').unwrap_or(rest).split('#').next()?.trim().trim_matches('\'');
        let plain = Path::new(value).components().all(|part| matches!(part, Component::Normal(_)));
        Some(value).filter(|value| plain && !value.is_empty())
    });
    included.collect()
}

fn make(folder: &Path) -> anyhow::Result<()> {
    match fs::create_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            Err(e).with_context(|| format!("make {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, content: &str) -> ConfigFile {
        ConfigFile { path: path.to_owned(), content: content.to_owned() }
    }

    #[test]
    fn debian_s_files_come_into_the_data_directory() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let files = [
            file("/etc/postgresql/18/main/postgresql.conf", "include_dir = 'conf.d'  # more\ninclude_dir '/etc/all'\n"),
            file("/etc/postgresql/18/main/conf.d/10-memory.conf", "work_mem = '9MB'\n"),
            file("/etc/access/pg_hba.conf", "local all all peer\n"),
            file("/etc/other/secret.conf", "x = 1\n"),
            file("/etc/postgresql/18/main/../../../evil.conf", "x = 1\n"),
        ];
        place(&files, dir.path()).expect("write");
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).expect("written");
        assert_eq!(read("conf.d/10-memory.conf"), "work_mem = '9MB'\n");
        assert_eq!(read("pg_hba.conf"), "local all all peer\n");
        assert!(read("postgresql.conf").starts_with("include_dir"));
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 3);
    }

    #[test]
    fn a_backup_that_brought_its_configuration_is_left_alone() {
        let dir = tempfile::tempdir().expect("temporary directory");
        durable_fs::write(&dir.path().join(MAIN), b"own\n", 0o600).expect("write");
        place(&[file("/srv/data/postgresql.conf", "other\n"), file("/srv/data/pg_hba.conf", "x\n")], dir.path())
            .expect("nothing to do");
        assert_eq!(fs::read(dir.path().join(MAIN)).expect("there"), b"own\n");
        assert!(!dir.path().join("pg_hba.conf").exists());
    }
}
