//! The readers of the CPUs' rings.
//!
//! Records are handed out where they lie. The consumer's position is published once per batch: the
//! producer reads it for every packet, and each write to it takes the cache line away from the
//! producer's CPU.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::{AsFd as _, BorrowedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use capture_ebpf::abi::{MAX_SNAPLEN, PIECE, Piece, Positions, RECORD_LEN, Record, position_after};
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

/// The time of a packet that is not there.
const NOTHING: u64 = u64::MAX;

/// The part of a ring that may fill up in a nap; more, and the next is shorter.
const NAP_PART: usize = 8;

/// The shortest nap of a reader, and by how much the next one may be longer.
const SHORTEST_NAP: Duration = Duration::from_micros(250);

/// Who has woken the reader: a ring, or another thread.
const OF_RING: u64 = 0;
const OF_CALLER: u64 = 1;

/// Where a VLAN tag stands in a frame: behind both MAC addresses.
const TAG_AT: usize = 12;

/// A map's memory.
struct Mapping<T> {
    start: NonNull<T>,
    length: NonZeroUsize,
}

impl<T> Mapping<T> {
    /// Maps elements of a map from this one on.
    fn new(map: &MapData, first: usize, count: usize, protection: ProtFlags) -> io::Result<Self> {
        let length =
            NonZeroUsize::new(count * size_of::<T>()).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = libc::off_t::try_from(first * size_of::<T>()).map_err(io::Error::other)?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces none.
        let start = unsafe {
            mmap(None, length, protection, MapFlags::MAP_SHARED, map.fd().as_fd(), offset)
        }?;
        Ok(Self { start: start.cast(), length })
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length; no reference into it outlives `self`.
        let _: nix::Result<()> = unsafe { munmap(self.start.cast(), self.length.get()) };
    }
}

/// One CPU's ring.
pub struct Ring {
    pieces: Mapping<Piece>,
    /// Those of this ring's CPU are the last.
    positions: Mapping<Positions>,
    cpu: usize,
    size: usize,
    /// Rung by the kernel program when the ring fills up.
    bell: RingBuf<MapData>,
    position: u64,
    /// Where what was seen begins and ends.
    begin: u64,
    seen: u64,
    /// When the next packet of it came, or [`NOTHING`].
    next_ns: u64,
}

// SAFETY: the mappings are this value's own, and only the methods below touch them.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of this CPU, of this many bytes, out of the maps for all.
    pub(crate) fn map(
        rings: &MapData,
        positions: &MapData,
        bell: RingBuf<MapData>,
        cpu: u32,
        bytes: u32,
    ) -> io::Result<Self> {
        let (cpu, size) = (cpu as usize, bytes as usize);
        let count = size / PIECE;
        let pieces = Mapping::new(rings, cpu * count, count, ProtFlags::PROT_READ)?;
        let write = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let positions = Mapping::new(positions, 0, cpu + 1, write)?;
        let mut ring = Self {
            pieces,
            positions,
            cpu,
            size,
            bell,
            position: 0,
            begin: 0,
            seen: 0,
            next_ns: NOTHING,
        };
        ring.position = ring.consumed().load(Ordering::Acquire);
        (ring.begin, ring.seen) = (ring.position, ring.position);
        Ok(ring)
    }

    fn positions(&self) -> NonNull<Positions> {
        // SAFETY: the mapping ends with those of this CPU.
        unsafe { self.positions.start.add(self.cpu) }
    }

    fn produced(&self) -> u64 {
        // SAFETY: inside the mapping, which lives as long as `self`.
        let produced = unsafe { &raw mut (*self.positions().as_ptr()).produced };
        // SAFETY: as above, and aligned; on both sides it is only accessed as one word.
        unsafe { AtomicU64::from_ptr(produced) }.load(Ordering::Acquire)
    }

    fn consumed(&self) -> &AtomicU64 {
        // SAFETY: as in `produced`.
        let consumed = unsafe { &raw mut (*self.positions().as_ptr()).consumed };
        // SAFETY: as in `produced`.
        unsafe { AtomicU64::from_ptr(consumed) }
    }

    /// How much has not been read yet, bytes.
    fn backlog(&self) -> usize {
        self.produced().saturating_sub(self.position) as usize
    }

    /// The record at the consumer's position, and its packet's bytes.
    ///
    /// Lent where it lies: a copy that is read again in other pieces than it was written in waits until all
    /// that the encoder has written before is in the cache.
    fn record(&self) -> (&Record, &[u8]) {
        let position = self.position as usize;
        let piece = (position / PIECE) & (self.size / PIECE - 1);
        // SAFETY: the piece is one of the mapping's.
        let piece = unsafe { self.pieces.start.add(piece) };
        // SAFETY: a record begins in a piece's first part, and behind that is room for the longest: see `Piece`.
        let place = unsafe { piece.cast::<u8>().add(position % PIECE) };
        // SAFETY: as above. It is aligned: pieces are whole pages, and positions begin at 0 and go on by multiples
        // of 8, see `position_after`. The kernel program has published a position behind it, so it is complete,
        // and does not write there again before the consumer's position is published beyond it, which
        // `give_back` does after the last use. Any bytes are a valid `Record`.
        let record = unsafe { place.cast::<Record>().as_ref() };
        // SAFETY: as above.
        let data = unsafe { place.add(RECORD_LEN) };
        // SAFETY: as above.
        let data = unsafe {
            std::slice::from_raw_parts(data.as_ptr(), record.captured.min(MAX_SNAPLEN) as usize)
        };
        (record, data)
    }

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
        self.next_ns =
            if self.position < self.seen { self.record().0.header.time_ns } else { NOTHING };
    }

    /// Hands over the packet that was found, and finds the next.
    #[inline]
    fn hand_over(&mut self, each: &mut impl FnMut(&Received<'_>)) {
        let (&Record { ref header, captured, .. }, data) = self.record();
        match data.split_at_checked(TAG_AT) {
            Some((front, rest)) if header.vlan != 0 => {
                let tag = header.vlan.to_be_bytes();
                each(&Received { header, data: front, rest: &[&tag, rest] });
            }
            _ => each(&Received { header, data, rest: &[] }),
        }
        self.position = position_after(self.position, captured);
        self.find();
    }

    /// Gives back what was taken since the last look; says how many bytes.
    #[inline]
    fn give_back(&mut self) -> usize {
        let taken = self.position - self.begin;
        if taken > 0 {
            self.consumed().store(self.position, Ordering::Release);
        }
        taken as usize
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
            epoll.add(ring.bell.as_fd(), news)?;
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
                if (ring.position - begin) as usize + bytes > BATCH_BYTES {
                    break;
                }
            }
            bytes += (ring.position - begin) as usize;
        }
        let taken = self.lanes.iter_mut().map(Ring::give_back).sum();
        self.taken += taken;
        taken
    }

    fn backlog(&mut self) -> usize {
        self.lanes.iter().map(Ring::backlog).sum()
    }

    fn is_roomy(&mut self) -> bool {
        self.lanes.iter().all(|ring| ring.backlog() < ring.size / 2)
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
        if events[..count].iter().any(|event| event.data() == OF_RING) {
            for ring in &mut self.lanes {
                while ring.bell.next().is_some() {}
            }
        }
        Ok(if called { Wake::Called } else { Wake::Look })
    }

    fn counters(&self) -> io::Result<SourceCounters> {
        // The kernel program counts what it cannot put into a ring, per job.
        Ok(SourceCounters::default())
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
