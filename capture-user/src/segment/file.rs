//! The file of a segment that is being written.
//!
//! - A large buffer goes past the page cache, straight from its memory to the disk, with others in
//!   flight; a small one, as a quiet job passes on five times a second, goes through the cache.
//! - Past the cache, whole pages are written: the buffer's last packet block is padded. So a direct
//!   write begins where one ended, or behind a large buffer that went through the cache for that.
//! - Writes may be over in any order. They are told of in the file's order, and a write through the
//!   cache waits for its turn: whatever was told of has no gap in front of it.
//! - A direct write that was refused or stopped short is completed through the cache, which either
//!   works or says why not, and how far it came.
//! - Room is preallocated ahead of direct writes, because to make a file longer they would have to wait
//!   for each other. A crash leaves it as zeros at the end, which are not a block; a seal cuts it off.
//! - If it is asked for, what is in the file is hashed as it gets there, out of the memory that it is in:
//!   to read it again would cost more than to write it did. That is given up for a segment as soon as
//!   buffers run short, for the next packets need them more.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsFd as _,
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use nix::fcntl::{FallocateFlags, fallocate};
use ring::digest::{Context, Digest, SHA256};

use super::{Run, io::Io};
use crate::{
    buffer::{ALIGNMENT, Buffer},
    uring::{Landed, Ticket},
};

/// Least bytes that are worth a direct write. Smaller, and the padding (half a page on average) and the
/// disk's time for each write count; larger, and a job of a few megabytes per second would fill the page
/// cache with what nobody reads again.
const DIRECT_FROM: usize = 64 * 1024;

/// Room that is preallocated at once, bytes. Less, and the file system's journal is written more often;
/// more, and a job holds more of the disk that it may not need.
const ALLOCATE: u64 = 64 << 20;

enum Direct {
    /// No buffer was large enough so far.
    Untried,
    /// The ring has a descriptor of its own in this place.
    Open {
        place: u32,
    },
    Refused,
}

enum State {
    Flying(Ticket),
    /// To be written through the page cache when its turn comes.
    Waiting(Buffer),
}

struct Flight {
    at: u64,
    runs: Vec<Run>,
    state: State,
}

/// What became of a buffer.
pub(super) struct Written {
    pub(super) buffer: Buffer,
    pub(super) runs: Vec<Run>,
    /// Bytes that are in the file.
    pub(super) put: usize,
    pub(super) result: io::Result<()>,
}

/// The file.
pub(super) struct Output {
    file: File,
    hidden: PathBuf,
    direct: Direct,
    /// Where the next buffer goes.
    end: u64,
    /// The file will not grow beyond this.
    most: u64,
    /// Up to where there is room, or `u64::MAX` where it cannot be preallocated.
    allocated: u64,
    flights: VecDeque<Flight>,
    /// Of all that is in the file; none if nobody wants it, or it was given up.
    digest: Option<Context>,
}

impl Output {
    /// Creates the file, which begins with `head`. It is removed again when that cannot be written.
    pub(super) fn create(
        hidden: PathBuf,
        head: &[u8],
        most: Option<u64>,
        hashed: bool,
    ) -> io::Result<Self> {
        let mut file =
            OpenOptions::new().create(true).truncate(true).read(true).write(true).open(&hidden)?;
        if let Err(error) = file.write_all(head) {
            drop(fs::remove_file(&hidden));
            return Err(error);
        }
        Ok(Self {
            file,
            hidden,
            direct: Direct::Untried,
            end: head.len() as u64,
            most: most.unwrap_or(u64::MAX),
            allocated: 0,
            flights: VecDeque::new(),
            digest: hashed.then(|| {
                let mut digest = Context::new(&SHA256);
                digest.update(head);
                digest
            }),
        })
    }

    /// Its name until it is whole.
    pub(super) fn hidden(&self) -> &Path {
        &self.hidden
    }

    /// Where the next buffer goes.
    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Begins to write a buffer that consists of these runs.
    pub(super) fn write(&mut self, io: &mut Io, mut buffer: Buffer, mut runs: Vec<Run>) {
        let at = self.end;
        let large = buffer.len() >= DIRECT_FROM && buffer.free().len() >= ALIGNMENT;
        let place = if large { self.place(io) } else { None };
        if place.is_some() {
            let end = at + buffer.len() as u64;
            let by = (end.next_multiple_of(ALIGNMENT as u64) - end) as usize;
            buffer.pad(by);
            if let Some(last) = runs.last_mut() {
                last.bytes += by;
            }
        }
        self.end = at + buffer.len() as u64;
        let state = match place {
            Some(place) if at.is_multiple_of(ALIGNMENT as u64) => {
                self.allocate(at);
                State::Flying(io.write(place, at, buffer))
            }
            _ => State::Waiting(buffer),
        };
        self.flights.push_back(Flight { at, runs, state });
    }

    /// The place of the file's direct descriptor.
    fn place(&mut self, io: &mut Io) -> Option<u32> {
        if matches!(self.direct, Direct::Untried) && io.used.refused.is_none() {
            let opened =
                OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(&self.hidden);
            self.direct = Direct::Refused;
            match opened {
                Ok(file) => {
                    if let Some(place) = io.admit(&file) {
                        self.direct = Direct::Open { place };
                    }
                }
                Err(error) => io.refuse(format!("the file system refuses O_DIRECT: {error}")),
            }
        }
        match self.direct {
            Direct::Open { place } if io.used.refused.is_none() => Some(place),
            _ => None,
        }
    }

