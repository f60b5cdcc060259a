//! Ids, and other things of hexadecimal digits.

use std::fmt::Write as _;

use ring::{
    digest,
    rand::{SecureRandom as _, SystemRandom},
};

/// Random bytes that nobody can guess.
///
/// The kernel's generator does not fail once it is seeded, which it is before any network is up.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    assert!(SystemRandom::new().fill(&mut bytes).is_ok(), "the kernel has no random numbers");
    bytes
}

/// A new id: the digits of a random UUID.
pub fn new() -> u128 {
    let random = u128::from_be_bytes(random());
    // Version 4, variant 1.
    random & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62)
}

/// An id as it is shown.
pub fn show(id: u128) -> String {
    format!("{id:032x}")
}

/// Reads an id: 32 hexadecimal digits.
pub fn parse(text: &str) -> Option<u128> {
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    digits.then(|| u128::from_str_radix(text, 16).ok()).flatten()
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Reads a SHA-256 digest.
pub fn parse_digest(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&parse(&text[..32])?.to_be_bytes());
    bytes[16..].copy_from_slice(&parse(&text[32..])?.to_be_bytes());
    Some(bytes)
}

/// SHA-256.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut digest = [0; 32];
    digest.copy_from_slice(digest::digest(&digest::SHA256, bytes).as_ref());
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_32_digits_and_look_like_random_uuids() {
        let (one, other) = (new(), new());
        assert_ne!(one, other);
        assert_eq!(show(one).len(), 32);
        assert_eq!(parse(&show(one)), Some(one));
        assert_eq!(&show(one)[12..13], "4");
    }

    #[test]
    fn anything_else_is_no_id() {
        for text in ["", "1", "../../../../../../../etc/passwd..", &"g".repeat(32), &"é".repeat(16)]
        {
            assert_eq!(parse(text), None, "{text}");
        }
        assert_eq!(parse(&"+".repeat(32)), None);
    }

    #[test]
    fn digests_are_read_and_written() {
        let digest = sha256(b"abc");
        assert!(hex(&digest).starts_with("ba7816bf"));
        assert_eq!(parse_digest(&hex(&digest)), Some(digest));
        assert_eq!(parse_digest("12"), None);
    }
}
