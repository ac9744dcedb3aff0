//! Writers of numbered commits, and the proof that a restored cluster holds exactly those before a point of the WAL.
//!
//! Several sessions write transactions of many kinds. Each transaction puts its number into `ledger.commits`, together with
//! the count and a hash of the session's own table as it is at that moment: so a restored cluster shows by itself whether
//! its content belongs to its commits. Numbers and xids are noted before the commit, acknowledgements after it, in memory
//! and in a synced file.
//!
//! Which commits lie before a point is read from the source's WAL with `pg_waldump` of its major, never from clocks.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use pgrecall::pg::Lsn;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

use super::guard::Directory;
use super::postgres::{Cluster, run};
use super::wait;

/// A transaction as its session knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub number: u64,
    pub session: u32,
    pub kind: &'static str,
    pub xid: u32,
    /// What the server said after the commit had returned, or `None` when it never returned.
    pub acknowledged: Option<Acknowledged>,
}

/// A commit that the client was told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acknowledged {
    /// A position at or behind the commit record's end.
    pub lsn: Lsn,
    /// This host's clock, in microseconds since the Unix epoch.
    pub time_us: u64,
}

/// The end of a transaction in the WAL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransactionEnd {
    /// Where its record starts.
    pub lsn: Lsn,
    pub xid: u32,
    pub committed: bool,
    /// As pg_waldump prints it, in UTC: `2026-11-23 08:07:21.583631`.
    pub time: String,
}

const KINDS: [&str; 11] =
    ["insert", "update", "insert", "delete", "copy", "prepared", "toast", "savepoint", "ddl", "truncate", "abort"];
const SCHEMA: &str = "CREATE SCHEMA IF NOT EXISTS ledger; CREATE TABLE IF NOT EXISTS ledger.commits \
     (number bigint PRIMARY KEY, session int, kind text, rows bigint, hash numeric, at timestamptz DEFAULT clock_timestamp());";

struct Shared {
    address: Mutex<(PathBuf, u16)>,
    next: AtomicU64,
    stop: AtomicBool,
    pause_us: u64,
    entries: Mutex<BTreeMap<u64, Entry>>,
    file: Mutex<std::fs::File>,
}

/// Sessions that write until they are stopped; they connect again when the server was away.
pub struct Ledger {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
    dir: Directory,
}

impl Ledger {
    /// Starts `sessions` writers that write as fast as they can.
    pub fn start(cluster: &Cluster, sessions: u32) -> Ledger {
        Ledger::start_with_pause(cluster, sessions, Duration::ZERO)
    }

