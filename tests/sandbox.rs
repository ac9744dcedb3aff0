//! Sandboxes on real PostgreSQL: what people can do in one, what they cannot, and what becomes of it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgrecall::config::Config;
use pgrecall::error::{Code, Failure};
use pgrecall::lineage::moment::Request;
use pgrecall::operations::locate;
use pgrecall::operations::restore::{Observer, wal_get_words};
use pgrecall::operations::sandbox::proxy::{Entry, ProxyError, Traffic, proxy};
use pgrecall::operations::sandbox::{Area, Asked, CreateRequest, Created, Event, Record, Settings, Source, State};
use pgrecall::pg::Timestamp;
use pgrecall::repository::{JobId, Repository};
use pgrecall::restore::Plan;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};
use tokio_util::sync::CancellationToken;

use crate::common::guard::{self, Directory, signal};
use crate::common::pgrecall::{Environment, Pgrecall, Store};
use crate::common::postgres::{Builder, Cluster};
use crate::common::{MAJORS, NEWEST, places, wait};

/// A source with a backup and its WAL stored, and an area.
struct World {
    cluster: Cluster,
    host: Pgrecall,
    repository: Repository,
    dir: Directory,
    settings: Settings,
    area: Option<Area>,
}

/// The id of that number, as text.
fn id(number: u32) -> String {
    JobId::new(Timestamp(0), number).to_string()
}

struct Nobody;

impl Observer for Nobody {}

impl World {
    /// The daemon that stored everything has ended: nobody but a sandbox could write into the repository.
    async fn new(builder: Builder, setup: &str) -> World {
        let cluster = builder.start();
        cluster.query(setup);
        let dir = Directory::new("sandbox");
        let store = Store::Directory(dir.join("store"));
        let mut host = Pgrecall::new(&[Environment::new("shop", store).cluster(&cluster)]);
        host.start(&[&cluster]);
        host.wait_for_backup("shop");
        cluster.query("INSERT INTO orders VALUES (2, 'later')");
        host.wait_stored(&cluster, cluster.flush_lsn());
        host.stop();
        let config = Config::load(&host.config_file()).expect("valid");
        let repository = config.environment("shop").expect("there").open_repository().await.expect("open");
        let settings = Settings { directory: Some(dir.join("area")), ..Settings::default() };
        let area = Some(Area::open(&settings).expect("an area"));
        World { cluster, host, repository, dir, settings, area }
    }

    fn area(&self) -> &Area {
        self.area.as_ref().expect("open")
    }

    /// As when the daemon ended and starts with these settings.
    fn reopen(&mut self, change: impl FnOnce(&mut Settings)) {
        self.area = None;
        change(&mut self.settings);
        self.area = Some(Area::open(&self.settings).expect("an area"));
    }

    async fn plan(&self) -> Plan {
        let request = Request { target: "latest".parse().expect("a target"), exclusive: false, timeline: None };
        locate::plan_any(&self.repository, "shop", &request, None).await.expect("a plan").1
    }

    fn request(&self, number: u32) -> CreateRequest {
        CreateRequest {
            id: JobId::new(Timestamp(0), number),
            asked_by: Asked { uid: Some(1000), user: "ann".to_owned() },
            ticket: Some("T-1".to_owned()),
            target: "latest".to_owned(),
            writable: false,
            expires_in: None,
            wal_get: wal_get_words(&self.host.config_file()).expect("words"),
            postgres_bin_dirs: vec![places::pg_bin(self.cluster.major())],
        }
    }

    async fn try_make(&self, request: &CreateRequest) -> Result<Created, Failure> {
        let source = Source { repository: &self.repository, plan: self.plan().await };
        self.area().create(source, request, &mut Nobody, CancellationToken::new()).await
    }

    async fn make(&self, request: &CreateRequest) -> Record {
        let made = self.try_make(request).await;
        made.unwrap_or_else(|error| panic!("{error}; {:?}", error.hint)).sandbox
    }

    /// Every object of the repository with its size.
    fn stored(&self) -> BTreeMap<PathBuf, u64> {
        let mut all = BTreeMap::new();
        collect(&self.dir.join("store"), &mut all);
        all
    }

