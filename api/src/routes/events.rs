//! A capture's events, as they happen. <https://html.spec.whatwg.org/multipage/server-sent-events.html>

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::State,
    response::{
        IntoResponse as _, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::stream;
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::{Instant, sleep_until},
};

use super::{App, beyond::stats_of, blocking, caller::Target};
use crate::{envelope::Failure, error::ApiError};

/// Between two `stats` events.
const EVERY: Duration = Duration::from_secs(1);

#[utoipa::path(
    get, path = "/accounts/{account_id}/pcaps/{pcap_id}/events",
    operation_id = "tapline-pcap-events",
    description = "Server-sent events: `capture` at once and at the end, with what `get` answers; \
                   `stats` every second in between. The stream ends with the capture.",
    params(
        ("account_id" = String, Path, min_length = 32, max_length = 32),
        ("pcap_id" = String, Path, min_length = 32, max_length = 32),
    ),
    responses(
        (status = 200, body = String, content_type = "text/event-stream", description = "Events"),
        (status = "default", body = Failure, description = "Why not"),
    ),
    tag = "beyond",
)]
pub(super) async fn events(
    State(app): State<Arc<App>>,
    target: Target,
) -> Result<Response, ApiError> {
    let permit = Arc::clone(&app.streams)
        .try_acquire_owned()
        .map_err(|_closed_or_none| ApiError::Streams(app.config.limits.event_streams))?;
    // An id that is unknown is an error, not an empty stream.
    let known = Arc::clone(&app);
    let first = blocking(move || Ok(known.captures.get(target.account, target.pcap)?)).await?;
    let ended = app.captures.delivered(target.account, target.pcap);
    let closing = app.closing.clone();
    let next = if first.is_final() { Next::Nothing } else { Next::Stats };
    let first = event("capture", &first.result());
    let watcher = Watcher { app, target, ended, closing, next, _permit: permit };
    let rest = stream::unfold(watcher, Watcher::next);
    let all = stream::StreamExt::chain(stream::once(async { Ok(first) }), rest);
    Ok(Sse::new(all).keep_alive(KeepAlive::default()).into_response())
}

enum Next {
    Stats,
    Nothing,
}

struct Watcher {
    app: Arc<App>,
    target: Target,
    ended: Option<watch::Receiver<bool>>,
    closing: watch::Receiver<bool>,
    next: Next,
    _permit: OwnedSemaphorePermit,
}

impl Watcher {
    /// The next event: statistics when it is time, or the end.
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        if matches!(self.next, Next::Nothing) {
            return None;
        }
        let due = Instant::now() + EVERY;
        let ended = async {
            // Without it, the capture ended before anyone could watch.
            if let Some(ended) = &mut self.ended {
                drop(ended.wait_for(|ended| *ended).await);
            }
        };
        let over = tokio::select! {
            () = ended => true,
            // Captures are sealed while the daemon stops; the stream is not to outlast that.
            _ = self.closing.wait_for(|closing| *closing) => true,
            () = sleep_until(due) => false,
        };
        let (app, target) = (Arc::clone(&self.app), self.target);
        let event = if over {
            self.next = Next::Nothing;
            let record = blocking(move || Ok(app.captures.get(target.account, target.pcap)?));
            event("capture", &record.await.ok()?.result())
        } else {
            let stats = blocking(move || stats_of(&app, target));
            event("stats", &stats.await.ok()?)
        };
        Some((Ok(event), self))
    }
}

fn event(name: &str, data: &impl serde::Serialize) -> Event {
    // What has just been an answer's body can be serialized.
    let data = serde_json::to_string(data).unwrap_or_default();
    Event::default().event(name).data(data)
}
