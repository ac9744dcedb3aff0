//! The WAL reader against `pg_waldump` of the same major, record by record.
//!
//! A server of each major runs everything that writes WAL in its own way: all index access methods, DDL, subtransactions,
//! prepared transactions, TRUNCATE, COPY, vacuum, switches; a crash in the middle; at last a promotion. Then every record
//! that our reader finds in its files is written as `pg_waldump` writes it, and the texts are compared.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use pgrecall::pg::{ForkNumber, Lsn, SegmentName, SegmentSize, TimelineId};
use pgrecall::wal::reader::Stream;
use pgrecall::wal::rmgr::{Rmgr, xact};
use pgrecall::wal::transactions::EndKind;
use pgrecall::wal::{Fragments, Indexer, RawRecord, Reader, SegmentIndex, Start, StopKind};
use proptest::prelude::*;

use crate::common::MAJORS;
use crate::common::postgres::{Cluster, Stop};
use crate::common::wait;

const WORKLOAD: &str = "
CREATE TABLE t (id int PRIMARY KEY, n int, txt text, ts tsvector, p point, h int, a int[]);
CREATE INDEX t_btree ON t (n);
CREATE INDEX t_hash ON t USING hash (h);
CREATE INDEX t_gin ON t USING gin (ts);
CREATE INDEX t_gin_array ON t USING gin (a);
CREATE INDEX t_gist ON t USING gist (p);
CREATE INDEX t_spgist ON t USING spgist (txt);
CREATE INDEX t_brin ON t USING brin (id);
INSERT INTO t SELECT i, i % 1000, md5(i::text), to_tsvector('simple', md5(i::text)), point(i % 97, i % 89), i % 50,
    ARRAY[i % 7, i % 11] FROM generate_series(1, 6000) i;
COPY t (id, n, txt) FROM PROGRAM 'seq -f \"%.0f|1|copied\" 100001 103000' (DELIMITER '|');
UPDATE t SET n = n + 1 WHERE id % 3 = 0;
DELETE FROM t WHERE id % 5 = 0;
VACUUM (FREEZE) t;
SELECT count(*) FROM t WHERE n = 5;
BEGIN; SAVEPOINT a; INSERT INTO t (id) VALUES (200001); SAVEPOINT b; INSERT INTO t (id) VALUES (200002);
ROLLBACK TO b; SAVEPOINT c; INSERT INTO t (id) VALUES (200003); RELEASE c; COMMIT;
DO $$ BEGIN FOR i IN 1..150 LOOP BEGIN INSERT INTO t (id) VALUES (300000 + i); EXCEPTION WHEN others THEN NULL; END;
    END LOOP; END $$;
BEGIN; INSERT INTO t (id) VALUES (210001); ROLLBACK;
BEGIN; CREATE TABLE prepared (x int); INSERT INTO prepared VALUES (1); PREPARE TRANSACTION 'commit me';
BEGIN; DELETE FROM t WHERE id < 100; PREPARE TRANSACTION 'roll me back';
COMMIT PREPARED 'commit me';
ROLLBACK PREPARED 'roll me back';
SELECT pg_create_restore_point('a point with a name');
BEGIN; SELECT count(*) FROM (SELECT id FROM t WHERE id < 50 FOR UPDATE) x; COMMIT;
BEGIN; SELECT count(*) FROM (SELECT id FROM t WHERE id < 50 FOR KEY SHARE) x; SAVEPOINT s;
SELECT count(*) FROM (SELECT id FROM t WHERE id < 50 FOR UPDATE) x; COMMIT;
INSERT INTO t (id, n) VALUES (1, 1), (500001, 2) ON CONFLICT (id) DO UPDATE SET n = 7;
CREATE TABLE toasted (x text); ALTER TABLE toasted ALTER x SET STORAGE EXTERNAL;
INSERT INTO toasted SELECT string_agg(md5(i::text), '') FROM generate_series(1, 3000) i;
CREATE TABLE parts (id int, v int) PARTITION BY RANGE (id);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (100) TO (200);
INSERT INTO parts SELECT i, i FROM generate_series(0, 199) i; UPDATE parts SET id = id + 100 WHERE id < 50;
CREATE SEQUENCE s; SELECT count(nextval('s')) FROM generate_series(1, 100);
CREATE UNLOGGED TABLE u (x int); INSERT INTO u SELECT generate_series(1, 100);
CREATE MATERIALIZED VIEW mv AS SELECT n, count(*) FROM t GROUP BY n; REFRESH MATERIALIZED VIEW mv;
CLUSTER t USING t_btree; REINDEX TABLE t; ALTER TABLE t ADD COLUMN extra int DEFAULT 5; VACUUM FULL toasted;
TRUNCATE parts; DROP TABLE toasted; DROP MATERIALIZED VIEW mv;
CREATE DATABASE other; DROP DATABASE other;
SELECT count(pg_logical_emit_message(false, 'test', repeat('x', 3000))) FROM generate_series(1, 100);
SELECT pg_logical_emit_message(false, 'test', repeat('y', 2500000));
CHECKPOINT;
";

