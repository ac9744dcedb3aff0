use proptest::prelude::*;

use super::*;

/// A header as `tarCreateHeader` makes it.
fn header(name: &str, kind: u8, size: u64, link: &str) -> Vec<u8> {
    let mut block = vec![0u8; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000600 ");
    put(108, b"0000000 ");
    put(116, b"0000000 ");
    if size < 1 << 33 {
        put(124, format!("{size:011o} ").as_bytes());
    } else {
        put(128, &size.to_be_bytes());
        put(124, &[0x80]);
    }
    put(136, format!("{:011o} ", 1_700_000_000u64).as_bytes());
    put(156, &[kind]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    put(148, b"        ");
    let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

fn file(name: &str, content: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, b'0', content.len() as u64, "");
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// Reads an archive that arrives in pieces: names with their content.
fn read(archive: &[u8], piece: usize) -> Result<Vec<(String, Vec<u8>)>, TarError> {
    let mut reader = TarReader::default();
    let mut found: Vec<(String, Vec<u8>)> = Vec::new();
    for chunk in archive.chunks(piece) {
        reader.push(Bytes::copy_from_slice(chunk));
        while let Some(event) = reader.next()? {
            match event {
                TarEvent::Entry(entry) => found.push((entry.path.display().to_string(), Vec::new())),
                TarEvent::Data(data) => found.last_mut().expect("an entry first").1.extend_from_slice(&data),
                TarEvent::EndOfFile => {}
            }
        }
    }
    reader.finish().map(|()| found)
}

fn check_refused(block: Vec<u8>) {
    assert!(read(&block, 512).is_err(), "{:?}", block[..100].escape_ascii().to_string());
}

#[test]
fn files_directories_and_links_of_a_server() {
    let mut archive = file("backup_label", b"START WAL LOCATION");
    archive.extend(header("base/1/", b'5', 0, ""));
    archive.extend(file("base/1/empty", b""));
    archive.extend(header("pg_tblspc/16384/", b'2', 0, "/srv/ts"));
    archive.extend(file("global/pg_control", &[7; 8192]));
    for trailer in [0, 1024] {
        archive.resize(archive.len() + trailer, 0);
        let found = read(&archive, 1000).expect("well formed");
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["backup_label", "base/1", "base/1/empty", "pg_tblspc/16384", "global/pg_control"]);
        assert_eq!(found[4].1, [7; 8192]);
    }
}

#[test]
fn what_a_header_says() {
    let mut reader = TarReader::default();
    reader.push(header("pg_tblspc/1/", b'2', 0, "/srv/a b").into());
    let expected = TarEntry {
        path: "pg_tblspc/1".into(),
        kind: TarKind::Symlink { target: "/srv/a b".into() },
        mode: 0o600,
        mtime: 1_700_000_000,
    };
    assert_eq!(reader.next(), Ok(Some(TarEvent::Entry(expected))));
    reader.push(header("big", b'0', 20 << 30, "").into());
    let Ok(Some(TarEvent::Entry(entry))) = reader.next() else { panic!("an entry") };
    assert_eq!(entry.kind, TarKind::File { size: 20 << 30 });
    assert!(reader.finish().is_err());
}

#[test]
fn names_that_lead_elsewhere_and_other_kinds_are_refused() {
    for name in ["/etc/passwd", "../x", "base/../../x", "", "./"] {
        check_refused(header(name, b'0', 0, ""));
    }
    for kind in [b'1', b'3', b'L', b'x', b'g', b'7'] {
        check_refused(header("a", kind, 0, ""));
    }
    check_refused(header("a", b'5', 1, ""));
    let mut damaged = header("a", b'0', 0, "");
    damaged[0] = b'b';
    check_refused(damaged);
    check_refused(file("a", b"x")[..513].to_vec());
}

proptest! {
    #[test]
    fn any_bytes_are_entries_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..2000), piece in 1usize..600) {
        let _ = read(&bytes, piece);
    }

    #[test]
    fn a_damaged_archive_does_no_harm(at in 0usize..1536, value in any::<u8>(), piece in 1usize..600) {
        let mut archive = file("a/b", &[1; 700]);
        archive.extend(header("c/", b'5', 0, ""));
        let length = archive.len();
        archive[at % length] = value;
        let _ = read(&archive, piece);
    }

    #[test]
    fn a_header_with_any_number_and_a_right_checksum_does_no_harm(field in proptest::collection::vec(any::<u8>(), 12)) {
        let mut block = header("a", b'0', 0, "");
        block[124..136].copy_from_slice(&field);
        block[148..156].copy_from_slice(b"        ");
        let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let _ = read(&block, 512);
    }

    #[test]
    fn files_come_back_however_they_arrive(
        contents in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..1500), 0..5),
        piece in 1usize..1400,
    ) {
        let mut archive = Vec::new();
        for (number, content) in contents.iter().enumerate() {
            archive.extend(file(&format!("f{number}"), content));
        }
        let found = read(&archive, piece).expect("well formed");
        let found: Vec<Vec<u8>> = found.into_iter().map(|(_, content)| content).collect();
        prop_assert_eq!(found, contents);
    }
}
