//! What the contract does not have: statistics, health, metrics, the description of it all.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use capture_user::stats::Amount;
use serde::Serialize;
use serde_json::{Map, Value, json};
use utoipa::{OpenApi as _, ToSchema};

use super::{
    App, blocking,
    caller::{Anyone, Target},
};
use crate::{
    captures::{QueueStats, Rates, Recording, Stats, by_cause},
    envelope::{Envelope, Failure, Message, failure, success},
    error::ApiError,
    id, metrics as prometheus,
    openapi::Description,
    record::{Capture, PcapFull, Record, Segment, Status},
    simple::SimpleRecord,
    upload::UploadStats,
};

/// Packets and their bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct Counted {
    /// Packets.
    packets: u64,
    /// Bytes.
    bytes: u64,
}

impl From<Amount> for Counted {
    fn from(amount: Amount) -> Self {
        Self { packets: amount.packets, bytes: amount.bytes }
    }
}

/// A capture's counts. For one that has ended, `hits = captured + dropped`, cause by cause, exactly;
/// while it runs, what is on its way is in `hits` only.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct PcapStats {
    /// The capture's id.
    id: String,
    /// Where it stands.
    status: Status,
    /// How long it has captured, seconds. Not known of one that a crash cut short.
    #[schema(nullable = true)]
    seconds: Option<f64>,
    /// Packets that passed the interfaces meanwhile.
    #[schema(nullable = true)]
    seen: Option<u64>,
    /// Packets that the filter accepted.
    hits: Option<Counted>,
    /// Packets in files, or on their way there.
    captured: Counted,
    /// Packets accepted and not written, by cause.
    #[schema(value_type = Option<Object>)]
    dropped: Option<Map<String, Value>>,
    /// How fast; null when it has ended.
    rates: Option<Rates>,
    /// How late packets were when they had been encoded, and when they had been written: percentiles,
    /// counted from when the kernel program saw them, nanoseconds.
    #[schema(value_type = Option<Object>)]
    latency: Option<Value>,
    /// Per queue, while it runs.
    queues: Vec<QueueStats>,
    /// Sealed files, when it has ended.
    segments: Vec<Segment>,
    /// How far its files have come to where they belong, file by file.
    upload: Option<UploadStats>,
    /// The engine's summary, when it has ended: the law per interface and queue.
    #[schema(value_type = Option<Object>)]
    summary: Option<Value>,
}

impl PcapStats {
    fn live(record: &Record, stats: Stats) -> Self {
        let dropped = by_cause(&stats.progress.drops);
        Self {
            id: id::show(record.id),
            status: record.status,
            seconds: Some(stats.elapsed.as_secs_f64()),
            seen: Some(stats.progress.seen),
            hits: Some(stats.progress.hits.into()),
            captured: stats.progress.captured.into(),
            dropped: Some(dropped.map(|(cause, count)| (cause.into(), count.into())).collect()),
            rates: Some(stats.rates),
            latency: serde_json::to_value(stats.progress.latency).ok(),
            queues: stats.queues,
            segments: Vec::new(),
            upload: None,
            summary: None,
        }
    }

    fn ended(record: &Record) -> Self {
        let summary = record.summary.as_ref();
        let law = summary.map(|summary| &summary["law"]);
        let amount = |name: &str| {
            law.and_then(|law| {
                let count = |unit| law[name][unit].as_u64();
                Some(Counted { packets: count("packets")?, bytes: count("bytes")? })
            })
        };
        Self {
            id: id::show(record.id),
            status: record.status,
            seconds: summary.and_then(|summary| summary["seconds"].as_f64()),
            seen: summary.and_then(|summary| summary["seen"].as_u64()),
            hits: amount("hits"),
            captured: amount("written")
                .unwrap_or(Counted { packets: record.packets_captured, bytes: 0 }),
            dropped: law.and_then(|law| law["drops"].as_object().cloned()),
            rates: None,
            latency: summary.and_then(|summary| summary.get("latency")).cloned(),
            queues: Vec::new(),
            segments: record.segments.clone(),
            upload: None,
            summary: summary.cloned(),
        }
    }

    fn simple(record: &SimpleRecord) -> Self {
        let captured = Counted { packets: record.packets, bytes: record.captured_bytes };
        Self {
            id: id::show(record.id),
            status: record.status,
            seconds: None,
            seen: None,
            hits: None,
            captured,
            dropped: None,
            rates: None,
            latency: None,
            queues: Vec::new(),
            segments: Vec::new(),
            upload: None,
            summary: None,
        }
    }
}

