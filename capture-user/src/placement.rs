//! Which thread runs on which CPU.
//!
//! - Each worker of the `exclusive` path is pinned to a CPU of its own, as long as there are enough: the
//!   CPUs that were named (`--cpus`), in that order, or those that the process may use, from the highest
//!   down, because interrupts are usually served from the lowest up. A worker that moved would leave its
//!   ring, its frames and its buffer behind in another CPU's cache.
//! - A worker of the `tap` path, where the host does its own work, is pinned only to a CPU that was named:
//!   the scheduler knows better which of them has time.
//! - Disk threads share the CPUs that were named for them (`--disk-cpus`), or those that the process may
//!   use and no worker is pinned to, so that none interrupts a worker. Where there is none left, the
//!   scheduler decides.
//! - The engine's own thread sleeps nearly always, and runs anywhere.

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// The CPUs that this process may use, from the lowest up.
pub fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}

/// The CPUs that workers get, unless they were named.
pub(crate) fn for_workers(allowed: &[usize]) -> Vec<usize> {
    if allowed.is_empty() { vec![0] } else { allowed.iter().rev().copied().collect() }
}

/// The CPUs that disk threads share, unless they were named; empty when it does not matter.
pub(crate) fn for_disk(allowed: &[usize], workers: &[usize]) -> Vec<usize> {
    allowed.iter().filter(|cpu| !workers.contains(cpu)).copied().collect()
}

/// Keeps the calling thread, which is called `name`, on these CPUs.
pub(crate) fn pin(name: &str, cpus: &[usize]) {
    let mut set = CpuSet::new();
    let pinned = cpus
        .iter()
        .try_for_each(|cpu| set.set(*cpu))
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        log::warn!("{name}: not pinned to CPU {cpus:?}: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disk_threads_keep_off_the_workers_cpus_if_they_can() {
        assert_eq!(for_workers(&[0, 1, 5]), [5, 1, 0]);
        assert_eq!(for_workers(&[]), [0]);
        assert_eq!(for_disk(&[0, 1, 5], &[5, 1]), [0]);
        assert_eq!(for_disk(&[0, 1], &[1, 0]), [0; 0]);
    }

    #[test]
    fn a_thread_stays_where_it_was_put() {
        std::thread::spawn(|| {
            let last = *allowed().last().unwrap();
            pin("a test", &[last]);
            assert_eq!(allowed(), [last]);
        })
        .join()
        .unwrap();
    }
}
