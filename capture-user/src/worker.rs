//! The loop that takes packets off one queue and encodes them: no lock, no allocation, no formatting,
//! and no system call but the poll of an empty queue.
//!
//! A worker owns its source and, per job, a [`Sink`]. It shares nothing that it writes in the loop;
//! what others need to know it publishes once per batch, or, where many jobs share the packets, per few.

use std::{
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use capture_ebpf::abi::{DIRECTION_IN, DIRECTION_OUT, MAX_JOBS};
use crossbeam::channel::{Receiver, Sender, TrySendError, bounded, unbounded};
use nix::sys::eventfd::EventFd;

use crate::{
    buffer::{Buffer, Pool},
    clock::{Clock, monotonic_ns},
    disk::ToDisk,
    engine::{Event, JobId},
    latency::Late,
    limits::{Lease, Limits},
    merge::Frontier,
    pace::{Comment, Thinner},
    placement,
    ring::BATCH_BYTES,
    segment::pcapng::{self, Direction, Packet},
    source::{ON_THE_WAY_NS, Received, Source, SourceCounters, Wake},
    spin::{Next, Spin},
    stats::{QueueCounters, QueueTotals},
    sys,
};

/// Longest sleep; bounds how late a partly filled buffer is passed on.
const LONG_NAP: Duration = Duration::from_millis(100);

/// Sleep of a reader that the kernel does not wake, while there is traffic: the most that its packets
/// are late. A ring must hold what comes meanwhile; one that fills up wakes its reader sooner.
const SHORT_NAP: Duration = Duration::from_millis(4);

/// Sleep of a reader that waits for buffers.
const HELD_NAP: Duration = Duration::from_millis(1);

/// How long jobs that have buffers wait for one that has none, nanoseconds: a pause of a disk that is well,
/// but for no job whose output stands still.
const MOMENT_NS: u64 = 50_000_000;

/// How long the end of a job waits for buffers, nanoseconds.
const DRAIN_NS: u64 = 200_000_000;

/// Nice value of a worker whose ring is filled by the network card's pace, on a port that only mirrors: its
/// ring lasts for a millisecond, a disk thread's queue for much longer. A worker of an interface that the
/// host itself lives on has no such rank.
const NICE: i32 = -10;

/// How late a sleeper may be woken, so that several wake at once, nanoseconds. The kernel's own default is
/// as long as a nap.
const TIMER_SLACK_NS: u64 = 5_000;

/// Packets per job that a worker takes before it says what it has counted, while there are more: when each
/// packet of a batch is another job's, what is done for a job after a batch is done for every packet.
const SETTLE: usize = 16;

/// How long packets may stay in a buffer that does not fill up, nanoseconds.
const FLUSH_NS: u64 = 200_000_000;

/// How often the clock is compared with the wall clock's, nanoseconds.
const CLOCK_NS: u64 = 1_000_000_000;

/// What the engine asks of a worker.
pub(crate) enum ToWorker {
    /// Take part in a job. Answered with what the source has counted so far.
    Add { slot: usize, sink: Box<Sink>, answer: Sender<SourceCounters> },
    /// Pass on what there is of a job: others' packets wait for it, or, if the job is being flushed, also
    /// what lies on the queue.
    Flush { slot: usize, job: JobId, flushing: Option<Arc<Flushing>> },
    /// Say how late a job's packets have been encoded so far.
    Late { slot: usize, job: JobId, answer: Sender<Late> },
    /// Finish a job that the kernel does not match any more: drain, pass on, report.
    Finish { slot: usize },
    /// End the thread.
    Exit,
}

/// Held by each worker until it has passed on what there is. The last one tells the disk thread, which
/// has all of it on its queue then.
pub(crate) struct Flushing(pub(crate) Sender<ToDisk>);

impl Drop for Flushing {
    fn drop(&mut self) {
        // The queue has room for it; a reader that is gone has written everything.
        drop(self.0.try_send(ToDisk::Flush));
    }
}

/// Where messages for a worker are left.
#[derive(Clone)]
pub(crate) struct Caller {
    mailbox: Sender<ToWorker>,
    called: Arc<AtomicBool>,
    wake: Arc<EventFd>,
}

/// How the engine reaches a worker.
pub(crate) struct WorkerLink {
    caller: Caller,
    thread: Option<JoinHandle<()>>,
    pub(crate) queues: Queues,
}

impl WorkerLink {
    /// See [`Caller::send`].
    pub(crate) fn send(&self, message: ToWorker) {
        self.caller.send(message);
    }

    /// For another thread that has something to say to the worker.
    pub(crate) fn caller(&self) -> Caller {
        self.caller.clone()
    }
}

impl Caller {
    /// Leaves a message and wakes the worker.
    pub(crate) fn send(&self, message: ToWorker) {
        if self.mailbox.send(message).is_ok() {
            self.called.store(true, Ordering::Release);
            if let Err(error) = self.wake.write(1) {
                log::warn!("waking a worker: {error}");
            }
        }
    }
}

impl Drop for WorkerLink {
    fn drop(&mut self) {
        self.send(ToWorker::Exit);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("a worker panicked");
        }
    }
}