    /// Starts `sessions` writers that rest for `pause` between two transactions.
    pub fn start_with_pause(cluster: &Cluster, sessions: u32, pause: Duration) -> Ledger {
        cluster.query(SCHEMA);
        for session in 0..sessions {
            cluster.query(&format!("CREATE TABLE IF NOT EXISTS ledger.s{session} (id bigint, v text)"));
        }
        let first = cluster.query("SELECT coalesce(max(number), 0) + 1 FROM ledger.commits").parse().unwrap();
        let dir = Directory::new("ledger");
        let shared = Arc::new(Shared {
            address: Mutex::new((cluster.socket_dir(), cluster.port())),
            next: AtomicU64::new(first),
            stop: AtomicBool::new(false),
            pause_us: pause.as_micros().try_into().unwrap_or(u64::MAX),
            entries: Mutex::default(),
            file: Mutex::new(std::fs::File::create(dir.join("ledger")).unwrap()),
        });
        let thread = {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(write_all(shared, sessions));
            })
        };
        Ledger { shared, thread: Some(thread), dir }
    }

    /// From now on the sessions write to this server, for example a promoted standby.
    pub fn retarget(&self, cluster: &Cluster) {
        *lock(&self.shared.address) = (cluster.socket_dir(), cluster.port());
    }

    /// Ends the sessions; a commit that hangs for five seconds stays unacknowledged.
    pub fn stop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the writers of the ledger");
        }
    }

    /// The file with one line for each begun and each acknowledged transaction.
    pub fn file(&self) -> PathBuf {
        self.dir.join("ledger")
    }

    pub fn entries(&self) -> Vec<Entry> {
        lock(&self.shared.entries).values().cloned().collect()
    }

    /// The numbers of the commits whose clients were told so, in ascending order.
    pub fn acknowledged(&self) -> BTreeSet<u64> {
        lock(&self.shared.entries).values().filter(|e| e.acknowledged.is_some()).map(|e| e.number).collect()
    }

    /// Waits until `count` more commits were acknowledged.
    #[track_caller]
    pub fn wait_for(&self, count: usize) {
        let goal = self.acknowledged().len() + count;
        wait::until(&format!("{count} more commits"), 120, || self.acknowledged().len() >= goal);
    }

    /// The numbers whose commit records start before `lsn`, by the given ends of transactions.
    #[track_caller]
    pub fn expected(&self, ends: &[TransactionEnd], lsn: Lsn) -> BTreeSet<u64> {
        let entries = lock(&self.shared.entries);
        let by_xid: BTreeMap<u32, u64> = entries.values().map(|e| (e.xid, e.number)).collect();
        let before = ends.iter().filter(|end| end.committed && end.lsn < lsn);
        before.filter_map(|end| by_xid.get(&end.xid).copied()).collect()
    }

    /// The numbers that a cluster restored to `lsn` must hold, by the source's own `pg_wal` (see [`keep_wal`]). The source
    /// may be stopped, and must not have switched timelines.
    pub fn expected_at(&self, source: &Cluster, lsn: Lsn) -> BTreeSet<u64> {
        self.expected(&transaction_ends(source, &source.data().join("pg_wal")), lsn)
    }

    /// Checks that a cluster holds exactly these commits, and that its tables are as they were at its last ones.
    #[track_caller]
    pub fn check(&self, restored: &Cluster, expected: &BTreeSet<u64>) {
        let present = numbers(restored);
        let lost: Vec<_> = expected.difference(&present).collect();
        let extra: Vec<_> = present.difference(expected).collect();
        assert!(
            lost.is_empty() && extra.is_empty(),
            "of {} expected commits {} are lost ({:?}…), and {} are extra ({:?}…)",
            expected.len(),
            lost.len(),
            &lost[..lost.len().min(10)],
            extra.len(),
            &extra[..extra.len().min(10)]
        );
        check_content(restored);
    }

    /// Checks that every commit whose client was told so is there, and that the tables fit to the commits.
    #[track_caller]
    pub fn check_none_lost(&self, restored: &Cluster) {
        self.check_holds(restored, &self.acknowledged());
    }

    /// Checks that these commits are there, and that the tables fit to the commits.
    #[track_caller]
    pub fn check_holds(&self, restored: &Cluster, commits: &BTreeSet<u64>) {
        let present = numbers(restored);
        let lost: Vec<_> = commits.difference(&present).copied().collect();
        assert!(lost.is_empty(), "{} acknowledged commits are lost: {:?}…", lost.len(), &lost[..lost.len().min(10)]);
        check_content(restored);
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The settings with which a source keeps the WAL that [`Ledger::expected_at`] reads.
pub fn keep_wal(builder: super::postgres::Builder) -> super::postgres::Builder {
    builder.setting("wal_keep_size", "8GB").setting("wal_recycle", "off")
}

/// The numbers that a cluster holds.
#[track_caller]
pub fn numbers(cluster: &Cluster) -> BTreeSet<u64> {
    cluster.rows("SELECT number FROM ledger.commits").iter().map(|n| n.parse().unwrap()).collect()
}

/// Checks that each session's table has the content that its last commit noted.
#[track_caller]
fn check_content(cluster: &Cluster) {
    let sql =
        "SELECT DISTINCT ON (session) session, number, rows, hash FROM ledger.commits ORDER BY session, number DESC";
    for row in cluster.rows(sql) {
        let fields: Vec<&str> = row.split('|').collect();
        let content = cluster.query(&content_of(fields[0]));
        assert_eq!(content, fields[2..4].join("|"), "content of session {} after commit {}", fields[0], fields[1]);
    }
}

fn content_of(session: &str) -> String {
    format!("SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0) FROM ledger.s{session} t")
}

const PAGE_BYTES: u64 = 8192;
/// After so many pages in which no record begins, the WAL has ended. No record of these writers is as long.
const PAGES_WITHOUT_RECORD_MAX: u32 = 40;

/// Every end of a transaction in the WAL files of a folder, in the order of the WAL, oldest file to end.
///
/// Each run of consecutive files of one timeline is read; a file that begins a run may begin in the middle of a record.
pub fn transaction_ends(cluster: &Cluster, wal: &Path) -> Vec<TransactionEnd> {
    let mut names: Vec<String> = std::fs::read_dir(wal)
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|n| n.len() == 24 && n.bytes().all(|b| b.is_ascii_hexdigit()))
        .collect();
    names.sort();
    let mut ends: Vec<TransactionEnd> = Vec::new();
    let timelines: BTreeSet<&str> = names.iter().map(|n| &n[..8]).collect();
    for timeline in timelines {
        let first = names.iter().find(|n| n.starts_with(timeline)).unwrap();
        let mut from = first_lsn(cluster, wal, first);
        let mut pages_without_record = 0;
        while pages_without_record < PAGES_WITHOUT_RECORD_MAX {
            let mut command = cluster.tool("pg_waldump");
            command.args(["-r", "Transaction", "-p"]).arg(wal).arg("-t").arg(timeline_number(timeline));
            // Without an end it reads as far as there are records, and then says so with a failure.
            let done = command.arg("-s").arg(from.to_string()).output().expect("run pg_waldump");
            ends.extend(String::from_utf8_lossy(&done.stdout).lines().filter_map(transaction_end));
            // What a crash left unfinished stops it too; the server went on at the start of one of the next pages.
            let message = String::from_utf8_lossy(&done.stderr).into_owned();
            let Some(stopped) = position_after(&message, "error in WAL record at ") else {
                pages_without_record += 1;
                from = Lsn(from.0 + PAGE_BYTES);
                continue;
            };
            pages_without_record = 0;
            from = Lsn(stopped.0 - stopped.0 % PAGE_BYTES + PAGE_BYTES);
        }
    }
    ends.sort_by_key(|e| e.lsn);
    ends
}

