//! The recorder: a sample of what passed in the last hours, from which questions about the past are
//! answered.
//!
//! ```text
//!  job ─► .000001_00007.pcapng.part ─ sealed ─► 000001_00007.pcapng ─┬─► Store ─► the answer's file
//!  1 in N, 160 bytes      │                            │             │
//!                         └──── flush, or a moment     └─ index ─────┘
//! ```
//!
//! - It is a job of the engine like any other, started first so that it has slot 0. It samples and cuts
//!   packets in the kernel, and all interfaces and CPUs go into one series of files in the order of time.
//! - It never takes more than its budget of the disk, and leaves the reserve free: [`RecorderConfig`].
//! - Whoever asks ([`Store`]) needs neither the daemon nor the engine: a folder is enough, while it is
//!   written as well as later. What has been recorded a moment ago is in the open segment; it gets there
//!   within half a second by itself, or at once by [`Recorder::flush`].
//! - After SIGKILL, what had reached the open segment is kept; after a loss of power, what was sealed.
//! - A job that fails (a full disk, an interface that goes) is started again, and what was recorded stays.
//!
//! # The clock
//!
//! Packets have the wall clock's time. When it is stepped back, what is recorded next lies before what
//! was recorded last. Segments are numbered, so the order of recording is known all the same, and it is
//! what "oldest" means when room is needed. Queries go by the packets' times: an hour that passed twice
//! by the clock is found twice.

mod index;
mod keeper;
mod query;
mod store;
#[cfg(test)]
mod tests;

use std::{
    error::Error,
    fs::{self, File},
    io,
    num::NonZeroU32,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use thiserror::Error;

pub use self::{
    keeper::Removed,
    query::{Answer, Blocks, Query, QueryError, Store},
};
use self::{
    keeper::{Bounds, Keeper, World},
    store::Name,
};
use crate::{
    engine::{Ending, Job, JobSpec, MIN_BUFFER, Progress, Summary},
    error::with_causes,
    pace,
    segment::{Rotation, SegmentError, SegmentInfo, Target},
    spool::{Budget, OnSealed},
};

/// Where a recorder is in the data folder of the daemon.
pub const FOLDER: &str = "recorder";

/// What is kept of a packet, bytes: the headers and what identifies most protocols.
pub const SNAPLEN: u32 = 160;

/// Least budget, bytes: room for segments of half a MiB, and some of them.
pub const LEAST_BYTES: u64 = 32 << 20;

/// How often it is looked whether there is something to remove.
const TICK: Duration = Duration::from_secs(1);

/// How long after a failure the job is started again.
const AGAIN: Duration = Duration::from_secs(5);

/// What a recorder records and keeps.
#[derive(Clone, Debug)]
pub struct RecorderConfig {
    /// Its folder; made if it is not there. Nothing else may be in it.
    pub folder: PathBuf,
    /// Most bytes that it takes on the disk, indices included.
    pub bytes: u64,
    /// Bytes of the disk that stay free: it removes its oldest when there are fewer.
    pub reserve: u64,
    /// How long packets are kept, if the budget has room for them.
    pub keep: Duration,
    /// Which of the packets.
    pub sampling: Sampling,
    /// Most bytes kept of a packet.
    pub snaplen: u32,
}

impl RecorderConfig {
    /// One packet in 100, its first 160 bytes, for 24 hours, in 1 GiB at most, with 1 GiB of the disk left
    /// free.
    pub fn new(folder: PathBuf) -> Self {
        Self {
            folder,
            bytes: 1 << 30,
            reserve: 1 << 30,
            keep: Duration::from_hours(24),
            sampling: Sampling::Fixed(NonZeroU32::new(100).unwrap_or(NonZeroU32::MIN)),
            snaplen: SNAPLEN,
        }
    }

    /// Checks that it can be.
    pub fn check(&self) -> Result<(), RecorderError> {
        let wrong =
            |name, value: String, limit: String| Err(RecorderError::Config { name, value, limit });
        if self.bytes < LEAST_BYTES {
            return wrong(
                "budget",
                self.bytes.to_string(),
                format!("at least {LEAST_BYTES} bytes"),
            );
        }
        if self.keep < Duration::from_mins(1) {
            let keep = humantime::format_duration(self.keep).to_string();
            return wrong("time to keep packets", keep, "at least 1m".into());
        }
        if let Sampling::Adaptive { packets_per_second } = self.sampling
            && !pace::BUDGETS.contains(&packets_per_second)
        {
            let (least, most) = pace::BUDGETS.into_inner();
            return wrong(
                "budget of packets per second",
                packets_per_second.to_string(),
                format!("from {least} to {most}"),
            );
        }
        Ok(())
    }

    /// Size of a segment: small enough that little is removed at a time, large enough that they are few.
    fn segment_bytes(&self) -> u64 {
        (self.bytes / 64).min(16 << 20)
    }

    /// How old a segment gets: packets are kept a little longer than they have to be, by this much.
    fn segment_age(&self) -> Duration {
        (self.keep / 288).clamp(Duration::from_secs(1), Duration::from_mins(5))
    }
}

/// Which packets a recorder keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampling {
    /// One in this many.
    Fixed(NonZeroU32),
    /// So many a second, over all interfaces: one in how many rises and falls with the load, and each
    /// packet is kept with what it stands for. Of a smaller load, every packet but those of bursts. See
    /// [`pace`].
    Adaptive {
        /// What is kept a second.
        packets_per_second: u32,
    },
}

