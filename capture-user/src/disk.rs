//! A job's disk thread: takes full buffers, writes segments, gives the buffers back.
//!
//! A thread per job, so that a job whose disk is slow or full disturbs no other.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};

use crate::{
    buffer::{ALIGNMENT, Buffer, Pool},
    engine::{Event, JobId},
    merge::{Frontier, Lane, Merge},
    placement,
    segment::{DiskUse, Io, Run, SegmentError, SegmentInfo, StreamTotals, Writer},
    spool::{Outlet, Refused},
    stats::{Amount, Law},
};

/// What a disk thread is told.
pub(crate) enum ToDisk {
    /// Write this.
    Buffer { stream: usize, buffer: Buffer },
    /// Write all there is, and say so.
    Flush,
    /// All buffers have been sent: complete the segments. Per stream, what is known but for what was
    /// written, which this thread knows.
    Finish { totals: Vec<StreamTotals> },
}

/// What a disk thread has to say in the end.
#[derive(Debug)]
pub(crate) struct DiskReport {
    /// Packets written, per stream.
    pub(crate) written: Vec<Amount>,
    /// Packets that could not be written, per stream.
    pub(crate) lost: Vec<u64>,
    /// Packets for which the spool had no room, per stream.
    pub(crate) refused: Vec<u64>,
    /// Every visible segment.
    pub(crate) segments: Vec<SegmentInfo>,
    /// How bytes got there.
    pub(crate) used: DiskUse,
    /// The first thing that went wrong.
    pub(crate) error: Option<SegmentError>,
}

/// One queue of a job.
pub(crate) struct Stream {
    /// Which writer its packets go to.
    pub(crate) writer: usize,
    /// Which of that writer's interfaces they are of.
    pub(crate) interface: usize,
    /// Where its buffers come from.
    pub(crate) pool: Arc<Pool>,
    /// Up to when its packets have been passed on.
    pub(crate) frontier: Arc<Frontier>,
}

pub(crate) struct Disk {
    pub(crate) job: JobId,
    pub(crate) writers: Vec<Writer>,
    pub(crate) streams: Vec<Stream>,
    /// How the worker of each stream is asked to pass on what it has.
    pub(crate) ask: Vec<Box<dyn Fn() + Send>>,
    /// Most bytes that a buffer may hold.
    pub(crate) fill: usize,
    pub(crate) inbox: Receiver<ToDisk>,
    pub(crate) engine: Sender<Event>,
    pub(crate) outlet: Outlet,
    pub(crate) refused: Arc<Refused>,
    pub(crate) io: Io,
    /// CPUs to run on; any if there is none.
    pub(crate) cpus: Vec<usize>,
}

/// Longest wait for a write while messages may come.
const LOOK: Duration = Duration::from_millis(20);

impl Disk {
    /// Starts the thread, and waits until it has pinned its memory: that keeps a CPU busy for some
    /// milliseconds, which a worker that shares it may not have.
    pub(crate) fn spawn(self) -> std::io::Result<()> {
        let (ready, is_ready) = bounded(1);
        let name = format!("tl-disk-{}", self.job);
        thread::Builder::new().name(name).spawn(move || self.run(&ready))?;
        is_ready.recv().map_err(std::io::Error::other)
    }

    fn run(mut self, ready: &Sender<()>) {
        if !self.cpus.is_empty() {
            placement::pin(&format!("tl-disk-{}", self.job), &self.cpus);
        }
        let count = self.streams.len();
        let mut report = DiskReport {
            written: vec![Amount::default(); count],
            lost: vec![0; count],
            refused: vec![0; count],
            segments: Vec::new(),
            used: DiskUse::default(),
            error: None,
        };
        let (mut merges, lanes) = self.merges();
        let _: Result<(), _> = ready.send(());
        let totals = loop {
            match self.next(&merges, &mut report) {
                Ok(ToDisk::Buffer { stream, buffer }) => {
                    merges[self.streams[stream].writer].take(lanes[stream], buffer);
                }
                Ok(ToDisk::Flush) => self.flush(&mut merges, &mut report),
                Ok(ToDisk::Finish { totals }) => break totals,
                Err(RecvTimeoutError::Timeout) => {
                    self.each_writer(&mut report, Writer::tick);
                }
                // The engine is gone without a word: seal what there is.
                Err(RecvTimeoutError::Disconnected) => break Vec::new(),
            }
            if let Some(totals) = self.write(&mut merges, &lanes, &mut report) {
                break totals;
            }
        };
        for (at, merge) in merges.iter_mut().enumerate() {
            self.emit(at, merge, u64::MAX, &mut report);
        }
        self.finish(totals, &mut report);
        drop(self.engine.send(Event::Sealed { job: self.job, report: Box::new(report) }));
    }

