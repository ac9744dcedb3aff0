//! The program under test: its configuration, its daemon, its commands.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use pgrecall::pg::Lsn;

use super::clock::set_back;
use super::guard::{Directory, Process};
use super::minio::Bucket;
use super::postgres::{Cluster, tail};
use super::{logs, places, small_disk, wait};

/// Where the repository of an environment is.
#[derive(Clone, Debug)]
pub enum Store {
    /// A directory of this host.
    Directory(PathBuf),
    /// A bucket and a prefix in it.
    Bucket(Bucket, String),
}

/// One environment of a configuration file.
#[derive(Clone, Debug)]
pub struct Environment {
    name: String,
    postgres: Option<String>,
    store: Store,
    /// Lines of the environment's own table, such as `rpo = "0s"`.
    keys: Vec<String>,
    /// Lines of its `s3` table.
    s3: Vec<String>,
    master_key: Option<PathBuf>,
    majors: Vec<u16>,
}

impl Environment {
    pub fn new(name: &str, store: Store) -> Environment {
        let (s3, majors) = (Vec::new(), super::MAJORS.to_vec());
        Environment { name: name.to_owned(), postgres: None, store, keys: Vec::new(), s3, master_key: None, majors }
    }

    /// The server, reached by its Unix socket.
    pub fn cluster(self, cluster: &Cluster) -> Self {
        let conninfo = cluster.conninfo();
        self.postgres(&conninfo)
    }

    /// The server's connection string; without one the environment can only be listed and restored.
    pub fn postgres(mut self, conninfo: &str) -> Self {
        self.postgres = Some(conninfo.to_owned());
        self
    }

    /// A key of the environment, with its value as TOML writes it: `key("rpo", "\"0s\"")`.
    pub fn key(mut self, name: &str, value: &str) -> Self {
        self.keys.push(format!("{name} = {value}"));
        self
    }

    /// A key of the environment's `s3` table, with its value as TOML writes it.
    pub fn s3_key(mut self, name: &str, value: &str) -> Self {
        self.s3.push(format!("{name} = {value}"));
        self
    }

    /// Encrypted with the key in this file.
    pub fn encrypted(mut self, master_key_file: &Path) -> Self {
        self.master_key = Some(master_key_file.to_owned());
        self
    }

    /// The same environment without its server: what a fresh host knows.
    pub fn store_only(mut self) -> Self {
        self.postgres = None;
        self
    }

    fn write(&self, text: &mut String, dir: &Path) {
        let name = &self.name;
        writeln!(text, "\n[environment.{name}]").unwrap();
        if let Some(postgres) = &self.postgres {
            writeln!(text, "postgres = {postgres:?}").unwrap();
        }
        let repository = match &self.store {
            Store::Directory(path) => format!("file://{}", path.display()),
            Store::Bucket(bucket, prefix) => format!("s3://{}/{prefix}", bucket.name),
        };
        writeln!(text, "repository = {repository:?}").unwrap();
        for line in &self.keys {
            writeln!(text, "{line}").unwrap();
        }
        if let Store::Bucket(bucket, _) = &self.store {
            let (id, secret) = (dir.join(format!("{name}.id")), dir.join(format!("{name}.secret")));
            secret_file(&id, &bucket.access_key);
            secret_file(&secret, &bucket.secret_key);
            writeln!(text, "[environment.{name}.s3]\nendpoint = {:?}\nregion = {:?}", bucket.endpoint, bucket.region)
                .unwrap();
            writeln!(text, "access_key_id_file = {id:?}\nsecret_access_key_file = {secret:?}").unwrap();
            writeln!(text, "allow_http = {}", bucket.endpoint.starts_with("http:")).unwrap();
            if let Some(ca) = &bucket.ca_file {
                writeln!(text, "ca_file = {ca:?}").unwrap();
            }
            for line in &self.s3 {
                writeln!(text, "{line}").unwrap();
            }
        }
        if let Some(key) = &self.master_key {
            writeln!(text, "[environment.{name}.encryption]\nmaster_key_file = {key:?}").unwrap();
        }
        let bins: Vec<_> = self.majors.iter().map(|m| places::pg_bin(*m)).collect();
        writeln!(text, "[environment.{name}.restore]\npostgres_bin_dirs = {bins:?}").unwrap();
    }
}

