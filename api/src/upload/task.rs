//! Works on one delivery to its end.

use std::{
    collections::{HashSet, VecDeque},
    fs,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinSet,
};

use super::{
    Object, Uploads,
    backoff::Backoff,
    delivery::{Delivery, Told},
    manifest,
    transfer::{self, Failure, turned},
};
use crate::{
    destination::{Bucket, Cause},
    id,
    record::{Record, Segment, Status, now_us, time},
};

/// Refusals in a row that are believed, when the capture has ended. The first may be of keys that have
/// just been changed.
const REFUSALS: u32 = 3;

/// Most files that a message names.
const NAMED: usize = 5;

/// Why something is not where it belongs.
#[derive(Debug)]
enum Unsent {
    /// It was lost on this host.
    Gone(String),
    /// The store does not take it.
    Hopeless(Cause),
    /// The daemon stops.
    Stopped,
}

/// What there is to send.
#[derive(Clone, Debug)]
enum What {
    Segment(Segment),
    Manifest(Arc<str>),
}

impl What {
    fn name(&self) -> &str {
        match self {
            Self::Segment(segment) => &segment.name,
            Self::Manifest(_) => manifest::NAME,
        }
    }
}

/// How it ended.
#[derive(Default)]
struct Outcome {
    missing: Vec<String>,
    hopeless: Option<Cause>,
}

pub(super) struct Task {
    uploads: Arc<Uploads>,
    delivery: Arc<Delivery>,
    id: u128,
    account: u128,
    destination: String,
    folder_name: String,
    /// What bounds the uploads to this store.
    gate: Arc<Semaphore>,
    /// Opened again after each failure: keys may have been changed.
    bucket: Mutex<Option<Bucket>>,
    /// Turns true when the capture has ended.
    ended: watch::Sender<bool>,
    /// Turns true when nothing more is to be sent.
    quit: watch::Sender<bool>,
}

impl Task {
    pub(super) fn new(
        uploads: Arc<Uploads>,
        delivery: Arc<Delivery>,
        record: &Record,
        gate: Arc<Semaphore>,
        bucket: Option<Bucket>,
    ) -> Self {
        Self {
            uploads,
            delivery,
            id: record.id,
            account: record.account,
            destination: record.destination_conf.clone(),
            folder_name: record.folder_name(),
            gate,
            bucket: Mutex::new(bucket),
            ended: watch::Sender::new(false),
            quit: watch::Sender::new(false),
        }
    }

    pub(super) async fn run(self, inbox: mpsc::UnboundedReceiver<Told>) {
        let task = Arc::new(self);
        let mut stopping = task.uploads.stopping.subscribe();
        let work = Arc::clone(&task).work(inbox);
        tokio::pin!(work);
        let done = tokio::select! {
            done = &mut work => done,
            () = turned(&mut stopping) => {
                task.quit.send_replace(true);
                // It ends what it has begun.
                work.await
            }
        };
        if let Some((record, outcome)) = done {
            let last = Arc::clone(&task);
            // It is waited for.
            drop(tokio::task::spawn_blocking(move || last.conclude(record, outcome)).await);
        }
        task.uploads.active().remove(&task.id);
        task.delivery.announce();
    }

