mod calls_tests;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use tokio_util::sync::CancellationToken;

use super::full::{BackupSettings, Collaborators, FullBackup, ProgressSender};
use super::packer::{PackSettings, Packed, pack};
use super::packs::Destination;
use super::source::ChecksumKind;
use super::testing::*;
use super::*;
use crate::pg::{Lsn, Major, SegmentSize, TimelineId, Timestamp};
use crate::repository::backup_object::FileKind;
use crate::repository::layout::BackupMark;
use crate::repository::{BackupId, Generation, Repository, catalogue, generation};

fn settings(scratch: &Path) -> PackSettings {
    PackSettings { threads: 2, uploads_max: 3, scratch: scratch.to_owned() }
}

async fn pack_into(repository: &Repository, source: &mut MadeSource, scratch: &Path) -> Result<Packed, BackupError> {
    let id = BackupId::new(Timestamp::from_unix_seconds(1_795_000_000), 1);
    let to = Destination { repository: repository.clone(), incarnation: INCARNATION, id };
    let start = source.begin().await?;
    pack(source, &start, to, &settings(scratch), &ProgressSender::default()).await
}

/// Half repeated, half random, so that packs fill without a test of hours.
fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut random = rand::rngs::SmallRng::seed_from_u64(seed);
    let mut bytes = vec![7; length];
    random.fill(&mut bytes[length / 2..]);
    bytes
}

async fn check_round_trip(sizes: &[usize], encrypted: bool) {
    let folder = tempfile::tempdir().expect("temporary directory");
    let repository = repository(&folder.path().join("store"), encrypted).await;
    let name = |i: usize| format!("base/{}/{:04}", i % 3, sizes.len() - i);
    let files: Vec<File> = sizes.iter().enumerate().map(|(i, s)| (name(i), content(i as u64, *s))).collect();
    let packed = pack_into(&repository, &mut MadeSource::of(files.clone()), folder.path()).await.expect("packed");
    let (entries, contents) = read_back(&repository, &packed.tables).await;
    assert!(contents == files.iter().cloned().collect(), "the same bytes under the same names");
    assert_eq!(entries.iter().filter(|e| e.kind == FileKind::Directory).count(), 1);
    assert_eq!(packed.counts.bytes, sizes.iter().map(|s| *s as u64).sum::<u64>());
    assert_eq!(packed.counts.files, sizes.len() as u64 + 1);
    for entry in &packed.packs {
        let key = crate::repository::Key::pack(INCARNATION, &entry.pack.backup, entry.pack.number);
        let bytes = repository.store().get(&key, 64 << 20).await.expect("the pack");
        let (header, body) =
            repository.codec().open_header(crate::repository::codec::Kind::Pack, &bytes).expect("header");
        assert_eq!((bytes.len() as u64, header.digest), (entry.bytes, entry.digest));
        assert_eq!(repository.codec().digest(body), entry.digest);
    }
}

#[tokio::test]
async fn files_of_all_sizes_come_back() {
    const MIB: usize = 1 << 20;
    let sizes = [0, 1, 8192, MIB - 1, MIB, MIB + 1, 5 * MIB, 0, 300, 12 * MIB + 77, 8192];
    check_round_trip(&sizes, false).await;
    check_round_trip(&sizes, true).await;
}

#[test]
fn any_mixture_of_sizes_comes_back() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    let size = prop_oneof![0usize..3, 0usize..10_000, 0usize..400_000, 900_000usize..1_200_000];
    proptest!(ProptestConfig::with_cases(12), |(sizes in prop::collection::vec(size, 0..25), encrypted: bool)| {
        runtime.block_on(check_round_trip(&sizes, encrypted));
    });
}

#[tokio::test]
async fn an_extent_table_is_written_for_a_file_of_many_frames() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let repository = repository(&folder.path().join("store"), false).await;
    let zeros = vec![0; 40 << 20];
    let files = vec![("base/1/1".to_owned(), zeros.clone()), ("base/1/1.1".to_owned(), vec![1; 8 << 20])];
    let packed = pack_into(&repository, &mut MadeSource::of(files), folder.path()).await.expect("packed");
    let (entries, contents) = read_back(&repository, &packed.tables).await;
    assert_eq!((entries[0].extents.len(), entries[0].extent_tables.len()), (0, 1));
    assert_eq!((entries[1].extents.len(), entries[1].extent_tables.len()), (8, 0));
    assert!(contents["base/1/1"] == zeros);
}

#[tokio::test]
async fn a_file_that_differs_from_the_manifest_is_named() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let repository = repository(&folder.path().join("store"), false).await;
    for checksums in [ChecksumKind::Crc32c, ChecksumKind::Sha256] {
        let make = |n: u64| (n < 50).then(|| (format!("f{n}"), content(n, 100)));
        let mut source = MadeSource::new(Some(checksums), make);
        pack_into(&repository, &mut source, folder.path()).await.expect("all is well");
        let mut source = MadeSource::new(Some(checksums), make);
        source.wrong = Some("f31".into());
        let error = pack_into(&repository, &mut source, folder.path()).await.err().expect("noticed");
        assert!(
            matches!(&error, BackupError::Mismatch { count: 1, examples } if examples[0].starts_with("f31 ")),
            "{error}"
        );
    }
}

