//! A disk thread's ring of writes that the kernel does by itself.
//!
//! Who owns a buffer when:
//! - from [`write`](Uring::write) until its completion is here, the ring, which neither reads nor
//!   changes it: the kernel reads it;
//! - then the ring still, until it is [taken](Uring::take).
//!
//! A ring that goes waits for what is in flight, so no memory is freed that the kernel still reads.
//!
//! Buffers and files are registered: the kernel then pins the pages and looks up the file once, not for
//! each write. Pages that are pinned so count against the limit of locked memory of a user without
//! `CAP_IPC_LOCK`; if that is too low, the same writes work without.
//!
//! # Minimum kernel version
//!
//! 5.11, for a wait with a time limit.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsRawFd as _, BorrowedFd, RawFd},
    sync::Arc,
    thread,
    time::Duration,
};

use io_uring::{
    IoUring, opcode,
    types::{Fixed, SubmitArgs, Timespec},
};

use crate::buffer::{Buffer, Pool};

/// Most writes in flight. With buffers of 1 MiB that is more than the queue of any disk holds; the
/// buffers of a job usually run out first.
const DEPTH: u32 = 64;

/// Sleep after a system call that failed without a reason that is known to pass.
const PAUSE: Duration = Duration::from_millis(10);

/// No file in a place.
const NO_FILE: RawFd = -1;

/// A write that was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ticket(usize);

/// A write that is over.
#[derive(Debug)]
pub(crate) struct Landed {
    pub(crate) buffer: Buffer,
    /// Bytes written, which may be fewer than there were.
    pub(crate) result: io::Result<usize>,
}

enum Slot {
    Free,
    Flying(Buffer),
    Landed(Landed),
}

/// The ring.
pub(crate) struct Uring {
    ring: IoUring,
    slots: Vec<Slot>,
    flying: usize,
    /// Where registered buffers begin, and their numbers.
    registered: HashMap<usize, u16>,
    /// A pool that lives makes no other buffer where one of its own was.
    pools: Vec<Arc<Pool>>,
}

