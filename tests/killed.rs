//! What the next start says and does when the daemon was killed in the middle of its work. A sandbox that ran is found again in
//! `sandbox_commands`; a backup that had not stored anything yet is in `control`, a prune without a daemon in `retention_store`.

use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::common::guard::Process;
use crate::common::minio::Minio;
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::{Cluster, run};
use crate::common::proxy::s3::{Fault, Rule, S3Proxy};
use crate::common::{NEWEST, compare, wait};
use crate::crash::restore;

struct World {
    /// Goes first: a daemon complains when its server or store does.
    host: Pgrecall,
    cluster: Cluster,
    proxy: S3Proxy,
}

impl World {
    fn new() -> World {
        let cluster = Cluster::start_new(NEWEST);
        cluster.query("CREATE TABLE orders AS SELECT generate_series(1, 1000) n");
        let proxy = S3Proxy::start(&Minio::shared());
        let shop = Environment::new("shop", Store::Bucket(proxy.bucket(), "killed".to_owned()));
        World { host: Pgrecall::new(&[shop.cluster(&cluster)]), cluster, proxy }
    }

    /// `kill -9`, and from then on a store that answers.
    fn kill(&mut self) {
        self.host.kill9();
        self.proxy.clear();
    }

    fn jobs(&self, kind: &str) -> Vec<Value> {
        let listed = self.host.json(&["jobs", "list", "shop"]);
        let all = listed["jobs"].as_array().unwrap_or_else(|| panic!("{listed}")).clone();
        all.into_iter().filter(|job| job["kind"] == kind).collect()
    }

    /// Waits for the state of the first or second job of a kind.
    fn wait_job(&self, kind: &str, index: usize, state: &str) -> Value {
        wait::for_value(&format!("{kind} {index} to be {state}"), 120, || {
            self.jobs(kind).get(index).filter(|job| job["state"] == state).cloned()
        })
    }

    fn was_put(&self, part: &str) -> Option<String> {
        let fits = |key: &str| key.contains(part);
        self.proxy.seen().into_iter().find(|s| s.operation == "PUT" && s.status == 200 && fits(&s.key)).map(|s| s.key)
    }
}

fn hint(job: &Value) -> String {
    job["error"]["hint"].as_str().unwrap_or_else(|| panic!("a hint: {job}")).to_owned()
}

#[test]
fn a_backup_whose_daemon_was_killed_is_never_seen_is_taken_anew_and_its_remains_go_over_a_killed_prune() {
    let mut world = World::new();
    // All of it is stored but the object that makes it a backup.
    world.proxy.add(Rule::new(Fault::Hang).on("PUT").key(".backup"));
    world.host.start(&[&world.cluster]);
    let intent = wait::for_value("what was begun", 60, || world.was_put(".intent"));
    let broken = intent.rsplit('/').next().and_then(|name| name.strip_suffix(".intent")).expect("an id").to_owned();
    wait::until("its packs", 60, || world.was_put(&format!("/packs/{broken}/")).is_some());
    world.wait_job("backup", 0, "running");
    world.kill();
    assert_eq!(world.jobs("backup")[0]["state"], "running", "what the dead daemon left");
    assert_eq!(world.host.json(&["backups", "shop"])["backups"], json!([]), "half a backup is none");

    world.host.start(&[&world.cluster]);
    world.host.wait_logged("a job was interrupted by the end of the daemon", 30);
    world.host.wait_logged("no backup leads to the WAL that is archived now: one begins by itself", 30);
    assert!(hint(&world.wait_job("backup", 0, "interrupted")).contains("is removed by a later prune"));
    let again = world.wait_job("backup", 1, "done");
    let status = wait::for_value("it is protected", 60, || {
        let status = world.host.json(&["status", "shop"]);
        (status["environments"][0]["state"] == "protected").then_some(status)
    });
    let listed = world.host.json(&["backups", "shop"])["backups"].clone();
    let ids: Vec<&str> = listed.as_array().expect("a list").iter().filter_map(|b| b["id"].as_str()).collect();
    assert!(ids.len() == 1 && ids[0] != broken, "{listed}, {again}");
    println!("{}\n{}", status["environments"][0]["state"], world.host.run(&["jobs", "list"]));

    // Killed again, while it removes that: what it had begun is ended by the next one's prune.
    world.proxy.add(Rule::new(Fault::Hang).on("PUT").key(&format!("{broken}.dropped")));
    let mut command = world.host.command(&["prune", "shop"]);
    let mut asked = Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()));
    wait::until("its mark", 60, || world.was_put(&format!("{broken}.leaving-")).is_some());
    world.wait_job("prune", 0, "running");
    world.kill();
    assert!(!asked.wait(60).success(), "who asked is told");
    world.host.start(&[&world.cluster]);
    assert!(hint(&world.wait_job("prune", 0, "interrupted")).contains("goes on where this one ended"));
    let pruned = world.host.run(&["prune", "shop"]);
    let dropped = format!("backup {broken} dropped: it was begun long ago, or by a writer that is gone");
    assert!(pruned.contains(&dropped), "{pruned}");
    world.host.wait_stored(&world.cluster, world.cluster.flush_lsn());
    world.host.stop();
    world.host.run(&["verify", "shop"]);
    let copy = restore(&world.host, "latest", &world.host.scratch().join("copy"));
    compare::assert_same(&compare::fingerprint(&world.cluster), &compare::fingerprint(&copy));
}

/// Asks the daemon for a restore, as any client of its socket does; gives the answer's status.
fn ask_restore(world: &World, request: &Value) -> String {
    let socket = world.host.scratch().join("control.sock");
    let mut curl = Command::new("curl");
    curl.args(["-sN", "-m", "60", "-X", "POST", "-o", "/dev/null", "-w", "%{http_code}", "--unix-socket"]).arg(socket);
    run(curl.args(["-d", &request.to_string(), "http://pgrecall/v1/environments/shop/restore"]))
}

#[test]
fn a_restore_whose_daemon_was_killed_is_told_as_interrupted_and_begins_anew_in_its_directory() {
    let mut world = World::new();
    world.host.start(&[&world.cluster]);
    world.host.wait_for_backup("shop");
    world.host.wait_stored(&world.cluster, world.cluster.flush_lsn());
    let into = world.host.scratch().join("copy");
    let request = json!({ "into": &into, "no_start": true });
    world.proxy.add(Rule::new(Fault::Hang).on("GET").key("/packs/"));
    assert_eq!(ask_restore(&world, &request), "202");
    world.wait_job("restore", 0, "running");
    wait::until("the directory, marked", 60, || into.join("pgrecall_restore/state.json").exists());
    world.kill();
    assert!(!into.join("global/pg_control").exists(), "no server starts there too early");

    world.host.start(&[&world.cluster]);
    let interrupted = world.wait_job("restore", 0, "interrupted");
    let expected = "Ask again with the same directory: a restore that did not end begins it anew.";
    assert!(hint(&interrupted).starts_with(expected), "{interrupted}");
    let shown = world.host.run(&["jobs", "list"]);
    assert!(shown.contains("interrupted"), "{shown}");
    // What the dead one pinned stays pinned for some hours.
    let pins = world.host.run(&["pin", "list", "shop"]);
    assert!(pins.contains(&format!("restore into {}", into.display())), "{pins}");
    assert_eq!(ask_restore(&world, &request), "202");
    world.wait_job("restore", 1, "done");
    world.host.stop();
    let expected = compare::fingerprint(&world.cluster);
    let mut copy = Cluster::adopt(NEWEST, &into);
    copy.start();
    copy.wait_writable();
    compare::assert_same(&expected, &compare::fingerprint(&copy));
}
