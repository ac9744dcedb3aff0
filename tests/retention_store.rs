//! Removal in a real object store: one that keeps versions, one that denies deletes, one that is busy, and prunes that are
//! killed on the way; after a month of silence, with wrong clocks, and beside another cluster in the same place.
//!
//! The past is lived in a directory, with clocks that are set back, and then put into a bucket with the times that it has there.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use chrono::{DateTime, Utc};

use crate::common::guard::{Directory, Process};
use crate::common::minio::{Bucket, Minio};
use crate::common::pgrecall::{Environment, Pgrecall, Store, secret_file};
use crate::common::postgres::{Cluster, with_input};
use crate::common::proxy::s3::{Fault, Rule, S3Proxy};
use crate::common::{NEWEST, clock, wait};
use crate::crash::restore;
use crate::retention::{Past, backups, days_ago, files};

const STORE: i32 = 5;
const HOST: i32 = 9;

fn curl(bucket: &Bucket, service: &str) -> Command {
    let mut command = Command::new("curl");
    command.args(["-sS", "--fail-with-body", "--aws-sigv4", &format!("aws:amz:{}:{service}", bucket.region)]);
    command.args(["--user", &format!("{}:{}", bucket.access_key, bucket.secret_key)]);
    command
}

fn said(command: &mut Command, input: &str) -> String {
    let done = with_input(command, input.as_bytes());
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(done.status.success(), "{command:?}: {}{text}", String::from_utf8_lossy(&done.stderr));
    text
}

/// Puts a repository into a bucket, each object with the time of its file: MinIO takes it from this header.
fn upload(repository: &Path, bucket: &Bucket) {
    let mut transfers = String::new();
    for path in files(repository) {
        let time: DateTime<Utc> = path.metadata().unwrap().modified().unwrap().into();
        let key = path.strip_prefix(repository).unwrap().display();
        let (url, user) = (&bucket.endpoint, format!("{}:{}", bucket.access_key, bucket.secret_key));
        writeln!(transfers, "next\nsilent\nshow-error\nfail\noutput = /dev/null\nupload-file = {path:?}").unwrap();
        writeln!(transfers, "aws-sigv4 = \"aws:amz:{}:s3\"\nuser = {user:?}", bucket.region).unwrap();
        writeln!(transfers, "header = \"x-minio-source-mtime: {}\"", time.to_rfc3339()).unwrap();
        writeln!(transfers, "url = \"{url}/{}/old/{key}\"", bucket.name).unwrap();
    }
    said(Command::new("curl").args(["-K", "-"]), transfers.trim_start_matches("next\n"));
}

/// Three weeks, of which the first days have left the window: their backups were dropped two days ago, and nothing of them
/// is deleted yet.
struct Weeks {
    dir: Directory,
    gone: Vec<String>,
    kept: Vec<String>,
}

fn weeks() -> &'static Weeks {
    static WEEKS: OnceLock<Weeks> = OnceLock::new();
    WEEKS.get_or_init(|| {
        let mut past = Past::new();
        past.live(&[22, 20, 18, 10, 0]);
        let all = backups(&past.host);
        past.host.run(&["prune", "shop"]);
        past.age_the_dropped();
        let kept = backups(&past.host);
        let gone: Vec<String> = all.into_iter().filter(|id| !kept.contains(id)).collect();
        assert!(gone.contains(&past.asked[0]) && gone.contains(&past.asked[1]) && kept.contains(&past.asked[2]));
        let Past { dir, .. } = past;
        Weeks { dir, gone, kept }
    })
}

fn shop(bucket: &Bucket) -> Environment {
    Environment::new("shop", Store::Bucket(bucket.clone(), "old".to_owned()))
}

/// Those weeks in a bucket, and a host that knows nothing else.
fn stored_weeks() -> (Bucket, Pgrecall) {
    let bucket = Minio::shared();
    upload(&weeks().dir.join("repository"), &bucket);
    let host = Pgrecall::new(&[shop(&bucket)]);
    (bucket, host)
}

