//! Removal of what has left the recovery window: a real server and a real repository, through three weeks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::common::guard::{Directory, Process};
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::{Cluster, Stop};
use crate::common::{NEWEST, wait};
use crate::crash::restore;

const DAY: Duration = Duration::from_hours(24);

pub fn files(directory: &Path) -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let mut found = BTreeSet::new();
    for path in entries {
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.insert(path);
        }
    }
    found
}

/// The store's clock is that of the files.
fn written_days_ago(paths: impl IntoIterator<Item = impl AsRef<Path>>, days: u32) {
    for path in paths {
        let file = std::fs::File::options().append(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - DAY * days).unwrap();
    }
}

pub fn days_ago(days: u32) -> String {
    (chrono::Utc::now() - DAY * days).to_rfc3339()
}

pub fn backups(host: &Pgrecall) -> Vec<String> {
    let list = host.json(&["backups", "shop"]);
    list["backups"].as_array().unwrap().iter().map(|backup| backup["id"].as_str().unwrap().to_owned()).collect()
}

/// A cluster, its host and its repository.
pub struct Past {
    /// Goes first: a daemon complains when its server does.
    pub host: Pgrecall,
    pub cluster: Cluster,
    pub dir: Directory,
    /// The backup that was asked for on each day.
    pub asked: Vec<String>,
}

impl Past {
    pub fn new() -> Past {
        let dir = Directory::new("retention");
        let cluster = Cluster::builder(NEWEST).make();
        let shop = Environment::new("shop", Store::Directory(dir.join("repository"))).cluster(&cluster);
        Past { host: Pgrecall::new(&[shop]), cluster, dir, asked: Vec::new() }
    }

    pub fn repository(&self) -> PathBuf {
        self.dir.join("repository")
    }

    /// One row, one or two backups, and a few seconds of archiving on each of these days, oldest first; nothing runs afterwards.
    pub fn live(&mut self, days_ago: &[u32]) {
        for days in days_ago {
            let old = if self.repository().exists() { files(&self.repository()) } else { BTreeSet::new() };
            let Past { cluster, host, asked, .. } = self;
            cluster.live_days_ago(*days);
            host.live_days_ago(*days);
            cluster.start();
            host.start(&[cluster]);
            cluster.query("CREATE TABLE IF NOT EXISTS visits (days_ago int)");
            cluster.query(&format!("INSERT INTO visits VALUES ({days})"));
            asked.push(host.json(&["backup", "shop"])["backup"].as_str().unwrap().to_owned());
            cluster.query("SELECT pg_switch_wal()");
            host.wait_stored(cluster, cluster.flush_lsn());
            host.stop();
            cluster.stop(Stop::Fast);
            written_days_ago(files(&self.repository()).difference(&old), *days);
        }
        self.cluster.live_days_ago(0);
        self.host.live_days_ago(0);
    }

    /// As if what was dropped had been dropped days ago.
    pub fn age_the_dropped(&self) {
        let is_dropped = |path: &&PathBuf| path.extension().is_some_and(|extension| extension == "dropped");
        written_days_ago(files(&self.repository()).iter().filter(is_dropped), 2);
    }

    fn has_packs(&self, id: &str) -> bool {
        files(&self.repository()).iter().any(|path| path.to_str().unwrap().contains(&format!("packs/{id}/")))
    }
}