/// A job's final word from one worker.
#[derive(Clone, Debug)]
pub(crate) struct Drained {
    pub(crate) totals: QueueTotals,
    /// How late its packets were encoded.
    pub(crate) late: Late,
    pub(crate) source: SourceCounters,
}

/// One job's place in one worker.
pub(crate) struct Sink {
    pub(crate) job: JobId,
    /// Index of this queue among the job's.
    pub(crate) stream: usize,
    pub(crate) interface: u32,
    pub(crate) snaplen: usize,
    /// Fill of a buffer beyond which it is passed on, bytes.
    pub(crate) fill: usize,
    pub(crate) pool: Arc<Pool>,
    pub(crate) disk: Sender<ToDisk>,
    pub(crate) frontier: Arc<Frontier>,
    pub(crate) limits: Option<Arc<Limits>>,
    /// Of a job that samples adaptively.
    pub(crate) pace: Option<Box<Thinner>>,
    pub(crate) counters: Arc<QueueCounters>,
    pub(crate) state: SinkState,
}

/// What changes in a [`Sink`].
#[derive(Default)]
pub(crate) struct SinkState {
    buffer: Option<Buffer>,
    /// Kernel time at which the buffer got its first packet.
    begun_ns: u64,
    lease: Lease,
    totals: QueueTotals,
    late: Late,
    limit_said: bool,
}

impl Sink {
    /// What was counted so far.
    pub(crate) fn totals(&self) -> QueueTotals {
        self.state.totals
    }

    /// Encodes one packet, or counts why not.
    #[inline]
    pub(crate) fn take(&mut self, packet: &Received<'_>, utc_ns: u64) {
        let state = &mut self.state;
        state.totals.delivered += 1;
        let mut comment = None;
        if let Some(pace) = &mut self.pace {
            let Some(weight) = pace.draw(packet.header) else {
                state.totals.thinned += 1;
                return;
            };
            comment = Some(weight.comment());
        }
        let captured = packet.len().min(self.snaplen);
        let need = pcapng::packet_len(captured) + comment.as_ref().map_or(0, Comment::block_len);
        let full = state.buffer.as_ref().is_none_or(|buffer| buffer.len() + need > self.fill);
        if full && !self.renew(packet.header.time_ns) {
            self.state.totals.buffer_full += 1;
            return;
        }
        let state = &mut self.state;
        if let Some(limits) = &self.limits
            && !state.lease.admit(limits, captured as u64)
        {
            state.totals.past_limit += 1;
            return;
        }
        let Some(buffer) = &mut state.buffer else { return };
        let record = Packet {
            interface: self.interface,
            queue: packet.header.queue.into(),
            direction: match packet.header.direction {
                DIRECTION_IN => Direction::Inbound,
                DIRECTION_OUT => Direction::Outbound,
                _ => Direction::Unknown,
            },
            timestamp_ns: utc_ns,
            original_len: packet.header.original_len,
            data: if packet.rest.is_empty() { &packet.data[..captured] } else { packet.data },
        };
        let written = if packet.rest.is_empty() {
            pcapng::packet(buffer.free(), &record)
        } else {
            pcapng::packet_parts(buffer.free(), &record, captured, packet.rest.iter().copied())
        };
        match written {
            Some(mut written) => {
                if let Some(comment) = comment {
                    written += comment.block_len();
                    pcapng::comment(&mut buffer.free()[..written], comment.text());
                }
                buffer.commit(written, captured, utc_ns);
                state.totals.captured += 1;
                state.totals.captured_bytes += captured as u64;
            }
            // Only a packet larger than a whole buffer: configuration forbids it.
            None => state.totals.buffer_full += 1,
        }
    }

    /// Whether there are buffers for a batch off a ring.
    #[inline]
    fn is_ready(&self) -> bool {
        let need = 2 + 2 * BATCH_BYTES / self.fill;
        self.pool.available() >= need.min(self.pool.capacity() / 2)
    }

    /// Whether there is a buffer for a packet of this many bytes.
    pub(crate) fn has_room(&mut self, captured: usize) -> bool {
        let need = pcapng::packet_len(captured);
        let fits = |buffer: &Buffer| buffer.len() + need <= self.fill;
        self.state.buffer.as_ref().is_some_and(fits) || self.renew(0)
    }

