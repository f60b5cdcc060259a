//! A capture's packets as a file.

use std::{io, ops::Range, sync::Arc};

use axum::{
    body::Body,
    extract::{RawQuery, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use capture_user::{
    error::with_causes,
    segment::export::{Export, Format, Part},
};
use futures_util::stream;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    App, blocking,
    caller::Target,
    conditions::{Wanted, wanted},
};
use crate::{download::Download, envelope::Failure, error::ApiError, id};

#[utoipa::path(
    get, path = "/accounts/{account_id}/pcaps/{pcap_id}/download",
    operation_id = "magic-pcap-collection-download-simple-pcap",
    description = "The packets of a capture that has ended, as one file in the order of time. Of a full \
                   capture, as long as its files are on this host. Ranges, and tags, are understood.",
    params(
        ("account_id" = String, Path, min_length = 32, max_length = 32),
        ("pcap_id" = String, Path, min_length = 32, max_length = 32),
        ("format" = Option<String>, Query, pattern = "^(pcap|pcapng)$",
         description = "`pcap`, with nanoseconds, if it is left out; or `pcapng`, with interfaces, \
                        directions and statistics."),
    ),
    responses(
        (status = 200, description = "The file", content(
            (Vec<u8> = "application/vnd.tcpdump.pcap"), (Vec<u8> = "application/x-pcapng"))),
        (status = 206, description = "A part of it", content(
            (Vec<u8> = "application/vnd.tcpdump.pcap"), (Vec<u8> = "application/x-pcapng"))),
        (status = 304, description = "The client has it"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "pcaps",
)]
pub(super) async fn download(
    State(app): State<Arc<App>>,
    target: Target,
    method: Method,
    headers: HeaderMap,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let format = format(query.as_deref())?;
    let permit = Arc::clone(&app.downloads)
        .try_acquire_owned()
        .map_err(|_closed_or_none| ApiError::Downloads(app.config.limits.downloads))?;
    let download = blocking(move || {
        let files = app.captures.download(target.account, target.pcap)?;
        Ok(files.open(format)?)
    });
    let Download { name, tag, export } = download.await?;
    let length = export.len();
    let (status, range) = match wanted(&method, &headers, &tag, length) {
        Wanted::Whole => (StatusCode::OK, 0..length),
        Wanted::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
        Wanted::NotModified => {
            return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response());
        }
        Wanted::Unsatisfiable => return Ok(unsatisfiable(length)),
    };
    let kind = match format {
        Format::Pcap => "application/vnd.tcpdump.pcap",
        Format::Pcapng => "application/x-pcapng",
    };
    let head = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{name}\"")),
        (header::CONTENT_LENGTH, (range.end - range.start).to_string()),
        (header::ETAG, tag),
        (header::ACCEPT_RANGES, "bytes".into()),
        (header::CACHE_CONTROL, "private, no-cache".into()),
    ];
    let mut response =
        (status, head, body(target.pcap, export, range.clone(), permit)).into_response();
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {}-{}/{length}", range.start, range.end - 1);
        response.headers_mut().insert(header::CONTENT_RANGE, value(&range));
    }
    Ok(response)
}

/// The format that a query asks for.
fn format(query: Option<&str>) -> Result<Format, ApiError> {
    let mut format = Format::Pcap;
    for pair in query.unwrap_or_default().split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        match (key, value) {
            ("format", "pcap") => format = Format::Pcap,
            ("format", "pcapng") => format = Format::Pcapng,
            ("format", other) => return Err(ApiError::Format(other.to_owned())),
            _ => {}
        }
    }
    Ok(format)
}

fn unsatisfiable(length: u64) -> Response {
    let mut response = ApiError::Range(length).into_response();
    response.headers_mut().insert(header::CONTENT_RANGE, value(&format!("bytes */{length}")));
    response
}

fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).unwrap_or_else(|_never| HeaderValue::from_static(""))
}

/// Made as it is sent: a client that is slow holds neither a thread nor more than a chunk.
fn body(pcap: u128, export: Export, range: Range<u64>, permit: OwnedSemaphorePermit) -> Body {
    let first = (Some(export.part(range)), permit);
    Body::from_stream(stream::unfold(first, move |(part, permit)| async move {
        let next = tokio::task::spawn_blocking(move || chunk(pcap, part?));
        let (chunk, part) = next.await.unwrap_or(None)?;
        Some((chunk, (part, permit)))
    }))
}

/// The next bytes; after an error, none. A connection that ends before the length that was said tells the
/// client that it does not have all.
fn chunk(pcap: u128, mut part: Part) -> Option<(io::Result<Vec<u8>>, Option<Part>)> {
    match part.chunk() {
        Ok(chunk) => chunk.map(|chunk| (Ok(chunk), Some(part))),
        Err(error) => {
            let told = with_causes(&error);
            tracing::error!(pcap_id = id::show(pcap), error = told, "a download breaks off");
            Some((Err(io::Error::other(error)), None))
        }
    }
}
