use proptest::prelude::*;

use super::*;

fn parameters() -> RecoveryParameters {
    RecoveryParameters {
        wal_level: WalLevel::Minimal,
        wal_log_hints: false,
        max_connections: 250,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_transactions: 3,
        max_locks_per_transaction: 64,
        track_commit_timestamp: true,
    }
}

fn isolation(major: u16, parameters: &RecoveryParameters) -> Settings {
    isolated(&Isolation {
        major: Major(major),
        parameters,
        socket_directory: Path::new("/run/x"),
        port: 5432,
        preload_libraries: &[],
        jit: false,
        shared_buffers_bytes: 128 << 20,
    })
}

#[test]
fn an_isolated_server_reaches_nobody_and_archives_nothing() {
    let settings = isolation(18, &parameters());
    for (name, value) in [
        ("listen_addresses", ""),
        ("archive_mode", "off"),
        ("max_logical_replication_workers", "0"),
        ("primary_conninfo", ""),
        ("shared_preload_libraries", ""),
        ("max_connections", "250"),
        ("max_prepared_transactions", "3"),
        ("wal_level", "replica"),
        ("shared_buffers", "131072kB"),
    ] {
        assert_eq!(settings.get(name), Some(value), "{name}");
    }
}

#[test]
fn settings_that_a_major_does_not_know_are_not_given_to_it() {
    assert_eq!(isolation(14, &parameters()).get("log_startup_progress_interval"), None);
    assert_eq!(isolation(17, &parameters()).get("max_active_replication_origins"), None);
}

#[test]
fn the_target_comes_after_the_targets_that_are_emptied() {
    let target = Target { timeline: TimelineId(3), lsn: Lsn(0x300_0028), inclusive: false };
    let text = recovery(&target, TargetAction::Pause, "/bin/false").to_string();
    let place = |what: &str| text.find(what).unwrap_or_else(|| panic!("{what} in {text}"));
    for other in ["recovery_target = ''", "recovery_target_name = ''", "recovery_target_time = ''"] {
        assert!(place(other) < place("recovery_target_lsn = '0/3000028'"));
    }
    place("recovery_target_inclusive = 'off'");
    place("recovery_target_timeline = '3'");
    place("recovery_target_action = 'pause'");
}

#[test]
fn a_later_setting_replaces_the_earlier() {
    let mut first = Settings::new();
    first.set("a", "1").set("b", "2").set("a", "3");
    let mut second = Settings::new();
    second.set("b", "it's");
    assert_eq!(first.and(&second).to_string(), "a = '3'\nb = 'it''s'\n");
}

#[test]
fn restore_commands_survive_the_shell_and_the_configuration_file() {
    let line = restore_command(&["/opt/my tool/pgrecall", "wal-get", "100%", "%f", "%p", "it's"]);
    assert_eq!(line.as_deref(), Some("'/opt/my tool/pgrecall' wal-get '100%%' \"%f\" \"%p\" 'it'\\''s'"));
    assert_eq!(restore_command(&["a\nb"]), None);
    assert_eq!(quote("a\\b'c\n"), "'a\\\\b''c\\n'");
}

proptest! {
    #[test]
    fn words_reach_the_program_as_they_are(words in proptest::collection::vec("[^\0\n\r]{0,12}", 1..4)) {
        prop_assume!(words.iter().all(|word| word != "%f" && word != "%p"));
        let line = restore_command(&words).expect("no line ends").replace("%%", "%");
        let output = std::process::Command::new("sh")
            .args(["-c", &format!("printf '%s\\n' {line}")])
            .output()
            .expect("run sh");
        let expected: String = words.iter().map(|word| format!("{word}\n")).collect();
        prop_assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    }
}
