//! Every object key, in one place: how names are made and how they are read back.
//!
//! A [`Key`] is relative to the environment's root. Names that this module does not know are `None` when parsed, never an
//! error: somebody else's file in the bucket, or a staging file of the local store, is passed over.

mod records;

use std::fmt;
use std::str::FromStr;

pub use records::{JobId, Ticket, parse_audit, parse_incident, parse_job};

use serde::{Deserialize, Serialize};

use crate::pg::{Lsn, SegmentName, SegmentNo, SegmentSize, SystemId, TimelineId, Timestamp};
use crate::util::digest::{Digest, hex, unhex};

/// An object holds at most this much WAL; larger segments stay ranges of this size.
pub const WAL_OBJECT_BYTES_MAX: u64 = 64 << 20;

/// The name of an object, relative to the environment's root; made only here.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

/// The first 16 bytes of a content digest, as names carry them.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentHash([u8; 16]);

/// One life of a cluster: `<ordinal>-<system identifier>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation {
    pub ordinal: u32,
    pub system_id: SystemId,
}

/// One life of a writer: `<ordinal>-<random>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation {
    pub ordinal: u32,
    pub random: u32,
}

/// The id of a backup: the time at which it began, then six random hex digits; never used twice.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BackupId(String);

/// A stored range of a segment: `[from, to)` are offsets in the segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalRange {
    pub timeline: TimelineId,
    pub segment: SegmentNo,
    pub from: u64,
    pub to: u64,
    pub hash: ContentHash,
    /// Stored under the segment's own name.
    pub whole: bool,
}

/// A pin: which backup of which incarnation is kept, and a random number that tells pins of one backup apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PinName {
    pub incarnation: Incarnation,
    pub backup: BackupId,
    pub random: u64,
}

/// What an object below `<incarnation>/wal/` is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalName {
    History { timeline: TimelineId, hash: ContentHash },
    Range(WalRange),
}

/// What an object below `<incarnation>/backups/` is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupMark {
    Intent,
    Commit,
    /// The mark of a remover: generation and its number.
    Leaving(String),
    Dropped,
}

/// What the name of a coverage object claims; see [`super::coverage`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CoverageName {
    pub timeline: TimelineId,
    pub server_time: Timestamp,
    pub lsn: Lsn,
    pub run: u32,
}

