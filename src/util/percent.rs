//! Any text as one segment of a path: what could be mistaken for something else is written `%` and two hexadecimal digits.

use std::fmt::Write as _;

/// The text as a segment.
pub fn encode(text: &str) -> String {
    let mut segment = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => segment.push(char::from(byte)),
            byte => {
                let _ = write!(segment, "%{byte:02X}");
            }
        }
    }
    segment
}

/// The text of a segment; `None` when it is not one.
pub fn decode(segment: &str) -> Option<String> {
    let mut bytes = segment.bytes();
    let mut text = Vec::with_capacity(segment.len());
    while let Some(byte) = bytes.next() {
        text.push(match byte {
            b'%' => {
                let mut digit = || bytes.next().and_then(|byte| char::from(byte).to_digit(16));
                let (high, low) = (digit()?, digit()?);
                u8::try_from(high * 16 + low).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_comes_back_from_one_segment() {
        for text in ["", "audit-2026", "incident OPS-1 at 2026-11-28 07:00:00Z", "1-7/b/0", "%2F", "für 100 %?", "..#"]
        {
            let segment = encode(text);
            assert!(segment.bytes().all(|byte| byte.is_ascii_graphic() && !b"/?#".contains(&byte)), "{segment}");
            assert_eq!(decode(&segment).as_deref(), Some(text));
        }
        for segment in ["%", "%2", "%zz", "%ff", "%+1"] {
            assert_eq!(decode(segment), None, "{segment}");
        }
    }
}
