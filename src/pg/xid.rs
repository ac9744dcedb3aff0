//! Transaction ids.
//!
//! Source: `src/include/access/transam.h` (`FullTransactionId`), 14–18.

use std::fmt;

/// A transaction id as records carry it: 32 bits that wrap around.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Xid(pub u32);

/// A transaction id with its epoch in the upper half; never wraps. `pg_current_xact_id()` shows this one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct FullXid(pub u64);

impl Xid {
    /// With the epoch it must have when `near` was given out at about the same time: living ids lie within 2^31 of each
    /// other. `None` when that would lie before the first id of epoch 0.
    pub fn full_near(self, near: FullXid) -> Option<FullXid> {
        let distance = self.0.wrapping_sub(near.low().0);
        match i32::from_ne_bytes(distance.to_ne_bytes()) {
            ahead @ 0.. => near.0.checked_add(u64::from(ahead.unsigned_abs())),
            behind => near.0.checked_sub(u64::from(behind.unsigned_abs())),
        }
        .map(FullXid)
    }
}

impl FullXid {
    /// The id without its epoch.
    pub fn low(self) -> Xid {
        let [_, _, _, _, a, b, c, d] = self.0.to_be_bytes();
        Xid(u32::from_be_bytes([a, b, c, d]))
    }
}

macro_rules! as_number {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    )*};
}

as_number!(Xid, FullXid);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epoch_comes_from_a_neighbour() {
        let near = FullXid(5 << 32 | 100);
        assert_eq!(Xid(90).full_near(near), Some(FullXid(5 << 32 | 90)));
        assert_eq!(Xid(200).full_near(near), Some(FullXid(5 << 32 | 200)));
        assert_eq!(Xid(u32::MAX).full_near(near), Some(FullXid(4 << 32 | u64::from(u32::MAX))));
        assert_eq!(Xid(3).full_near(FullXid(4 << 32 | 0xFFFF_FFF0)), Some(FullXid(5 << 32 | 3)));
        assert_eq!(Xid(u32::MAX).full_near(FullXid(3)), None);
    }
}
