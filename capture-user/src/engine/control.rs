//! The engine's own thread: starts jobs, ends them, and is the only one that writes the programs'
//! maps.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use capture_ebpf::abi::JobCounters;
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use super::{
    Ending, Event, Job, JobId, JobSpec, Opened, Progress, QueueProgress, StartError, Transport,
    port::Port,
    running::{Flushes, Lane, Place, Running, since},
};
use crate::{
    buffer::{ALIGNMENT, Pool},
    clock::monotonic_ns,
    disk::{Disk, DiskReport, Stream, ToDisk},
    error::with_causes,
    filter::Rule,
    latency::{Late, Latency, SharedLate, read_late},
    limits::Limits,
    nic,
    pace::{FOLLOW, Pacer, Thinner},
    segment::{InterfaceLabel, Io, Target, Writer},
    spool::{Outlet, Refused},
    stats::{Amount, QueueCounters},
    worker::{Drained, Flushing, Queues, Sink, SinkState, ToWorker},
};

pub(super) struct Control {
    ports: Vec<Port>,
    jobs: HashMap<JobId, Running>,
    next: JobId,
    disk_cpus: Vec<usize>,
    events: Sender<Event>,
}

/// How often it is looked whether the interfaces are still there.
const LOOK: Duration = Duration::from_millis(500);

impl Control {
    pub(super) fn new(ports: Vec<Port>, disk_cpus: Vec<usize>, events: Sender<Event>) -> Self {
        Self { ports, jobs: HashMap::new(), next: 1, disk_cpus, events }
    }

    pub(super) fn run(mut self, inbox: &Receiver<Event>) {
        let mut exiting = false;
        let mut looked = Instant::now();
        let mut followed = looked;
        while !(exiting && self.jobs.is_empty()) {
            let due = self
                .jobs
                .values()
                .filter(|job| job.ending.is_none())
                .filter_map(|job| job.until)
                .min();
            let paced = self.jobs.values().any(Running::is_paced);
            let most = if paced { FOLLOW } else { LOOK };
            let wait =
                due.map_or(most, |due| due.saturating_duration_since(Instant::now()).min(most));
            match inbox.recv_timeout(wait) {
                Ok(Event::Exit) | Err(RecvTimeoutError::Disconnected) => {
                    exiting = true;
                    self.end_all(&Ending::Stopped);
                }
                Ok(event) => self.handle(event),
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.end_due();
            if paced && followed.elapsed() >= FOLLOW {
                followed = Instant::now();
                self.follow();
            }
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                self.look();
            }
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Start { spec, answer } => {
                let started = self.start(*spec);
                drop(answer.send(started));
            }
            Event::Stop { job } => self.end(job, Ending::Stopped),
            Event::Limit { job } => self.end(job, Ending::Limit),
            // The disk thread names the cause when it reports.
            Event::Failed { job } => self.end(job, Ending::Failed(String::new())),
            Event::Gone { port } => self.gone(port),
            Event::Progress { job, answer } => {
                if let Some(progress) = self.progress(job) {
                    let _: Result<(), _> = answer.send(progress);
                }
            }
            Event::Flush { job, answer } => {
                if let Some(running) = self.jobs.get_mut(&job) {
                    running.flushes.next.push(answer);
                    self.flush(job);
                }
            }
            Event::Flushed { job } => {
                if let Some(running) = self.jobs.get_mut(&job) {
                    for answer in running.flushes.now.drain(..) {
                        let _: Result<(), _> = answer.send(());
                    }
                    self.flush(job);
                }
            }
            Event::Drained { job, port, worker, drained } => {
                self.drained(job, port, worker, drained);
            }
            Event::Sealed { job, report } => self.sealed(job, *report),
            Event::Exit => {}
        }
    }

