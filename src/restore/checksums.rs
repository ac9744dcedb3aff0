//! Every page of every relation file, read and judged as the server would.
//!
//! The server may run: a page that looks wrong is read again before it is called so, since it may have been caught half
//! written. Temporary relations are left out. Memory: a buffer for each worker and a short queue of paths, whatever the
//! number of files.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context;

use crate::pg::page::{PageState, check_page};
use crate::pg::{ControlFile, RelationFile};

/// What was read, and what is wrong with it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    pub file_count: u64,
    pub page_count: u64,
    pub bad_page_count: u64,
    /// The first of them.
    pub bad_pages: Vec<BadPage>,
}

/// A page that the server would refuse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadPage {
    /// Below the data directory.
    pub file: String,
    /// Within the fork.
    pub block: u32,
    pub problem: Problem,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Problem {
    Checksum {
        stored: u16,
        computed: u16,
    },
    Header,
    /// The file ends within the page.
    Torn {
        bytes: usize,
    },
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Problem::Checksum { stored, computed } => {
                write!(f, "the page carries the checksum {stored:04X}, its content has {computed:04X}")
            }
            Problem::Header => f.write_str("the page header is impossible"),
            Problem::Torn { bytes } => write!(f, "the file ends after {bytes} bytes of the page"),
        }
    }
}

/// Bad pages that are named; more are only counted.
const NAMED_MAX: usize = 100;

/// Pages that a worker reads at once: 1 MiB of the usual size.
const PAGES_AT_ONCE: usize = 128;

/// Paths waiting for a worker.
const QUEUE_PATHS: usize = 256;

/// A page that looks wrong is read so often, with a pause, before it counts.
const LOOKS: u32 = 5;
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Reads all relation files with `workers` threads. `read_bytes` grows on the way.
///
/// # Errors
/// When a file or a directory cannot be read. Bad pages are findings, not errors.
pub fn check_all(
    data_directory: &Path,
    control: &ControlFile,
    workers: usize,
    read_bytes: &AtomicU64,
) -> anyhow::Result<Findings> {
    let (send, receive) = sync_channel(QUEUE_PATHS);
    let queue = Mutex::new(receive);
    let check = Check { data_directory, control, read_bytes };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers.max(1)).map(|_| scope.spawn(|| check.work(&queue))).collect();
        // The sender goes with the walk: the workers end when the queue is empty.
        let walked = walk(data_directory, send);
        let mut total = Findings::default();
        let mut failure = None;
        for worker in workers {
            match worker.join() {
                Ok(Ok(findings)) => total.add(findings),
                Ok(Err(error)) => failure = failure.or(Some(error)),
                Err(_) => failure = failure.or_else(|| Some(anyhow::anyhow!("a checksum worker panicked"))),
            }
        }
        match failure {
            Some(error) => Err(error),
            None => walked.map(|()| total),
        }
    })
}

impl Findings {
    fn add(&mut self, other: Findings) {
        self.file_count += other.file_count;
        self.page_count += other.page_count;
        self.bad_page_count += other.bad_page_count;
        self.bad_pages.extend(other.bad_pages);
        self.bad_pages.sort_by(|a, b| (&a.file, a.block).cmp(&(&b.file, b.block)));
        self.bad_pages.truncate(NAMED_MAX);
    }

    fn bad(&mut self, page: BadPage) {
        self.bad_page_count += 1;
        if self.bad_pages.len() < NAMED_MAX {
            self.bad_pages.push(page);
        }
    }
}

struct Check<'a> {
    data_directory: &'a Path,
    control: &'a ControlFile,
    read_bytes: &'a AtomicU64,
}

