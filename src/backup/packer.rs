//! From a source's events to packs in the store and the frames of the file tables.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument;

use super::compressors::Compressors;
use super::error::BackupError;
use super::framer::{Framer, RawFrame};
use super::full::ProgressSender;
use super::manifest::{ManifestFile, ManifestRange, ManifestReader};
use super::packs::{Destination, PackWriter};
use super::placer::{PendingFrame, Placer};
use super::sorter::Sorter;
use super::source::{Event, Meta, Source, SourceEnd, SourceError, SourceStart};
use super::tables::{Counts, PlainTable, Sorted, manifest_value};
use crate::repository::backup_object::{DamagedBlock, PackEntry, TableEntry, TablePacks};
use crate::repository::pack::PackRef;

/// Frames between the framer and the placer, per thread; 2 MiB each.
const FRAMES_PER_THREAD: usize = 4;
/// Small files whose content the backup itself must know.
const KNOWN_FILES: [&str; 3] = ["backup_label", "tablespace_map", "global/pg_control"];
const KNOWN_FILE_BYTES_MAX: u64 = 1 << 20;
/// Damaged pages that are named one by one.
const DAMAGED_MAX: usize = 10_000;

/// How much work at once, and where temporary files may lie.
#[derive(Debug, Clone)]
pub struct PackSettings {
    /// Compressing threads.
    pub threads: usize,
    pub uploads_max: usize,
    pub scratch: PathBuf,
}

/// Everything stored, nothing visible.
pub struct Packed {
    pub end: SourceEnd,
    pub packs: Vec<PackEntry>,
    pub tables: TablePacks,
    pub counts: Counts,
    pub damaged: Vec<DamagedBlock>,
    /// The content of those of [`KNOWN_FILES`] that came.
    pub known: BTreeMap<String, Vec<u8>>,
}

/// Reads the source to its end and stores everything.
///
/// Cancel safety: dropping this leaves packs that nothing names.
pub async fn pack(
    source: &mut dyn Source,
    start: &SourceStart,
    to: Destination,
    settings: &PackSettings,
    progress: &ProgressSender,
) -> Result<Packed, BackupError> {
    let pipeline = Pipeline::start(to, settings, progress.clone())?;
    let mut reader = Reader::new(start, settings, pipeline, progress.clone());
    let end = loop {
        let event = source.next().await?;
        if let Event::End(end) = event {
            break end;
        }
        reader.take(event).await?;
    };
    reader.finish(end).await
}

/// The stages behind the reader.
struct Pipeline {
    compressors: Arc<Compressors>,
    frames: mpsc::Sender<PendingFrame>,
    placer: AbortOnDropHandle<Result<Placer, BackupError>>,
}

impl Pipeline {
    fn start(to: Destination, settings: &PackSettings, progress: ProgressSender) -> Result<Self, BackupError> {
        let threads = settings.threads.max(1);
        let compressors = Arc::new(Compressors::start(to.repository.codec(), threads).map_err(BackupError::Thread)?);
        let (frames, queue) = mpsc::channel(threads.saturating_mul(FRAMES_PER_THREAD));
        let packs = PackWriter::new(to, settings.uploads_max);
        let placer = Placer::new(packs, Sorter::new(&settings.scratch), compressors.clone(), progress);
        let placer = AbortOnDropHandle::new(tokio::spawn(placer.run(queue).in_current_span()));
        Ok(Pipeline { compressors, frames, placer })
    }

    fn buffer(&self) -> Vec<u8> {
        self.compressors.buffer()
    }

    async fn send(&mut self, raw: RawFrame) -> Result<(), BackupError> {
        let frame = if raw.plain.is_empty() { None } else { Some(self.compressors.compress(raw.plain).await?) };
        if self.frames.send(PendingFrame { frame, steps: raw.steps }).await.is_err() {
            // The placer ended early: its error is the reason.
            return Err((&mut self.placer)
                .await
                .map_or(BackupError::Cancelled, |r| r.err().unwrap_or(BackupError::Cancelled)));
        }
        Ok(())
    }

    async fn finish(self) -> Result<(Placer, Arc<Compressors>), BackupError> {
        let Pipeline { compressors, frames, placer } = self;
        drop(frames);
        let placer = placer.await.map_err(|_| BackupError::Cancelled)??;
        Ok((placer, compressors))
    }
}

/// Takes events one by one.
struct Reader {
    pipeline: Pipeline,
    framer: Framer,
    manifest: Option<(ManifestReader, Sorter)>,
    damaged: Vec<DamagedBlock>,
    known: BTreeMap<String, Vec<u8>>,
    /// The file whose content is being kept.
    keeping: Option<String>,
    progress: ProgressSender,
}

