//! How often one address may guess.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Failures are forgotten after this time.
const WINDOW: Duration = Duration::from_mins(1);

/// Addresses remembered, a few MiB. More guess at once only in an attack from many networks; then the
/// oldest are forgotten.
const ADDRESSES: usize = 65536;

/// Failures of one address since the first of them.
#[derive(Clone, Copy)]
struct Failures {
    since: Instant,
    count: u32,
}

pub(super) struct Limiter {
    most: u32,
    failures: Mutex<HashMap<IpAddr, Failures>>,
}

impl Limiter {
    pub(super) fn new(most: u32) -> Self {
        Self { most, failures: Mutex::default() }
    }

    /// Whether an address may try; if not, for how long not.
    pub(super) fn check(&self, peer: IpAddr) -> Result<(), Duration> {
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        match failures.get(&network(peer)) {
            Some(failures) if failures.count >= self.most => {
                let wait = WINDOW.saturating_sub(failures.since.elapsed());
                // Rounded up, so that a client that waits as long as it is told gets in.
                if wait.is_zero() { Ok(()) } else { Err(wait + Duration::from_secs(1)) }
            }
            _ => Ok(()),
        }
    }

    /// Takes note of a failure.
    pub(super) fn failed(&self, peer: IpAddr) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.len() >= ADDRESSES {
            failures.retain(|_, failures| failures.since.elapsed() < WINDOW);
        }
        if failures.len() >= ADDRESSES
            && let Some(oldest) =
                failures.iter().min_by_key(|(_, failures)| failures.since).map(|(peer, _)| *peer)
        {
            failures.remove(&oldest);
        }
        let now = Instant::now();
        let entry = failures.entry(network(peer)).or_insert(Failures { since: now, count: 0 });
        if entry.since.elapsed() >= WINDOW {
            *entry = Failures { since: now, count: 0 };
        }
        entry.count = entry.count.saturating_add(1);
    }
}

/// An IPv6 host has a network of addresses to guess from.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => {
            Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_of_ipv6_addresses_counts_as_one() {
        let limiter = Limiter::new(2);
        let peers = ["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1"];
        let [one, two, three, other] = peers.map(|peer| peer.parse().unwrap());
        limiter.failed(one);
        assert!(limiter.check(three).is_ok());
        limiter.failed(two);
        assert!(limiter.check(three).is_err());
        assert!(limiter.check(other).is_ok());
    }
}
