//! What a store said, in words that have no secret and fit on a line.
//!
//! A store's answer may repeat keys and signatures, so nothing of it is passed on but its status and
//! the name that it gives the error.

use std::{error::Error, fmt, io, time::Duration};

use object_store::client::{HttpError, HttpErrorKind};

/// Why a request to a store failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    text: String,
    /// The store has answered, and what it said will not change by itself.
    pub refused: bool,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Cause {
    /// Of an error of the store's client.
    pub fn of(error: &object_store::Error) -> Self {
        let said = error.to_string();
        if said.contains("Received redirect") {
            return Self::answered(301, None);
        }
        if let Some(status) = status(&said) {
            return Self::answered(status, code(&said));
        }
        let mut cause: Option<&(dyn Error + 'static)> = Some(error);
        let (mut kind, mut system) = (None, None);
        while let Some(error) = cause {
            kind = kind.or(error.downcast_ref::<HttpError>().map(HttpError::kind));
            system = error.downcast_ref::<io::Error>().map(io_text).or(system);
            cause = error.source();
        }
        let system = system.map(|system| format!(" ({system})")).unwrap_or_default();
        let passing = |text: &str| Self { text: format!("{text}{system}"), refused: false };
        match kind {
            Some(HttpErrorKind::Connect) => passing("the store cannot be reached"),
            Some(HttpErrorKind::Timeout) => passing("the store did not answer in time"),
            Some(HttpErrorKind::Request | HttpErrorKind::Interrupted) => {
                passing("the connection to the store broke off")
            }
            Some(_) => passing("the store's answer makes no sense"),
            None if !system.is_empty() => passing("it cannot be written"),
            None => passing("the request failed"),
        }
    }

    /// Nothing came in time.
    pub fn timeout(limit: Duration) -> Self {
        let text = format!("the store did not answer within {} s", limit.as_secs());
        Self { text, refused: false }
    }

    /// In words of this host's own.
    pub fn own(text: impl Into<String>) -> Self {
        Self { text: text.into(), refused: false }
    }

    /// What stays as it is until someone does something about it.
    pub fn lasting(text: impl Into<String>) -> Self {
        Self { text: text.into(), refused: true }
    }

    fn answered(status: u16, code: Option<&str>) -> Self {
        let named = match code {
            Some(code) => format!("{status} {code}"),
            None => status.to_string(),
        };
        let text = match (status, code) {
            (_, Some("RequestTimeTooSkewed")) => format!(
                "the clocks of this host and of the store are too far apart ({named}): set this host's"
            ),
            (_, Some("NoSuchBucket")) => format!("there is no such bucket ({named})"),
            (401, _) => format!("the store does not know the credentials ({named})"),
            (403, _) => format!("the store denies access ({named})"),
            (404, _) => format!("there is no such bucket, or it is not visible ({named})"),
            (429 | 500..=599, _) => format!("the store is busy or broken ({named})"),
            (300..=399, _) => format!(
                "the store sends elsewhere ({named}): the bucket is in another region, or endpoint"
            ),
            _ => format!("the store refuses it ({named})"),
        };
        Self { text, refused: (300..500).contains(&status) && !matches!(status, 408 | 429) }
    }
}

fn io_text(error: &io::Error) -> String {
    // Not its text: some wrap others, whose text may be anything.
    match error.raw_os_error() {
        Some(number) => nix::errno::Errno::from_raw(number).desc().to_owned(),
        None => error.kind().to_string(),
    }
}

/// The status that the client's message has.
fn status(said: &str) -> Option<u16> {
    let at = said.find("status code: ")? + "status code: ".len();
    said.get(at..at + 3)?.parse().ok()
}

/// The name in `<Code>…</Code>`.
fn code(said: &str) -> Option<&str> {
    let (_, rest) = said.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let plain = code.len() <= 64 && code.bytes().all(|byte| byte.is_ascii_alphanumeric());
    Some(code).filter(|code| plain && !code.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: &str, body: &str) -> Cause {
        let text = format!("Server returned non-2xx status code: {status}: {body}");
        Cause::of(&object_store::Error::Generic { store: "S3", source: text.into() })
    }

    #[test]
    fn an_answer_is_named_by_its_status_and_code_and_nothing_else_of_it() {
        let body =
            "<Error><Code>AccessDenied</Code><AWSAccessKeyId>hidden</AWSAccessKeyId></Error>";
        let cause = answer("403 Forbidden", body);
        assert_eq!(cause.to_string(), "the store denies access (403 AccessDenied)");
        assert!(cause.refused);
        let skewed = answer("403 Forbidden", "<Code>RequestTimeTooSkewed</Code>");
        assert!(skewed.to_string().contains("clocks"), "{skewed}");
        let storm = answer("503 Service Unavailable", "<Code>SlowDown</Code>");
        assert!(!storm.refused && storm.to_string().contains("SlowDown"), "{storm}");
        let odd = answer("400 Bad Request", "<Code>hidden=1&x</Code>");
        assert_eq!(odd.to_string(), "the store refuses it (400)");
    }

    #[test]
    fn what_never_was_answered_is_named_by_what_the_system_said() {
        let full = io::Error::from_raw_os_error(28);
        let cause = Cause::of(&object_store::Error::Generic { store: "x", source: full.into() });
        assert_eq!(cause.to_string(), "it cannot be written (No space left on device)");
        assert!(!cause.refused);
    }
}