impl Key {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last component.
    pub fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }

    pub fn format() -> Key {
        Key("format.json".into())
    }

    pub fn identity(incarnation: Incarnation) -> Key {
        Key(format!("identity/{incarnation}"))
    }

    /// A wrap of data key `id`; the last part names the kind of wrap and the master key.
    pub fn data_key(id: u32, fingerprint: &str) -> Key {
        Key(format!("keys/{id:08x}.master-{fingerprint}"))
    }

    pub fn lease(generation: Generation) -> Key {
        Key(format!("lease/{generation}"))
    }

    /// A later fact about a generation, such as a connection that it opened.
    pub fn lease_fact(generation: Generation, number: u32) -> Key {
        Key(format!("lease/{generation}.{number:08}"))
    }

    pub fn history(incarnation: Incarnation, timeline: TimelineId, hash: ContentHash) -> Key {
        Key(format!("{incarnation}/wal/{}/history-{hash}", timeline.hex()))
    }

    /// The whole segment, or a range of it.
    pub fn wal(incarnation: Incarnation, range: &WalRange, size: SegmentSize) -> Key {
        let segment = SegmentName::new(range.timeline, range.segment, size);
        let (folder, hash) = (format!("{incarnation}/wal/{}", range.timeline.hex()), range.hash);
        if range.whole {
            Key(format!("{folder}/{segment}-{hash}.wal"))
        } else {
            Key(format!("{folder}/{segment}.parts/{:08X}-{:08X}-{hash}.part", range.from, range.to))
        }
    }

    pub fn index(incarnation: Incarnation, segment: SegmentName, version: u8, hash: ContentHash) -> Key {
        Key(format!("{incarnation}/index/{}/{segment}.{version}-{hash}", segment.timeline().hex()))
    }

    /// The indexes of `count` segments from this one on, in short.
    pub fn rollup(incarnation: Incarnation, first: SegmentName, count: u64, version: u8, hash: ContentHash) -> Key {
        Key(format!("{incarnation}/index/{}/{first}+{count}.{version}-{hash}", first.timeline().hex()))
    }

    pub fn coverage(incarnation: Incarnation, name: &CoverageName) -> Key {
        let micros = u64::try_from(name.server_time.0).unwrap_or(0);
        let (timeline, lsn, run) = (name.timeline.hex(), name.lsn.0, name.run);
        Key(format!("{incarnation}/coverage/{timeline}/{micros:016x}-{lsn:016x}-{run:08x}"))
    }

    /// A hole of WAL that is missing for good.
    pub fn gap(incarnation: Incarnation, timeline: TimelineId, start: Lsn, end: Lsn) -> Key {
        Key(format!("{incarnation}/gaps/{}/{:016x}-{:016x}", timeline.hex(), start.0, end.0))
    }

    /// That WAL of a timeline before `lsn` left the recovery window and is being removed, or was.
    pub fn removed(incarnation: Incarnation, timeline: TimelineId, lsn: Lsn) -> Key {
        Key(format!("{incarnation}/removed/{}/{:016x}", timeline.hex(), lsn.0))
    }

    pub fn pin(name: &PinName) -> Key {
        Key(format!("pins/{name}"))
    }

    pub fn pack(incarnation: Incarnation, backup: &BackupId, number: u32) -> Key {
        Key(format!("{incarnation}/packs/{backup}/{number:06}.pack"))
    }

    pub fn backup(incarnation: Incarnation, backup: &BackupId, mark: &BackupMark) -> Key {
        let suffix = match mark {
            BackupMark::Intent => "intent".to_owned(),
            BackupMark::Commit => "backup".to_owned(),
            BackupMark::Leaving(by) => format!("leaving-{by}"),
            BackupMark::Dropped => "dropped".to_owned(),
        };
        Key(format!("{incarnation}/backups/{backup}.{suffix}"))
    }

    /// A random name for probing what the store can do; removed afterwards.
    pub fn probe(random: u64) -> Key {
        Key(format!("probe/{random:016x}"))
    }

    /// A key that was written down, such as in a plan; `None` unless it is one of this incarnation's.
    pub fn of_incarnation(incarnation: Incarnation, text: &str) -> Option<Key> {
        let inside = text.strip_prefix(&incarnation.to_string())?.starts_with('/');
        (inside && !text.split('/').any(|part| matches!(part, "" | "." | ".."))).then(|| Key(text.to_owned()))
    }

    /// A key as a listing gave it: relative to the environment's root.
    pub(super) fn listed(name: String) -> Key {
        Key(name)
    }

    #[cfg(test)]
    pub fn for_tests(name: &str) -> Key {
        Key(name.into())
    }
}

/// Prefixes for listings.
pub mod prefix {
    use super::{Incarnation, TimelineId};

    pub const IDENTITY: &str = "identity";
    pub const KEYS: &str = "keys";
    pub const LEASE: &str = "lease";
    pub const PINS: &str = "pins";
    pub const PROBE: &str = "probe";
    pub const JOBS: &str = "jobs";
    pub const AUDIT: &str = "audit";
    pub const INCIDENTS: &str = "incidents";

    pub fn wal(incarnation: Incarnation) -> String {
        format!("{incarnation}/wal")
    }

    pub fn wal_timeline(incarnation: Incarnation, timeline: TimelineId) -> String {
        format!("{incarnation}/wal/{}", timeline.hex())
    }

    pub fn index(incarnation: Incarnation) -> String {
        format!("{incarnation}/index")
    }

    pub fn index_timeline(incarnation: Incarnation, timeline: TimelineId) -> String {
        format!("{incarnation}/index/{}", timeline.hex())
    }

    pub fn coverage(incarnation: Incarnation) -> String {
        format!("{incarnation}/coverage")
    }

    pub fn coverage_timeline(incarnation: Incarnation, timeline: TimelineId) -> String {
        format!("{incarnation}/coverage/{}", timeline.hex())
    }

    pub fn gaps(incarnation: Incarnation) -> String {
        format!("{incarnation}/gaps")
    }

    pub fn removed(incarnation: Incarnation) -> String {
        format!("{incarnation}/removed")
    }

    pub fn backups(incarnation: Incarnation) -> String {
        format!("{incarnation}/backups")
    }

    pub fn packs(incarnation: Incarnation) -> String {
        format!("{incarnation}/packs")
    }
}

