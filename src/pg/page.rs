//! Pages of relations: header and checksum.
//!
//! Source: `src/include/storage/bufpage.h`, `src/include/storage/checksum_impl.h` (the algorithm),
//! `src/backend/storage/page/bufpage.c` (`PageIsVerified`), 14–18, on little-endian machines.

use super::Lsn;

/// `BLCKSZ` of every normal build; `pg_control` says when a cluster has another one.
pub const PAGE_BYTES: usize = 8192;

/// `SizeOfPageHeaderData`.
pub const HEADER_BYTES: usize = 24;

/// `PD_VALID_FLAG_BITS`.
const VALID_FLAGS: u16 = 0x0007;

/// The columns of words that are hashed side by side.
const SUMS: usize = 32;

const FNV_PRIME: u32 = 16_777_619;

/// Where each column's hash begins.
const BASE_OFFSETS: [u32; SUMS] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// `PageHeaderData` without the line pointers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// The first byte after the record of the latest change.
    pub lsn: Lsn,
    pub checksum: u16,
    pub flags: u16,
    pub lower: u16,
    pub upper: u16,
    pub special: u16,
    pub page_bytes: u16,
    pub layout_version: u8,
}

/// What a page's bytes say about themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    Good,
    /// All zero: added to the file, never written.
    New,
    /// The checksum in the header is not the one of the content at this block number.
    Mismatch {
        stored: u16,
        computed: u16,
    },
    /// The checksum fits (or none is used), but the header cannot be one; the server would refuse the page.
    BadHeader,
}

impl PageHeader {
    /// `None` when there are fewer bytes than a header.
    pub fn decode(page: &[u8]) -> Option<PageHeader> {
        let header = page.first_chunk::<HEADER_BYTES>()?;
        let half = |at: usize| Some(u16::from_le_bytes(*header.get(at..)?.first_chunk()?));
        let word = |at: usize| Some(u32::from_le_bytes(*header.get(at..)?.first_chunk()?));
        let size_and_version = half(18)?;
        Some(PageHeader {
            lsn: Lsn(u64::from(word(0)?) << 32 | u64::from(word(4)?)),
            checksum: half(8)?,
            flags: half(10)?,
            lower: half(12)?,
            upper: half(14)?,
            special: half(16)?,
            page_bytes: size_and_version & 0xFF00,
            layout_version: size_and_version.to_le_bytes()[0],
        })
    }

    /// `PageIsNew`.
    pub fn is_new(&self) -> bool {
        self.upper == 0
    }

    /// The tests that the server makes of a page that it has read, apart from the checksum.
    fn is_sane(&self, page_bytes: usize) -> bool {
        self.flags & !VALID_FLAGS == 0
            && self.lower <= self.upper
            && self.upper <= self.special
            && usize::from(self.special) <= page_bytes
            && self.special.is_multiple_of(8)
    }
}

/// The checksum of a page at `block` (counted over the whole relation fork, not one file of it); the field in the header
/// counts as zero. A page whose length is no multiple of 128 bytes is never right: its tail is not covered.
pub fn checksum(page: &[u8], block: u32) -> u16 {
    let mut sums = BASE_OFFSETS;
    for (row_index, row) in page.chunks_exact(SUMS * 4).enumerate() {
        for (column, (sum, word)) in sums.iter_mut().zip(row.chunks_exact(4)).enumerate() {
            let mut value = word.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
            if row_index == 0 && column == 2 {
                value &= 0xFFFF_0000;
            }
            *sum = round(*sum, value);
        }
    }
    let folded = sums.iter().fold(0, |folded, sum| folded ^ round(round(*sum, 0), 0));
    let reduced = (folded ^ block) % 65_535 + 1;
    // 1..=65535 by construction.
    u16::try_from(reduced).unwrap_or(u16::MAX)
}

/// Judges a page as the server does when it reads one. Without checksums only the header is judged.
pub fn check_page(page: &[u8], block: u32, has_checksums: bool) -> PageState {
    let Some(header) = PageHeader::decode(page) else { return PageState::BadHeader };
    if header.is_new() {
        let zero = page.iter().all(|byte| *byte == 0);
        return if zero { PageState::New } else { PageState::BadHeader };
    }
    if has_checksums {
        let computed = checksum(page, block);
        if computed != header.checksum {
            return PageState::Mismatch { stored: header.checksum, computed };
        }
    }
    if header.is_sane(page.len()) { PageState::Good } else { PageState::BadHeader }
}

fn round(sum: u32, value: u32) -> u32 {
    let mixed = sum ^ value;
    mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page() -> Vec<u8> {
        let mut page = vec![0; PAGE_BYTES];
        page[12..14].copy_from_slice(&28u16.to_le_bytes());
        page[14..16].copy_from_slice(&8000u16.to_le_bytes());
        page[16..18].copy_from_slice(&8192u16.to_le_bytes());
        page[18..20].copy_from_slice(&0x2004u16.to_le_bytes());
        page
    }

    fn sealed(mut page: Vec<u8>, block: u32) -> Vec<u8> {
        let sum = checksum(&page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    #[test]
    fn a_page_is_good_at_its_own_block_only() {
        let page = sealed(page(), 7);
        assert_eq!(check_page(&page, 7, true), PageState::Good);
        assert!(matches!(check_page(&page, 8, true), PageState::Mismatch { .. }));
        assert_eq!(PageHeader::decode(&page).expect("long enough").page_bytes, 8192);
    }

    #[test]
    fn zero_pages_are_new_and_half_zero_pages_are_not() {
        let mut page = vec![0; PAGE_BYTES];
        assert_eq!(check_page(&page, 0, true), PageState::New);
        page[5000] = 1;
        assert_eq!(check_page(&page, 0, true), PageState::BadHeader);
        assert_eq!(check_page(&page[..10], 0, true), PageState::BadHeader);
    }

    #[test]
    fn an_impossible_header_is_noticed_even_with_a_fitting_checksum() {
        let mut bad = page();
        bad[10] = 0xFF;
        assert_eq!(check_page(&sealed(bad, 0), 0, true), PageState::BadHeader);
    }

    proptest! {
        #[test]
        fn one_flipped_bit_is_found(at in 20usize..PAGE_BYTES, bit in 0u8..8, block: u32) {
            let mut page = sealed(page(), block);
            page[at] ^= 1 << bit;
            let noticed = matches!(check_page(&page, block, true), PageState::Mismatch { .. });
            prop_assert!(noticed);
        }
    }
}
