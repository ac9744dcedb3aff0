//! Bytes that nobody should ever send: whoever reads them gives an answer or an error. It never panics, never waits for ever
//! and never gives out content that is not what was stored.
//!
//! Real input (a server's WAL, stored objects, what a server said over a connection, an archive) is changed in a few places,
//! again and again. A round depends on the seed and its number alone. `PGRECALL_SEED` and `PGRECALL_ROUNDS` choose which and how
//! many, `PGRECALL_FIRST_ROUND` goes on from there; `PGRECALL_SLOW=1` runs each target for two and a half minutes. What was run
//! is noted in `tests/totals.tsv`.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use pgrecall::config::Config;
use pgrecall::control::request::{ParseError, parse};
use pgrecall::pg::{Lsn, SegmentName, SegmentSize, SystemId, TimelineId};
use pgrecall::replication::base_backup::{BackupEvent, BaseBackupOptions};
use pgrecall::replication::tar::{TarEvent, TarReader};
use pgrecall::replication::{ConnectConfig, ReplicationError, Session, StartReplication, wire};
use pgrecall::repository::backup_object::{Extent, FileEntry, FileKind, Table};
use pgrecall::repository::codec::{Codec, Header, Kind, decompress};
use pgrecall::repository::crypto::{DataKey, MasterKey};
use pgrecall::repository::layout::{ContentHash, Incarnation, Key};
use pgrecall::wal::reader::Stream;
use pgrecall::wal::rmgr::{tblspc, xact, xlog};
use pgrecall::wal::transactions::{Row, decode_rows, encode_rows};
use pgrecall::wal::{Fragments, Indexer, Reader, SegmentIndex, Start};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::chance::number;
use crate::common::postgres::Cluster;
use crate::common::{NEWEST, slow};

const SLOW: Duration = Duration::from_secs(150);

/// Says which round it was when it panics.
struct Round(u64, u64);

impl Drop for Round {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("again: PGRECALL_SEED={} PGRECALL_FIRST_ROUND={} PGRECALL_ROUNDS=1", self.0, self.1);
        }
    }
}

/// Runs as many rounds as were asked for, else so many.
fn rounds(target: &str, usual: u64, mut round: impl FnMut(&mut StdRng)) {
    let seed = number("PGRECALL_SEED").unwrap_or(std::process::id().into());
    let first = number("PGRECALL_FIRST_ROUND").unwrap_or(0);
    let count = number("PGRECALL_ROUNDS").or_else(|| (!slow()).then_some(usual));
    let (begun, mut done) = (Instant::now(), 0);
    while count.map_or_else(|| begun.elapsed() < SLOW, |count| done < count) {
        let told = Round(seed, first + done);
        round(&mut StdRng::seed_from_u64(seed.rotate_left(32) ^ told.1));
        done += 1;
    }
    println!("{target}: PGRECALL_SEED={seed}, rounds {first} to {}, {:?}", first + done, begun.elapsed());
}

/// Changes bytes in one to six ways.
fn mutate(random: &mut StdRng, bytes: &mut Vec<u8>) {
    for _ in 0..random.random_range(1..=6) {
        let at = random.random_range(0..=bytes.len());
        let length = random.random_range(0..=(bytes.len() - at).min(64));
        match random.random_range(0..8) {
            0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << random.random_range(0..8)),
            1 => bytes.iter_mut().skip(at).take(length).for_each(|byte| *byte = random.random()),
            2 => bytes.iter_mut().skip(at).take(length).for_each(|byte| *byte = 0),
            // A length or a count, in either order of bytes.
            3 => {
                let choice = [0_u32, 1, 4, 255, 0x7FFF_FFFF, 0x8000_0000, u32::MAX][random.random_range(0..7)];
                let number = if random.random() { choice.to_le_bytes() } else { choice.to_be_bytes() };
                bytes.iter_mut().skip(at).zip(number).for_each(|(byte, new)| *byte = new);
            }
            4 => bytes.truncate(at.max(bytes.len() / 2)),
            5 => drop(bytes.drain(at..at + length)),
            6 => {
                let copied = bytes[at..at + length].to_vec();
                let to = random.random_range(0..=bytes.len());
                bytes.splice(to..to, copied);
            }
            _ => {
                let other = random.random_range(0..=bytes.len() - length);
                bytes.copy_within(at..at + length, other);
            }
        }
    }
}

