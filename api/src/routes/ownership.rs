//! Ownership of buckets: routed, and not available in this version.

use axum::response::Response;

use super::caller::Caller;
use crate::{
    envelope::Failure,
    error::ApiError,
    openapi::{OwnershipRequest, ValidateRequest},
};

fn unavailable() -> Result<Response, ApiError> {
    Err(ApiError::Unavailable(
        "buckets are not available in this version of Tapline: captures go to file:///PATH, in a folder \
         that this host's operator trusts",
    ))
}

#[utoipa::path(
    get, path = "/accounts/{account_id}/pcaps/ownership",
    operation_id = "magic-pcap-collection-list-pca-ps-bucket-ownership",
    description = "Buckets. Not available in this version.",
    params(("account_id" = String, Path, min_length = 32, max_length = 32)),
    responses((status = "default", body = Failure, description = "Why not")),
    tag = "ownership",
)]
pub(super) async fn list_buckets(_caller: Caller) -> Result<Response, ApiError> {
    unavailable()
}

#[utoipa::path(
    post, path = "/accounts/{account_id}/pcaps/ownership",
    operation_id = "magic-pcap-collection-add-buckets-for-full-packet-captures",
    description = "Adds a bucket. Not available in this version.",
    params(("account_id" = String, Path, min_length = 32, max_length = 32)),
    request_body(content = OwnershipRequest),
    responses((status = "default", body = Failure, description = "Why not")),
    tag = "ownership",
)]
pub(super) async fn add_bucket(_caller: Caller) -> Result<Response, ApiError> {
    unavailable()
}

#[utoipa::path(
    post, path = "/accounts/{account_id}/pcaps/ownership/validate",
    operation_id = "magic-pcap-collection-validate-buckets-for-full-packet-captures",
    description = "Proves that a bucket is one's own. Not available in this version.",
    params(("account_id" = String, Path, min_length = 32, max_length = 32)),
    request_body(content = ValidateRequest),
    responses((status = "default", body = Failure, description = "Why not")),
    tag = "ownership",
)]
pub(super) async fn validate_bucket(_caller: Caller) -> Result<Response, ApiError> {
    unavailable()
}

#[utoipa::path(
    delete, path = "/accounts/{account_id}/pcaps/ownership/{ownership_id}",
    operation_id = "magic-pcap-collection-delete-buckets-for-full-packet-captures",
    description = "Removes a bucket. Not available in this version.",
    params(
        ("account_id" = String, Path, min_length = 32, max_length = 32),
        ("ownership_id" = String, Path, min_length = 32, max_length = 32),
    ),
    responses((status = "default", body = Failure, description = "Why not")),
    tag = "ownership",
)]
pub(super) async fn remove_bucket(_caller: Caller) -> Result<Response, ApiError> {
    unavailable()
}
