//! The one place where what went wrong becomes HTTP.
//!
//! | status | codes | when |
//! |---|---|---|
//! | 400 | 9106, 6003 | credentials are missing, or a header cannot be one |
//! | 401, 403 | 10000 | credentials are nobody's, another account's, or may only read |
//! | 400 | 1100 to 1109 | the body: each violation is an item with `source.pointer` |
//! | 400 | 1108, 1111 | a bucket does not take the challenge; an account has not proved that it owns it |
//! | 400 | 1112, 1113, 1114 | a challenge is wrong, has expired, is the name of its file |
//! | 400 | 1145, 1150 | a simple capture is not stopped; it needs the recorder, which is off |
//! | 404 | 7003, 7000; 1130, 1131 | no such route; no such capture, no such ownership |
//! | 405, 408, 413 | 1163, 1161, 1160 | method, time, size |
//! | 409 | 1140, 1143 | too many captures, buckets |
//! | 409 | 1144 | a capture has nothing to send again |
//! | 409 | 1151, 1152, 1156 | a download: not finished, nothing in it, a file was changed |
//! | 410 | 1153, 1154, 1155 | a download: it has expired, is in its bucket, was removed |
//! | 400, 416 | 1157, 1158; 1159 | a download: link types that pcap cannot have, the format; its range |
//! | 429 | 1141, 1142, 1148 | too many failed authentications, event streams, downloads |
//! | 429 | 1146, 1147 | too many simple captures: in a minute, that wait |
//! | 500, 503 | 1170; 1171 | a fault of ours; interfaces are gone, or the service is shutting down |
//!
//! The official clients repeat 408, 409, 429 and 5xx, one of them for minutes, unless told not to:
//! every refusal here says `x-should-retry: false`.

use std::time::Duration;

use axum::{
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use capture_user::{engine::StartError, error::with_causes, segment::export::ExportError};

use crate::{
    auth::AuthError,
    captures::CaptureError,
    download::DownloadError,
    envelope::{Message, Source, failure},
    ownership::OwnershipError,
    request::{Problem, Violation},
    simple::SimpleError,
};

/// Why a request is refused.
#[derive(Debug)]
pub enum ApiError {
    /// Credentials.
    Auth(AuthError),
    /// The body.
    Violations(Vec<Violation>),
    /// A capture.
    Capture(CaptureError),
    /// A bucket.
    Ownership(OwnershipError),
    /// No such route; the path as it was sent.
    Route(String),
    /// The id in the path is none; as it was sent.
    Id(String),
    /// The same, of an ownership.
    OwnershipId(String),
    /// The route has other methods.
    Method,
    /// The body is longer than this many bytes.
    TooLarge(usize),
    /// It took longer than this.
    Timeout(Duration),
    /// The body broke off.
    Broken,
    /// A download is not made in this format; as it was sent.
    Format(String),
    /// A range of a file that has this many bytes.
    Range(u64),
    /// As many downloads as there may be.
    Downloads(usize),
    /// As many event streams as there may be.
    Streams(usize),
    /// A fault of ours, which is in the log.
    Internal(String),
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        Self::Auth(error)
    }
}

impl From<CaptureError> for ApiError {
    fn from(error: CaptureError) -> Self {
        Self::Capture(error)
    }
}

impl From<DownloadError> for ApiError {
    fn from(error: DownloadError) -> Self {
        Self::Capture(error.into())
    }
}

impl From<OwnershipError> for ApiError {
    fn from(error: OwnershipError) -> Self {
        Self::Ownership(error)
    }
}

/// What is told of an error.
struct Told {
    status: StatusCode,
    messages: Vec<Message>,
    wait: Option<Duration>,
}

fn message(code: u16, message: impl Into<String>) -> Message {
    Message { code, message: message.into(), source: None }
}

fn told(status: StatusCode, code: u16, text: impl Into<String>) -> Told {
    Told { status, messages: vec![message(code, text)], wait: None }
}

fn at(pointer: &str, code: u16, text: String) -> Told {
    let source = Some(Source { pointer: pointer.into() });
    let message = Message { code, message: text, source };
    Told { status: StatusCode::BAD_REQUEST, messages: vec![message], wait: None }
}

fn violation(violation: Violation) -> Message {
    let code = match violation.problem {
        Problem::Body => 1100,
        Problem::Missing => 1101,
        Problem::Type => 1102,
        Problem::Value => 1103,
        Problem::Unknown => 1104,
        Problem::Contradiction => 1105,
        Problem::Colo => 1106,
        Problem::Destination => 1107,
    };
    let source = Some(Source { pointer: violation.pointer });
    Message { code, message: violation.message, source }
}

