//! The repository against itself: is everything there that should be, whole, and what it says it is?
//!
//! Without reading data: every commit object is read; every pack that a backup names must exist with its size and a header
//! that agrees; every WAL object's header must agree with its name (which carries the content's hash); the WAL must be
//! without holes from the oldest backup on, along every timeline. With data: everything is read and hashed, in the order of
//! keys, so that it can go on where it was broken off.
//!
//! What is wrong is collected, not returned at the first; only a store that cannot be reached ends the inspection.

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::StreamExt;
use serde::Serialize;
use tokio::sync::Semaphore;

use super::backup_object::{BackupCommit, PackEntry};
use super::catalogue::{self, WalListing, WalObject};
use super::codec::{CodecError, HEADER_BYTES, Header, Kind};
use super::format::{Repository, RepositoryError};
use super::identity::{self, KnownIncarnation};
use super::layout::{self, BackupMark, ContentHash, Incarnation, Key, prefix};
use super::tables::TableReader;
use super::wal_object;

mod continuity;

/// Small requests in flight.
const HEADERS_AT_ONCE: usize = 16;
/// Objects read at a time, and the memory that they may take.
const READS_AT_ONCE: usize = 4;
const BUDGET_MIB: usize = 128;
/// More findings than this are counted, not kept.
const FINDINGS_MAX: usize = 1000;

/// What to do beyond looking at names, sizes and headers.
#[derive(Debug, Clone, Default)]
pub struct InspectSettings {
    /// Read and hash about so many of a hundred objects; 0 none, 100 all.
    pub read_percent: u8,
    /// Which objects a partial reading takes; another number takes others.
    pub sample: u32,
    /// Go on after this key, which an earlier, broken off reading reported.
    pub after: Option<String>,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Known and recorded, such as a gap.
    Note,
    /// Some restores will not work.
    Problem,
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    /// The object, or the place where one is missing.
    pub object: String,
    pub what: String,
}

/// How far an inspection is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct InspectProgress {
    pub objects: u64,
    pub objects_total: u64,
    pub bytes: u64,
    pub bytes_total: u64,
    /// All objects up to this key have been read: what [`InspectSettings::after`] takes.
    pub after: Option<String>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    pub backups: u64,
    pub wal_objects: u64,
    pub packs: u64,
    /// Sizes by the listing.
    pub stored_bytes: u64,
    pub read: InspectProgress,
    pub findings: Vec<Finding>,
    /// Findings beyond those kept.
    pub more_findings: u64,
}

impl Report {
    pub fn is_sound(&self) -> bool {
        self.more_findings == 0 && self.findings.iter().all(|f| f.severity == Severity::Note)
    }

    fn add(&mut self, severity: Severity, object: impl Into<String>, what: impl Into<String>) {
        if self.findings.len() >= FINDINGS_MAX {
            self.more_findings += 1;
            return;
        }
        self.findings.push(Finding { severity, object: object.into(), what: what.into() });
    }

    /// Keeps what says something about the repository; returns what says something about the store.
    fn note<T>(&mut self, key: &str, result: Result<T, RepositoryError>) -> Result<Option<T>, RepositoryError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(e) if e.is_corrupt() || e.is_not_found() => {
                self.add(Severity::Problem, key, e.to_string());
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

/// An object to be read with its data.
#[derive(Debug, Clone)]
enum Readable {
    Wal(WalObject),
    History(Key, ContentHash),
    Pack(Key, PackEntry),
    Fact(Key, Kind),
    Tables(Incarnation, Box<BackupCommit>),
}

/// Inspects every incarnation of the environment.
///
/// # Errors
/// When the store cannot be reached. `progress` is called after each object that was read.
pub async fn inspect(
    repository: &Repository,
    settings: &InspectSettings,
    mut progress: impl FnMut(&InspectProgress),
) -> Result<Report, RepositoryError> {
    let mut report = Report::default();
    let mut readable = BTreeMap::new();
    let names = identity::names(repository).await?;
    for incarnation in names.known {
        let key = Key::identity(incarnation);
        if let Some(known) = report.note(key.as_str(), identity::load(repository, incarnation).await)? {
            Inspection { repository, known: &known }.look(&mut report, &mut readable).await?;
        }
    }
    for incarnation in names.lost {
        let key = Key::identity(incarnation);
        report.add(Severity::Problem, key.as_str(), "it is missing: nothing of its incarnation is found without it");
    }
    for folder in RECORDS {
        add_facts(repository, folder, &mut report, &mut readable).await?;
    }
    if settings.read_percent > 0 {
        read_data(repository, settings, readable, &mut report, &mut progress).await?;
    }
    Ok(report)
}

/// One incarnation.
struct Inspection<'a> {
    repository: &'a Repository,
    known: &'a KnownIncarnation,
}

impl Inspection<'_> {
    async fn look(
        &self,
        report: &mut Report,
        readable: &mut BTreeMap<String, (u64, Readable)>,
    ) -> Result<(), RepositoryError> {
        let incarnation = self.known.incarnation;
        let backups = self.backups(report).await?;
        let wal = catalogue::list_wal(self.repository, incarnation, self.known.identity.segment_size).await?;
        self.packs(&backups, report, readable).await?;
        self.wal_headers(&wal, report).await?;
        self.continuity(&backups, &wal, report).await?;
        for commit in backups {
            let key = Key::backup(incarnation, &commit.id, &BackupMark::Commit);
            let bytes = commit.tables.tables.iter().map(|t| u64::from(t.frame.stored_bytes)).sum();
            readable.insert(key.as_str().to_owned(), (bytes, Readable::Tables(incarnation, Box::new(commit))));
        }
        for history in &wal.histories {
            let read = Readable::History(history.key.clone(), history.hash);
            readable.insert(history.key.as_str().to_owned(), (0, read));
        }
        for object in wal.ranges {
            readable.insert(object.key.as_str().to_owned(), (object.bytes, Readable::Wal(object)));
        }
        self.facts(report, readable).await
    }

