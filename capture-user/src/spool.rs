//! What ties a job's segments to whoever takes them away while it runs.
//!
//! - Who takes them away is told of each segment as it is sealed.
//! - Jobs may share a [`Budget`]: what their segments may take on the disk together. Bytes are taken off
//!   it before they are written, and whoever removes a segment gives its size back. A job for whose
//!   packets there is no room drops and counts them, and goes on; no other job notices. A budget can be
//!   within another one, so that a job whose segments nobody takes away leaves room for others.
//! - When there is no room, what is open is sealed, so that it can be taken away; and there is none again
//!   until an eighth of the budget is free, so that packets go missing in a few long runs, and segments
//!   do not become tiny.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use crate::{segment::SegmentInfo, stats::Amount};

/// Bytes that the segments of several jobs may take on the disk together.
#[derive(Debug)]
pub struct Budget {
    within: Option<Arc<Budget>>,
    limit: u64,
    used: AtomicU64,
    full: AtomicBool,
}

impl Budget {
    /// One of this many bytes, of which some are used already.
    pub fn new(limit: u64, used: u64) -> Self {
        let (used, full) = (AtomicU64::new(used), AtomicBool::new(false));
        Self { within: None, limit, used, full }
    }

    /// One of this many bytes that are another one's, too.
    pub fn within(whole: &Arc<Self>, limit: u64) -> Self {
        Self { within: Some(Arc::clone(whole)), ..Self::new(limit, 0) }
    }

    /// How many bytes there are.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// How many of them are used.
    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    /// Gives back what a segment took that is no longer there.
    pub fn give_back(&self, bytes: u64) {
        // Who gives back has taken; a file that someone else cut short must not make it wrap.
        let less = |used: u64| Some(used.saturating_sub(bytes));
        let _: Result<u64, u64> = self.used.fetch_update(Relaxed, Relaxed, less);
        if let Some(whole) = &self.within {
            whole.give_back(bytes);
        }
    }

    /// Takes bytes that are on the disk already.
    pub fn add(&self, bytes: u64) {
        self.used.fetch_add(bytes, Relaxed);
        if let Some(whole) = &self.within {
            whole.add(bytes);
        }
    }

    /// Whether who removes segments has to, so that this many bytes more can be taken.
    pub(crate) fn wants_room(&self, more: u64) -> bool {
        let full = self.full.load(Relaxed) && self.used() > self.limit - self.limit / 8;
        full || self.used().saturating_add(more) > self.limit
    }

    /// Takes bytes if there is room for them.
    pub(crate) fn take(&self, bytes: u64) -> bool {
        if self.full.load(Relaxed) && self.used() > self.limit - self.limit / 8 {
            return false;
        }
        let more = |used: u64| used.checked_add(bytes).filter(|used| *used <= self.limit);
        let mut taken = self.used.fetch_update(Relaxed, Relaxed, more).is_ok();
        if taken
            && let Some(whole) = &self.within
            && !whole.take(bytes)
        {
            self.used.fetch_sub(bytes, Relaxed);
            taken = false;
        }
        self.full.store(!taken, Relaxed);
        taken
    }
}

/// Told of every segment as it is sealed, on the job's disk thread: it must not block.
pub struct OnSealed(Box<dyn FnMut(&SegmentInfo) + Send>);

impl OnSealed {
    /// Calls this.
    pub fn new(told: impl FnMut(&SegmentInfo) + Send + 'static) -> Self {
        Self(Box::new(told))
    }
}

impl fmt::Debug for OnSealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnSealed")
    }
}

/// Packets for which there was no room, as others read it while the job runs.
#[derive(Debug, Default)]
pub(crate) struct Refused {
    packets: AtomicU64,
    bytes: AtomicU64,
}

impl Refused {
    pub(crate) fn read(&self) -> Amount {
        Amount { packets: self.packets.load(Relaxed), bytes: self.bytes.load(Relaxed) }
    }

    pub(crate) fn add(&self, more: Amount) {
        self.packets.fetch_add(more.packets, Relaxed);
        self.bytes.fetch_add(more.bytes, Relaxed);
    }
}

