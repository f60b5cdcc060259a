//! Where a worker's packets come from.

use std::{io, os::fd::BorrowedFd, time::Duration};

use capture_ebpf::abi::Header;
use serde::Serialize;

/// How long a packet may take from the kernel's reading of the clock to the queue, nanoseconds. What a
/// worker does not find on a queue says nothing of packets younger than this.
pub(crate) const ON_THE_WAY_NS: u64 = 1_000_000;

/// A packet as the kernel handed it over.
#[derive(Debug)]
pub struct Received<'a> {
    /// What the kernel program says of it.
    pub header: &'a Header,
    /// Its bytes, or those of its first buffer.
    pub data: &'a [u8],
    /// The further buffers of a packet that lies in several.
    pub rest: &'a [&'a [u8]],
}

impl Received<'_> {
    /// Bytes handed over.
    #[inline]
    pub fn len(&self) -> usize {
        self.data.len() + self.rest.iter().map(|part| part.len()).sum::<usize>()
    }

    /// Whether no bytes were handed over.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Why a source waits no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Packets may be waiting, or the time is up.
    Look,
    /// The other descriptor is readable.
    Called,
    /// The interface is gone.
    Gone,
}

/// What a source itself has counted since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SourceCounters {
    /// Packets lost because the ring to userspace was full.
    pub ring_full: u64,
    /// Packets lost for want of a free frame, or longer than one where they may not be split.
    pub dropped: u64,
    /// Times that the fill ring was found empty. With zero-copy the interface drops then, before the
    /// kernel program, so these are no hits.
    pub fill_empty: u64,
    /// Descriptors that the kernel refused.
    pub invalid: u64,
}

impl std::ops::Sub for SourceCounters {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            ring_full: self.ring_full - earlier.ring_full,
            dropped: self.dropped - earlier.dropped,
            fill_empty: self.fill_empty - earlier.fill_empty,
            invalid: self.invalid - earlier.invalid,
        }
    }
}

/// A queue of packets between the kernel and one worker.
pub trait Source: Send {
    /// Whether the kernel wakes a sleeping reader for every packet. If not, the reader looks by itself
    /// every few milliseconds while there is traffic.
    const WAKES: bool;

    /// Entries of the ring, where a reader may leave packets to the clock for a moment; 0 where it may not,
    /// or always does.
    fn entries(&self) -> usize {
        0
    }

    /// Hands the packets of one batch to `each`, in order, and gives their memory back. Returns how
    /// much was taken off the queue, in the units of [`backlog`](Self::backlog); 0 when it was empty.
    fn receive(&mut self, each: impl FnMut(&Received<'_>)) -> usize;

    /// How much lies on the queue now.
    fn backlog(&mut self) -> usize;

    /// Whether packets may be left on the queue for a moment without others' being lost.
    fn is_roomy(&mut self) -> bool {
        false
    }

    /// Sleeps until packets arrive, `other` is readable, or `timeout` has passed.
    fn wait(&mut self, other: BorrowedFd<'_>, timeout: Duration) -> io::Result<Wake>;

    /// What the kernel has counted of this queue.
    fn counters(&self) -> io::Result<SourceCounters>;
}
