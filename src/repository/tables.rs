//! Reads the file tables of a backup one after the other: bounded memory whatever the number of files.
//!
//! A table is at most 1 MiB of JSON; the next one is read while the caller works on the present one. Extent tables of
//! large files are read one by one too. Every address is checked before anybody follows it: extents lie within their
//! file and within their frame, in rising order without overlap.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::backup_object::{Extent, FileEntry, FileKind, Table, TablePacks};
use super::format::{Repository, RepositoryError};
use super::layout::{Incarnation, Key};
use super::pack::{FRAME_BYTES_MAX, FrameRef, PackRef, read_frame};

/// Tables read ahead; each costs a few MiB once decoded.
const TABLES_AHEAD: usize = 1;

/// The packs that a table's addresses index.
pub type Packs = Arc<[Arc<PackRef>]>;

/// A file with what its addresses mean.
#[derive(Debug, Clone)]
pub struct TableFile {
    pub entry: FileEntry,
    pub packs: Packs,
}

/// An extent with the pack that its frame lies in.
#[derive(Debug, Clone)]
pub struct FileExtent {
    pub extent: Extent,
    pub pack: Arc<PackRef>,
}

/// The files of a backup in the order of their paths.
pub struct TableReader {
    repository: Repository,
    incarnation: Incarnation,
    tables: mpsc::Receiver<Result<Table<FileEntry>, RepositoryError>>,
    packs: Packs,
    rows: std::vec::IntoIter<FileEntry>,
    last_path: String,
    files: u64,
    files_listed: u64,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for TableReader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl TableReader {
    /// Begins to read; dropping the reader ends it.
    pub fn new(repository: &Repository, incarnation: Incarnation, tables: TablePacks) -> Self {
        let (send, receive) = mpsc::channel(TABLES_AHEAD);
        let reader = repository.clone();
        let files_listed = tables.tables.iter().map(|t| t.files).sum();
        let task = tokio::spawn(async move {
            let packs = share(tables.packs);
            for table in tables.tables {
                let read = read_table::<FileEntry>(&reader, incarnation, &packs, &table.frame).await;
                let failed = read.is_err();
                if send.send(read).await.is_err() || failed {
                    return;
                }
            }
        });
        TableReader {
            repository: repository.clone(),
            incarnation,
            tables: receive,
            packs: share(Vec::new()),
            rows: Vec::new().into_iter(),
            last_path: String::new(),
            files: 0,
            files_listed,
            task,
        }
    }

    /// The next file, or `None` after the last.
    pub async fn next(&mut self) -> Result<Option<TableFile>, RepositoryError> {
        loop {
            if let Some(entry) = self.rows.next() {
                if entry.path <= self.last_path && !self.last_path.is_empty() {
                    let reason = format!("{:?} follows {:?}: the files are not sorted", entry.path, self.last_path);
                    return Err(RepositoryError::Malformed { key: "file table".into(), reason });
                }
                self.last_path.clone_from(&entry.path);
                self.files += 1;
                return Ok(Some(TableFile { entry, packs: self.packs.clone() }));
            }
            match self.tables.recv().await {
                None if self.files == self.files_listed => return Ok(None),
                None => {
                    let reason = format!("there are {} files, {} were announced", self.files, self.files_listed);
                    return Err(RepositoryError::Malformed { key: "file tables".into(), reason });
                }
                Some(table) => {
                    let table = table?;
                    self.packs = share(table.packs);
                    self.rows = table.rows.into_iter();
                }
            }
        }
    }

    /// The extents of a file, in pieces of bounded size.
    pub fn extents(&self, file: &TableFile) -> ExtentReader {
        ExtentReader {
            repository: self.repository.clone(),
            incarnation: self.incarnation,
            path: file.entry.path.clone(),
            packs: file.packs.clone(),
            inline: (!file.entry.extents.is_empty()).then(|| file.entry.extents.clone()),
            tables: file.entry.extent_tables.clone().into_iter(),
            file_bytes: if file.entry.kind == FileKind::File { file.entry.bytes } else { 0 },
            end: 0,
        }
    }
}

/// The extents of one file.
pub struct ExtentReader {
    repository: Repository,
    incarnation: Incarnation,
    path: String,
    packs: Packs,
    inline: Option<Vec<Extent>>,
    tables: std::vec::IntoIter<FrameRef>,
    file_bytes: u64,
    end: u64,
}

impl ExtentReader {
    /// The next extents, checked, or `None` after the last.
    pub async fn next(&mut self) -> Result<Option<Vec<FileExtent>>, RepositoryError> {
        if let Some(inline) = self.inline.take() {
            let packs = self.packs.clone();
            return self.check(inline, &packs).map(Some);
        }
        let Some(frame) = self.tables.next() else { return Ok(None) };
        let table = read_table::<Extent>(&self.repository, self.incarnation, &self.packs, &frame).await?;
        let packs = share(table.packs);
        self.check(table.rows, &packs).map(Some)
    }

    fn check(&mut self, extents: Vec<Extent>, packs: &Packs) -> Result<Vec<FileExtent>, RepositoryError> {
        let mut checked = Vec::with_capacity(extents.len());
        for extent in extents {
            let wrong = |reason: &str| {
                let reason = format!("extent at byte {} of {:?} {reason}", extent.offset, self.path);
                RepositoryError::Malformed { key: "file table".into(), reason }
            };
            let end = extent.offset.checked_add(extent.length.into()).ok_or_else(|| wrong("ends nowhere"))?;
            if extent.offset < self.end || end > self.file_bytes {
                return Err(wrong("overlaps another or lies past the end of the file"));
            }
            if u64::from(extent.frame_offset) + u64::from(extent.length) > u64::from(extent.frame.plain_bytes) {
                return Err(wrong("lies past the end of its frame"));
            }
            self.end = end;
            checked.push(FileExtent { extent, pack: resolve(packs, &extent.frame)? });
        }
        Ok(checked)
    }
}

fn share(packs: Vec<PackRef>) -> Packs {
    packs.into_iter().map(Arc::new).collect()
}

fn resolve(packs: &Packs, frame: &FrameRef) -> Result<Arc<PackRef>, RepositoryError> {
    let malformed = |reason| RepositoryError::Malformed { key: "file table".into(), reason };
    if frame.plain_bytes as usize > FRAME_BYTES_MAX {
        return Err(malformed(format!("a frame of {} bytes is addressed", frame.plain_bytes)));
    }
    let pack = packs.get(frame.pack as usize).cloned();
    pack.ok_or_else(|| malformed(format!("pack {} is addressed, {} are listed", frame.pack, packs.len())))
}

async fn read_table<T>(
    repository: &Repository,
    incarnation: Incarnation,
    packs: &Packs,
    frame: &FrameRef,
) -> Result<Table<T>, RepositoryError>
where
    T: serde::Serialize + for<'de> serde::Deserialize<'de> + Send + 'static,
{
    let pack = resolve(packs, frame)?;
    let bytes = read_frame(repository, incarnation, &pack, frame).await?;
    let decoded = tokio::task::spawn_blocking(move || Table::<T>::decode(&bytes)).await;
    decoded.map_err(|_| RepositoryError::Stopping)?.map_err(|e| RepositoryError::Malformed {
        key: Key::pack(incarnation, &pack.backup, pack.number).as_str().to_owned(),
        reason: format!("table at byte {}: {e}", frame.offset),
    })
}