    /// Sends segments as they come, then the manifest; nothing if the capture never was, or the daemon
    /// stops.
    async fn work(
        self: Arc<Self>,
        mut inbox: mpsc::UnboundedReceiver<Told>,
    ) -> Option<(Record, Outcome)> {
        let mut known = HashSet::new();
        let mut queue = VecDeque::new();
        let mut record: Option<Record> = None;
        let mut sending: JoinSet<Result<(), Unsent>> = JoinSet::new();
        let mut outcome = Outcome::default();
        let most = if self.delivery.in_place() { 1 } else { self.uploads.settings.per_capture };
        let mut quit = self.quit.subscribe();
        loop {
            while sending.len() < most
                && outcome.hopeless.is_none()
                && let Some(segment) = queue.pop_front()
            {
                sending.spawn(Arc::clone(&self).send(What::Segment(segment)));
            }
            let idle = queue.is_empty() || outcome.hopeless.is_some();
            if record.is_some() && sending.is_empty() && idle {
                break;
            }
            tokio::select! {
                told = inbox.recv(), if record.is_none() => match told? {
                    Told::Sealed(segment) => {
                        if known.insert(segment.name.clone()) {
                            queue.push_back(segment);
                        }
                    }
                    Told::Ended(ended) => {
                        let ended = self.end(*ended, &mut known, &mut queue).await?;
                        record = Some(ended);
                    }
                    Told::Withdrawn => return None,
                },
                Some(sent) = sending.join_next() => match sent {
                    Ok(Ok(()) | Err(Unsent::Stopped)) => {}
                    Ok(Err(Unsent::Gone(name))) => outcome.missing.push(name),
                    Ok(Err(Unsent::Hopeless(cause))) => {
                        outcome.hopeless.get_or_insert(cause);
                        self.quit.send_replace(true);
                    }
                    Err(error) => {
                        outcome.hopeless.get_or_insert(Cause::own(error.to_string()));
                    }
                },
                () = turned(&mut quit), if sending.is_empty() => {}
            }
            if *quit.borrow() && outcome.hopeless.is_none() {
                while sending.join_next().await.is_some() {}
                return None;
            }
        }
        let record = record?;
        if outcome.hopeless.is_none() {
            match Arc::clone(&self).send_manifest(&record, &outcome.missing).await {
                Ok(()) | Err(Unsent::Gone(_)) => {}
                Err(Unsent::Hopeless(cause)) => outcome.hopeless = Some(cause),
                Err(Unsent::Stopped) => return None,
            }
        }
        Some((record, outcome))
    }

    /// The capture has ended: what of it has not been sent is sent now.
    async fn end(
        self: &Arc<Self>,
        mut record: Record,
        known: &mut HashSet<String>,
        queue: &mut VecDeque<Segment>,
    ) -> Option<Record> {
        let task = Arc::clone(self);
        let objects = tokio::task::spawn_blocking(move || task.already()).await.ok()?;
        for object in &objects {
            self.delivery.store(object);
            known.insert(object.segment.name.clone());
        }
        let more = record.segments.iter().filter(|segment| known.insert(segment.name.clone()));
        queue.extend(more.cloned());
        record.status = Status::ConversionPending;
        self.delivery.end(record.clone());
        self.ended.send_replace(true);
        Some(record)
    }

    /// What had been sent before a crash. Blocks.
    fn already(&self) -> Vec<Object> {
        let objects = self.uploads.store.objects(self.id).unwrap_or_else(|error| {
            // It is sent again.
            tracing::error!(error = %error, pcap_id = id::show(self.id), "objects");
            Vec::new()
        });
        for object in &objects {
            self.take_away(object);
        }
        objects
    }

    /// Sends until it is there, or there is no hope.
    async fn send(self: Arc<Self>, what: What) -> Result<(), Unsent> {
        let mut backoff = Backoff::new();
        let mut refusals = 0;
        loop {
            let permits = self.permits().await?;
            self.delivery.begin(what.name());
            let cause = match self.attempt(&what).await {
                Ok(None) => {
                    self.delivery.succeeded();
                    return Ok(());
                }
                Ok(Some(object)) => match Arc::clone(&self).confirm(object).await {
                    Ok(()) => return Ok(()),
                    Err(cause) => cause,
                },
                Err(Failure::Gone) => {
                    self.delivery.succeeded();
                    self.delivery.lose(what.name());
                    tracing::error!(pcap_id = id::show(self.id), segment = what.name(), "is gone");
                    return Err(Unsent::Gone(what.name().to_owned()));
                }
                Err(Failure::Cause(cause)) => cause,
            };
            drop(permits);
            let waited_since = self.delivery.failed(what.name(), &cause);
            if *self.quit.borrow() {
                return Err(Unsent::Stopped);
            }
            self.uploads.counters.upload_retried();
            self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take();
            refusals = if cause.refused { refusals + 1 } else { 0 };
            tracing::warn!(
                pcap_id = id::show(self.id),
                segment = what.name(),
                destination = self.destination,
                cause = cause.to_string(),
                "not sent"
            );
            let patience = Duration::from_secs(self.uploads.settings.patience_seconds);
            if let Some(since) = waited_since
                && (refusals >= REFUSALS || since.elapsed() >= patience)
            {
                return Err(Unsent::Hopeless(cause));
            }
            self.pause(backoff.next()).await?;
        }
    }

