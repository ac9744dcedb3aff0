//! A restore from the repository alone, on real PostgreSQL: exactly the commits before the target come back.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pgrecall::instance::Postmaster;
use pgrecall::operations::restore::{Check, Observer, RestoreReport, RestoreRequest, execute};
use pgrecall::pg::{Lsn, Major, SegmentName, SegmentSize, TimelineId, Timestamp};
use pgrecall::repository::backup_object::{
    BackupCommit, Extent, FileEntry, FileKind, INLINE_EXTENTS_MAX, PackEntry, Surroundings, Table, TableEntry,
    TablePacks, Tablespace, Totals, line,
};
use pgrecall::repository::codec::Kind;
use pgrecall::repository::identity::{self, Identity, KnownIncarnation};
use pgrecall::repository::inspect::{InspectSettings, inspect};
use pgrecall::repository::layout::{ContentHash, Key, WalRange};
use pgrecall::repository::pack::{CompressedFrame, FRAME_BYTES_MAX, FrameRef, PackBuilder, PackRef};
use pgrecall::repository::store::StoreSettings;
use pgrecall::repository::{BackupId, Location, Repository, Store, catalogue};
use pgrecall::restore::gather::{self, PlanRequest};
use pgrecall::restore::recovery::Finish;
use pgrecall::restore::run::run;
use pgrecall::restore::target::TablespacePlaces;
use pgrecall::restore::{Plan, RestoreOptions, Stop, wal};
use tokio_util::sync::CancellationToken;

use crate::common::guard::{self, Directory};
use crate::common::ledger::{Ledger, keep_wal, transaction_ends};
use crate::common::pgrecall::{Environment, Pgrecall, Store as Place};
use crate::common::postgres::{Cluster, Stop as How};
use crate::common::{NEWEST, places, slow, wait};

const MIB: u64 = 1 << 20;

/// A repository into which the tests put backups and WAL by hand, and the configuration of a host that knows only it.
struct Stored {
    dir: Directory,
    repository: Repository,
    known: KnownIncarnation,
    host: Pgrecall,
}

impl Stored {
    async fn new(cluster: &Cluster, segment_mib: u64) -> Stored {
        let dir = Directory::new("repository");
        let root = dir.join("store");
        let store = Store::open(&Location::File(root.clone()), "shop", StoreSettings::default()).expect("open");
        let repository = Repository::open_or_create(store, 1, None).await.expect("create");
        let identity = Identity {
            system_id: cluster.system_identifier().parse().expect("a number"),
            major: Major(cluster.major()),
            segment_size: SegmentSize::new(segment_mib * MIB).expect("a size"),
            block_size: 8192,
            opened_at: Timestamp(0),
            reason: "first".into(),
        };
        let known = identity::open_next(&repository, identity).await.expect("open");
        let host = Pgrecall::new(&[Environment::new("shop", Place::Directory(root))]);
        Stored { dir, repository, known, host }
    }

    fn size(&self) -> SegmentSize {
        self.known.identity.segment_size
    }

    /// Stores what `pg_wal` holds: finished segments whole, the newest as a part, histories.
    async fn put_wal(&self, cluster: &Cluster) {
        let end = cluster.flush_lsn();
        for file in std::fs::read_dir(cluster.data().join("pg_wal")).expect("list").flatten() {
            let name = file.file_name().into_string().expect("text");
            if let Some(timeline) = name.strip_suffix(".history").and_then(TimelineId::from_hex) {
                let content = std::fs::read(file.path()).expect("read");
                let hash = ContentHash::of(&self.repository.codec().digest(&content));
                let key = Key::history(self.known.incarnation, timeline, hash);
                self.repository.write(&key, Kind::History, content.into()).await.expect("store");
                continue;
            }
            let Ok(name) = name.parse::<SegmentName>() else { continue };
            let segment = name.segment(self.size()).expect("of this size");
            let to = end.0.saturating_sub(segment.start_lsn(self.size()).0).min(self.size().bytes());
            if to == 0 {
                continue;
            }
            let mut content = std::fs::read(file.path()).expect("read");
            content.truncate(usize::try_from(to).expect("small"));
            let hash = ContentHash::of(&self.repository.codec().digest(&content));
            let whole = to == self.size().bytes();
            let range = WalRange { timeline: name.timeline(), segment, from: 0, to, hash, whole };
            let key = Key::wal(self.known.incarnation, &range, self.size());
            self.repository.write(&key, Kind::Wal, content.into()).await.expect("store");
        }
    }

