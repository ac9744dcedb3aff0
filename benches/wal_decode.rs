//! How fast WAL is decoded, with every CRC checked, beside crc32c alone over the same bytes.
//!
//!     cargo bench --bench wal_decode -- FOLDER      (a pg_wal of consecutive, complete segments)
#![expect(clippy::print_stdout, reason = "a benchmark's result")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pgrecall::pg::{Lsn, SegmentSize, TimelineId};
use pgrecall::wal::reader::Stream;
use pgrecall::wal::{Fragments, Reader, Start};

const ROUNDS: usize = 5;

fn main() -> Result<()> {
    let folder = std::env::args().skip(1).find(|argument| !argument.starts_with("--"));
    let folder = PathBuf::from(folder.context("name a folder with WAL segments")?);
    let (segment_size, start_lsn, bytes) = read(&folder)?;
    let stream = Stream { timeline: TimelineId(1), segment_size, system_id: None };
    let (mut decode, mut crc, mut records) = (Duration::MAX, Duration::MAX, 0);
    // In turn, so that both see the same machine; the best of each.
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        std::hint::black_box(crc32c::crc32c(&bytes));
        crc = crc.min(begin.elapsed());
        let begin = Instant::now();
        records = decode_all(stream, start_lsn, &bytes);
        decode = decode.min(begin.elapsed());
    }
    ensure!(records > 0, "no record was found");
    let speed = |took: Duration| bytes.len() as f64 / took.as_secs_f64() / 1e6;
    println!("{} MB, {records} records", bytes.len() / 1_000_000);
    println!("crc32c alone  {:8.0} MB/s", speed(crc));
    println!("decode + CRC  {:8.0} MB/s, x{:.2} of crc32c", speed(decode), crc.as_secs_f64() / decode.as_secs_f64());
    Ok(())
}

fn decode_all(stream: Stream, start_lsn: Lsn, bytes: &[u8]) -> usize {
    let mut reader = Reader::new(stream, Start::Page(start_lsn));
    let (mut fragments, mut count) = (Fragments::default(), 0);
    for piece in bytes.chunks(131_072) {
        let mut records = reader.read(reader.position(), piece);
        loop {
            match records.next() {
                Ok(Some(record)) => {
                    count += usize::from(fragments.decode(&record).is_ok());
                    std::hint::black_box(&fragments);
                }
                Ok(None) => break,
                // Where what was written ends.
                Err(_) => return count,
            }
        }
    }
    count
}

/// The longest run of segments of timeline 1 from the oldest on, as one piece.
fn read(folder: &Path) -> Result<(SegmentSize, Lsn, Vec<u8>)> {
    let mut names: Vec<String> = std::fs::read_dir(folder)?
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.len() == 24 && name.starts_with("00000001"))
        .collect();
    names.sort();
    let first = names.first().with_context(|| format!("{} holds no segment of timeline 1", folder.display()))?;
    let size = std::fs::metadata(folder.join(first))?.len();
    let number = |name: &str| -> Result<u64> {
        let (log, segment) = (u64::from_str_radix(&name[8..16], 16)?, u64::from_str_radix(&name[16..24], 16)?);
        Ok(log * ((1 << 32) / size) + segment)
    };
    let (start, mut bytes) = (number(first)?, Vec::new());
    for (at, name) in names.iter().enumerate() {
        if number(name)? != start + at as u64 || at as u64 * size >= 1 << 30 {
            break;
        }
        bytes.extend(std::fs::read(folder.join(name))?);
    }
    Ok((SegmentSize::new(size)?, Lsn(start * size), bytes))
}
