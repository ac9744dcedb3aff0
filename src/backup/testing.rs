//! A source of made-up files, and what the tests read back.

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;

use super::source::{ChecksumKind, Event, Meta, Source, SourceEnd, SourceError, SourcePosition, SourceStart};
use crate::pg::{Lsn, SegmentSize, SystemId, TimelineId};
use crate::repository::backup_object::{Extent, FileEntry, FileKind, Table, TablePacks};
use crate::repository::pack::{FrameRef, PackRef, read_frame};
use crate::repository::store::StoreSettings;
use crate::repository::{Incarnation, Location, Repository, Store};
use crate::util::digest::{Digest, hex};

pub const INCARNATION: Incarnation = Incarnation { ordinal: 1, system_id: SystemId(7_012_345_678_901_234_567) };
pub const START: Lsn = Lsn(0x200_0028);
pub const STOP: Lsn = Lsn(0x200_0138);
pub const TIMELINE: TimelineId = TimelineId(1);
/// Longest piece of data in one event.
const PIECE: usize = 300_001;

/// One made-up file: its path and its content.
pub type File = (String, Vec<u8>);
type Make = Box<dyn Fn(u64) -> Option<File> + Send + Sync>;

/// Sends files made by their number, then a manifest that is made by making them again.
pub struct MadeSource {
    make: Make,
    checksums: Option<ChecksumKind>,
    number: u64,
    step: Step,
    /// Path whose checksum the manifest has wrong.
    pub wrong: Option<String>,
    /// Fails instead of sending the file of this number.
    pub cut_at: Option<u64>,
    manifest: Vec<u8>,
    digest: crate::util::digest::Hasher,
}

enum Step {
    Begin,
    Data(Bytes),
    EndFile,
    Manifest(u64),
    End,
}

impl MadeSource {
    pub fn new(checksums: Option<ChecksumKind>, make: impl Fn(u64) -> Option<File> + Send + Sync + 'static) -> Self {
        let digest = crate::util::digest::Hasher::sha256();
        let (make, manifest): (Make, _) = (Box::new(make), Vec::new());
        MadeSource { make, checksums, number: 0, step: Step::Begin, wrong: None, cut_at: None, manifest, digest }
    }

    pub fn of(files: Vec<File>) -> Self {
        Self::new(Some(ChecksumKind::Crc32c), move |n| files.get(usize::try_from(n).ok()?).cloned())
    }

    fn begin_file(&mut self) -> Result<Event, SourceError> {
        if self.cut_at == Some(self.number) {
            let source = std::io::ErrorKind::ConnectionReset.into();
            return Err(SourceError::Io { path: "the connection".into(), source });
        }
        let Some((path, content)) = (self.make)(self.number) else {
            self.step = if self.checksums.is_some() { Step::Manifest(0) } else { Step::End };
            return Ok(Event::Directory(meta("pg_wal", 0)));
        };
        self.number += 1;
        if path.ends_with('/') {
            return Ok(Event::Directory(meta(path.trim_end_matches('/'), 0)));
        }
        let event = Event::File(meta(&path, content.len() as u64));
        self.step = Step::Data(content.into());
        Ok(event)
    }

    fn manifest_piece(&mut self, number: u64) -> Event {
        self.manifest.clear();
        if number == 0 {
            self.manifest.extend_from_slice(b"{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n");
        }
        let file = (self.make)(number);
        self.step = match &file {
            Some(_) => Step::Manifest(number + 1),
            None => Step::End,
        };
        match file {
            Some((path, _)) if path.ends_with('/') => {}
            Some((path, content)) => {
                let mut checksum = match self.checksums {
                    Some(ChecksumKind::Sha256) => Digest::sha256(&content).to_string(),
                    _ => hex(&crc32c::crc32c(&content).to_le_bytes()),
                };
                if self.wrong.as_ref() == Some(&path) {
                    checksum.replace_range(0..1, "z");
                }
                let line =
                    format!("{{ \"Path\": {path:?}, \"Size\": {}, \"Checksum\": \"{checksum}\" }},\n", content.len());
                self.manifest.extend_from_slice(line.as_bytes());
            }
            None => {
                let range = format!("{{ \"Timeline\": 1, \"Start-LSN\": \"{START}\", \"End-LSN\": \"{STOP}\" }}\n],\n");
                self.manifest.extend_from_slice(format!("],\n\"WAL-Ranges\": [\n{range}").as_bytes());
            }
        }
        self.digest.update(&self.manifest);
        if matches!(self.step, Step::End) {
            let last = format!("\"Manifest-Checksum\": \"{}\"}}\n", self.digest.clone().finish());
            self.manifest.extend_from_slice(last.as_bytes());
        }
        Event::Manifest(Bytes::copy_from_slice(&self.manifest))
    }
}

pub fn start(checksums: Option<ChecksumKind>) -> SourceStart {
    SourceStart { timeline: TIMELINE, start_lsn: START, tablespaces: Vec::new(), bytes_estimate: None, checksums }
}