fn position_after(message: &str, mark: &str) -> Option<Lsn> {
    message.split_once(mark)?.1.split(':').next()?.trim().parse().ok()
}

fn timeline_number(hex: &str) -> String {
    u32::from_str_radix(hex, 16).unwrap().to_string()
}

/// The address of a file's first byte.
fn first_lsn(cluster: &Cluster, wal: &Path, name: &str) -> Lsn {
    let size = std::fs::metadata(wal.join(name)).unwrap().len();
    assert!(size.is_power_of_two(), "{name} of PostgreSQL {} has {size} bytes", cluster.major());
    let log = u64::from_str_radix(&name[8..16], 16).unwrap();
    let offset = u64::from_str_radix(&name[16..24], 16).unwrap() * size;
    Lsn(log << 32 | offset)
}

/// `rmgr: Transaction len (rec/tot): 34/34, tx: 733, lsn: 0/0253D468, prev 0/0253D420, desc: COMMIT 2026-11-23 08:07:21.58 UTC`
fn transaction_end(line: &str) -> Option<TransactionEnd> {
    let after = |mark: &str| line.split_once(mark).map(|(_, rest)| rest);
    let xid: u32 = after("tx:")?.split(',').next()?.trim().parse().ok()?;
    let lsn = after("lsn:")?.split(',').next()?.trim().parse().ok()?;
    let description = after("desc: ")?;
    let (kind, rest) = description.split_once(' ')?;
    let (xid, rest) = match kind {
        "COMMIT" | "ABORT" => (xid, rest),
        "COMMIT_PREPARED" | "ABORT_PREPARED" => {
            let (prepared, rest) = rest.split_once(": ")?;
            (prepared.parse().ok()?, rest)
        }
        _ => return None,
    };
    let time = rest.split(" UTC").next()?.trim().to_owned();
    Some(TransactionEnd { lsn, xid, committed: kind.starts_with("COMMIT"), time })
}

async fn write_all(shared: Arc<Shared>, sessions: u32) {
    let writers: Vec<_> = (0..sessions).map(|s| tokio::spawn(write_session(Arc::clone(&shared), s))).collect();
    while !shared.stop.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let end = tokio::time::Instant::now() + Duration::from_secs(5);
    for writer in writers {
        let stop = writer.abort_handle();
        match tokio::time::timeout_at(end, writer).await {
            Ok(done) => done.expect("a writer of the ledger"),
            Err(_) => stop.abort(),
        }
    }
}

