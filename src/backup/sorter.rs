//! Sorts records by key in bounded memory: sorted runs in one nameless file, merged when read.
//!
//! The file is unlinked as soon as it is made, so that nothing is left behind however the process ends. Few records never
//! touch a disk.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::BackupError;

/// Bytes of records in memory before they are written out.
const RUN_BYTES: usize = 16 << 20;
/// Buffers of all runs together while merging.
const MERGE_BYTES: usize = 8 << 20;

/// Where a record lies in memory.
#[derive(Clone, Copy)]
pub struct Place {
    start: usize,
    key_bytes: usize,
    end: usize,
}

/// Collects records.
pub struct Sorter {
    folder: PathBuf,
    arena: Vec<u8>,
    places: Vec<Place>,
    file: Option<File>,
    /// Ends of the runs in the file.
    runs: Vec<u64>,
    run_bytes: usize,
}

/// A key and what goes with it.
pub type Record = (Vec<u8>, Vec<u8>);

/// The next record of a run; the run breaks ties.
type Head = Reverse<(Vec<u8>, usize, Vec<u8>)>;

impl Sorter {
    /// `folder` takes the runs when there are more records than memory may hold.
    pub fn new(folder: &Path) -> Self {
        let folder = folder.to_owned();
        Sorter { folder, arena: Vec::new(), places: Vec::new(), file: None, runs: Vec::new(), run_bytes: RUN_BYTES }
    }

    #[cfg(test)]
    fn with_run_bytes(mut self, bytes: usize) -> Self {
        self.run_bytes = bytes;
        self
    }

    pub fn push(&mut self, key: &[u8], value: &[u8]) {
        let start = self.arena.len();
        self.arena.extend_from_slice(key);
        self.arena.extend_from_slice(value);
        self.places.push(Place { start, key_bytes: key.len(), end: self.arena.len() });
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Takes the records out; what is left is empty.
    fn take(&mut self) -> Sorter {
        let empty = Sorter::new(&self.folder);
        std::mem::replace(self, empty)
    }

    /// [`Sorter::spill`] on the blocking pool.
    pub async fn spill_in_background(&mut self) -> Result<(), BackupError> {
        let (mut taken, folder) = (self.take(), self.folder.clone());
        let spilled = tokio::task::spawn_blocking(move || taken.spill().map(|()| taken)).await;
        let spilled = spilled.map_err(|_| BackupError::Cancelled)?;
        *self = spilled.map_err(|source| BackupError::Scratch { folder, source })?;
        Ok(())
    }

    /// Time to spill.
    pub fn is_full(&self) -> bool {
        self.arena.len() + self.places.len() * size_of::<Place>() >= self.run_bytes
    }

    /// Writes what is in memory as a sorted run. Blocks.
    pub fn spill(&mut self) -> io::Result<()> {
        self.sort();
        let file = match &self.file {
            Some(file) => file,
            None => self.file.insert(nameless_file(&self.folder)?),
        };
        let mut end = self.runs.last().copied().unwrap_or(0);
        let mut out = BufWriter::with_capacity(256 << 10, file);
        for place in &self.places {
            let record = self.arena.get(place.start..place.end).unwrap_or_default();
            let lengths = [u32_of(place.key_bytes)?, u32_of(record.len())?];
            for length in lengths {
                out.write_all(&length.to_le_bytes())?;
            }
            out.write_all(record)?;
            end += 8 + record.len() as u64;
        }
        out.flush()?;
        drop(out);
        self.runs.push(end);
        self.arena.clear();
        self.places.clear();
        Ok(())
    }

    /// All records by rising key; equal keys in the order of their runs. Blocks, also while it is read.
    pub fn merge(mut self) -> io::Result<Merge> {
        if self.runs.is_empty() {
            self.sort();
            return Ok(Merge::Memory { arena: self.arena, places: self.places.into_iter() });
        }
        self.spill()?;
        let Some(file) = self.file.take().map(Arc::new) else { return Err(io::ErrorKind::NotFound.into()) };
        let buffer_bytes = (MERGE_BYTES / self.runs.len()).clamp(4 << 10, 256 << 10);
        let mut runs = Vec::with_capacity(self.runs.len());
        let mut heap = BinaryHeap::new();
        let mut start = 0;
        for (index, end) in self.runs.iter().enumerate() {
            let mut run =
                RunReader { file: file.clone(), at: start, end: *end, buffer: Vec::new(), used: 0, buffer_bytes };
            start = *end;
            if let Some((key, value)) = run.next()? {
                heap.push(Reverse((key, index, value)));
            }
            runs.push(run);
        }
        Ok(Merge::Files { runs, heap })
    }

    fn sort(&mut self) {
        let arena = &self.arena;
        let key = |p: &Place| arena.get(p.start..p.start + p.key_bytes).unwrap_or_default();
        self.places.sort_by(|a, b| key(a).cmp(key(b)));
    }
}

/// The records in order.
pub enum Merge {
    Memory { arena: Vec<u8>, places: std::vec::IntoIter<Place> },
    Files { runs: Vec<RunReader>, heap: BinaryHeap<Head> },
}

impl Merge {
    fn pop(&mut self) -> io::Result<Option<Record>> {
        match self {
            Merge::Memory { arena, places } => Ok(places.next().map(|p| {
                let record = arena.get(p.start..p.end).unwrap_or_default();
                let (key, value) = record.split_at_checked(p.key_bytes).unwrap_or_default();
                (key.to_vec(), value.to_vec())
            })),
            Merge::Files { runs, heap } => {
                let Some(Reverse((key, index, value))) = heap.pop() else { return Ok(None) };
                if let Some((next_key, next_value)) = runs.get_mut(index).map(RunReader::next).transpose()?.flatten() {
                    heap.push(Reverse((next_key, index, next_value)));
                }
                Ok(Some((key, value)))
            }
        }
    }
}

impl Iterator for Merge {
    type Item = io::Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        self.pop().transpose()
    }
}

