//! The header of a WAL page.
//!
//! Every 8 KiB page begins with 24 bytes; the first page of a segment with 40, which also name the cluster, the segment
//! size and the page size. Source: `src/include/access/xlog_internal.h` (`XLogPageHeaderData`), 14–18.

use super::bytes::Bytes;
use super::format::Format;
use crate::pg::{Lsn, SegmentSize, SystemId, TimelineId};

/// `XLOG_BLCKSZ` of every usual build; a server with another says so in its long headers and is refused.
pub const PAGE_BYTES: u64 = 8192;
/// Bytes of the header of a segment's first page.
pub const LONG_HEADER_BYTES: usize = 40;
/// Bytes of the header of all other pages.
pub const SHORT_HEADER_BYTES: usize = 24;

const FIRST_IS_CONTRECORD: u16 = 0x01;
const LONG_HEADER: u16 = 0x02;
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x08;
const KNOWN_FLAGS: u16 = 0x0F;

/// A page header that is right for the place where it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    pub format: Format,
    /// Timeline of the first record on the page; may be older than the segment's.
    pub timeline: TimelineId,
    flags: u16,
    /// Bytes still missing of the record that continues from the page before.
    pub remaining_bytes: u32,
    /// In the first page of a segment only.
    pub system_id: Option<SystemId>,
}

/// Why bytes are not the page header that must stand there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    #[error("the page was never written")]
    Zero,
    #[error("the page is left over from {found}")]
    Stale { found: Lsn },
    #[error("the page says that it belongs to {found}")]
    Address { found: Lsn },
    #[error("the page is of a WAL format that is not known (magic {magic:04X})")]
    UnknownFormat { magic: u16 },
    #[error("the page does not begin with a page header (magic {magic:04X})")]
    Magic { magic: u16 },
    #[error("the page header has flags {flags:04X}")]
    Flags { flags: u16 },
    #[error("the page header names timeline 0")]
    Timeline,
    #[error("the page header is for segments of {found} bytes")]
    SegmentSize { found: u32 },
    #[error("the page header is for pages of {found} bytes")]
    PageSize { found: u32 },
}

/// Bytes of the header of the page at `page_lsn`.
pub fn header_bytes(page_lsn: Lsn, segment_size: SegmentSize) -> usize {
    if segment_size.offset_of(page_lsn) == 0 { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES }
}

impl PageHeader {
    /// Decodes the header of the page at `page_lsn`; `bytes` are at least [`header_bytes`] long.
    ///
    /// # Errors
    /// [`PageError::Zero`] and [`PageError::Stale`] are how WAL that is not archived yet ends; all others are damage.
    pub fn decode(bytes: &[u8], page_lsn: Lsn, segment_size: SegmentSize) -> Result<PageHeader, PageError> {
        let mut fields = Bytes::new(bytes);
        let mut decode = || {
            let (magic, flags, timeline) = (fields.u16()?, fields.u16()?, fields.u32()?);
            let (address, remaining_bytes, _padding) = (fields.u64()?, fields.u32()?, fields.u32()?);
            Some((magic, flags, timeline, Lsn(address), remaining_bytes))
        };
        let (magic, flags, timeline, address, remaining_bytes) = decode().ok_or(PageError::Zero)?;
        let Some(format) = Format::from_magic(magic) else {
            return Err(match magic {
                0 => PageError::Zero,
                0xD100..=0xD1FF if address == page_lsn => PageError::UnknownFormat { magic },
                _ => PageError::Magic { magic },
            });
        };
        if address < page_lsn {
            return Err(PageError::Stale { found: address });
        }
        if address > page_lsn {
            return Err(PageError::Address { found: address });
        }
        let is_first = segment_size.offset_of(page_lsn) == 0;
        if flags & !KNOWN_FLAGS != 0 || (flags & LONG_HEADER != 0) != is_first {
            return Err(PageError::Flags { flags });
        }
        if timeline == 0 {
            return Err(PageError::Timeline);
        }
        let system_id = if is_first { Some(decode_long(fields, segment_size)?) } else { None };
        Ok(PageHeader { format, timeline: TimelineId(timeline), flags, remaining_bytes, system_id })
    }

    /// The page begins with the rest of a record from the page before.
    pub fn continues_record(&self) -> bool {
        self.flags & FIRST_IS_CONTRECORD != 0
    }

    /// The page begins with the record that says: what the page before ends with was never finished.
    pub fn overwrites_record(&self) -> bool {
        self.flags & FIRST_IS_OVERWRITE_CONTRECORD != 0
    }
}

fn decode_long(mut fields: Bytes<'_>, segment_size: SegmentSize) -> Result<SystemId, PageError> {
    let (system_id, segment_bytes, page_bytes) =
        (|| Some((fields.u64()?, fields.u32()?, fields.u32()?)))().ok_or(PageError::Zero)?;
    if u64::from(segment_bytes) != segment_size.bytes() {
        return Err(PageError::SegmentSize { found: segment_bytes });
    }
    if u64::from(page_bytes) != PAGE_BYTES {
        return Err(PageError::PageSize { found: page_bytes });
    }
    Ok(SystemId(system_id))
}