/// The keys that a listing shows.
fn keys(bucket: &Bucket) -> BTreeSet<String> {
    use futures::TryStreamExt;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let client = bucket.client();
    let listed = client.list(None).map_ok(|object| object.location.to_string()).try_collect::<BTreeSet<String>>();
    runtime.block_on(listed).unwrap().into_iter().filter(|key| !key.contains("/probe/")).collect()
}

fn packs_of(keys: &BTreeSet<String>, ids: &[String]) -> usize {
    keys.iter().filter(|key| ids.iter().any(|id| key.contains(&format!("/packs/{id}/")))).count()
}

/// What had to go is gone, and every moment of the window is there.
fn check_pruned(bucket: &Bucket, host: &Pgrecall) {
    let Weeks { gone, kept, .. } = weeks();
    let now = keys(bucket);
    assert_eq!((packs_of(&now, gone), packs_of(&now, kept)), (0, kept.len()), "{now:?}");
    assert_eq!(&backups(host), kept);
    host.run(&["verify", "shop", "--read-data"]);
    assert_eq!(host.refused(&["plan", "shop", "--to", &days_ago(19)]).status, 4);
    let copy = restore(host, &days_ago(13), &host.scratch().join("copy"));
    assert_eq!(copy.query("SELECT string_agg(days_ago::text, ',' ORDER BY days_ago) FROM visits"), "18,20,22");
}

#[test]
fn a_bucket_that_keeps_versions_is_named_and_a_prune_hides_what_has_left_the_window() {
    let plain = Minio::shared();
    let (name, disk) =
        (format!("{}-versions", plain.name), plain.disk.with_file_name(format!("{}-versions", plain.name)));
    let bucket = Bucket { name, disk, ..plain };
    // A bucket in which objects can be locked keeps versions.
    let mut make = curl(&bucket, "s3");
    make.args(["-X", "PUT", "-H", "x-amz-bucket-object-lock-enabled: true"]);
    said(make.arg(format!("{}/{}", bucket.endpoint, bucket.name)), "");
    upload(&weeks().dir.join("repository"), &bucket);
    let host = Pgrecall::new(&[shop(&bucket)]);
    let hidden: Vec<String> = keys(&bucket).into_iter().filter(|key| key.contains(&weeks().gone[0])).collect();
    let pruned = host.run(&["prune", "shop"]);
    assert!(pruned.contains("note: the bucket keeps versions"), "{pruned}");
    check_pruned(&bucket, &host);
    // What the remark says: it takes space all the same.
    let pack = hidden.iter().find(|key| key.ends_with(".pack")).expect("a pack");
    assert!(!keys(&bucket).contains(pack) && bucket.disk.join(pack).join("xl.meta").exists(), "{pack}");
}

/// Credentials that may do all but delete.
fn without_delete(bucket: &Bucket) -> (Bucket, String) {
    let policy = r#"{"Version":"2012-10-17","Statement":[
        {"Effect":"Allow","Action":["s3:*"],"Resource":["arn:aws:s3:::*"]},
        {"Effect":"Deny","Action":["s3:DeleteObject","s3:DeleteObjectVersion"],"Resource":["arn:aws:s3:::*"]}]}"#;
    let mut ask = curl(bucket, "sts");
    ask.args(["-d", "Action=AssumeRole&Version=2011-06-15&DurationSeconds=3600", "--data-urlencode"]);
    let answer = said(ask.arg(format!("Policy={policy}")).arg(&bucket.endpoint), "");
    let part = |name: &str| {
        let after = answer.split_once(&format!("<{name}>")).unwrap_or_else(|| panic!("{name}: {answer}")).1;
        after.split('<').next().unwrap().to_owned()
    };
    let own = Bucket { access_key: part("AccessKeyId"), secret_key: part("SecretAccessKey"), ..bucket.clone() };
    (own, part("SessionToken"))
}

