//! What differs between the WAL of the majors, in one table.
//!
//! Source: `XLOG_PAGE_MAGIC` in `src/include/access/xlog_internal.h`, `BKPIMAGE_*` in `xlogrecord.h`,
//! `xl_xact_stats_item` in `xact.h`, 14–18.

use crate::pg::Major;

/// The WAL format of one major version, told by the magic number of its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Format {
    major: Major,
}

/// How the bits of a block image's flags are to be read.
pub(super) struct ImageBits {
    pub has_hole: u8,
    pub apply: u8,
    pub pglz: u8,
    pub lz4: u8,
    pub zstd: u8,
}

const MAGICS: [(u16, Major); 5] =
    [(0xD10D, Major(14)), (0xD110, Major(15)), (0xD113, Major(16)), (0xD116, Major(17)), (0xD118, Major(18))];

const IMAGE_BITS_14: ImageBits = ImageBits { has_hole: 0x01, apply: 0x04, pglz: 0x02, lz4: 0, zstd: 0 };
const IMAGE_BITS_15: ImageBits = ImageBits { has_hole: 0x01, apply: 0x02, pglz: 0x04, lz4: 0x08, zstd: 0x10 };

impl Format {
    /// `None` for the magic of another version, or of no page at all.
    pub fn from_magic(magic: u16) -> Option<Format> {
        MAGICS.iter().find(|(known, _)| *known == magic).map(|(_, major)| Format { major: *major })
    }

    /// `None` for a major that this program does not read.
    pub fn of_major(major: Major) -> Option<Format> {
        major.is_supported().then_some(Format { major })
    }

    pub fn major(self) -> Major {
        self.major
    }

    /// The greatest `xl_tot_len`: `XLogRecordMaxSize` since 16; before, what `palloc` gives at most.
    pub fn record_bytes_max(self) -> u32 {
        if self.major >= Major(16) { 1020 << 20 } else { (1 << 30) - 1 }
    }

    pub(super) fn image_bits(self) -> &'static ImageBits {
        if self.major >= Major(15) { &IMAGE_BITS_15 } else { &IMAGE_BITS_14 }
    }

    /// Bytes of one dropped statistics entry in a commit or abort; `None` where there are none.
    pub(super) fn stats_item_bytes(self) -> Option<usize> {
        match self.major.0 {
            ..15 => None,
            15..18 => Some(12),
            18.. => Some(16),
        }
    }

    /// Whether checkpoints and the end of recovery carry `wal_level`.
    pub(super) fn has_wal_level_in_checkpoints(self) -> bool {
        self.major >= Major(17)
    }
}
