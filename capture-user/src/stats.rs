//! What is counted, and the law that it adds up to.
//!
//! For every job: `hits = written + each named drop`, exactly. Hits are counted by the kernel program,
//! written packets by the disk thread, and each drop where it happens.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crossbeam::utils::CachePadded;
use serde::Serialize;

use crate::source::SourceCounters;

macro_rules! drops {
    ($($(#[doc = $why:literal])+ $name:ident),+ $(,)?) => {
        /// Why hits were not written. Each hit that was not is counted under exactly one cause.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct Drops {
            $($(#[doc = $why])+ pub $name: u64,)+
        }

        impl Drops {
            /// Every cause with its name, count and meaning.
            pub fn named(&self) -> Vec<(&'static str, u64, &'static str)> {
                vec![$((stringify!($name), self.$name, concat!($($why),+).trim_ascii())),+]
            }
        }

        impl std::ops::AddAssign for Drops {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)+
            }
        }
    };
}

drops! {
    /// the socket's RX ring was full: the worker was too slow
    rx_ring_full,
    /// no UMEM frame was free, or the packet was longer than one where it may not be split
    rx_dropped,
    /// the kernel redirected it, but the socket neither got nor counted it
    redirect_failed,
    /// its receive queue had no socket
    no_socket,
    /// the driver left no room in front of the packet for the capture header
    no_header,
    /// the CPU's ring was full: the worker was too slow
    bpf_ring_full,
    /// no segment buffer was free: the disk was too slow
    buffer_full,
    /// it came after a limit was reached, before the kernel stopped matching
    past_limit,
    /// adaptive sampling left it out, to keep to its budget
    thinned,
    /// the disk or the reader of the pipe refused it
    write_error,
    /// the spool was full: what takes segments away was too slow
    spool_full,
}

impl Drops {
    /// All causes together.
    pub fn total(&self) -> u64 {
        self.named().iter().map(|(_, count, _)| count).sum()
    }
}

/// Packets and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// Packets.
    pub packets: u64,
    /// Bytes: captured lengths where something was written, lengths on the wire for hits.
    pub bytes: u64,
}

impl std::ops::AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

/// The law of one job.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Law {
    /// Packets that the filter and the sampling accepted.
    pub hits: Amount,
    /// Packets in files.
    pub written: Amount,
    /// Packets in neither.
    pub drops: Drops,
}

impl Law {
    /// Whether it adds up.
    pub fn holds(&self) -> bool {
        self.hits.packets == self.written.packets + self.drops.total()
    }
}

/// What a worker counts for one job on one queue. Written by the worker only, once per batch or
/// a few.
#[derive(Debug, Default)]
pub struct QueueCounters(CachePadded<QueueCells>);

#[derive(Debug, Default)]
struct QueueCells {
    delivered: AtomicU64,
    captured: AtomicU64,
    captured_bytes: AtomicU64,
    buffer_full: AtomicU64,
    past_limit: AtomicU64,
    thinned: AtomicU64,
}

/// A reading of [`QueueCounters`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct QueueTotals {
    /// Hits that reached the worker.
    pub delivered: u64,
    /// Of these, encoded into a buffer.
    pub captured: u64,
    /// Their captured lengths, bytes.
    pub captured_bytes: u64,
    /// Dropped for want of a buffer.
    pub buffer_full: u64,
    /// Dropped behind a limit.
    pub past_limit: u64,
    /// Left out by adaptive sampling.
    pub thinned: u64,
}

impl QueueCounters {
    /// Publishes the worker's totals.
    pub fn publish(&self, totals: &QueueTotals) {
        self.0.delivered.store(totals.delivered, Relaxed);
        self.0.captured.store(totals.captured, Relaxed);
        self.0.captured_bytes.store(totals.captured_bytes, Relaxed);
        self.0.buffer_full.store(totals.buffer_full, Relaxed);
        self.0.past_limit.store(totals.past_limit, Relaxed);
        self.0.thinned.store(totals.thinned, Relaxed);
    }

    /// Reads them.
    pub fn read(&self) -> QueueTotals {
        QueueTotals {
            delivered: self.0.delivered.load(Relaxed),
            captured: self.0.captured.load(Relaxed),
            captured_bytes: self.0.captured_bytes.load(Relaxed),
            buffer_full: self.0.buffer_full.load(Relaxed),
            past_limit: self.0.past_limit.load(Relaxed),
            thinned: self.0.thinned.load(Relaxed),
        }
    }
}

/// Names the hits that the kernel handed over and no worker received.
///
/// The socket counts its losses for all jobs together. For a job that was alone these are its own,
/// and each cause is exact; among several, the total stays exact and the split is exact when only one
/// cause occurred.
pub fn name_lost(lost: u64, queues: SourceCounters) -> Drops {
    let rx_dropped = lost.min(queues.dropped);
    let rx_ring_full = (lost - rx_dropped).min(queues.ring_full);
    Drops {
        rx_dropped,
        rx_ring_full,
        redirect_failed: lost - rx_dropped - rx_ring_full,
        ..Drops::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lost_hit_gets_exactly_one_name() {
        for (ring_full, dropped) in [(0, 0), (10, 0), (0, 10), (7, 3), (3, 3), (20, 20)] {
            let queues = SourceCounters { ring_full, dropped, ..SourceCounters::default() };
            assert_eq!(name_lost(10, queues).total(), 10, "{queues:?}");
        }
        let queues = SourceCounters { ring_full: 7, dropped: 3, ..SourceCounters::default() };
        let want = Drops { rx_ring_full: 7, rx_dropped: 3, ..Drops::default() };
        assert_eq!(name_lost(10, queues), want);
    }

    #[test]
    fn every_cause_has_a_name_and_a_sentence_and_counts_in_the_total() {
        let drops = Drops { rx_ring_full: 1, write_error: 2, ..Drops::default() };
        assert_eq!(drops.total(), 3);
        assert!(drops.named().iter().all(|(_, _, meaning)| meaning.len() > 10));
    }
}
