//! The control socket of the daemon as a process: curl, jobs that outlive what asked for them, the record of acts.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::common::guard;
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::Cluster;
use crate::common::{NEWEST, wait};

struct Host {
    cluster: Cluster,
    pgrecall: Pgrecall,
    store: tempfile::TempDir,
}

/// A daemon that archives one cluster and has taken its first backup.
fn host() -> Host {
    let cluster = Cluster::start_new(NEWEST);
    cluster.query("CREATE TABLE orders AS SELECT generate_series(1, 1000) n");
    let store = tempfile::tempdir().expect("temporary directory");
    let shop = Environment::new("shop", Store::Directory(store.path().join("repository"))).cluster(&cluster);
    let mut pgrecall = Pgrecall::new(&[shop]);
    pgrecall.start(&[&cluster]);
    pgrecall.wait_for_backup("shop");
    Host { cluster, pgrecall, store }
}

impl Host {
    /// What the documentation shows: `curl` on the socket. Gives the HTTP status and the answer.
    fn curl(&self, method: &str, path: &str, body: &Value) -> (String, Value) {
        let socket = self.pgrecall.scratch().join("control.sock");
        let output = Command::new("curl")
            .args(["-sN", "-m", "60", "-X", method, "-w", "\n%{http_code}", "--unix-socket"])
            .arg(socket)
            .args(["-d", &body.to_string(), &format!("http://pgrecall/v1/{path}")])
            .output();
        let output = output.expect("run curl");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (answer, status) = text.trim_end().rsplit_once('\n').expect("an answer and a status");
        // Of a stream, the last line.
        let last = answer.trim_end().lines().last().unwrap_or_default();
        (status.to_owned(), serde_json::from_str(last).unwrap_or(Value::Null))
    }

    fn job(&self, id: &str) -> Value {
        let jobs = self.pgrecall.json(&["jobs", "list"]);
        let found = jobs["jobs"].as_array().and_then(|all| all.iter().find(|job| job["job"] == id).cloned());
        found.unwrap_or_else(|| panic!("job {id} in {jobs}"))
    }
}

#[test]
fn curl_takes_a_backup_restores_and_reads_the_record() {
    let mut host = host();
    let (status, answer) = host.curl("GET", "status", &json!({}));
    assert_eq!((status.as_str(), answer["environments"][0]["name"].as_str()), ("200", Some("shop")));

    let asked = json!({ "ticket": "T-4711", "idempotency_key": "t4711-1" });
    let (status, accepted) = host.curl("POST", "environments/shop/backup", &asked);
    assert_eq!(status, "202", "{accepted}");
    let job = accepted["job"].as_str().expect("an id").to_owned();
    let (status, ended) = host.curl("GET", &format!("jobs/{job}/follow"), &json!({}));
    assert_eq!((status.as_str(), ended["state"].as_str()), ("200", Some("done")), "{ended}");
    assert!(ended["result"]["backup"].is_string(), "{ended}");
    let (_, again) = host.curl("POST", "environments/shop/backup", &asked);
    assert_eq!(again["job"], job.as_str());

    // The first backup, which nobody asked for, is a job too.
    let jobs = host.pgrecall.json(&["jobs", "list", "shop"]);
    let askers: Vec<_> = jobs["jobs"].as_array().expect("jobs").iter().map(|job| job["asked_by"].clone()).collect();
    assert_eq!((askers.len(), askers[0].as_str()), (2, Some("pgrecall")), "{jobs}");

    let (status, planned) = host.curl("POST", "environments/shop/plan", &json!({ "to": "latest" }));
    assert_eq!((status.as_str(), planned["target"].as_str()), ("200", Some("latest")), "{planned}");
    let into = host.pgrecall.scratch().join("restored");
    let user = host.cluster.query("SELECT current_user");
    let asked = json!({ "to": "latest", "into": into, "user": user, "finish": "shutdown", "ticket": "T-4712" });
    let (status, accepted) = host.curl("POST", "environments/shop/restore", &asked);
    assert_eq!(status, "202", "{accepted}");
    let restore = accepted["job"].as_str().expect("an id").to_owned();
    host.pgrecall.run(&["jobs", "follow", &restore]);
    assert!(into.join("PG_VERSION").is_file());
    let shown = host.pgrecall.run(&["jobs", "show", &restore[restore.len() - 6..]]);
    assert!(shown.contains("restore of shop, done") && shown.contains("for T-4712"), "{shown}");

    let (status, missed) = host.curl("POST", "environments/shop/bakup", &json!({}));
    assert_eq!((status.as_str(), missed["error"]["hint"].as_str()), ("404", Some("Did you mean backup?")));
    let (status, wrong) = host.curl("POST", "environments/shop/restore", &json!({ "to": "yesterday", "into": "/x" }));
    assert_eq!((status.as_str(), wrong["error"]["code"].as_str()), ("400", Some("usage")), "{wrong}");

    // Without the daemon the store says the same.
    host.pgrecall.stop();
    assert_eq!(host.job(&restore)["state"], "done");
    let record = host.pgrecall.json(&["audit", "shop"]);
    let acts: Vec<_> = record["acts"].as_array().expect("acts").iter().collect();
    let names: Vec<_> = acts.iter().map(|act| act["request"].as_str().unwrap_or_default()).collect();
    assert_eq!(names, ["backup", "backup", "restore", "restore", "restore"], "{record}");
    assert_eq!((&acts[0]["job"], &acts[0]["ticket"]), (&json!(job), &json!("T-4711")));
    assert_eq!((&acts[3]["outcome"], &acts[4]["outcome"]), (&json!("allowed"), &json!("failed")));
    assert_eq!(record["problems"], json!([]));
}