    /// Passes the buffer on and takes an empty one; false when there is none.
    #[cold]
    fn renew(&mut self, now_ns: u64) -> bool {
        self.pass_on();
        self.state.buffer = self.pool.take();
        self.state.begun_ns = now_ns;
        self.state.buffer.is_some()
    }

    /// Passes the buffer on if anything is in it.
    pub(crate) fn pass_on(&mut self) {
        let Some(buffer) = self.state.buffer.take_if(|buffer| !buffer.is_empty()) else { return };
        let newest_ns = buffer.last_ns;
        let message = ToDisk::Buffer { stream: self.stream, buffer };
        match self.disk.try_send(message) {
            Ok(()) => self.frontier.raise(newest_ns),
            // The queue has room for all buffers there are, and its reader outlives the job.
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                log::error!("job {}: the disk thread is gone", self.job);
            }
        }
    }

    /// Says that all packets up to this time have been passed on, if so.
    fn reach(&self, utc_ns: u64) {
        if self.state.buffer.as_ref().is_none_or(Buffer::is_empty) {
            self.frontier.raise(utc_ns);
        }
    }

    /// Ends a batch, or a few. Says whether the job has just reached a limit.
    pub(crate) fn settle(&mut self) -> bool {
        self.counters.publish(&self.state.totals);
        let Some(limits) = &self.limits else { return false };
        let reached = self.state.lease.settle(limits);
        reached && !std::mem::replace(&mut self.state.limit_said, true)
    }
}

/// The receive queues of a worker; on the `tap` path, the CPUs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Queues {
    /// The first of them, by which the worker is called.
    pub(crate) first: u32,
    /// How many.
    pub(crate) count: usize,
}

/// Where and as what a worker runs.
pub(crate) struct WorkerConfig {
    /// Thread name.
    pub(crate) name: String,
    /// CPU to run on.
    pub(crate) cpu: Option<usize>,
    /// Index of the interface in the engine.
    pub(crate) port: usize,
    /// Index of the worker on the interface.
    pub(crate) index: usize,
    /// What it reads.
    pub(crate) queues: Queues,
    /// Whether it goes before all threads that have no real-time priority.
    pub(crate) realtime: bool,
}

impl WorkerConfig {
    /// The rank of the calling thread, a worker on a source of this kind.
    fn rank<S: Source>(&self) -> std::io::Result<()> {
        if self.realtime {
            return sys::be_realtime().map_err(|error| {
                std::io::Error::new(
                    error.kind(),
                    format!("no real-time priority, for which it needs CAP_SYS_NICE: {error}"),
                )
            });
        }
        // Where the host's own packets wait it has no privilege.
        if S::WAKES
            && let Err(error) = sys::set_nice(NICE)
        {
            log::debug!("{}: nice {NICE}: {error}", self.name);
        }
        Ok(())
    }
}

struct Worker<S> {
    config: WorkerConfig,
    source: S,
    sinks: [Option<Box<Sink>>; MAX_JOBS],
    mailbox: Receiver<ToWorker>,
    called: Arc<AtomicBool>,
    wake: Arc<EventFd>,
    engine: Sender<Event>,
    clock: Clock,
    clock_at_ns: u64,
    /// Kernel time of the newest packet so far.
    newest_ns: u64,
    /// Jobs that have had packets since they were last settled, and how many these were.
    touched: u64,
    unsettled: usize,
    /// Kernel times of the last batch's first and last packet.
    batch_ns: [u64; 2],
    /// When the looks at the queue began that have found it empty since.
    empty_at_ns: u64,
    gone: bool,
    nap: Duration,
    /// Whether packets are left on the queue until there are buffers for them.
    held: bool,
    /// Since when there has always been a job without buffers.
    out_since_ns: Option<u64>,
}

/// Starts a worker on its source.
pub(crate) fn spawn<S: Source + 'static>(
    config: WorkerConfig,
    source: S,
    engine: Sender<Event>,
) -> std::io::Result<WorkerLink> {
    let (mailbox, inbox) = unbounded();
    let called = Arc::new(AtomicBool::new(false));
    let wake = Arc::new(EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_NONBLOCK)?);
    let queues = config.queues;
    let worker = Worker {
        source,
        sinks: [const { None }; MAX_JOBS],
        mailbox: inbox,
        called: Arc::clone(&called),
        wake: Arc::clone(&wake),
        engine,
        clock: Clock::new(),
        clock_at_ns: monotonic_ns(),
        newest_ns: 0,
        touched: 0,
        unsettled: 0,
        batch_ns: [0; 2],
        empty_at_ns: 0,
        gone: false,
        nap: LONG_NAP,
        held: false,
        out_since_ns: None,
        config,
    };
    let (answer, ranked) = bounded(1);
    let thread = thread::Builder::new().name(worker.config.name.clone()).spawn(move || {
        let rank = worker.config.rank::<S>();
        let begins = rank.is_ok();
        let _: Result<(), _> = answer.send(rank);
        if begins {
            worker.run();
        }
    })?;
    ranked.recv().map_err(std::io::Error::other)??;
    Ok(WorkerLink { caller: Caller { mailbox, called, wake }, thread: Some(thread), queues })
}

