//! How long to go on looking at an empty queue before sleeping.
//!
//! To be woken costs the worker's CPU some microseconds, and the CPU that the packets come in on as many,
//! for an interrupt to the other one. So a worker looks on for as long as that, at least; and, where the
//! packets of late have come after gaps that are not much longer, for as long as such a gap. A stream so
//! fast is then never slept through, and a slower one costs no more than being woken.

use crate::clock::monotonic_ns;

/// Looks at an empty queue before a sleep, at least: some microseconds, so few that they are not seen as
/// load.
const LOOKS: u32 = 200;

/// The longest gap that is waited out awake, nanoseconds: about what it costs to be woken. Longer, and a
/// stream that a CPU does with little work takes all of it: four times as long was no faster, and cost half
/// as much again at 200,000 packets a second.
const LONGEST_NS: u64 = 5_000;

/// What a gap that was slept through counts for at most, so that one long silence is soon forgotten.
const SILENCE_NS: u64 = 8 * LONGEST_NS;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The queue is empty since this time, or longer: look again.
    First(u64),
    /// Look again.
    Look,
    /// Sleep until there is something.
    Sleep,
}

/// One worker's patience.
#[derive(Clone, Copy, Debug)]
pub struct Spin {
    /// Whether gaps are waited out.
    adapts: bool,
    looks: u32,
    /// Since when there was nothing, and until when to look on.
    since_ns: u64,
    until_ns: u64,
    /// A typical gap.
    gap_ns: u64,
}

impl Spin {
    /// `adapts` where a sleeper is woken by the packets: it is by nothing else that looking on saves.
    pub fn new(adapts: bool) -> Self {
        Self { adapts, looks: 0, since_ns: 0, until_ns: 0, gap_ns: SILENCE_NS }
    }

    /// There was something.
    #[inline]
    pub fn found(&mut self) {
        if self.looks > 0 {
            self.looks = 0;
            if self.adapts {
                self.note(monotonic_ns().saturating_sub(self.since_ns));
            }
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
            let worth = self.adapts && self.gap_ns <= LONGEST_NS;
            self.until_ns = self.since_ns + if worth { 2 * LONGEST_NS } else { 0 };
            return Next::First(self.since_ns);
        }
        std::hint::spin_loop();
        if self.looks.is_multiple_of(LOOKS) && monotonic_ns() >= self.until_ns {
            Next::Sleep
        } else {
            Next::Look
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether it waits a gap out that comes after others of this length.
    fn waits_out(gap_ns: u64) -> bool {
        let mut spin = Spin::new(true);
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
        let mut spin = Spin::new(true);
        spin.note(u64::MAX);
        let gaps = (0..100).find(|_| {
            spin.note(1_000);
            spin.gap_ns <= LONGEST_NS
        });
        assert!(gaps.unwrap() < 12, "{gaps:?}");
    }

    #[test]
    fn without_anything_it_ends_in_sleep() {
        for adapts in [false, true] {
            let mut spin = Spin::new(adapts);
            assert!(matches!(spin.empty(), Next::First(_)));
            let looks = (0..1_000_000).find(|_| spin.empty() == Next::Sleep);
            assert!(looks.is_some());
            spin.found();
            assert!(matches!(spin.empty(), Next::First(_)));
        }
    }
}
