//! The daemon as a service: told of another configuration, watched by a service manager and a collector, beside broken
//! environments.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::common::minio::Minio;
use crate::common::pgrecall::{Environment, Pgrecall, Store, secret_file};
use crate::common::places;
use crate::common::postgres::Cluster;
use crate::common::proxy::s3::{Fault, Rule, S3Proxy};
use crate::common::{NEWEST, clock, guard, slow, small_disk, wait};

/// An environment whose repository is a directory of this host.
fn environment(host: &Pgrecall, name: &str) -> Environment {
    Environment::new(name, Store::Directory(host.scratch().join(name)))
}

fn of(host: &Pgrecall, name: &str) -> serde_json::Value {
    let status: serde_json::Value =
        serde_json::from_str(&host.try_run(&["status", "--json"]).stdout).unwrap_or_default();
    let all = status["environments"].as_array().cloned().unwrap_or_default();
    all.into_iter().find(|environment| environment["name"] == name).unwrap_or_default()
}

/// What the daemon itself says of an environment: `status` reads the store of one of which the daemon knows nothing yet.
fn told(host: &Pgrecall, name: &str) -> serde_json::Value {
    let socket = host.scratch().join("control.sock");
    let mut curl = Command::new("curl");
    let done = curl.args(["-s", "-m", "20", "--unix-socket"]).arg(socket).arg("http://pgrecall/v1/status").output();
    let status: serde_json::Value = serde_json::from_slice(&done.expect("run curl").stdout).unwrap_or_default();
    let all = status["environments"].as_array().cloned().unwrap_or_default();
    all.into_iter().find(|environment| environment["name"] == name).unwrap_or_default()
}

fn wait_state(host: &Pgrecall, name: &str, state: &str) {
    wait::until(&format!("{name} is {state}"), 90, || of(host, name)["state"] == state);
}

fn walsender(cluster: &Cluster) -> String {
    cluster.query("SELECT pid FROM pg_stat_replication WHERE state = 'streaming'")
}

#[test]
fn a_reload_touches_only_what_changed_and_names_what_stays() {
    let (shop, cafe) = (Cluster::start_new(NEWEST), Cluster::start_new(NEWEST));
    let mut host = Pgrecall::new(&[]);
    let (kept, other) = (environment(&host, "shop").cluster(&shop), environment(&host, "cafe").cluster(&cafe));
    host.configure(&[kept.clone(), other.clone()]);
    host.start(&[&shop, &cafe]);
    ["shop", "cafe"].iter().for_each(|name| wait_state(&host, name, "protected"));
    let (shop_pid, cafe_pid) = (walsender(&shop), walsender(&cafe));

    // A configuration with a mistake changes nothing.
    secret_file(&host.config_file(), "controlsocket = 1\n");
    host.announce("nothing has changed");
    host.daemon().signal("HUP");
    host.wait_logged("unknown key (did you mean control_socket?)", 20);
    assert_eq!((walsender(&shop), walsender(&cafe)), (shop_pid.clone(), cafe_pid.clone()));

    // Another value in one environment: that one alone begins anew.
    host.configure(&[kept.clone(), other.key("rpo", "\"0s\""), environment(&host, "museum")]);
    host.daemon().signal("HUP");
    wait::until("cafe streams anew", 60, || !["", cafe_pid.as_str()].contains(&walsender(&cafe).as_str()));
    assert_eq!(walsender(&shop), shop_pid);

    // Where there is no server, there is nothing for the daemon to do.
    let answer = host.refused(&["backup", "museum"]);
    assert!(answer.stderr.contains("looks after no server of museum"), "{}", answer.stderr);

    // One that is taken out ends, and says what stays.
    host.announce("not looked after any more");
    host.configure(&[kept]);
    host.daemon().signal("HUP");
    wait::until("nobody streams from cafe", 60, || walsender(&cafe).is_empty());
    host.wait_logged("SELECT pg_drop_replication_slot('pgrecall_cafe')", 10);
    host.wait_logged("delete what lies there", 10);
    assert_eq!(walsender(&shop), shop_pid);
    let slots = cafe.query("SELECT count(*) FROM pg_replication_slots WHERE NOT active");
    assert_eq!(slots, "1", "the slot is left to the operator");
    host.stop();
}

/// What the service manager has heard so far.
struct Manager {
    socket: UnixDatagram,
    heard: String,
}