#[test]
fn deletes_that_a_store_denies_are_told_hinder_nothing_and_are_made_when_they_are_allowed() {
    let (bucket, host) = stored_weeks();
    let (denied, token) = without_delete(&bucket);
    let other = Pgrecall::new(&[]);
    let file = other.scratch().join("token");
    secret_file(&file, &token);
    other.configure(&[shop(&denied).s3_key("session_token_file", &format!("{file:?}"))]);
    let before = keys(&bucket);
    let refused = other.refused(&["prune", "shop"]);
    assert_eq!(refused.status, STORE, "{refused:?}");
    assert!(refused.stdout.contains("refused: ") && refused.stdout.contains("AccessDenied"), "{refused:?}");
    assert!(refused.stderr.contains("Grant the right to delete"), "{refused:?}");
    let now = keys(&bucket);
    assert!(before.is_subset(&now), "{:?}", before.difference(&now));
    // Whoever may not delete restores all the same.
    let copy = restore(&other, &days_ago(13), &other.scratch().join("copy"));
    assert_eq!(copy.query("SELECT string_agg(days_ago::text, ',' ORDER BY days_ago) FROM visits"), "18,20,22");
    host.run(&["prune", "shop"]);
    check_pruned(&bucket, &host);
}

#[test]
fn a_prune_that_was_killed_or_met_a_busy_store_is_repeated_and_comes_to_its_end() {
    let (bucket, _) = stored_weeks();
    let proxy = S3Proxy::start(&bucket);
    let host = Pgrecall::new(&[shop(&proxy.bucket())]);
    let deletes = || proxy.seen().iter().filter(|seen| seen.operation == "DELETE" && seen.status < 300).count();
    for more in [2, 3, 6] {
        let goal = deletes() + more;
        proxy.add(Rule::new(Fault::Hang).on("DELETE").skip(u64::try_from(more).unwrap()));
        let mut command = host.command(&["prune", "shop"]);
        let mut prune = Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()));
        wait::until("some deletes", 60, || deletes() >= goal);
        assert!(prune.ended().is_none(), "it waits for the next one");
        prune.kill();
        proxy.clear();
        assert_eq!(backups(&host), weeks().kept);
        host.run(&["verify", "shop", "--read-data"]);
    }
    let left = host.run(&["prune", "shop", "--dry-run"]);
    assert!(left.contains("would be removed: "), "there is something left to do: {left}");
    proxy.add(Rule::new(Fault::SLOW_DOWN).on("DELETE").times(3));
    host.run(&["prune", "shop"]);
    assert!(proxy.faults() >= 3, "the store was busy");
    check_pruned(&bucket, &host);
}

#[test]
fn a_clock_that_is_a_month_off_removes_nothing() {
    let (bucket, host) = stored_weeks();
    let past = &weeks().dir;
    let local = Pgrecall::new(&[Environment::new("shop", Store::Directory(past.join("repository")))]);
    let before = (keys(&bucket), files(&past.join("repository")));
    for days in [-30, 30] {
        let shifted = Utc::now() + chrono::TimeDelta::days(days);
        for (host, status) in [(&host, STORE), (&local, HOST)] {
            let mut prune = host.command(&["prune", "shop"]);
            let done = prune.envs(clock::set_to(shifted)).output().expect("run pgrecall");
            let text = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.code(), Some(status), "{days} days: {text}");
        }
    }
    let is_lease = |name: &str| name.contains("/lease/");
    let now = keys(&bucket);
    assert_eq!(now.iter().filter(|key| !is_lease(key)).count(), before.0.iter().filter(|key| !is_lease(key)).count());
    let here = files(&past.join("repository"));
    let lost: Vec<&PathBuf> = before.1.difference(&here).filter(|path| !is_lease(&path.to_string_lossy())).collect();
    assert!(lost.is_empty(), "{lost:?}");
    host.run(&["prune", "shop"]);
    check_pruned(&bucket, &host);
}

