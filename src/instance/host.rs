//! What this host lacks to run a cluster: programs, libraries, extensions, the same order of text.
//!
//! Known before anything is fetched, so that a plan can name it. Best effort: what cannot be found out is not reported.

use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use super::{Installation, LocateError, locate};
use crate::pg::collation::{icu_version_of, same_icu_version};
use crate::pg::{CollationProvider, Major};

/// What a restored server's cache gets: an eighth of the memory that is free on this host, so that replay need not write a page out
/// and read it again for each change, and other servers keep theirs.
pub fn cache_bytes() -> u64 {
    const MIN: u64 = 128 << 20;
    const MAX: u64 = 1 << 30;
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    (available_bytes(&text).unwrap_or(0) / 8).clamp(MIN, MAX)
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What a cluster needs, as recorded with its backup.
#[derive(Debug, Clone, Default)]
pub struct Needs {
    /// Libraries of `shared_preload_libraries`.
    pub preload_libraries: Vec<String>,
    /// Those without which some of its WAL cannot be replayed.
    pub replay_libraries: Vec<String>,
    pub extensions: Vec<String>,
    pub sorted: Vec<SortedText>,
}

/// Text that was sorted under some version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SortedText {
    pub provider: CollationProvider,
    pub version: String,
    /// Where it is; empty when unknown.
    pub databases: Vec<String>,
}

/// The ICU that PostgreSQL's programs here are linked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Icu {
    /// The major of its libraries.
    Library(u32),
    NotLinked,
}

/// One thing that is missing or different here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lack {
    Programs(LocateError),
    Library(String),
    /// Replay stops at the first record that needs it.
    ReplayLibrary(String),
    Extension(String),
    /// Text indexes may be in the wrong order.
    Collation {
        sorted: SortedText,
        here: String,
    },
    /// Its databases take no session.
    NoIcu(SortedText),
}

impl Lack {
    /// Whether the cluster cannot be started at all. A missing library is only missed by those who call it, since the
    /// generated configuration preloads nothing that is not asked for.
    pub fn is_fatal(&self) -> bool {
        matches!(self, Lack::Programs(_) | Lack::ReplayLibrary(_))
    }
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lack::Programs(error) => error.fmt(f),
            Lack::Library(name) => write!(f, "the preloaded library {name} is not installed on this host"),
            Lack::Extension(name) => write!(f, "the extension {name} is not installed on this host"),
            Lack::ReplayLibrary(name) => {
                write!(f, "the library {name} is not installed on this host, and WAL of its resource manager needs it")
            }
            Lack::Collation { sorted, here } => write!(
                f,
                "{} was sorted by {} {}, this host has {here}: after the restore run REINDEX DATABASE there, then ALTER \
                 DATABASE … (or ALTER COLLATION …) REFRESH COLLATION VERSION",
                sorted.place(),
                sorted.provider,
                sorted.version
            ),
            Lack::NoIcu(sorted) => write!(
                f,
                "{} was sorted by ICU {}, and the programs on this host were built without ICU: its databases cannot be used",
                sorted.place(),
                sorted.version
            ),
        }
    }
}

impl SortedText {
    fn place(&self) -> String {
        const NAMED_MAX: usize = 5;
        if self.databases.is_empty() {
            return "text".to_owned();
        }
        let named = self.databases.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
        match self.databases.len().saturating_sub(NAMED_MAX) {
            0 => format!("text in {named}"),
            more => format!("text in {named} and {more} more databases"),
        }
    }
}

/// The installation that can run the cluster, and what it lacks.
pub fn check(major: Major, configured: &[PathBuf], needs: &Needs) -> (Option<Installation>, Vec<Lack>) {
    let mut lacks = Vec::new();
    let mut icu = None;
    let installation = match locate::locate(major, configured) {
        Ok(installation) => {
            lacks.extend(missing_files(&installation, needs));
            icu = icu_of(&installation);
            Some(installation)
        }
        Err(error) => {
            lacks.push(Lack::Programs(error));
            None
        }
    };
    let glibc = glibc_version();
    lacks.extend(needs.sorted.iter().filter_map(|sorted| other_order(sorted, glibc.as_deref(), icu)));
    (installation, lacks)
}

/// What is known to sort in another order here, or not known to sort in the same.
fn other_order(sorted: &SortedText, glibc: Option<&str>, icu: Option<Icu>) -> Option<Lack> {
    let other = |here: String| Lack::Collation { sorted: sorted.clone(), here };
    match sorted.provider {
        CollationProvider::Libc => glibc.filter(|here| *here != sorted.version).map(|here| other(here.to_owned())),
        CollationProvider::Icu => match icu? {
            Icu::NotLinked => Some(Lack::NoIcu(sorted.clone())),
            Icu::Library(major) => match icu_version_of(major) {
                Some(here) if same_icu_version(&here, &sorted.version) => None,
                Some(here) => Some(other(format!("{here} (ICU {major})"))),
                None => Some(other(format!("ICU {major}, whose order may be another"))),
            },
        },
        // The same major sorts in the same order.
        CollationProvider::Builtin => None,
    }
}