/// Reads an index object's name: the segment, the index version and the content's hash.
pub fn parse_index(key: &Key) -> Option<(SegmentName, u8, ContentHash)> {
    let (segment, rest) = key.name().split_once('.')?;
    let (version, hash) = rest.split_once('-')?;
    Some((segment.parse().ok()?, version.parse().ok()?, hash.parse().ok()?))
}

/// Reads a roll-up's name: its first segment, how many there are, the index version and the content's hash.
pub fn parse_rollup(key: &Key) -> Option<(SegmentName, u64, u8, ContentHash)> {
    let (segments, rest) = key.name().split_once('.')?;
    let (first, count) = segments.split_once('+')?;
    let (version, hash) = rest.split_once('-')?;
    Some((first.parse().ok()?, count.parse().ok()?, version.parse().ok()?, hash.parse().ok()?))
}

/// Reads a coverage object's name.
pub fn parse_coverage(key: &Key) -> Option<CoverageName> {
    let (folder, name) = key.as_str().rsplit_once('/')?;
    let timeline = TimelineId::from_hex(folder.rsplit('/').next()?)?;
    let mut fields = name.split('-');
    let micros = u64::from_str_radix(fields.next()?, 16).ok()?;
    let lsn = Lsn(u64::from_str_radix(fields.next()?, 16).ok()?);
    let run = u32::from_str_radix(fields.next()?, 16).ok()?;
    let server_time = Timestamp(i64::try_from(micros).ok()?);
    fields.next().is_none().then_some(CoverageName { timeline, server_time, lsn, run })
}

/// Reads a gap object's name: timeline, start, end.
pub fn parse_gap(key: &Key) -> Option<(TimelineId, Lsn, Lsn)> {
    let (folder, name) = key.as_str().rsplit_once('/')?;
    let timeline = TimelineId::from_hex(folder.rsplit('/').next()?)?;
    let (start, end) = name.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok().map(Lsn);
    Some((timeline, number(start)?, number(end)?))
}

/// Reads the name of a record of removed WAL: timeline, and up to where.
pub fn parse_removed(key: &Key) -> Option<(TimelineId, Lsn)> {
    let (folder, name) = key.as_str().rsplit_once('/')?;
    let (above, timeline) = folder.rsplit_once('/')?;
    let lsn = u64::from_str_radix(name, 16).ok().filter(|_| above.ends_with("/removed"))?;
    Some((TimelineId::from_hex(timeline)?, Lsn(lsn)))
}

/// Reads the name of a pin.
pub fn parse_pin(key: &Key) -> Option<PinName> {
    key.as_str().strip_prefix("pins/")?.parse().ok()
}

/// Reads the name of a pack: its backup and its number.
pub fn parse_pack(key: &Key) -> Option<(BackupId, u32)> {
    let (folder, name) = key.as_str().rsplit_once('/')?;
    let (above, backup) = folder.rsplit_once('/')?;
    let number = name.strip_suffix(".pack").filter(|_| above.ends_with("/packs"))?;
    Some((backup.parse().ok()?, number.parse().ok()?))
}

/// Reads the name of an object below `backups/`.
pub fn parse_backup(key: &Key) -> Option<(BackupId, BackupMark)> {
    let (id, suffix) = key.name().split_once('.')?;
    let mark = match suffix {
        "intent" => BackupMark::Intent,
        "backup" => BackupMark::Commit,
        "dropped" => BackupMark::Dropped,
        _ => BackupMark::Leaving(suffix.strip_prefix("leaving-")?.to_owned()),
    };
    Some((BackupId::try_from(id.to_owned()).ok()?, mark))
}

/// Reads the name of a lease: the generation, and the number of the fact when it is a later one.
pub fn parse_lease(key: &Key) -> Option<(Generation, Option<u32>)> {
    match key.name().split_once('.') {
        Some((generation, number)) => Some((generation.parse().ok()?, Some(number.parse().ok()?))),
        None => Some((key.name().parse().ok()?, None)),
    }
}

/// Reads the name of a wrapped data key: id and fingerprint of the master key.
pub fn parse_data_key(key: &Key) -> Option<(u32, String)> {
    let (id, wrap) = key.name().split_once('.')?;
    Some((u32::from_str_radix(id, 16).ok()?, wrap.strip_prefix("master-")?.to_owned()))
}

