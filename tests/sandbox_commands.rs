//! Sandboxes and incidents through the commands, as a person uses them.

use std::io::{PipeWriter, Write as _};
use std::path::PathBuf;

use serde_json::Value;

use crate::common::guard::{Directory, Process, children, signal};
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::Cluster;
use crate::common::{NEWEST, wait};

struct World {
    /// Goes first: a daemon complains when its server does.
    host: Pgrecall,
    cluster: Cluster,
    dir: Directory,
}

impl World {
    fn new() -> World {
        let cluster = Cluster::start_new(NEWEST);
        cluster.query("CREATE TABLE orders (id int); INSERT INTO orders VALUES (1)");
        let dir = Directory::new("commands");
        let shop = Environment::new("shop", Store::Directory(dir.join("store"))).cluster(&cluster);
        let mut host = Pgrecall::new(&[]);
        host.key("sandbox.directory", &format!("{:?}", dir.join("area")));
        host.configure(&[shop]);
        host.start(&[&cluster]);
        host.wait_for_backup("shop");
        cluster.query("INSERT INTO orders VALUES (2)");
        host.wait_stored(&cluster, cluster.flush_lsn());
        World { cluster, host, dir }
    }

    /// What psql in a sandbox says to a statement.
    fn psql(&self, job: &str, sql: &str) -> Result<String, String> {
        let answer = self.host.try_run(&["sandbox", "connect", job, "--", "-XAtqc", sql]);
        if answer.status == 0 { Ok(answer.stdout.trim_end().to_owned()) } else { Err(answer.stderr) }
    }

    fn sandboxes(&self) -> Vec<Value> {
        let listed = self.host.json(&["sandbox", "list"]);
        listed["sandboxes"].as_array().expect("a list").clone()
    }

    fn create(&self, arguments: &[&str]) -> String {
        let created = self.host.json(arguments);
        created["sandbox"]["id"].as_str().unwrap_or_else(|| panic!("{created}")).to_owned()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let listed = self.host.try_run(&["sandbox", "list", "--json"]).stdout;
        let listed: Value = serde_json::from_str(&listed).unwrap_or_default();
        for found in listed["sandboxes"].as_array().into_iter().flatten() {
            let pid = found["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
            pid.into_iter().for_each(|pid| signal(pid, "QUIT"));
        }
    }
}

#[test]
fn a_person_restores_looks_and_leaves_while_the_daemon_comes_and_goes() {
    let mut world = World::new();
    let denied = world.host.refused(&["incident", "open", "shop", "--ticket", "a ticket"]);
    assert!(denied.stderr.contains("letters, digits"), "{}", denied.stderr);
    let opened = world.host.run(&["incident", "open", "shop", "--ticket", "OPS-1", "--reason", "orders are gone"]);
    assert!(opened.contains("restore point incident"), "{opened}");
    world.cluster.query("DELETE FROM orders");
    world.host.wait_stored(&world.cluster, world.cluster.flush_lsn());

    let to = "name:incident-OPS-1";
    let job = world.create(&["sandbox", "create", "shop", "--to", to, "--ticket", "OPS-1", "--expires", "2h"]);
    assert_eq!(world.psql(&job, "SELECT count(*) FROM orders").as_deref(), Ok("2"));
    assert_eq!(world.psql(&job[16..], "SELECT count(*) FROM orders").as_deref(), Ok("2"), "the end of an id will do");
    let refused = world.psql(&job, "COPY orders TO PROGRAM 'id'").expect_err("no superuser");
    assert!(refused.contains("permission denied"), "{refused}");
    let superuser = ["sandbox", "connect", &job, "--superuser", "--", "-XAtqc", "SELECT current_user"];
    assert_eq!(world.host.run(&superuser).trim_end(), "postgres");
    let unknown = world.psql("20200101t000000z_000000", "SELECT 1").expect_err("no such sandbox");
    assert!(unknown.contains("there is none"), "{unknown}");

    // The daemon is killed; the sandbox and the way into it are there again when the next one runs.
    let pid = world.sandboxes()[0]["pid"].as_u64().expect("it runs");
    world.host.daemon().signal("KILL");
    world.host.daemon().wait(30);
    world.host.kill9();
    world.host.announce("a job that ran when the daemon ended");
    world.host.start(&[&world.cluster]);
    let found = world.sandboxes();
    assert_eq!((found.len(), found[0]["pid"].as_u64(), found[0]["state"].as_str()), (1, Some(pid), Some("running")));
    wait::until("the job to be known", 30, || world.psql(&job, "SELECT 1").as_deref() == Ok("1"));

    let second = world.create(&["restore", "shop", "--to", to]);
    assert_eq!(world.sandboxes().len(), 2);
    world.host.run(&["sandbox", "extend", &second, "--expires", "30min"]);
    world.host.run(&["sandbox", "stop", &second]);
    assert!(world.psql(&second, "SELECT 1").is_err(), "it was stopped");
    world.host.run(&["sandbox", "start", &second]);
    assert_eq!(world.psql(&second, "SELECT 1").as_deref(), Ok("1"));
    let released = world.host.run(&["sandbox", "release", &second]);
    assert!(released.contains("pg_ctl start -D "), "{released}");

    world.host.run(&["backup", "shop", "--ticket", "OPS-1"]);
    world.host.run(&["sandbox", "destroy", &job]);
    assert!(!world.dir.join("area/shop").join(&job).exists());
    let file = world.dir.join("report.md");
    let report = file.display().to_string();
    let close = ["incident", "close", "shop", "--ticket", "OPS-1", "--outcome", "rows put back", "--report", &report];
    world.host.run(&close);
    let report = std::fs::read_to_string(file).expect("the report");
    let checked = "checked: replay stopped where it was planned";
    for part in ["orders are gone", "## Restored", checked, "backup of shop done", "rows put back"] {
        assert!(report.contains(part), "{part}: {report}");
    }
    let audit = world.host.run(&["audit", "shop"]);
    for act in ["sandbox-connect-superuser", "sandbox-destroy", "incident-open", "incident-close"] {
        assert!(audit.contains(act), "{act}: {audit}");
    }
    world.host.stop();
}

/// `psql` in a sandbox, with what it says in a file.
struct Psql {
    child: Process,
    input: PipeWriter,
    output: PathBuf,
}

impl Psql {
    fn open(world: &World, job: &str) -> Psql {
        let output = world.dir.join("psql.out");
        let file = std::fs::File::create(&output).expect("make it");
        let mut command = world.host.command(&["sandbox", "connect", job, "--", "-XAtq"]);
        let (reader, writer) = std::io::pipe().expect("a pipe");
        command.env("XDG_RUNTIME_DIR", world.dir.path()).stdin(reader);
        command.stdout(file.try_clone().expect("the same file")).stderr(file);
        Psql { child: Process::spawn(&mut command), input: writer, output }
    }

