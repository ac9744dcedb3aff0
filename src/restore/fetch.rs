//! Brings a backup's files into a prepared directory: tables one by one, packs in large ranges, many at a time.
//!
//! Extents are gathered in windows and sorted by pack and offset, so that each pack is read in a few large ranges whatever
//! the order of the files; ranges are fetched in parallel, and frames opened on one thread more than there are cores. A
//! frame's bytes are written only after their digest matched; a file gets its name when its last byte is in place.
//!
//! Memory: [`RANGES_AT_ONCE`] × [`RANGE_BYTES_MAX`] of stored bytes, a few frames per core, and one window of addresses
//! (about 6 MiB); independent of the size of the backup.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::{Semaphore, mpsc};

use super::run::RestoreError;
use super::target::{TargetDirectory, io_error};
use super::write::NewFile;
use crate::repository::backup_object::{Extent, FileKind, TablePacks};
use crate::repository::pack::{FrameOpener, PackRef, read_frame};
use crate::repository::tables::{FileExtent, TableFile, TableReader};
use crate::repository::{Incarnation, Key, Repository, RepositoryError};

/// Ranges of packs in flight.
pub const RANGES_AT_ONCE: usize = 8;
/// Most stored bytes fetched by one request, unless a single frame is longer.
const RANGE_BYTES_MAX: u64 = 4 << 20;
/// A hole between two frames that is read rather than making another request.
const SKIP_BYTES_MAX: u64 = 64 << 10;
/// Extents gathered before they are sorted: about 6 MiB.
const WINDOW_EXTENTS: usize = 1 << 15;

/// How far a restore is; read by whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    pub files: AtomicU64,
    /// Bytes of files written.
    pub bytes: AtomicU64,
    /// Stored bytes fetched from packs.
    pub fetched_bytes: AtomicU64,
    pub segments: AtomicU64,
}

/// One extent of one file.
struct Piece {
    file: Arc<NewFile>,
    extent: Extent,
    pack: Arc<PackRef>,
}

/// Frames that lie close together in a pack, and the pieces that need them.
struct Range {
    pack: Arc<PackRef>,
    start: u64,
    end: u64,
    pieces: Vec<Piece>,
}

/// Where frames are opened and written.
struct Openers {
    cores: Arc<Semaphore>,
    /// Those that nobody uses now.
    free: Mutex<Vec<FrameOpener>>,
}

/// Restores the files of a backup.
pub struct Fetch {
    pub repository: Repository,
    pub incarnation: Incarnation,
    pub target: TargetDirectory,
    pub progress: Arc<Progress>,
}

impl Fetch {
    /// Writes all files; `global/pg_control` keeps a temporary name, see [`super::write`].
    ///
    /// Cancel safety: dropping this future leaves an unfinished directory with its marker, which can be begun anew when
    /// [`TargetDirectory::wait_written`] has returned.
    pub async fn run(&self, tables: TablePacks) -> Result<(), RestoreError> {
        let (send, receive) = mpsc::channel::<Range>(RANGES_AT_ONCE);
        // One more than cores: another opens frames while one waits for its turn to write.
        let threads = std::thread::available_parallelism().map_or(2, |n| n.get()) + 1;
        let openers = Arc::new(Openers { cores: Arc::new(Semaphore::new(threads)), free: Mutex::default() });
        let ranges = futures::stream::unfold(receive, |mut receive| async {
            receive.recv().await.map(|range| (range, receive))
        });
        let bring = ranges.map(Ok).try_for_each_concurrent(RANGES_AT_ONCE, |range| self.bring(range, &openers));
        // `bring` first: its error is the cause when the walk finds the channel closed.
        let ((), symlinks) = tokio::try_join!(bring, self.walk(tables, send))?;
        for (path, link) in symlinks {
            std::os::unix::fs::symlink(&link, &path).map_err(io_error("make", &path))?;
        }
        Ok(())
    }

