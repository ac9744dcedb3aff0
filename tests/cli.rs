//! The command line as a script sees it: what is printed where, and the exit status.

use std::path::Path;
use std::process::{Command, Output};

use crate::common::NEWEST;
use crate::common::postgres::Cluster;

fn pgrecall(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgrecall"));
    command.args(arguments).env_remove("PGRECALL_CONFIG").env_remove("PGRECALL_LOG");
    command.output().expect("run pgrecall")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn write(dir: &Path, content: &str) -> String {
    let path = dir.join("config.toml");
    pgrecall::util::durable_fs::write(&path, content.as_bytes(), 0o600).expect("write the configuration");
    path.to_str().expect("UTF-8").to_owned()
}

#[test]
fn a_broken_configuration_lists_every_problem_and_ends_with_3() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let config = write(dir.path(), "[environment.shop]\nrpo = 5\nwindw = \"1d\"\nrepository = \"file:///a\"\n");
    let run = pgrecall(&["--config", &config, "config", "check"]);
    assert_eq!(run.status.code(), Some(3));
    assert_eq!(text(&run.stdout), "");
    let stderr = text(&run.stderr);
    assert!(stderr.starts_with(&format!("error: failed to use the configuration {config}: 2 problems\n")), "{stderr}");
    assert!(stderr.contains("\n  line 2: environment.shop.rpo: needs a unit"), "{stderr}");
    assert!(stderr.contains("\n  line 3: environment.shop.windw: unknown key (did you mean window?)"), "{stderr}");

    let run = pgrecall(&["config", "check", "--config", &config, "--json"]);
    assert_eq!(run.status.code(), Some(3));
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).expect("JSON on standard output");
    assert_eq!(report["valid"], false);
    assert_eq!(
        (&report["problems"][1]["line"], &report["problems"][1]["key"]),
        (&3.into(), &"environment.shop.windw".into())
    );
    let failure: serde_json::Value = serde_json::from_slice(&run.stderr).expect("JSON on standard error");
    assert_eq!(failure["error"]["code"], "configuration");
}

#[test]
fn a_good_configuration_is_told_in_short_and_an_unreadable_secret_is_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let place = dir.path().display();
    let config = write(dir.path(), &format!("[environment.shop]\nrepository = \"file://{place}\"\n"));
    let run = pgrecall(&["--config", &config, "config", "check"]);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    assert!(text(&run.stdout).contains(&format!("shop: file://{place}, only to be listed")), "{}", text(&run.stdout));

    let config = write(
        dir.path(),
        "[environment.shop]\nrepository = \"file:///a\"\nencryption.master_key_file = \"/nowhere\"\n",
    );
    let run = pgrecall(&["--config", &config, "config", "check"]);
    assert_eq!(run.status.code(), Some(3));
    assert!(text(&run.stderr).contains("shop: read /nowhere: No such file"), "{}", text(&run.stderr));
}

#[test]
fn a_check_of_the_configuration_asks_the_store_and_the_server() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let place = dir.path().display();
    let server = format!("postgres = \"host={place}\"\nrepository = \"file://{place}\"\n");
    let config = write(dir.path(), &format!("[environment.shop]\n{server}"));
    let run = pgrecall(&["--config", &config, "config", "check"]);
    assert_eq!(run.status.code(), Some(6), "{}", text(&run.stderr));
    assert!(text(&run.stdout).contains("slot pgrecall_shop\n    the server cannot be asked: connect to"));
    assert!(text(&run.stderr).starts_with("error: failed to check shop: connect to "), "{}", text(&run.stderr));

    let config = write(dir.path(), &format!("[environment.shop]\nrepository = \"file://{place}/config.toml\"\n"));
    let run = pgrecall(&["--config", &config, "config", "check"]);
    assert_eq!(run.status.code(), Some(5), "{}", text(&run.stdout));
    assert!(text(&run.stdout).contains("the store cannot be used: "), "{}", text(&run.stdout));
}

#[test]
fn a_missing_configuration_says_where_it_may_lie() {
    let run = pgrecall(&["config", "check", "--config", "/nowhere/config.toml"]);
    assert_eq!(run.status.code(), Some(3));
    let stderr = text(&run.stderr);
    assert!(stderr.contains("hint: Name the file with --config or PGRECALL_CONFIG"), "{stderr}");
}

