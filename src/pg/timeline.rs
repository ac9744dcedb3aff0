//! Timeline numbers and history files.
//!
//! Source: `src/backend/access/transam/timeline.c` (`readTimeLineHistory`), 14–18: lines
//! `parent TLI <white space> switch point <white space> reason`; blank lines and `#` comments are skipped; ids increase.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Lsn;

/// A timeline id (`TimeLineID`); 0 is never used by PostgreSQL. Names of files and objects carry it as eight hex digits
/// ([`TimelineId::hex`]), messages as a decimal number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TimelineId(pub u32);

impl TimelineId {
    /// Eight upper-case hex digits, as in file names.
    pub fn hex(self) -> String {
        format!("{:08X}", self.0)
    }

    /// Parses eight upper-case hex digits that are not all zero.
    pub fn from_hex(text: &str) -> Option<TimelineId> {
        let plain = text.len() == 8 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'));
        let id = plain.then(|| u32::from_str_radix(text, 16).ok()).flatten()?;
        (id != 0).then_some(TimelineId(id))
    }

    /// The name of this timeline's history file, `XXXXXXXX.history`.
    pub fn history_name(self) -> String {
        format!("{}.history", self.hex())
    }
}

impl fmt::Display for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for TimelineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// One line of a history file: `timeline` was left at `switch_lsn`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryEntry {
    pub timeline: TimelineId,
    /// First position that is *not* on `timeline` any more.
    pub switch_lsn: Lsn,
    pub reason: String,
}

/// The ancestors of a timeline, oldest first, as its history file names them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HistoryFile {
    pub entries: Vec<HistoryEntry>,
}

/// Why a text is not a history file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line} of the timeline history file is not `timeline<tab>LSN<tab>reason` in rising order: {text:?}")]
pub struct ParseHistoryError {
    pub line: usize,
    pub text: String,
}

impl FromStr for HistoryFile {
    type Err = ParseHistoryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut entries: Vec<HistoryEntry> = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let trimmed = line.trim_start();
            if trimmed.is_empty() || trimmed.starts_with('#') {
                continue;
            }
            let wrong = || ParseHistoryError { line: index + 1, text: line.chars().take(200).collect() };
            let mut fields = trimmed.splitn(3, char::is_whitespace);
            let timeline = fields.next().and_then(|t| t.parse().ok()).filter(|t| *t != 0).map(TimelineId);
            let switch_lsn = fields.next().and_then(|t| t.trim().parse().ok());
            let (Some(timeline), Some(switch_lsn)) = (timeline, switch_lsn) else { return Err(wrong()) };
            if entries.last().is_some_and(|last| last.timeline >= timeline) {
                return Err(wrong());
            }
            entries.push(HistoryEntry { timeline, switch_lsn, reason: fields.next().unwrap_or("").trim().to_owned() });
        }
        Ok(HistoryFile { entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn history_file_of_a_second_promotion() {
        let text =
            "1\t0/3000148\tno recovery target specified\n\n# note\n2\t0/5000000\tafter transaction 739 2026-11-23\n";
        let file: HistoryFile = text.parse().expect("well formed");
        assert_eq!(file.entries.len(), 2);
        assert_eq!(file.entries[1].timeline, TimelineId(2));
        assert_eq!(file.entries[1].switch_lsn, Lsn(0x500_0000));
        assert_eq!(file.entries[0].reason, "no recovery target specified");
    }

    #[test]
    fn malformed_lines_are_named() {
        for bad in ["x\t0/0\tr", "1\tzz\tr", "1", "0\t0/1\tr", "2\t0/1\tr\n1\t0/2\tr"] {
            assert!(bad.parse::<HistoryFile>().is_err(), "{bad}");
        }
    }

    #[test]
    fn hex_names() {
        assert_eq!(TimelineId(26).history_name(), "0000001A.history");
        assert_eq!(TimelineId::from_hex("0000001A"), Some(TimelineId(26)));
        assert_eq!(TimelineId::from_hex("00000000"), None);
        assert_eq!(TimelineId::from_hex("0000001a"), None);
    }
}
