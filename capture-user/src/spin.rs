//! How long to go on looking at an empty queue before sleeping, and how to sleep.
//!
//! To be woken by a packet costs the worker's CPU some microseconds, and the CPU that the packets come in
//! on as many, for an interrupt to the other one. So a worker looks on for as long as that, at least; and,
//! where the packets of late have come after gaps that are not much longer, for as long as such a gap.
//!
//! Then, while packets keep coming, it naps: it sleeps for a time without asking to be woken, so that the
//! packets' CPU has nothing to do for it, and finds what has come meanwhile in one go, as a network card
//! does that moderates its interrupts. How long depends on how much of the ring fills up meanwhile. Only
//! when a nap has brought nothing does the worker ask to be woken.

use std::time::Duration;

use crate::clock::monotonic_ns;

/// Looks at an empty queue before a sleep, at least: some microseconds, so few that they are not seen as
/// load.
const LOOKS: u32 = 200;

/// The same while the worker naps: a nap costs less than to look on.
const LOOKS_OF_NAPPER: u32 = 4;

/// The longest gap that is waited out awake, nanoseconds: about what it costs to be woken. Longer, and a
/// stream that a CPU does with little work takes all of it: four times as long was no faster, and cost half
/// as much again at 200,000 packets a second.
const LONGEST_NS: u64 = 5_000;

/// What a gap that was slept through counts for at most, so that one long silence is soon forgotten.
const SILENCE_NS: u64 = 8 * LONGEST_NS;

/// The longest nap per entry of the ring, nanoseconds: a packet of 64 bytes at 10 Gb/s takes as long, or one
/// of 840 bytes at 100 Gb/s. So a ring that was empty does not fill up in a nap, even if a burst begins
/// with it.
const NAP_NS_PER_ENTRY: u64 = 67;

/// The part of a ring that may fill up in a nap; more, and the next is shorter.
const NAP_PART: usize = 8;

/// The shortest nap, nanoseconds: shorter, and the naps themselves are the load.
const SHORTEST_NAP_NS: u64 = 30_000;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The queue is empty since this time, or longer: look again.
    First(u64),
    /// Look again.
    Look,
    /// Sleep for so long, then look again.
    Nap(Duration),
    /// Sleep until there is something.
    Sleep,
}

/// One worker's patience.
#[derive(Clone, Copy, Debug)]
pub struct Spin {
    /// Where a sleeper is woken by the packets: it is by nothing else that looking on saves.
    naps: Option<Naps>,
    looks: u32,
    /// After how many of them it is time to ask the clock.
    patience: u32,
    /// Since when there was nothing, and until when to look on.
    since_ns: u64,
    until_ns: u64,
    /// A typical gap.
    gap_ns: u64,
}

/// How a worker naps.
#[derive(Clone, Copy, Debug)]
struct Naps {
    entries: usize,
    longest_ns: u64,
    /// How long the next one is.
    next_ns: u64,
    /// Whether packets came of late, so that more are to be expected.
    lively: bool,
    /// How many came since the last nap.
    taken: usize,
}

impl Naps {
    fn new(entries: usize) -> Self {
        let longest_ns = (entries as u64 * NAP_NS_PER_ENTRY).max(SHORTEST_NAP_NS);
        Self { entries, longest_ns, next_ns: SHORTEST_NAP_NS, lively: false, taken: 0 }
    }

    /// The next one, as long as the last one allows.
    fn next(&mut self) -> Duration {
        let much = self.entries / NAP_PART;
        let next_ns = match std::mem::take(&mut self.taken) {
            taken if taken > much => self.next_ns / 2,
            taken if taken < much / 2 => self.next_ns + self.next_ns / 4,
            _ => self.next_ns,
        };
        self.next_ns = next_ns.clamp(SHORTEST_NAP_NS, self.longest_ns);
        self.lively = false;
        Duration::from_nanos(self.next_ns)
    }
}

impl Spin {
    /// For a queue whose sleeping reader the kernel wakes for every packet, and that has so many entries; 0
    /// for one that is looked at by the clock.
    pub fn new(entries: usize) -> Self {
        let naps = (entries > 0).then(|| Naps::new(entries));
        Self { naps, looks: 0, patience: LOOKS, since_ns: 0, until_ns: 0, gap_ns: SILENCE_NS }
    }

