//! Answers about the past: which packets of a window match a filter.
//!
//! - Only blocks are read whose time and sets can match. A limit takes the newest: blocks are then looked
//!   at from the newest back until no older one can have one of them, and read once more in the order of
//!   time. Memory grows with the limit (24 bytes each) and with how many blocks overlap in time.
//! - The answer is in the order of time also where the clock was stepped back and what was recorded is
//!   not. Packets of the same time are in the order of recording.
//! - A block whose checksum is wrong is skipped and counted; so is one whose segment expired meanwhile.
//!   Neither is an error.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    fs::File,
    io::{self, BufWriter, Write},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;
use thiserror::Error;

use super::{
    index::{Index, headers},
    store::{self, Name},
};
use crate::{
    filter::{Filter, FilterError},
    segment::{
        SegmentError, hidden,
        pcapng::{self, InterfaceStatistics},
        read::{self, Interface, Packet, Reader},
    },
};

/// Segments that stay open between two readings of their blocks, so that what was found is not lost when
/// they expire. Others are opened again. Well under the 1024 descriptors that a process usually may have.
const KEPT_OPEN: usize = 256;

/// What is asked.
#[derive(Clone, Copy, Debug)]
pub struct Query {
    /// First time, UTC nanoseconds.
    pub from_ns: u64,
    /// Last time, UTC nanoseconds, included.
    pub to_ns: u64,
    /// Which packets.
    pub filter: Filter,
    /// Only this many of them, the newest.
    pub limit: Option<u64>,
}

/// A question that could not be answered.
#[derive(Debug, Error)]
pub enum QueryError {
    /// No packet can match.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// No time lies in the window.
    #[error("the window ends before it begins")]
    Window,
    /// The recorder's folder cannot be read, or the answer not be written.
    #[error(transparent)]
    Segment(#[from] SegmentError),
    /// The answer could not be written to a stream.
    #[error("writing the answer")]
    Write(#[source] io::Error),
}

/// Blocks of a recorder, by what a query did with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Blocks {
    /// Read.
    pub read: u64,
    /// Not read, because nothing in them can match.
    pub skipped: u64,
    /// Skipped because they are damaged.
    pub corrupt: u64,
    /// Skipped because they were removed meanwhile.
    pub expired: u64,
}

/// What was found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Answer {
    /// Packets.
    pub packets: u64,
    /// What was kept of them, bytes.
    pub captured_bytes: u64,
    /// About how many packets passed that they stand for, by how they were sampled.
    pub estimated: f64,
    /// The first one's time, UTC nanoseconds; 0 without packets.
    pub first_ns: u64,
    /// The last one's.
    pub last_ns: u64,
    /// Size of the file, bytes.
    pub size: u64,
    /// What was read for it.
    pub blocks: Blocks,
}

/// Where a packet stands: its time, its segment, its place in that. No two are equal.
type Key = (u64, usize, u64);

/// A segment that has to do with the question.
pub(super) struct Segment {
    name: Name,
    pub(super) file: Option<Arc<File>>,
    interfaces: Vec<Interface>,
    /// Which of the answer's interfaces they are.
    among: Vec<u32>,
}

/// A block that may have matching packets.
#[derive(Clone, Copy)]
struct Place {
    segment: usize,
    offset: u64,
    length: u32,
    crc: u32,
    first_ns: u64,
    last_ns: u64,
    read: bool,
    /// It cannot be read.
    lost: bool,
}

/// A block with its matching packets, in the order of time.
struct Loaded {
    segment: usize,
    bytes: Vec<u8>,
    /// Key, start and length of each.
    hits: Vec<(Key, usize, usize)>,
    next: usize,
}

