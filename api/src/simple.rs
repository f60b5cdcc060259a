//! Simple captures: packets that have passed, out of what the recorder has.
//!
//! # A capture's life
//!
//! 1. Its record is written, `pending`, and the client gets its answer. From here on a crash finds it, and
//!    the next start answers it.
//! 2. When it is its turn, the recorder is told to write what it has in memory, and is asked. What was
//!    found goes to `DATA/simple/ID.pcapng`, hidden until it is whole.
//! 3. The record is written, `success` also when nothing was found, or `failed` with the reason.
//! 4. The file is downloaded, until it has been there for long enough or newer ones need its room.

mod files;
mod record;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use capture_user::{
    error::with_causes,
    recorder::{self, Answer, Query, QueryError},
    segment::export::Holds,
};
use thiserror::Error;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
};

pub use self::record::{PcapSimple, SimpleKind, SimpleRecord};
use crate::{
    captures::Recording,
    config::{Config, SimpleSettings},
    download::{DownloadError, Files},
    id,
    metrics::Counters,
    record::Status,
    request::SimpleRequest,
    store::{Store, StoreError},
};

/// Between two simple captures of an account, where there must be some time.
const MINUTE: Duration = Duration::from_mins(1);

/// For those that are being looked for when the daemon stops.
const GRACE: Duration = Duration::from_secs(5);

/// A simple capture cannot be created.
#[derive(Debug, Error)]
pub enum SimpleError {
    /// Nothing is recorded.
    #[error(
        "`simple` captures are answered by the recorder, which is off on this host: its operator can \
         turn it on with `enabled = true` in [recorder] of the configuration"
    )]
    Off,
    /// There was one less than a minute ago.
    #[error("this host allows one simple capture per minute: the next one in {} s", wait.as_secs())]
    TooSoon {
        /// In whole seconds.
        wait: Duration,
    },
    /// As many as there may be.
    #[error("{limit} simple captures wait for their turn, the most that this host allows")]
    Waiting {
        /// How many.
        limit: usize,
    },
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// All simple captures.
#[derive(Debug)]
pub struct Simples {
    store: Arc<Store>,
    recording: Arc<Recording>,
    counters: Arc<Counters>,
    runtime: Handle,
    settings: SimpleSettings,
    folder: PathBuf,
    /// What bounds how many are looked for at once; closed when the daemon stops.
    turns: Arc<Semaphore>,
    /// Not final, as far as this process knows; who watches one is told when it is.
    unfinished: Mutex<HashMap<u128, watch::Sender<bool>>>,
    /// Of these, being looked for.
    working: AtomicUsize,
    /// When each account had its last one.
    last: Mutex<HashMap<u128, Instant>>,
}

impl Simples {
    /// Puts the folder in order, and goes on with what is not answered.
    pub fn open(
        config: &Config,
        store: Arc<Store>,
        recording: Arc<Recording>,
        counters: Arc<Counters>,
        runtime: Handle,
    ) -> Result<Arc<Self>, StoreError> {
        let folder = config.data_dir.join("simple");
        files::open(&folder)
            .map_err(|source| StoreError::Folder { path: folder.clone(), source })?;
        let simples = Arc::new(Self {
            store,
            recording,
            counters,
            runtime,
            turns: Arc::new(Semaphore::new(config.simple.at_once)),
            settings: config.simple.clone(),
            folder,
            unfinished: Mutex::default(),
            working: AtomicUsize::new(0),
            last: Mutex::default(),
        });
        for record in simples.store.unfinished_simple()? {
            tracing::info!(pcap_id = id::show(record.id), "answering what was asked before");
            simples.begin(record);
        }
        simples.sweep();
        simples.runtime.spawn(files::sweep_now_and_then(Arc::downgrade(&simples)));
        Ok(simples)
    }

    fn unfinished(&self) -> MutexGuard<'_, HashMap<u128, watch::Sender<bool>>> {
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Turns true when a capture is final; none if it is.
    pub(crate) fn ended(&self, id: u128) -> Option<watch::Receiver<bool>> {
        self.unfinished().get(&id).map(watch::Sender::subscribe)
    }

    /// Takes a question, which is answered in a moment.
    pub fn create(
        self: &Arc<Self>,
        account: u128,
        request: &SimpleRequest,
    ) -> Result<SimpleRecord, SimpleError> {
        if !self.recording.is_on() {
            return Err(SimpleError::Off);
        }
        let limit = self.settings.waiting + self.settings.at_once;
        if self.unfinished().len() >= limit {
            return Err(SimpleError::Waiting { limit: self.settings.waiting });
        }
        self.admit(account)?;
        let record = SimpleRecord::new(account, request, self.store.submitted_us());
        self.store.put_simple(&record)?;
        self.counters.captures_started();
        self.begin(record.clone());
        Ok(record)
    }

