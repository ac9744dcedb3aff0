//! What happens to a cluster while a backup reads it, and what a restore by commands makes of that.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use async_trait::async_trait;
use pgrecall::backup::{
    BackupReport, BackupSettings, Collaborators, Event, FullBackup, ListedWal, ServerSource, Source, SourceError,
    SourcePosition, SourceStart, SqlFacts,
};
use pgrecall::pg::{Major, Timestamp};
use pgrecall::replication::BaseBackupOptions;
use pgrecall::repository::generation::{self, Lease};
use pgrecall::repository::{Repository, identity};
use tokio_util::sync::CancellationToken;

use crate::archive::{Running, repository};
use crate::common::guard::{Directory, Process};
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::Cluster;
use crate::common::{NEWEST, compare};
use crate::replication::{config, session};
use crate::whole_way::{Left, moment, restore};

/// A server as the source, read slowly while psql does something that begins after so many bytes.
struct Meanwhile {
    inner: ServerSource,
    bytes: u64,
    after: u64,
    psql: Option<Command>,
    acting: Option<Process>,
}

#[async_trait]
impl Source for Meanwhile {
    async fn position(&mut self) -> Result<SourcePosition, SourceError> {
        self.inner.position().await
    }

    async fn begin(&mut self) -> Result<SourceStart, SourceError> {
        self.inner.begin().await
    }

    async fn next(&mut self) -> Result<Event, SourceError> {
        let event = self.inner.next().await?;
        if let Event::Data(piece) = &event {
            self.bytes += piece.len() as u64;
            if self.bytes > self.after
                && let Some(mut psql) = self.psql.take()
            {
                self.acting = Some(Process::spawn(&mut psql));
            }
            // Reading goes on: the server waits for its walsender before it removes a database or tablespace.
            if self.acting.as_mut().is_some_and(|acting| acting.ended().is_none()) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        } else if let Event::Manifest(_) = &event
            && let Some(mut acting) = self.acting.take()
        {
            assert!(acting.wait(60).success(), "psql failed");
        }
        Ok(event)
    }
}

/// A backup beside a running archive, as the daemon takes it.
async fn back_up(cluster: &Cluster, repository: &Repository, after: u64, psql: Command) -> BackupReport {
    let known = identity::current(repository).await.expect("identity").expect("one");
    let lease = Lease { host: "h".into(), pid: 1, started_at: Timestamp(0), version: "1".into(), store: None };
    let scratch = Directory::new("scratch");
    let segment_size = known.identity.segment_size;
    let mut session = session(cluster).await;
    let job = FullBackup {
        repository: repository.clone(),
        incarnation: known.incarnation,
        generation: generation::take(repository, &lease).await.expect("a generation"),
        major: Major(cluster.major()),
        server_version: session.server_version().to_owned(),
        segment_size: session.segment_size().await.expect("SHOW"),
        settings: BackupSettings { scratch: scratch.path().to_owned(), ..BackupSettings::default() },
    };
    session.close().await;
    let wal = ListedWal { repository: repository.clone(), incarnation: known.incarnation, segment_size };
    let facts = SqlFacts { config: config(cluster), host_index: 0 };
    let (progress, cancel) = (Default::default(), CancellationToken::new());
    let inner = ServerSource::new(config(cluster), 0, BaseBackupOptions::default());
    let mut source = Meanwhile { inner, bytes: 0, after, psql: Some(psql), acting: None };
    let report = job.run(Collaborators { source: &mut source, wal: &wal, facts: Some(&facts), progress, cancel }).await;
    assert!(source.psql.is_none() && source.acting.is_none(), "all of it happened while the backup was read");
    report.expect("a backup")
}