    async fn backups(&self, report: &mut Report) -> Result<Vec<BackupCommit>, RepositoryError> {
        let mut backups = Vec::new();
        for marks in catalogue::list_backup_marks(self.repository, self.known.incarnation).await? {
            if !marks.exists() {
                if !marks.marks.contains(&BackupMark::Dropped) {
                    let what =
                        "it was begun and has no commit object: it is being taken, was broken off, or has lost it";
                    report.add(Severity::Note, format!("backup {}", marks.id), what);
                }
                continue;
            }
            let loaded = catalogue::load_backup(self.repository, self.known.incarnation, &marks.id).await;
            backups.extend(report.note(&format!("backup {}", marks.id), loaded)?);
        }
        report.backups += backups.len() as u64;
        Ok(backups)
    }

    /// Every pack that a backup wrote: there, of its size, with a header that says the same.
    async fn packs(
        &self,
        backups: &[BackupCommit],
        report: &mut Report,
        readable: &mut BTreeMap<String, (u64, Readable)>,
    ) -> Result<(), RepositoryError> {
        let incarnation = self.known.incarnation;
        let listed = self.repository.store().list(&prefix::packs(incarnation)).await?;
        let sizes: BTreeMap<&str, u64> = listed.iter().map(|o| (o.key.as_str(), o.bytes)).collect();
        let mut present = Vec::new();
        for entry in backups.iter().flat_map(|b| &b.packs) {
            let key = Key::pack(incarnation, &entry.pack.backup, entry.pack.number);
            // A listing may be stale: absence is asked for by name.
            let size = match sizes.get(key.as_str()) {
                Some(bytes) => Some(*bytes),
                None => self.repository.store().head(&key).await?.map(|o| o.bytes),
            };
            match size {
                None => report.add(
                    Severity::Problem,
                    key.as_str(),
                    format!("it is missing; {} needs it", entry.pack.backup),
                ),
                Some(bytes) if bytes != entry.bytes => {
                    report.add(
                        Severity::Problem,
                        key.as_str(),
                        format!("it has {bytes} bytes instead of {}", entry.bytes),
                    );
                }
                Some(bytes) => {
                    report.packs += 1;
                    report.stored_bytes += bytes;
                    present.push((key, entry.clone()));
                }
            }
        }
        let checks = futures::stream::iter(present).map(|(key, entry)| async move {
            let fits = |header: &Header| header.salt == entry.pack.salt && header.digest == entry.digest;
            let header = self.header(&key, Kind::Pack, entry.bytes, fits).await;
            (key, entry, header)
        });
        let mut checks = checks.buffer_unordered(HEADERS_AT_ONCE);
        while let Some((key, entry, header)) = checks.next().await {
            if let Some(header) = report.note(key.as_str(), header)? {
                if header.salt != entry.pack.salt || header.digest != entry.digest {
                    report.add(Severity::Problem, key.as_str(), "it is another pack than its backup names");
                }
                readable.insert(key.as_str().to_owned(), (entry.bytes, Readable::Pack(key, entry)));
            }
        }
        Ok(())
    }

    async fn wal_headers(&self, wal: &WalListing, report: &mut Report) -> Result<(), RepositoryError> {
        let checks = futures::stream::iter(wal.ranges.iter().cloned()).map(|object| async move {
            let fits = |header: &Header| tells_of(header, &object);
            let header = self.header(&object.key, Kind::Wal, object.bytes, fits).await;
            (object, header)
        });
        let mut checks = checks.buffer_unordered(HEADERS_AT_ONCE);
        while let Some((object, header)) = checks.next().await {
            report.wal_objects += 1;
            report.stored_bytes += object.bytes;
            let gone = header.as_ref().is_err_and(RepositoryError::is_not_found);
            if gone {
                // A part that was replaced by a whole between listing and reading; a hole would be found as such.
                continue;
            }
            let Some(header) = report.note(object.key.as_str(), header)? else { continue };
            if !tells_of(&header, &object) {
                report.add(Severity::Problem, object.key.as_str(), "its header tells of other content than its name");
            }
        }
        Ok(())
    }