    /// Takes a base backup and stores it.
    async fn put_backup(&self, cluster: &Cluster, tablespace: Option<&Path>) -> BackupCommit {
        let copy = Directory::new("copy");
        let target = copy.join("data").display().to_string();
        let mut arguments = vec!["-D", &target, "-X", "none", "-c", "fast", "--no-sync", "--no-manifest"];
        let moved = tablespace.map(|from| format!("{}={}", from.display(), copy.join("space").display()));
        arguments.extend(moved.iter().flat_map(|moved| ["-T", moved.as_str()]));
        cluster.run("pg_basebackup", &arguments);
        let stop_lsn = cluster.flush_lsn();
        Packer::new(self).store(cluster, &copy.join("data"), stop_lsn, tablespace).await
    }

    async fn plan(&self, timeline: u32, lsn: Lsn, end_lsn: Lsn) -> Plan {
        let stop = Stop { timeline: TimelineId(timeline), lsn, inclusive: false, end_lsn };
        let request = PlanRequest { environment: "shop", stop, backup: None, lacks: &[] };
        gather::plan(&self.repository, &self.known, &request).await.expect("a plan")
    }

    /// Writes and stores so much WAL, and plans to just before the only row of `t`.
    async fn plan_before_an_insert(&self, cluster: &Cluster, mib: u64) -> Plan {
        write_wal(cluster, mib);
        cluster.query("CREATE TABLE t (n int)");
        let lsn = cluster.insert_lsn();
        cluster.query("INSERT INTO t VALUES (1)");
        let end_lsn = cluster.flush_lsn();
        self.put_wal(cluster).await;
        self.plan(1, lsn, end_lsn).await
    }

    async fn restore(&self, plan: &Plan, into: &Path, no_start: bool) -> RestoreReport {
        let config = self.host.config_file().display().to_string();
        let program = places::pgrecall().display().to_string();
        let request = RestoreRequest {
            into: into.to_owned(),
            finish: Finish::Promote,
            check: Check::Quick,
            with_config: false,
            no_start,
            tablespaces: TablespacePlaces { moved: Vec::new(), under: Some(self.dir.join("spaces")) },
            wal_get: [&program, "--config", &config, "wal-get", "%f", "%p"].map(String::from).to_vec(),
            postgres_bin_dirs: vec![places::pg_bin(plan.backup.major.0)],
            user: "postgres".into(),
            socket_directory: None,
        };
        let cancel = CancellationToken::new();
        execute(&self.repository, plan.clone(), &request, &mut Nobody, cancel).await.unwrap_or_else(|e| {
            let log = std::fs::read_to_string(into.join("pgrecall.log")).unwrap_or_default();
            panic!("{e}\n{}", crate::common::postgres::tail(&log, 4000))
        })
    }
}

struct Nobody;

impl Observer for Nobody {}

/// Stores a copied data directory as a backup.
struct Packer<'a> {
    stored: &'a Stored,
    id: BackupId,
    builder: PackBuilder,
    packs: Vec<PackRef>,
    entries: Vec<PackEntry>,
}

impl<'a> Packer<'a> {
    fn new(stored: &'a Stored) -> Self {
        let id = BackupId::new(Timestamp::from_unix_seconds(1_795_000_000), std::process::id());
        let builder = PackBuilder::new(stored.repository.codec(), stored.known.incarnation, &id, 0);
        let packs = vec![builder.reference().clone()];
        Packer { stored, id, builder, packs, entries: Vec::new() }
    }

    async fn frame(&mut self, plain: &[u8]) -> FrameRef {
        let codec = self.stored.repository.codec();
        let number = u32::try_from(self.packs.len() - 1).expect("few");
        let address = self.builder.add(CompressedFrame::make(codec, plain).expect("compress"), number);
        if self.builder.is_full() {
            let next = PackBuilder::new(codec, self.stored.known.incarnation, &self.id, number + 1);
            self.packs.push(next.reference().clone());
            let full = std::mem::replace(&mut self.builder, next);
            self.put(full).await;
        }
        address
    }

