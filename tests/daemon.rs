//! The service as a process: started from a configuration file, asked over its socket, stopped by a signal.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::common::postgres::Cluster;
use crate::common::{NEWEST, wait};

/// A running `pgrecall daemon`; killed when dropped.
struct Daemon {
    child: Child,
    config: PathBuf,
}

impl Daemon {
    fn start(dir: &Path, config: &str) -> Daemon {
        let path = dir.join("config.toml");
        let socket = format!("control_socket = \"{}/control\"\n", dir.display());
        std::fs::write(&path, socket + config).expect("write the configuration");
        let log = std::fs::File::create(dir.join("daemon.log")).expect("make the log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgrecall"));
        command.args(["daemon", "--config"]).arg(&path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        Daemon { child: command.spawn().expect("start the daemon"), config: path }
    }

    fn status(&self) -> Option<serde_json::Value> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgrecall"));
        let run = command.args(["status", "--json", "--config"]).arg(&self.config).output().expect("run status");
        serde_json::from_slice(&run.stdout).ok()
    }

    /// Sends SIGTERM and returns the exit status.
    fn stop(mut self) -> Option<i32> {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill").success());
        let ended = wait::for_value("the daemon ends", 30, || self.child.try_wait().expect("wait for the daemon"));
        ended.code()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn the_daemon_archives_one_environment_beside_a_broken_one_and_stores_the_tail_when_stopped() {
    let cluster = Cluster::start_new(NEWEST);
    let dir = tempfile::tempdir().expect("temporary directory");
    let place = dir.path().display();
    let config = format!(
        "[defaults]\nrepository = \"file://{place}/repository\"\n\
         [environment.shop]\npostgres = \"{}\"\n\
         [environment.lost]\npostgres = \"host={place} user=nobody\"\n",
        cluster.conninfo()
    );
    let daemon = Daemon::start(dir.path(), &config);
    let environment = |name: &str| {
        let status = daemon.status()?;
        let all = status["environments"].as_array()?.clone();
        all.into_iter().find(|environment| environment["name"] == name)
    };
    wait::until("shop streams", 20, || environment("shop").is_some_and(|e| e["daemon"]["wal"] == "streaming"));
    let lost = wait::for_value("lost waits", 20, || {
        environment("lost").filter(|e| e["state"] == "unprotected" && e["daemon"]["wal"] == "disconnected")
    });
    assert!(lost["detail"].as_str().is_some_and(|d| d.contains("no connection to the server")), "{lost}");

    cluster.query("CREATE TABLE t AS SELECT generate_series(1, 1000) n");
    let end = cluster.flush_lsn();
    let config = daemon.config.clone();
    assert_eq!(daemon.stop(), Some(0), "{}", std::fs::read_to_string(dir.path().join("daemon.log")).unwrap());
    assert!(!dir.path().join("control").exists());

    let run = Command::new(env!("CARGO_BIN_EXE_pgrecall"))
        .args(["status", "shop", "--json", "--config"])
        .arg(config)
        .output();
    let status: serde_json::Value = serde_json::from_slice(&run.expect("run status").stdout).expect("JSON");
    assert_eq!(status["daemon"]["running"], false);
    let stored = status["environments"][0]["store"]["stored_to_lsn"].as_str().expect("a stored end").to_owned();
    let stored: pgrecall::pg::Lsn = stored.parse().expect("an LSN");
    assert!(stored >= end, "stored up to {stored}, committed up to {end}");
}

/// Runs a verb with `--json` and returns its document.
fn ask(config: &Path, arguments: &[&str]) -> Result<serde_json::Value, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgrecall"));
    let run = command.args(arguments).args(["--json", "--config"]).arg(config).output().expect("run pgrecall");
    // 11: an environment is not protected now, which `status` says in its document, too.
    let is_status = arguments.first() == Some(&"status") && run.status.code() == Some(11);
    match run.status.success() || is_status {
        true => Ok(serde_json::from_slice(&run.stdout).expect("JSON on standard output")),
        false => Err(String::from_utf8_lossy(&run.stderr).into_owned()),
    }
}

/// Ends a server by its process id.
struct Restored(String);

impl Drop for Restored {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-INT", &self.0]).status();
        wait::until("the restored server ends", 30, || !Path::new("/proc").join(&self.0).exists());
    }
}

fn restore(config: &Path, cluster: &Cluster, into: &Path, to: &str) -> (String, Restored) {
    let into = into.to_str().expect("UTF-8");
    let user = cluster.query("SELECT current_user");
    let arguments = ["restore", "shop", "--to", to, "--into", into, "--user", &user];
    let report = ask(config, &arguments).unwrap_or_else(|error| panic!("restore to {to}: {error}"));
    let pid = Restored(report["pid"].to_string());
    let psql = report["psql"].as_str().expect("how to connect");
    let words: Vec<&str> = psql.split(' ').skip(1).collect();
    let output = cluster.tool("psql").args(words).args(["-XAtc", "SELECT count(*) FROM orders"]).output();
    let output = output.expect("run psql");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    (String::from_utf8_lossy(&output.stdout).trim().to_owned(), pid)
}

