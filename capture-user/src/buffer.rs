//! The buffers that packets are encoded into and that go to the disk thread whole.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

/// Alignment of a buffer's memory, as direct I/O wants it.
pub const ALIGNMENT: usize = 4096;

#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(4096))]
struct Page([u8; ALIGNMENT]);

const _: () = assert!(align_of::<Page>() == ALIGNMENT);

/// A run of whole pcapng blocks, on its way from a worker to the disk.
pub struct Buffer {
    pages: Box<[Page]>,
    filled: usize,
    /// Packets in it.
    pub packets: u64,
    /// Sum of their captured lengths, bytes.
    pub captured_bytes: u64,
    /// Earliest packet time in it, UTC nanoseconds.
    pub first_ns: u64,
    /// Latest packet time in it, UTC nanoseconds.
    pub last_ns: u64,
    home: Arc<Pool>,
}

impl Buffer {
    /// What is in it.
    pub fn filled(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.pages)[..self.filled]
    }

    /// What is free in it.
    #[inline]
    pub fn free(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.pages)[self.filled..]
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
        if self.packets == 0 {
            self.first_ns = time_ns;
        }
        self.filled += bytes;
        self.packets += 1;
        self.captured_bytes += captured as u64;
        self.first_ns = self.first_ns.min(time_ns);
        self.last_ns = self.last_ns.max(time_ns);
    }

    /// Empties it and gives it back to the pool that it came from.
    pub fn recycle(mut self) {
        self.filled = 0;
        self.packets = 0;
        self.captured_bytes = 0;
        self.first_ns = 0;
        self.last_ns = 0;
        let home = Arc::clone(&self.home);
        // A pool has room for every buffer that it made.
        drop(home.free.push(self));
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

/// The buffers of one job on one worker. All memory is allocated, and touched, when it is made.
#[derive(Debug)]
pub struct Pool {
    free: ArrayQueue<Buffer>,
}

impl Pool {
    /// `count` buffers of `size` bytes, rounded up to whole pages.
    pub fn new(count: usize, size: usize) -> Arc<Self> {
        let pool = Arc::new(Self { free: ArrayQueue::new(count.max(2)) });
        for _ in 0..count.max(2) {
            // Not zeroed by the allocator but written, so that no page fault waits in the hot loop.
            let mut pages = vec![Page([0; ALIGNMENT]); size.div_ceil(ALIGNMENT).max(1)];
            for page in &mut pages {
                page.0[0] = std::hint::black_box(1);
            }
            let buffer = Buffer {
                pages: pages.into_boxed_slice(),
                filled: 0,
                packets: 0,
                captured_bytes: 0,
                first_ns: 0,
                last_ns: 0,
                home: Arc::clone(&pool),
            };
            drop(pool.free.push(buffer));
        }
        pool
    }

    /// An empty buffer, if one is free.
    #[inline]
    pub fn take(&self) -> Option<Buffer> {
        self.free.pop()
    }

    /// Breaks the circle of pool and buffers, so that both can go.
    pub fn close(&self) {
        while self.free.pop().is_some() {}
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
