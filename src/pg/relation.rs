//! Relations and the files that hold them.
//!
//! Source: `src/common/relpath.c` (`GetRelationPath`, `parse_filename_for_nontemp_relation` of 17), 14–18. A fork is cut
//! into files of `relation_segment_blocks` blocks: the first has no number, the next ones `.1`, `.2` …

use std::fmt;

/// `DEFAULTTABLESPACE_OID`: `base/`.
pub const DEFAULT_TABLESPACE: u32 = 1663;

/// `GLOBALTABLESPACE_OID`: `global/`, whose relations belong to database 0.
pub const GLOBAL_TABLESPACE: u32 = 1664;

/// Where a relation lies: tablespace, database, file node (`RelFileLocator`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelFileLocator {
    pub tablespace: u32,
    /// 0 for relations that all databases share.
    pub database: u32,
    pub relation: u32,
}

/// The forks of a relation (`ForkNumber`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ForkNumber {
    Main,
    FreeSpace,
    Visibility,
    /// Of unlogged relations: what they become after a crash.
    Init,
}

/// One file of a fork of a relation, by its path below the data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelationFile {
    pub locator: RelFileLocator,
    pub fork: ForkNumber,
    /// The number after the dot; 0 for the first file.
    pub segment: u32,
    /// Set for a temporary relation: the backend that owns it.
    pub backend: Option<u32>,
}

impl ForkNumber {
    /// As records of the write-ahead log number them.
    pub fn from_number(number: u8) -> Option<ForkNumber> {
        match number {
            0 => Some(ForkNumber::Main),
            1 => Some(ForkNumber::FreeSpace),
            2 => Some(ForkNumber::Visibility),
            3 => Some(ForkNumber::Init),
            _ => None,
        }
    }

    /// What follows the file node in a file name.
    pub fn suffix(self) -> &'static str {
        match self {
            ForkNumber::Main => "",
            ForkNumber::FreeSpace => "_fsm",
            ForkNumber::Visibility => "_vm",
            ForkNumber::Init => "_init",
        }
    }

    fn from_suffix(text: &str) -> Option<ForkNumber> {
        match text {
            "fsm" => Some(ForkNumber::FreeSpace),
            "vm" => Some(ForkNumber::Visibility),
            "init" => Some(ForkNumber::Init),
            _ => None,
        }
    }
}

impl RelationFile {
    /// Parses a path below the data directory, such as `base/5/16384_vm.2`, `global/1260`,
    /// `pg_tblspc/16400/PG_18_202506291/5/16401`. `None` for every file that is not part of a relation.
    pub fn parse(path: &str) -> Option<RelationFile> {
        let parts: Vec<&str> = path.split('/').collect();
        let (tablespace, database, name) = match parts.as_slice() {
            ["base", database, name] => (DEFAULT_TABLESPACE, number(database)?, name),
            ["global", name] => (GLOBAL_TABLESPACE, 0, name),
            ["pg_tblspc", tablespace, version, database, name] if version.starts_with("PG_") => {
                (number(tablespace)?, number(database)?, name)
            }
            _ => return None,
        };
        let (backend, name) = match name.strip_prefix('t') {
            Some(rest) => {
                let (backend, name) = rest.split_once('_')?;
                (Some(plain_number(backend)?), name)
            }
            None => (None, *name),
        };
        let (stem, segment) = match name.split_once('.') {
            Some((stem, segment)) => (stem, number(segment)?),
            None => (name, 0),
        };
        let (relation, fork) = match stem.split_once('_') {
            Some((relation, fork)) => (relation, ForkNumber::from_suffix(fork)?),
            None => (stem, ForkNumber::Main),
        };
        let locator = RelFileLocator { tablespace, database, relation: number(relation)? };
        Some(RelationFile { locator, fork, segment, backend })
    }

    /// The number, within the fork, of this file's first block.
    pub fn first_block(&self, relation_segment_blocks: u32) -> Option<u32> {
        self.segment.checked_mul(relation_segment_blocks)
    }
}

impl fmt::Display for RelFileLocator {
    /// `tablespace/database/relation`, as `pg_waldump` prints it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.tablespace, self.database, self.relation)
    }
}

/// A decimal number without sign or leading zero, not 0.
fn number(text: &str) -> Option<u32> {
    plain_number(text).filter(|n| *n != 0 && !text.starts_with('0'))
}

fn plain_number(text: &str) -> Option<u32> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(path: &str, expected: Option<(&str, ForkNumber, u32)>) {
        let found = RelationFile::parse(path);
        let found = found.map(|file| (file.locator.to_string(), file.fork, file.segment));
        assert_eq!(found.as_ref().map(|(l, f, s)| (l.as_str(), *f, *s)), expected, "{path}");
    }

    #[test]
    fn paths_of_relations() {
        check("base/5/16384", Some(("1663/5/16384", ForkNumber::Main, 0)));
        check("base/5/16384_vm.2", Some(("1663/5/16384", ForkNumber::Visibility, 2)));
        check("base/5/16384_fsm", Some(("1663/5/16384", ForkNumber::FreeSpace, 0)));
        check("base/5/16384_init", Some(("1663/5/16384", ForkNumber::Init, 0)));
        check("global/1260", Some(("1664/0/1260", ForkNumber::Main, 0)));
        check("pg_tblspc/16400/PG_18_202506291/5/16401.1", Some(("16400/5/16401", ForkNumber::Main, 1)));
        check("base/5/t3_16390", Some(("1663/5/16390", ForkNumber::Main, 0)));
        assert_eq!(RelationFile::parse("base/5/t3_16390_fsm").and_then(|f| f.backend), Some(3));
    }

    #[test]
    fn other_files() {
        for path in [
            "base/5/PG_VERSION",
            "base/5/pg_filenode.map",
            "base/5/pg_internal.init",
            "base/5/16384_xx",
            "base/5/16384.0",
            "base/5/016384",
            "base/5/0",
            "base/pgsql_tmp/pgsql_tmp1.0",
            "global/pg_control",
            "pg_wal/000000010000000000000001",
            "pg_tblspc/16400/5/16401",
            "base/5/99999999999",
            "base//1",
            "",
        ] {
            check(path, None);
        }
    }

    #[test]
    fn blocks_are_counted_over_the_fork() {
        let file = RelationFile::parse("base/5/16384.3").expect("a relation");
        assert_eq!(file.first_block(131_072), Some(393_216));
        assert_eq!(file.first_block(u32::MAX), None);
    }

    proptest! {
        #[test]
        fn a_path_made_of_parts_gives_the_parts_back(database in 1u32.., relation in 1u32.., segment in 0u32.., fork in 0u8..4) {
            let fork = ForkNumber::from_number(fork).expect("one of four");
            let tail = if segment == 0 { String::new() } else { format!(".{segment}") };
            let file = RelationFile::parse(&format!("base/{database}/{relation}{}{tail}", fork.suffix()));
            let locator = RelFileLocator { tablespace: DEFAULT_TABLESPACE, database, relation };
            prop_assert_eq!(file, Some(RelationFile { locator, fork, segment, backend: None }));
        }
    }
}
