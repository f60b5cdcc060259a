//! Ownership of buckets: list, add, prove, remove.

use std::sync::Arc;

use axum::{body::Body, extract::State, http::StatusCode, response::Response};

use super::{
    App, blocking,
    caller::{Caller, OwnershipTarget},
};
use crate::{
    envelope::{Envelope, Failure, success},
    error::ApiError,
    http::read_body,
    openapi::{OwnershipRequest, ValidateRequest},
    ownership::{Ownership, Record},
};

#[utoipa::path(
    get, path = "/accounts/{account_id}/pcaps/ownership",
    operation_id = "magic-pcap-collection-list-pca-ps-bucket-ownership",
    description = "An account's buckets, newest first.",
    params(("account_id" = String, Path, min_length = 32, max_length = 32)),
    responses(
        (status = 200, body = Envelope<Vec<Ownership>>, description = "The buckets"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "ownership",
)]
pub(super) async fn list_buckets(
    State(app): State<Arc<App>>,
    caller: Caller,
) -> Result<Response, ApiError> {
    let records = blocking(move || Ok(app.ownerships.list(caller.account)?)).await?;
    Ok(success(records.iter().map(Record::result).collect::<Vec<_>>()))
}

#[utoipa::path(
    post, path = "/accounts/{account_id}/pcaps/ownership",
    operation_id = "magic-pcap-collection-add-buckets-for-full-packet-captures",
    description = "Adds a bucket: writes a challenge to it. What is in the file is to be sent to \
                   `validate`. A bucket that is there already has the same id again, and a new \
                   challenge if it is not proved yet.",
    params(("account_id" = String, Path, min_length = 32, max_length = 32)),
    request_body(content = OwnershipRequest),
    responses(
        (status = 200, body = Envelope<Ownership>, description = "The bucket"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "ownership",
)]
pub(super) async fn add_bucket(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = read_body(body, app.config.limits.body_bytes).await?;
    let record = blocking(move || {
        let (destination, keys) = app.rules.read_ownership(&body).map_err(ApiError::Violations)?;
        Ok(app.ownerships.add(caller.account, &destination, keys.as_ref())?)
    });
    Ok(success(record.await?.result()))
}

#[utoipa::path(
    post, path = "/accounts/{account_id}/pcaps/ownership/validate",
    operation_id = "magic-pcap-collection-validate-buckets-for-full-packet-captures",
    description = "Proves that a bucket is one's own, with what is in the challenge's file.",
    params(("account_id" = String, Path, min_length = 32, max_length = 32)),
    request_body(content = ValidateRequest),
    responses(
        (status = 200, body = Envelope<Ownership>, description = "The bucket"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "ownership",
)]
pub(super) async fn validate_bucket(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: Body,
) -> Result<Response, ApiError> {
    let body = read_body(body, app.config.limits.body_bytes).await?;
    let record = blocking(move || {
        let (destination, challenge) =
            app.rules.read_validation(&body).map_err(ApiError::Violations)?;
        Ok(app.ownerships.validate(caller.account, &destination, &challenge)?)
    });
    Ok(success(record.await?.result()))
}

#[utoipa::path(
    delete, path = "/accounts/{account_id}/pcaps/ownership/{ownership_id}",
    operation_id = "magic-pcap-collection-delete-buckets-for-full-packet-captures",
    description = "Removes a bucket, and the keys that it was added with. What has been captured stays \
                   in it, and so does the challenge's file.",
    params(
        ("account_id" = String, Path, min_length = 32, max_length = 32),
        ("ownership_id" = String, Path, min_length = 32, max_length = 32),
    ),
    responses(
        (status = 204, description = "It is removed"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "ownership",
)]
pub(super) async fn remove_bucket(
    State(app): State<Arc<App>>,
    target: OwnershipTarget,
) -> Result<StatusCode, ApiError> {
    blocking(move || Ok(app.ownerships.remove(target.account, target.ownership)?)).await?;
    Ok(StatusCode::NO_CONTENT)
}
