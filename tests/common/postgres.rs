//! Real PostgreSQL clusters in temporary directories.
//!
//! A cluster is a copy of one that `initdb` made once for its major, so those of one major share a system identifier unless
//! [`Builder::fresh`] is asked for. Each has its own socket directory and listens nowhere else unless [`Builder::tcp`] is.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use pgrecall::pg::Lsn;

use super::clock::set_back;
use super::guard::{Directory, Process, free_port};
use super::{places, wait};

/// What every server of a test has; a test's own settings come on top.
const SETTINGS: [(&str, &str); 14] = [
    ("autovacuum", "off"),
    ("checkpoint_timeout", "30min"),
    ("fsync", "off"),
    ("hot_standby", "on"),
    ("jit", "off"),
    ("log_min_messages", "info"),
    ("log_replication_commands", "on"),
    ("max_prepared_transactions", "20"),
    ("max_slot_wal_keep_size", "100GB"),
    ("max_wal_senders", "10"),
    ("max_wal_size", "2GB"),
    ("shared_buffers", "32MB"),
    ("timezone", "UTC"),
    ("wal_level", "replica"),
];

/// How a server is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    Smart,
    Fast,
    Immediate,
}

/// A cluster before it is made.
#[derive(Clone, Debug)]
pub struct Builder {
    major: u16,
    fresh: bool,
    checksums: bool,
    segment_mib: u32,
    tcp: bool,
    settings: BTreeMap<String, String>,
    hba: Option<String>,
}

impl Builder {
    /// One setting of `postgresql.conf`.
    pub fn setting(mut self, name: &str, value: &str) -> Self {
        self.settings.insert(name.to_owned(), value.to_owned());
        self
    }

    /// A system identifier of its own: `initdb` runs, which takes a second.
    pub fn fresh(mut self) -> Self {
        self.fresh = true;
        self
    }

    pub fn without_checksums(mut self) -> Self {
        self.checksums = false;
        self
    }

    /// The size of a WAL segment; 16 without this call.
    pub fn segment_mib(mut self, mib: u32) -> Self {
        self.segment_mib = mib;
        self
    }

    /// Listens on a loopback port too.
    pub fn tcp(mut self) -> Self {
        self.tcp = true;
        self
    }

    /// The content of `pg_hba.conf`; without this call everybody is trusted.
    pub fn hba(mut self, text: &str) -> Self {
        self.hba = Some(text.to_owned());
        self
    }

    /// Makes the data directory, and does not start it.
    pub fn make(self) -> Cluster {
        let dir = Directory::new(&format!("pg{}", self.major));
        let data = dir.join("data");
        if self.fresh {
            initdb(&self, &data);
        } else {
            copy(&template(&self), &data);
        }
        if let Some(hba) = &self.hba {
            std::fs::write(data.join("pg_hba.conf"), hba).unwrap();
        }
        let mut cluster = Cluster::of_directory(self.major, dir, data, self.tcp);
        cluster.settings.extend(self.settings);
        cluster.write_settings();
        cluster
    }

    /// Makes and starts it.
    pub fn start(self) -> Cluster {
        let mut cluster = self.make();
        cluster.start();
        cluster
    }
}

/// One data directory and, mostly, a running server on it.
pub struct Cluster {
    major: u16,
    /// Holds the data directory, unless that was adopted, and always the socket and the server's log.
    dir: Directory,
    data: PathBuf,
    tcp: bool,
    port: u16,
    settings: BTreeMap<String, String>,
    /// Settings of the command line, which win over every file.
    overrides: Vec<(String, String)>,
    days_ago: u32,
    process: Option<Process>,
}

impl Cluster {
    pub fn builder(major: u16) -> Builder {
        Builder {
            major,
            fresh: false,
            checksums: true,
            segment_mib: 16,
            tcp: false,
            settings: BTreeMap::new(),
            hba: None,
        }
    }

    /// A running cluster with nothing special about it.
    pub fn start_new(major: u16) -> Cluster {
        Cluster::builder(major).start()
    }

