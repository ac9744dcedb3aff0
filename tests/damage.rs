//! Damage in the store: every kind of object flipped, cut, emptied and removed. `verify` finds it and names it, no command
//! panics, and what can be restored all the same is restored.

use std::path::{Path, PathBuf};

use pgrecall::pg::Lsn;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::common::NEWEST;
use crate::common::guard::Directory;
use crate::common::pgrecall::{Answer, Environment, Pgrecall, Store, secret_file};
use crate::common::postgres::Cluster;
use crate::whole_way::{Left, restore, wait_stored};

const CORRUPT: i32 = 7;

/// A repository with something of every kind in it, and no daemon.
struct Scene {
    cluster: Cluster,
    host: Pgrecall,
    dir: Directory,
    /// In the gap.
    lost_lsn: Lsn,
}

impl Scene {
    fn new() -> Scene {
        let cluster = Cluster::builder(NEWEST).setting("wal_keep_size", "0").start();
        let dir = Directory::new("damage");
        secret_file(&dir.join("master.key"), &"5a".repeat(32));
        let place = Store::Directory(dir.join("repository"));
        let environment = Environment::new("shop", place).cluster(&cluster).encrypted(&dir.join("master.key"));
        let mut host = Pgrecall::new(&[environment]);
        host.start(&[&cluster]);
        host.wait_for_backup("shop");
        cluster.query("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n");
        cluster.switch_wal();
        wait_stored(&cluster);
        host.stop();
        // WAL that the server has removed while nobody looked.
        cluster.query("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots");
        for _ in 0..3 {
            cluster.query("INSERT INTO t VALUES (0)");
            cluster.switch_wal();
            cluster.query("CHECKPOINT");
        }
        let lost_lsn = cluster.lsn("SELECT pg_current_wal_lsn() - 16777216");
        for text in ["WAL is missing", "gap", "slot", "no longer", "backup"] {
            host.announce(text);
        }
        host.start(&[&cluster]);
        host.run(&["backup", "shop"]);
        cluster.query("INSERT INTO t VALUES (-1)");
        cluster.switch_wal();
        cluster.query("INSERT INTO t VALUES (-2)");
        wait_stored(&cluster);
        host.stop();
        Scene { cluster, host, dir, lost_lsn }
    }

    fn root(&self) -> PathBuf {
        self.dir.join("repository/shop")
    }

    fn verify(&self) -> Answer {
        self.host.try_run(&["verify", "shop", "--read-data"])
    }

    /// The objects of which the path has this text in it, in the order of their names; without the packs of a backup that
    /// was broken off, which nothing rests on.
    fn objects(&self, part: &str) -> Vec<PathBuf> {
        let all = files(&self.root());
        let committed = |pack: &Path| {
            let id = pack.parent().and_then(Path::file_name).expect("a folder").to_string_lossy().into_owned();
            all.iter().any(|path| path.ends_with(format!("backups/{id}.backup")))
        };
        let is_pack = |path: &Path| path.extension().is_some_and(|extension| extension == "pack");
        let wanted = |path: &&PathBuf| path.to_string_lossy().contains(part) && (!is_pack(path) || committed(path));
        let mut found: Vec<PathBuf> = all.iter().filter(wanted).cloned().collect();
        found.sort();
        found
    }