/// One way to run a server.
struct Variant {
    major: u16,
    segment_mib: u32,
    wal_level: &'static str,
    compression: &'static str,
}

fn check(variant: &Variant) {
    let Variant { major, segment_mib, wal_level, compression } = variant;
    let mut primary = Cluster::builder(*major)
        .segment_mib(*segment_mib)
        .setting("wal_level", wal_level)
        .setting("wal_compression", compression)
        .setting("wal_keep_size", "1GB")
        .setting("track_commit_timestamp", "on")
        .start();
    primary.query(WORKLOAD);
    primary.query("SELECT pg_switch_wal()");
    crash_under_load(&mut primary);
    let standby = primary.standby();
    primary.query("CREATE TABLE later AS SELECT generate_series(1, 1000) n");
    standby.wait_replayed(primary.flush_lsn());
    standby.promote();
    standby.query("CREATE TABLE after AS SELECT generate_series(1, 1000) n; SELECT pg_switch_wal()");
    primary.stop(Stop::Fast);
    let of_primary = Files::of(&primary, TimelineId(1), *segment_mib);
    compare(&primary, &of_primary);
    let indexes = index(&of_primary);
    check_indexes(&of_primary, &indexes);
    let mut standby = standby;
    standby.stop(Stop::Fast);
    compare(&standby, &Files::of(&standby, TimelineId(2), *segment_mib));
    fuzz(&of_primary);
}

/// Ends the server in the middle of its work, twice, so that recovery has something to say.
fn crash_under_load(cluster: &mut Cluster) {
    cluster.pgbench(&["-i", "-s", "1", "-q"]);
    for _ in 0..2 {
        let load = cluster.pgbench_in_background(&["-c", "4", "-T", "60", "-n"]);
        let from = cluster.insert_lsn();
        wait::until("load", 30, || cluster.insert_lsn().saturating_since(from) > 1_000_000);
        cluster.stop(Stop::Immediate);
        drop(load);
        cluster.start();
    }
}

/// The WAL of one timeline in a server's directory: contiguous segments.
struct Files {
    directory: PathBuf,
    stream: Stream,
    start_lsn: Lsn,
    segments: Vec<(SegmentName, Vec<u8>)>,
}

impl Files {
    fn of(cluster: &Cluster, timeline: TimelineId, segment_mib: u32) -> Files {
        let segment_size = SegmentSize::new(u64::from(segment_mib) << 20).unwrap();
        let directory = cluster.data().join("pg_wal");
        let mut segments = Vec::new();
        for file in cluster.wal_files() {
            let Ok(name) = file.parse::<SegmentName>() else { continue };
            if name.timeline() == timeline {
                segments.push((name, std::fs::read(directory.join(&file)).unwrap()));
            }
        }
        let start_lsn = segments[0].0.segment(segment_size).unwrap().start_lsn(segment_size);
        Files { directory, stream: Stream { timeline, segment_size, system_id: None }, start_lsn, segments }
    }