/// Reads the name of an object below `wal/`.
pub fn parse_wal(key: &Key, size: SegmentSize) -> Option<WalName> {
    let (folder, name) = key.as_str().rsplit_once('/')?;
    let folder = folder.rsplit('/').next()?;
    if let Some(hash) = name.strip_prefix("history-") {
        return Some(WalName::History { timeline: TimelineId::from_hex(folder)?, hash: hash.parse().ok()? });
    }
    let (segment, from, to, hash, whole) = match folder.strip_suffix(".parts") {
        Some(segment) => {
            let mut fields = name.strip_suffix(".part")?.split('-');
            let mut offset = || fields.next().and_then(|t| u64::from_str_radix(t, 16).ok());
            let (from, to) = (offset()?, offset()?);
            (segment, from, to, fields.next()?, false)
        }
        None => {
            let (segment, hash) = name.strip_suffix(".wal")?.split_once('-')?;
            (segment, 0, size.bytes(), hash, true)
        }
    };
    let segment: SegmentName = segment.parse().ok()?;
    let (timeline, number, hash) = (segment.timeline(), segment.segment(size)?, hash.parse().ok()?);
    let sound = from < to && to <= size.bytes() && to - from <= WAL_OBJECT_BYTES_MAX.max(if whole { to } else { 0 });
    sound.then_some(WalName::Range(WalRange { timeline, segment: number, from, to, hash, whole }))
}

impl WalRange {
    pub fn start_lsn(&self, size: SegmentSize) -> Lsn {
        self.segment.start_lsn(size).saturating_add(self.from)
    }

    pub fn end_lsn(&self, size: SegmentSize) -> Lsn {
        self.segment.start_lsn(size).saturating_add(self.to)
    }
}

impl ContentHash {
    pub fn of(digest: &Digest) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(digest.0.first_chunk::<16>().expect("a digest has 32 bytes"));
        ContentHash(bytes)
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is not a name that this program makes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a name of this kind")]
pub struct NameError(pub String);

impl FromStr for ContentHash {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let lower = !text.bytes().any(|b| b.is_ascii_uppercase());
        let bytes = if lower { unhex(text) } else { None };
        let bytes = bytes.and_then(|b| <[u8; 16]>::try_from(b).ok());
        bytes.map(ContentHash).ok_or_else(|| NameError(text.to_owned()))
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04}-{}", self.ordinal, self.system_id)
    }
}

impl FromStr for Incarnation {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let parsed = text.split_once('-').and_then(|(ordinal, system_id)| {
            Some(Incarnation { ordinal: ordinal.parse().ok()?, system_id: system_id.parse().ok()? })
        });
        parsed.filter(|i| i.to_string() == text).ok_or_else(|| NameError(text.to_owned()))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08}-{:08x}", self.ordinal, self.random)
    }
}

impl FromStr for Generation {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let parsed = text.split_once('-').and_then(|(ordinal, random)| {
            Some(Generation { ordinal: ordinal.parse().ok()?, random: u32::from_str_radix(random, 16).ok()? })
        });
        parsed.filter(|g| g.to_string() == text).ok_or_else(|| NameError(text.to_owned()))
    }
}

impl fmt::Display for PinName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{:016x}", self.incarnation, self.backup, self.random)
    }
}

impl FromStr for PinName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let mut parts = text.split('/');
        let parsed = (|| {
            let (incarnation, backup) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            let random = u64::from_str_radix(parts.next()?, 16).ok()?;
            Some(PinName { incarnation, backup, random })
        })();
        parsed.filter(|name| name.to_string() == text).ok_or_else(|| NameError(text.to_owned()))
    }
}

impl BackupId {
    /// A new id; `random` must come from a random generator.
    pub fn new(start: Timestamp, random: u32) -> Self {
        let time = start.to_chrono().unwrap_or_default().format("%Y%m%dT%H%M%SZ");
        BackupId(format!("{time}-{:06x}", random & 0xFF_FFFF))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for BackupId {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let plain = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f' | b'T' | b'Z' | b'-');
        if (8..=40).contains(&text.len()) && text.bytes().all(plain) {
            Ok(BackupId(text))
        } else {
            Err(NameError(text))
        }
    }
}

impl FromStr for BackupId {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        text.to_owned().try_into()
    }
}