/// Cuts bytes into pieces of any size.
fn pieces<'a>(random: &mut StdRng, bytes: &'a [u8]) -> Vec<&'a [u8]> {
    let most = [1, 7, 100, 8192, bytes.len().max(1)][random.random_range(0..5)];
    let (mut rest, mut found) = (bytes, Vec::new());
    while !rest.is_empty() {
        let (piece, after) = rest.split_at(random.random_range(1..=most.min(rest.len())));
        found.push(piece);
        rest = after;
    }
    found
}

#[test]
fn changed_wal_is_read_as_far_as_it_goes() {
    const PAGE: usize = 8192;
    let cluster = Cluster::builder(NEWEST).segment_mib(1).setting("wal_level", "logical").start();
    cluster.query("CREATE TABLE t (n int PRIMARY KEY, t text); INSERT INTO t SELECT n, md5(n::text) FROM generate_series(1, 9000) n");
    cluster.query(
        "DELETE FROM t WHERE n % 7 = 0; SELECT pg_create_restore_point('here'); CREATE TABLE u AS SELECT * FROM t",
    );
    cluster.query(
        "BEGIN; INSERT INTO t VALUES (-1, 'x'); PREPARE TRANSACTION 'a'; ROLLBACK PREPARED 'a'; CHECKPOINT; VACUUM t",
    );
    let size = SegmentSize::new(1 << 20).unwrap();
    let names: Vec<SegmentName> = cluster.wal_files().iter().filter_map(|name| name.parse().ok()).collect();
    let start = names[0].segment(size).unwrap().start_lsn(size);
    let end = cluster.flush_lsn();
    let files =
        names.iter().flat_map(|name| std::fs::read(cluster.data().join("pg_wal").join(name.to_string())).unwrap());
    let wal: Vec<u8> = files.take(usize::try_from(end.0 - start.0).unwrap()).collect();
    drop(cluster);
    let stream = Stream { timeline: TimelineId(1), segment_size: size, system_id: None };
    rounds("wal::reader", 3000, |random| {
        let page = random.random_range(0..wal.len() / PAGE) * PAGE;
        let mut part = wal[page..wal.len().min(page + random.random_range(1..12) * PAGE)].to_vec();
        mutate(random, &mut part);
        let mut lsn = Lsn(start.0 + page as u64);
        let mut reader = Reader::new(stream, Start::Page(lsn));
        if random.random_range(0..4) > 0 {
            // Beyond the checksum lies what decodes the records.
            reader = reader.without_crc_check();
        }
        let (mut fragments, mut indexer) = (Fragments::default(), Indexer::new(stream, lsn));
        'all: for piece in pieces(random, &part) {
            indexer.feed(lsn, piece);
            let mut records = reader.read(lsn, piece);
            loop {
                let Ok(found) = records.next() else { break 'all };
                let Some(record) = found else { break };
                if fragments.decode(&record).is_ok() {
                    let main = fragments.main(&record);
                    drop(xact::decode_end(record.format, record.header.info, record.header.xid, main));
                    drop(xlog::decode(record.format, record.op(), main));
                    drop(tblspc::decode(record.op(), main));
                }
            }
            lsn = lsn.saturating_add(piece.len() as u64);
        }
        for index in indexer.take_finished().into_iter().chain([indexer.current()]) {
            assert_eq!(SegmentIndex::decode(&index.encode()).as_ref(), Ok(&index));
            let rows = [Row::of(&index)];
            assert_eq!(decode_rows(&encode_rows(&rows)).as_deref(), Ok(&rows[..]));
        }
    });
}