/// A capture's statistics. Blocks.
pub(super) fn stats_of(app: &App, target: Target) -> Result<PcapStats, ApiError> {
    let live = app.captures.find_live(target.account, target.pcap);
    if let Some(live) = live
        && let Some(stats) = live.stats()
    {
        let record = live.record();
        let upload = Some(app.captures.upload_stats(&record)?);
        return Ok(PcapStats { upload, ..PcapStats::live(&record, stats) });
    }
    Ok(match app.captures.get(target.account, target.pcap)? {
        Capture::Full(record) => {
            let upload = Some(app.captures.upload_stats(&record)?);
            PcapStats { upload, ..PcapStats::ended(&record) }
        }
        Capture::Simple(record) => PcapStats::simple(&record),
    })
}

#[utoipa::path(
    get, path = "/accounts/{account_id}/pcaps/{pcap_id}/stats",
    operation_id = "tapline-pcap-stats",
    description = "A capture's counts and rates, drops by cause, per queue.",
    params(
        ("account_id" = String, Path, min_length = 32, max_length = 32),
        ("pcap_id" = String, Path, min_length = 32, max_length = 32),
    ),
    responses(
        (status = 200, body = Envelope<PcapStats>, description = "The statistics"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "beyond",
)]
pub(super) async fn stats(
    State(app): State<Arc<App>>,
    target: Target,
) -> Result<Response, ApiError> {
    Ok(success(blocking(move || stats_of(&app, target)).await?))
}

#[utoipa::path(
    post, path = "/accounts/{account_id}/pcaps/{pcap_id}/retry",
    operation_id = "tapline-pcap-retry",
    description = "Sends again what of a full capture could not be delivered to its bucket, and is still \
                   on this host.",
    params(
        ("account_id" = String, Path, min_length = 32, max_length = 32),
        ("pcap_id" = String, Path, min_length = 32, max_length = 32),
    ),
    responses(
        (status = 200, body = Envelope<PcapFull>, description = "The capture"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "beyond",
)]
pub(super) async fn retry(
    State(app): State<Arc<App>>,
    target: Target,
) -> Result<Response, ApiError> {
    let record = blocking(move || Ok(app.captures.retry(target.account, target.pcap)?)).await?;
    Ok(success(record.result()))
}

#[utoipa::path(
    get, path = "/healthz", operation_id = "tapline-healthz",
    description = "Whether the daemon answers.",
    responses(
        (status = 200, body = Object, description = "It does"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "beyond",
)]
pub(super) async fn healthz(_anyone: Anyone) -> Response {
    Json(json!({ "status": "ok" })).into_response()
}

#[utoipa::path(
    get, path = "/readyz", operation_id = "tapline-readyz",
    description = "Whether captures can be started; and whether the recorder records, and why not.",
    responses(
        (status = 200, body = Object, description = "They can"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "beyond",
)]
pub(super) async fn readyz(
    State(app): State<Arc<App>>,
    _anyone: Anyone,
) -> Result<Response, ApiError> {
    let known = Arc::clone(&app);
    let ready = blocking(move || Ok(known.captures.ready())).await?;
    Ok(match ready {
        Ok(()) => {
            let recorder = recorder_in_words(app.captures.recording());
            Json(json!({ "status": "ok", "recorder": recorder })).into_response()
        }
        Err(message) => failure(
            StatusCode::SERVICE_UNAVAILABLE,
            vec![Message { code: 1171, message, source: None }],
        ),
    })
}

fn recorder_in_words(recording: &Recording) -> String {
    match recording.stats() {
        None => "off".into(),
        Some(stats) if stats.recording => "recording".into(),
        Some(stats) => format!("not recording: {}", stats.error.unwrap_or_default()),
    }
}

#[utoipa::path(
    get, path = "/metrics", operation_id = "tapline-metrics",
    description = "Counters, in the text format of Prometheus.",
    responses(
        (status = 200, body = String, content_type = "text/plain", description = "The metrics"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "beyond",
)]
pub(super) async fn metrics(
    State(app): State<Arc<App>>,
    _anyone: Anyone,
) -> Result<Response, ApiError> {
    let page = blocking(move || Ok(prometheus::page(&app.counters, &app.captures))).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response())
}

#[utoipa::path(
    get, path = "/openapi.json", operation_id = "tapline-openapi",
    description = "This description.",
    responses(
        (status = 200, body = Object, description = "The description"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "beyond",
)]
pub(super) async fn openapi(_anyone: Anyone) -> Response {
    Json(Description::openapi()).into_response()
}
