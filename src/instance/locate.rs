//! Finding the programs of a major version.
//!
//! Order: directories that the operator names, the places where Debian and Red Hat put each major, what `pg_config` on the
//! PATH says, the PATH itself. A place counts only when its `postgres --version` has the major asked for: a cluster is
//! never started by another one.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::pg::Major;

/// The programs of one PostgreSQL version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installation {
    pub major: Major,
    /// As `postgres --version` says it, such as `18.4`.
    pub version: String,
    /// The directory that holds `postgres`.
    pub bin: PathBuf,
}

/// No place has the programs of this major.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("PostgreSQL {major} is not installed on this host ({})", describe(.found, .tried))]
pub struct LocateError {
    pub major: Major,
    /// What was found instead.
    pub found: Vec<Installation>,
    pub tried: Vec<PathBuf>,
}

impl Installation {
    pub fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// Where loadable modules lie (`pg_config --pkglibdir`, or beside `bin` where that program is missing).
    pub fn library_directory(&self) -> PathBuf {
        self.ask_pg_config("--pkglibdir").unwrap_or_else(|| self.beside(&["lib/postgresql", "lib"]))
    }

    /// Where the control files of extensions lie.
    pub fn extension_directory(&self) -> PathBuf {
        let share = self.ask_pg_config("--sharedir");
        share.unwrap_or_else(|| self.beside(&["share/postgresql", "share"])).join("extension")
    }

    fn ask_pg_config(&self, option: &str) -> Option<PathBuf> {
        pg_config(&self.program("pg_config"), option)
    }

    fn beside(&self, places: &[&str]) -> PathBuf {
        let prefix = self.bin.parent().unwrap_or(&self.bin);
        places.iter().map(|place| prefix.join(place)).find(|place| place.is_dir()).unwrap_or_else(|| prefix.join("lib"))
    }
}

/// The installation of `major`; `configured` are directories that hold `postgres`, or `bin/postgres`, or a folder for each
/// major (`18/bin/postgres`).
///
/// # Errors
/// When no place has it; the error names what is there instead.
pub fn locate(major: Major, configured: &[PathBuf]) -> Result<Installation, LocateError> {
    let tried = candidates(&[major], configured);
    let mut found = Vec::new();
    for bin in &tried {
        match probe(bin) {
            Some(installation) if installation.major == major => return Ok(installation),
            Some(other) => found.push(other),
            None => {}
        }
    }
    Err(LocateError { major, found, tried })
}

/// The first installation of each supported major.
pub fn installed(configured: &[PathBuf]) -> Vec<Installation> {
    let majors: Vec<Major> = (Major::SUPPORTED.start().0..=Major::SUPPORTED.end().0).map(Major).collect();
    let mut seen = BTreeSet::new();
    let found = candidates(&majors, configured).into_iter().filter_map(|bin| probe(&bin));
    let mut first: Vec<Installation> = found.filter(|installation| seen.insert(installation.major)).collect();
    first.sort_by_key(|installation| installation.major);
    first
}

fn candidates(majors: &[Major], configured: &[PathBuf]) -> Vec<PathBuf> {
    let mut places: Vec<PathBuf> = Vec::new();
    for place in configured {
        places.push(place.clone());
        places.push(place.join("bin"));
        places.extend(majors.iter().map(|major| place.join(major.to_string()).join("bin")));
    }
    for major in majors {
        places.push(PathBuf::from(format!("/usr/lib/postgresql/{major}/bin")));
        places.push(PathBuf::from(format!("/usr/pgsql-{major}/bin")));
    }
    places.extend(pg_config(Path::new("pg_config"), "--bindir"));
    places.extend(std::env::var_os("PATH").iter().flat_map(std::env::split_paths));
    let mut seen = BTreeSet::new();
    places.retain(|place| place.join("postgres").is_file() && seen.insert(place.clone()));
    places
}

fn probe(bin: &Path) -> Option<Installation> {
    let output = Command::new(bin.join("postgres")).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let (major, version) = parse_version(&text)?;
    Some(Installation { major, version, bin: bin.to_owned() })
}

/// `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`; betas say `18beta1`.
fn parse_version(text: &str) -> Option<(Major, String)> {
    let version = text.split_once("(PostgreSQL) ")?.1.split_whitespace().next()?;
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    Some((Major(digits.parse().ok()?), version.to_owned()))
}

fn pg_config(program: &Path, option: &str) -> Option<PathBuf> {
    let output = Command::new(program).arg(option).output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(PathBuf::from(text.trim_end())).filter(|path| path.is_absolute())
}

fn describe(found: &[Installation], tried: &[PathBuf]) -> String {
    if !found.is_empty() {
        let list: Vec<String> = found.iter().map(|i| format!("{} in {}", i.version, i.bin.display())).collect();
        return format!("found {}", list.join(", "));
    }
    match tried.is_empty() {
        true => "no postgres program in any of the usual places".to_owned(),
        false => "the postgres programs found do not say their version".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: Option<(u16, &str)>) {
        let found = parse_version(text);
        assert_eq!(found.as_ref().map(|(major, version)| (major.0, version.as_str())), expected, "{text}");
    }

    #[test]
    fn versions_as_programs_print_them() {
        check("postgres (PostgreSQL) 18.4\n", Some((18, "18.4")));
        check("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", Some((15, "15.18")));
        check("postgres (PostgreSQL) 18beta1\n", Some((18, "18beta1")));
        check("postgres (EnterpriseDB) 18\n", None);
        check("", None);
    }

    #[test]
    fn a_missing_major_is_named() {
        let error = locate(Major(99), &[PathBuf::from("/nonexistent")]).expect_err("no such major");
        assert!(error.to_string().starts_with("PostgreSQL 99 is not installed on this host ("), "{error}");
    }
}
