//! How late packets are, counted from when the kernel program saw them.
//!
//! A worker records the oldest and the newest packet of each batch once the batch is encoded (where more than
//! a few jobs share the packets, of one batch in several); a disk thread records those of each buffer once
//! it is written. So percentiles are of these, not of every packet. Each thread has a histogram of its own:
//! nothing is shared in a loop.

use std::sync::{Arc, Mutex, PoisonError};

use hdrhistogram::Histogram;
use serde::Serialize;

/// Shorter times are not told apart, nanoseconds: reading the clock takes a good part of this.
const LEAST_NS: u64 = 1_000;

/// Longer times are counted as this, nanoseconds: 100 seconds.
const MOST_NS: u64 = 100_000_000_000;

/// Two digits: a percentile is right to a hundredth. A third would take eight times the memory, which a
/// worker's cache has better use for.
const DIGITS: u8 = 2;

/// Times of one kind.
#[derive(Clone, Debug)]
pub(crate) struct Late(Histogram<u64>);

impl Default for Late {
    fn default() -> Self {
        let bounds = Histogram::new_with_bounds(LEAST_NS, MOST_NS, DIGITS);
        Self(bounds.expect("bounds that are constants, and fit"))
    }
}

impl Late {
    /// One more.
    #[inline]
    pub(crate) fn note(&mut self, nanoseconds: u64) {
        self.0.saturating_record(nanoseconds);
    }

    /// All of another's too.
    pub(crate) fn add(&mut self, other: &Self) {
        self.0.add(&other.0).expect("both have the same bounds");
    }

    /// In a few numbers.
    pub(crate) fn percentiles(&self) -> Percentiles {
        let at = |quantile| self.0.value_at_quantile(quantile);
        Percentiles {
            samples: self.0.len(),
            min_ns: self.0.min(),
            p50_ns: at(0.5),
            p90_ns: at(0.9),
            p99_ns: at(0.99),
            p999_ns: at(0.999),
            max_ns: self.0.max(),
        }
    }
}

/// Times that a disk thread records, and others read while it does.
pub(crate) type SharedLate = Arc<Mutex<Late>>;

/// Reads them.
pub(crate) fn read_late(late: &SharedLate) -> Percentiles {
    late.lock().unwrap_or_else(PoisonError::into_inner).percentiles()
}

/// How times are distributed; all 0 without any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Percentiles {
    /// How many were recorded.
    pub samples: u64,
    /// The shortest, nanoseconds.
    pub min_ns: u64,
    /// Half of them are at most this long.
    pub p50_ns: u64,
    /// Nine of ten.
    pub p90_ns: u64,
    /// 99 of 100.
    pub p99_ns: u64,
    /// 999 of 1000.
    pub p999_ns: u64,
    /// The longest.
    pub max_ns: u64,
}

/// How late a job's packets are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Latency {
    /// From the kernel program until they were encoded.
    pub encoded: Percentiles,
    /// From the kernel program until they were written: to the disk if it was past the page cache, or
    /// to the cache, or to the pipe.
    pub written: Percentiles,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_a_hundredth_and_the_ends_exact() {
        assert_eq!(Late::default().percentiles(), Percentiles::default());
        let (mut one, mut other) = (Late::default(), Late::default());
        for microseconds in 1..=10_000 {
            let which = if microseconds % 2 == 0 { &mut one } else { &mut other };
            which.note(1_000 * microseconds);
        }
        one.add(&other);
        let found = one.percentiles();
        assert_eq!(found.samples, 10_000);
        let near = |found: u64, want: u64| found.abs_diff(want) <= want / 100;
        for (found, want) in [
            (found.p50_ns, 5_000_000),
            (found.p90_ns, 9_000_000),
            (found.p99_ns, 9_900_000),
            (found.p999_ns, 9_990_000),
            (found.max_ns, 10_000_000),
        ] {
            assert!(near(found, want), "{found} for {want}");
        }
        one.note(u64::MAX);
        assert!(near(one.percentiles().max_ns, MOST_NS));
    }
}
