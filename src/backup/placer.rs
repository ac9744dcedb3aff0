//! Replays the steps of compressed frames in order: places their bytes in packs, and puts each file's entry together.
//!
//! Entries go into a sorter with pack numbers as addresses; [`super::tables`] makes tables of them. Extents of a file beyond
//! [`INLINE_EXTENTS_MAX`] become extent tables, written while the file passes, so that a file may have any size.

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc;

use super::compressors::{Compressors, Pending};
use super::error::BackupError;
use super::framer::Step;
use super::full::ProgressSender;
use super::packs::PackWriter;
use super::sorter::Sorter;
use crate::repository::backup_object::{Extent, FileEntry, INLINE_EXTENTS_MAX, Table};
use crate::repository::pack::{FrameRef, PackRef};

/// Extents in one extent table: far below 1 MiB even when each names another pack.
const EXTENTS_PER_TABLE: usize = 4096;

/// A frame on its way through the compressors, and what its bytes are.
pub struct PendingFrame {
    /// `None` when the steps need no bytes.
    pub frame: Option<Pending>,
    pub steps: Vec<Step>,
}

struct OpenEntry {
    entry: FileEntry,
    /// Not yet in an extent table.
    extents: Vec<Extent>,
}

/// Takes frames in order.
pub struct Placer {
    pub packs: PackWriter,
    pub entries: Sorter,
    compressors: Arc<Compressors>,
    progress: ProgressSender,
    open: Option<OpenEntry>,
}

impl Placer {
    pub fn new(packs: PackWriter, entries: Sorter, compressors: Arc<Compressors>, progress: ProgressSender) -> Self {
        Placer { packs, entries, compressors, progress, open: None }
    }

    /// Places frames until the sender is gone.
    ///
    /// Cancel safety: dropping this leaves packs that nothing names.
    pub async fn run(mut self, mut frames: mpsc::Receiver<PendingFrame>) -> Result<Placer, BackupError> {
        while let Some(PendingFrame { frame, steps }) = frames.recv().await {
            let address = match frame {
                Some(pending) => Some(self.packs.add(pending.done().await?).await?),
                None => None,
            };
            for step in steps {
                self.replay(step, address).await?;
            }
            let stored_bytes = self.packs.stored_bytes();
            self.progress.send_modify(|p| p.stored_bytes = stored_bytes);
        }
        Ok(self)
    }

    async fn replay(&mut self, step: Step, address: Option<FrameRef>) -> Result<(), BackupError> {
        match (step, address) {
            (Step::Begin(entry), _) => self.open = Some(OpenEntry { entry: *entry, extents: Vec::new() }),
            (Step::Run { offset, length, frame_offset }, Some(frame)) => {
                let Some(open) = &mut self.open else { return Ok(()) };
                open.extents.push(Extent { offset, length, frame_offset, frame });
                if open.extents.len() >= EXTENTS_PER_TABLE {
                    self.write_extents().await?;
                }
            }
            // A frame without bytes has no runs.
            (Step::Run { .. }, None) => {}
            (Step::End(checksum), _) => self.end_file(checksum.unwrap_or_default()).await?,
            (Step::Whole(entry), _) => self.keep(&entry, "").await?,
        }
        Ok(())
    }

    async fn end_file(&mut self, checksum: String) -> Result<(), BackupError> {
        let many = |o: &OpenEntry| !o.entry.extent_tables.is_empty() || o.extents.len() > INLINE_EXTENTS_MAX;
        if self.open.as_ref().is_some_and(many) {
            self.write_extents().await?;
        }
        if let Some(OpenEntry { mut entry, extents }) = self.open.take() {
            entry.extents = extents;
            self.keep(&entry, &checksum).await?;
        }
        Ok(())
    }

    /// Moves the open file's extents into a table.
    async fn write_extents(&mut self) -> Result<(), BackupError> {
        let Some(open) = &mut self.open else { return Ok(()) };
        if open.extents.is_empty() {
            return Ok(());
        }
        let mut packs = LocalPacks::default();
        let mut rows = std::mem::take(&mut open.extents);
        for row in &mut rows {
            packs.localize(&mut row.frame, self.packs.references())?;
        }
        let plain = Table { packs: packs.packs, rows }.encode();
        let frame = self.compressors.compress(plain).await?.done().await?;
        let address = self.packs.add(frame).await?;
        if let Some(open) = &mut self.open {
            open.entry.extent_tables.push(address);
        }
        Ok(())
    }

    async fn keep(&mut self, entry: &FileEntry, checksum: &str) -> Result<(), BackupError> {
        let mut value = checksum.as_bytes().to_vec();
        value.push(b'\n');
        serde_json::to_writer(&mut value, entry).map_err(|e| BackupError::Unfit(e.to_string()))?;
        self.entries.push(entry.path.as_bytes(), &value);
        if self.entries.is_full() {
            self.entries.spill_in_background().await?;
        }
        Ok(())
    }
}

/// The packs that one table names, in order of first use.
#[derive(Default)]
pub struct LocalPacks {
    pub packs: Vec<PackRef>,
    places: HashMap<u32, u32>,
}

impl LocalPacks {
    /// Turns the number of a pack into its place in the table's list.
    pub fn localize(&mut self, frame: &mut FrameRef, references: &[PackRef]) -> Result<(), BackupError> {
        if let Some(place) = self.places.get(&frame.pack) {
            frame.pack = *place;
            return Ok(());
        }
        let unknown = || BackupError::Unfit(format!("an extent names pack {}, which was not written", frame.pack));
        let index = usize::try_from(frame.pack).map_err(|_| unknown())?;
        let reference = references.get(index).ok_or_else(unknown)?.clone();
        let place = u32::try_from(self.packs.len()).map_err(|_| unknown())?;
        self.packs.push(reference);
        self.places.insert(frame.pack, place);
        frame.pack = place;
        Ok(())
    }
}
