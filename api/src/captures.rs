//! Captures: from the request to the record of what was captured.
//!
//! # A full capture's life
//!
//! 1. Its record is written, `pending`. From here on a crash finds it.
//! 2. The engine starts the job. When that returns, the next matching packet is a hit, and the client
//!    gets its answer.
//! 3. A thread waits for the job's end: a limit, the time, [`Captures::stop`], a failure, a shutdown.
//! 4. The record is written, `conversion_pending`, and the capture is no longer live.
//! 5. [`crate::upload`] delivers its files, as it has done all along, and makes the record final:
//!    `success` or `failed`.
//!
//! What is `running` is known from who is alive, not from the database: one write less before the
//! answer.
//!
//! A simple one is taken out of what is recorded all the time: [`crate::simple`].
//!
//! # Threads
//!
//! Everything here blocks, for as long as the disk takes; the HTTP side calls it from threads that may.

mod engine;
mod live;
mod recording;
mod recovery;
mod retry;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use capture_user::{
    engine::{Ending, EngineError, JobSpec, StartError, Summary},
    error::with_causes,
    recorder::RecorderError,
    segment::{SegmentError, Target},
};
use thiserror::Error;
use tokio::sync::watch;

use self::engine::Engines;
pub(crate) use self::live::by_cause;
pub use self::{
    live::{Live, QueueStats, Rates, Stats},
    recording::Recording,
    recovery::Recovered,
};
use crate::{
    config::{Buffers, Config},
    download::{DownloadError, Files},
    id,
    metrics::Counters,
    ownership::{OwnershipError, Ownerships},
    record::{Capture, Record, Status, now_us},
    request::{FullRequest, Request},
    simple::{SimpleError, Simples},
    store::{Store, StoreError},
    upload::{Delivery, Means, Told, UploadStats, Uploads, on_sealed},
};

/// What the API documents for a full capture that found nothing.
pub const NO_PACKETS: &str = "No packets matched the filter in the time limit given. Please modify the \
                              filter or try again.";