/// Reads what a recorder has written, from any process.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    /// The recorder's folder.
    pub fn open(folder: &Path) -> Result<Self, SegmentError> {
        store::list(folder)?;
        Ok(Self { folder: folder.to_path_buf() })
    }

    /// Whether a folder is one.
    pub fn is_one(folder: &Path) -> bool {
        store::list(folder).is_ok_and(|listing| !listing.segments.is_empty())
    }

    /// Writes what matches into a file, which is hidden until it is whole.
    pub fn query(&self, query: &Query, target: &Path) -> Result<Answer, QueryError> {
        let mut work = self.prepare(query)?;
        let (mut file, hidden) = hidden::create(target)?;
        let answer = work.answer(&mut file).and_then(|answer| {
            hidden::reveal(&file, &hidden, target)?;
            Ok(answer)
        });
        if answer.is_err() {
            drop(std::fs::remove_file(&hidden));
        }
        answer.map_err(|error| match error {
            QueryError::Write(source) => {
                SegmentError { operation: "writing", path: hidden, source }.into()
            }
            error => error,
        })
    }

    /// Writes what matches into a stream.
    pub fn query_into(
        &self,
        query: &Query,
        out: &mut (impl Write + ?Sized),
    ) -> Result<Answer, QueryError> {
        self.prepare(query)?.answer(out)
    }

    pub(super) fn prepare(&self, query: &Query) -> Result<Work<'_>, QueryError> {
        query.filter.check()?;
        if query.from_ns > query.to_ns {
            return Err(QueryError::Window);
        }
        let mut work = Work {
            folder: &self.folder,
            query: *query,
            segments: Vec::new(),
            places: Vec::new(),
            interfaces: Vec::new(),
            open: 0,
            blocks: Blocks::default(),
        };
        let listing = store::list(&self.folder)?;
        let mut newest = None;
        for (name, visible) in listing.segments {
            newest = Some(name);
            // Of a sealed segment, the head of the index may be enough.
            if visible && work.passes_over(name) {
                continue;
            }
            match store::index(&self.folder, name)? {
                Some(index) => work.survey(name, &index)?,
                None => work.blocks.expired += 1,
            }
        }
        // An answer without packets says what was recorded, too.
        if work.interfaces.is_empty()
            && let Some(name) = newest
            && let Some((file, path)) = store::open(&self.folder, name)?
        {
            work.interfaces = Reader::of(file, &path)?.interfaces().to_vec();
        }
        Ok(work)
    }
}

/// One question on its way to its answer.
pub(super) struct Work<'a> {
    folder: &'a Path,
    query: Query,
    pub(super) segments: Vec<Segment>,
    places: Vec<Place>,
    interfaces: Vec<Interface>,
    /// Segments that are open.
    open: usize,
    blocks: Blocks,
}