    /// Reads and checks the header of an object of `stored` bytes; one that is damaged, or another than it should be, is
    /// read once more before it counts.
    async fn header(
        &self,
        key: &Key,
        kind: Kind,
        stored: u64,
        fits: impl Fn(&Header) -> bool,
    ) -> Result<Header, RepositoryError> {
        match self.read_header(key, kind, stored).await {
            Err(e) if e.is_corrupt() => self.read_header(key, kind, stored).await,
            Ok(header) if !fits(&header) => self.read_header(key, kind, stored).await,
            read => read,
        }
    }

    async fn read_header(&self, key: &Key, kind: Kind, stored: u64) -> Result<Header, RepositoryError> {
        let wrong = |source| RepositoryError::Corrupt { key: key.as_str().to_owned(), source };
        if stored < HEADER_BYTES as u64 {
            return Err(wrong(CodecError::NoHeader));
        }
        let bytes = self.repository.store().get_range(key, 0..HEADER_BYTES as u64).await?;
        let header = Header::decode(&bytes).map_err(wrong)?;
        if header.kind != kind as u8 {
            let (found, wanted) = (char::from(header.kind), char::from(kind as u8));
            return Err(wrong(CodecError::OtherKind { found, wanted }));
        }
        if header.encrypted != self.repository.codec().is_encrypted() {
            return Err(wrong(if header.encrypted { CodecError::KeyMissing } else { CodecError::NotEncrypted }));
        }
        let body = stored.saturating_sub(HEADER_BYTES as u64);
        if header.body_bytes != body {
            return Err(wrong(CodecError::Length { found: body, declared: header.body_bytes }));
        }
        Ok(header)
    }

    /// Small objects that are read whole: claims, gaps, intents. Indexes are derived and may be damaged.
    async fn facts(
        &self,
        report: &mut Report,
        readable: &mut BTreeMap<String, (u64, Readable)>,
    ) -> Result<(), RepositoryError> {
        let incarnation = self.known.incarnation;
        let folders: [(String, Kind, IsNamed); 4] = [
            (prefix::coverage(incarnation), Kind::Coverage, |key| layout::parse_coverage(key).is_some()),
            (prefix::gaps(incarnation), Kind::Gap, |key| layout::parse_gap(key).is_some()),
            (prefix::removed(incarnation), Kind::Removed, |key| layout::parse_removed(key).is_some()),
            (prefix::backups(incarnation), Kind::Intent, |key| key.name().ends_with(".intent")),
        ];
        for (folder, kind, is_named) in folders {
            add_facts(self.repository, (&folder, kind, is_named), report, readable).await?;
        }
        Ok(())
    }
}

/// Whether a key has the form of the facts of its folder.
type IsNamed = fn(&Key) -> bool;

/// The facts about the environment as a whole.
const RECORDS: [(&str, Kind, IsNamed); 4] = [
    (prefix::JOBS, Kind::Job, |key| layout::parse_job(key).is_some()),
    (prefix::AUDIT, Kind::Act, |key| layout::parse_audit(key).is_some()),
    (prefix::INCIDENTS, Kind::Incident, |key| layout::parse_incident(key).is_some()),
    (prefix::PINS, Kind::Pin, |key| layout::parse_pin(key).is_some()),
];

async fn add_facts(
    repository: &Repository,
    (folder, kind, is_named): (&str, Kind, IsNamed),
    report: &mut Report,
    readable: &mut BTreeMap<String, (u64, Readable)>,
) -> Result<(), RepositoryError> {
    for object in repository.store().list(folder).await?.into_iter().filter(|object| is_named(&object.key)) {
        report.stored_bytes += object.bytes;
        let fact = Readable::Fact(object.key.clone(), kind);
        readable.insert(object.key.as_str().to_owned(), (object.bytes, fact));
    }
    Ok(())
}

/// Whether a header says what the name says.
fn tells_of(header: &Header, object: &WalObject) -> bool {
    let length = object.range.to.saturating_sub(object.range.from);
    header.content_bytes == length && ContentHash::of(&header.digest) == object.range.hash
}