#[test]
fn after_a_month_of_silence_the_last_good_backup_is_there_and_archiving_goes_on() {
    let mut past = Past::new();
    past.live(&[50, 36, 34]);
    let bucket = Minio::shared();
    upload(&past.repository(), &bucket);
    let mut host = Pgrecall::new(&[shop(&bucket).cluster(&past.cluster)]);
    let (before, all) = (backups(&host), keys(&bucket));
    let pruned = host.run(&["prune", "shop"]);
    assert!(!pruned.contains(" dropped: "), "{pruned}");
    assert_eq!(backups(&host), before);
    assert!(packs_of(&keys(&bucket), &before) == packs_of(&all, &before));

    past.cluster.start();
    host.start(&[&past.cluster]);
    host.wait_logged("a backup is due: one begins by itself", 60);
    wait::until("a backup of today", 120, || backups(&host).len() > before.len());
    past.cluster.query("INSERT INTO visits VALUES (0)");
    host.wait_stored(&past.cluster, past.cluster.flush_lsn());
    wait::until("today to be proven", 90, || host.try_run(&["plan", "shop", "--to", &days_ago(1)]).status == 0);
    let status = host.json(&["status", "shop"]);
    assert_eq!(status["environments"][0]["store"]["gaps"], serde_json::json!([]));
    host.stop();
    // The window ends today now: the newest backup before it leads to its oldest moment, 34 days old.
    host.run(&["prune", "shop"]);
    let kept = backups(&host);
    let newest = past.asked.last().expect("one");
    assert!(kept.contains(newest) && kept.first() >= Some(newest), "{kept:?}");
    for (moment, visits) in [(days_ago(10), "34,36,50"), ("latest".to_owned(), "0,34,36,50")] {
        let copy = restore(&host, &moment, &host.scratch().join("copy"));
        let found = copy.query("SELECT string_agg(days_ago::text, ',' ORDER BY days_ago) FROM visits");
        assert_eq!(found, visits, "{moment}");
    }
}

#[test]
fn another_cluster_in_the_same_place_is_refused_until_told_and_the_old_past_keeps_its_window() {
    let (bucket, _) = stored_weeks();
    let other = Cluster::builder(NEWEST).fresh().start();
    other.query("CREATE TABLE visits (days_ago int); INSERT INTO visits VALUES (-1)");
    let mut host = Pgrecall::new(&[shop(&bucket).cluster(&other)]);
    host.announce("WAL is not archived");
    host.announce("environment failed");
    host.start_without_waiting();
    let before = keys(&bucket);
    let state = || host.json(&["status", "shop"])["environments"][0]["state"].clone();
    wait::until("another cluster is a conflict", 60, || state() == "conflict");
    let stored =
        |keys: &BTreeSet<String>| keys.iter().filter(|key| key.contains("/wal/") || key.contains("/packs/")).count();
    assert_eq!(stored(&keys(&bucket)), stored(&before), "nothing of it is stored");
    host.run(&["incarnation", "open", "shop", "--confirm", "shop"]);
    wait::until("it is protected", 120, || state() == "protected");
    host.wait_stored(&other, other.flush_lsn());
    host.stop();
    let own = backups(&host);
    host.run(&["prune", "shop"]);
    assert_eq!(backups(&host), own);
    let now = keys(&bucket);
    assert_eq!((packs_of(&now, &weeks().gone), packs_of(&now, &weeks().kept)), (0, weeks().kept.len()));
    let visits = "SELECT string_agg(days_ago::text, ',' ORDER BY days_ago) FROM visits";
    for (moment, expected) in [(days_ago(5), "10,18,20,22"), ("latest".to_owned(), "-1")] {
        let copy = restore(&host, &moment, &host.scratch().join("copy"));
        assert_eq!(copy.query(visits), expected, "{moment}");
    }
    let refused = host.refused(&["plan", "shop", "--to", &days_ago(19)]);
    assert_eq!(refused.status, 4, "{refused:?}");
    host.run(&["plan", "shop", "--to", "latest", "--incarnation", "1"]);
}