/// The generation under which the daemon archives: the newest lease.
fn leases(store: &Path) -> Vec<String> {
    let leases = std::fs::read_dir(store.join("repository/shop/lease")).expect("the leases").flatten();
    leases.map(|lease| lease.file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn pins_and_prunes_go_through_the_daemon_under_its_own_generation() {
    let mut host = host();
    let of_shop = |rest: &str| format!("environments/shop/{rest}");
    let name = "audit of May";
    let asked = json!({ "name": name, "at": "latest", "until": "2100-01-01 00:00 UTC" });
    let (status, added) = host.curl("POST", &of_shop("pins"), &asked);
    assert_eq!((status.as_str(), &added["pin"]["name"]), ("200", &json!(name)), "{added}");
    assert_eq!(host.curl("POST", &of_shop("pins"), &asked).0, "409", "the name is taken");
    let (_, listed) = host.curl("GET", &of_shop("pins"), &json!({}));
    assert_eq!(listed["pins"][0]["backup"], added["pin"]["backup"], "{listed}");
    assert!(listed["text"].as_str().is_some_and(|text| text.contains("until 2100-01-01")), "{listed}");
    assert_eq!(host.pgrecall.json(&["pin", "list", "shop"])["pins"], listed["pins"], "the command says the same");

    let (status, planned) = host.curl("POST", &of_shop("prune/plan"), &json!({}));
    assert_eq!((status.as_str(), &planned["objects_unlisted"]), ("200", &json!(0)), "{planned}");
    let of_kind = |kind: &str| {
        let objects = planned["objects"].as_array().expect("objects").iter();
        objects.filter(|judged| judged["object"].as_str().is_some_and(|name| name.starts_with(kind))).count()
    };
    assert_eq!((of_kind("pins/"), of_kind("identity/")), (1, 1), "{planned}");
    assert!(planned["text"].as_str().is_some_and(|text| text.contains("keep   identity/")), "{planned}");

    let before = leases(host.store.path());
    let (status, accepted) = host.curl("POST", &of_shop("prune"), &json!({ "ticket": "T-1" }));
    assert_eq!(status, "202", "{accepted}");
    let job = accepted["job"].as_str().expect("an id");
    let (_, ended) = host.curl("GET", &format!("jobs/{job}/follow"), &json!({}));
    assert_eq!((&ended["kind"], &ended["state"]), (&json!("prune"), &json!("done")), "{ended}");
    assert!(ended["result"]["window_end"].is_string(), "{ended}");
    // Whoever may read the store does not take the generation from the daemon either.
    let pruned = host.pgrecall.json(&["prune", "shop"]);
    assert_eq!(pruned["dropped"], json!([]), "{pruned}");
    assert_eq!(leases(host.store.path()), before);
    host.pgrecall.run(&["backup", "shop"]);

    let (status, removed) = host.curl("DELETE", &of_shop("pins/audit%20of%20May"), &json!({}));
    assert_eq!((status.as_str(), &removed["pin"]["name"]), ("200", &json!(name)), "{removed}");
    assert_eq!(host.curl("DELETE", &of_shop("pins/audit%20of%20May"), &json!({})).0, "404");
    host.pgrecall.stop();
    let record = host.pgrecall.json(&["audit", "shop"]);
    let acts = record["acts"].as_array().expect("acts").iter();
    let names: Vec<_> = acts.filter_map(|act| act["request"].as_str()).collect();
    let wanted =
        ["pin-add", "pin-add", "pin-add", "prune", "prune", "backup", "pin-remove", "pin-remove", "pin-remove"];
    assert_eq!(names, wanted, "{record}");
}

#[test]
fn a_daemon_that_was_killed_knows_what_it_was_doing_and_begins_nothing_twice() {
    let mut host = host();
    host.pgrecall.announce("interrupted");
    // The server accepts connections and says nothing: what asks it for a backup waits.
    let frozen = Frozen::new(host.cluster.pid());
    let asked = json!({ "idempotency_key": "nightly-1" });
    let (_, accepted) = host.curl("POST", "environments/shop/backup", &asked);
    let backup = accepted["job"].as_str().expect("an id").to_owned();
    wait::until("the backup runs", 30, || host.job(&backup)["state"] == "running");
    let shown = host.pgrecall.run(&["status", "shop"]);
    assert!(shown.contains(&format!("job           {backup}, backup running")), "{shown}");
    let (_, status) = host.curl("GET", "status", &json!({}));
    let mut unfinished = status["jobs"].as_array().expect("jobs").iter();
    assert!(unfinished.any(|job| job["job"] == backup.as_str() && job["log"] == json!([])), "{status}");
    host.pgrecall.kill9();
    drop(frozen);
    let stored = host.job(&backup);
    assert_eq!(stored["state"], "running", "what the dead daemon left: {stored}");

    host.pgrecall.start(&[&host.cluster]);
    wait::until("the job is found again", 30, || host.job(&backup)["state"] == "interrupted");
    let found = host.job(&backup);
    assert!(found["error"]["hint"].as_str().is_some_and(|hint| hint.contains("another backup")), "{found}");
    let (status, again) = host.curl("POST", "environments/shop/backup", &asked);
    assert_eq!((status.as_str(), &again["job"]), ("202", &json!(backup)), "the same key is the same job");
    let followed = host.pgrecall.refused(&["jobs", "follow", &backup]);
    assert_eq!(followed.status, 130, "{}", followed.stderr);

    // Two lives of the daemon, two chains, one record.
    let record = host.pgrecall.json(&["audit", "shop"]);
    let generations: Vec<_> =
        record["acts"].as_array().expect("acts").iter().map(|act| act["generation"].clone()).collect();
    assert!(generations.first() != generations.last(), "{record}");
    assert_eq!(record["problems"], json!([]));
    host.pgrecall.stop();
    tamper(&host.pgrecall, host.store.path());
}

/// Removes an act from the store: the record says so.
fn tamper(pgrecall: &Pgrecall, store: &Path) {
    let audit = store.join("repository/shop/audit");
    let mut chains: Vec<_> = std::fs::read_dir(&audit).expect("the record").flatten().map(|e| e.path()).collect();
    chains.sort();
    let first = chains.first().expect("a chain").join("00000001");
    std::fs::remove_file(&first).expect("an act");
    let refused = pgrecall.refused(&["audit", "shop"]);
    assert_eq!(refused.status, 7);
    assert!(refused.stderr.contains("is gone"), "{}", refused.stderr);
}

/// A process that does not run until this is dropped.
struct Frozen(u32);

impl Frozen {
    fn new(pid: u32) -> Frozen {
        guard::signal(pid, "STOP");
        Frozen(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        guard::signal(self.0, "CONT");
    }
}