/// Peak resident memory of this process in MiB.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find(|l| l.starts_with("VmHWM")).expect("VmHWM");
    line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).expect("a number") / 1024
}

/// Alone in a process `PGRECALL_SLOW=1 cargo test --lib a_list_of_files` shows the bound for a million files.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_files_of_any_length_needs_bounded_memory() {
    let slow = std::env::var_os("PGRECALL_SLOW").is_some();
    let count: u64 = if slow { 1_000_000 } else { 20_000 };
    let folder = tempfile::tempdir().expect("temporary directory");
    let repository = repository(&folder.path().join("store"), false).await;
    // Neither the order of names nor of anything else.
    let make =
        move |n: u64| (n < count).then(|| (format!("base/16384/{}", n * 7919 % count), n.to_le_bytes().to_vec()));
    let mut source = MadeSource::new(Some(ChecksumKind::Crc32c), make);
    let packed = pack_into(&repository, &mut source, folder.path()).await.expect("packed");
    assert_eq!(packed.counts.files, count + 1);
    assert_eq!(packed.tables.tables.iter().map(|t| t.files).sum::<u64>(), count + 1);
    if slow {
        assert!(peak_mib() <= 256, "{} MiB", peak_mib());
    } else {
        assert_eq!(read_back(&repository, &packed.tables).await.1.len() as u64, count);
    }
}

struct Wal {
    covers: bool,
    asked: AtomicBool,
}

#[async_trait::async_trait]
impl StoredWal for Wal {
    async fn covers(&self, timeline: TimelineId, lsn: Lsn) -> anyhow::Result<bool> {
        assert_eq!((timeline, lsn), (TIMELINE, START));
        Ok(self.covers)
    }

    async fn wait_stored(&self, timeline: TimelineId, start_lsn: Lsn, stop_lsn: Lsn) -> anyhow::Result<()> {
        assert_eq!((timeline, start_lsn, stop_lsn), (TIMELINE, START, STOP));
        self.asked.store(true, Ordering::SeqCst);
        Ok(())
    }
}

struct Bench {
    _folder: tempfile::TempDir,
    repository: Repository,
    generation: Generation,
    wal: Wal,
    scratch: PathBuf,
}

impl Bench {
    async fn new() -> Self {
        let folder = tempfile::tempdir().expect("temporary directory");
        let repository = repository(&folder.path().join("store"), false).await;
        let generation = take_generation(&repository).await;
        let (wal, scratch) = (Wal { covers: true, asked: AtomicBool::new(false) }, folder.path().to_owned());
        Bench { _folder: folder, repository, generation, wal, scratch }
    }

    async fn run(&self, source: &mut dyn Source, cancel: CancellationToken) -> Result<BackupReport, BackupError> {
        let job = FullBackup {
            repository: self.repository.clone(),
            incarnation: INCARNATION,
            generation: self.generation,
            major: Major(18),
            server_version: "18.4".into(),
            segment_size: SegmentSize::MIB_16,
            settings: BackupSettings { scratch: self.scratch.clone(), ..BackupSettings::default() },
        };
        let progress = ProgressSender::default();
        job.run(Collaborators { source, wal: &self.wal, facts: None, progress, cancel }).await
    }

    async fn marks(&self) -> Vec<BackupMark> {
        let listed = catalogue::list_backup_marks(&self.repository, INCARNATION).await.expect("listing");
        assert!(listed.len() <= 1);
        listed.into_iter().flat_map(|m| m.marks).collect()
    }
}

async fn take_generation(repository: &Repository) -> Generation {
    let lease =
        generation::Lease { host: "h".into(), pid: 1, started_at: Timestamp(0), version: "1".into(), store: None };
    generation::take(repository, &lease).await.expect("a generation")
}

fn cluster() -> MadeSource {
    let mut files = system_files();
    files.extend((0..20).map(|n| (format!("base/5/{n}"), content(n, 100_000))));
    MadeSource::of(files)
}

#[tokio::test]
async fn a_backup_is_visible_when_its_wal_is_stored() {
    let bench = Bench::new().await;
    let report = bench.run(&mut cluster(), CancellationToken::new()).await.expect("a backup");
    assert!(bench.wal.asked.load(Ordering::SeqCst));
    let listed = catalogue::list_backups(&bench.repository, INCARNATION).await.expect("listing");
    assert_eq!(listed, std::slice::from_ref(&report.commit));
    let (_, contents) = read_back(&bench.repository, &report.commit.tables).await;
    assert_eq!((contents.len(), report.commit.totals.files), (22, 23));
    assert_eq!((report.commit.start_lsn, report.commit.stop_lsn), (START, STOP));
}

