//! `/openapi.json`, generated from the code: the handlers' annotations and the types' schemas.

use serde::Deserialize;
use utoipa::{
    Modify, OpenApi, ToSchema,
    openapi::{
        SecurityRequirement,
        security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme},
    },
};

use crate::{request::FilterV1, routes};

/// A capture to be. One of the two, by `type`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "a description; requests are read by hand, to tell all violations")]
pub(crate) enum CreateRequest {
    /// Packets that passed.
    Simple(CreateSimple),
    /// Packets to come.
    Full(CreateFull),
}

/// A full capture to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "a description; requests are read by hand, to tell all violations")]
pub(crate) struct CreateFull {
    /// `full`
    #[schema(pattern = "^full$")]
    r#type: String,
    /// `magic-transit`
    #[schema(pattern = "^magic-transit$")]
    system: String,
    /// The site or region, as in `ord02` or `ORD`; this host's own names are the ones that it knows.
    colo_name: String,
    /// A bucket that the account has proved to own, as it was added; or `file:///PATH`, in a folder
    /// that the operator allows. One that the operator trusts needs no proof.
    destination_conf: String,
    /// Ends the capture after this time, seconds.
    #[schema(minimum = 1, maximum = 86400)]
    time_limit: u32,
    /// Ends the capture after exactly this many packets.
    #[schema(minimum = 1, maximum = 10000)]
    packet_limit: Option<u32>,
    /// Ends the capture before its packets have more bytes.
    #[schema(minimum = 1, maximum = 1_000_000_000)]
    byte_limit: Option<u64>,
    /// Which packets; without it, all.
    filter_v1: Option<FilterV1>,
}

/// A simple capture to be: of what has passed.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "a description; requests are read by hand, to tell all violations")]
pub(crate) struct CreateSimple {
    /// `simple`
    #[schema(pattern = "^simple$")]
    r#type: String,
    /// `magic-transit`
    #[schema(pattern = "^magic-transit$")]
    system: String,
    /// Seconds before `offset_time`.
    #[schema(minimum = 1, maximum = 300)]
    time_limit: u32,
    /// Most packets.
    #[schema(minimum = 1, maximum = 10000)]
    packet_limit: u32,
    /// Which packets; without it, all.
    filter_v1: Option<FilterV1>,
    /// The end of the time that is asked for, within the last 24 hours, in UTC if it has no zone; without
    /// it, or if it is empty, now.
    #[schema(max_length = 64, example = "2026-01-01T08:00:00Z")]
    offset_time: Option<String>,
}

/// A bucket to add.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "a description; requests are read by hand, to tell all violations")]
pub(crate) struct OwnershipRequest {
    /// `s3://BUCKET/DIRECTORY?region=REGION`, with `endpoint` for a store that the operator allows;
    /// `gs://BUCKET/DIRECTORY`; `r2://BUCKET/DIRECTORY?account-id=ID&access-key-id=ID&secret-access-key=KEY`;
    /// or `file:///PATH`, in a folder that the operator allows.
    #[schema(max_length = 2048)]
    destination_conf: String,
}

/// A bucket to prove.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "a description; requests are read by hand, to tell all violations")]
pub(crate) struct ValidateRequest {
    /// The bucket as it was added; keys in it are not looked at.
    #[schema(max_length = 2048)]
    destination_conf: String,
    /// What is in the challenge's file, not its name.
    #[schema(max_length = 4096)]
    ownership_challenge: String,
}

/// The description.
#[derive(Debug, OpenApi)]
#[openapi(
    info(title = "Tapline", description = "The PCAPs API over hosts of one's own."),
    servers((url = "/client/v4", description = "As the official clients have it"), (url = "/")),
    paths(
        routes::list, routes::create, routes::get, routes::stop, routes::download,
        routes::list_buckets, routes::add_bucket, routes::validate_bucket, routes::remove_bucket,
        routes::stats, routes::events, routes::retry,
        routes::healthz, routes::readyz, routes::metrics, routes::openapi,
    ),
    modifiers(&Credentials),
)]
pub struct Description;

struct Credentials;

impl Modify for Credentials {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        let header =
            |name: &str| SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new(name.to_owned())));
        components.add_security_scheme(
            "api_token",
            SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build()),
        );
        components.add_security_scheme("api_email", header("X-Auth-Email"));
        components.add_security_scheme("api_key", header("X-Auth-Key"));
        let none: [&str; 0] = [];
        openapi.security = Some(vec![
            SecurityRequirement::new("api_token", none),
            SecurityRequirement::new("api_email", none).add("api_key", none),
        ]);
    }
}