/// A table of files as a backup has it.
fn table() -> Table<FileEntry> {
    let file = |n: u64| FileEntry {
        path: format!("base/5/{n}"),
        kind: FileKind::File,
        mode: 0o600,
        bytes: n * 8192,
        modified: 1_795_000_000,
        target: None,
        extents: Vec::new(),
        extent_tables: Vec::new(),
    };
    Table { packs: Vec::new(), rows: (0..40).map(file).collect() }
}

#[test]
fn changed_objects_are_refused_or_their_content_is_right() {
    let incarnation = Incarnation { ordinal: 1, system_id: SystemId(7) };
    let key = Key::history(incarnation, TimelineId(2), ContentHash::of(&Codec::new(1, None).digest(b"x")));
    let contents = [b"1\t0/3000000\tno recovery target specified\n".to_vec(), table().encode(), vec![0; 300_000]];
    let codecs = [Codec::new(3, None), Codec::new(3, Some(Arc::new(DataKey::new(1, [7; 32]))))];
    let stored =
        |codec: &Codec, content: &[u8]| codec.encode(&key, Kind::History, content).expect("encode").bytes.to_vec();
    let mut objects: Vec<(&Codec, &[u8], Vec<u8>)> = Vec::new();
    for codec in &codecs {
        objects.extend(contents.iter().map(|content| (codec, &content[..], stored(codec, content))));
    }
    let master = MasterKey::new([9; 32]);
    let wrapped = master.wrap(&DataKey::new(1, [7; 32]), "shop");
    rounds("repository::codec", 5000, |random| {
        let (codec, content, stored) = &objects[random.random_range(0..objects.len())];
        let mut bytes = stored.clone();
        mutate(random, &mut bytes);
        if let Ok(decoded) = codec.decode(&key, Kind::History, &bytes, 1 << 20) {
            assert!(decoded == *content, "other content was taken for what was stored");
        }
        drop(Header::decode(&bytes));
        drop(codec.open_header(Kind::History, &bytes));
        drop(decompress(&bytes, random.random_range(0..1 << 20)));
        let mut text = contents[1].clone();
        mutate(random, &mut text);
        drop(Table::<FileEntry>::decode(&text));
        drop(Table::<Extent>::decode(&text));
        let mut sealed = wrapped.clone();
        mutate(random, &mut sealed);
        assert!(sealed == wrapped || master.unwrap(1, &sealed, "shop").is_err());
    });
}

#[test]
fn a_changed_archive_is_refused_or_no_larger_than_it_was() {
    let cluster = Cluster::builder(NEWEST).make();
    let mut tar = Command::new("tar");
    tar.args(["-c", "--format=ustar", "-f", "-", "-C"]).arg(cluster.data()).args(["global", "pg_xact", "pg_hba.conf"]);
    let archive = tar.stdin(Stdio::null()).output().expect("run tar").stdout;
    assert!(archive.len() > 100_000);
    rounds("replication::tar", 2000, |random| {
        let at = random.random_range(0..archive.len() / 512) * 512;
        let mut bytes = archive[at..archive.len().min(at + random.random_range(1..200) * 512)].to_vec();
        mutate(random, &mut bytes);
        let (mut reader, mut given) = (TarReader::default(), 0);
        'all: for piece in pieces(random, &bytes) {
            reader.push(Bytes::copy_from_slice(piece));
            loop {
                match reader.next() {
                    Ok(Some(TarEvent::Data(data))) => given += data.len(),
                    Ok(Some(_)) => {}
                    Ok(None) => break,
                    Err(_) => break 'all,
                }
            }
        }
        assert!(given <= bytes.len());
        drop(reader.finish());
    });
}