    /// A data directory that somebody else made, for example a restore. Its configuration stays as it is, but a server
    /// started here listens only on its own socket and archives nothing.
    pub fn adopt(major: u16, data: &Path) -> Cluster {
        let mut cluster = Cluster::of_directory(major, Directory::new("adopt"), data.to_owned(), false);
        for (name, value) in [
            ("listen_addresses", ""),
            ("archive_mode", "off"),
            ("ssl", "off"),
            ("fsync", "off"),
            ("logging_collector", "off"),
            ("log_destination", "stderr"),
            ("synchronous_standby_names", ""),
        ] {
            cluster.overrides.push((name.to_owned(), value.to_owned()));
        }
        let socket = cluster.socket_dir().display().to_string();
        cluster.overrides.push(("unix_socket_directories".to_owned(), socket));
        cluster.overrides.push(("port".to_owned(), cluster.port.to_string()));
        cluster
    }

    fn of_directory(major: u16, dir: Directory, data: PathBuf, tcp: bool) -> Cluster {
        std::fs::create_dir(dir.join("socket")).unwrap();
        let port = if tcp { free_port() } else { 5432 };
        let settings = SETTINGS.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Cluster { major, dir, data, tcp, port, settings, overrides: Vec::new(), days_ago: 0, process: None }
    }

    pub fn major(&self) -> u16 {
        self.major
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn socket_dir(&self) -> PathBuf {
        self.dir.join("socket")
    }

    /// A folder beside the data directory that goes with the cluster.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    /// The server's log since the cluster was made.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.join("log")).unwrap_or_default()).into_owned()
    }

    /// A connection string of libpq's keyword form, by the Unix socket.
    pub fn conninfo(&self) -> String {
        format!("host={} port={} user=postgres dbname=postgres", self.socket_dir().display(), self.port)
    }

