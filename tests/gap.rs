//! WAL that is lost for good while nobody archives: what is said of it, and what happens by itself.

use pgrecall::pg::Lsn;
use serde_json::Value;

use crate::common::guard::Directory;
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::Cluster;
use crate::common::{NEWEST, compare, wait};
use crate::crash::restore;
use crate::whole_way::moment;

const UNREACHABLE_TARGET: i32 = 4;

fn backups(host: &Pgrecall) -> Vec<Value> {
    host.json(&["backups", "shop"])["backups"].as_array().expect("a list").clone()
}

fn lsn(value: &Value) -> Lsn {
    value.as_str().and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("an LSN: {value}"))
}

/// A hole in the WAL of a server, and moments before and in it.
struct Hole {
    before: String,
    inside: String,
    inside_lsn: Lsn,
}

/// The daemon is away, and the server writes until it has thrown away what the slot was to keep.
fn lose_the_slot(cluster: &mut Cluster, before: String) -> Hole {
    cluster.set("max_slot_wal_keep_size", "1MB");
    cluster.reload();
    let slot = "SELECT wal_status FROM pg_replication_slots WHERE slot_name LIKE 'pgrecall%'";
    let fill = || {
        cluster.query("INSERT INTO visits SELECT 'lost', md5(n::text) FROM generate_series(1, 20000) n");
        cluster.switch_wal();
        cluster.query("CHECKPOINT");
    };
    fill();
    fill();
    let (inside, inside_lsn) = (moment(cluster), cluster.insert_lsn());
    wait::until("the slot to be invalidated", 60, || {
        fill();
        cluster.query(slot) == "lost"
    });
    fill();
    cluster.set("max_slot_wal_keep_size", "1GB");
    cluster.reload();
    Hole { before, inside, inside_lsn }
}

#[test]
fn wal_lost_while_the_daemon_was_down_is_shown_and_a_new_backup_begins_by_itself() {
    let mut cluster = Cluster::builder(NEWEST).setting("min_wal_size", "32MB").setting("max_wal_size", "32MB").start();
    cluster.query("CREATE TABLE visits (at text, v text)");
    let dir = Directory::new("gap");
    let shop = Environment::new("shop", Store::Directory(dir.join("repository"))).cluster(&cluster);
    let mut host = Pgrecall::new(&[shop]);
    host.start(&[&cluster]);
    host.wait_for_backup("shop");
    cluster.query("INSERT INTO visits VALUES ('before', '')");
    let before = moment(&cluster);
    cluster.query("INSERT INTO visits VALUES ('later', '')");
    host.wait_stored(&cluster, cluster.flush_lsn());
    host.stop();
    let first = backups(&host);

    let hole = lose_the_slot(&mut cluster, before);
    for text in ["WAL is missing for good: a gap is recorded", "the slot"] {
        host.announce(text);
    }
    host.start(&[&cluster]);
    wait::until("a backup to be taken by itself", 120, || backups(&host).len() > first.len());
    host.wait_logged("no backup leads to the WAL that is archived now: one begins by itself", 5);
    cluster.query("INSERT INTO visits VALUES ('after', '')");
    host.wait_stored(&cluster, cluster.flush_lsn());
    what_is_shown(&host, &hole);
    what_is_refused(&host, &hole, &dir);

    // On either side of the hole everything is there.
    let names = "SELECT string_agg(DISTINCT at, ',' ORDER BY at) FROM visits";
    let copy = restore(&host, &hole.before, &dir.join("before"));
    assert_eq!(copy.query(names), "before");
    drop(copy);
    let expected = compare::fingerprint(&cluster);
    let copy = restore(&host, "latest", &dir.join("after"));
    assert_eq!(copy.query(names), "after,before,later,lost");
    compare::assert_same(&expected, &compare::fingerprint(&copy));
    host.run(&["verify", "shop"]);
    host.stop();
}

/// The window has a hole, with its bounds and its cause; the backups lie on both sides of it.
fn what_is_shown(host: &Pgrecall, hole: &Hole) {
    let status = host.json(&["status", "shop"]);
    let store = &status["environments"][0]["store"];
    let (window, gap) = (&store["window"], &store["gaps"][0]);
    assert_eq!(
        (window.as_array().map(Vec::len), store["gaps"].as_array().map(Vec::len)),
        (Some(2), Some(1)),
        "{store}"
    );
    let (start, end) = (lsn(&gap["start_lsn"]), lsn(&gap["end_lsn"]));
    assert!(start < hole.inside_lsn && hole.inside_lsn < end, "{gap}");
    assert!(lsn(&window[0]["to_lsn"]) <= start && end <= lsn(&window[1]["from_lsn"]), "{store}");
    assert_eq!((&window[0]["ended_by"], &window[1]["ended_by"]), (&gap["cause"], &Value::Null));
    let cause = gap["cause"].as_str().expect("a cause");
    assert!(cause.contains("slot") || cause.contains("removed"), "{cause}");
    let shown = host.run(&["status", "shop"]);
    for text in ["then nothing until the next backup", "  gap           timeline 1, ", cause] {
        assert!(shown.contains(text), "{text}: {shown}");
    }
    let ends: Vec<Lsn> = backups(host).iter().map(|backup| lsn(&backup["stop_lsn"])).collect();
    assert!(ends[0] <= start && end <= ends[1], "{ends:?}, {gap}");
}

/// A moment in the hole is refused before anything is written, with the moments on either side that can be asked for.
fn what_is_refused(host: &Pgrecall, hole: &Hole, dir: &Directory) {
    let into = dir.join("refused");
    let path = into.display().to_string();
    for to in [hole.inside.clone(), format!("lsn:{}", hole.inside_lsn)] {
        let refused = host.refused(&["restore", "shop", "--to", &to, "--into", &path, "--no-start"]);
        assert_eq!(refused.status, UNREACHABLE_TARGET, "{refused:?}");
        assert!(refused.stderr.contains("WAL is missing") && !into.exists(), "{refused:?}");
        let (_, nearest) = refused.stderr.split_once("nearest are ").unwrap_or_else(|| panic!("{to}: {refused:?}"));
        let nearest: Vec<&str> = nearest.split_whitespace().filter(|word| word.starts_with("lsn:")).take(2).collect();
        assert_eq!(nearest.len(), 2, "{refused:?}");
        for place in nearest {
            host.run(&["plan", "shop", "--to", place]);
        }
    }
}