#[tokio::test]
async fn a_superseded_writer_commits_nothing() {
    let bench = Bench::new().await;
    take_generation(&bench.repository).await;
    let error = bench.run(&mut cluster(), CancellationToken::new()).await.expect_err("superseded");
    assert!(matches!(error, BackupError::Superseded { .. }), "{error}");
    assert_eq!(bench.marks().await, []);
}

/// Does something to the repository after the last file was read, before the commit.
struct Meddling<'a> {
    source: MadeSource,
    repository: &'a Repository,
    how: Meddle,
}

enum Meddle {
    TakeOver,
    Drop,
}

#[async_trait::async_trait]
impl Source for Meddling<'_> {
    async fn position(&mut self) -> Result<SourcePosition, SourceError> {
        self.source.position().await
    }

    async fn begin(&mut self) -> Result<SourceStart, SourceError> {
        self.source.begin().await
    }

    async fn next(&mut self) -> Result<Event, SourceError> {
        let event = self.source.next().await?;
        if matches!(event, Event::End(_)) {
            match self.how {
                Meddle::TakeOver => drop(take_generation(self.repository).await),
                Meddle::Drop => {
                    let marks = catalogue::list_backup_marks(self.repository, INCARNATION).await.expect("listing");
                    let key = crate::repository::Key::backup(INCARNATION, &marks[0].id, &BackupMark::Dropped);
                    let kind = crate::repository::codec::Kind::Mark;
                    self.repository.write_fact(&key, kind, &"dropped").await.expect("a mark");
                }
            }
        }
        Ok(event)
    }
}

#[tokio::test]
async fn who_loses_the_repository_while_copying_commits_nothing() {
    let bench = Bench::new().await;
    let repository = &bench.repository;
    let mut source = Meddling { source: cluster(), repository, how: Meddle::Drop };
    let error = bench.run(&mut source, CancellationToken::new()).await.expect_err("dropped");
    assert!(matches!(error, BackupError::Dropped { .. }), "{error}");
    assert!(!bench.marks().await.contains(&BackupMark::Commit));

    let bench = Bench::new().await;
    let mut source = Meddling { source: cluster(), repository: &bench.repository, how: Meddle::TakeOver };
    let error = bench.run(&mut source, CancellationToken::new()).await.expect_err("superseded");
    assert!(matches!(error, BackupError::Superseded { .. }), "{error}");
    assert_eq!(bench.marks().await, [BackupMark::Intent]);
}

#[tokio::test]
async fn a_start_outside_the_stored_wal_is_refused_before_the_first_pack() {
    let mut bench = Bench::new().await;
    bench.wal.covers = false;
    let error = bench.run(&mut cluster(), CancellationToken::new()).await.expect_err("refused");
    assert!(matches!(error, BackupError::StartNotStored { start_lsn: START, .. }), "{error}");
    assert!(error.hint().is_some());
    assert_eq!(bench.marks().await, [BackupMark::Intent]);
    let prefix = crate::repository::layout::prefix::packs(INCARNATION);
    assert_eq!(bench.repository.store().list(&prefix).await.expect("listing"), []);
}

#[tokio::test]
async fn a_cancelled_or_cut_backup_leaves_nothing_visible() {
    let bench = Bench::new().await;
    let mut source = cluster();
    source.cut_at = Some(15);
    let error = bench.run(&mut source, CancellationToken::new()).await.expect_err("cut");
    assert!(matches!(error, BackupError::Source(_)), "{error}");
    assert_eq!(bench.marks().await, [BackupMark::Intent]);

    let bench = Bench::new().await;
    let cancel = CancellationToken::new();
    cancel.cancel();
    let error = bench.run(&mut cluster(), cancel).await.expect_err("cancelled");
    assert!(matches!(error, BackupError::Cancelled), "{error}");
    assert!(!bench.marks().await.contains(&BackupMark::Commit));
}

#[tokio::test]
async fn a_copy_of_another_cluster_or_without_its_label_is_refused() {
    for (index, text) in [(0, "backup_label did not come"), (1, "global/pg_control did not come")] {
        let bench = Bench::new().await;
        let mut files = system_files();
        files.remove(index);
        let error = bench.run(&mut MadeSource::of(files), CancellationToken::new()).await.expect_err("refused");
        assert_eq!(error.to_string(), text);
    }
    let bench = Bench::new().await;
    let mut files = system_files();
    files[1].1[0] ^= 1;
    let crc = crc32c::crc32c(&files[1].1[..292]);
    files[1].1[292..296].copy_from_slice(&crc.to_le_bytes());
    let error = bench.run(&mut MadeSource::of(files), CancellationToken::new()).await.expect_err("refused");
    assert!(error.to_string().contains("belongs to cluster"), "{error}");
    assert_eq!(bench.marks().await, [BackupMark::Intent]);
}