    /// Makes room for what is about to be written here.
    fn allocate(&mut self, at: u64) {
        if self.end <= self.allocated {
            return;
        }
        let from = self.allocated.max(at);
        let to = (from + ALLOCATE).min(self.most).max(self.end);
        let (offset, length) = (from.cast_signed(), (to - from).cast_signed());
        self.allocated = match fallocate(self.file.as_fd(), FallocateFlags::empty(), offset, length)
        {
            Ok(()) => to,
            Err(error) => {
                // A disk that is nearly full may still take what there is to write.
                log::debug!("preallocating {}: {error}", self.hidden.display());
                u64::MAX
            }
        };
    }

    /// The next buffer in the file's order, if it has been written.
    pub(super) fn next(&mut self, io: &mut Io) -> Option<Written> {
        let flight = self.flights.pop_front()?;
        let Flight { at, runs, state } = flight;
        let (buffer, done) = match state {
            State::Waiting(buffer) => (buffer, 0),
            State::Flying(ticket) => match io.take(ticket) {
                None => {
                    self.flights.push_front(Flight { at, runs, state });
                    return None;
                }
                Some(Landed { buffer, result }) => {
                    let done = result.unwrap_or_else(|error| {
                        // A full disk has nothing against direct writes.
                        if matches!(
                            error.raw_os_error(),
                            Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)
                        ) {
                            io.refuse(format!("the file system refuses direct writes: {error}"));
                        }
                        0
                    });
                    io.used.direct_bytes += done as u64;
                    (buffer, done)
                }
            },
        };
        let (more, result) = put(&buffer.filled()[done..], |bytes, put| {
            self.file.write_some_at(bytes, at + (done + put) as u64)
        });
        io.used.cached_bytes += more as u64;
        let put = done + more;
        if result.is_err() || buffer.is_urgent() {
            self.digest = None;
        }
        if let Some(digest) = &mut self.digest {
            digest.update(&buffer.filled()[..put]);
        }
        Some(Written { buffer, runs, put, result })
    }

    /// Whether buffers are on their way.
    pub(super) fn is_busy(&self) -> bool {
        !self.flights.is_empty()
    }

    /// After a failure: waits for all buffers on their way, and gives back what they were, lost.
    pub(super) fn abandon(&mut self, io: &mut Io) -> Vec<Run> {
        let mut lost = Vec::new();
        for flight in std::mem::take(&mut self.flights) {
            let buffer = match flight.state {
                State::Waiting(buffer) => buffer,
                State::Flying(ticket) => loop {
                    match io.take(ticket) {
                        Some(landed) => break landed.buffer,
                        None => io.wait(),
                    }
                },
            };
            buffer.recycle();
            lost.extend(flight.runs);
        }
        lost
    }

    /// Cuts the file and goes on writing at its end. Nothing may be on its way.
    pub(super) fn cut(&mut self, size: u64) -> io::Result<()> {
        self.digest = None;
        self.truncate(size)
    }

    fn truncate(&mut self, size: u64) -> io::Result<()> {
        self.file.set_len(size)?;
        self.end = size;
        self.allocated = 0;
        Ok(())
    }

    /// Appends the last blocks, or nothing, and cuts off what was preallocated. Nothing may be on its
    /// way.
    pub(super) fn finish(&mut self, io: &mut Io, last: &[u8]) -> io::Result<io::Result<()>> {
        if let Direct::Open { place } = std::mem::replace(&mut self.direct, Direct::Refused) {
            io.release(place);
        }
        let appended = self.file.write_all_at(last, self.end);
        let more = if appended.is_ok() { last } else { &[] };
        self.truncate(self.end + more.len() as u64)?;
        if let Some(digest) = &mut self.digest {
            digest.update(more);
        }
        Ok(appended)
    }

    /// SHA-256 of the finished file, if it was hashed from its beginning to its end.
    pub(super) fn digest(&mut self) -> Option<Digest> {
        self.digest.take().map(Context::finish)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }
}

/// Writes all bytes with `some`, which is given the rest of them and how many came before, or says how
/// many it wrote before it failed.
pub(super) fn put(
    bytes: &[u8],
    mut some: impl FnMut(&[u8], usize) -> io::Result<usize>,
) -> (usize, io::Result<()>) {
    let mut done = 0;
    while done < bytes.len() {
        match some(&bytes[done..], done) {
            Ok(0) => return (done, Err(io::ErrorKind::WriteZero.into())),
            Ok(more) => done += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (done, Err(error)),
        }
    }
    (done, Ok(()))
}

/// Writes that may write only a part: how much is what we want to know.
trait WriteSomeAt {
    fn write_some_at(&self, bytes: &[u8], at: u64) -> io::Result<usize>;
}

impl WriteSomeAt for File {
    #[expect(clippy::disallowed_methods, reason = "how much of it was written is what we want")]
    fn write_some_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        self.write_at(bytes, at)
    }
}

#[cfg(test)]
mod tests;