/// Reads objects in the order of their keys.
async fn read_data(
    repository: &Repository,
    settings: &InspectSettings,
    readable: BTreeMap<String, (u64, Readable)>,
    report: &mut Report,
    progress: &mut impl FnMut(&InspectProgress),
) -> Result<(), RepositoryError> {
    let after = settings.after.clone().unwrap_or_default();
    let chosen: Vec<_> = readable
        .into_iter()
        .filter(|(key, _)| *key > after && in_sample(key, settings))
        .map(|(key, (bytes, object))| (key, bytes, object))
        .collect();
    report.read.objects_total = chosen.len() as u64;
    report.read.bytes_total = chosen.iter().map(|(_, bytes, _)| bytes).sum();
    let budget = Arc::new(Semaphore::new(BUDGET_MIB));
    let reads = futures::stream::iter(chosen).map(|(key, bytes, object)| {
        let budget = budget.clone();
        async move {
            let cost = u32::try_from((bytes.saturating_mul(3) >> 20).clamp(1, BUDGET_MIB as u64)).unwrap_or(1);
            let _permit = budget.acquire_many(cost).await;
            (key, bytes, read_one(repository, object).await)
        }
    });
    let mut reads = reads.buffered(READS_AT_ONCE);
    while let Some((key, bytes, result)) = reads.next().await {
        report.note(&key, result)?;
        report.read.objects += 1;
        report.read.bytes += bytes;
        report.read.after = Some(key);
        progress(&report.read);
    }
    Ok(())
}

fn in_sample(key: &str, settings: &InspectSettings) -> bool {
    settings.read_percent >= 100
        || crc32c::crc32c_append(settings.sample, key.as_bytes()) % 100 < u32::from(settings.read_percent)
}

async fn read_one(repository: &Repository, object: Readable) -> Result<(), RepositoryError> {
    match object {
        // A part may have been replaced by a whole since it was listed.
        Readable::Wal(object) => match wal_object::read_range(repository, &object.key, &object.range).await {
            Err(e) if e.is_not_found() && !object.range.whole => Ok(()),
            read => read.map(drop),
        },
        Readable::History(key, hash) => wal_object::load_history(repository, &key, hash).await.map(drop),
        Readable::Fact(key, kind) => match repository.read_fact::<serde_json::Value>(&key, kind).await {
            Err(e) if e.is_not_found() => Ok(()),
            read => read.map(drop),
        },
        Readable::Pack(key, entry) => read_pack(repository, &key, &entry).await,
        Readable::Tables(incarnation, commit) => read_tables(repository, incarnation, *commit).await,
    }
}

/// The digest in a pack's header is that of its body as stored: it covers every frame.
async fn read_pack(repository: &Repository, key: &Key, entry: &PackEntry) -> Result<(), RepositoryError> {
    let mut again = true;
    loop {
        let bytes = repository.store().get(key, entry.bytes).await?;
        let (codec, digest) = (repository.codec().clone(), entry.digest);
        let checked = tokio::task::spawn_blocking(move || {
            let (header, body) = codec.open_header(Kind::Pack, &bytes)?;
            let right = header.digest == digest && codec.digest(body) == digest;
            if right { Ok(()) } else { Err(CodecError::Digest) }
        });
        match checked.await.map_err(|_| RepositoryError::Stopping)? {
            Ok(()) => return Ok(()),
            Err(_) if again => again = false,
            Err(source) => return Err(RepositoryError::Corrupt { key: key.as_str().to_owned(), source }),
        }
    }
}

/// Walks the file tables and the extents of every file: all of it is understood, and every address leads into a pack.
async fn read_tables(
    repository: &Repository,
    incarnation: Incarnation,
    commit: BackupCommit,
) -> Result<(), RepositoryError> {
    let own: BTreeMap<_, u64> = commit.packs.iter().map(|p| (p.pack.clone(), p.bytes)).collect();
    let mut older: BTreeMap<_, u64> = BTreeMap::new();
    let mut reader = TableReader::new(repository, incarnation, commit.tables);
    while let Some(file) = reader.next().await? {
        let mut extents = reader.extents(&file);
        while let Some(some) = extents.next().await? {
            for extent in some {
                let key = Key::pack(incarnation, &extent.pack.backup, extent.pack.number);
                let known = own.get(extent.pack.as_ref()).or_else(|| older.get(extent.pack.as_ref())).copied();
                let bytes = match known {
                    Some(bytes) => bytes,
                    None => {
                        // A pack of an earlier backup.
                        let missing =
                            || super::store::StoreError::NotFound { action: "ask for", key: key.as_str().into() };
                        let bytes = repository.store().head(&key).await?.ok_or_else(missing)?.bytes;
                        older.insert(extent.pack.as_ref().clone(), bytes);
                        bytes
                    }
                };
                let frame = extent.extent.frame;
                if frame.offset.saturating_add(frame.stored_bytes.into()) > bytes {
                    let reason = format!("{} names bytes past its end", file.entry.path);
                    return Err(RepositoryError::Malformed { key: key.as_str().to_owned(), reason });
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