#[test]
fn wrong_arguments_end_with_2() {
    assert_eq!(pgrecall(&["frobnicate"]).status.code(), Some(2));
    let version = pgrecall(&["--version"]);
    assert_eq!(version.status.code(), Some(0));
    assert_eq!(text(&version.stdout), format!("pgrecall {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn status_without_daemon_and_without_anything_stored_is_no_error() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let place = dir.path().display();
    let environments = format!(
        "[environment.shop]\nrepository = \"file://{place}\"\n[environment.lost]\nrepository = \"file://{place}/gone\"\n"
    );
    let config = write(dir.path(), &format!("control_socket = \"{place}/socket\"\n{environments}"));
    let run = pgrecall(&["--config", &config, "status", "shop"]);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    let stdout = text(&run.stdout);
    assert!(stdout.contains("daemon: not running") && stdout.contains("nothing is stored yet"), "{stdout}");
    assert_eq!(pgrecall(&["--config", &config, "backups", "shop"]).status.code(), Some(10));

    // One environment that cannot be read hides no other, and is the exit status.
    let run = pgrecall(&["--config", &config, "status", "--json"]);
    assert_eq!(run.status.code(), Some(5));
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).expect("JSON");
    assert_eq!(report["environments"].as_array().map(Vec::len), Some(2));
    assert_eq!(report["daemon"]["running"], false);

    let run = pgrecall(&["--config", &config, "status", "shp"]);
    assert_eq!(run.status.code(), Some(10));
    assert!(text(&run.stderr).ends_with("hint: Did you mean shop?\n"), "{}", text(&run.stderr));
}

#[test]
fn a_slot_is_dropped_once_and_an_incarnation_needs_a_confirmation() {
    let cluster = Cluster::start_new(NEWEST);
    cluster.query("SELECT pg_create_physical_replication_slot('pgrecall_shop', true)");
    let dir = tempfile::tempdir().expect("temporary directory");
    let postgres = cluster.conninfo();
    let place = dir.path().display();
    let config =
        write(dir.path(), &format!("[environment.shop]\npostgres = \"{postgres}\"\nrepository = \"file://{place}\"\n"));
    cluster.query("SELECT pg_create_physical_replication_slot('pgrecall_forgotten', true)");
    let check = pgrecall(&["--config", &config, "config", "check", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&check.stdout).expect("JSON");
    let unowned = &report["environments"][0]["unowned_slots"];
    assert_eq!((unowned.as_array().map(Vec::len), &unowned[0]["slot"]), (Some(1), &"pgrecall_forgotten".into()));
    cluster.query("SELECT pg_drop_replication_slot('pgrecall_forgotten')");
    assert_eq!(report["environments"][0]["unlimited_wal"], serde_json::json!([]));
    cluster.query("ALTER SYSTEM SET max_slot_wal_keep_size = -1");
    cluster.query("SELECT pg_reload_conf()");
    let check = pgrecall(&["--config", &config, "config", "check", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&check.stdout).expect("JSON");
    let statement =
        report["environments"][0]["unlimited_wal"][0]["statement"].as_str().expect("a statement").to_owned();
    for statement in statement.split_inclusive(';') {
        cluster.query(statement);
    }
    let limit =
        cluster.query("SELECT pg_size_bytes(setting || unit) FROM pg_settings WHERE name = 'max_slot_wal_keep_size'");
    assert!(limit.parse::<i64>().expect("a number") >= 64 << 20, "{statement}: {limit}");

    let run = pgrecall(&["--config", &config, "slot", "drop", "shop"]);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    assert!(text(&run.stdout).starts_with("slot pgrecall_shop dropped on "), "{}", text(&run.stdout));
    assert_eq!(cluster.query("SELECT count(*) FROM pg_replication_slots"), "0");
    let again = pgrecall(&["--config", &config, "slot", "drop", "shop"]);
    assert_eq!(again.status.code(), Some(10), "{}", text(&again.stderr));

    let unconfirmed = pgrecall(&["--config", &config, "incarnation", "open", "shop", "--confirm", "shp"]);
    assert_eq!(unconfirmed.status.code(), Some(2));
    let empty = pgrecall(&["--config", &config, "incarnation", "open", "shop", "--confirm", "shop"]);
    assert_eq!(empty.status.code(), Some(10), "{}", text(&empty.stderr));
}

#[test]
fn wal_get_never_says_by_mistake_that_a_file_does_not_exist() {
    for arguments in
        [["wal-get", "a"].as_slice(), &["wal-get", "--nonsense"], &["wal-get", "000000010000000000000001", "x"]]
    {
        let run = pgrecall(arguments);
        assert_eq!(run.status.code(), Some(200), "{arguments:?}: {}", text(&run.stderr));
    }
}