/// The ICU of an installation; `None` when that cannot be found out.
fn icu_of(installation: &Installation) -> Option<Icu> {
    let output = Command::new("ldd").arg(installation.bin.join("postgres")).env("LC_ALL", "C").output().ok()?;
    output.status.success().then(|| parse_libraries(&String::from_utf8_lossy(&output.stdout)))
}

/// `libicui18n.so.72 => …`; others link the rest of ICU, too.
fn parse_libraries(text: &str) -> Icu {
    let library = text.lines().find_map(|line| line.trim_start().strip_prefix("libicui18n.so."));
    let major = library.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    major.map_or(Icu::NotLinked, Icu::Library)
}

fn missing_files(installation: &Installation, needs: &Needs) -> Vec<Lack> {
    let libraries = installation.library_directory();
    let extensions = installation.extension_directory();
    let missing = |name: &&String| {
        let plain = name.strip_prefix("$libdir/").unwrap_or(name);
        let file = if plain.ends_with(".so") { plain.to_owned() } else { format!("{plain}.so") };
        !libraries.join(file).exists()
    };
    let replay_lacks = needs.replay_libraries.iter().filter(missing);
    let library_lacks =
        needs.preload_libraries.iter().filter(|name| !needs.replay_libraries.contains(name)).filter(missing);
    let extension_lacks = needs.extensions.iter().filter(|name| !extensions.join(format!("{name}.control")).exists());
    let libraries = replay_lacks.cloned().map(Lack::ReplayLibrary).chain(library_lacks.cloned().map(Lack::Library));
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
    fn the_free_memory_of_a_host() {
        let text = "MemTotal:       24689884 kB\nMemFree:         1049912 kB\nMemAvailable:   22080980 kB\n";
        assert_eq!(available_bytes(text), Some(22_080_980 << 10));
        assert_eq!(available_bytes("MemTotal: 1 kB\nMemAvailable: many kB\n"), None);
        assert!((128 << 20..=1 << 30).contains(&cache_bytes()));
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
        let replay_libraries = vec!["here".to_owned(), "needed".to_owned()];
        let needs = Needs { preload_libraries: both(), replay_libraries, extensions: both(), ..Needs::default() };
        let lacks = missing_files(&installation, &needs);
        let named = |name: &str| name.to_owned();
        let expected =
            [Lack::ReplayLibrary(named("needed")), Lack::Library(named("gone")), Lack::Extension(named("gone"))];
        assert_eq!(lacks, expected);
    }

    #[test]
    fn text_that_may_sort_otherwise_here_is_named_with_what_to_do() {
        let sorted = |provider, version: &str| {
            let databases = ["a", "b", "c", "d", "e", "f"].map(String::from).to_vec();
            SortedText { provider, version: version.to_owned(), databases }
        };
        let check = |provider, version: &str, expected: &[&str]| {
            let told = other_order(&sorted(provider, version), Some("2.36"), Some(Icu::Library(72)));
            let told = told.map(|lack| lack.to_string()).unwrap_or_default();
            assert!(expected.iter().all(|part| told.contains(part)), "{told}");
            assert_eq!(told.is_empty(), expected.is_empty(), "{told}");
        };
        check(CollationProvider::Libc, "2.36", &[]);
        check(CollationProvider::Libc, "2.31", &["glibc 2.31", "has 2.36", "REINDEX", "a, b, c, d, e and 1 more"]);
        check(CollationProvider::Icu, "153.120.42", &[]);
        check(CollationProvider::Icu, "153.112", &["ICU 153.112", "153.120 (ICU 72)", "REINDEX"]);
        check(CollationProvider::Builtin, "1", &[]);
        let icu = sorted(CollationProvider::Icu, "153.112");
        assert!(matches!(other_order(&icu, None, Some(Icu::NotLinked)), Some(Lack::NoIcu(_))));
        assert!(matches!(other_order(&icu, None, Some(Icu::Library(200))), Some(Lack::Collation { .. })));
        assert_eq!(other_order(&icu, None, None), None);
    }

    #[test]
    fn the_icu_of_a_program_is_the_one_that_it_sorts_with() {
        let debian = "\tlibxml2.so.2 => /lib/x\n\tlibicui18n.so.72 => /lib/y (0x1)\n\tlibicuuc.so.72 => /lib/z\n";
        assert_eq!(parse_libraries(debian), Icu::Library(72));
        assert_eq!(parse_libraries("\tlibicuuc.so.72 => /lib/z (by libxml2)\n"), Icu::NotLinked);
    }
}
