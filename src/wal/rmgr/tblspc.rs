//! Tablespaces that were made.
//!
//! Source: `xl_tblspc_create_rec` in `src/include/commands/tablespace.h`, 14–18.

use super::PayloadError;
use crate::wal::bytes::Bytes;

pub const CREATE: u8 = 0x00;

/// `CREATE TABLESPACE`: replay makes it at this very path, whatever the server's configuration says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MadeTablespace {
    pub oid: u32,
    /// Bytes that are not UTF-8 are replaced.
    pub path: String,
}

/// What the record says; `None` for a tablespace that lies in the data directory, and for its end.
///
/// # Errors
/// When the data is shorter than every major writes it.
pub fn decode(op: u8, main: &[u8]) -> Result<Option<MadeTablespace>, PayloadError> {
    if op != CREATE {
        return Ok(None);
    }
    let mut fields = Bytes::new(main);
    let made = fields.u32().zip(fields.take_c_string());
    let (oid, path) = made.ok_or(PayloadError("TBLSPC_CREATE"))?;
    let path = String::from_utf8_lossy(path).into_owned();
    Ok((!path.is_empty()).then_some(MadeTablespace { oid, path }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tablespace_outside_the_data_directory_has_its_path() {
        let made = |path: &[u8]| decode(CREATE, &[&16_500_u32.to_le_bytes(), path].concat());
        let expected = MadeTablespace { oid: 16_500, path: "/srv/fast disk".to_owned() };
        assert_eq!(made(b"/srv/fast disk\0"), Ok(Some(expected)));
        assert_eq!(made(b"\0"), Ok(None));
        assert_eq!(decode(0x10, &16_500_u32.to_le_bytes()), Ok(None));
        assert!(made(b"/srv").is_err() && decode(CREATE, &[1, 2]).is_err());
    }
}
