//! A repository with a synthetic backup and WAL in it, for tests.

pub mod sim;

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use tempfile::TempDir;

use crate::pg::{Lsn, Major, SegmentNo, SegmentSize, SystemId, TimelineId, Timestamp};
use crate::repository::backup_object::{
    BackupCommit, Extent, FileEntry, FileKind, INLINE_EXTENTS_MAX, PackEntry, Surroundings, Table, TableEntry,
    TablePacks, Tablespace, Totals, line,
};
use crate::repository::codec::Kind;
use crate::repository::crypto::MasterKey;
use crate::repository::identity::{self, Identity, KnownIncarnation};
use crate::repository::layout::{ContentHash, Key, WalRange};
use crate::repository::location::Location;
use crate::repository::pack::{CompressedFrame, FrameRef, PackBuilder, PackRef};
use crate::repository::store::{Store, StoreSettings};
use crate::repository::{BackupId, Repository, catalogue};

pub const SIZE: u64 = 1 << 20;
pub const T1: TimelineId = TimelineId(1);
pub const T2: TimelineId = TimelineId(2);
/// Small, so that a synthetic backup has several packs.
const PACK_BYTES: usize = 300_000;
const FRAME_BYTES: usize = 64 << 10;
const FILES_PER_TABLE: usize = 7;

pub struct World {
    pub dir: TempDir,
    pub repository: Repository,
    pub known: KnownIncarnation,
}

/// path → (mode, content)
pub type Files = BTreeMap<String, (u32, Vec<u8>)>;

pub fn segment_size() -> SegmentSize {
    SegmentSize::new(SIZE).expect("1 MiB")
}

/// Bytes that do not compress to nothing, with some runs of zeros.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let word = if (state >> 40).is_multiple_of(5) || (out.len() / 16_384) % 3 == 2 { 0 } else { state };
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.truncate(length);
    out
}

/// A cluster of small files, two large ones, an empty one, a tablespace.
pub fn files() -> Files {
    let mut files = Files::new();
    let mut add = |path: &str, content: Vec<u8>| files.insert(path.to_owned(), (0o600, content));
    add("PG_VERSION", b"18\n".to_vec());
    add("backup_label", b"START WAL LOCATION: 0/300028 (file 000000010000000000000003)\n".to_vec());
    add("tablespace_map", b"16500 /srv/old space\n".to_vec());
    add("global/pg_control", noise(1, 8192));
    add("base/1/1259", noise(2, 900_000));
    add("base/1/1249", noise(3, 70_001));
    add("base/1/empty", Vec::new());
    add("base/1/zeros", vec![0; 50_000]);
    add("pg_tblspc/16500/PG_18_202506291/5/1", noise(4, 100_000));
    for number in 0..40 {
        add(&format!("base/5/{}", 16_000 + number), noise(100 + number, 300 * usize::try_from(number).expect("small")));
    }
    files
}

impl World {
    pub async fn new(master: Option<&MasterKey>) -> World {
        let dir = tempfile::tempdir().expect("temporary directory");
        let location = Location::File(dir.path().join("repository"));
        let settings = StoreSettings { attempts_max: 2, ..StoreSettings::default() };
        let store = Store::open(&location, "shop", settings).expect("open");
        World::over(store, dir, master).await
    }

    /// In any store; `dir` is for what is restored.
    pub async fn over(store: Store, dir: TempDir, master: Option<&MasterKey>) -> World {
        let repository = Repository::open_or_create(store, 3, master).await.expect("create");
        let identity = Identity {
            system_id: SystemId(7),
            major: Major(18),
            segment_size: segment_size(),
            block_size: 8192,
            opened_at: Timestamp(0),
            reason: "first".into(),
        };
        let known = identity::open_next(&repository, identity).await.expect("open");
        World { dir, repository, known }
    }

    /// With a backup [3/300028, 3/400000) and WAL of timeline 1 in segments 3 to 9.
    pub async fn with_backup(master: Option<&MasterKey>) -> World {
        let world = World::new(master).await;
        world.fill().await;
        world
    }

