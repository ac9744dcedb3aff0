//! What a backup consists of: the commit object, its file tables, the files' extents.
//!
//! The commit object is small JSON. It names *file tables*: frames of JSON Lines, each at most 1 MiB, sorted by path over
//! all tables. The first line of a table is the list of packs that its addresses use; each further line is a file. A file
//! with many extents names *extent tables* instead: frames of the same form, so that a later backup can name them again
//! while the file does not change. Addresses hold the pack's backup, number and salt, so a table is readable by itself.

use serde::{Deserialize, Serialize};

use super::layout::{BackupId, Generation};
use super::pack::{FrameRef, PackRef};
use crate::pg::{CollationProvider, Lsn, Major, SegmentSize, SystemId, TimelineId, Timestamp};

/// Most bytes of a commit object's content.
pub const COMMIT_BYTES_MAX: u64 = 256 << 20;
/// A file with more extents than this has extent tables.
pub const INLINE_EXTENTS_MAX: usize = 8;

/// The commit object: the backup exists because this does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BackupCommit {
    pub format: u32,
    pub id: BackupId,
    pub generation: String,
    pub system_id: SystemId,
    pub major: Major,
    /// As the server says it, such as `18.4`.
    pub server_version: String,
    pub segment_size: SegmentSize,
    pub timeline: TimelineId,
    /// Replay begins here (the checkpoint's redo position).
    pub start_lsn: Lsn,
    /// The cluster is consistent when replay has reached this.
    pub stop_lsn: Lsn,
    /// By the server's clock when known, else by the writer's.
    pub started_at: Timestamp,
    pub stopped_at: Timestamp,
    pub from_standby: bool,
    pub tablespaces: Vec<Tablespace>,
    pub totals: Totals,
    /// Blocks that the server found damaged while it sent them.
    pub damaged_blocks: Vec<DamagedBlock>,
    /// What lies outside the data directory, and what a host must have.
    pub surroundings: Surroundings,
    pub packs: Vec<PackEntry>,
    pub tables: TablePacks,
}

/// The packs that hold the file tables, and the tables in order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TablePacks {
    pub packs: Vec<PackRef>,
    pub tables: Vec<TableEntry>,
}

/// One file table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TableEntry {
    /// Path of its first file.
    pub first: String,
    pub files: u64,
    pub frame: FrameRef,
}

/// A pack written by this backup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PackEntry {
    pub pack: PackRef,
    pub bytes: u64,
    pub digest: crate::util::digest::Digest,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tablespace {
    pub oid: u32,
    /// Absolute, or relative to the data directory when it lies inside.
    pub path: String,
    /// Bytes of its files as restored; part of [`Totals::bytes`].
    pub bytes: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub files: u64,
    /// Bytes of the files as restored.
    pub bytes: u64,
    /// Bytes that this backup added to the store.
    pub stored_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedBlock {
    pub file: String,
    pub block: Option<u64>,
    pub message: String,
}

/// What a restored cluster needs and its data directory does not hold. Empty lists when the role may not ask.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Surroundings {
    /// Why something below is missing, one sentence each.
    pub not_readable: Vec<String>,
    pub settings: Vec<Setting>,
    /// Configuration files with their content.
    pub config_files: Vec<ConfigFile>,
    pub preload_libraries: Vec<String>,
    pub extensions: Vec<Extension>,
    pub databases: Vec<Database>,
    /// Version of the C library, and of ICU, as the server reports them for collations.
    pub libc_version: Option<String>,
    pub icu_version: Option<String>,
    /// Under which versions the text of which databases is sorted.
    pub collations: Vec<CollationUse>,
    /// Resource managers of extensions: a library of the same server registers them, and replay needs it.
    pub resource_managers: Vec<ResourceManager>,
}

