//! From the kernel's packet times to UTC.

use nix::{
    sys::time::TimeSpec,
    time::{ClockId, clock_gettime},
};

/// A step of the wall clock that is followed. Both clocks are slewed alike, so only a step moves
/// their difference; below this it is the noise of reading two clocks one after the other, and
/// following that would put packets out of order.
const STEP_NS: u64 = 1_000_000;

/// The difference between `CLOCK_REALTIME` and `CLOCK_MONOTONIC`, which the kernel program reads.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    offset_ns: u64,
}

fn now(clock: ClockId) -> u64 {
    let time = clock_gettime(clock).unwrap_or(TimeSpec::new(0, 0));
    time.tv_sec().unsigned_abs() * 1_000_000_000 + time.tv_nsec().unsigned_abs()
}

/// `CLOCK_MONOTONIC`, nanoseconds.
pub fn monotonic_ns() -> u64 {
    now(ClockId::CLOCK_MONOTONIC)
}

/// `CLOCK_REALTIME`, nanoseconds since 1970.
pub fn utc_ns() -> u64 {
    now(ClockId::CLOCK_REALTIME)
}

/// The difference as read in the least time of a few tries.
fn read_offset() -> u64 {
    let mut best = (u64::MAX, 0);
    for _ in 0..5 {
        let before = monotonic_ns();
        let utc = utc_ns();
        let took = monotonic_ns() - before;
        if took < best.0 {
            best = (took, utc.saturating_sub(before + took / 2));
        }
    }
    best.1
}

impl Clock {
    /// Reads both clocks.
    pub fn new() -> Self {
        Self { offset_ns: read_offset() }
    }

    /// UTC in nanoseconds since 1970 for a time by `CLOCK_MONOTONIC`.
    #[inline]
    pub fn utc(self, monotonic_ns: u64) -> u64 {
        self.offset_ns + monotonic_ns
    }

    /// Follows the wall clock if it was stepped. Costs a few microseconds: once a second is enough.
    pub fn refresh(&mut self) {
        let offset_ns = read_offset();
        if offset_ns.abs_diff(self.offset_ns) >= STEP_NS {
            log::warn!("the wall clock was stepped; packet times follow it from here");
            self.offset_ns = offset_ns;
        }
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packet_times_agree_with_the_wall_clock() {
        let clock = Clock::new();
        assert!(clock.utc(monotonic_ns()).abs_diff(utc_ns()) < 10_000_000);
    }
}