    /// There was something: so many entries.
    #[inline]
    pub fn found(&mut self, entries: usize) {
        let Some(naps) = &mut self.naps else {
            self.looks = 0;
            return;
        };
        naps.taken += entries;
        if self.looks > 0 {
            self.looks = 0;
            let gap_ns = monotonic_ns().saturating_sub(self.since_ns);
            // A nap for a stream of fewer packets would only be one more sleep.
            naps.lively = gap_ns < 2 * naps.longest_ns;
            self.note(gap_ns);
        }
    }

    fn note(&mut self, gap_ns: u64) {
        self.gap_ns = (3 * self.gap_ns + gap_ns.min(SILENCE_NS)) / 4;
    }

    /// There was nothing.
    #[inline]
    pub fn empty(&mut self) -> Next {
        self.looks += 1;
        if self.looks == 1 {
            self.since_ns = monotonic_ns();
            let worth = self.naps.is_some() && self.gap_ns <= LONGEST_NS;
            self.until_ns = self.since_ns + if worth { 2 * LONGEST_NS } else { 0 };
            let naps = self.naps.is_none_or(|naps| naps.lively) && !worth;
            self.patience = if naps { LOOKS_OF_NAPPER } else { LOOKS };
            return Next::First(self.since_ns);
        }
        std::hint::spin_loop();
        if !self.looks.is_multiple_of(self.patience) || monotonic_ns() < self.until_ns {
            return Next::Look;
        }
        match &mut self.naps {
            Some(naps) if naps.lively => Next::Nap(naps.next()),
            _ => Next::Sleep,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether it waits a gap out that comes after others of this length.
    fn waits_out(gap_ns: u64) -> bool {
        let mut spin = Spin::new(4096);
        for _ in 0..40 {
            spin.note(gap_ns);
        }
        matches!(spin.empty(), Next::First(since_ns) if spin.until_ns > since_ns)
    }

    #[test]
    fn short_gaps_are_waited_out_and_long_ones_slept_through() {
        assert!(waits_out(0) && waits_out(LONGEST_NS - 1000));
        assert!(!waits_out(LONGEST_NS * 2) && !waits_out(u64::MAX));
    }

    #[test]
    fn a_silence_is_forgotten_after_some_short_gaps() {
        let mut spin = Spin::new(4096);
        spin.note(u64::MAX);
        let gaps = (0..100).find(|_| {
            spin.note(1_000);
            spin.gap_ns <= LONGEST_NS
        });
        assert!(gaps.unwrap() < 12, "{gaps:?}");
    }

    #[test]
    fn without_anything_it_ends_in_sleep() {
        for entries in [0, 4096] {
            let mut spin = Spin::new(entries);
            assert!(matches!(spin.empty(), Next::First(_)));
            let looks = (0..1_000_000).find(|_| spin.empty() == Next::Sleep);
            assert!(looks.is_some());
            spin.found(1);
            assert!(matches!(spin.empty(), Next::First(_)));
        }
    }

    /// Empty until there is something else to do than to look.
    fn ending(spin: &mut Spin) -> Next {
        let mut endings = (0..1_000_000).map(|_| spin.empty());
        endings.find(|next| !matches!(next, Next::First(_) | Next::Look)).unwrap()
    }

    #[test]
    fn naps_follow_packets_and_one_that_brings_nothing_ends_them() {
        let mut spin = Spin::new(4096);
        assert_eq!(ending(&mut spin), Next::Sleep);
        spin.found(1);
        assert!(matches!(ending(&mut spin), Next::Nap(_)));
        assert_eq!(ending(&mut spin), Next::Sleep);
    }

    #[test]
    fn a_nap_is_as_long_as_little_of_the_ring_fills_up() {
        let nap = |taken: usize| {
            let mut naps = Naps::new(4096);
            for _ in 0..40 {
                naps.taken = taken;
                naps.next();
            }
            naps.taken = taken;
            naps.next()
        };
        assert_eq!(nap(1), Duration::from_nanos(4096 * NAP_NS_PER_ENTRY));
        assert_eq!(nap(4096), Duration::from_nanos(SHORTEST_NAP_NS));
    }
}
