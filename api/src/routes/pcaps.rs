//! Captures: create, list, get, stop.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::StatusCode, response::Response};

use super::{
    App, blocking,
    caller::{Caller, Target},
};
use crate::{
    envelope::{Envelope, Failure, success},
    error::ApiError,
    http::read_body,
    openapi::CreateRequest,
    record::{Capture, Pcap},
};

/// The API lists no more.
const LISTED: usize = 50;

#[utoipa::path(
    get, path = "/accounts/{account_id}/pcaps",
    operation_id = "magic-pcap-collection-list-packet-capture-requests",
    description = "The newest 50 captures of an account, newest first.",
    params(("account_id" = String, Path, min_length = 32, max_length = 32)),
    responses(
        (status = 200, body = Envelope<Vec<Pcap>>, description = "The captures"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "pcaps",
)]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
) -> Result<Response, ApiError> {
    let captures = blocking(move || Ok(app.captures.list(caller.account, LISTED)?)).await?;
    Ok(success(captures.iter().map(Capture::result).collect::<Vec<_>>()))
}

#[utoipa::path(
    post, path = "/accounts/{account_id}/pcaps",
    operation_id = "magic-pcap-collection-create-pcap-request",
    description = "Starts a capture. A full one: when the answer comes, the next matching packet is captured. \
                   A simple one: packets that have passed before `offset_time` are looked for in what this \
                   host has recorded.",
    params(("account_id" = String, Path, min_length = 32, max_length = 32)),
    request_body(content = CreateRequest),
    responses(
        (status = 200, body = Envelope<Pcap>, description = "The capture"),
        (status = "default", body = Failure, description = "Everything that is wrong"),
    ),
    tag = "pcaps",
)]
pub(super) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = read_body(body, app.config.limits.body_bytes).await?;
    // On a thread of its own to the end, also when the client goes away: what has started is
    // remembered, and what is remembered has started.
    let capture = blocking(move || {
        let request = app.rules.read(&body).map_err(ApiError::Violations)?;
        Ok(app.captures.create(caller.account, &request)?)
    });
    Ok(success(capture.await?.result()))
}

#[utoipa::path(
    get, path = "/accounts/{account_id}/pcaps/{pcap_id}",
    operation_id = "magic-pcap-collection-get-pcap-request",
    description = "A capture.",
    params(
        ("account_id" = String, Path, min_length = 32, max_length = 32),
        ("pcap_id" = String, Path, min_length = 32, max_length = 32),
    ),
    responses(
        (status = 200, body = Envelope<Pcap>, description = "The capture"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "pcaps",
)]
pub(super) async fn get(State(app): State<Arc<App>>, target: Target) -> Result<Response, ApiError> {
    let capture = blocking(move || Ok(app.captures.get(target.account, target.pcap)?)).await?;
    Ok(success(capture.result()))
}

#[utoipa::path(
    put, path = "/accounts/{account_id}/pcaps/{pcap_id}/stop",
    operation_id = "magic-pcap-collection-stop-full-pcap",
    description = "Tells a full capture to stop. One that has ended stays as it is.",
    params(
        ("account_id" = String, Path, min_length = 32, max_length = 32),
        ("pcap_id" = String, Path, min_length = 32, max_length = 32),
    ),
    responses(
        (status = 204, description = "It has been told"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "pcaps",
)]
pub(super) async fn stop(
    State(app): State<Arc<App>>,
    target: Target,
) -> Result<StatusCode, ApiError> {
    blocking(move || Ok(app.captures.stop(target.account, target.pcap)?)).await?;
    Ok(StatusCode::NO_CONTENT)
}
