//! Removal of what has left the recovery window: a real server and a real repository, through three weeks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::common::NEWEST;
use crate::common::guard::Directory;
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::{Cluster, Stop};
use crate::crash::restore;

const DAY: Duration = Duration::from_hours(24);

fn files(directory: &Path) -> BTreeSet<PathBuf> {
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

fn days_ago(days: u32) -> String {
    (chrono::Utc::now() - DAY * days).to_rfc3339()
}

fn backups(host: &Pgrecall) -> Vec<String> {
    let list = host.json(&["backups", "shop"]);
    list["backups"].as_array().unwrap().iter().map(|backup| backup["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn what_has_left_the_window_goes_and_every_moment_of_it_stays() {
    let dir = Directory::new("retention");
    let repository = dir.join("repository");
    let mut cluster = Cluster::builder(NEWEST).make();
    let mut host = Pgrecall::new(&[Environment::new("shop", Store::Directory(repository.clone())).cluster(&cluster)]);
    let mut old = BTreeSet::new();
    // The window is of fourteen days: 18 days ago lies the backup that leads to its oldest moment.
    for days in [20, 18, 10, 0] {
        cluster.live_days_ago(days);
        host.live_days_ago(days);
        cluster.start();
        host.start(&[&cluster]);
        cluster.query("CREATE TABLE IF NOT EXISTS visits (days_ago int)");
        cluster.query(&format!("INSERT INTO visits VALUES ({days})"));
        host.run(&["backup", "shop"]);
        cluster.query("SELECT pg_switch_wal()");
        host.wait_stored(&cluster, cluster.flush_lsn());
        host.stop();
        cluster.stop(Stop::Fast);
        let now = files(&repository);
        written_days_ago(now.difference(&old), days);
        old = now;
    }
    let all = backups(&host);
    host.run(&["prune", "shop", "--dry-run"]);
    assert_eq!(files(&repository), old, "nothing was changed");
    host.run(&["prune", "shop"]);
    let kept = backups(&host);
    assert!(kept.len() < all.len() && all.ends_with(&kept), "{all:?}, {kept:?}");
    // For a day whoever found the dropped ones before may read them.
    let packs =
        |id: &String| files(&repository).iter().any(|path| path.to_str().unwrap().contains(&format!("packs/{id}/")));
    assert!(all.iter().all(packs));
    written_days_ago(files(&repository).iter().filter(|path| path.extension().is_some_and(|e| e == "dropped")), 2);
    host.run(&["prune", "shop"]);
    assert!(all.iter().all(|id| packs(id) == kept.contains(id)), "{all:?}, {kept:?}");
    host.run(&["verify", "shop", "--read-data"]);

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
