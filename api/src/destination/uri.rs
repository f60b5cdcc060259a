//! The parts of a bucket's URI: `BUCKET/DIRECTORY?KEY=VALUE&…`.

use super::DestinationError;

/// Longest part of a client's text that is said back, characters.
const ECHO: usize = 80;

/// Longest directory, bytes: a name of a file fits behind it in what stores allow (1024).
const DIRECTORY: usize = 512;

pub(super) struct Parts<'a> {
    bucket: &'a str,
    directory: &'a str,
    query: Vec<(&'a str, String)>,
}

impl<'a> Parts<'a> {
    /// Splits what is behind `scheme://`. Any key but those is an error.
    pub(super) fn new(
        rest: &'a str,
        scheme: &'static str,
        known: &'static str,
        keys: &[&str],
    ) -> Result<Self, DestinationError> {
        let wrong = |problem| DestinationError::Query { problem };
        if rest.contains('#') {
            return Err(wrong("is followed by a fragment (`#`): write it as %23"));
        }
        let (path, pairs) = rest.split_once('?').unwrap_or((rest, ""));
        let (bucket, directory) = path.split_once('/').unwrap_or((path, ""));
        if bucket.contains('@') {
            return Err(DestinationError::UserInfo);
        }
        let mut query: Vec<(&str, String)> = Vec::new();
        for pair in pairs.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if !keys.contains(&key) {
                let key = without_secrets(key);
                return Err(DestinationError::Key { key, scheme, known });
            }
            if query.iter().any(|(other, _)| *other == key) {
                return Err(wrong("has a key twice"));
            }
            let value = decode(value).ok_or(wrong("has broken percent-encoding"))?;
            query.push((key, value));
        }
        Ok(Self { bucket, directory, query })
    }

    /// The bucket's name, of the characters that there can be in one.
    pub(super) fn bucket(&self, allowed: fn(char) -> bool) -> Result<String, DestinationError> {
        let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        let name = self.bucket;
        let fine = (3..=63).contains(&name.len())
            && name.chars().all(allowed)
            && ends(name.chars().next())
            && ends(name.chars().last())
            && !name.contains("..")
            && name.parse::<std::net::Ipv4Addr>().is_err();
        if fine {
            return Ok(name.to_owned());
        }
        let limit =
            "3 to 63 small letters, digits and hyphens, and begin and end with a letter or digit";
        Err(DestinationError::BucketName { name: without_secrets(name), limit })
    }

    /// The directory, without slashes at its ends.
    pub(super) fn directory(&self) -> Result<String, DestinationError> {
        let wrong = |problem| DestinationError::Directory { problem };
        let directory = decode(self.directory).ok_or(wrong("has broken percent-encoding"))?;
        let directory = directory.strip_suffix('/').unwrap_or(&directory);
        if directory.len() > DIRECTORY {
            return Err(wrong("has more than 512 bytes"));
        }
        let plain = |c: char| {
            c.is_ascii_alphanumeric() || matches!(c, '/' | '-' | '_' | '.' | '=' | '+' | ',')
        };
        if !directory.chars().all(plain) {
            return Err(wrong("has other characters than letters, digits and - _ . = + ,"));
        }
        let mut segments = directory.split('/');
        if !directory.is_empty() && segments.any(|part| matches!(part, "" | "." | "..")) {
            return Err(wrong("has `.`, `..` or nothing between two slashes"));
        }
        Ok(directory.to_owned())
    }

    /// A key's value.
    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let at = self.query.iter().position(|(known, _)| *known == key)?;
        Some(self.query.swap_remove(at).1)
    }
}

/// The beginning of a text that may be long.
pub(super) fn cut(text: &str) -> String {
    match text.char_indices().nth(ECHO) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// The beginning of a text in which there may be a secret by mistake: up to where one could begin.
pub(super) fn without_secrets(text: &str) -> String {
    match text.find(['@', '=', '&']) {
        Some(_) => "…".to_owned(),
        None => cut(text),
    }
}

/// Takes percent-encoding out.
pub(super) fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
            let (high, low) = (digit(rest.next())?, digit(rest.next())?);
            bytes.push((high * 16 + low) as u8);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// Percent-encodes what has a meaning in a URI.
pub(super) fn encode(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for c in path.chars() {
        match c {
            '%' | '?' | '#' | ' ' => out += &format!("%{:02X}", c as u32),
            _ => out.push(c),
        }
    }
    out
}