#[test]
fn rows_deleted_by_accident_come_back_by_four_commands() {
    let cluster = Cluster::start_new(NEWEST);
    let dir = tempfile::tempdir().expect("temporary directory");
    let bin = crate::common::places::pg_bin(NEWEST);
    let config = format!(
        "[environment.shop]\npostgres = \"{}\"\nrepository = \"file://{}/repository\"\n\
         restore.postgres_bin_dirs = [\"{}\"]\n",
        cluster.conninfo(),
        dir.path().display(),
        bin.display()
    );
    cluster.query("CREATE TABLE orders AS SELECT generate_series(1, 1000) n");
    let daemon = Daemon::start(dir.path(), &config);
    let config = daemon.config.clone();
    let backups = || Some(ask(&config, &["backups", "shop"]).ok()?["backups"].as_array()?.len());
    wait::until("the first backup is taken by itself", 60, || backups() == Some(1));
    // The daemon may not have taken note of that one's end yet: the one that is asked for is another all the same.
    let first = ask(&config, &["backups", "shop"]).expect("the first")["backups"][0]["id"].clone();
    let asked = ask(&config, &["backup", "shop"]).expect("a backup that was asked for");
    assert_eq!(asked["event"], "done", "{asked}");
    assert_ne!(asked["backup"], first);
    assert_eq!(backups(), Some(2));

    cluster.query("INSERT INTO orders SELECT generate_series(1001, 1500)");
    let good =
        cluster.query("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')");
    cluster.query("DELETE FROM orders");
    cluster.query("SELECT txid_current()");
    let plan = wait::for_value("the moment is covered", 60, || ask(&config, &["plan", "shop", "--to", &good]).ok());
    assert!(plan["first_excluded"]["xid"].is_u64(), "{plan}");
    assert_eq!(restore(&config, &cluster, &dir.path().join("before"), &good).0, "1500");

    // The daemon gone, the server too: the store alone brings back the newest moment.
    let newest = cluster.flush_lsn();
    assert_eq!(daemon.stop(), Some(0));
    drop(cluster.query("SELECT 1"));
    let stored = ask(&config, &["status", "shop"]).expect("status");
    let window = &stored["environments"][0]["store"]["window"];
    assert_eq!(window.as_array().map(Vec::len), Some(1), "{window}");
    assert_eq!(
        (&window[0]["to_lsn"], &window[0]["ended_by"]),
        (&stored["environments"][0]["store"]["stored_to_lsn"], &serde_json::Value::Null)
    );
    assert!(window[0]["from"].as_str() <= window[0]["to"].as_str(), "{window}");
    let stored = stored["environments"][0]["store"]["stored_to_lsn"].as_str().expect("an LSN").parse();
    assert!(stored.is_ok_and(|stored: pgrecall::pg::Lsn| stored >= newest));
    assert_eq!(restore(&config, &cluster, &dir.path().join("latest"), "latest").0, "0");

    // Without a daemon a backup is taken from here, and the earlier ones stay.
    let alone = ask(&config, &["backup", "shop"]).expect("a backup without a daemon");
    assert_eq!(alone["event"], "done", "{alone}");
    assert_eq!(backups(), Some(3));
    assert!(ask(&config, &["verify", "shop", "--read-data"]).is_ok());
    let future = ask(&config, &["plan", "shop", "--to", "2099-01-01T00:00Z"]).expect_err("not there yet");
    assert!(future.contains("unreachable-target"), "{future}");
}

#[test]
fn a_backup_is_read_from_the_standby_among_the_hosts() {
    let primary = Cluster::start_new(NEWEST);
    primary.query("CREATE TABLE orders AS SELECT generate_series(1, 1000) n");
    let dir = tempfile::tempdir().expect("temporary directory");
    let hosts = |standby: &Cluster| {
        let sockets = format!("{},{}", primary.socket_dir().display(), standby.socket_dir().display());
        format!("host={sockets} port={},{} user=postgres dbname=postgres", primary.port(), standby.port())
    };
    let standby = primary.standby();
    let place = dir.path().display();
    let config = format!(
        "[environment.shop]\npostgres = \"{}\"\nbackup_from_standby = true\nrepository = \"file://{place}/repository\"\n",
        hosts(&standby)
    );
    let daemon = Daemon::start(dir.path(), &config);
    let streams = || daemon.status().is_some_and(|s| s["environments"][0]["daemon"]["wal"] == "streaming");
    wait::until("WAL flows from the primary", 60, streams);
    // From here on a restartpoint of the standby lies in the stored WAL.
    primary.switch_wal();
    primary.query("CHECKPOINT");
    standby.wait_replayed(primary.flush_lsn());
    standby.query("CHECKPOINT");
    let asked = ask(&daemon.config, &["backup", "shop"]).expect("a backup that was asked for");
    let listed = ask(&daemon.config, &["backups", "shop"]).expect("backups");
    let own = listed["backups"].as_array().and_then(|all| all.iter().find(|b| b["id"] == asked["backup"]).cloned());
    assert!(own.is_some_and(|backup| backup["from_standby"] == true), "{listed}");
    assert_eq!(daemon.stop(), Some(0));
}
