//! What is kept of a recording: indexes segments as they are sealed and removes the oldest.
//!
//! - Segments, indices and what the open segment may grow by stay within the budget. What is removed is
//!   the oldest by the order of recording, except that a segment whose last packet is older than what is
//!   to be kept goes wherever it stands.
//! - While the disk has less free than the reserve, the oldest is removed, too; when nothing is left to
//!   remove, nothing is written until there is room again. What is not written then is dropped and counted
//!   by its job, as `spool_full`.
//! - Age is by the wall clock, as the packets' times are. When it is stepped forward, what is too old by
//!   it goes; when it is stepped back, what seems to be of the future stays until the budget needs its
//!   room, or until its time has come and gone.

use std::{
    collections::VecDeque,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use nix::sys::statvfs::statvfs;
use serde::Serialize;

use super::{
    index::{self, Index},
    store::{self, Name},
};
use crate::{
    error::with_causes,
    segment::{SegmentError, SegmentInfo, read::Reader, recover},
    spool::Budget,
};

/// A file takes whole blocks of the disk, bytes.
const DISK_BLOCK: u64 = 4096;

/// What of the budget is left to the first and last blocks of segments, which no job asks for.
const MARGIN: u64 = 64 << 10;

/// Bounds of a recording.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Most bytes on the disk.
    pub(super) bytes: u64,
    /// Bytes of the disk that stay free.
    pub(super) reserve: u64,
    /// How long packets are kept.
    pub(super) keep: Duration,
    /// Most bytes of a segment.
    pub(super) segment_bytes: u64,
}

type Clock = dyn Fn() -> u64 + Send;
type Free = dyn Fn(&Path) -> io::Result<u64> + Send;

/// What the keeper knows of the world; a test has another one.
pub(super) struct World {
    /// The wall clock, UTC nanoseconds.
    pub(super) now_ns: Box<Clock>,
    /// Bytes that are free on the disk of a folder.
    pub(super) free: Box<Free>,
}

impl World {
    pub(super) fn real() -> Self {
        let free = |folder: &Path| {
            let disk = statvfs(folder)?;
            Ok(disk.blocks_available() as u64 * disk.fragment_size() as u64)
        };
        Self { now_ns: Box::new(crate::clock::utc_ns), free: Box::new(free) }
    }
}

/// Segments that were removed, by why.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Older than what is kept.
    pub age: u64,
    /// The budget was used.
    pub budget: u64,
    /// The disk had less free than the reserve.
    pub reserve: u64,
}

/// A sealed segment.
#[derive(Clone, Copy, Debug)]
struct Kept {
    name: Name,
    /// What it and its index take on the disk.
    bytes: u64,
    first_ns: u64,
    last_ns: u64,
    indexed: bool,
}

pub(super) struct Keeper {
    folder: PathBuf,
    bounds: Bounds,
    world: World,
    budget: Arc<Budget>,
    /// In the order of recording.
    segments: VecDeque<Kept>,
    /// Whether the budget is taken so that nothing is written.
    stopped: bool,
    pub(super) removed: Removed,
    /// Damaged places found in sealed segments.
    pub(super) gaps: u64,
}

fn on_disk(bytes: u64) -> u64 {
    bytes.next_multiple_of(DISK_BLOCK)
}

impl Keeper {
    /// Takes over a folder: completes what a crash left, and counts what is there.
    pub(super) fn open(folder: &Path, bounds: Bounds, world: World) -> Result<Self, SegmentError> {
        let mut keeper = Self {
            folder: folder.to_path_buf(),
            bounds,
            world,
            budget: Arc::new(Budget::new(bounds.bytes - MARGIN, 0)),
            segments: VecDeque::new(),
            stopped: false,
            removed: Removed::default(),
            gaps: 0,
        };
        let listing = store::list(folder)?;
        for (name, visible) in &listing.segments {
            if !visible {
                recover(&name.hidden(folder))?;
            }
            keeper.adopt(*name)?;
        }
        for name in listing.indices {
            if !listing.segments.contains_key(&name) {
                remove(&name.index(folder));
            }
        }
        keeper.tidy();
        Ok(keeper)
    }

    /// Counts a segment that is there already.
    fn adopt(&mut self, name: Name) -> Result<(), SegmentError> {
        let path = name.segment(&self.folder);
        let metadata = match fs::metadata(&path) {
            Ok(metadata) => metadata,
            // It had no packets.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(source) => return Err(SegmentError { operation: "reading", path, source }),
        };
        let index = name.index(&self.folder);
        let summary = Index::peek(&index, metadata.len());
        let written =
            metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let written = written.map_or(0, |time| time.as_nanos() as u64);
        let index_bytes = fs::metadata(&index).map_or(0, |index| on_disk(index.len()));
        let kept = Kept {
            name,
            bytes: on_disk(metadata.len()) + index_bytes,
            // Until it is indexed, as good as any.
            first_ns: summary.map_or(written, |summary| summary.first_ns),
            last_ns: summary.map_or(written, |summary| summary.last_ns),
            indexed: summary.is_some(),
        };
        self.budget.add(kept.bytes);
        self.segments.push_back(kept);
        Ok(())
    }

