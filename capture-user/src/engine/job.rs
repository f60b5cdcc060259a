//! A job as its owner sees it.

use std::{io, num::NonZeroU32, sync::Arc, time::Duration};

use capture_ebpf::abi::MAX_JOBS;
use crossbeam::channel::{Receiver, Sender, bounded};
use serde::Serialize;
use thiserror::Error;

use super::{Event, Summary};
use crate::{
    filter::{Direction, Filter, FilterError},
    latency::Latency,
    pace,
    program::ProgramLoadError,
    segment::{Rotation, SegmentError, Target},
    spool::{Budget, OnSealed, Refused},
    stats::{Amount, Drops, QueueCounters, QueueTotals},
};

/// Smallest buffer, bytes: more than the largest packet that the kernel hands over and its block.
pub const MIN_BUFFER: usize = 128 * 1024;

/// Identifies a job within an engine.
pub type JobId = u64;

/// Why a job could not be started.
#[derive(Debug, Error)]
pub enum StartError {
    /// No packet can match.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// All slots are taken.
    #[error("{interface} already runs {MAX_JOBS} jobs, the most there can be")]
    NoSlot {
        /// The interface.
        interface: String,
    },
    /// An interface was removed.
    #[error("interface {interface} is gone")]
    Gone {
        /// The interface.
        interface: String,
    },
    /// A setting is out of range.
    #[error("{name} is {value}, but must be {limit}")]
    Config {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        limit: String,
    },
    /// The output.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The kernel.
    #[error(transparent)]
    Program(#[from] ProgramLoadError),
    /// The disk thread could not be started.
    #[error("no disk thread")]
    Thread(#[source] io::Error),
    /// The engine has ended.
    #[error("the engine has ended")]
    Ended,
}

/// A job to be.
#[derive(Debug)]
pub struct JobSpec {
    /// Which packets.
    pub filter: Filter,
    /// One in this many of them.
    pub sample: NonZeroU32,
    /// Keeps so many of them a second, however many there are: sampling adapts, and each packet says how
    /// many it stands for. See [`pace`].
    pub pace: Option<NonZeroU32>,
    /// Which way they go.
    pub direction: Direction,
    /// Most bytes kept of a packet; 0 is all.
    pub snaplen: u32,
    /// Ends the job after exactly this many packets.
    pub packet_limit: Option<u64>,
    /// Ends the job before this many captured bytes would be exceeded.
    pub byte_limit: Option<u64>,
    /// Ends the job after this time.
    pub duration: Option<Duration>,
    /// Where the packets go.
    pub target: Target,
    /// When a new segment is begun.
    pub rotation: Rotation,
    /// Whether segments are hashed as they are written. It takes the disk thread under a millisecond a
    /// megabyte on a CPU that has instructions for it; when buffers run short, it is left out for the
    /// segment.
    pub hashed: bool,
    /// What the files say of the job.
    pub comment: String,
    /// Buffers per queue. They bridge the time that the disk takes.
    pub buffers: usize,
    /// Size of a buffer, bytes.
    pub buffer_size: usize,
    /// Who is told of each segment as it is sealed.
    pub sealed: Option<OnSealed>,
    /// What its segments may take on the disk, together with other jobs'. Without it, all there is.
    pub budget: Option<Arc<Budget>>,
}

impl JobSpec {
    /// Everything, until stopped.
    pub fn new(target: Target) -> Self {
        Self {
            filter: Filter::default(),
            sample: NonZeroU32::MIN,
            pace: None,
            direction: Direction::Both,
            snaplen: 0,
            packet_limit: None,
            byte_limit: None,
            duration: None,
            target,
            rotation: Rotation::default(),
            hashed: false,
            comment: String::new(),
            buffers: 64,
            buffer_size: 256 << 10,
            sealed: None,
            budget: None,
        }
    }

    pub(super) fn check(&self) -> Result<(), StartError> {
        self.filter.check()?;
        let wrong = |name, value, limit: String| Err(StartError::Config { name, value, limit });
        if self.buffer_size < MIN_BUFFER || self.buffer_size > 1 << 30 {
            return wrong(
                "buffer size",
                self.buffer_size as u64,
                format!("from {MIN_BUFFER} to {} bytes", 1 << 30),
            );
        }
        if !(2..=4096).contains(&self.buffers) {
            return wrong("number of buffers", self.buffers as u64, "from 2 to 4096".into());
        }
        if let Some(bytes) = self.rotation.bytes
            && bytes < 2 * MIN_BUFFER as u64
        {
            return wrong("segment size", bytes, format!("at least {} bytes", 2 * MIN_BUFFER));
        }
        if let Some(pace) = self.pace {
            if !pace::BUDGETS.contains(&pace.get()) {
                let (least, most) = pace::BUDGETS.into_inner();
                return wrong(
                    "packets per second",
                    pace.get().into(),
                    format!("from {least} to {most}"),
                );
            }
            if self.sample.get() > 1 {
                let limit = "1 where sampling is adaptive".into();
                return wrong("sampling", self.sample.get().into(), limit);
            }
        }
        for (name, limit) in [("packet limit", self.packet_limit), ("byte limit", self.byte_limit)]
        {
            if limit == Some(0) {
                return wrong(name, 0, "at least 1".into());
            }
        }
        Ok(())
    }
}

/// Why a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// A packet or byte limit was reached.
    Limit,
    /// The time was up.
    Duration,
    /// It was told to.
    Stopped,
    /// The output or the interface failed; the message says which and how.
    Failed(String),
}

/// A job that runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Packets that reached the kernel program.
    pub seen: u64,
    /// The job's hits.
    pub hits: Amount,
    /// Packets encoded.
    pub captured: Amount,
    /// Drops so far, as far as they have a name already.
    pub drops: Drops,
    /// How late packets were so far.
    pub latency: Latency,
}

