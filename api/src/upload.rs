//! From a capture's folder to where its files belong.
//!
//! - A segment is sent as soon as it is sealed, while the capture goes on. It is removed here only when
//!   the store has confirmed it and that is on the disk; so after any crash each segment is here, or
//!   there, or in both places under the same name, and sending it again changes nothing.
//! - Names follow from the capture and the segment alone. A multipart upload is completed when every
//!   part of it has been confirmed, and is aborted otherwise.
//! - Nothing waits for a store but what goes there. Those who capture are never blocked: segments pile up
//!   in the spool, which has a budget, and a share of it for each capture. Sending has threads of its
//!   own, and a store, and a capture, has a few uploads at once and no more.
//! - What fails is tried again, more and more slowly, as long as the capture runs. Then it has failed when
//!   the store has refused it a few times, or has taken nothing for `upload.patience_seconds`. Its segments
//!   stay for `spool.retention_hours`, and can be sent again until then.
//! - A folder on this host is written to by the capture itself. Its segments are hashed as they are
//!   written, or read and hashed afterwards if there was no time for it, instead of sent, so that such a
//!   capture, too, ends in a manifest and in nothing else.
//!
//! ```text
//!  disk thread ── sealed ──► Delivery ── a task per segment ──► store
//!  close       ── ended ───►    │        transfer.rs, parts.rs
//!                               └─ at last: manifest.json, and the record is final
//! ```

mod backoff;
mod delivery;
mod manifest;
mod parts;
mod progress;
mod spool;
mod task;
mod transfer;

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use capture_user::{
    segment::Rotation,
    spool::{Budget, OnSealed},
};
use serde::{Deserialize, Serialize};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, mpsc, watch},
};

pub use self::{
    delivery::{Delivery, Told},
    progress::{SegmentState, SegmentUpload, UploadStats},
};
use self::{parts::Compression, task::Task};
use crate::{
    config::{Config, SpoolSettings, UploadSettings},
    destination::{Bucket, DestinationError, Destinations},
    metrics::Counters,
    ownership::{OwnershipError, Ownerships},
    record::{Record, Segment, Status, now_us},
    store::{Store, StoreError},
};

/// For uploads to end when the daemon stops; what does not goes on at the next start.
const GRACE: Duration = Duration::from_secs(5);

/// For multipart uploads to be aborted then.
const ABORT: Duration = Duration::from_secs(3);

/// A segment that is where it belongs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// As it was captured.
    pub segment: Segment,
    /// What it is called there, in the capture's folder.
    pub name: String,
    /// Bytes there.
    pub size: u64,
    /// Of these, in hexadecimal digits.
    pub sha256: String,
}

/// All that is on its way.
#[derive(Debug)]
pub struct Uploads {
    store: Arc<Store>,
    ownerships: Arc<Ownerships>,
    destinations: Arc<Destinations>,
    counters: Arc<Counters>,
    runtime: Handle,
    settings: UploadSettings,
    spool_settings: SpoolSettings,
    compression: Option<Compression>,
    spool: PathBuf,
    budget: Arc<Budget>,
    at_once: Arc<Semaphore>,
    /// By destination without its directory.
    stores: Mutex<HashMap<String, Weak<Semaphore>>>,
    active: Mutex<HashMap<u128, Arc<Delivery>>>,
    stopping: watch::Sender<bool>,
}

/// What uploads work with.
#[derive(Clone, Debug)]
pub struct Means {
    /// What is remembered.
    pub store: Arc<Store>,
    /// Whose buckets are whose.
    pub ownerships: Arc<Ownerships>,
    /// How they are reached.
    pub destinations: Arc<Destinations>,
    /// What is counted.
    pub counters: Arc<Counters>,
    /// The threads that send.
    pub runtime: Handle,
}

impl Uploads {
    /// Puts the spool in order. Nothing is sent yet.
    pub fn open(config: &Config, means: Means) -> Result<Arc<Self>, StoreError> {
        let Means { store, ownerships, destinations, counters, runtime } = means;
        let spool = config.data_dir.join("spool");
        let used = spool::open(&spool)
            .map_err(|source| StoreError::Folder { path: spool.clone(), source })?;
        let uploads = Arc::new(Self {
            store,
            ownerships,
            destinations,
            counters,
            runtime,
            compression: Compression::new(&config.upload),
            settings: config.upload.clone(),
            spool_settings: config.spool.clone(),
            spool,
            budget: Arc::new(Budget::new(config.spool.bytes, used)),
            at_once: Arc::new(Semaphore::new(config.upload.at_once)),
            stores: Mutex::default(),
            active: Mutex::default(),
            stopping: watch::Sender::new(false),
        });
        uploads.sweep();
        uploads.runtime.spawn(spool::sweep_now_and_then(Arc::downgrade(&uploads)));
        Ok(uploads)
    }

    fn active(&self) -> MutexGuard<'_, HashMap<u128, Arc<Delivery>>> {
        self.active.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where captures for buckets are written.
    pub fn spool(&self) -> &Path {
        &self.spool
    }

    /// What a capture's folder on this host is in, as long as captures may be written there.
    pub fn base(&self, record: &Record) -> Result<PathBuf, DestinationError> {
        if record.is_uploaded() {
            return Ok(self.spool.clone());
        }
        let (destination, _keys) = self.destinations.parse(&record.destination_conf)?;
        Ok(destination.folder().map(Path::to_path_buf).unwrap_or_default())
    }

    /// Bytes in the spool, and how many there may be.
    pub fn spool_bytes(&self) -> (u64, u64) {
        (self.budget.used(), self.budget.limit())
    }