impl Check<'_> {
    fn page_bytes(&self) -> usize {
        // A smaller one is no page; the decoder of `pg_control` does not judge it.
        usize::try_from(self.control.block_size).unwrap_or(0).max(512)
    }

    fn work(&self, queue: &Mutex<Receiver<PathBuf>>) -> anyhow::Result<Findings> {
        let mut buffer = vec![0; self.page_bytes() * PAGES_AT_ONCE];
        let mut findings = Findings::default();
        let mut failure = Ok(());
        loop {
            let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let Ok(path) = next else { return failure.map(|()| findings) };
            // After a failure the queue is only emptied, so that the walk does not wait for ever.
            if failure.is_ok() {
                failure = self.check_file(&path, &mut buffer, &mut findings);
            }
        }
    }

    fn check_file(&self, name: &Path, buffer: &mut [u8], findings: &mut Findings) -> anyhow::Result<()> {
        let name = name.to_string_lossy();
        let Some(relation) = RelationFile::parse(&name).filter(|file| file.backend.is_none()) else { return Ok(()) };
        let path = self.data_directory.join(name.as_ref());
        let file = match File::open(&path) {
            Ok(file) => file,
            // Dropped meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(e).with_context(|| format!("open {}", path.display())),
        };
        findings.file_count += 1;
        let first_block = relation.first_block(self.control.relation_segment_blocks).unwrap_or(u32::MAX);
        let mut offset = 0;
        let mut block = first_block;
        loop {
            let read = read_full(&file, buffer, offset).with_context(|| format!("read {}", path.display()))?;
            let Some(filled) = buffer.get(..read).filter(|filled| !filled.is_empty()) else { return Ok(()) };
            self.read_bytes.fetch_add(read as u64, Ordering::Relaxed);
            for page in filled.chunks(self.page_bytes()) {
                findings.page_count += 1;
                if let Some(problem) = self.judge(&file, page, offset, block) {
                    findings.bad(BadPage { file: name.clone().into_owned(), block, problem });
                }
                offset += page.len() as u64;
                block = block.saturating_add(1);
            }
        }
    }

    fn judge(&self, file: &File, page: &[u8], offset: u64, block: u32) -> Option<Problem> {
        let page_bytes = self.page_bytes();
        let has_checksums = self.control.has_data_checksums();
        let judge = |page: &[u8]| match check_page(page, block, has_checksums) {
            _ if page.len() < page_bytes => Some(Problem::Torn { bytes: page.len() }),
            PageState::Good | PageState::New => None,
            PageState::Mismatch { stored, computed } => Some(Problem::Checksum { stored, computed }),
            PageState::BadHeader => Some(Problem::Header),
        };
        let mut problem = judge(page)?;
        let mut whole = vec![0; page_bytes];
        for _ in 1..LOOKS {
            std::thread::sleep(LOOK_AGAIN);
            let read = read_full(file, &mut whole, offset).ok()?;
            // Nothing there: cut off meanwhile, so there is no such page any more.
            problem = judge(whole.get(..read).filter(|page| !page.is_empty())?)?;
        }
        Some(problem)
    }
}

fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(filled)
}

/// Sends the paths, below the data directory, of all files in the places where relations lie.
fn walk(data_directory: &Path, send: SyncSender<PathBuf>) -> anyhow::Result<()> {
    for place in ["global", "base", "pg_tblspc"] {
        walk_below(data_directory, Path::new(place), &send)?;
    }
    Ok(())
}

fn walk_below(data_directory: &Path, place: &Path, send: &SyncSender<PathBuf>) -> anyhow::Result<()> {
    let path = data_directory.join(place);
    let entries = match fs::read_dir(&path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e).with_context(|| format!("list {}", path.display())),
    };
    for entry in entries {
        let entry = entry.with_context(|| format!("list {}", path.display()))?;
        let below = place.join(entry.file_name());
        // Tablespaces are links to directories.
        match fs::metadata(entry.path()) {
            Ok(metadata) if metadata.is_dir() => walk_below(data_directory, &below, send)?,
            // The workers are gone only when one panicked, which is told elsewhere.
            Ok(_) => drop(send.send(below)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e).with_context(|| format!("look at {}", entry.path().display())),
        }
    }
    Ok(())
}
