//! The reader of one CPU's BPF ring buffer.
//!
//! The kernel maps a ring as a page with the consumer's position, a page with the producer's, and the
//! data, twice in a row, so that a record that wraps is contiguous all the same.
//! <https://github.com/torvalds/linux/blob/v6.6/kernel/bpf/ringbuf.c#L96-L124>
//!
//! Records are handed out where they lie. The consumer's position is published once per batch: the
//! producer reads it for every packet, and each write to it takes the cache line away from the
//! producer's CPU.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{AsFd as _, BorrowedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU32, AtomicUsize, Ordering},
    time::Duration,
};

use aya::maps::MapData;
use capture_ebpf::abi::{RECORD_LEN, Record};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::mman::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::source::{Received, Source, SourceCounters, Wake};

/// Most records in one batch.
const BATCH: usize = 256;

/// Most bytes in one batch, so that the producer learns of freed room in time.
const BATCH_BYTES: usize = 256 * 1024;

/// Length of a record's own head: its length and flags, and the offset of its page.
const HEAD: usize = 8;

/// Set in a record's length while the kernel still writes it.
const BUSY: u32 = 1 << 31;

/// Set in a record's length when there is nothing in it.
const DISCARD: u32 = 1 << 30;

/// Where a VLAN tag stands in a frame: behind both MAC addresses.
const TAG_AT: usize = 12;

/// A ring with its mappings.
pub struct Ring {
    map: MapData,
    size: usize,
    page: usize,
    consumer: NonNull<AtomicUsize>,
    producer: NonNull<AtomicUsize>,
    position: usize,
}

// SAFETY: the mappings are this value's own, and only the methods below touch them.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of this many bytes.
    pub fn map(map: MapData, size: u32) -> io::Result<Self> {
        let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
        let page = usize::try_from(page).map_err(io::Error::other)?;
        let size = size as usize;
        let length = |bytes| NonZeroUsize::new(bytes).ok_or(io::ErrorKind::InvalidInput);
        let write = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let offset = libc::off_t::try_from(page).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces none.
        let consumer =
            unsafe { mmap(None, length(page)?, write, MapFlags::MAP_SHARED, map.fd().as_fd(), 0) }?;
        // SAFETY: as above; read-only, as the kernel wants it.
        let producer = unsafe {
            mmap(
                None,
                length(page + 2 * size)?,
                ProtFlags::PROT_READ,
                MapFlags::MAP_SHARED,
                map.fd().as_fd(),
                offset,
            )
        };
        let producer = match producer {
            Ok(producer) => producer,
            Err(error) => {
                // SAFETY: mapped above with this length, and used by nobody yet.
                let _: nix::Result<()> = unsafe { munmap(consumer, page) };
                return Err(error.into());
            }
        };
        let consumer = consumer.cast::<AtomicUsize>();
        // SAFETY: the first word of the consumer's page is its position; pages are aligned.
        let position = unsafe { consumer.as_ref() }.load(Ordering::Acquire);
        Ok(Self { map, size, page, consumer, producer: producer.cast(), position })
    }

    fn produced(&self) -> usize {
        // SAFETY: the first word of the producer's page is its position; the mapping lives as long as
        // `self`.
        unsafe { self.producer.as_ref() }.load(Ordering::Acquire)
    }

    /// The address of a position in the data.
    fn at(&self, position: usize) -> NonNull<u8> {
        let offset = self.page + (position & (self.size - 1));
        // SAFETY: the mapping is the page and twice the size.
        unsafe { self.producer.cast::<u8>().add(offset) }
    }

    /// The record at the consumer's position: what it holds, unless it was discarded, and how much it
    /// takes of the ring. `None` while the kernel still writes it.
    fn record(&self) -> Option<(Option<&[u8]>, usize)> {
        let head = self.at(self.position).cast::<AtomicU32>();
        // SAFETY: a record's head is 8-byte aligned and inside the mapping; the kernel stores to it
        // with release ordering when the record is complete.
        let length = unsafe { head.as_ref() }.load(Ordering::Acquire);
        if length & BUSY != 0 {
            return None;
        }
        let bytes = (length & !DISCARD) as usize;
        let taken = (HEAD + bytes).next_multiple_of(8);
        if length & DISCARD != 0 {
            return Some((None, taken));
        }
        // SAFETY: the data is mapped twice, so a record is contiguous from any start.
        let start = unsafe { self.at(self.position).add(HEAD) };
        // SAFETY: the record is complete, and the kernel does not write there again before the
        // consumer's position is published beyond it, which `receive` does after the last use.
        let data = unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) };
        Some((Some(data), taken))
    }
}

/// Reads what precedes a packet's bytes, and the bytes.
fn split(data: &[u8]) -> Option<(Record, &[u8])> {
    let (front, rest) = data.split_first_chunk::<RECORD_LEN>()?;
    // SAFETY: as many readable bytes as a `Record` has, and any bytes are a valid one.
    let record = unsafe { front.as_ptr().cast::<Record>().read_unaligned() };
    Some((record, rest.get(..record.captured as usize)?))
}

impl Source for Ring {
    const WAKES: bool = false;

    #[inline]
    fn receive(&mut self, mut each: impl FnMut(&Received<'_>)) -> usize {
        let produced = self.produced();
        let begin = self.position;
        for _ in 0..BATCH {
            let taken_so_far = self.position.wrapping_sub(begin);
            if self.position == produced || taken_so_far > BATCH_BYTES {
                break;
            }
            let Some((data, taken)) = self.record() else { break };
            if let Some((record, data)) = data.and_then(split) {
                let header = record.header;
                match data.split_at_checked(TAG_AT) {
                    Some((front, rest)) if header.vlan != 0 => {
                        let tag = header.vlan.to_be_bytes();
                        each(&Received { header, data: front, rest: &[&tag, rest] });
                    }
                    _ => each(&Received { header, data, rest: &[] }),
                }
            }
            self.position = self.position.wrapping_add(taken);
        }
        let taken = self.position.wrapping_sub(begin);
        if taken > 0 {
            // SAFETY: the first word of the consumer's page; see `map`.
            unsafe { self.consumer.as_ref() }.store(self.position, Ordering::Release);
        }
        taken
    }

    fn backlog(&mut self) -> usize {
        self.produced().wrapping_sub(self.position)
    }

    fn wait(&mut self, other: BorrowedFd<'_>, timeout: Duration) -> io::Result<Wake> {
        let mut fds = [
            PollFd::new(self.map.fd().as_fd(), PollFlags::POLLIN),
            PollFd::new(other, PollFlags::POLLIN),
        ];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(if fds[1].any().unwrap_or(false) { Wake::Called } else { Wake::Look })
    }

    fn counters(&self) -> io::Result<SourceCounters> {
        // The kernel program counts what it cannot put into the ring, per job.
        Ok(SourceCounters::default())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length; no reference into it outlives `self`.
        let _: nix::Result<()> = unsafe { munmap(self.consumer.cast(), self.page) };
        // SAFETY: as above.
        let _: nix::Result<()> = unsafe { munmap(self.producer.cast(), self.page + 2 * self.size) };
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("size", &self.size).finish_non_exhaustive()
    }
}
