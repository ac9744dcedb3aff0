//! Where the programs that the tests need lie; `scripts/setup-tests` puts them there.

use std::path::{Path, PathBuf};

/// The cache of `scripts/setup-tests`: `PGRECALL_TEST_CACHE`, or its default.
pub fn cache() -> PathBuf {
    if let Some(place) = std::env::var_os("PGRECALL_TEST_CACHE") {
        return place.into();
    }
    let system = Path::new("/var/cache/pgrecall");
    match std::env::var_os("HOME") {
        Some(home) if !system.exists() => Path::new(&home).join(".cache/pgrecall"),
        _ => system.to_owned(),
    }
}

/// A program of one major of PostgreSQL.
pub fn pg_program(major: u16, name: &str) -> PathBuf {
    present(cache().join(format!("postgresql/{major}/bin/{name}")))
}

/// The folder with the programs of one major.
pub fn pg_bin(major: u16) -> PathBuf {
    present(cache().join(format!("postgresql/{major}/bin")))
}

pub fn minio() -> PathBuf {
    present(cache().join("bin/minio"))
}

/// The program under test.
pub fn pgrecall() -> PathBuf {
    env!("CARGO_BIN_EXE_pgrecall").into()
}

/// The root of the source tree.
pub fn source() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// A folder for what is worth keeping between runs and can be made again.
pub fn kept() -> PathBuf {
    let place = cache().join("kept");
    if std::fs::create_dir_all(&place).is_ok() && tempfile::tempfile_in(&place).is_ok() {
        return place;
    }
    let user = std::env::var("USER").unwrap_or_else(|_| rustix::process::getuid().as_raw().to_string());
    let place = std::env::temp_dir().join(format!("pgrecall-kept-{user}"));
    std::fs::create_dir_all(&place).expect("make a folder for prepared clusters");
    place
}

fn present(path: PathBuf) -> PathBuf {
    assert!(path.exists(), "{} is missing: run scripts/setup-tests", path.display());
    path
}
