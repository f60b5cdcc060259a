//! Packet and byte limits that hold exactly across workers.
//!
//! - A packet is written only after it was taken off the budget, so no limit is ever exceeded.
//! - A worker borrows from the shared budget in small leases and returns what is left of one when its
//!   batch ends, or a few, so the shared counter is touched a few times per batch, not per packet.
//! - A lease is a small share of what is left: the nearer the end, the smaller, down to one packet.
//! - The packet limit is met exactly. The byte limit ends a job at the first packet that does not fit in
//!   what no other worker holds just then: at most a few leases short of the limit, and never over it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// A shared amount that workers take from. Nothing but the number itself is guarded by it, so relaxed
/// ordering is enough.
#[derive(Debug)]
struct Budget(AtomicU64);

impl Budget {
    /// Takes between `least` and `most`, by what is left and `share`; 0 when `least` is not there.
    fn take(&self, least: u64, most: u64, share: u64) -> u64 {
        let mut taken = 0;
        let take = |left: u64| {
            taken = (left / share).clamp(least, most.max(least));
            if taken > left {
                taken = 0;
                return None;
            }
            Some(left - taken)
        };
        match self.0.fetch_update(Relaxed, Relaxed, take) {
            Ok(_) => taken,
            Err(_) => 0,
        }
    }

    fn give_back(&self, amount: u64) {
        if amount > 0 {
            self.0.fetch_add(amount, Relaxed);
        }
    }
}

/// A job's limits, shared by its workers.
#[derive(Debug)]
pub struct Limits {
    packets: Option<Budget>,
    packet_limit: u64,
    written: AtomicU64,
    bytes: Option<Budget>,
    reached: AtomicBool,
    share: u64,
}

/// Most packets in one lease: about a batch.
const LEASE_PACKETS: u64 = 64;

/// Most bytes in one lease: about a batch of full-size packets.
const LEASE_BYTES: u64 = 128 * 1024;

impl Limits {
    /// Limits for this many workers; `None` is no limit.
    pub fn new(packets: Option<u64>, bytes: Option<u64>, workers: usize) -> Self {
        Self {
            packets: packets.map(|packets| Budget(AtomicU64::new(packets))),
            packet_limit: packets.unwrap_or(u64::MAX),
            written: AtomicU64::new(0),
            bytes: bytes.map(|bytes| Budget(AtomicU64::new(bytes))),
            reached: AtomicBool::new(packets == Some(0)),
            share: 4 * workers.max(1) as u64,
        }
    }

    /// Whether the job is to end.
    pub fn reached(&self) -> bool {
        self.reached.load(Relaxed)
    }
}

/// One worker's part in a job's limits.
#[derive(Debug, Default)]
pub struct Lease {
    packets: u64,
    bytes: u64,
    admitted: u64,
}

impl Lease {
    /// Whether one more packet of `length` captured bytes may be written.
    #[inline]
    pub fn admit(&mut self, limits: &Limits, length: u64) -> bool {
        if let Some(budget) = &limits.packets
            && self.packets == 0
        {
            self.packets = budget.take(1, LEASE_PACKETS, limits.share);
            if self.packets == 0 {
                return false;
            }
        }
        if let Some(budget) = &limits.bytes {
            // Ends at the first packet that does not fit, as a reader of the file expects; a shorter
            // one behind it is not squeezed in.
            if limits.reached() {
                return false;
            }
            if self.bytes < length {
                let more = budget.take(length - self.bytes, LEASE_BYTES, limits.share);
                self.bytes += more;
                if self.bytes < length {
                    limits.reached.store(true, Relaxed);
                    return false;
                }
            }
            self.bytes -= length;
        }
        if limits.packets.is_some() {
            self.packets -= 1;
        }
        self.admitted += 1;
        true
    }

    /// Ends a batch: returns what was not used. Says whether the job has now reached a limit.
    pub fn settle(&mut self, limits: &Limits) -> bool {
        if let Some(budget) = &limits.packets {
            budget.give_back(std::mem::take(&mut self.packets));
            let admitted = std::mem::take(&mut self.admitted);
            let before = limits.written.fetch_add(admitted, Relaxed);
            if before + admitted >= limits.packet_limit {
                limits.reached.store(true, Relaxed);
            }
        }
        if let Some(budget) = &limits.bytes {
            budget.give_back(std::mem::take(&mut self.bytes));
        }
        limits.reached()
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, thread};

    use super::*;

    /// Lets workers loose on a job and returns the packets and bytes that they wrote.
    fn race(packets: Option<u64>, bytes: Option<u64>, lengths: &'static [u64]) -> (u64, u64) {
        let limits = Arc::new(Limits::new(packets, bytes, 4));
        let workers: Vec<_> = (0..4)
            .map(|worker| {
                let limits = Arc::clone(&limits);
                thread::spawn(move || {
                    let mut lease = Lease::default();
                    let mut written = (0, 0);
                    let mut at = worker;
                    while !limits.reached() {
                        for _ in 0..(at % 97) {
                            let length = lengths[at % lengths.len()];
                            at += 1;
                            if lease.admit(&limits, length) {
                                written.0 += 1;
                                written.1 += length;
                            }
                        }
                        at += 1;
                        lease.settle(&limits);
                    }
                    written
                })
            })
            .collect();
        workers.into_iter().fold((0, 0), |(packets, bytes), worker| {
            let (more_packets, more_bytes) = worker.join().unwrap();
            (packets + more_packets, bytes + more_bytes)
        })
    }

    #[test]
    fn four_workers_write_exactly_the_packet_limit() {
        for limit in [1, 2, 63, 64, 65, 1000, 100_003] {
            assert_eq!(race(Some(limit), None, &[60, 1500]).0, limit);
        }
    }

    #[test]
    fn four_workers_never_write_a_byte_over_the_byte_limit() {
        for limit in [1, 59, 60, 61, 1499, 1_000_000, 99_999_999] {
            let (_, bytes) = race(None, Some(limit), &[60, 1500, 9000]);
            assert!(bytes <= limit, "{bytes} of {limit}");
            // A worker that was interrupted in its batch may hold a lease while another ends the job.
            let held = 4 * LEASE_BYTES;
            assert!(bytes + held + 9000 > limit, "{bytes} of {limit}: ended long before it had to");
        }
    }

    #[test]
    fn both_limits_hold_together() {
        let (packets, bytes) = race(Some(500), Some(10_000_000), &[100]);
        assert_eq!((packets, bytes), (500, 50_000));
        let (packets, bytes) = race(Some(500), Some(10_000), &[100]);
        assert!(packets <= 100 && bytes <= 10_000);
    }
}
