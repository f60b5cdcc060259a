//! The readers of the CPUs' BPF ring buffers.
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
use nix::sys::{
    epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
    mman::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::{
    clock::monotonic_ns,
    source::{ON_THE_WAY_NS, Received, Source, SourceCounters, Wake},
};

/// Most records in one batch.
const BATCH: usize = 256;

/// Most bytes in one batch, so that the producer learns of freed room in time.
pub(crate) const BATCH_BYTES: usize = 256 * 1024;

/// Length of a record's own head: its length and flags, and the offset of its page.
const HEAD: usize = 8;

/// Set in a record's length while the kernel still writes it.
const BUSY: u32 = 1 << 31;

/// Set in a record's length when there is nothing in it.
const DISCARD: u32 = 1 << 30;

/// The time of a packet that is not there.
const NOTHING: u64 = u64::MAX;

/// The part of a ring that may fill up in a nap; more, and the next is shorter.
const NAP_PART: usize = 8;

/// The shortest nap of a reader, and by how much the next one may be longer.
const SHORTEST_NAP: Duration = Duration::from_millis(1);

/// Who has woken the reader: a ring, or another thread.
const OF_RING: u64 = 0;
const OF_CALLER: u64 = 1;

/// Where a VLAN tag stands in a frame: behind both MAC addresses.
const TAG_AT: usize = 12;

/// One CPU's ring with its mappings.
pub struct Ring {
    map: MapData,
    size: usize,
    page: usize,
    consumer: NonNull<AtomicUsize>,
    producer: NonNull<AtomicUsize>,
    position: usize,
    /// Where what was seen begins and ends.
    begin: usize,
    seen: usize,
    /// When the next packet of it came, or [`NOTHING`].
    next_ns: u64,
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
        let (begin, seen, next_ns) = (position, position, NOTHING);
        let producer = producer.cast();
        Ok(Self { map, size, page, consumer, producer, position, begin, seen, next_ns })
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

impl Ring {
    /// Takes note of what the kernel has put there by now.
    #[inline]
    fn look(&mut self) {
        self.seen = self.produced();
        self.begin = self.position;
        self.find();
    }

    /// Finds the next packet among what was seen.
    #[inline]
    fn find(&mut self) {
        self.next_ns = NOTHING;
        while self.position != self.seen {
            let Some((data, taken)) = self.record() else { return };
            if let Some((record, _)) = data.and_then(split) {
                self.next_ns = record.header.time_ns;
                return;
            }
            self.position = self.position.wrapping_add(taken);
        }
    }

    /// Hands over the packet that was found, and finds the next.
    #[inline]
    fn hand_over(&mut self, each: &mut impl FnMut(&Received<'_>)) {
        let Some((data, taken)) = self.record() else { return };
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
        self.find();
    }

    /// Gives back what was taken since the last look; says how many bytes.
    #[inline]
    fn give_back(&mut self) -> usize {
        let taken = self.position.wrapping_sub(self.begin);
        if taken > 0 {
            // SAFETY: the first word of the consumer's page; see `map`.
            unsafe { self.consumer.as_ref() }.store(self.position, Ordering::Release);
        }
        taken
    }
}

/// The rings of some CPUs, which one worker reads in the order of time, so that their packets are encoded
/// in it and need not be put in order afterwards.
///
/// A packet is left on its ring until all that are older are there, too: one that another CPU's program has
/// just given its time may not be. See [`ON_THE_WAY_NS`].
pub struct Rings {
    lanes: Vec<Ring>,
    epoll: Epoll,
    /// Whether `epoll` has the descriptor by which the worker is called.
    is_called: bool,
    /// Bytes taken since the last sleep, and how long that was.
    taken: usize,
    nap: Duration,
}

impl Rings {
    /// What one worker reads.
    pub fn new(rings: Vec<Ring>) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        for ring in &rings {
            // Only news: what is too young to be taken would end each sleep at once.
            let news = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, OF_RING);
            epoll.add(ring.map.fd().as_fd(), news)?;
        }
        Ok(Self { lanes: rings, epoll, is_called: false, taken: 0, nap: SHORTEST_NAP })
    }

    /// How long to sleep, at most: shorter when more than a part of a ring has filled up since the last
    /// time.
    fn next_nap(&mut self, longest: Duration) -> Duration {
        let much = self.lanes.first().map_or(0, |ring| ring.size) / NAP_PART;
        match std::mem::take(&mut self.taken) {
            taken if taken > much => self.nap /= 2,
            taken if taken < much / 2 => self.nap += SHORTEST_NAP,
            _ => {}
        }
        self.nap = self.nap.min(longest).max(SHORTEST_NAP);
        self.nap
    }
}

impl Source for Rings {
    const WAKES: bool = false;

    #[inline]
    fn receive(&mut self, mut each: impl FnMut(&Received<'_>)) -> usize {
        // Before the look, which then sees all that is older.
        let until = match self.lanes.as_slice() {
            [_] => NOTHING - 1,
            _ => monotonic_ns().saturating_sub(ON_THE_WAY_NS),
        };
        for ring in &mut self.lanes {
            ring.look();
        }
        let (mut packets, mut bytes) = (0, 0);
        while packets < BATCH && bytes <= BATCH_BYTES {
            let (mut at, mut first, mut second) = (0, NOTHING, NOTHING);
            for (index, ring) in self.lanes.iter().enumerate() {
                if ring.next_ns < first {
                    (at, first, second) = (index, ring.next_ns, first);
                } else {
                    second = second.min(ring.next_ns);
                }
            }
            if first > until {
                break;
            }
            // It is this one's turn until another's packet is older.
            let ring = &mut self.lanes[at];
            let turn = until.min(second);
            let begin = ring.position;
            while ring.next_ns <= turn && packets < BATCH {
                ring.hand_over(&mut each);
                packets += 1;
                if ring.position.wrapping_sub(begin) + bytes > BATCH_BYTES {
                    break;
                }
            }
            bytes += ring.position.wrapping_sub(begin);
        }
        let taken = self.lanes.iter_mut().map(Ring::give_back).sum();
        self.taken += taken;
        taken
    }

    fn backlog(&mut self) -> usize {
        self.lanes.iter().map(|ring| ring.produced().wrapping_sub(ring.position)).sum()
    }

    fn is_roomy(&mut self) -> bool {
        self.lanes.iter().all(|ring| ring.produced().wrapping_sub(ring.position) < ring.size / 2)
    }

    fn wait(&mut self, other: BorrowedFd<'_>, timeout: Duration) -> io::Result<Wake> {
        if !self.is_called {
            self.epoll.add(other, EpollEvent::new(EpollFlags::EPOLLIN, OF_CALLER))?;
            self.is_called = true;
        }
        let lively = self.taken > 0 || self.backlog() > 0;
        let nap = if lively { self.next_nap(timeout) } else { timeout };
        let mut events = [EpollEvent::empty(); 8];
        let count = match self
            .epoll
            .wait(&mut events, EpollTimeout::try_from(nap).unwrap_or(EpollTimeout::MAX))
        {
            Ok(count) => count,
            Err(nix::Error::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        let called = events[..count].iter().any(|event| event.data() == OF_CALLER);
        Ok(if called { Wake::Called } else { Wake::Look })
    }

    fn counters(&self) -> io::Result<SourceCounters> {
        // The kernel program counts what it cannot put into a ring, per job.
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

impl std::fmt::Debug for Rings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rings").field("lanes", &self.lanes).finish_non_exhaustive()
    }
}