    /// What the recorder's jobs take their bytes from.
    pub(super) fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// How many segments there are, and from when to when.
    pub(super) fn extent(&self) -> (usize, Option<(u64, u64)>) {
        let first = self.segments.iter().map(|kept| kept.first_ns).min();
        let last = self.segments.iter().map(|kept| kept.last_ns).max();
        (self.segments.len(), first.zip(last))
    }

    /// What is taken of the budget by what is there.
    pub(super) fn bytes(&self) -> u64 {
        let taken = if self.stopped { self.budget.limit() } else { 0 };
        self.budget.used().saturating_sub(taken)
    }

    /// The number of the next run.
    pub(super) fn next_run(&self) -> u32 {
        self.segments.back().map_or(1, |kept| kept.name.run + 1)
    }

    /// Takes in a segment that a job has sealed and the budget knows of.
    pub(super) fn sealed(&mut self, info: &SegmentInfo) {
        let Some(name) = Name::of(&info.path) else { return };
        if info.packets == 0 {
            remove(&info.path);
            self.budget.give_back(info.size);
            return;
        }
        let bytes = on_disk(info.size);
        self.budget.add(bytes - info.size);
        self.segments.push_back(Kept {
            name,
            bytes,
            first_ns: info.first_ns,
            last_ns: info.last_ns,
            indexed: false,
        });
        self.tidy();
        self.index_one();
    }

    /// Makes the index of the newest segment that has none; false when all have one.
    pub(super) fn index_one(&mut self) -> bool {
        let Some(at) = self.segments.iter().rposition(|kept| !kept.indexed) else { return false };
        // Whatever comes of it, it is not tried again.
        self.segments[at].indexed = true;
        let name = self.segments[at].name;
        if let Err(error) = self.index(name) {
            let path = name.segment(&self.folder);
            log::warn!("indexing {}: {}", path.display(), with_causes(&error));
        }
        true
    }

    fn index(&mut self, name: Name) -> Result<(), SegmentError> {
        let (segment, path) = (name.segment(&self.folder), name.index(&self.folder));
        let index = Index::build(&mut Reader::open(&segment)?, false)?;
        if index.summary.gaps > 0 {
            let gaps = index.summary.gaps;
            log::warn!("{}: damaged in {gaps} places, which are skipped", segment.display());
            self.gaps += gaps;
        }
        let bytes = index.to_bytes();
        let need = on_disk(bytes.len() as u64);
        while !self.budget.take(need) {
            // The segment itself may have to go.
            if self.remove_oldest().is_none() {
                return Ok(());
            }
            self.removed.budget += 1;
        }
        let kept = self.segments.iter_mut().find(|kept| kept.name == name);
        let Some(kept) = kept else {
            self.budget.give_back(need);
            return Ok(());
        };
        (kept.first_ns, kept.last_ns) = (index.summary.first_ns, index.summary.last_ns);
        // In place of one that could not be used.
        let before = fs::metadata(&path).map_or(0, |index| on_disk(index.len()));
        kept.bytes = kept.bytes - before + need;
        self.budget.give_back(before);
        index::write(&path, &bytes).map_err(|source| {
            self.budget.give_back(need);
            SegmentError { operation: "writing", path, source }
        })
    }

    /// Removes what is too old, and the oldest while there is no room.
    pub(super) fn tidy(&mut self) {
        let now = (self.world.now_ns)();
        let keep = self.bounds.keep.as_nanos() as u64;
        while let Some(at) =
            self.segments.iter().position(|kept| kept.last_ns.saturating_add(keep) < now)
        {
            self.remove(at);
            self.removed.age += 1;
        }
        // The open segment goes on growing, and the next one is begun before this is called again.
        let headroom = 2 * self.bounds.segment_bytes;
        while self.budget.wants_room(headroom) && self.remove_oldest().is_some() {
            self.removed.budget += 1;
        }
        self.keep_reserve();
    }

    fn keep_reserve(&mut self) {
        let free = match (self.world.free)(&self.folder) {
            Ok(free) => free,
            Err(error) => {
                log::warn!("asking for the free space of {}: {error}", self.folder.display());
                return;
            }
        };
        // By what they take and not by what gets free: a reader may hold what is removed for a while.
        let mut short = self.bounds.reserve.saturating_sub(free);
        while short > 0
            && let Some(bytes) = self.remove_oldest()
        {
            short = short.saturating_sub(bytes);
            self.removed.reserve += 1;
        }
        let stop = short > 0;
        if stop == self.stopped {
            return;
        }
        self.stopped = stop;
        if stop {
            log::warn!(
                "{}: the disk has {free} bytes free, less than the reserve of {}: nothing is recorded",
                self.folder.display(),
                self.bounds.reserve
            );
            self.budget.add(self.budget.limit());
        } else {
            log::warn!("{}: recording again", self.folder.display());
            self.budget.give_back(self.budget.limit());
        }
    }

    fn remove_oldest(&mut self) -> Option<u64> {
        (!self.segments.is_empty()).then(|| self.remove(0))
    }

    /// Removes a segment; gives the bytes that it took.
    fn remove(&mut self, at: usize) -> u64 {
        let Some(kept) = self.segments.remove(at) else { return 0 };
        // The index first: what is left of a crash in between is made again, or removed.
        remove(&kept.name.index(&self.folder));
        remove(&kept.name.segment(&self.folder));
        self.budget.give_back(kept.bytes);
        kept.bytes
    }
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("removing {}: {error}", path.display());
        }
        _ => {}
    }
}