    /// Makes directories, gathers extents, hands out ranges. Returns the symbolic links, which are made last so that
    /// nothing is written through them.
    async fn walk(
        &self,
        tables: TablePacks,
        send: mpsc::Sender<Range>,
    ) -> Result<BTreeMap<PathBuf, String>, RestoreError> {
        let mut reader = TableReader::new(&self.repository, self.incarnation, tables);
        let mut symlinks = BTreeMap::new();
        let mut window: Vec<Piece> = Vec::new();
        while let Some(file) = reader.next().await? {
            match file.entry.kind {
                FileKind::Directory => self.make_directory(&file)?,
                FileKind::Symlink => {
                    let link = file.entry.target.clone().unwrap_or_default();
                    symlinks.insert(self.target.resolve(&file.entry.path)?, link);
                }
                FileKind::File => self.gather(&reader, &file, &mut window, &send).await?,
            }
        }
        hand_out(&mut window, &send).await?;
        Ok(symlinks)
    }

    fn make_directory(&self, file: &TableFile) -> Result<(), RestoreError> {
        if matches!(file.entry.path.as_str(), "" | ".") {
            return Ok(());
        }
        let path = self.target.resolve(&file.entry.path)?;
        // PostgreSQL knows two kinds: for the owner alone, or readable by the group.
        let mode = if file.entry.mode & 0o050 != 0 { 0o750 } else { 0o700 };
        let made = fs::DirBuilder::new().recursive(true).mode(mode).create(&path);
        made.map_err(io_error("make", &path))?;
        // Where WAL goes there may be a directory already.
        if file.entry.path.starts_with("pg_wal") {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(io_error("set the mode of", &path))?;
        }
        if file.entry.path == "global" && mode == 0o750 {
            let root = self.target.root();
            fs::set_permissions(root, fs::Permissions::from_mode(mode)).map_err(io_error("set the mode of", root))?;
        }
        Ok(())
    }

    async fn gather(
        &self,
        reader: &TableReader,
        file: &TableFile,
        window: &mut Vec<Piece>,
        send: &mpsc::Sender<Range>,
    ) -> Result<(), RestoreError> {
        let path = self.target.resolve(&file.entry.path)?;
        let new = Arc::new(NewFile::new(path, &file.entry));
        let mut extents = reader.extents(file);
        while let Some(some) = extents.next().await? {
            for FileExtent { extent, pack } in some {
                window.push(Piece { file: new.clone(), extent, pack });
            }
            if window.len() >= WINDOW_EXTENTS {
                hand_out(window, send).await?;
            }
        }
        self.finish_one(new)
    }

    /// Fetches a range, opens its frames and writes their pieces.
    async fn bring(&self, range: Range, openers: &Arc<Openers>) -> Result<(), RestoreError> {
        let key = Key::pack(self.incarnation, &range.pack.backup, range.pack.number);
        let stored = self.repository.store().get_range(&key, range.start..range.end).await;
        let stored = stored.map_err(|e| RestoreError::of_file(range.first_path(), e.into()))?;
        self.progress.fetched_bytes.fetch_add(stored.len() as u64, Ordering::Relaxed);
        let permit = openers.cores.clone().acquire_owned().await.map_err(|_| RepositoryError::Stopping)?;
        let (codec, incarnation, progress) = (self.repository.codec().clone(), self.incarnation, self.progress.clone());
        let (openers, key) = (openers.clone(), key.clone());
        let opened = self.target.writers().spawn_blocking(move || {
            let _permit = permit;
            let free = || openers.free.lock().unwrap_or_else(PoisonError::into_inner);
            let opener = free().pop().map_or_else(|| FrameOpener::new(&codec, incarnation), Ok);
            let mut opener =
                opener.map_err(|source| RepositoryError::Corrupt { key: key.as_str().to_owned(), source })?;
            let damaged = write_range(range, &stored, &progress, &mut opener)?;
            free().push(opener);
            Ok::<_, RestoreError>(damaged)
        });
        let damaged = opened.await.map_err(|_| RepositoryError::Stopping)??;
        for group in damaged {
            self.bring_again(group).await?;
        }
        Ok(())
    }

    /// Damaged bytes are read once more before they count: a bit may have flipped on the way.
    async fn bring_again(&self, group: Vec<Piece>) -> Result<(), RestoreError> {
        let Some(first) = group.first() else { return Ok(()) };
        let plain = read_frame(&self.repository, self.incarnation, &first.pack, &first.extent.frame).await;
        let plain = plain.map_err(|e| RestoreError::of_file(first.file.path().to_owned(), e))?;
        tracing::warn!(pack = first.pack.number, backup = %first.pack.backup, "a frame was damaged when first read");
        let progress = self.progress.clone();
        let written = self.target.writers().spawn_blocking(move || write_pieces(group, &plain, &progress));
        written.await.map_err(|_| RepositoryError::Stopping)?
    }