    /// A merge per writer, and for each stream which of its writer's lanes it is.
    fn merges(&mut self) -> (Vec<Merge>, Vec<usize>) {
        let mut of_writer: Vec<Vec<Lane>> = self.writers.iter().map(|_| Vec::new()).collect();
        let mut index = Vec::new();
        let ask = std::mem::take(&mut self.ask);
        for ((at, stream), ask) in self.streams.iter().enumerate().zip(ask) {
            let lanes = &mut of_writer[stream.writer];
            index.push(lanes.len());
            let frontier = Arc::clone(&stream.frontier);
            lanes.push(Lane::new(at, stream.interface, frontier, stream.pool.capacity(), ask));
        }
        let mut pools: Vec<_> = self.streams.iter().map(|s| Arc::clone(&s.pool)).collect();
        let merge = |lanes: Vec<Lane>| {
            let buffers = lanes.first().map_or(0, |lane| lane.buffers);
            let pool = (lanes.len() > 1).then(|| Pool::new(buffers, self.fill + ALIGNMENT));
            pools.extend(pool.clone());
            Merge::new(lanes, pool, self.fill)
        };
        let merges = of_writer.into_iter().map(merge).collect();
        self.io.prepare(self.writers.len(), pools);
        (merges, index)
    }

    fn next(
        &mut self,
        merges: &[Merge],
        report: &mut DiskReport,
    ) -> Result<ToDisk, RecvTimeoutError> {
        let tick = self.writers.iter().filter_map(Writer::next_tick).min().map(|due| {
            // Not sooner than in a moment: a quiet segment that is due stays open.
            due.saturating_duration_since(Instant::now()).max(Duration::from_millis(20))
        });
        let wait = merges.iter().filter_map(Merge::wait).min();
        let wait = tick.into_iter().chain(wait).min();
        if self.io.is_busy() {
            // Buffers wait to be given back. What comes meanwhile is not in a hurry: the disk is busy.
            return match self.inbox.try_recv() {
                Ok(message) => Ok(message),
                Err(TryRecvError::Disconnected) => Err(RecvTimeoutError::Disconnected),
                Err(TryRecvError::Empty) => {
                    self.io.land(wait.unwrap_or(LOOK).min(LOOK));
                    self.each_writer(report, Writer::settle);
                    Err(RecvTimeoutError::Timeout)
                }
            };
        }
        match wait {
            Some(wait) => self.inbox.recv_timeout(wait),
            None => self.inbox.recv().map_err(|_closed| RecvTimeoutError::Disconnected),
        }
    }

    /// Writes what may be written; gives the totals if the end is near.
    fn write(
        &mut self,
        merges: &mut [Merge],
        lanes: &[usize],
        report: &mut DiskReport,
    ) -> Option<Vec<StreamTotals>> {
        // What they promise to be on the queue has to be taken off it before it is relied on.
        let frontiers: Vec<u64> = merges.iter().map(Merge::frontier).collect();
        let mut end = None;
        let mut flush = false;
        while let Ok(message) = self.inbox.try_recv() {
            match message {
                ToDisk::Buffer { stream, buffer } => {
                    merges[self.streams[stream].writer].take(lanes[stream], buffer);
                }
                ToDisk::Flush => flush = true,
                ToDisk::Finish { totals } => end = Some(totals),
            }
        }
        if flush {
            self.flush(merges, report);
        }
        for (at, (merge, frontier)) in merges.iter_mut().zip(frontiers).enumerate() {
            self.emit(at, merge, frontier, report);
            merge.ask();
        }
        end
    }

    /// Writes what a merge has up to this time.
    fn emit(&mut self, writer: usize, merge: &mut Merge, until: u64, report: &mut DiskReport) {
        while !merge.emit(until, |buffer, runs| self.put(writer, buffer, runs, report)) {
            self.io.land(LOOK);
            self.each_writer(report, Writer::settle);
        }
    }