    /// Sets a setting in `postgresql.conf`; it is in force after `reload` or `restart`.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.insert(name.to_owned(), value.to_owned());
        self.write_settings();
    }

    /// Sets a setting of the server's command line for the next start.
    pub fn set_override(&mut self, name: &str, value: &str) {
        self.overrides.push((name.to_owned(), value.to_owned()));
    }

    fn write_settings(&self) {
        let mut text = String::new();
        for (name, value) in &self.settings {
            writeln!(text, "{name} = '{}'", value.replace('\'', "''")).unwrap();
        }
        let listen = if self.tcp { "127.0.0.1" } else { "" };
        writeln!(text, "listen_addresses = '{listen}'\nport = {}", self.port).unwrap();
        writeln!(text, "unix_socket_directories = '{}'", self.socket_dir().display()).unwrap();
        std::fs::write(self.data.join("test.conf"), text).unwrap();
        let main = self.data.join("postgresql.conf");
        let old = std::fs::read_to_string(&main).unwrap();
        if !old.contains("test.conf") {
            std::fs::write(&main, old + "\ninclude_if_exists = 'test.conf'\n").unwrap();
        }
    }

    /// Starts the server and waits until it takes connections.
    pub fn start(&mut self) {
        self.start_without_waiting();
        wait::until("PostgreSQL to take connections", 120, || {
            let ended = self.process.as_mut().and_then(Process::ended);
            assert!(ended.is_none(), "PostgreSQL ended: {}", tail(&self.log(), 3000));
            self.try_query("SELECT 1").is_ok()
        });
    }

    /// Starts the server and returns at once.
    pub fn start_without_waiting(&mut self) {
        assert!(!self.is_running(), "the server runs already");
        let log = std::fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let mut command = self.tool("postgres");
        command.arg("-D").arg(&self.data);
        for (name, value) in &self.overrides {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        set_back(&mut command, self.days_ago);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.process = Some(Process::spawn(&mut command));
    }

    /// From its next start on the server lives so many days ago.
    pub fn live_days_ago(&mut self, days: u32) {
        self.days_ago = days;
    }

    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|p| p.ended().is_none())
    }

    /// The process id of the postmaster.
    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the server was started").pid()
    }

    /// Tells the server to stop, and returns at once.
    pub fn begin_stop(&mut self, how: Stop) {
        let signal = match how {
            Stop::Smart => "TERM",
            Stop::Fast => "INT",
            Stop::Immediate => "QUIT",
        };
        self.process.as_mut().expect("the server was started").signal(signal);
    }

    /// Stops the server and waits for its end, at most a minute.
    pub fn stop(&mut self, how: Stop) {
        if self.is_running() {
            self.begin_stop(how);
            self.wait_ended(60);
        }
        self.process = None;
    }

    /// Waits for the server's end, whoever asked for it.
    pub fn wait_ended(&mut self, seconds: u64) {
        if let Some(process) = &mut self.process {
            process.wait(seconds);
        }
    }

    /// Kills the server and all its processes in one instant, as a crash does.
    pub fn kill9(&mut self) {
        self.process = None;
        let _ = std::fs::remove_file(self.data.join("postmaster.pid"));
    }

    pub fn restart(&mut self) {
        self.stop(Stop::Fast);
        self.start();
    }

    pub fn reload(&self) {
        self.query("SELECT pg_reload_conf()");
    }

    /// A program of the cluster's major, with a clean environment that points to this server.
    pub fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(places::pg_program(self.major, name));
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("LC_ALL", "C.UTF-8");
        command.env("PGHOST", self.socket_dir()).env("PGPORT", self.port.to_string()).env("PGUSER", "postgres");
        command
            .env("PGDATABASE", "postgres")
            .env("TZ", "UTC")
            .env("HOME", self.dir.path())
            .current_dir(self.dir.path());
        command
    }

    /// Runs a program of the cluster's major; gives its standard output, fails the test when it fails.
    #[track_caller]
    pub fn run(&self, name: &str, args: &[&str]) -> String {
        run(self.tool(name).args(args))
    }

    /// The answer of one query (or several), unaligned, without header.
    #[track_caller]
    pub fn query(&self, sql: &str) -> String {
        self.query_in("postgres", sql)
    }

    #[track_caller]
    pub fn query_in(&self, database: &str, sql: &str) -> String {
        self.try_query_in(database, sql).unwrap_or_else(|e| panic!("{e}\nin: {}", tail(sql, 500)))
    }

    /// The answer, or psql's message.
    pub fn try_query(&self, sql: &str) -> Result<String, String> {
        self.try_query_in("postgres", sql)
    }

    pub fn try_query_in(&self, database: &str, sql: &str) -> Result<String, String> {
        let mut command = self.tool("psql");
        command.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-f", "-"]);
        let done = with_input(&mut command, sql.as_bytes());
        if done.status.success() {
            Ok(String::from_utf8_lossy(&done.stdout).trim_end_matches('\n').to_owned())
        } else {
            Err(String::from_utf8_lossy(&done.stderr).trim().to_owned())
        }
    }

    /// The first column of the answer, one element a row.
    #[track_caller]
    pub fn rows(&self, sql: &str) -> Vec<String> {
        self.query(sql).lines().map(str::to_owned).collect()
    }

    /// An LSN that a query gives.
    #[track_caller]
    pub fn lsn(&self, sql: &str) -> Lsn {
        self.query(sql).parse().expect("the query gives an LSN")
    }

    pub fn insert_lsn(&self) -> Lsn {
        self.lsn("SELECT pg_current_wal_insert_lsn()")
    }

    pub fn flush_lsn(&self) -> Lsn {
        self.lsn("SELECT pg_current_wal_flush_lsn()")
    }

    /// Ends the current segment, even when nothing was written to it; gives the name of the ended file.
    pub fn switch_wal(&self) -> String {
        self.query("SELECT pg_logical_emit_message(false, 'test', 'x')");
        self.query("SELECT pg_walfile_name(pg_switch_wal())")
    }

    /// The timeline that a primary writes.
    pub fn timeline(&self) -> u32 {
        let name = self.query("SELECT pg_walfile_name(pg_current_wal_lsn())");
        u32::from_str_radix(&name[..8], 16).expect("a file name begins with its timeline")
    }

    /// The system identifier, as a number in text.
    pub fn system_identifier(&self) -> String {
        self.query("SELECT system_identifier FROM pg_control_system()")
    }

    /// A connection of `tokio_postgres`; its driver runs as a task until the client is dropped.
    pub async fn connect(&self) -> tokio_postgres::Client {
        self.try_connect("postgres").await.expect("connect to PostgreSQL")
    }

    pub async fn try_connect(&self, database: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host_path(self.socket_dir()).port(self.port).user("postgres").dbname(database);
        let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Runs pgbench to its end; gives its output.
    #[track_caller]
    pub fn pgbench(&self, args: &[&str]) -> String {
        run(self.tool("pgbench").args(args))
    }

    /// Starts pgbench and returns; it is killed when the value is dropped.
    pub fn pgbench_in_background(&self, args: &[&str]) -> Process {
        Process::spawn(self.tool("pgbench").args(args).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()))
    }

    /// A standby that streams from this server, started and caught up.
    pub fn standby(&self) -> Cluster {
        let dir = Directory::new(&format!("standby{}", self.major));
        let data = dir.join("data");
        let target = data.display().to_string();
        self.run("pg_basebackup", &["-D", &target, "-X", "stream", "-c", "fast", "--no-sync"]);
        let mut standby = Cluster::of_directory(self.major, dir, data, self.tcp);
        standby.settings = self.settings.clone();
        // Not `pg_basebackup -R`: what it writes for 18 is refused by an older libpq of the system.
        let source = format!("host={} port={} user=postgres", self.socket_dir().display(), self.port);
        standby.settings.insert("primary_conninfo".to_owned(), source);
        // A comparison may take long on a busy machine: replay waits for it.
        standby.settings.insert("max_standby_streaming_delay".to_owned(), "-1".to_owned());
        standby.settings.insert("max_standby_archive_delay".to_owned(), "-1".to_owned());
        std::fs::write(standby.data.join("standby.signal"), "").unwrap();
        standby.write_settings();
        standby.start();
        standby.wait_replayed(self.flush_lsn());
        standby
    }

    /// Waits until a standby has replayed up to `lsn`.
    pub fn wait_replayed(&self, lsn: Lsn) {
        wait::until(&format!("replay of {lsn}"), 60, || {
            self.query("SELECT coalesce(pg_last_wal_replay_lsn(), '0/0')").parse::<Lsn>().unwrap() >= lsn
        });
    }

    /// Promotes a standby and waits until it takes writes.
    pub fn promote(&self) {
        self.query("SELECT pg_promote(true, 60)");
        self.wait_writable();
    }

    /// Waits for the end of recovery.
    pub fn wait_writable(&self) {
        wait::until("the end of recovery", 600, || self.try_query("SELECT pg_is_in_recovery()").as_deref() == Ok("f"));
    }

    /// The names of the files in `pg_wal`, sorted.
    pub fn wal_files(&self) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(self.data.join("pg_wal"))
            .unwrap()
            .flatten()
            .filter(|e| e.path().is_file())
            .filter_map(|e| e.file_name().into_string().ok())
            .collect();
        names.sort();
        names
    }
}

