//! What the writers of one disk thread share: the ring that writes past the page cache.
//!
//! - The ring is made, and buffers are registered, when the first large write comes: a quiet job has
//!   none.
//! - What a kernel or a file system refuses is said once, and writes go through the page cache from
//!   then on.

use std::{
    fs::File,
    io,
    os::fd::AsFd as _,
    sync::{Arc, PoisonError},
    time::Duration,
};

use serde::Serialize;

use crate::{
    buffer::{Buffer, Pool},
    clock::utc_ns,
    latency::SharedLate,
    uring::{Landed, Ticket, Uring},
};

/// How a job's bytes got to its files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DiskUse {
    /// Bytes written past the page cache (`O_DIRECT`, `io_uring`).
    pub direct_bytes: u64,
    /// Bytes written through the page cache.
    pub cached_bytes: u64,
    /// Bytes thrown away, where nothing was to be written.
    pub discarded_bytes: u64,
    /// Why writes did not go past the page cache, if they were to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// Longest wait for one write, after which it is looked what else there is to do.
const WAIT: Duration = Duration::from_secs(1);

/// The ring, and what was done with it.
#[derive(Debug, Default)]
pub(crate) struct Io {
    ring: Option<Uring>,
    /// Places for files in the ring that are free.
    places: Vec<u32>,
    pools: Vec<Arc<Pool>>,
    pub(super) used: DiskUse,
    /// How late packets are written.
    late: SharedLate,
}

impl Io {
    /// Records in `late` how late packets are written. Writes past the page cache once it is
    /// [`prepared`](Self::prepare).
    pub(crate) fn new(late: SharedLate) -> Self {
        Self { late, ..Self::default() }
    }

    /// For this many writers, which are given buffers of these pools.
    pub(crate) fn prepare(&mut self, writers: usize, pools: Vec<Arc<Pool>>) {
        self.places = (0..writers as u32).rev().collect();
        self.pools = pools;
    }

    /// A buffer has been written.
    pub(super) fn note(&self, buffer: &Buffer) {
        let now = utc_ns();
        let mut late = self.late.lock().unwrap_or_else(PoisonError::into_inner);
        for seen in [buffer.first_ns, buffer.last_ns] {
            late.note(now.saturating_sub(seen));
        }
    }

    /// Goes past the page cache no more, and says so.
    pub(super) fn refuse(&mut self, why: String) {
        if self.used.refused.is_none() {
            log::warn!("{why}: segments are written through the page cache, which is slower");
            self.used.refused = Some(why);
        }
    }

    /// A place in the ring for a file, unless something was refused.
    pub(super) fn admit(&mut self, file: &File) -> Option<u32> {
        if self.used.refused.is_some() {
            return None;
        }
        if self.ring.is_none() {
            match self.make() {
                Ok(ring) => self.ring = Some(ring),
                Err(error) => {
                    self.refuse(format!("no io_uring: {error}"));
                    return None;
                }
            }
        }
        let (ring, place) = (self.ring.as_mut()?, self.places.pop()?);
        if let Err(error) = ring.set_file(place, Some(file.as_fd())) {
            self.places.push(place);
            self.refuse(format!("io_uring does not take a file: {error}"));
            return None;
        }
        Some(place)
    }

    fn make(&mut self) -> io::Result<Uring> {
        let mut ring = Uring::new(self.places.len())?;
        if let Err(error) = ring.register(std::mem::take(&mut self.pools)) {
            // Not worth a warning: the same writes, each a little dearer.
            log::info!("buffers are not registered with io_uring: {error}");
        }
        Ok(ring)
    }

    /// Takes a file's place back.
    pub(super) fn release(&mut self, place: u32) {
        if let Some(ring) = &mut self.ring
            && let Err(error) = ring.set_file(place, None)
        {
            log::warn!("taking a file out of io_uring: {error}");
        }
        self.places.push(place);
    }

    /// Begins a write to the file in a place.
    pub(super) fn write(&mut self, place: u32, offset: u64, buffer: Buffer) -> Ticket {
        let ring = self.ring.as_mut().expect("a file has a place in it");
        while !ring.has_room() {
            ring.land(WAIT);
        }
        ring.write(place, offset, buffer)
    }

    /// What became of a write, if it is over.
    pub(super) fn take(&mut self, ticket: Ticket) -> Option<Landed> {
        self.ring.as_mut()?.take(ticket)
    }

    /// Whether writes are in flight.
    pub(crate) fn is_busy(&self) -> bool {
        self.ring.as_ref().is_some_and(Uring::is_busy)
    }

    /// Takes note of writes that are over. If none is, waits for one for up to this long.
    pub(crate) fn land(&mut self, wait: Duration) {
        if let Some(ring) = &mut self.ring {
            ring.land(wait);
        }
    }

    /// Waits for a write.
    pub(super) fn wait(&mut self) {
        self.land(WAIT);
    }

    /// How bytes got to the files.
    pub(crate) fn into_used(self) -> DiskUse {
        self.used
    }
}