    fn end_due(&mut self) {
        let now = Instant::now();
        let due: Vec<JobId> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.ending.is_none() && job.until.is_some_and(|until| until <= now))
            .map(|(id, _)| *id)
            .collect();
        for job in due {
            self.end(job, Ending::Duration);
        }
    }

    fn end_all(&mut self, ending: &Ending) {
        let all: Vec<JobId> = self.jobs.keys().copied().collect();
        for job in all {
            self.end(job, ending.clone());
        }
    }

    /// Lets the kernel's sampling follow the load, where it is adaptive.
    fn follow(&mut self) {
        let now_ns = monotonic_ns();
        for running in self.jobs.values_mut().filter(|running| running.is_paced()) {
            let Some((pacer, k)) = &mut running.pace else { continue };
            let next = pacer.follow(*k, now_ns);
            if next == *k {
                continue;
            }
            for (place, port) in running.places.iter().zip(&mut self.ports) {
                // One that stays as it was is written as it was, too.
                if let Err(error) = port.program.resample(place.slot, next) {
                    log::warn!("{}: {}", port.opened.name, with_causes(&error));
                }
            }
            *k = next;
        }
    }

    /// A socket says so at once where it is bound; this also sees what no socket reports.
    fn look(&mut self) {
        for at in 0..self.ports.len() {
            if !nic::exists(self.ports[at].index) {
                self.gone(at);
            }
        }
    }

    fn gone(&mut self, port: usize) {
        let port = &mut self.ports[port];
        if std::mem::replace(&mut port.gone, true) {
            return;
        }
        let ending = Ending::Failed(format!("interface {} is gone", port.opened.name));
        log::error!("interface {} is gone", port.opened.name);
        self.end_all(&ending);
    }

    fn start(&mut self, mut spec: JobSpec) -> Result<Job, StartError> {
        spec.check()?;
        if let Some(port) = self.ports.iter().find(|port| port.gone) {
            return Err(StartError::Gone { interface: port.opened.name.clone() });
        }
        let mut slots = Vec::new();
        for port in &self.ports {
            let slot = port
                .program
                .free_slot()
                .ok_or_else(|| StartError::NoSlot { interface: port.opened.name.clone() })?;
            slots.push(slot);
        }
        let id = self.next;
        self.next += 1;
        let refused = Arc::new(Refused::default());
        let late = SharedLate::default();
        let sinks = self.sinks(id, &slots, &mut spec, &refused, &late)?;
        let disk = sinks[0].disk.clone();
        let pacer = spec.pace.map(|budget| Arc::new(Pacer::new(budget, sinks.len())));
        match self.enlist(&spec, &slots, sinks, pacer.as_ref()) {
            Ok((places, lanes)) => {
                let since = Instant::now();
                let (done, result) = bounded(1);
                let queues = lanes.iter().map(|lane| self.queue(lane)).collect();
                let until = spec.duration.map(|duration| since + duration);
                let running = Running {
                    places,
                    lanes,
                    disk,
                    flushes: Flushes::default(),
                    refused: Arc::clone(&refused),
                    late,
                    done,
                    since,
                    until,
                    pace: pacer.map(|pacer| (pacer, spec.sample)),
                    ending: None,
                    seconds: 0.0,
                };
                self.jobs.insert(id, running);
                Ok(Job { id, engine: self.events.clone(), done: result, queues, refused })
            }
            Err(error) => {
                self.withdraw(&slots);
                Err(error)
            }
        }
    }

    fn queue(&self, lane: &Lane) -> QueueProgress {
        let port = &self.ports[lane.port];
        QueueProgress {
            interface: port.opened.name.clone(),
            queue: port.workers[lane.worker].queues.first,
            counters: Arc::clone(&lane.counters),
        }
    }

    /// Opens a job's output and starts its disk thread; returns its place for each worker.
    fn sinks(
        &self,
        job: JobId,
        slots: &[usize],
        spec: &mut JobSpec,
        refused: &Arc<Refused>,
        late: &SharedLate,
    ) -> Result<Vec<Sink>, StartError> {
        let workers = self.ports.iter().map(|port| port.workers.len()).sum();
        let limits = (spec.packet_limit.is_some() || spec.byte_limit.is_some())
            .then(|| Arc::new(Limits::new(spec.packet_limit, spec.byte_limit, workers)));
        let (writers, streams) = self.writers(spec)?;
        let room = writers.iter().filter_map(Writer::room).min().unwrap_or(u64::MAX);
        // The last page is for padding.
        let fill = usize::try_from(room).unwrap_or(usize::MAX).min(spec.buffer_size - ALIGNMENT);
        // Room for every buffer there is, a flush, and the last message.
        let buffers: usize = streams.iter().map(|stream| stream.pool.capacity()).sum();
        let (disk, inbox) = bounded(buffers + 2);
        let sink = |(at, stream): (usize, &Stream)| Sink {
            job,
            stream: at,
            interface: stream.interface as u32,
            snaplen: if spec.snaplen == 0 { usize::MAX } else { spec.snaplen as usize },
            fill,
            pool: Arc::clone(&stream.pool),
            disk: disk.clone(),
            frontier: Arc::clone(&stream.frontier),
            limits: limits.clone(),
            pace: None,
            counters: Arc::new(QueueCounters::default()),
            state: SinkState::default(),
        };
        let sinks = streams.iter().enumerate().map(sink).collect();
        let workers = self.ports.iter().zip(slots).flat_map(|(port, slot)| {
            port.workers.iter().map(move |worker| (*slot, worker.caller()))
        });
        let ask = workers
            .map(|(slot, caller)| -> Box<dyn Fn() + Send> {
                Box::new(move || caller.send(ToWorker::Flush { slot, job, flushing: None }))
            })
            .collect();
        let outlet = Outlet::new(spec.sealed.take(), spec.budget.take(), writers.len());
        let engine = self.events.clone();
        let refused = Arc::clone(refused);
        let io = Io::new(Arc::clone(late));
        let cpus = self.disk_cpus.clone();
        Disk { job, writers, streams, ask, fill, inbox, engine, outlet, refused, io, cpus }
            .spawn()
            .map_err(StartError::Thread)?;
        Ok(sinks)
    }

    /// Makes the job known to every program and worker, then activates it.
    fn enlist(
        &mut self,
        spec: &JobSpec,
        slots: &[usize],
        sinks: Vec<Sink>,
        pacer: Option<&Arc<Pacer>>,
    ) -> Result<(Vec<Place>, Vec<Lane>), StartError> {
        let rule = Rule {
            filter: spec.filter,
            sample: spec.sample,
            direction: spec.direction,
            snaplen: spec.snaplen,
        };
        let mut sinks = sinks.into_iter();
        let mut places = Vec::new();
        let mut lanes = Vec::new();
        for (at, (port, slot)) in self.ports.iter_mut().zip(slots).enumerate() {
            port.program.insert(*slot, rule)?;
            let counters = port.program.counters()?;
            let history = pacer.zip(pacer.and_then(|_| port.program.follow(*slot)));
            for ((worker, link), mut sink) in port.workers.iter().enumerate().zip(sinks.by_ref()) {
                let counters = Arc::clone(&sink.counters);
                sink.pace = history.as_ref().map(|(pacer, history)| {
                    Box::new(Thinner::new(Arc::clone(pacer), lanes.len(), Arc::clone(history)))
                });
                let (answer, reply) = bounded(1);
                link.send(ToWorker::Add { slot: *slot, sink: Box::new(sink), answer });
                let base = reply.recv().unwrap_or_default();
                lanes.push(Lane { port: at, worker, counters, base, drained: None });
            }
            places.push(Place {
                slot: *slot,
                base: counters.jobs[*slot],
                base_seen: counters.packets,
                hits: JobCounters::default(),
                seen: 0,
            });
        }
        for (port, slot) in self.ports.iter_mut().zip(slots) {
            port.program.activate(*slot)?;
        }
        Ok((places, lanes))
    }

    /// Takes back what [`enlist`](Self::enlist) had done when it failed.
    fn withdraw(&mut self, slots: &[usize]) {
        for (port, slot) in self.ports.iter_mut().zip(slots) {
            let taken_back =
                port.program.deactivate(*slot).and_then(|()| port.program.remove(*slot));
            if let Err(error) = taken_back {
                log::error!("{}: {error}", port.opened.name);
            }
            for worker in &port.workers {
                worker.send(ToWorker::Finish { slot: *slot });
            }
        }
    }

    /// The writers of a job, and for each queue which of them is its.
    fn writers(&self, spec: &mut JobSpec) -> Result<(Vec<Writer>, Vec<Stream>), StartError> {
        // A writer of its own for each queue, or one for all.
        let target = std::mem::replace(&mut spec.target, Target::File(PathBuf::new()));
        let spec = &*spec;
        let label = |port: &Port| InterfaceLabel {
            name: port.opened.name.clone(),
            hardware: port.opened.driver.clone(),
            filter: spec.filter.to_string(),
            snaplen: spec.snaplen,
            comment: comment(&port.opened, spec),
            raw_ip: port.opened.raw_ip,
        };
        let mut writers = Vec::new();
        let mut streams = Vec::new();
        let queues = self.ports.iter().enumerate().flat_map(|(at, port)| {
            port.workers.iter().map(move |worker| (at, port, worker.queues))
        });
        let pool = |queues: Queues| Pool::new(spec.buffers * queues.count, spec.buffer_size);
        match target {
            Target::Directory { path, prefix } => {
                for (_, port, queues) in queues {
                    let target = Target::Directory { path: path.clone(), prefix: prefix.clone() };
                    let series = format!("{}_q{}", port.opened.name, queues.first);
                    let labels = vec![label(port)];
                    writers.push(Writer::create(
                        target,
                        &series,
                        spec.rotation,
                        spec.hashed,
                        &spec.comment,
                        labels,
                    )?);
                    let pool = pool(queues);
                    let frontier = Arc::default();
                    streams.push(Stream {
                        writer: writers.len() - 1,
                        interface: 0,
                        pool,
                        frontier,
                    });
                }
            }
            target => {
                let labels = self.ports.iter().map(label).collect();
                writers.push(Writer::create(
                    target,
                    "",
                    spec.rotation,
                    spec.hashed,
                    &spec.comment,
                    labels,
                )?);
                for (at, _, queues) in queues {
                    let pool = pool(queues);
                    let frontier = Arc::default();
                    streams.push(Stream { writer: 0, interface: at, pool, frontier });
                }
            }
        }
        Ok((writers, streams))
    }

    fn progress(&self, job: JobId) -> Option<Progress> {
        let running = self.jobs.get(&job)?;
        let mut progress = Progress::default();
        for (place, port) in running.places.iter().zip(&self.ports) {
            let counters = port.program.counters().ok()?;
            let hits = since(&counters.jobs[place.slot], &place.base);
            progress.seen += counters.packets - place.base_seen;
            progress.hits += Amount { packets: hits.hits, bytes: hits.bytes };
            progress.drops.no_socket += hits.no_socket;
            progress.drops.no_header += hits.no_header;
            progress.drops.bpf_ring_full += hits.ring_full;
        }
        let mut delivered = 0;
        for lane in &running.lanes {
            let totals = lane.counters.read();
            delivered += totals.delivered;
            progress.captured += Amount { packets: totals.captured, bytes: totals.captured_bytes };
            progress.drops.buffer_full += totals.buffer_full;
            progress.drops.past_limit += totals.past_limit;
            progress.drops.thinned += totals.thinned;
        }
        let known = delivered + progress.drops.total()
            - progress.drops.buffer_full
            - progress.drops.past_limit
            - progress.drops.thinned;
        // Of what was encoded.
        let refused = running.refused.read();
        progress.drops.spool_full = refused.packets;
        progress.captured.packets = progress.captured.packets.saturating_sub(refused.packets);
        progress.captured.bytes = progress.captured.bytes.saturating_sub(refused.bytes);
        // Includes what is on its way: exact only when the job has ended.
        let lost = progress.hits.packets.saturating_sub(known);
        if self.ports.iter().any(|port| port.opened.transport == Some(Transport::AfXdp)) {
            progress.drops.rx_ring_full = lost;
        }
        progress.latency = self.latency(job, running);
        Some(progress)
    }

    /// Starts a flush, if there is who waits for one and none is on its way.
    fn flush(&mut self, job: JobId) {
        let Some(running) = self.jobs.get_mut(&job) else { return };
        if !running.flushes.now.is_empty() || running.flushes.next.is_empty() {
            return;
        }
        std::mem::swap(&mut running.flushes.now, &mut running.flushes.next);
        let flushing = Arc::new(Flushing(running.disk.clone()));
        for lane in &running.lanes {
            let port = &self.ports[lane.port];
            let slot = running.places[lane.port].slot;
            let flushing = Some(Arc::clone(&flushing));
            port.workers[lane.worker].send(ToWorker::Flush { slot, job, flushing });
        }
    }

    /// Asks the workers; the disk thread's word is where everyone can read it.
    fn latency(&self, job: JobId, running: &Running) -> Latency {
        let (answer, replies) = unbounded();
        let mut encoded = Late::default();
        for lane in &running.lanes {
            if let Some(drained) = &lane.drained {
                encoded.add(&drained.late);
                continue;
            }
            let (port, answer) = (&self.ports[lane.port], answer.clone());
            let slot = running.places[lane.port].slot;
            port.workers[lane.worker].send(ToWorker::Late { slot, job, answer });
        }
        drop(answer);
        // Ends when each has answered, or has ended the job meanwhile.
        for late in replies {
            encoded.add(&late);
        }
        Latency { encoded: encoded.percentiles(), written: read_late(&running.late) }
    }

    /// Step 1 of a job's end, and the start of step 2.
    fn end(&mut self, job: JobId, ending: Ending) {
        let Some(running) = self.jobs.get_mut(&job) else { return };
        if let Some(already) = &mut running.ending {
            // A failure while the job ends is the news that matters.
            if matches!(ending, Ending::Failed(_)) && !matches!(already, Ending::Failed(_)) {
                *already = ending;
            }
            return;
        }
        running.ending = Some(ending);
        running.seconds = running.since.elapsed().as_secs_f64();
        for (place, port) in running.places.iter_mut().zip(&mut self.ports) {
            if let Err(error) = port.program.deactivate(place.slot) {
                log::error!("{}: {error}", port.opened.name);
            }
            match port.program.counters() {
                Ok(counters) => {
                    place.hits = since(&counters.jobs[place.slot], &place.base);
                    place.seen = counters.packets - place.base_seen;
                }
                Err(error) => log::error!("{}: {error}", port.opened.name),
            }
            for worker in &port.workers {
                worker.send(ToWorker::Finish { slot: place.slot });
            }
        }
    }

    /// The end of step 2 and the start of step 3.
    fn drained(&mut self, job: JobId, port: usize, worker: usize, drained: Drained) {
        let Some(running) = self.jobs.get_mut(&job) else { return };
        let lane = running.lanes.iter_mut().find(|l| l.port == port && l.worker == worker);
        if let Some(lane) = lane {
            lane.drained = Some(drained);
        }
        if running.lanes.iter().any(|lane| lane.drained.is_none()) {
            return;
        }
        for (place, port) in running.places.iter().zip(&mut self.ports) {
            if let Err(error) = port.program.remove(place.slot) {
                log::error!("{}: {error}", port.opened.name);
            }
        }
        let totals = running.stream_totals();
        drop(running.disk.send(ToDisk::Finish { totals }));
    }

    /// Step 4.
    fn sealed(&mut self, job: JobId, report: DiskReport) {
        let Some(running) = self.jobs.remove(&job) else { return };
        let summary = running.summary(report, &self.ports);
        if !summary.law.holds() {
            log::error!("job {job}: the counts do not add up: {:?}", summary.law);
        }
        drop(running.done.send(summary));
    }
}

/// Most bytes that a job's buffers may hold.
pub(super) fn fill(writers: &[Writer], spec: &JobSpec) -> usize {
    let room = writers.iter().filter_map(Writer::room).min().unwrap_or(u64::MAX);
    // The last page is for padding.
    usize::try_from(room).unwrap_or(usize::MAX).min(spec.buffer_size - ALIGNMENT)
}

/// What a file says of how an interface was captured.
fn comment(opened: &Opened, spec: &JobSpec) -> String {
    let mut words = opened.to_string();
    if let Some(pace) = spec.pace {
        words +=
            &format!(", sampled to {pace} packets a second, of which each says what it stands for");
    }
    if spec.sample.get() > 1 {
        words += &format!(", sampled 1 in {}", spec.sample);
    }
    if opened.mode == "tap" {
        words += ". As the host's own stack has them: sent packets may have unfinished checksums and be \
                  longer than the MTU, which the network card mends (checksum offload, TSO); received \
                  ones may have been merged (GRO)";
    }
    words
}