    fn finish_one(&self, file: Arc<NewFile>) -> Result<(), RestoreError> {
        finish(file, &self.progress)
    }
}

impl Range {
    fn first_path(&self) -> PathBuf {
        self.pieces.first().map_or_else(PathBuf::new, |p| p.file.path().to_owned())
    }
}

/// Sorts a window by place in the packs and hands out its ranges.
async fn hand_out(window: &mut Vec<Piece>, send: &mpsc::Sender<Range>) -> Result<(), RestoreError> {
    let mut pieces = std::mem::take(window);
    let place = |p: &Piece| (p.extent.frame.offset, p.extent.offset);
    pieces.sort_by(|a, b| a.pack.cmp(&b.pack).then_with(|| place(a).cmp(&place(b))));
    let mut current: Option<Range> = None;
    for piece in pieces {
        let frame = piece.extent.frame;
        let end = frame.offset.saturating_add(frame.stored_bytes.into());
        match &mut current {
            Some(range) if range.takes(&piece, end) => {
                range.end = range.end.max(end);
                range.pieces.push(piece);
            }
            _ => {
                let next = Range { pack: piece.pack.clone(), start: frame.offset, end, pieces: vec![piece] };
                send_range(current.replace(next), send).await?;
            }
        }
    }
    send_range(current, send).await
}

async fn send_range(range: Option<Range>, send: &mpsc::Sender<Range>) -> Result<(), RestoreError> {
    match range {
        // A closed channel means that fetching failed, and its error is the one reported.
        Some(range) => send.send(range).await.map_err(|_| RepositoryError::Stopping.into()),
        None => Ok(()),
    }
}

impl Range {
    fn takes(&self, piece: &Piece, end: u64) -> bool {
        let near = piece.extent.frame.offset <= self.end.saturating_add(SKIP_BYTES_MAX);
        self.pack == piece.pack && near && end.saturating_sub(self.start) <= RANGE_BYTES_MAX
    }
}

/// Opens each frame once and writes the pieces that need it. Returns the pieces of frames that did not open.
fn write_range(
    range: Range,
    stored: &Bytes,
    progress: &Progress,
    opener: &mut FrameOpener,
) -> Result<Vec<Vec<Piece>>, RestoreError> {
    let mut damaged = Vec::new();
    let start = range.start;
    let mut pieces = range.pieces.into_iter().peekable();
    while let Some(first) = pieces.next() {
        let frame = first.extent.frame;
        let mut group = vec![first];
        while let Some(more) = pieces.next_if(|p| p.extent.frame.offset == frame.offset && same_frame(p, &group)) {
            group.push(more);
        }
        let from = usize::try_from(frame.offset.saturating_sub(start)).unwrap_or(usize::MAX);
        let bytes = stored.get(from..from.saturating_add(frame.stored_bytes as usize));
        let plain = match (bytes, group.first()) {
            (Some(bytes), Some(first)) => opener.open(&range.pack, &first.extent.frame, bytes).ok(),
            _ => None,
        };
        match plain {
            Some(plain) => write_pieces(group, plain, progress)?,
            None => damaged.push(group),
        }
    }
    Ok(damaged)
}

fn same_frame(piece: &Piece, group: &[Piece]) -> bool {
    group.first().is_some_and(|first| {
        let (a, b) = (&first.extent.frame, &piece.extent.frame);
        (a.stored_bytes, a.plain_bytes, a.hash) == (b.stored_bytes, b.plain_bytes, b.hash)
    })
}

fn write_pieces(group: Vec<Piece>, plain: &[u8], progress: &Progress) -> Result<(), RestoreError> {
    for piece in group {
        let from = piece.extent.frame_offset as usize;
        let bytes = plain.get(from..from.saturating_add(piece.extent.length as usize));
        let bytes = bytes.ok_or_else(|| RestoreError::Extent(piece.file.path().to_owned()))?;
        piece.file.write(piece.extent.offset, bytes)?;
        progress.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        finish(piece.file, progress)?;
    }
    Ok(())
}

/// Drops one hold on a file; whoever drops the last gives it its name.
fn finish(file: Arc<NewFile>, progress: &Progress) -> Result<(), RestoreError> {
    if let Some(file) = Arc::into_inner(file) {
        file.complete()?;
        progress.files.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}