/// What a client does with a server; ends with what the server says, or with an error.
async fn talk(config: &ConnectConfig, what: u8) -> Result<(), ReplicationError> {
    let mut session = Session::connect(config, 0).await?;
    let identity = session.identify_system().await?;
    session.segment_size().await?;
    if what == 0 {
        session.timeline_history(TimelineId(2)).await?;
        session.create_physical_slot("s").await?;
        session.read_slot("s").await?;
        let start_lsn = SegmentSize::MIB_16.start_of(identity.flush_lsn);
        let from = StartReplication { slot: None, start_lsn, timeline: identity.timeline };
        let mut stream = session.start_replication(&from).await?;
        for _ in 0..20 {
            stream.next().await?;
        }
        return Ok(());
    }
    let (_, mut backup) = session.base_backup(&BaseBackupOptions::default()).await?;
    while !matches!(backup.next().await?, BackupEvent::End(_)) {}
    Ok(())
}

/// Lets a client talk with a server through a port of this process, and writes down what the server said, at most so much.
async fn record(cluster: &Cluster, what: u8, most: usize) -> Vec<u8> {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let config = connect_to(listener.local_addr().unwrap().port());
    let socket = cluster.socket_dir().join(format!(".s.PGSQL.{}", cluster.port()));
    let relay = async {
        let (client, _) = listener.accept().await.unwrap();
        let mut server = tokio::net::UnixStream::connect(socket).await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.split();
        let mut said = Vec::new();
        let forward = async { tokio::io::copy(&mut from_client, &mut to_server).await };
        let answers = async {
            let mut piece = vec![0; 4096];
            while said.len() < most {
                let Ok(length @ 1..) = from_server.read(&mut piece).await else { break };
                said.extend_from_slice(&piece[..length]);
                if to_client.write_all(&piece[..length]).await.is_err() {
                    break;
                }
            }
        };
        tokio::select! {
            _ = forward => {}
            () = answers => {}
        }
        said
    };
    let (said, _) = tokio::join!(relay, talk(&config, what));
    said
}

fn connect_to(port: u16) -> ConnectConfig {
    format!("host=127.0.0.1 port={port} user=postgres sslmode=disable connect_timeout=20").parse().unwrap()
}

/// A server on timeline 2, and the one that it was a standby of.
fn promoted() -> (Cluster, Cluster) {
    let former = Cluster::start_new(NEWEST);
    let cluster = former.standby();
    cluster.promote();
    (cluster, former)
}

/// The whole client against a port that says what a server once said, with changes.
#[test]
fn a_server_that_says_anything_gets_an_end() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (cluster, former) = promoted();
    cluster.query("SELECT pg_create_physical_replication_slot('s', true)");
    cluster.query("CREATE TABLE t AS SELECT n, md5(n::text) FROM generate_series(1, 300) n");
    let recorded = runtime.block_on(async { [record(&cluster, 0, 200_000).await, record(&cluster, 1, 100_000).await] });
    assert!(recorded.iter().all(|said| said.len() > 5_000), "{:?}", recorded.each_ref().map(Vec::len));
    drop((cluster, former));
    rounds("replication", 1000, |random| {
        let what = random.random_range(0..2);
        let mut said = recorded[usize::from(what)].clone();
        // Most changes hit the beginning, where every byte means something.
        let head = [600, 3_000, said.len()][random.random_range(0..3)].min(said.len());
        let rest = said.split_off(head);
        mutate(random, &mut said);
        said.extend_from_slice(&rest);
        let mut buffer = BytesMut::new();
        for piece in pieces(random, &said) {
            buffer.extend_from_slice(piece);
            while let Ok(Some(frame)) = wire::split_frame(&mut buffer, wire::MESSAGE_BYTES_MAX) {
                assert!(frame.body.len() <= said.len());
            }
        }
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
            let config = connect_to(listener.local_addr().unwrap().port());
            let server = async {
                let (mut client, _) = listener.accept().await.unwrap();
                let _ = client.write_all(&said).await;
                let _ = client.shutdown().await;
                // The client may have more to say; it must not be cut off before it has read the answers.
                let _ = tokio::io::copy(&mut client, &mut tokio::io::sink()).await;
            };
            let talked = async { tokio::time::timeout(Duration::from_secs(30), talk(&config, what)).await };
            tokio::select! {
                talked = talked => drop(talked.expect("an end in time")),
                () = async { server.await; std::future::pending().await } => {}
            }
        });
    });
}