    async fn put(&mut self, builder: PackBuilder) {
        let pack = builder.finish(self.stored.repository.codec());
        self.entries.push(PackEntry { pack: pack.reference, bytes: pack.bytes.len() as u64, digest: pack.digest });
        self.stored.repository.store().put(&pack.key, pack.bytes).await.expect("store");
    }

    async fn file(&mut self, path: String, content: &[u8]) -> FileEntry {
        let mut file = entry(path, FileKind::File, content.len() as u64);
        let mut offset = 0;
        for plain in content.chunks(FRAME_BYTES_MAX) {
            let length = u32::try_from(plain.len()).expect("a frame");
            let frame = self.frame(plain).await;
            file.extents.push(Extent { offset, length, frame_offset: 0, frame });
            offset += u64::from(length);
        }
        if file.extents.len() > INLINE_EXTENTS_MAX {
            let rows: Vec<u8> = std::mem::take(&mut file.extents).iter().flat_map(line).collect();
            let table = [line(&self.packs), rows].concat();
            file.extent_tables = vec![self.frame(&table).await];
        }
        file
    }

    async fn store(mut self, cluster: &Cluster, data: &Path, stop_lsn: Lsn, tablespace: Option<&Path>) -> BackupCommit {
        let label = std::fs::read_to_string(data.join("backup_label")).expect("a label");
        let label: pgrecall::pg::BackupLabel = label.parse().expect("well formed");
        let mut found = Vec::new();
        collect(data, "", &mut found);
        let mut tablespaces = Vec::new();
        if let Some(place) = tablespace {
            let oid = cluster.query("SELECT max(oid) FROM pg_tablespace").parse().expect("a number");
            let map = data.join("tablespace_map");
            std::fs::write(&map, format!("{oid} {}\n", place.display())).expect("write");
            found.push(("tablespace_map".into(), map, false));
            tablespaces.push(Tablespace { oid, path: place.display().to_string(), bytes: 0 });
        }
        found.sort();
        let (mut rows, mut bytes) = (Vec::new(), 0);
        for (path, place, folder) in found {
            if folder {
                rows.push(entry(path, FileKind::Directory, 0));
            } else {
                let content = std::fs::read(place).expect("read");
                bytes += content.len() as u64;
                if let Some(tablespace) = tablespaces.first_mut().filter(|_| path.starts_with("pg_tblspc/")) {
                    tablespace.bytes += content.len() as u64;
                }
                rows.push(self.file(path, &content).await);
            }
        }
        let mut tables = Vec::new();
        for rows in rows.chunks(300) {
            let table = Table { packs: self.packs.clone(), rows: rows.to_vec() }.encode();
            let frame = self.frame(&table).await;
            tables.push(TableEntry { first: rows[0].path.clone(), files: rows.len() as u64, frame });
        }
        let empty = PackBuilder::new(self.stored.repository.codec(), self.stored.known.incarnation, &self.id, 999_999);
        let last = std::mem::replace(&mut self.builder, empty);
        self.put(last).await;
        let commit = BackupCommit {
            format: 1,
            id: self.id,
            generation: "00000001-00000001".into(),
            system_id: self.stored.known.identity.system_id,
            major: Major(cluster.major()),
            server_version: cluster.query("SHOW server_version"),
            segment_size: self.stored.size(),
            timeline: label.timeline,
            start_lsn: label.start_lsn,
            stop_lsn,
            started_at: Timestamp(0),
            stopped_at: Timestamp(1),
            from_standby: false,
            tablespaces,
            totals: Totals { files: rows.len() as u64, bytes, stored_bytes: 0 },
            damaged_blocks: Vec::new(),
            surroundings: Surroundings::default(),
            packs: self.entries,
            tables: TablePacks { packs: self.packs, tables },
        };
        let incarnation = self.stored.known.incarnation;
        catalogue::commit_backup(&self.stored.repository, incarnation, &commit).await.expect("commit");
        commit
    }
}

fn entry(path: String, kind: FileKind, bytes: u64) -> FileEntry {
    let mode = if kind == FileKind::Directory { 0o700 } else { 0o600 };
    FileEntry { path, kind, mode, bytes, modified: 0, target: None, extents: Vec::new(), extent_tables: Vec::new() }
}