    /// Waits; not beyond the end of the capture, for then it counts.
    async fn pause(&self, wait: Duration) -> Result<(), Unsent> {
        let (mut quit, mut ended) = (self.quit.subscribe(), self.ended.subscribe());
        let has_ended = *ended.borrow();
        tokio::select! {
            () = tokio::time::sleep(wait) => Ok(()),
            () = turned(&mut ended), if !has_ended => Ok(()),
            () = turned(&mut quit) => Err(Unsent::Stopped),
        }
    }

    /// First the store's, so that one that is slow takes none of those that others wait for.
    async fn permits(&self) -> Result<Vec<OwnedSemaphorePermit>, Unsent> {
        if self.delivery.in_place() {
            return Ok(Vec::new());
        }
        let mut quit = self.quit.subscribe();
        let (gate, all) = (Arc::clone(&self.gate), Arc::clone(&self.uploads.at_once));
        let both = async {
            // Neither is ever closed.
            let one = gate.acquire_owned().await.ok();
            let other = all.acquire_owned().await.ok();
            one.into_iter().chain(other).collect()
        };
        tokio::select! {
            permits = both => Ok(permits),
            () = turned(&mut quit) => Err(Unsent::Stopped),
        }
    }

    /// Once. A segment that is there then is an object.
    async fn attempt(&self, what: &What) -> Result<Option<Object>, Failure> {
        let folder = self.delivery.folder().to_path_buf();
        match (what, self.delivery.in_place()) {
            (What::Segment(segment), true) => {
                let sha256 = transfer::hash(folder.join(&segment.name), segment).await?;
                self.delivery.sent(&segment.name, segment.size);
                let (name, size) = (segment.name.clone(), segment.size);
                Ok(Some(Object { segment: segment.clone(), name, size, sha256 }))
            }
            (What::Segment(segment), false) => {
                let bucket = self.bucket().await?;
                let compression = self.uploads.compression;
                let suffix = if compression.is_some() { ".zst" } else { "" };
                let name = format!("{}{suffix}", segment.name);
                let to = format!("{}/{name}", self.folder_name);
                let path = folder.join(&segment.name);
                let mut quit = self.quit.subscribe();
                let sent = |bytes| self.delivery.sent(&segment.name, bytes);
                let passed =
                    transfer::send(&bucket, &to, path, segment, compression, &mut quit, sent)
                        .await?;
                let (size, sha256) = (passed.given, passed.sha256);
                Ok(Some(Object { segment: segment.clone(), name, size, sha256 }))
            }
            (What::Manifest(text), true) => {
                let text = Arc::clone(text);
                let written =
                    tokio::task::spawn_blocking(move || manifest::write(&folder, &text)).await;
                match written {
                    Ok(Ok(())) => Ok(None),
                    Ok(Err(error)) => Err(Cause::lasting(error.to_string()).into()),
                    Err(error) => Err(Cause::own(error.to_string()).into()),
                }
            }
            (What::Manifest(text), false) => {
                let bucket = self.bucket().await?;
                let to = bucket.path(&format!("{}/{}", self.folder_name, manifest::NAME));
                let mut quit = self.quit.subscribe();
                transfer::put(&bucket, &to, text.to_string().into(), &mut quit).await?;
                Ok(None)
            }
        }
    }