    fn pid(&self, id: &str) -> Option<u32> {
        let found = self.area().find(id).expect("there");
        found.pid.map(|pid| u32::try_from(pid).expect("a process id"))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let listing = self.area.as_ref().and_then(|area| area.list().ok()).unwrap_or_default();
        for pid in listing.sandboxes.iter().filter_map(|found| found.pid) {
            let pid = u32::try_from(pid).expect("a process id");
            signal(pid, "QUIT");
            let gone = || !Path::new(&format!("/proc/{pid}/cwd")).exists();
            if !std::thread::panicking() {
                wait::until("the end of a sandbox", 30, gone);
            }
        }
    }
}

fn collect(directory: &Path, all: &mut BTreeMap<PathBuf, u64>) {
    for entry in std::fs::read_dir(directory).expect("list").flatten() {
        let meta = entry.metadata().expect("there");
        if meta.is_dir() {
            collect(&entry.path(), all);
        } else {
            all.insert(entry.path(), meta.len());
        }
    }
}

/// A person's session, and what the proxy said in the end.
struct Person {
    client: Client,
    proxied: JoinHandle<Result<Traffic, ProxyError>>,
}

async fn enter(record: &Record, entry: Entry, user: &str) -> Result<Person, tokio_postgres::Error> {
    let (ours, theirs) = tokio::io::duplex(8192);
    let sandbox = record.clone();
    let proxied = tokio::spawn(async move { proxy(theirs, &sandbox, entry).await });
    let mut config = tokio_postgres::Config::new();
    config.user(user).dbname("postgres").application_name("person");
    let (client, connection) = config.connect_raw(ours, NoTls).await?;
    tokio::spawn(connection);
    Ok(Person { client, proxied })
}

impl Person {
    async fn enter(record: &Record) -> Person {
        enter(record, Entry::Role, &record.role).await.expect("a session")
    }

    async fn number(&self, sql: &str) -> i64 {
        self.client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
    }

    /// The SQLSTATE with which a statement is refused.
    async fn refused(&self, sql: &str) -> String {
        match self.client.batch_execute(sql).await {
            Ok(()) => "done".to_owned(),
            Err(error) => error.code().map_or_else(|| error.to_string(), |code| code.code().to_owned()),
        }
    }
}

const ORDERS: &str = "CREATE TABLE orders (id int, what text); INSERT INTO orders VALUES (1, 'first');";
const DENIED: &str = "42501";

/// What a source may hold that must not be open to whoever looks into its copy.
const SECRETS: &str = "CREATE ROLE clerk LOGIN PASSWORD 'secret';
    CREATE SCHEMA hidden; CREATE TABLE hidden.t AS SELECT 1 AS n; REVOKE ALL ON SCHEMA hidden FROM PUBLIC;
    CREATE TABLE rows (n int); INSERT INTO rows VALUES (1); ALTER TABLE rows ENABLE ROW LEVEL SECURITY;
    ALTER TABLE rows FORCE ROW LEVEL SECURITY;
    CREATE FOREIGN DATA WRAPPER elsewhere; CREATE SERVER other FOREIGN DATA WRAPPER elsewhere;
    CREATE USER MAPPING FOR PUBLIC SERVER other OPTIONS (password 'secret');
    REVOKE CONNECT ON DATABASE postgres FROM PUBLIC;
    ALTER DATABASE template1 SET default_transaction_read_only = on;";

