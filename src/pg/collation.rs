//! Who decides in which order text is sorted, and the version under which it did.
//!
//! An index over text that was built under another version may be in the wrong order. libc's version is the C library's;
//! ICU's names the Unicode collation algorithm; the builtin provider (17 on) belongs to PostgreSQL's major.
//! Source: `pg_locale.c`, `pg_collation_actual_version`, 14–18; ICU `ucol_getVersion`, of which the second number is the
//! algorithm's version, major × 8 + minor (seen: ICU 72 gives 153.120 and, for tailored locales, 153.120.42).

use std::fmt;

use serde::{Deserialize, Serialize};

/// The provider of a collation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CollationProvider {
    Libc,
    Icu,
    Builtin,
}

/// Version of the collation algorithm in the libraries of an ICU release, times 8; from the first major on.
const ALGORITHMS: [(u32, u32); 10] =
    [(60, 80), (62, 88), (64, 97), (66, 104), (70, 112), (72, 120), (74, 121), (76, 128), (78, 136), (79, 0)];

impl CollationProvider {
    /// `collprovider`, `datlocprovider`; `None` for `d`, the database's own.
    pub fn from_catalog(letter: &str) -> Option<Self> {
        match letter {
            "c" => Some(CollationProvider::Libc),
            "i" => Some(CollationProvider::Icu),
            "b" => Some(CollationProvider::Builtin),
            _ => None,
        }
    }
}

impl fmt::Display for CollationProvider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CollationProvider::Libc => "glibc",
            CollationProvider::Icu => "ICU",
            CollationProvider::Builtin => "PostgreSQL's own collations",
        })
    }
}

/// The version that PostgreSQL finds in the libraries of this ICU major, without what a tailored locale adds; `None` when
/// this is not known.
pub fn icu_version_of(library_major: u32) -> Option<String> {
    let (_, algorithm) = ALGORITHMS.iter().rev().find(|(since, _)| *since <= library_major)?;
    (*algorithm > 0).then(|| format!("153.{algorithm}"))
}

/// Whether two of ICU's versions mean the same algorithm.
pub fn same_icu_version(one: &str, other: &str) -> bool {
    let algorithm = |version: &str| version.split('.').take(2).map(str::to_owned).collect::<Vec<_>>();
    algorithm(one) == algorithm(other)
}

/// Whether libc sorts by bytes under this name, whatever its version.
pub fn is_bytewise(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    name == "C" || name == "POSIX" || name.starts_with("C.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_icu_are_those_that_postgresql_records() {
        assert_eq!(icu_version_of(72).as_deref(), Some("153.120"));
        assert_eq!(icu_version_of(73).as_deref(), Some("153.120"));
        assert_eq!(icu_version_of(63).as_deref(), Some("153.88"));
        assert_eq!((icu_version_of(57), icu_version_of(90)), (None, None));
        assert!(same_icu_version("153.120.42", "153.120") && !same_icu_version("153.121", "153.120"));
        assert!(is_bytewise("C.UTF-8") && !is_bytewise("cs_CZ.UTF-8"));
    }
}