    /// The way to the bucket, with the keys that it has now.
    async fn bucket(&self) -> Result<Bucket, Cause> {
        let open = self.bucket.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(open) = open {
            return Ok(open);
        }
        let (uploads, account) = (Arc::clone(&self.uploads), self.account);
        let destination = self.destination.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let (destination, _keys) = uploads
                .destinations
                .parse(&destination)
                .map_err(|error| Cause::lasting(error.to_string()))?;
            uploads
                .ownerships
                .way(account, &destination)
                .map_err(|error| Cause::lasting(error.to_string()))
        });
        let bucket = opened.await.map_err(|error| Cause::own(error.to_string()))??;
        *self.bucket.lock().unwrap_or_else(PoisonError::into_inner) = Some(bucket.clone());
        Ok(bucket)
    }

    /// The store has it: remembers that, and then takes it away here.
    async fn confirm(self: Arc<Self>, object: Object) -> Result<(), Cause> {
        let work = move || {
            self.uploads
                .store
                .put_object(self.id, &object)
                .map_err(|error| Cause::own(error.to_string()))?;
            self.take_away(&object);
            if !self.delivery.in_place() {
                self.uploads.counters.uploaded(object.size);
            }
            self.delivery.store(&object);
            self.delivery.succeeded();
            Ok(())
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|error| Err(Cause::own(error.to_string())))
    }

    /// Removes from the spool what the store has. Blocks.
    fn take_away(&self, object: &Object) {
        if self.delivery.in_place() {
            return;
        }
        let path = self.delivery.folder().join(&object.segment.name);
        match fs::remove_file(&path) {
            Ok(()) => self.delivery.give_back(object.segment.size),
            Err(error) if super::is_gone(&error) => {}
            // It is removed with its folder.
            Err(error) => tracing::error!(%error, path = %path.display(), "the spool"),
        }
    }

    async fn send_manifest(
        self: Arc<Self>,
        record: &Record,
        missing: &[String],
    ) -> Result<(), Unsent> {
        let (store, record, missing) =
            (Arc::clone(&self.uploads.store), record.clone(), missing.to_vec());
        let text = tokio::task::spawn_blocking(move || {
            let objects = store.objects(record.id).map_err(|error| error.to_string())?;
            manifest::text(&record, &objects, &missing).map_err(|error| error.to_string())
        });
        match text.await {
            Ok(Ok(text)) => self.send(What::Manifest(text.into())).await,
            Ok(Err(error)) => Err(Unsent::Hopeless(Cause::own(error))),
            Err(error) => Err(Unsent::Hopeless(Cause::own(error.to_string()))),
        }
    }

    /// Makes the record final. Blocks.
    fn conclude(&self, mut record: Record, outcome: Outcome) {
        let Outcome { mut missing, hopeless } = outcome;
        let now = now_us();
        record.status = record.outcome.unwrap_or(Status::Failed);
        record.upload_error = None;
        if let Some(cause) = hopeless {
            self.uploads.counters.upload_failed();
            let unsent = self.delivery.unsent();
            let what = match unsent.len() {
                0 => manifest::NAME.to_owned(),
                count => format!("{count} of its files ({})", some(&unsent)),
            };
            let to = &record.destination_conf;
            let mut text = format!("{what} could not be delivered to {to}: {cause}.");
            if !self.delivery.in_place() {
                let hours = i64::from(self.uploads.spool_settings.retention_hours);
                let until = time(now + hours * 3_600_000_000);
                text += &format!(" What is missing is kept until {until}: POST …/retry sends it.");
            }
            record.upload_error = Some(text);
        } else if !missing.is_empty() {
            self.uploads.counters.upload_failed();
            missing.sort();
            let (count, names) = (missing.len(), some(&missing));
            record.upload_error =
                Some(format!("{count} of its files ({names}) were lost on this host."));
        }
        if record.upload_error.is_some() {
            record.status = Status::Failed;
        }
        record.final_us = Some(now);
        if let Err(error) = self.uploads.store.put(&record) {
            // The next start delivers it once more, which changes nothing.
            tracing::error!(%error, pcap_id = id::show(record.id), "an end is not remembered");
            return;
        }
        self.uploads.counters.capture_delivered(record.status);
        tracing::info!(
            pcap_id = id::show(record.id),
            status = ?record.status,
            error = record.upload_error,
            "capture delivered"
        );
        if record.upload_error.is_none() && !self.delivery.in_place() {
            // Empty but for what could not be removed before.
            drop(fs::remove_dir_all(&record.folder));
        }
        self.uploads.ownerships.tidy(record.account, &record.destination_conf);
    }
}

/// Some names of many.
fn some(names: &[String]) -> String {
    let more = if names.len() > NAMED { ", …" } else { "" };
    format!("{}{more}", names[..names.len().min(NAMED)].join(", "))
}