    fn ask(&mut self, sql: &str, answer: &str) {
        writeln!(self.input, "{sql}").expect("write");
        wait::until("the answer", 60, || std::fs::read_to_string(&self.output).is_ok_and(|said| said.contains(answer)));
    }
}

#[test]
fn an_open_psql_is_interrupted_sees_its_sandbox_end_and_leaves_nothing_behind() {
    let world = World::new();
    let job = world.create(&["sandbox", "create", "shop", "--writable"]);
    let doors = || {
        let entries = std::fs::read_dir(world.dir.path()).expect("list").flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("pgrecall-")).count()
    };
    let mut psql = Psql::open(&world, &job);
    psql.ask("INSERT INTO orders VALUES (3); SELECT 'rows', count(*) FROM orders;", "rows|3");
    assert_eq!(doors(), 1);
    writeln!(psql.input, "SELECT pg_sleep(600);").expect("write");
    let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep%'";
    wait::until("the query to run", 60, || world.psql(&job, sleeping).as_deref() == Ok("1"));
    // As a terminal does at Ctrl-C: the whole foreground group gets it, and a script ends by it.
    let pid = psql.child.pid();
    children(pid).into_iter().chain([pid]).for_each(|pid| signal(pid, "INT"));
    let status = psql.child.wait(60);
    assert!(status.code().is_some(), "it ended by itself: {status}");
    let said = std::fs::read_to_string(&psql.output).expect("read");
    assert!(said.contains("canceling statement due to user request"), "{said}");
    assert_eq!(doors(), 0);

    let mut psql = Psql::open(&world, &job);
    psql.ask("SELECT 'rows', count(*) FROM orders;", "rows|3");
    world.host.run(&["sandbox", "destroy", &job]);
    psql.ask("SELECT 1;", "server closed the connection");
    drop(psql.input);
    psql.child.wait(60);
    assert_eq!(doors(), 0);
    assert!(!world.dir.join("area/shop").join(&job).exists());
}