/// Everything below a directory, tablespaces through their links.
fn collect(directory: &Path, prefix: &str, found: &mut Vec<(String, PathBuf, bool)>) {
    for file in std::fs::read_dir(directory).expect("list").flatten() {
        let name = file.file_name().into_string().expect("text");
        let path = if prefix.is_empty() { name } else { format!("{prefix}/{name}") };
        let folder = std::fs::metadata(file.path()).expect("there").is_dir();
        if folder {
            collect(&file.path(), &path, found);
        }
        found.push((path, file.path(), folder));
    }
}

/// Cheap WAL.
fn write_wal(cluster: &Cluster, mib: u64) {
    let message = "pg_logical_emit_message(false, 'x', repeat(md5(n::text), 16000))";
    cluster.query(&format!("SELECT count({message}) FROM generate_series(1, {}) n", mib * 2));
}

fn stop_server(data: &Path) {
    let found = Postmaster::find(data).expect("readable").expect("it runs");
    guard::signal(found.pid.try_into().expect("a process"), "INT");
    wait::until("the restored server stops", 60, || Postmaster::find(data).expect("readable").is_none());
}

/// The start of a commit record somewhere after most others, and the commits before it.
fn target(ledger: &Ledger, cluster: &Cluster, permille: usize) -> (Lsn, BTreeSet<u64>) {
    let ends = transaction_ends(cluster, &cluster.data().join("pg_wal"));
    let commits: Vec<Lsn> = ends.iter().filter(|end| end.committed).map(|end| end.lsn).collect();
    let lsn = commits[commits.len() * permille / 1000];
    (lsn, ledger.expected(&ends, lsn))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_far_past_its_backup_has_exactly_the_commits_before_the_target() {
    let cluster = keep_wal(Cluster::builder(NEWEST)).segment_mib(1).start();
    let space = Directory::new("space");
    cluster.query(&format!("CREATE TABLESPACE ts LOCATION '{}'", space.path().display()));
    cluster.query("CREATE TABLE elsewhere TABLESPACE ts AS SELECT n, md5(n::text) FROM generate_series(1, 50000) n");
    let stored = Stored::new(&cluster, 1).await;
    let mut ledger = Ledger::start(&cluster, 3);
    ledger.wait_for(50);
    stored.put_backup(&cluster, Some(space.path())).await;
    write_wal(&cluster, 90);
    ledger.wait_for(300);
    ledger.stop();
    cluster.query("SELECT pg_current_xact_id()");
    let stored_lsn = cluster.flush_lsn();
    stored.put_wal(&cluster).await;
    let report =
        inspect(&stored.repository, &InspectSettings { read_percent: 100, ..Default::default() }, |_| {}).await;
    let report = report.expect("inspected");
    assert!(report.is_sound(), "{:?}", report.findings);

    let (lsn, expected) = target(&ledger, &cluster, 900);
    let end_lsn = lsn.saturating_add(400).min(stored_lsn);
    let plan = stored.plan(1, lsn, end_lsn).await;
    assert!(plan.wal.len() > wal::preload_end(&plan) + 5, "some of the WAL must come by wal-get");

    let data = stored.dir.join("started");
    let report = stored.restore(&plan, &data, false).await;
    assert_eq!(report.new_timeline, Some(TimelineId(2)));
    stop_server(&data);
    assert!(!data.join("pgrecall_restore").exists());
    let mut restored = Cluster::adopt(NEWEST, &data);
    restored.start();
    ledger.check(&restored, &expected);
    assert_eq!(restored.query("SELECT count(*), min(n), max(n) FROM elsewhere"), "50000|1|50000");
    restored.stop(How::Fast);

    // Not started, a directory recovers by itself when somebody starts it later.
    std::fs::remove_dir_all(stored.dir.join("spaces")).expect("remove");
    let data = stored.dir.join("by itself");
    stored.restore(&plan, &data, true).await;
    let mut restored = Cluster::adopt(NEWEST, &data);
    restored.start();
    restored.wait_writable();
    ledger.check(&restored, &expected);
    restored.stop(How::Fast);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_across_a_fail_over_keeps_what_was_prepared_before_it() {
    for major in [14, NEWEST] {
        let cluster = keep_wal(Cluster::builder(major)).setting("max_prepared_transactions", "5").start();
        let stored = Stored::new(&cluster, 16).await;
        cluster.query("CREATE TABLE t (n int)");
        stored.put_backup(&cluster, None).await;
        let standby = cluster.standby();
        cluster.query("INSERT INTO t VALUES (1)");
        cluster.query("BEGIN; INSERT INTO t VALUES (2); PREPARE TRANSACTION 'open'");
        standby.wait_replayed(cluster.flush_lsn());
        stored.put_wal(&cluster).await;
        standby.promote();
        standby.wait_writable();
        standby.query("INSERT INTO t VALUES (3)");
        let lsn = standby.insert_lsn();
        standby.query("INSERT INTO t VALUES (4)");
        standby.query("SELECT pg_current_xact_id()");
        let end_lsn = standby.flush_lsn();
        stored.put_wal(&standby).await;

        let plan = stored.plan(2, lsn, end_lsn).await;
        assert!(plan.wal.iter().any(|segment| segment.left), "{plan}");
        let data = stored.dir.join("data");
        let report = stored.restore(&plan, &data, false).await;
        assert_eq!(report.new_timeline, Some(TimelineId(3)));
        stop_server(&data);
        let mut restored = Cluster::adopt(major, &data);
        restored.start();
        assert_eq!(restored.rows("SELECT n FROM t ORDER BY n"), ["1", "3"]);
        restored.query("COMMIT PREPARED 'open'");
        assert_eq!(restored.rows("SELECT n FROM t ORDER BY n"), ["1", "2", "3"]);
        restored.stop(How::Fast);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_wal_stops_a_recovery_instead_of_ending_it_early() {
    let cluster = keep_wal(Cluster::builder(NEWEST)).segment_mib(1).start();
    let stored = Stored::new(&cluster, 1).await;
    stored.put_backup(&cluster, None).await;
    let plan = stored.plan_before_an_insert(&cluster, 80).await;
    let data = stored.dir.join("data");
    stored.restore(&plan, &data, true).await;
    let broken = plan.wal.iter().filter(|s| !s.left).nth(wal::preload_end(&plan) + 3).expect("served by wal-get");
    let path = stored.dir.join("store/shop").join(&broken.objects[0].key);
    let original = std::fs::read(&path).expect("stored");
    let mut bytes = original.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 8;
    std::fs::write(&path, &bytes).expect("damage");
    let mut restored = Cluster::adopt(NEWEST, &data);
    restored.start_without_waiting();
    restored.wait_ended(60);
    assert!(!data.join("pg_wal/00000002.history").exists(), "{}", restored.log());
    assert!(data.join("recovery.signal").exists());
    // With the object whole again, the same directory goes on.
    std::fs::write(&path, &original).expect("put back");
    restored.start();
    restored.wait_writable();
    assert_eq!(restored.query("SELECT count(*) FROM t"), "0");
    restored.stop(How::Fast);
}

/// The most memory that this process had since `reset_peak`, in bytes.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("read");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_restore_stays_within_its_memory() {
    let scale = if slow() { "100" } else { "10" };
    let cluster = keep_wal(Cluster::builder(NEWEST)).setting("max_wal_size", "4GB").start();
    cluster.pgbench(&["-i", "-q", "-s", scale]);
    let stored = Stored::new(&cluster, 16).await;
    stored.put_backup(&cluster, None).await;
    let plan = stored.plan_before_an_insert(&cluster, 100).await;
    let data = stored.dir.join("data");

    // From here on the peak is the restore's, above what this process holds already.
    std::fs::write("/proc/self/clear_refs", "5").expect("reset the peak");
    let before = peak_bytes();
    let begun = std::time::Instant::now();
    let options = RestoreOptions::default();
    let restored = run(&stored.repository, plan, &data, &options, Arc::default()).await.expect("restore");
    let (elapsed, peak) = (begun.elapsed(), peak_bytes());
    println!("scale {scale}: {elapsed:?}, peak {} MiB, before {} MiB", peak >> 20, before >> 20);
    assert!(peak.saturating_sub(before) < 256 << 20, "{} MiB", peak.saturating_sub(before) >> 20);
    drop(restored);
    for name in ["base/1/1259", "global/pg_control"] {
        assert!(data.join(name).exists(), "{name}");
    }
}