/// Tables, databases and tablespaces, many of which will not be the same when the backup ends.
fn before(cluster: &Cluster, places: &Directory) {
    for name in ["kept", "gone"] {
        std::fs::create_dir(places.join(name)).unwrap();
        cluster.query(&format!("CREATE TABLESPACE {name} LOCATION '{}'", places.join(name).display()));
    }
    let rows = "AS SELECT n, md5(n::text) t FROM generate_series(1, 20000) n";
    for (table, place) in [
        ("moves", "pg_default"),
        ("returns", "kept"),
        ("stays", "kept"),
        ("in_gone", "gone"),
        ("rewritten", "pg_default"),
        ("emptied", "pg_default"),
        ("dropped", "pg_default"),
        ("big", "pg_default"),
    ] {
        cluster.query(&format!("CREATE TABLE {table} TABLESPACE {place} {rows}; CREATE INDEX ON {table} (n)"));
    }
    cluster.query(&format!("CREATE UNLOGGED TABLE forgotten {rows}"));
    for database in ["old", "moved"] {
        cluster.query(&format!("CREATE DATABASE {database}"));
        cluster.query_in(database, &format!("CREATE TABLE t {rows}"));
    }
    cluster.query("SELECT pg_create_physical_replication_slot('of_the_source', true)");
}

/// psql with what happens meanwhile.
fn meanwhile(cluster: &Cluster) -> Command {
    let mut acts = vec![
        "ALTER TABLE moves SET TABLESPACE kept".to_owned(),
        "ALTER TABLE returns SET TABLESPACE pg_default".to_owned(),
        "DROP TABLE in_gone".to_owned(),
        "DROP TABLESPACE gone".to_owned(),
        "DELETE FROM rewritten WHERE n % 3 = 0".to_owned(),
        "VACUUM FULL rewritten".to_owned(),
        "TRUNCATE emptied".to_owned(),
        "INSERT INTO emptied VALUES (1, 'x')".to_owned(),
        "DROP TABLE dropped".to_owned(),
        "CREATE TABLE made TABLESPACE kept AS SELECT * FROM big".to_owned(),
        "CREATE INDEX ON made (t)".to_owned(),
        "CREATE TABLE brief AS SELECT * FROM big".to_owned(),
        "DROP TABLE brief".to_owned(),
        "DROP DATABASE old".to_owned(),
    ];
    let strategies: &[&str] = if cluster.major() >= 15 { &["STRATEGY file_copy", "STRATEGY wal_log"] } else { &[""] };
    for (number, strategy) in strategies.iter().enumerate() {
        acts.push(format!("CREATE DATABASE fresh{number} {strategy}"));
        acts.push(format!("\\connect fresh{number}"));
        acts.push("CREATE TABLE t AS SELECT generate_series(1, 1000) n".to_owned());
    }
    let mut psql = cluster.tool("psql");
    psql.args(["-Xq", "-v", "ON_ERROR_STOP=1"]).args(acts.iter().flat_map(|act| ["-c", act.as_str()]));
    psql.stdin(Stdio::null()).stdout(Stdio::null());
    psql
}