    /// Puts a backup [3/300028, 3/400000) and WAL of timeline 1 in segments 3 to 9.
    pub async fn fill(&self) {
        for segment in 3..10 {
            self.put_segment(T1, segment).await;
        }
        self.put_backup(&files()).await;
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub async fn put_segment(&self, timeline: TimelineId, segment: u64) {
        self.put_range(timeline, segment, 0, SIZE).await;
    }

    /// Content depends on the segment alone, so that timelines agree below their switch.
    pub fn segment_content(segment: u64) -> Vec<u8> {
        noise(1000 + segment, usize::try_from(SIZE).expect("1 MiB"))
    }

    pub async fn put_range(&self, timeline: TimelineId, segment: u64, from: u64, to: u64) -> Key {
        let at = |n: u64| usize::try_from(n).expect("small");
        let content = Self::segment_content(segment)[at(from)..at(to)].to_vec();
        let hash = ContentHash::of(&self.repository.codec().digest(&content));
        let whole = (from, to) == (0, SIZE);
        let range = WalRange { timeline, segment: SegmentNo(segment), from, to, hash, whole };
        let key = Key::wal(self.known.incarnation, &range, segment_size());
        self.repository.write(&key, Kind::Wal, content.into()).await.expect("store WAL");
        key
    }

    pub async fn put_history(&self, timeline: TimelineId, text: &str) -> Key {
        let hash = ContentHash::of(&self.repository.codec().digest(text.as_bytes()));
        let key = Key::history(self.known.incarnation, timeline, hash);
        self.repository.write(&key, Kind::History, Bytes::from(text.to_owned())).await.expect("store history");
        key
    }

    pub async fn put_backup(&self, files: &Files) -> BackupCommit {
        let id: BackupId = "20261123T210000Z-000001".parse().expect("id");
        let mut packer = Packer::new(self, &id);
        let entries: Vec<FileEntry> =
            files.iter().map(|(path, (mode, content))| packer.file(path, *mode, content)).collect();
        let mut with_folders = folders(files);
        with_folders.extend(entries);
        with_folders.sort_by(|a, b| a.path.cmp(&b.path));
        let mut tables = Vec::new();
        for rows in with_folders.chunks(FILES_PER_TABLE) {
            let table = Table { packs: packer.packs.clone(), rows: rows.to_vec() }.encode();
            let frame = packer.frame(&table);
            tables.push(TableEntry { first: rows[0].path.clone(), files: rows.len() as u64, frame });
        }
        let table_packs = packer.packs.clone();
        let packs = packer.store().await;
        let bytes = files.values().map(|(_, content)| content.len() as u64).sum();
        let commit = BackupCommit {
            format: 1,
            id,
            generation: "00000001-00000001".into(),
            system_id: SystemId(7),
            major: Major(18),
            server_version: "18.4".into(),
            segment_size: segment_size(),
            timeline: T1,
            start_lsn: Lsn(0x30_0028),
            stop_lsn: Lsn(0x40_0000),
            started_at: Timestamp(0),
            stopped_at: Timestamp(1),
            from_standby: false,
            tablespaces: vec![Tablespace { oid: 16500, path: "/srv/old space".into(), bytes: 100_000 }],
            totals: Totals { files: files.len() as u64, bytes, stored_bytes: 0 },
            damaged_blocks: Vec::new(),
            surroundings: Surroundings::default(),
            packs,
            tables: TablePacks { packs: table_packs, tables },
        };
        catalogue::commit_backup(&self.repository, self.known.incarnation, &commit).await.expect("commit");
        commit
    }
}

fn folders(files: &Files) -> Vec<FileEntry> {
    let mut names: Vec<String> = ["base", "global", "pg_wal", "pg_tblspc"].map(String::from).to_vec();
    names.extend(files.keys().filter_map(|path| path.rsplit_once('/').map(|(folder, _)| folder.to_owned())));
    names.sort();
    names.dedup();
    names.into_iter().map(|path| entry(path, FileKind::Directory, 0o700, 0)).collect()
}

fn entry(path: String, kind: FileKind, mode: u32, bytes: u64) -> FileEntry {
    FileEntry { path, kind, mode, bytes, modified: 0, target: None, extents: Vec::new(), extent_tables: Vec::new() }
}

/// Packs in a simple way: a small file shares its frame with others, a large one has many.
struct Packer<'a> {
    world: &'a World,
    id: BackupId,
    builder: PackBuilder,
    finished: Vec<PackBuilder>,
    packs: Vec<PackRef>,
}

impl<'a> Packer<'a> {
    fn new(world: &'a World, id: &BackupId) -> Self {
        let builder = PackBuilder::new(world.repository.codec(), world.known.incarnation, id, 0);
        let packs = vec![builder.reference().clone()];
        Packer { world, id: id.clone(), builder, finished: Vec::new(), packs }
    }

    fn frame(&mut self, plain: &[u8]) -> FrameRef {
        let codec = self.world.repository.codec();
        let frame = CompressedFrame::make(codec, plain).expect("compress");
        let number = u32::try_from(self.finished.len()).expect("few");
        let address = self.builder.add(frame, number);
        if address.offset > PACK_BYTES as u64 {
            let next = PackBuilder::new(codec, self.world.known.incarnation, &self.id, number + 1);
            self.packs.push(next.reference().clone());
            self.finished.push(std::mem::replace(&mut self.builder, next));
        }
        address
    }

    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> FileEntry {
        let mut file = entry(path.to_owned(), FileKind::File, mode, content.len() as u64);
        let mut offset = 0;
        for plain in content.chunks(FRAME_BYTES) {
            let length = u32::try_from(plain.len()).expect("a frame");
            if plain.iter().any(|b| *b != 0) {
                // Some frames begin with bytes of another file.
                let padding = usize::from(length < 5000) * 33;
                let frame = self.frame(&[vec![7u8; padding].as_slice(), plain].concat());
                let frame_offset = u32::try_from(padding).expect("small");
                file.extents.push(Extent { offset, length, frame_offset, frame });
            }
            offset += u64::from(length);
        }
        if file.extents.len() > INLINE_EXTENTS_MAX {
            for extents in std::mem::take(&mut file.extents).chunks(5) {
                let rows: Vec<u8> = extents.iter().flat_map(line).collect();
                let table = [line(&self.packs), rows].concat();
                let frame = self.frame(&table);
                file.extent_tables.push(frame);
            }
        }
        file
    }

    async fn store(mut self) -> Vec<PackEntry> {
        self.finished.push(self.builder);
        let mut entries = Vec::new();
        for builder in self.finished {
            let pack = builder.finish(self.world.repository.codec());
            entries.push(PackEntry { pack: pack.reference, bytes: pack.bytes.len() as u64, digest: pack.digest });
            self.world.repository.store().put(&pack.key, pack.bytes).await.expect("store pack");
        }
        entries
    }
}