async fn write_session(shared: Arc<Shared>, session: u32) {
    while !shared.stop.load(Ordering::Relaxed) {
        let (host, port) = lock(&shared.address).clone();
        let mut config = tokio_postgres::Config::new();
        config.host_path(&host).port(port).user("postgres").dbname("postgres").application_name("ledger");
        if let Ok((client, connection)) = config.connect(NoTls).await {
            let driver = tokio::spawn(connection);
            // Ends with the connection, or when the ledger is stopped; what is unfinished stays unacknowledged.
            let _ = write_on(&shared, session, &client).await;
            driver.abort();
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

async fn write_on(shared: &Shared, session: u32, client: &Client) -> Result<(), tokio_postgres::Error> {
    // A transaction that was prepared before the connection broke would block its session's table.
    let left = format!("SELECT gid FROM pg_prepared_xacts WHERE gid LIKE 'ledger-{session}-%'");
    for gid in column(client, &left).await? {
        client.batch_execute(&format!("COMMIT PREPARED '{gid}'")).await?;
    }
    while !shared.stop.load(Ordering::Relaxed) {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        write_one(shared, session, number, client).await?;
        if shared.pause_us > 0 {
            tokio::time::sleep(Duration::from_micros(shared.pause_us)).await;
        }
    }
    Ok(())
}

async fn write_one(shared: &Shared, session: u32, number: u64, client: &Client) -> Result<(), tokio_postgres::Error> {
    // Multiplied, so that the kinds of a session do not depend on how many sessions there are.
    let kind = KINDS[usize::try_from(number.wrapping_mul(0x9E37_79B9) >> 16).unwrap() % KINDS.len()];
    client.batch_execute("BEGIN").await?;
    work(client, session, number, kind).await?;
    let note = format!(
        "INSERT INTO ledger.commits SELECT {number}, {session}, '{kind}', c.* FROM ({}) c",
        content_of(&session.to_string())
    );
    client.batch_execute(&note).await?;
    let xid: u64 = column(client, "SELECT pg_current_xact_id()").await?[0].parse().unwrap();
    let xid = u32::try_from(xid & 0xFFFF_FFFF).unwrap();
    shared.note(&format!("begun {number} {session} {kind} {xid}\n"), false);
    lock(&shared.entries).insert(number, Entry { number, session, kind, xid, acknowledged: None });
    match kind {
        "abort" => {
            client.batch_execute("ROLLBACK").await?;
            return Ok(());
        }
        "prepared" => {
            client.batch_execute(&format!("PREPARE TRANSACTION 'ledger-{session}-{number}'")).await?;
            client.batch_execute(&format!("COMMIT PREPARED 'ledger-{session}-{number}'")).await?;
        }
        _ => client.batch_execute("COMMIT").await?,
    }
    let time_us = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros().try_into().unwrap();
    // The commit is acknowledged, whatever becomes of the question for the position.
    if let Some(entry) = lock(&shared.entries).get_mut(&number) {
        entry.acknowledged = Some(Acknowledged { lsn: Lsn::MAX, time_us });
    }
    shared.note(&format!("done {number} {time_us}\n"), true);
    let lsn: Lsn = column(client, "SELECT pg_current_wal_insert_lsn()").await?[0].parse().unwrap();
    if let Some(entry) = lock(&shared.entries).get_mut(&number) {
        entry.acknowledged = Some(Acknowledged { lsn, time_us });
    }
    Ok(())
}

async fn work(client: &Client, session: u32, number: u64, kind: &str) -> Result<(), tokio_postgres::Error> {
    let table = format!("ledger.s{session}");
    let sql = match kind {
        "update" => format!("UPDATE {table} SET v = md5(v || {number}) WHERE id % 3 = {}", number % 3),
        "delete" => {
            format!("DELETE FROM {table} WHERE id < (SELECT max(id) FROM {table}) - 40 OR id % 7 = {}", number % 7)
        }
        "toast" => format!(
            "INSERT INTO {table} (id, v) SELECT {number}, string_agg(md5(random()::text), '') FROM generate_series(1, 1000)"
        ),
        "savepoint" => format!(
            "SAVEPOINT a; INSERT INTO {table} (id, v) VALUES ({number}, 'kept'); RELEASE a; \
             SAVEPOINT b; DELETE FROM {table}; ROLLBACK TO b"
        ),
        "ddl" => format!(
            "DROP TABLE IF EXISTS ledger.d{session}; CREATE TABLE ledger.d{session} AS SELECT {number}::bigint n; \
             CREATE INDEX ON ledger.d{session} (n); ALTER TABLE {table} ALTER v TYPE text USING v || '.'"
        ),
        "truncate" => format!("TRUNCATE {table}; INSERT INTO {table} (id, v) VALUES ({number}, 'first')"),
        "copy" => format!("COPY {table} (id, v) FROM STDIN"),
        _ => format!("INSERT INTO {table} (id, v) SELECT {number}, md5(n::text) FROM generate_series(1, 3) n"),
    };
    if kind == "copy" {
        use futures::SinkExt;
        let sink = client.copy_in::<_, bytes::Bytes>(&sql).await?;
        let mut sink = std::pin::pin!(sink);
        let lines: String = (0..20).map(|i| format!("{number}\tline {i}\n")).collect();
        sink.send(lines.into()).await?;
        sink.close().await?;
        return Ok(());
    }
    client.batch_execute(&sql).await
}

async fn column(client: &Client, sql: &str) -> Result<Vec<String>, tokio_postgres::Error> {
    let rows = client.simple_query(sql).await?.into_iter();
    let value = |message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
        _ => None,
    };
    Ok(rows.filter_map(value).collect())
}

impl Shared {
    fn note(&self, line: &str, sync: bool) {
        let mut file = lock(&self.file);
        file.write_all(line.as_bytes()).expect("write the ledger");
        if sync {
            file.sync_data().expect("sync the ledger");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Copies the WAL files of a cluster, with their history files, to where they survive it.
pub fn save_wal(cluster: &Cluster, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for name in cluster.wal_files() {
        run(std::process::Command::new("cp").arg(cluster.data().join("pg_wal").join(name)).arg(to));
    }
}
