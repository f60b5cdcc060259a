//! From a packet's fields to the set of jobs that want it.
//!
//! A set of jobs is a `u64`, one bit each. For every dimension (source, destination, ports, protocol)
//! one lookup gives the set of jobs that accept the packet's value; the answer is the intersection of
//! these sets with the set of active jobs. The cost does not grow with the number of jobs.
//!
//! Addresses are looked up in [`Ranges`]: the prefixes of up to 64 jobs cut the address space into at
//! most 129 ranges, each with its set, found by a binary search of a fixed eight steps without a
//! branch. A prefix trie (`BPF_MAP_TYPE_LPM_TRIE`) would answer the same, but it costs a helper call
//! and a walk that gets longer with every job, and userspace could not run the same code.
//!
//! Sampling is one dimension more: a job that wants 1 in N keeps a packet when the packet's random
//! draw is below 2³²/N, so one draw and one lookup serve all jobs.

use crate::{
    abi::MAX_JOBS,
    parse::{Fields, Ipv6, NO_PORT, NO_PROTOCOL},
};

/// Ranges in a table: a power of two above 129, the most that 64 prefixes can make.
pub const RANGES: usize = 256;

const STEPS: [usize; 8] = [128, 64, 32, 16, 8, 4, 2, 1];

/// A value that [`Ranges`] can be cut by.
pub trait Key: Copy {
    /// All ones when `self <= other`, else zero, without a branch: an address is not predictable,
    /// and eight mispredicted branches would cost more than the search.
    fn at_most(self, other: Self) -> usize;
}

impl Key for u32 {
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "inside the kernel program's search")]
    #[allow(clippy::cast_sign_loss, reason = "the mask is the point")]
    fn at_most(self, other: Self) -> usize {
        ((i64::from(self) - i64::from(other) - 1) >> 63) as usize
    }
}

/// The borrow of `a - b`: 1 when `a < b`, else 0.
#[inline(always)]
#[allow(clippy::inline_always, reason = "inside the kernel program's search")]
const fn borrow(a: u64, b: u64) -> u64 {
    ((!a & b) | ((!a | b) & a.wrapping_sub(b))) >> 63
}

impl Key for Ipv6 {
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "inside the kernel program's search")]
    fn at_most(self, other: Self) -> usize {
        let above = borrow(other.high, self.high);
        let below = borrow(self.high, other.high);
        let low_above = borrow(other.low, self.low);
        let yes = below | (1 ^ above) & (1 ^ low_above);
        (yes as usize).wrapping_neg()
    }
}

/// A division of a value's space into ranges, each with a set of jobs.
///
/// `start` ascends and begins with the lowest value; a range ends where the next starts. Unused
/// entries at the end repeat the highest value and the last range's set.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ranges<K> {
    /// First value of each range.
    pub start: [K; RANGES],
    /// The jobs that accept the values of each range.
    pub set: [u64; RANGES],
}

impl<K: Key> Ranges<K> {
    /// The set of the range that `value` lies in.
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "inside the kernel program's search")]
    pub fn find(&self, value: K) -> u64 {
        let mut at = 0;
        for step in STEPS {
            at += self.start[(at + step) & (RANGES - 1)].at_most(value) & step;
        }
        self.set[at & (RANGES - 1)]
    }
}

/// The dimensions, as bits of [`Tables::constrained`] and as indices of [`Tables::unconstrained`].
pub mod dimension {
    /// Source address.
    pub const SRC: usize = 0;
    /// Destination address.
    pub const DST: usize = 1;
    /// Source port.
    pub const SPORT: usize = 2;
    /// Destination port.
    pub const DPORT: usize = 3;
    /// Upper-layer protocol.
    pub const PROTOCOL: usize = 4;
    /// How many.
    pub const COUNT: usize = 5;
}

/// All lookup tables of an interface's jobs but those for ports.
///
/// The kernel holds two and reads the one that the generation names, so userspace rewrites the other
/// at leisure and switches with one store.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// Dimensions that at least one job constrains, one bit each; the others are skipped.
    pub constrained: u64,
    /// Jobs that sample.
    pub sampled: u64,
    /// Jobs that want received packets.
    pub inbound: u64,
    /// Jobs that want sent packets.
    pub outbound: u64,
    /// 1 where packets have no link layer, else 0.
    pub raw_ip: u64,
    /// Per dimension, the jobs that accept any value and a missing one.
    pub unconstrained: [u64; dimension::COUNT],
    /// By protocol number.
    pub protocol: [u64; 256],
    /// By IPv4 source address.
    pub src4: Ranges<u32>,
    /// By IPv4 destination address.
    pub dst4: Ranges<u32>,
    /// By IPv6 source address.
    pub src6: Ranges<Ipv6>,
    /// By IPv6 destination address.
    pub dst6: Ranges<Ipv6>,
    /// By random draw.
    pub draw: Ranges<u32>,
    /// By slot, the most bytes that the job keeps of a packet.
    pub snaplen: [u32; MAX_JOBS],
}

const _: () = assert!(
    size_of::<Tables>()
        == 8 * (5 + dimension::COUNT + 256)
            + 3 * (4 + 8) * RANGES
            + 2 * (16 + 8) * RANGES
            + 4 * MAX_JOBS
);

/// The port tables: for each port the jobs that ask for just this port.
pub trait Ports {
    /// Jobs that ask for this source port.
    fn sport(&self, port: u16) -> u64;
    /// Jobs that ask for this destination port.
    fn dport(&self, port: u16) -> u64;
}

/// The jobs of `active` whose filters accept a packet with these fields.
#[inline(always)]
#[allow(clippy::inline_always, reason = "one program, no calls: the verifier follows it in one go")]
pub fn classify<P: Ports>(fields: &Fields, tables: &Tables, ports: &P, active: u64) -> u64 {
    let constrains = |dimension: usize| tables.constrained >> dimension & 1 != 0;
    let mut jobs = active;

    if constrains(dimension::PROTOCOL) {
        jobs &= if fields.protocol < NO_PROTOCOL {
            tables.protocol[fields.protocol as usize & 0xff]
        } else {
            tables.unconstrained[dimension::PROTOCOL]
        };
    }
    if constrains(dimension::DPORT) && jobs != 0 {
        jobs &= tables.unconstrained[dimension::DPORT]
            | if fields.dport < NO_PORT { ports.dport(fields.dport as u16) } else { 0 };
    }
    if constrains(dimension::SPORT) && jobs != 0 {
        jobs &= tables.unconstrained[dimension::SPORT]
            | if fields.sport < NO_PORT { ports.sport(fields.sport as u16) } else { 0 };
    }
    if constrains(dimension::DST) && jobs != 0 {
        jobs &= match fields.version {
            4 => tables.dst4.find(fields.dst4),
            6 => tables.dst6.find(fields.dst6),
            _ => tables.unconstrained[dimension::DST],
        };
    }
    if constrains(dimension::SRC) && jobs != 0 {
        jobs &= match fields.version {
            4 => tables.src4.find(fields.src4),
            6 => tables.src6.find(fields.src6),
            _ => tables.unconstrained[dimension::SRC],
        };
    }
    jobs
}

/// The jobs of `jobs` that keep a packet with this random draw.
#[inline(always)]
#[allow(clippy::inline_always, reason = "see `classify`")]
pub fn sample(tables: &Tables, jobs: u64, draw: impl FnOnce() -> u32) -> u64 {
    if jobs & tables.sampled == 0 {
        return jobs;
    }
    jobs & tables.draw.find(draw())
}
