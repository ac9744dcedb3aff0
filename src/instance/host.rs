//! What this host lacks to run a cluster: programs, libraries, extensions, the same C library.
//!
//! Known before anything is fetched, so that a plan can name it. Best effort: what cannot be found out is not reported.

use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use super::{Installation, LocateError, locate};
use crate::pg::Major;

/// What a cluster needs, as recorded with its backup.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// Libraries of `shared_preload_libraries`.
    pub preload_libraries: Vec<String>,
    pub extensions: Vec<String>,
    /// Version of the GNU C library under which text was sorted; `None` when unknown.
    pub glibc: Option<String>,
}

/// One thing that is missing or different here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lack {
    Programs(LocateError),
    Library(String),
    Extension(String),
    /// Text indexes may be in the wrong order.
    Glibc {
        there: String,
        here: String,
    },
}

impl Lack {
    /// Whether the cluster cannot be started at all. A missing library is only missed by those who call it, since the
    /// generated configuration preloads nothing that is not asked for.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Lack::Programs(_))
    }
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lack::Programs(error) => error.fmt(f),
            Lack::Library(name) => write!(f, "the preloaded library {name} is not installed on this host"),
            Lack::Extension(name) => write!(f, "the extension {name} is not installed on this host"),
            Lack::Glibc { there, here } => write!(
                f,
                "the source ran on glibc {there}, this host has {here}: text may sort differently, check the collation \
                 versions and REINDEX"
            ),
        }
    }
}

/// The installation that can run the cluster, and what it lacks.
pub fn check(major: Major, configured: &[PathBuf], needs: &Needs) -> (Option<Installation>, Vec<Lack>) {
    let mut lacks = Vec::new();
    let installation = match locate::locate(major, configured) {
        Ok(installation) => {
            lacks.extend(missing_files(&installation, needs));
            Some(installation)
        }
        Err(error) => {
            lacks.push(Lack::Programs(error));
            None
        }
    };
    if let (Some(there), Some(here)) = (&needs.glibc, glibc_version())
        && *there != here
    {
        lacks.push(Lack::Glibc { there: there.clone(), here });
    }
    (installation, lacks)
}

fn missing_files(installation: &Installation, needs: &Needs) -> Vec<Lack> {
    let libraries = installation.library_directory();
    let extensions = installation.extension_directory();
    let library_lacks = needs.preload_libraries.iter().filter(|name| {
        let plain = name.strip_prefix("$libdir/").unwrap_or(name);
        let file = if plain.ends_with(".so") { plain.to_owned() } else { format!("{plain}.so") };
        !libraries.join(file).exists()
    });
    let extension_lacks = needs.extensions.iter().filter(|name| !extensions.join(format!("{name}.control")).exists());
    let libraries = library_lacks.cloned().map(Lack::Library);
    libraries.chain(extension_lacks.cloned().map(Lack::Extension)).collect()
}

/// The version of the GNU C library, from `ldd --version`; `None` on other C libraries.
pub fn glibc_version() -> Option<String> {
    let output = Command::new("ldd").arg("--version").env("LC_ALL", "C").output().ok()?;
    parse_ldd(&String::from_utf8_lossy(&output.stdout))
}

/// `ldd (Debian GLIBC 2.36-9+deb12u10) 2.36`.
fn parse_ldd(text: &str) -> Option<String> {
    let line = text.lines().next()?;
    let lower = line.to_ascii_lowercase();
    if !lower.contains("glibc") && !lower.contains("gnu libc") {
        return None;
    }
    let version = line.split_whitespace().next_back()?;
    version.starts_with(|c: char| c.is_ascii_digit()).then(|| version.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_the_c_library() {
        assert_eq!(parse_ldd("ldd (Debian GLIBC 2.36-9+deb12u10) 2.36\nCopyright").as_deref(), Some("2.36"));
        assert_eq!(parse_ldd("ldd (GNU libc) 2.34").as_deref(), Some("2.34"));
        assert_eq!(parse_ldd("musl libc (x86_64)\nVersion 1.2.4"), None);
        assert_eq!(parse_ldd(""), None);
    }

    #[test]
    fn what_is_missing_is_named() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for folder in ["bin", "lib", "share/extension"] {
            std::fs::create_dir_all(dir.path().join(folder)).expect("make");
        }
        for file in ["lib/here.so", "share/extension/here.control"] {
            crate::util::durable_fs::write(&dir.path().join(file), b"", 0o600).expect("write");
        }
        let installation = Installation { major: Major(18), version: "18.4".to_owned(), bin: dir.path().join("bin") };
        let both = || vec!["here".to_owned(), "gone".to_owned()];
        let needs = Needs { preload_libraries: both(), extensions: both(), glibc: None };
        let lacks = missing_files(&installation, &needs);
        assert_eq!(lacks, [Lack::Library("gone".to_owned()), Lack::Extension("gone".to_owned())]);
    }
}