/// A running job. Dropping it does not end the job.
#[derive(Debug)]
pub struct Job {
    pub(super) id: JobId,
    pub(super) engine: Sender<Event>,
    pub(super) done: Receiver<Summary>,
    pub(super) queues: Vec<QueueProgress>,
    pub(super) refused: Arc<Refused>,
}

/// A queue of a running job.
#[derive(Clone, Debug)]
pub struct QueueProgress {
    /// Its interface.
    pub interface: String,
    /// The receive queue; on the `tap` path, the first CPU of those that have a worker together.
    pub queue: u32,
    pub(super) counters: Arc<QueueCounters>,
}

impl QueueProgress {
    /// What its worker has counted so far.
    pub fn totals(&self) -> QueueTotals {
        self.counters.read()
    }
}

impl Job {
    /// Its number.
    pub fn id(&self) -> JobId {
        self.id
    }

    /// Packets encoded so far.
    pub fn packets_captured(&self) -> u64 {
        // What was refused has been encoded.
        let refused = self.refused.read().packets;
        let encoded: u64 = self.queues.iter().map(|queue| queue.totals().captured).sum();
        encoded.saturating_sub(refused)
    }

    /// Its queues, which go on counting.
    pub fn queues(&self) -> &[QueueProgress] {
        &self.queues
    }

    /// How it stands; `None` when it has ended.
    pub fn progress(&self) -> Option<Progress> {
        let (answer, reply) = bounded(1);
        self.engine.send(Event::Progress { job: self.id, answer }).ok()?;
        reply.recv().ok()
    }

    /// Waits until every packet that has been a hit by now is in the file, if it is to be; or until the
    /// job has ended. The file goes on.
    pub fn flush(&self) {
        let (answer, reply) = bounded(1);
        if self.engine.send(Event::Flush { job: self.id, answer }).is_ok() {
            // An answer that never comes is that of a job that has ended.
            let _: Result<(), _> = reply.recv();
        }
    }

    /// Tells it to end; [`wait`](Self::wait) gives the result.
    pub fn stop(&self) {
        drop(self.engine.send(Event::Stop { job: self.id }));
    }

    /// What tells it to end from elsewhere.
    pub fn stopper(&self) -> Stopper {
        Stopper { id: self.id, engine: self.engine.clone() }
    }

    /// Waits for its end for up to this long.
    pub fn wait_for(&self, timeout: Duration) -> Option<Summary> {
        self.done.recv_timeout(timeout).ok()
    }

    /// Waits for its end.
    pub fn wait(self) -> Option<Summary> {
        self.done.recv().ok()
    }
}

/// Tells a job to end.
#[derive(Clone, Debug)]
pub struct Stopper {
    id: JobId,
    engine: Sender<Event>,
}

impl Stopper {
    /// See [`Job::stop`].
    pub fn stop(&self) {
        drop(self.engine.send(Event::Stop { job: self.id }));
    }
}