/// One job's side of it, on its disk thread.
#[derive(Debug, Default)]
pub(crate) struct Outlet {
    told: Option<OnSealed>,
    budget: Option<Arc<Budget>>,
    /// Per writer, bytes taken for the segment that is open.
    held: Vec<u64>,
    /// Per writer, segments that have been told of.
    known: Vec<usize>,
}

impl Outlet {
    pub(crate) fn new(told: Option<OnSealed>, budget: Option<Arc<Budget>>, writers: usize) -> Self {
        Self { told, budget, held: vec![0; writers], known: vec![0; writers] }
    }

    /// Takes room for a buffer that is about to be written.
    pub(crate) fn admit(&mut self, writer: usize, bytes: u64) -> bool {
        let Some(budget) = &self.budget else { return true };
        let taken = budget.take(bytes);
        if taken {
            self.held[writer] += bytes;
        }
        taken
    }

    /// Takes note of what a writer has sealed; `bytes` were written since then.
    pub(crate) fn sealed(&mut self, writer: usize, segments: &[SegmentInfo], bytes: u64) {
        for segment in &segments[self.known[writer]..] {
            self.known[writer] += 1;
            if let Some(budget) = &self.budget {
                // With its first and last blocks, for which nothing was taken.
                budget.add(segment.size);
                let held = std::mem::replace(&mut self.held[writer], bytes);
                budget.give_back(held.saturating_sub(bytes));
            }
            if let Some(told) = &mut self.told {
                told.0(segment);
            }
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        if let Some(budget) = &self.budget {
            budget.give_back(self.held.iter().sum());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(size: u64) -> SegmentInfo {
        SegmentInfo {
            path: "x".into(),
            size,
            packets: 1,
            captured_bytes: 1,
            first_ns: 1,
            last_ns: 1,
            sha256: None,
        }
    }

    #[test]
    fn what_is_full_stays_full_until_an_eighth_is_free() {
        let budget = Budget::new(800, 0);
        assert!(budget.take(800));
        assert!(!budget.take(1));
        budget.give_back(99);
        assert!(!budget.take(1));
        budget.give_back(1);
        assert!(budget.take(1));
        assert_eq!(budget.used(), 701);
        budget.give_back(1000);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn one_within_another_takes_from_both_and_leaves_room_for_others() {
        let whole = Arc::new(Budget::new(1000, 100));
        let (slow, other) = (Budget::within(&whole, 500), Budget::within(&whole, 500));
        assert!(slow.take(500));
        assert!(!slow.take(1));
        assert_eq!((slow.used(), whole.used()), (500, 600));
        assert!(other.take(400));
        assert!(!other.take(1), "the whole is full");
        assert_eq!((other.used(), whole.used()), (400, 1000));
        slow.give_back(300);
        assert!(other.take(1) && slow.take(1));
        slow.add(10);
        assert_eq!((slow.used(), other.used(), whole.used()), (211, 401, 712));
    }

    #[test]
    fn a_job_holds_what_its_segments_take_and_no_more() {
        let budget = Arc::new(Budget::new(1000, 0));
        let told = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&told);
        let on_sealed = OnSealed::new(move |info| {
            count.fetch_add(info.size, Relaxed);
        });
        let mut outlet = Outlet::new(Some(on_sealed), Some(Arc::clone(&budget)), 2);
        assert!(outlet.admit(0, 100) && outlet.admit(1, 100) && outlet.admit(0, 100));
        assert_eq!(budget.used(), 300);
        // The second buffer of the first writer came behind the seal.
        let mut sealed = vec![segment(130)];
        outlet.sealed(0, &sealed, 100);
        assert_eq!(budget.used(), 130 + 100 + 100);
        sealed.push(segment(120));
        outlet.sealed(0, &sealed, 0);
        assert_eq!(budget.used(), 250 + 100);
        assert_eq!(told.load(Relaxed), 250, "each once");
        assert!(!outlet.admit(1, 1000));
        // What was never sealed is not there.
        drop(outlet);
        assert_eq!(budget.used(), 250);
    }
}