impl Uring {
    /// A ring with places for this many files.
    pub(crate) fn new(files: usize) -> io::Result<Self> {
        let entries = DEPTH;
        // One thread uses it, and needs no interrupt to learn of completions: Linux 6.0 has both.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_coop_taskrun()
            .dontfork()
            .build(entries)
            .or_else(|_error| IoUring::builder().dontfork().build(entries))?;
        if !ring.params().is_feature_ext_arg() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "io_uring cannot wait with a time limit (Linux 5.11 can)",
            ));
        }
        ring.submitter().register_files(&vec![NO_FILE; files])?;
        Ok(Self {
            ring,
            slots: Vec::new(),
            flying: 0,
            registered: HashMap::new(),
            pools: Vec::new(),
        })
    }

    /// Registers all buffers of these pools. When that fails, they can be written all the same.
    pub(crate) fn register(&mut self, pools: Vec<Arc<Pool>>) -> io::Result<()> {
        let places: Vec<_> = pools.iter().flat_map(|pool| pool.places()).copied().collect();
        if u16::try_from(places.len()).is_err() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let vectors: Vec<libc::iovec> = places
            .iter()
            .map(|(base, length)| libc::iovec {
                iov_base: std::ptr::without_provenance_mut(*base),
                iov_len: *length,
            })
            .collect();
        // SAFETY: the kernel pins the pages that are there now, and only reads them, for writes of
        // buffers that this ring owns. Should a buffer be freed, its pages stay pinned and are never
        // named again, because its pool, kept below, makes no other.
        unsafe { self.ring.submitter().register_buffers(&vectors) }?;
        self.registered = places.into_iter().map(|(base, _)| base).zip(0..).collect();
        self.pools = pools;
        Ok(())
    }

    /// Puts a file into a place, or takes away the one that is there.
    pub(crate) fn set_file(&mut self, place: u32, file: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let file = file.map_or(NO_FILE, |file| file.as_raw_fd());
        self.ring.submitter().register_files_update(place, &[file]).map(drop)
    }

    /// Whether there is room for one more write. Those that are over take none, also before they are
    /// [taken](Self::take).
    pub(crate) fn has_room(&self) -> bool {
        self.flying < DEPTH as usize
    }

    /// Whether writes are in flight.
    pub(crate) fn is_busy(&self) -> bool {
        self.flying > 0
    }

    /// Begins to write a buffer to the file in a place, at this offset. There must be
    /// [room](Self::has_room).
    pub(crate) fn write(&mut self, place: u32, offset: u64, buffer: Buffer) -> Ticket {
        assert!(self.has_room(), "the caller has looked for room");
        let free = self.slots.iter().position(|slot| matches!(slot, Slot::Free));
        let at = free.unwrap_or_else(|| {
            self.slots.push(Slot::Free);
            self.slots.len() - 1
        });
        let bytes = buffer.filled();
        let (start, length) = (bytes.as_ptr(), bytes.len() as u32);
        let entry = match self.registered.get(&start.addr()) {
            Some(number) => {
                opcode::WriteFixed::new(Fixed(place), start, length, *number).offset(offset).build()
            }
            None => opcode::Write::new(Fixed(place), start, length).offset(offset).build(),
        };
        let entry = entry.user_data(at as u64);
        self.slots[at] = Slot::Flying(buffer);
        self.flying += 1;
        // SAFETY: the buffer is in its slot, and stays there unchanged until the kernel is done.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.expect("the queue has as many entries as writes may fly, and is emptied below");
        if let Err(error) = self.ring.submit() {
            // It stays on the queue; the next wait submits it.
            log::debug!("submitting a write: {error}");
        }
        Ticket(at)
    }

    /// Takes note of writes that are over. If none is, waits for one for up to this long.
    pub(crate) fn land(&mut self, wait: Duration) {
        if self.collect() || self.flying == 0 || wait.is_zero() {
            return;
        }
        let timeout = Timespec::from(wait);
        let args = SubmitArgs::new().timespec(&timeout);
        match self.ring.submitter().submit_with_args(1, &args) {
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) => {}
            Err(error) => {
                log::error!("waiting for writes: {error}");
                thread::sleep(PAUSE);
            }
        }
        self.collect();
    }

    /// Empties the completion queue; says whether anything was there.
    fn collect(&mut self) -> bool {
        let mut any = false;
        for entry in self.ring.completion() {
            any = true;
            let slot = &mut self.slots[entry.user_data() as usize];
            if let Slot::Flying(buffer) = std::mem::replace(slot, Slot::Free) {
                let result = usize::try_from(entry.result())
                    .map_err(|_negative| io::Error::from_raw_os_error(-entry.result()));
                *slot = Slot::Landed(Landed { buffer, result });
                self.flying -= 1;
            }
        }
        any
    }

    /// What became of a write, if it is over: its place is free then.
    pub(crate) fn take(&mut self, ticket: Ticket) -> Option<Landed> {
        let slot = &mut self.slots[ticket.0];
        match std::mem::replace(slot, Slot::Free) {
            Slot::Landed(landed) => Some(landed),
            other => {
                *slot = other;
                None
            }
        }
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        while self.is_busy() {
            self.land(Duration::from_secs(1));
        }
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("flying", &self.flying)
            .field("registered", &self.registered.len())
            .field("pools", &self.pools.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsFd as _};

    use super::*;

    const WAIT: Duration = Duration::from_secs(20);

    fn filled(pool: &Pool, byte: u8, length: usize) -> Buffer {
        let mut buffer = pool.take().unwrap();
        buffer.append(&vec![byte; length]);
        buffer
    }

    /// Takes every ticket's buffer and gives it back.
    fn land_all(ring: &mut Uring, mut tickets: Vec<Ticket>) {
        while !tickets.is_empty() {
            ring.land(WAIT);
            tickets.retain(|ticket| match ring.take(*ticket) {
                Some(landed) => {
                    assert_eq!(landed.result.unwrap(), landed.buffer.len());
                    landed.buffer.recycle();
                    false
                }
                None => true,
            });
        }
    }

    #[test]
    fn what_is_written_lands_where_it_should_registered_or_not() {
        for registered in [true, false] {
            let file = tempfile::tempfile().unwrap();
            let pool = Pool::new(8, 8192);
            let mut ring = Uring::new(2).unwrap();
            if registered {
                ring.register(vec![Arc::clone(&pool)]).unwrap();
            }
            ring.set_file(1, Some(file.as_fd())).unwrap();
            for round in 0..5 {
                let write = |at: u64| {
                    let buffer = filled(&pool, (round * 8 + at) as u8, 4096 + at as usize);
                    ring.write(1, (round * 8 + at) * 8192, buffer)
                };
                let tickets = (0..8).map(write).collect();
                assert!(pool.take().is_none(), "the ring has them all");
                land_all(&mut ring, tickets);
            }
            assert!(!ring.is_busy());
            let mut bytes = vec![0; 40 * 8192];
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes[..39 * 8192 + 4096 + 7], 0)
                .unwrap();
            for (number, piece) in bytes.chunks(8192).enumerate() {
                let length = 4096 + number % 8;
                assert!(piece[..length].iter().all(|byte| *byte == number as u8), "{number}");
                assert!(piece[length..].iter().all(|byte| *byte == 0), "{number}");
            }
        }
    }

    #[test]
    fn a_write_that_fails_gives_its_buffer_back_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "").unwrap();
        let file = fs::File::open(&path).unwrap();
        let pool = Pool::new(2, 4096);
        let mut ring = Uring::new(1).unwrap();
        ring.set_file(0, Some(file.as_fd())).unwrap();
        for place in [0, 7] {
            let ticket = ring.write(place, 0, filled(&pool, 1, 100));
            while ring.is_busy() {
                ring.land(WAIT);
            }
            let landed = ring.take(ticket).unwrap();
            assert_eq!(landed.result.unwrap_err().raw_os_error(), Some(libc::EBADF), "{place}");
            assert_eq!(landed.buffer.len(), 100);
            landed.buffer.recycle();
        }
    }

    #[test]
    fn writes_that_are_over_make_room_before_they_are_taken() {
        let count = 3 * DEPTH as usize;
        let file = tempfile::tempfile().unwrap();
        let pool = Pool::new(count, 4096);
        let mut ring = Uring::new(1).unwrap();
        ring.set_file(0, Some(file.as_fd())).unwrap();
        let write = |at: usize| {
            while !ring.has_room() {
                assert!(ring.is_busy(), "what is waited for is in flight");
                ring.land(WAIT);
            }
            ring.write(0, at as u64 * 4096, filled(&pool, 7, 4096))
        };
        let tickets = (0..count).map(write).collect();
        land_all(&mut ring, tickets);
        assert_eq!(file.metadata().unwrap().len(), count as u64 * 4096);
    }

    #[test]
    fn a_ring_that_goes_waits_for_its_writes() {
        let file = tempfile::tempfile().unwrap();
        let pool = Pool::new(2, 1 << 20);
        let mut ring = Uring::new(1).unwrap();
        ring.set_file(0, Some(file.as_fd())).unwrap();
        ring.write(0, 0, filled(&pool, 7, 1 << 20));
        drop(ring);
        assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    }
}
