//! Merges the sorted entries with the server's sorted manifest, and makes file tables of at most 1 MiB.
//!
//! Invariants: rows rise strictly by path over all tables; every file of the manifest is a file of the tables with the same
//! length and checksum, and the other way round.

use std::collections::BTreeMap;

use tokio::sync::mpsc;

use super::error::BackupError;
use super::placer::LocalPacks;
use super::sorter::{Merge, Record, Sorter};
use crate::repository::backup_object::{FileEntry, FileKind, line};
use crate::repository::pack::{FRAME_BYTES_MAX, PackRef};

/// Bytes of a pack's reference in a table's first line, generously.
const REFERENCE_BYTES: usize = 96;
/// Differences that an error names.
const EXAMPLES_MAX: usize = 5;

/// A file table, not yet compressed.
pub struct PlainTable {
    pub first: String,
    pub files: u64,
    pub plain: Vec<u8>,
}

/// Counts of what the tables hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    pub files: u64,
    pub bytes: u64,
    /// oid → bytes of a tablespace's files, which `bytes` includes.
    pub tablespaces: BTreeMap<u32, u64>,
}

impl Counts {
    fn add(&mut self, entry: &FileEntry) {
        self.files += 1;
        self.bytes = self.bytes.saturating_add(entry.bytes);
        let inside = entry.path.strip_prefix("pg_tblspc/").and_then(|rest| rest.split('/').next());
        if let Some(oid) = inside.and_then(|oid| oid.parse().ok()) {
            let bytes = self.tablespaces.entry(oid).or_default();
            *bytes = bytes.saturating_add(entry.bytes);
        }
    }
}

/// What the tables are made of.
pub struct Sorted {
    pub entries: Sorter,
    /// `None` when the source has no manifest.
    pub manifest: Option<Sorter>,
    pub references: Vec<PackRef>,
}

impl Sorted {
    /// Sends every table to `out`. Blocks: to be called on the blocking pool.
    pub fn write(self, out: &mpsc::Sender<PlainTable>) -> Result<Counts, BackupError> {
        let folder = self.entries.folder().to_owned();
        let scratch = |source| BackupError::Scratch { folder: folder.clone(), source };
        let mut comparison = match self.manifest {
            Some(manifest) => Some(Comparison::new(manifest.merge().map_err(scratch)?).map_err(scratch)?),
            None => None,
        };
        let (mut counts, mut table, mut last) = (Counts::default(), Builder::default(), None);
        for record in self.entries.merge().map_err(scratch)? {
            let (path, value) = record.map_err(scratch)?;
            let (entry, checksum) = parse_entry(&value)?;
            if last.as_ref() == Some(&path) {
                // The server lists some directories twice, a file never.
                if entry.kind == FileKind::Directory {
                    continue;
                }
                return Err(BackupError::Unfit(format!("the server sent {} twice", entry.path)));
            }
            if let (Some(comparison), FileKind::File) = (&mut comparison, &entry.kind) {
                comparison.next(&entry, checksum).map_err(scratch)?;
            }
            counts.add(&entry);
            if let Some(full) = table.push(entry, value.len(), &self.references)? {
                out.blocking_send(full).map_err(|_| BackupError::Cancelled)?;
            }
            last = Some(path);
        }
        if let Some(comparison) = comparison {
            comparison.finish().map_err(scratch)??;
        }
        if let Some(table) = table.take() {
            out.blocking_send(table).map_err(|_| BackupError::Cancelled)?;
        }
        Ok(counts)
    }
}

fn parse_entry(value: &[u8]) -> Result<(FileEntry, &str), BackupError> {
    let wrong = || BackupError::Unfit("the sorted list of files does not read back".into());
    let end = value.iter().position(|b| *b == b'\n').ok_or_else(wrong)?;
    let (checksum, json) = value.split_at(end);
    Ok((serde_json::from_slice(json).map_err(|_| wrong())?, std::str::from_utf8(checksum).map_err(|_| wrong())?))
}

/// A table being filled.
#[derive(Default)]
struct Builder {
    packs: LocalPacks,
    rows: Vec<u8>,
    first: Option<String>,
    files: u64,
}

impl Builder {
    /// Adds an entry whose addresses hold pack numbers; gives the table before it when that has no room left.
    fn push(
        &mut self,
        mut entry: FileEntry,
        encoded_bytes: usize,
        references: &[PackRef],
    ) -> Result<Option<PlainTable>, BackupError> {
        let addresses = entry.extents.len() + entry.extent_tables.len();
        // A place can have a few digits more than the number had.
        let row_bytes = encoded_bytes + addresses * 8;
        let head_bytes = (self.packs.packs.len() + addresses) * REFERENCE_BYTES;
        let full = self.rows.len() + row_bytes + head_bytes > FRAME_BYTES_MAX;
        let before = if full { self.take() } else { None };
        let frames = entry.extents.iter_mut().map(|x| &mut x.frame).chain(entry.extent_tables.iter_mut());
        for frame in frames {
            self.packs.localize(frame, references)?;
        }
        self.rows.extend_from_slice(&line(&entry));
        self.files += 1;
        self.first.get_or_insert(entry.path);
        Ok(before)
    }

    fn take(&mut self) -> Option<PlainTable> {
        let Builder { packs, rows, first, files } = std::mem::take(self);
        let mut plain = line(&packs.packs);
        plain.extend_from_slice(&rows);
        Some(PlainTable { first: first?, files, plain })
    }
}

/// Walks the manifest beside the entries.
struct Comparison {
    manifest: Merge,
    next: Option<Record>,
    count: u64,
    examples: Vec<String>,
}

impl Comparison {
    fn new(mut manifest: Merge) -> std::io::Result<Self> {
        let next = manifest.next().transpose()?;
        Ok(Comparison { manifest, next, count: 0, examples: Vec::new() })
    }

    fn next(&mut self, entry: &FileEntry, checksum: &str) -> std::io::Result<()> {
        while let Some((path, value)) = self.next.take_if(|(path, _)| path.as_slice() <= entry.path.as_bytes()) {
            self.next = self.manifest.next().transpose()?;
            if path != entry.path.as_bytes() {
                self.differ(format!("{} did not come", String::from_utf8_lossy(&path)));
                continue;
            }
            let ours = manifest_value(entry.bytes, checksum);
            if value != ours {
                let told = |v: &[u8]| String::from_utf8_lossy(v).into_owned();
                self.differ(format!("{} came as {}, was sent as {}", entry.path, told(&ours), told(&value)));
            }
            return Ok(());
        }
        self.differ(format!("{} is not in the manifest", entry.path));
        Ok(())
    }

    fn finish(mut self) -> std::io::Result<Result<(), BackupError>> {
        while let Some((path, _)) = self.next.take() {
            self.differ(format!("{} did not come", String::from_utf8_lossy(&path)));
            self.next = self.manifest.next().transpose()?;
        }
        let Comparison { count, examples, .. } = self;
        Ok(if count == 0 { Ok(()) } else { Err(BackupError::Mismatch { count, examples }) })
    }

    fn differ(&mut self, what: String) {
        self.count += 1;
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(what);
        }
    }
}

/// A file in the sorted manifest, readable because errors quote it.
pub fn manifest_value(bytes: u64, checksum: &str) -> Vec<u8> {
    format!("{bytes} bytes with checksum {checksum}").into_bytes()
}
