//! A job as the engine keeps it, and the law that is made up of its parts.

use std::{num::NonZeroU32, sync::Arc, time::Instant};

use capture_ebpf::abi::{JobCounters, OUTCOME_NAMES};
use crossbeam::channel::Sender;
use serde::Serialize;

use super::{Ending, Opened, port::Port};
use crate::{
    disk::{DiskReport, ToDisk},
    error::with_causes,
    latency::{Late, Latency, SharedLate, read_late},
    pace::Pacer,
    segment::{DiskUse, SegmentInfo, StreamTotals},
    source::SourceCounters,
    spool::Refused,
    stats::{Law, QueueCounters, QueueTotals, name_lost},
    worker::Drained,
};

/// One queue in a [`Summary`].
#[derive(Clone, Debug, Serialize)]
pub struct QueueSummary {
    /// The interface.
    pub interface: String,
    /// The receive queue; on the `tap` path, the first CPU of those that have a worker together.
    pub queue: u32,
    /// What the worker counted.
    #[serde(flatten)]
    pub totals: QueueTotals,
    /// What the socket counted while the job ran, for all jobs together.
    pub socket: SourceCounters,
}

/// One interface in a [`Summary`].
#[derive(Clone, Debug, Serialize)]
pub struct InterfaceSummary {
    /// How it was captured.
    #[serde(flatten)]
    pub opened: Opened,
    /// Packets that reached the kernel program while the job ran.
    pub seen: u64,
    /// The job's law on this interface.
    pub law: Law,
    /// What became of all packets there since the interface was opened, by outcome.
    pub outcomes: Vec<(&'static str, u64)>,
}

/// A job that has ended.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Why.
    pub ending: Ending,
    /// How long it captured, seconds.
    pub seconds: f64,
    /// Packets that reached the kernel program meanwhile.
    pub seen: u64,
    /// The law over all interfaces.
    pub law: Law,
    /// Per interface.
    pub interfaces: Vec<InterfaceSummary>,
    /// Per queue.
    pub queues: Vec<QueueSummary>,
    /// The files.
    pub segments: Vec<SegmentInfo>,
    /// How bytes got to them.
    pub disk: DiskUse,
    /// How late packets were.
    pub latency: Latency,
}

/// A job's place on one port.
pub(super) struct Place {
    pub(super) slot: usize,
    /// The program's counters when the job started.
    pub(super) base: JobCounters,
    pub(super) base_seen: u64,
    /// Filled in when the job ends.
    pub(super) hits: JobCounters,
    pub(super) seen: u64,
}

/// A job's place on one worker.
pub(super) struct Lane {
    pub(super) port: usize,
    pub(super) worker: usize,
    pub(super) counters: Arc<QueueCounters>,
    pub(super) base: SourceCounters,
    pub(super) drained: Option<Drained>,
}

/// Who waits for what has been a hit by now to be in the file. One flush is on its way at a time.
#[derive(Default)]
pub(super) struct Flushes {
    pub(super) now: Vec<Sender<()>>,
    /// Those that came when one was on its way already, which need another.
    pub(super) next: Vec<Sender<()>>,
}

pub(super) struct Running {
    pub(super) places: Vec<Place>,
    pub(super) lanes: Vec<Lane>,
    pub(super) disk: Sender<ToDisk>,
    pub(super) flushes: Flushes,
    pub(super) refused: Arc<Refused>,
    pub(super) late: SharedLate,
    pub(super) done: Sender<Summary>,
    pub(super) since: Instant,
    pub(super) until: Option<Instant>,
    /// Of a job that samples adaptively, with what the kernel keeps one in.
    pub(super) pace: Option<(Arc<Pacer>, NonZeroU32)>,
    pub(super) ending: Option<Ending>,
    pub(super) seconds: f64,
}

/// What a job's counters have grown by.
pub(super) fn since(now: &JobCounters, base: &JobCounters) -> JobCounters {
    JobCounters {
        hits: now.hits - base.hits,
        bytes: now.bytes - base.bytes,
        no_socket: now.no_socket - base.no_socket,
        no_header: now.no_header - base.no_header,
        ring_full: now.ring_full - base.ring_full,
    }
}

impl Running {
    /// Whether its sampling follows the load.
    pub(super) fn is_paced(&self) -> bool {
        self.pace.is_some() && self.ending.is_none()
    }

