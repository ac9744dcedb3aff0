//! Full backups of real servers: read back by the format alone and judged by PostgreSQL's `pg_verifybackup`.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pgrecall::archive::{ArchiveStatus, State, StoredStream};
use pgrecall::backup::{
    BackupError, BackupReport, BackupSettings, Collaborators, Event, FullBackup, ServerSource, Source, SourceError,
    SourcePosition, SourceStart, SqlFacts, StoredWal,
};
use pgrecall::operations::backup::BackupJob;
use pgrecall::pg::{Lsn, Major, SystemId, TimelineId, Timestamp};
use pgrecall::replication::{BaseBackupOptions, ConnectConfig};
use pgrecall::repository::backup_object::{Extent, FileEntry, FileKind, Table, TablePacks};
use pgrecall::repository::identity::{self, Identity};
use pgrecall::repository::pack::{FrameRef, PackRef, read_frame};
use pgrecall::repository::store::StoreSettings;
use pgrecall::repository::{Incarnation, Location, Repository, Store, catalogue, generation};
use tokio_util::sync::CancellationToken;

use crate::common::guard::Directory;
use crate::common::postgres::{Cluster, Stop};
use crate::common::{MAJORS, NEWEST};
use crate::replication::{config, session};

/// An archive that has everything; the archive has tests of its own.
struct AllStored;

#[async_trait]
impl StoredWal for AllStored {
    async fn covers(&self, _: TimelineId, _: Lsn) -> anyhow::Result<bool> {
        Ok(true)
    }

    async fn wait_stored(&self, _: TimelineId, start_lsn: Lsn, stop_lsn: Lsn) -> anyhow::Result<()> {
        assert!(start_lsn < stop_lsn);
        Ok(())
    }
}

/// A server as the source; keeps the manifest and does something after so many bytes.
struct Watched<'a> {
    inner: ServerSource,
    manifest: Vec<u8>,
    bytes: u64,
    after: u64,
    act: Option<Box<dyn FnOnce() + Send + 'a>>,
}

#[async_trait]
impl Source for Watched<'_> {
    async fn position(&mut self) -> Result<SourcePosition, SourceError> {
        self.inner.position().await
    }

    async fn begin(&mut self) -> Result<SourceStart, SourceError> {
        self.inner.begin().await
    }

    async fn next(&mut self) -> Result<Event, SourceError> {
        let event = self.inner.next().await?;
        match &event {
            Event::Manifest(piece) => self.manifest.extend_from_slice(piece),
            Event::Data(piece) => self.bytes += piece.len() as u64,
            _ => {}
        }
        if self.bytes > self.after
            && let Some(act) = self.act.take()
        {
            act();
        }
        Ok(event)
    }
}

/// A repository for one cluster.
struct Place {
    folder: Directory,
    repository: Repository,
    incarnation: Incarnation,
}

impl Place {
    async fn new(cluster: &Cluster) -> Place {
        let folder = Directory::new("repository");
        let store = Store::open(&Location::File(folder.join("store")), "shop", StoreSettings::default()).expect("open");
        let repository = Repository::open_or_create(store, 1, None).await.expect("a repository");
        let system_id = SystemId(cluster.system_identifier().parse().expect("a number"));
        Place { folder, repository, incarnation: Incarnation { ordinal: 1, system_id } }
    }

    async fn back_up(&self, cluster: &Cluster, source: &mut dyn Source) -> Result<BackupReport, BackupError> {
        let lease =
            generation::Lease { host: "h".into(), pid: 1, started_at: Timestamp(0), version: "1".into(), store: None };
        let mut session = session(cluster).await;
        let job = FullBackup {
            repository: self.repository.clone(),
            incarnation: self.incarnation,
            generation: generation::take(&self.repository, &lease).await.expect("a generation"),
            major: Major(cluster.major()),
            server_version: session.server_version().to_owned(),
            segment_size: session.segment_size().await.expect("SHOW"),
            settings: BackupSettings { scratch: self.folder.path().to_owned(), ..BackupSettings::default() },
        };
        session.close().await;
        let facts = SqlFacts { config: config(cluster), host_index: 0 };
        let (progress, cancel) = (Default::default(), CancellationToken::new());
        job.run(Collaborators { source, wal: &AllStored, facts: Some(&facts), progress, cancel }).await
    }