    /// Every record, in pieces as the replication protocol gives them, until WAL ends.
    fn each(&self, mut with: impl FnMut(&RawRecord<'_>)) -> Lsn {
        let mut reader = Reader::new(self.stream, Start::Page(self.start_lsn));
        for (name, bytes) in &self.segments {
            for piece in bytes.chunks(131_072) {
                let mut records = reader.read(reader.position(), piece);
                loop {
                    match records.next() {
                        Ok(Some(record)) => with(&record),
                        Ok(None) => break,
                        Err(stop) => {
                            assert_eq!(stop.kind(), StopKind::End, "{name}: {stop}");
                            return reader.end_lsn().unwrap();
                        }
                    }
                }
            }
        }
        reader.end_lsn().unwrap()
    }
}

fn compare(cluster: &Cluster, files: &Files) {
    let mut ours = Vec::new();
    let mut fragments = Fragments::default();
    files.each(|record| ours.push(line_of(record, &mut fragments)));
    let timeline = files.stream.timeline.to_string();
    let mut command = cluster.tool("pg_waldump");
    command.env("TZ", "UTC").arg("-p").arg(&files.directory).args(["-t", &timeline]);
    // Without an end it reads to the end of WAL, as we do, and then complains about it.
    let done = command.args(["-s", &files.start_lsn.to_string()]).output().unwrap();
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let theirs: Vec<String> = text.lines().filter(|line| line.starts_with("rmgr:")).map(normalized).collect();
    for (index, (our, their)) in ours.iter().zip(&theirs).enumerate() {
        assert_eq!(our, their, "record {index} of major {}", cluster.major());
    }
    assert_eq!(ours.len(), theirs.len(), "{}", String::from_utf8_lossy(&done.stderr));
    assert!(ours.len() > 1000, "only {} records", ours.len());
}

/// A record as `pg_waldump` shows it, as far as the two are compared.
fn line_of(record: &RawRecord<'_>, fragments: &mut Fragments) -> String {
    fragments.decode(record).unwrap_or_else(|error| panic!("{}: {error}", record.lsn));
    let images: usize = fragments.blocks.iter().filter_map(|b| b.image.as_ref()).map(|i| i.bytes.len()).sum();
    let (header, total) = (&record.header, record.header.total_bytes as usize);
    let mut line = format!(
        "{} {}/{total} tx {} lsn {} prev {}",
        header.rmgr,
        total - images,
        header.xid,
        padded(record.lsn),
        padded(header.prev)
    );
    if header.rmgr == Rmgr::XACT {
        let main = fragments.main(record);
        if let Some(end) = xact::decode_end(record.format, header.info, header.xid, main).unwrap() {
            let time = end.time.to_string().replace('T', " ");
            let (subs, rels) = (end.subtransactions_count, end.dropped_relations_count);
            let prepared = matches!(end.kind, EndKind::CommitPrepared | EndKind::AbortPrepared);
            let xid = if prepared { end.xid.0 } else { 0 };
            write!(line, " at {} xid {xid} subs {subs} rels {rels}", time.trim_end_matches('Z')).unwrap();
        }
    }
    for block in &fragments.blocks {
        let rel = block.relation;
        write!(line, " #{} {}/{}/{}", block.id, rel.tablespace, rel.database, rel.relation).unwrap();
        let fork = match block.fork {
            ForkNumber::Main => "",
            ForkNumber::FreeSpace => " fork fsm",
            ForkNumber::Visibility => " fork vm",
            ForkNumber::Init => " fork init",
        };
        write!(line, "{fork} blk {}", block.block).unwrap();
        match &block.image {
            Some(image) if image.apply => line.push_str(" FPW"),
            Some(_) => line.push_str(" FPW for WAL verification"),
            None => {}
        }
    }
    line
}

fn padded(lsn: Lsn) -> String {
    format!("{:X}/{:08X}", lsn.0 >> 32, lsn.0 & 0xFFFF_FFFF)
}

/// A line of `pg_waldump` in the same form.
fn normalized(line: &str) -> String {
    let (head, rest) = line.split_once(", desc: ").expect("a description");
    let fields: Vec<&str> = head.split([',', ' ', ':']).filter(|field| !field.is_empty()).collect();
    // rmgr NAME len (rec/tot) REC/ TOT tx XID lsn LSN prev PREV
    let numbers: String = head[head.find("(rec/tot):").unwrap() + 10..].chars().take_while(|c| *c != ',').collect();
    let lengths: String = numbers.split_whitespace().collect();
    let after = |name: &str| fields[fields.iter().position(|field| *field == name).unwrap() + 1];
    let lsn = |name: &str| padded(after(name).parse().unwrap());
    let mut out = format!("{} {lengths} tx {} lsn {} prev {}", fields[1], after("tx"), lsn("lsn"), lsn("prev"));
    let (desc, blocks) = match rest.split_once(", blkref ") {
        Some((desc, _)) => (desc, &rest[desc.len()..]),
        None => (rest, ""),
    };
    let operation = desc.split_whitespace().next().unwrap_or_default();
    if fields[1] == "Transaction" && ["COMMIT", "ABORT", "COMMIT_PREPARED", "ABORT_PREPARED"].contains(&operation) {
        let counted = |name: &str| {
            let part = desc.split(';').find(|part| part.trim().starts_with(name));
            part.map_or(0, |part| part.trim().trim_start_matches(name).split_whitespace().count())
        };
        let mut words = desc.split_whitespace().skip(1);
        let mut xid = 0;
        if operation.ends_with("PREPARED") {
            let word = words.next().unwrap().trim_end_matches(':');
            xid = word.parse().unwrap();
        }
        let time = format!("{} {}", words.next().unwrap(), words.next().unwrap());
        let xid: u32 = xid;
        write!(out, " at {time} xid {xid} subs {} rels {}", counted("subxacts:"), counted("rels:")).unwrap();
    }
    for block in blocks.split(", blkref ").filter(|block| !block.is_empty()) {
        let (id, place) = block.split_once(": rel ").unwrap();
        write!(out, " {id} {}", place.trim_end()).unwrap();
    }
    out
}

fn index(files: &Files) -> Vec<SegmentIndex> {
    let mut indexer = Indexer::new(files.stream, files.start_lsn);
    let mut lsn = files.start_lsn;
    for (_, bytes) in &files.segments {
        for piece in bytes.chunks(131_072) {
            indexer.feed(lsn, piece);
            lsn = lsn.checked_add(piece.len() as u64).unwrap();
        }
    }
    let mut all = indexer.take_finished();
    all.push(indexer.current());
    all
}

/// The indexes hold exactly the transaction ends of the records, and survive being stored.
fn check_indexes(files: &Files, indexes: &[SegmentIndex]) {
    let mut expected: BTreeMap<Lsn, Vec<Lsn>> = BTreeMap::new();
    let mut fragments = Fragments::default();
    let end_lsn = files.each(|record| {
        if record.header.rmgr != Rmgr::XACT {
            return;
        }
        fragments.decode(record).unwrap();
        let main = fragments.main(record);
        if xact::decode_end(record.format, record.header.info, record.header.xid, main).unwrap().is_some() {
            expected.entry(files.stream.segment_size.start_of(record.lsn)).or_default().push(record.lsn);
        }
    });
    for index in indexes.iter().filter(|index| index.start_lsn < end_lsn) {
        let ends: Vec<Lsn> = index.ends.iter().map(|end| end.lsn).collect();
        assert_eq!(ends, expected.remove(&index.start_lsn).unwrap_or_default(), "{}", index.start_lsn);
        let is_last = end_lsn <= index.start_lsn.checked_add(files.stream.segment_size.bytes()).unwrap();
        assert!(index.is_whole() || is_last, "{}: {:?}", index.start_lsn, index.completeness);
        assert_eq!(SegmentIndex::decode(&index.encode()).as_ref(), Ok(index));
    }
    assert!(expected.is_empty());
    let named: Vec<&str> = indexes.iter().flat_map(|i| &i.restore_points).map(|point| point.name.as_str()).collect();
    assert_eq!(named, ["a point with a name"]);
    assert!(indexes.iter().any(|index| index.checkpoints.iter().any(|checkpoint| !checkpoint.what.shutdown)));
}

/// Changed bytes in real pages, with the checksum off: nothing panics, whatever the reader finds.
fn fuzz(files: &Files) {
    let bytes: Vec<u8> = files.segments.iter().take(8).flat_map(|(_, bytes)| bytes.iter().copied()).collect();
    let config = ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() };
    let changes = proptest::collection::vec((0_usize..12 * 8192, any::<u8>(), 1_usize..5), 1..24);
    proptest!(config, |(page in 0..bytes.len() / 8192, changes in changes, check_crc: bool)| {
        let start = page * 8192;
        let mut part = bytes[start..bytes.len().min(start + 12 * 8192)].to_vec();
        for (at, value, count) in changes {
            part.iter_mut().skip(at).take(count).for_each(|byte| *byte = value);
        }
        let start_lsn = files.start_lsn.checked_add(start as u64).unwrap();
        let mut reader = Reader::new(files.stream, Start::Page(start_lsn));
        if !check_crc {
            reader = reader.without_crc_check();
        }
        let mut fragments = Fragments::default();
        let mut records = reader.read(start_lsn, &part);
        while let Ok(Some(record)) = records.next() {
            if fragments.decode(&record).is_ok() {
                let main = fragments.main(&record);
                drop(xact::decode_end(record.format, record.header.info, record.header.xid, main));
                drop(pgrecall::wal::rmgr::xlog::decode(record.format, record.op(), main));
            }
        }
        let mut indexer = Indexer::new(files.stream, start_lsn);
        indexer.feed(start_lsn, &part);
        drop(indexer.current());
    });
}

#[test]
fn every_record_is_read_as_pg_waldump_reads_it_with_small_segments() {
    for major in MAJORS {
        let compression = ["on", "lz4", "zstd", "pglz", "zstd"][usize::from(major - 14)];
        check(&Variant { major, segment_mib: 1, wal_level: "logical", compression });
    }
}

#[test]
fn every_record_is_read_as_pg_waldump_reads_it_with_usual_segments() {
    for major in MAJORS {
        check(&Variant { major, segment_mib: 16, wal_level: "replica", compression: "off" });
    }
}