fn meta(path: &str, bytes: u64) -> Meta {
    Meta { path: path.to_owned(), mode: 0o600, modified: 1_795_000_000, bytes }
}

#[async_trait]
impl Source for MadeSource {
    async fn position(&mut self) -> Result<SourcePosition, SourceError> {
        Ok(SourcePosition { timeline: TIMELINE, lsn: Lsn(0x200_0000), from_standby: false })
    }

    async fn begin(&mut self) -> Result<SourceStart, SourceError> {
        Ok(start(self.checksums))
    }

    async fn next(&mut self) -> Result<Event, SourceError> {
        match std::mem::replace(&mut self.step, Step::Begin) {
            Step::Begin => self.begin_file(),
            Step::Data(content) if content.is_empty() => Ok(Event::FileEnd),
            Step::Data(mut content) => {
                let piece = content.split_to(content.len().min(PIECE));
                self.step = if content.is_empty() { Step::EndFile } else { Step::Data(content) };
                Ok(Event::Data(piece))
            }
            Step::EndFile => Ok(Event::FileEnd),
            Step::Manifest(number) => Ok(self.manifest_piece(number)),
            Step::End => Ok(Event::End(Some(SourceEnd { timeline: TIMELINE, stop_lsn: STOP }))),
        }
    }
}

/// `backup_label` and `global/pg_control` as the checks of a backup want them.
pub fn system_files() -> Vec<File> {
    let label = format!(
        "START WAL LOCATION: {START} (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000080\n\
        BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-23 21:00:00 UTC\nLABEL: x\nSTART TIMELINE: 1\n"
    );
    let mut control = vec![0; 8192];
    let mut put = |offset: usize, value: &[u8]| control[offset..offset + value.len()].copy_from_slice(value);
    put(0, &INCARNATION.system_id.0.to_le_bytes());
    put(8, &1800u32.to_le_bytes());
    put(12, &202_506_291u32.to_le_bytes());
    put(228, &u32::try_from(SegmentSize::MIB_16.bytes()).expect("small").to_le_bytes());
    let crc = crc32c::crc32c(&control[..292]);
    control[292..296].copy_from_slice(&crc.to_le_bytes());
    vec![("backup_label".into(), label.into_bytes()), ("global/pg_control".into(), control)]
}

pub async fn repository(folder: &std::path::Path, encrypted: bool) -> Repository {
    let location = Location::File(folder.to_owned());
    let store = Store::open(&location, "shop", StoreSettings::default()).expect("open");
    let master = encrypted.then(|| crate::repository::crypto::MasterKey::new([5; 32]));
    Repository::open_or_create(store, 1, master.as_ref()).await.expect("a new repository")
}

/// The entries of all tables in order, and the files' bytes; checks the order and the counts.
pub async fn read_back(repository: &Repository, tables: &TablePacks) -> (Vec<FileEntry>, BTreeMap<String, Vec<u8>>) {
    let (mut entries, mut contents) = (Vec::<FileEntry>::new(), BTreeMap::new());
    for entry in &tables.tables {
        let plain = frame(repository, &tables.packs, &entry.frame).await;
        assert!(plain.len() <= 1 << 20);
        let table: Table<FileEntry> = Table::decode(&plain).expect("a table");
        assert_eq!((table.rows.len() as u64, &table.rows[0].path), (entry.files, &entry.first));
        for file in table.rows {
            assert!(entries.last().is_none_or(|last| last.path < file.path), "{} is in order", file.path);
            if file.kind == FileKind::File {
                contents.insert(file.path.clone(), content(repository, &table.packs, &file).await);
            }
            entries.push(file);
        }
    }
    (entries, contents)
}

async fn content(repository: &Repository, packs: &[PackRef], file: &FileEntry) -> Vec<u8> {
    let mut bytes = Vec::new();
    add_extents(repository, packs, &file.extents, &mut bytes).await;
    for address in &file.extent_tables {
        let plain = frame(repository, packs, address).await;
        let table: Table<Extent> = Table::decode(&plain).expect("an extent table");
        add_extents(repository, &table.packs, &table.rows, &mut bytes).await;
    }
    assert_eq!(bytes.len() as u64, file.bytes, "extents tile {}", file.path);
    bytes
}

async fn add_extents(repository: &Repository, packs: &[PackRef], extents: &[Extent], bytes: &mut Vec<u8>) {
    for extent in extents {
        assert_eq!(extent.offset, bytes.len() as u64, "extents follow each other");
        let plain = frame(repository, packs, &extent.frame).await;
        let from = extent.frame_offset as usize;
        bytes.extend_from_slice(&plain[from..from + extent.length as usize]);
    }
}

async fn frame(repository: &Repository, packs: &[PackRef], address: &FrameRef) -> Bytes {
    let pack = &packs[usize::try_from(address.pack).expect("small")];
    read_frame(repository, INCARNATION, pack, address).await.expect("a frame")
}
