//! The disk path alone: packets that no interface had, encoded and written like any others, as fast as
//! the disk takes them.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use capture_ebpf::abi::{DIRECTION_IN, Header};
use crossbeam::channel::{bounded, unbounded};

use super::{Ending, Event, JobSpec, StartError, Summary, control::fill};
use crate::{
    buffer::Pool,
    clock::{Clock, monotonic_ns},
    disk::{Disk, DiskReport, Stream, ToDisk},
    error::with_causes,
    latency::{Latency, Percentiles, SharedLate, read_late},
    limits::Limits,
    segment::{InterfaceLabel, Io, StreamTotals, Writer},
    source::Received,
    spool::{Outlet, Refused},
    stats::{Amount, Drops, Law, QueueCounters},
    worker::{Sink, SinkState},
};

/// Packets between two looks at the clock and the limits.
const BATCH: u64 = 64;

/// Sleep while the disk has every buffer. A buffer of a megabyte takes it longer.
const PAUSE: Duration = Duration::from_micros(100);

/// What the files call the interface that there is not.
const NAME: &str = "synthetic";

/// Length of packets if none is given: of the smallest there are.
const SMALLEST: u32 = 64;

/// Writes packets of the spec's snaplen until one of its limits is reached or `stopped` says so. The time
/// that the summary gives lasts until the last segment is sealed.
pub fn run_synthetic(mut spec: JobSpec, stopped: impl Fn() -> bool) -> Result<Summary, StartError> {
    spec.check()?;
    if spec.snaplen == 0 {
        spec.snaplen = SMALLEST;
    }
    let length = spec.snaplen as usize;
    let limits = (spec.packet_limit.is_some() || spec.byte_limit.is_some())
        .then(|| Arc::new(Limits::new(spec.packet_limit, spec.byte_limit, 1)));
    let target = std::mem::replace(&mut spec.target, crate::segment::Target::Nowhere);
    let label = InterfaceLabel {
        name: NAME.into(),
        comment: "made up, to measure the disk".into(),
        ..InterfaceLabel::default()
    };
    let writer =
        Writer::create(target, NAME, spec.rotation, spec.hashed, &spec.comment, vec![label])?;
    let (events, inbox) = unbounded();
    let (disk, to_disk) = bounded(spec.buffers + 1);
    let stream = Stream {
        writer: 0,
        interface: 0,
        pool: Pool::new(spec.buffers, spec.buffer_size),
        frontier: Arc::default(),
    };
    let writers = vec![writer];
    let late = SharedLate::default();
    let mut sink = Sink {
        job: 1,
        stream: 0,
        interface: 0,
        snaplen: length,
        fill: fill(&writers, &spec),
        pool: Arc::clone(&stream.pool),
        disk: disk.clone(),
        frontier: Arc::clone(&stream.frontier),
        limits,
        pace: None,
        counters: Arc::new(QueueCounters::default()),
        state: SinkState::default(),
    };
    Disk {
        job: 1,
        writers,
        streams: vec![stream],
        ask: vec![Box::new(|| {})],
        fill: sink.fill,
        inbox: to_disk,
        engine: events,
        outlet: Outlet::new(spec.sealed.take(), spec.budget.take(), 1),
        refused: Arc::new(Refused::default()),
        io: Io::new(Arc::clone(&late)),
        cpus: Vec::new(),
    }
    .spawn()
    .map_err(StartError::Thread)?;

    let data: Vec<u8> = (0..length).map(|byte| byte as u8).collect();
    let clock = Clock::new();
    let since = Instant::now();
    let ending = loop {
        if stopped() {
            break Ending::Stopped;
        }
        if spec.duration.is_some_and(|duration| since.elapsed() >= duration) {
            break Ending::Duration;
        }
        // The cause comes with the report.
        if !inbox.is_empty() {
            break Ending::Failed(String::new());
        }
        let time_ns = monotonic_ns();
        let header = Header {
            time_ns,
            original_len: length as u32,
            direction: DIRECTION_IN,
            ..Header::default()
        };
        // A limit is met exactly, so that nothing made comes after it.
        let left = spec.packet_limit.map(|limit| limit - sink.totals().delivered);
        for _ in 0..left.map_or(BATCH, |left| left.min(BATCH)) {
            if !sink.has_room(length) {
                thread::sleep(PAUSE);
                break;
            }
            sink.take(&Received { header: &header, data: &data, rest: &[] }, clock.utc(time_ns));
        }
        if sink.settle() {
            break Ending::Limit;
        }
    };
    sink.pass_on();
    let made = sink.totals();
    let bytes = made.delivered * length as u64;
    let hits = Amount { packets: made.delivered, bytes };
    let drops =
        Drops { buffer_full: made.buffer_full, past_limit: made.past_limit, ..Drops::default() };
    let totals = StreamTotals { seen: made.delivered, law: Law { hits, drops, ..Law::default() } };
    drop(disk.send(ToDisk::Finish { totals: vec![totals] }));
    let report: DiskReport = loop {
        match inbox.recv() {
            Ok(Event::Sealed { report, .. }) => break *report,
            Ok(_) => {}
            Err(_gone) => return Err(StartError::Ended),
        }
    };
    let mut law = Law { written: report.written[0], ..totals.law };
    law.drops.write_error = report.lost[0];
    law.drops.spool_full = report.refused[0];
    Ok(Summary {
        ending: report.error.map_or(ending, |error| Ending::Failed(with_causes(&error))),
        seconds: since.elapsed().as_secs_f64(),
        seen: made.delivered,
        law,
        interfaces: Vec::new(),
        queues: Vec::new(),
        segments: report.segments,
        disk: report.used,
        latency: Latency { encoded: Percentiles::default(), written: read_late(&late) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::{Target, survey};

    #[test]
    fn made_up_packets_are_in_the_file_up_to_the_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pcapng");
        let spec = JobSpec {
            packet_limit: Some(100_000),
            snaplen: 100,
            ..JobSpec::new(Target::File(path.clone()))
        };
        let summary = run_synthetic(spec, || false).unwrap();
        assert_eq!(summary.ending, Ending::Limit);
        assert!(summary.law.holds(), "{:?}", summary.law);
        assert_eq!(summary.law.written, Amount { packets: 100_000, bytes: 10_000_000 });
        assert_eq!(survey(&path).unwrap(), summary.segments[0]);
        assert!(summary.latency.written.samples > 0);
    }

    #[test]
    fn what_goes_nowhere_is_counted_and_leaves_nothing() {
        let spec =
            JobSpec { duration: Some(Duration::from_millis(100)), ..JobSpec::new(Target::Nowhere) };
        let summary = run_synthetic(spec, || false).unwrap();
        assert_eq!(summary.ending, Ending::Duration);
        assert!(summary.law.holds() && summary.segments.is_empty());
        assert!(summary.law.written.packets > 0);
        assert!(summary.disk.discarded_bytes > summary.law.written.bytes);
        assert_eq!((summary.disk.direct_bytes, summary.disk.cached_bytes), (0, 0));
    }
}