/// A database whose own collation, or that of some column, is of this version.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct CollationUse {
    pub provider: CollationProvider,
    pub version: String,
    pub database: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceManager {
    pub id: u8,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    pub name: String,
    pub value: String,
    pub file: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigFile {
    pub path: String,
    pub content: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extension {
    pub database: String,
    pub name: String,
    pub version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Database {
    pub oid: u32,
    pub name: String,
    pub collate: String,
    pub collation_version: Option<String>,
}

/// Recorded before the database backup begins and before the first pack.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupIntent {
    pub id: BackupId,
    pub generation: String,
    /// The backup it builds on.
    pub base: Option<BackupId>,
    /// Timeline and position of the WAL before it: nothing from here on may be pruned.
    pub timeline: TimelineId,
    pub wal_lsn: Lsn,
    pub started_at: Timestamp,
}

impl BackupIntent {
    pub fn generation(&self) -> Option<Generation> {
        self.generation.parse().ok()
    }
}

/// What a file entry is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    #[serde(rename = "f")]
    File,
    #[serde(rename = "d")]
    Directory,
    #[serde(rename = "l")]
    Symlink,
}

/// One line of a file table. Paths are relative to the data directory; files of tablespace N lie below `pg_tblspc/N/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    #[serde(rename = "p")]
    pub path: String,
    #[serde(rename = "k")]
    pub kind: FileKind,
    /// Permission bits.
    #[serde(rename = "m")]
    pub mode: u32,
    #[serde(rename = "z", default)]
    pub bytes: u64,
    /// Seconds since 1970.
    #[serde(rename = "t", default)]
    pub modified: i64,
    /// Target of a symbolic link.
    #[serde(rename = "l", default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    #[serde(rename = "x", default, skip_serializing_if = "Vec::is_empty")]
    pub extents: Vec<Extent>,
    /// Frames that hold extent tables, in order; then `extents` is empty.
    #[serde(rename = "xt", default, skip_serializing_if = "Vec::is_empty")]
    pub extent_tables: Vec<FrameRef>,
}

/// A run of a file: `length` bytes at `offset` of the file are the bytes from `frame_offset` of the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub length: u32,
    pub frame_offset: u32,
    pub frame: FrameRef,
}

/// `[offset, length, offset in the frame, frame]`.
impl Serialize for Extent {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        (self.offset, self.length, self.frame_offset, self.frame).serialize(s)
    }
}

impl<'de> Deserialize<'de> for Extent {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let (offset, length, frame_offset, frame) = <(u64, u32, u32, FrameRef)>::deserialize(d)?;
        Ok(Extent { offset, length, frame_offset, frame })
    }
}

/// A decoded table: its packs, and its lines.
#[derive(Debug, Clone, PartialEq)]
pub struct Table<T> {
    pub packs: Vec<PackRef>,
    pub rows: Vec<T>,
}

/// Why the bytes of a frame are not a table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the table is not understood: {reason}")]
pub struct TableError {
    pub line: usize,
    pub reason: String,
}

impl<T: Serialize + for<'de> Deserialize<'de>> Table<T> {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = line(&self.packs);
        for row in &self.rows {
            out.extend_from_slice(&line(row));
        }
        out
    }

    /// # Errors
    /// [`TableError`] with the line.
    pub fn decode(bytes: &[u8]) -> Result<Table<T>, TableError> {
        let wrong = |line: usize| move |e: serde_json::Error| TableError { line: line + 1, reason: e.to_string() };
        let mut lines = bytes.split(|b| *b == b'\n').enumerate().filter(|(_, l)| !l.is_empty());
        let (_, first) = lines.next().ok_or(TableError { line: 1, reason: "the table is empty".into() })?;
        let packs = serde_json::from_slice(first).map_err(wrong(0))?;
        let rows = lines.map(|(i, l)| serde_json::from_slice(l).map_err(wrong(i))).collect::<Result<_, _>>()?;
        Ok(Table { packs, rows })
    }
}

/// One line of a table, with its end.
pub fn line(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(value).expect("table rows have only text keys");
    bytes.push(b'\n');
    bytes
}