/// A recorder could not be started.
#[derive(Debug, Error)]
pub enum RecorderError {
    /// A setting is out of range.
    #[error("the recorder's {name} is {value}, but must be {limit}")]
    Config {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        limit: String,
    },
    /// Its folder.
    #[error(transparent)]
    Folder(#[from] SegmentError),
    /// Another process has it.
    #[error("another recorder writes to {}", .0.display())]
    Taken(PathBuf),
    /// The job.
    #[error("the recorder's job could not be started")]
    Start(#[source] Box<dyn Error + Send + Sync>),
    /// No thread.
    #[error("no thread for the recorder")]
    Thread(#[source] io::Error),
}

/// How a recorder is doing.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RecorderStats {
    /// Whether its job runs.
    pub recording: bool,
    /// Why not, or why it did not the last time.
    pub error: Option<String>,
    /// The job that runs.
    pub progress: Progress,
    /// Sealed segments.
    pub segments: usize,
    /// What it takes on the disk, bytes.
    pub bytes: u64,
    /// What it may take.
    pub limit: u64,
    /// The oldest sealed packet, UTC nanoseconds.
    pub oldest_ns: Option<u64>,
    /// The newest sealed packet.
    pub newest_ns: Option<u64>,
    /// Segments that were removed.
    pub removed: Removed,
    /// Damaged places that were found in segments.
    pub damaged: u64,
}

/// Starts a job made by the given function: on an engine, or on one that is opened anew when the other
/// has ended. The function may be called more than once.
pub type StartJob =
    dyn Fn(&dyn Fn() -> JobSpec) -> Result<Job, Box<dyn Error + Send + Sync>> + Send;

enum Message {
    Sealed(SegmentInfo),
    Stop,
}

/// What the thread and its owner share.
struct Shared {
    job: Mutex<Option<Arc<Job>>>,
    stats: Mutex<RecorderStats>,
}

/// A recorder that records; ended when dropped.
pub struct Recorder {
    folder: PathBuf,
    shared: Arc<Shared>,
    inbox: Sender<Message>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recorder {
    /// Takes over the folder, completes what a crash left in it, and records.
    pub fn start(config: RecorderConfig, start: Box<StartJob>) -> Result<Self, RecorderError> {
        config.check()?;
        let failed = |operation, source| {
            RecorderError::Folder(SegmentError { operation, path: config.folder.clone(), source })
        };
        fs::create_dir_all(&config.folder).map_err(|error| failed("creating", error))?;
        let lock_file = File::create(config.folder.join("lock"))
            .map_err(|error| failed("creating a lock in", error))?;
        let lock_file = Flock::lock(lock_file, FlockArg::LockExclusiveNonblock)
            .map_err(|_taken| RecorderError::Taken(config.folder.clone()))?;
        let bounds = Bounds {
            bytes: config.bytes,
            reserve: config.reserve,
            keep: config.keep,
            segment_bytes: config.segment_bytes(),
        };
        let keeper = Keeper::open(&config.folder, bounds, World::real())?;
        let (sender, inbox) = unbounded();
        let shared = Arc::new(Shared { job: Mutex::default(), stats: Mutex::default() });
        let mut work = Work {
            run: keeper.next_run(),
            keeper,
            start,
            shared: Arc::clone(&shared),
            sender: sender.clone(),
            inbox,
            failed: None,
            _lock: lock_file,
            config,
        };
        work.record().map_err(RecorderError::Start)?;
        work.publish();
        let folder = work.config.folder.clone();
        let thread = thread::Builder::new()
            .name("tl-recorder".into())
            .spawn(move || work.run())
            .map_err(RecorderError::Thread)?;
        Ok(Self { folder, shared, inbox: sender, thread: Some(thread) })
    }

    /// Its folder, for a [`Store`].
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Waits until every packet that was recorded by now can be found.
    pub fn flush(&self) {
        let job = lock(&self.shared.job).clone();
        if let Some(job) = job {
            job.flush();
        }
    }

    /// How it is doing.
    pub fn stats(&self) -> RecorderStats {
        let job = lock(&self.shared.job).clone();
        let mut stats = lock(&self.shared.stats).clone();
        stats.progress = job.and_then(|job| job.progress()).unwrap_or_default();
        stats
    }
}

impl Drop for Recorder {
    /// Ends the job and seals what is open.
    fn drop(&mut self) {
        drop(self.inbox.send(Message::Stop));
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the recorder's thread panicked");
        }
    }
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// The recorder's thread.
struct Work {
    config: RecorderConfig,
    keeper: Keeper,
    start: Box<StartJob>,
    /// Number of the next run.
    run: u32,
    shared: Arc<Shared>,
    sender: Sender<Message>,
    inbox: Receiver<Message>,
    /// When the job failed that has not been started again.
    failed: Option<Instant>,
    /// Keeps others out of the folder.
    _lock: Flock<File>,
}

impl Work {
    /// Starts a run.
    fn record(&mut self) -> Result<(), Box<dyn Error + Send + Sync>> {
        let (config, budget) = (&self.config, Arc::clone(self.keeper.budget()));
        let run = self.run;
        let spec = || self.spec(config, run, &budget);
        let job = (self.start)(&spec)?;
        self.run += 1;
        *lock(&self.shared.job) = Some(Arc::new(job));
        Ok(())
    }

    fn spec(&self, config: &RecorderConfig, run: u32, budget: &Arc<Budget>) -> JobSpec {
        let sender = self.sender.clone();
        let (sample, pace) = match config.sampling {
            Sampling::Fixed(sample) => (sample, None),
            Sampling::Adaptive { packets_per_second } => {
                (NonZeroU32::MIN, NonZeroU32::new(packets_per_second))
            }
        };
        JobSpec {
            sample,
            pace,
            snaplen: config.snaplen,
            rotation: Rotation {
                bytes: Some(config.segment_bytes()),
                every: Some(config.segment_age()),
            },
            comment: "recorder".into(),
            buffers: 8,
            buffer_size: MIN_BUFFER,
            sealed: Some(OnSealed::new(move |segment| {
                drop(sender.send(Message::Sealed(segment.clone())));
            })),
            budget: Some(Arc::clone(budget)),
            ..JobSpec::new(Target::File(Name::run(&config.folder, run)))
        }
    }

    fn run(mut self) {
        let mut tidied = Instant::now();
        loop {
            // Segments of an earlier run that have no index are made one while nothing else is to do.
            let busy = self.keeper.index_one();
            let wait = if busy { Duration::ZERO } else { TICK };
            match self.inbox.recv_timeout(wait) {
                Ok(Message::Sealed(segment)) => self.keeper.sealed(&segment),
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if tidied.elapsed() >= TICK {
                tidied = Instant::now();
                self.keeper.tidy();
                self.supervise();
            }
            self.publish();
        }
        self.end();
    }

    /// Starts the job again when it has ended.
    fn supervise(&mut self) {
        let job = lock(&self.shared.job).clone();
        if let Some(job) = job {
            let Some(summary) = job.wait_for(Duration::ZERO) else { return };
            self.ended(&summary);
        }
        if self.failed.is_some_and(|failed| failed.elapsed() < AGAIN) {
            return;
        }
        match self.record() {
            Ok(()) => {
                log::info!("the recorder records again");
                self.failed = None;
            }
            Err(error) => {
                let error = with_causes(&*error);
                if self.failed.is_none() {
                    log::warn!("the recorder's job could not be started again: {error}");
                }
                self.fail(error);
            }
        }
    }

    fn ended(&mut self, summary: &Summary) {
        *lock(&self.shared.job) = None;
        let why = match &summary.ending {
            Ending::Failed(why) => why.clone(),
            _ => "the engine has ended".into(),
        };
        log::warn!("the recorder's job has ended: {why}");
        self.fail(why);
    }

    fn fail(&mut self, why: String) {
        self.failed = Some(Instant::now());
        lock(&self.shared.stats).error = Some(why);
    }

    fn publish(&self) {
        let (segments, extent) = self.keeper.extent();
        let budget = self.keeper.budget();
        let mut stats = lock(&self.shared.stats);
        stats.recording = self.failed.is_none();
        stats.segments = segments;
        stats.bytes = self.keeper.bytes();
        stats.limit = budget.limit();
        (stats.oldest_ns, stats.newest_ns) = extent.unzip();
        stats.removed = self.keeper.removed;
        stats.damaged = self.keeper.gaps;
    }

    /// Ends the job, and indexes what it has sealed.
    fn end(mut self) {
        let job = lock(&self.shared.job).take();
        if let Some(job) = job {
            job.stop();
            while job.wait_for(TICK).is_none() && job.progress().is_some() {}
        }
        while let Ok(message) = self.inbox.try_recv() {
            if let Message::Sealed(segment) = message {
                self.keeper.sealed(&segment);
            }
        }
    }
}
