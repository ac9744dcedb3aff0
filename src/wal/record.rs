//! A WAL record: its header, and the fragments it is made of.
//!
//! A record is a header of 24 bytes, the headers of its fragments, then their payloads in the same order: for each block
//! its image and its data, and last the main data, which only the resource manager understands.
//! Source: `src/include/access/xlogrecord.h`, `DecodeXLogRecord` in `src/backend/access/transam/xlogreader.c`, 14–18.

use std::ops::Range;

use super::bytes::Bytes;
use super::format::Format;
use super::rmgr::Rmgr;
use crate::pg::{ForkNumber, Lsn, RelFileLocator, Xid};

/// Bytes of `XLogRecord`.
pub const RECORD_HEADER_BYTES: usize = 24;

const BLOCK_ID_MAX: u8 = 32;
const ID_TOPLEVEL_XID: u8 = 252;
const ID_ORIGIN: u8 = 253;
const ID_MAIN_LONG: u8 = 254;
const ID_MAIN_SHORT: u8 = 255;
const FORK_MASK: u8 = 0x0F;
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const WILL_INIT: u8 = 0x40;
const SAME_REL: u8 = 0x80;
const BLOCK_BYTES: u16 = 8192;

/// The fixed part of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// Header included; page headers and the padding after the record are not.
    pub total_bytes: u32,
    pub xid: Xid,
    /// Start of the record before this one.
    pub prev: Lsn,
    /// Upper half: the resource manager's; lower half: flags of every record.
    pub info: u8,
    pub rmgr: Rmgr,
    pub(super) crc: u32,
}

/// A record that passed its CRC, not yet taken apart.
#[derive(Debug, Clone, Copy)]
pub struct RawRecord<'a> {
    pub format: Format,
    /// Where the record starts; what PostgreSQL calls its LSN when it is a target.
    pub lsn: Lsn,
    /// Where the next record may start, padding included; after a switch the end of the segment.
    pub end_lsn: Lsn,
    pub header: RecordHeader,
    /// The whole record from its header on; shorter than its length when it was too large to keep.
    pub bytes: &'a [u8],
}

/// A block that the record touches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockRef {
    pub id: u8,
    pub relation: RelFileLocator,
    pub fork: ForkNumber,
    /// Within the relation, not within one of its files.
    pub block: u32,
    pub will_init: bool,
    pub image: Option<BlockImage>,
    /// Range of [`RawRecord::bytes`].
    pub data: Range<usize>,
}

/// A page image in a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockImage {
    /// Range of [`RawRecord::bytes`].
    pub bytes: Range<usize>,
    pub hole_offset: u16,
    pub hole_bytes: u16,
    pub compression: Option<ImageCompression>,
    /// Replay writes it; otherwise it is there for checking only.
    pub apply: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageCompression {
    Pglz,
    Lz4,
    Zstd,
}

/// A record taken apart; made to be used again for the next record.
#[derive(Debug, Clone, Default)]
pub struct Fragments {
    pub blocks: Vec<BlockRef>,
    pub origin: Option<u16>,
    pub toplevel_xid: Option<Xid>,
    main: Range<usize>,
}

/// Why a record whose CRC is right cannot be taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error("the record is too large to be taken apart")]
    TooLarge,
    #[error("the record is shorter than its fragments say")]
    Short,
    #[error("the record is longer than its fragments say")]
    Long,
    #[error("the record has a fragment of unknown kind {0}")]
    UnknownFragment(u8),
    #[error("block {0} of the record is out of order")]
    BlockOrder(u8),
    #[error("block {0} of the record has no relation")]
    NoRelation(u8),
    #[error("block {0} of the record has an impossible fork or length")]
    BlockHeader(u8),
    #[error("the page image of block {0} has an impossible hole, length or compression")]
    Image(u8),
}

impl RecordHeader {
    /// From the first 24 bytes of a record.
    pub(super) fn decode(bytes: &[u8]) -> Option<RecordHeader> {
        let mut fields = Bytes::new(bytes);
        let (total_bytes, xid, prev) = (fields.u32()?, fields.u32()?, fields.u64()?);
        let (info, rmgr, _padding, crc) = (fields.u8()?, fields.u8()?, fields.u16()?, fields.u32()?);
        Some(RecordHeader { total_bytes, xid: Xid(xid), prev: Lsn(prev), info, rmgr: Rmgr(rmgr), crc })
    }
}

impl RawRecord<'_> {
    /// The resource manager's half of `info`.
    pub fn op(&self) -> u8 {
        self.header.info & 0xF0
    }

    /// The record was too large to keep whole; its CRC was checked all the same.
    pub fn is_cut(&self) -> bool {
        usize::try_from(self.header.total_bytes).map_or(true, |total| self.bytes.len() < total)
    }
}