impl Work<'_> {
    fn overlaps(&self, first_ns: u64, last_ns: u64) -> bool {
        first_ns <= self.query.to_ns && last_ns >= self.query.from_ns
    }

    /// Whether the head of a sealed segment's index says that no packet is in the window.
    fn passes_over(&self, name: Name) -> bool {
        let size = std::fs::metadata(name.segment(self.folder)).map_or(0, |segment| segment.len());
        Index::peek(&name.index(self.folder), size)
            .is_some_and(|summary| !self.overlaps(summary.first_ns, summary.last_ns))
    }

    /// Takes note of the blocks of a segment that may match.
    fn survey(&mut self, name: Name, index: &Index) -> Result<(), SegmentError> {
        let segment = self.segments.len();
        let before = self.places.len();
        for entry in index.entries() {
            if !self.overlaps(entry.first_ns, entry.last_ns) || !entry.may_match(&self.query.filter)
            {
                self.blocks.skipped += 1;
                continue;
            }
            self.places.push(Place {
                segment,
                offset: entry.offset,
                length: entry.length,
                crc: entry.crc,
                first_ns: entry.first_ns,
                last_ns: entry.last_ns,
                read: false,
                lost: false,
            });
        }
        let summary = &index.summary;
        if self.overlaps(summary.first_ns, summary.last_ns) {
            self.blocks.corrupt += summary.gaps;
        }
        if self.places.len() == before {
            return Ok(());
        }
        let Some((file, path)) = store::open(self.folder, name)? else {
            self.blocks.expired += (self.places.len() - before) as u64;
            self.places.truncate(before);
            return Ok(());
        };
        let kept = if self.open < KEPT_OPEN {
            self.open += 1;
            Some(Arc::new(file.try_clone().map_err(|source| SegmentError {
                operation: "opening",
                path: path.clone(),
                source,
            })?))
        } else {
            None
        };
        let interfaces = Reader::of(file, &path)?.interfaces().to_vec();
        let among =
            interfaces.iter().map(|one| read::index_of(&mut self.interfaces, one)).collect();
        self.segments.push(Segment { name, file: kept, interfaces, among });
        Ok(())
    }

    /// Reads a block and finds its matching packets; `None` when it cannot be read.
    fn load(&mut self, at: usize) -> Option<Loaded> {
        let place = self.places[at];
        if place.lost {
            return None;
        }
        let segment = &self.segments[place.segment];
        let file = match &segment.file {
            Some(file) => Arc::clone(file),
            None => match store::open(self.folder, segment.name) {
                Ok(Some((file, _))) => Arc::new(file),
                Ok(None) => {
                    self.places[at].lost = true;
                    self.blocks.expired += 1;
                    return None;
                }
                Err(error) => {
                    log::warn!("{}", crate::error::with_causes(&error));
                    return self.corrupt(at);
                }
            },
        };
        let mut bytes = vec![0; place.length as usize];
        if let Err(error) = file.read_exact_at(&mut bytes, place.offset) {
            log::warn!("{}: {error}", segment.name.segment(self.folder).display());
            return self.corrupt(at);
        }
        if crc32fast::hash(&bytes) != place.crc {
            return self.corrupt(at);
        }
        let mut hits = Vec::new();
        let mut start = 0;
        while let Some(block) = bytes.get(start..).and_then(pcapng::first_block) {
            let packet = Packet::parse(block, &segment.interfaces);
            if packet.is_some_and(|packet| self.matches(&packet, &segment.interfaces)) {
                let time = packet.map_or(0, |packet| packet.timestamp_ns);
                let key = (time, place.segment, place.offset + start as u64);
                hits.push((key, start, block.len()));
            }
            start += block.len();
        }
        hits.sort_unstable();
        if !self.places[at].read {
            self.places[at].read = true;
            self.blocks.read += 1;
        }
        Some(Loaded { segment: place.segment, bytes, hits, next: 0 })
    }

    fn corrupt(&mut self, at: usize) -> Option<Loaded> {
        let place = &mut self.places[at];
        place.lost = true;
        self.blocks.corrupt += 1;
        let path = self.segments[place.segment].name.segment(self.folder);
        log::warn!("{}: the block at {} is damaged", path.display(), place.offset);
        None
    }

    fn matches(&self, packet: &Packet<'_>, interfaces: &[Interface]) -> bool {
        let link = interfaces[packet.interface as usize].link_type;
        (self.query.from_ns..=self.query.to_ns).contains(&packet.timestamp_ns)
            && self.query.filter.accepts(&headers(link, packet.data))
    }

    /// The oldest of the packets that the limit leaves; blocks without any of them are left out.
    fn cut(&mut self, limit: u64) -> Option<Key> {
        let mut newest: BinaryHeap<Reverse<Key>> = BinaryHeap::new();
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        self.places.sort_unstable_by_key(|place| (place.last_ns, place.segment, place.offset));
        for at in (0..self.places.len()).rev() {
            if let Some(Reverse(oldest)) = newest.peek()
                && newest.len() == limit
                && self.places[at].last_ns < oldest.0
            {
                self.blocks.skipped += at as u64 + 1;
                self.places.drain(..=at);
                break;
            }
            for (key, ..) in self.load(at).map(|loaded| loaded.hits).unwrap_or_default() {
                newest.push(Reverse(key));
                if newest.len() > limit {
                    newest.pop();
                }
            }
        }
        newest.pop().map(|Reverse(oldest)| oldest)
    }

    /// Writes the answer.
    pub(super) fn answer(&mut self, out: &mut (impl Write + ?Sized)) -> Result<Answer, QueryError> {
        let mut out = Counted { out: BufWriter::with_capacity(1 << 20, out), bytes: 0 };
        let mut blocks = Vec::new();
        read::head(&mut blocks, &self.in_words(), &self.interfaces);
        out.put(&blocks)?;

        let oldest = self.query.limit.map(|limit| self.cut(limit));
        let mut answer = Answer::default();
        let mut per_interface = vec![0_u64; self.interfaces.len()];
        // No packet at all, if a limit left none.
        if !matches!(oldest, Some(None)) {
            let oldest = oldest.flatten().unwrap_or_default();
            self.merge(oldest, |packet| {
                per_interface[packet.interface as usize] += 1;
                if answer.packets == 0 {
                    answer.first_ns = packet.timestamp_ns;
                }
                answer.last_ns = packet.timestamp_ns;
                answer.packets += 1;
                answer.captured_bytes += packet.data.len() as u64;
                answer.estimated += packet.weight;
                blocks.clear();
                packet.append_to(&mut blocks);
                out.put(&blocks)
            })?;
        }

        blocks.clear();
        for (interface, packets) in per_interface.into_iter().enumerate() {
            let statistics = InterfaceStatistics {
                interface: interface as u32,
                timestamp_ns: self.query.to_ns,
                start_ns: self.query.from_ns,
                end_ns: self.query.to_ns,
                delivered: Some(packets),
                ..InterfaceStatistics::default()
            };
            pcapng::interface_statistics(&mut blocks, &statistics);
        }
        out.put(&blocks)?;
        out.out.flush().map_err(QueryError::Write)?;
        Ok(Answer { size: out.bytes, blocks: self.blocks, ..answer })
    }

    /// Gives `each` the matching packets from this one on, in the order of time.
    fn merge(
        &mut self,
        oldest: Key,
        mut each: impl FnMut(&Packet<'_>) -> Result<(), QueryError>,
    ) -> Result<(), QueryError> {
        self.places.sort_unstable_by_key(|place| (place.first_ns, place.segment, place.offset));
        let mut loaded: Vec<Option<Loaded>> = Vec::new();
        let mut heads: BinaryHeap<Reverse<(Key, usize)>> = BinaryHeap::new();
        let mut free: Vec<usize> = Vec::new();
        let mut next = 0;
        loop {
            // Every block that may begin before the packet whose turn it is.
            while let Some(place) = self.places.get(next)
                && heads.peek().is_none_or(|Reverse(((time, ..), _))| place.first_ns <= *time)
            {
                let at = next;
                next += 1;
                let Some(mut block) = self.load(at) else { continue };
                block.hits.retain(|(key, ..)| *key >= oldest);
                if let Some((key, ..)) = block.hits.first() {
                    let slot = free.pop().unwrap_or(loaded.len());
                    heads.push(Reverse((*key, slot)));
                    loaded.resize_with(loaded.len().max(slot + 1), || None);
                    loaded[slot] = Some(block);
                }
            }
            let Some(Reverse((_, slot))) = heads.pop() else { return Ok(()) };
            let Some(block) = &mut loaded[slot] else { continue };
            let (_, start, length) = block.hits[block.next];
            let segment = &self.segments[block.segment];
            if let Some(packet) =
                Packet::parse(&block.bytes[start..start + length], &segment.interfaces)
            {
                let interface = segment.among[packet.interface as usize];
                each(&Packet { interface, ..packet })?;
            }
            block.next += 1;
            if let Some((key, ..)) = block.hits.get(block.next) {
                heads.push(Reverse((*key, slot)));
            } else {
                loaded[slot] = None;
                free.push(slot);
            }
        }
    }

    fn in_words(&self) -> String {
        let time = |ns: u64| {
            jiff::Timestamp::from_nanosecond(ns.into())
                .map_or_else(|_| "?".into(), |t| t.to_string())
        };
        let mut words =
            format!("recorded from {} to {}", time(self.query.from_ns), time(self.query.to_ns));
        match self.query.filter.to_string() {
            all if all.is_empty() => {}
            filter => words += &format!(", filter: {filter}"),
        }
        if let Some(limit) = self.query.limit {
            words += &format!(", the newest {limit}");
        }
        words
    }
}

/// Counts what is written.
struct Counted<W: Write> {
    out: BufWriter<W>,
    bytes: u64,
}

impl<W: Write> Counted<W> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), QueryError> {
        self.bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(QueryError::Write)
    }
}
