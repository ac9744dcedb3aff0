//! Whether two clusters hold the same, and whether one is sound.

use std::collections::BTreeMap;

use super::postgres::{Cluster, Stop, run};

/// What a cluster contains: for each table its rows (count and a hash that does not depend on their order), for each
/// sequence its state. The key is `database.schema.name`.
#[track_caller]
pub fn fingerprint(cluster: &Cluster) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for database in databases(cluster) {
        // Hashes of rows are added, so the order of the rows does not matter; a partitioned table is seen by its parts.
        let tables = "SELECT format('SELECT %L, count(*) || '' rows '' || \
             coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) FROM ONLY %s t;', \
             current_database() || '.' || n.nspname || '.' || c.relname, c.oid::regclass) \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE c.relkind IN ('r', 'm') AND c.relpersistence = 'p' \
             AND n.nspname NOT IN ('pg_catalog', 'information_schema') \
             UNION ALL SELECT format('SELECT %L, ''sequence at '' || last_value || '' '' || is_called FROM %s;', \
             current_database() || '.' || n.nspname || '.' || c.relname, c.oid::regclass) \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'S'";
        let script = cluster.query_in(&database, tables);
        for line in cluster.query_in(&database, &script).lines() {
            let (name, content) = line.split_once('|').expect("name and content");
            found.insert(name.to_owned(), content.to_owned());
        }
        found.insert(database, "database".to_owned());
    }
    let roles =
        "SELECT count(*) || ' roles ' || coalesce(sum(hashtextextended(r::text, 0)::numeric), 0) FROM pg_authid r";
    found.insert("(roles)".to_owned(), cluster.query(roles));
    found
}

/// Fails the test with the differences when the contents differ.
#[track_caller]
pub fn assert_same(expected: &BTreeMap<String, String>, found: &BTreeMap<String, String>) {
    let mut differences = Vec::new();
    for (name, content) in expected {
        match found.get(name) {
            None => differences.push(format!("{name} is missing")),
            Some(other) if other != content => differences.push(format!("{name}: {content} expected, {other} found")),
            Some(_) => {}
        }
    }
    let extra = found.keys().filter(|name| !expected.contains_key(*name));
    differences.extend(extra.map(|name| format!("{name} should not be there")));
    assert!(differences.is_empty(), "the contents differ:\n  {}", differences.join("\n  "));
}

/// Checks a running cluster that takes writes: indexes and heaps with pg_amcheck, visibility maps with pg_visibility; then
/// stops it, checks every page's checksum where there are any, and starts it again.
#[track_caller]
pub fn check_sound(cluster: &mut Cluster) {
    cluster.run("pg_amcheck", &["--all", "--install-missing", "--heapallindexed", "--jobs=2"]);
    for database in databases(cluster) {
        let sql = "CREATE EXTENSION IF NOT EXISTS pg_visibility; \
             SELECT c.oid::regclass FROM pg_class c WHERE c.relkind IN ('r', 'm', 't') AND c.relpersistence = 'p' \
             AND (EXISTS (SELECT FROM pg_check_visible(c.oid)) OR EXISTS (SELECT FROM pg_check_frozen(c.oid)))";
        let wrong = cluster.query_in(&database, sql);
        assert_eq!(wrong, "", "visibility map and rows disagree in {database}");
    }
    let checksums = cluster.query("SHOW data_checksums") == "on";
    cluster.stop(Stop::Fast);
    if checksums {
        let data = cluster.data().to_owned();
        let report = run(cluster.tool("pg_checksums").arg("--check").arg("-D").arg(data));
        assert!(report.contains("Bad checksums:  0"), "{report}");
    }
    cluster.start();
}

#[track_caller]
fn databases(cluster: &Cluster) -> Vec<String> {
    cluster.rows("SELECT datname FROM pg_database WHERE datallowconn ORDER BY datname")
}