impl Fragments {
    /// The part that the resource manager reads; empty when the record has none.
    pub fn main<'a>(&self, record: &RawRecord<'a>) -> &'a [u8] {
        record.bytes.get(self.main.clone()).unwrap_or_default()
    }

    /// Takes `record` apart.
    ///
    /// # Errors
    /// When the headers of its fragments contradict each other or the record's length.
    pub fn decode(&mut self, record: &RawRecord<'_>) -> Result<(), RecordError> {
        self.blocks.clear();
        *self = Fragments { blocks: std::mem::take(&mut self.blocks), ..Fragments::default() };
        if record.is_cut() {
            return Err(RecordError::TooLarge);
        }
        let body = record.bytes.get(RECORD_HEADER_BYTES..).ok_or(RecordError::Short)?;
        let mut headers = Headers { fields: Bytes::new(body), format: record.format, relation: None, announced: 0 };
        let mut main_bytes = 0;
        while headers.fields.len() > headers.announced {
            let id = headers.number(Bytes::u8)?;
            match id {
                0..=BLOCK_ID_MAX => {
                    if self.blocks.last().is_some_and(|last| last.id >= id) {
                        return Err(RecordError::BlockOrder(id));
                    }
                    let block = headers.block(id)?;
                    self.blocks.push(block);
                }
                ID_ORIGIN => self.origin = Some(headers.number(Bytes::u16)?),
                ID_TOPLEVEL_XID => self.toplevel_xid = Some(Xid(headers.number(Bytes::u32)?)),
                ID_MAIN_SHORT | ID_MAIN_LONG => {
                    let short = id == ID_MAIN_SHORT;
                    let bytes =
                        if short { u32::from(headers.number(Bytes::u8)?) } else { headers.number(Bytes::u32)? };
                    main_bytes = usize::try_from(bytes).map_err(|_| RecordError::Short)?;
                    headers.announced = headers.announced.checked_add(main_bytes).ok_or(RecordError::Short)?;
                    // The main data's header is always the last one.
                    break;
                }
                other => return Err(RecordError::UnknownFragment(other)),
            }
        }
        match headers.fields.len().cmp(&headers.announced) {
            std::cmp::Ordering::Less => Err(RecordError::Short),
            std::cmp::Ordering::Greater => Err(RecordError::Long),
            std::cmp::Ordering::Equal => {
                self.place(record.bytes.len() - headers.announced, main_bytes);
                Ok(())
            }
        }
    }

    /// Turns lengths into places: the payloads follow each other from `position` on.
    fn place(&mut self, mut position: usize, main_bytes: usize) {
        let mut next = |length: usize| {
            let start = position;
            position = position.saturating_add(length);
            start..position
        };
        for block in &mut self.blocks {
            if let Some(image) = &mut block.image {
                image.bytes = next(image.bytes.len());
            }
            block.data = next(block.data.len());
        }
        self.main = next(main_bytes);
    }
}

struct Headers<'a> {
    fields: Bytes<'a>,
    format: Format,
    relation: Option<RelFileLocator>,
    /// Payload bytes that the headers so far announce.
    announced: usize,
}

impl<'a> Headers<'a> {
    fn number<T>(&mut self, read: impl FnOnce(&mut Bytes<'a>) -> Option<T>) -> Result<T, RecordError> {
        read(&mut self.fields).ok_or(RecordError::Short)
    }

    /// A block reference whose ranges carry lengths only.
    fn block(&mut self, id: u8) -> Result<BlockRef, RecordError> {
        let flags = self.number(Bytes::u8)?;
        let data_bytes = self.number(Bytes::u16)?;
        let fork = ForkNumber::from_number(flags & FORK_MASK).ok_or(RecordError::BlockHeader(id))?;
        if (flags & HAS_DATA != 0) != (data_bytes != 0) {
            return Err(RecordError::BlockHeader(id));
        }
        let image = if flags & HAS_IMAGE != 0 { Some(self.image(id)?) } else { None };
        if flags & SAME_REL == 0 {
            let (tablespace, database) = (self.number(Bytes::u32)?, self.number(Bytes::u32)?);
            self.relation = Some(RelFileLocator { tablespace, database, relation: self.number(Bytes::u32)? });
        }
        let relation = self.relation.ok_or(RecordError::NoRelation(id))?;
        let block = self.number(Bytes::u32)?;
        let image_bytes = image.as_ref().map_or(0, |image| image.bytes.len());
        self.announced = self.announced.saturating_add(usize::from(data_bytes)).saturating_add(image_bytes);
        let data = 0..usize::from(data_bytes);
        Ok(BlockRef { id, relation, fork, block, will_init: flags & WILL_INIT != 0, image, data })
    }

    fn image(&mut self, id: u8) -> Result<BlockImage, RecordError> {
        let (bytes, hole_offset) = (self.number(Bytes::u16)?, self.number(Bytes::u16)?);
        let flags = self.number(Bytes::u8)?;
        let bits = self.format.image_bits();
        let has_hole = flags & bits.has_hole != 0;
        let compression = match flags & (bits.pglz | bits.lz4 | bits.zstd) {
            0 => None,
            bit if bit == bits.pglz => Some(ImageCompression::Pglz),
            bit if bit == bits.lz4 => Some(ImageCompression::Lz4),
            bit if bit == bits.zstd => Some(ImageCompression::Zstd),
            _ => return Err(RecordError::Image(id)),
        };
        let hole_bytes = match (has_hole, compression) {
            (true, Some(_)) => self.number(Bytes::u16)?,
            (true, None) => BLOCK_BYTES.checked_sub(bytes).ok_or(RecordError::Image(id))?,
            (false, _) => 0,
        };
        let hole_fits = hole_offset.checked_add(hole_bytes).is_some_and(|end| end <= BLOCK_BYTES);
        let hole_is_right = if has_hole { hole_offset > 0 && hole_bytes > 0 } else { hole_offset == 0 };
        let shortened = has_hole || compression.is_some();
        let length_is_right = if shortened { bytes < BLOCK_BYTES } else { bytes == BLOCK_BYTES };
        if !(hole_fits && hole_is_right && length_is_right) {
            return Err(RecordError::Image(id));
        }
        let bytes = 0..usize::from(bytes);
        Ok(BlockImage { bytes, hole_offset, hole_bytes, compression, apply: flags & bits.apply != 0 })
    }
}