/// Writes a file that only its owner may read.
pub fn secret_file(path: &Path, content: &str) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::write(path, content).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// One host's pgrecall: a configuration file, a control socket, perhaps a running daemon. Its log may hold no warning that
/// was not announced; that is checked when the value is dropped.
pub struct Pgrecall {
    dir: Directory,
    daemon: Option<Process>,
    announced: Vec<String>,
    level: &'static str,
    /// Lines before every table of the configuration, such as `metrics_listen = "…"`.
    keys: Vec<String>,
    /// Of the daemon's process environment.
    variables: Vec<(String, String)>,
    days_ago: u32,
    /// A directory that is a file system of so many MiB for the daemon.
    small_disk: Option<(PathBuf, u32)>,
}

/// What a command said.
#[derive(Debug)]
pub struct Answer {
    pub status: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Pgrecall {
    /// Writes the configuration.
    pub fn new(environments: &[Environment]) -> Pgrecall {
        let dir = Directory::new("host");
        let (announced, keys, variables) = (Vec::new(), Vec::new(), Vec::new());
        let level = "info,pgrecall=debug";
        let pgrecall = Pgrecall { dir, daemon: None, announced, level, keys, variables, days_ago: 0, small_disk: None };
        pgrecall.configure(environments);
        pgrecall
    }

    /// A key before every table, from the next [`Pgrecall::configure`] on.
    pub fn key(&mut self, name: &str, value: &str) {
        self.keys.push(format!("{name} = {value}"));
    }

    /// A variable of the daemon's environment, from its next start on.
    pub fn variable(&mut self, name: &str, value: &str) {
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// From its next start on the daemon has a file system of so many MiB at this directory, which nobody else sees.
    pub fn small_disk(&mut self, place: &Path, mib: u32) {
        self.small_disk = Some((place.to_owned(), mib));
    }

    /// Writes the configuration anew; a running daemon does not notice.
    pub fn configure(&self, environments: &[Environment]) {
        let socket = self.dir.join("control.sock");
        let mut text = format!("control_socket = {socket:?}\n");
        for line in &self.keys {
            writeln!(text, "{line}").unwrap();
        }
        writeln!(text, "[log]\nlevel = {:?}", self.level).unwrap();
        for environment in environments {
            environment.write(&mut text, self.dir.path());
        }
        secret_file(&self.config_file(), &text);
    }

    pub fn config_file(&self) -> PathBuf {
        self.dir.join("config.toml")
    }

    /// A folder that goes with this host.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// Announces that the log may warn with lines that contain this text.
    pub fn announce(&mut self, text: &str) {
        self.announced.push(text.to_owned());
    }

    /// The program with a clean environment and this host's configuration.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(places::pgrecall());
        command.env_clear().env("PATH", "/usr/bin:/bin").env("HOME", self.dir.path()).env("LC_ALL", "C.UTF-8");
        command.env("PGRECALL_CONFIG", self.config_file()).env("RUST_BACKTRACE", "1");
        command.current_dir(self.dir.path()).stdin(Stdio::null()).args(args);
        set_back(&mut command, self.days_ago);
        command
    }

    /// From now on this host's clock shows a time so many days ago.
    pub fn live_days_ago(&mut self, days: u32) {
        self.days_ago = days;
    }

    /// Runs a command to its end.
    pub fn try_run(&self, args: &[&str]) -> Answer {
        let Output { status, stdout, stderr } = self.command(args).output().expect("run pgrecall");
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Answer { status: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
    }

    /// Runs a command to its end; fails the test when it fails; gives its standard output. That not everything is protected is
    /// an answer of `status`, not its failure.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> String {
        let answer = self.try_run(args);
        let fine = answer.status == 0 || (args.first() == Some(&"status") && answer.status == 11);
        assert!(fine, "pgrecall {args:?} failed:\n{}", tail(&answer.stderr, 4000));
        answer.stdout
    }

    /// Runs a command with `--json`; fails the test when it fails.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> serde_json::Value {
        let text = self.run(&[args, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("pgrecall {args:?} --json is not JSON ({e}): {text}"))
    }

    /// Runs a command that must fail; gives what it said.
    #[track_caller]
    pub fn refused(&self, args: &[&str]) -> Answer {
        let answer = self.try_run(args);
        assert_ne!(answer.status, 0, "pgrecall {args:?} should have been refused: {}", answer.stdout);
        answer
    }

    /// Starts the daemon and returns at once.
    pub fn start_without_waiting(&mut self) {
        assert!(!self.is_running(), "the daemon runs already");
        let log = std::fs::File::options().create(true).append(true).open(self.log_file()).unwrap();
        let mut command = self.command(&["daemon"]);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        if let Some((place, mib)) = &self.small_disk {
            command = small_disk::within(&command, place, *mib);
        }
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.daemon = Some(Process::spawn(&mut command));
    }

    /// Starts the daemon and waits until it streams from every given server.
    pub fn start(&mut self, clusters: &[&Cluster]) {
        self.start_without_waiting();
        for cluster in clusters {
            wait::until("the daemon to stream", 60, || {
                assert!(self.is_running(), "the daemon ended:\n{}", tail(&self.log(), 4000));
                let streams = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' \
                     AND pid IN (SELECT active_pid FROM pg_replication_slots WHERE slot_name LIKE 'pgrecall%')";
                cluster.try_query(streams).is_ok_and(|n| n != "0")
            });
        }
    }

    /// Waits until an environment has a backup: the daemon takes the first one by itself.
    #[track_caller]
    pub fn wait_for_backup(&self, environment: &str) {
        wait::until("the first backup", 120, || {
            let list = self.try_run(&["backups", environment, "--json"]);
            let list: serde_json::Value = serde_json::from_str(&list.stdout).unwrap_or_default();
            list["backups"].as_array().is_some_and(|b| !b.is_empty())
        });
    }

    /// Waits until a server has been told that its WAL is stored as far as `lsn`.
    #[track_caller]
    pub fn wait_stored(&self, cluster: &Cluster, lsn: Lsn) {
        let stored = "SELECT min(flush_lsn) FROM pg_stat_replication WHERE application_name LIKE 'pgrecall%'";
        wait::until(&format!("the WAL up to {lsn} to be stored"), 120, || {
            cluster.query(stored).parse::<Lsn>().is_ok_and(|stored| stored >= lsn)
        });
    }

    pub fn is_running(&mut self) -> bool {
        self.daemon.as_mut().is_some_and(|d| d.ended().is_none())
    }

    /// The daemon's process, for signals and `/proc`.
    pub fn daemon(&mut self) -> &mut Process {
        self.daemon.as_mut().expect("the daemon was started")
    }

    /// SIGTERM; fails the test when the daemon is not gone in time or reports a failure.
    #[track_caller]
    pub fn stop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.signal("TERM");
            let status = daemon.wait(40);
            assert!(status.success(), "the daemon ended with {status}:\n{}", tail(&self.log(), 4000));
        }
    }

    /// `kill -9`.
    pub fn kill9(&mut self) {
        self.daemon = None;
    }

    pub fn log_file(&self) -> PathBuf {
        self.dir.join("daemon.log")
    }

    /// The log of all the daemons that ran here.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_file()).unwrap_or_default()).into_owned()
    }

    /// Waits until the log contains a text.
    #[track_caller]
    pub fn wait_logged(&self, text: &str, seconds: u64) {
        wait::until(&format!("{text:?} in the log"), seconds, || self.log().contains(text));
    }
}

impl Drop for Pgrecall {
    fn drop(&mut self) {
        self.daemon = None;
        if std::thread::panicking() {
            println!("--- the daemon's log, its end:\n{}", tail(&self.log(), 6000));
        } else {
            logs::check(&self.log_file(), &self.announced);
        }
    }
}