/// A capture could not be created, found or stopped.
#[derive(Debug, Error)]
pub enum CaptureError {
    /// As many as there may be.
    #[error("{limit} captures are running, the most that this host allows: stop one, or wait")]
    Full {
        /// How many.
        limit: usize,
    },
    /// No such capture, or another account's.
    #[error("no capture has the id {}", id::show(*.0))]
    Unknown(u128),
    /// The destination cannot be written.
    #[error("the destination cannot be written: {0}")]
    Destination(String),
    /// The destination is not the account's.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// There is nothing to send again.
    #[error("capture {} cannot be sent again: {reason}", id::show(*.id))]
    Retry {
        /// Which.
        id: u128,
        /// Why not.
        reason: String,
    },
    /// The daemon is on its way out.
    #[error("the service is shutting down")]
    ShuttingDown,
    /// Its files.
    #[error(transparent)]
    Download(#[from] DownloadError),
    /// A simple one.
    #[error(transparent)]
    Simple(#[from] SimpleError),
    /// It ends by itself.
    #[error(
        "capture {} is a simple one, which ends by itself within a moment: only full captures are stopped",
        id::show(*.0)
    )]
    NotFull(u128),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The interfaces.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The recorder.
    #[error("the recorder cannot be started")]
    Recorder(#[from] RecorderError),
    /// The job.
    #[error(transparent)]
    Start(StartError),
    /// A thread could not be started.
    #[error("no thread for the capture")]
    Thread(#[source] std::io::Error),
}

/// All captures.
#[derive(Debug)]
pub struct Captures {
    store: Arc<Store>,
    ownerships: Arc<Ownerships>,
    uploads: Arc<Uploads>,
    engines: Arc<Engines>,
    recording: Arc<Recording>,
    simples: Arc<Simples>,
    live: Mutex<HashMap<u128, Arc<Live>>>,
    /// Captures from before they start until their end has been written.
    busy: AtomicUsize,
    limit: usize,
    prefix: String,
    buffers: Buffers,
    closing: AtomicBool,
    retrying: Mutex<()>,
    counters: Arc<Counters>,
}

/// A capture's place among those that may run at once.
struct Slot(Arc<Captures>);

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Captures {
    /// Opens the interfaces, closes what a crash left open, and goes on with what was not delivered.
    pub fn open(config: &Config, means: Means) -> Result<Arc<Self>, CaptureError> {
        let store = Arc::clone(&means.store);
        let undelivered = recovery::recover(&store)?;
        let engines = Arc::new(Engines::open(config)?);
        let recording = Arc::new(Recording::start(config, &engines)?);
        let simples = Simples::open(
            config,
            Arc::clone(&store),
            Arc::clone(&recording),
            Arc::clone(&means.counters),
            means.runtime.clone(),
        )?;
        let host = if config.host.is_empty() { host_name() } else { config.host.clone() };
        let captures = Arc::new(Self {
            store,
            ownerships: Arc::clone(&means.ownerships),
            counters: Arc::clone(&means.counters),
            uploads: Uploads::open(config, means)?,
            engines,
            recording,
            simples,
            live: Mutex::default(),
            busy: AtomicUsize::new(0),
            limit: config.max_jobs,
            prefix: format!("{}_{host}", config.colo),
            buffers: config.buffers.clone(),
            closing: AtomicBool::new(false),
            retrying: Mutex::default(),
        });
        for record in undelivered {
            captures.uploads.resume(record);
        }
        Ok(captures)
    }

    fn live(&self) -> MutexGuard<'_, HashMap<u128, Arc<Live>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Captures that run now.
    pub fn running(&self) -> usize {
        self.live().len()
    }

    /// Whether a capture could be started, as far as the interfaces go.
    pub fn ready(&self) -> Result<(), String> {
        if self.closing.load(Ordering::Acquire) {
            return Err(CaptureError::ShuttingDown.to_string());
        }
        self.engines.ready()
    }

    fn slot(self: &Arc<Self>) -> Result<Slot, CaptureError> {
        let take = |busy| (busy < self.limit).then_some(busy + 1);
        self.busy
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .map_err(|_full| CaptureError::Full { limit: self.limit })?;
        Ok(Slot(Arc::clone(self)))
    }

    /// Starts a capture.
    pub fn create(
        self: &Arc<Self>,
        account: u128,
        request: &Request,
    ) -> Result<Capture, CaptureError> {
        match request {
            Request::Full(request) => self.create_full(account, request).map(Capture::Full),
            Request::Simple(_) if self.closing.load(Ordering::Acquire) => {
                Err(CaptureError::ShuttingDown)
            }
            Request::Simple(request) => Ok(Capture::Simple(self.simples.create(account, request)?)),
        }
    }

    fn create_full(
        self: &Arc<Self>,
        account: u128,
        request: &FullRequest,
    ) -> Result<Record, CaptureError> {
        let slot = self.slot()?;
        if self.closing.load(Ordering::Acquire) {
            return Err(CaptureError::ShuttingDown);
        }
        let bucket = self.ownerships.open(account, &request.destination)?;
        let mut record = Record::new(account, request, self.store.submitted_us());
        if record.is_uploaded() {
            record.folder = self.uploads.spool().join(record.folder_name());
        }
        self.store.put(&record)?;
        let delivery = self.uploads.begin(&record, bucket);
        let job = match self.engines.start(|| self.spec(&record, request, &delivery)) {
            Ok(job) => job,
            Err(error) => {
                delivery.tell(Told::Withdrawn);
                // It never was: no client knows its id.
                self.store.remove(&record)?;
                // Removed only if nothing is in it.
                drop(std::fs::remove_dir(&record.folder));
                return Err(refusal(error, self.limit));
            }
        };
        let live = Arc::new(Live::new(record, job));
        let record = live.record();
        self.live().insert(record.id, Arc::clone(&live));
        self.counters.captures_started();
        let waiter = thread::Builder::new().name("tl-capture".into());
        let watched = Arc::clone(&live);
        let watch = move || {
            let summary = watched.wait();
            slot.0.close(&watched, summary.as_ref(), &delivery);
            drop(slot);
        };
        if let Err(error) = waiter.spawn(watch) {
            live.stop();
            self.live().remove(&record.id);
            return Err(CaptureError::Thread(error));
        }
        // A shutdown that began meanwhile may not have seen it.
        if self.closing.load(Ordering::Acquire) {
            live.stop();
        }
        Ok(record)
    }

    fn spec(&self, record: &Record, request: &FullRequest, delivery: &Arc<Delivery>) -> JobSpec {
        JobSpec {
            filter: request.filter,
            packet_limit: request.packet_limit.map(u64::from),
            byte_limit: request.byte_limit,
            duration: Some(Duration::from_secs(request.time_limit.into())),
            rotation: self.uploads.rotation(record, self.buffers.segment_bytes),
            // What is sent is read for that, and hashed then.
            hashed: !record.is_uploaded(),
            sealed: Some(on_sealed(delivery)),
            budget: delivery.budget(),
            comment: format!("capture {}", id::show(record.id)),
            buffers: self.buffers.per_queue,
            buffer_size: self.buffers.bytes,
            ..JobSpec::new(Target::Directory {
                path: record.folder.clone(),
                prefix: self.prefix.clone(),
            })
        }
    }

    /// A capture of an account, of either kind.
    pub fn get(&self, account: u128, id: u128) -> Result<Capture, CaptureError> {
        // What has ended is in the database before it is no longer live.
        if let Some(live) = self.find_live(account, id) {
            return Ok(Capture::Full(live.record()));
        }
        if let Some(record) = self.uploads.find(account, id).and_then(|delivery| delivery.record())
        {
            return Ok(Capture::Full(record));
        }
        self.store.get_any(account, id)?.ok_or(CaptureError::Unknown(id))
    }

    /// A capture of an account, if it runs.
    pub fn find_live(&self, account: u128, id: u128) -> Option<Arc<Live>> {
        self.live().get(&id).filter(|live| live.account() == account).map(Arc::clone)
    }

    /// What is recorded all the time.
    pub fn recording(&self) -> &Recording {
        &self.recording
    }

    /// The files of a capture that has ended, as far as they are on this host.
    pub fn download(&self, account: u128, id: u128) -> Result<Files, CaptureError> {
        let record = match self.get(account, id)? {
            Capture::Simple(record) => return Ok(self.simples.files(&record)?),
            Capture::Full(record) => record,
        };
        if record.outcome.is_none() && !record.is_final() {
            return Err(DownloadError::NotFinished.into());
        }
        let base = self.uploads.base(&record).map_err(OwnershipError::from)?;
        Ok(Files::of_full(&record, &base)?)
    }

    /// What is on its way to where it belongs.
    pub fn uploads(&self) -> &Uploads {
        &self.uploads
    }

    /// Turns true when a capture is final; none if it is.
    pub fn delivered(&self, account: u128, id: u128) -> Option<watch::Receiver<bool>> {
        let full = self.uploads.find(account, id).map(|delivery| delivery.delivered());
        full.or_else(|| self.simples.ended(id))
    }

    /// How far a full capture's files have come.
    pub fn upload_stats(&self, record: &Record) -> Result<UploadStats, CaptureError> {
        match self.uploads.find(record.account, record.id) {
            Some(delivery) => Ok(delivery.stats()),
            None => Ok(self.uploads.stats_of(record)?),
        }
    }

    /// The newest captures of an account, of both kinds.
    pub fn list(&self, account: u128, most: usize) -> Result<Vec<Capture>, CaptureError> {
        let live: HashMap<u128, Arc<Live>> = self.live().clone();
        let mut captures = self.store.list(account, most)?;
        for capture in &mut captures {
            // A capture may have ended between the two looks; then the database has the news.
            if let Capture::Full(record) = capture
                && !record.is_final()
                && let Some(now) = match live.get(&record.id) {
                    Some(live) => Some(live.record()),
                    None => self.uploads.find(account, record.id).and_then(|one| one.record()),
                }
            {
                *record = now;
            }
        }
        Ok(captures)
    }

    /// Tells a full capture to stop. One that has ended is left as it is.
    pub fn stop(&self, account: u128, id: u128) -> Result<(), CaptureError> {
        let Some(live) = self.find_live(account, id) else {
            return match self.store.get_any(account, id)? {
                Some(Capture::Full(_)) => Ok(()),
                Some(Capture::Simple(_)) => Err(CaptureError::NotFull(id)),
                None => Err(CaptureError::Unknown(id)),
            };
        };
        if let Some(record) = live.request_stop(now_us()) {
            // First the job, which packets depend on. Its end may be written before this; then there
            // is nothing left to write.
            live.stop();
            live.unless_closed(|| self.store.put(&record))?;
        }
        Ok(())
    }

    /// Step 4.
    fn close(&self, live: &Live, summary: Option<&Summary>, delivery: &Delivery) {
        let outcome = live.close(|record| {
            conclude(record, summary, self.closing.load(Ordering::Acquire));
            self.store.put(record)
        });
        if let Err(error) = outcome {
            // The next start closes it by its files.
            tracing::error!(error = with_causes(&error), "the end of a capture is not remembered");
        }
        let record = live.record();
        self.counters.capture_ended(summary);
        tracing::info!(
            pcap_id = id::show(record.id),
            outcome = ?record.outcome.unwrap_or(record.status),
            packets = record.packets_captured,
            error = record.error_message,
            "capture ended"
        );
        let id = record.id;
        delivery.tell(Told::Ended(Box::new(record)));
        self.live().remove(&id);
    }

    /// Seals every capture, delivers what can be in a moment, and refuses new ones. Returns whether all
    /// ended in time.
    pub fn shutdown(&self, patience: Duration) -> bool {
        self.closing.store(true, Ordering::Release);
        let start = Instant::now();
        loop {
            self.live().values().for_each(|live| live.stop());
            let sealed = self.busy.load(Ordering::Acquire) == 0;
            if sealed || start.elapsed() > patience {
                self.simples.shutdown();
                self.recording.end();
                self.uploads.shutdown();
                return sealed;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Enters into the record how its job ended.
fn conclude(record: &mut Record, summary: Option<&Summary>, closing: bool) {
    record.status = Status::ConversionPending;
    let Some(summary) = summary else {
        record.outcome = Some(Status::Failed);
        record.error_message = Some("The capture engine ended unexpectedly.".into());
        return;
    };
    record.packets_captured = summary.law.written.packets;
    record.segments = summary.segments.iter().map(Into::into).collect();
    record.summary = serde_json::to_value(summary).ok();
    let (outcome, error_message) = match &summary.ending {
        Ending::Failed(cause) => (Status::Failed, Some(cause.clone())),
        _ if record.packets_captured > 0 => (Status::Success, None),
        Ending::Stopped if closing && record.stop_requested_us.is_none() => (
            Status::Failed,
            Some("The service was stopped before a packet matched the filter.".into()),
        ),
        _ => (Status::Failed, Some(NO_PACKETS.into())),
    };
    record.outcome = Some(outcome);
    record.error_message = error_message;
}

/// What the engine's refusal means to who asked.
fn refusal(error: CaptureError, limit: usize) -> CaptureError {
    match error {
        CaptureError::Start(StartError::NoSlot { .. }) => CaptureError::Full { limit },
        CaptureError::Start(StartError::Segment(SegmentError { source, .. })) => {
            CaptureError::Destination(source.to_string())
        }
        other => other,
    }
}

fn host_name() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' };
    let name: String = name.to_string_lossy().chars().take(63).map(plain).collect();
    if name.is_empty() { "host".into() } else { name }
}
