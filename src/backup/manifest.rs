//! Reads the server's backup manifest as it passes, line by line.
//!
//! Limits: a line of at most [`LINE_BYTES_MAX`]. The manifest's own checksum is verified at its end.
//! Source: `src/backend/backup/backup_manifest.c` (14: `src/backend/replication`), 14–18; versions 1 and 2.

use serde::Deserialize;

use super::source::{SourceEnd, SourceError};
use crate::pg::{Lsn, TimelineId};
use crate::util::digest::{Hasher, unhex};

const LINE_BYTES_MAX: usize = 64 << 10;

/// What the manifest says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    pub path: String,
    pub bytes: u64,
    /// In hex; missing when the server was asked for none.
    pub checksum: Option<String>,
}

/// WAL that the manifest says is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestRange {
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    pub end_lsn: Lsn,
}

/// Takes pieces of a manifest.
pub struct ManifestReader {
    line: Vec<u8>,
    hasher: Hasher,
    ranges: Vec<ManifestRange>,
    complete: bool,
}

/// Every line that matters is an object of its own; its fields tell which.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Line {
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    size: Option<u64>,
    checksum: Option<String>,
    timeline: Option<u32>,
    #[serde(rename = "Start-LSN")]
    start_lsn: Option<Lsn>,
    #[serde(rename = "End-LSN")]
    end_lsn: Option<Lsn>,
}

impl ManifestRange {
    /// Where a backup that needs this range ends.
    pub fn end(&self) -> SourceEnd {
        SourceEnd { timeline: self.timeline, stop_lsn: self.end_lsn }
    }
}

impl Default for ManifestReader {
    fn default() -> Self {
        ManifestReader { line: Vec::new(), hasher: Hasher::sha256(), ranges: Vec::new(), complete: false }
    }
}

impl ManifestReader {
    /// Takes a piece; `file` gets each file whose line is complete.
    pub fn push(&mut self, mut piece: &[u8], mut file: impl FnMut(ManifestFile)) -> Result<(), SourceError> {
        while let Some(end) = piece.iter().position(|b| *b == b'\n') {
            let (line, rest) = piece.split_at(end + 1);
            self.line.extend_from_slice(line);
            self.take_line(&mut file)?;
            piece = rest;
        }
        self.line.extend_from_slice(piece);
        if self.line.len() > LINE_BYTES_MAX {
            return Err(malformed("a line of it is too long"));
        }
        Ok(())
    }

    /// The WAL ranges, when the manifest came whole.
    pub fn finish(self) -> Result<Vec<ManifestRange>, SourceError> {
        if self.complete { Ok(self.ranges) } else { Err(malformed("it is cut off")) }
    }

    fn take_line(&mut self, file: &mut impl FnMut(ManifestFile)) -> Result<(), SourceError> {
        let line = std::mem::take(&mut self.line);
        if let Some(rest) = line.strip_prefix(b"\"Manifest-Checksum\"") {
            let hex = rest.split(|b| *b == b'"').nth(1).and_then(|h| std::str::from_utf8(h).ok()).and_then(unhex);
            let hasher = std::mem::replace(&mut self.hasher, Hasher::sha256());
            if hex.as_deref() != Some(hasher.finish().0.as_slice()) {
                return Err(malformed("its own checksum is wrong"));
            }
            self.complete = true;
            return Ok(());
        }
        self.hasher.update(&line);
        let text = line.trim_ascii();
        let text = text.strip_suffix(b",").unwrap_or(text);
        // The opening line begins with a brace too, and does not end with one.
        if !(text.starts_with(b"{") && text.ends_with(b"}")) {
            return Ok(());
        }
        let parsed: Line = serde_json::from_slice(text).map_err(|e| malformed(&e.to_string()))?;
        match parsed {
            Line { path: Some(path), size: Some(bytes), checksum, .. } => file(ManifestFile { path, bytes, checksum }),
            Line { timeline: Some(timeline), start_lsn: Some(start_lsn), end_lsn: Some(end_lsn), .. } => {
                self.ranges.push(ManifestRange { timeline: TimelineId(timeline), start_lsn, end_lsn });
            }
            Line { encoded_path: Some(path), .. } => {
                let shown = unhex(&path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or(path);
                return Err(SourceError::NotUtf8 { path: shown });
            }
            _ => return Err(malformed("a line of it says nothing that is known")),
        }
        Ok(())
    }
}

fn malformed(reason: &str) -> SourceError {
    SourceError::Malformed(format!("the server's backup manifest is not understood: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::util::digest::Digest;

    fn manifest(body: &str) -> Vec<u8> {
        let checksum = Digest::sha256(body.as_bytes());
        format!("{body}\"Manifest-Checksum\": \"{checksum}\"}}\n").into_bytes()
    }

    const BODY: &str = "{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 7,\n\"Files\": [\n\
        { \"Path\": \"backup_label\", \"Size\": 225, \"Last-Modified\": \"2026-01-01 00:00:00 GMT\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"01020304\" },\n\
        { \"Path\": \"a\\\"b\", \"Size\": 0, \"Last-Modified\": \"x\" }\n],\n\"WAL-Ranges\": [\n\
        { \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }\n],\n";

    fn read(bytes: &[u8], piece: usize) -> Result<(Vec<ManifestFile>, Vec<ManifestRange>), SourceError> {
        let (mut reader, mut files) = (ManifestReader::default(), Vec::new());
        for piece in bytes.chunks(piece) {
            reader.push(piece, |f| files.push(f))?;
        }
        Ok((files, reader.finish()?))
    }

    #[test]
    fn files_and_ranges_come_out_whatever_the_pieces() {
        for piece in [1, 7, 10_000] {
            let (files, ranges) = read(&manifest(BODY), piece).expect("a sound manifest");
            assert_eq!(files.len(), 2);
            assert_eq!((files[0].bytes, files[0].checksum.as_deref()), (225, Some("01020304")));
            assert_eq!((files[1].path.as_str(), files[1].checksum.as_deref()), ("a\"b", None));
            let (start_lsn, end_lsn) = (Lsn(0x200_0028), Lsn(0x200_0100));
            assert_eq!(ranges, [ManifestRange { timeline: TimelineId(1), start_lsn, end_lsn }]);
        }
    }

    #[test]
    fn a_cut_or_changed_manifest_is_refused() {
        let whole = manifest(BODY);
        assert!(read(&whole[..whole.len() - 80], 100).is_err());
        let mut changed = whole.clone();
        changed[130] ^= 1;
        assert!(read(&changed, 100).is_err());
        assert!(read(&[b'x'; LINE_BYTES_MAX + 1], 1000).is_err());
    }
}