    /// Per queue, everything but what was written. The kernel counts hits per interface; what no
    /// worker received is booked on the interface's queues by what their sockets lost, and the rest
    /// on the first.
    pub(super) fn stream_totals(&self) -> Vec<StreamTotals> {
        let mut totals = vec![StreamTotals::default(); self.lanes.len()];
        for (port, place) in self.places.iter().enumerate() {
            let lanes: Vec<usize> =
                (0..self.lanes.len()).filter(|at| self.lanes[*at].port == port).collect();
            let mut delivered = 0;
            let in_kernel = place.hits.no_socket + place.hits.no_header + place.hits.ring_full;
            let mut lost = place.hits.hits - in_kernel;
            for at in &lanes {
                delivered += self.lanes[*at].totals().delivered;
            }
            lost = lost.saturating_sub(delivered);
            for at in &lanes {
                let lane = self.lanes[*at].totals();
                let socket = self.lanes[*at].socket();
                let here = lost.min(socket.ring_full + socket.dropped);
                lost -= here;
                let law = &mut totals[*at].law;
                law.drops = name_lost(here, socket);
                law.drops.buffer_full = lane.buffer_full;
                law.drops.past_limit = lane.past_limit;
                law.drops.thinned = lane.thinned;
                law.hits.packets = lane.delivered + here;
            }
            if let Some(first) = lanes.first() {
                let law = &mut totals[*first].law;
                law.drops.redirect_failed += lost;
                law.drops.no_socket = place.hits.no_socket;
                law.drops.no_header = place.hits.no_header;
                law.drops.bpf_ring_full = place.hits.ring_full;
                law.hits.packets += lost + in_kernel;
                law.hits.bytes = place.hits.bytes;
                totals[*first].seen = place.seen;
            }
        }
        totals
    }

    pub(super) fn summary(&self, report: DiskReport, ports: &[Port]) -> Summary {
        let mut totals = self.stream_totals();
        for (at, totals) in totals.iter_mut().enumerate() {
            totals.law.written = report.written[at];
            totals.law.drops.write_error = report.lost[at];
            totals.law.drops.spool_full = report.refused[at];
        }
        let mut law = Law::default();
        let mut interfaces = Vec::new();
        for (at, (port, place)) in ports.iter().zip(&self.places).enumerate() {
            let mut own = Law::default();
            for (lane, totals) in self.lanes.iter().zip(&totals) {
                if lane.port == at {
                    own.hits += totals.law.hits;
                    own.written += totals.law.written;
                    own.drops += totals.law.drops;
                }
            }
            // By the kernel's count, whatever the queues say.
            own.hits.packets = place.hits.hits;
            law.hits += own.hits;
            law.written += own.written;
            law.drops += own.drops;
            let counters = port.program.counters();
            interfaces.push(InterfaceSummary {
                opened: port.opened.clone(),
                seen: place.seen,
                law: own,
                outcomes: counters.map_or_else(
                    |_| Vec::new(),
                    |counters| {
                        OUTCOME_NAMES
                            .map(|(at, name)| (name, counters.outcomes[at as usize]))
                            .into()
                    },
                ),
            });
        }
        let queues = self
            .lanes
            .iter()
            .map(|lane| QueueSummary {
                interface: ports[lane.port].opened.name.clone(),
                queue: ports[lane.port].workers[lane.worker].queues.first,
                totals: lane.totals(),
                socket: lane.socket(),
            })
            .collect();
        let mut encoded = Late::default();
        for drained in self.lanes.iter().filter_map(|lane| lane.drained.as_ref()) {
            encoded.add(&drained.late);
        }
        let ending = match (report.error, self.ending.clone()) {
            (Some(error), _) => Ending::Failed(with_causes(&error)),
            (None, Some(ending)) => ending,
            (None, None) => Ending::Stopped,
        };
        Summary {
            ending,
            seconds: self.seconds,
            seen: interfaces.iter().map(|interface| interface.seen).sum(),
            law,
            interfaces,
            queues,
            segments: report.segments,
            disk: report.used,
            latency: Latency { encoded: encoded.percentiles(), written: read_late(&self.late) },
        }
    }
}

impl Lane {
    fn totals(&self) -> QueueTotals {
        self.drained.as_ref().map(|drained| drained.totals).unwrap_or_default()
    }

    fn socket(&self) -> SourceCounters {
        let drained = self.drained.as_ref();
        drained.map(|drained| drained.source - self.base).unwrap_or_default()
    }
}