fn auth(error: &AuthError) -> Told {
    let text = error.to_string();
    match error {
        AuthError::Missing => told(StatusCode::BAD_REQUEST, 9106, text),
        AuthError::Malformed { .. } => Told {
            status: StatusCode::BAD_REQUEST,
            messages: vec![message(6003, "Invalid request headers"), message(6103, text)],
            wait: None,
        },
        AuthError::Wrong => told(StatusCode::UNAUTHORIZED, 10000, text),
        AuthError::OtherAccount { .. } | AuthError::ReadOnly => {
            told(StatusCode::FORBIDDEN, 10000, text)
        }
        AuthError::Limited { wait } => {
            Told { wait: Some(*wait), ..told(StatusCode::TOO_MANY_REQUESTS, 1141, text) }
        }
    }
}

fn capture(error: &CaptureError) -> Told {
    let text = error.to_string();
    match error {
        CaptureError::Full { .. } => told(StatusCode::CONFLICT, 1140, text),
        CaptureError::Unknown(_) => told(StatusCode::NOT_FOUND, 1130, text),
        CaptureError::Destination(_) => at("/destination_conf", 1107, text),
        CaptureError::Ownership(error) => ownership(error),
        CaptureError::Retry { .. } => told(StatusCode::CONFLICT, 1144, text),
        CaptureError::Simple(error) => simple(error),
        CaptureError::Download(error) => download(error),
        CaptureError::NotFull(_) => told(StatusCode::BAD_REQUEST, 1145, text),
        CaptureError::ShuttingDown => told(StatusCode::SERVICE_UNAVAILABLE, 1171, text),
        CaptureError::Engine(_) | CaptureError::Start(StartError::Gone { .. }) => told(
            StatusCode::SERVICE_UNAVAILABLE,
            1171,
            format!("this host cannot capture now: {}", with_causes(error)),
        ),
        CaptureError::Store(_)
        | CaptureError::Recorder(_)
        | CaptureError::Start(_)
        | CaptureError::Thread(_) => {
            tracing::error!(error = with_causes(error), "internal error");
            internal()
        }
    }
}

fn ownership(error: &OwnershipError) -> Told {
    let text = error.to_string();
    let challenge = |code, text| at("/ownership_challenge", code, text);
    match error {
        OwnershipError::Destination(_) => at("/destination_conf", 1107, text),
        OwnershipError::Write { .. } => at("/destination_conf", 1108, text),
        OwnershipError::NotAdded { .. }
        | OwnershipError::NotProved { .. }
        | OwnershipError::Removed { .. } => at("/destination_conf", 1111, text),
        OwnershipError::Wrong { .. } | OwnershipError::Other { .. } => challenge(1112, text),
        OwnershipError::Expired { .. } => challenge(1113, text),
        OwnershipError::Filename { .. } => challenge(1114, text),
        OwnershipError::Unknown(_) => told(StatusCode::NOT_FOUND, 1131, text),
        OwnershipError::Full { .. } => told(StatusCode::CONFLICT, 1143, text),
        OwnershipError::Store(_) => {
            tracing::error!(error = with_causes(error), "internal error");
            internal()
        }
    }
}

fn simple(error: &SimpleError) -> Told {
    let text = error.to_string();
    match error {
        SimpleError::Off => at("/type", 1150, text),
        SimpleError::TooSoon { wait } => {
            Told { wait: Some(*wait), ..told(StatusCode::TOO_MANY_REQUESTS, 1146, text) }
        }
        SimpleError::Waiting { .. } => {
            let wait = Some(Duration::from_secs(1));
            Told { wait, ..told(StatusCode::TOO_MANY_REQUESTS, 1147, text) }
        }
        SimpleError::Store(_) => {
            tracing::error!(error = with_causes(error), "internal error");
            internal()
        }
    }
}

fn download(error: &DownloadError) -> Told {
    let text = error.to_string();
    match error {
        DownloadError::NotFinished => told(StatusCode::CONFLICT, 1151, text),
        DownloadError::Nothing { .. } => told(StatusCode::CONFLICT, 1152, text),
        DownloadError::Expired { .. } => told(StatusCode::GONE, 1153, text),
        DownloadError::Elsewhere { .. } => told(StatusCode::GONE, 1154, text),
        DownloadError::Removed { .. } => told(StatusCode::GONE, 1155, text),
        DownloadError::Changed { .. } => told(StatusCode::CONFLICT, 1156, text),
        DownloadError::Export(ExportError::LinkTypes { .. }) => {
            let text = format!("{text}, with ?format=pcapng");
            told(StatusCode::BAD_REQUEST, 1157, text)
        }
        DownloadError::Read(_) | DownloadError::Export(_) => {
            tracing::error!(error = with_causes(error), "internal error");
            internal()
        }
    }
}

