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
    wait::until("shop streams", 20, || environment("shop").is_some_and(|e| e["daemon"]["state"] == "streaming"));
    let lost = wait::for_value("lost waits", 20, || environment("lost").filter(|e| e["daemon"]["state"] == "waiting"));
    assert!(lost["daemon"]["detail"].as_str().is_some_and(|d| d.contains("no connection to the server")), "{lost}");

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