/// Reads one run.
pub struct RunReader {
    file: Arc<File>,
    at: u64,
    end: u64,
    buffer: Vec<u8>,
    used: usize,
    buffer_bytes: usize,
}

impl RunReader {
    fn next(&mut self) -> io::Result<Option<Record>> {
        if self.at >= self.end && self.used >= self.buffer.len() {
            return Ok(None);
        }
        let length = |this: &mut Self| -> io::Result<usize> {
            let bytes = this.take(4)?.first_chunk::<4>().copied().ok_or(io::ErrorKind::UnexpectedEof)?;
            Ok(u32::from_le_bytes(bytes) as usize)
        };
        let (key_bytes, record_bytes) = (length(self)?, length(self)?);
        let record = self.take(record_bytes)?;
        let (key, value) = record.split_at_checked(key_bytes).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Some((key.to_vec(), value.to_vec())))
    }

    fn take(&mut self, bytes: usize) -> io::Result<&[u8]> {
        if self.buffer.len() - self.used < bytes {
            self.buffer.drain(..self.used);
            self.used = 0;
            let have = self.buffer.len();
            let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
            let more = self.buffer_bytes.max(bytes - have).min(left);
            self.buffer.resize(have + more, 0);
            self.file.read_exact_at(self.buffer.get_mut(have..).unwrap_or_default(), self.at)?;
            self.at += more as u64;
        }
        let taken = self.buffer.get(self.used..self.used + bytes).ok_or(io::ErrorKind::UnexpectedEof)?;
        self.used += bytes;
        Ok(taken)
    }
}

fn u32_of(length: usize) -> io::Result<u32> {
    u32::try_from(length).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn nameless_file(folder: &Path) -> io::Result<File> {
    let path = folder.join(format!(".pgrecall-{:016x}", rand::random::<u64>()));
    let file = OpenOptions::new().read(true).append(true).create_new(true).mode(0o600).open(&path)?;
    std::fs::remove_file(&path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sorted(records: &[(Vec<u8>, Vec<u8>)], run_bytes: usize) -> Vec<Record> {
        let folder = tempfile::tempdir().expect("temporary directory");
        let mut sorter = Sorter::new(folder.path()).with_run_bytes(run_bytes);
        for (key, value) in records {
            sorter.push(key, value);
            if sorter.is_full() {
                sorter.spill().expect("spill");
            }
        }
        let merged = sorter.merge().expect("merge").collect::<io::Result<_>>().expect("read");
        assert_eq!(std::fs::read_dir(folder.path()).expect("folder").count(), 0, "nothing has a name");
        merged
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn records_come_back_sorted_whatever_fits_in_memory(
            records in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..20), prop::collection::vec(any::<u8>(), 0..300)), 0..200),
            run_bytes in 1usize..4000,
        ) {
            let mut expected = records.clone();
            expected.sort_by(|a, b| a.0.cmp(&b.0));
            prop_assert_eq!(sorted(&records, run_bytes), expected.clone());
            prop_assert_eq!(sorted(&records, usize::MAX), expected);
        }
    }
}