impl Reader {
    fn new(start: &SourceStart, settings: &PackSettings, pipeline: Pipeline, progress: ProgressSender) -> Self {
        let manifest = start.checksums.map(|_| (ManifestReader::default(), Sorter::new(&settings.scratch)));
        let (framer, damaged, known) = (Framer::new(start.checksums), Vec::new(), BTreeMap::new());
        Reader { pipeline, framer, manifest, damaged, known, keeping: None, progress }
    }

    async fn take(&mut self, event: Event) -> Result<(), BackupError> {
        let pipeline = &self.pipeline;
        let frame = match event {
            Event::File(meta) => {
                self.keeping = keeps(&meta).then(|| meta.path.clone());
                self.framer.begin(meta, || pipeline.buffer())?
            }
            Event::Data(bytes) => return self.data(bytes).await,
            Event::FileEnd => {
                self.keeping = None;
                self.framer.end()?;
                self.progress.send_modify(|p| p.files_done += 1);
                None
            }
            Event::Directory(meta) => self.framer.whole(meta, None, || pipeline.buffer())?,
            // PostgreSQL makes these from tablespace_map when it starts.
            Event::Symlink { meta, .. } if meta.path.starts_with("pg_tblspc/") => None,
            Event::Symlink { meta, target } => self.framer.whole(meta, Some(target), || pipeline.buffer())?,
            Event::Damaged(block) => {
                if self.damaged.len() < DAMAGED_MAX {
                    self.damaged.push(block);
                }
                None
            }
            Event::Manifest(piece) => return self.manifest(&piece).await,
            Event::End(_) => None,
        };
        match frame {
            Some(frame) => self.pipeline.send(frame).await,
            None => Ok(()),
        }
    }

    async fn data(&mut self, mut bytes: Bytes) -> Result<(), BackupError> {
        let length = bytes.len() as u64;
        if let Some(path) = &self.keeping {
            self.known.entry(path.clone()).or_default().extend_from_slice(&bytes);
        }
        while !bytes.is_empty() {
            let pipeline = &self.pipeline;
            if let Some(frame) = self.framer.data(&mut bytes, || pipeline.buffer())? {
                self.pipeline.send(frame).await?;
            }
        }
        self.progress.send_modify(|p| p.bytes_done += length);
        Ok(())
    }

    async fn manifest(&mut self, piece: &[u8]) -> Result<(), BackupError> {
        let Some((reader, files)) = &mut self.manifest else {
            return Err(SourceError::Malformed("a manifest came that was not announced".into()).into());
        };
        reader.push(piece, |ManifestFile { path, bytes, checksum }| {
            files.push(path.as_bytes(), &manifest_value(bytes, &checksum.unwrap_or_default()));
        })?;
        if files.is_full() {
            files.spill_in_background().await?;
        }
        Ok(())
    }

    async fn finish(mut self, end: Option<SourceEnd>) -> Result<Packed, BackupError> {
        let last = self.framer.finish()?;
        self.pipeline.send(last).await?;
        let (ranges, manifest) = match self.manifest {
            Some((reader, files)) => (reader.finish()?, Some(files)),
            None => (Vec::new(), None),
        };
        let end = end.or_else(|| ranges.last().map(ManifestRange::end));
        let end = end.ok_or_else(|| SourceError::Malformed("nothing says where the backup ends".into()))?;
        let (Placer { mut packs, entries, .. }, compressors) = self.pipeline.finish().await?;
        let references = packs.references().to_vec();
        let sorted = Sorted { entries, manifest, references };
        let (tables, counts) = write_tables(sorted, &mut packs, &compressors).await?;
        let packs = packs.finish().await?;
        let (damaged, known) = (self.damaged, self.known);
        Ok(Packed { end, packs, tables, counts, damaged, known })
    }
}

async fn write_tables(
    sorted: Sorted,
    packs: &mut PackWriter,
    compressors: &Compressors,
) -> Result<(TablePacks, Counts), BackupError> {
    let (out, mut plain_tables) = mpsc::channel(2);
    let merging = AbortOnDropHandle::new(tokio::task::spawn_blocking(move || sorted.write(&out)));
    let mut local = super::placer::LocalPacks::default();
    let mut tables = Vec::new();
    while let Some(PlainTable { first, files, plain }) = plain_tables.recv().await {
        let frame = compressors.compress(plain).await?.done().await?;
        let mut frame = packs.add(frame).await?;
        local.localize(&mut frame, packs.references())?;
        tables.push(TableEntry { first, files, frame });
    }
    let counts = merging.await.map_err(|_| BackupError::Cancelled)??;
    let packs: Vec<PackRef> = local.packs;
    Ok((TablePacks { packs, tables }, counts))
}

fn keeps(meta: &Meta) -> bool {
    meta.bytes <= KNOWN_FILE_BYTES_MAX && KNOWN_FILES.contains(&meta.path.as_str())
}
