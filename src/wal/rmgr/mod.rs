//! Resource managers: who wrote a record, and what a few of them write.
//!
//! Source: `src/include/access/rmgrlist.h`; the numbers are the same in 14–18.

use std::fmt;

pub mod tblspc;
pub mod xact;
pub mod xlog;

/// The number of a resource manager.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rmgr(pub u8);

const NAMES: [&str; 22] = [
    "XLOG",
    "Transaction",
    "Storage",
    "CLOG",
    "Database",
    "Tablespace",
    "MultiXact",
    "RelMap",
    "Standby",
    "Heap2",
    "Heap",
    "Btree",
    "Hash",
    "Gin",
    "Gist",
    "Sequence",
    "SPGist",
    "BRIN",
    "CommitTs",
    "ReplicationOrigin",
    "Generic",
    "LogicalMessage",
];

impl Rmgr {
    pub const XLOG: Rmgr = Rmgr(0);
    pub const XACT: Rmgr = Rmgr(1);
    pub const TBLSPC: Rmgr = Rmgr(5);

    /// The name that `pg_waldump` prints; `None` for one that no version up to 18 has built in.
    pub fn name(self) -> Option<&'static str> {
        NAMES.get(usize::from(self.0)).copied()
    }

    /// Neither built in nor in the range of extensions (128–255): what its records do cannot be known.
    pub fn is_unknown(self) -> bool {
        self.name().is_none() && self.0 < 128
    }
}

impl fmt::Display for Rmgr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "resource manager {}", self.0),
        }
    }
}

impl fmt::Debug for Rmgr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The main data of a record is not what its operation must carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the data of a {0} record is not of the known form")]
pub struct PayloadError(pub &'static str);