    /// Whether it is not too soon.
    fn admit(&self, account: u128) -> Result<(), SimpleError> {
        if !self.settings.one_per_minute {
            return Ok(());
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.retain(|_, at| at.elapsed() < MINUTE);
        if let Some(at) = last.get(&account) {
            let left = MINUTE.saturating_sub(at.elapsed());
            return Err(SimpleError::TooSoon { wait: Duration::from_secs(left.as_secs() + 1) });
        }
        last.insert(account, Instant::now());
        Ok(())
    }

    /// Answers when it is the turn of this one. When the daemon stops before that, the next start does.
    fn begin(self: &Arc<Self>, record: SimpleRecord) {
        let simples = Arc::clone(self);
        let id = record.id;
        self.unfinished().insert(id, watch::Sender::new(false));
        self.runtime.spawn(async move {
            let turn = simples.turns.acquire().await;
            if turn.is_ok() {
                let (working, record) = (Arc::clone(&simples), record);
                let answer = tokio::task::spawn_blocking(move || {
                    working.working.fetch_add(1, Ordering::AcqRel);
                    working.answer(record);
                    working.working.fetch_sub(1, Ordering::AcqRel);
                });
                if let Err(error) = answer.await {
                    tracing::error!(%error, "a simple capture is not answered before the next start");
                }
            }
            if let Some(watched) = simples.unfinished().remove(&id) {
                watched.send_replace(true);
            }
        });
    }

    /// Steps 2 and 3.
    fn answer(&self, mut record: SimpleRecord) {
        match self.ask(&record) {
            Ok(answer) => {
                record.status = Status::Success;
                record.packets = answer.packets;
                record.captured_bytes = answer.captured_bytes;
            }
            Err(error) => {
                tracing::error!(
                    pcap_id = id::show(record.id),
                    error,
                    "a simple capture has failed"
                );
                record.status = Status::Failed;
                record.error_message = Some(error);
            }
        }
        self.counters.capture_delivered(record.status);
        if let Err(error) = self.store.put_simple(&record) {
            // The next start asks again.
            tracing::error!(error = with_causes(&error), "the end of a capture is not remembered");
        }
        self.sweep();
    }

    /// Asks the recorder.
    fn ask(&self, record: &SimpleRecord) -> Result<Answer, String> {
        let filter = record.filter_v1.filter().map_err(|error| error.to_string())?;
        // What was recorded until now has to be found.
        self.recording.flush();
        let nanoseconds = |us: i64| u64::try_from(us).unwrap_or_default() * 1000;
        let from_us = record.offset_us - i64::from(record.time_limit) * 1_000_000;
        let query = Query {
            from_ns: nanoseconds(from_us),
            to_ns: nanoseconds(record.offset_us),
            filter,
            limit: Some(record.packet_limit.into()),
        };
        let start = Instant::now();
        let answer = recorder::Store::open(self.recording.folder())
            .map_err(QueryError::from)
            .and_then(|store| store.query(&query, &files::path(&self.folder, record.id)))
            .map_err(|error| {
                tracing::error!(error = with_causes(&error), "asking the recorder");
                in_words(&error)
            })?;
        let blocks = &answer.blocks;
        if blocks.corrupt > 0 {
            tracing::warn!(
                pcap_id = id::show(record.id),
                blocks = blocks.corrupt,
                "damaged blocks of the recorder were passed over"
            );
        }
        tracing::info!(
            pcap_id = id::show(record.id),
            packets = answer.packets,
            bytes = answer.size,
            milliseconds = start.elapsed().as_secs_f64() * 1e3,
            "simple capture answered"
        );
        Ok(answer)
    }

    /// The file of a capture.
    pub fn files(&self, record: &SimpleRecord) -> Result<Files, DownloadError> {
        match record.status {
            Status::Success => {}
            Status::Failed => {
                let reason = record.error_message.clone().unwrap_or_default();
                return Err(DownloadError::Nothing { reason });
            }
            _ => return Err(DownloadError::NotFinished),
        }
        let path = files::path(&self.folder, record.id);
        if !path.is_file() {
            let SimpleSettings { keep_hours: hours, files, bytes, .. } = self.settings;
            return Err(DownloadError::Expired { hours, files, bytes });
        }
        let SimpleRecord { packets, captured_bytes, .. } = *record;
        Ok(Files::of_simple(record.id, path, Holds { packets, captured_bytes }))
    }

    /// Lets those end that are being looked for; the next start answers the others.
    pub(crate) fn shutdown(&self) {
        self.turns.close();
        let start = Instant::now();
        while self.working.load(Ordering::Acquire) > 0 && start.elapsed() < GRACE {
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Removes files that have been there for long enough, or have no room.
    fn sweep(&self) {
        files::sweep(&self.folder, &self.settings);
    }
}

/// What the client is told, who need not know where things are on this host.
fn in_words(error: &QueryError) -> String {
    match error {
        QueryError::Segment(error) => {
            format!(
                "{} what was recorded, or what was found, failed: {}",
                error.operation, error.source
            )
        }
        other => with_causes(other),
    }
}
