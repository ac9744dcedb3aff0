//! `BASE_BACKUP` of every major, judged by PostgreSQL's own `pg_verifybackup`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use pgrecall::pg::Lsn;
use pgrecall::replication::{
    BackupEnd, BackupEntry, BackupEvent, BackupStart, BaseBackup, BaseBackupOptions, ChecksumFailure,
    ManifestChecksums, ReplicationError,
};

use crate::common::guard::Directory;
use crate::common::postgres::Cluster;
use crate::common::{MAJORS, NEWEST};
use crate::replication::session;

/// What a base backup brought, written below a directory.
#[derive(Default)]
struct Written {
    files: BTreeMap<PathBuf, u64>,
    bytes: u64,
    progress: Vec<u64>,
    damaged: Vec<ChecksumFailure>,
    end: Option<BackupEnd>,
}

fn place(root: &Path, entry: &BackupEntry) -> PathBuf {
    match entry.tablespace {
        None => root.join(&entry.path),
        Some(oid) => root.join("pg_tblspc").join(oid.to_string()).join(&entry.path),
    }
}

async fn write_to(root: &Path, backup: &mut BaseBackup) -> Result<Written, ReplicationError> {
    let mut written = Written::default();
    let mut current: Option<(File, u64)> = None;
    loop {
        match backup.next().await? {
            BackupEvent::File { entry, size } => {
                let path = place(root, &entry);
                fs::create_dir_all(path.parent().expect("below the root")).expect("make a directory");
                written.files.insert(entry.path, size);
                current = Some((File::create(&path).expect("make a file"), size));
            }
            BackupEvent::Data(bytes) => {
                let (file, left) = current.as_mut().expect("a file first");
                file.write_all(&bytes).expect("write");
                *left -= bytes.len() as u64;
                written.bytes += bytes.len() as u64;
            }
            BackupEvent::EndOfFile => assert_eq!(current.take().expect("a file").1, 0, "the size that was announced"),
            BackupEvent::Directory(entry) => fs::create_dir_all(place(root, &entry)).expect("make a directory"),
            BackupEvent::Symlink { entry, .. } => panic!("{entry:?}"),
            BackupEvent::Manifest(bytes) => {
                let path = root.join("backup_manifest");
                let mut file = File::options().create(true).append(true).open(path).expect("the manifest");
                file.write_all(&bytes).expect("write");
            }
            BackupEvent::Progress(bytes) => written.progress.push(bytes),
            BackupEvent::Notice(notice) => written.damaged.extend(notice.checksum_failure()),
            BackupEvent::End(end) => {
                written.end = Some(end);
                return Ok(written);
            }
        }
    }
}