    /// Writes all there is, also what waits for its order.
    fn flush(&mut self, merges: &mut [Merge], report: &mut DiskReport) {
        for (at, merge) in merges.iter_mut().enumerate() {
            self.emit(at, merge, u64::MAX, report);
        }
        self.each_writer(report, Writer::drain);
        drop(self.engine.send(Event::Flushed { job: self.job }));
    }

    fn put(&mut self, writer: usize, buffer: Buffer, runs: &mut Vec<Run>, report: &mut DiskReport) {
        if report.error.is_some() {
            // After a failure the file ends where it failed: nothing may follow a gap.
            for run in runs.drain(..) {
                report.lost[run.stream] += run.packets;
            }
            buffer.recycle();
            return;
        }
        // It may be padded.
        let bytes = (buffer.len() + ALIGNMENT) as u64;
        if !self.outlet.admit(writer, bytes) {
            for run in runs.drain(..) {
                report.refused[run.stream] += run.packets;
                self.refused.add(Amount { packets: run.packets, bytes: run.captured_bytes });
            }
            buffer.recycle();
            self.each_writer(report, Writer::rotate_now);
            return;
        }
        let result = self.writers[writer].write(&mut self.io, buffer, runs);
        self.after(writer, bytes, result, report);
    }

    /// Does something with every writer.
    fn each_writer(
        &mut self,
        report: &mut DiskReport,
        mut what: impl FnMut(&mut Writer, &mut Io) -> Result<(), SegmentError>,
    ) {
        for at in 0..self.writers.len() {
            let result = what(&mut self.writers[at], &mut self.io);
            self.after(at, 0, result, report);
        }
    }

    /// Books what a writer has done; since it last sealed a segment it was given this many bytes.
    fn after(
        &mut self,
        writer: usize,
        bytes: u64,
        result: Result<(), SegmentError>,
        report: &mut DiskReport,
    ) {
        for outcome in self.writers[writer].outcomes() {
            report.written[outcome.stream] +=
                Amount { packets: outcome.packets, bytes: outcome.captured_bytes };
            report.lost[outcome.stream] += outcome.lost;
        }
        self.outlet.sealed(writer, self.writers[writer].sealed(), bytes);
        if let Err(error) = result {
            self.fail(error, report);
        }
    }

    fn fail(&self, error: SegmentError, report: &mut DiskReport) {
        if report.error.is_none() {
            drop(self.engine.send(Event::Failed { job: self.job }));
            report.error = Some(error);
        }
    }

    fn finish(&mut self, mut totals: Vec<StreamTotals>, report: &mut DiskReport) {
        self.each_writer(report, Writer::drain);
        totals.resize(self.streams.len(), StreamTotals::default());
        for (at, totals) in totals.iter_mut().enumerate() {
            totals.law.written = report.written[at];
            totals.law.drops.write_error += report.lost[at];
            totals.law.drops.spool_full += report.refused[at];
        }
        let used = self.writers.iter().any(Writer::is_used);
        for (at, writer) in std::mem::take(&mut self.writers).into_iter().enumerate() {
            // A queue without a packet leaves no file, but a job leaves at least one.
            if !writer.is_used() && (used || at > 0) {
                continue;
            }
            let of_writer = |stream: &&(usize, &Stream)| stream.1.writer == at;
            let mut interfaces: Vec<StreamTotals> = Vec::new();
            for (index, stream) in self.streams.iter().enumerate().filter(|s| of_writer(&s)) {
                if interfaces.len() <= stream.interface {
                    interfaces.resize(stream.interface + 1, StreamTotals::default());
                }
                let sum = &mut interfaces[stream.interface];
                sum.seen += totals[index].seen;
                add(&mut sum.law, &totals[index].law);
            }
            let (segments, result) = writer.finish(&mut self.io, &interfaces);
            self.outlet.sealed(at, &segments, 0);
            report.segments.extend(segments);
            if let Err(error) = result {
                report.error.get_or_insert(error);
            }
        }
        report.used = std::mem::take(&mut self.io).into_used();
    }
}

fn add(sum: &mut Law, law: &Law) {
    sum.hits += law.hits;
    sum.written += law.written;
    sum.drops += law.drops;
}
