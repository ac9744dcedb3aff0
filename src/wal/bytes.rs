//! Reads little-endian numbers off the front of a slice, and says `None` where it is too short.

#[derive(Clone, Copy)]
pub struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Bytes(bytes)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    /// `count` items of `item_bytes` each; the product is checked before anything is looked at.
    pub fn take_items(&mut self, count: usize, item_bytes: usize) -> Option<&'a [u8]> {
        self.take(count.checked_mul(item_bytes)?)
    }

    /// A C string: up to the NUL, which is consumed too.
    pub fn take_c_string(&mut self) -> Option<&'a [u8]> {
        let length = self.0.iter().position(|b| *b == 0)?;
        let text = self.take(length)?;
        self.u8()?;
        Some(text)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk()?;
        self.0 = tail;
        Some(*head)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn i32(&mut self) -> Option<i32> {
        self.array().map(i32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn i64(&mut self) -> Option<i64> {
        self.array().map(i64::from_le_bytes)
    }

    /// A C `int` that counts items; `None` also when negative.
    pub fn count(&mut self) -> Option<usize> {
        self.i32().and_then(|n| usize::try_from(n).ok())
    }
}
