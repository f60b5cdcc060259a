//! One capture on its way out, as others see it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use capture_user::spool::Budget;
use tokio::sync::{mpsc, watch};

use super::{
    Object,
    progress::{Progress, UploadStats},
};
use crate::{
    destination::Cause,
    record::{Record, Segment, Status},
};

/// What a delivery is told.
#[derive(Debug)]
pub enum Told {
    /// A segment is whole.
    Sealed(Segment),
    /// The capture has ended. Nothing comes behind this.
    Ended(Box<Record>),
    /// The capture never was.
    Withdrawn,
}

/// A capture from its start until all its files are where they belong, or will not be.
#[derive(Debug)]
pub struct Delivery {
    account: u128,
    folder: PathBuf,
    in_place: bool,
    budget: Arc<Budget>,
    inbox: mpsc::UnboundedSender<Told>,
    state: Mutex<State>,
    /// Turns true when the record is final.
    delivered: watch::Sender<bool>,
}

#[derive(Debug)]
struct State {
    /// When the capture has ended.
    record: Option<Record>,
    progress: Progress,
    in_flight: usize,
    /// Since when the store is waited for.
    waiting_since: Instant,
    /// The last attempt failed.
    failing: bool,
}

impl Delivery {
    pub(super) fn new(
        record: &Record,
        inbox: mpsc::UnboundedSender<Told>,
        budget: Arc<Budget>,
    ) -> Self {
        let state = State {
            record: None,
            progress: Progress::default(),
            in_flight: 0,
            waiting_since: Instant::now(),
            failing: false,
        };
        Self {
            account: record.account,
            folder: record.folder.clone(),
            in_place: !record.is_uploaded(),
            budget,
            inbox,
            state: Mutex::new(state),
            delivered: watch::Sender::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose it is.
    pub fn account(&self) -> u128 {
        self.account
    }

    /// What its segments may take in the spool; nothing bounds those that stay where they are.
    pub fn budget(&self) -> Option<Arc<Budget>> {
        (!self.in_place).then(|| Arc::clone(&self.budget))
    }

    /// Where its segments are.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Whether that is where they belong.
    pub(super) fn in_place(&self) -> bool {
        self.in_place
    }

    /// Tells it something; it does not block.
    pub fn tell(&self, told: Told) {
        if let Told::Sealed(segment) = &told {
            self.state().progress.add(segment);
        }
        // When nobody listens any more, the daemon is about to end.
        drop(self.inbox.send(told));
    }

    /// The record, when the capture has ended.
    pub fn record(&self) -> Option<Record> {
        self.state().record.clone()
    }

    /// How far it has come.
    pub fn stats(&self) -> UploadStats {
        self.state().progress.stats()
    }

    /// Turns true when its record is final.
    pub fn delivered(&self) -> watch::Receiver<bool> {
        self.delivered.subscribe()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.state().in_flight
    }

    /// Whether waiting for it would be in vain, for now.
    pub(super) fn is_stuck(&self) -> bool {
        self.state().failing
    }

    /// The capture has ended: what is late is late from now on.
    pub(super) fn end(&self, mut record: Record) {
        let mut state = self.state();
        if state.in_flight > 0 {
            record.status = Status::ConversionRunning;
        }
        for segment in &record.segments {
            state.progress.add(segment);
        }
        state.waiting_since = Instant::now();
        state.record = Some(record);
    }

    pub(super) fn announce(&self) {
        self.delivered.send_replace(true);
    }

    /// An attempt begins.
    pub(super) fn begin(&self, name: &str) {
        let mut state = self.state();
        state.in_flight += 1;
        state.progress.begin(name);
        if let Some(record) = &mut state.record {
            record.status = Status::ConversionRunning;
        }
    }

    /// A part of it has been taken.
    pub(super) fn sent(&self, name: &str, bytes: u64) {
        let mut state = self.state();
        // A store that takes the same parts again and again takes nothing.
        if state.progress.sent(name, bytes) {
            state.waiting_since = Instant::now();
        }
    }

    /// An attempt has failed. Since when nothing was taken, if the capture has ended.
    pub(super) fn failed(&self, name: &str, cause: &Cause) -> Option<Instant> {
        let mut state = self.state();
        state.in_flight -= 1;
        state.failing = true;
        state.progress.fail(name, cause);
        state.record.as_ref().map(|_| state.waiting_since)
    }

    /// An attempt has succeeded.
    pub(super) fn succeeded(&self) {
        let mut state = self.state();
        state.in_flight -= 1;
        state.failing = false;
        state.waiting_since = Instant::now();
    }

    /// It is where it belongs.
    pub(super) fn store(&self, object: &Object) {
        self.state().progress.store(object);
    }

    /// Its place in the spool is free again.
    pub(super) fn give_back(&self, bytes: u64) {
        self.budget.give_back(bytes);
    }

    /// Segments that are neither stored nor lost.
    pub(super) fn unsent(&self) -> Vec<String> {
        self.state().progress.unsent()
    }

    /// It is gone.
    pub(super) fn lose(&self, name: &str) {
        self.state().progress.lose(name);
    }
}