impl From<BackupId> for String {
    fn from(id: BackupId) -> String {
        id.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: SegmentSize = SegmentSize::MIB_16;

    fn incarnation() -> Incarnation {
        Incarnation { ordinal: 1, system_id: SystemId(7_012_345_678_901_234_567) }
    }

    fn hash() -> ContentHash {
        ContentHash::of(&Digest::sha256(b"x"))
    }

    fn check_wal(range: WalRange, expected: &str) {
        let key = Key::wal(incarnation(), &range, SIZE);
        assert_eq!(key.as_str(), expected);
        assert_eq!(parse_wal(&key, SIZE), Some(WalName::Range(range)));
    }

    #[test]
    fn wal_names() {
        let (timeline, segment, hash) = (TimelineId(2), SegmentNo(0x1FF), hash());
        let whole = WalRange { timeline, segment, from: 0, to: SIZE.bytes(), hash, whole: true };
        let folder = "0001-7012345678901234567/wal/00000002";
        let hex = "2d711642b726b04401627ca9fbac32f5";
        check_wal(whole.clone(), &format!("{folder}/0000000200000001000000FF-{hex}.wal"));
        let part = WalRange { from: 0x28, to: 0x1000, whole: false, ..whole };
        check_wal(part, &format!("{folder}/0000000200000001000000FF.parts/00000028-00001000-{hex}.part"));
        let history = Key::history(incarnation(), timeline, hash);
        assert_eq!(parse_wal(&history, SIZE), Some(WalName::History { timeline, hash }));
    }

    #[test]
    fn names_of_others_are_passed_over() {
        for name in [
            "",
            "a",
            "i/wal/00000001/x.wal",
            "i/wal/00000001/000000010000000000000001.wal#1",
            "i/wal/00000001/x.parts/1-2",
        ] {
            assert_eq!(parse_wal(&Key::for_tests(name), SIZE), None, "{name}");
        }
        let backwards = format!("i/wal/00000001/000000010000000000000001.parts/00000002-00000001-{}.part", hash());
        assert_eq!(parse_wal(&Key::for_tests(&backwards), SIZE), None);
    }

    #[test]
    fn other_names_come_back() {
        let id = BackupId::new(Timestamp::from_unix_seconds(1_795_000_000), 0xABCD_EF01);
        assert_eq!(id.as_str(), "20261118T110640Z-cdef01");
        for mark in [BackupMark::Intent, BackupMark::Commit, BackupMark::Dropped, BackupMark::Leaving("1-2".into())] {
            let key = Key::backup(incarnation(), &id, &mark);
            assert_eq!(parse_backup(&key), Some((id.clone(), mark)));
        }
        let generation = Generation { ordinal: 3, random: 0xBEEF };
        assert_eq!(parse_lease(&Key::lease(generation)), Some((generation, None)));
        assert_eq!(parse_lease(&Key::lease_fact(generation, 4)), Some((generation, Some(4))));
        let name = CoverageName { timeline: TimelineId(1), server_time: Timestamp(5), lsn: Lsn(6), run: 7 };
        assert_eq!(parse_coverage(&Key::coverage(incarnation(), &name)), Some(name));
        assert_eq!(
            parse_gap(&Key::gap(incarnation(), TimelineId(1), Lsn(1), Lsn(2))),
            Some((TimelineId(1), Lsn(1), Lsn(2)))
        );
        let removed = Key::removed(incarnation(), TimelineId(2), Lsn(0x300_0000));
        assert_eq!(parse_removed(&removed), Some((TimelineId(2), Lsn(0x300_0000))));
        let pin = PinName { incarnation: incarnation(), backup: id.clone(), random: 7 };
        assert_eq!(parse_pin(&Key::pin(&pin)), Some(pin));
        assert_eq!(parse_pack(&Key::pack(incarnation(), &id, 12)), Some((id, 12)));
        assert_eq!(parse_data_key(&Key::data_key(1, "abcd")), Some((1, "abcd".into())));
        assert_eq!(incarnation().to_string().parse(), Ok(incarnation()));
        assert!("1-2".parse::<Incarnation>().is_err());
        let segment = SegmentName::new(TimelineId(1), SegmentNo(1), SIZE);
        assert_eq!(parse_index(&Key::index(incarnation(), segment, 1, hash())), Some((segment, 1, hash())));
        let rollup = Key::rollup(incarnation(), segment, 256, 1, hash());
        assert_eq!((parse_rollup(&rollup), parse_index(&rollup)), (Some((segment, 256, 1, hash())), None));
        assert_eq!(parse_rollup(&Key::index(incarnation(), segment, 1, hash())), None);
    }
}