async fn start(cluster: &Cluster, options: &BaseBackupOptions) -> (BackupStart, BaseBackup) {
    session(cluster).await.base_backup(options).await.expect("a base backup")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_files_of_a_base_backup_pass_pg_verifybackup() {
    for major in MAJORS {
        let cluster = Cluster::start_new(major);
        let elsewhere = Directory::new("ts");
        cluster.query(&format!("CREATE TABLESPACE ts LOCATION '{}'", elsewhere.path().display()));
        cluster.query("CREATE TABLE t TABLESPACE ts AS SELECT n, md5(n::text) FROM generate_series(1, 20000) n");
        cluster.query("CREATE TABLE u AS SELECT n, md5(n::text) FROM generate_series(1, 20000) n");
        for manifest_checksums in [ManifestChecksums::Crc32c, ManifestChecksums::Sha256] {
            let root = Directory::new("backup");
            let label = r"it's a \ label".to_owned();
            let options = BaseBackupOptions { label, manifest_checksums, ..BaseBackupOptions::default() };
            let before = cluster.flush_lsn();
            let (start, mut backup) = start(&cluster, &options).await;
            assert!(start.start_lsn >= before && start.timeline.0 == 1, "{start:?}");
            assert_eq!(start.tablespaces.len(), 1);
            assert_eq!(start.tablespaces[0].path, elsewhere.path().display().to_string());
            let written = write_to(root.path(), &mut backup).await.expect("a whole backup");
            let end = written.end.expect("an end");
            assert!(end.end_lsn > start.start_lsn && end.timeline == start.timeline);
            let label = fs::read_to_string(root.join("backup_label")).expect("read");
            assert!(label.contains(r"LABEL: it's a \ label"), "{label}");
            assert!(label.contains(&format!("START WAL LOCATION: {} ", start.start_lsn)), "{label}");
            let map = fs::read_to_string(root.join("tablespace_map")).expect("read");
            assert_eq!(map.trim(), format!("{} {}", start.tablespaces[0].oid, elsewhere.path().display()));
            assert!(start.size_kb() * 1024 >= written.bytes / 2 && start.tablespaces[0].size_kb > 500);
            assert_eq!(major >= 15, written.progress.last().is_some_and(|bytes| *bytes >= written.bytes));
            cluster.run("pg_verifybackup", &["-n", &root.path().display().to_string()]);
            let mut session = backup.into_session().expect("the connection is free");
            session.identify_system().await.expect("and can be used");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_can_be_the_source() {
    for major in [14, NEWEST] {
        let primary = Cluster::start_new(major);
        primary.query("CREATE TABLE t AS SELECT generate_series(1, 1000) n");
        let standby = primary.standby();
        let root = Directory::new("backup");
        let (start, mut backup) = start(&standby, &BaseBackupOptions::default()).await;
        let written = write_to(root.path(), &mut backup).await.expect("a whole backup");
        assert!(written.end.expect("an end").end_lsn >= start.start_lsn);
        let label = fs::read_to_string(root.join("backup_label")).expect("read");
        assert!(label.contains("BACKUP FROM: standby"), "{label}");
        primary.run("pg_verifybackup", &["-n", &root.path().display().to_string()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_pages_are_named_and_fail_the_backup_after_its_last_byte() {
    for major in MAJORS {
        let mut cluster = Cluster::start_new(major);
        cluster.query("CREATE TABLE t AS SELECT n, md5(n::text) FROM generate_series(1, 5000) n");
        cluster.query("CHECKPOINT");
        let file = cluster.query("SELECT pg_relation_filepath('t')");
        cluster.stop(crate::common::postgres::Stop::Fast);
        let path = cluster.data().join(&file);
        let mut bytes = fs::read(&path).expect("read");
        bytes[3 * 8192 + 4000] ^= 1;
        fs::write(&path, bytes).expect("write");
        cluster.start();

        let (_, mut backup) = start(&cluster, &BaseBackupOptions::default()).await;
        let root = Directory::new("backup");
        let mut damaged = Vec::new();
        let error = loop {
            match backup.next().await {
                Ok(BackupEvent::Notice(notice)) => damaged.extend(notice.checksum_failure()),
                Ok(_) => {}
                Err(e) => break e,
            }
        };
        assert_eq!(damaged, [ChecksumFailure { file: format!("./{file}"), block: 3 }]);
        assert!(matches!(error, ReplicationError::ChecksumsFailed(_)), "{error:?}");

        let session = backup.into_session().expect("the connection is free");
        let options = BaseBackupOptions { verify_checksums: false, ..BaseBackupOptions::default() };
        let (_, mut backup) = session.base_backup(&options).await.expect("a base backup");
        write_to(root.path(), &mut backup).await.expect("without verification it is whole");
        cluster.run("pg_verifybackup", &["-n", &root.path().display().to_string()]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_the_server_cannot_read_is_named() {
    for major in [14, NEWEST] {
        let cluster = Cluster::start_new(major);
        let path = cluster.data().join("pg_hba.bak");
        fs::write(&path, "x").expect("write");
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o000)).expect("chmod");
        let (_, mut backup) =
            start(&cluster, &BaseBackupOptions { max_rate_kb: Some(1 << 20), ..Default::default() }).await;
        let root = Directory::new("backup");
        let Err(error) = write_to(root.path(), &mut backup).await else { panic!("it is unreadable") };
        let message = error.server_message().expect("the server's word");
        assert!(message.sqlstate == "42501" && message.message.contains("./pg_hba.bak"), "{error:?}");
        assert!(cluster.lsn("SELECT pg_current_wal_lsn()") > Lsn::ZERO);
    }
}
