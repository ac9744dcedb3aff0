use super::*;
use crate::pg::{Lsn, TimelineId};

const LABEL: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
    CHECKPOINT LOCATION: 0/2000080\nBACKUP METHOD: streamed\nBACKUP FROM: primary\n\
    START TIME: 2026-11-23 21:00:00 UTC\nLABEL: base\nSTART TIMELINE: 1\n";

/// A directory with what `prepare` looks at.
fn directory() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("temporary directory");
    let data = dir.path();
    fs::create_dir(data.join("global")).expect("make");
    let mut control = vec![0u8; ControlFile::FILE_BYTES];
    let mut put = |offset: usize, value: u32| control[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    put(8, 1800);
    put(12, 202_506_291);
    put(172, 1);
    put(180, 100);
    put(228, 16 << 20);
    let crc = crc32c::crc32c(&control[..292]);
    control[292..296].copy_from_slice(&crc.to_le_bytes());
    write(durable_fs::write, &data.join("global/pg_control"), &control).expect("write");
    write(durable_fs::write, &data.join("backup_label"), LABEL.as_bytes()).expect("write");
    dir
}

fn recovery() -> Recovery {
    Recovery {
        target: Target { timeline: TimelineId(1), lsn: Lsn(0x300_0000), inclusive: true },
        finish: Finish::Promote,
        wal: WalSource::Preloaded,
        configuration: Configuration::Isolated,
        later_parameters: None,
        preload_libraries: Vec::new(),
        jit: false,
        shared_buffers_bytes: 128 << 20,
        socket_directory: None,
    }
}

fn read(dir: &tempfile::TempDir, name: &str) -> String {
    fs::read_to_string(dir.path().join(name)).unwrap_or_else(|e| panic!("read {name}: {e}"))
}

#[test]
fn the_source_s_settings_are_set_aside_once() {
    let dir = directory();
    for name in ["postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "standby.signal", "postmaster.opts"] {
        write(durable_fs::write, &dir.path().join(name), b"archive_mode = on\n").expect("write");
    }
    for _ in 0..2 {
        prepare(dir.path(), &recovery()).expect("prepare");
        assert_eq!(read(&dir, "postgresql.auto.conf.source"), "archive_mode = on\n");
        assert_eq!(read(&dir, "postgresql.conf.source"), "archive_mode = on\n");
        assert!(read(&dir, "postgresql.conf").contains("archive_mode = 'off'"));
        assert!(read(&dir, "postgresql.conf").contains("unix_socket_directories = '.pgrecall'"));
        assert!(read(&dir, "postgresql.auto.conf").contains("recovery_target_lsn = '0/3000000'"));
        assert!(!dir.path().join("standby.signal").exists() && dir.path().join("recovery.signal").exists());
    }
}

#[test]
fn nothing_is_written_where_something_is_missing() {
    let dir = directory();
    fs::remove_file(dir.path().join("backup_label")).expect("remove");
    let error = prepare(dir.path(), &recovery()).expect_err("no label");
    assert!(format!("{error:#}").contains("backup_label"), "{error:#}");
    assert!(!dir.path().join("recovery.signal").exists() && !dir.path().join("postgresql.conf").exists());

    let dir = directory();
    let mut early = recovery();
    early.target.lsn = Lsn(0x100_0000);
    let error = prepare(dir.path(), &early).expect_err("target before the backup");
    assert!(error.to_string().contains("before the start of the backup"), "{error}");
}

#[test]
fn a_source_that_names_its_places_does_not_lead_back_to_them() {
    let dir = directory();
    let debian = "data_directory = '/var/lib/postgresql/18/main'\nport = 5433\n";
    write(durable_fs::write, &dir.path().join("postgresql.conf"), debian.as_bytes()).expect("write");
    write(durable_fs::write, &dir.path().join("postgresql.auto.conf"), b"work_mem = '7MB'\n").expect("write");
    let recovery = Recovery { configuration: Configuration::Source, ..recovery() };
    let prepared = prepare(dir.path(), &recovery).expect("prepare");
    prepare(dir.path(), &recovery).expect("prepare again");
    let text = read(&dir, "postgresql.conf");
    assert_eq!(text.matches("data_directory").count(), 2, "{text}");
    let own = format!("data_directory = '{}'", dir.path().display());
    assert!(text.find(&own) > text.find("/var/lib/postgresql"), "{text}");
    assert!(prepared.overrides.get("hba_file").is_some_and(|path| path.ends_with("pgrecall_hba.conf")));
    forget_recovery(&prepared, &recovery).expect("forget");
    let automatic = read(&dir, "postgresql.auto.conf");
    assert!(automatic.contains("work_mem = '7MB'") && !automatic.contains("recovery_target"), "{automatic}");
}

#[test]
fn the_socket_of_a_deep_directory_lies_elsewhere_and_is_ours_alone() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let deep = dir.path().join("x".repeat(120));
    fs::create_dir(&deep).expect("make");
    let socket = make_socket_directory(&deep, None).expect("make");
    assert!(socket.as_os_str().len() < 80 && !socket.starts_with(&deep), "{}", socket.display());
    assert_eq!(fs::metadata(&socket).expect("there").permissions().mode() & 0o777, 0o700);
    fs::remove_dir(&socket).expect("remove");
}