    async fn is_empty(&self) -> bool {
        catalogue::list_backups(&self.repository, self.incarnation).await.expect("listing").is_empty()
    }

    /// Writes the backup's files below `root`, and the manifest that was kept.
    async fn write_files(&self, tables: &TablePacks, manifest: &[u8], root: &Path) {
        for table in &tables.tables {
            let plain = self.frame(&tables.packs, &table.frame).await;
            let table: Table<FileEntry> = Table::decode(&plain).expect("a table");
            for file in &table.rows {
                let path = root.join(&file.path);
                fs::create_dir_all(path.parent().expect("below the root")).expect("make a directory");
                match file.kind {
                    FileKind::File => fs::write(path, self.content(&table.packs, file).await).expect("write"),
                    FileKind::Directory => fs::create_dir_all(path).expect("make a directory"),
                    FileKind::Symlink => panic!("{file:?}"),
                }
            }
        }
        fs::write(root.join("backup_manifest"), manifest).expect("write");
    }

    async fn content(&self, packs: &[PackRef], file: &FileEntry) -> Vec<u8> {
        let mut extents: Vec<(Vec<PackRef>, Extent)> = file.extents.iter().map(|x| (packs.to_vec(), *x)).collect();
        for address in &file.extent_tables {
            let table: Table<Extent> = Table::decode(&self.frame(packs, address).await).expect("an extent table");
            extents.extend(table.rows.iter().map(|x| (table.packs.clone(), *x)));
        }
        let mut bytes = vec![0; file.bytes as usize];
        for (packs, extent) in extents {
            let plain = self.frame(&packs, &extent.frame).await;
            let (to, from, length) = (extent.offset as usize, extent.frame_offset as usize, extent.length as usize);
            bytes[to..to + length].copy_from_slice(&plain[from..from + length]);
        }
        bytes
    }

    async fn frame(&self, packs: &[PackRef], address: &FrameRef) -> bytes::Bytes {
        read_frame(&self.repository, self.incarnation, &packs[address.pack as usize], address).await.expect("a frame")
    }
}