/// Runs a command to its end; gives its standard output, fails the test with its messages when it fails.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let done = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?} failed, {}: {}", done.status, tail(&errors, 3000));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Runs a command to its end with `input` as its standard input.
pub fn with_input(command: &mut Command, input: &[u8]) -> std::process::Output {
    use std::io::Write;
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
    let mut pipe = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || pipe.write_all(input));
        child.wait_with_output().unwrap()
    })
}

/// Copies a directory as it is.
pub fn copy(from: &Path, to: &Path) {
    run(Command::new("cp").args(["-a", "--reflink=auto"]).arg(from).arg(to));
}

/// At most the last `bytes` bytes of a text.
pub fn tail(text: &str, bytes: usize) -> &str {
    let start = (text.len().saturating_sub(bytes)..text.len()).find(|i| text.is_char_boundary(*i));
    start.map_or(text, |start| &text[start..])
}

fn initdb(builder: &Builder, data: &Path) {
    let mut command = Command::new(places::pg_program(builder.major, "initdb"));
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("LC_ALL", "C.UTF-8");
    command.arg("-D").arg(data).args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]);
    command.arg(format!("--wal-segsize={}", builder.segment_mib));
    if builder.checksums {
        command.arg("-k");
    } else if builder.major >= 18 {
        command.arg("--no-data-checksums");
    }
    run(&mut command);
}

/// A data directory that `initdb` made, kept between runs; nobody starts a server on it.
fn template(builder: &Builder) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let checksums = if builder.checksums { "checksums" } else { "plain" };
    let place = places::kept().join(format!("pg{}-{}mib-{checksums}", builder.major, builder.segment_mib));
    if !place.exists() {
        let fresh = place.with_extension(std::process::id().to_string());
        let _ = std::fs::remove_dir_all(&fresh);
        initdb(builder, &fresh);
        // Another process may have been faster; its copy is as good.
        if std::fs::rename(&fresh, &place).is_err() {
            let _ = std::fs::remove_dir_all(&fresh);
        }
    }
    place
}