fn internal() -> Told {
    told(
        StatusCode::INTERNAL_SERVER_ERROR,
        1170,
        "internal error: this host's log has it under the request id of this answer",
    )
}

impl ApiError {
    fn told(self) -> Told {
        match self {
            Self::Auth(error) => auth(&error),
            Self::Violations(violations) => Told {
                status: StatusCode::BAD_REQUEST,
                messages: violations.into_iter().map(violation).collect(),
                wait: None,
            },
            Self::Capture(error) => capture(&error),
            Self::Ownership(error) => ownership(&error),
            Self::Route(path) => {
                let path: String = path.chars().take(200).collect();
                let text = format!(
                    "Could not route to {path}, perhaps your object identifier is invalid?"
                );
                Told {
                    status: StatusCode::NOT_FOUND,
                    messages: vec![message(7003, text), message(7000, "No route for that URI")],
                    wait: None,
                }
            }
            Self::Id(id) => {
                let id: String = id.chars().take(64).collect();
                let text = format!("no capture has the id {id}: an id is 32 hexadecimal digits");
                told(StatusCode::NOT_FOUND, 1130, text)
            }
            Self::OwnershipId(id) => {
                let id: String = id.chars().take(64).collect();
                let text = format!("no ownership has the id {id}: an id is 32 hexadecimal digits");
                told(StatusCode::NOT_FOUND, 1131, text)
            }
            Self::Method => told(
                StatusCode::METHOD_NOT_ALLOWED,
                1163,
                "method not allowed: the `allow` header has those that are",
            ),
            Self::TooLarge(limit) => told(
                StatusCode::PAYLOAD_TOO_LARGE,
                1160,
                format!("the body is longer than {limit} bytes"),
            ),
            Self::Timeout(limit) => told(
                StatusCode::REQUEST_TIMEOUT,
                1161,
                format!("the request took longer than {} s", limit.as_secs()),
            ),
            Self::Broken => told(StatusCode::BAD_REQUEST, 1100, "the body broke off"),
            Self::Format(format) => {
                let format: String = format.chars().take(64).collect();
                let text = format!("`format` is `{format}`, but must be pcap or pcapng");
                told(StatusCode::BAD_REQUEST, 1158, text)
            }
            Self::Range(length) => told(
                StatusCode::RANGE_NOT_SATISFIABLE,
                1159,
                format!("nothing of the range is in the file, which has {length} bytes"),
            ),
            Self::Downloads(limit) => told(
                StatusCode::TOO_MANY_REQUESTS,
                1148,
                format!("{limit} downloads are on their way, the most that this host allows"),
            ),
            Self::Streams(limit) => told(
                StatusCode::TOO_MANY_REQUESTS,
                1142,
                format!("{limit} event streams are open, the most that this host allows"),
            ),
            Self::Internal(cause) => {
                tracing::error!(error = cause, "internal error");
                internal()
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Told { status, messages, wait } = self.told();
        let mut response = failure(status, messages);
        let headers = response.headers_mut();
        headers.insert("x-should-retry", HeaderValue::from_static("false"));
        if let Some(wait) = wait {
            headers.insert(header::RETRY_AFTER, wait.as_secs().into());
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if matches!(status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
            // The rest of the body is not read.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_refusal_is_repeated() {
        let errors = [
            ApiError::Auth(AuthError::Limited { wait: Duration::from_secs(7) }),
            ApiError::Capture(CaptureError::Full { limit: 1 }),
            ApiError::Capture(CaptureError::ShuttingDown),
            ApiError::Timeout(Duration::from_secs(30)),
            ApiError::Internal("x".into()),
        ];
        for error in errors {
            let name = format!("{error:?}");
            let response = error.into_response();
            assert_eq!(response.headers()["x-should-retry"], "false", "{name}");
            assert_eq!(response.headers()["content-type"], "application/json", "{name}");
        }
    }

    #[test]
    fn what_is_internal_is_not_told() {
        let told = ApiError::Internal("/secret/place".into()).told();
        assert!(!told.messages[0].message.contains("secret"));
    }
}
