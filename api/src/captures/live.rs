//! A capture that runs.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use capture_user::{
    engine::{Job, Progress, Summary},
    stats::{Amount, Drops},
};
use serde::Serialize;
use utoipa::ToSchema;

use crate::record::{Record, Status};

/// Between two looks that a rate is made of, at least.
const SAMPLE: Duration = Duration::from_millis(500);

/// A running capture.
#[derive(Debug)]
pub struct Live {
    account: u128,
    state: Mutex<State>,
    job: Job,
    since: Instant,
    rates: Mutex<Sample>,
}

#[derive(Debug)]
struct State {
    record: Record,
    /// Its end has been entered; what the job counts is in the record.
    closed: bool,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    captured: Amount,
    rates: Rates,
}

/// How fast packets come in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Rates {
    /// Packets captured per second, over the last second or so.
    pub packets_per_second: f64,
    /// Their bytes per second.
    pub bytes_per_second: f64,
}

/// One queue of a running capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct QueueStats {
    /// The interface.
    pub interface: String,
    /// The receive queue; on the `tap` path, the CPU.
    pub queue: u32,
    /// Hits that reached its worker.
    pub delivered: u64,
    /// Of these, packets captured.
    pub captured: u64,
    /// Their captured lengths, bytes.
    pub captured_bytes: u64,
    /// Hits dropped because no segment buffer was free.
    pub buffer_full: u64,
    /// Hits that came after a limit was reached.
    pub past_limit: u64,
}

/// How a running capture stands.
#[derive(Clone, Debug)]
pub struct Stats {
    /// Since it started.
    pub elapsed: Duration,
    /// Counts so far. What is on its way is in none but `hits`.
    pub progress: Progress,
    /// How fast.
    pub rates: Rates,
    /// Per queue.
    pub queues: Vec<QueueStats>,
}

impl Live {
    pub(super) fn new(mut record: Record, job: Job) -> Self {
        record.status = Status::Running;
        let since = Instant::now();
        let sample = Sample { at: since, captured: Amount::default(), rates: Rates::default() };
        Self {
            account: record.account,
            state: Mutex::new(State { record, closed: false }),
            job,
            since,
            rates: Mutex::new(sample),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whose it is.
    pub fn account(&self) -> u128 {
        self.account
    }

    /// The record as of now.
    pub fn record(&self) -> Record {
        let state = self.state();
        let mut record = state.record.clone();
        if !state.closed {
            record.packets_captured = self.job.packets_captured();
        }
        record
    }

    /// Tells the job to end.
    pub(super) fn stop(&self) {
        self.job.stop();
    }

    /// Takes note of a request to stop; the record to write, unless there was one before, or it ended.
    pub(super) fn request_stop(&self, now_us: i64) -> Option<Record> {
        let mut state = self.state();
        if state.closed || state.record.stop_requested_us.is_some() {
            return None;
        }
        state.record.stop_requested_us = Some(now_us);
        Some(state.record.clone())
    }

    /// Does something that must not follow the end.
    pub(super) fn unless_closed<E>(&self, act: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let state = self.state();
        if state.closed { Ok(()) } else { act() }
    }

    /// Enters the end.
    pub(super) fn close<E>(
        &self,
        enter: impl FnOnce(&mut Record) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut state = self.state();
        state.closed = true;
        enter(&mut state.record)
    }

    /// Waits for the job's end; `None` if the engine ended without a word.
    pub(super) fn wait(&self) -> Option<Summary> {
        const LONG: Duration = Duration::from_hours(1);
        loop {
            let start = Instant::now();
            if let Some(summary) = self.job.wait_for(LONG) {
                return Some(summary);
            }
            if start.elapsed() < LONG {
                return None;
            }
        }
    }

    /// How it stands; `None` when it has ended.
    pub fn stats(&self) -> Option<Stats> {
        let progress = self.job.progress()?;
        let queues = self.job.queues().iter().map(|queue| {
            let totals = queue.totals();
            QueueStats {
                interface: queue.interface.clone(),
                queue: queue.queue,
                delivered: totals.delivered,
                captured: totals.captured,
                captured_bytes: totals.captured_bytes,
                buffer_full: totals.buffer_full,
                past_limit: totals.past_limit,
            }
        });
        Some(Stats {
            elapsed: self.since.elapsed(),
            rates: self.rates(progress.captured),
            queues: queues.collect(),
            progress,
        })
    }

    #[expect(clippy::cast_precision_loss, reason = "a rate is not exact")]
    fn rates(&self, captured: Amount) -> Rates {
        let mut sample = self.rates.lock().unwrap_or_else(PoisonError::into_inner);
        let elapsed = sample.at.elapsed();
        if elapsed >= SAMPLE {
            let seconds = elapsed.as_secs_f64();
            let since = |now: u64, before: u64| now.saturating_sub(before) as f64 / seconds;
            let rates = Rates {
                packets_per_second: since(captured.packets, sample.captured.packets),
                bytes_per_second: since(captured.bytes, sample.captured.bytes),
            };
            *sample = Sample { at: Instant::now(), captured, rates };
        }
        sample.rates
    }
}

/// Drops by cause, as JSON has them.
pub(crate) fn by_cause(drops: &Drops) -> impl Iterator<Item = (&'static str, u64)> {
    drops.named().into_iter().map(|(name, count, _)| (name, count))
}