    /// When a capture's segments are sealed: those that are sent, also by time and well before its share
    /// of the spool is full.
    pub fn rotation(&self, record: &Record, bytes: u64) -> Rotation {
        if !record.is_uploaded() {
            return Rotation { bytes: Some(bytes), every: None };
        }
        let share = self.spool_settings.capture_bytes / 4;
        let least = 2 * capture_user::engine::MIN_BUFFER as u64;
        let every = Some(Duration::from_secs(self.settings.segment_seconds));
        Rotation { bytes: Some(bytes.min(share).max(least)), every }
    }

    /// Makes ready for the segments of a capture that is about to start.
    pub fn begin(self: &Arc<Self>, record: &Record, bucket: Option<Bucket>) -> Arc<Delivery> {
        let share = self.spool_settings.capture_bytes.min(self.spool_settings.bytes);
        let budget = Arc::new(Budget::within(&self.budget, share));
        self.deliver(record, budget, bucket)
    }

    /// Goes on with a capture that has ended.
    pub fn resume(self: &Arc<Self>, record: Record) {
        let delivery = self.deliver(&record, Arc::clone(&self.budget), None);
        delivery.tell(Told::Ended(Box::new(record)));
    }

    fn deliver(
        self: &Arc<Self>,
        record: &Record,
        budget: Arc<Budget>,
        bucket: Option<Bucket>,
    ) -> Arc<Delivery> {
        let (sender, inbox) = mpsc::unbounded_channel();
        let delivery = Arc::new(Delivery::new(record, sender, budget));
        self.active().insert(record.id, Arc::clone(&delivery));
        let gate = self.gate(record);
        let task = Task::new(Arc::clone(self), Arc::clone(&delivery), record, gate, bucket);
        self.runtime.spawn(task.run(inbox));
        delivery
    }

    /// What bounds the uploads to a capture's store.
    fn gate(&self, record: &Record) -> Arc<Semaphore> {
        let host = self.destinations.store_of(&record.destination_conf);
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        stores.retain(|_, gate| gate.strong_count() > 0);
        if let Some(gate) = stores.get(&host).and_then(Weak::upgrade) {
            return gate;
        }
        let gate = Arc::new(Semaphore::new(self.settings.per_store));
        stores.insert(host, Arc::downgrade(&gate));
        gate
    }

    /// What stands in the way of sending a capture again; none if it can be.
    pub fn cannot_retry(&self, record: &Record) -> Option<String> {
        if record.status != Status::Failed || record.upload_error.is_none() {
            return Some("all of its files that there are have been delivered".into());
        }
        if !record.folder.exists() {
            let hours = self.spool_settings.retention_hours;
            return Some(format!("its files were kept for {hours} hours, and are gone"));
        }
        self.active().contains_key(&record.id).then(|| "its files are on their way".into())
    }

    /// Whether its account may still have it sent.
    pub fn may_send(&self, record: &Record) -> Result<(), OwnershipError> {
        let (destination, _keys) = self.destinations.parse(&record.destination_conf)?;
        self.ownerships.open(record.account, &destination).map(drop)
    }

    /// A capture that is not delivered yet, whether it still captures or not.
    pub fn find(&self, account: u128, id: u128) -> Option<Arc<Delivery>> {
        self.active().get(&id).filter(|delivery| delivery.account() == account).map(Arc::clone)
    }

    /// How the files of a capture that is final, or unknown here, have fared.
    pub fn stats_of(&self, record: &Record) -> Result<UploadStats, StoreError> {
        Ok(UploadStats::of_record(record, &self.store.objects(record.id)?))
    }

    /// Uploads that move bytes now.
    pub fn in_flight(&self) -> usize {
        let active = self.active();
        let leave = active.values().filter(|delivery| !delivery.in_place());
        leave.map(|delivery| delivery.in_flight()).sum()
    }

    /// Lets what goes well come to its end, and stops the rest: the next start goes on with it. Those who
    /// capture have ended by now.
    pub fn shutdown(&self) {
        let wait_until = |most: Duration, done: &dyn Fn() -> bool| {
            let start = Instant::now();
            while !done() && start.elapsed() < most {
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        wait_until(GRACE, &|| self.active().values().all(|delivery| delivery.is_stuck()));
        self.stopping.send_replace(true);
        wait_until(ABORT, &|| self.active().is_empty());
    }

    /// Removes what has been in the spool for long enough, or has no business there.
    fn sweep(&self) {
        let retention_us = i64::from(self.spool_settings.retention_hours) * 3_600_000_000;
        let is_over = |id: u128| {
            if self.active().contains_key(&id) {
                return false;
            }
            match self.store.find_full(id) {
                Ok(Some(record)) if record.is_final() => {
                    let since = record.final_us.unwrap_or_default();
                    record.status == Status::Success
                        || record.upload_error.is_none()
                        || now_us() - since >= retention_us
                }
                // One that is not final, or a record that cannot be read: it may be needed.
                Ok(Some(_)) | Err(_) => false,
                Ok(None) => true,
            }
        };
        for freed in spool::remove(&self.spool, is_over) {
            self.budget.give_back(freed);
        }
    }
}

/// Tells a delivery of each segment as it is sealed.
pub fn on_sealed(delivery: &Arc<Delivery>) -> OnSealed {
    let delivery = Arc::clone(delivery);
    OnSealed::new(move |segment| delivery.tell(Told::Sealed(segment.into())))
}

/// Of a file that may be gone.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

#[cfg(test)]
mod tests;
