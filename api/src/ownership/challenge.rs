//! What is in a challenge's file: a text that only this host could have made, for one account, one
//! destination and a while.
//!
//! `tapline-ID-EXPIRY-SIGNATURE`, in hexadecimal digits. What it is bound to is signed and not in it:
//! it says nothing to whoever finds it.

use crate::{id, secrets::Secrets};

const MARK: &str = "tapline-";

/// A challenge as its file has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Challenge {
    /// Of which ownership.
    pub(super) id: u128,
    /// Until when it counts, UTC microseconds.
    pub(super) expires_us: i64,
    signature: [u8; 32],
}

impl Challenge {
    pub(super) fn new(
        secrets: &Secrets,
        account: u128,
        destination: &str,
        id: u128,
        expires_us: i64,
    ) -> Self {
        let signature = secrets.sign(&bound(account, destination, id, expires_us));
        Self { id, expires_us, signature }
    }

    pub(super) fn text(&self) -> String {
        let (id, signature) = (id::show(self.id), id::hex(&self.signature));
        format!("{MARK}{id}-{:016x}-{signature}", self.expires_us)
    }

    /// Reads what may be one. Files get a line's end or a space from those who copy them.
    pub(super) fn read(text: &str) -> Option<Self> {
        let mut parts = text.trim().strip_prefix(MARK)?.split('-');
        let (id, expires, signature) = (parts.next()?, parts.next()?, parts.next()?);
        let digits = expires.len() == 16 && expires.bytes().all(|byte| byte.is_ascii_hexdigit());
        let fine = digits && parts.next().is_none();
        let expires_us = i64::from_str_radix(expires, 16).ok().filter(|_| fine)?;
        Some(Self { id: id::parse(id)?, expires_us, signature: id::parse_digest(signature)? })
    }

    /// Whether this host made it for this account and destination.
    pub(super) fn is_of(&self, secrets: &Secrets, account: u128, destination: &str) -> bool {
        let bound = bound(account, destination, self.id, self.expires_us);
        secrets.is_signed(&bound, &self.signature)
    }
}

fn bound(account: u128, destination: &str, id: u128, expires_us: i64) -> Vec<u8> {
    // All but the last are of one length.
    let numbers =
        [&account.to_be_bytes()[..], &id.to_be_bytes(), &expires_us.to_be_bytes()].concat();
    [numbers.as_slice(), destination.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_is_read_as_it_was_written_and_is_of_nothing_else() {
        let secrets = Secrets::new(&[1; 32]);
        let made = Challenge::new(&secrets, 7, "s3://a", 9, 1_000);
        let read = Challenge::read(&format!(" {}\r\n", made.text())).unwrap();
        assert_eq!(read, made);
        assert!(read.is_of(&secrets, 7, "s3://a"));
        assert!(!read.is_of(&secrets, 8, "s3://a"));
        assert!(!read.is_of(&secrets, 7, "s3://b"));
        assert!(!read.is_of(&Secrets::new(&[2; 32]), 7, "s3://a"));
        let longer = Challenge { expires_us: 2_000, ..read };
        assert!(!longer.is_of(&secrets, 7, "s3://a"));
        let other = Challenge { id: 10, ..read };
        assert!(!other.is_of(&secrets, 7, "s3://a"));
    }

    #[test]
    fn what_is_none_is_not_taken_for_one() {
        let text = Challenge::new(&Secrets::new(&[1; 32]), 7, "s3://a", 9, 1_000).text();
        for wrong in ["", "tapline-", "ownership-challenge-1.txt", &text[1..], &text[..60]] {
            assert_eq!(Challenge::read(wrong), None, "{wrong}");
        }
        assert_eq!(Challenge::read(&format!("{text}-")), None);
        assert_eq!(Challenge::read(&text.replace("-00", "-+0")), None);
    }
}
