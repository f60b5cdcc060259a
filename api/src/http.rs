//! What every request passes on its way in and out: a request id, a log line, a time limit.

use std::{
    net::IpAddr,
    panic::AssertUnwindSafe,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderValue, Method},
    middleware::Next,
    response::{IntoResponse as _, Response},
};
use futures_util::FutureExt as _;
use hyper::body::Body as _;

use crate::{error::ApiError, id, routes::App};

/// Who is at the other end of the connection. Headers that say so are not believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub IpAddr);

/// Reads a body of up to so many bytes.
pub(crate) async fn read_body(body: Body, limit: usize) -> Result<Bytes, ApiError> {
    // What says that it is too long is not read at all.
    if body.size_hint().lower() > limit as u64 {
        return Err(ApiError::TooLarge(limit));
    }
    axum::body::to_bytes(body, limit).await.map_err(|error| {
        // The two that there are: it was longer, or the connection broke.
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
        while let Some(error) = cause {
            if error.to_string().contains("length limit") {
                return ApiError::TooLarge(limit);
            }
            cause = error.source();
        }
        ApiError::Broken
    })
}

/// Around every request.
pub(crate) async fn observe(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let request_id = id::hex(&id::random::<8>());
    let method = request.method().clone();
    let path: String = request.uri().path().chars().take(256).collect();
    let peer = request.extensions().get::<Peer>().map(|peer| peer.0);
    let limit = Duration::from_secs(app.config.limits.request_seconds);
    // A panic is a fault of ours, and no reason to hang up without a word.
    let answer = AssertUnwindSafe(next.run(request)).catch_unwind();
    let mut response = match tokio::time::timeout(limit, answer).await {
        Ok(Ok(response)) => response,
        Ok(Err(_panic)) => ApiError::Internal("a handler panicked".into()).into_response(),
        Err(_elapsed) => ApiError::Timeout(limit).into_response(),
    };
    let took = start.elapsed();
    let status = response.status().as_u16();
    app.counters.request(name(&method), status, took);
    tracing::info!(
        request_id,
        method = method.as_str(),
        path,
        status,
        milliseconds = took.as_secs_f64() * 1e3,
        peer = peer.map(|peer| peer.to_string()),
        "request"
    );
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

/// A method's name in the metrics, which must not grow with what clients make up.
fn name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::HEAD => "HEAD",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}
