//! Which part of a file a request asks for, and whether it has it already.
//! <https://www.rfc-editor.org/rfc/rfc9110#name-conditional-requests>,
//! <https://www.rfc-editor.org/rfc/rfc9110#name-range-requests>

use std::ops::Range;

use axum::http::{HeaderMap, HeaderName, Method, header};

/// What a request is to be answered with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Wanted {
    /// All of the file.
    Whole,
    /// These bytes of it.
    Part(Range<u64>),
    /// Nothing: the client has it.
    NotModified,
    /// Bytes that there are not.
    Unsatisfiable,
}

fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// What is wanted of a file with this tag and length. Of several ranges, and of what is no range, all of
/// the file is the answer, as the standard allows.
pub(super) fn wanted(method: &Method, headers: &HeaderMap, tag: &str, length: u64) -> Wanted {
    if let Some(known) = text(headers, header::IF_NONE_MATCH) {
        let same = |one: &str| one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag;
        if known.split(',').map(str::trim).any(same) {
            return Wanted::NotModified;
        }
    }
    let current = text(headers, header::IF_RANGE).is_none_or(|known| known.trim() == tag);
    let range = text(headers, header::RANGE).filter(|_| current && method == Method::GET);
    match range.and_then(parse) {
        None => Wanted::Whole,
        Some(range) => range.of(length).map_or(Wanted::Unsatisfiable, Wanted::Part),
    }
}

/// A range as it is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    From { first: u64, last: Option<u64> },
    Last { bytes: u64 },
}

fn parse(text: &str) -> Option<Asked> {
    let (unit, range) = text.split_once('=')?;
    if !unit.trim().eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (first, last) = range.trim().split_once('-')?;
    let number = |digits: &str| {
        let plain = !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_digit());
        // More than any file has.
        plain.then(|| digits.parse().unwrap_or(u64::MAX))
    };
    if first.is_empty() {
        return Some(Asked::Last { bytes: number(last)? });
    }
    let first = number(first)?;
    let last = if last.is_empty() { None } else { Some(number(last)?) };
    let backwards = last.is_some_and(|last| last < first);
    (!backwards).then_some(Asked::From { first, last })
}

impl Asked {
    /// In a file of this length; `None` if nothing of it is there.
    fn of(self, length: u64) -> Option<Range<u64>> {
        let range = match self {
            Self::From { first, last } => {
                first..last.map_or(length, |last| last.saturating_add(1)).min(length)
            }
            Self::Last { bytes } => length.saturating_sub(bytes)..length,
        };
        (!range.is_empty()).then_some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: &str = "\"abc\"";

    fn of(method: &Method, headers: &[(HeaderName, &str)]) -> Wanted {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.insert(name, value.parse().unwrap());
        }
        wanted(method, &map, TAG, 100)
    }

    fn range(text: &str) -> Wanted {
        of(&Method::GET, &[(header::RANGE, text)])
    }

    #[test]
    fn one_range_is_given_as_far_as_it_is_there() {
        for (text, want) in [
            ("bytes=0-0", 0..1),
            ("bytes=10-19", 10..20),
            ("Bytes=99-", 99..100),
            ("bytes=90-1000", 90..100),
            ("bytes=-1", 99..100),
            ("bytes=-1000", 0..100),
            ("bytes=0-99999999999999999999999", 0..100),
        ] {
            assert_eq!(range(text), Wanted::Part(want), "{text}");
        }
        for text in ["bytes=100-", "bytes=100-200", "bytes=-0", "bytes=99999999999999999999999-"] {
            assert_eq!(range(text), Wanted::Unsatisfiable, "{text}");
        }
    }

    #[test]
    fn what_is_not_one_range_means_the_whole() {
        for text in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=x-y",
            "bytes=5-4",
            "bytes=+1-2",
            "lines=1-2",
            "bytes=0-1,5-6",
        ] {
            assert_eq!(range(text), Wanted::Whole, "{text}");
        }
        assert_eq!(of(&Method::HEAD, &[(header::RANGE, "bytes=0-1")]), Wanted::Whole);
        assert_eq!(of(&Method::GET, &[]), Wanted::Whole);
    }

    #[test]
    fn tags_tell_whether_the_client_has_it_already() {
        for (known, want) in [
            (TAG, Wanted::NotModified),
            ("\"x\", W/\"abc\"", Wanted::NotModified),
            ("*", Wanted::NotModified),
            ("\"x\"", Wanted::Whole),
        ] {
            assert_eq!(of(&Method::GET, &[(header::IF_NONE_MATCH, known)]), want, "{known}");
        }
        for (known, want) in [
            (TAG, Wanted::Part(0..2)),
            ("\"x\"", Wanted::Whole),
            ("W/\"abc\"", Wanted::Whole),
            ("Wed, 25 Nov 2026 13:00:00 GMT", Wanted::Whole),
        ] {
            let headers = [(header::IF_RANGE, known), (header::RANGE, "bytes=0-1")];
            assert_eq!(of(&Method::GET, &headers), want, "{known}");
        }
    }
}
