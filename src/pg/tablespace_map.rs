//! `tablespace_map`: where the tablespaces of a base backup lie. The server makes the links in `pg_tblspc` from it when it
//! starts, so writing other paths into it moves tablespaces.
//!
//! Source: `do_pg_backup_start` (writes a backslash before newline, carriage return and backslash) and
//! `read_tablespace_map`, 14–18. Paths are bytes, not text.

/// The lines of the file in their order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TablespaceMap {
    pub entries: Vec<TablespaceEntry>,
}

/// A tablespace and its directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablespaceEntry {
    pub oid: u32,
    /// Absolute; relative (`pg_tblspc/<oid>`) for a tablespace inside the data directory.
    pub path: Vec<u8>,
}

/// A line is not an oid, a space and a path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {0} of tablespace_map is not an oid, a space and a path")]
pub struct ParseTablespaceMapError(pub usize);

impl TablespaceMap {
    /// # Errors
    /// When a line has another form, or the last line has no end.
    pub fn parse(bytes: &[u8]) -> Result<TablespaceMap, ParseTablespaceMapError> {
        let mut entries = Vec::new();
        let mut line = Vec::new();
        let mut escaped = false;
        for byte in bytes {
            match byte {
                b'\\' if !escaped => escaped = true,
                b'\n' | b'\r' if !escaped => {
                    if !line.is_empty() {
                        entries.push(entry(&line).ok_or(ParseTablespaceMapError(entries.len() + 1))?);
                    }
                    line.clear();
                }
                _ => {
                    escaped = false;
                    line.push(*byte);
                }
            }
        }
        let complete = line.is_empty() && !escaped;
        if complete { Ok(TablespaceMap { entries }) } else { Err(ParseTablespaceMapError(entries.len() + 1)) }
    }

    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for entry in &self.entries {
            out.extend_from_slice(entry.oid.to_string().as_bytes());
            out.push(b' ');
            for byte in &entry.path {
                if matches!(byte, b'\n' | b'\r' | b'\\') {
                    out.push(b'\\');
                }
                out.push(*byte);
            }
            out.push(b'\n');
        }
        out
    }
}

fn entry(line: &[u8]) -> Option<TablespaceEntry> {
    let space = line.iter().position(|byte| *byte == b' ')?;
    let (oid, rest) = line.split_at_checked(space)?;
    let oid = std::str::from_utf8(oid).ok()?;
    let path = rest.get(1..).filter(|path| !path.is_empty())?;
    let plain = oid.bytes().all(|b| b.is_ascii_digit());
    let oid = plain.then(|| oid.parse().ok()).flatten().filter(|oid| *oid != 0)?;
    Some(TablespaceEntry { oid, path: path.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_path_with_spaces_and_backslashes() {
        let map = TablespaceMap::parse(b"16384 /srv/fast disk/a\\\\b\n16385 /srv/two\n").expect("well formed");
        assert_eq!(map.entries[0].path, b"/srv/fast disk/a\\b");
        assert_eq!(map.entries[1].oid, 16385);
    }

    #[test]
    fn malformed_lines_are_refused() {
        for (bytes, line) in
            [(&b"16384\n"[..], 1), (b"16384 \n", 1), (b"x /a\n", 1), (b"1 /a\n0 /b\n", 2), (b"16384 /a", 1)]
        {
            assert_eq!(TablespaceMap::parse(bytes), Err(ParseTablespaceMapError(line)));
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(list in proptest::collection::vec((1u32.., proptest::collection::vec(1u8.., 1..40)), 0..5)) {
            let entries = list.into_iter().map(|(oid, path)| TablespaceEntry { oid, path }).collect();
            let map = TablespaceMap { entries };
            prop_assert_eq!(TablespaceMap::parse(&map.encode()), Ok(map));
        }
    }
}