#[test]
fn what_has_left_the_window_goes_and_every_moment_of_it_stays() {
    // The window is of fourteen days: 18 days ago lies the backup that leads to its oldest moment.
    let mut past = Past::new();
    past.live(&[20, 18, 10, 0]);
    let repository = past.repository();
    let old = files(&repository);
    let all = backups(&past.host);
    let planned = past.host.json(&["prune", "shop", "--dry-run"]);
    let goes = |judged: &&serde_json::Value| judged["keep"] == false && judged["reason"].is_string();
    assert!(planned["objects"].as_array().unwrap().iter().any(|judged| goes(&judged)), "{planned}");
    let to_drop: Vec<_> = planned["dropped"].as_array().unwrap().iter().map(|outcome| &outcome["backup"]).collect();
    assert!(past.host.run(&["prune", "shop", "--dry-run"]).contains("would be dropped"));
    assert_eq!(files(&repository), old, "nothing was changed");
    past.host.run(&["prune", "shop"]);
    let kept = backups(&past.host);
    assert!(kept.len() < all.len() && all.ends_with(&kept), "{all:?}, {kept:?}");
    assert!(to_drop.iter().copied().eq(all.iter().take(all.len() - kept.len())), "{to_drop:?}");
    // For a day whoever found the dropped ones before may read them.
    assert!(all.iter().all(|id| past.has_packs(id)));
    past.age_the_dropped();
    let pruned = past.host.json(&["prune", "shop"]);
    assert!(pruned["objects"].as_array().is_some_and(|objects| !objects.is_empty()), "{pruned}");
    assert!(all.iter().all(|id| past.has_packs(id) == kept.contains(id)), "{all:?}, {kept:?}");
    past.host.run(&["verify", "shop", "--read-data"]);

    let Past { mut host, mut cluster, dir, .. } = past;
    assert_eq!(host.refused(&["plan", "shop", "--to", &days_ago(19)]).status, 4);
    for (moment, visits) in [(days_ago(13), "18,20"), (days_ago(5), "10,18,20"), ("latest".to_owned(), "0,10,18,20")] {
        let copy = restore(&host, &moment, &dir.join("copy"));
        let found = copy.query("SELECT string_agg(days_ago::text, ',' ORDER BY days_ago) FROM visits");
        assert_eq!(found, visits, "{moment}");
    }
    // Archiving goes on behind what is left.
    cluster.start();
    host.start(&[&cluster]);
    cluster.query("INSERT INTO visits VALUES (-1)");
    host.wait_stored(&cluster, cluster.flush_lsn());
    let store = host.json(&["status", "shop"])["environments"][0]["store"].clone();
    assert_eq!(
        (&store["gaps"], store["window"].as_array().map(Vec::len)),
        (&serde_json::json!([]), Some(1)),
        "{store}"
    );
    host.run(&["verify", "shop"]);
    host.stop();
}

/// Whoever reads a backup has pinned it. That it left the window meanwhile, and was to be removed, ends no restore.
#[test]
fn a_restore_of_a_backup_that_left_the_window_completes_beside_prunes() {
    let mut past = Past::new();
    past.live(&[22, 20, 18, 0]);
    past.host.key("limits.restore_bandwidth_max", "\"512KiB\"");
    past.host.configure(&[Environment::new("shop", Store::Directory(past.repository()))]);
    let (read, unread) = (past.asked[1].clone(), past.asked[0].clone());
    let planned = past.host.run(&["prune", "shop", "--dry-run"]);
    assert!(planned.contains(&format!("backup {read} would be dropped: it ended before the window")), "{planned}");

    let into = past.dir.join("copy");
    let (target, path) = (format!("backup:{read}"), into.display().to_string());
    let restore = ["restore", "shop", "--to", &target, "--into", &path, "--no-start", "--finish", "promote"];
    let said = std::fs::File::create(past.dir.join("said")).unwrap();
    let mut command = past.host.command(&restore);
    let said_too = said.try_clone().unwrap();
    let mut reading = Process::spawn(command.stdout(said_too).stderr(said));
    let pins = past.repository().join("shop/pins");
    wait::until("the restore to read", 60, || pins.exists() && !files(&pins).is_empty() && into.exists());
    reading.signal("STOP");
    assert!(reading.ended().is_none() && !into.join("global/pg_control").exists(), "it has only begun");
    for _ in 0..2 {
        let pruned = past.host.run(&["prune", "shop"]);
        assert!(!pruned.contains(&format!("backup {read} dropped")), "{pruned}");
        past.age_the_dropped();
    }
    let planned = past.host.run(&["prune", "shop", "--dry-run"]);
    assert!(planned.contains(&format!("it is pinned as \"restore into {path}\" until ")), "{planned}");
    let left = backups(&past.host);
    assert!(left.contains(&read) && !left.contains(&unread) && !past.has_packs(&unread), "{left:?}");
    reading.signal("CONT");
    let status = reading.wait(120);
    assert!(status.success(), "{}", std::fs::read_to_string(past.dir.join("said")).unwrap());
    let mut copy = Cluster::adopt(NEWEST, &into);
    copy.start();
    copy.wait_writable();
    assert_eq!(copy.query("SELECT string_agg(days_ago::text, ',' ORDER BY days_ago) FROM visits"), "20,22");

    // It reads no more: what it held goes like the rest.
    let pruned = past.host.run(&["prune", "shop"]);
    assert!(pruned.contains(&format!("backup {read} dropped")), "{pruned}");
    past.age_the_dropped();
    past.host.run(&["prune", "shop"]);
    assert!(!past.has_packs(&read));
    past.host.run(&["verify", "shop", "--read-data"]);
}
