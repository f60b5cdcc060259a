//! The whole HTTP surface, on one page. A handler decodes, calls and encodes; nothing else.

mod beyond;
mod caller;
mod conditions;
mod download;
mod events;
mod ownership;
mod pcaps;

pub(crate) use self::{
    beyond::{
        __path_healthz, __path_metrics, __path_openapi, __path_readyz, __path_retry, __path_stats,
    },
    download::__path_download,
    events::__path_events,
    ownership::{
        __path_add_bucket, __path_list_buckets, __path_remove_bucket, __path_validate_bucket,
    },
    pcaps::{__path_create, __path_get, __path_list, __path_stop},
};

use std::sync::Arc;

use axum::{
    Router,
    extract::Request,
    routing::{delete, get, post, put},
};
use tokio::sync::{Semaphore, watch};

use crate::{
    auth::Auth, captures::Captures, config::Config, error::ApiError, metrics::Counters,
    ownership::Ownerships, request::Rules,
};

/// What the handlers work with.
#[derive(Debug)]
pub struct App {
    /// The configuration.
    pub config: Config,
    /// Who may what.
    pub auth: Auth,
    /// What requests are held against.
    pub rules: Rules,
    /// Whose buckets are whose.
    pub ownerships: Arc<Ownerships>,
    /// The captures.
    pub captures: Arc<Captures>,
    /// What is counted.
    pub counters: Arc<Counters>,
    /// One permit per event stream.
    pub streams: Arc<Semaphore>,
    /// One permit per download.
    pub downloads: Arc<Semaphore>,
    /// Turns true when the daemon is told to stop.
    pub closing: watch::Receiver<bool>,
}

/// Everything that is answered, at `/client/v4` as the official clients have it by default, and at `/`.
pub fn router(app: &Arc<App>) -> Router {
    let api = Router::new()
        .route("/accounts/{account_id}/pcaps", get(pcaps::list).post(pcaps::create))
        .route(
            "/accounts/{account_id}/pcaps/ownership",
            get(ownership::list_buckets).post(ownership::add_bucket),
        )
        .route(
            "/accounts/{account_id}/pcaps/ownership/validate",
            post(ownership::validate_bucket),
        )
        .route(
            "/accounts/{account_id}/pcaps/ownership/{ownership_id}",
            delete(ownership::remove_bucket),
        )
        .route("/accounts/{account_id}/pcaps/{pcap_id}", get(pcaps::get))
        .route("/accounts/{account_id}/pcaps/{pcap_id}/stop", put(pcaps::stop))
        .route("/accounts/{account_id}/pcaps/{pcap_id}/download", get(download::download))
        // Beyond the contract.
        .route("/accounts/{account_id}/pcaps/{pcap_id}/stats", get(beyond::stats))
        .route("/accounts/{account_id}/pcaps/{pcap_id}/retry", post(beyond::retry))
        .route("/accounts/{account_id}/pcaps/{pcap_id}/events", get(events::events))
        .route("/healthz", get(beyond::healthz))
        .route("/readyz", get(beyond::readyz))
        .route("/metrics", get(beyond::metrics))
        .route("/openapi.json", get(beyond::openapi))
        .method_not_allowed_fallback(async || ApiError::Method);
    Router::new()
        .nest("/client/v4", api.clone())
        .merge(api)
        .fallback(async |request: Request| ApiError::Route(request.uri().path().to_owned()))
        .with_state(Arc::clone(app))
}

/// Runs what blocks where it may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ApiError::Internal(error.to_string())),
    }
}