#[tokio::test(flavor = "multi_thread")]
async fn a_person_reads_everything_and_becomes_nobody_else() {
    let world = World::new(Cluster::builder(NEWEST), &format!("{ORDERS}{SECRETS}")).await;
    let record = world.make(&world.request(1)).await;
    assert_eq!((record.state, record.superuser.as_deref()), (State::Running, Some("postgres")));
    let person = Person::enter(&record).await;
    for (sql, expected) in [
        ("SELECT count(*) FROM orders", 2),
        ("SELECT count(*) FROM hidden.t", 1),
        ("SELECT count(*) FROM rows", 1),
        ("SELECT count(*) FROM pg_authid WHERE rolpassword IS NOT NULL", 0),
        ("SELECT count(*) FROM pg_user_mapping WHERE umoptions IS NOT NULL", 0),
    ] {
        assert_eq!(person.number(sql).await, expected, "{sql}");
    }
    assert_eq!(person.refused("INSERT INTO orders VALUES (3, 'x')").await, "25006");
    assert_eq!(person.refused("SET default_transaction_read_only = off").await, "done");
    for sql in [
        "INSERT INTO orders VALUES (3, 'x')",
        "SET ROLE postgres",
        "SET ROLE clerk",
        "SET SESSION AUTHORIZATION postgres",
        "ALTER ROLE CURRENT_USER SUPERUSER",
        "GRANT pg_execute_server_program TO CURRENT_USER",
        "CREATE ROLE friend",
        "CREATE DATABASE d",
        "CREATE TABLE t (n int)",
        "CREATE EXTENSION file_fdw",
        "ALTER SYSTEM SET archive_mode = on",
        "COPY orders TO PROGRAM 'id'",
        "COPY orders TO '/tmp/orders'",
        "SELECT pg_read_file('/etc/passwd')",
        "SELECT pg_ls_dir('.')",
        "SELECT lo_import('/etc/passwd')",
        "SELECT pg_reload_conf()",
        "SELECT pg_create_physical_replication_slot('s')",
        "CREATE SUBSCRIPTION s CONNECTION '' PUBLICATION p",
    ] {
        assert_eq!(person.refused(sql).await, DENIED, "{sql}");
    }
    // Its own sessions are its own to end; those of a superuser are not.
    assert_eq!(
        person.refused("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'").await,
        "done"
    );
    drop(person.client);
    let traffic = person.proxied.await.expect("ended").expect("a session");
    assert!(traffic.from_client_bytes > 1000 && traffic.from_server_bytes > 1000, "{traffic:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_role_gets_in_unless_an_administrator_asked() {
    let world = World::new(Cluster::builder(NEWEST), ORDERS).await;
    let record = world.make(&world.request(1)).await;
    for user in ["postgres", "clerk", "pgrecall_19700101t000000z_000002"] {
        let error = enter(&record, Entry::Role, user).await.err().expect("another user");
        assert_eq!(error.code().map(|code| code.code()), Some("28000"), "{user}: {error:?}");
    }
    let administrator = enter(&record, Entry::Superuser, "postgres").await.expect("a session");
    assert_eq!(administrator.refused("COPY orders TO PROGRAM 'cat >/dev/null'").await, "done");
    // A request to cancel comes over a connection of its own.
    let person = Person::enter(&record).await;
    let token = person.client.cancel_token();
    let sleep =
        tokio::spawn(async move { (person.client.batch_execute("SELECT pg_sleep(600)").await, person.proxied) });
    let sleeping = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_sleep(600)' AND state = 'active' \
                    AND pid <> pg_backend_pid()";
    wait::until_async("the person to sleep", 30, || async { administrator.number(sleeping).await == 1 }).await;
    let (ours, theirs) = tokio::io::duplex(8192);
    let sandbox = record.clone();
    let cancelling = tokio::spawn(async move { proxy(theirs, &sandbox, Entry::Role).await });
    token.cancel_query_raw(ours, NoTls).await.expect("sent");
    cancelling.await.expect("ended").expect("passed on");
    let (cancelled, proxied) = sleep.await.expect("ended");
    assert_eq!(cancelled.expect_err("cancelled").code().map(|code| code.code()), Some("57014"));
    proxied.await.expect("ended").expect("a session");
    // Nobody gets in when no server runs, and is told so.
    let stopped = world.area().stop(&id(1)).await.expect("stopped");
    let error = enter(&stopped.record, Entry::Role, &record.role).await.err().expect("it does not run");
    assert_eq!(error.code().map(|code| code.code()), Some("57P03"), "{error:?}");
    let started = world.area().start(&id(1)).await.expect("started");
    assert_eq!(Person::enter(&started.record).await.number("SELECT count(*) FROM orders").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_may_write_writes_and_is_still_no_superuser_on_any_major() {
    for major in MAJORS {
        let world = World::new(Cluster::builder(major), &format!("{ORDERS}{SECRETS}")).await;
        // 14 lets everybody make tables; reading alone is tried in full on the newest.
        let writable = major != 14;
        let record = world.make(&CreateRequest { writable, ..world.request(1) }).await;
        let person = Person::enter(&record).await;
        assert_eq!(person.number("SELECT count(*) + (SELECT count(*) FROM rows) FROM orders").await, 3, "{major}");
        let write = "INSERT INTO orders VALUES (3, 'x'); UPDATE orders SET what = 'y'; DELETE FROM orders WHERE id = 1";
        if writable {
            assert_eq!(person.refused(write).await, "done", "{major}");
            assert_eq!(person.number("SELECT count(*) FROM orders").await, 2);
        } else {
            assert_eq!(person.refused(write).await, "25006", "{major}");
            assert_eq!(person.refused("SET default_transaction_read_only = off").await, "done");
            assert_eq!(person.refused(write).await, DENIED, "{major}");
        }
        for sql in ["SET ROLE postgres", "COPY orders TO PROGRAM 'id'", "UPDATE pg_authid SET rolsuper = true"] {
            assert_eq!(person.refused(sql).await, DENIED, "{major}: {sql}");
        }
        assert_eq!(world.cluster.query("SELECT count(*) FROM orders WHERE what = 'y'"), "0");
        world.area().destroy(&id(1)).await.expect("destroyed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_leaves_the_source_s_repository_slots_and_subscriptions_alone() {
    let logical = || Cluster::builder(NEWEST).setting("wal_level", "logical");
    let publisher = logical().start();
    publisher.query("CREATE TABLE news (n int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE news");
    let setup = format!(
        "{ORDERS} CREATE TABLE news (n int PRIMARY KEY); SELECT pg_create_logical_replication_slot('l', 'pgoutput'); \
         SELECT pg_create_physical_replication_slot('ph', true);"
    );
    let world = World::new(logical().fresh(), &setup).await;
    let subscribe = format!("CREATE SUBSCRIPTION s CONNECTION '{}' PUBLICATION p", publisher.conninfo());
    world.cluster.query(&subscribe);
    publisher.query("INSERT INTO news VALUES (1)");
    wait::until("the row to arrive", 60, || world.cluster.query("SELECT count(*) FROM news") == "1");
    let mut world = world;
    world.host.start(&[&world.cluster]);
    world.host.wait_stored(&world.cluster, world.cluster.flush_lsn());
    world.host.stop();

    let stored = world.stored();
    let slots = "SELECT slot_name, restart_lsn, confirmed_flush_lsn FROM pg_replication_slots ORDER BY 1";
    let before = world.cluster.query(slots);
    let walsenders = "SELECT count(*) FROM pg_stat_replication";
    assert_eq!(publisher.query(walsenders), "1");
    let record = world.make(&CreateRequest { writable: true, ..world.request(1) }).await;
    let administrator = enter(&record, Entry::Superuser, "postgres").await.expect("a session");
    for (sql, expected) in [
        ("SELECT count(*) FROM pg_replication_slots", 0),
        ("SELECT count(*) FROM pg_subscription WHERE subenabled OR subconninfo <> '' OR subslotname IS NOT NULL", 0),
        ("SELECT count(*) FROM pg_subscription", 1),
        ("SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'logical replication%'", 0),
        ("SELECT count(*) FROM news", 1),
    ] {
        assert_eq!(administrator.number(sql).await, expected, "{sql}");
    }
    // It writes and ends segments, a subscription that is dropped here leaves the publisher's slot.
    let work = [
        "INSERT INTO orders SELECT n, 'x' FROM generate_series(1, 1000) n",
        "SELECT pg_switch_wal()",
        "CHECKPOINT",
        "DROP SUBSCRIPTION s",
    ];
    for sql in work {
        assert_eq!(administrator.refused(sql).await, "done", "{sql}");
    }
    assert_eq!(
        administrator.number("SELECT count(*) FROM pg_settings WHERE name = 'archive_mode' AND setting = 'off'").await,
        1
    );
    assert_eq!(world.stored(), stored, "the repository is as it was");
    assert_eq!(world.cluster.query(slots), before);
    assert_eq!(publisher.query(walsenders), "1");
    assert_eq!(publisher.query("SELECT count(*) FROM pg_replication_slots WHERE slot_name = 's' AND active"), "1");
    publisher.query("INSERT INTO news VALUES (2)");
    wait::until("the source to go on", 60, || world.cluster.query("SELECT count(*) FROM news") == "2");
    assert_eq!(world.area().destroy(&id(1)).await.expect("destroyed").id, record.id);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_outlives_the_daemon_is_started_again_and_ends_in_time() {
    let mut world = World::new(Cluster::builder(NEWEST), ORDERS).await;
    let record = world.make(&world.request(1)).await;
    let pid = world.pid(&id(1)).expect("it runs");
    let person = Person::enter(&record).await;
    world.reopen(|_| {});
    let now = || Timestamp::from(chrono::Utc::now());
    assert_eq!(world.area().keep(now()).await.expect("a pass"), [], "nothing is amiss");
    assert_eq!(world.pid(&id(1)), Some(pid), "the same server");
    assert_eq!(person.number("SELECT count(*) FROM orders").await, 2, "the same session");

    let children = guard::children(pid);
    signal(pid, "KILL");
    let is_there = |pid: &u32| Path::new(&format!("/proc/{pid}/cwd")).exists();
    wait::until("the server's end", 30, || world.pid(&id(1)).is_none() && !children.iter().any(is_there));
    let again = wait::for_value_async("the server to start again", 60, || async {
        let events = world.area().keep(now()).await.expect("a pass");
        // Its processes may still hold their shared memory.
        assert!(matches!(events.as_slice(), [Event::StartedAgain(_) | Event::NotStarted(..)]), "{events:?}");
        world.pid(&id(1))
    })
    .await;
    assert_ne!(again, pid);
    assert_eq!(Person::enter(&record).await.number("SELECT count(*) FROM orders").await, 2);

    let hours = |hours: i64| now().saturating_add_micros(hours * 3_600_000_000);
    let near = world.area().keep(hours(23).saturating_add_micros(60_000_000)).await.expect("a pass");
    assert!(matches!(near.as_slice(), [Event::Warned(_)]), "{near:?}");
    let over = world.area().keep(hours(24)).await.expect("a pass");
    assert!(matches!(over.as_slice(), [Event::Expired(_)]), "{over:?}");
    assert!(!Path::new(&format!("/proc/{again}/cwd")).exists(), "its server is gone");
    assert_eq!(world.area().list().expect("a list"), pgrecall::operations::sandbox::Listing::default());
    assert!(!record.socket_directory.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_was_interrupted_or_refused_leaves_nothing() {
    let mut world = World::new(Cluster::builder(NEWEST), ORDERS).await;
    // Too large for what is left.
    world.reopen(|settings| settings.quota_bytes = Some(1 << 20));
    let refused = world.try_make(&world.request(1)).await.expect_err("no room");
    assert_eq!(refused.code, Code::Host);
    assert!(refused.message.contains("of their 1.00 MiB"), "{refused}");
    assert!(world.area().list().expect("a list").sandboxes.is_empty());
    world.reopen(|settings| settings.quota_bytes = Some(1 << 30));
    let longer = CreateRequest { expires_in: Some(Duration::from_hours(24 * 30)), ..world.request(1) };
    assert_eq!(world.try_make(&longer).await.expect_err("too long").code, Code::Usage);

    // Dropped at some moments, as by a kill of the daemon: the next pass of the next daemon removes what is there.
    for (number, state) in [(1, "data"), (2, "data/pgrecall_restore/state.json"), (3, "data/postmaster.pid")] {
        let request = world.request(number);
        let place = world.dir.join("area/shop").join(id(number));
        let mut making = Box::pin(world.try_make(&request));
        let reached = async {
            loop {
                if place.join(state).exists() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            made = &mut making => panic!("made before it came to {state}: {made:?}"),
            () = reached => {}
        }
        drop(making);
        world.reopen(|_| {});
        let events = world.area().keep(Timestamp::from(chrono::Utc::now())).await.expect("a pass");
        assert!(matches!(events.as_slice(), [Event::Removed(_)]), "{state}: {events:?}");
        assert!(!place.exists(), "{state}");
    }
    // The same again, to its end.
    let record = world.make(&world.request(1)).await;
    assert_eq!(Person::enter(&record).await.number("SELECT count(*) FROM orders").await, 2);
    // A cancelled one is gone at once.
    let cancel = CancellationToken::new();
    let source = Source { repository: &world.repository, plan: world.plan().await };
    let request = world.request(9);
    let mut nobody = Nobody;
    let making = world.area().create(source, &request, &mut nobody, cancel.clone());
    let place = world.dir.join("area/shop").join(id(9)).join("data/postmaster.pid");
    let stop = async {
        while !place.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        cancel.cancel();
    };
    let (made, ()) = tokio::join!(making, stop);
    assert_eq!(made.expect_err("cancelled").code, Code::Cancelled);
    assert!(!world.dir.join("area/shop").join(id(9)).exists());
    // What is released is kept, and starts as is said.
    let released = world.area().release(&id(1)).await.expect("released");
    assert!(released.start.starts_with("pg_ctl start -D "), "{}", released.start);
    assert_eq!(released.sandbox.pid, None);
    let mut copy = Cluster::adopt(NEWEST, &released.sandbox.directory.join("data"));
    copy.start();
    assert_eq!(copy.query("SELECT count(*) FROM orders"), "2");
}