impl Manager {
    fn hears(&mut self, text: &str) -> bool {
        let mut buffer = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            self.heard.push_str(&String::from_utf8_lossy(&buffer[..length]));
            self.heard.push('\n');
        }
        self.heard.lines().any(|line| line.starts_with(text))
    }
}

#[test]
fn the_service_manager_hears_that_the_daemon_is_ready_works_and_stops() {
    let cluster = Cluster::start_new(NEWEST);
    let mut host = Pgrecall::new(&[]);
    let path = host.scratch().join("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut manager = Manager { socket, heard: String::new() };
    host.configure(&[environment(&host, "shop").cluster(&cluster)]);
    host.variable("NOTIFY_SOCKET", path.to_str().unwrap());
    host.variable("WATCHDOG_USEC", "1500000");
    host.start(&[&cluster]);
    wait::until("READY=1", 30, || manager.hears("READY=1"));
    wait::until("a status in words", 60, || manager.hears("STATUS=1 protected"));
    manager.heard.clear();
    wait::until("the watchdog is fed", 5, || manager.hears("WATCHDOG=1"));
    host.stop();
    assert!(manager.hears("STOPPING=1") && manager.hears("EXTEND_TIMEOUT_USEC="), "{}", manager.heard);
}

fn get(port: u16, path: &str) -> String {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_collector_reads_metrics_and_health_on_the_loopback_address() {
    let cluster = Cluster::start_new(NEWEST);
    let mut host = Pgrecall::new(&[]);
    let port = guard::free_port();
    host.key("metrics_listen", &format!("\"127.0.0.1:{port}\""));
    host.configure(&[environment(&host, "shop").cluster(&cluster)]);
    host.start(&[&cluster]);
    wait_state(&host, "shop", "protected");
    let has = |line: &str| get(port, "/metrics").lines().any(|found| found.starts_with(line));
    for line in [
        "pgrecall_state{environment=\"shop\",state=\"protected\"} 1",
        "pgrecall_window_end_timestamp_seconds{environment=\"shop\"} ",
        "pgrecall_gaps{environment=\"shop\"} 0",
        "pgrecall_backups{environment=\"shop\"} 1",
        "pgrecall_slot_retained_bytes{environment=\"shop\"} ",
        "pgrecall_exposure_seconds{environment=\"shop\"} ",
        "pgrecall_jobs_total{environment=\"shop\",kind=\"backup\",outcome=\"done\"} 1",
        "pgrecall_jobs_total{environment=\"shop\",kind=\"prune\",outcome=\"failed\"} 0",
        "pgrecall_store_errors_total{environment=\"shop\"} 0",
    ] {
        wait::until(line, 60, || has(line));
    }
    let health = get(port, "/health");
    assert!(health.starts_with("HTTP/1.1 200") && health.contains("ok: 1 of 1"), "{health}");
    assert!(get(port, "/else").starts_with("HTTP/1.1 404"));
    host.stop();
}

#[test]
fn a_broken_environment_of_each_kind_delays_no_other() {
    let good = Cluster::start_new(NEWEST);
    let mut host = Pgrecall::new(&[]);
    // One whose server does not know the role, one whose store's disk cannot be written, one whose server nobody runs,
    // and one whose repository holds another cluster.
    let (other, foreign) = (Cluster::start_new(NEWEST), Cluster::builder(NEWEST).fresh().start());
    let password = good.conninfo().replace("user=postgres", "user=nobody_known");
    let full = host.scratch().join("full");
    std::fs::write(&full, "not a directory").unwrap();
    let conflict = environment(&host, "conflict");
    let all = [
        environment(&host, "good").cluster(&good),
        environment(&host, "password").postgres(&password),
        Environment::new("full", Store::Directory(full)).cluster(&other).key("slot", "\"other\""),
        environment(&host, "lost").postgres("host=/nowhere user=nobody"),
        conflict.clone().cluster(&foreign),
    ];
    for text in
        ["WAL is not archived", "environment failed", "of ours that no", "look for backups", "read earlier jobs"]
    {
        host.announce(text);
    }
    host.configure(&[conflict.cluster(&other)]);
    host.start(&[&other]);
    host.stop();
    host.configure(&all);
    host.start(&[&good]);
    wait_state(&host, "good", "protected");
    wait_state(&host, "conflict", "conflict");
    for name in ["password", "full", "lost"] {
        wait_state(&host, name, "unprotected");
        assert!(of(&host, name)["detail"].is_string(), "{}", of(&host, name));
    }
    // While all of them fail again and again, the good one stores a commit within its bound.
    for _ in 0..5 {
        let begin = Instant::now();
        good.query("SELECT pg_logical_emit_message(true, 'x', 'y')");
        host.wait_stored(&good, good.flush_lsn());
        assert!(begin.elapsed() < Duration::from_secs(10), "stored after {:?}", begin.elapsed());
    }
    let shown = host.try_run(&["status"]);
    assert_eq!(shown.status, 11, "{}", shown.stderr);
    let names: Vec<&str> = shown.stdout.lines().skip(2).filter_map(|line| line.split_whitespace().nth(1)).collect();
    assert_eq!((names.first(), names.last(), names.len()), (Some(&"conflict"), Some(&"good"), 5), "{}", shown.stdout);
    assert_eq!(host.try_run(&["status", "good"]).status, 0);
    host.stop();
}

/// Four at once: a server that wants another password, a bucket that takes seconds for everything, a disk that is full, and one
/// with nothing amiss.
#[test]
fn a_wrong_password_a_slow_bucket_and_a_full_disk_are_named_and_delay_no_other() {
    let mut host = Pgrecall::new(&[]);
    let disk = host.scratch().join("disk");
    std::fs::create_dir(&disk).unwrap();
    if !small_disk::is_possible(&disk) {
        println!("not checked: the kernel lets no ordinary user mount a file system");
        return;
    }
    let line = |user: &str, method: &str| format!("local all {user} {method}\nlocal replication {user} {method}\n");
    let hba = line("postgres", "trust") + &line("clerk", "scram-sha-256");
    let asking = Cluster::builder(NEWEST).hba(&hba).start();
    asking.query("CREATE ROLE clerk LOGIN REPLICATION PASSWORD 'another'");
    let password = host.scratch().join("wrong-password");
    secret_file(&password, "wrong");
    let [far, full, good] = [(); 3].map(|()| Cluster::start_new(NEWEST));
    let proxy = S3Proxy::start(&Minio::shared());
    proxy.add(Rule::new(Fault::Delay(Duration::from_secs(8))));
    host.configure(&[
        environment(&host, "password")
            .postgres(&asking.conninfo().replace("user=postgres", "user=clerk"))
            .key("password_file", &format!("{password:?}")),
        Environment::new("slow", Store::Bucket(proxy.bucket(), "slow".to_owned())).cluster(&far),
        Environment::new("full", Store::Directory(disk.clone())).cluster(&full),
        Environment::new("good", Store::Bucket(Minio::shared(), "good".to_owned())).cluster(&good),
    ]);
    // What the broken ones say is in their states; the good one may say nothing.
    for name in ["password", "full", "slow"] {
        host.announce(&format!("environment={name}}}"));
        host.announce(&format!("environment=\"{name}\""));
    }
    host.small_disk(&disk, 1);
    let begin = Instant::now();
    host.start(&[&good]);
    wait::until("good is protected", 60, || told(&host, "good")["state"] == "protected");
    println!("good is protected after {:?}", begin.elapsed());
    for (name, says) in [("password", "password authentication failed for user \"clerk\""), ("full", "No space left")] {
        wait::until(&format!("{name} says {says}"), 60, || {
            let seen = told(&host, name);
            let detail = seen["detail"].as_str().unwrap_or_default();
            seen["state"] == "unprotected" && detail.contains(says)
        });
    }
    // While these fail and that one waits, commits are stored within their bound and a backup is taken.
    for _ in 0..5 {
        let begin = Instant::now();
        good.query("SELECT pg_logical_emit_message(true, 'x', 'y')");
        host.wait_stored(&good, good.flush_lsn());
        assert!(begin.elapsed() < Duration::from_secs(10), "stored after {:?}", begin.elapsed());
    }
    let asked = host.json(&["backup", "good"]);
    assert_eq!(asked["event"], "done", "{asked}");
    let slow = told(&host, "slow");
    println!("slow: {}: {}", slow["state"], slow["detail"]);
    assert!(slow["state"] != "protected" && slow["detail"].is_string(), "{slow}");
    assert_eq!(host.try_run(&["status", "good"]).status, 0);
    proxy.clear();
    wait::until("slow is protected", 120, || told(&host, "slow")["state"] == "protected");
    // Not stopped in order: what the full one has received would take all of the grace.
    host.kill9();
}

#[test]
fn a_backup_is_held_to_its_bandwidth_and_wal_is_not() {
    let cluster = Cluster::start_new(NEWEST);
    let mut host = Pgrecall::new(&[]);
    host.key("limits.backup_bandwidth_max", "\"256KiB\"");
    host.configure(&[environment(&host, "shop").cluster(&cluster)]);
    host.start(&[&cluster]);
    wait::until("a backup runs", 60, || of(&host, "shop")["daemon"]["backup"]["event"] == "running");
    let begin = Instant::now();
    // A segment and more of WAL, beside packs that need ten seconds.
    cluster.query("CREATE TABLE t AS SELECT repeat(md5(n::text), 10) FROM generate_series(1, 60000) n");
    host.wait_stored(&cluster, cluster.flush_lsn());
    let stored = begin.elapsed();
    assert_eq!(of(&host, "shop")["daemon"]["backup"]["event"], "running", "WAL was stored first, after {stored:?}");
    host.wait_for_backup("shop");
    let backup = host.json(&["backups", "shop"])["backups"][0]["stored_bytes"].as_u64().expect("its size");
    // The second that may be made up for is given.
    let least = Duration::from_secs(backup / (256 << 10) - 2);
    assert!(begin.elapsed() > least, "{backup} bytes in {:?}", begin.elapsed());
    host.stop();
}

/// The daemon's clock stands ten seconds before four o'clock when it starts.
#[test]
fn the_daily_backup_begins_at_its_hour_and_once() {
    let cluster = Cluster::start_new(NEWEST);
    let mut host = Pgrecall::new(&[]);
    let shop = environment(&host, "shop").cluster(&cluster);
    host.configure(&[shop.key("backup_schedule", "\"0 4 * * *\"").key("backup_spread", "\"0s\"")]);
    let tomorrow = (chrono::Utc::now() + Duration::from_hours(24)).date_naive();
    let hour = tomorrow.and_hms_opt(4, 0, 0).expect("an hour").and_utc();
    for (name, value) in clock::set_to(hour - Duration::from_secs(10)) {
        host.variable(name, &value);
    }
    host.start(&[&cluster]);
    host.wait_for_backup("shop");
    let backups = || host.json(&["backups", "shop"])["backups"].as_array().map_or(0, Vec::len);
    let next = || of(&host, "shop")["daemon"]["backups"]["next_at"].as_str().unwrap_or_default().to_owned();
    let due = |day: chrono::NaiveDate| format!("{day}T04:00:00");
    wait::until("the next one to be due at four", 10, || next().starts_with(&due(tomorrow)));
    assert_eq!(backups(), 1, "it is not four yet");
    host.wait_logged("a backup is due: one begins by itself", 30);
    wait::until("the daily backup", 30, || backups() == 2);
    let day_after = tomorrow.succ_opt().expect("a day");
    wait::until("the next one to be due a day later", 10, || next().starts_with(&due(day_after)));
    assert_eq!(host.log().matches("a backup is due: one begins by itself").count(), 1);
    host.stop();
}

#[test]
fn a_backup_begins_by_itself_when_it_is_due() {
    if !slow() {
        return;
    }
    let cluster = Cluster::start_new(NEWEST);
    let mut host = Pgrecall::new(&[]);
    let shop = environment(&host, "shop").cluster(&cluster);
    host.configure(&[shop.key("backup_schedule", "\"* * * * *\"").key("backup_spread", "\"0s\"")]);
    host.start(&[&cluster]);
    let backups = || host.json(&["backups", "shop"])["backups"].as_array().map_or(0, Vec::len);
    wait::until("three backups in as many minutes", 200, || backups() >= 3);
    host.stop();
}

#[test]
fn the_unit_is_hardened_and_valid() {
    let tool = "/usr/bin/systemd-analyze";
    if !std::path::Path::new(tool).exists() {
        println!("not checked: there is no systemd-analyze");
        return;
    }
    let unit = places::source().join("systemd/pgrecall.service");
    let run =
        Command::new(tool).args(["security", "--offline=true", "--threshold=25", "--no-pager"]).arg(&unit).output();
    let run = run.expect("run systemd-analyze");
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(
        run.status.success(),
        "{}\n{}",
        said.lines().last().unwrap_or_default(),
        String::from_utf8_lossy(&run.stderr)
    );
}