/// Changes a text in one to six ways; what is no text any more is replaced.
fn mutate_text(random: &mut StdRng, text: &str) -> String {
    let mut bytes = text.as_bytes().to_vec();
    mutate(random, &mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn a_changed_request_is_read_or_what_is_wrong_is_said_in_short() {
    let sound = [
        (
            "POST",
            "/v1/environments/shop/restore",
            r#"{"to":"2026-11-28 03:45:50Z","into":"/x","tablespaces":[["/a","/b"]]}"#,
        ),
        ("POST", "/v1/environments/shop/backup", r#"{"ticket":"T-1","idempotency_key":"k"}"#),
        ("GET", "/v1/environments/shop/audit?last=5", ""),
        ("POST", "/v1/sandboxes/20261128t034550z_68e1f7/connect?superuser=true", ""),
        ("DELETE", "/v1/environments/shop/pins/p", ""),
        ("GET", "/v1/jobs/20261128t034550z_68e1f7/follow", "{}"),
    ];
    let (mut read, mut refused) = (0_u64, 0_u64);
    rounds("control::request", 20_000, |random| {
        let (method, path, body) = sound[random.random_range(0..sound.len())];
        let (mut path, mut body) = (path.to_owned(), body.to_owned());
        match random.random_range(0..3) {
            0 => path = mutate_text(random, &path),
            1 => body = mutate_text(random, &body),
            _ => {}
        }
        let (path, query) = path.split_once('?').map_or((path.as_str(), None), |(path, query)| (path, Some(query)));
        match parse(&method.parse().expect("a method"), path, query, body.as_bytes()) {
            Ok(request) => {
                read += 1;
                // Everything that rights and records ask of it.
                let _ =
                    (request.required_role(), request.subject(), request.detail(), request.ticket(), request.weight());
            }
            Err(ParseError::NoSuchPath(why) | ParseError::OtherMethod(why) | ParseError::Malformed(why)) => {
                refused += 1;
                assert!(why.message.len() < 1000, "{}", why.message);
            }
        }
    });
    // Unless a few rounds are looked at again.
    let tenth = (read + refused) / 10;
    assert!(tenth < 10 || (read > tenth && refused > tenth), "{read} read, {refused} refused");
}

#[test]
fn a_changed_configuration_is_read_or_its_problems_are_named_with_their_lines() {
    let example = include_str!("../config.example.toml");
    let is_key = |line: &str| line.starts_with('#') && line[1..].starts_with(|c: char| c.is_ascii_lowercase());
    let (mut read, mut refused) = (0_u64, 0_u64);
    rounds("config", 2000, |random| {
        let mut text = String::new();
        for line in example.lines() {
            let shown = is_key(line) && random.random_range(0..3) == 0;
            text.push_str(if shown { &line[1..] } else { line });
            text.push('\n');
        }
        if random.random_range(0..8) > 0 {
            text = mutate_text(random, &text);
        }
        match Config::parse(&text, Path::new("config.toml")) {
            Ok(_) => read += 1,
            Err(problems) => {
                refused += 1;
                let lines = text.lines().count();
                let named = |problem: &pgrecall::config::Problem| (1..=lines.max(1)).contains(&problem.line);
                assert!(!problems.is_empty() && problems.iter().all(named), "{problems:?} in {lines} lines");
            }
        }
    });
    assert!(read > 0 && refused > 0, "{read} read, {refused} refused");
}