impl<S: Source> Worker<S> {
    fn run(mut self) {
        if let Some(cpu) = self.config.cpu {
            placement::pin(&self.config.name, &[cpu]);
        }
        if let Err(error) = nix::sys::prctl::set_timerslack(TIMER_SLACK_NS) {
            log::debug!("{}: {error}", self.config.name);
        }
        let mut spin = Spin::new(self.source.entries());
        loop {
            if self.called.swap(false, Ordering::Acquire) && !self.answer_calls() {
                return;
            }
            self.held = self.must_hold();
            let taken = if self.held { 0 } else { self.batch() };
            if taken > 0 {
                spin.found(taken);
                self.nap = if S::WAKES { LONG_NAP } else { SHORT_NAP };
                continue;
            }
            self.settle();
            match spin.empty() {
                // The looks that follow see what had been put on the queue by now.
                Next::First(now_ns) => self.empty_at_ns = now_ns,
                Next::Look => {}
                Next::Nap(nap) => {
                    self.tidy();
                    thread::sleep(nap);
                    self.empty_at_ns = monotonic_ns();
                }
                Next::Sleep => {
                    self.tidy();
                    self.sleep();
                    self.empty_at_ns = monotonic_ns();
                }
            }
        }
    }

    /// Whether the packets of a batch are better left where they are, as a job has no buffers for them: what
    /// the kernel then has no room for costs it no copy. A job that has buffers waits for one that has not
    /// only for a moment, and while there is room for both.
    #[inline]
    fn must_hold(&mut self) -> bool {
        if S::WAKES {
            return false;
        }
        let (mut ready, mut out) = (0, 0);
        for sink in self.sinks.iter().flatten() {
            if sink.is_ready() {
                ready += 1;
            } else {
                out += 1;
            }
        }
        if out == 0 {
            self.out_since_ns = None;
            return false;
        }
        let now_ns = monotonic_ns();
        let out_ns = now_ns - *self.out_since_ns.get_or_insert(now_ns);
        ready == 0 || out_ns < MOMENT_NS && self.source.is_roomy()
    }

    /// One batch through the sinks.
    #[inline]
    fn batch(&mut self) -> usize {
        let Self { source, sinks, clock, .. } = self;
        let mut touched = 0_u64;
        let mut packets = 0;
        let (mut oldest_ns, mut now_ns) = (0, 0);
        let taken = source.receive(|packet| {
            now_ns = packet.header.time_ns;
            if packets == 0 {
                oldest_ns = now_ns;
            }
            packets += 1;
            let utc_ns = clock.utc(now_ns);
            let mut jobs = packet.header.jobs;
            touched |= jobs;
            while jobs != 0 {
                let slot = jobs.trailing_zeros() as usize;
                jobs &= jobs - 1;
                if let Some(sink) = &mut sinks[slot] {
                    sink.take(packet, utc_ns);
                }
            }
        });
        if touched != 0 {
            self.touched |= touched;
            self.unsettled += packets;
            self.batch_ns = [oldest_ns, now_ns];
            if self.unsettled >= SETTLE * self.touched.count_ones() as usize {
                self.settle();
            }
        }
        self.newest_ns = self.newest_ns.max(now_ns);
        if now_ns.saturating_sub(self.clock_at_ns) > CLOCK_NS {
            self.clock_at_ns = now_ns;
            self.clock.refresh();
        }
        taken
    }

    /// Says what was counted of the jobs that have had packets, and sees to what is due.
    #[inline]
    fn settle(&mut self) {
        if self.touched == 0 {
            return;
        }
        self.unsettled = 0;
        let encoded_ns = monotonic_ns();
        while self.touched != 0 {
            let slot = self.touched.trailing_zeros() as usize;
            self.touched &= self.touched - 1;
            let Some(sink) = &mut self.sinks[slot] else { continue };
            for seen_ns in self.batch_ns {
                sink.state.late.note(encoded_ns.saturating_sub(seen_ns));
            }
            if sink.settle() {
                drop(self.engine.send(Event::Limit { job: sink.job }));
            }
            // A busy queue never sleeps, so a quiet job's packets are passed on here.
            if self.batch_ns[1].saturating_sub(sink.state.begun_ns) > FLUSH_NS {
                sink.pass_on();
            }
        }
    }

