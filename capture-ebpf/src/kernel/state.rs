//! The maps, and how the programs read and count in them.

use core::hint::black_box;

use aya_ebpf::{
    macros::map,
    maps::{Array, PerCpuArray, XskMap},
};
use capture_ebpf::{
    abi::{Counters, DIRECTION_OUT, JobCounters, MAX_JOBS, MAX_QUEUES, Outcome, Switch},
    classify::{Ports, Tables, classify, sample},
    parse::{Buffer, Fields},
};

#[map]
static SWITCH: Array<Switch> = Array::with_max_entries(1, 0);

#[map]
static TABLES: Array<Tables> = Array::with_max_entries(2, 0);

#[map]
static SPORTS: Array<u64> = Array::with_max_entries(65536, 0);

#[map]
static DPORTS: Array<u64> = Array::with_max_entries(65536, 0);

#[map]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);

#[map]
pub(super) static SOCKETS: XskMap = XskMap::with_max_entries(MAX_QUEUES, 0);

struct PortMaps;

impl Ports for PortMaps {
    #[inline(always)]
    fn sport(&self, port: u16) -> u64 {
        SPORTS.get(u32::from(port)).map_or(0, |jobs| *jobs)
    }

    #[inline(always)]
    fn dport(&self, port: u16) -> u64 {
        DPORTS.get(u32::from(port)).map_or(0, |jobs| *jobs)
    }
}

/// This CPU's counters. The programs run with migration disabled and do not nest on one CPU, so
/// nothing else writes them meanwhile.
pub(super) struct Account(*mut Counters);

impl Account {
    /// Counts one more packet; the caller owes it an outcome.
    #[inline(always)]
    pub(super) fn open() -> Option<Self> {
        let counters = COUNTERS.get_ptr_mut(0)?;
        // SAFETY: a per-CPU map value of this type, alive as long as the program runs; the verifier
        // checks the access.
        unsafe { (*counters).packets += 1 };
        Some(Self(counters))
    }

    /// Says what became of the packet.
    #[inline(always)]
    pub(super) fn close(&self, outcome: Outcome) {
        // SAFETY: as in `open`; an `Outcome` is below the array's length.
        unsafe { (*self.0).outcomes[outcome as usize] += 1 };
    }

    /// Says what became of a hit, for the packet and for each of its jobs.
    #[inline(always)]
    pub(super) fn close_hit(&self, outcome: Outcome, hit: &Hit, length: u64) {
        self.close(outcome);
        hit.each_slot(|slot| {
            // SAFETY: as in `open`; the slot is masked to the array's length.
            let job: &mut JobCounters = unsafe { &mut (*self.0).jobs[slot] };
            job.hits += 1;
            job.bytes += length;
            match outcome {
                Outcome::NoSocket => job.no_socket += 1,
                Outcome::NoHeader => job.no_header += 1,
                Outcome::RingFull => job.ring_full += 1,
                _ => {}
            }
        });
    }
}

/// The lowest job of a set that has one.
#[inline(always)]
fn slot_of(jobs: u64) -> usize {
    // LLVM knows that a bit index is below 64 and drops the mask; the verifier does not, and needs it.
    black_box(jobs.trailing_zeros()) as usize & (MAX_JOBS - 1)
}

/// A packet's jobs, and the tables that they were found in.
pub(super) struct Hit {
    pub(super) jobs: u64,
    /// Lowest 8 bits of the tables' generation.
    pub(super) generation: u8,
    /// Size of each CPU's ring, bytes.
    pub(super) ring_bytes: u64,
    tables: &'static Tables,
    /// The lowest of the jobs: nearly always the only one, and finding it takes some time.
    first: usize,
}

/// The jobs that this packet is a hit of, or the outcome of one that is none's.
#[inline(always)]
pub(super) fn hits<B: Buffer>(
    packet: &B,
    direction: u8,
    draw: impl FnOnce() -> u32,
) -> Result<Hit, Outcome> {
    let Some(Switch { active, generation, ring_bytes }) = SWITCH.get(0).copied() else {
        return Err(Outcome::Idle);
    };
    if active == 0 {
        return Err(Outcome::Idle);
    }
    let tables = TABLES.get((generation & 1) as u32).ok_or(Outcome::Idle)?;
    let wanted = if direction == DIRECTION_OUT { tables.outbound } else { tables.inbound };
    let mut jobs = active & wanted;
    if tables.constrained != 0 && jobs != 0 {
        let fields = if tables.raw_ip == 0 {
            Fields::of_ethernet(packet)
        } else {
            Fields::of_raw_ip(packet)
        };
        jobs = classify(&fields, tables, &PortMaps, jobs);
    }
    if jobs == 0 {
        return Err(Outcome::NoMatch);
    }
    match sample(tables, jobs, draw) {
        0 => Err(Outcome::SampledOut),
        jobs => {
            Ok(Hit { jobs, generation: generation as u8, ring_bytes, tables, first: slot_of(jobs) })
        }
    }
}

impl Hit {
    /// The most bytes that any of the jobs keeps.
    #[inline(always)]
    pub(super) fn snaplen(&self) -> u32 {
        let mut most = 0;
        self.each_slot(|slot| most = most.max(self.tables.snaplen[slot]));
        most
    }

    /// Calls `each` for each job's slot.
    #[inline(always)]
    fn each_slot(&self, mut each: impl FnMut(usize)) {
        each(self.first & (MAX_JOBS - 1));
        let mut rest = self.jobs & (self.jobs - 1);
        for _ in 1..MAX_JOBS {
            if rest == 0 {
                break;
            }
            each(slot_of(rest));
            rest &= rest - 1;
        }
    }
}
