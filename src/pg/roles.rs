//! The roles of a cluster that is down, from the pages of `pg_authid`.
//!
//! A restored cluster is reached as a superuser of its own, whose name nobody may know any more. What is read here is what
//! was on disk, dead row versions included: names to try, not the truth.
//!
//! Source: `relmapper.c` (`RelMapFile`), `pg_authid.h`, `htup_details.h`, `itemid.h`, 14–18.

use super::page::HEADER_BYTES;

/// `pg_authid`'s own oid, by which the map finds its file.
const PG_AUTHID: u32 = 1260;

const MAP_MAGIC: u32 = 0x0059_2717;

/// `LP_NORMAL`.
const NORMAL_POINTER: u32 = 1;

/// Of `NameData`.
const NAME_BYTES: usize = 64;

/// A row version of `pg_authid`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Role {
    /// 10 for the role that `initdb` made.
    pub oid: u32,
    pub name: String,
    pub is_superuser: bool,
    pub can_login: bool,
}

/// The file below `global/` that holds `pg_authid`, from the bytes of `global/pg_filenode.map`.
pub fn roles_file(map: &[u8]) -> Option<u32> {
    if u32_at(map, 0)? != MAP_MAGIC {
        return None;
    }
    let count = usize::try_from(u32_at(map, 4)?).ok()?.min(64);
    (0..count)
        .map(|index| 8 + index * 8)
        .find(|at| u32_at(map, *at) == Some(PG_AUTHID))
        .and_then(|at| u32_at(map, at + 4))
}

/// The roles on a page of `pg_authid`; what cannot be one is left out.
pub fn roles_of_page(page: &[u8]) -> Vec<Role> {
    let lower = page.get(12..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u16::from_le_bytes(*bytes));
    let count = usize::from(lower).saturating_sub(HEADER_BYTES) / 4;
    (0..count).filter_map(|index| role(page, u32_at(page, HEADER_BYTES + index * 4)?)).collect()
}

fn role(page: &[u8], pointer: u32) -> Option<Role> {
    let (offset, flags, length) = (pointer & 0x7FFF, pointer >> 15 & 3, pointer >> 17);
    if flags != NORMAL_POINTER {
        return None;
    }
    let start = usize::try_from(offset).ok()?;
    let tuple = page.get(start..start.checked_add(usize::try_from(length).ok()?)?)?;
    let row = tuple.get(usize::from(*tuple.get(22)?)..)?;
    let name = row.get(4..4 + NAME_BYTES)?.split(|byte| *byte == 0).next()?;
    let flag = |at: usize| row.get(at).copied().filter(|byte| *byte <= 1).map(|byte| byte == 1);
    let name = std::str::from_utf8(name).ok().filter(|name| !name.is_empty())?.to_owned();
    Some(Role { oid: u32_at(row, 0)?, name, is_superuser: flag(68)?, can_login: flag(72)? })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_map_names_the_file() {
        let words = [MAP_MAGIC, 2, 1262, 1262, 1260, 16_390];
        let map: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(roles_file(&map), Some(16_390));
        assert_eq!(roles_file(&map[..20]), None);
        assert_eq!(roles_file(&[0; 524]), None);
    }

    proptest! {
        #[test]
        fn any_page_is_read_without_panic(mut page in proptest::collection::vec(any::<u8>(), 8192), lower: u16) {
            page[12..14].copy_from_slice(&lower.to_le_bytes());
            let _ = roles_of_page(&page);
            let _ = roles_file(&page);
        }
    }
}