    fn name(&self, path: &Path) -> String {
        path.strip_prefix(self.root()).expect("below the root").display().to_string()
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("a directory").map(|e| e.expect("an entry").path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Damage {
    Flip,
    Cut,
    Empty,
    Remove,
}

const ALL: [Damage; 4] = [Damage::Flip, Damage::Cut, Damage::Empty, Damage::Remove];

impl Damage {
    /// Does it; gives what was there before.
    fn to(self, path: &Path) -> Vec<u8> {
        let before = std::fs::read(path).expect("read");
        let mut bytes = before.clone();
        let middle = bytes.len() / 2;
        match self {
            Damage::Flip => bytes[middle] ^= 4,
            Damage::Cut => bytes.truncate(middle),
            Damage::Empty => bytes.clear(),
            Damage::Remove => {
                std::fs::remove_file(path).expect("remove");
                return before;
            }
        }
        std::fs::write(path, bytes).expect("write");
        before
    }
}

/// What damage to an object leads to.
enum Leads {
    /// `verify` exits with 7 and says this, or the object's name.
    Found(&'static str),
    /// `verify` says this and does not begin.
    Refused(&'static str),
    /// It is made anew, or says nothing that is not known otherwise.
    Nothing,
    /// The very end is missed only when a claim was written after it.
    Perhaps,
}

#[test]
fn damage_to_every_kind_of_object_is_found_and_named() {
    use Leads::{Found, Nothing, Perhaps, Refused};
    let scene = Scene::new();
    let sound = scene.verify();
    assert_eq!(sound.status, 0, "{sound:?}");
    assert!(sound.stdout.contains("note: WAL ["), "the gap is a note: {}", sound.stdout);
    // A part of the path, what damage leads to, and what removal leads to.
    let kinds = [
        ("format.json", Refused("format.json"), Refused("there is no repository")),
        ("/keys/", Refused("keys/"), Refused("wrapped by the master keys")),
        ("/identity/", Found(""), Found("")),
        (".intent", Found(""), Nothing),
        (".backup", Found(""), Nothing),
        (".pack", Found(""), Found("")),
        (".wal", Found(""), Found("WAL [")),
        (".part", Found(""), Perhaps),
        ("/coverage/", Found(""), Nothing),
        ("/gaps/", Found(""), Found("WAL [")),
        ("/index/", Nothing, Nothing),
        ("/lease/", Nothing, Nothing),
    ];
    for (part, damaged, removed) in &kinds {
        // Of the WAL the last, which a backup needs, and behind which nothing is stored.
        let objects = scene.objects(part);
        let object = objects.last().unwrap_or_else(|| panic!("there is something of {part}"));
        let name = scene.name(object);
        for damage in ALL {
            let before = damage.to(object);
            let found = scene.verify();
            let said = format!("{}{}", found.stdout, found.stderr);
            let leads = if damage == Damage::Remove { removed } else { damaged };
            match leads {
                Found(text) => {
                    assert_eq!(found.status, CORRUPT, "{damage:?} {name}: {said}");
                    let named = if text.is_empty() { name.as_str() } else { text };
                    assert!(said.contains(named), "{damage:?} {name}: {said}");
                }
                Refused(text) => {
                    assert!(found.status != 0 && said.contains(text), "{damage:?} {name}: {said}");
                }
                Perhaps => {}
                Nothing => assert_eq!(found.status, 0, "{damage:?} {name}: {said}"),
            }
            for command in [&["plan", "shop", "--to", "latest"][..], &["backups", "shop"], &["status"]] {
                let answer = scene.host.try_run(command);
                assert!(!answer.stderr.contains("panicked"), "{damage:?} {name}: {command:?}: {answer:?}");
                assert!(answer.status == 0 || !answer.stderr.is_empty(), "{damage:?} {name}: {command:?}: {answer:?}");
            }
            std::fs::write(object, before).expect("put back");
        }
    }
    let (first, second) = (scene.objects(".backup")[0].clone(), scene.objects(".backup")[1].clone());
    let other = std::fs::read(&second).expect("read");
    let before = std::fs::read(&first).expect("read");
    std::fs::write(&first, other).expect("swap");
    let found = scene.verify();
    assert!(found.status == CORRUPT && found.stdout.contains(&scene.name(&first)), "{found:?}");
    std::fs::write(&first, before).expect("put back");
    assert_eq!(scene.verify().status, 0);
}

#[test]
fn what_damage_leaves_is_restored_and_what_it_hit_is_refused_by_name() {
    let scene = Scene::new();
    let rows = |name: &str| {
        let report = restore(&scene.host, "latest", &scene.dir.join(name), &[]);
        Left::of(&report).query(&scene.cluster, "SELECT count(*) || ' ' || min(n) FROM t")
    };
    for object in scene.objects("/index/").iter().chain(&scene.objects("/lease/")) {
        Damage::Flip.to(object);
    }
    assert_eq!(rows("without-indexes"), "1005 -2");

    let newest_claim = scene.objects("/coverage/").pop().expect("a claim");
    let before = Damage::Flip.to(&newest_claim);
    assert_eq!(rows("without-a-claim"), "1005 -2");
    std::fs::write(newest_claim, before).expect("put back");

    // The commit object of the first backup: the second one is enough.
    let commit = scene.objects(".backup")[0].clone();
    let before = Damage::Cut.to(&commit);
    assert_eq!(rows("without-a-backup"), "1005 -2");
    std::fs::write(&commit, before).expect("put back");

    let in_gap = scene.host.refused(&["plan", "shop", "--to", &format!("lsn:{}", scene.lost_lsn)]);
    println!("{in_gap:?}");
    assert!(in_gap.stderr.contains("missing"), "{in_gap:?}");

    // A pack of the backup that is needed: refused before a server is started, and named.
    // Which of those that began at about the same time is the newest, its name does not say.
    let needed = scene.host.json(&["plan", "shop"])["plan"]["backup"]["id"].as_str().expect("an id").to_owned();
    let pack = scene.objects(&format!("{needed}/")).pop().expect("a pack");
    Damage::Flip.to(&pack);
    let into = scene.dir.join("damaged").display().to_string();
    let refused = scene.host.refused(&["restore", "shop", "--to", "latest", "--into", &into]);
    assert!(refused.stderr.contains(&scene.name(&pack)), "{refused:?}");
    assert!(!Path::new(&into).join("postmaster.pid").exists(), "nothing runs there");
}

/// An archive whose identity is gone says so, to readers too; the daemon writes it again for the same cluster.
#[test]
fn a_lost_identity_is_not_taken_for_an_empty_repository() {
    let mut scene = Scene::new();
    let identity = scene.objects("/identity/")[0].clone();
    Damage::Remove.to(&identity);
    for command in [&["plan", "shop", "--to", "latest"][..], &["backups", "shop"]] {
        let answer = scene.host.refused(command);
        assert!(answer.status == CORRUPT && answer.stderr.contains(&scene.name(&identity)), "{command:?}: {answer:?}");
    }
    scene.host.announce("the identity object was gone");
    scene.host.start(&[&scene.cluster]);
    scene.cluster.query("INSERT INTO t VALUES (-3)");
    wait_stored(&scene.cluster);
    scene.host.stop();
    assert!(identity.exists() && scene.objects("/identity/").len() == 1);
    assert_eq!(scene.verify().status, 0);
}

/// Any byte of any object that something rests on: `verify --read-data` finds it. `PGRECALL_ROUNDS` and `PGRECALL_SEED` for more.
#[test]
fn a_flipped_byte_anywhere_is_found() {
    let number = |name: &str, default: u64| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
    let (rounds, seed) = (number("PGRECALL_ROUNDS", 25), number("PGRECALL_SEED", 1));
    println!("seed {seed}, {rounds} rounds");
    let scene = Scene::new();
    let mut objects = scene.objects("");
    let derived = |path: &Path| ["/index/", "/lease/"].iter().any(|part| path.to_string_lossy().contains(part));
    objects.retain(|path| !derived(path));
    let mut random = StdRng::seed_from_u64(seed);
    for _ in 0..rounds {
        let object = &objects[random.random_range(0..objects.len())];
        let before = std::fs::read(object).expect("read");
        let mut bytes = before.clone();
        let at = random.random_range(0..bytes.len());
        bytes[at] ^= 1 << random.random_range(0..8_u8);
        std::fs::write(object, bytes).expect("write");
        let found = scene.verify();
        assert!(found.status != 0, "byte {at} of {}: {found:?}", scene.name(object));
        std::fs::write(object, before).expect("put back");
    }
}