    /// Before sleeping: passes on what has waited long enough, and says that nothing else is there.
    fn tidy(&mut self) {
        let now_ns = monotonic_ns();
        let nothing_until = self.clock.utc(self.empty_at_ns.saturating_sub(ON_THE_WAY_NS));
        for sink in self.sinks.iter_mut().flatten() {
            if now_ns.saturating_sub(sink.state.begun_ns) > FLUSH_NS {
                sink.pass_on();
            }
            if !self.held {
                sink.reach(nothing_until);
            }
        }
    }

    /// Passes on what there is of a job.
    fn flush(&mut self, slot: usize, job: JobId) {
        let Some(sink) = self.sinks[slot].as_mut().filter(|sink| sink.job == job) else { return };
        sink.pass_on();
        if self.gone {
            sink.frontier.end();
        } else if self.newest_ns > 0 {
            sink.reach(self.clock.utc(self.newest_ns));
        }
    }

    fn sleep(&mut self) {
        if self.gone {
            // Nothing comes any more but messages.
            let mut fds = [nix::poll::PollFd::new(self.wake.as_fd(), nix::poll::PollFlags::POLLIN)];
            let _: nix::Result<_> = nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE);
            let _: nix::Result<_> = self.wake.read();
            return;
        }
        let nap = if self.held { HELD_NAP } else { self.nap };
        match self.source.wait(self.wake.as_fd(), nap) {
            Ok(Wake::Look) if self.held => {}
            // Nothing came while it slept: it can sleep longer.
            Ok(Wake::Look) => self.nap = (self.nap * 2).min(LONG_NAP),
            Ok(Wake::Called) => drop(self.wake.read()),
            Ok(Wake::Gone) => {
                self.gone = true;
                drop(self.engine.send(Event::Gone { port: self.config.port }));
            }
            Err(error) => {
                log::error!("{}: {error}", self.config.name);
                self.gone = true;
                drop(self.engine.send(Event::Gone { port: self.config.port }));
            }
        }
    }

    /// Handles every message; false when the thread is to end.
    #[cold]
    fn answer_calls(&mut self) -> bool {
        self.settle();
        while let Ok(message) = self.mailbox.try_recv() {
            match message {
                ToWorker::Add { slot, sink, answer } => {
                    self.sinks[slot] = Some(sink);
                    let _: Result<(), _> = answer.send(self.source.counters().unwrap_or_default());
                }
                ToWorker::Flush { slot, job, flushing } => {
                    if flushing.is_some() {
                        self.drain();
                    }
                    self.flush(slot, job);
                }
                ToWorker::Late { slot, job, answer } => {
                    if let Some(sink) = self.sinks[slot].as_ref().filter(|sink| sink.job == job) {
                        let _: Result<(), _> = answer.send(sink.state.late.clone());
                    }
                }
                ToWorker::Finish { slot } => self.finish(slot),
                ToWorker::Exit => return false,
            }
        }
        true
    }

    /// Takes what lies on the queue now.
    fn drain(&mut self) {
        let mut backlog = self.source.backlog();
        let begun_ns = monotonic_ns();
        while backlog > 0 {
            let waited_ns = monotonic_ns() - begun_ns;
            let taken = if waited_ns < DRAIN_NS && self.must_hold() { 0 } else { self.batch() };
            backlog = backlog.saturating_sub(taken);
            if taken > 0 {
                continue;
            }
            // Packets that are too young to be put in order are no longer in a moment, and buffers come back.
            if S::WAKES || waited_ns > DRAIN_NS + 2 * ON_THE_WAY_NS {
                break;
            }
            thread::sleep(Duration::from_nanos(ON_THE_WAY_NS / 4));
        }
        self.settle();
    }

    fn finish(&mut self, slot: usize) {
        // The kernel has stopped matching the job, so what lies on the queue now is all there is.
        self.drain();
        let Some(mut sink) = self.sinks[slot].take() else { return };
        sink.settle();
        sink.pass_on();
        sink.frontier.end();
        let drained = Drained {
            totals: sink.state.totals,
            late: sink.state.late,
            source: self.source.counters().unwrap_or_default(),
        };
        let (port, worker) = (self.config.port, self.config.index);
        drop(self.engine.send(Event::Drained { job: sink.job, port, worker, drained }));
    }
}