/// What belongs to a running server alone is not in what was restored.
fn assert_nothing_of_the_server_itself(into: &Path) {
    assert!(!into.join("postmaster.pid").exists() && !into.join("postmaster.opts").exists());
    let names = |place: &str| -> Vec<_> {
        std::fs::read_dir(into.join(place)).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect()
    };
    assert_eq!(names("pg_replslot"), Vec::<std::ffi::OsString>::new());
    assert!(!into.join("base/pgsql_tmp").exists() || names("base/pgsql_tmp").is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_made_moved_and_dropped_while_a_backup_runs_is_restored_as_it_was() {
    for (major, after) in [(14, 1000), (NEWEST, 1000), (NEWEST, 12_000_000)] {
        let (cluster, places) = (Cluster::start_new(major), Directory::new("places"));
        before(&cluster, &places);
        let store = places.join("repository");
        let repository = repository(&store).await;
        let running = Running::start(&cluster, &repository).await;
        running.wait_stored(cluster.flush_lsn()).await;
        let report = back_up(&cluster, &repository, after, meanwhile(&cluster)).await;
        assert_eq!(report.commit.tablespaces.len(), 2, "those of the backup's begin");
        cluster.query("ALTER DATABASE moved SET TABLESPACE kept");
        cluster.query("INSERT INTO made SELECT n + 1000000, 'later' FROM generate_series(1, 1000) n");
        running.wait_stored(cluster.flush_lsn()).await;
        let expected = compare::fingerprint(&cluster);
        running.stop().await;

        let host = Pgrecall::new(&[Environment::new("shop", Store::Directory(store))]);
        let (into, under) = (places.join("restored"), places.join("under").display().to_string());
        let shown = into.display().to_string();
        host.run(&["restore", "shop", "--into", &shown, "--tablespaces-under", &under, "--no-start"]);
        assert_nothing_of_the_server_itself(&into);
        let mut copy = Cluster::adopt(major, &into);
        copy.start();
        copy.wait_writable();
        compare::assert_same(&expected, &compare::fingerprint(&copy));
        assert_eq!(copy.query("SELECT count(*) FROM forgotten"), "0", "what is not in the WAL begins empty");
        let place = "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'kept'";
        assert!(copy.query(place).starts_with(&under), "{}", copy.query(place));
        assert_eq!(copy.query("SELECT count(*) FROM pg_tablespace WHERE spcname = 'gone'"), "0");
        compare::check_sound(&mut copy);
    }
}

/// PostgreSQL's replay makes a new tablespace where the source has it, and no setting leads it elsewhere: beside the source
/// that would be the source's own files.
#[test]
fn a_restore_never_touches_a_tablespace_that_the_source_made_after_the_backup() {
    let (cluster, dir) = (Cluster::start_new(NEWEST), Directory::new("places"));
    let mut host =
        Pgrecall::new(&[Environment::new("shop", Store::Directory(dir.join("repository"))).cluster(&cluster)]);
    host.start(&[&cluster]);
    host.wait_for_backup("shop");
    let before = moment(&cluster);
    // Replay up to the end of that transaction does not come to what follows.
    cluster.query("CREATE TABLE between ()");
    let place = dir.join("later");
    std::fs::create_dir(&place).unwrap();
    cluster.query(&format!("CREATE TABLESPACE later LOCATION '{}'", place.display()));
    cluster.query("CREATE TABLE t TABLESPACE later AS SELECT generate_series(1, 1000) n; CHECKPOINT");
    host.wait_stored(&cluster, cluster.flush_lsn());
    host.stop();

    let files = |place: &Path| {
        crate::common::postgres::run(std::process::Command::new("find").arg(place).args([
            "-type",
            "f",
            "-exec",
            "sha256sum",
            "{}",
            ";",
        ]))
    };
    let as_it_was = files(&place);
    let into = dir.join("restored").display().to_string();
    let planned = host.json(&["plan", "shop", "--into", &into]);
    let lacks = planned["plan"]["lacks"].to_string();
    assert!(lacks.contains("tablespace") && lacks.contains(&place.display().to_string()), "{planned}");
    let refused = host.refused(&["restore", "shop", "--into", &into]);
    assert!(refused.stderr.contains(&place.display().to_string()), "{refused:?}");
    assert!(!Path::new(&into).exists() && files(&place) == as_it_was);

    // Before it was made, or where its place is free, there is nothing in the way.
    drop(Left::of(&restore(&host, &before, &dir.join("before"), &[])));
    assert!(files(&place) == as_it_was);
    drop(cluster);
    std::fs::rename(&place, dir.join("aside")).unwrap();
    let mut copy = None;
    for _ in 0..2 {
        let report = restore(&host, "latest", &dir.join("restored"), &[]);
        drop(Left::of(&report));
        copy = Some(report);
        std::fs::remove_dir_all(dir.join("restored")).unwrap();
        std::fs::remove_dir_all(&place).unwrap();
    }
    assert!(copy.is_some());
}
