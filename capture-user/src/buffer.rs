//! The buffers that packets are encoded into and that go to the disk thread whole.

use std::sync::{Arc, Weak};

use crossbeam::queue::ArrayQueue;

use crate::{
    segment::pcapng,
    sys::{Part, parts},
};

/// Alignment of a buffer's memory, as direct I/O wants it.
pub const ALIGNMENT: usize = 4096;

/// Memory as direct I/O wants it.
#[derive(Debug)]
pub(crate) struct Pages(Part);

impl Pages {
    /// So many, each with as many pages as hold `bytes`, at least one.
    pub(crate) fn several(count: usize, bytes: usize) -> Vec<Self> {
        let size = bytes.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        match parts(count, size) {
            Ok(parts) => parts.into_iter().map(Self).collect(),
            // Like any allocation that fails.
            Err(error) => panic!("no memory for {count} buffers of {size} bytes: {error}"),
        }
    }

    #[inline]
    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.bytes()
    }

    #[inline]
    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }
}

/// A run of whole pcapng blocks, on its way from a worker to the disk.
pub struct Buffer {
    pages: Pages,
    filled: usize,
    /// Packets in it.
    pub packets: u64,
    /// Sum of their captured lengths, bytes.
    pub captured_bytes: u64,
    /// Earliest packet time in it, UTC nanoseconds.
    pub first_ns: u64,
    /// Latest packet time in it, UTC nanoseconds.
    pub last_ns: u64,
    /// A pool holds its buffers, so they do not hold it.
    home: Weak<Pool>,
}

impl Buffer {
    /// What is in it.
    pub fn filled(&self) -> &[u8] {
        &self.pages.bytes()[..self.filled]
    }

    /// What is free in it.
    #[inline]
    pub fn free(&mut self) -> &mut [u8] {
        &mut self.pages.bytes_mut()[self.filled..]
    }

    /// Bytes in it.
    #[inline]
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Takes `bytes` more of the free part as filled, with one packet.
    #[inline]
    pub fn commit(&mut self, bytes: usize, captured: usize, time_ns: u64) {
        self.filled += bytes;
        self.note(captured, time_ns);
    }

    /// Counts a packet whose bytes are [appended](Self::append) with others'.
    #[inline]
    pub(crate) fn note(&mut self, captured: usize, time_ns: u64) {
        if self.packets == 0 {
            self.first_ns = time_ns;
        }
        self.packets += 1;
        self.captured_bytes += captured as u64;
        self.first_ns = self.first_ns.min(time_ns);
        self.last_ns = self.last_ns.max(time_ns);
    }

    /// Copies whole blocks in. The caller sees to it that there is room.
    pub(crate) fn append(&mut self, blocks: &[u8]) {
        self.free()[..blocks.len()].copy_from_slice(blocks);
        self.filled += blocks.len();
    }

    /// Makes the last packet's block longer, by whole words that readers skip. The caller sees to it
    /// that there is room.
    pub(crate) fn pad(&mut self, by: usize) {
        let length = self.filled + by;
        pcapng::pad(&mut self.pages.bytes_mut()[..length], by);
        self.filled = length;
    }

    /// Forgets what is in it.
    pub fn empty(&mut self) {
        self.filled = 0;
        self.packets = 0;
        self.captured_bytes = 0;
        self.first_ns = 0;
        self.last_ns = 0;
    }

    /// Whether more than half of its pool's buffers are in use: who fills them may have none soon.
    pub(crate) fn is_urgent(&self) -> bool {
        self.home.upgrade().is_some_and(|home| home.available() < home.capacity() / 2)
    }

    /// Empties it and gives it back to the pool that it came from, if there still is one.
    pub fn recycle(mut self) {
        self.empty();
        if let Some(home) = self.home.upgrade() {
            let mut left = Some(self);
            for tier in &home.tiers {
                left = left.and_then(|buffer| tier.push(buffer).err());
            }
            debug_assert!(left.is_none(), "a pool has room for every buffer that it made");
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer")
            .field("filled", &self.filled)
            .field("packets", &self.packets)
            .finish_non_exhaustive()
    }
}

/// The buffers of one job on one worker.
#[derive(Debug)]
pub struct Pool {
    /// The free ones: a few that come first, a few more that come next, and the rest, so that a disk that
    /// keeps up is written from the same few, which the caches hold.
    tiers: [ArrayQueue<Buffer>; 3],
    /// Where its buffers are, and how long.
    places: Vec<(usize, usize)>,
}

/// Least number of buffers.
const LEAST: usize = 2;

/// Buffers that are used first: one that is filled, and one that is written meanwhile. All that a job needs
/// that shares the packets with many.
const HOT: usize = 2;

/// Bytes of the buffers that are used next: about a second-level cache.
const WARM_BYTES: usize = 2 << 20;

impl Pool {
    /// A pool of `count` buffers of `size` bytes, rounded up to whole pages.
    pub fn new(count: usize, size: usize) -> Arc<Self> {
        let count = count.max(LEAST);
        let warm = (WARM_BYTES / size.max(1)).clamp(1, count);
        let tiers = [HOT, warm, count].map(ArrayQueue::new);
        let mut memory = Pages::several(count, size);
        for page in
            memory.iter_mut().flat_map(|pages| pages.bytes_mut().iter_mut().step_by(ALIGNMENT))
        {
            // Written, so that no page fault waits in the hot loop.
            *page = std::hint::black_box(1);
        }
        let place = |pages: &Pages| (pages.bytes().as_ptr().addr(), pages.bytes().len());
        let places = memory.iter().map(place).collect();
        let pool = Arc::new(Self { tiers, places });
        for pages in memory {
            pool.buffer(pages).recycle();
        }
        pool
    }

    /// How many buffers there are, free or not.
    pub fn capacity(&self) -> usize {
        self.places.len()
    }

    /// How many are free.
    #[inline]
    pub(crate) fn available(&self) -> usize {
        self.tiers.iter().map(ArrayQueue::len).sum()
    }

    /// Where its buffers are, those that are not free too, and their sizes in bytes.
    pub(crate) fn places(&self) -> &[(usize, usize)] {
        &self.places
    }

    fn buffer(self: &Arc<Self>, pages: Pages) -> Buffer {
        Buffer {
            pages,
            filled: 0,
            packets: 0,
            captured_bytes: 0,
            first_ns: 0,
            last_ns: 0,
            home: Arc::downgrade(self),
        }
    }

    /// An empty buffer, if one is free.
    #[inline]
    pub fn take(&self) -> Option<Buffer> {
        self.tiers.iter().find_map(ArrayQueue::pop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_come_back_empty() {
        let pool = Pool::new(2, 10_000);
        let mut one = pool.take().unwrap();
        assert_eq!(one.free().as_ptr() as usize % ALIGNMENT, 0);
        assert_eq!(one.free().len(), 3 * ALIGNMENT);
        one.free()[..4].copy_from_slice(b"abcd");
        one.commit(4, 2, 77);
        assert_eq!(one.filled(), b"abcd");
        let two = pool.take().unwrap();
        assert!(pool.take().is_none(), "a pool never grows");
        one.recycle();
        two.recycle();
        assert!(pool.take().is_some_and(|buffer| buffer.is_empty() && buffer.packets == 0));
    }
}