fn watched<'a>(cluster: &Cluster, after: u64, act: impl FnOnce() + Send + 'a) -> Watched<'a> {
    let inner = ServerSource::new(config(cluster), 0, BaseBackupOptions::default());
    Watched { inner, manifest: Vec::new(), bytes: 0, after, act: Some(Box::new(act)) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_every_major_passes_pg_verifybackup() {
    for major in MAJORS {
        let cluster = Cluster::start_new(major);
        let elsewhere = Directory::new("ts");
        cluster.query(&format!("CREATE TABLESPACE ts LOCATION '{}'", elsewhere.path().display()));
        cluster.query("CREATE TABLE t TABLESPACE ts AS SELECT n, md5(n::text) FROM generate_series(1, 20000) n");
        cluster.query(
            "CREATE TABLE big AS SELECT n, md5(n::text) a, md5((n+1)::text) b FROM generate_series(1, 200000) n",
        );
        cluster.query("CREATE UNLOGGED TABLE unlogged AS SELECT generate_series(1, 10000) n");
        let place = Place::new(&cluster).await;
        // Much happens while the files are read.
        let mut source = watched(&cluster, 1000, || {
            cluster.query("CREATE TABLE made AS SELECT n FROM generate_series(1, 10000) n");
            cluster.query("DROP TABLE t");
            cluster.query("TRUNCATE big");
            cluster.query("CREATE DATABASE other");
        });
        let report = place.back_up(&cluster, &mut source).await.expect("a backup");
        let (manifest, copied) = (std::mem::take(&mut source.manifest), source.bytes);
        drop(source);
        let commit = &report.commit;
        assert_eq!((commit.tablespaces.len(), commit.totals.bytes), (1, copied));
        assert!(!commit.from_standby && commit.damaged_blocks.is_empty());
        assert!(commit.surroundings.config_files.iter().any(|f| f.path.ends_with("pg_hba.conf")));
        assert!(commit.surroundings.databases.iter().any(|d| d.name == "postgres"));
        let root = Directory::new("files");
        place.write_files(&commit.tables, &manifest, root.path()).await;
        cluster.run("pg_verifybackup", &["-n", &root.path().display().to_string()]);
        let in_tablespace = files_below(&root.path().join(format!("pg_tblspc/{}", commit.tablespaces[0].oid)));
        assert_eq!(commit.tablespaces[0].bytes, in_tablespace);
        assert!(in_tablespace > 500_000, "{in_tablespace}");
        assert!(root.path().join("pg_wal").is_dir() && root.path().join("tablespace_map").is_file());
    }
}

fn files_below(folder: &Path) -> u64 {
    let sizes = std::fs::read_dir(folder).expect("list").flatten().map(|entry| {
        let found = entry.metadata().expect("there");
        if found.is_dir() { files_below(&entry.path()) } else { found.len() }
    });
    sizes.sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_with_replication_alone_can_take_a_backup() {
    let cluster = Cluster::start_new(NEWEST);
    cluster.query("CREATE ROLE r LOGIN REPLICATION");
    let place = Place::new(&cluster).await;
    let config = ConnectConfig { user: "r".into(), ..config(&cluster) };
    let mut source = ServerSource::new(config, 0, BaseBackupOptions::default());
    place.back_up(&cluster, &mut source).await.expect("a backup");
    assert!(!place.is_empty().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_gives_backups_until_it_is_promoted_meanwhile() {
    for major in [14, NEWEST] {
        let primary = Cluster::start_new(major);
        primary.query("CREATE TABLE t AS SELECT n, md5(n::text) FROM generate_series(1, 100000) n");
        let standby = primary.standby();
        let place = Place::new(&standby).await;
        let mut source = ServerSource::new(config(&standby), 0, BaseBackupOptions::default());
        let report = place.back_up(&standby, &mut source).await.expect("a backup");
        assert!(report.commit.from_standby);

        let place = Place::new(&standby).await;
        let mut source = watched(&standby, 1000, || standby.promote());
        let error = place.back_up(&standby, &mut source).await.expect_err("the standby was promoted");
        assert!(error.is_retryable(), "{error}");
        assert!(place.is_empty().await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_without_a_restartpoint_in_the_stored_wal_is_not_waited_for_for_ever() {
    let primary = Cluster::start_new(NEWEST);
    let standby = primary.standby();
    let place = Place::new(&primary).await;
    let mut session = session(&primary).await;
    let segment_size = session.segment_size().await.expect("SHOW");
    session.close().await;
    let identity = Identity {
        system_id: place.incarnation.system_id,
        major: Major(NEWEST),
        segment_size,
        block_size: 8192,
        opened_at: Timestamp(0),
        reason: "first".into(),
    };
    identity::open_next(&place.repository, identity).await.expect("open");
    // The standby's restartpoint is the one of its own making; what is stored begins here, and has no end.
    primary.switch_wal();
    let stored = StoredStream { timeline: TimelineId(1), start_lsn: primary.flush_lsn(), end_lsn: Lsn(1 << 29) };
    let status = ArchiveStatus { state: State::Streaming, stored: Some(stored), ..ArchiveStatus::default() };
    let (_sender, archive) = tokio::sync::watch::channel(status);
    let lease =
        generation::Lease { host: "h".into(), pid: 1, started_at: Timestamp(0), version: "1".into(), store: None };
    let hosts = [config(&standby).hosts, config(&primary).hosts].concat();
    let job = BackupJob {
        repository: place.repository.clone(),
        generation: generation::take(&place.repository, &lease).await.expect("a generation"),
        connect: ConnectConfig { hosts, ..config(&primary) },
        archive,
        settings: BackupSettings { scratch: place.folder.path().to_owned(), ..BackupSettings::default() },
        from_standby: true,
        standby_wait_max: Duration::from_secs(3),
    };
    let begun = Instant::now();
    let report = job.run(Default::default(), CancellationToken::new()).await.expect("a backup");
    assert!(!report.commit.from_standby && begun.elapsed() >= Duration::from_secs(3));
    assert!(report.commit.start_lsn >= stored.start_lsn);

    // With a checkpoint behind it, the standby is read.
    standby.wait_replayed(primary.flush_lsn());
    let report = job.run(Default::default(), CancellationToken::new()).await.expect("a backup");
    assert!(report.commit.from_standby);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_the_server_cannot_read_is_named() {
    use std::os::unix::fs::PermissionsExt;
    for major in [14, NEWEST] {
        let cluster = Cluster::start_new(major);
        let foreign = cluster.data().join("pg_hba.bak");
        fs::write(&foreign, "x").expect("write");
        fs::set_permissions(&foreign, fs::Permissions::from_mode(0o000)).expect("chmod");
        let place = Place::new(&cluster).await;
        let mut source = ServerSource::new(config(&cluster), 0, BaseBackupOptions::default());
        let failure = place.back_up(&cluster, &mut source).await.expect_err("it cannot be read").to_failure();
        assert!(failure.message.contains("pg_hba.bak") && !failure.retryable, "{failure:?}");
        assert!(failure.hint.expect("a hint").contains("Move the file"));
        assert!(place.is_empty().await);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_free_walsender_the_hint_says_what_to_raise() {
    let cluster = Cluster::builder(NEWEST).setting("max_wal_senders", "1").start();
    let place = Place::new(&cluster).await;
    let mut first = ServerSource::new(config(&cluster), 0, BaseBackupOptions::default());
    let mut second = ServerSource::new(config(&cluster), 0, BaseBackupOptions::default());
    first.position().await.expect("the only place");
    let error = second.position().await.expect_err("no place is left");
    assert!(error.hint().expect("a hint").contains("max_wal_senders"), "{error}");
    drop((first, place));
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_pages_are_recorded_and_the_backup_kept() {
    for major in MAJORS {
        let mut cluster = Cluster::start_new(major);
        cluster.query("CREATE TABLE t AS SELECT n, md5(n::text) FROM generate_series(1, 5000) n");
        let file = cluster.query("SELECT pg_relation_filepath('t')");
        cluster.stop(Stop::Fast);
        let path = cluster.data().join(&file);
        let mut bytes = fs::read(&path).expect("read");
        bytes[3 * 8192 + 4000] ^= 1;
        fs::write(&path, bytes).expect("write");
        cluster.start();
        let place = Place::new(&cluster).await;
        let mut source = ServerSource::new(config(&cluster), 0, BaseBackupOptions::default());
        let commit = place.back_up(&cluster, &mut source).await.expect("a backup").commit;
        let damaged: Vec<_> = commit.damaged_blocks.iter().map(|d| (d.file.clone(), d.block)).collect();
        assert_eq!(damaged, [(file, Some(3))]);
        assert!(commit.stop_lsn > commit.start_lsn);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_cut_anywhere_leaves_nothing_visible() {
    for major in [14, NEWEST] {
        let cluster = Cluster::start_new(major);
        cluster.query("CREATE TABLE t AS SELECT n, md5(n::text) FROM generate_series(1, 200000) n");
        let total: u64 = cluster.query("SELECT sum(pg_database_size(oid)) FROM pg_database").parse().expect("a number");
        for percent in [0, 10, 50, 80] {
            let place = Place::new(&cluster).await;
            let end = || {
                let end = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_replication";
                assert_eq!(cluster.query(end), "1");
            };
            let mut source = watched(&cluster, total * percent / 100, end);
            let error = place.back_up(&cluster, &mut source).await.expect_err("it was cut");
            assert!(error.is_retryable() && error.hint().is_some(), "{error}");
            assert!(place.is_empty().await);
        }
    }
}
